"""Closed-loop evaluation: how often a policy does what the sentence says, on scenes it has never seen.

    python eval.py                                                  # 100 episodes of out/ckpt.pt, about 20 s
    python eval.py --policies expert,random,policy --controls       # beside ceiling, floor and the controls
    python eval.py --episodes 500 --out results.json                # the headline figure

Controls, on the same scenes: `blind` sees a constant picture, `deaf` hears an empty sentence, `swap` is told another
sentence that is valid in the scene and is scored on it and on the original. A policy that looks and listens fails
blind and deaf, and obeys the swapped sentence.
"""
import argparse
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
import torch
from tqdm import tqdm

import gen_data
from gen_data import MAX_STEPS, N_BLOCKS, N_PADS, SUCCESS_STEPS, TASKS, TEST_SEED, Env, expert, make_instruction
from model import VLA

# ----------------------------------------------------------------------------- settings
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--ckpt", default=None, help="checkpoint, or a comma list of them (default out/ckpt.pt, else assets/ckpt.pt)")
add("--policies", default="policy", help="comma list of expert, random, policy (default policy: the checkpoints)")
add("--controls", action="store_true", help="also run the checkpoints blind, deaf and with swapped sentences")
add("--episodes", type=int, default=100, help="episodes per row (default 100)")
add("--tasks", default="pick_place", help=f"comma list of {', '.join(TASKS)} (default pick_place)")
add("--seed", type=int, default=TEST_SEED, help=f"first scene seed (default {TEST_SEED:,}: the reporting range; "
    "0 to 999,999 is for choosing)")
add("--execute", type=int, default=None, help="actions carried out per look (default: the checkpoint's own)")
add("--width", type=int, default=50, help="scenes played side by side (default 50); results depend on it in the last bits")
add("--out", type=Path, default=None, help="write results here as JSON, and one line per episode beside it (.jsonl)")
add("--latency", action="store_true", help="also time predict() on one core")
args = parser.parse_args()
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


def fail(message):
    print(f"eval.py: {message}", file=sys.stderr)
    sys.exit(2)


tasks, policies = args.tasks.split(","), args.policies.split(",")
for flag, names, known in (("--tasks", tasks, TASKS), ("--policies", policies, ("expert", "random", "policy"))):
    if wrong := [n for n in names if n not in known]:
        fail(f"{flag} {wrong[0]!r} is not one of {', '.join(known)}")
for flag, value in (("--episodes", args.episodes), ("--width", args.width), ("--execute", args.execute)):
    if value is not None and value < 1:
        fail(f"{flag} must be at least 1, not {value}")
if args.seed < 0:
    fail(f"--seed must not be negative, got {args.seed}")
models = []
if "policy" in policies:
    try:
        models = [VLA.load(path) for path in (args.ckpt.split(",") if args.ckpt else [None])]
    except ValueError as error:
        fail(error)
    for model in models:
        if args.execute and args.execute > model.config.chunk:
            fail(f"--execute {args.execute} is more than the checkpoint's chunk of {model.config.chunk}")
if args.out:
    try:
        if args.out.is_dir() or args.out.suffix != ".json":
            fail(f"cannot write {args.out}: --out is a file name that ends in .json")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        episode_file = open(args.out.with_suffix(".jsonl.part"), "w")
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror}")


# ----------------------------------------------------------------------------- playing
def wilson(k, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); well behaved at 0 and 1."""
    centre, half = k / n + z * z / 2 / n, z * ((k / n * (1 - k / n) + z * z / 4 / n) / n) ** 0.5
    return max((centre - half) / (1 + z * z / n), 0), min((centre + half) / (1 + z * z / n), 1)


def play(policy, control, seeds, pool, envs, bar):
    """Plays one scene per seed side by side; returns a list of result dicts. The batch keeps its width to the end."""
    n = len(seeds)
    results, observations, told = [None] * n, [None] * n, [None] * n

    def begin(i):
        env = envs[i]
        observations[i], info = env.reset(seeds[i])
        env.original = env.block, env.pad, info["instruction"]
        env.original_steps, env.total_reward, env.dice = 0, 0.0, np.random.default_rng([seeds[i], 2])
        if control == "swap":                                  # the environment scores what the policy is told
            other = gen_data.another_pair(env, env.dice)
            slots = dict(block=env.block_colors[other[0]], pad=env.pad_colors[other[1]])
            env.set_instruction(make_instruction(env.task, slots, env.dice))
            observations[i] = env.observe()
        told[i] = "" if control == "deaf" else env.instruction

    def step(i, action):
        env = envs[i]
        observations[i], reward, success, truncated, info = env.step(action)
        env.total_reward += reward
        block, pad, sentence = env.original
        env.original_steps = env.original_steps + 1 if env.placed(block, pad) else 0
        original = env.original_steps >= SUCCESS_STEPS
        if success or truncated or original or info["diverged"]:
            results[i] = dict(seed=seeds[i], told=told[i], original=sentence, success=bool(success and not info["diverged"]),
                              original_success=bool(original), touched=info["touched"], block=info["block"],
                              reward=env.total_reward / env.steps, steps=env.steps, violations=info["violations"],
                              diverged=info["diverged"])
            bar.update()

    list(pool.map(begin, range(n)))
    if isinstance(policy, torch.nn.Module):
        execute = args.execute or policy.config.execute
    for t in range(MAX_STEPS):
        alive = [i for i in range(n) if results[i] is None]
        if not alive:
            break
        if policy == "expert":
            actions = {i: expert(envs[i]) for i in alive}
        elif policy == "random":
            actions = {i: envs[i].dice.uniform(-1, 1, 4) for i in alive}
        else:
            if t % execute == 0:
                if control == "blind":
                    grey = {f"{c}_image": np.full((64, 64, 3), 127, np.uint8) for c in policy.config.cameras}
                    seen = [o | grey for o in observations]
                chunk = policy.plan(seen if control == "blind" else observations, told)
            actions = {i: chunk[i, t % execute] for i in alive}
        list(pool.map(step, alive, [actions[i] for i in alive]))
    return results


def evaluate(name, policy, control):
    """One row of the table."""
    cameras = policy.config.cameras if isinstance(policy, torch.nn.Module) else ()
    seeds = list(range(args.seed, args.seed + args.episodes))
    start, results = time.time(), []
    with ThreadPoolExecutor() as pool:                         # MuJoCo lets go of the interpreter lock
        envs = list(pool.map(lambda _: Env(tasks, cameras), range(min(args.width, len(seeds)))))
        bar = tqdm(total=len(seeds), desc=f"{name} {control}".strip(), unit="episode", disable=not sys.stderr.isatty())
        with bar:
            for i in range(0, len(seeds), args.width):
                results += play(policy, control, seeds[i:i + args.width], pool, envs, bar)
    n, k = len(results), sum(r["success"] for r in results)
    low, high = wilson(k, n)
    reward, steps = [r["reward"] for r in results], [r["steps"] for r in results]
    failed = [r for r in results if not r["success"]]
    row = dict(policy=name, control=control or "none", task=args.tasks, split="reporting" if args.seed >= TEST_SEED else "choosing", k=k, n=n, low=low, high=high,
               reward=float(np.mean(reward)), reward_sd=float(np.std(reward)), steps=float(np.mean(steps)),
               steps_sd=float(np.std(steps)), violations=int(sum(r["violations"] for r in results)),
               diverged=sum(r["diverged"] for r in results), original=sum(r["original_success"] for r in results),
               wrong_first=sum(r["touched"] not in (None, r["block"]) for r in failed),
               untouched=sum(r["touched"] is None for r in failed), seconds=time.time() - start)
    if args.out:
        for r in results:
            print(json.dumps(dict(policy=name, control=control or "none", **r)), file=episode_file, flush=True)
    text = f"{k}/{n} = {100 * k / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    if control == "swap":
        a, b = wilson(row["original"], n)
        text += f" on the sentence given, {row['original']}/{n} = {100 * row['original'] / n:.1f}% [{100 * a:.1f}, {100 * b:.1f}] on the original"
    print(f"{name:8} {control or '-':6} {text}; reward {row['reward']:.2f} ± {row['reward_sd']:.2f}, steps {row['steps']:.0f} ± "
          f"{row['steps_sd']:.0f}, violations {row['violations']}, of {n - k} failures {row['wrong_first']} touched a wrong "
          f"block first and {row['untouched']} none; {row['seconds']:.0f} s", flush=True)
    return row


# ----------------------------------------------------------------------------- the table
print(f"{args.episodes} scenes from seed {args.seed}; success [95% Wilson interval]; chance, one of "
      f"{N_BLOCKS * N_PADS} possible answers, is {100 / N_BLOCKS / N_PADS:.1f}%")
rows = []
for name in policies:
    if name != "policy":
        rows.append(evaluate(name, name, ""))
for model in models:
    for control in ("", *(("blind", "deaf", "swap") if args.controls and model.config.model == "vla" else ())):
        try:
            rows.append(evaluate(model.config.model, model, control))
        except ValueError as error:                            # other words, cameras or states than this world's
            fail(error)
fingerprint = dict(torch=torch.__version__, mujoco=mujoco.__version__, numpy=np.__version__, seed=args.seed,
                   threads=torch.get_num_threads(), cpu=torch.backends.cpu.get_cpu_capability())
if args.latency:
    torch.set_num_threads(1)
    for model, row in zip(models, [r for r in rows if r["policy"] in ("vla", "bc") and r["control"] == "none"]):
        env, execute = Env(tasks, model.config.cameras), model.config.execute
        obs, info = env.reset(args.seed)
        model.reset()
        times = []
        for _ in range(50 * execute):
            begin = time.perf_counter()
            model.predict(obs, info["instruction"])
            times.append((time.perf_counter() - begin) * 1e3)
        times = np.array(times).reshape(-1, execute)[2:]       # ms; a row is a look and what is taken from its chunk
        kinds = {"fresh look": times[:, 0], "from the chunk": times[:, 1:], "averaged over a chunk": times.mean(1)}
        row["latency_ms"] = {k: np.percentile(v, (50, 95)).tolist() for k, v in kinds.items() if v.size}
        print(f"{model.config.model} predict on one core, p50 and p95: " + ", ".join(
            f"{k} {p50:.2f} and {p95:.2f} ms" for k, (p50, p95) in row["latency_ms"].items()))
if args.out:
    episode_file.close()
    Path(episode_file.name).replace(args.out.with_suffix(".jsonl"))
    args.out.write_text(json.dumps(dict(rows=rows, fingerprint=fingerprint), indent=1))
