"""Closed-loop evaluation: how often a policy does what the instruction says, in scenes it has never
seen. Times are for 2 CPU cores.

    python eval.py                                              # 100 episodes of out/ckpt.pt, 30 s
    python eval.py --policies expert,random,policy --controls   # beside ceiling and floor, 6 min
    python eval.py --episodes 500 --out results.json            # the figure to report, 3 min
    python eval.py --split phrasing                             # in held-out templates and words
    python eval.py --instructions assets/paraphrases.tsv        # in other people's, or yours

--controls plays the same scenes again with something wrong:

    blind           all pictures are grey
    blind_shuffled  the pictures are those of another scene, played beside it
    deaf            the sentence is empty
    deaf_shuffled   the sentence is another scene's
    swap            another sentence that fits the scene; scored on it, and on the original
    retarget        after a random time, another sentence that fits; scored on that one

A policy that looks and listens succeeds at most as often as chance in the first four, and obeys in
the last two. Chance is what the best policy without ears would reach: it knows the tasks and does
one of them without fail, but has to guess which block, which pad or which direction is meant.
"""

import argparse
import json
import re
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
    NAMES,
    SLOTS,
    SPLITS,
    SUCCESS_STEPS,
    TASKS,
    TEST_SEED,
    VALID_SEED,
    Env,
    choose,
    expert,
    is_held_out,
    make_instruction,
    number,
    task_list,
)
from model import UNDERSTOOD, VLA, Policy, code_version, explain_errors

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
    declined="declined",
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
    add(
        "--ckpt",
        default="",
        help="checkpoint, or a comma list (default out/ckpt.pt, else assets/ckpt.pt)",
    )
    add(
        "--policies",
        default="policy",
        help="comma list of expert, random, policy (default policy: the checkpoints)",
    )
    add("--controls", action="store_true", help="also run the checkpoints under each control")
    add(
        "--execute",
        type=int,
        help="actions carried out per forward pass (default: the checkpoint's)",
    )
    add(
        "--ensemble",
        action="store_true",
        help="a forward pass in every step, averaging all chunks; not with --head mixture",
    )
    add(
        "--flow_steps",
        type=int,
        help="of a flow head's integration (default: the checkpoint's)",
    )
    # on what
    add(
        "--episodes",
        type=number(int, 1, 1_000_000),
        help="scenes, shared among the tasks (default 100)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31),
        default=TEST_SEED,
        help=f"of the first scene (default {TEST_SEED:,}; 0 to 999,999 is for choosing)",
    )
    add(
        "--tasks",
        help=f"all, or a comma list of {', '.join(TASKS)} (default: what the checkpoints learned)",
    )
    add(
        "--split",
        default="seen",
        choices=SPLITS,
        help="phrasing: held-out sentences; combo: held-out colours and directions; "
        "crowd: two more blocks (default seen)",
    )
    add(
        "--instructions",
        type=Path,
        help="file of lines task<TAB>sentence[<TAB>direction or way], with {block} {pad} {lower} for "
        "names; each is told in --episodes scenes (default 1), beside the scenes' own sentences; with "
        "the task none: how many are declined",
    )
    add(
        "--randomize",
        type=number(float, 0, 1),
        default=0.0,
        help="0 to 1: how much the world differs from scene to scene (default 0)",
    )
    add("--randomize_only", choices=tuple(FACTORS), help="let this alone differ (default all)")
    add("--no_guard", action="store_true", help="without the safety guard before the servos")
    add(
        "--parallel",
        type=number(int, 1, 1000),
        default=50,
        help="scenes in a batch, whose size changes the last bits of actions (default 50)",
    )
    add(
        "--out",
        type=Path,
        help="a .json file for the results; beside it a .jsonl with one line per episode",
    )
    args = parser.parse_args()
    args.episodes = args.episodes or (1 if args.instructions else 100)
    if args.instructions and (args.controls or args.tasks or args.policies != "policy"):
        raise ValueError("--instructions goes without --tasks, --policies and --controls")
    args.lines = read_instructions(args.instructions) if args.instructions else []
    last = args.seed + args.episodes * max(len(args.lines), 1) - 1
    args.range, end = map(range_of, (args.seed, last))
    if end != args.range:
        raise ValueError(
            f"the scenes reach from {args.range} into {end}; choose another --seed"
        )
    if args.controls and args.split == "combo":
        raise ValueError(
            "--split combo has too few instructions for --controls; use another split"
        )
    if args.controls and 1 in (args.parallel, args.episodes % args.parallel):
        raise ValueError("--controls needs two scenes a batch; change --episodes or --parallel")
    if args.randomize_only and not args.randomize:
        raise ValueError("--randomize_only says what --randomize changes; give that too")
    if args.out and args.out.suffix != ".json":
        raise ValueError(f"--out must be a file name that ends in .json, not {args.out}")
    args.policies = choose(
        args.policies.split(","), ("expert", "random", "policy"), "--policies"
    )
    return args


def range_of(seed):
    return [name for name, first in SEED_RANGES.items() if seed >= first][-1]


def read_instructions(path):
    """[(task, sentence with {names} left open, its other slots), ..] of lines of task<TAB>sentence, and
    a word if the task has a slot that is not a name."""
    found = []
    for line in filter(str.strip, path.read_text(encoding="utf-8-sig").splitlines()):
        task, *rest = line.split("\t")
        slots = TASKS[task].slots if task in TASKS else ()
        other = [slot for slot in slots if slot not in NAMES]
        words = dict(zip(other, rest[1:]))
        said = all(words.get(slot) in SLOTS[slot] for slot in other)
        try:
            example = rest[0].format(block="red", pad="green", lower="blue")
            names = {"{%s}" % slot for slot in slots if slot in NAMES}
            named = task == "none" or set(re.findall(r"{.*?}", rest[0])) == names
        except (AttributeError, IndexError, KeyError, ValueError):
            named = False
        if task not in (*TASKS, "none") or not named or not said:
            needed = " ".join("{%s}" % slot for slot in slots)
            raise ValueError(
                f"{path}: {line!r} should be a task ({', '.join(TASKS)}, none), a tab, a sentence "
                f"with its names in braces ({needed}), and for push and drawer a tab and the "
                f"direction or way"
            )
        found.append((task, example if task == "none" else rest[0], words))
    if not found:
        raise ValueError(f"{path} is empty; give lines of a task, a tab and a sentence")
    return found


# ----------------------------------------------------------------------------------- playing
@dataclass
class Run:
    """A policy on some scenes."""

    policy: str  # expert, random, vla or bc
    model: Policy  # of the latter two
    scenes: list  # (seed, options of Env.reset)
    label: str
    control: str = "none"
    wordings: list = None  # what to tell in each scene instead of its own sentence


class Episode:
    """One scene being played.

    Of its world it needs reset(seed, options), step(action), info["success"] and info["diverged"],
    task, instruction, seed and steps, as Env has them; for swap and retarget also observe(),
    draw_request() and set_request()."""

    def __init__(self, env, seed, options, run, wording=None):
        self.env = env
        self.control = run.control
        self.rng = np.random.default_rng([seed, 2])
        self.obs, _ = env.reset(seed, options)
        self.task = env.task
        self.original = self.sentence = env.instruction  # the latter is what the policy is told
        self.reward = 0.0
        self.success = self.over = self.original_success = False
        self.after_done = False  # whether it was done before another came
        self.original_steps = 0  # control steps in a row that it has been done
        self.switch = 0  # control step when another comes; 0: none
        self.declined = False
        if wording:
            self.sentence = wording.format(**env.slots)
        if self.control == "deaf":
            self.sentence = ""
        if run.model and self.control == "none":  # play.py would not do it
            self.declined = run.model.understands(self.sentence) < UNDERSTOOD
        if self.control == "swap":
            self.meaning = env.meaning  # of the original
            self.tell_another()
        if self.control == "retarget":
            self.switch = self.rng.integers(5, 40)

    def tell_another(self):
        """Gives another instruction that fits the scene as it is now, if there is one. This
        restarts the environment's clock."""
        env = self.env
        request = env.draw_request(self.rng, avoid=env.request) or env.request
        env.set_request(request, make_instruction(request, self.rng, env.split == "phrasing"))
        self.sentence = env.instruction
        self.obs = env.observe()  # its target_pos is another now
        self.reward = 0.0

    def seen(self):
        """The observation that a model gets under the control."""
        keys = [f"{name}_image" for name in self.env.cameras]
        if self.control == "blind":
            return self.obs | {key: np.full_like(self.obs[key], 127) for key in keys}
        if self.control == "blind_shuffled":
            return self.obs | {key: self.other.obs[key] for key in keys}
        return self.obs

    def step(self, action):
        if self.over:
            return
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.reward += reward
        self.success = self.info["success"] and not self.info["diverged"] and not self.declined
        self.over = terminated or truncated
        if self.control == "swap":
            done = TASKS[self.task].success(self.env, **self.meaning)
            self.original_steps = self.original_steps + 1 if done else 0
            self.original_success = self.original_steps >= SUCCESS_STEPS
            self.over |= self.original_success
        if self.switch and (self.success or self.env.steps == self.switch):
            self.switch = 0
            self.after_done = self.success
            self.success = self.over = False
            self.tell_another()

    def result(self):
        touched = self.info.get("touched")
        return dict(
            self.info,
            seed=self.env.seed,
            task=self.task,
            told=self.sentence,
            original=self.original,
            success=self.success,
            original_success=self.original_success,
            after_done=self.after_done,
            after_done_success=self.after_done and self.success,
            declined=self.declined,
            untouched=not self.success and touched is None,
            wrong_first=not self.success and touched not in (None, self.info.get("block")),
            reward=self.reward / self.env.steps,
            steps=self.env.steps,
        )


def guessing(env, scene, tasks):
    """Chances of success without ears in this scene: knowing which task it is, and not knowing."""
    env.reset(*scene)
    held_out = is_held_out(*env.request)
    chance = {}
    for task in tasks:
        answers = sum(
            is_held_out(task, slots) == held_out and env.can_ask(task, slots)
            for slots in env.requests(task)
        )
        if answers:
            chance[task] = 1 / answers
    return dict(task_chance=chance[env.task], chance=max(chance.values()) / len(tasks))


def play(run, episodes, pool):
    """Plays them to the end, side by side. A model sees all of them to the end, since the size of
    its batch changes the last bits of its actions."""
    for i, episode in enumerate(episodes):
        episode.other = episodes[i - 1]
        if run.control == "deaf_shuffled":
            episode.sentence = episode.other.original
    if run.model:
        run.model.reset()
    while not all(episode.over for episode in episodes):
        if run.model:
            sentences = [episode.sentence for episode in episodes]
            actions = run.model.act([episode.seen() for episode in episodes], sentences)
        elif run.policy == "expert":
            actions = [expert(episode.env) for episode in episodes]
        else:
            actions = [episode.rng.uniform(-1, 1, len(ACTION_NAMES)) for episode in episodes]
        list(pool.map(Episode.step, episodes, actions))


def evaluate(run, world, parallel):
    """A result for each scene. world: arguments of Env. parallel: size of a batch."""
    cameras = run.model.config.cameras if run.model else ()
    tasks = {options["task"] for _, options in run.scenes}
    envs = [Env(cameras=cameras, **world) for _ in run.scenes[:parallel]]
    results = []
    # MuJoCo lets go of the interpreter's lock, but threads beyond four only wait for it
    with ThreadPoolExecutor(4) as pool:
        for i in range(0, len(run.scenes), parallel):
            scenes = run.scenes[i : i + parallel]
            wordings = (run.wordings or [None] * len(run.scenes))[i : i + parallel]
            starts = [
                pool.submit(Episode, env, *scene, run, wording)
                for env, scene, wording in zip(envs, scenes, wordings)
            ]
            episodes = [start.result() for start in starts]
            play(run, episodes, pool)
            results += [episode.result() for episode in episodes]
    blind = Env(cameras=(), **world)
    for result, scene in zip(results, run.scenes):
        result |= guessing(blind, scene, tasks)
    return results


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
        return [result[key] for result in results]

    row = dict(about, task=task, n=len(results))
    for key, counted in COUNTS.items():
        row[key] = sum(column(counted))
    for key in ("reward", "steps"):
        row[key] = np.mean(column(key))
        row[f"{key}_sd"] = np.std(column(key))
    row["low"], row["high"] = wilson(row["k"], row["n"])
    row["guard"] = {name: sum(guard[name] for guard in column("guard")) for name in GUARDS}
    row["force_p95"] = np.percentile(column("force"), 95)
    row["force_max"] = max(column("force"))
    row["chance"] = np.mean(column("chance" if task == "all" else "task_chance"))
    return row


def describe(row):
    """A line about a row."""
    text = f"{row['label']:14} {percent(row['k'], row['n'])}"
    if row["declined"]:
        text += f", {row['declined']} declined"
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


# -------------------------------------------------------------------------------------- script
def main():
    args = read_settings()
    models = []
    if "policy" in args.policies:
        models = [VLA.load(path or None) for path in args.ckpt.split(",")]
    acting = ("execute", "ensemble", "flow_steps")
    changes = {name: value for name, value in vars(args).items() if name in acting and value}
    for model in models:
        vars(model.config).update(changes)
        model.config.check(changes)

    # the scenes
    known = [task for task in TASKS if any(task in model.config.tasks for model in models)]
    tasks = task_list(args.tasks) if args.tasks else known or ["pick_place"]
    if args.split == "combo":
        tasks = [task for task in tasks if task in HELD_OUT]
    if not tasks:
        raise ValueError(
            f"--split combo is for {', '.join(HELD_OUT)}; no other words are held out"
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
    runs = [Run(name, None, scenes, name) for name in args.policies if name != "policy"]
    for model in models:
        kind = model.config.model
        prefix = f"{model.path} " if len(models) > 1 else ""
        if args.instructions:
            for _, sentence, _ in args.lines:
                model.understands(sentence)  # ValueError if it is too long
            told = [line for line in args.lines if line[0] in model.config.tasks]
            strange = {line[0] for line in args.lines} - {*model.config.tasks, "none"}
            if strange:
                print(f"{model.path} was not taught {', '.join(sorted(strange))}: left out")
            told *= args.episodes
            wordings = [wording for _, wording, _ in told]
            asked = [
                (seed, dict(task=task, slots=slots))
                for seed, (task, _, slots) in enumerate(told, args.seed)
            ]
            if told:
                runs.append(Run(kind, model, asked, prefix + "demonstrated wordings"))
                runs.append(
                    Run(kind, model, asked, prefix + "these wordings", wordings=wordings)
                )
        else:
            runs.append(Run(kind, model, scenes, prefix + kind))
        if args.controls and kind == "vla":
            runs += [Run(kind, model, scenes, prefix + name, name) for name in CONTROLS]
    fingerprint = dict(
        torch=torch.__version__,
        mujoco=mujoco.__version__,
        numpy=np.__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        seed=args.seed,
        code=code_version(),
    )
    print(", ".join(f"{key} {value}" for key, value in fingerprint.items()))
    for model in models:
        print(f"{model.path}: step {model.step}, {model.fingerprint}")
    count = max([len(run.scenes) for run in runs], default=0)
    print(
        f"{count} scenes from seed {args.seed} ({args.range}), split {args.split}; "
        f"success [95% Wilson interval]"
    )

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        log = open(args.out.with_suffix(".jsonl"), "w")
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
            range=args.range,
            seconds=time.time() - start,
            ckpt=run.model.path if run.model else None,
        )
        groups = list(dict.fromkeys(result["task"] for result in results))
        if len(groups) > 1:
            groups.append("all")
        column = columns[run.label] = [summarize(results, task, about) for task in groups]
        rows += column
        print(describe(column[-1]), flush=True)
        if args.out:
            for result in results:
                print(json.dumps(about | result), file=log, flush=True)
    if columns:
        print_table(columns)
    nothing = [sentence for task, sentence, _ in args.lines if task == "none"]
    for model in models if nothing else ():
        k = sum(model.understands(sentence) < UNDERSTOOD for sentence in nothing)
        n = len(nothing)
        rows.append(
            dict(label=model.path, ckpt=model.path, control="declined", task="none", k=k, n=n)
        )
        print(f"{model.path} declines {percent(k, n)} of the sentences that ask for nothing")
    if args.out:
        args.out.write_text(json.dumps(dict(rows=rows, fingerprint=fingerprint), indent=1))


if __name__ == "__main__":
    explain_errors("eval.py")
    main()
