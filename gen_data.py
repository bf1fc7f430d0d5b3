"""The world and its demonstrations: scene, cameras, sentences, scripted expert, HDF5 writer.

    python gen_data.py --episodes 3000 --out data/demos.h5        # 2 to 4 minutes on 2 cores
    python gen_data.py --tasks all --episodes 8000 --out data/all.h5
    python gen_data.py --info data/demos.h5                       # what is in a file

A 7-joint arm (Franka Panda link offsets) with a friction gripper stands at a table with coloured
blocks, coloured pads and a drawer; an instruction says what to do with which of them. Needs MuJoCo
and no OpenGL: pixels come from MuJoCo's ray caster. Importing this file does no work.

World frame: origin at the arm's base on the table top, x away from the robot, y to its left, z up;
metres. In order: numbers, instructions, scene, camera, environment, expert, tasks, recording.
"""

import argparse
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
# Exactly these two give the answer away; they are also the goal that train.py regresses.
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
# Random streams of a scene: [seed] itself; [seed, 1] recording, 2 eval.py, 7 world, 8 pixels, 9 next.

# What demonstrations never show: these combinations of slots, and each task's last two sentences.
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
# A request is (task, slots), e.g. ("push", dict(block="red", direction="left")).
SLOTS = dict(
    block=tuple(COLORS),
    pad=tuple(COLORS),
    lower=tuple(COLORS),  # the block underneath
    direction=tuple(DIRECTIONS),
    way=("open", "close"),
)
FORMS = dict(  # other forms of a slot's word that sentences may use
    left=dict(towards="to the left"),
    right=dict(towards="to the right"),
    forward=dict(towards="forward"),
    back=dict(towards="back"),
    open=dict(pull="pull", opened="open"),
    close=dict(pull="push", opened="shut"),
)
BLOCK_WORDS = ("block", "cube", "object")
PAD_WORDS = ("target", "marker", "goal", "spot", "pad", "zone")


def fill(pattern, slots):
    """A sentence pattern with its slots filled in: "push the {block} cube {towards}"."""
    words = dict(slots)
    for word in slots.values():
        words.update(FORMS.get(word, {}))
    return pattern.format(**words)


def patterns(task, held_out=False):
    """The task's sentence patterns: those of the demonstrations, or the two they never use."""
    sentences = TASKS[task].sentences
    return sentences[-2:] if held_out else sentences[:-2]


def make_instruction(request, rng, held_out=False):
    """A sentence for the request, its wording drawn by `rng`."""
    task, slots = request
    choice = patterns(task, held_out)
    return fill(choice[rng.integers(len(choice))], slots)


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


def parse_instruction(text):
    """The request that a sentence in anybody's words makes. Raises ValueError if none fits.

    A colour is a block's or a pad's by the word after it, or else by its place: the first is the
    block's, the second the pad's. Of tasks with the same slots, the nearest wording decides; words
    that mean nothing here are ignored.
    """
    words = re.findall("[a-z]+", text.lower())
    slots = {}
    for word, following in zip(words, words[1:] + [""]):
        if word in COLORS:
            first = "block" not in slots
            if following in BLOCK_WORDS or first and following not in PAD_WORDS:
                slots["block" if first else "lower"] = word
            else:
                slots["pad"] = word
        elif word in DIRECTIONS:
            slots["direction"] = word
    drawer = not {"drawer", "cabinet", "handle"}.isdisjoint(words)
    if drawer and not slots:
        shut = not {"close", "closed", "shut"}.isdisjoint(words)
        pushed = "push" in words and "open" not in words
        slots["way"] = "close" if shut or pushed else "open"
    tasks = [task for task in TASKS if set(TASKS[task].slots) == set(slots)]
    colors = [word for word in words if word in COLORS]
    pushed = not {"push", "slide", "shove", "nudge"}.isdisjoint(words)
    aimless = pushed and set(slots) == {"block"}  # pushed, but where to?
    if not tasks or aimless or len(colors) > 2 or drawer != ("way" in slots):
        raise ValueError(
            f"it is not clear what {text!r} asks for: it should name a block by its colour "
            f"({', '.join(COLORS)}), and if need be a pad, a second block or a direction "
            f"({', '.join(DIRECTIONS)}), or else the drawer"
        )

    def similarity(task):
        sentences = [set(fill(pattern, slots).split()) for pattern in TASKS[task].sentences]
        return max(len(s.intersection(words)) / len(s.union(words)) for s in sentences)

    return max(tasks, key=similarity), slots


# ---------------------------------------------------------------------------------- the scene
# Link offsets and joint ranges: Franka Emika Panda data sheet. Capsules, no meshes. The hand hangs
# on the flange, turned by -45 degrees as on the real arm; fingers slide along its y. The drawer
# slides out of its cabinet, away from the robot, and is drawn by the handle on its front edge.
SCENE = """
<mujoco model="picovla">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.005" integrator="implicitfast" iterations="20"/>
  <default>
    <geom contype="0" conaffinity="0" group="2"/>
    <joint armature=".1" damping="1"/>
    <default class="link"><geom type="capsule" group="1" rgba=".80 .82 .85 1"/></default>
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
    <geom name="table" type="plane" group="0" size="0 0 .1" rgba=".42 .40 .38 1"
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
    """The MjModel of a table with so many blocks."""

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
            None,
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
        """Indices (n,) of the pixels inside the rectangle of some geom."""
        turn = data.geom_xmat[1:].reshape(-1, 3, 3)  # geoms to world
        corners = self.corners @ turn.swapaxes(1, 2) + data.geom_xpos[1:, None]
        uv, depth = self._look_at(data, corners)
        low = self.size * uv.min(1) - 0.5  # px; a ray goes through a pixel's middle
        high = self.size * uv.max(1) + 0.5 + 1e-6
        edges = np.stack([low, high], 1).clip(0, self.size).astype(int)  # (geoms, 2, 2)
        seen = (edges[:, 0] < edges[:, 1]).all(1) & (depth.max((1, 2)) > 0)
        edges[depth.min((1, 2)) < self.NEAR] = [[0], [self.size]]
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
    between the fingertips; ee_vel (3,) m/s; gripper (1,) m between the fingers; object_pos and
    target_pos (3,) m: the instructed thing and where it should go, which give the answer away.
    All but images float32. Action: (4,) [dx, dy, dz, gripper] in [-1, 1]; 1 is 3 cm a step;
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
        self.pixel_noise = FACTORS["noise"] * abs(draw["noise"][0])  # of 255
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
        numbers = dict(
            joint_pos=self.data.qpos[:7],
            ee_pos=self.ee_pos,
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


def funnel(across, near, slope):
    """How much higher than at its goal, in m, the hand should be `across` (2,) m from it: not at all
    within `near` m, and by `slope` times the distance beyond."""
    return slope * max(np.hypot(*across) - near, 0)


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


def grasp(env, thing, near=0.012, slope=4):
    """Opens, moves over the thing, descends in a funnel, closes."""
    hand, at = env.ee_pos, env.thing_pos[thing]
    across = (at - hand)[:2]
    low = at[2] + GRASP_HEIGHT
    around = np.hypot(*across) < near + 0.004 and hand[2] < at[2] + 0.015
    if around and env.ee_vel[2] > -0.2:
        return act([0, 0, low - hand[2]], -1)
    if env.opening <= WIDE:
        low = TRAVEL
    return act(approach(hand, across, low, funnel(across, near, slope)), 1)


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
    above = min(funnel(spot - load[:2], 0.016, 4), too_near)
    if above < 0.01 and load[2] < rest + 0.004:
        return let_go(env, load[2])
    return carry(env, spot if above else load[:2], rest, above)


def bring(env, block, goal, there, near=0.016):
    """Grasps the block, brings it until its middle is at `goal` (3,) m and, once `there`, lets go.

    near: m from the goal within which it is lowered all the way, as wide as the task allows. Where
    a pad is hidden under the load, a policy is a centimetre uncertain, and in a narrow funnel it
    hovers at the height that belongs to its usual error."""
    if there:
        return let_go(env, env.block_pos[block, 2])
    if env.held is None:
        return grasp(env, block)
    if env.held != block:
        return put_away(env, goal)
    return carry(env, goal[:2], goal[2], funnel((goal - env.block_pos[block])[:2], near, 4))


def graspable(env, block):
    """Whether the block is within reach, nothing is on it and the fingers have room around it."""
    at = env.block_pos[block]
    others = np.delete(env.block_pos, block, 0)
    blocked = (distance(others, at) < 0.07) & (others[:, 2] > at[2] - 0.03)
    return inside(at[:2], (0.3, -0.21), (0.7, 0.31)) and not blocked.any()


# ---------------------------------------------------------------------------------- the tasks
def lines(text):
    return tuple(line.strip() for line in text.strip().splitlines())


class Task:
    """One kind of request. Its methods get the scene and the meaning of its slots by name
    (Env.resolve): indices of blocks and pads, a unit vector for a direction.

    slots: names from SLOTS. sentences: patterns with those slots in braces, the last two held out.
    possible(env, ..): can it be asked for now? target(env, ..): where the thing should go (3,) m.
    success(env, ..): is it done, this instant? expert(env, ..): an action (4,)."""


class PickPlace(Task):
    """| what the expert sees                      | what it does                        |
    | the block rests on its pad                | lets go                             |
    | another block between the fingers         | puts it away                        |
    | the right block between the fingers       | carries it to the pad               |
    | anything else                             | grasps the block                    |"""

    slots = ("block", "pad")
    sentences = lines("""
        pick up the {block} block and place it at the {pad} target
        grasp the {block} cube and move it to the {pad} target location
        move the {block} object to the {pad} marker
        grab the {block} cube and place it at the {pad} goal
        lift the {block} block then set it on the {pad} target
        pick up the {block} object and transport it to the {pad} target zone
        grasp and relocate the {block} block to the {pad} spot
        put the {block} cube down on the {pad} marker
        pick the {block} block and put it on the {pad} target
        grab the {block} object and set it down at the {pad} spot""")

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
        there = distance(at, goal) < 0.02 and at[2] < goal[2] + 0.004
        return bring(env, block, goal, there)


class Lift(Task):
    """| another block between the fingers         | puts it away                        |
    | the right block between the fingers       | rises                               |
    | anything else                             | grasps the block                    |"""

    slots = ("block",)
    sentences = lines("""
        pick up the {block} block
        lift the {block} cube
        raise the {block} block
        grab the {block} object and hold it up
        take the {block} cube off the table
        lift up the {block} object
        hold the {block} block in the air
        grasp the {block} cube and raise it
        grab the {block} block and lift it
        raise the {block} object off the table""")
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
    sentences = lines("""
        push the {block} block {towards}
        slide the {block} cube {direction}
        shove the {block} object {towards}
        push the {block} cube {direction}
        nudge the {block} block {towards}
        move the {block} block {direction} without lifting it
        slide the {block} object {towards} on the table
        push against the {block} cube to move it {direction}
        slide the {block} block {towards}
        shove the {block} cube {direction} without lifting it""")
    BEHIND = 0.055  # m, the hand from the block's middle
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
        lane = 0.02 if ahead < 0.045 else 0.01  # m, more once it touches
        behind = 0.02 < ahead < 0.085 and np.hypot(*aside) < lane
        if hand[2] < 0.05 and behind and shut:
            return act([*(self.SPEED / 0.6 * direction + aside), self.HEIGHT - hand[2]], -1)
        across = offset - self.BEHIND * direction
        low = self.HEIGHT if shut else TRAVEL
        motion = approach(hand, across, low, funnel(across, 0.008, 6))
        return act(motion, -1 if shut or hand[2] > 0.1 else 1)


class Stack(Task):
    """| the upper block rests on the lower one    | lets go                             |
    | another block between the fingers         | puts it away                        |
    | the right block between the fingers       | carries it onto the lower one       |
    | anything else                             | grasps the upper block              |"""

    slots = ("block", "lower")
    sentences = lines("""
        stack the {block} cube on the {lower} cube
        put the {block} block on top of the {lower} block
        place the {block} cube on the {lower} block
        set the {block} object on top of the {lower} cube
        pick up the {block} block and stack it on the {lower} block
        build a tower with the {block} cube on the {lower} cube
        lift the {block} cube onto the {lower} object
        balance the {block} block on the {lower} block
        grab the {block} cube and put it on top of the {lower} block
        stack the {block} object onto the {lower} cube""")

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
        there = across < 0.015 and height < 0.004 and calm
        return bring(env, block, self.target(env, block, lower), there, near=0.012)


class Drawer(Task):
    """| the drawer is as it should be             | lets go                             |
    | a block between the fingers               | puts it away                        |
    | the handle between the fingers            | draws or pushes it                  |
    | anything else                             | grasps the handle                   |"""

    slots = ("way",)
    sentences = lines("""
        {way} the drawer
        {pull} the drawer {opened}
        {way} the cabinet
        {pull} the handle until the drawer is {opened}
        grasp the handle and {way} the drawer
        take the handle and {pull} it until the drawer is {opened}
        move the drawer until it is {opened}
        {way} the drawer of the cabinet
        grasp the handle and {pull} the drawer {opened}
        {pull} the cabinet {opened}""")

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
        return grasp(env, env.handle, 0.008, 6)


TASKS = dict(pick_place=PickPlace(), lift=Lift(), push=Push(), stack=Stack(), drawer=Drawer())


def task_list(text):
    """("pick_place", "lift") of "pick_place,lift" or "all". Raises ValueError."""
    return tuple(TASKS) if text == "all" else choose(text.split(","), TASKS, "task")


# ------------------------------------------------------------------------------ demonstrations
NOISE = 0.12  # standard deviation of the white noise on the motion
PUSH = 0.03  # probability a step of a push: 3 to 7 steps, of 0.8
SLIP = 0.004  # probability a step of the gripper doing the opposite, 3 steps
INTERRUPT = 0.6  # share of instructions followed by another, in mid-motion if not done by then
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


def demonstrate(env, seed, noise=1.0):
    """Plays one scene; returns ([(attrs, arrays), ...], Counter of why episodes were dropped).

    An episode is one instruction, from the moment it is given until it is done or the next one, of
    any of the tasks, interrupts it. A disturbed action is executed, the clean one recorded."""
    rng = np.random.default_rng([seed, 1])
    obs, info = env.reset(seed)
    episodes, dropped = [], Counter()
    disturbance = Disturbance(rng, noise)
    requests = all_requests(env.tasks)
    for part in range(INSTRUCTIONS):
        goes_on = rng.random() < INTERRUPT
        frames = []
        for _ in range(rng.integers(4, 60) if goes_on else MAX_STEPS):
            action = expert(env)
            relabel = env.draw_request(rng, avoid=env.request) or env.request
            labels = grounding(env, relabel, requests.index(relabel))
            frame = obs | labels | dict(actions=action)
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
                part=part,
                block_colors=",".join(env.block_colors),
                pad_colors=",".join(env.pad_colors),
            )
            episodes.append((attrs, arrays))
        request = env.draw_request(rng, avoid=env.request)
        if info["diverged"] or truncated or not goes_on or not request:
            break
        env.set_request(request, make_instruction(request, rng))
        obs = env.observe()
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
SCHEMA = "picovla-3"
CHUNK = 8  # frames per compressed chunk of a camera's pictures
BATCH = 8  # scenes in a file of an unfinished recording


def write_episode(file, index, attrs, arrays):
    """Appends one episode (T control steps) to an open HDF5 file. The whole file, see assemble():

    attrs: schema, total, seed, tasks, all_tasks (what `--tasks all` would have been), control_hz,
        action_names, proprio, privileged (comma lists of names), requests (JSON [{task, slots,
        sentences}, ..]: all that can be asked for, each with its wordings), env_args (JSON, with
        the cameras), versions, git_commit, settings (JSON), dropped (JSON), complete
    episode_0/
        attrs: instruction, task, slots (JSON), request (index in requests), things (2,) (what is
            to be moved and what it goes to: index among blocks, pads, the handle; -1: nothing),
            num_samples, success, interrupted, scene_seed, part (how many instructions came before
            it in this scene), block_colors, pad_colors ("red,blue,..")
        observations/
            front_image, wrist_image     (T, 64, 64, 3) u1, one per camera
            joint_pos (T, 7) f4 rad      ee_pos (T, 3) f4 m      ee_vel (T, 3) f4 m/s
            gripper (T, 1) f4 m          object_pos (T, 3) f4 m  target_pos (T, 3) f4 m
        grounding/
            front_uv, wrist_uv           (T, things, 2) f4, 0..1 in the picture, -1: not visible
            things_pos                   (T, things, 3) f4 m
            relabel (T,) u2              another request that could be made at this moment, its
            relabel_things (T, 2) i1     things, its
            relabel_goal (T, 6) f4 m     object_pos and target_pos,
            relabel_action (T, 4) f4     and what the expert would do then
        actions (T, 4) f4    rewards (T,) f4    dones (T,) u1
        obs -> observations
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


def start_worker(folder, world, noise):
    """Prepares a process for record_batch."""
    global worker  # one a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = folder, Env(**world), noise


def record_batch(scenes):
    """Plays `scenes`, a range of seeds, into a file of their own, unless it is there already.
    Returns its path, its number of episodes, and why others were dropped."""
    folder, env, noise = worker
    path = folder / f"{scenes[0]}.h5"
    if not path.exists():
        part = path.with_suffix(".tmp")
        dropped = Counter()
        buffer = io.BytesIO()  # so that a full disk is Python's OSError
        with h5py.File(buffer, "w") as file:
            for seed in scenes:
                episodes, lost = demonstrate(env, seed, noise)
                dropped += lost
                for attrs, arrays in episodes:
                    write_episode(file, len(file), attrs, arrays)
            file.attrs.update(total=len(file), dropped=json.dumps(dropped))
        part.write_bytes(buffer.getbuffer())
        part.replace(path)
    with h5py.File(path) as file:
        return path, len(file), Counter(json.loads(file.attrs["dropped"]))


def generate(out, episodes, seed, shard, world, noise, workers):
    """Writes `episodes` demonstrations to `out`, of scenes of the part `shard` (i, n) of the seed's.
    Finished batches wait in `out`.part, so that a killed run loses seconds; the content depends on
    neither kills nor workers."""
    folder = out.with_name(out.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    code = zlib.crc32(Path(__file__).read_bytes())  # no mixture of two versions
    settings = json.dumps(
        dict(world, seed=seed, shard=shard, noise=noise, schema=SCHEMA, code=code)
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
    batches = (scenes[at : at + BATCH] for at in range(0, len(scenes), BATCH))
    done = {}  # path: episodes to take from it
    written = 0
    dropped = Counter()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (folder, world, noise))
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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    requests = []
    for task, slots in all_requests(tasks):
        sentences = [fill(pattern, slots) for pattern in patterns(task)]
        requests.append(dict(task=task, slots=slots, sentences=sentences))
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


def split_of(scene_seed, tasks):
    """ "valid" for one scene in twenty, of every task as often, since they take turns by seed."""
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
        "--noise",
        type=number(float, 0, 1),
        default=1.0,
        help="0 to 1: how much noise is executed with the actions (default 1)",
    )
    add(
        "--workers",
        type=number(int, 1, 61),
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    generate(args.out, args.episodes, args.seed, args.shard, world, args.noise, args.workers)


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
