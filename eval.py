"""Closed-loop evaluation: how often a policy does what the instruction says, in scenes it has never
seen. Times are for 2 CPU cores.

    python eval.py                                              # 100 episodes of out/ckpt.pt, 10 s
    python eval.py --policies expert,random,policy --controls   # beside ceiling and floor, 4 min
    python eval.py --episodes 500 --out results.json            # the figure to report, 1 min
    python eval.py --split phrasing                             # in words never used in training
    python eval.py --instructions mine.txt                      # in yours: lines task<TAB>sentence

--controls plays the same scenes again with something wrong:

    blind           all pictures are grey
    blind_shuffled  the pictures are those of another scene, played beside it
    deaf            the sentence is empty
    deaf_shuffled   the sentence is another scene's
    swap            another sentence that fits the scene; scored on it, and on the original
    retarget        after a random time, another sentence that fits; scored on that one

A policy that looks and listens succeeds at most as often as chance in the first four, and obeys in
the last two. Chance is
what the best policy without ears would reach: it knows the tasks and does one of them without fail,
but has to guess which block, which pad or which direction is meant.
"""

import argparse
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch

from gen_data import (
    ACTION_NAMES,
    DEMO_SEED,
    FACTORS,
    GUARDS,
    HELD_OUT,
    SLOTS,
    SPLITS,
    SUCCESS_STEPS,
    TASKS,
    TEST_SEED,
    VALID_SEED,
    Env,
    choose,
    expert,
    fill,
    is_held_out,
    make_instruction,
    number,
    parse_instruction,
    task_list,
)
from model import VLA, Policy, explain_errors, tokenize

CONTROLS = ("blind", "blind_shuffled", "deaf", "deaf_shuffled", "swap", "retarget")
SEED_RANGES = dict(  # where each range of scene seeds begins
    choosing=VALID_SEED,
    retired=1_000_000,  # was for reporting, until it had been looked at too often
    reporting=TEST_SEED,
    demonstrations=DEMO_SEED,
)

COUNTS = dict(  # in a row: how often this is so in its episodes' results
    k="success",
    original="original_success",
    after_done_k="after_done_success",
    after_done_n="after_done",
    violations="violations",
    diverged="diverged",
    wrong_first="wrong_first",
    untouched="untouched",
)


# ---------------------------------------------------------------------------------- settings
def read_settings():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # what is evaluated
    add("--ckpt", help="checkpoint, or a comma list (default out/ckpt.pt, else assets/ckpt.pt)")
    add(
        "--policies",
        default="policy",
        help="comma list of expert, random, policy (default policy: the checkpoints)",
    )
    add("--controls", action="store_true", help="also run the checkpoints under each control")
    add(
        "--execute",
        type=number(int, 1, 256),
        help="actions carried out per forward pass (default: the checkpoint's)",
    )
    add(
        "--ensemble",
        action="store_true",
        help="instead: a forward pass in every step, averaging all chunks",
    )
    add(
        "--flow_steps",
        type=number(int, 1, 1000),
        help="of a flow head's integration (default: the checkpoint's)",
    )
    # on what
    add(
        "--episodes",
        type=number(int, 1, 10**6),
        default=100,
        help="scenes, shared among the tasks (default 100)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31),
        default=TEST_SEED,
        help=f"of the first scene (default {TEST_SEED:,}, the range for reporting; 0 to 999,999 "
        f"is for choosing)",
    )
    add(
        "--tasks",
        help=f"all, or a comma list of {', '.join(TASKS)} (default: what the checkpoints learned)",
    )
    add(
        "--split",
        default="seen",
        choices=SPLITS,
        help="seen: as in training; phrasing: held-out sentence patterns; combo: held-out colours "
        "and directions; crowd: two more blocks (default seen)",
    )
    add(
        "--instructions",
        type=Path,
        metavar="FILE",
        help="lines of task<TAB>sentence with {block} {pad} {lower} {direction} {towards} {way}: "
        "scores each sentence on --episodes scenes",
    )
    add(
        "--randomize",
        type=number(float, 0, 1),
        default=0.0,
        help="0 to 1: how much the world differs from scene to scene (default 0)",
    )
    add("--randomize_only", choices=tuple(FACTORS), help="let this alone differ (default all)")
    add("--no_guard", action="store_true", help="without the safety guard before the servos")
    # what else is measured, and how
    add(
        "--sensitivity",
        action="store_true",
        help="also: how far the action follows the sentence, before and after training",
    )
    add("--latency", action="store_true", help="also: the time an action takes on one core")
    add(
        "--parallel",
        type=number(int, 1, 1000),
        default=50,
        help="scenes played side by side, in one batch, whose size changes the last bits of a "
        "policy's actions (default 50)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write results here, and one line per episode beside it (.jsonl)",
    )
    args = parser.parse_args()

    args.policies = choose(
        args.policies.split(","), ("expert", "random", "policy"), "--policies"
    )
    if args.tasks:
        args.tasks = task_list(args.tasks)
    last = args.seed + args.episodes - 1
    if range_of(args.seed) != range_of(last):
        raise ValueError(
            f"scenes {args.seed} to {last} reach from the range for "
            f"{range_of(args.seed)} into that for {range_of(last)}; choose another "
            f"--seed"
        )
    if args.instructions and (args.controls or args.tasks or args.policies != ("policy",)):
        raise ValueError(
            "--instructions names tasks for checkpoints; it goes without --tasks, "
            "--policies and --controls"
        )
    if args.controls and args.split == "combo":
        raise ValueError(
            "--controls gives other instructions that fit a scene, and --split combo "
            "has too few; use another split"
        )
    if args.controls and 1 in (args.parallel, args.episodes % args.parallel):
        raise ValueError(
            f"--controls shows a policy another scene of its batch, and the last of "
            f"{args.episodes} episodes would be alone in a batch of --parallel "
            f"{args.parallel}; change one of them"
        )
    if args.randomize_only and not args.randomize:
        raise ValueError("--randomize_only says what --randomize changes; give that too")
    if args.out and args.out.suffix != ".json":
        raise ValueError(f"--out must be a file name that ends in .json, not {args.out}")
    return args


def range_of(seed):
    return [name for name, first in SEED_RANGES.items() if seed >= first][-1]


# ----------------------------------------------------------------------------------- playing
@dataclass
class Run:
    """A policy on some scenes."""

    policy: str  # expert, random, vla or bc
    model: Policy  # of the latter two
    scenes: list  # (seed, options of Env.reset)
    label: str
    control: str = "none"
    pattern: str = None  # of the sentences to tell, instead of the scenes' own


class Episode:
    """One scene being played.

    Of its world it needs reset(seed, options), step(action) and info["success"], as Env has them;
    for the controls swap and retarget also observe(), draw_request() and set_request()."""

    def __init__(self, env, seed, options, control="none"):
        self.env = env
        self.seed = seed
        self.control = control
        self.rng = np.random.default_rng([seed, 2])
        self.obs, self.info = env.reset(seed, options)
        self.task = self.info.get("task")
        self.original = self.info["instruction"]
        self.sentence = self.original  # what the policy is told
        self.reward = 0.0
        self.steps = 0
        self.success = self.over = False
        self.original_steps = 0  # control steps in a row that it has been done
        self.original_success = False
        self.after_done = False  # whether it was done before another came
        self.switch = 0  # control step when another comes; 0: none
        if control == "swap":
            self.meaning = env.meaning  # of the original
            self.tell_another()
        if control == "retarget":
            self.switch = self.rng.integers(5, 40)

    def tell_another(self):
        """Gives another instruction that fits the scene as it is now, if there is one."""
        env = self.env
        request = env.draw_request(self.rng, avoid=env.request) or env.request
        env.set_request(request, make_instruction(request, self.rng, env.split == "phrasing"))
        self.sentence = env.instruction
        self.obs = env.observe()  # its target_pos is another now
        self.reward = 0.0
        self.steps = 0

    def step(self, action):
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.reward += reward
        self.steps += 1
        diverged = self.info.get("diverged", False)
        self.success = self.info["success"] and not diverged
        self.over = terminated or truncated
        if self.control == "swap":
            done = TASKS[self.task].success(self.env, **self.meaning)
            self.original_steps = self.original_steps + 1 if done else 0
            self.original_success = self.original_steps >= SUCCESS_STEPS
            self.over = self.over or self.original_success
        if self.switch and not diverged and (self.success or self.steps == self.switch):
            self.switch = 0
            self.after_done = self.success
            self.success = self.over = False
            self.tell_another()

    def result(self):
        return dict(
            self.info,
            seed=self.seed,
            task=self.task,
            told=self.sentence,
            original=self.original,
            success=self.success,
            original_success=self.original_success,
            after_done=self.after_done,
            after_done_success=self.after_done and self.success,
            reward=self.reward / self.steps,
            steps=self.steps,
        )


def play(envs, run, scenes, pool):
    """Plays a scene in each env, side by side; returns the Episodes. A model sees all of them to
    the end, since the size of its batch changes the last bits of its actions."""
    starts = [
        pool.submit(Episode, env, *scene, run.control) for env, scene in zip(envs, scenes)
    ]
    episodes = [start.result() for start in starts]
    others = roll([episode.sentence for episode in episodes])
    for episode, other in zip(episodes, others):
        if run.pattern:
            episode.sentence = fill(run.pattern, episode.env.slots)
        if run.control == "deaf":
            episode.sentence = ""
        if run.control == "deaf_shuffled":
            episode.sentence = other
    if run.model:
        run.model.reset()
    while running := [episode for episode in episodes if not episode.over]:
        if run.model:
            observations = shown([episode.obs for episode in episodes], run.control)
            sentences = [episode.sentence for episode in episodes]
            actions = dict(zip(episodes, run.model.act(observations, sentences)))
        elif run.policy == "expert":
            actions = {episode: expert(episode.env) for episode in running}
        else:
            size = len(ACTION_NAMES)
            actions = {episode: episode.rng.uniform(-1, 1, size) for episode in running}
        list(pool.map(lambda episode: episode.step(actions[episode]), running))
    return episodes


def roll(items):
    """For each the one before it; for the first, the last."""
    return items[-1:] + items[:-1]


def shown(observations, control):
    """What a model gets to see under a control."""
    sources = roll(observations) if control == "blind_shuffled" else observations
    result = []
    for obs, source in zip(observations, sources):
        pictures = {key: value for key, value in source.items() if key.endswith("_image")}
        if control == "blind":
            pictures = {key: np.full_like(image, 127) for key, image in pictures.items()}
        result.append(obs | pictures)
    return result


def evaluate(run, world, parallel):
    """A result for each scene. world: arguments of Env. parallel: size of a batch."""
    cameras = run.model.config.cameras if run.model else ()
    results = []
    # MuJoCo lets go of the interpreter's lock, but threads beyond four only wait for it
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        envs = [Env(cameras=cameras, **world) for _ in run.scenes[:parallel]]
        for i in range(0, len(run.scenes), parallel):
            episodes = play(envs, run, run.scenes[i : i + parallel], pool)
            results += [episode.result() for episode in episodes]
    tasks = {options["task"] for _, options in run.scenes}
    env = Env(cameras=(), **world)
    for result, scene in zip(results, run.scenes):
        result["task_chance"], result["chance"] = guessing(env, scene, tasks)
        failed = not result["success"]
        touched = result["touched"]
        result["untouched"] = failed and touched is None
        result["wrong_first"] = failed and touched not in (None, result.get("block"))
    return results


def guessing(env, scene, tasks):
    """Chances of success without ears in this scene: knowing which task it is, and not knowing."""
    env.reset(*scene)
    held_out = is_held_out(*env.request)
    chance = {}
    for task in tasks:
        askable = [
            slots
            for slots in env.requests(task)
            if is_held_out(task, slots) == held_out and env.can_ask(task, slots)
        ]
        if askable:
            chance[task] = 1 / len(askable)
    return chance[env.task], max(chance.values()) / len(tasks)


# ----------------------------------------------------------------------------------- results
def wilson(k, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); well behaved at 0 and 1."""
    p = k / n
    centre = p + z**2 / n / 2
    half = z * (p * (1 - p) / n + (z / n) ** 2 / 4) ** 0.5
    scale = 1 + z**2 / n
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def percent(k, n):
    low, high = wilson(k, n)
    return f"{k}/{n} = {100 * k / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def summarize(results, task, about):
    """One row: of a task, or of "all"."""
    results = [result for result in results if task in ("all", result["task"])]

    def column(key):
        return np.array([result[key] for result in results])

    row = dict(about, task=task, n=len(results))
    for key, counted in COUNTS.items():
        row[key] = int(column(counted).sum())
    for key in ("reward", "steps"):
        row[key] = column(key).mean()
        row[f"{key}_sd"] = column(key).std()
    row["low"], row["high"] = wilson(row["k"], row["n"])
    row["guard"] = {name: sum(guard[name] for guard in column("guard")) for name in GUARDS}
    row["force_p95"] = np.percentile(column("force"), 95)
    row["force_max"] = column("force").max()
    row["chance"] = column("chance" if task == "all" else "task_chance").mean()
    return row


def describe(row):
    """A line about a row."""
    text = f"{row['label']:14} {percent(row['k'], row['n'])}"
    if row["control"] == "swap":
        text += f" on the sentence told, {percent(row['original'], row['n'])} on the original"
    if row["control"] == "retarget":
        text += (
            f" ({row['after_done_k']}/{row['after_done_n']} where the first was done before)"
        )
    stops = [f"{count} {name}" for name, count in row["guard"].items() if count]
    return (
        f"{text}; reward {row['reward']:.2f} +- {row['reward_sd']:.2f}, steps {row['steps']:.0f} "
        f"+- {row['steps_sd']:.0f}, guard {', '.join(stops) or 'never'}, force on a block p95 "
        f"{row['force_p95']:.0f} N, max {row['force_max']:.0f} N; {row['wrong_first']} failures "
        f"touched a wrong block first and {row['untouched']} none; {row['seconds']:.0f} s"
    )


def print_table(columns):
    """Markdown. columns: for each label its rows, of the same tasks."""
    print(f"| task | chance | {' | '.join(columns)} |")
    print("| --- | --- |" + " --- |" * len(columns))
    for rows in zip(*columns.values()):
        cells = " | ".join(percent(row["k"], row["n"]) for row in rows)
        print(f"| {rows[0]['task']} | {100 * rows[0]['chance']:.1f}% | {cells} |")


# ------------------------------------------------------------------------------------ files
def open_part(path):
    """A file beside `path` that becomes it when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(f"{path}.part", "w")
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}); choose another --out"
        ) from None


# ------------------------------------------------------------------------ other measurements
def read_instructions(path):
    """[(task, pattern, slots that it fixes, one sentence), ..] of lines of task<TAB>pattern."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as text: {error}") from None
    found = []
    for line in filter(str.strip, lines):
        task, _, pattern = line.strip().partition("\t")
        if task not in TASKS or not pattern:
            raise ValueError(
                f"{path}: a line should be one of {', '.join(TASKS)}, a tab and a "
                f"sentence, not {line[:60]!r}"
            )
        example = {slot: SLOTS[slot][0] for slot in TASKS[task].slots}
        fixed = {}
        try:
            sentence = fill(pattern, example)
            for slot in example:
                other = fill(pattern, example | {slot: SLOTS[slot][1]})
                if other == sentence:  # it is said in plain words, such as "left"
                    fixed[slot] = parse_instruction(sentence)[1][slot]
        except (ValueError, KeyError, IndexError):
            slots = " and ".join("{%s}" % slot for slot in example)
            raise ValueError(
                f"{path}: {pattern!r} should say {slots}, or plain words in place of "
                f"them, and have no other braces"
            ) from None
        found.append((task, pattern, fixed, sentence))
    if not found:
        raise ValueError(
            f"{path} is empty; it should have lines of a task, a tab and a sentence"
        )
    return found


def sensitivity(model, seeds):
    """Mean distance of the next actions, in [-1, 1], for two sentences that fit the same scene:
    before and after training."""
    torch.manual_seed(0)
    fresh = VLA(model.config).eval()
    env = Env(model.config.tasks, model.config.cameras)
    distances = []
    for seed in seeds:
        obs, info = env.reset(seed)
        rng = np.random.default_rng([seed, 2])
        other = env.draw_request(rng, avoid=env.request) or env.request
        sentences = [info["instruction"], make_instruction(other, rng)]
        plans = [policy.plan([[obs], [obs]], sentences) for policy in (fresh, model)]
        distances.append([np.abs(one[0] - two[0]).mean() for one, two in plans])
    return np.mean(distances, 0).tolist()


def latency(model, seed):
    """p50 and p95 of a forward pass on one core, ms. Actions from its chunk cost nothing."""
    torch.set_num_threads(1)
    obs, info = Env(model.config.tasks, model.config.cameras).reset(seed)
    times = []
    for _ in range(52):
        start = time.perf_counter()
        model.plan([[obs]], [info["instruction"]])
        times.append((time.perf_counter() - start) * 1e3)
    return np.percentile(times[2:], (50, 95)).tolist()  # the first two warm up


# -------------------------------------------------------------------------------------- script
def main():
    args = read_settings()
    models = []
    if "policy" in args.policies:
        paths = args.ckpt.split(",") if args.ckpt else [None]
        models = [VLA.load(path) for path in dict.fromkeys(paths)]
    changes = dict(execute=args.execute, ensemble=args.ensemble, flow_steps=args.flow_steps)
    changes = {name: value for name, value in changes.items() if value}
    for model in models:
        vars(model.config).update(changes)
        model.config.check(changes)

    # the scenes
    known = [task for task in TASKS if any(task in model.config.tasks for model in models)]
    tasks = args.tasks or known or ["pick_place"]
    if args.split == "combo":
        tasks = [task for task in tasks if task in HELD_OUT]
    if not tasks:
        raise ValueError(
            f"--split combo is for tasks with held-out words: {', '.join(HELD_OUT)}"
        )
    world = dict(
        tasks=[task for task in TASKS if task in tasks or task in known],
        split=args.split,
        randomize=args.randomize,
        randomize_only=args.randomize_only,
        guard=not args.no_guard,
    )
    seeds = range(args.seed, args.seed + args.episodes)
    scenes = [(seed, dict(task=tasks[seed % len(tasks)])) for seed in seeds]

    # what is run on them
    wordings = read_instructions(args.instructions) if args.instructions else []
    runs = [Run(name, None, scenes, name) for name in args.policies if name != "policy"]
    for model in models:
        kind = model.config.model
        prefix = f"{model.path} " if len(models) > 1 else ""
        if not wordings:
            runs.append(Run(kind, model, scenes, prefix + kind))
        if args.controls and kind == "vla":
            runs += [
                Run(kind, model, scenes, prefix + control, control) for control in CONTROLS
            ]
        for task, pattern, fixed, example in wordings:
            label = f"{prefix}{task}: {pattern}"
            asked = [(seed, dict(task=task, slots=fixed)) for seed in seeds]
            try:
                tokenize(example, model.config)
                runs.append(Run(kind, model, asked, label, pattern=pattern))
            except ValueError as error:
                print(f"{label}: not understood: {error}")
    if not runs:
        raise ValueError(f"no sentence of {args.instructions} was understood; use other words")

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    fingerprint = dict(
        torch=torch.__version__,
        mujoco=mujoco.__version__,
        numpy=np.__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        seed=args.seed,
        code=git.stdout.strip() or "unknown",
    )
    print(", ".join(f"{key} {value}" for key, value in fingerprint.items()))
    for model in models:
        print(
            f"{model.path}: step {model.step}, commit {model.fingerprint.get('commit')}, data "
            f"{model.fingerprint.get('data')}"
        )
    print(
        f"{args.episodes} scenes from seed {args.seed} ({range_of(args.seed)}), split "
        f"{args.split}; success [95% Wilson interval]",
        flush=True,
    )

    # everything goes to .part files until all is done
    if args.out:
        lines = args.out.with_suffix(".jsonl")
        lines_part = open_part(lines)
        rows_part = open_part(args.out)
    rows = []
    columns = {}  # of the table
    for run in runs:
        start = time.time()
        results = evaluate(run, world, args.parallel)
        about = dict(
            label=run.label,
            policy=run.policy,
            control=run.control,
            split=args.split,
            range=range_of(args.seed),
            seconds=time.time() - start,
            ckpt=run.model.path if run.model else None,
        )
        groups = list(dict.fromkeys(result["task"] for result in results))
        if len(groups) > 1:
            groups.append("all")
        column = [summarize(results, task, about) for task in groups]
        columns[run.label] = column
        rows += column
        print(describe(column[-1]), flush=True)
        if args.out:
            for result in results:
                print(json.dumps(about | result), file=lines_part, flush=True)
    if not wordings:
        print_table(columns)

    for model in models:
        measured = {}
        if args.sensitivity and model.config.model == "vla":
            measured["sensitivity"] = before, after = sensitivity(model, seeds)
            print(
                f"{model.path}: two sentences in one scene differ in the next action by "
                f"{before:.3f} before training and {after:.3f} after it"
            )
        if args.latency:
            measured["latency_ms"] = p50, p95 = latency(model, args.seed)
            print(
                f"{model.path}: a forward pass on one core takes {p50:.1f} ms (p95 {p95:.1f})"
            )
        for row in rows:
            if (
                row["ckpt"] == model.path
                and row["control"] == "none"
                and row["n"] == args.episodes
            ):
                row.update(measured)

    if args.out:
        json.dump(dict(rows=rows, fingerprint=fingerprint), rows_part, indent=1)
        for part, path in ((rows_part, args.out), (lines_part, lines)):
            part.close()
            Path(part.name).replace(path)


if __name__ == "__main__":
    explain_errors("eval.py")
    main()
