r"""Meta-World's MT50 with picoVLA: scripted experts to demonstrations, a trained policy to scores.

    python examples/metaworld.py record --tasks mt50 --demos 50 --size 80 --out data/mt50.h5
    python train.py --data data/mt50.h5 --out_dir out_mt50 --steps 40000 --batch_size 96 \
        --keep_patches 96 --shift 5 --execute 2 --head_width 480 --buckets 1024 --seed 2
    python examples/metaworld.py eval --ckpt out_mt50/ckpt.pt --tasks mt50 --episodes 20

assets/metaworld.pt, which `eval` scores by default, was made so. Run this script from the project's
root, in a virtual environment of its own with what is in examples/requirements-metaworld.txt, since
Meta-World needs an older MuJoCo. Rendering needs OpenGL; on Linux it uses EGL, unless MUJOCO_GL says
otherwise.

The protocol is LeRobot's (src/lerobot/envs/metaworld.py): camera corner2, moved and turned upside
down, of which we draw the middle, where the hands stay; the first four numbers of the
observation, here the fingertips' place and an opening that is 0 when shut; success at any of 500
steps counts. The second camera, gripperPOV, is ours; train.py --cameras corner2 leaves it out.
Sentences are in metaworld.tsv: LeRobot's and, to train on beside them, our own. If `record` is
stopped, the same command carries on.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder, where `metaworld` would be this file
INSTALLED = importlib.util.find_spec("metaworld")
if INSTALLED and sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's drawing: every core has a process

import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from model import Policy, explain_errors

explain_errors("metaworld.py")
try:
    import mujoco
except (ImportError, AttributeError) as error:
    raise ValueError(f"MuJoCo does not start, perhaps for lack of OpenGL: {error}") from None

from eval import percent
from gen_data import Disturbance, number, write_episode

if INSTALLED:
    warnings.filterwarnings("ignore", module="metaworld")  # its experts ask for more than 1
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS as ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP as EXPERTS

# Of each task: group and official sentence of LeRobot's metaworld_config.json, our paraphrases, heard
# in training or for `eval --paraphrase` alone, and the task whose sentence `eval --swap` says.
TASKS = {}
for line in Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines()[1:]:
    task, what, value = line.split("\t")
    TASKS.setdefault(task, {}).setdefault(what, []).append(value)
MT10 = (
    "reach push pick-place door-open drawer-open drawer-close button-press-topdown "
    "peg-insert-side window-open window-close"
).split()

CAMERAS = ("corner2", "gripperPOV")
CORNER2 = (0.75, 0.075, 0.7)  # m, where LeRobot puts it
FOVY = 36.0  # degrees, of corner2; its own 60 show much that no hand comes near
# Half of all triangles, and next to no pixel.
UNSEEN = "right_arm_base_link right_l0 right_l1 head".split()
FILM = 128  # px, of --gif
FINGERTIPS = np.array([0, 0, -0.045])  # m from the body that is called hand
SHUT = 0.28  # of the observed opening, of 1, when the fingers touch
SIGNS = np.array([1, 1, 1, -1], np.float32)  # theirs shuts the gripper above 0
NOISE = 0.3  # on the scale of gen_data.py's --noise; these experts take long to recover
MISTAKEN = 0.4  # share of attempts that begin where an expert that is wrong has led
MISTAKE = 0.06  # m, standard deviation of each number that it is wrong about
STEPS = 500  # control steps, at most
# Hindsight takes the end of a demonstration for the goal, but success may come 9 cm before that. So
# the demonstration goes on for this many steps at full speed; slower steps count for less.
AFTER = 10
CREEP = 0.15  # of full speed: what a step counts for at least
CORES = min(os.cpu_count(), 61)  # as many processes as Windows allows
REPORT = 1_000_000  # seed of the first scene to report on; demonstrations are of those from 0


class Scene:
    """One of Meta-World's tasks, with the observations that picoVLA knows."""

    def __init__(self, task, size):
        self.task, self.size, self.renderers = task + "-v3", size, {}
        self.env = env = ENVIRONMENTS[self.task]()
        # Scenes follow from a seed, and the expert may see the goal: Meta-World's own way to ask for
        # that, metaworld.MT1, makes fifty scenes first.
        env.seeded_rand_vec, env._freeze_rand_vec, env._set_task_called = True, False, True
        env._partially_observable = False
        vars(env).pop("sawyer_observation_space", None)  # it was cached with the goal hidden
        # No antialiasing and no shadows: OpenGL in software is slow.
        env.model.vis.quality.offsamples = 0
        env.model.camera("corner2").pos = CORNER2
        env.model.camera("corner2").fovy = FOVY
        for name in UNSEEN:
            env.model.geom_rgba[env.model.geom_bodyid == env.model.body(name).id, 3] = 0

    def make_renderer(self, size):
        try:
            renderer = mujoco.Renderer(self.env.model, size, size)
        except mujoco.FatalError as error:
            raise ValueError(f"MuJoCo finds no OpenGL to draw with: {error}") from None
        for flag in mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION:
            renderer.scene.flags[flag] = False
        return renderer

    def reset(self, seed):
        self.env.seed(seed)
        self.seen, _ = self.env.reset()
        self.expert = EXPERTS[self.task]()
        mujoco.mj_forward(self.env.model, self.env.data)  # else the goal is drawn where it was

    def ask_expert(self, mistake=0):
        """The scripted policy's action, as step() takes it. A mistake (35,) is added to all that it
        is told but the hand's four numbers."""
        seen = self.seen.copy()
        seen[4:] += mistake
        return np.clip(self.expert.get_action(seen), -1, 1) * SIGNS

    def step(self, action):
        """Action (4,) in [-1, 1], the last above 0 opens; returns whether the task is done."""
        self.seen, _, _, _, info = self.env.step((action * SIGNS).clip(-1, 1))
        return bool(info["success"])

    def observe(self, look=True):
        """What the robot feels and, if it is to `look`, its pictures."""
        felt = dict(
            ee_pos=(self.seen[:3] + FINGERTIPS).astype(np.float32),  # m
            # Of the hand's camera, that is, which moves along but does not turn (mode "track").
            ee_quat=np.array([1, 0, 0, 0], np.float32),
            gripper=np.array([self.seen[3] - SHUT], np.float32),  # of 1
        )
        return felt | {f"{name}_image": self.picture(name) for name in CAMERAS if look}

    def picture(self, camera, size=None):
        size = size or self.size
        if size not in self.renderers:
            self.renderers[size] = self.make_renderer(size)
        self.renderers[size].update_scene(self.env.data, camera)
        picture = self.renderers[size].render()
        return picture[::-1, ::-1].copy() if camera == "corner2" else picture

    def calibration(self):
        """What gen_data.write_episode wants to know of the cameras."""
        data, attrs = self.env.data, {}
        fingertips = data.body("hand").xpos + FINGERTIPS
        for name, mount, origin, signs in (
            ("corner2", "world", 0, [-1, 1, -1]),  # z ahead, and upside down
            ("gripperPOV", "hand", fingertips, [1, -1, -1]),
        ):
            camera, pose = data.camera(name), np.eye(4)
            pose[:3, :3] = camera.xmat.reshape(3, 3) * signs
            pose[:3, 3] = camera.xpos - origin
            attrs |= {f"{name}_mount": mount, f"{name}_pose": pose}
            attrs[f"{name}_fovy"] = self.env.model.camera(name).fovy[0]
        return attrs


# ----------------------------------------------------------------------------------- recording
def demonstrate(scene, task, seed, look=True):
    """An episode of the expert, with noise on what is done and none on what is recorded: attrs and
    arrays of write_episode, without pictures unless it is to `look`, or False if it failed. Some
    begin where a mistaken expert has led."""
    rng = np.random.default_rng([seed, 1])
    disturbance = Disturbance(rng, NOISE)
    scene.reset(seed)
    if rng.random() < MISTAKEN:
        # Not recorded; only the recovery is, from fingers beside the thing or, after a push, which
        # half of them get, from far off: a policy's mistakes, as in gen_data.py's blunder.
        mistake, push = rng.normal(0, MISTAKE, 35), rng.normal(size=4)
        for _ in range(rng.integers(20, 80)):
            scene.step(disturbance.disturb(scene.ask_expert(mistake)))
        for _ in range(rng.integers(-50, 50)):
            scene.step(push)
        scene.env.curr_path_length = 0  # steps; beyond 500 it raises an error
    frames, done, more = [], False, AFTER
    attrs = scene.calibration() | dict(
        instruction=TASKS[task]["official"][0], task=task, scene_seed=seed, interrupted=False
    )
    while more > 0 and len(frames) < STEPS:
        action = scene.ask_expert()
        frames.append(scene.observe(look) | dict(actions=action))
        done |= scene.step(disturbance.disturb(action))
        more -= done * max(abs(action[:3]).max(), CREEP)
    arrays = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    return done and (attrs, arrays)


def record_task(folder, task, args):
    """Writes a task's demonstrations to a file of their own, unless it is there; returns its path."""
    path = folder / f"{task}_{args.demos}_{args.size}.h5"
    if not path.exists():
        scene, part = Scene(task, args.size), path.with_suffix(".tmp")
        with h5py.File(part, "w") as file:
            for seed in range(2 * args.demos):  # experts may fail, after mistakes above all
                if len(file) == args.demos:
                    break
                # Drawing takes most of the time, and failures are long: first without.
                if demonstrate(scene, task, seed, look=False):
                    write_episode(file, len(file), *demonstrate(scene, task, seed))
        part.replace(path)
    return path


def record(args):
    if args.out.exists():
        raise ValueError(f"{args.out} exists; delete it or choose another --out")
    folder = args.out.with_name(args.out.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    requests = [dict(task=task, intent=task, slots={}) for task in args.tasks]
    part = args.out.with_suffix(".tmp")
    with pool_of(args) as pool, h5py.File(part, "w") as file:
        paths = pool.map(record_task, repeat(folder), args.tasks, repeat(args))
        for path in tqdm(paths, "tasks", len(args.tasks), disable=None):
            with h5py.File(path) as finished:
                for episode in finished.values():
                    name = f"episode_{len(file)}"
                    file.copy(episode, name)
                    file[name].attrs["request"] = args.tasks.index(episode.attrs["task"])
        total = len(file)
        for task in args.tasks:
            file[f"wordings/{task}"] = TASKS[task]["official"] + TASKS[task]["heard"]
        file.attrs.update(
            total=total,
            tasks=",".join(args.tasks),
            requests=json.dumps(requests),
            proprio="ee_pos,gripper",
            action_names="dx,dy,dz,gripper",
        )
    part.replace(args.out)
    shutil.rmtree(folder)
    print(f"{args.out}: {total} demonstrations, of {args.demos * len(args.tasks)} asked for")


# ------------------------------------------------------------------------------------- scoring
def score_task(task, args):
    """Plays `args.episodes` scenes of a task; returns the task, its successes and pictures of
    the first."""
    torch.set_num_threads(1)
    policy = None if args.expert else Policy.load(args.ckpt)
    scene = Scene(task, policy.config.image_size if policy else FILM)
    # Between plans no picture is looked at, so none is drawn.
    lazy = policy and policy.config.frames == 1 and not policy.config.ensemble
    said = TASKS[TASKS[task]["swap"][0] if args.swap else task]
    sentences = said["unheard" if args.paraphrase else "official"]
    done, film = 0, []
    for seed in range(args.seed, args.seed + args.episodes):
        scene.reset(seed)
        sentence = sentences[seed % len(sentences)]
        if policy:
            policy.reset()
        for _ in range(STEPS):
            if policy:
                planned = lazy and policy.memory and policy.memory[0].chunks
                action = policy.predict(scene.observe(look=not planned), sentence)
            else:
                action = scene.ask_expert()
            if args.gif and seed == args.seed:
                film.append(scene.picture("corner2", FILM))
            if scene.step(action):
                done += 1
                break
    return task, done, film


def save_gif(films, path):
    """Films, each a list of pictures, side by side in a square, every fourth step."""
    across = int(np.ceil(len(films) ** 0.5))
    pictures = []
    for t in range(0, max(map(len, films)), 4):
        now = [film[min(t, len(film) - 1)] for film in films]
        now += [np.zeros_like(now[0])] * (across**2 - len(now))
        rows = [np.concatenate(now[i : i + across], 1) for i in range(0, len(now), across)]
        pictures.append(Image.fromarray(np.concatenate(rows)))
    pictures[0].save(
        path, "GIF", save_all=True, append_images=pictures[1:], duration=50, loop=0
    )


def score(args):
    groups, n, films = {}, args.episodes, []
    with pool_of(args) as pool:
        results = pool.map(score_task, args.tasks, repeat(args))
        for task, k, film in tqdm(results, total=len(args.tasks), disable=None):
            (group,) = TASKS[task]["group"]
            groups.setdefault(group, []).append(k)
            films.append(film)
            print(f"{group:10} {task:26} {k:3} of {n}", flush=True)
    for group, counts in groups.items():
        print(f"{group:10} {len(counts):2} tasks: {percent(sum(counts), n * len(counts))}")
    every = sum(groups.values(), [])
    means = [np.mean(counts) / n for counts in groups.values()]
    print(f"all: {percent(sum(every), n * len(every))}; macro {100 * np.mean(means):.1f}%")
    if args.gif:
        save_gif(films, args.gif)


# -------------------------------------------------------------------------------------- script
def pool_of(args):
    """Processes that Ctrl-C ends without a word."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        args.workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_DFL)
    )


def task_names(text):
    names = dict(mt10=MT10, mt50=list(TASKS)).get(text, text.split(","))
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not mt10, mt50 or one of {', '.join(TASKS)}"
            )
    return list(dict.fromkeys(names))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "eval"):
        add = commands.add_parser(name).add_argument
        add("--tasks", type=task_names, default="mt10", help="mt10, mt50 or names with commas")
        add("--workers", type=number(int, 1, 61), default=CORES, help="processes")
        if name == "record":
            add("--out", type=Path, default="data/mt10.h5")
            add("--demos", type=number(int, 1, 10_000), default=50, help="of each task")
            add("--size", type=number(int, 16, 256), default=96, help="px of pictures")
        else:
            shipped = ROOT / "assets/metaworld.pt"
            add("--ckpt", type=Path, default=shipped, help="default assets/metaworld.pt")
            add("--expert", action="store_true", help="score the scripted experts instead")
            add("--episodes", type=number(int, 1, 1000), default=10, help="of each task")
            add("--seed", type=number(int, 0, 2**31), default=REPORT, help="of the first scene")
            add("--paraphrase", action="store_true", help="say what was not trained on")
            add("--swap", action="store_true", help="say another task's sentence")
            add("--gif", type=Path, help="GIF to make of the first episodes")
    args = parser.parse_args()
    if not INSTALLED or mujoco.__version__[:2] != "3.":
        raise ValueError(
            "Meta-World, with the MuJoCo 3.3.0 that it needs, is not installed; make a virtual "
            "environment for it: python -m venv mw, and there pip install -r "
            "examples/requirements-metaworld.txt"
        )
    dict(record=record, eval=score)[args.command](args)


if __name__ == "__main__":
    main()
