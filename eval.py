"""Closed-loop evaluation: how often a policy does what it is told in unseen scenes. On 2 CPU cores:

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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gen_data import (
    ACTION_NAMES,
    HELD_OUT,
    NAMES,
    SPLITS,
    SUCCESS_STEPS,
    TASKS,
    TEST_SEED,
)
from gen_data import Env, choose, expert, explain_errors, make_instruction, pick
from model import UNDERSTOOD, VLA, code_version

CONTROLS = ("blind", "blind_shuffled", "deaf", "deaf_shuffled", "swap", "retarget")
# what a row counts episodes by, beside success
COUNTS = ("original_success", "declined", "wrong_first", "untouched")


# ----------------------------------------------------------------------------------- playing
def fill_in(wording, slots):
    """The sentence of a wording: each {name} in it is the word of that slot."""
    for slot, word in slots.items():
        wording = wording.replace("{%s}" % slot, word)
    return wording


def tell_another(env, rng):
    """Asks for something else that fits the scene as it is now, if there is anything; returns the
    sentence and the observation. The clock starts again."""
    others = [
        request
        for task in env.tasks
        for request in env.requests(task)
        if request != env.request
    ]
    request = pick(others or [env.request], rng)
    env.set_request(request, make_instruction(request, rng, env.split == "phrasing"))
    return env.instruction, env.observe()


def play(
    policy, env, seed, options=None, control="none", wording=None, watch=lambda obs: None
):
    """Plays one scene to its end; returns what came of it, a dict.

    policy: of model.py, or "expert" or "random". options: of Env.reset. control: of CONTROLS.
    wording: what to tell instead of the scene's own sentence; its {slots} are filled in. watch(obs)
    is called before every step, and at the end."""
    learned = not isinstance(policy, str)
    if learned:
        policy.reset(seed)
    rng = np.random.default_rng([seed, 2])
    # tasks take turns with the seeds, so this other scene has the same one
    if control.endswith("shuffled"):
        other_obs, other_info = env.reset(seed + len(env.tasks), options)
    obs, info = env.reset(seed, options)
    task, meaning = env.task, env.meaning  # the scene's own, whatever is told
    told = info["instruction"]
    pictures = [key for key in obs if key.endswith("_image")]
    shown = {}  # pictures in place of what the cameras see
    if wording:
        told = fill_in(wording, env.slots)
    elif control == "blind":
        shown = {key: np.full_like(obs[key], 127) for key in pictures}
    elif control == "blind_shuffled":
        shown = {key: other_obs[key] for key in pictures}
    elif control == "deaf":
        told = ""
    elif control == "deaf_shuffled":
        told = other_info["instruction"]
    elif control == "swap":
        told, obs = tell_another(env, rng)
    switch = rng.integers(5, 40) if control == "retarget" else None  # of env.steps
    original_steps = 0  # in a row, with the scene's own request fulfilled, under swap
    while True:
        watch(obs)
        action = action_of(policy, env, obs | shown, told, rng)
        obs, _, terminated, truncated, info = env.step(action)
        fulfilled = control == "swap" and TASKS[task].success(env, *meaning)
        original_steps = original_steps + 1 if fulfilled else 0
        if switch and (info["success"] or env.steps == switch):
            told, obs = tell_another(env, rng)  # restarts the clock
            switch = None
        elif terminated or truncated or original_steps == SUCCESS_STEPS:
            break
    watch(obs)
    declined = learned and policy.understands(told) < UNDERSTOOD
    success = info["success"] and not declined  # it was played all the same
    touched = info["touched"]  # the colour of the block that was touched first
    return info | dict(
        seed=seed,
        task=task,
        told=told,
        success=success,
        original_success=original_steps == SUCCESS_STEPS,
        declined=declined,
        wrong_first=not success and touched not in (None, info.get("block")),
        untouched=not success and touched is None,
        steps=env.steps,
    )


def action_of(policy, env, obs, told, rng):
    if policy == "expert":
        return expert(env)
    if policy == "random":
        return rng.uniform(-1, 1, len(ACTION_NAMES))
    return policy.predict(obs, told)


def load(path, changes):
    """The policy of a checkpoint, with changes of its Config, ["execute=2"]."""
    policy = VLA.load(path)
    config = vars(policy.config)
    for change in changes:
        key, _, value = change.partition("=")
        if key not in config:
            raise ValueError(f"--set {change}: the policy has no {key!r}")
        config[key] = type(config[key])(value)
    policy.config.__post_init__()  # complains about what does not go together
    return policy


# Scenes are played in processes of their own. Each makes its policy and its Env once, in start(),
# and then plays one scene after the other with them, in play_job().
def start(who, changes, world):
    """Prepares a process. who: "expert", "random", or a checkpoint; world: arguments of Env."""
    global player
    torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
    policy = who
    cameras = ()
    if who not in ("expert", "random"):
        policy = load(who, changes)
        cameras = policy.config.cameras
    player = policy, Env(cameras=cameras, **world)


def play_job(scene):
    return play(*player, **scene)


def play_all(scenes, *setup):
    """The results of play() with each of these arguments. setup: arguments of start()."""
    if len(scenes) < 20:  # starting processes would take longer
        start(*setup)
        return list(map(play_job, scenes))
    with multiprocessing.get_context("spawn").Pool(None, start, setup) as pool:
        results = pool.imap(play_job, scenes)
        return list(tqdm(results, total=len(scenes), leave=False, disable=None))


# ----------------------------------------------------------------------------------- results
def wilson(k, n):
    """95% interval of a proportion (Wilson 1927); well behaved at 0 and 1."""
    z = 1.96  # standard deviations
    total = n + z**2
    centre = (k + z**2 / 2) / total
    half = z * (k * (n - k) / n + z**2 / 4) ** 0.5 / total
    return max(centre - half, 0.0), min(centre + half, 1.0)


def percent(k, n):
    low, high = wilson(k, n)
    return f"{k}/{n} = {100 * k / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def summarize(results, task, about):
    """One row: of a task, or of "all". k of n episodes were a success, from low to high (95%)."""
    results = [result for result in results if task in ("all", result["task"])]

    def values(key):
        return [result[key] for result in results]

    row = dict(about, task=task, k=sum(values("success")), n=len(results))
    row["low"], row["high"] = wilson(row["k"], row["n"])
    row["steps"] = np.mean(values("steps"))
    row["force"] = max(values("force"))  # N
    return row | {key: sum(values(key)) for key in COUNTS}


def read_instructions(path):
    """[(task, wording, slots), ..] of lines of task<TAB>wording, and for push and drawer another
    tab and their direction or way, which is what `slots` has: names are whatever the scene has."""
    found = []
    for line in path.read_text("utf-8-sig").splitlines():
        task, wording, *words = [*line.split("\t"), ""]
        slots = TASKS[task].slots if task in TASKS else ()
        named = all("{%s}" % slot in wording for slot in slots if slot in NAMES)
        if task not in (*TASKS, "none") or not named:
            raise ValueError(
                f"{path}: {line!r} should be a task, a tab, a sentence with {{block}}, {{pad}} or "
                f"{{lower}} in it, and for push and drawer a tab and the direction or way"
            )
        others = [slot for slot in slots if slot not in NAMES]
        found.append((task, wording, dict(zip(others, words))))
    return found


def describe(row):
    """A line about a row."""
    text = f"{row['control'].replace('none', 'policy'):15} {percent(row['k'], row['n'])}"
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
    add(
        "--set",
        nargs="*",
        default=[],
        help="changes to its Config: execute=2 flow_steps=8",
    )
    add("--policies", default="policy", help="comma list of expert, random, policy")
    add(
        "--controls",
        action="store_true",
        help="also play the checkpoint under each control",
    )
    add(
        "--episodes",
        type=int,
        default=100,
        help="scenes, shared among the tasks (default 100)",
    )
    add(
        "--seed",
        type=int,
        default=TEST_SEED,
        help="of the first scene; from 0: for choosing",
    )
    add("--tasks", help="all, or a comma list (default: what the checkpoint learned)")
    add("--split", default="seen", choices=SPLITS, help="seen, or what is held out")
    add(
        "--randomize",
        type=float,
        default=0.0,
        help="how much the world differs (default 0)",
    )
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
    scenes = [dict(seed=args.seed + i) for i in range(len(told) or args.episodes)]
    reworded = []
    for scene, (task, wording, slots) in zip(scenes, told):
        scene["options"] = dict(task=task, slots=slots)
        reworded.append(scene | dict(wording=wording))
    if not tasks or not scenes or lines and not model:
        raise ValueError(
            "no scene, or no policy; change --policies, --tasks, --split, --episodes"
        )
    # Who plays, what the results are called, and what play() is given for each scene.
    runs = [(name, name, scenes) for name in names if name != "policy"]
    if model:
        print(
            f"{model.path}: step {model.step}, code {model.code}; this code {code_version()}"
        )
        runs.append((model.path, "none", scenes))
        for control in CONTROLS if args.controls else ():
            runs.append(
                (model.path, control, [scene | dict(control=control) for scene in scenes])
            )
        if reworded:
            runs.append((model.path, "these sentences", reworded))
    print(f"{len(scenes)} scenes from seed {args.seed}, split {args.split}")
    setting = dict(split=args.split, randomize=args.randomize)
    rows = []
    episodes = []
    for who, control, played in runs:
        results = play_all(played, who, args.set, dict(setting, tasks=tasks))
        about = dict(setting, policy=who, control=control)
        episodes += [about | result for result in results]
        found = choose([result["task"] for result in results], TASKS)
        *of_tasks, of_all = [summarize(results, task, about) for task in [*found, "all"]]
        rows += [*of_tasks, of_all]
        print(describe(of_all))
        print(
            "    " + ", ".join(f"{row['task']} {row['k']}/{row['n']}" for row in of_tasks)
        )
    nothing = [wording for task, wording, _ in lines if task == "none"]
    if nothing:
        k = sum(model.understands(wording) < UNDERSTOOD for wording in nothing)
        rows.append(
            dict(policy=model.path, control="declined", task="none", k=k, n=len(nothing))
        )
        print(
            f"{percent(k, len(nothing))} of the sentences that ask for nothing are declined"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(
            dict(rows=rows, episodes=episodes, code=code_version()), indent=1
        )
        args.out.write_text(content)
