r"""Meta-World's MT50 with picoVLA: scripted experts to demonstrations, a trained policy to scores.

    python examples/metaworld.py record --tasks mt50 --demos 50 --size 80 --out data/mt50
    python train.py --data data/mt50 --out_dir out_mt50 --steps 40000 --batch_size 96 \
        --keep_patches 96 --shift 5 --execute 2 --head_width 480 --buckets 1024 --seed 2
    python examples/metaworld.py eval --ckpt out_mt50/ckpt.pt --tasks mt50 --episodes 20

assets/metaworld.pt, which `eval` scores by default, was made so at 83ea29e, whose labels in
hindsight also knew thin things and pushes round a corner. Run this script from the project's
root, in a virtual environment of its own with what is in examples/requirements-metaworld.txt, since
Meta-World needs an older MuJoCo. Drawing needs OpenGL; on Linux that is EGL (Debian's libegl1),
unless MUJOCO_GL says otherwise. If `record` is stopped, the same command carries on.

The protocol is LeRobot's (src/lerobot/envs/metaworld.py): camera corner2, moved and turned upside
down, of which we draw the middle, where the hands stay; the first four numbers of the
observation, here the fingertips' place and an opening that is 0 when shut; success at any of 500
steps counts. The second camera, gripperPOV, is ours; train.py --cameras corner2 leaves it out.
Sentences are in metaworld.tsv: LeRobot's and, to train on beside them, our own.
"""

import sys
from pathlib import Path

# In place of this folder, where `metaworld` would be this file and `inspect` its neighbour.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import functools
import importlib.util
import multiprocessing
import os
import signal
import warnings

INSTALLED = importlib.util.find_spec("metaworld")
if INSTALLED and sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault(
        "LP_NUM_THREADS", "1"
    )  # of Mesa's drawing: every core has a process

import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

try:
    import mujoco
except (ImportError, AttributeError, RuntimeError) as error:
    sys.exit(f"metaworld.py: MuJoCo does not start, perhaps for lack of OpenGL: {error}")

from eval import percent
from gen_data import RayCamera, disturbance, explain_errors, write_episode
from model import Policy
from play import save

if INSTALLED:
    warnings.filterwarnings(
        "ignore", module="metaworld"
    )  # its experts ask for more than 1
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

# Each camera, and what its picture is turned by, as a matrix of image coordinates 0..1.
CAMERAS = dict(
    corner2=np.array([[-1, 0, 1], [0, -1, 1], [0, 0, 1]]), gripperPOV=np.eye(3)
)
CORNER2 = (0.75, 0.075, 0.7)  # m, where LeRobot puts it
FOVY = 36.0  # degrees, of corner2; its own 60 show much that no hand comes near
# Half of all triangles, and next to no pixel.
UNSEEN = "right_arm_base_link right_l0 right_l1 head".split()
FILM = 128  # px, of --gif
FINGERTIPS = np.array([0, 0, -0.045])  # m from the body that is called hand
SHUT = 0.28  # of the observed opening, of 1, when the fingers touch
SIGNS = np.array([1, 1, 1, -1], np.float32)  # theirs shuts the gripper above 0
NOISE = 0.3  # share of gen_data.py's disturbance; these experts take long to recover
MISTAKEN = 0.4  # share of attempts that begin where an expert that is wrong has led
MISTAKE = 0.06  # m, standard deviation of each number that it is wrong about
STEPS = 500  # control steps, at most
# Hindsight takes the end of a demonstration for the goal, but success may come 9 cm before that. So
# the demonstration goes on for this many steps at full speed; slower steps count for less.
AFTER = 10
CREEP = 0.15  # of full speed: what a step counts for at least
REPORT = (
    1_000_000  # seed of the first scene to report on; demonstrations are of those from 0
)


class Scene:
    """One of Meta-World's tasks, with the observations that picoVLA knows."""

    def __init__(self, task, size):
        self.size, self.renderers = size, {}
        self.make_expert = EXPERTS[f"{task}-v3"]
        self.env = env = ENVIRONMENTS[f"{task}-v3"]()
        # Scenes follow from a seed, and the expert may see the goal: Meta-World's own way to ask for
        # that, metaworld.MT1, makes fifty scenes first.
        env.seeded_rand_vec, env._freeze_rand_vec, env._set_task_called = (
            True,
            False,
            True,
        )
        env._partially_observable = False
        vars(env).pop(
            "sawyer_observation_space", None
        )  # it was cached with the goal hidden
        # No antialiasing and no shadows: OpenGL in software is slow.
        env.model.vis.quality.offsamples = 0
        env.model.camera("corner2").pos = CORNER2
        env.model.camera("corner2").fovy = FOVY
        for name in UNSEEN:
            env.model.geom_rgba[env.model.geom_bodyid == env.model.body(name).id, 3] = 0
        self.cameras = {name: RayCamera(env.model, name) for name in CAMERAS}

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
        self.expert = self.make_expert()
        mujoco.mj_forward(
            self.env.model, self.env.data
        )  # else the goal is drawn where it was

    def ask_expert(self, mistake=0):
        """The scripted policy's action (4,), as step() takes it. A mistake (35,) is added to all that
        it is told but the hand's four numbers."""
        seen = self.seen.copy()
        seen[4:] += mistake
        return (np.clip(self.expert.get_action(seen), -1, 1) * SIGNS).astype(np.float32)

    def step(self, action):
        """Action (4,) in [-1, 1], the last above 0 opens; returns whether the task is done."""
        self.seen, _, _, _, info = self.env.step((action * SIGNS).clip(-1, 1))
        return bool(info["success"])

    def observe(self, look=True):
        """What the robot feels and, if it is to `look`, its pictures."""
        felt = dict(
            ee_pos=(self.seen[:3] + FINGERTIPS).astype(np.float32),  # m
            gripper=np.array([self.seen[3] - SHUT], np.float32),  # of 1
        )
        return felt | {f"{name}_image": self.picture(name) for name in CAMERAS if look}

    def picture(self, camera, size=None):
        """(size, size, 3) uint8"""
        size = size or self.size
        if size not in self.renderers:
            self.renderers[size] = self.make_renderer(size)
        self.renderers[size].update_scene(self.env.data, camera)
        picture = self.renderers[size].render()
        return picture[::-1, ::-1].copy() if camera == "corner2" else picture

    def matrix(self, camera):
        """Its camera matrix (3, 4), see gen_data.project(); world frame."""
        return CAMERAS[camera] @ self.cameras[camera].matrix(self.env.data)


# ----------------------------------------------------------------------------------- recording
def demonstrate(scene, seed, look):
    """Frames of write_episode, with noise on what is done and none on what is recorded; without
    pictures unless it is to `look`; None if the expert failed. Some episodes begin where a mistaken
    expert has led."""
    rng = np.random.default_rng([seed, 1])
    noise = disturbance(rng, NOISE)
    scene.reset(seed)
    if rng.random() < MISTAKEN:
        # Not recorded; only the recovery is, from fingers beside the thing or, after a push, which
        # half of them get, from far off: a policy's mistakes, as in gen_data.py's blunder.
        mistake, push = rng.normal(0, MISTAKE, 35), rng.normal(size=4)
        for _ in range(rng.integers(20, 80)):
            scene.step(scene.ask_expert(mistake) + next(noise))
        for _ in range(rng.integers(-50, 50)):
            scene.step(push)
        scene.env.curr_path_length = 0  # steps; beyond 500 it raises an error
    frames, done, more = [], False, AFTER
    while more > 0 and len(frames) < STEPS:
        action = scene.ask_expert()
        frame = {
            f"observations/{key}": value for key, value in scene.observe(look).items()
        }
        for name in CAMERAS:
            frame[f"cameras/{name}"] = scene.matrix(name).astype(np.float32)
        frames.append(frame | dict(actions=action))
        done |= scene.step(action + next(noise))
        more -= done * max(np.abs(action[:3]).max(), CREEP)
    return frames if done else None


def record_task(job):
    """Writes a task's demonstrations to a file, unless it is there; returns how many it holds. job:
    (task, arguments)."""
    task, args = job
    path, part = args.out / f"{task}.h5", args.out / f"{task}.part"
    settings = f"{args.demos} demonstrations of {args.size} px"
    if path.exists():
        with h5py.File(path) as file:
            if file.attrs["settings"] != settings:
                raise ValueError(
                    f"{path} was to hold {file.attrs['settings']}; choose another --out"
                )
            return file.attrs["total"]
    scene, total = Scene(task, args.size), 0
    (official,) = TASKS[task]["official"]
    about = dict(
        instruction=official, task=task, intent=task, slots="{}", interrupted=False
    )
    with h5py.File(part, "w") as file:
        for seed in range(2 * args.demos):  # experts may fail, after mistakes above all
            # Drawing takes most of the time, and failures are long: first without.
            if total < args.demos and demonstrate(scene, seed, look=False):
                frames = demonstrate(scene, seed, look=True)
                write_episode(file, total, about | dict(scene_seed=seed), frames)
                total += 1
        file[f"wordings/{task}"] = [official, *TASKS[task]["heard"]]
        file.attrs.update(
            total=total,
            tasks=task,
            settings=settings,
            proprio="ee_pos,gripper",
            action_names="dx,dy,dz,gripper",
        )
    part.replace(path)
    return total


def record(args):
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(
        map_jobs(record_task, [(task, args) for task in args.tasks], args.workers)
    )
    print(
        f"{args.out}: {total} demonstrations, of {args.demos * len(args.tasks)} asked for"
    )


# ------------------------------------------------------------------------------------- scoring
load = functools.cache(Policy.load)
make_scene = functools.lru_cache(1)(Scene)  # jobs come task by task


def play(job):
    """Plays one scene; returns whether the task was done, and pictures if there is to be a GIF. job:
    (task, seed, arguments)."""
    task, seed, args = job
    torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
    policy = None if args.expert else load(args.ckpt)
    scene = make_scene(task, policy.config.image_size if policy else FILM)
    scene.reset(seed)
    said = TASKS[TASKS[task]["swap"][0] if args.swap else task]
    sentences = said["unheard" if args.paraphrase else "official"]
    film, done, step = [], False, 0
    if policy:
        policy.reset(seed)
        always = policy.config.frames > 1 or policy.config.ensemble
    while not done and step < STEPS:
        if args.gif and seed == args.seed and step % 4 == 0:
            film.append(Image.fromarray(scene.picture("corner2", FILM)))
        if policy:
            look = always or not policy.plans  # between plans no picture is looked at
            action = policy.predict(scene.observe(look), sentences[seed % len(sentences)])
        else:
            action = scene.ask_expert()
        done = scene.step(action)
        step += 1
    return done, film


def score(args):
    n, groups = args.episodes, {}
    if n < 1:
        raise ValueError("--episodes must be at least 1")
    seeds = range(args.seed, args.seed + n)
    jobs = [(task, seed, args) for task in args.tasks for seed in seeds]
    done, films = zip(*map_jobs(play, jobs, args.workers))
    for i, task in enumerate(args.tasks):
        (group,) = TASKS[task]["group"]
        k = sum(done[i * n : (i + 1) * n])
        groups.setdefault(group, []).append(k)
        print(f"{group:10} {task:26} {k:3} of {n}")
    for group, counts in groups.items():
        print(
            f"{group:10} {len(counts):2} tasks: {percent(sum(counts), n * len(counts))}"
        )
    macro = np.mean([np.mean(counts) / n for counts in groups.values()])
    print(f"all: {percent(sum(done), len(done))}; macro {100 * macro:.1f}%")
    if args.gif:
        save([film for film in films if film], args.gif)


# -------------------------------------------------------------------------------------- script
def map_jobs(function, jobs, workers):
    """The results of `function`, in turn, computed in several processes."""
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C is for the main process, which ends the others.
    with spawn.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(tqdm(pool.imap(function, jobs), total=len(jobs), disable=None))


def task_names(text):
    names = dict(mt10=MT10, mt50=list(TASKS)).get(text, text.split(","))
    for name in names:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise argparse.ArgumentTypeError(
                f"{name!r} is not mt10, mt50 or one of {known}"
            )
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    add = both.add_argument
    add(
        "--tasks", type=task_names, default="mt10", help="mt10, mt50 or names with commas"
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add = commands.add_parser("record", parents=[both]).add_argument
    add("--out", type=Path, default="data/mt10", help="folder, a file for each task")
    add("--demos", type=int, default=50, help="of each task")
    add("--size", type=int, default=96, help="px of pictures")
    add = commands.add_parser("eval", parents=[both]).add_argument
    shipped = ROOT / "assets/metaworld.pt"
    add("--ckpt", type=Path, default=shipped, help="default assets/metaworld.pt")
    add("--expert", action="store_true", help="score the scripted experts instead")
    add("--episodes", type=int, default=10, help="of each task")
    add("--seed", type=int, default=REPORT, help="of the first scene")
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
    run = record if args.command == "record" else score
    run(args)
