"""The world and its demonstrations: scene, cameras, sentences, scripted expert, HDF5 writer.

    python gen_data.py --episodes 1500 --out data/demos.h5        # 1 to 3 minutes on 2 cores
    python gen_data.py --tasks all --episodes 8000 --out data/more.h5  # all in the normal world
    python gen_data.py --info data/demos.h5                       # what is in a file

A 7-joint arm (Franka Panda link offsets) with a friction gripper stands at a table with coloured
blocks, coloured pads and a drawer; an instruction says what to do with which of them. Needs MuJoCo
and no OpenGL: pixels come from MuJoCo's ray caster. Importing this file does no work.

World frame: origin at the arm's base on the table top, x away from the robot, y to its left, z up;
metres. In order: numbers, instructions, scene, camera, environment, expert, tasks, grammar,
recording.
"""

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
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
CAMERAS = ("front", "wrist", "top")
PROPRIO = ("joint_pos", "ee_pos", "ee_vel", "gripper")  # observations that a robot feels
# Exactly these two give the answer away: for train.py --state full and --labels simulator alone.
PRIVILEGED = ("object_pos", "target_pos")

COLORS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.08, 0.62, 0.16),
    "blue": (0.10, 0.25, 0.95),
    "yellow": (0.96, 0.84, 0.08),
    "purple": (0.58, 0.12, 0.78),
}
N_BLOCKS = 3
N_PADS = 2
AREA = np.array([[0.36, -0.15], [0.64, 0.22]])  # m, where things are put (x, y)
DRAWER = 0.13  # m, travel of the drawer
HANDLE = np.array([0.437, -0.275, 0.064])  # m, its handle when it is shut
DIRECTIONS = {  # unit vectors (x, y), as the robot sees them
    "left": (0, 1),
    "right": (0, -1),
    "forward": (1, 0),
    "back": (-1, 0),
}

HOME = np.array([0, -0.2, 0, -2.2, 0, 2.0, 0.785])  # rad, start and rest of the IK
DAMPING = 1e-4 * np.eye(6)  # m² and rad², of the IK
POINTING_DOWN = np.array([0.0, 1, 0, 0])  # quaternion of the hand
GRIPPER_OPEN = 0.035  # m, travel of each finger
LEASH = 0.04  # m, how far the commanded hand may run ahead of the real one

# The guard between any policy and the servos; eval.py counts what it stops.
GUARDS = ("action", "speed", "box", "joint", "force")
WORKSPACE = np.array([[0.28, -0.32, 0.004], [0.72, 0.32, 0.35]])  # m, box for the hand
SPEED_LIMIT = 0.8  # m/s, of the hand
JOINT_MARGIN = 0.02  # rad, kept from the ends of the joints' ranges
FORCE_LIMIT = 40.0  # N, at any contact of a block; above it the hand backs off

# Scene seeds: three ranges that never meet. Demonstrations start at DEMO_SEED + 100_000 * --seed.
VALID_SEED = 0  # for choosing
TEST_SEED = 1_500_000  # for reporting, once a release
DEMO_SEED = 2_000_000
# Random streams of a scene: [seed] itself; [seed, 1] recording, 2 eval.py, 3 whether its world is the
# normal one, 7 world, 8 pixels, 9 the next seed.

# What demonstrations never show: these combinations of slots, and what GRAMMAR marks with a *.
HELD_OUT = dict(
    pick_place=("red blue", "green yellow", "blue purple", "yellow red", "purple green"),
    stack=("red yellow", "green purple", "blue red", "purple blue"),
    push=("purple left", "purple right", "purple forward", "purple back"),
)
SPLITS = ("seen", "phrasing", "combo", "crowd")
CROWD = 5  # blocks in the last of these

# Domain randomisation: what may differ from scene to scene, by how much at --randomize 1.
FACTORS = dict(
    light=(0.5, 0.25),  # of the direction (unit vector), of the strength (share)
    color=(0.12, 0.07),  # of the table, of blocks and pads (r, g, b in 0..1)
    camera=(0.02, 2.0),  # m, degrees of field of view
    noise=8.0,  # standard deviation, of 255
    friction=0.3,  # share
    mass=(0.5, 0.1),  # share, of the blocks' mass and size
    damping=0.5,  # share, of the joints'
    servo=0.25,  # share, of gain and bias together
    delay=0.5,  # probability that actions arrive one control step late
)


def choose(names, known, what):
    """`names` as a tuple, checked: each one of `known`, none twice."""
    names = tuple(names)
    for name in names:
        if name not in known or names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is not one of {', '.join(known)}, or twice")
    return names


# ------------------------------------------------------------------------------- instructions
# A request is (task, slots), e.g. ("push", dict(block="red", direction="left")). Sentences are drawn
# from GRAMMAR, below the tasks. A wording is a sentence in which the slots that are names are left
# open: "push the {block} cube to your left"; train.py fills them in.
SLOTS = dict(
    block=tuple(COLORS),
    pad=tuple(COLORS),
    lower=tuple(COLORS),  # the block underneath
    direction=tuple(DIRECTIONS),
    way=("open", "close"),
)
NAMES = ("block", "pad", "lower")  # slots that are open in a wording
NOTHING = ("none", {})  # the request of a sentence that asks for nothing that can be done here
WORDINGS = 3000  # in a data file, for each task and each word of its other slots


def is_held_out(task, slots):
    """Whether demonstrations leave out this combination of words."""
    return " ".join(slots.values()) in HELD_OUT.get(task, ())


def slots_of(task, words):
    """Every way to fill the task's slots from `words`, a dict of words for each kind of slot."""
    names = TASKS[task].slots
    combinations = itertools.product(*[words[name] for name in names])
    return [dict(zip(names, combination)) for combination in combinations]


def all_requests(tasks):
    """Every request that could ever be made; its order numbers the requests of a data file."""
    return [(task, slots) for task in tasks for slots in slots_of(task, SLOTS)]


def intent(task, slots):
    """What a sentence asks for, names apart: "pick_place", "push left", "drawer open"."""
    return " ".join([task, *[word for slot, word in slots.items() if slot not in NAMES]])


def alternatives(text):
    """Those of a rule of GRAMMAR, each after a | that has space around it."""
    parts = re.split(r"(?:^|\s)\|\s", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def read_grammar(text):
    """{name of a rule: its alternatives}"""
    parts = re.split(r"^ *(\w+):", re.sub("#.*", "", text), flags=re.MULTILINE)
    return {name: alternatives(body) for name, body in zip(parts[1::2], parts[2::2])}


@functools.cache
def choices(rule, held_out):
    """Alternatives of a rule of GRAMMAR: if held_out, those with a *, where it has any."""
    marked = [text[1:] for text in GRAMMAR[rule] if text.startswith("*")]
    plain = [text for text in GRAMMAR[rule] if not text.startswith("*")]
    return marked if held_out and marked else plain


def make_wording(task, slots, rng, held_out=False):
    """A wording of the request, drawn by `rng` from GRAMMAR; held_out: by a rule's * alternatives for
    the whole sentence, and in every second choice of words."""

    def replace(match):
        if match["rule"]:
            options = choices(match["rule"], held_out and rng.random() < 0.5)
        else:
            options = match["inline"].split("|")
        text = options[rng.integers(len(options))]
        return "" if text == "-" else text

    options = choices(task, held_out)
    text = options[rng.integers(len(options))]
    for slot, word in slots.items():
        if slot not in NAMES:
            text = text.replace("{%s}" % slot, word)
    replaced = True
    while replaced:
        text, replaced = re.subn(r"<(?P<rule>\w+)>|\((?P<inline>[^()]*)\)", replace, text)
    return " ".join(text.split())


def make_instruction(request, rng, held_out=False):
    """A sentence for the request, its wording drawn by `rng`."""
    task, slots = request
    text = make_wording(task, slots, rng, held_out).format(**slots)
    return text if len(text.split()) <= 40 else make_instruction(request, rng, held_out)


def words_in(text):
    """As model.py splits a sentence."""
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))


def words_of(*rules):
    """Every word of rules of GRAMMAR."""
    return set(words_in(" ".join(" ".join(GRAMMAR[rule]) for rule in rules)))


def parse_instruction(text):
    """The request that a sentence in anybody's words makes, as far as keywords tell; the policy knows
    more. Raises ValueError if none fits.

    A colour is a block's or a pad's by the word after it, or else by its place: the first is the
    block's, the second the pad's, unless something is stacked. A direction or open and close is the one
    with the most words of its rule."""
    words = words_in(text)
    blocks = words_of("cube")
    pads = words_of("rim") - words_of("cube", "thing", "under", "atop", "on", "put")
    stacked = not {"stack", "top", "tower", "pile", "atop", "base"}.isdisjoint(words)
    slots = {}
    for word, following in zip(words, words[1:] + [""]):
        if word in COLORS:
            if following in pads:
                slots["pad"] = word
            elif "block" not in slots:
                slots["block"] = word
            else:
                slots["lower" if following in blocks or stacked else "pad"] = word
    colors = [word for word in words if word in COLORS]
    drawer = not {"drawer", "cabinet", "cupboard", "handle"}.isdisjoint(words)
    if len(slots) == len(colors) < 2:
        other, rules = "direction", {word: [word] for word in DIRECTIONS}
        if drawer:
            other, rules = "way", dict(
                open=("open", "open_ed", "open_ing"), close=("close", "close_ed", "close_ing")
            )
        own = {}
        for word, names in rules.items():
            strangers = [name for name in itertools.chain(*rules.values()) if name not in names]
            own[word] = words_of(*names) - words_of(*strangers) - {"of", "from", "are", "where"}
        count = {word: sum(w in own[word] for w in words) for word in own}
        best = max(count, key=count.get)
        lifted = not {"lift", "raise", "up", "hold", "air", "grab", "grasp"}.isdisjoint(words)
        if count[best] and not lifted:
            slots[other] = best
    tasks = [task for task in TASKS if set(TASKS[task].slots) == set(slots)]
    pushed = not {"push", "slide", "shove", "nudge"}.isdisjoint(words)
    aimless = pushed and set(slots) == {"block"}  # pushed, but where to?
    if not tasks or aimless or len(colors) > 2 or drawer != ("way" in slots):
        raise ValueError(
            f"it is not clear what {text!r} asks for: it should name a block by its colour "
            f"({', '.join(COLORS)}), and if need be a pad, a second block or a direction "
            f"({', '.join(DIRECTIONS)}), or else the drawer"
        )
    # of tasks with the same slots, the one whose own words occur
    task = max(tasks, key=lambda task: len(words_of(task).intersection(words)))
    return task, {slot: slots[slot] for slot in TASKS[task].slots}


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
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
    {blocks}
    {pads}
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
  <sensor>{forces}</sensor>
</mujoco>"""
BLOCK_XML = """
    <body name="block{i}">
      <freejoint/>
      <geom name="block{i}" size=".02 .02 .02" mass=".06" friction="1 .05 .001"
            condim="4" class="solid"/>
    </body>"""
# a coloured disc with a white middle: a flat target, unlike a block of the same colour
PAD_XML = """
    <body name="pad{i}">
      <geom name="pad{i}" type="cylinder" size=".045 .0008"/>
      <geom type="cylinder" size=".016 .0012" rgba=".95 .95 .95 1"/>
    </body>"""
# of each contact: the normal force and two tangential ones
FORCE_XML = '<contact body1="block{i}" data="force" num="32"/>'


def build_model(n_blocks):
    """The MjModel of a table with so many blocks. Raises ValueError for an older MuJoCo."""
    if int(mujoco.__version__.split(".")[0]) < 4:
        raise ValueError(
            f"this world needs MuJoCo 4, and this is {mujoco.__version__}; pip install -r "
            "requirements.txt, in an environment without Meta-World"
        )

    def each(xml, n):
        return "".join(xml.format(i=i) for i in range(n))

    blocks, forces = each(BLOCK_XML, n_blocks), each(FORCE_XML, n_blocks)
    xml = SCENE.format(blocks=blocks, forces=forces, pads=each(PAD_XML, N_PADS), **globals())
    return mujoco.MjModel.from_xml_string(xml)


# ------------------------------------------------------------------------------- the camera
class RayCamera:
    """Pictures from MuJoCo's ray caster: no OpenGL, no driver, the same bytes on every run.

    Shading is Lambert's with one light and an ambient term; colours are the model's geom_rgba.
    Most pixels show bare table or sky, known without casting. The others are found by projection:

        a geom's box, 8 corners                 the picture
             ┌─────────┐                        ┌──────────────┐
            ╱         ╱│  corners to pixels     │  ▒▒▒▒        │  ▒ the rectangle around the
           └─────────┘ ╵  ----------------->    │  ▒▒▒▒        │    corners: rays are cast there
                                                └──────────────┘
    """

    LIGHT = np.array([0.35, -0.45, 0.82])  # direction towards the light, world frame
    AMBIENT = 0.45
    DIFFUSE = 0.55
    SKY = (150, 165, 180)
    TABLE = 0  # geom id: the first in SCENE
    CORNERS = np.array(list(itertools.product([-1, 1], repeat=3)))  # (8, 3)
    FLIP = np.array([1, -1, -1])  # MuJoCo's cameras look along -z with y up
    NEAR = 0.01  # m, anything nearer may be anywhere on screen
    IN_SIGHT = (
        1  # geom group that rays are cast at; the table and what is out of sight are in 0
    )
    CAST_AT = np.eye(mujoco.mjNGROUP, dtype=np.uint8)[IN_SIGHT]

    def __init__(self, model, name, size=IMAGE_SIZE):
        self.model = model
        self.size = size  # px
        self.id = model.camera(name).id
        self.light = self.LIGHT
        self.strength = 1.0
        self.refit()

    def refit(self):
        """Takes over the model's field of view, geom sizes and table colour, and the light."""
        model, size = self.model, self.size
        self.half = np.tan(np.deg2rad(model.cam_fovy[self.id]) / 2)
        grid = ((np.arange(size) + 0.5) / size * 2 - 1) * self.half
        x, y = np.meshgrid(grid, -grid)
        rays = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
        self.rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)  # camera frame

        boxes = model.geom_aabb[1:].reshape(-1, 2, 1, 3)  # of all but the table, geom frame
        self.corners = boxes[:, 0] + self.CORNERS * boxes[:, 1]  # (geoms, 8, 3)

        flat = np.float32(self.strength * (self.AMBIENT + self.DIFFUSE * self.light[2]))
        color = model.geom_rgba[self.TABLE, :3] * 255 * flat
        self.bare = np.tile(color.clip(0, 255).astype(np.uint8), (size * size, 1))

    def render(self, data, cull=True):
        """Picture (size, size, 3) uint8 of `data`, after mj_kinematics and mj_camlight. `geom`
        (size, size) is then the geom id of each pixel, -1 for sky."""
        turn = data.cam_xmat[self.id].reshape(3, 3)  # camera to world
        position = data.cam_xpos[self.id]
        sky = self.rays @ turn[2] >= 0  # rays that never come down
        image = self.bare.copy()
        image[sky] = self.SKY
        geoms = np.where(sky, -1, self.TABLE)

        pixels = self._pixels_to_cast(data) if cull else np.arange(len(image))
        n = len(pixels)
        geom, distance, normal = np.empty(n, np.int32), np.empty(n), np.empty(3 * n)
        rays = self.rays.take(pixels, 0) @ turn.T  # take is four times as fast as []
        mujoco.mj_multiRay(
            self.model,
            data,
            position,
            rays.reshape(-1),
            self.CAST_AT if cull else None,
            True,
            -1,
            geom,
            distance,
            normal,
            n,
            mujoco.mjMAXVAL,
        )
        above = position[2] + distance * rays[:, 2] > -1e-9  # the table hides what is sunk in
        hit = np.flatnonzero((geom >= 0) & above)
        pixels, geom = pixels.take(hit), geom.take(hit)

        lit = np.maximum(normal.reshape(n, 3).take(hit, 0) @ self.light, 0)
        light = self.strength * (lit * self.DIFFUSE + self.AMBIENT)
        rgb = 255 * self.model.geom_rgba[:, :3]
        color = rgb.take(geom, 0) * light.astype(np.float32)[:, None]
        image[pixels] = np.minimum(color, 255)
        geoms[pixels] = geom
        self.geom = geoms.reshape(self.size, self.size)
        return image.reshape(self.size, self.size, 3)

    def _pixels_to_cast(self, data):
        """Indices (n,) of the pixels in the rectangle of some geom; marks those geoms IN_SIGHT."""
        turn = data.geom_xmat[1:].reshape(-1, 3, 3)  # geoms to world
        corners = self.corners @ turn.swapaxes(1, 2) + data.geom_xpos[1:, None]
        uv, depth = self._look_at(data, corners)
        low = self.size * uv.min(1) - 0.5  # px; a ray goes through a pixel's middle
        high = self.size * uv.max(1) + 0.5 + 1e-6
        edges = np.stack([low, high], 1).clip(0, self.size).astype(int)  # (geoms, 2, 2)
        seen = (edges[:, 0] < edges[:, 1]).all(1) & (depth.max((1, 2)) > 0)
        edges[depth.min((1, 2)) < self.NEAR] = [[0], [self.size]]
        self.model.geom_group[1:] = self.IN_SIGHT * seen
        mask = np.zeros((self.size, self.size), bool)
        for (left, top), (right, bottom) in edges[seen].tolist():
            mask[top:bottom, left:right] = True
        return np.flatnonzero(mask)

    def _look_at(self, data, points):
        """World points (..., 3) m to image coordinates (..., 2), x right, y down, both 0..1 in the
        picture, and how far ahead they are (..., 1), m."""
        view = data.cam_xmat[self.id].reshape(3, 3) * self.FLIP
        local = (points - data.cam_xpos[self.id]) @ view
        depth = local[..., 2:]
        return local[..., :2] / np.maximum(depth, 1e-3) / self.half * 0.5 + 0.5, depth

    def calibration(self, data, hand):
        """Where the camera is, as a laboratory knows it: what it is mounted on ("world" or "hand"),
        its pose (4, 4) in that frame, m, with x right, y down, z ahead, and its vertical field of
        view, degrees. hand: id of the site of the hand's frame."""
        turn = data.cam_xmat[self.id].reshape(3, 3) * self.FLIP
        position = data.cam_xpos[self.id]
        mount = "hand" if self.model.cam_bodyid[self.id] else "world"
        if mount == "hand":
            frame = data.site_xmat[hand].reshape(3, 3)
            turn, position = frame.T @ turn, frame.T @ (position - data.site_xpos[hand])
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = turn, position
        return mount, pose, self.model.cam_fovy[self.id]

    def project(self, data, points):
        """World points (..., 3) m to image coordinates (..., 2): x right, y down, both 0..1."""
        uv, depth = self._look_at(data, points)
        return np.where(depth > 0, uv, -1.0)  # behind the camera: outside the picture

    def visible(self, data, points, geoms):
        """(n, 2) float32: where `points` (n, 3) on `geoms` (n,) are in the last picture, 0..1,
        and -1 where fewer than 3 pixels of the geom show."""
        uv = self.project(data, points)
        pixels = (self.geom.reshape(-1) == geoms[:, None]).sum(1)
        shows = (pixels >= 3) & (np.abs(uv - 0.5) < 0.5).all(1)
        return np.where(shows[:, None], uv, -1).astype(np.float32)


# -------------------------------------------------------------------------------- environment
class TouchMemory:
    """What has been touched and lifted since an instruction came. Success of lift and push depends on
    it, and no picture shows it; the expert does not read it.

    What is in the hand at that moment counts as touched only when it is touched anew, and a block
    that is in the air counts from where it is put down."""

    def __init__(self, env):
        self.first = None  # colour of the block touched first
        self.touched = set()  # indices of blocks
        self.holding = env.touching  # what the hand has touched without a pause
        self.airborne = env.is_high()
        self.lifted = np.zeros(env.n_blocks, bool)
        self.origin = env.block_pos.copy()  # (n_blocks, 3) m, where each block was

    def update(self, env):
        high = env.is_high()
        self.lifted |= high & ~self.airborne
        for block in np.flatnonzero(self.airborne & ~high):
            if block != env.held:  # it has been put down
                self.origin[block] = env.block_pos[block]
                self.airborne[block] = False
        self.holding = self.holding & env.touching
        new = np.flatnonzero((env.touching & ~self.holding)[: env.n_blocks])
        self.touched.update(new)
        if self.first is None and len(new):
            self.first = env.block_colors[new[0]]


class Env:
    """The table and the arm, with Gymnasium's five return values (gymnasium is not needed).

    tasks: names from TASKS, what may be asked for. cameras: names from CAMERAS; () renders
    nothing. split: one of SPLITS. randomize: 0..1, how far each of FACTORS may be from normal;
    randomize_only: the name of one, or None for all. guard: whether the safety guard stands
    between actions and servos (see step).

    Observations are a dict: <camera>_image (64, 64, 3) uint8; joint_pos (7,) rad; ee_pos (3,) m,
    between the fingertips; ee_quat (4,), the hand's orientation, w first; ee_vel (3,) m/s; gripper
    (1,) m between the fingers; object_pos and target_pos (3,) m: the instructed thing and where it
    should go, which give the answer away. All but images float32. Action: (4,) [dx, dy, dz, gripper] in [-1, 1]; 1 is 3 cm a step;
    gripper > 0 opens, otherwise it closes. info["violations"] counts what the guard stopped,
    info["force"] is the largest contact force on a block so far, N, the table's included.

    Things are numbered: blocks, then pads, then the drawer's handle. `command` and `q_command` are
    where hand and joints are to be, `ee_pos` and `data` where they are; `ik_data` is scratch.
    """

    def __init__(
        self,
        tasks=("pick_place",),
        cameras=("front", "wrist"),
        split="seen",
        randomize=0.0,
        randomize_only=None,
        guard=True,
    ):
        self.tasks = choose(tasks or [""], TASKS, "task")
        (self.split,) = choose([split], SPLITS, "split")
        chosen = [randomize_only] if randomize_only else FACTORS
        self.factors = choose(chosen, FACTORS, "factor")
        self.n_blocks = CROWD if split == "crowd" else N_BLOCKS
        self.guard = guard
        self.model = m = build_model(self.n_blocks)
        self.normal = build_model(self.n_blocks)  # other worlds are drawn around it
        self.data = mujoco.MjData(m)
        self.ik_data = mujoco.MjData(m)
        self.cameras = {name: RayCamera(m, name) for name in choose(cameras, CAMERAS, "camera")}
        self.grip = m.actuator("grip").id
        self.hand = m.site("hand").id
        self.hand_geoms = [m.geom(name).id for name in ("finger_left", "finger_right", "palm")]
        self.block_geom = [m.geom(f"block{i}").id for i in range(self.n_blocks)]
        pads = [m.geom(f"pad{i}").id for i in range(N_PADS)]
        self.thing_geom = np.array([*self.block_geom, *pads, m.geom("handle").id])
        self.handle = len(self.thing_geom) - 1
        self.block_qpos = m.jnt_qposadr[9:-1]  # joints: arm, fingers, blocks, drawer
        self.orientation = POINTING_DOWN  # quaternion that the IK holds the hand at
        self.seeds = np.random.default_rng()  # for resets without a seed
        self.memory = None  # until the first reset
        self.set_randomize(randomize)

    # -- setting up
    def set_randomize(self, amount):
        """How far from normal, 0..1, the worlds of the next resets may be."""
        if not 0 <= amount <= 1:
            raise ValueError(f"randomize is a number from 0 to 1, not {amount}")
        self.randomize = amount

    def reset(self, seed=None, options=None):
        """New scene, a function of `seed` (int; without one, the next of the last one's stream);
        tasks take turns with the seeds. Returns (obs, info).

        options: dict(instruction=sentence, task=name, slots=some of them), to set them by hand.
        Raises ValueError if they do not fit the scene."""
        options = options or {}
        choose(options, ("instruction", "task", "slots"), "option")
        if seed is None:
            self.seed = int(self.seeds.integers(2**31))
        else:
            self.seed = int(seed)
            self.seeds = np.random.default_rng([self.seed, 9])
        rng = np.random.default_rng(self.seed)
        text = options.get("instruction")
        slots = options.get("slots") or {}
        task = options.get("task") or self.tasks[self.seed % len(self.tasks)]
        choose([task], TASKS, "task")
        held_out = self.split == "combo"
        if set(slots) == set(TASKS[task].slots):
            held_out = None  # an explicit request is granted, held out or not
        self._randomize(np.random.default_rng([self.seed, 7]))
        for _ in range(1000):
            self._new_scene(rng)
            self._refresh(moved=False)
            if text is not None:
                self.set_instruction(text)
            elif request := self.draw_request(rng, (task,), held_out, only=slots):
                sentence = make_instruction(request, rng, self.split == "phrasing")
                self.set_request(request, sentence)
            else:
                continue
            return self.observe(), self.info()
        raise ValueError(f"no scene allows task {task} with {slots or 'this split'}")

    def _new_scene(self, rng):
        m, d = self.model, self.data
        mujoco.mj_resetData(m, d)
        self.block_colors = rng.permutation(list(COLORS))[: self.n_blocks].tolist()
        self.pad_colors = rng.permutation(list(COLORS))[:N_PADS].tolist()
        here = dict(block=self.block_colors, lower=self.block_colors, pad=self.pad_colors)
        self.words = SLOTS | here  # that have a meaning in this scene
        names = self.block_colors + self.pad_colors
        colors = np.array([COLORS[name] for name in names], np.float32)
        if self.randomize and "color" in self.factors:
            colors += self.randomize * FACTORS["color"][1] * rng.uniform(-1, 1, colors.shape)
        m.geom_rgba[self.thing_geom[:-1], :3] = colors.clip(0, 1)
        self.half = m.geom_size[self.block_geom, 0]  # m, half the edge of each block
        spots = self._free_spots(rng)
        for start, spot, half in zip(self.block_qpos, spots, self.half):
            yaw = rng.uniform(-0.25, 0.25)  # rad; the gripper does not turn
            pose = [*spot, half, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
            d.qpos[start : start + 7] = pose
        pads = m.geom_bodyid[self.thing_geom[self.n_blocks : -1]]
        m.body_pos[pads, :2] = spots[self.n_blocks :]
        d.qpos[-1] = DRAWER * np.clip(rng.uniform(-0.4, 1.4), 0, 1)  # often shut or wide open
        self.command = rng.uniform((0.38, -0.2, 0.14), (0.6, 0.2, 0.26))  # m, for the hand
        self.q_command = HOME  # rad, for the joints
        self.guarded = dict.fromkeys(GUARDS, 0)
        self.force = self.last_force = 0.0  # N, so far and in the last step
        for _ in range(20):
            self._solve_ik(self.command)
        d.qpos[:7] = d.ctrl[:7] = self.q_command
        d.qpos[7:9] = d.ctrl[self.grip] = GRIPPER_OPEN
        self.delayed = np.eye(len(ACTION_NAMES))[3]  # on its way, if late: open, stay

    def _randomize(self, rng):
        """Draws a world around the normal one. Every factor draws its numbers, so that one alone
        is as in all at once."""
        m, normal = self.model, self.normal
        draw = {}
        for name in FACTORS:
            draw[name] = rng.uniform(-1, 1, 32) * self.randomize * (name in self.factors)
        late = FACTORS["delay"] * self.randomize  # probability
        self.late = "delay" in self.factors and rng.random() < late
        self.pixel_noise = FACTORS["noise"] * abs(draw["noise"][0])  # std, of 255
        self.pixel_rng = np.random.default_rng([self.seed, 8])

        m.geom_rgba[:] = normal.geom_rgba
        m.geom("table").rgba[:3] += FACTORS["color"][0] * draw["color"][:3]
        shift, zoom = FACTORS["camera"]
        moves = draw["camera"][: 4 * m.ncam].reshape(4, -1)
        m.cam_pos[:] = normal.cam_pos + shift * moves[:3].reshape(-1, 3)
        m.cam_fovy[:] = normal.cam_fovy + zoom * moves[3]

        heavier, larger = FACTORS["mass"]
        blocks, bodies = self.block_geom, m.geom_bodyid[self.block_geom]
        size = 1 + larger * draw["mass"][: self.n_blocks, None]
        mass = 1 + heavier * draw["mass"][8 : 8 + self.n_blocks, None]
        servo = 1 + FACTORS["servo"] * draw["servo"][:7, None]
        for array, rows, factor in (
            ("geom_friction", np.s_[:, 0], 1 + FACTORS["friction"] * draw["friction"][0]),
            ("geom_size", blocks, size),
            ("geom_aabb", blocks, size),
            ("geom_rbound", blocks, size[:, 0]),
            ("body_mass", bodies, mass[:, 0]),
            ("body_inertia", bodies, mass * size**2),
            ("dof_damping", ..., 1 + FACTORS["damping"] * draw["damping"][0]),
            ("actuator_gainprm", slice(7), servo),
            ("actuator_biasprm", slice(7), servo),
        ):
            getattr(m, array)[rows] = getattr(normal, array)[rows] * factor
        mujoco.mj_setConst(m, self.ik_data)  # what follows from the masses

        direction, strength = FACTORS["light"]
        light = RayCamera.LIGHT + direction * draw["light"][:3]
        for camera in self.cameras.values():
            camera.light = light / np.linalg.norm(light) * np.linalg.norm(RayCamera.LIGHT)
            camera.strength = 1 + strength * draw["light"][3]
            camera.refit()

    def _free_spots(self, rng):
        """Places (n_blocks + N_PADS, 2) m, 10 cm apart at least, pads 12 cm from each other."""
        n = self.n_blocks + N_PADS
        gaps = np.full((n, n), 0.10)
        gaps[self.n_blocks :, self.n_blocks :] = 0.12
        spots = np.empty((n, 2))
        found = tries = 0
        while found < n:
            if tries == 50:  # cornered: start again
                found = tries = 0
            spots[found] = rng.uniform(*AREA)
            tries += 1
            if (distance(spots[:found], spots[found]) > gaps[found, :found]).all():
                found += 1
                tries = 0
        return spots

    # -- requests
    def resolve(self, slots):
        """What the words mean in this scene: indices of blocks and pads, a unit vector (2,) for a
        direction. These are the arguments of a Task's methods. Raises ValueError for a colour
        that is not there."""
        meaning = dict(slots)
        for slot, word in slots.items():
            if slot == "direction":
                meaning[slot] = np.array(DIRECTIONS[word])
            elif word not in self.words[slot]:
                raise ValueError(
                    f"there is no {word} {'pad' if slot == 'pad' else 'block'} in scene "
                    f"{self.seed}; it has {', '.join(self.block_colors)} blocks and "
                    f"{', '.join(self.pad_colors)} pads"
                )
            elif slot != "way":
                meaning[slot] = self.words[slot].index(word)
        return meaning

    def requests(self, task):
        """All slots of the task that this scene has words for."""
        return slots_of(task, self.words)

    def can_ask(self, task, slots):
        """Whether it can be done from here and is not done yet."""
        return TASKS[task].possible(self, **self.resolve(slots))

    def draw_request(self, rng, tasks=None, held_out=False, avoid=None, only={}):
        """A request that could be made now, other than `avoid`, its task drawn first; None if there
        is none. held_out: True for held-out combinations alone, False for the others, None for
        either. only: slots that it must have."""
        tasks = tasks or self.tasks
        for i in rng.permutation(len(tasks)):
            choice = self.requests(tasks[i])
            for j in rng.permutation(len(choice)):
                request = tasks[i], choice[j]
                fits = held_out in (None, is_held_out(*request)) and request != avoid
                if fits and only.items() <= choice[j].items() and self.can_ask(*request):
                    return request

    def things(self, slots):
        """Which things (2,): what is to be moved, and what it goes to (-1: nothing one sees)."""
        meaning = self.resolve(slots)
        place = meaning.get("lower", -1)
        if "pad" in meaning:
            place = self.n_blocks + meaning["pad"]
        return meaning.get("block", self.handle), place

    def set_instruction(self, text):
        """The sentence to be obeyed from now on; restarts the clock. Raises ValueError if it is not
        clear or does not fit the scene."""
        self.set_request(parse_instruction(text), text)

    def set_request(self, request, text):
        """The same with the meaning known."""
        self.meaning = self.resolve(request[1])  # ValueError before anything changes
        self.request = request
        self.task, self.slots = request
        self.instruction = text
        self.thing = self.things(self.slots)[0]
        self.steps = 0
        self.done_steps = 0
        self.memory = TouchMemory(self)

    # -- stepping
    def step(self, action):
        """One control step (50 ms): obs, reward, terminated, truncated, info.

        terminated is success, or a simulation that diverged (info["diverged"]). The guard clips
        the action to [-1, 1], the hand's speed, its place to WORKSPACE and the joints to their
        ranges less a margin, and backs off where a block is pressed too hard."""
        if self.memory is None:
            raise ValueError("step() needs a scene; call reset() first")
        action = np.asarray(action, np.float64)
        if action.shape != (len(ACTION_NAMES),) or not np.isfinite(action).all():
            raise ValueError(
                f"an action is {len(ACTION_NAMES)} finite numbers in [-1, 1] "
                f"({', '.join(ACTION_NAMES)}), not {action!r}"
            )
        if self.late:
            action, self.delayed = self.delayed, action
        action = self._limit("action", action, -1, 1)
        self._move_command(action[:3] * ACTION_SCALE)
        before = self.q_command
        self._solve_ik(self.command)
        self.data.ctrl[self.grip] = GRIPPER_OPEN if action[3] > 0 else 0.0
        self.last_force = 0.0
        for part in range(1, RAMP + 1):
            self.data.ctrl[:7] = before + part / RAMP * (self.q_command - before)
            mujoco.mj_step(self.model, self.data, SUBSTEPS)
            pressed = self.data.sensordata[::3].max()  # the normal forces
            self.last_force = max(self.last_force, float(pressed))
        self.force = max(self.force, self.last_force)
        self.steps += 1
        self._refresh()
        done = TASKS[self.task].success(self, **self.meaning)
        self.done_steps = self.done_steps + 1 if done else 0
        info = self.info()
        over = info["success"] or info["diverged"]
        late = self.steps >= MAX_STEPS
        return self.observe(), self._reward(info["success"]), over, late, info

    def _limit(self, guard, value, low, high):
        """`value` within its limits, and a count if it was not; without guards, as it is."""
        inside = value.clip(low, high) if self.guard else value
        self.guarded[guard] += int((inside != value).any())
        return inside

    def _move_command(self, motion):
        """Moves the commanded hand by `motion` (3,) m, as far as guard and leash allow."""
        speed = np.linalg.norm(motion) * CONTROL_HZ
        if self.guard and speed > SPEED_LIMIT:
            motion = motion * SPEED_LIMIT / speed
            self.guarded["speed"] += 1
        target = self.command + motion
        if self.guard and self.last_force > FORCE_LIMIT:
            target = self.ee_pos + [0, 0, 0.01]
            self.guarded["force"] += 1
        target = self._limit("box", target, *WORKSPACE)
        self.command = self.ee_pos + (target - self.ee_pos).clip(-LEASH, LEASH)

    def _solve_ik(self, target):
        """One damped least-squares step of the commanded joints towards the hand at `target`,
        pointing down; what the six equations leave free drifts back to a comfortable elbow."""
        m, d = self.model, self.ik_data
        d.qpos[:7] = self.q_command
        mujoco.mj_kinematics(m, d)
        mujoco.mj_comPos(m, d)
        jacobian = np.zeros((6, m.nv))
        mujoco.mj_jacSite(m, d, jacobian[:3], jacobian[3:], self.hand)
        jacobian = jacobian[:, :7]  # the arm's joints come first
        hand, turn, error = np.empty(4), np.empty(3), np.empty(6)
        error[:3] = target - d.site_xpos[self.hand]
        mujoco.mju_mat2Quat(hand, d.site_xmat[self.hand])
        mujoco.mju_subQuat(turn, self.orientation, hand)  # rad, in the hand's frame
        mujoco.mju_rotVecQuat(error[3:], turn, hand)
        rest = 0.05 * (HOME - self.q_command)
        dual = np.linalg.solve(jacobian @ jacobian.T + DAMPING, error - jacobian @ rest)
        wanted = self.q_command + jacobian.T @ dual + rest
        low, high = m.jnt_range[:7].T  # rad
        wanted = self._limit("joint", wanted, low + JOINT_MARGIN, high - JOINT_MARGIN)
        self.q_command = wanted.clip(low, high)

    def _refresh(self, moved=True):
        """Brings what the rest reads up to date with the state: poses, hand velocity, contacts."""
        m, d = self.model, self.data
        mujoco.mj_kinematics(m, d)
        mujoco.mj_camlight(m, d)
        hand = d.site_xpos[self.hand].copy()
        self.ee_vel = (hand - self.ee_pos) * CONTROL_HZ if moved else np.zeros(3)  # m/s
        self.ee_pos = hand
        self.opening = d.qpos[7:9].sum()  # m between the fingers
        self.drawer = d.qpos[-1]  # m, 0 is shut
        self.thing_pos = d.geom_xpos[self.thing_geom]
        self.block_pos = self.thing_pos[: self.n_blocks]
        self.pad_pos = self.thing_pos[self.n_blocks : -1]

        touch = np.zeros((m.ngeom, m.ngeom), bool)
        one, other = d.contact.geom.T
        touch[one, other] = touch[other, one] = True
        left, right, palm = touch[self.hand_geoms][:, self.thing_geom]  # each (things,)
        self.touching = left | right | palm
        between = left & right & (self.opening > 0.012)
        if 0.018 < self.opening < 0.03:  # the handle does not give way: one may be just off
            between[self.handle] = left[self.handle] or right[self.handle]
        reach = np.linalg.norm(self.thing_pos - self.ee_pos, axis=1)
        near = np.flatnonzero(between)
        self.grasped = min(near, key=reach.__getitem__, default=None)  # a thing
        self.held = self.grasped if self.grasped != self.handle else None  # a block
        if moved:
            self.memory.update(self)

    def is_high(self):
        """(n_blocks,) bool: which blocks are in the air or on something."""
        return self.block_pos[:, 2] > self.half + 0.01

    def at_rest(self, block):
        """Whether it lies or stands still, released, and the hand has withdrawn upwards."""
        still = np.abs(self.data.qvel[9:-1].reshape(-1, 6)[block, :3]).max() < 0.02
        released = self.held != block and self.opening > 0.055
        return still and released and self.ee_pos[2] > self.block_pos[block, 2] + 0.06

    def _reward(self, success):
        """Shaped, in [0, 1]: reaching up to 0.2, holding 0.2, nearness to the target up to 0.4;
        1 on success."""
        if success:
            return 1.0
        at = self.thing_pos[self.thing]
        reach = 1 - np.tanh(5 * np.linalg.norm(at - self.ee_pos))
        near = 1 - np.tanh(5 * np.linalg.norm(at - self.target()))
        return float(0.2 * reach + 0.2 * (self.grasped == self.thing) + 0.4 * near)

    def info(self):
        """Gymnasium's info dict of this instant."""
        return dict(
            instruction=self.instruction,
            task=self.task,
            success=self.done_steps >= SUCCESS_STEPS,
            touched=self.memory.first,
            violations=sum(self.guarded.values()),
            guard=dict(self.guarded),
            force=self.force,
            diverged=bool(self.data.warning.number.any()),
            **self.slots,
        )

    def target(self, request=None):
        """Where the thing should go (3,) m, for the instructed request or another."""
        task, slots = request or self.request
        return TASKS[task].target(self, **self.resolve(slots))

    def observe(self):
        """The observation dict of this instant; see the class."""
        obs = {}
        for name, camera in self.cameras.items():
            image = camera.render(self.data)
            if self.pixel_noise:
                noise = self.pixel_rng.normal(0, self.pixel_noise, image.shape)
                image = (image + noise).clip(0, 255).astype(np.uint8)
            obs[f"{name}_image"] = image
        ee_quat = np.zeros(4)
        mujoco.mju_mat2Quat(ee_quat, self.data.site_xmat[self.hand])
        numbers = dict(
            joint_pos=self.data.qpos[:7],
            ee_pos=self.ee_pos,
            ee_quat=ee_quat,
            ee_vel=self.ee_vel,
            gripper=[self.opening],
            object_pos=self.thing_pos[self.thing],
            target_pos=self.target(),
        )
        for name, value in numbers.items():
            obs[name] = np.array(value, np.float32)
        return obs


# ------------------------------------------------------------------------ the expert's movements
TRAVEL = 0.115  # m, height of the hand when moving sideways
GRASP_HEIGHT = 0.009  # m, of the fingertips' middle over the middle of a thing
WIDE = 0.055  # m between the fingers: room for a block
CLEAR = 0.105  # m, how far it rises after letting go
ROOM = 0.075  # m between things, so that the fingers have room to open
PUT_DOWN = AREA + [[-0.03, 0], [0.03, 0.03]]  # m, where a wrong block may be put
SPOTS = np.stack(np.meshgrid(*[np.arange(low, high, 0.02) for low, high in PUT_DOWN.T]), -1)
SPOTS = SPOTS.reshape(-1, 2)


def expert(env, request=None):
    """The scripted expert's action (4,) float32 for the instructed request or another: a memoryless
    function of the privileged state. Each Task draws the table of its phases; these movements are
    what they are made of."""
    task, slots = request or env.request
    return TASKS[task].expert(env, **env.resolve(slots))


def distance(a, b):
    """Horizontal distance in m between two points (2,) or (3,), or from each of (n, 2 or 3)."""
    x, y = (a - b)[..., 0], (a - b)[..., 1]
    return np.hypot(x, y)


def inside(at, low, high):
    """Whether a place (2,) is between two corners of a rectangle."""
    return ((low < at) & (at < high)).all()


def act(motion, gripper):
    """Speed-limited action towards `motion` (3,) m; gripper 1 opens, -1 closes."""
    x, y, z = 0.6 * np.asarray(motion) / ACTION_SCALE
    fast = max(1.0, np.hypot(x, y))
    return np.array([x / fast, y / fast, np.clip(z, -0.8, 0.8), gripper], np.float32)


def funnel(across, near):
    """How much higher than at its goal, in m, the hand should be `across` (2,) m from it: not at all
    within `near` m, and by twice the distance beyond.

    If it were steep, a policy that is a centimetre uncertain would hover at the height that belongs
    to its usual error."""
    return 2 * max(np.hypot(*across) - near, 0)


def approach(hand, across, low, above):
    """Motion (3,) in m that goes `across` (2,) m at TRAVEL height and down to `low` m, for the time
    being `above` m higher."""
    height = min(low + above, max(TRAVEL, low))
    if np.hypot(*across) > 0.03:  # first rise, then travel
        across = across * np.clip((hand[2] - 0.06) / 0.05, 0, 1)
    return [*across, height - hand[2]]


def let_go(env, at=0.0):
    """Lets go of a thing at height `at` m and rises straight up, 4.5 cm farther than at_rest wants:
    towards its end the motion gets slower, and a policy comes to rest before the expert does.
    """
    return act([0, 0, max(TRAVEL, at + CLEAR) - env.ee_pos[2]], 1)


def grasp(env, thing):
    """Opens, moves over the thing, descends in a funnel, closes."""
    hand, at = env.ee_pos, env.thing_pos[thing]
    across = (at - hand)[:2]
    low = at[2] + GRASP_HEIGHT
    around = np.hypot(*across) < 0.016 and hand[2] < at[2] + 0.015
    if around and env.ee_vel[2] > -0.2:
        return act([*across, low - hand[2]], -1)
    if env.opening <= WIDE:
        low = TRAVEL
    return act(approach(hand, across, low, funnel(across, near=0.014)), 1)


def carry(env, spot, height, above):
    """Brings the block in the hand over `spot` (2,) m and its middle down to `height` m, for the
    time being `above` m higher."""
    load = env.block_pos[env.held]
    low = height - 0.003 + env.ee_pos[2] - load[2]
    x, y, z = approach(env.ee_pos, spot - load[:2], low, above)
    return act([x, y, z if z > 0 else 0.5 * z], -1)  # set down gently


def put_away(env, goal=None):
    """Puts the block in the hand, which is not wanted there, down where it is, or where there is no
    room, on the nearest of SPOTS that is ROOM and 1 cm away from the other blocks and from `goal`
    (3,), the place that another one should have.

    It is set down wherever there is ROOM, not on that spot alone: which of many it is, a policy
    cannot see exactly."""
    load = env.block_pos[env.held]
    rest = env.half[env.held]
    taken = np.delete(env.block_pos, env.held, 0)
    if goal is not None:
        taken = np.vstack([taken, goal])

    def room(at):
        """From the nearest thing, m, for each of (..., 2)."""
        return distance(at[..., None, :], taken[:, :2]).min(-1)

    crowded = np.maximum(ROOM + 0.01 - room(SPOTS), 0)  # m
    cost = distance(SPOTS, load[:2]) + 10 * crowded  # too near is worse than far
    spot = SPOTS[cost.argmin()]
    on_table = inside(load[:2], *PUT_DOWN)
    too_near = 4 * max(ROOM - room(load[:2]), 0) if on_table else 1.0
    above = min(funnel(spot - load[:2], near=0.016), too_near)
    if above < 0.01 and load[2] < rest + 0.004:
        return let_go(env, load[2])
    return carry(env, spot if above else load[:2], rest, above)


def bring(env, block, goal, there, near):
    """Grasps the block, brings it until its middle is at `goal` (3,) m and, once `there`, lets go.

    near: m from the goal within which it is lowered all the way, as wide as the task allows."""
    if there:
        return let_go(env, env.block_pos[block, 2])
    if env.held is None:
        return grasp(env, block)
    if env.held != block:
        return put_away(env, goal)
    return carry(env, goal[:2], goal[2], funnel((goal - env.block_pos[block])[:2], near))


def graspable(env, block):
    """Whether the block is within reach, nothing is on it and the fingers have room around it."""
    at = env.block_pos[block]
    others = np.delete(env.block_pos, block, 0)
    blocked = (distance(others, at) < 0.07) & (others[:, 2] > at[2] - 0.03)
    return inside(at[:2], (0.3, -0.21), (0.7, 0.31)) and not blocked.any()


# ---------------------------------------------------------------------------------- the tasks
class Task:
    """One kind of request. Its methods get the scene and the meaning of its slots by name
    (Env.resolve): indices of blocks and pads, a unit vector for a direction.

    slots: names from SLOTS. Its sentences are the rule of its name in GRAMMAR.
    possible(env, ..): can it be asked for now? target(env, ..): where the thing should go (3,) m.
    success(env, ..): is it done, this instant? expert(env, ..): an action (4,)."""


class PickPlace(Task):
    """| what the expert sees                      | what it does                        |
    | the block rests on its pad                | lets go                             |
    | another block between the fingers         | puts it away                        |
    | the right block between the fingers       | carries it to the pad               |
    | anything else                             | grasps the block                    |"""

    slots = ("block", "pad")

    def possible(self, env, block, pad):
        return graspable(env, block) and distance(env.block_pos, env.pad_pos[pad]).min() >= 0.07

    def target(self, env, block, pad):
        return env.pad_pos[pad]

    def success(self, env, block, pad):
        """Rests within 3 cm of the pad's centre."""
        at = env.block_pos[block]
        low = abs(at[2] - env.half[block]) < 0.005
        return distance(at, env.pad_pos[pad]) < 0.03 and low and env.at_rest(block)

    def expert(self, env, block, pad):
        at = env.block_pos[block]
        goal = env.pad_pos[pad] + [0, 0, env.half[block]]
        there = distance(at, goal) < 0.022 and at[2] < goal[2] + 0.004
        return bring(env, block, goal, there, near=0.02)


class Lift(Task):
    """| another block between the fingers         | puts it away                        |
    | the right block between the fingers       | rises                               |
    | anything else                             | grasps the block                    |"""

    slots = ("block",)
    HEIGHT = 0.10  # m, under the block
    GOAL = 0.17  # m, of its middle

    def possible(self, env, block):
        return graspable(env, block) and env.block_pos[block, 2] < env.half[block] + self.HEIGHT

    def target(self, env, block):
        x, y, _ = env.block_pos[block]
        return np.array([x, y, self.GOAL])

    def success(self, env, block):
        """In the gripper, 10 cm above the table, no other block touched."""
        high = env.block_pos[block, 2] - env.half[block] > self.HEIGHT
        return env.held == block and high and env.memory.touched <= {block}

    def expert(self, env, block):
        if env.held is None:
            return grasp(env, block)
        if env.held != block:
            return put_away(env)
        return act([0, 0, self.GOAL - env.block_pos[block, 2]], -1)


class Push(Task):
    """| a block between the fingers               | puts it away                        |
    | the block right ahead of the lowered hand | pushes on, slowly, behind its middle |
    | anything else                             | closes, goes behind the block       |"""

    slots = ("block", "direction")
    BEHIND = 0.06  # m, the hand from the block's middle
    HEIGHT = 0.022  # m, of the hand
    SPEED = 0.009  # m per control step

    def possible(self, env, block, direction):
        at = env.block_pos[block, :2]
        others = np.delete(env.block_pos[:, :2], block, 0) - at
        along, across = others @ direction, np.abs(others @ direction[::-1])
        in_the_way = (along > -0.13) & (along < 0.22) & (across < 0.075)
        return (
            graspable(env, block)
            and not env.is_high()[block]
            and inside(at - self.BEHIND * direction, (0.31, -0.24), (0.70, 0.30))
            and inside(at + 0.14 * direction, (0.31, -0.19), (0.71, 0.29))
            and not in_the_way.any()
        )

    def target(self, env, block, direction):
        """Always ahead of it: where it came from cannot be seen."""
        return env.block_pos[block] + 0.1 * np.array([*direction, 0])

    def success(self, env, block, direction):
        """Moved 8 cm that way since the instruction, at most 4 cm sideways, never lifted."""
        moved = (env.block_pos[block] - env.memory.origin[block])[:2]
        straight = moved @ direction >= 0.08 and abs(moved @ direction[::-1]) <= 0.04
        lifted = env.memory.lifted[block] or env.memory.airborne[block]
        return straight and not lifted

    def expert(self, env, block, direction):
        if env.held is not None:
            return put_away(env)
        hand = env.ee_pos
        offset = (env.block_pos[block] - hand)[:2]
        ahead = offset @ direction
        aside = offset - ahead * direction
        shut = env.opening < 0.03
        lane = 0.02 if ahead < 0.045 else 0.014  # m, more once it touches
        behind = 0.02 < ahead < 0.085 and np.hypot(*aside) < lane
        if hand[2] < 0.05 and behind and shut:
            pace = self.SPEED / 0.6 * max(0.3, 1 - np.hypot(*aside) / 0.012)  # first straight
            return act([*(pace * direction + aside), self.HEIGHT - hand[2]], -1)
        across = offset - self.BEHIND * direction
        low = self.HEIGHT if shut else TRAVEL
        motion = approach(hand, across, low, funnel(across, near=0.016))
        return act(motion, -1 if shut or hand[2] > 0.1 else 1)


class Stack(Task):
    """| the upper block rests on the lower one    | lets go                             |
    | another block between the fingers         | puts it away                        |
    | the right block between the fingers       | carries it onto the lower one       |
    | anything else                             | grasps the upper block              |"""

    slots = ("block", "lower")

    def gap(self, env, block, lower):
        """Distance sideways and in height, m, from where the upper block belongs."""
        at, base = env.block_pos[block], env.block_pos[lower]
        height = abs(at[2] - base[2] - env.half[block] - env.half[lower])
        return distance(at, base), height

    def possible(self, env, block, lower):
        return (
            block != lower
            and graspable(env, block)
            and graspable(env, lower)
            and env.held != lower
            and not env.is_high()[lower]
        )

    def target(self, env, block, lower):
        return env.block_pos[lower] + [0, 0, env.half[block] + env.half[lower]]

    def success(self, env, block, lower):
        """Rests on the lower block."""
        across, height = self.gap(env, block, lower)
        return across < 0.022 and height < 0.006 and env.at_rest(block)

    def expert(self, env, block, lower):
        across, height = self.gap(env, block, lower)
        calm = env.held is None or np.linalg.norm(env.ee_vel) < 0.1  # not while it swings
        there = across < 0.016 and height < 0.004 and calm
        return bring(env, block, self.target(env, block, lower), there, near=0.015)


class Drawer(Task):
    """| the drawer is as it should be             | lets go                             |
    | a block between the fingers               | puts it away                        |
    | the handle between the fingers            | draws or pushes it                  |
    | anything else                             | grasps the handle                   |"""

    slots = ("way",)

    def possible(self, env, way):
        return env.drawer < 0.07 if way == "open" else env.drawer > 0.05

    def target(self, env, way):
        return HANDLE + [0.12 if way == "open" else 0, 0, 0]

    def success(self, env, way):
        """Open at least 10 cm, or shut within 1 cm."""
        return env.drawer >= 0.10 if way == "open" else env.drawer <= 0.01

    def expert(self, env, way):
        done = env.drawer > 0.115 if way == "open" else env.drawer < 0.005
        if done:
            return let_go(env)
        if env.held is not None:
            return put_away(env)
        if env.grasped == env.handle:
            goal = DRAWER if way == "open" else -0.01
            y, z = HANDLE[1:] - env.ee_pos[1:]
            return act([goal - env.drawer, y, z], -1)
        return grasp(env, env.handle)


TASKS = dict(pick_place=PickPlace(), lift=Lift(), push=Push(), stack=Stack(), drawer=Drawer())


def task_list(text):
    """("pick_place", "lift") of "pick_place,lift" or "all". Raises ValueError."""
    return tuple(TASKS) if text == "all" else choose(text.split(","), TASKS, "task")


# -------------------------------------------------------------------------------- the grammar
# name: alternatives, each after a | with space around it. <name> stands for one of that rule's, and
# (one|another|) for one of those in the brackets; - for nothing. {direction} and {way} are replaced by
# the word first, so that <{direction}> is the rule "left". Marked with *: held out of training, for
# --split phrasing. To teach a word, write it down once. A rule with a task's name is its sentences.
GRAMMAR = read_grammar("""
    # asking
    ask: - | - | - | - | - | - | please | please | <hey> | <hey> please | <hey> <could> |
        <could> | <could> please | <wish> | <now> | <now> please | kindly | <hey> <now> | <hey>
        <wish> | <context> | <context> please | <context> <could> | <context> <wish> | <jumble>
        | *be so kind as to | *do me a favor and
    context: my daughter wants to know if you can | my son would like to see you | i bet you can
        | i bet you can't | i wonder whether you could | i wonder if you can | it's tidy up time
        | we are doing a demo | for the demo | for the photo | let's play a game | you are a
        good robot | my wish is that you | the children are curious if you can | grandma says
        you can | mummy says | when i was young we did this by hand | for the next test | step
        one | step two | next job | new task | here is your task | here's the plan | listen
        carefully | here we go | come on | go on | i'm bored | it is my turn | today we learn
        something new | see what you can do | show me that you can | prove to me that you can |
        let's see if you can | let us see you | as an exercise | for science | mr robot | dear
        machine | why don't you | why not | how about you | it's your turn now | the customer
        asked that you | i'm curious if you can | i'd be pleased if you would | i would be most
        grateful if you would | i'd be happy if you would | we're short of space | this table is
        a mess | i have a small request | one more thing | oh and | so here's what i need | you
        know what | if it's no trouble | if it is not too much trouble | with all due respect |
        i am a visitor | my hands are full | i can't reach it | i forgot to do it | don't be shy
        | no rush but | hurry up and | be quick and | attention please | dear robot arm | my
        friend told me you can | do me a favour and | we need some order here | for heaven's
        sake | what are you waiting for | here is a puzzle | it's easy | as you wish | once more
        | this is a test | ladies and gentlemen | safety first | time is money
    jumble: <filler> | <filler> <filler> | <filler> <filler> <filler> | <filler> <filler>
        <filler> <filler> | <filler> <filler> <filler> <filler> <filler> | <filler> <filler>
        <filler> <filler> <filler> <filler> <filler>
    filler: a | an | and | but | or | so | if | then | because | i | you | he | she | we | they
        | me | us | them | my | your | his | her | our | their | is | are | was | were | be |
        been | am | do | does | did | has | have | had | will | would | can | could | may |
        might | must | shall | should | very | really | quite | too | also | again | still |
        already | yet | never | always | often | maybe | perhaps | here | there | where | when |
        how | who | what | which | why | with | without | from | for | of | by | about | before
        | after | since | until | while | during | between | through | today | tomorrow |
        yesterday | morning | evening | night | day | week | year | time | moment | minute |
        hour | friend | mother | father | sister | brother | daughter | son | boss | child |
        kids | children | grandpa | man | woman | people | visitor | customer | doctor | teacher
        | student | house | kitchen | garden | school | office | street | city | room | desk |
        story | game | music | water | bread | coffee | money | hand | eye | head | foot | voice
        | name | word | question | answer | idea | problem | thing | way | work | test | demo |
        photo | picture | news | weather | sun | rain | wind | summer | good | bad | big | new |
        old | young | happy | sad | tired | busy | late | early | easy | hard | clear | dear |
        sure | ready | important | different | same | other | next | last | first | second |
        many | few | more | less | much | some | any | all | every | each | think | know | say |
        tell | ask | see | hear | feel | like | love | hate | want | need | wish | hope | try |
        help | play | read | write | sing | run | walk | sit | wait | start | begin | finish |
        work | learn | forget | remember | believe | mean | make | let | give | show | yes | no
        | not | please | thanks | well | oh | ah | hmm | wow | honestly | actually | basically |
        literally | obviously | seriously | exactly | finally | suddenly | lately | kindly |
        madam | sir | mate | dude | folks | everyone | somebody | nobody | nothing | everything
        | something | anyway | however | therefore | though | although | whether | instead |
        else | away | home | world | life | part | place | side | end | line | number | one |
        two | three | ten
    hey: hey | hi | hello | robot | hey robot | ok | okay | alright | right | so | well | listen
        | ok robot | dear robot | hi there | um | hmm | yo | good morning | hey buddy | look |
        excuse me | *oi | *attention
    could: can you | could you | would you | will you | can ya | could u | would you be able to
        | do you think you could | could you possibly | would it be possible for you to | is it
        possible to | are you able to | can you go and | can you try to | may i ask you to |
        might you | *any chance you could | *would you be so good as to
    wish: i want you to | i need you to | i'd like you to | i would like you to | i wish you
        would | you should | you have to | you need to | your job is to | your task is to | you
        must | you can | let's | let us | help me | go | go ahead and | go and | try to | just |
        it's time to | time to | i'd love it if you would | i'd appreciate it if you could | the
        next step is to | next you should | we need to | we have to | i'm asking you to | make
        sure to | be a dear and | all you have to do is | i am telling you to | if you can | if
        you don't mind | it would be great if you could | what i want is for you to | *it would
        help to | *you are supposed to
    now: now | next | then | first | now then | this time | quickly | carefully | gently |
        slowly | for a start | once you are ready | when you have a moment | as a next step |
        using your gripper | with your hand | with the gripper | if possible | just | simply |
        *without delay
    end: - | - | - | - | - | - | - | - | please | now | for me | thanks | thank you | right now
        | right away | if you can | for us | would you | will you | carefully | gently | quickly
        | slowly | as soon as you can | when you're ready | if you don't mind | ok | okay | and
        be careful | and stop there | and nothing else | <reason> | <reason> | and then stop |
        all right | that's it | that's all | thx | pls | please and thank you | my friend |
        robot | buddy | with your gripper | using the gripper | with the arm | immediately | at
        once | in one go | without touching anything else | i beg you | *asap | *cheers
    reason: because i need it | because i said so | it is in the way | i want to see it | so i
        can take a picture | that's where it belongs | so that it is tidy | i need it for a game
        | so we can start | because it looks better that way | i have been waiting | to make
        room | as we discussed | like before | like i showed you | it would help me a lot | we
        are nearly done | my boss is watching | the kids want to see it | it's important |
        before lunch | and i will be happy | you are doing great | to finish the job | since you
        are free | as a test | , will you mate | , there's a good robot | , off you go | , chop
        chop | , you understand | , i mean it | , love | , shall we | , yes | , do it | , fix
        that | , try it | so i can wipe the table | so i can take a photo | so we can start the
        recording | and let's see | and see if it holds | if it's no trouble | , got it | , that
        would be lovely | , obviously | , real quick | before the visitors arrive | if you would
        | <context> | <jumble>
    mind: would you mind | do you mind | how about | what about | i'd appreciate you | start by
        | i was thinking of | try | consider | i suggest | *care for
    # things
    the: the | the | the | the | the | the | that | - | my | our | this
    cube: block | block | block | block | cube | cube | cube | brick | box | object | one | one
        | piece | thing | item | square | wooden block | wooden cube | toy block | building
        block | toy | little block | small cube | square block | block of wood | cubic thing |
        square thing | wood | die | *chunk | *lump
    small: - | - | - | - | - | - | - | - | - | - | small | little | wooden | pretty | tiny |
        nice | shiny | whole | bright | *chunky
    thing: <the> <small> {block} <cube> | <the> {block} <cube> | <the> {block} <cube> | <the>
        {block} <cube> | <the> {block} coloured <cube> | <the> {block} colored <cube> | <the>
        <cube> that is {block} | the {block} (block|cube|brick) (on the table|over there|you see
        there|in front of you|there) | the (block|cube|brick|piece|one) (which
        is|that's|painted|coloured|with the color|whose colour is) {block}
    rim: thingy | pad | pad | pad | target | target | target | marker | goal | spot | spot |
        circle |
        circle | disc | disk | dot | zone | area | location | mat | place | coaster | plate |
        round pad | round target | ring | patch | mark | target pad | circular pad | landing pad
        | platform | bullseye | round thing | flat disc | round spot | target spot | target area
        | target zone | goal area | circle thing | round marker | round one | target disc | pad
        on the table | place mat | flat circle | destination | base | position | button | saucer
        | *tile | *roundel
    goal: <the> {pad} <rim> | <the> {pad} <rim> | <the> {pad} <rim> | <the> {pad} <rim> | the
        {pad} coloured <rim> | the {pad} colored <rim> | the <rim> that is {pad} | the
        (pad|target|circle|disc|spot) (which is|that's|painted|coloured|whose colour is|with the
        color) {pad} | the middle of the {pad} <rim> | the center of the {pad} <rim> | the
        centre of <the> {pad} <rim>
    under: <the> <small> {lower} <cube> | <the> {lower} <cube> | <the> {lower} <cube> | <the>
        {lower} <cube> | the {lower} coloured <cube> | the {lower} colored <cube> | the <cube>
        that is {lower} | the (block|cube|brick|piece|one) (which
        is|that's|painted|coloured|whose colour is) {lower}
    it: it | it | it | that | that block | it down | the block | this
    # doing
    grab: pick up | pick up | pick | grab | take | grasp | get | lift | lift up | get hold of |
        take hold of | grip | collect | fetch | seize | catch | hold | find | reach for | clutch
        | go to | take up | pinch | *snatch | *nab
    grabbing: picking up | grabbing | taking | grasping | getting | lifting | collecting |
        gripping
    put: put | put | place | place | set | set down | lay | drop | leave | deposit | position |
        move | bring | put down | release | stick | park | rest | lower | pop | set it up so
        that you put | plop | sit | plant | locate | store | plonk | slap | dump | let go of |
        pose | *install | *stow
    take: move | move | bring | take | carry | transport | transfer | get | relocate | deliver |
        shift | send | haul | pass | drive | drag | transplant | ferry | *convey | *cart
    putting: putting | placing | setting | laying | moving | dropping | positioning | bringing |
        leaving | parking
    taking: moving | bringing | taking | carrying | transporting | transferring | getting |
        shifting | delivering
    placed: put | placed | moved | set | set down | brought | laid | dropped | carried | taken |
        transferred | positioned | delivered | transported | parked
    on: on | on | on | onto | onto | on top of | at | to | over | upon | down on | over to |
        right on | there on | in | into | squarely on | exactly on | up on | inside
    to: to | to | to | over to | onto | on to | on | across to | towards | all the way to |
        there to | back to | right up to
    home: go | be | end up | sit | land | rest | belong | stand | live | come to rest | lie |
        stay | wait
    goes: goes | belongs | should go | has to go | needs to go | must be | should be | needs to
        be | ought to be | should end up | should land | should sit | shall be | needs to end up
        | has to be | is supposed to be | is meant to go | should come to rest | should lie |
        needs to move | has got to go | gets to sit | should move | will go
    # up
    raise: lift | lift up | raise | pick up | pick up | hoist | elevate | raise up | heave |
        boost | take up | *levitate | *jack up
    raising: lifting | raising | picking up | lifting up | hoisting | elevating | grabbing |
        holding up | taking
    keep: maintain | suspend | hold | hold | keep | keep holding | show | show me
    high: up | up | up in the air | in the air | in the air | off the table | off the table |
        off the ground | off the surface | above the table | high | up high | aloft | into the
        air | up from the table | away from the table | over the table | off of the table | off
        the desk | upwards | in mid air | mid-air | up there | above everything | a bit up |
        straight up | off its place | a few inches up | ten centimeters up | higher | toward the
        ceiling | skyward | *overhead
    raised: suspended | dangling | lifted | raised | picked up | lifted up | held up | hoisted |
        elevated | up in the
        air | in the air | off the table | held in the air | held high | airborne
    # sideways
    shove: push | push | push | push | slide | slide | shove | shove | nudge | move | shift |
        scoot | poke | drag | press | sweep | prod | budge | bump | brush | give a push to |
        give a shove to | give a nudge to | roll | drive | guide | steer | knock | scooch |
        displace | pull | herd | tap | bulldoze | force | skid | *jostle | *propel
    shoving: pushing | sliding | shoving | nudging | moving | shifting | scooting | poking |
        dragging
    shoved: pushed | shoved | moved | shifted | slid | nudged | scooted
    along: - | - | - | - | - | - | along the table | on the table | across the table | over the
        table | without lifting it | on the surface | along the surface | some way | a little |
        a bit | a little bit | about ten centimeters | a few centimeters | slightly | a short
        distance | further | some distance | straight | a few inches | a hand's width | for a
        bit | by a little | gently | without picking it up | keeping it on the table | *with
        your knuckles
    left: left | left | to the left | to the left | to your left | leftwards | leftward |
        towards the left | toward the left | to the left side | over to the left | to the left
        hand side | towards your left | in the left direction | in a leftward direction |
        leftways | to left | further left | more to the left | off to the left | on your left
        side | to port | *to the left edge
    right: right | right | to the right | to the right | to your right | rightwards | rightward
        | towards the right | toward the right | to the right side | over to the right | to the
        right hand side | towards your right | in the right direction | in a rightward direction
        | rightways | to right | further right | more to the right | off to the right | on your
        right side | to starboard | *to the right edge
    forward: forward | forward | forwards | ahead | away from you | away from yourself | away |
        straight ahead | to the front | further away from you | forward away from you | away
        from the robot | in the forward direction | outwards | further away | farther away |
        onward | off ahead | straight forward | away from your base | out in front of you |
        further from you | out | to the far side | away from where you are | further forward |
        towards the far edge | *to the far edge
    back: back | back | backward | backwards | towards you | toward you | towards yourself |
        toward yourself | to you | closer to you | closer | back towards you | back to you |
        toward the robot | towards the robot | nearer to you | closer to the robot | in your
        direction | back in your direction | nearer | closer to yourself | towards your base |
        toward your body | towards your base | inward | in towards you | backwards to you | in
        the backward direction | to the near side | near you | rearward | *to the near edge
    not_left: right | far right | far to the right | to the right
    not_right: left | far left | far to the left | to the left
    not_forward: close | close to you | near | near you | near to the robot | close to your base
    not_back: far | far away | far out | distant | far from you | far off | close to the far
        edge | far forward
    # onto each other
    pile: mount | superimpose | chuck | load | seat | stick | hoist | get | stack | stack | put |
        put | place | set | balance | pile | lay | drop | rest | mount |
        heap | perch | sit | position | put down | move | stack up | deposit | leave | park |
        *lodge | *plonk
    piling: stacking | putting | placing | setting | balancing | piling | laying
    piled: stacked | put | placed | balanced | set | piled | resting | sitting | standing
    atop: on | on top of | on top of | onto | atop | upon | on to | on the top of | over | right
        on top of | squarely on | above | up on | up onto | directly on
    # the drawer
    chest: drawer | drawer | drawer | drawer | drawer | cabinet | cabinet drawer | wooden drawer
        | cupboard | little drawer | drawer of the cabinet | drawer there | drawer in the
        cabinet | box with the handle | small drawer | cabinet's drawer | cupboard drawer |
        wooden cabinet | chest | chest of drawers | sliding drawer | drawer at the side | drawer
        on the side | drawer on your right | compartment | dresser | *locker
    open: open | open | open up | pull open | slide open | draw open | get open | pull out |
        slide out | draw out | go open | yank open | unshut | tug open | reopen | open wide |
        crack open | pop open | *unclose
    close: guide back in | ease shut | close | close | shut | shut | push shut | push closed |
        slide shut | close up | push
        in | slide in | slam | slide closed | get shut | bang shut | go close | reclose | seal |
        slam shut | press shut | *nudge shut
    open_ing: opening | pulling open | pulling out | sliding open | drawing out | sliding out
    close_ing: closing | shutting | pushing in | sliding shut | pushing shut
    open_ed: open | open | opened | pulled out | wide open | fully open | out | all the way open
        | all the way out | ajar
    close_ed: closed | closed | shut | pushed in | fully closed | completely shut | all the way
        closed | firmly shut | in | all the way in | fully shut
    haul: pull | pull | tug | yank | draw | drag
    press: push | push | press | shove | slide | nudge
    open_drawer: <ask> <haul> <the> <chest> (open|out|towards you|all the way out|outwards|all
        the way open) <end> | <ask> <haul> the (handle|knob) (until <the> <chest> is
        <open_ed>|to open <the> <chest>|so that <the> <chest> opens|and open <the> <chest>)
        <end> | <ask> <haul> (on|at) the (handle|knob|drawer handle) <end> | <ask> <haul> the
        (drawer handle|handle of the drawer|drawer's handle) (out|) <end> | (<hey>|) (i need|i
        want|i'd like) to (get something out of|look into|see into|see inside|put something
        in|put something into|see what is in|get at) <the> <chest> (, so open it|, open it|,
        please open it|) <end> | (<hey>|) (let me see|show me) (what is in|what's in|what's
        inside|the inside of|the contents of) <the> <chest> <end> | (<hey>|) <the> <chest> is
        (closed|shut) (, open it|, please open it|and i need it open|but it should be open|,
        could you change that) <end> | (<hey>|) open sesame , (drawer|the drawer) | <ask> push
        <the> <chest> open <end> | <ask> unlatch <the> <chest> <end> | <ask> take <the> <chest>
        out <end> | <context> <haul> (out|open) <the> <chest> <end> | <ask> <haul> <the> <chest>
        out <end> | (<hey>|) what (is|'s) (in|inside) <the> <chest> ? (open it|open it and let's
        see|pull it open|) | <the> <chest> (is|seems|looks) (closed|shut|stuck) , i
        (want|need|would like|prefer) it (open|opened) | (<hey>|) (my|our|the|some)
        (keys|screws|pens|tools|socks|things|coins|glasses) are in (there|<the> <chest>) , (open
        it|pull it open|pull out <the> <chest>|please open <the> <chest>|open <the> <chest>|i
        need <the> <chest> open) <end> | <ask> (grab|take|grip|hold) the (handle|knob) and
        (pull|tug|yank|draw|pull it|pull hard|draw it out|pull back) <end> | <ask> <haul> (on|)
        (the|its) (drawer's|cabinet's|cupboard's|wooden cupboard's) handle until (it|<the>
        <chest>) (opens|comes out|is out) <end> | <ask> <open> <the> <chest> so (i can|that i
        can|we can) (drop|put|place|see|find|get|look for|drop) (my|our|the|some|a)
        (pen|keys|things|screws|tool|stuff|letter) (in|out|inside|into it|) <end> | <ask> reveal
        (the contents of|what is inside) <the> <chest> <end> | <ask> let me (into|look into|see
        into) <the> <chest> <end> | <ask> (give me|i need) access to <the> <chest> <end>
    close_drawer: <ask> <press> <the> <chest> (shut|closed|in|back in|all the way
        in|back|inwards|home|to) <end> | <ask> <press> the (handle|knob) (until <the> <chest> is
        <close_ed>|to close <the> <chest>|so that <the> <chest> closes|and close <the> <chest>)
        <end> | <ask> (push|press|shove) (on|at|against) the (handle|knob|drawer|drawer handle)
        (until it is shut|until it is closed|) <end> | <ask> <press> the (drawer handle|handle
        of the drawer|drawer's handle) (in|) <end> | (<hey>|) (i don't need|i'm done with|i am
        finished with|we are done with|nobody needs) <the> <chest> (anymore|any more|now|) (, so
        close it|, shut it|, please close it|, close it) <end> | (<hey>|)
        (someone|somebody|you|i|they) left <the> <chest> (open|standing open) (, close it|,
        please shut it|, shut it|, could you fix that|) <end> | (<hey>|) <the> <chest> is
        (open|standing open|still open|sticking out) (, close it|, please shut it|and it should
        be closed|but it should not be|, could you change that|, push it in) <end> | (<hey>|)
        (don't leave|no need to leave) <the> <chest> open <end> | <ask> put <the> <chest> back
        (in|) <end> | <ask> return <the> <chest> to its closed position <end> | <context>
        <press> (in|shut) <the> <chest> <end> | (<hey>|) (we're|we are|i'm|i am|all)
        (finished|done) with <the> <chest> , (so|) (in it goes|close it|shut it|push it in|back
        in with it) <end> | (<hey>|) i (keep bumping into|nearly tripped over|don't like|hate)
        that open (drawer|cabinet) , (can you close it|close it up|shut it|push it in|please
        shut it) <end> | <ask> give <the> <chest> a (push|shove|nudge) (so it's shut|until it is
        shut|to close it|so that it closes|shut|inwards) <end> | (<hey>|) (i don't want
        to|nobody should|no one may) (see|look) (inside|into) <the> <chest> (any more|anymore|)
        , (close it|shut it|push it in) | (were you born in a barn|it is drafty|safety
        first|someone might trip) ? (shut|close) <the> <chest> <end> | <the> <chest> (must
        not|should not|can't|shouldn't|may not) (stay|stand|be|remain) (out|open) (, close it|,
        you close it now|, shut it|, push it in|) | <ask> (slide|push|shove|press|move) <the>
        <chest> (back|all the way|completely|fully|) (into|inside) (the|its)
        (cabinet|cupboard|place|chest) <end> | <ask> hide what is in <the> <chest> by closing it
        <end> | <ask> push <the> <chest> <end> | <ask> push in <the> <chest> <end>
    # nothing that can be done here
    odd: orange | pink | black | white | brown | grey | gray | turquoise | golden | silver |
        transparent | striped | cyan | beige | violet | gold | crimson | navy | rainbow | teal |
        maroon | colourless | magenta
    stranger: banana | cup | bottle | ball | phone | book | pen | lamp | chair | cat | dog |
        spoon | plate of food | apple | door | window | hammer | robot | screwdriver | glass |
        key | shoe | hat | car | table | wall | light | fridge | box of chocolates | pencil |
        sock | towel | keyboard | mouse | knife | fork | sandwich | garbage | trash | laundry |
        plant | flower | pizza | wheel | carpet | bed | curtain | radio | triangle | sphere |
        cylinder | pyramid | teapot | mug | kettle | jar | lid | suitcase | bag | bicycle |
        letter | paper | newspaper | blanket | vase | camera | laptop | tv | remote
    job: make me a coffee | make tea | clean the table | wipe the table | do a dance | dance |
        sing a song | tell me a joke | play some music | turn on the light | turn off the light
        | switch yourself off | shut down | wash the dishes | write an email | write a poem |
        write some code | call my mother | fly to the moon | jump | wave your hand | wave at me
        | shake my hand | spin around | draw a picture | paint a picture | cook dinner | bake a
        cake | go home | go to sleep | sleep | wake up | stop | wait | do nothing | don't move |
        stay where you are | count to ten | calculate two plus two | order a pizza | buy milk |
        feed the cat | walk the dog | take a photo | take a picture | read me a story | set an
        alarm | open the window | close the window | open the door | close the door | lock the
        door | open the fridge | open your gripper | close your gripper | rotate your wrist |
        point at the door | look at me | throw a ball | kick the ball | play chess | play a game
        | translate this | search the web | book a flight | charge my phone | vacuum the floor |
        sweep the floor | water the plants | fold the laundry | drive to work | give me a high
        five | scratch my back | tidy your room | fix the car | repair yourself | explain
        yourself | hit the wall | break something | destroy everything | show me your best trick
        | surprise me | do something | do it | do it again | again | more | faster | undo that |
        continue | come here | go away | turn around | help | build a house | build a castle |
        juggle | sort the blocks | sort everything by size | count the blocks | clear the table
        | put everything away | tidy up | arrange the blocks | make a circle | mix the colors |
        switch the blocks | flip the table | close your eyes | open your mouth | hold my hand |
        pick me up | lift me up | push me | give it a push | put it down | put it back | pick it
        up | drop it | let go | take it | move
    chat: hello | hi | hey there | good morning | good night | how are you | what is your name |
        who are you | what can you do | what time is it | what day is it | how is the weather |
        will it rain tomorrow | where are you from | are you alive | do you love me | i love you
        | i hate mondays | i am hungry | i'm tired | i am bored | nice robot | good job | well
        done | bad robot | thanks | thank you very much | sorry | yes | no | maybe | of course |
        why | why not | what | ok | great | wow | never mind | forget it | see you later | bye |
        goodbye | happy birthday | what do you see | what is on the table | how many blocks are
        there | which block is the biggest | what colors are there | is the drawer open | where
        is the drawer | is it heavy | do you like blocks | what is love | how old are you | can
        you hear me | are you there | i think so | that was fun | you are funny | that's wrong |
        not that one | the other one | it was an accident | my favourite colour is {block} | i
        like {block} | roses are {block} | what a lovely day | the sky is {block} | i have a
        {block} car | {block} | {block} {pad} | the {block} <cube> | a {block} <cube> | the
        {pad} <rim> | {block} is nicer than {pad} | who painted it {block} | the quick brown fox
        | lorem ipsum dolor sit amet | hola que tal | guten tag | bonjour | schieb den block
        nach links | por favor abre la puerta | je ne sais pas | mach die schublade auf | asdf |
        qwerty | blah blah blah | test | testing one two three | one two three | hmm | ehm |
        dunno | what's up | lol | haha | ouch | oops | stop it | no no no | leave it | leave it
        alone | the end

    # sentences of each task; first how it is said, then what
    pick_place:
        | <ask> <grab> <thing> and <put> <it> <on> <goal> <end>
        | <ask> <grab> <thing> and <take> it <to> <goal> <end>
        | <ask> <grab> <thing> (, then|and then|then) <put> it <on> <goal> <end>
        | <ask> <grab> <thing> (from the table|off the table|with the gripper|) and <put> it <on>
            <goal> <end>
        | <ask> <put> <thing> <on> <goal> <end>
        | <ask> <put> <thing> <on> <goal> <end>
        | <ask> <put> <thing> <on> <goal> <end>
        | <ask> <take> <thing> <to> <goal> <end>
        | <ask> <take> <thing> <to> <goal> <end>
        | <ask> <take> <thing> over and <put> it <on> <goal> <end>
        | <ask> (put|place|set|move|drop|get) (the|) {block} (on|onto|to|at|in) (the|) {pad} <rim>
            <end>
        | <ask> (put|place|set|move|drop|get) {block} (on|to|onto) {pad} <rim>
        | <ask> <put> the <cube> of {block} color <on> the <rim> of {pad} color <end>
        | <mind> <putting> <thing> <on> <goal> <end>
        | <mind> <taking> <thing> <to> <goal> <end>
        | <mind> <grabbing> <thing> and <putting> it <on> <goal> <end>
        | (<hey>|) <thing> <goes> <on> <goal> <end>
        | (<hey>|) <thing> <goes> <to> <goal> <end>
        | (<hey>|) on <goal> <goes> <thing> <end>
        | (<hey>|) <on> <goal> (please|) <put> <thing> <end>
        | (<hey>|) (there is a {pad} <rim>|see the {pad} <rim>|you see the {pad} <rim>|look at the
            {pad} <rim>|go to the {pad} <rim>) (,|and|:) (please|) <put> <thing> (there|on it|onto
            it|right there|on top|down there) <end>
        | (<hey>|) (i want|i need|i'd like|i would like|i wish|i want to see|i'd love) <thing> (to
            <home>|<placed>|) <on> <goal> <end>
        | (<hey>|) (can|could) (i have|i get|we have|we get|i see) <thing> (<placed>|) <on> <goal>
            <end>
        | (<hey>|) (make|let|have|get|see that|ensure that|be sure that) <thing> (<home>) <on>
            <goal> <end>
        | (<hey>|) make sure (that|) <thing> (is|ends up|lands|sits|goes|gets|comes to rest|lies)
            <on> <goal> <end>
        | (<hey>|) <thing> (:|,|-|) (please|) <put> it <on> <goal> <end>
        | (<hey>|) <thing> (please|) (to|onto|on) <goal> <end>
        | <ask> <put> <on> <goal> <thing> <end>
        | <ask> (cover|occupy|fill|block) <goal> with <thing> <end>
        | <ask> use <thing> to (cover|mark|hide) <goal> <end>
        | (<hey>|) <goal> (needs|wants|should get|should have|should hold|is waiting for|is
            missing|gets|is the place for|is where i want|is the home of) <thing> (on it|on top|)
            <end>
        | (<hey>|) the (destination|goal|target|place|right place|home|spot) (of|for) <thing> is
            <goal> <end>
        | (<hey>|) (would it be possible|is it possible|i would be glad|it would be nice) to
            (have|get) <thing> <placed> <on> <goal>
        | (<hey>|) after <grabbing> <thing> <put> it <on> <goal> <end>
        | <ask> <take> <thing> from where it is <to> <goal> <end>
        | <ask> (do|perform|carry out) a pick and place : <thing> <to> <goal>
        | (pick and place|pick n place|pick-and-place|job|task|order|mission) : <thing> <to>
            <goal>
        | <ask> (get|take|use) <thing> for <goal> <end>
        | (<ask>|) {block} (block|cube|one|) (:|to|on|,|goes on|onto|for|in|) {pad}
            (pad|target|circle|one|) <end>
        | <ask> (pick|take|fetch) {block} (block|cube|brick|one) (and|) (put|place|drop|lay|leave)
            (it|) (on|at|in|to) {pad} (pad|target|circle|disc|spot) <end>
        | (<hey>|) <goal> is where <thing> (belongs|should be|goes|has to go|must lie|lives|should
            sit|needs to be) (, so take it there|, take it there|, put it there|, please|)
        | (<hey>|) <goal> is (the home|the place|the spot|the right place) (for|of) <thing> <end>
        | (<hey>|) (i think|we think|it seems) <thing> would look (nicer|better|good|great|nice)
            on <goal> (, let's move it there|, put it there|, move it there|)
        | (<hey>|) (there's nothing|there is nothing|nothing is) on <goal> (yet|) (,|.) (please|)
            <put> <thing> (there|on it) <end>
        | <ask> (get|put|have|make|let) <thing> (to land|to rest|to sit|to
            lie|land|resting|sitting|lying) on <goal> <end>
        | <ask> (take|move|bring|carry|get|shift|lift) <thing> (over|across|there|) (and|then|and
            then) (put|set|place|lay|drop) (it|) (down|) (on|on top of|at|in) <goal> <end>
        | <ask> <take> <thing> so (that|) it (rests|sits|lies|is|stands|lands|ends up) (on|at|in)
            <goal> <end>
        | <ask> (take hold of|grab|pick up|grasp) <thing> (with your gripper|) , go (over|across|)
            to <goal> and (let go|let it go|release it|drop it|put it down|set it down|open your
            gripper) <end>
        | (<hey>|) <goal> (should have|must have|needs|should carry|has to have) <thing> on it
            (when you're done|at the end|in the end|soon|)
        | <context> <thing> (goes|belongs|lives|should be|has to be|must go) <on> <goal> <end>
        | <ask> find <goal> and <put> <thing> (there|on it|in the middle of it) <end>
        | *<ask> find <goal> , then go and <grab> <thing> and <put> it there <end>
        | *what i'd like is to have <thing> <placed> <on> <goal> <end>
        | *<ask> <grab> <thing> , carry it over <goal> and let go <end>
        | *the <goal> is empty , <put> <thing> <on> it <end>
    lift:
        | <ask> <raise> <thing> <end>
        | <ask> <raise> <thing> <end>
        | <ask> <raise> <thing> <high> <end>
        | <ask> <raise> <thing> <high> <end>
        | <ask> <raise> <thing> and (hold|keep) it <high> <end>
        | <ask> <grab> <thing> <end>
        | <ask> <grab> <thing> and <raise> it <end>
        | <ask> <grab> <thing> and <raise> it <high> <end>
        | <ask> <grab> <thing> and <keep> it <high> <end>
        | <ask> <grab> <thing> (, then|and then) <raise> it <high> <end>
        | <ask> <keep> <thing> <high> <end>
        | <ask> (hold|pick|lift|raise|take|bring|get|keep|pull|move) <thing> (up|<high>) <end>
        | <ask> (lift|pick|hold|raise|take|bring) up <thing> <end>
        | <ask> (take|remove|get|pull|bring) <thing> (off the table|from the table|away from the
            table|up from the table|off the surface|up off the table) <end>
        | <mind> <raising> <thing> (<high>|) <end>
        | <mind> <grabbing> <thing> and <raising> it (<high>|) <end>
        | (<hey>|) <thing> (should be|has to be|needs to be|must be|ought to be|wants to be|is to
            be) <raised> <end>
        | (<hey>|) <thing> (should go|has to go|needs to go|must go|goes|has to come|should
            come|needs to come) <high> <end>
        | (<hey>|) (i want|i need|i'd like|i would like|i want to see|i'd love to see|show me|let
            me see) <thing> (<raised>|<high>) <end>
        | (<hey>|) (i want|i need|i'd like|i would like) <thing> to (be <raised>|go <high>|leave
            the table|rise|come <high>|float) <end>
        | (<hey>|) (make|let|have) <thing> (rise|go up|leave the table|come up|fly|float|hover|go
            <high>|levitate) <end>
        | (<hey>|) up with <thing> <end>
        | (<hey>|) <thing> : (up|lift it|raise it|pick it up|hold it up|up it goes|lift it <high>)
            <end>
        | (<hey>|) (see|you see|look at) <thing> (?|,|) (pick it up|lift it|raise it|hold it
            up|grab it and lift it|take it up) <end>
        | (<hey>|) get (a hold of|a grip on|your gripper around|your fingers around) <thing> and
            (lift|raise|lift it <high>|hold it up|hoist it) <end>
        | (<hey>|) (can|could) (i see|we see|you show me|you show us) <thing> (<high>|<raised>)
            <end>
        | (<hey>|) (the table should be rid of|free the table of|clear the table of) <thing> by
            lifting it <end>
        | (<hey>|) make sure (that|) <thing> (is <raised>|leaves the table|is no longer on the
            table|does not touch the table|isn't on the table anymore) <end>
        | <ask> (close|put|clamp) your (gripper|fingers|hand) (on|around) <thing> and (lift|raise)
            (it|) (<high>|) <end>
        | <ask> (grab|take|grasp|hold) <thing> <end>
        | <ask> (grab|take|grasp|pick|lift) (the|) {block} (block|cube|brick|one) (up|) <end>
        | (<hey>|) (lifting|raising|picking up) <thing> is (what i want|your task|your
            job|next|all i ask|the job) <end>
        | <ask> lift <thing> so that (i can see it|nothing is under it|it doesn't touch the
            table|it hangs in the air|i can look under it|there is air under it) <end>
        | (lift|raise|hoist|elevate|lift up|hold up|hold) {block} (up|high|) <end>
        | (get|make|bring) {block} (airborne|up|off the table|into the air|fly) <end>
        | <ask> (get|make|bring) <thing> (airborne|fly|float|rise|hover|up) <end>
        | <thing> , (pick|lift|hold|take) it up (please|pls|) <end>
        | <thing> (up|up please|up high please|up in the air|in the air please|off the table
            please) <end>
        | with <thing> : (close fingers|grab it|grip) , (go up|lift|raise|up) , (stop|hold|wait)
            <end>
        | <ask> (grab|grasp|grip|take|get) <thing> , (bring|lift|raise|take) it up (, hold|,
            stop|and hold|and wait|and stay like this|and keep hold of it|and hang on to it|and
            don't let go|and stay there) <end>
        | <ask> (only|just) (lift|raise) <thing> (straight up|up|) , (don't|do not)
            (move|put|take|carry) it (anywhere|elsewhere|away|down) <end>
        | <ask> (raise|lift|pick up|hold up|take up) <thing> and (wait|keep it there|keep it
            up|hold it|stay like this|don't put it down|don't let go|stop|show it to me|let me
            look under it) <end>
        | <ask> (hold|keep|lift|raise) <thing> (where everyone can see it|so everyone can see
            it|above your head|like a trophy|over your head|as high as you can|a bit above the
            table|above the surface|over the tabletop) <end>
        | (<hey>|) (is <thing> heavy|how heavy is <thing>) ? (lift it|pick it up|raise it|go on ,
            lift it) (and find out|and see|) <end>
        | (<hey>|) (i need to|i want to|let me) (clean|wipe|look|see what is)
            (under|beneath|below|underneath) <thing> (, so|, please|so) (lift it|raise it|pick it
            up|hold it up|take it up|could you lift it) (for a moment|up|) <end>
        | (<hey>|) let me (see|look at) the (underside|bottom) of <thing> (, hold it up|, lift
            it|, pick it up|) <end>
        | (<hey>|) <thing> (should|must|needs to|has to) (hang|be hanging|float|be
            floating|hover|stay) (in the air|above the table|in mid air) (, not lie on the
            table|not on the table|) <end>
        | <context> <raise> <thing> (<high>|) <end>
        | (<hey>|) <thing> shouldn't (lie on|be on|touch|stay on) the table (, lift it|, pick it
            up|, hold it up|)
        | *i'd be happy to see <thing> leave the table <end>
        | *<ask> <grab> <thing> , then go straight up with it <end>
        | *<thing> is what you should hold <high> <end>
    push:
        | <ask> <shove> <thing> <{direction}> <along> <end>
        | <ask> <shove> <thing> <{direction}> <along> <end>
        | <ask> <shove> <thing> <along> <{direction}> <end>
        | <ask> <shove> <thing> <{direction}> <end>
        | <ask> <shove> <thing> <{direction}> <end>
        | <ask> (push|slide|shove|nudge|move|shift) (the|) {block} (block|cube|brick|one|)
            <{direction}>
        | <ask> (move|shift|get|bring|take|slide) <thing> <{direction}> (without lifting it|along
            the table|on the table|by pushing it|with a push|without picking it up|while it stays
            on the table|sliding it|but don't lift it|don't pick it up)
        | <ask> (push|lean|press) against <thing> (so that it moves|to move it|until it moves|so
            it goes|so it slides) <{direction}> <end>
        | <ask> give <thing> a (push|shove|nudge|little push|tap|poke|kick|bump|gentle push|good
            shove) <{direction}> <end>
        | <ask> make <thing> (move|slide|go|shift|glide) <{direction}> <along> <end>
        | <ask> let <thing> (move|slide|go|glide) <{direction}> <along> <end>
        | <ask> close your (gripper|hand|fingers) and (push|shove|slide|move) <thing>
            <{direction}> <end>
        | <mind> <shoving> <thing> <{direction}> <along> <end>
        | <mind> <shoving> <thing> <along> <{direction}> <end>
        | (<hey>|) <thing> (should|must|has to|needs to|ought to|is to) (go|move|slide|be
            <shoved>|shift|travel|come) <{direction}> <along> <end>
        | (<hey>|) (i want|i need|i'd like|i would like|i'd love) <thing> (<shoved>|moved|to go|to
            move|to slide|to be <shoved>|to be|) <{direction}> <along> <end>
        | (<hey>|) (i want|i need|i'd like|i would like) <thing> (farther|further|more|a bit|some
            way|a little) <{direction}> <end>
        | (<hey>|) (can|could) (i have|we have|i get|you get) <thing> (<shoved>|moved|)
            <{direction}> <end>
        | (<hey>|) <{direction}> with <thing> <end>
        | (<hey>|) <thing> : (push it|shove it|slide it|move it|nudge it|) <{direction}> <end>
        | (<hey>|) (see|you see|look at) <thing> (?|,|) (push it|shove it|slide it|move it|nudge
            it) <{direction}> <end>
        | (<hey>|) <{direction}> is where (i want <thing>|<thing> should go|<thing> has to go|you
            push <thing>|<thing> goes) <end>
        | <ask> <shove> <{direction}> <thing> <end>
        | <ask> use (your hand|the gripper|your fingers|your arm|the closed gripper) to
            (push|slide|shove|move|nudge) <thing> <{direction}> <end>
        | <ask> without (lifting|grabbing|picking up|grasping) it , <shove> <thing> <{direction}>
            <end>
        | <ask> <shove> <thing> (a bit|a little|some|) (more|further|farther) <{direction}> <end>
        | (<hey>|) <shoving> <thing> <{direction}> is (what i want|your task|your job|next|all i
            ask) <end>
        | (<hey>|) make sure (that|) <thing> (moves|goes|slides|gets pushed|ends up further|is
            pushed) <{direction}> <end>
        | (<hey>|) make (some|) room by <shoving> <thing> <{direction}> <end>
        | <ask> go behind <thing> and (push|shove|slide) it <{direction}> <end>
        | (push|shove|slide|nudge|move) {block} <{direction}> <end>
        | {block} (block|cube|one) , <{direction}> (a bit|a little|please|) (, don't pick it up|,
            don't lift it|, just push|, pushing only|, by pushing|, just shove it|) <end>
        | <{direction}> (,|with|please ,|for) <thing> (, just push|, pushing only|, by pushing|,
            just shove it|, only push it|)
        | (<hey>|) <thing> is (too far|too|much too|a bit too|way too) <not_{direction}> (for my
            liking|) , (so|please|) <shove> it <{direction}> <end>
        | (<hey>|) <thing> is (too far|too|much too|a bit too|way too) <not_{direction}> , (make
            it go|it should go|get it) <{direction}> <end>
        | (no lifting|don't lift it|without grabbing|no grasping|just pushing|only by pushing)
            (this time|please|) , (just|) <shove> <thing> <{direction}> <end>
        | <ask> (bring|get|take|move|shift|work) <thing> <{direction}> (by
            (sliding|pushing|shoving|dragging) it|, keep it on the table|, keeping it on the
            table|, no lifting|in contact with the table|along the tabletop|across the table)
            <end>
        | (<hey>|) <thing> (needs|wants|could use|deserves|gets) (a push|pushing|a shove|a
            nudge|shifting|moving|to be pushed|to move) <{direction}> <end>
        | <context> <shove> <thing> <{direction}> <along> <end>
        | <ask> (give|apply) (a|some) (push|force|pressure) <{direction}> to <thing> <end>
        | <ask> (make|clear) (some|) (space|room) , (push|slide|shove) <thing> <{direction}> <end>
        | (<hey>|) it would be (nicer|better|good|great) if <thing> (were|was|moved|went|slid) (a
            bit|a little|) (further|more|) <{direction}> (, so push it|, push it|, so give it a
            push|, so slide it|)
        | *<thing> would look better a bit <{direction}> , so <shove> it <end>
        | *<ask> apply some force to <thing> so that it moves <{direction}> <end>
        | *a gentle push <{direction}> for <thing> <end>
    stack:
        | <ask> <pile> <thing> <atop> <under> <end>
        | <ask> <pile> <thing> <atop> <under> <end>
        | <ask> <pile> <thing> <atop> <under> <end>
        | <ask> <grab> <thing> and <pile> <it> <atop> <under> <end>
        | <ask> <grab> <thing> (, then|and then|then) <pile> it <atop> <under> <end>
        | <ask> <take> <thing> (up|over|) and <pile> it <atop> <under> <end>
        | <ask> <take> <thing> (to the top of|onto|on top of|on to) <under> <end>
        | <ask> <raise> <thing> (onto|on top of|up onto|on to) <under> <end>
        | <ask> (stack|put|place|set|balance) (the|) {block} (on|on top of|onto|atop) (the|)
            {lower} (one|cube|block|) <end>
        | <ask> (stack|pile up|put together) (the|) {block} <cube> and (the|) {lower} <cube> ,
            (with|) (the|) {block} (one|) (on top|above|at the top|as the upper one)
        | <mind> <piling> <thing> <atop> <under> <end>
        | <mind> <grabbing> <thing> and <piling> it <atop> <under> <end>
        | (<hey>|) <thing> (goes|belongs|should go|has to go|should be|must be|needs to be|should
            sit|has to sit|should stand|ought to be|shall stand|needs to go|should rest) <atop>
            <under> <end>
        | (<hey>|) (on|on top of|atop|onto) <under> (please|) <pile> <thing> <end>
        | (<hey>|) (on|on top of|onto) <under> <goes> <thing> <end>
        | (<hey>|) (i want|i need|i'd like|i would like|i want to see|i'd love) <thing>
            (<piled>|to be|to sit|to stand|to be <piled>|) <atop> <under> <end>
        | (<hey>|) (can|could) (i have|we have|i get|i see|we see) <thing> (<piled>|) <atop>
            <under> <end>
        | (<hey>|) make <thing> (sit|stand|rest|lie|be|go) <atop> <under> <end>
        | <ask> (build|make|construct|create|erect|form) a (tower|stack|pile|little
            tower|column|small tower) (with|of|from|out of) <thing> (on|on top of|over|above)
            <under> <end>
        | <ask> (build|make|construct|create|form) a (tower|stack|pile|tower of two) : (the|)
            {lower} (<cube>|) (at the bottom|below|down|first|underneath|as the base) , (the|)
            {block} (<cube>|) (on top|above|at the top|second|on it) <end>
        | <ask> (build|make|construct|create|form) a (tower|stack|pile|tower of two)
            (with|where|so that|in which) (the|) {lower} (<cube>|) (at the bottom|below|is the
            base|is at the bottom|as the base|is below) and (the|) {block} (<cube>|) (on
            top|above|at the top|is on top|is above|on it) <end>
        | <ask> use <under> as (a base|the base|a foundation|a pedestal|the bottom|a stand)
            (for|and put on it|and stack on it|and on it place) <thing> <end>
        | (<hey>|) <under> (is|should be|will be|shall be|makes|serves as) (the base|the
            bottom|the foundation|below|the lower one|underneath) , <thing> (goes|is|should
            be|comes|sits) (on top|on it|above|on top of it) <end>
        | (<hey>|) <under> (should|must|has to|needs to) (carry|hold|support|have|bear) <thing>
            (on top|on it|) <end>
        | (<hey>|) <thing> on top of <under> (please|) <end>
        | (<hey>|) <thing> (:|,|) (please|) <pile> it <atop> <under> <end>
        | (<hey>|) (see|you see|there is|look at|find) <under> (?|,|and|:) (please|) <pile>
            <thing> (on it|on top of it|on top|onto it) <end>
        | (<hey>|) make sure (that|) <thing> (is|ends up|sits|lands|rests|stands|goes) <atop>
            <under> <end>
        | <ask> <pile> <atop> <under> <thing> <end>
        | <ask> (top|crown|cover|cap) <under> with <thing> <end>
        | <ask> add <thing> (to the top of|on top of|onto) <under> <end>
        | (<hey>|) <piling> <thing> <atop> <under> is (what i want|your task|your job|next|all i
            ask) <end>
        | (stack|order|job|task|tower) : {block} (<cube>|) on {lower} (<cube>|)
        | <ask> stack <under> under <thing> <end>
        | (<hey>|) <under> (goes|belongs|should be) (under|below|underneath|beneath) <thing> (, so
            put it there|, so lift that one onto it|) <end>
        | (<hey>|) {block} (block|cube|one|) (on top of|atop|on top|onto|above|over|upon) {lower}
            (block|cube|one|) <end>
        | <ask> (stack|put|pop|place|set) {block} (on top of|on|atop|onto|over) {lower} (, the
            blocks|, as a tower|to make a tower|, block on block|, blocks i mean)
        | (<hey>|) (let's|let us|we will|we could|i want to|i'd like to see you|i'd like you to)
            (build|make|see|have) a (little|small|) (tower|stack|pile) : (the|) {lower} (<cube>|)
            (at the bottom|below|down|first|underneath|as the base|as base) , (and|) (the|)
            {block} (<cube>|) (on top|above it|above|at the top|on it) <end>
        | (<hey>|) (let's|let us|we will|we could|i want to|i'd like to see you|can i see)
            (build|make|see|have) a (little|small|) (tower|stack|pile) of <thing> (on|on top
            of|over) <under> <end>
        | (<hey>|) (i want|i'd like|we need) (the|) {lower} (<cube>|) (under|below|at the
            bottom|down) and (the|) {block} (<cube>|) (over|above|on top|on it|up) <end>
        | (<hey>|) (the|) {lower} (<cube>|) (stays|is|goes|remains) (below|down|at the
            bottom|where it is|put|in place) (and|,) (the|) {block} (<cube>|) (goes|comes|gets)
            (on top|on it|above|onto it|up) (of it|) <end>
        | (ground floor|first floor|bottom|below|base|down) {lower} , (upper floor|second
            floor|top|above|on top|up) {block} <end>
        | (top|above|upper|on top|up) {block} , (bottom|below|lower|underneath|base) {lower} <end>
        | (<hey>|) (can|could|will) <under> (carry|hold|support|bear) <thing> ? (try it|try|let's
            see|find out|put it on|)
        | (<hey>|) <under> (needs|wants|gets|should get|should have) (a hat|a roof|a friend on
            top|company|a top|a lid) (:|,) <thing> <end>
        | (<hey>|) <under> (will be|is|shall be|as) the (base|foundation|bottom|support) (,|.)
            (please|) <pile> <thing> (on it|on top|on top of it|onto it|there) <end>
        | <ask> (move|take|get|bring|lift|raise) <thing> (so that|so|until) it
            (stands|sits|rests|lies|is) (on|on top of|atop|upon) <under> <end>
        | (<hey>|) it would be (great|good|nice|lovely) if <thing> (ended
            up|was|were|stood|sat|came to rest) (stacked|) (on|on top of|atop) <under> <end>
        | (<hey>|) there (should|ought to|must|has to) be <thing> (on|on top of) <under> (, fix
            that|, please|)
        | <ask> (get|make|have|let) <thing> (to stay|to stand|to
            sit|stay|stand|sit|rest|standing|resting|balanced) (on|on top of|atop) <under> <end>
        | <ask> build (up|upwards|) (on|from) <under> (by adding|with|by putting on|using) <thing>
            <end>
        | <context> <pile> <thing> <atop> <under> <end>
        | <ask> (lift|grab|take|pick up) <thing> and (lower|set|lay|put) it (gently|carefully|)
            (onto|on|on top of) <under> <end>
        | *let <thing> ride <atop> <under> <end>
        | *<ask> <grab> <thing> , carry it over <under> and let go once it rests on it <end>
        | *two storeys : {lower} <cube> first , {block} <cube> second <end>
    drawer:
        | <ask> <{way}> <the> <chest> <end>
        | <ask> <{way}> <the> <chest> <end>
        | <ask> <{way}> <the> <chest> <end>
        | <ask> <{way}> <chest> <end>
        | <ask> <chest> <{way}> <end>
        | <ask> <{way}_ing> <the> <chest> <end>
        | <mind> <{way}_ing> <the> <chest> <end>
        | <ask> grab the (handle|knob) and <{way}> <the> <chest> <end>
        | <ask> <grab> the (handle|knob|drawer handle|drawer by its handle|handle of the
            drawer|drawer's handle|cream handle) and <{way}> (it|<the> <chest>) <end>
        | <ask> <{way}> <the> <chest> (by|using|with) (its|the) (handle|knob) <end>
        | <ask> (get|make|have|leave|put) <the> <chest> <{way}_ed> <end>
        | (<hey>|) <the> <chest> (should be|has to be|needs to be|must be|ought to be|wants to
            be|is supposed to be) <{way}_ed> <end>
        | (<hey>|) (i want|i need|i'd like|i would like|i'd love|i want to see) <the> <chest> (to
            be <{way}_ed>|<{way}_ed>) <end>
        | (<hey>|) (can|could) (i have|we have|i get|you get) <the> <chest> <{way}_ed> <end>
        | (<hey>|) make sure (that|) <the> <chest> is <{way}_ed> <end>
        | (<hey>|) (is <the> <chest> <{way}_ed> yet|<the> <chest> isn't <{way}_ed> yet|<the>
            <chest> is not <{way}_ed>) ? <{way}> it <end>
        | <ask> move <the> <chest> until it is <{way}_ed> <end>
        | (<hey>|) <the> <chest> (:|,|) (please|) <{way}> it <end>
        | (<hey>|) <{way}_ing> <the> <chest> is (what i want|your task|your job|next|all i ask)
            <end>
        | <context> <{way}> <the> <chest> <end>
        | (<hey>|) (let's have|let's get|let me have|let us have) <the> <chest> <{way}_ed> <end>
        | <ask> <{way}> <the> <chest> (of|in|on|from) (the|that|this) (little|small|wooden|brown|)
            (cabinet|cupboard|chest|wooden box) <end>
        | (drawer|cabinet|the drawer|the cabinet) <{way}_ed> (please|now|pls|) <end>
        | <ask> (move|bring|return|set|put) <the> <chest> (to|into|in|back to) (the|its)
            <{way}_ed> (position|state) <end>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | <{way}_drawer>
        | *<ask> see to it that <the> <chest> is <{way}_ed> <end>
        | *<ask> take care of <the> <chest> , it should be <{way}_ed> <end>
        | *<the> <chest> wants <{way}_ing> <end>
    # sentences that ask for nothing that can be done here
    none:
        | (does|did|will|has) <the> <chest> (lock|squeak|fit|matter|have a lock|contain
            anything|belong to you)
        | (my|our|her) (grandmother|father|boss|friend|neighbour) (had|has|likes|bought|sold)
            (a|the) (<chest>|{block} <cube>|{pad} <rim>) (just like that|too|once|as well)
        | (tell|read|sing|write|knit|sew|paint|bake) (me|us|him) (a|the|some) <stranger>
            (about|with|out of) (a|some) {block} (and {pad}|) <stranger>
        | (could you|please|can you|would you|i want you to)
            (draft|send|read|copy|print|sign|post) (a|the|my) <stranger>
        | (does|do|is|are|why is) the (colour|color) {block} (exist|so nice|better than {pad}|your
            favourite|a colour)
        | <job>
        | <job>
        | <ask> <job> <end>
        | <ask> <job> <end>
        | <chat>
        | <chat>
        | <hey> <chat>
        | <ask> <grab> <the> {block} <stranger> <end>
        | <ask> <grab> <the> <odd> <cube> <end>
        | <ask> <raise> <the> <odd> <cube> <high> <end>
        | <ask> <raise> <the> <stranger> <high> <end>
        | <ask> <put> <the> <odd> <cube> <on> <goal> <end>
        | <ask> <put> <thing> <on> the <odd> <rim> <end>
        | <ask> <put> <the> <stranger> <on> <goal> <end>
        | <ask> <put> <thing> <on> the <stranger> <end>
        | <ask> <put> <thing> (in|into|inside) the (<chest>|<stranger>) <end>
        | <ask> <put> <the> <stranger> (in|into|inside|on) the (<chest>|<stranger>) <end>
        | <ask> <pile> <the> <odd> <cube> <atop> <under> <end>
        | <ask> <pile> <thing> <atop> the <odd> <cube> <end>
        | <ask> <pile> <the> <stranger> <atop> the <stranger> <end>
        | <ask> <shove> <the> <odd> <cube> (<left>|<right>|<forward>|<back>) <end>
        | <ask> <shove> <the> <stranger> (<left>|<right>|<forward>|<back>) <end>
        | <ask> (open|close|shut|pull open|push) the <stranger> <end>
        | <ask> (open|close|shut) the <odd> <stranger> <end>
        | <ask> (lock|paint|break|clean|empty|fill|unlock|sell|measure|remove|fix|repair|dust) the
            <chest> <end>
        | <ask> (paint|eat|throw|burn|wash|break|cut|spin|flip|rotate|hide|throw
            away|squeeze|smash|drop|describe|measure|weigh|kiss|toss|turn
            over|turn|count|sell|buy) <thing> <end>
        | <ask> (throw|toss|give|hand|sell|show) me <thing> <end>
        | <ask> <put> <thing> (next to|beside|near|far from|between|behind|left of|under) <under>
            <end>
        | <ask> (swap|exchange|switch|compare) <thing> and <under> <end>
        | <ask> (pick up|take|grab|get|lift|raise|hold) (the|) {block} <end>
        | <ask> (pick up|take|grab|get|lift|raise|hold) (the|a|some) <cube> <end>
        | <ask> <put> <the> <cube> <on> <goal> <end>
        | <ask> <put> it <on> <goal> <end>
        | <ask> <put> <thing> <end>
        | <ask> <put> <thing> (on|onto|to|at|on the|to the|on the pad|on the
            target|there|here|somewhere|away|where it belongs) <end>
        | <ask> <pile> <thing> (on|on top of|onto|on the|on top of the|) <end>
        | <ask> stack (the blocks|them|everything|all blocks|these|two blocks|something) <end>
        | <ask> <shove> <thing> <end>
        | <ask> <shove> <the> <cube> (<left>|<right>|<forward>|<back>) <end>
        | <ask> <shove> it (<left>|<right>|<forward>|<back>) <end>
        | <ask> (push|move|go|slide|drive|turn|look) (<left>|<right>|<forward>|<back>)
        | (<left>|<right>|<forward>|<back>)
        | (open|close|shut|up|down|pull|push|lift|grab|stack|put)
        | (open|close|shut|pull|push) (it|that|this|please|now|the thing|something)
        | (don't|do not|never|please don't|you must not|stop trying to|whatever you do don't)
            (<raise>|<grab>|touch|move|push) <thing> <end>
        | (don't|do not|never|please don't|you must not) <put> <thing> <on> <goal> <end>
        | (don't|do not|never|please don't|you must not) (open|close|touch) <the> <chest> <end>
        | (why|when|how) (is|was|did you put|has someone put) <thing> <on> <goal>
        | (why|when|how) is <the> <chest> (open|closed)
        | (where|what|how big|how heavy|what colour|what size) is (<thing>|<goal>|<the> <chest>)
        | (who|what) (put|moved|pushed|lifted|stole|made) <thing> (there|here|<on> <goal>|)
        | (is|are) (<thing>|<goal>|<the> <chest>) (nice|heavy|new|open|red|broken|clean|far
            away|made of wood)
        | (i think|i believe|i guess|i saw that|yesterday) <thing> (is nice|is lovely|was
            here|fell down|is heavy|is mine|looks dirty|was on the floor)
        | the {block} (block|cube) and the {lower} (block|cube)
        | (put|move|take|bring|get) everything (to|on) <goal> <end>
        | (put|move|take) all (the|) (blocks|cubes) (on|to|into) (<goal>|the <chest>|a line|a
            row|the middle|the left) <end>
        | (bring|give|fetch|get|find|buy) me (a|the|some) <stranger> <end>
        | (do you|did you|can you) (see|like|want|know|hear|understand) (me|<thing>|the
            <stranger>|blocks)
        | <jumble>
    """)


# ------------------------------------------------------------------------------ demonstrations
NOISE = 0.12  # standard deviation of the white noise on the motion
PUSH = 0.03  # probability a step of a push: 3 to 7 steps, of 0.8
SLIP = 0.004  # probability a step of the gripper doing the opposite, 3 steps
MISTAKEN = 0.4  # share of episodes that begin where an expert that is wrong has led
MISTAKE = 0.02  # m, standard deviation of where it takes each thing to be
INTERRUPT = 0.3  # share of instructions followed by another, in mid-motion if not done by then
INSTRUCTIONS = 3  # at most, per scene


class Disturbance:
    """What is executed in place of the expert's action: with noise, pushes and slips, so that
    recovery is in the data (DART, arXiv:1703.09327). amount: share of NOISE, PUSH and SLIP."""

    def __init__(self, rng, amount):
        self.rng = rng
        self.amount = amount
        self.pushes = []  # (3,), those of the control steps to come
        self.slip_left = 0  # control steps

    def disturb(self, action):
        noisy = action.astype(np.float64)
        noisy[:3] += self.amount * self.rng.normal(0, NOISE, 3)
        if not self.pushes and self.rng.random() < self.amount * PUSH:
            push = self.rng.normal(size=3)
            steps = int(self.rng.integers(3, 8))
            self.pushes = [push * (0.8 / np.linalg.norm(push))] * steps
        if self.pushes:
            noisy[:3] += self.pushes.pop()
        if self.slip_left == 0 and self.rng.random() < self.amount * SLIP:
            self.slip_left = 3
        if self.slip_left:
            noisy[3] = -noisy[3]
            self.slip_left -= 1
        return noisy.clip(-1, 1)


def blunder(env, rng, disturbance):
    """Plays some steps of an expert that is wrong about where things are. They are not recorded, but
    what follows is: how to mend it when the fingers are beside a block, or a block fell off another.
    These are a policy's mistakes, as in DAgger (arXiv:1011.0686), without a policy."""
    error = np.zeros_like(env.thing_pos)
    error[:, :2] = rng.normal(0, MISTAKE, (len(error), 2))
    cameras, env.cameras = env.cameras, {}  # nobody looks
    for _ in range(rng.integers(4, 60)):
        true = env.thing_pos.copy()
        env.thing_pos += error  # block_pos and pad_pos are parts of it
        if env.grasped is not None:
            env.thing_pos[env.grasped] = true[env.grasped]
        action = expert(env)
        env.thing_pos[:] = true
        env.step(disturbance.disturb(action))
    env.cameras = cameras
    env.set_request(env.request, env.instruction)  # restarts the clock


def demonstrate(env, seed, noise=1.0):
    """Plays one scene; returns ([(attrs, arrays), ...], Counter of why episodes were dropped).

    An episode is one instruction, from the moment it is given until it is done or the next one, of
    any of the tasks, interrupts it. A disturbed action is executed, the clean one recorded."""
    rng = np.random.default_rng([seed, 1])
    env.reset(seed)
    env.pixel_noise = 0.0  # does not compress; train.py adds it
    episodes, dropped = [], Counter()
    disturbance = Disturbance(rng, noise)
    requests = all_requests(env.tasks)
    for part in range(INSTRUCTIONS):
        if rng.random() < noise * MISTAKEN:
            blunder(env, rng, disturbance)
        obs = env.observe()
        goes_on = rng.random() < INTERRUPT
        frames = []
        for _ in range(rng.integers(4, 60) if goes_on else MAX_STEPS):
            action = expert(env)
            relabel = env.draw_request(rng, avoid=env.request) or env.request
            frame = (
                obs | grounding(env, relabel, requests.index(relabel)) | dict(actions=action)
            )
            obs, reward, terminated, truncated, info = env.step(disturbance.disturb(action))
            success = info["success"]
            frames.append(frame | dict(rewards=np.float32(reward), dones=np.uint8(success)))
            if terminated or truncated:
                break
        if info["diverged"]:
            dropped["diverged"] += 1
        elif truncated and not success:
            dropped[f"{env.task} not done in time"] += 1
        else:
            arrays = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
            attrs = dict(
                instruction=env.instruction,
                task=env.task,
                slots=json.dumps(env.slots),
                request=requests.index(env.request),
                things=env.things(env.slots),
                num_samples=len(frames),
                success=success,
                interrupted=not success,
                scene_seed=seed,
                randomize=env.randomize,
                part=part,
                block_colors=",".join(env.block_colors),
                pad_colors=",".join(env.pad_colors),
            )
            for name, camera in env.cameras.items():
                mount, pose, fovy = camera.calibration(env.data, env.hand)
                attrs |= {f"{name}_mount": mount, f"{name}_pose": pose, f"{name}_fovy": fovy}
            episodes.append((attrs, arrays))
        request = env.draw_request(rng, avoid=env.request)
        if info["diverged"] or truncated or not goes_on or not request:
            break
        env.set_request(request, make_instruction(request, rng))
    return episodes, dropped


def grounding(env, relabel, index):
    """Labels of this frame that only a simulator has: where everything is, in each picture too, and
    what the expert would do for another request, `relabel`, that could be made now."""
    things = env.things(relabel[1])
    goal = np.concatenate([env.thing_pos[things[0]], env.target(relabel)])
    labels = {
        "grounding/things_pos": env.thing_pos.astype(np.float32),
        "grounding/relabel": np.uint16(index),
        "grounding/relabel_things": np.array(things, np.int8),
        "grounding/relabel_goal": goal.astype(np.float32),
        "grounding/relabel_action": expert(env, relabel),
    }
    for name, camera in env.cameras.items():
        labels[f"grounding/{name}_uv"] = camera.visible(env.data, env.thing_pos, env.thing_geom)
    return labels


# -------------------------------------------------------------------------------- the data file
SCHEMA = "picovla-5"
CHUNK = 8  # frames per compressed chunk of a camera's pictures
BATCH = 4  # scenes in a file of an unfinished recording


def write_episode(file, index, attrs, arrays):
    """Appends one episode (T control steps) to an open HDF5 file. The whole file, see assemble():

    attrs: schema, total, seed, tasks, all_tasks (what `--tasks all` would have been), control_hz,
        action_names, proprio, privileged (comma lists of names), requests (JSON [{task, slots,
        intent}, ..]: all that can be asked for), env_args (JSON, with the cameras), versions,
        git_commit, settings (JSON), dropped (JSON), complete
    episode_0/
        attrs: instruction, task, slots (JSON), request (index in requests), things (2,) (what is
            to be moved and what it goes to: index among blocks, pads, the handle; -1: nothing),
            num_samples, success, interrupted, scene_seed, randomize (of its world), part (how
            many instructions came before it in this scene), block_colors, pad_colors ("red,blue,..");
            of each camera: front_mount ("world" or "hand"), front_pose (4, 4) (in that frame, m;
            x right, y down, z ahead), front_fovy (degrees, vertical)
        observations/
            front_image, wrist_image     (T, 64, 64, 3) u1, one per camera
            joint_pos (T, 7) f4 rad      ee_pos (T, 3) f4 m      ee_vel (T, 3) f4 m/s
            ee_quat (T, 4) f4, w first   gripper (T, 1) f4 m
            object_pos (T, 3) f4 m       target_pos (T, 3) f4 m  see PRIVILEGED
        grounding/                       optional: for train.py --labels simulator
            front_uv, wrist_uv           (T, things, 2) f4, 0..1 in the picture, -1: not visible
            things_pos                   (T, things, 3) f4 m
            relabel (T,) u2              another request that could be made at this moment, its
            relabel_things (T, 2) i1     things, its
            relabel_goal (T, 6) f4 m     object_pos and target_pos,
            relabel_action (T, 4) f4     and what the expert would do then
        actions (T, 4) f4    rewards (T,) f4    dones (T,) u1
        obs -> observations
    wordings/push left (3000,) str       of each intent, more of "none"; {names} left open
    data/demo_0 -> episode_0             robomimic's view; mask/train, mask/valid list the demos
    """
    group = file.create_group(f"episode_{index}")
    for key, value in arrays.items():
        if key.endswith("_image"):
            group.create_dataset(
                f"observations/{key}",
                data=value,
                compression="gzip",
                chunks=(CHUNK, *value.shape[1:]),
                maxshape=(None, *value.shape[1:]),
                compression_opts=1,
            )
        elif "/" in key or key in ("actions", "rewards", "dones"):
            group[key] = value
        else:
            group[f"observations/{key}"] = value
    group.attrs.update(attrs)


def start_worker(folder, world, noise, normal_share):
    """Prepares a process for record_batch."""
    global worker  # one a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = folder, Env(**world), world.get("randomize", 0.0), noise, normal_share


def record_batch(scenes):
    """Plays `scenes`, a range of seeds, into a file of their own, unless it is there already.
    Returns its path, its number of episodes, and why others were dropped."""
    folder, env, randomize, noise, normal_share = worker
    path = folder / f"{scenes[0]}.h5"
    if not path.exists():
        part = path.with_suffix(".tmp")
        dropped = Counter()
        buffer = io.BytesIO()  # so that a full disk is Python's OSError
        with h5py.File(buffer, "w") as file:
            for seed in scenes:
                normal = np.random.default_rng([seed, 3]).random() < normal_share
                env.set_randomize(0.0 if normal else randomize)
                episodes, lost = demonstrate(env, seed, noise)
                dropped += lost
                for attrs, arrays in episodes:
                    write_episode(file, len(file), attrs, arrays)
            file.attrs.update(total=len(file), dropped=json.dumps(dropped))
        part.write_bytes(buffer.getbuffer())
        part.replace(path)
    with h5py.File(path) as file:
        return path, len(file), Counter(json.loads(file.attrs["dropped"]))


def generate(out, episodes, seed, shard, world, noise, normal_share, workers):
    """Writes `episodes` demonstrations to `out`, of scenes of the part `shard` (i, n) of the seed's.
    Finished batches wait in `out`.part, so that a killed run loses seconds; the content depends on
    neither kills nor workers."""
    build_model(1)  # where that fails, it is said once, not by every worker
    folder = out.with_name(out.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    code = zlib.crc32(Path(__file__).read_bytes())  # no mixture of two versions
    settings = json.dumps(
        dict(
            world,
            seed=seed,
            shard=shard,
            noise=noise,
            normal_share=normal_share,
            schema=SCHEMA,
            code=code,
        )
    )
    if not note.exists():
        note.write_text(settings)
    if note.read_text() != settings:
        raise ValueError(
            f"{folder} was begun with other settings ({note.read_text()}); finish it "
            f"with those or delete it"
        )
    i, n = shard
    first = DEMO_SEED + 100_000 * seed
    scenes = range(first + 100_000 * (i - 1) // n, first + 100_000 * i // n)
    scenes = scenes[: BATCH * episodes]  # plenty: of four, more than one is worth recording
    batches = (scenes[at : at + BATCH] for at in range(0, len(scenes), BATCH))
    done = {}  # path: episodes to take from it
    written = 0
    dropped = Counter()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, spawn, start_worker, (folder, world, noise, normal_share)
    )
    try:
        with tqdm(total=episodes, unit="episode", disable=None) as bar:
            for path, found, lost in pool.map(record_batch, batches):
                done[path] = min(found, episodes - written)
                dropped += lost
                written += done[path]
                bar.update(done[path])
                if written == episodes:
                    break
    finally:
        pool.shutdown(cancel_futures=True)
    if written < episodes:
        raise ValueError(f"these {len(scenes)} scenes hold {written} episodes")
    assemble(out, done, world, settings=settings, seed=seed, dropped=json.dumps(dropped))
    shutil.rmtree(folder)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    print(
        f"{out}: {episodes} episodes from {BATCH * len(done)} scenes, "
        f"{out.stat().st_size / 1e6:.0f} MB; dropped: {reasons}"
    )


def assemble(out, batches, world, **attrs):
    """Copies the episodes of the batches into one file and adds what is said about all of them."""
    tasks = world["tasks"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git
        commit = ""
    requests = []
    for task, slots in all_requests(tasks):
        requests.append(dict(task=task, slots=slots, intent=intent(task, slots)))
    masks = dict(train=[], valid=[])
    samples = total = 0
    part = out.with_name(out.name + ".tmp")
    with h5py.File(part, "w") as file:
        for path, episodes in batches.items():
            with h5py.File(path) as batch:
                for k in range(episodes):
                    name = f"episode_{total}"
                    batch.copy(f"episode_{k}", file, name)
                    file[f"{name}/obs"] = h5py.SoftLink(f"/{name}/observations")
                    file[f"data/demo_{total}"] = h5py.SoftLink(f"/{name}")
                    about = file[name].attrs
                    masks[split_of(about["scene_seed"], tasks)].append(f"demo_{total}")
                    samples += int(about["num_samples"])
                    total += 1
        for name, wordings in draw_wordings(tasks).items():
            file[f"wordings/{name}"] = wordings
        for name, demos in masks.items():
            file[f"mask/{name}"] = np.array(demos, "S16")
        env_args = json.dumps(dict(env_name="picovla", type=2, env_kwargs=world))  # 2: Gym
        file["data"].attrs.update(total=samples, env_args=env_args)
        file.attrs.update(
            attrs,
            schema=SCHEMA,
            total=total,
            tasks=",".join(tasks),
            all_tasks=",".join(TASKS),
            control_hz=CONTROL_HZ,
            action_names=",".join(ACTION_NAMES),
            proprio=",".join(PROPRIO),
            privileged=",".join(PRIVILEGED),
            requests=json.dumps(requests),
            env_args=env_args,
            git_commit=commit or "unknown",
            complete=True,
            versions=f"mujoco {mujoco.__version__}, numpy {np.__version__}, h5py {h5py.__version__}",
        )
    part.replace(out)


def draw_wordings(tasks):
    """{intent: WORDINGS of it} for all that can be asked of these tasks, and for "none": sentences
    that ask for nothing, or for other tasks."""
    rng = np.random.default_rng(0)
    asked, others = {}, {}
    for task in TASKS:
        for slots in slots_of(task, SLOTS):
            (asked if task in tasks else others)[intent(task, slots)] = task, slots
    found = {}
    for name, request in asked.items():
        found[name] = [make_wording(*request, rng) for _ in range(WORDINGS)]
    found["none"] = [make_wording(*NOTHING, rng) for _ in range(3 * WORDINGS)]
    for request in others.values():
        found["none"] += [make_wording(*request, rng) for _ in range(WORDINGS // len(others))]
    return found


def split_of(scene_seed, tasks):
    """ "valid" for one scene in twenty, equally often for each task: they take turns by seed."""
    return "train" if scene_seed // len(tasks) % 20 else "valid"


def describe(path):
    """Prints what is said of a data file and how many episodes each task has."""
    try:
        with h5py.File(path) as file:
            for key, value in file.attrs.items():
                print(f"{key:12} {str(value)[:200]}")
            episodes = range(file.attrs["total"])
            tasks = Counter(file[f"episode_{i}"].attrs["task"] for i in episodes)
    except OSError as error:
        raise ValueError(f"{path} is not a data file of gen_data.py ({error})") from None
    print(", ".join(f"{task} {n}" for task, n in tasks.items()))


# -------------------------------------------------------------------------------------- script
def number(kind, low, high):
    """A type for argparse: a number from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--episodes",
        type=number(int, 1, 100_000),
        default=3000,
        help="demonstrations to write (default 3000)",
    )
    add(
        "--out",
        type=Path,
        default=Path("data/demos.h5"),
        help="file to write (default data/demos.h5)",
    )
    add(
        "--seed",
        type=number(int, 0, 9999),
        default=0,
        help="which 100,000 demonstration scenes to draw from (default 0)",
    )
    add(
        "--shard",
        type=number(int, 1, 1000),
        nargs=2,
        default=(1, 1),
        metavar=("I", "N"),
        help="draw from the I-th of N parts of them, so that N runs, each with an --out of its own, "
        "make one set; train.py --data 'shards/*.h5' reads it (default 1 1)",
    )
    add(
        "--tasks",
        default="pick_place",
        help=f"all, or a comma list of {', '.join(TASKS)} (default pick_place)",
    )
    add(
        "--cameras",
        default="front,wrist",
        help=f"comma list of {', '.join(CAMERAS)} (default front,wrist)",
    )
    add(
        "--randomize",
        type=number(float, 0, 1),
        default=0.0,
        help="0 to 1: how much the world differs from scene to scene (default 0)",
    )
    add("--randomize_only", choices=tuple(FACTORS), help="let this alone differ (default all)")
    add(
        "--normal_share",
        type=number(float, 0, 1),
        default=0.0,
        help="share of the scenes that --randomize leaves as they are (default 0)",
    )
    add(
        "--noise",
        type=number(float, 0, 1),
        default=1.0,
        help="0 to 1: how much noise is executed with the actions, and how often a mistake comes before "
        "them (default 1)",
    )
    add(
        "--workers",
        type=number(int, 1, 61),
        default=(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        help="processes (default all cores); does not change the data",
    )
    add("--info", type=Path, metavar="FILE", help="only print what is in this data file")
    args = parser.parse_args()
    if args.info:
        return describe(args.info)
    if args.out.exists():
        raise ValueError(f"{args.out} exists; delete it or choose another --out")
    if args.shard[0] > args.shard[1]:
        raise ValueError(f"--shard {args.shard[0]} {args.shard[1]}: I must be at most N")
    if args.randomize_only and not args.randomize:
        raise ValueError("--randomize_only says what --randomize is to change; give that too")
    world = dict(
        tasks=task_list(args.tasks), cameras=choose(args.cameras.split(","), CAMERAS, "camera")
    )
    if args.randomize:
        world.update(randomize=args.randomize, randomize_only=args.randomize_only)
    generate(
        args.out,
        args.episodes,
        args.seed,
        args.shard,
        world,
        args.noise,
        args.normal_share,
        args.workers,
    )


if __name__ == "__main__":
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("gen_data.py: stopped; the same command carries on from there", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, KeyError, MemoryError, RuntimeError) as error:
        if os.environ.get("PICOVLA_TRACEBACK"):
            raise
        print(f"gen_data.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
