"""The world and its demonstrations: scene, cameras, sentences, scripted expert, HDF5 writer.

    python gen_data.py                                            # 1,500 of one task, in minutes
    python gen_data.py --tasks all --episodes 8000 --randomize 1  # all of them, in changed worlds

A 7-joint arm (Franka Panda link offsets) with a friction gripper stands at a table with coloured
blocks, coloured pads and a drawer; a sentence says what to do with which of them. Needs MuJoCo and
no OpenGL: pixels come from MuJoCo's ray caster. Importing this file does no work.

World frame: origin at the arm's base on the table top, x away from the robot, y to its left, z up;
metres. `Env.reset` draws a scene and one of its `requests`, `make_wording` words it, `demonstrate`
has the `expert` do it, `write_episode` writes it down.
"""

import argparse
import atexit
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import zlib
from pathlib import Path

import h5py
import mujoco
import numpy as np
from tqdm import tqdm

# ------------------------------------------------------------------------- the world, in numbers
CONTROL_HZ = 20
RAMP = 5  # joint targets in a control step: a jump would shake the load loose
SUBSTEPS = 2  # physics steps for each of them: 200 Hz
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
ACTION_SCALE = 0.03  # m of hand motion per control step at action 1
MAX_STEPS = 200  # control steps (10 s) before an episode is cut off
SUCCESS_STEPS = 5  # control steps (0.25 s) that success must hold

IMAGE_SIZE = 64  # px
CAMERAS = ("front", "top", "wrist")  # by name, as HDF5 lists them
PRIVILEGED = ("object_pos", "target_pos")  # these two observations give the answer away

COLORS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.08, 0.62, 0.16),
    "blue": (0.10, 0.25, 0.95),
    "yellow": (0.96, 0.84, 0.08),
    "purple": (0.58, 0.12, 0.78),
}
N_BLOCKS = 3
HALF = 0.02  # m, half the edge of a block
CROWD = 5  # blocks in the split of that name
N_PADS = 2
AREA = np.array([[0.36, -0.15], [0.64, 0.22]])  # m, where things are put (x, y)
DRAWER = 0.13  # m, travel of the drawer
HANDLE = np.array([0.437, -0.275, 0.064])  # m, its handle when it is shut
LEFT = np.array([0, 1])  # x, y, as the robot sees it
FORWARD = np.array([1, 0])
DIRECTIONS = dict(left=LEFT, right=-LEFT, forward=FORWARD, back=-FORWARD)

HOME = np.array([0, -0.2, 0, -2.2, 0, 2.0, 0.785])  # rad, start and rest of the IK
DAMPING = 1e-4 * np.eye(6)  # m² and rad², of the IK
POINTING_DOWN = np.diag([1.0, -1, -1])  # the hand's axes in the world
GRIPPER_OPEN = 0.035  # m, travel of each finger
SHUT = 0.012  # m between the fingers: less, and nothing is in the hand
LEASH = 0.04  # m, how far the commanded hand may run ahead of the real one
WORKSPACE = np.array([[0.28, -0.32, 0.004], [0.72, 0.32, 0.35]])  # m, box for the hand
LIGHT = np.array([0.35, -0.45, 0.82])  # direction towards the light, world frame
JOINT_MARGIN = 0.02  # rad, kept from the ends of the joints' ranges

# Scene seeds: from 0 for choosing, then for reporting, once a release, then demonstrations'.
TEST_SEED = 1_500_000
DEMO_SEED = 2_000_000
# Random streams of a scene: [seed] itself; [seed, 1] demonstrations, 2 eval.py, 7 world, 8 noise.

# What demonstrations never show: these combinations of words, and what the grammar marks with a *.
HELD_OUT = dict(
    pick_place=("red blue", "green yellow", "blue purple", "yellow red", "purple green"),
    stack=("red yellow", "green purple", "blue red", "purple blue"),
    push=("purple left", "purple right", "purple forward", "purple back"),
)
# What of the model differs among worlds.
CHANGED = """geom_rgba cam_pos cam_fovy geom_friction dof_damping body_mass actuator_gainprm
actuator_biasprm"""
SPLITS = ("seen", "phrasing", "combo", "crowd")


def choose(names, known):
    """`names`, a sequence, a comma list or "all", as a tuple, in the order of `known`."""
    if isinstance(names, str):
        names = known if names == "all" else names.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {name!r}; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


# --------------------------------------------------------------------------------- sentences
# A request is (task, slots), e.g. ("push", dict(block="red", direction="left")). Its sentences are
# drawn from assets/grammar.txt. A wording is a sentence in which the slots that are names are left
# open: "push the {block} cube to your left"; train.py fills them in.
GRAMMAR = Path(__file__).parent / "assets/grammar.txt"
SLOTS = dict(
    block=COLORS,
    pad=COLORS,
    lower=COLORS,  # the block underneath
    direction=DIRECTIONS,
    way=dict(open=True, close=False),
)
NAMES = ("block", "pad", "lower")  # slots that are open in a wording


def is_held_out(task, slots):
    """Whether demonstrations leave out this combination of words."""
    return " ".join(slots.values()) in HELD_OUT.get(task, ())


def slots_of(task, words):
    """Every way to fill the task's slots from `words`, a dict of words for each kind of slot."""
    names = TASKS[task].slots
    choice = [words[name] for name in names]
    return [dict(zip(names, combination)) for combination in itertools.product(*choice)]


def intent(task, slots):
    """What a sentence asks for, names apart: "pick_place", "push left", "drawer open"."""
    return " ".join([task, *[word for slot, word in slots.items() if slot not in NAMES]])


@functools.cache
def grammar(held_out):
    """{rule: its alternatives} of assets/grammar.txt, which says how it is written; held_out: where
    a rule has alternatives that are held out of training, those instead."""
    rules, marked = {}, {}
    for line in GRAMMAR.read_text("utf-8").splitlines():
        rule, _, alternatives = line.partition(": ")
        for text in alternatives.split(" | "):
            into = marked if text.startswith("*") else rules
            into.setdefault(rule, []).append(text.removeprefix("*"))
    return rules | marked if held_out else rules


def pick(options, rng):
    """One of a list, drawn by `rng`."""
    return options[rng.integers(len(options))]


def make_wording(task, slots, rng, held_out=False):
    """A wording of the request, of 24 words at most: the longest of a batch sets its cost."""

    def expand(text):
        """Replaces every <rule> and every (choice|of|these), and what comes in their place."""
        return re.sub(r"<([^<>]+)>|\(([^()]*)\)", replace, text)

    def replace(match):
        rule, inline = match.groups()
        if rule:  # <{direction}> is the rule "left"
            options = grammar(held_out)[rule.format(**slots)]
        else:
            options = inline.split("|")
        return expand(pick(options, rng))

    words = expand(f"<{task}>").split()
    return (
        " ".join(words) if len(words) <= 24 else make_wording(task, slots, rng, held_out)
    )


def make_instruction(request, rng, held_out=False):
    """A sentence for the request."""
    task, slots = request
    return make_wording(task, slots, rng, held_out).format(**slots)


def draw_wordings(tasks, rng, count):
    """{intent: `count` wordings} for all that can be asked of these tasks, and for "none": three
    times as many sentences that ask for nothing, and some for other tasks."""
    found = dict(none=[make_wording("none", {}, rng) for _ in range(3 * count)])
    for task in TASKS:
        # names are left open
        for slots in slots_of(task, SLOTS | dict.fromkeys(NAMES, [""])):
            wordings = [make_wording(task, slots, rng) for _ in range(count)]
            if task in tasks:
                found[intent(task, slots)] = wordings
            else:
                found["none"] += wordings[: count // 10]
    return found


# ---------------------------------------------------------------------------------- the scene
# Link offsets and joint ranges: Franka Emika Panda data sheet. Capsules, no meshes. The hand hangs
# on the flange, turned by -45 degrees as on the real arm; fingers slide along its y. The drawer
# slides out of its cabinet, away from the robot, and is drawn by the handle on its front edge.
SCENE = """
<mujoco model="picovla">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.005" integrator="implicitfast" iterations="20"/>
  <default>
    <geom contype="0" conaffinity="0"/>
    <joint armature=".1" damping="1"/>
    <default class="link"><geom type="capsule" rgba=".80 .82 .85 1"/></default>
    <default class="solid"><geom type="box" contype="1" conaffinity="1"/></default>
    <default class="finger">
      <geom type="box" contype="1" conaffinity="1" size=".009 .006 .026" mass=".03" condim="4"
            friction="1.6 .05 .001" solref=".01 1" rgba=".22 .22 .25 1"/>
      <joint type="slide" range="0 {GRIPPER_OPEN}" armature=".12" damping="8"/>
    </default>
  </default>
  <worldbody>
    <light pos=".6 -.4 1.6" dir="-.1 .3 -1"/>
    <camera name="front" pos=".92 0 .72" xyaxes="0 1 0 -.848 0 .530" fovy="43"/>
    <camera name="top" pos=".5 0 1.05" xyaxes="0 -1 0 1 0 0" fovy="34"/>
    <geom name="table" type="plane" size="0 0 .1" rgba=".42 .40 .38 1"
          contype="1" conaffinity="1" friction="1 .05 .001"/>
    <geom fromto="0 0 .02 0 0 .1" size=".075" mass="3" class="link"/>
    <body name="link1" pos="0 0 .333" gravcomp="1">
      <joint name="joint1" range="-2.8973 2.8973"/>
      <geom fromto="0 0 -.19 0 0 -.02" size=".062" mass="3" class="link"/>
      <body name="link2" quat="1 -1 0 0" gravcomp="1">
        <joint name="joint2" range="-1.7628 1.7628"/>
        <geom fromto="0 0 -.06 0 0 .06" size=".06" mass="3" class="link"/>
        <body name="link3" pos="0 -.316 0" quat="1 1 0 0" gravcomp="1">
          <joint name="joint3" range="-2.8973 2.8973"/>
          <geom fromto="0 0 -.24 .05 0 -.02" size=".055" mass="2.5" class="link"/>
          <body name="link4" pos=".0825 0 0" quat="1 1 0 0" gravcomp="1">
            <joint name="joint4" range="-3.0718 -.0698"/>
            <geom fromto="0 0 -.05 0 0 .05" size=".052" mass="2.5" class="link"/>
            <body name="link5" pos="-.0825 .384 0" quat="1 -1 0 0" gravcomp="1">
              <joint name="joint5" range="-2.8973 2.8973"/>
              <geom fromto=".06 0 -.33 0 .03 -.08" size=".048" mass="2" class="link"/>
              <body name="link6" quat="1 1 0 0" gravcomp="1">
                <joint name="joint6" range="-.0175 3.7525"/>
                <geom fromto="0 0 -.03 .05 0 0" size=".045" mass="1.5" class="link"/>
                <body name="link7" pos=".088 0 0" quat="1 1 0 0" gravcomp="1">
                  <joint name="joint7" range="-2.8973 2.8973"/>
                  <geom fromto="0 0 .02 0 0 .07" size=".042" mass=".7" class="link"/>
                  <body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1">
                    <geom name="palm" pos="0 0 .032" size=".02 .07 .022" mass=".6" class="solid"
                          rgba=".85 .86 .88 1"/>
                    <site name="hand" pos="0 0 .1034"/>
                    <camera name="wrist" pos=".08 0 .02" xyaxes="0 -1 0 -.966 0 -.259" fovy="80"/>
                    <body name="finger_left" pos="0 0 .0584" gravcomp="1">
                      <joint name="finger_left" axis="0 1 0" class="finger"/>
                      <geom name="finger_left" pos="0 .006 .032" class="finger"/>
                    </body>
                    <body name="finger_right" pos="0 0 .0584" gravcomp="1">
                      <joint name="finger_right" axis="0 -1 0" class="finger"/>
                      <geom name="finger_right" pos="0 -.006 .032" class="finger"/>
                    </body></body></body></body></body></body></body></body></body>
    <replicate count="{n_blocks}">
      <body name="block">
        <freejoint/>
        <geom name="block" size="{HALF} {HALF} {HALF}" mass=".06" friction="1 .05 .001" condim="4"
              class="solid"/>
      </body>
    </replicate>
    <replicate count="{N_PADS}">
      <body name="pad">
        <geom name="pad" type="cylinder" size=".045 .0008"/>
        <geom type="cylinder" size=".016 .0012" rgba=".95 .95 .95 1"/>
      </body>
    </replicate>
    <body name="cabinet" pos="{HANDLE[0]} {HANDLE[1]} 0">
      <geom name="cabinet" pos="-.085 0 .03" size=".065 .06 .03" class="solid"
            rgba=".42 .27 .15 1"/>
    </body>
    <body name="drawer" pos="{HANDLE[0]} {HANDLE[1]} 0">
      <joint name="drawer" type="slide" axis="1 0 0" range="0 {DRAWER}" armature="0" damping="6"
             frictionloss=".3"/>
      <geom name="drawer" pos="-.065 0 .02" size=".08 .052 .0185" mass=".25" class="solid"
            rgba=".70 .50 .30 1"/>
      <geom name="handle" pos="0 0 {HANDLE[2]}" size=".01 .012 .025" mass=".02" class="solid"
            rgba=".97 .95 .88 1" friction="1.2 .05 .001" condim="4"/>
    </body>
  </worldbody>
  <contact><exclude body1="cabinet" body2="drawer"/></contact>
  <equality><joint joint1="finger_left" joint2="finger_right"/></equality>
  <actuator>
    <position name="servo1" joint="joint1" kp="4500" kv="202"/>
    <position name="servo2" joint="joint2" kp="4500" kv="202"/>
    <position name="servo3" joint="joint3" kp="3500" kv="158"/>
    <position name="servo4" joint="joint4" kp="3500" kv="158"/>
    <position name="servo5" joint="joint5" kp="2000" kv="90"/>
    <position name="servo6" joint="joint6" kp="2000" kv="90"/>
    <position name="servo7" joint="joint7" kp="2000" kv="90"/>
    <position name="grip" joint="finger_left" kp="900" forcerange="-12 12"/>
  </actuator>
  <sensor><contact body1="block" data="force" num="32"/></sensor>
</mujoco>"""


def build_model(n_blocks):
    """The MjModel of a table with so many blocks."""
    return mujoco.MjModel.from_xml_string(SCENE.format(n_blocks=n_blocks, **globals()))


# ------------------------------------------------------------------------------- the camera
def project(points, matrix):
    """World points (..., 3) m through a camera matrix (3, 4) to image coordinates (..., 2), x right
    and y down, 0..1 inside the picture, and how far ahead of the camera they are, (...,) m."""
    seen = points @ matrix[..., :3].swapaxes(-1, -2) + matrix[..., None, :, 3]
    depth = seen[..., 2]
    return seen[..., :2] / np.maximum(depth, 1e-3)[..., None], depth


class RayCamera:
    """Pictures from MuJoCo's ray caster: no OpenGL, no driver, the same bytes on every run.

    Shading is Lambert's with one light and an ambient term; colours are the model's geom_rgba. All
    is read from the model when a picture is drawn, so a changed model is seen at once. Most pixels
    show bare table or sky, known without casting. The others are found by projection:

        a geom's box, 8 corners                 the picture
             ┌─────────┐                        ┌──────────────┐
            ╱         ╱│  corners to pixels     │  ▒▒▒▒        │  ▒ the rectangle around the
           └─────────┘ ╵  ----------------->    │  ▒▒▒▒        │    corners: rays are cast there
                                                └──────────────┘
    """

    AMBIENT = 0.45
    DIFFUSE = 0.55
    SKY = (150, 165, 180)
    TABLE = 0  # geom id: the first in SCENE
    CORNERS = np.array(list(itertools.product([-1, 1], repeat=3)))  # (8, 3)

    def __init__(self, model, name, size=IMAGE_SIZE):
        self.model = model
        self.size = size  # px
        self.id = model.camera(name).id
        y, x = (np.mgrid[:size, :size].reshape(2, -1) + 0.5) / size
        self.grid = np.stack([x, y, np.ones(size**2)], 1)  # middles of pixels, 0..1

    def matrix(self, data):
        """Its camera matrix (3, 4), see project()."""
        focus = 0.5 / np.tan(np.deg2rad(self.model.cam_fovy[self.id]) / 2)
        lens = np.array([[focus, 0, 0.5], [0, focus, 0.5], [0, 0, 1]])
        # MuJoCo's cameras look along -z with y up.
        axes = lens @ (data.cam_xmat[self.id].reshape(3, 3) * [1, -1, -1]).T
        return np.column_stack([axes, -axes @ data.cam_xpos[self.id]])

    def rays(self, data):
        """The direction of each pixel (size * size, 3), world frame."""
        rays = self.grid @ np.linalg.inv(self.matrix(data)[:, :3]).T
        return rays / np.linalg.norm(rays, axis=1, keepdims=True)

    def render(self, data):
        """Picture (size, size, 3) uint8 of `data`, after mj_kinematics and mj_camlight. `geom`
        (size, size) is then the geom id of each pixel, -1 for sky."""
        rays = self.rays(data)
        geom = np.where(rays[:, 2] < 0, self.TABLE, -1)  # -1: rays that never come down
        normal = np.tile([0.0, 0.0, 1.0], (len(rays), 1))
        pixels = self._pixels_to_cast(data)
        eye = data.cam_xpos[self.id]
        geom[pixels], normal[pixels] = cast(self.model, data, eye, rays[pixels])

        light = -self.model.light_dir[0]  # world frame, towards it
        colors = 255 * self.model.geom_rgba[:, :3] * self.model.light_diffuse[0]
        shade = self.AMBIENT + self.DIFFUSE * np.maximum(normal @ light, 0)
        image = np.minimum(colors[geom] * shade[:, None], 255)
        image[geom < 0] = self.SKY
        self.geom = geom.reshape(self.size, self.size)
        return image.astype(np.uint8).reshape(self.size, self.size, 3)

    def _pixels_to_cast(self, data):
        """Indices (n,) of the pixels in the rectangle of some geom that is not the table."""
        boxes = self.model.geom_aabb[1:].reshape(-1, 2, 1, 3)
        corners = boxes[:, 0] + self.CORNERS * boxes[:, 1]  # (geoms, 8, 3), geom frame
        turn = data.geom_xmat[1:].reshape(-1, 3, 3)  # geoms to world
        corners = corners @ turn.swapaxes(1, 2) + data.geom_xpos[1:, None]
        uv, depth = project(corners, self.matrix(data))
        low = self.size * uv.min(1) - 0.5  # px; a ray goes through a pixel's middle
        high = self.size * uv.max(1) + 0.5
        edges = np.hstack([low, high]).clip(0, self.size).astype(int)  # (geoms, 4)
        seen = (edges[:, :2] < edges[:, 2:]).all(1) & (depth.max(1) > 0)
        mask = np.zeros((self.size, self.size), bool)
        for left, top, right, bottom in edges[seen].tolist():
            mask[top:bottom, left:right] = True
        return np.flatnonzero(mask)


def cast(model, data, origin, rays):
    """What rays (n, 3) from `origin` meet first: geom ids (n,), -1: none, and normals (n, 3)."""
    n = len(rays)
    geom, distance, normal = found = np.empty(n, np.int32), np.empty(n), np.empty(3 * n)
    # all geom groups, static geoms too, no body left out; no limit to the distance
    mujoco.mj_multiRay(
        model, data, origin, rays.ravel(), None, True, -1, *found, n, mujoco.mjMAXVAL
    )
    return geom, normal.reshape(n, 3)


# -------------------------------------------------------------------------------- environment
class Env:
    """The table and the arm, with Gymnasium's five return values (gymnasium is not needed).

    tasks: names from TASKS, what may be asked for. cameras: names from CAMERAS; () renders
    nothing. split: one of SPLITS. randomize: how far each world may be from the normal one; the
    factors are in _new_world.

    Observations are a dict: <camera>_image (64, 64, 3) uint8; joint_pos (7,) rad; ee_pos (3,) m,
    between the fingertips; ee_vel (3,) m/s; gripper (1,) m between the fingers; object_pos and
    target_pos (3,) m: the instructed thing and where it should go, which give the answer away. All
    but images float32. Action: (4,) [dx, dy, dz, gripper] in [-1, 1]; 1 is 3 cm a step; gripper > 0
    opens, otherwise it closes. Between a policy and the servos stand the action's clip, WORKSPACE,
    LEASH and JOINT_MARGIN. info["force"] is the largest contact force on a block so far, N.

    Things are numbered: blocks, then pads, then the drawer's handle. `command` and `q_command` are
    where hand and joints should be, `ee_pos` and `data` where they are; `ik_data` is scratch. qpos
    is 7 joints, 2 fingers, 7 numbers a block, the drawer; ctrl: targets of joints and gripper."""

    def __init__(
        self,
        tasks=("pick_place",),
        cameras=("front", "wrist"),
        split="seen",
        randomize=0.0,
    ):
        self.tasks = choose(tasks, TASKS)
        self.split = split
        self.randomize = randomize
        self.n_blocks = CROWD if split == "crowd" else N_BLOCKS
        self.model = m = build_model(self.n_blocks)
        self.normal = build_model(self.n_blocks)  # other worlds are drawn around it
        self.data = mujoco.MjData(m)
        self.ik_data = mujoco.MjData(m)
        self.cameras = {name: RayCamera(m, name) for name in choose(cameras, CAMERAS)}
        self.hand = m.site("hand").id
        self.fingers = [m.geom("finger_left").id, m.geom("finger_right").id]
        things = [f"block{i}" for i in range(self.n_blocks)]
        things += [f"pad{i}" for i in range(N_PADS)] + ["handle"]
        self.thing_geom = np.array([m.geom(name).id for name in things])
        self.handle = len(things) - 1
        self.orientation = POINTING_DOWN  # that the IK holds the hand at
        self.limits = m.jnt_range[:7].T + [[JOINT_MARGIN], [-JOINT_MARGIN]]  # rad

    # -- setting up
    def reset(self, seed=None, options=None):
        """New scene, a function of `seed` (int; without one, of a random one); tasks take turns
        with the seeds. Returns (obs, info).

        options: dict(task=name, slots=some of them), to ask for something by name. Raises
        ValueError if no scene allows that."""
        self.seed = np.random.randint(2**31) if seed is None else seed
        options = options or {}
        slots = options.get("slots", {})
        task = options.get("task", self.tasks[self.seed % len(self.tasks)])
        # What is asked for by name is granted, held out or not.
        held_out = None if slots else self.split == "combo"
        self._new_world(np.random.default_rng([self.seed, 7]))
        rng = np.random.default_rng(self.seed)
        for _ in range(1000):
            self._new_scene(rng)
            self._refresh()
            requests = self.requests(task, held_out, slots)
            if requests:
                request = pick(requests, rng)
                self.set_request(
                    request, make_instruction(request, rng, self.split == "phrasing")
                )
                return self.observe(), self.info()
        raise ValueError(f"no scene allows task {task} with {slots or 'this split'}")

    def _new_world(self, rng):
        """Draws a world around the normal one: what differs, by how much at --randomize 1."""
        m = self.model
        for field in CHANGED.split():
            getattr(m, field)[:] = getattr(self.normal, field)

        def differ(most, *shape):
            return self.randomize * most * rng.uniform(-1, 1, shape)

        light = LIGHT + differ(0.5, 3)
        m.light_dir[0] = -light / np.linalg.norm(light)
        m.light_diffuse[0] = 1 + differ(0.25)  # strength
        m.geom_rgba[RayCamera.TABLE, :3] += differ(0.12, 3)  # 0..1
        self.tint = differ(0.07, self.n_blocks + N_PADS, 3)  # of blocks and pads
        m.cam_pos += differ(0.02, m.ncam, 3)  # m
        m.cam_fovy += differ(2.0, m.ncam)  # degrees
        m.geom_friction *= 1 + differ(0.3)
        m.dof_damping *= 1 + differ(0.5)
        m.body_mass[m.geom_bodyid[self.thing_geom[: self.n_blocks]]] *= 1 + differ(
            0.5, self.n_blocks
        )
        servo = 1 + differ(0.25, 7, 1)  # gain and bias together
        m.actuator_gainprm[:7] *= servo
        m.actuator_biasprm[:7] *= servo
        mujoco.mj_setConst(m, self.ik_data)  # what follows from the masses
        self.pixel_noise = abs(differ(8.0))  # standard deviation, of 255
        self.pixel_rng = np.random.default_rng([self.seed, 8])
        # actions arrive one control step late
        self.late = rng.random() < 0.5 * self.randomize

    def _new_scene(self, rng):
        m, d, n = self.model, self.data, self.n_blocks
        mujoco.mj_resetData(m, d)
        colors = [rng.choice([*COLORS], count, replace=False) for count in (n, N_PADS)]
        self.colors = np.concatenate(colors).tolist()  # of blocks and pads
        blocks = dict(zip(self.colors[:n], range(n)))
        pads = dict(zip(self.colors[n:], range(n, n + N_PADS)))
        # {slot: {word: what it means in this scene}}
        self.words = SLOTS | dict(block=blocks, lower=blocks, pad=pads)
        rgb = np.array([COLORS[color] for color in self.colors]) + self.tint
        m.geom_rgba[self.thing_geom[:-1], :3] = rgb.clip(0, 1)
        spots = self._free_spots(rng)
        yaw = rng.uniform(-0.25, 0.25, n)  # rad; the gripper does not turn
        pose = d.qpos[9:-1].reshape(n, 7)  # a view: place, then quaternion
        pose[:, :2] = spots[:n]
        pose[:, 2] = HALF
        pose[:, 3] = np.cos(yaw / 2)
        pose[:, 6] = np.sin(yaw / 2)
        m.body_pos[m.geom_bodyid[self.thing_geom[n:-1]], :2] = spots[n:]
        # often shut or wide open
        d.qpos[-1] = DRAWER * np.clip(rng.uniform(-0.4, 1.4), 0, 1)
        self.command = rng.uniform((0.38, -0.2, 0.14), (0.6, 0.2, 0.26))  # m
        self.q_command = HOME  # rad, for the joints
        for _ in range(20):
            self._solve_ik(self.command)
        d.qpos[:7] = d.ctrl[:7] = self.q_command
        d.qpos[7:9] = d.ctrl[7] = GRIPPER_OPEN
        self.ee_vel = np.zeros(3)  # m/s
        self.force = 0.0  # N, the largest so far
        # the action on its way, if late: open, stay
        self.delayed = np.eye(len(ACTION_NAMES))[-1]

    def _free_spots(self, rng):
        """Places (n_blocks + N_PADS, 2) m, 10 cm apart at least."""
        n = self.n_blocks + N_PADS
        while True:
            spots = rng.uniform(*AREA, (n, 2))
            gaps = distance(spots[:, None], spots) + np.eye(n)  # none from itself
            if gaps.min() > 0.10:
                return spots

    # -- requests
    def resolve(self, slots):
        """What the words mean in this scene, which is what a Task's methods are given: a name the
        number of its thing, a direction a unit vector. ValueError if there is no such thing."""
        for slot, word in slots.items():
            if word not in self.words[slot]:
                raise ValueError(f"there is no {word} {slot} here")
        return [self.words[slot][word] for slot, word in slots.items()]

    def requests(self, task, held_out=False, only={}):
        """All requests of a task that could be made now; held_out: True for held-out combinations
        alone, False for the others, None for both; only: slots that they must have."""
        found = []
        for slots in slots_of(task, self.words):
            wanted = (
                held_out in (None, is_held_out(task, slots))
                and only.items() <= slots.items()
            )
            if wanted and TASKS[task].possible(self, *self.resolve(slots)):
                found.append((task, slots))
        return found

    def set_request(self, request, text):
        """What is to be done from now on, and the sentence for it; restarts the clock. Raises
        ValueError if it names what is not there."""
        self.meaning = self.resolve(request[1])  # ValueError before anything changes
        first, *_ = request[1]  # the thing is what this slot names, else the handle
        self.thing = self.meaning[0] if first in NAMES else self.handle
        self.request = request
        self.task, self.slots = request
        self.instruction = text
        self.steps = 0
        self.done_steps = 0
        # What has happened since, which push is judged by and no picture shows.
        self.touched = None  # colour of the first block to be touched
        self.lifted = np.zeros(self.n_blocks, bool)
        self.origin = self.block_pos.copy()  # (n_blocks, 3) m, where each block was

    # -- stepping
    def step(self, action):
        """One control step (50 ms): moves `command`, which the hand follows. Returns obs, reward,
        terminated, truncated, info; terminated: success, or it diverged (info["diverged"])."""
        action = np.asarray(action, np.float64)
        if action.shape != (len(ACTION_NAMES),) or not np.isfinite(action).all():
            raise ValueError(
                f"an action is {len(ACTION_NAMES)} finite numbers, not {action!r}"
            )
        if self.late:  # in some changed worlds actions come a step late
            action, self.delayed = self.delayed, action
        action = action.clip(-1, 1)
        target = (self.command + action[:3] * ACTION_SCALE).clip(*WORKSPACE)
        self.command = self.ee_pos + (target - self.ee_pos).clip(-LEASH, LEASH)
        start = self.q_command  # which _solve_ik replaces
        self._solve_ik(self.command)
        self.data.ctrl[7] = GRIPPER_OPEN if action[-1] > 0 else 0.0
        for servos in np.linspace(start, self.q_command, RAMP + 1)[1:]:
            self.data.ctrl[:7] = servos
            mujoco.mj_step(self.model, self.data, SUBSTEPS)
            self.force = max(self.force, *self.data.sensordata[::3])  # normal forces
        before = self.ee_pos
        self._refresh()
        self.ee_vel = (self.ee_pos - before) * CONTROL_HZ
        self.steps += 1
        self.lifted |= self.is_high()
        for block in np.flatnonzero(self.touching[: self.n_blocks]):
            self.touched = self.touched or self.colors[block]
        done = TASKS[self.task].success(self, *self.meaning)
        self.done_steps = self.done_steps + 1 if done else 0
        info = self.info()
        over = info["success"] or info["diverged"]
        return (
            self.observe(),
            float(info["success"]),
            over,
            self.steps >= MAX_STEPS,
            info,
        )

    def _solve_ik(self, target):
        """One damped least-squares step of the commanded joints, which brings the hand nearer to
        `target`, pointing down; what six equations leave free drifts back to HOME."""
        m, d = self.model, self.ik_data
        d.qpos[:7] = self.q_command
        mujoco.mj_kinematics(m, d)
        mujoco.mj_comPos(m, d)
        jacobian = np.zeros((6, m.nv))
        mujoco.mj_jacSite(m, d, jacobian[:3], jacobian[3:], self.hand)
        jacobian = jacobian[:, :7]  # the arm's joints come first
        hand = d.site_xmat[self.hand].reshape(3, 3)
        turn = np.cross(hand.T, self.orientation.T).sum(0) / 2  # rad, if it is small
        error = np.concatenate([target - d.site_xpos[self.hand], turn])
        rest = 0.05 * (HOME - self.q_command)
        dual = np.linalg.solve(jacobian @ jacobian.T + DAMPING, error - jacobian @ rest)
        wanted = self.q_command + jacobian.T @ dual + rest
        self.q_command = wanted.clip(*self.limits)

    def _refresh(self):
        """Brings what the rest reads up to date with the state: poses and contacts."""
        m, d = self.model, self.data
        mujoco.mj_kinematics(m, d)
        mujoco.mj_camlight(m, d)
        self.ee_pos = d.site_xpos[self.hand].copy()
        self.opening = d.qpos[7:9].sum()  # m between the fingers
        self.drawer = d.qpos[-1]  # m, 0 is shut
        self.thing_pos = d.geom_xpos[self.thing_geom]
        self.block_pos = self.thing_pos[: self.n_blocks]

        touch = np.zeros((m.ngeom, m.ngeom), bool)
        one, other = d.contact.geom.T
        touch[one, other] = touch[other, one] = True
        fingers = touch[self.fingers][:, self.thing_geom]  # (2, things)
        self.touching = fingers.any(0)
        # In the hand is what both touch. The handle does not give way: one may be just off.
        between = fingers.all(0)
        between[self.handle] = self.touching[self.handle]
        reach = np.linalg.norm(self.thing_pos - self.ee_pos, axis=1)
        things = np.flatnonzero(between & (self.opening > SHUT))
        self.held = min(things, key=reach.__getitem__, default=None)

    def is_high(self):
        """(n_blocks,) bool: which blocks are in the air or on something."""
        return self.block_pos[:, 2] > HALF + 0.01

    def info(self):
        """Gymnasium's info dict of this instant; touched: colour of the block touched first."""
        return dict(
            instruction=self.instruction,
            task=self.task,
            success=self.done_steps >= SUCCESS_STEPS,
            touched=self.touched,
            force=self.force,
            diverged=bool(self.data.warning.number.any()),
            **self.slots,
        )

    def observe(self):
        """The observation dict of this instant; see the class."""
        obs = {}
        for name, camera in self.cameras.items():
            image = camera.render(self.data)
            if self.pixel_noise:
                noise = self.pixel_rng.normal(0, self.pixel_noise, image.shape)
                image = (image + noise).clip(0, 255).astype(np.uint8)
            obs[f"{name}_image"] = image
        numbers = dict(
            joint_pos=self.data.qpos[:7],
            ee_pos=self.ee_pos,
            ee_vel=self.ee_vel,
            gripper=[self.opening],
            object_pos=self.thing_pos[self.thing],
            target_pos=TASKS[self.task].target(self, *self.meaning),
        )
        return obs | {
            name: np.array(value, np.float32) for name, value in numbers.items()
        }


# ---------------------------------------------------------------------------------- the tasks
def expert(env):
    """The scripted expert's action (4,) float32: a memoryless function of the privileged state."""
    task = TASKS[env.task]
    wanted = env.thing if task.holds else None
    if env.held not in (None, wanted):
        return put_away(env)
    return task.expert(env, *env.meaning)


class Task:
    """One kind of request. Its methods get the scene and the meaning of its slots in turn
    (Env.resolve): the numbers of things, a unit vector for a direction, True for open.

    slots: names from SLOTS. Its sentences are the rule of its name in assets/grammar.txt.
    possible(env, ..): can it be asked for now? target(env, ..): where the thing should go (3,) m.
    success(env, ..): is it done, this instant? The slots among NAMES are what a policy's pointers
    look for, in order: the thing, and its place."""

    holds = True  # whether the thing is to be in the hand; else the hand is emptied first
    THERE = 0.0  # m sideways from the target, where the expert lets go
    NEAR = 0.02  # m sideways, where it lowers the thing all the way

    def expert(self, env, *meaning):
        """An action (4,), with an empty hand or with the thing in it:

        | what the expert sees                      | what it does                        |
        | the thing at its target                   | lets go                             |
        | the thing between the fingers             | carries it to its target            |
        | anything else                             | grasps the thing                    |"""
        goal = self.target(env, *meaning)
        x, y, z = goal - env.thing_pos[env.thing]
        calm = env.held is None or np.linalg.norm(env.ee_vel) < 0.1  # not while it swings
        if np.hypot(x, y) < self.THERE and abs(z) < 0.004 and calm:
            return let_go(env)
        if env.held is None:
            return grasp(env)
        return carry(env, goal, funnel([x, y], self.NEAR))


class PickPlace(Task):
    slots = ("block", "pad")
    WITHIN = 0.03  # m sideways, of success
    THERE = 0.022

    def possible(self, env, block, pad):
        return (
            graspable(env, block)
            and distance(env.block_pos, env.thing_pos[pad]).min() >= 0.07
        )

    def target(self, env, block, pad):
        return env.thing_pos[pad] + [0, 0, HALF]

    def success(self, env, block, *place):
        """Lies or stands still on its place, released, and the hand has withdrawn upwards."""
        at = env.block_pos[block]
        x, y, z = at - self.target(env, block, *place)
        there = np.hypot(x, y) < self.WITHIN and abs(z) < 0.006
        still = np.abs(env.data.qvel[9:-1].reshape(-1, 6)[block, :3]).max() < 0.02
        released = env.held != block and env.opening > WIDE
        return there and still and released and env.ee_pos[2] > at[2] + 0.06


class Stack(PickPlace):
    """The same with a block in place of the pad, more exactly."""

    slots = ("block", "lower")
    WITHIN, THERE, NEAR = 0.022, 0.016, 0.015  # m

    def possible(self, env, block, lower):
        free = block != lower and graspable(env, block) and graspable(env, lower)
        return free and env.held != lower and not env.is_high()[lower]

    def target(self, env, block, lower):
        return env.block_pos[lower] + [0, 0, 2 * HALF]


class Lift(Task):
    slots = ("block",)
    HEIGHT = 0.12  # m, of its middle; the block is then 10 cm above the table

    def possible(self, env, block):
        return graspable(env, block) and env.block_pos[block, 2] < self.HEIGHT

    def target(self, env, block):
        return np.array([*env.block_pos[block, :2], 0.17])

    def success(self, env, block):
        return env.held == block and env.block_pos[block, 2] > self.HEIGHT


class Drawer(Task):
    slots = ("way",)
    THERE = 0.005  # m
    NEAR = 1.0  # m: it stays at its height all the way

    def possible(self, env, opens):
        return env.drawer < 0.07 if opens else env.drawer > 0.05

    def target(self, env, opens):
        return HANDLE + [0.12 * opens, 0, 0.003]  # carry() aims that much lower

    def success(self, env, opens):
        """Open at least 10 cm, or shut within 1 cm."""
        return env.drawer >= 0.10 if opens else env.drawer <= 0.01


class Push(Task):
    """| the block right ahead of the lowered hand | pushes on, slowly, behind its middle |
    | anything else                             | closes, goes behind the block       |"""

    slots = ("block", "direction")
    holds = False
    BEHIND = 0.06  # m, the hand from the block's middle
    HEIGHT = 0.022  # m, of the hand

    def possible(self, env, block, direction):
        """With nothing beside its way, from behind it to where it should be."""
        way = env.block_pos[block, :2] + np.outer([-0.06, 0.04, 0.14], direction)
        others = np.delete(env.block_pos, block, 0)
        gap = distance(others[:, None, :2], way).min()
        free = gap > 0.085 and inside(way, (0.31, -0.22), (0.70, 0.30))
        return free and not env.is_high()[block]

    def target(self, env, block, direction):
        """Always ahead of it: where it came from cannot be seen."""
        return env.block_pos[block] + 0.1 * np.array([*direction, 0])

    def success(self, env, block, direction):
        """Moved 8 cm that way since the instruction, at most 4 cm sideways, never lifted."""
        moved = (env.block_pos[block] - env.origin[block])[:2]
        straight = moved @ direction >= 0.08 and abs(moved @ direction[::-1]) <= 0.04
        return straight and not env.lifted[block]

    def expert(self, env, block, direction):
        hand = env.ee_pos
        offset = (env.block_pos[block] - hand)[:2]
        ahead = offset @ direction
        aside = offset - ahead * direction
        shut = env.opening < 0.03
        lane = 0.02 if ahead < 0.045 else 0.014  # m, more once it touches
        behind = 0.02 < ahead < 0.085 and np.hypot(*aside) < lane
        if hand[2] < 0.05 and behind and shut:
            # m ahead of the hand; more slowly until it is straight
            pace = 0.015 * max(0.3, 1 - np.hypot(*aside) / 0.012)
            return act([*(pace * direction + aside), self.HEIGHT - hand[2]], -1)
        across = offset - self.BEHIND * direction
        low = self.HEIGHT if shut else TRAVEL
        gripper = -1 if shut or hand[2] > 0.1 else 1
        return approach(hand, across, low, funnel(across, near=0.016), gripper)


TASKS = dict(
    pick_place=PickPlace(), lift=Lift(), push=Push(), stack=Stack(), drawer=Drawer()
)


# ------------------------------------------------------------------------ the expert's movements
TRAVEL = 0.115  # m, height of the hand when moving sideways
GRASP_HEIGHT = 0.009  # m, of the fingertips' middle over the middle of a thing
WIDE = 0.055  # m between the fingers: room for a block
CLEAR = 0.165  # m, height to which it rises after letting go: 10 cm above a stacked block
ROOM = 0.075  # m between things, so that the fingers have room to open


def distance(a, b):
    """Horizontal distance in m between two points (2,) or (3,), or from each of (n, 2 or 3)."""
    return np.linalg.norm((a - b)[..., :2], axis=-1)


def inside(at, low, high):
    """Whether a place (2,) is between two corners of a rectangle."""
    return ((low < at) & (at < high)).all()


def act(motion, gripper):
    """Speed-limited action towards `motion` (3,) m; gripper 1 opens, -1 closes."""
    x, y, z = 0.6 * np.asarray(motion) / ACTION_SCALE
    fast = max(1.0, np.hypot(x, y))
    return np.array([x / fast, y / fast, np.clip(z, -0.8, 0.8), gripper], np.float32)


def funnel(across, near):
    """How much higher than at its goal, in m, the hand should be `across` (2,) m from it: not at
    all within `near` m, and by twice the distance beyond. If that were steep, a policy that is a
    centimetre uncertain would hover at the height that belongs to its usual error."""
    return 2 * max(np.hypot(*across) - near, 0)


def approach(hand, across, low, above, gripper):
    """Action that goes `across` (2,) m at TRAVEL height and down to `low` m, for now
    `above` m higher."""
    height = min(low + above, max(TRAVEL, low))
    if above > 0.03:  # first rise, then travel
        across = across * np.clip((hand[2] - 0.06) / 0.05, 0, 1)
    return act([*across, height - hand[2]], gripper)


def let_go(env):
    """Lets go and rises straight up, farther than success wants: towards its end the motion gets
    slower, and a policy comes to rest before the expert does."""
    return act([0, 0, CLEAR - env.ee_pos[2]], 1)


def grasp(env):
    """Opens, moves over the thing, descends in a funnel, closes."""
    hand, at = env.ee_pos, env.thing_pos[env.thing]
    across = (at - hand)[:2]
    low = at[2] + GRASP_HEIGHT
    calm = env.ee_vel[2] > -0.2
    if calm and np.hypot(*across) < 0.016 and hand[2] < at[2] + 0.015:
        return act([*across, low - hand[2]], -1)
    if env.opening <= WIDE:
        low = TRAVEL
    return approach(hand, across, low, funnel(across, near=0.014), 1)


def carry(env, goal, above):
    """Brings the thing in the hand to `goal` (3,) m, for now `above` m higher."""
    load = env.thing_pos[env.held]
    low = goal[2] - 0.003 + env.ee_pos[2] - load[2]
    action = approach(env.ee_pos, (goal - load)[:2], low, above, -1)
    action[2] *= 0.5 if action[2] < 0 else 1  # set down gently
    return action


def put_away(env):
    """Gets rid of what should not be in the hand: sets a block down where it is or, where there is
    no ROOM, away from the nearest thing."""
    if env.held == env.handle:
        return let_go(env)
    load = env.block_pos[env.held]
    others = np.delete(env.thing_pos, env.held, 0)
    away = (load - others[distance(others, load).argmin()])[:2]
    crowded = max(ROOM - np.hypot(*away), 0)  # m
    if not crowded and load[2] < HALF + 0.004:
        return let_go(env)
    spot = (load[:2] + away * (crowded > 0)).clip(*AREA)
    return carry(env, np.array([*spot, HALF]), 4 * crowded)


def graspable(env, block):
    """Whether the block is within reach, nothing is on it and the fingers have room around it."""
    at = env.block_pos[block]
    others = np.delete(env.block_pos, block, 0)
    blocked = (distance(others, at) < 0.07) & (others[:, 2] > at[2] - 0.03)
    return inside(at[:2], (0.3, -0.21), (0.7, 0.31)) and not blocked.any()


# ------------------------------------------------------------------------------ demonstrations
NOISE = 0.12  # standard deviation of the white noise on the motion
PUSH = 0.03  # probability a step of a push: 5 steps of N(0, 0.5)
SLIP = 0.004  # probability a step of the gripper opening, for 3 steps
MISTAKEN = 0.4  # share of demonstrations that begin where an expert that is wrong has led
MISTAKE = 0.02  # m, standard deviation of where it takes each thing to be
INTERRUPT = 0.3  # share of requests that another one interrupts, if they take so long
REQUESTS = 3  # at most, per scene
NORMAL = 0.35  # share of the scenes that --randomize leaves in the normal world


def disturbance(rng, amount=1.0):
    """Noise to be executed with the actions but not recorded, so that demonstrations show how to
    recover, as in DART (arXiv:1703.09327): an iterator over what is added to the action of each
    step, (4,). amount: share of NOISE, PUSH and SLIP."""
    steps = 1000  # more than a scene has
    noise = np.zeros((steps, len(ACTION_NAMES)))
    noise[:, :3] = rng.normal(0, amount * NOISE, (steps, 3))
    for start in np.flatnonzero(rng.random(steps) < amount * PUSH):
        noise[start : start + 5, :3] += rng.normal(0, 0.5, 3)
    for start in np.flatnonzero(rng.random(steps) < amount * SLIP):
        noise[start : start + 3, -1] = 2
    return iter(noise)


def blunder(env, rng, noise):
    """Plays some steps of an expert that is wrong about where things are. They are not recorded,
    but what follows is: how to mend it when the fingers are beside a block, or a block fell off
    another. These are a policy's mistakes, as in DAgger (arXiv:1011.0686), without a policy."""
    error = np.zeros_like(env.thing_pos)
    error[:, :2] = rng.normal(0, MISTAKE, (len(error), 2))
    cameras, env.cameras = env.cameras, {}  # these pictures would be thrown away
    for _ in range(rng.integers(4, 60)):
        others = np.arange(len(error)) != env.held  # than the one in the hand
        env.thing_pos[others] += error[others]  # until step() sees where they really are
        env.step(expert(env) + next(noise))
    env.cameras = cameras
    env.set_request(env.request, env.instruction)  # restarts the clock


def demonstrate(env, seed, randomize):
    """Plays one scene; yields (attrs, frames) of write_episode.

    A demonstration is one request, from the moment it is made until it is done or the next one, of
    any of the tasks, interrupts it. The expert sometimes fails; that is left out, and the scene
    ends there. randomize: how much the world may differ, in all scenes but the NORMAL share."""
    rng = np.random.default_rng([seed, 1])
    noise = disturbance(rng)
    env.randomize = randomize * (rng.random() >= NORMAL)
    env.reset(seed)
    env.pixel_noise = 0.0  # does not compress; train.py adds it
    for _ in range(REQUESTS):
        if rng.random() < MISTAKEN:
            blunder(env, rng, noise)
        obs = env.observe()
        interrupt = rng.random() < INTERRUPT
        frames = []
        for _ in range(rng.integers(4, 60) if interrupt else MAX_STEPS):
            action = expert(env)
            frame = {f"observations/{key}": value for key, value in obs.items()}
            for name, camera in env.cameras.items():
                frame[f"cameras/{name}"] = camera.matrix(env.data).astype(np.float32)
            obs, reward, terminated, truncated, info = env.step(action + next(noise))
            frames.append(frame | dict(actions=action, rewards=reward))
            if terminated or truncated:
                break
        success = info["success"]
        if info["diverged"] or truncated and not success:
            return
        attrs = dict(
            instruction=env.instruction,
            task=env.task,
            intent=intent(*env.request),
            slots=json.dumps(env.slots),
            interrupted=not success,
            scene_seed=seed,
            randomize=env.randomize,
        )
        yield attrs, frames
        requests = env.requests(pick(env.tasks, rng))
        if not interrupt or not requests:
            return
        request = pick(requests, rng)
        env.set_request(request, make_instruction(request, rng))


# -------------------------------------------------------------------------------- the data file
EPISODES = 25  # demonstrations in a file
SCENES = 64  # set aside for them


def write_episode(file, index, attrs, frames):
    """Adds one demonstration to an HDF5 file: `frames`, of each of T control steps a dict of arrays
    by their path in it. Returns T.

    episode_0/
        attrs: instruction, task, intent (what is asked for, names apart), slots (JSON),
            num_samples, interrupted (by another request, before it was done), scene_seed, randomize
        observations/
            front_image, wrist_image     (T, 64, 64, 3) u1, one per camera
            joint_pos (T, 7) f4 rad      ee_pos (T, 3) f4 m      ee_vel (T, 3) f4 m/s
            gripper (T, 1) f4 m          object_pos, target_pos (T, 3) f4 m, see PRIVILEGED
        cameras/
            front, wrist                 (T, 3, 4) f4: its matrix, see project()
        actions (T, 4) f4    rewards (T,) f8
        obs -> observations
    wordings/push left (50,) str         of each intent, more of "none"; {names} left open
    data/                                robomimic's view
        attrs: total (of steps), env_args (JSON: the world, a hash of this file and of the grammar)
        demo_0 -> episode_0

    Another robot's file needs pictures, ee_pos, gripper, actions, and the instruction."""
    name = f"episode_{index}"
    group = file.create_group(name)
    for key in frames[0]:
        array = np.stack([frame[key] for frame in frames])
        packing = {}
        if key.endswith("_image"):  # one by one, as train.py wants them
            packing = dict(
                chunks=(1, *array.shape[1:]), compression="gzip", compression_opts=1
            )
        group.create_dataset(key, data=array, **packing)
    group.attrs.update(attrs, num_samples=len(frames))
    group["obs"] = h5py.SoftLink(f"/{name}/observations")
    file[f"data/demo_{index}"] = h5py.SoftLink(f"/{name}")
    return len(frames)


def record_file(job):
    """Records one file, unless it is there already; returns how many demonstrations it holds. job:
    (path, its env_args). A kill leaves no half file."""
    path, env_args = job
    if path.exists():
        with h5py.File(path) as file:
            if file["data"].attrs["env_args"] != env_args:
                raise ValueError(
                    f"{path} is of other settings, code or grammar; delete it, or gen_data.py --out"
                )
            return len(file["data"])
    settings = json.loads(env_args)
    first, world = settings["first_seed"], settings["env_kwargs"]
    env = Env(**world)
    scenes = (demonstrate(env, first + i, world["randomize"]) for i in range(SCENES))
    demonstrations = itertools.chain.from_iterable(scenes)
    samples = 0
    buffer = io.BytesIO()  # so that a full disk is Python's OSError
    with h5py.File(buffer, "w") as file:
        for index, episode in enumerate(
            itertools.islice(demonstrations, settings["episodes"])
        ):
            samples += write_episode(file, index, *episode)
        rng = np.random.default_rng([first, 1])
        for name, wordings in draw_wordings(env.tasks, rng, 50).items():
            file[f"wordings/{name}"] = wordings
        file["data"].attrs.update(total=samples, env_args=env_args)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")  # an earlier run may still be ending
    part.write_bytes(buffer.getbuffer())
    part.replace(path)
    return index + 1


# -------------------------------------------------------------------------------------- script
def explain_errors():
    """What a script does about errors: what the user can mend is one sentence and exit status 2,
    Ctrl-C and SIGTERM are 130. PICOVLA_TRACEBACK=1 in the environment shows the traceback."""

    def explain(kind, error, trace):
        atexit._run_exitfuncs()  # os._exit would not
        if kind is KeyboardInterrupt:
            os._exit(130)
        mendable = issubclass(kind, (ValueError, OSError, KeyError))
        if not mendable or "PICOVLA_TRACEBACK" in os.environ:
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        print(
            f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr
        )
        os._exit(2)

    sys.excepthook = explain
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--episodes", type=int, default=1500, help="demonstrations (default 1500)")
    add("--out", type=Path, help="folder for their files (default data/TASKS)")
    add(
        "--tasks",
        default="pick_place",
        help=f"all, or a comma list of {', '.join(TASKS)}",
    )
    add("--cameras", default="front,wrist", help="comma list of front, wrist, top")
    add(
        "--randomize",
        type=float,
        default=0.0,
        help="how much the world differs in two scenes of three, 0 to 1 (default 0)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="which block of 100,000 scenes to use (default 0)",
    )
    add("--workers", type=int, help="processes (default all cores)")
    args = parser.parse_args()
    if not 0 <= args.randomize <= 1 or args.seed < 0:
        raise ValueError("--randomize must be from 0 to 1, --seed not below 0")
    # Files that are there already stay, so the same command carries on. What is in a file depends
    # on its own scenes alone, not on the number of workers.
    tasks = choose(args.tasks, TASKS)  # a typo is found before processes start
    world = dict(tasks=tasks, cameras=args.cameras, randomize=args.randomize)
    code = zlib.crc32(Path(__file__).read_bytes() + GRAMMAR.read_bytes())
    env_args = dict(env_name="picovla", type=2, env_kwargs=world, code=code)
    out = args.out or Path("data", args.tasks)
    jobs = []
    for start in range(0, args.episodes, EPISODES):
        env_args["first_seed"] = DEMO_SEED + 100_000 * args.seed + SCENES * len(jobs)
        env_args["episodes"] = min(EPISODES, args.episodes - start)
        jobs.append((out / f"{len(jobs):04}.h5", json.dumps(env_args)))
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C is for the main process, which ends the others.
    with spawn.Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        totals = list(
            tqdm(pool.imap(record_file, jobs), "files", len(jobs), disable=None)
        )
    print(f"{out}: {sum(totals)} demonstrations in {len(jobs)} files")
