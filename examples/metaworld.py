r"""Meta-World's MT50 with picoVLA: scripted experts to demonstrations, a trained policy to scores.

    python examples/metaworld.py record --tasks mt50 --demos 50 --size 80 --out data/mt50.h5
    python train.py --data data/mt50.h5 --out_dir out_mt50 --steps 40000 --batch_size 96 \
        --keep_patches 96 --shift 5 --execute 2 --head_width 480 --buckets 1024
    python examples/metaworld.py eval --ckpt out_mt50/ckpt.pt --tasks mt50 --episodes 20

This made assets/metaworld.pt, which `eval` scores by default. Run it from the project's root, in a
virtual environment of its own with what is in examples/requirements-metaworld.txt, since Meta-World
needs an older MuJoCo. Rendering needs OpenGL; on Linux without a display EGL is used, or what
MUJOCO_GL says.

The protocol is LeRobot's (src/lerobot/envs/metaworld.py): camera corner2, moved and turned upside
down, of which we draw the middle, where the hands stay; the first four numbers of the
observation, here the fingertips' place and an opening that is 0 when shut; success at any of 500
steps counts. The second camera, gripperPOV, is ours; train.py --cameras corner2 leaves it out. If
`record` is stopped, the same command carries on.
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

# Difficulty and sentence of LeRobot's metaworld_config.json; then our paraphrases, the first to train
# on beside it, the last for `eval --paraphrase` alone; then the task whose sentence `--swap` says.
TABLE = """
hard | assembly | Pick up a nut and place it onto a peg | take the nut and put it over the peg | grab the ring and drop it on the post | disassemble
medium | basketball | Dunk the basketball into the basket | drop the ball into the hoop | put the basketball through the hoop | reach
medium | bin-picking | Grasp the puck from one bin and place it into another bin | move the puck to the other bin | take the puck over into the second bin | reach
medium | box-close | Grasp the cover and close the box with it | put the lid on the box | close the box by placing its lid on top | reach
easy | button-press-topdown | Press a button from the top | push the button down from above | hit the button on the top | reach
easy | button-press-topdown-wall | Bypass a wall and press a button from the top | go over the wall and push the button down | get past the wall and press the button from above | reach
easy | button-press | Press a button | push the button in | hit the button | reach
easy | button-press-wall | Bypass a wall and press a button | go around the wall and push the button in | get past the wall and hit the button | reach
easy | coffee-button | Push a button on the coffee machine | start the coffee machine with its button | press the button of the coffee maker | coffee-push
medium | coffee-pull | Pull a mug from a coffee machine | take the mug away from the coffee machine | draw the mug out of the coffee maker | coffee-push
medium | coffee-push | Push a mug under a coffee machine | slide the mug below the coffee machine | move the mug under the coffee maker | coffee-pull
easy | dial-turn | Rotate a dial 180 degrees | turn the dial half way round | give the dial half a turn | reach
very_hard | disassemble | Pick a nut out of a peg | take the nut off the peg | lift the ring from the post | assembly
easy | door-close | Close a door with a revolving joint | shut the door | push the door shut | door-open
easy | door-lock | Lock the door by rotating the lock clockwise | turn the lock to lock the door | lock that door | door-unlock
easy | door-open | Open a door with a revolving joint | pull the door open | swing the door open | door-close
easy | door-unlock | Unlock the door by rotating the lock counter-clockwise | turn the lock back to unlock the door | unlock that door | door-lock
hard | hand-insert | Insert the gripper into a hole | put the hand into the hole | stick the gripper in the hole | reach
easy | drawer-close | Push and close a drawer | shut the drawer | push the drawer in | drawer-open
easy | drawer-open | Open a drawer | pull the drawer out | slide the drawer open | drawer-close
easy | faucet-open | Rotate the faucet counter-clockwise | turn the tap on | open the tap | faucet-close
easy | faucet-close | Rotate the faucet clockwise | turn the tap off | close the tap | faucet-open
medium | hammer | Hammer a screw on the wall | take the hammer and drive the screw in | hit the screw in the wall with the hammer | reach
easy | handle-press-side | Press a handle down sideways | push the handle at the side down | press the side handle down | handle-pull-side
easy | handle-press | Press a handle down | push the handle down | press down on the handle | handle-pull
easy | handle-pull-side | Pull a handle up sideways | lift the handle at the side | pull the side handle up | handle-press-side
easy | handle-pull | Pull a handle up | lift the handle | raise the handle | handle-press
easy | lever-pull | Pull a lever down 90 degrees | move the lever by a quarter turn | pull the lever a quarter of the way round | reach
medium | peg-insert-side | Insert a peg sideways | put the peg into the hole at the side | slide the peg into the side of the box | peg-unplug-side
very_hard | pick-place-wall | Pick a puck, bypass a wall and place the puck | lift the puck over the wall to the goal | carry the puck past the wall to its place | push-wall
hard | pick-out-of-hole | Pick up a puck from a hole | take the puck out of the hole | lift the puck from the hole | reach
easy | reach | Reach a goal position | move the hand to the goal | go to the target with the hand | push
hard | push-back | Push the puck to a goal | push the puck back to the goal | slide the puck back to its target | push
hard | push | Push the puck to a goal | slide the puck to the goal | shove the puck to the target | pick-place
hard | pick-place | Pick and place a puck to a goal | lift the puck to the goal | carry the puck up to the target | push
easy | plate-slide | Slide a plate into a cabinet | push the plate into the cabinet | move the plate inside the cabinet | plate-slide-side
easy | plate-slide-side | Slide a plate into a cabinet sideways | push the plate into the cabinet from the side | move the plate sideways into the cabinet | plate-slide
easy | plate-slide-back | Get a plate from the cabinet | pull the plate out of the cabinet | take the plate out of the cabinet | plate-slide-back-side
easy | plate-slide-back-side | Get a plate from the cabinet sideways | pull the plate out of the cabinet to the side | take the plate sideways out of the cabinet | plate-slide-back
easy | peg-unplug-side | Unplug a peg sideways | pull the peg out of its hole | draw the peg out sideways | peg-insert-side
medium | soccer | Kick a soccer into the goal | push the football into the goal | get the soccer ball into the net | reach
very_hard | stick-push | Grasp a stick and push a box using the stick | push the box with the stick | take the stick and shove the box along with it | stick-pull
very_hard | stick-pull | Grasp a stick and pull a box with the stick | pull the box with the stick | take the stick and draw the box back with it | stick-push
medium | push-wall | Bypass a wall and push a puck to a goal | push the puck around the wall to the goal | slide the puck past the wall to the target | pick-place-wall
easy | reach-wall | Bypass a wall and reach a goal | move the hand past the wall to the goal | go around the wall to the target | push-wall
very_hard | shelf-place | Pick and place a puck onto a shelf | put the puck on the shelf | lift the puck up onto the shelf | reach
medium | sweep-into | Sweep a puck into a hole | push the puck into the hole | sweep the puck down the hole | sweep
medium | sweep | Sweep a puck off the table | push the puck off the table | sweep the puck over the edge | sweep-into
easy | window-open | Push and open a window | slide the window open | open that window | window-close
easy | window-close | Push and close a window | slide the window shut | shut that window | window-open
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
TASKS = {row[1]: row for row in ROWS}
MT10 = (
    "reach push pick-place door-open drawer-open drawer-close button-press-topdown "
    "peg-insert-side window-open window-close"
).split()
GROUPS = ("easy", "medium", "hard", "very_hard")

CAMERAS = ("corner2", "gripperPOV")
CORNER2 = (0.75, 0.075, 0.7)  # m, where LeRobot puts it
FOVY = 36.0  # degrees, of corner2; its own 60 show much that no hand comes near
# Half of all triangles, and next to no pixel.
UNSEEN = "right_arm_base_link right_l0 right_l1 head".split()
FILM = 128  # px, of --gif
FINGERTIPS = np.array([0, 0, -0.045])  # m from the body that is called hand
SHUT = 0.28  # of the observed opening, of 1, when the fingers touch
NOISE = 0.3  # as gen_data.py's --noise; these experts take long to recover
STEPS = 500  # control steps, at most
AFTER = 10  # steps that a demonstration goes on: success may be 7 cm from the goal
CREEP = 0.25  # of full speed: slower steps count as a quarter, as some experts creep to the end
JOB = 10  # demonstrations in a file of an unfinished recording
REPORT = 1_000_000  # seed of the first scene to report on; demonstrations are of those from 0


class Scene:
    """One of Meta-World's tasks, with the observations that picoVLA knows."""

    def __init__(self, task, size):
        self.size, self.renderers = size, {}
        self.env = env = ENVIRONMENTS[task + "-v3"]()
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
        for flag in ("SHADOW", "REFLECTION"):
            renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        return renderer

    def reset(self, seed):
        self.env.seed(seed)
        self.seen, _ = self.env.reset()
        mujoco.mj_forward(self.env.model, self.env.data)  # else the goal is drawn where it was

    def step(self, action):
        """Action (4,) in [-1, 1], the last above 0 opens; returns whether the task is done."""
        motion, gripper = action[:3], -action[3]
        self.seen, _, _, _, info = self.env.step(np.append(motion, gripper).clip(-1, 1))
        return bool(info["success"])

    def observe(self, look=True):
        """What the robot feels and, if it is to `look`, its pictures."""
        felt = dict(
            ee_pos=(self.seen[:3] + FINGERTIPS).astype(np.float32),  # m
            ee_quat=self.env.data.body("hand").xquat.astype(np.float32),
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
        hand = data.body("hand")
        turn = hand.xmat.reshape(3, 3).T
        for name, mount in zip(CAMERAS, ("world", "hand")):
            camera, pose = data.camera(name), np.eye(4)
            axes, position = camera.xmat.reshape(3, 3) * [1, -1, -1], camera.xpos  # z ahead
            if mount == "world":
                axes *= [-1, -1, 1]  # upside down
            else:
                axes, position = turn @ axes, turn @ (position - hand.xpos - FINGERTIPS)
            pose[:3, :3], pose[:3, 3] = axes, position
            attrs |= {f"{name}_mount": mount, f"{name}_pose": pose}
            attrs[f"{name}_fovy"] = self.env.model.camera(name).fovy[0]
        return attrs


class Expert:
    """The scripted policy of a task, with the actions of picoVLA's: above 0 opens the gripper."""

    def __init__(self, scene, task):
        self.scene, self.policy = scene, EXPERTS[task + "-v3"]()

    def predict(self):
        action = np.clip(self.policy.get_action(self.scene.seen), -1, 1)
        return (action * [1, 1, 1, -1]).astype(np.float32)


# ----------------------------------------------------------------------------------- recording
def demonstrate(scene, task, seed, look=True):
    """An episode of the expert, with noise on what is done and none on what is recorded: attrs and
    arrays of write_episode, without pictures unless it is to `look`, or False if it failed."""
    disturbance = Disturbance(np.random.default_rng([seed, 1]), NOISE)
    scene.reset(seed)
    expert, frames, done, more = Expert(scene, task), [], False, AFTER
    attrs = dict(instruction=TASKS[task][2], task=task, scene_seed=seed, interrupted=False)
    attrs |= scene.calibration()
    while more > 0 and len(frames) < STEPS:
        action = expert.predict()
        frames.append(scene.observe(look) | dict(actions=action))
        done |= scene.step(disturbance.disturb(action))
        more -= done * (0.25 if abs(action[:3]).max() < CREEP else 1)
    arrays = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    return done and (attrs, arrays)


def record_job(folder, task, first, args):
    """Writes demonstrations of a task, from this one on, to a file of their own, unless it is there."""
    path = folder / f"{task}_{first}_{args.size}.h5"
    if not path.exists():
        scene, part = Scene(task, args.size), path.with_suffix(".tmp")
        with h5py.File(part, "w") as file:
            for seed in range(2 * first, 2 * (first + JOB)):  # some experts fail now and then
                if len(file) == min(JOB, args.demos - first):
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
    firsts = range(0, args.demos, JOB)
    jobs = [(folder, task, first, args) for task in args.tasks for first in firsts]
    requests = [dict(task=task, intent=task, slots={}) for task in args.tasks]
    part, total = args.out.with_suffix(".tmp"), 0
    with pool_of(args) as pool, h5py.File(part, "w") as file:
        paths = pool.map(record_job, *zip(*jobs))
        for path in tqdm(paths, "demonstrations, tens", len(jobs), disable=None):
            with h5py.File(path) as finished:
                for name in finished:
                    finished.copy(name, file, f"episode_{total}")
                    attrs = file[f"episode_{total}"].attrs
                    attrs["request"] = args.tasks.index(attrs["task"])
                    total += 1
        for task in args.tasks:
            file[f"wordings/{task}"] = TASKS[task][2:4]
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
    """Plays `args.episodes` scenes of a task; returns how many succeeded, and pictures of the first."""
    torch.set_num_threads(1)
    policy = None if args.expert else Policy.load(args.ckpt)
    scene = Scene(task, policy.config.image_size if policy else FILM)
    # Between plans no picture is looked at, so none is drawn.
    lazy = policy and policy.config.frames == 1 and not policy.config.ensemble
    said = TASKS[TASKS[task][5]] if args.swap else TASKS[task]
    sentence, done, film = said[4 if args.paraphrase else 2], [], []
    for seed in range(args.seed, args.seed + args.episodes):
        scene.reset(seed)
        expert = Expert(scene, task)
        if policy:
            policy.reset()
        for _ in range(STEPS):
            if policy:
                planned = lazy and policy.memory and policy.memory[0].chunks
                action = policy.predict(scene.observe(look=not planned), sentence)
            else:
                action = expert.predict()
            if args.gif and seed == args.seed:
                film.append(scene.picture("corner2", FILM))
            success = scene.step(action)
            if success:
                break
        done.append(success)
    return sum(done), film


def save_gif(films, path):
    """Films, each a list of pictures, side by side in a square, every fourth step."""
    across = int(np.ceil(len(films) ** 0.5))
    pictures = []
    for t in range(0, max(map(len, films)), 4):
        now = [film[min(t, len(film) - 1)] for film in films]
        now += [np.zeros_like(now[0])] * (across**2 - len(now))
        rows = [np.concatenate(now[i : i + across], 1) for i in range(0, len(now), across)]
        pictures.append(Image.fromarray(np.concatenate(rows)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50, loop=0)


def score(args):
    if args.gif and args.gif.suffix != ".gif":
        raise ValueError(f"--gif {args.gif}: its name must end in .gif")
    groups, n, films = {group: [] for group in GROUPS}, args.episodes, []
    with pool_of(args) as pool:
        results = pool.map(score_task, args.tasks, [args] * len(args.tasks))
        for task, (k, film) in zip(
            args.tasks, tqdm(results, total=len(args.tasks), disable=None)
        ):
            groups[TASKS[task][0]].append(k)
            films.append(film)
            print(f"{TASKS[task][0]:10} {task:26} {k:3} of {n}", flush=True)
    for group, counts in groups.items():
        if counts:
            print(f"{group:10} {len(counts):2} tasks: {percent(sum(counts), n * len(counts))}")
    every = sum(groups.values(), [])
    means = [np.mean(counts) / n for counts in groups.values() if counts]
    print(f"all: {percent(sum(every), n * len(every))}; macro {100 * np.mean(means):.1f}%")
    if args.gif:
        save_gif(films, args.gif)


# -------------------------------------------------------------------------------------- script
def pool_of(args):
    """Processes that Ctrl-C ends without a word."""
    spawn = multiprocessing.get_context("spawn")
    quiet = signal.SIGINT, signal.SIG_DFL
    return ProcessPoolExecutor(args.workers, spawn, signal.signal, quiet)


def task_names(text):
    names = dict(mt10=MT10, mt50=list(TASKS)).get(text, text.split(","))
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not mt10, mt50 or of {', '.join(TASKS)}"
            )
    return names


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "eval"):
        add = commands.add_parser(name).add_argument
        add("--tasks", type=task_names, default="mt10", help="mt10, mt50 or a comma list")
        add("--workers", type=number(int, 1, 61), default=os.cpu_count(), help="processes")
        if name == "record":
            add("--out", type=Path, default="data/mt10.h5")
            add("--demos", type=number(int, 1, 10_000), default=50, help="of each task")
            add("--size", type=number(int, 16, 256), default=96, help="px of pictures")
        else:
            add(
                "--ckpt",
                type=Path,
                default=ROOT / "assets/metaworld.pt",
                help="checkpoint (default assets/metaworld.pt)",
            )
            add("--expert", action="store_true", help="score the scripted experts instead")
            add("--episodes", type=number(int, 1, 1000), default=10, help="of each task")
            add("--seed", type=number(int, 0, 2**31), default=REPORT, help="of the first scene")
            add("--paraphrase", action="store_true", help="say what was not trained on")
            add("--swap", action="store_true", help="say another task's sentence")
            add("--gif", type=Path, help="film of the first episodes")
    args = parser.parse_args()
    if not INSTALLED:
        raise ValueError(
            "Meta-World is not installed; make a virtual environment for it: python -m venv mw, and "
            "there pip install -r examples/requirements-metaworld.txt"
        )
    if mujoco.__version__[:2] != "3.":
        raise ValueError(f"Meta-World needs MuJoCo 3.3.0, and this is {mujoco.__version__}")
    dict(record=record, eval=score)[args.command](args)


if __name__ == "__main__":
    main()
