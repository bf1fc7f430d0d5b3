"""Closed-loop evaluation: how often a policy does what the sentence says, on scenes it has never seen.

    python eval.py                                                  # 100 episodes of out/ckpt.pt, 10 to 18 s
    python eval.py --policies expert,random,policy --controls       # beside ceiling, floor and the controls
    python eval.py --episodes 500 --out results.json                # the headline figure
    python eval.py --split phrasing                                 # in words that demonstrations never used
    python eval.py --instructions mine.txt                          # in yours: lines of task<TAB>sentence
    python eval.py --ckpt clean.pt,randomized.pt --transfer --out transfer.json     # and transfer.png
    python eval.py --ablate assets/ablations.txt --episodes 200 --seed 0            # trains and scores each line's settings

Controls, on the same scenes: `blind` sees a constant picture, `deaf` hears an empty sentence, `swap` is told another
sentence that is valid in the scene and is scored on it and on the original, `retarget` is told another at a random moment and
scored on that one. A policy that looks and listens fails blind and deaf, and obeys the other two.
"""
import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from gen_data import (DEMO_SEED, FACTORS, GUARDS, HELD_OUT, MAX_STEPS, PHRASES, SLOTS, SPLITS, SUCCESS_STEPS, TASKS, TEST_SEED, VALID_SEED, Env,
                      expert, fill, make_instruction, parse_instruction, task_list)
from model import VLA


def fail(message):
    print(f"eval.py: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------- settings
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error, add = fail, parser.add_argument                 # one sentence, without the usage
add("--ckpt", default=None, help="checkpoint, or a comma list of them (default out/ckpt.pt, else assets/ckpt.pt)")
add("--policies", default="policy", help="comma list of expert, random, policy (default policy: the checkpoints)")
add("--controls", action="store_true", help="also run the checkpoints blind, deaf, with swapped and with changing sentences")
add("--episodes", type=int, default=100, help="episodes per policy and control, shared among the tasks (default 100)")
add("--tasks", default=None, help=f"all, or a comma list of {', '.join(TASKS)} (default: what the checkpoint was trained on)")
add("--split", default="seen", choices=SPLITS, help="seen: as in the demonstrations; phrasing: their held-out sentence patterns; "
    "combo: their held-out colours; crowd: two more blocks (default seen)")
add("--instructions", type=Path, default=None, help="file of lines task<TAB>sentence with {block} {pad} {lower} {direction} {way}: scores each")
add("--sensitivity", action="store_true", help="also: how much the action depends on the sentence, before and after training")
add("--randomize", type=float, default=0.0, help="0 to 1: how far the world may be from normal (default 0)")
add("--randomize_only", default=None, choices=tuple(FACTORS), help="let this alone differ (default: everything)")
add("--transfer", action="store_true", help="the checkpoints in the normal world, with each factor, with all; a heat map beside --out")
add("--ablate", type=Path, default=None, help="file of lines NAME: FLAGS OF train.py, of which the one named `all` holds for "
    "every other: trains each in out/ablate/NAME, unless that is done, and scores them in one table")
add("--guard", default="on", choices=("on", "off"), help="the safety guard between every policy and the servos (default on)")
add("--seed", type=int, default=TEST_SEED, help=f"first scene seed (default {TEST_SEED:,}: the reporting range; "
    "0 to 999,999 is for choosing, 2,000,000 and up are the demonstrations')")
add("--execute", type=int, default=None, help="actions carried out per look (default: the checkpoint's own)")
add("--ensemble", action="store_const", const=True, help="look at every step and average what all chunks say about it")
add("--flow_steps", type=int, default=None, help="of a flow head's integration (default: the checkpoint's own)")
add("--width", type=int, default=50, help="scenes played side by side (default 50); results depend on it in the last bits")
add("--out", type=Path, default=None, help="write results here as JSON, and one line per episode beside it (.jsonl)")
add("--latency", action="store_true", help="also time predict() on one core")
args = parser.parse_args()
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


policies = args.policies.split(",")
if wrong := [n for n in policies if n not in ("expert", "random", "policy")]:
    fail(f"--policies {wrong[0]!r} is not one of expert, random, policy")
if not 0 <= args.randomize <= 1:
    fail(f"--randomize must be from 0 to 1, not {args.randomize}")
for flag, value in (("--episodes", args.episodes), ("--width", args.width)):
    if value < 1:
        fail(f"{flag} must be at least 1, not {value}")
if args.seed < 0:
    fail(f"--seed must not be negative, got {args.seed}")
ranges = dict(choosing=VALID_SEED, reporting=TEST_SEED, demonstrations=DEMO_SEED)
seed_range, last_range = ([name for name, first in ranges.items() if seed >= first][-1] for seed in (args.seed, args.seed + args.episodes - 1))
if seed_range != last_range:
    fail(f"{args.episodes} scenes from seed {args.seed} reach from the range for {seed_range} into that for {last_range}; choose another --seed")


def read_ablations(path):
    """{name: checkpoint} of the lines of the file, trained as far as they are not yet. Lines with the same flags share one."""
    if args.ckpt or args.transfer or args.controls or args.instructions or "policy" not in policies:
        fail("--ablate scores the policies that it trains; it goes without --ckpt, --transfer, --controls and --instructions")
    try:
        lines = [line.partition(":") for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    try:
        flags = {name.strip(): shlex.split(rest) for name, colon, rest in lines if colon}
    except ValueError as error:
        fail(f"{path} has a quotation that does not end ({error})")
    common = flags.pop("all", [])
    if len(lines) - (common != []) != len(flags) or not flags or any(re.search(r"[^\w. +-]", name) for name in flags):
        fail(f"{path} should have lines NAME: FLAGS OF train.py, each with a name of its own in letters, digits and spaces")
    found = {}
    for name, own in flags.items():
        folder = Path("out/ablate") / next(n for n in flags if flags[n] == own)
        found[name], told, note = folder / "ckpt.pt", shlex.join(common + own), folder / "flags.txt"
        if note.exists() and note.read_text() != told:
            fail(f"{folder} was trained with other flags ({note.read_text()}); delete it or give the line another name")
        if not (folder / "curve.png").exists():                # which is what a training ends with
            print(f"{name}: {told}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(told)
            where = ["--resume", str(folder)] if (folder / "resume.pt").exists() else ["--overwrite", "--out_dir", str(folder)]
            command = [sys.executable, str(Path(__file__).parent / "train.py"), *common, *own, "--eval_interval", "0", *where]
            before = signal.signal(signal.SIGINT, lambda *_: None)   # Ctrl-C is for train.py, which saves; wait until it has
            code = subprocess.run(command).returncode
            signal.signal(signal.SIGINT, before)
            if code:
                sys.exit(code)
    return found


try:
    tasks = task_list(args.tasks) if args.tasks else []
except ValueError as error:
    fail(f"--tasks {error}")
if args.out and (args.out.is_dir() or args.out.suffix != ".json" or args.out.parent.exists() and not args.out.parent.is_dir()):
    fail(f"cannot write {args.out}: --out is a file name that ends in .json, in a folder")
if (args.transfer or args.instructions) and policies != ["policy"]:
    fail("--transfer and --instructions score checkpoints alone, without --policies")
if args.transfer + args.controls + bool(args.instructions) > 1:
    fail("--transfer, --instructions and --controls are three evaluations; choose one at a time")
if args.controls and args.split == "combo":
    fail("--controls tells other things that can be asked for in a scene, and those of --split combo are too few; use another split")
if args.randomize_only and (args.transfer or not args.randomize):
    fail("--randomize_only goes with --randomize and without --transfer, which plays every factor")
ablations = read_ablations(args.ablate) if args.ablate else {}
models, paths = [], list(dict.fromkeys(ablations.values())) or (args.ckpt.split(",") if args.ckpt else [None])
if "policy" in policies:
    try:
        models = [VLA.load(path) for path in paths]
    except ValueError as error:
        fail(error)
    for model in models:
        for flag in ("execute", "ensemble", "flow_steps"):
            if getattr(args, flag) is not None:
                setattr(model.config, flag, getattr(args, flag))
        if args.flow_steps and model.config.head != "flow":
            fail(f"--flow_steps belongs to checkpoints with --head flow, and this one has {model.config.head}")
        try:
            model.config.check()
        except ValueError as error:
            fail(error)
if args.transfer and not (models and args.out):
    fail("--transfer needs checkpoints and --out")
known = [task for task in TASKS if any(task in m.config.tasks for m in models)] or ["pick_place"]
tasks = tasks or known
if args.split == "combo" and not (tasks := [t for t in tasks if t in HELD_OUT]):
    fail(f"--split combo: no colours are held out in these tasks, only in {', '.join(HELD_OUT)}")


def read_instructions(path):
    """[(task, pattern, slots that the pattern fixes), ..] of a file of lines task<TAB>sentence."""
    forms = {form: "direction" if form == "towards" else "way" for words in PHRASES.values() for form in words}
    found, example = [], dict(block="red", pad="blue", lower="blue", direction="left", way="open")
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    if not lines:
        fail(f"{path} is empty; it should have lines of a task, a tab and a sentence")
    for number, line in enumerate(lines, 1):
        task, _, pattern = (part.strip() for part in line.partition("\t"))
        if not pattern or task not in TASKS:
            fail(f"{path}, line {number}: it should begin with one of {', '.join(TASKS)} and a tab, not {line[:40]!r}")
        named = re.findall(r"{([^}]*)}", pattern)
        if wrong := [slot for slot in named if slot not in {**SLOTS, **forms}]:
            fail(f"{path}, line {number}: {{{wrong[0]}}} is not one of {', '.join('{%s}' % s for s in SLOTS)}")
        missing = set(TASKS[task].slots) - {forms.get(slot, slot) for slot in named}
        try:                                                   # said in plain words, such as "open" or "left"
            said = parse_instruction(fill(pattern, example))[1] if missing else {}
            found.append((task, pattern, {slot: said[slot] for slot in missing}))
        except (ValueError, KeyError):
            fail(f"{path}, line {number}: a sentence for {task} must say {', '.join('{%s}' % s for s in TASKS[task].slots)}")
    return found


wordings = read_instructions(args.instructions) if args.instructions else []
if args.out:
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        episode_file = open(args.out.with_suffix(".jsonl.part"), "w")
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror}")


# ----------------------------------------------------------------------------- playing
def wilson(k, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); well behaved at 0 and 1."""
    centre, half = k / n + z * z / 2 / n, z * ((k / n * (1 - k / n) + z * z / 4 / n) / n) ** 0.5
    return max((centre - half) / (1 + z * z / n), 0), min((centre + half) / (1 + z * z / n), 1)


def play(policy, control, seeds, pool, envs, bar, wording):
    """Plays one scene per seed side by side; returns a list of result dicts. The batch keeps its width to the end.
    wording: (task, pattern, fixed slots) to use instead of the scenes' own tasks and sentences."""
    n = len(seeds)
    results, observations, told = [None] * n, [None] * n, [None] * n

    def begin(i):
        env, options = envs[i], dict(task=tasks[seeds[i] % len(tasks)])
        if wording:
            options = dict(task=wording[0], slots=wording[2])
        observations[i], info = env.reset(seeds[i], options)
        if wording:
            env.set_request(env.request, fill(wording[1], env.slots))
        env.original, env.original_sentence = (env.request[0], env.which), env.instruction
        env.original_steps, env.total_reward, env.dice = 0, 0.0, np.random.default_rng([seeds[i], 2])
        env.chance = 1 / sum(env.can_ask(task, slots) for task in env.tasks for slots in env.requests(task))
        env.switch = int(env.dice.integers(5, 40)) if control == "retarget" else None
        if control == "swap":                                  # the environment scores what the policy is told
            another(i)
        told[i] = "" if control == "deaf" else env.instruction

    def another(i):
        """Tells it something else that is valid in the scene as it is now."""
        env = envs[i]
        request = env.draw_request(env.dice, avoid=env.request) or env.request
        env.set_request(request, make_instruction(*request, env.dice, args.split == "phrasing"))
        observations[i], told[i] = env.observe(), env.instruction

    def step(i, action):
        env = envs[i]
        observations[i], reward, success, truncated, info = env.step(action)
        env.total_reward += reward
        task, which = env.original
        env.original_steps = env.original_steps + 1 if TASKS[task].success(env, **which) else 0
        original = env.original_steps >= SUCCESS_STEPS
        if env.switch is not None and (success or env.steps >= env.switch) and not info["diverged"]:
            env.switch, env.total_reward = None, 0.0
            another(i)
        elif success or truncated or info["diverged"] or original and control == "swap":
            results[i] = dict(seed=seeds[i], task=task, told=told[i], original=env.original_sentence,
                              success=bool(success and not info["diverged"]), original_success=bool(original),
                              touched=info["touched"], block=info.get("block"), reward=env.total_reward / env.steps,
                              steps=env.steps, violations=info["violations"], guard=info["guard"],
                              force=info["force"], diverged=info["diverged"], chance=env.chance)
            bar.update()

    list(pool.map(begin, range(n)))
    if isinstance(policy, torch.nn.Module):
        policy.reset()
        grey = {f"{c}_image": np.full((64, 64, 3), 127, np.uint8) for c in policy.config.cameras}
    for _ in range(2 * MAX_STEPS):
        alive = [i for i in range(n) if results[i] is None]
        if not alive:
            break
        if policy == "expert":
            actions = {i: expert(envs[i]) for i in alive}
        elif policy == "random":
            actions = {i: envs[i].dice.uniform(-1, 1, 4) for i in alive}
        else:
            actions = policy.act([o | grey for o in observations] if control == "blind" else observations, told)
        list(pool.map(step, alive, [actions[i] for i in alive]))
    return results


def evaluate(name, policy, control="", changed=None, wording=None, **about):
    """Rows of one policy: one per task and, if there are several, one for all of them. changed: of the world, arguments of Env.
    about: what else the rows should say."""
    changed = changed or (dict(randomize=args.randomize, randomize_only=args.randomize_only) if args.randomize else {})
    cameras = policy.config.cameras if isinstance(policy, torch.nn.Module) else ()
    allowed = [t for t in TASKS if t in tasks or t in known]   # what else could be asked for
    new = lambda _: Env(allowed, cameras, split=args.split, guard=args.guard == "on", **changed)
    about, seeds = about | changed, list(range(args.seed, args.seed + args.episodes))
    start, results = time.time(), []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:        # MuJoCo lets go of the interpreter lock, but more wait for it
        envs = list(pool.map(new, range(min(args.width, args.episodes))))
        with tqdm(total=len(seeds), desc=f"{name} {control}".strip(), unit="episode", disable=not sys.stderr.isatty()) as bar:
            for i in range(0, len(seeds), args.width):
                results += play(policy, control, seeds[i:i + args.width], pool, envs, bar, wording)
    if args.out:
        for r in results:
            print(json.dumps(dict(policy=name, control=control or "none", **about, **r)), file=episode_file, flush=True)
    seconds, found = time.time() - start, []
    for task in [*dict.fromkeys(r["task"] for r in results), "all"]:
        mine = [r for r in results if task in ("all", r["task"])]
        n, k = len(mine), sum(r["success"] for r in mine)
        failed, (low, high) = [r for r in mine if not r["success"]], wilson(k, n)
        mean = lambda key: float(np.mean([r[key] for r in mine]))
        found.append(dict(
            policy=name, control=control or "none", task=task, split=args.split, k=k, n=n, low=low, high=high,
            range=seed_range, reward=mean("reward"),
            reward_sd=float(np.std([r["reward"] for r in mine])), steps=mean("steps"),
            steps_sd=float(np.std([r["steps"] for r in mine])), violations=sum(r["violations"] for r in mine),
            guard={g: sum(r["guard"][g] for r in mine) for g in GUARDS}, force_p95=float(np.percentile([r["force"] for r in mine], 95)),
            force_max=max(r["force"] for r in mine), diverged=sum(r["diverged"] for r in mine),
            original=sum(r["original_success"] for r in mine),
            wrong_first=sum(r["touched"] not in (None, r["block"]) for r in failed), untouched=sum(r["touched"] is None for r in failed),
            chance=mean("chance"), seconds=seconds, **about))
    if len(found) == 2:
        found = found[:1]
    row = found[-1]
    text = percent(row)
    if control == "swap":
        text += f" on the sentence given, {percent(dict(row, k=row['original']))} on the original"
    print(f"{name:8} {control or '-':8} {text}; reward {row['reward']:.2f} ± {row['reward_sd']:.2f}, steps {row['steps']:.0f} ± "
          f"{row['steps_sd']:.0f}, guard {', '.join(f'{v} {k}' for k, v in row['guard'].items() if v) or 'never'}, force on a block p95 "
          f"{row['force_p95']:.0f} N, max {row['force_max']:.0f} N; of {row['n'] - row['k']} failures {row['wrong_first']} touched a wrong "
          f"block first and {row['untouched']} none; {row['seconds']:.0f} s", flush=True)
    return found


def percent(row):
    low, high = wilson(row["k"], row["n"])
    return f"{row['k']}/{row['n']} = {100 * row['k'] / row['n']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


# ----------------------------------------------------------------------------- the table
fingerprint = dict(torch=str(torch.__version__), mujoco=mujoco.__version__, numpy=np.__version__, cpu=torch.backends.cpu.get_cpu_capability(),
                   threads=torch.get_num_threads(), seed=args.seed)
print(", ".join(f"{k} {v}" for k, v in fingerprint.items()))
for model in models:
    print(f"{model.path}: step {model.step}, commit {model.fingerprint.get('commit')}, data {model.fingerprint.get('data')}"
          + "; to train it again, delete its folder" * bool(ablations))
rows, headline = [], {}                                        # of each checkpoint, the row for all tasks
try:
    if not args.transfer and not wordings:
        print(f"{args.episodes} scenes from seed {args.seed}, split {args.split}, tasks {', '.join(tasks)}; success [95% Wilson "
              "interval]", flush=True)
        for name in policies:
            if name != "policy":
                rows += evaluate(name, name)
        for model in models:
            for control in ("", *(("blind", "deaf", "swap", "retarget") if args.controls and model.config.model == "vla" else ())):
                if len(models) > 1:
                    print(f"{model.path}:", end=" ")
                rows += evaluate(model.config.model, model, control, ckpt=model.path)
                if not control:
                    headline[model] = rows[-1]
        print(f"chance, for who moves perfectly and picks any of the things that could be asked for, is {100 * rows[-1]['chance']:.1f}%")
        columns = list(dict.fromkeys((len(models) > 1 and r.get("ckpt") or r["policy"], r["control"]) for r in rows))
        if len(tasks) > 1 and not args.ablate:
            names = [p if c == "none" else f"{p} {c}" if len(models) > 1 else c for p, c in columns]
            print(f"| task | {' | '.join(names)} |\n{'| --- ' * (len(names) + 1)}|")
            for task in [*tasks, "all"]:
                cells = [r for r in rows if r["task"] == task]
                if cells:
                    print(f"| {task} | " + " | ".join(percent(r) for r in cells) + " |")
    for model in models if wordings else ():                   # anybody's words
        for wording in wordings:
            print(f"{model.path}, {wording[0]}: {wording[1]}")
            try:
                rows += evaluate(model.config.model, model, wording=wording, ckpt=model.path, sentence=wording[1])
            except ValueError as error:
                print(f"         not understood: {error}")
    if args.transfer:
        amount = args.randomize or 1.0
        worlds = {"normal": {}, **{f: dict(randomize=amount, randomize_only=f) for f in FACTORS}, "all": dict(randomize=amount)}
        matrix = []
        for model in models:
            matrix.append([])
            for name, changed in worlds.items():
                print(f"{model.path}, {name}:", end=" ")
                rows.append(evaluate(model.config.model, model, changed=changed or dict(randomize=0.0), ckpt=model.path, world=name)[-1])
                matrix[-1].append(rows[-1]["k"] / rows[-1]["n"])
except ValueError as error:                                    # other words, cameras or states than this world's
    if args.out:
        episode_file.close()
        os.unlink(episode_file.name)
    fail(error)
if args.transfer:
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(models)), layout="constrained")     # no pyplot: draws without a display
    axes = figure.subplots()
    axes.imshow(matrix, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(worlds)), list(worlds)), axes.set_yticks(range(len(models)), [Path(model.path).stem for model in models])
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center")
    axes.set_title(f"success in %, {args.episodes} scenes a cell; world randomised by {amount:g} in")
    figure.savefig(args.out.with_suffix(".png"), dpi=110)

# ----------------------------------------------------------------------------- other measurements
if args.sensitivity:
    for model in [m for m in models if m.config.model == "vla"]:
        torch.manual_seed(0)
        fresh = type(model)(model.config)
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith(("_mean", "_std"))}, strict=False)
        env, difference = Env([t for t in TASKS if t in model.config.tasks], model.config.cameras), []
        for seed in range(args.seed, args.seed + args.episodes):
            obs, info = env.reset(seed)
            dice = np.random.default_rng([seed, 2])
            other = env.draw_request(dice, avoid=env.request) or env.request
            told = [info["instruction"], make_instruction(*other, dice)]
            difference.append([np.abs(np.diff(policy.plan([obs, obs], told)[:, 0], axis=0)).mean() for policy in (fresh.eval(), model)])
        before, after = np.mean(difference, 0)
        print(f"{model.config.model} sensitivity: two sentences in one scene differ in the next action by {before:.3f} before training "
              f"and {after:.3f} after (mean of 4 numbers, each in [-1, 1]; {len(difference)} scenes)")
        headline.get(model, {})["sensitivity"] = [float(before), float(after)]
if args.latency or args.ablate:
    torch.set_num_threads(1)
    for model in models:
        env, execute = Env(tasks, model.config.cameras), 1 if model.config.ensemble else model.config.execute
        obs, info = env.reset(args.seed)
        model.reset()
        times = []
        for _ in range(50 * execute):
            begin = time.perf_counter()
            model.predict(obs, info["instruction"])
            times.append((time.perf_counter() - begin) * 1e3)
        times = np.array(times).reshape(-1, execute)[2:]       # ms; a row is a look and what is taken from its chunk
        kinds = {"fresh look": times[:, 0], "from the chunk": times[:, 1:], "averaged over a chunk": times.mean(1)}
        latency = headline.get(model, {})["latency_ms"] = {k: np.percentile(v, (50, 95)).tolist() for k, v in kinds.items() if v.size}
        print(f"{model.config.model} predict on one core, p50 and p95: " + ", ".join(
            f"{k} {p50:.2f} and {p95:.2f} ms" for k, (p50, p95) in latency.items()))
if args.ablate:
    print("| settings | success | parameters | samples/s | p50 of a fresh look |\n| --- | --- | --- | --- | --- |")
    curves = {}                                                # of lines named WORD NUMBER: {word: {number: row}}
    for name, path in ablations.items():
        log = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines()]
        model = models[paths.index(path)]
        row = headline[model]
        row.update(parameters=sum(p.numel() for p in model.parameters()),
                   samples_per_s=float(np.median([line["samples_per_s"] for line in log])))
        row["name"] = ", ".join(n for n, p in ablations.items() if p == path)
        print(f"| {name} | {percent(row)} | {row['parameters']:,} | {row['samples_per_s']:.0f} | "
              f"{row['latency_ms']['fresh look'][0]:.1f} ms |")
        word, _, number = name.rpartition(" ")
        if number.isdigit():
            curves.setdefault(word, {})[int(number)] = row
    curves = {word: dict(sorted(curve.items())) for word, curve in curves.items() if len(curve) > 1}
    if args.out and curves:
        figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)
        for axis, (word, curve) in zip(axes[0], curves.items()):
            k, low, high = (100 * np.array(v) for v in zip(*((r["k"] / r["n"], r["low"], r["high"]) for r in curve.values())))
            axis.errorbar(list(curve), k, np.maximum([k - low, high - k], 0), fmt="o-", capsize=3)
            axis.set_xscale("log"), axis.minorticks_off(), axis.grid(alpha=0.3)
            sizes = len({r["parameters"] for r in curve.values()}) > 1
            axis.set_xticks(list(curve), [f"{n:,}" + f"\n{r['parameters'] / 1e6:.1f}M" * sizes for n, r in curve.items()], fontsize=7)
            axis.set_xlabel(word + ", parameters" * sizes)
        axes[0, 0].set_ylabel(f"success in %, {args.episodes} scenes"), axes[0, 0].set_ylim(-3, 103)
        figure.savefig(args.out.with_suffix(".png"), dpi=110)
if args.out:
    episode_file.close()
    Path(episode_file.name).replace(args.out.with_suffix(".jsonl"))
    args.out.write_text(json.dumps(dict(rows=rows, fingerprint=fingerprint), indent=1))
