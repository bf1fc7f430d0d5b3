"""The SO-101 arm in simulation: demonstrations as a dataset of LeRobot's, and scores.

    python examples/so101.py record data/so101
    python examples/lerobot.py data/so101 data/so101.h5
    python examples/prepare.py data/so101.h5 data/ready.h5
    python train.py --data data/ready.h5 --steps 4000 --shift 4 --execute 1 --out_dir out_so101
    python examples/so101.py eval out_so101/ckpt.pt

The simulator is so101-nexus, its task MuJoCoPickAndPlace-v1, of which there are published results:
a red cube is to lie on a blue circle, as the environment itself defines it. With --colors there are
three cubes, one of which the sentence names, and circles of three colours. Nothing of ours is in
the dataset: absolute joint targets, the joints, two pictures and a sentence, written by lerobot.

`record` and `eval` need Python 3.12 and a virtual environment of their own with what is in
examples/requirements-so101.txt, and OpenGL to draw with. Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder, where `lerobot` would be our lerobot.py.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import functools
import itertools
import json
import multiprocessing
import os

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # every core has a process

import gymnasium
import mujoco
import numpy as np
import so101_nexus.mujoco
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image
from scipy.optimize import least_squares
from so101_nexus import (
    SO101_JOINT_NAMES,
    CubeObject,
    PickAndPlaceConfig,
    RenderConfig,
    RenderingQuality,
)
from so101_nexus.constants import COLOR_MAP
from tqdm import tqdm

from eval import percent
from examples.lerobot import targets
from gen_data import explain_errors
from model import Policy, load_file
from play import save

SPAWN = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
CUBES = "red", "green", "purple"  # the first alone without --colors
CIRCLES = "blue", "white", "orange"
FIRST = 2_000_000  # seed of the first scene of demonstrations
SIZE = 192  # px, of recorded pictures
GRID = 0.002  # m, see simplify()
FPS = 10  # control steps a second
REPEAT = 5  # steps of the environment in one of ours
STEPS = 100  # control steps, at most

OPEN, SHUT = 0.8, -0.1  # rad, the gripper's two targets
TURN = 0.2  # rad that a joint may turn in a step
ABOVE = 0.07  # m above its goal, the hand's height until it is in the funnel
NEAR = 0.012  # m, close enough to grasp or to let go
FUNNEL = 4  # m up for each m to the side beyond NEAR
HELD = 0.3  # rad that the gripper is open with a cube in it, at most
SHOULDER = 0.039  # m, where the arm turns, on the axis x
# rad: the hand low before the arm, pointing down, a jaw on each side.
READY = (-0.3, 0.6, 1.3, -1.57)
NOISE = 0.06  # rad, of a disturbance of what is executed
DISTURBED = 0.15  # share of steps with a new one, which fades
MISTAKEN = 0.4  # share of episodes that begin where an expert that is wrong has led
MISTAKE = 0.12  # m, standard deviation of what it is wrong by, each way


def simplify(model):
    """Moves the corners of meshes to a grid and drops faces without area, before drawing: 12 of 13
    faces, hardly seen, without which OpenGL in software is six times as fast."""
    for mesh in range(model.nmesh):
        vert, face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        corners = model.mesh_vert[vert:][: model.mesh_vertnum[mesh]]
        faces, normals = (
            array[face:][: model.mesh_facenum[mesh]]
            for array in (model.mesh_face, model.mesh_facenormal)
        )
        _, first, cell = np.unique(
            np.round(corners / GRID), axis=0, return_index=True, return_inverse=True
        )
        moved = first[cell.ravel()][faces]
        wide = (moved != np.roll(moved, 1, 1)).all(1)
        n = model.mesh_facenum[mesh] = wide.sum()
        faces[:n] = moved[wide]
        normals[:n] = normals[wide]


def funnel(across):
    """How high above its goal a hand should be, m, when it is so far to the side of that, m. If it
    came down only when right above, a policy that is not exact would hover between the two."""
    return np.clip(FUNNEL * (across - NEAR), 0, ABOVE)


class Scene:
    """The table with arm, cubes and circle."""

    def __init__(self, colors):
        self.cubes = CUBES if colors else CUBES[:1]
        config = PickAndPlaceConfig(
            target_colors=list(CIRCLES if colors else CIRCLES[:1]),
            distractors=[CubeObject(), CubeObject()],
            n_distractors=len(self.cubes) - 1,
            render=RenderConfig(quality=RenderingQuality(msaa_samples=0)),
        )
        self.env = gymnasium.make("MuJoCoPickAndPlace-v1", config=config).unwrapped
        self.slots = [*self.env._slots, *self.env._distractor_slots]  # of cubes
        model = self.env.model
        self.scratch = mujoco.MjData(model)
        simplify(model)
        self.renderer = mujoco.Renderer(model, SIZE, SIZE)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self.above = mujoco.MjvCamera()
        self.above.lookat[:] = 0.25, 0, 0
        self.above.distance = 0.8  # m
        self.above.elevation = -90  # degrees
        self.above.azimuth = 0  # degrees

    def reset(self, seed, named=0):
        """Makes a scene, returns its sentence. named: the number of the cube that it names."""
        env = self.env
        env._slots = self.slots[:1]
        env.reset(seed=seed)
        colors = np.random.default_rng(seed).permutation(self.cubes)
        for slot, color in zip(self.slots, colors):
            env.model.geom_rgba[slot.geom_ids] = COLOR_MAP[color]
        cube = self.slots[named]  # what the environment scores by
        env._slots = [cube]
        env._set_target_geoms(cube.geom_ids)
        return (
            f"Pick up the {colors[named]} cube and place it on the "
            f"{env.target_color_name} circle."
        )

    def joints(self):
        return self.env._get_current_qpos().astype(np.float32)

    def picture(self, camera):
        self.renderer.update_scene(self.env.data, camera)
        return self.renderer.render()

    def pictures(self):
        return dict(above=self.picture(self.above), wrist=self.picture("wrist_cam"))

    def step(self, target):
        """Holds a target of the joints (6,), rad, for a control step; returns whether the cube is
        placed and let go, and the environment's info."""
        for _ in range(REPEAT):
            _, _, done, _, info = self.env.step(target)
            if done:
                break
        return done, info

    # --------------------------------------------------------------------------- the expert
    def solve_ik(self, place, edges):
        """Joints (5,), rad, with the fingertips at a place (3,), m. There the hand points down as
        far as it can, and the jaws shut level and along edges of a cube, turned by `edges`, rad."""
        env, data = self.env, self.scratch

        def away(joints):
            data.qpos[env._arm_qpos_addrs] = joints
            mujoco.mj_kinematics(env.model, data)
            axes = data.site_xmat[env._tcp_site_id].reshape(3, 3)
            shuts, points = axes[:, 0], axes[:, 2]  # along which jaws shut, hand points
            askew = np.sin(2 * (np.arctan2(shuts[1], shuts[0]) - edges))
            miss = data.site_xpos[env._tcp_site_id] - place
            return [*20 * miss, *0.2 * points[:2], 0.5 * shuts[2], 0.2 * askew]

        bounds = env._target_low[:5], env._target_high[:5]
        start = np.clip([-np.arctan2(place[1], place[0] - SHOULDER), *READY], *bounds)
        return least_squares(away, start, bounds=bounds, xtol=1e-3, ftol=1e-3).x

    def ask_expert(self, mistake=0):
        """A target (6,), rad, by what is where now, whatever came before. mistake (3,), m: by how
        much it is wrong about where the cube is."""
        env, joints = self.env, self.joints()
        tip = env.data.site_xpos[env._tcp_site_id]
        pose = env._get_object_pose()  # m, and a quaternion
        cube = pose[:3] + mistake
        goal = env._get_target_pos()
        way = goal - cube
        edges = 2 * np.arctan2(pose[6], pose[3])
        across = np.linalg.norm((tip - cube)[:2])
        up = tip[2] - cube[2]
        left = np.linalg.norm(way[:2])
        held = across < 2 * NEAR and abs(up) < 2 * NEAR and joints[5] < HELD
        shut = held
        if left < NEAR and cube[2] < 2 * NEAR:  # there: let go, and up
            shut, place = False, tip + [0, 0, 0.05 * (joints[5] > HELD)]
        elif held:
            height = funnel(left)
            place = tip + way + [0, 0, height]
            if cube[2] < height / 2:  # first up
                place[:2] = tip[:2]
        else:
            place = cube + [0, 0, funnel(across)]
            shut = across < NEAR and up < NEAR
        turn = self.solve_ik(place, edges) - joints[:5]
        turn *= min(1, TURN / np.abs(turn).max())
        return np.append(joints[:5] + turn, SHUT if shut else OPEN).astype(np.float32)


make_scene = functools.cache(Scene)


@functools.cache
def load(path):
    """A checkpoint's policy, and the units of its actions, see lerobot.py."""
    units = load_file(path).get("units")
    if not units:
        raise ValueError(f"{path} was not trained on a file made by lerobot.py")
    return Policy.load(path), json.loads(units)


def demonstrate(job):
    """A scene's sentence and frames, or None where the expert fails. job: (seed, arguments)."""
    seed, args = job
    scene = make_scene(args.colors)
    sentence = scene.reset(seed)
    rng = np.random.default_rng(seed)
    frames, noise = [], np.zeros(6)
    if rng.random() < MISTAKEN:
        mistake = [*rng.normal(0, MISTAKE, 2), 0]
        for _ in range(rng.integers(5, 25)):
            scene.step(scene.ask_expert(mistake))
    for _ in range(STEPS):
        target = scene.ask_expert()
        views = {f"observation.images.{k}": v for k, v in scene.pictures().items()}
        frames.append({"observation.state": scene.joints(), "action": target} | views)
        noise *= 0.7
        if rng.random() < DISTURBED:
            noise[:5] = rng.normal(0, NOISE, 5)
        done, _ = scene.step(target + noise)
        if done:
            return sentence, frames


def record(args):
    numbers = dict(
        dtype="float32", shape=(6,), names=[f"{name}.pos" for name in SO101_JOINT_NAMES]
    )
    video = dict(
        dtype="video", shape=(SIZE, SIZE, 3), names=["height", "width", "channels"]
    )
    dataset = LeRobotDataset.create(
        repo_id="local/so101",
        fps=FPS,
        root=args.out,
        streaming_encoding=True,
        encoder_queue_maxsize=STEPS,  # lerobot drops what is beyond
        features={
            "observation.state": numbers,
            "action": numbers,
            "observation.images.above": video,
            "observation.images.wrist": video,
        },
    )
    jobs = [(FIRST + i, args) for i in range(2 * args.episodes)]
    with SPAWN.Pool() as workers:
        made = filter(None, workers.imap(demonstrate, jobs))
        for sentence, frames in tqdm(itertools.islice(made, args.episodes)):
            for frame in frames:
                dataset.add_frame(frame | {"task": sentence})
            dataset.save_episode()
    dataset.finalize()


def play(job):
    """Plays one scene; returns whether the cube was placed, was grasped, and was within 6 cm of the
    middle of the circle in the end; and pictures. job: (seed, arguments)."""
    seed, args = job
    torch.set_num_threads(1)
    policy, units = load(args.ckpt)
    scene = make_scene(args.colors)
    sentence = scene.reset(seed, named=int(args.control == "swap"))
    if args.control == "deaf":
        sentence = ""
    config = policy.config
    policy.reset(seed)
    grasped, film = False, []
    for _ in range(STEPS):
        joints = scene.joints()
        if not policy.plans or config.frames > 1 or config.ensemble:  # when it looks
            obs = dict(ee_pos=joints[:5], gripper=joints[5:])
            for name, view in scene.pictures().items():
                small = Image.fromarray(view).resize([config.image_size] * 2, Image.BOX)
                obs[f"{name}_image"] = np.array(small) * (args.control != "blind")
        if args.gif:
            film.append(Image.fromarray(scene.picture(scene.above)))
        done, info = scene.step(targets(units, policy.predict(obs, sentence), joints))
        grasped |= info["is_grasped"] > 0.5
        if done:
            break
    return done, grasped, info["obj_to_target_dist"] < 0.06, film


def evaluate(args):
    args.colors |= args.control == "swap"
    jobs = [(seed, args) for seed in range(args.seed, args.seed + args.episodes)]
    with SPAWN.Pool() as workers:
        played = list(tqdm(workers.imap(play, jobs), total=len(jobs)))
    *outcomes, films = zip(*played)
    for what, so in zip(("placed", "grasped", "within 6 cm"), outcomes):
        print(what, percent(sum(so), len(so)))
    if args.gif:
        save(films[:9], args.gif)


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("record")
    sub.set_defaults(run=record)
    sub.add_argument("out", type=Path, help="folder to make")
    sub.add_argument("--episodes", type=int, default=500)
    sub = commands.add_parser("eval")
    sub.set_defaults(run=evaluate)
    sub.add_argument("ckpt")
    sub.add_argument("--episodes", type=int, default=200)
    sub.add_argument("--seed", type=int, default=0, help="of the first scene")
    sub.add_argument(
        "--control",
        choices=("swap", "deaf", "blind"),
        help="another of three cubes is named and counts, no sentence, or black pictures",
    )
    sub.add_argument("--gif", type=Path, help="film of nine scenes")
    for sub in commands.choices.values():
        sub.add_argument(
            "--colors", action="store_true", help="three cubes, three circles"
        )
    args = parser.parse_args()
    if args.episodes < 1:
        raise ValueError("--episodes must be at least 1")
    args.run(args)
