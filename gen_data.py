"""The world and its demonstrations: scene, cameras, sentences, scripted expert, HDF5 writer.

    python gen_data.py --episodes 3000 --out data/demos.h5    # all cores, about 3 minutes on 2 of them
    python gen_data.py --tasks all --episodes 8000 --out data/all.h5
    python gen_data.py --info data/demos.h5                   # what is in a file, and data/demos.png
    python gen_data.py --bench                                # frames/s against bare physics + ray casting

A 7-joint arm (Franka Panda link offsets) with a friction gripper stands at a table with coloured blocks, coloured
pads and a drawer; a sentence says what to do with which of them. Needs MuJoCo and no OpenGL: pixels come from
MuJoCo's ray caster. Importing this file does no work.

World frame: origin at the arm's base on the table top, x away from the robot, y to its left, z up; metres.
"""
import argparse
import itertools
import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread

import h5py
import mujoco
import numpy as np
from tqdm import tqdm

# ----------------------------------------------------------------------------- the world, in numbers
PHYSICS_DT = 0.005                     # s, 200 Hz
SUBSTEPS = 10                          # physics steps per control step: 20 Hz control
CONTROL_HZ = 20
RAMP = np.arange(1, 6)[:, None] / 5    # share of a control step's joint motion commanded by each fifth of it
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
ACTION_SCALE = 0.03                    # m of hand motion per control step at action 1
MAX_STEPS = 200                        # control steps (10 s) before an episode is cut off
IMAGE_SIZE = 64                        # px
CAMERAS = ("front", "wrist", "top")
COLORS = {"red": (.86, .10, .10), "green": (.08, .62, .16), "blue": (.10, .25, .95),
          "yellow": (.96, .84, .08), "purple": (.58, .12, .78)}
N_BLOCKS, N_PADS = 3, 2
BLOCK = 0.02                           # m, half the edge of a block
PAD_RADIUS = 0.045                     # m
AREA = np.array([[0.36, -0.15], [0.64, 0.22]])                 # m, where blocks and pads are put (x, y)
WORKSPACE = np.array([[0.28, -0.32, 0.004], [0.72, 0.32, 0.35]])  # m, where the hand may be commanded
HOME = np.array([0, -0.2, 0, -2.2, 0, 2.0, 0.785])             # rad, start of the IK and its null-space pull
DAMPING = 1e-4 * np.eye(6)             # m² and rad², of the IK
LEASH = 0.04                           # m, how far the commanded hand may run ahead of the real one
GRIPPER_OPEN = 0.035                   # m, travel of each finger
DRAWER = 0.13                          # m, travel of the drawer
HANDLE = np.array([0.437, -0.275, 0.064])                      # m, its handle when it is shut
SUCCESS_STEPS = 5                      # control steps (0.25 s) that success must hold
DIRECTIONS = {"left": (0, 1), "right": (0, -1), "forward": (1, 0), "back": (-1, 0)}     # as the robot sees it

# The guard between any policy and the servos; eval.py counts what it stops.
SPEED_LIMIT = 0.8                      # m/s, of the hand
JOINT_MARGIN = 0.02                    # rad, kept from the ends of the joints' ranges
FORCE_LIMIT = 40.0                     # N, at any contact of a block; above it the hand backs off
GUARDS = ("action", "speed", "box", "joint", "force")

# Scene seeds: three ranges that never meet. Demonstration seeds start at DEMO_SEED + 100_000 * --seed.
VALID_SEED, TEST_SEED, DEMO_SEED = 0, 1_000_000, 2_000_000     # choosing, reporting, demonstrations

# What demonstrations never show: these, and the last two sentence patterns of each task.
HELD_OUT = dict(
    pick_place=[dict(block=b, pad=p) for b, p in (("red", "blue"), ("green", "yellow"), ("blue", "purple"), ("yellow", "red"),
                                                  ("purple", "green"))],
    stack=[dict(block=b, lower=l) for b, l in (("red", "yellow"), ("green", "purple"), ("blue", "red"), ("purple", "blue"))],
    push=[dict(block="purple")])
SPLITS = ("seen", "phrasing", "combo", "crowd")                # as demonstrated; held-out wordings; colours; more blocks
CROWD = 2                                                      # more blocks than in demonstrations

# Domain randomisation: what may differ from scene to scene, each by up to this much at --randomize 1.
FACTORS = dict(
    light=(0.5, 0.25),                 # of the direction (unit vector), of the strength (share)
    color=(0.12, 0.07),                # of the table, of blocks and pads (r, g, b in 0..1)
    camera=(0.02, 2.0),                # m, degrees of field of view
    noise=(8.0,),                      # standard deviation, of 255
    friction=(0.3,),                   # share
    mass=(0.5, 0.1),                   # share, of the blocks' mass and size
    damping=(0.5,),                    # share, of the joints'
    servo=(0.25,),                     # share, of gain and bias together
    delay=(0.5,))                      # probability that actions arrive one control step late


# ----------------------------------------------------------------------------- sentences
PHRASES = dict(left=dict(towards="to the left"), right=dict(towards="to the right"), forward=dict(towards="forward"),
               back=dict(towards="back"), open=dict(pull="pull", opened="open"), close=dict(pull="push", opened="shut"))    # other forms of a slot's word
PAD_WORDS = ("target", "marker", "goal", "spot", "pad", "zone")
SLOTS = dict(block=tuple(COLORS), pad=tuple(COLORS), lower=tuple(COLORS), direction=tuple(DIRECTIONS), way=("open", "close"))


def fill(pattern, slots):
    """A sentence pattern with its slots filled in; "to the left" and "shut" are other forms of "left" and "close"."""
    forms = {k: v for word in slots.values() for k, v in PHRASES.get(word, {}).items()}
    return pattern.format(**slots, **forms)


def patterns(task, held_out=False):
    """The task's sentence patterns: those of the demonstrations, or the two that they never use."""
    return TASKS[task].sentences[-2:] if held_out else TASKS[task].sentences[:-2]


def make_instruction(task, slots, rng, held_out=False):
    """One of the task's sentences, drawn by `rng`, with the slots filled in, e.g. dict(block="red", pad="blue")."""
    choice = patterns(task, held_out)
    return fill(choice[rng.integers(len(choice))], slots)


def is_held_out(task, slots):
    """Whether demonstrations leave out this combination of colours."""
    return any(combination.items() <= slots.items() for combination in HELD_OUT.get(task, ()))


def slots_of(task, words):
    """Every way to fill the task's slots from `words`, a dict of words for each kind of slot."""
    return [dict(zip(TASKS[task].slots, chosen)) for chosen in itertools.product(*(words[slot] for slot in TASKS[task].slots))]


def all_requests(tasks):
    """Every (task, slots) that could ever be asked for; its order numbers the requests of a data file."""
    return [(task, slots) for task in tasks for slots in slots_of(task, SLOTS)]


def parse_instruction(text):
    """(task, slots) of a sentence in anybody's words. A colour is a block's or a target's by the word after it, or else by its
    place: the first is the block's, the second the target's. Among tasks with these slots, the one whose wording is nearest.

    Raises ValueError, with a sentence for the user, when nothing fits."""
    words, slots = re.findall("[a-z]+", text.lower()), {}
    for word, following in zip(words, words[1:] + [""]):
        if word in COLORS:
            is_block = following in ("block", "cube", "object") or "block" not in slots and following not in PAD_WORDS
            slots["pad" if not is_block else "lower" if "block" in slots else "block"] = word
        elif word in DIRECTIONS:
            slots["direction"] = word
    drawer = bool({"drawer", "cabinet", "handle"} & set(words))
    if drawer and not slots:
        slots = dict(way="close" if {"close", "shut"} & set(words) or "push" in words and "open" not in words else "open")
    fitting = [task for task in TASKS if set(TASKS[task].slots) == set(slots) and drawer == ("way" in slots)]
    if not fitting or sum(w in COLORS for w in words) > 2:
        named = ", ".join(w for w in words if w in COLORS or w in DIRECTIONS) or "none"
        raise ValueError(f"what to do is not clear from {text!r}: it should name a block's colour ({', '.join(COLORS)}), and a "
                         f"target's or a second block's colour or {', '.join(DIRECTIONS)} if need be, or the drawer; it names {named}")
    if len(fitting) > 1:
        said, usual = set(words), lambda task: [set(fill(p, slots).split()) for p in TASKS[task].sentences]
        fitting.sort(key=lambda task: -max(len(said & other) / len(said | other) for other in usual(task)))
    return fitting[0], slots


# ----------------------------------------------------------------------------- the scene
def scene_xml(n_blocks=N_BLOCKS, n_pads=N_PADS):
    """MJCF of the scene. Link offsets and joint ranges: Franka Emika Panda data sheet. Capsules, no meshes."""
    # offset from the previous joint (m), its rotation, range (rad), mass (kg), kp (N m/rad), drawn capsule (m: ends, radius)
    joints = [
        ("0 0 .333", "1 0 0 0", "-2.8973 2.8973", 3.0, 4500, "0 0 -.19 0 0 -.02 .062"),
        ("0 0 0", "1 -1 0 0", "-1.7628 1.7628", 3.0, 4500, "0 0 -.06 0 0 .06 .06"),
        ("0 -.316 0", "1 1 0 0", "-2.8973 2.8973", 2.5, 3500, "0 0 -.24 .05 0 -.02 .055"),
        (".0825 0 0", "1 1 0 0", "-3.0718 -.0698", 2.5, 3500, "0 0 -.05 0 0 .05 .052"),
        ("-.0825 .384 0", "1 -1 0 0", "-2.8973 2.8973", 2.0, 2000, ".06 0 -.33 0 .03 -.08 .048"),
        ("0 0 0", "1 1 0 0", "-.0175 3.7525", 1.5, 2000, "0 0 -.03 .05 0 0 .045"),
        (".088 0 0", "1 1 0 0", "-2.8973 2.8973", 0.7, 2000, "0 0 .02 0 0 .07 .042"),
    ]
    arm = '<geom type="capsule" fromto="0 0 .02 0 0 .1" size=".075" mass="3" class="link"/>'
    for i, (pos, quat, limits, mass, _, capsule) in enumerate(joints, 1):
        *ends, radius = capsule.split()
        arm += (f'<body name="link{i}" pos="{pos}" quat="{quat}" gravcomp="1"><joint name="joint{i}" '
                f'range="{limits}" armature=".1" damping="1"/><geom type="capsule" fromto="{" ".join(ends)}" '
                f'size="{radius}" mass="{mass}" class="link"/>')
    # the hand hangs on the flange, turned by -45 degrees as on the real arm; fingers slide along its y
    finger = ('<body name="{0}" pos="0 0 .0584" gravcomp="1"><joint name="{0}" type="slide" axis="0 {1} 0" '
              f'range="0 {GRIPPER_OPEN}" armature=".12" damping="8"/>'
              '<geom name="{0}" type="box" pos="0 {2} .032" size=".009 .006 .026" mass=".03" friction="1.6 .05 .001" '
              'condim="4" contype="1" conaffinity="1" rgba=".22 .22 .25 1" solref=".01 1"/></body>')
    arm += ('<body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1">'
            '<geom name="palm" type="box" pos="0 0 .032" size=".02 .07 .022" mass=".6" rgba=".85 .86 .88 1" '
            'contype="1" conaffinity="1"/><site name="hand" pos="0 0 .1034"/>'
            '<camera name="wrist" pos=".08 0 .02" xyaxes="0 -1 0 -.966 0 -.259" fovy="80"/>'
            + finger.format("finger_left", 1, .006) + finger.format("finger_right", -1, -.006) + "</body>")
    arm += "</body>" * len(joints)
    blocks = "".join(f'<body name="block{i}"><freejoint/><geom name="block{i}" type="box" size="{BLOCK} {BLOCK} '
                     f'{BLOCK}" mass=".06" friction="1 .05 .001" condim="4" contype="1" conaffinity="1"/></body>'
                     for i in range(n_blocks))
    # a coloured disc with a white middle: a flat target, unlike a block of the same colour
    pads = "".join(f'<body name="pad{i}"><geom name="pad{i}" type="cylinder" size="{PAD_RADIUS} .0008"/>'
                   f'<geom type="cylinder" size=".016 .0012" rgba=".95 .95 .95 1"/></body>' for i in range(n_pads))
    # the drawer slides out of its cabinet, away from the robot, and is drawn by the handle on its front edge
    x, y, z = HANDLE
    cabinet = (f'<body name="cabinet" pos="{x} {y} 0"><geom name="cabinet" type="box" pos="-.085 0 .03" size=".065 .06 .03" '
               'rgba=".42 .27 .15 1" contype="1" conaffinity="1"/></body>'
               f'<body name="drawer" pos="{x} {y} 0"><joint name="drawer" type="slide" axis="1 0 0" range="0 {DRAWER}" damping="6" '
               'frictionloss=".3"/><geom name="drawer" type="box" pos="-.065 0 .02" size=".08 .052 .0185" mass=".25" '
               'rgba=".70 .50 .30 1" contype="1" conaffinity="1"/>'
               f'<geom name="handle" type="box" pos="0 0 {z}" size=".01 .012 .025" mass=".02" rgba=".97 .95 .88 1" friction="1.2 .05 .001" '
               'condim="4" contype="1" conaffinity="1"/></body>')
    servos = "".join(f'<position name="servo{i}" joint="joint{i}" kp="{kp}" kv="{kp * .045:.0f}"/>'
                     for i, (_, _, _, _, kp, _) in enumerate(joints, 1))
    forces = "".join(f'<contact body1="block{i}" data="force" num="32"/>' for i in range(n_blocks))     # each: normal, two tangents
    return f"""<mujoco model="picovla">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{PHYSICS_DT}" integrator="implicitfast" iterations="20"/>
  <default>
    <geom contype="0" conaffinity="0" group="2"/>
    <default class="link"><geom group="1" rgba=".80 .82 .85 1"/></default>
  </default>
  <worldbody>
    <light pos=".6 -.4 1.6" dir="-.1 .3 -1"/>
    <camera name="front" pos=".92 0 .72" xyaxes="0 1 0 -.848 0 .530" fovy="43"/>
    <camera name="top" pos=".5 0 1.05" xyaxes="0 -1 0 1 0 0" fovy="34"/>
    <geom name="table" type="plane" group="0" size="0 0 .1" rgba=".42 .40 .38 1" contype="1" conaffinity="1" friction="1 .05 .001"/>
    {arm}{blocks}{pads}{cabinet}
  </worldbody>
  <contact><exclude body1="cabinet" body2="drawer"/></contact>
  <equality><joint joint1="finger_left" joint2="finger_right"/></equality>
  <actuator>{servos}
    <position name="grip" joint="finger_left" kp="900" forcerange="-12 12"/>
  </actuator>
  <sensor>{forces}</sensor>
</mujoco>"""


class RayCamera:
    """Pictures from MuJoCo's ray caster: no OpenGL, no driver, the same bytes on every run.

    Shading is Lambert's with one light and an ambient term; colours are the model's geom_rgba. Rays are cast only
    inside the projected boxes of the geoms, long ones in pieces, and only against the geom groups in view; every other pixel
    is table or sky, known without casting. Less than half the time for the same picture (test_smoke.py compares them)."""

    LIGHT = np.array([0.35, -0.45, 0.82])                      # direction towards the light, world frame
    AMBIENT, DIFFUSE = 0.45, 0.55
    SKY = (150, 165, 180)
    CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
    TURNED = np.array([1, -1, -1])                             # x right, y down, z ahead: MuJoCo's cameras look along -z, y up
    REACH = np.array([-1e-6, 1 + 1e-6]) - 0.5                  # px: a ray goes through the middle of its pixel

    def __init__(self, model, name, size=IMAGE_SIZE):
        self.model, self.id, self.size = model, model.camera(name).id, size
        self.table = model.geom("table").id
        self.outermost = [0, size - 1, size * size - size, size * size - 1]
        self.geom = np.empty((size, size), np.int32)           # geom id at each pixel of the last picture, -1 for sky
        self.light, self.strength = self.LIGHT, 1.0
        self.refit()

    def refit(self):
        """Takes over the model's field of view, the sizes of its geoms and the table's colour, and the light."""
        model, size = self.model, self.size
        self.half = np.tan(np.deg2rad(model.cam_fovy[self.id]) / 2)
        grid = ((np.arange(size) + 0.5) / size * 2 - 1) * self.half
        x, y = np.meshgrid(grid, -grid)
        rays = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
        self.rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)    # camera frame, row-major pixels
        boxes, self.owner = [], []                             # long geoms in pieces, whose rectangles on the screen are smaller
        for geom in np.flatnonzero(np.arange(model.ngeom) != self.table):
            middle, half = model.geom_aabb[geom].reshape(2, 3)           # in the geom's frame
            n, along = min(int(half.max() / np.median(half) + 0.5), 8), np.arange(3) == half.argmax()
            for i in range(n):
                boxes.append((middle + along * half * ((2 * i + 1) / n - 1))[:, None]
                             + self.CORNERS * np.where(along, half / n, half)[:, None])
                self.owner.append(geom)
        self.boxes, self.owner = np.array(boxes), np.array(self.owner)   # (pieces, 3, 8), (pieces,) geom ids
        self.group = model.geom_group[self.owner]
        flat = np.float32(self.strength * (self.AMBIENT + self.DIFFUSE * self.light[2]))
        table = (model.geom_rgba[self.table, :3].astype(np.float32) * 255 * flat).clip(0, 255).astype(np.uint8)
        self.empty = table[None].repeat(size * size, 0)        # the picture of a bare table

    def render(self, data, cull=True):
        """(size, size, 3) uint8 of `data`, which must have had mj_kinematics and mj_camlight. Leaves in `hits` the geom ids of
        the pixels that rays have hit: all but table and sky, if culled."""
        turn, pos = data.cam_xmat[self.id].reshape(3, 3), data.cam_xpos[self.id]
        rgba, image, geoms = self.model.geom_rgba[:, :3].astype(np.float32) * 255, self.empty.copy(), self.geom.reshape(-1)
        geoms[:] = self.table
        if (self.rays[self.outermost] @ turn[2] >= 0).any():   # the horizon is in the picture
            sky = self.rays @ turn[2] >= 0
            image[sky], geoms[sky] = self.SKY, -1
        pixels, groups = self._candidates(data) if cull else (np.arange(len(image)), None)
        n = len(pixels)
        geom, dist, normal = np.empty(n, np.int32), np.empty(n), np.empty((n, 3))
        rays = self.rays.take(pixels, 0) @ turn.T              # take: four times as fast as []
        mujoco.mj_multiRay(self.model, data, pos, rays.reshape(-1), groups, True, -1, geom, dist, normal.reshape(-1), n, mujoco.mjMAXVAL)
        # what is sunk into the table is hidden by it
        hit = np.flatnonzero((geom >= 0) & (pos[2] + dist * rays[:, 2] > -1e-9))
        pixels, self.hits = pixels[hit], geom[hit]
        light = self.strength * (np.maximum(normal.take(hit, 0) @ self.light, 0) * self.DIFFUSE + self.AMBIENT)
        image[pixels] = np.minimum(rgba.take(self.hits, 0) * light.astype(np.float32)[:, None], 255)
        geoms[pixels] = self.hits
        return image.reshape(self.size, self.size, 3)

    def _candidates(self, data):
        """Pixels (n,) inside the screen rectangle of some geom's bounding box, or of a piece of it; geom groups (6,) uint8 in view."""
        view = data.cam_xmat[self.id].reshape(3, 3) * self.TURNED
        turn = view.T @ data.geom_xmat.take(self.owner, 0).reshape(-1, 3, 3)
        offset = (data.geom_xpos.take(self.owner, 0) - data.cam_xpos[self.id]) @ view
        corners = turn @ self.boxes + offset[..., None]        # (pieces, 3, 8)
        z = corners[:, 2]
        xy = corners[:, :2] * (self.size / 2 / self.half / np.maximum(z, 0.01))[:, None] + self.size / 2
        edges = np.ceil(np.concatenate([xy.min(2) + self.REACH[0], xy.max(2) + self.REACH[1]], 1)).clip(0, self.size).astype(int)
        seen = (edges[:, 0] < edges[:, 2]) & (edges[:, 1] < edges[:, 3]) & (z.max(1) > 0)
        edges[z.min(1) < 0.01] = 0, 0, self.size, self.size    # reaches behind the camera: could be anywhere
        mask = np.zeros((self.size, self.size), bool)
        for left, top, right, bottom in edges[seen].tolist():
            mask[top:bottom, left:right] = True
        groups = np.zeros(6, np.uint8)
        groups[self.group[seen]] = 1
        return np.flatnonzero(mask), groups

    def project(self, data, points):
        """World points (..., 3) in metres to image coordinates (..., 2): x right, y down, the picture is 0..1."""
        local = (points - data.cam_xpos[self.id]) @ (data.cam_xmat[self.id].reshape(3, 3) * self.TURNED)
        uv = local[..., :2] / np.maximum(local[..., 2:], 1e-3) / self.half * 0.5 + 0.5
        return np.where(local[..., 2:] > 0, uv, -1.0)          # behind the camera: outside the picture


# ----------------------------------------------------------------------------- environment
class Env:
    """The table and the arm, with Gymnasium's five return values (gymnasium itself is not needed).

    tasks: names from TASKS, what may be asked for. cameras: names from CAMERAS; () renders nothing. split: one of SPLITS.
    randomize: 0..1, how far each of FACTORS may be from normal; randomize_only: the name of one, or None for all.
    guard: whether the safety guard stands between actions and servos (see step).
    Observations are a dict: <camera>_image (64, 64, 3) uint8; joint_pos (7,) rad; ee_pos (3,) m, between the
    fingertips; ee_vel (3,) m/s; gripper (1,) m between the fingers; object_pos and target_pos (3,) m: the
    instructed thing and where it should go, which give the answer away. All but images float32.
    Action: (4,) [dx, dy, dz, gripper] in [-1, 1]; 1 is 3 cm a step; gripper > 0 opens, otherwise it closes.
    info["violations"] counts what the guard stopped, info["force"] is the largest contact force on a block so far, N.
    """

    def __init__(self, tasks=("pick_place",), cameras=("front", "wrist"), n_blocks=N_BLOCKS, n_pads=N_PADS, split="seen",
                 randomize=0.0, randomize_only=None, guard=True):
        for name, known in [(t, TASKS) for t in tasks] + [(c, CAMERAS) for c in cameras] + [(split, SPLITS)] + [
                (f, FACTORS) for f in [randomize_only] if f is not None]:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        self.tasks, self.n_blocks, self.n_pads = tuple(tasks), n_blocks + CROWD * (split == "crowd"), n_pads
        if not 1 <= min(self.n_blocks, n_pads) <= max(self.n_blocks, n_pads) <= len(COLORS):
            raise ValueError(f"there must be 1 to {len(COLORS)} blocks and pads, each of one of {len(COLORS)} colours, not {self.n_blocks} and {n_pads}")
        self.split, self.guard = split, guard
        self.factors = tuple(FACTORS) if randomize_only is None else (randomize_only,)
        self.late, self.pixel_noise = False, 0.0               # whether actions arrive one control step late; of 255
        self.model = m = mujoco.MjModel.from_xml_string(scene_xml(self.n_blocks, n_pads))
        self.normal = None                                     # the model to draw other worlds around
        self.data = mujoco.MjData(m)
        self.arm_model = mujoco.MjModel.from_xml_string(scene_xml(0, 0))    # the arm alone, for the IK
        self.arm = mujoco.MjData(self.arm_model)
        self.cameras = {name: RayCamera(m, name) for name in cameras}
        self.qadr = np.array([m.joint(f"joint{i}").qposadr[0] for i in range(1, 8)])
        self.fadr, self.dadr = m.joint("finger_left").qposadr[0], m.joint("drawer").qposadr[0]
        self.arm_qadr = [self.arm_model.joint(f"joint{i}").qposadr[0] for i in range(1, 8)]
        self.arm_hand = self.arm_model.site("hand").id
        self.limits = m.jnt_range[[m.joint(f"joint{i}").id for i in range(1, 8)]]
        self.hand = m.site("hand").id
        self.grip = m.actuator("grip").id
        self.others = np.array([[j for j in range(self.n_blocks) if j != i] for i in range(self.n_blocks)], int)    # than block i
        self.block_body = np.array([m.body(f"block{i}").id for i in range(self.n_blocks)])
        self.block_qadr = np.array([m.joint(m.body_jntadr[b]).qposadr[0] for b in self.block_body])
        self.block_vadr = np.array([m.joint(m.body_jntadr[b]).dofadr[0] for b in self.block_body])
        self.block_geom = np.array([m.geom(f"block{i}").id for i in range(self.n_blocks)])
        self.pad_body = np.array([m.body(f"pad{i}").id for i in range(n_pads)])
        self.pad_geom = np.array([m.geom(f"pad{i}").id for i in range(n_pads)])
        self.thing_geom = np.array([*self.block_geom, *self.pad_geom, m.geom("handle").id])
        self.handle = len(self.thing_geom) - 1                 # its index among the things
        self.fingers = [m.geom("finger_left").id, m.geom("finger_right").id]
        self.thing_of = {g: i for i, g in enumerate(self.thing_geom.tolist())}
        self.set_randomize(randomize)

    # -- setting up
    def set_randomize(self, amount):
        """How far from normal, 0..1, the worlds of the next resets may be."""
        if not 0 <= amount <= 1:
            raise ValueError(f"randomize is a number from 0 to 1, not {amount}")
        if amount and self.normal is None:
            self.normal = mujoco.MjModel.from_xml_string(scene_xml(self.n_blocks, self.n_pads))
        self.randomize = amount

    def reset(self, seed=None, options=None):
        """New scene, a function of `seed` (int; None draws one); the tasks take turns with the seeds. options:
        dict(instruction=sentence, task=name, slots=some of them) sets them by hand. Returns (obs, info). Raises ValueError if
        the sentence does not fit the scene."""
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        rng, options = np.random.default_rng(self.seed), options or {}
        task, text = options.get("task") or self.tasks[self.seed % len(self.tasks)], options.get("instruction")
        if task not in TASKS:
            raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
        slots = options.get("slots") or {}
        combo = self.split == "combo" or (None if set(slots) == set(TASKS[task].slots) else False)       # what is asked for may be held out
        if self.normal is not None:
            self._randomize(np.random.default_rng([self.seed, 7]))
        for _ in range(1000):
            self._new_scene(rng)
            TASKS[task].setup(self, rng)
            self._refresh(moved=False)
            request = self.draw_request(rng, (task,), combo, only=slots)
            if text or request:
                break
        else:
            raise ValueError(f"no scene has something held out to ask for in task {task}" if self.split == "combo" else
                             f"no scene allows task {task}")
        if text:
            self.set_instruction(text, options.get("task"))
        else:
            self.set_request(request, make_instruction(*request, rng, self.split == "phrasing"))
        return self.observe(), self._info()

    def _new_scene(self, rng):
        m, d = self.model, self.data
        mujoco.mj_resetData(m, d)
        names = list(COLORS)
        self.block_colors = [names[i] for i in rng.permutation(len(names))[:self.n_blocks]]
        self.pad_colors = [names[i] for i in rng.permutation(len(names))[:self.n_pads]]
        self.askable = {}                                      # what requests() has found for this scene
        for geom, color in zip(self.thing_geom, self.block_colors + self.pad_colors):
            m.geom_rgba[geom, :3] = COLORS[color]
        if self.randomize and "color" in self.factors:
            m.geom_rgba[self.thing_geom[:-1], :3] += self.randomize * FACTORS["color"][1] * rng.uniform(-1, 1, (self.handle, 3))
            m.geom_rgba[:, :3] = m.geom_rgba[:, :3].clip(0, 1)
        self.half = m.geom_size[self.block_geom, 0]            # m, of each block
        spots = self._free_spots(rng)
        for i, q in enumerate(self.block_qadr):
            yaw = rng.uniform(-0.25, 0.25)                     # rad; the gripper does not turn
            d.qpos[q:q + 7] = [*spots[i], self.half[i], np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        m.body_pos[self.pad_body] = [[*s, 0] for s in spots[self.n_blocks:]]
        d.qpos[self.dadr] = np.clip(rng.uniform(-0.4, 1.4), 0, 1) * DRAWER       # often shut or wide open
        self.command = np.array([rng.uniform(0.38, 0.6), rng.uniform(-0.2, 0.2), rng.uniform(0.14, 0.26)])
        self.q_command = HOME.copy()
        self.guarded, self.force, self.last_force = dict.fromkeys(GUARDS, 0), 0.0, 0.0
        for _ in range(20):
            self._solve_ik(self.command)
        d.qpos[self.qadr] = d.ctrl[:7] = self.q_command
        d.qpos[[self.fadr, self.fadr + 1]] = d.ctrl[self.grip] = GRIPPER_OPEN
        self.delayed = np.array([0, 0, 0, 1.0]) if self.late else None
        self.meddled, self.lifted, self.waiting = set(), np.zeros(self.n_blocks, bool), np.zeros(self.n_blocks, bool)

    def _randomize(self, rng):
        """Draws a world around the normal one. Every factor takes its numbers, so that one alone is as in all at once."""
        m, normal, cameras = self.model, self.normal, self.cameras.values()
        draw = {name: rng.uniform(-1, 1, 32) * self.randomize * (name in self.factors) for name in FACTORS}
        for camera in cameras:
            light = RayCamera.LIGHT + FACTORS["light"][0] * draw["light"][:3]
            camera.light = light / np.linalg.norm(light) * np.linalg.norm(RayCamera.LIGHT)
            camera.strength = 1 + FACTORS["light"][1] * draw["light"][3]
        m.geom_rgba[:] = normal.geom_rgba
        m.geom_rgba[m.geom("table").id, :3] += FACTORS["color"][0] * draw["color"][:3]
        m.cam_pos[:] = normal.cam_pos + FACTORS["camera"][0] * draw["camera"][:3 * m.ncam].reshape(-1, 3)
        m.cam_fovy[:] = normal.cam_fovy + FACTORS["camera"][1] * draw["camera"][3 * m.ncam:4 * m.ncam]
        self.pixel_noise = FACTORS["noise"][0] * abs(draw["noise"][0])
        m.geom_friction[:, 0] = normal.geom_friction[:, 0] * (1 + FACTORS["friction"][0] * draw["friction"][0])
        scale, mass = (1 + s * draw["mass"][k:k + self.n_blocks] for k, s in ((0, FACTORS["mass"][1]), (8, FACTORS["mass"][0])))
        geoms, bodies = self.block_geom, self.block_body
        m.geom_size[geoms], m.geom_rbound[geoms] = normal.geom_size[geoms] * scale[:, None], normal.geom_rbound[geoms] * scale
        m.geom_aabb[geoms] = normal.geom_aabb[geoms] * scale[:, None]
        m.body_mass[bodies] = normal.body_mass[bodies] * mass
        m.body_inertia[bodies] = normal.body_inertia[bodies] * (mass * scale ** 2)[:, None]
        m.dof_damping[:] = normal.dof_damping * (1 + FACTORS["damping"][0] * draw["damping"][0])
        servo = 1 + FACTORS["servo"][0] * draw["servo"][:7, None]
        m.actuator_gainprm[:7], m.actuator_biasprm[:7] = normal.actuator_gainprm[:7] * servo, normal.actuator_biasprm[:7] * servo
        self.late = bool(rng.random() < FACTORS["delay"][0] * self.randomize) and "delay" in self.factors
        self.pixels = np.random.default_rng([self.seed, 8])
        mujoco.mj_setConst(m, mujoco.MjData(m))                # what follows from the masses
        for camera in cameras:
            camera.refit()

    def _free_spots(self, rng):
        """Places (n_blocks + n_pads, 2) at least 10 cm apart, 12 cm between pads."""
        while True:
            spots = []
            for i in range(self.n_blocks + self.n_pads):
                for _ in range(50):
                    s = rng.uniform(*AREA)
                    gap = [0.12 if i >= self.n_blocks and j >= self.n_blocks else 0.10 for j in range(i)]
                    if all(np.hypot(*(s - t)) > g for t, g in zip(spots, gap)):
                        spots.append(s)
                        break
                else:
                    break                                      # cornered: start again
            else:
                return np.array(spots)

    # -- requests: (task, slots), e.g. ("push", dict(block="red", direction="left"))
    def resolve(self, slots):
        """What the words mean in this scene: indices of blocks and pads, a unit vector (2,) for a direction. These are the
        arguments of a Task's methods. Raises ValueError, in one sentence, for a colour that is not there."""
        found = dict(slots)
        blocks, pads = (self.block_colors, "block"), (self.pad_colors, "pad")
        for slot, (colors, kind) in dict(block=blocks, lower=blocks, pad=pads).items():
            if slot in slots:
                if slots[slot] not in colors:
                    raise ValueError(f"there is no {slots[slot]} {kind} in this scene (seed {self.seed}); it has "
                                     f"{', '.join(self.block_colors)} blocks and {', '.join(self.pad_colors)} pads")
                found[slot] = colors.index(slots[slot])
        if "direction" in slots:
            found["direction"] = np.array(DIRECTIONS[slots["direction"]], float)
        return found

    def requests(self, task):
        """All slots of the task that this scene has words for."""
        if task not in self.askable:
            words = SLOTS | dict(block=self.block_colors, lower=self.block_colors, pad=self.pad_colors)
            self.askable[task] = slots_of(task, words)
        return self.askable[task]

    def can_ask(self, task, slots):
        """Whether it can be done from here and is not done yet."""
        return TASKS[task].possible(self, **self.resolve(slots))

    def draw_request(self, rng, tasks=None, combo=False, avoid=None, only={}):
        """A (task, slots) that could be asked for now, other than `avoid`, the task drawn first; None if there is none.
        combo: True for held-out combinations alone, False for the others, None for either. only: slots that it must have."""
        tasks = tasks or self.tasks
        for i in rng.permutation(len(tasks)):
            choice = self.requests(tasks[i])
            for j in rng.permutation(len(choice)):
                request = tasks[i], choice[j]
                fits = request != avoid and only.items() <= choice[j].items() and combo in (None, is_held_out(*request))
                if fits and self.can_ask(*request):
                    return request

    def things(self, slots):
        """Indices (2,) among blocks, pads and the handle: what is to be moved, and what it is to be moved to (-1: nothing)."""
        which = self.resolve(slots)
        return (which.get("block", self.handle), self.n_blocks + which["pad"] if "pad" in which else which.get("lower", -1))

    def set_instruction(self, text, task=None):
        """The sentence to be obeyed from now on; restarts the clock. Raises ValueError, in one sentence, for one that cannot be."""
        found = parse_instruction(text)
        if task not in (None, found[0]):
            raise ValueError(f"{text!r} asks for {found[0]}, not for {task}")
        self.set_request(found, text)

    def set_request(self, request, text):
        """The same with the meaning known: (task, slots)."""
        which = self.resolve(request[1])
        self.request, self.instruction, self.which, self.thing = request, text, which, self.things(request[1])[0]
        (self.task, self.slots), self.steps, self.done_steps, self.touched = request, 0, 0, None
        self.origin, self.lifted[:], self.meddled = self.block_pos[:, :2].copy(), False, set()
        self.waiting = self.block_pos[:, 2] > self.half + 0.01           # in the air: its story starts when it is put down
        self.already = set().union(*self.touching)             # what is in the hand when the sentence comes

    # -- stepping
    def step(self, action):
        """One control step (50 ms). Returns obs, reward, terminated, truncated, info; info["success"] is strict.

        The guard clips the action to [-1, 1], the hand's speed, its place to WORKSPACE and the joints to their ranges
        less a margin, and backs off where a block is pressed too hard; info["guard"] counts each."""
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers in [-1, 1], got {action!r}")
        if self.late:
            action, self.delayed = self.delayed, action
        safe, counts = action, self.guarded
        if self.guard:
            safe = action.clip(-1, 1)
            counts["action"] += int((safe != action).any())
        motion = safe[:3] * ACTION_SCALE
        if self.guard and (speed := np.linalg.norm(motion) * CONTROL_HZ) > SPEED_LIMIT:
            motion, counts["speed"] = motion * SPEED_LIMIT / speed, counts["speed"] + 1
        target = wanted = self.command + motion
        if self.guard:
            if self.last_force > FORCE_LIMIT:
                wanted, counts["force"] = self.ee_pos + [0, 0, 0.01], counts["force"] + 1
            target = wanted.clip(*WORKSPACE)
            counts["box"] += int((target != wanted).any())
        self.command = self.ee_pos + (target - self.ee_pos).clip(-LEASH, LEASH)
        before = self.q_command
        self._solve_ik(self.command)
        self.data.ctrl[self.grip] = GRIPPER_OPEN if safe[3] > 0 else 0.0
        forces = np.zeros_like(self.data.sensordata)
        for joints in before + RAMP * (self.q_command - before):         # a jump of the servos would shake the block loose
            self.data.ctrl[:7] = joints
            mujoco.mj_step(self.model, self.data, SUBSTEPS // len(RAMP))
            np.maximum(forces, self.data.sensordata, out=forces)
        self.last_force = float(forces[::3].max())             # the normal ones, at any contact of a block
        self.force = max(self.force, self.last_force)
        self.steps += 1
        self._refresh()
        self.done_steps = self.done_steps + 1 if TASKS[self.task].success(self, **self.which) else 0
        info = self._info()
        return self.observe(), self._reward(info["success"]), info["success"], self.steps >= MAX_STEPS, info

    def _solve_ik(self, target):
        """One damped least-squares step of the commanded joints towards the hand at `target`, pointing down."""
        d = self.arm
        d.qpos[self.arm_qadr] = self.q_command
        mujoco.mj_kinematics(self.arm_model, d)
        mujoco.mj_comPos(self.arm_model, d)
        jac = np.zeros((6, self.arm_model.nv))
        mujoco.mj_jacSite(self.arm_model, d, jac[:3], jac[3:], self.arm_hand)
        jac = jac[:, :7]
        (_, xy, xz), (yx, _, yz), (zx, zy, _) = d.site_xmat[self.arm_hand].reshape(3, 3).T.tolist()
        turn = 0.5 * (yz - zy), 0.5 * (xz + zx), -0.5 * (xy + yx)     # rad, to x, y, z = (1,0,0), (0,-1,0), (0,0,-1)
        error = np.concatenate([target - d.site_xpos[self.arm_hand], turn])
        home = 0.05 * (HOME - self.q_command)                  # redundancy: drift back to a comfortable elbow
        dual = np.linalg.solve(jac @ jac.T + DAMPING, error - jac @ home)
        q = self.q_command + jac.T @ dual + home
        margin = JOINT_MARGIN if self.guard else 0.0
        self.q_command = q.clip(self.limits[:, 0] + margin, self.limits[:, 1] - margin)
        self.guarded["joint"] += int(self.guard and (q != self.q_command).any())

    def _refresh(self, moved=True):
        """Brings what the rest reads up to date with the state: poses, hand velocity, contacts."""
        m, d = self.model, self.data
        mujoco.mj_kinematics(m, d)
        mujoco.mj_camlight(m, d)
        before = self.ee_pos if moved else d.site_xpos[self.hand]
        self.ee_vel = (d.site_xpos[self.hand] - before) * CONTROL_HZ
        self.ee_pos = d.site_xpos[self.hand].copy()
        self.opening = d.qpos[self.fadr] + d.qpos[self.fadr + 1]
        self.drawer = d.qpos[self.dadr]                        # m, 0 is shut
        self.block_pos = d.xpos[self.block_body]
        self.pad_pos = d.xpos[self.pad_body]
        self.thing_pos = np.concatenate([self.block_pos, self.pad_pos, [HANDLE + [self.drawer, 0, 0]]])
        self.touching = [set(), set()]                         # things at the left and the right finger
        for a, b in d.contact.geom.tolist():
            for side, finger in enumerate(self.fingers):
                if finger in (a, b) and (other := b if a == finger else a) in self.thing_of:
                    self.touching[side].add(self.thing_of[other])
        both = self.touching[0] & self.touching[1] if self.opening > 0.012 else set()
        if self.handle in self.touching[0] | self.touching[1] and 0.018 < self.opening < 0.03:
            both.add(self.handle)                              # it does not give way: one finger may just be off it
        self.grasped = min(both, key=lambda i: np.linalg.norm(self.thing_pos[i] - self.ee_pos)) if both else None
        # the thing between the fingers (its index), and the same if it is a block
        self.held = self.grasped if self.grasped != self.handle else None
        high = self.block_pos[:, 2] > self.half + 0.01
        self.lifted |= high & ~self.waiting                    # since the sentence came
        for i in np.flatnonzero(self.waiting & ~high):
            if i != self.held:
                self.origin[i], self.waiting[i] = self.block_pos[i, :2], False
        if moved:
            now = set().union(*self.touching)
            self.already &= now
            new = [i for i in now - self.already if i < self.n_blocks]
            self.meddled.update(new)                           # blocks touched since the sentence came
            if self.touched is None and new:
                self.touched = self.block_colors[min(new)]

    def at_rest(self, block):
        """Whether it lies or stands still, released, and the hand has withdrawn upwards."""
        v = self.block_vadr[block]
        return bool(np.abs(self.data.qvel[v:v + 3]).max() < 0.02 and self.held != block and self.opening > 0.055
                    and self.ee_pos[2] > self.block_pos[block, 2] + 0.06)

    def _reward(self, success):
        """Shaped, in [0, 1]: reaching up to 0.2, holding 0.2, distance to the target up to 0.4; 1 on success."""
        if success:
            return 1.0
        at = self.thing_pos[self.thing]
        near, there = (1 - np.tanh(5 * np.linalg.norm(at - goal)) for goal in (self.ee_pos, self.target()))
        return float(0.2 * near + 0.2 * (self.grasped == self.thing) + 0.4 * there)

    def _info(self):
        return dict(instruction=self.instruction, task=self.task, success=self.done_steps >= SUCCESS_STEPS, touched=self.touched,
                    violations=sum(self.guarded.values()), guard=dict(self.guarded), force=self.force,
                    diverged=bool(self.data.warning.number.any()), **self.slots)

    def target(self, request=None):
        """Where the thing should go (3,) m, for the instructed (task, slots) or another."""
        task, which = (self.task, self.which) if request is None else (request[0], self.resolve(request[1]))
        return TASKS[task].target(self, **which)

    def observe(self):
        """The observation dict of this instant; see the class."""
        d = self.data
        obs = {f"{name}_image": camera.render(d) for name, camera in self.cameras.items()}
        if self.randomize and self.pixel_noise:
            for name, image in obs.items():
                noise = self.pixels.normal(0, self.pixel_noise, image.shape)
                obs[name] = (image + noise).clip(0, 255).astype(np.uint8)
        state = dict(joint_pos=d.qpos[self.qadr], ee_pos=self.ee_pos, ee_vel=self.ee_vel, gripper=[self.opening],
                     object_pos=self.thing_pos[self.thing], target_pos=self.target())
        return obs | {k: np.array(v, np.float32) for k, v in state.items()}


# ----------------------------------------------------------------------------- the expert's movements
TRAVEL = 0.115                         # m, height of the hand when moving sideways


def expert(env, request=None):
    """The scripted expert's action (4,) float32 for the instruction, or for another (task, slots): a memoryless function of
    the privileged state. Each Task draws the table of its phases; these movements are what they are made of."""
    task, which = (env.task, env.which) if request is None else (request[0], env.resolve(request[1]))
    return TASKS[task].expert(env, **which)


def act(motion, gripper):
    """Speed-limited action towards `motion` (3,) m; gripper 1 opens, -1 closes."""
    a = 0.6 * np.asarray(motion) / ACTION_SCALE
    a[:2] /= max(1.0, np.hypot(*a[:2]))
    return np.array([*a[:2], min(max(a[2], -0.8), 0.8), gripper], np.float32)


def funnel(across, near, slope):
    """How much higher than at its goal, in m, the hand should be `across` (2,) m from it: not at all within `near` m, and by
    `slope` times the distance beyond."""
    return slope * max(np.hypot(*across) - near, 0)


def approach(hand, across, low, above):
    """Motion (3,) in m that goes `across` (2,) m at TRAVEL height and down to `low` m, for the time being `above` m higher."""
    height = min(low + above, max(TRAVEL, low))
    if np.hypot(*across) > 0.03:                               # first rise, then travel
        across = across * min(max((hand[2] - 0.06) / 0.05, 0), 1)
    return [*across, height - hand[2]]


def let_go(env, at=0.0):
    """Lets go of a thing at height `at` m and rises straight up, 4.5 cm farther than at_rest wants: towards its end the motion
    gets slower, and a policy comes to rest before the expert does."""
    return act([0, 0, max(TRAVEL, at + 0.105) - env.ee_pos[2]], 1)


def grasp(env, thing, near=0.012, slope=4):
    """Opens, moves over the thing, descends in a funnel, closes."""
    hand, at = env.ee_pos, env.thing_pos[thing]
    across = (at - hand)[:2]
    if np.hypot(*across) < near + 0.004 and hand[2] < at[2] + 0.015 and env.ee_vel[2] > -0.2:
        return act([0, 0, at[2] + 0.009 - hand[2]], -1)
    low = at[2] + 0.009 if env.opening > 0.055 else TRAVEL
    return act(approach(hand, across, low, funnel(across, near, slope)), 1)


def carry(env, spot, height, above):
    """Brings the block in the hand over `spot` (2,) m and its centre down to `height` m, for the time being `above` m higher."""
    load = env.block_pos[env.held]
    x, y, z = approach(env.ee_pos, spot - load[:2], height - 0.003 + env.ee_pos[2] - load[2], above)
    return act([x, y, z if z > 0 else 0.5 * z], -1)            # set down gently


ROOM = 0.075                           # m between the middles of things, so that the fingers have room to open
PUT_DOWN = AREA + [[-0.03, 0], [0.03, 0.03]]                   # m, where a wrong block is put down (x, y)
SPOTS = np.stack(np.meshgrid(*(np.arange(*ends, 0.02) for ends in PUT_DOWN.T)), -1).reshape(-1, 2)


def put_away(env, goal=None):
    """Puts the block in the hand, which is not wanted there, down where it is, or where there is no room, on the nearest of
    SPOTS that is ROOM and 1 cm away from the other blocks and from `goal` (3,), the place that another one should have.

    It is set down wherever there is ROOM, not on that spot alone: which of many it is, a policy cannot see exactly."""
    load, rest = env.block_pos[env.held], env.half[env.held]
    others = np.array([*env.block_pos[env.others[env.held]], *([] if goal is None else [goal])]).reshape(-1, 3)[:, :2]
    room = lambda at: np.linalg.norm(at[..., None, :] - others, axis=-1).min(-1, initial=1.0)
    away = np.linalg.norm(SPOTS - load[:2], axis=1)
    spot = SPOTS[(away + 10 * np.maximum(ROOM + 0.01 - room(SPOTS), 0)).argmin()]
    inside = (PUT_DOWN[0] < load[:2]).all() and (load[:2] < PUT_DOWN[1]).all()
    above = min(funnel(spot - load[:2], 0.016, 4), 4 * max(ROOM - room(load[:2]), 0) if inside else 1.0)
    if above < 0.01 and load[2] < rest + 0.004:
        return let_go(env, load[2])
    return carry(env, spot if above else load[:2], rest, above)


def bring(env, block, goal, there, near=0.016):
    """Grasps the block, brings it until its centre is at `goal` (3,) m and, once it is `there`, lets go.

    near: m from the goal within which it is lowered all the way, as wide as the task allows. Where a pad is hidden under the
    load, a policy is a centimetre uncertain, and in a narrow funnel it hovers at the height that belongs to its usual error."""
    if there:
        return let_go(env, env.block_pos[block, 2])
    if env.held not in (None, block):
        return put_away(env, goal)
    if env.held is None:
        return grasp(env, block)
    return carry(env, goal[:2], goal[2], funnel((goal - env.block_pos[block])[:2], near, 4))


def graspable(env, block):
    """Whether the block is within reach, nothing is on it and the fingers have room around it."""
    at, others = env.block_pos[block], env.block_pos[env.others[block]]
    near = np.hypot(others[:, 0] - at[0], others[:, 1] - at[1]) < 0.07
    return bool(abs(at[0] - 0.5) < 0.2 and abs(at[1] - 0.05) < 0.26 and not (near & (others[:, 2] > at[2] - 0.03)).any())


# ----------------------------------------------------------------------------- the tasks
class Task:
    """One kind of request. Its methods get the scene and the meaning of its slots by name (Env.resolve): indices of blocks
    and pads, a unit vector for a direction.

    slots: names from SLOTS. sentences: patterns with those slots in braces, the last two held out from demonstrations.
    setup(env, rng): changes a new scene, in env.model and env.data, if the task needs it. possible(env, ..): can it be asked for now?
    target(env, ..): where the thing should go (3,) m. success(env, ..): is it done, this instant? expert(env, ..): (4,)."""
    slots = sentences = ()

    def setup(self, env, rng):
        pass


class PickPlace(Task):
    """| what the expert sees                      | what it does                                     |
    | the block rests on its pad                   | lets go                                          |
    | another block between the fingers            | puts it away, where it is if there is room       |
    | the right block between the fingers          | carries it to the pad                            |
    | anything else                                | grasps the block                                 |"""
    slots = ("block", "pad")
    sentences = (
        "pick up the {block} block and place it at the {pad} target",
        "grasp the {block} cube and move it to the {pad} target location",
        "move the {block} object to the {pad} marker",
        "grab the {block} cube and place it at the {pad} goal",
        "lift the {block} block then set it on the {pad} target",
        "pick up the {block} object and transport it to the {pad} target zone",
        "grasp and relocate the {block} block to the {pad} spot",
        "put the {block} cube down on the {pad} marker",
        "pick the {block} block and put it on the {pad} target",
        "grab the {block} object and set it down at the {pad} spot")

    def possible(self, env, block, pad):
        return graspable(env, block) and not (np.hypot(*(env.block_pos - env.pad_pos[pad]).T[:2]) < 0.07).any()

    def target(self, env, block, pad):
        return env.pad_pos[pad]

    def success(self, env, block, pad):
        """Rests within 3 cm of the pad's centre."""
        at = env.block_pos[block]
        return bool(np.hypot(*(at - env.pad_pos[pad])[:2]) < 0.03 and abs(at[2] - env.half[block]) < 0.005 and env.at_rest(block))

    def expert(self, env, block, pad):
        at, goal = env.block_pos[block], env.pad_pos[pad] + [0, 0, env.half[block]]
        return bring(env, block, goal, np.hypot(*(at - goal)[:2]) < 0.02 and at[2] < goal[2] + 0.004)


class Lift(Task):
    """| another block between the fingers          | puts it away                                     |
    | the right block between the fingers          | rises                                            |
    | anything else                                | grasps the block                                 |"""
    slots = ("block",)
    sentences = (
        "pick up the {block} block",
        "lift the {block} cube",
        "raise the {block} block",
        "grab the {block} object and hold it up",
        "take the {block} cube off the table",
        "lift up the {block} object",
        "hold the {block} block in the air",
        "grasp the {block} cube and raise it",
        "grab the {block} block and lift it",
        "raise the {block} object off the table")
    HEIGHT = 0.10                                              # m, under the block

    def possible(self, env, block):
        return graspable(env, block) and env.block_pos[block, 2] < env.half[block] + self.HEIGHT

    def target(self, env, block):
        return np.array([*env.block_pos[block, :2], 0.17])

    def success(self, env, block):
        """In the gripper, 10 cm above the table, no other block touched."""
        return bool(env.held == block and env.block_pos[block, 2] - env.half[block] > self.HEIGHT and env.meddled <= {block})

    def expert(self, env, block):
        if env.held == block:
            return act([0, 0, 0.17 - env.block_pos[block, 2]], -1)
        return grasp(env, block) if env.held is None else put_away(env)


class Push(Task):
    """| a block between the fingers                | puts it away                                     |
    | the block right ahead of the lowered hand    | pushes on, slowly, keeping behind its middle     |
    | anything else                                | closes the fingers, goes behind the block        |"""
    slots = ("block", "direction")
    sentences = (
        "push the {block} block {towards}",
        "slide the {block} cube {direction}",
        "shove the {block} object {towards}",
        "push the {block} cube {direction}",
        "nudge the {block} block {towards}",
        "move the {block} block {direction} without lifting it",
        "slide the {block} object {towards} on the table",
        "push against the {block} cube to move it {direction}",
        "slide the {block} block {towards}",
        "shove the {block} cube {direction} without lifting it")
    BEHIND, HEIGHT, SPEED = 0.055, 0.022, 0.009                # m, m, m per control step

    def possible(self, env, block, direction):
        at, start = env.block_pos[block], env.block_pos[block, :2] - self.BEHIND * direction
        end = at[:2] + 0.14 * direction
        others = env.block_pos[env.others[block], :2] - at[:2]
        along, across = others @ direction, np.abs(others @ direction[::-1])
        return bool(at[2] < env.half[block] + 0.01 and graspable(env, block)
                    and (end > (0.31, -0.19)).all() and (end < (0.71, 0.29)).all()
                    and (start > (0.31, -0.24)).all() and (start < (0.70, 0.30)).all()
                    and not ((along > -0.13) & (along < 0.22) & (across < 0.075)).any())

    def target(self, env, block, direction):
        """Always ahead of it: where it came from cannot be seen."""
        return env.block_pos[block] + 0.1 * np.array([*direction, 0])

    def success(self, env, block, direction):
        """Moved 8 cm that way since the sentence, at most 4 cm sideways, never lifted."""
        moved = env.block_pos[block, :2] - env.origin[block]
        return bool(moved @ direction >= 0.08 and abs(moved @ direction[::-1]) <= 0.04
                    and not env.lifted[block] and not env.waiting[block])

    def expert(self, env, block, direction):
        if env.held is not None:
            return put_away(env)
        hand, at = env.ee_pos, env.block_pos[block]
        ahead = (at - hand)[:2] @ direction
        aside = (at - hand)[:2] - ahead * direction
        if hand[2] < 0.05 and 0.02 < ahead < 0.085 and np.hypot(*aside) < (0.02 if ahead < 0.045 else 0.01) and env.opening < 0.03:
            return act([*(self.SPEED / 0.6 * direction + aside), self.HEIGHT - hand[2]], -1)
        across, shut = (at - hand)[:2] - self.BEHIND * direction, env.opening < 0.03
        motion = approach(hand, across, self.HEIGHT if shut else TRAVEL, funnel(across, 0.008, 6))
        return act(motion, -1 if shut or hand[2] > 0.1 else 1)


class Stack(Task):
    """| the upper block rests on the lower one     | lets go                                          |
    | another block between the fingers            | puts it away                                     |
    | the right block between the fingers          | carries it onto the lower one                    |
    | anything else                                | grasps the upper block                           |"""
    slots = ("block", "lower")
    sentences = (
        "stack the {block} cube on the {lower} cube",
        "put the {block} block on top of the {lower} block",
        "place the {block} cube on the {lower} block",
        "set the {block} object on top of the {lower} cube",
        "pick up the {block} block and stack it on the {lower} block",
        "build a tower with the {block} cube on the {lower} cube",
        "lift the {block} cube onto the {lower} object",
        "balance the {block} block on the {lower} block",
        "grab the {block} cube and put it on top of the {lower} block",
        "stack the {block} object onto the {lower} cube")

    def gap(self, env, block, lower):
        """Distance sideways and in height, m, from where the upper block belongs."""
        at, base = env.block_pos[block], env.block_pos[lower]
        return np.hypot(*(at - base)[:2]), abs(at[2] - base[2] - env.half[block] - env.half[lower])

    def possible(self, env, block, lower):
        return bool(block != lower and graspable(env, block) and graspable(env, lower) and env.held != lower
                    and env.block_pos[lower, 2] < env.half[lower] + 0.01)

    def target(self, env, block, lower):
        return env.block_pos[lower] + [0, 0, env.half[block] + env.half[lower]]

    def success(self, env, block, lower):
        """Rests on the lower block."""
        across, height = self.gap(env, block, lower)
        return bool(across < 0.022 and height < 0.006 and env.at_rest(block))

    def expert(self, env, block, lower):
        across, height = self.gap(env, block, lower)
        calm = env.held is None or np.linalg.norm(env.ee_vel) < 0.1      # it is not let go while it still swings
        return bring(env, block, self.target(env, block, lower), across < 0.015 and height < 0.004 and calm, near=0.012)


class Drawer(Task):
    """| the drawer is as it should be              | lets go                                          |
    | a block between the fingers                  | puts it away                                     |
    | the handle between the fingers               | draws or pushes it                               |
    | anything else                                | grasps the handle                                |"""
    slots = ("way",)
    sentences = (
        "{way} the drawer",
        "{pull} the drawer {opened}",
        "{way} the cabinet",
        "{pull} the handle until the drawer is {opened}",
        "grasp the handle and {way} the drawer",
        "take the handle and {pull} it until the drawer is {opened}",
        "move the drawer until it is {opened}",
        "{way} the drawer of the cabinet",
        "grasp the handle and {pull} the drawer {opened}",
        "{pull} the cabinet {opened}")

    def possible(self, env, way):
        return bool(env.drawer < 0.07 if way == "open" else env.drawer > 0.05)

    def target(self, env, way):
        return HANDLE + [0.12 if way == "open" else 0, 0, 0]

    def success(self, env, way):
        """Open at least 10 cm, or shut within 1 cm."""
        return bool(env.drawer >= 0.10 if way == "open" else env.drawer <= 0.01)

    def expert(self, env, way):
        if env.drawer > 0.115 if way == "open" else env.drawer < 0.005:
            return let_go(env)
        if env.held is not None:
            return put_away(env)
        if env.grasped == env.handle:
            goal = DRAWER if way == "open" else -0.01
            return act([goal - env.drawer, HANDLE[1] - env.ee_pos[1], HANDLE[2] - env.ee_pos[2]], -1)
        return grasp(env, env.handle, 0.008, 6)


TASKS = dict(pick_place=PickPlace(), lift=Lift(), push=Push(), stack=Stack(), drawer=Drawer())


def task_list(text):
    """["pick_place", "lift"] of "pick_place,lift" or "all". Raises ValueError naming what is allowed."""
    names = list(TASKS) if text == "all" else text.split(",")
    if wrong := [n for n in names if n not in TASKS]:
        raise ValueError(f"{wrong[0]!r} is not one of {', '.join(TASKS)}, nor all")
    return names


# ----------------------------------------------------------------------------- demonstrations
NOISE = 0.12                           # standard deviation of the white noise on the executed motion
PUSH = 0.03                            # probability a step of a push: 3 to 7 steps of a random direction at 0.8
DROP = 0.004                           # probability a step of the gripper doing the opposite for 3 steps
INTERRUPT = 0.6                        # share of sentences that are interrupted by another, after 4 to 59 steps
SENTENCES = 3                          # at most, per scene


def demonstrate(env, seed, noise=1.0):
    """Plays one scene; returns ([episode, ...], {reason: dropped}). An episode is one sentence, from the moment it
    is given until it is done or the next one, of any of the tasks, interrupts it. The expert's action plus noise is executed
    and the clean action recorded, so that recovery is in the data (DART, arXiv:1703.09327). noise: share of NOISE, PUSH, DROP."""
    rng = np.random.default_rng([seed, 1])
    obs, info = env.reset(seed)
    episodes, dropped = [], {}
    push, push_left, drop_left = np.zeros(3), 0, 0
    number = {(task, *slots.values()): i for i, (task, slots) in enumerate(all_requests(env.tasks))}
    for part in range(SENTENCES):
        until = rng.integers(4, 60) if rng.random() < INTERRUPT else MAX_STEPS
        frames = []
        while True:
            action = expert(env)
            other = env.draw_request(rng, avoid=env.request) or env.request
            things = env.things(other[1])
            row = dict(obs, actions=action, things_pos=env.thing_pos.astype(np.float32), other_action=expert(env, other),
                       other=np.uint16(number[other[0], *other[1].values()]), other_things=np.array(things, np.int8),
                       other_goal=np.concatenate([env.thing_pos[things[0]], env.target(other)], dtype=np.float32))
            for name, camera in env.cameras.items():
                row[f"{name}_uv"] = seen_at(env, camera)
            noisy = action.astype(np.float64)
            noisy[:3] += noise * rng.normal(0, NOISE, 3)
            if push_left == 0 and rng.random() < noise * PUSH:
                push, push_left = rng.normal(size=3), rng.integers(3, 8)
                push *= 0.8 / np.linalg.norm(push)
            if push_left:
                noisy[:3] += push
                push_left -= 1
            if drop_left == 0 and rng.random() < noise * DROP:
                drop_left = 3
            if drop_left:
                noisy[3] = -noisy[3]
                drop_left -= 1
            obs, reward, success, truncated, info = env.step(noisy.clip(-1, 1))
            frames.append(row | dict(rewards=np.float32(reward), dones=np.uint8(success)))
            if success or truncated or info["diverged"] or len(frames) >= until:
                break
        reason = "diverged" if info["diverged"] else f"{env.task} not done in time" if truncated and not success else None
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            arrays = {k: np.stack([f[k] for f in frames]) for k in frames[0]}
            attrs = dict(instruction=env.instruction, task=env.task, num_samples=len(frames), success=bool(success),
                         interrupted=not success, scene_seed=seed, sentence=part,
                         block_colors=",".join(env.block_colors), pad_colors=",".join(env.pad_colors),
                         slots=json.dumps(env.slots), request=number[env.task, *env.slots.values()], things=env.things(env.slots))
            episodes.append((attrs, arrays))
        request = env.draw_request(rng, avoid=env.request)
        if info["diverged"] or truncated or until == MAX_STEPS or not request:
            break
        env.set_request(request, make_instruction(*request, rng))
        obs = env.observe()
    return episodes, dropped


def seen_at(env, camera):
    """(things, 2) float32: where each block, each pad and the handle is in the picture just rendered, 0..1 (x right,
    y down), -1 where fewer than 3 pixels of it show. The labels of train.py's grounding loss."""
    uv = camera.project(env.data, env.thing_pos)
    pixels = np.bincount(camera.hits, minlength=env.model.ngeom)
    shows = (pixels[env.thing_geom] >= 3) & (np.abs(uv - 0.5) < 0.5).all(1)
    return np.where(shows[:, None], uv, -1).astype(np.float32)


# ----------------------------------------------------------------------------- the data file
SCHEMA = "picovla-2"
CHUNK = 8                              # frames per compressed chunk of a camera's pictures
SPARE = 20_000_000                     # bytes left free on the disk, so that the file can be closed in order


def start_worker(kwargs, noise):
    global worker_env, worker_noise
    if parent := mp.parent_process():                          # a worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is the main process's to handle
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()     # and its death is ours
    worker_env, worker_noise = Env(**kwargs), noise


def play_scene(seed, env=None):
    """demonstrate() in a worker, the pictures already compressed as the file's chunks will hold them."""
    episodes, dropped = demonstrate(env, seed) if env else demonstrate(worker_env, seed, worker_noise)
    for _, arrays in episodes:
        for key in [k for k in arrays if k.endswith("_image")]:
            images = arrays[key]
            pad = np.zeros((-len(images) % CHUNK, *images.shape[1:]), np.uint8)
            padded = np.concatenate([images, pad])
            arrays[key] = [zlib.compress(padded[i:i + CHUNK].tobytes(), 1) for i in range(0, len(padded), CHUNK)]
    return episodes, dropped


def write_episode(file, index, attrs, arrays):
    """Appends one episode.

    attrs: schema, total, seed, tasks, all_tasks (what `--tasks all` would have been), control_hz, requests (JSON
        [{task, slots, sentences}, ..]: all that can be asked for, each with its wordings), env_args (JSON, with the
        cameras), versions, git_commit, settings, scenes_done, dropped (JSON), complete (written last)
    episode_0/                           T control steps
        attrs: instruction, task, num_samples, success, interrupted, scene_seed, sentence (0, 1, 2: how many came
            before it in this scene), block_colors, pad_colors ("red,blue,.."), slots (JSON), request (index in
            requests), things (2,) (index among the things, blocks then pads then the handle: of what is to be moved, and
            of what it is to be moved to, -1 if that is no thing)
        observations/
            front_image, wrist_image     (T, 64, 64, 3) u1, one per camera
            joint_pos (T, 7) f4 rad      ee_pos (T, 3) f4 m      ee_vel (T, 3) f4 m/s      gripper (T, 1) f4 m
            object_pos (T, 3) f4 m       target_pos (T, 3) f4 m
        grounding/
            front_uv, wrist_uv           (T, things, 2) f4, 0..1 in the picture, -1 where not visible
            things_pos                   (T, things, 3) f4 m
            other (T,) u2                another request that could have been made at this moment, its
            other_things (T, 2) i1       things, its
            other_goal (T, 6) f4 m       object_pos and target_pos,
            other_action (T, 4) f4       and what the expert would have done then
        actions (T, 4) f4    rewards (T,) f4    dones (T,) u1
        obs -> observations
    data/demo_0 -> episode_0             robomimic's view; mask/train, mask/valid list the demos, split by scene
    """
    group = file.create_group(f"episode_{index}")
    for key, value in arrays.items():
        if key.endswith("_image"):
            data = group.create_dataset(f"observations/{key}", (attrs["num_samples"], IMAGE_SIZE, IMAGE_SIZE, 3), "u1",
                                        chunks=(CHUNK, IMAGE_SIZE, IMAGE_SIZE, 3), maxshape=(None, IMAGE_SIZE, IMAGE_SIZE, 3),
                                        compression="gzip", compression_opts=1)
            for i, chunk in enumerate(value):
                data.id.write_direct_chunk((i * CHUNK, 0, 0, 0), chunk)
        elif key in ("actions", "rewards", "dones"):
            group[key] = value
        else:
            side = key.endswith("_uv") or key == "things_pos" or key.startswith("other")
            group[("grounding/" if side else "observations/") + key] = value
    group["obs"] = h5py.SoftLink(f"/episode_{index}/observations")
    file[f"data/demo_{index}"] = h5py.SoftLink(f"/episode_{index}")
    group.attrs.update(attrs)


def fail(message, status=2):
    print(f"gen_data.py: {message}", file=sys.stderr)
    sys.exit(status)


def generate(out, episodes, seed, shard, kwargs, noise, workers):
    """Writes `episodes` demonstrations to `out`, of scenes of the part `shard` (i, n) of the seed's; returns nothing. A killed
    run is carried on by the next."""
    part = out.with_name(out.name + ".part")
    settings, tasks = json.dumps(dict(kwargs, seed=seed, shard=shard, noise=noise, schema=SCHEMA), sort_keys=True), kwargs["tasks"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = h5py.File(part, "a")
        begun_with = file.attrs.get("settings", settings)
        written, scene = int(file.attrs.get("total", 0)), int(file.attrs.get("scenes_done", 0))
        dropped = json.loads(file.attrs.get("dropped", "{}"))
        for i in range(written, written + SENTENCES):          # cut off in the middle of a scene
            for path in (f"episode_{i}", f"data/demo_{i}"):
                if file.get(path, getlink=True) is not None:
                    del file[path]
        file.attrs["settings"] = begun_with
        file.flush()                                           # from here on a killed run can be carried on
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        fail(f"cannot write {part} ({str(error).splitlines()[0]}); is another run writing it? If not, delete it or choose "
             "another --out")
    if begun_with != settings:
        fail(f"{part} was begun with other settings ({begun_with}); finish it with those or delete it")
    if written > episodes:
        fail(f"{part} holds {written} episodes already; ask for at least as many, or delete it")
    if written:
        print(f"carrying on from {written} episodes in {part}")
    start, begun, frames = time.time(), written, 0
    scenes = range(DEMO_SEED + 100_000 * seed, DEMO_SEED + 100_000 * (seed + 1))
    scenes = scenes[len(scenes) * (shard[0] - 1) // shard[1]:len(scenes) * shard[0] // shard[1]]

    def seeds_done(pool):
        """Scenes in order, a few in flight per worker: the file's content does not depend on their number."""
        todo = iter(scenes[scene:])
        if pool is None:
            start_worker(kwargs, noise)
            yield from map(play_scene, todo)
            return
        waiting = [pool.submit(play_scene, seed) for seed in itertools.islice(todo, 4 * workers)]
        signal.signal(signal.SIGINT, stop)
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(play_scene, seed) for seed in itertools.islice(todo, 1)]

    stopped = []                                               # Ctrl-C is heeded between scenes: the file stays whole
    stop = lambda *_: stopped.append(True)
    signal.signal(signal.SIGINT, stop if workers == 1 else signal.SIG_IGN)     # workers inherit it as they start
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), initializer=start_worker, initargs=(kwargs, noise))
    bar = tqdm(total=episodes, initial=written, unit="episode", disable=not sys.stderr.isatty(), smoothing=0.05)
    try:
        for found, lost in seeds_done(pool) if written < episodes else ():
            for attrs, arrays in found[:episodes - written]:
                write_episode(file, written, attrs, arrays)
                written, frames = written + 1, frames + attrs["num_samples"]
                bar.update()
            scene += 1
            dropped = {k: dropped.get(k, 0) + lost.get(k, 0) for k in {**dropped, **lost}}
            file.attrs.update(total=written, scenes_done=scene, dropped=json.dumps(dropped, sort_keys=True))
            file.flush()
            if shutil.disk_usage(part.parent).free < SPARE:
                file.close()
                fail(f"stopped with {written} episodes in {part}: the disk is full but for {SPARE / 1e6:.0f} MB; make room, and the same "
                     "command carries on from there", 1)
            if written == episodes or stopped:
                break
    except BrokenProcessPool as error:
        fail(f"stopped with {written} episodes in {part} ({error}); the same command carries on from there", 1)
    except (OSError, RuntimeError) as error:                   # after which HDF5 can neither go on nor end in order
        print(f"gen_data.py: cannot write {part} any more ({str(error).splitlines()[0]}); if the same command does not carry on "
              "from it, delete it", file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    if written < episodes:
        file.close()
        if not stopped:
            fail(f"shard {shard[0]}/{shard[1]} has {len(scenes)} scenes, enough for the {written} episodes in {part}; ask for fewer shards "
                 "or episodes")
        print(f"stopped with {written} episodes in {part}; the same command carries on from there", file=sys.stderr)
        sys.exit(130)
    seconds = max(time.time() - start, 1e-9)
    drawn = {i: int(file[f"episode_{i}"].attrs["scene_seed"]) for i in range(written)}
    for name, chosen in (("train", lambda s: s % 20), ("valid", lambda s: not s % 20)):
        if f"mask/{name}" in file:
            del file[f"mask/{name}"]
        file[f"mask/{name}"] = np.array([f"demo_{i}" for i, s in drawn.items() if chosen(s)], "S16")
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')
    commit, versions = "unknown" if failed else commit, f"mujoco {mujoco.__version__}, numpy {np.__version__}, h5py {h5py.__version__}"
    finished = sum(bool(file[f"episode_{i}"].attrs["success"]) for i in range(written))
    env_args = json.dumps(dict(env_name="picovla", type=0, env_kwargs=kwargs), sort_keys=True)
    file["data"].attrs.update(total=written, env_args=env_args)
    file.attrs.update(schema=SCHEMA, seed=seed, tasks=",".join(tasks), all_tasks=",".join(TASKS), control_hz=CONTROL_HZ,
                      env_args=env_args, requests=json.dumps([dict(task=task, slots=slots, sentences=[fill(p, slots) for p in patterns(task)])
                                           for task, slots in all_requests(tasks)]),
                      versions=versions, git_commit=commit)
    file.attrs["complete"] = True
    file.close()
    try:
        os.replace(part, out)
    except OSError as error:
        fail(f"cannot name {part} {out} ({error.strerror})", 1)
    lost = sum(dropped.values())
    print(f"{out}: {written} episodes from {scene} scenes, {out.stat().st_size / 1e6:.0f} MB; dropped {lost} "
          f"({', '.join(f'{v} {k}' for k, v in dropped.items()) or 'none'}); of the sentences that were not interrupted the "
          f"expert, under noise, did {finished}/{finished + lost} = {100 * finished / max(finished + lost, 1):.1f}%")
    print(f"this run: {written - begun} episodes, {frames} frames in {seconds:.0f} s: {frames / seconds:.0f} frames/s, "
          f"{(written - begun) / seconds:.1f} episodes/s, {workers} workers; {versions}, commit {commit}")


def info(path):
    """Prints what is in a data file and draws it beside it, in a .png."""
    try:
        with h5py.File(path) as file:
            attrs = {k: file.attrs[k] for k in ("schema", "total", "tasks", "seed", "settings", "versions", "git_commit", "dropped")}
            episodes = [file[f"episode_{i}"] for i in range(attrs["total"])]
            about = [dict(e.attrs) for e in episodes]
            actions = np.concatenate([e["actions"][:] for e in episodes])
            places = np.concatenate([e["grounding/things_pos"][0, :len(a["block_colors"].split(","))] for e, a in zip(episodes, about)])
            cameras = [k for k in episodes[0]["observations"] if k.endswith("_image")]
            first = [np.concatenate([e[f"observations/{k}"][0] for k in cameras], 1) for e in episodes[:24]]
    except (OSError, KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        fail(f"{path} is not a data file of this program ({str(error).splitlines()[0]})")
    for key, value in attrs.items():
        print(f"{key:10} {value}")
    lengths = {task: [a["num_samples"] for a in about if a["task"] == task] for task in attrs["tasks"].split(",")}
    for task, n in lengths.items():
        mine = [a for a in about if a["task"] == task]
        wordings = Counter(a["instruction"] for a in mine)
        print(f"{task:10} {len(n)} episodes, {sum(a['interrupted'] for a in mine)} of them interrupted; {min(n, default=0)} to "
              f"{max(n, default=0)} steps, {np.mean(n or 0):.0f} on average; {len(wordings)} sentences, most often "
              f"{max(wordings, key=wordings.get, default='')!r}")
    for name, column in zip(ACTION_NAMES, actions.T):
        print(f"{name:10} {column.mean():+.2f} ± {column.std():.2f}, at its limit in {100 * np.mean(np.abs(column) >= 1):.0f}% of "
              f"{len(column)} steps")
    for name in ("block_colors", "pad_colors"):
        print(f"{name:12} " + ", ".join(f"{n} {c}" for c, n in Counter(",".join(a[name] for a in about).split(",")).most_common()))

    from matplotlib.figure import Figure                       # no pyplot: draws without a display
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for task, n in lengths.items():
        axes[0, 0].hist(n, np.arange(0, MAX_STEPS + 5, 5), histtype="step", label=f"{task}, {len(n)} episodes")
    axes[0, 0].set_xlabel("control steps in an episode"), axes[0, 0].legend()
    axes[0, 1].hist(actions, np.linspace(-1, 1, 42), histtype="step", label=ACTION_NAMES)
    axes[0, 1].set_xlabel("action"), axes[0, 1].set_yscale("log"), axes[0, 1].legend()
    axes[1, 0].scatter(places[:, 1], places[:, 0], 3, [COLORS[c] for a in about for c in a["block_colors"].split(",")])
    axes[1, 0].set_xlabel("y, m"), axes[1, 0].set_ylabel("x, m"), axes[1, 0].invert_xaxis(), axes[1, 0].set_aspect("equal")
    axes[1, 0].set_title("blocks when a sentence came, seen from above")
    first = [np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in first]
    first += [np.full_like(first[0], 255)] * (-len(first) % 4)
    axes[1, 1].imshow(np.concatenate([np.concatenate(first[i:i + 4], 1) for i in range(0, len(first), 4)]))
    axes[1, 1].set_title("first frames"), axes[1, 1].axis("off")
    try:
        figure.savefig(path.with_suffix(".png"), dpi=80)
    except OSError as error:
        fail(f"cannot write {path.with_suffix('.png')}: {error.strerror}")
    print(path.with_suffix(".png"))


def benchmark(scenes=25):
    """Prints recorded frames/s on one core beside the bare rate: physics and one full ray-cast picture a step."""
    env, recorders = Env(cameras=()), {"front": Env(cameras=["front"]), "front + wrist": Env(cameras=["front", "wrist"])}
    env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR         # the guard's, not physics
    camera, n = RayCamera(env.model, "front"), IMAGE_SIZE ** 2
    buffers = np.empty(n, np.int32), np.empty(n), np.empty(3 * n)
    done = {name: np.zeros(2) for name in ("bare", *recorders)}              # frames, seconds
    for seed in range(DEMO_SEED, DEMO_SEED + scenes):                        # alternately: a machine's speed wanders
        env.reset(seed)
        start = time.perf_counter()
        for _ in range(40):
            for _ in RAMP:
                mujoco.mj_step(env.model, env.data, SUBSTEPS // len(RAMP))
            mujoco.mj_kinematics(env.model, env.data)
            mujoco.mj_camlight(env.model, env.data)
            rays = camera.rays @ env.data.cam_xmat[camera.id].reshape(3, 3).T
            mujoco.mj_multiRay(env.model, env.data, env.data.cam_xpos[camera.id], rays.reshape(-1), None, True, -1,
                               *buffers, n, mujoco.mjMAXVAL)
        done["bare"] += 40, time.perf_counter() - start
        for name, recorder in recorders.items():
            start = time.perf_counter()
            frames = sum(attrs["num_samples"] for attrs, _ in play_scene(seed, recorder)[0])
            done[name] += frames, time.perf_counter() - start
    rates = {name: frames / spent for name, (frames, spent) in done.items()}
    bare = rates.pop("bare")
    print(f"one core, control steps/s: bare physics and one ray-cast picture {bare:.0f}; recorded, compressed, "
          + ", ".join(f"with {name} {rate:.0f} (ratio {rate / bare:.2f})" for name, rate in rates.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                        # one sentence, without the usage
    parser.add_argument("--episodes", type=int, default=3000, help="demonstrations to write (default 3000)")
    parser.add_argument("--out", type=Path, default=Path("data/demos.h5"), help="file to write (default data/demos.h5)")
    parser.add_argument("--seed", type=int, default=0, help="which 100,000 demonstration scenes to draw from (default 0)")
    parser.add_argument("--shard", default="1/1", help="I/N: draw from the I-th of N parts of them, so that N runs, each with an --out of its "
                        "own, make one set; train.py --data 'shards/*.h5' reads it (default 1/1)")
    parser.add_argument("--tasks", default="pick_place", help=f"all, or a comma list of {', '.join(TASKS)} (default pick_place)")
    parser.add_argument("--cameras", default="front,wrist", help=f"comma list of {', '.join(CAMERAS)} (default front,wrist)")
    parser.add_argument("--randomize", type=float, default=0.0, help="0 to 1: how much the world differs from scene to scene (default 0)")
    parser.add_argument("--randomize_only", default=None, choices=tuple(FACTORS), help="let this alone differ (default: everything)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1    # as far as they are ours
    parser.add_argument("--workers", type=int, default=min(cores, 61),
                        help="processes (default: all cores); does not change the data")
    parser.add_argument("--noise", type=float, default=1.0, help="0 to 1: how much noise is executed with the actions (default 1)")
    parser.add_argument("--info", type=Path, default=None, help="only print what is in this data file, and draw it in a .png beside it")
    parser.add_argument("--bench", action="store_true", help="only print the recording rate of one core beside bare physics")
    args = parser.parse_args()
    cameras = args.cameras.split(",")
    if wrong := [n for n in cameras if n not in CAMERAS]:
        fail(f"--cameras {wrong[0]!r} is not one of {', '.join(CAMERAS)}")
    try:
        tasks = task_list(args.tasks)
    except ValueError as error:
        fail(f"--tasks {error}")
    if args.bench or args.info:
        sys.exit(info(args.info) if args.info else benchmark())
    for flag, value, low, high in (("--episodes", args.episodes, 1, 100_000), ("--workers", args.workers, 1, 61),
                                   ("--seed", args.seed, 0, 9999), ("--randomize", args.randomize, 0, 1), ("--noise", args.noise, 0, 1)):
        if not low <= value <= high:
            fail(f"{flag} must be from {low} to {high}, not {value}")
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not shard or not 1 <= int(shard[1]) <= int(shard[2]) <= 1000:
        fail(f"--shard must be I/N, the I-th of up to 1000, such as 3/16, not {args.shard!r}")
    if args.out.exists():
        fail(f"{args.out} exists; delete it or choose another --out")
    if args.randomize_only and not args.randomize:
        fail("--randomize_only says what --randomize 0.1 to 1 is to change; give that too")
    world = dict(tasks=tasks, cameras=cameras)
    if args.randomize:
        world.update(randomize=args.randomize, randomize_only=args.randomize_only)
    generate(args.out, args.episodes, args.seed, [int(i) for i in shard.groups()], world, args.noise, args.workers)
