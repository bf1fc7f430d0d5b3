"""Closed-loop evaluation: how often a policy does what the sentence says, in scenes it has never
seen. Times are for 2 CPU cores.

    python eval.py                                             # 100 episodes of out/ckpt.pt, 30 s
    python eval.py --policies expert,random,policy --controls  # beside ceiling and floor, 6 min
    python eval.py --episodes 500 --out results.json           # the figure to report, 2 min
    python eval.py --split phrasing                            # in held-out templates and words
    python eval.py --instructions assets/paraphrases.tsv       # in other people's, or yours

--controls plays the same scenes again with something changed:

    blind           all pictures are grey
    blind_shuffled  the pictures are the first ones of another scene of the same task
    deaf            the sentence is empty
    deaf_shuffled   the sentence is of another scene of the same task
    swap            another sentence that fits the scene; scored on it, and on the original
    retarget        after a random time, another sentence that fits; scored on that one

A sentence that the policy declines counts as a failure, whatever is done then.
"""

import argparse
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gen_data import (
    ACTION_NAMES,
    HELD_OUT,
    NAMES,
    SLOTS,
    SPLITS,
    SUCCESS_STEPS,
    TASKS,
    TEST_SEED,
    Env,
    choose,
    expert,
    explain_errors,
    make_instruction,
)
from model import UNDERSTOOD, VLA, code_version

CONTROLS = ("blind", "blind_shuffled", "deaf", "deaf_shuffled", "swap", "retarget")
COUNTS = ("success", "original_success", "declined", "wrong_first", "untouched")


# ----------------------------------------------------------------------------------- playing
def play(policy, env, seed, options=None, control="none", wording=None, watch=None):
    """Plays one scene to its end; returns what came of it, a dict.

    policy: of model.py, or "expert" or "random". options: of Env.reset. wording: what to say
    instead of the scene's own sentence, with {names} open. watch(obs) is called before every
    step."""
    rng = np.random.default_rng([seed, 2])
    model = not isinstance(policy, str)
    if control.endswith("shuffled"):
        other_obs, other_info = env.reset(seed + len(env.tasks), options)
    obs, info = env.reset(seed, options)
    task, original, told = env.task, env.meaning, info["instruction"]
    if wording:
        told = re.sub(r"{(\w+)}", lambda name: env.slots.get(name[1], name[0]), wording)
    elif control == "deaf":
        told = ""
    elif control == "deaf_shuffled":
        told = other_info["instruction"]
    elif control == "swap":
        told, obs = tell_another(env, rng)
    switch = rng.integers(5, 40) if control == "retarget" else None  # control step
    if model:
        policy.reset(seed)
    instead = {}  # of what is seen
    for key in [f"{name}_image" for name in env.cameras]:
        if control == "blind":
            instead[key] = np.full_like(obs[key], 127)
        elif control == "blind_shuffled":
            instead[key] = other_obs[key]
    declined = original_success = False
    original_steps = 0  # in a row that the original request has been fulfilled
    while True:
        if model and env.steps == 0:
            declined = policy.understands(told) < UNDERSTOOD
        if watch:
            watch(obs)
        if policy == "expert":
            action = expert(env)
        elif policy == "random":
            action = rng.uniform(-1, 1, len(ACTION_NAMES))
        else:
            action = policy.predict(obs | instead, told)
        obs, _, terminated, truncated, info = env.step(action)
        if control == "swap":
            done = TASKS[task].success(env, *original)
            original_steps = original_steps + 1 if done else 0
            original_success = original_steps >= SUCCESS_STEPS
        if switch and (info["success"] or env.steps == switch):
            told, obs = tell_another(env, rng)  # restarts the clock
            switch = None
        elif terminated or truncated or original_success:
            break
    if watch:
        watch(obs)
    touched = info["touched"]
    success = info["success"] and not info["diverged"] and not declined
    return info | dict(
        seed=seed,
        task=task,
        told=told,
        success=success,
        original_success=original_success,
        declined=declined,
        wrong_first=not success and touched not in (None, info.get("block")),
        untouched=not success and touched is None,
        steps=env.steps,
    )


def tell_another(env, rng):
    """Asks for something else that fits the scene as it is now, if there is anything; returns the
    sentence and the observation."""
    request = env.draw_request(rng, avoid=env.request) or env.request
    env.set_request(request, make_instruction(request, rng, env.split == "phrasing"))
    return env.instruction, env.observe()


def load(name, changes):
    """The policy of a checkpoint, with changes of its Config, ["execute=2"]; "expert" and "random"
    are themselves."""
    if name in ("expert", "random"):
        return name
    policy = VLA.load(name)
    for change in changes:
        key, _, value = change.partition("=")
        if not hasattr(policy.config, key):
            raise ValueError(f"--set {change}: the policy has no {key!r}")
        setattr(policy.config, key, type(getattr(policy.config, key))(value))
    policy.config.__post_init__()
    return policy


def start(name, changes, world):
    """Prepares a process for play_job. world: arguments of Env."""
    global player
    torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
    policy = load(name, changes)
    cameras = () if name == policy else policy.config.cameras
    player = policy, Env(cameras=cameras, **world)


def play_job(scene):
    return play(*player, **scene)


def play_all(scenes, *setting):
    """The results of play() with these arguments, in turn. setting: arguments of start()."""
    if len(scenes) < 20:  # starting processes would take longer
        start(*setting)
        return [play_job(scene) for scene in scenes]
    with multiprocessing.get_context("spawn").Pool(None, start, setting) as pool:
        results = pool.imap(play_job, scenes, chunksize=4)
        return list(tqdm(results, total=len(scenes), disable=None, leave=False))


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
    row = dict(about, task=task, n=len(results))
    for key in COUNTS:
        row[key] = sum(result[key] for result in results)
    row["k"] = row.pop("success")
    row["low"], row["high"] = wilson(row["k"], row["n"])
    row["steps"] = np.mean([result["steps"] for result in results])
    row["force"] = max(result["force"] for result in results)  # N
    return row


def read_instructions(path):
    """[(task, sentence with {names} left open, its other slots), ..] of lines of
    task<TAB>sentence, and a word if the task has a slot that is not a name."""
    found = []
    for line in path.read_text("utf-8-sig").splitlines():
        task, sentence, *words = [*line.split("\t"), ""]
        slots = TASKS[task].slots if task in TASKS else ()
        other = dict(zip([slot for slot in slots if slot not in NAMES], words))
        named = all("{%s}" % slot in sentence for slot in slots if slot in NAMES)
        fits = all(word in SLOTS[slot] for slot, word in other.items())
        if task not in (*TASKS, "none") or not named or not fits:
            raise ValueError(
                f"{path}: {line!r} should be a task, a tab, a sentence with {{block}}, {{pad}} or "
                f"{{lower}} in it, and for push and drawer a tab and the direction or way"
            )
        found.append((task, sentence, other))
    return found


def describe(row):
    """A line about a row."""
    label = row["control"].replace("none", "policy")
    text = f"{label:15} {percent(row['k'], row['n'])}"
    if row["control"] == "swap":
        text += f" on the sentence told, {row['original_success']} on the original"
    return (
        f"{text}; {row['declined']} declined, {row['wrong_first']} failures touched a wrong block "
        f"first and {row['untouched']} none; {row['steps']:.0f} steps, at most {row['force']:.0f} N"
    )


# -------------------------------------------------------------------------------------- script
if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
    add("--set", nargs="*", default=[], help="changes of its Config: execute=2 flow_steps=8")
    add("--policies", default="policy", help="comma list of expert, random, policy")
    add("--controls", action="store_true", help="also play the checkpoint under each control")
    add("--episodes", type=int, default=100, help="scenes, shared among the tasks (default 100)")
    add("--seed", type=int, default=TEST_SEED, help="of the first scene; below 1,000,000: choosing")
    add("--tasks", help="all, or a comma list (default: what the checkpoint learned)")
    add("--split", default="seen", choices=SPLITS, help="what of the scenes is unseen")
    add("--randomize", type=float, default=0.0, help="how much the world differs (default 0)")
    add(
        "--instructions",
        type=Path,
        help="file of lines task<TAB>sentence[<TAB>direction or way], with {block} {pad} {lower} for "
        "names; each is told in a scene, beside the scene's own sentence; with the task none: how "
        "many are declined",
    )
    add("--out", type=Path, help="a .json file for the rows and the episodes")
    args = parser.parse_args()
    names = choose(args.policies, ("expert", "random", "policy"))
    model = load(args.ckpt, args.set) if "policy" in names else None
    tasks = choose(args.tasks or (model.config.tasks if model else "pick_place"), TASKS)
    if args.split == "combo":
        tasks = [task for task in tasks if task in HELD_OUT]
    lines = read_instructions(args.instructions) if args.instructions else []
    told = [line for line in lines if line[0] in tasks]
    scenes = []
    for i in range(len(told) or args.episodes * bool(tasks)):
        options = (
            dict(task=told[i][0], slots=told[i][2]) if told else dict(task=tasks[i % len(tasks)])
        )
        scenes.append(dict(seed=args.seed + i, options=options))
    if not scenes or lines and not model:
        raise ValueError("no scene, or no policy; change --policies, --tasks, --split, --episodes")
    runs = [(name, name, scenes) for name in names if name != "policy"]  # who, control, scenes
    if model:
        runs.append((model.path, "none", scenes))
        print(f"{model.path}: step {model.step}, code {model.code}; this code {code_version()}")
        for control in CONTROLS if args.controls else ():
            runs.append((model.path, control, [scene | dict(control=control) for scene in scenes]))
        if told:
            said = [scene | dict(wording=line[1]) for scene, line in zip(scenes, told)]
            runs.append((model.path, "these sentences", said))
    print(f"{len(scenes)} scenes from seed {args.seed}, split {args.split}", flush=True)
    world = dict(tasks=tasks, split=args.split, randomize=args.randomize)
    rows, episodes = [], []
    for who, control, places in runs:
        results = play_all(places, who, args.set, world)
        about = dict(policy=who, control=control, split=args.split, randomize=args.randomize)
        episodes += [about | result for result in results]
        found = [task for task in TASKS if any(result["task"] == task for result in results)]
        column = [summarize(results, task, about) for task in [*found, "all"]]
        rows += column
        print(describe(column[-1]), flush=True)
        print("    " + ", ".join(f"{row['task']} {row['k']}/{row['n']}" for row in column[:-1]))
    nothing = [sentence for task, sentence, _ in lines if task == "none"]
    if nothing:
        k = sum(model.understands(sentence) < UNDERSTOOD for sentence in nothing)
        rows.append(dict(policy=model.path, control="declined", task="none", k=k, n=len(nothing)))
        print(f"{percent(k, len(nothing))} of the sentences that ask for nothing are declined")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = dict(rows=rows, episodes=episodes, code=code_version())
        args.out.write_text(json.dumps(found, indent=1))
