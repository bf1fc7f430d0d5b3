"""The world and its demonstrations: scene, cameras, sentences, scripted expert, HDF5 writer.

    python gen_data.py --episodes 2000 --out data/demos.h5    # all cores, about 2 minutes on 2 of them
    python gen_data.py --bench                                # frames/s against bare physics + ray casting

A 7-joint arm (Franka Panda link offsets) with a friction gripper stands at a table with coloured blocks and
coloured pads; a sentence says which block belongs on which pad. Needs MuJoCo and no OpenGL: pixels come from
MuJoCo's ray caster. Importing this file does no work.

World frame: origin at the arm's base on the table top, x away from the robot, y to its left, z up; metres.
"""
import argparse
import json
import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
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
RAMP = (0.2, 0.4, 0.6, 0.8, 1.0)       # share of a control step's joint motion commanded by each fifth of it
ACTION_SCALE = 0.03                    # m of hand motion per control step at action 1
MAX_STEPS = 200                        # control steps (10 s) before an episode is cut off
IMAGE_SIZE = 64                        # px
CAMERAS = ("front", "wrist", "top")
COLORS = {"red": (.86, .10, .10), "green": (.08, .62, .16), "blue": (.10, .25, .95),
          "yellow": (.96, .84, .08), "purple": (.58, .12, .78)}
N_BLOCKS, N_PADS = 3, 2
BLOCK = 0.02                           # m, half the edge of a block
PAD_RADIUS = 0.045                     # m
AREA = np.array([[0.36, -0.21], [0.64, 0.21]])                 # m, where blocks and pads are put (x, y)
WORKSPACE = np.array([[0.28, -0.32, 0.004], [0.72, 0.32, 0.35]])  # m, where the hand may be commanded
HOME = np.array([0, -0.2, 0, -2.2, 0, 2.0, 0.785])             # rad, start of the IK and its null-space pull
LEASH = 0.04                           # m, how far the commanded hand may run ahead of the real one
GRIPPER_OPEN = 0.035                   # m, travel of each finger
SUCCESS_RADIUS = 0.03                  # m, block to pad centre
SUCCESS_STEPS = 5                      # control steps (0.25 s) that success must hold

# Scene seeds: three ranges that never meet. Demonstration seeds start at DEMO_SEED + 100_000 * --seed.
VALID_SEED, TEST_SEED, DEMO_SEED = 0, 1_000_000, 2_000_000     # choosing, reporting, demonstrations

# ----------------------------------------------------------------------------- sentences
TASKS = {"pick_place": (
    "pick up the {block} block and place it at the {pad} target",
    "grasp the {block} cube and move it to the {pad} target location",
    "pick the {block} block and put it on the {pad} target",
    "move the {block} object to the {pad} marker",
    "grab the {block} cube and place it at the {pad} goal",
    "lift the {block} block then set it on the {pad} target",
    "pick up the {block} object and transport it to the {pad} target zone",
    "grasp and relocate the {block} block to the {pad} spot")}


def make_instruction(task, slots, rng):
    """One of the task's sentences, drawn by `rng`, with the slots filled in, e.g. dict(block="red", pad="blue")."""
    patterns = TASKS[task]
    return patterns[rng.integers(len(patterns))].format(**slots)


def parse_instruction(text):
    """Slots of a sentence in anybody's words: the first colour named is the block's, the second the pad's.

    Raises ValueError, with a sentence for the user, when it does not name exactly two colours."""
    named = [w for w in re.findall("[a-z]+", text.lower()) if w in COLORS]
    if len(named) != 2:
        raise ValueError(f"the instruction {text!r} names {len(named)} colours; it must name two of "
                         f"{', '.join(COLORS)}: the block's, then the target's")
    return dict(block=named[0], pad=named[1])


# ----------------------------------------------------------------------------- the scene
def scene_xml(n_blocks=N_BLOCKS, n_pads=N_PADS):
    """MJCF of the scene. Link offsets and joint ranges: Franka Emika Panda data sheet. Capsules, no meshes."""
    # offset from the previous joint (m), its rotation, range (rad), mass (kg), kp (N m/rad), kv, drawn capsules
    joints = [
        ("0 0 .333", "1 0 0 0", "-2.8973 2.8973", 3.0, 4500, "0 0 -.19 0 0 -.02 .062"),
        ("0 0 0", "1 -1 0 0", "-1.7628 1.7628", 3.0, 4500, "0 0 -.06 0 0 .06 .06"),
        ("0 -.316 0", "1 1 0 0", "-2.8973 2.8973", 2.5, 3500, "0 0 -.24 0 0 -.03 .055"),
        (".0825 0 0", "1 1 0 0", "-3.0718 -.0698", 2.5, 3500, "0 0 -.05 0 0 .05 .052"),
        ("-.0825 .384 0", "1 -1 0 0", "-2.8973 2.8973", 2.0, 2000, "0 0 -.27 0 .03 -.08 .048"),
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
    servos = "".join(f'<position name="servo{i}" joint="joint{i}" kp="{kp}" kv="{kp * .045:.0f}"/>'
                     for i, (_, _, _, _, kp, _) in enumerate(joints, 1))
    return f"""<mujoco model="picovla">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{PHYSICS_DT}" integrator="implicitfast" iterations="20"/>
  <default>
    <geom contype="0" conaffinity="0" group="2"/>
    <default class="link"><geom group="1" rgba=".80 .82 .85 1"/></default>
  </default>
  <worldbody>
    <light pos=".6 -.4 1.6" dir="-.1 .3 -1"/>
    <camera name="front" pos=".92 0 .72" xyaxes="0 1 0 -.848 0 .530" fovy="38"/>
    <camera name="top" pos=".5 0 1.05" xyaxes="0 -1 0 1 0 0" fovy="34"/>
    <geom name="table" type="plane" group="0" size="0 0 .1" rgba=".42 .40 .38 1" contype="1" conaffinity="1" friction="1 .05 .001"/>
    {arm}{blocks}{pads}
  </worldbody>
  <equality><joint joint1="finger_left" joint2="finger_right"/></equality>
  <actuator>{servos}
    <position name="grip" joint="finger_left" kp="900" forcerange="-12 12"/>
  </actuator>
</mujoco>"""


class RayCamera:
    """Pictures from MuJoCo's ray caster: no OpenGL, no driver, the same bytes on every run.

    Shading is Lambert's with one light and an ambient term; colours are the model's geom_rgba. Rays are cast only
    inside the projected boxes of the geoms, and only against the geom groups in view; every other pixel is table
    or sky, known without casting. A third of the time for the same picture (test_smoke.py compares them)."""

    LIGHT = np.array([0.35, -0.45, 0.82])                      # direction towards the light, world frame
    AMBIENT, DIFFUSE = 0.45, 0.55
    SKY = (150, 165, 180)
    CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)

    def __init__(self, model, name, size=IMAGE_SIZE):
        self.model, self.id, self.size = model, model.camera(name).id, size
        self.half = np.tan(np.deg2rad(model.cam_fovy[self.id]) / 2)
        grid = ((np.arange(size) + 0.5) / size * 2 - 1) * self.half
        x, y = np.meshgrid(grid, -grid)
        rays = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
        self.rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)    # camera frame, row-major pixels
        self.outermost = [0, size - 1, size * size - size, size * size - 1]
        self.table = model.geom("table").id
        self.solid = np.flatnonzero(np.arange(model.ngeom) != self.table)
        box = model.geom_aabb[self.solid]                      # centre and half size in the geom's frame
        self.boxes = box[:, :3, None] + self.CORNERS * box[:, 3:, None]   # (geoms, 3, 8)
        self.geom = np.empty((size, size), np.int32)           # geom id at each pixel of the last picture, -1 for sky

    def render(self, data, cull=True):
        """(size, size, 3) uint8 of `data`, which must have had mj_kinematics and mj_camlight."""
        turn, pos = data.cam_xmat[self.id].reshape(3, 3), data.cam_xpos[self.id]
        rgba = self.model.geom_rgba[:, :3].astype(np.float32) * 255
        image = np.empty((self.size * self.size, 3), np.uint8)
        image[:] = (rgba[self.table] * np.float32(self.AMBIENT + self.DIFFUSE * self.LIGHT[2])).astype(np.uint8)
        geoms = self.geom.reshape(-1)
        geoms[:] = self.table
        if (self.rays[self.outermost] @ turn[2] >= 0).any():   # the horizon is in the picture
            sky = self.rays @ turn[2] >= 0
            image[sky], geoms[sky] = self.SKY, -1
        pixels, groups = self._candidates(data) if cull else (np.arange(len(image)), None)
        n = len(pixels)
        if n:
            geom, dist, normal = np.empty(n, np.int32), np.empty(n), np.empty((n, 3))
            rays = self.rays[pixels] @ turn.T
            mujoco.mj_multiRay(self.model, data, pos, rays.reshape(-1), groups, True, -1,
                               geom, dist, normal.reshape(-1), n, mujoco.mjMAXVAL)
            light = np.maximum(normal @ self.LIGHT, 0) * self.DIFFUSE + self.AMBIENT
            shaded = rgba[geom] * light.astype(np.float32)[:, None]
            # what is sunk into the table is hidden by it
            hit = np.flatnonzero((geom >= 0) & (pos[2] + dist * rays[:, 2] > -1e-9))
            pixels = pixels[hit]
            image[pixels], geoms[pixels] = shaded[hit], geom[hit]
        return image.reshape(self.size, self.size, 3)

    def _candidates(self, data):
        """Pixels (n,) inside the screen rectangle of some geom's bounding box; geom groups (6,) uint8 in view."""
        view = data.cam_xmat[self.id].reshape(3, 3)
        turn = view.T @ data.geom_xmat[self.solid].reshape(-1, 3, 3)
        offset = (data.geom_xpos[self.solid] - data.cam_xpos[self.id]) @ view
        x, y, z = (turn @ self.boxes + offset[..., None]).transpose(1, 0, 2)    # camera frame, (geoms, 8) each
        reach = self.half * -z                                 # half the picture's width at a corner's depth
        seen = ~((x > reach).all(1) | (x < -reach).all(1) | (y > reach).all(1) | (y < -reach).all(1))
        near = (z > -0.01).any(1)                              # reaches behind the camera: could be anywhere
        scale = self.size / 2 / np.maximum(reach, 0.01 * self.half)
        x, y = self.size / 2 + x * scale, self.size / 2 - y * scale
        edges = np.stack([y.min(1), y.max(1) + 1, x.min(1), x.max(1) + 1], 1)
        edges = np.ceil(edges - 0.5 + [-1e-6, 1e-6, -1e-6, 1e-6])        # a ray goes through the middle of its pixel
        edges[near] = 0, self.size, 0, self.size
        edges = np.clip(edges[seen], 0, self.size).astype(int).tolist()
        mask = np.zeros((self.size, self.size), bool)
        for top, bottom, left, right in edges:
            mask[top:bottom, left:right] = True
        groups = np.zeros(6, np.uint8)
        groups[self.model.geom_group[self.solid[seen]]] = 1
        return np.flatnonzero(mask), groups

    def project(self, data, points):
        """World points (..., 3) in metres to image coordinates (..., 2): x right, y down, the picture is 0..1."""
        local = (points - data.cam_xpos[self.id]) @ data.cam_xmat[self.id].reshape(3, 3)
        depth = np.maximum(-local[..., 2:], 1e-3)
        uv = local[..., :2] / depth / self.half * [0.5, -0.5] + 0.5
        return np.where(local[..., 2:] < 0, uv, -1.0)          # behind the camera: outside the picture


# ----------------------------------------------------------------------------- environment
class Env:
    """The pick-and-place world with Gymnasium's five return values (gymnasium itself is not needed).

    tasks: names from TASKS, one drawn per episode. cameras: names from CAMERAS; () renders nothing.
    Observations are a dict: <camera>_image (64, 64, 3) uint8; joint_pos (7,) rad; ee_pos (3,) m, between the
    fingertips; ee_vel (3,) m/s; gripper (1,) m between the fingers; object_pos and target_pos (3,) m: the
    instructed block and its pad, which give the answer away. All but images float32.
    Action: (4,) [dx, dy, dz, gripper] in [-1, 1]; 1 is 3 cm a step; gripper > 0 opens, otherwise it closes.
    info["violations"] counts what was clipped: to [-1, 1], to the workspace, to the joints' ranges.
    """

    def __init__(self, tasks=("pick_place",), cameras=("front", "wrist"), n_blocks=N_BLOCKS, n_pads=N_PADS):
        for name, known in [(t, TASKS) for t in tasks] + [(c, CAMERAS) for c in cameras]:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        self.tasks, self.n_blocks, self.n_pads = tuple(tasks), n_blocks, n_pads
        self.model = m = mujoco.MjModel.from_xml_string(scene_xml(n_blocks, n_pads))
        self.data = mujoco.MjData(m)
        self.arm_model = mujoco.MjModel.from_xml_string(scene_xml(0, 0))    # the arm alone, for the IK
        self.arm = mujoco.MjData(self.arm_model)
        self.cameras = {name: RayCamera(m, name) for name in cameras}
        self.qadr = np.array([m.joint(f"joint{i}").qposadr[0] for i in range(1, 8)])
        self.fadr = m.joint("finger_left").qposadr[0]
        self.arm_qadr = [self.arm_model.joint(f"joint{i}").qposadr[0] for i in range(1, 8)]
        self.arm_hand = self.arm_model.site("hand").id
        self.limits = m.jnt_range[[m.joint(f"joint{i}").id for i in range(1, 8)]]
        self.hand = m.site("hand").id
        self.grip = m.actuator("grip").id
        self.block_body = np.array([m.body(f"block{i}").id for i in range(n_blocks)])
        self.block_qadr = np.array([m.joint(m.body_jntadr[b]).qposadr[0] for b in self.block_body])
        self.block_vadr = np.array([m.joint(m.body_jntadr[b]).dofadr[0] for b in self.block_body])
        self.block_geom = np.array([m.geom(f"block{i}").id for i in range(n_blocks)])
        self.pad_body = np.array([m.body(f"pad{i}").id for i in range(n_pads)])
        self.pad_geom = np.array([m.geom(f"pad{i}").id for i in range(n_pads)])
        self.object_geom = np.concatenate([self.block_geom, self.pad_geom])
        self.fingers = [m.geom("finger_left").id, m.geom("finger_right").id]
        self.block_of = {g: i for i, g in enumerate(self.block_geom.tolist())}

    # -- setting up
    def reset(self, seed=None, options=None):
        """New scene, a function of `seed` (int; None draws one). options: dict(instruction=sentence, task=name)
        sets the sentence by hand. Returns (obs, info). Raises ValueError if a colour is not in the scene."""
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self.rng = rng = np.random.default_rng(self.seed)
        m, d, options = self.model, self.data, options or {}
        mujoco.mj_resetData(m, d)
        names = list(COLORS)
        self.block_colors = [names[i] for i in rng.permutation(len(names))[:self.n_blocks]]
        self.pad_colors = [names[i] for i in rng.permutation(len(names))[:self.n_pads]]
        for geoms, colors in ((self.block_geom, self.block_colors), (self.pad_geom, self.pad_colors)):
            m.geom_rgba[geoms, :3] = [COLORS[c] for c in colors]
        spots = self._free_spots(rng)
        for i, q in enumerate(self.block_qadr):
            yaw = rng.uniform(-0.25, 0.25)                     # rad; the gripper does not turn
            d.qpos[q:q + 7] = [*spots[i], BLOCK, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        m.body_pos[self.pad_body] = [[*s, 0] for s in spots[self.n_blocks:]]
        self.command = np.array([rng.uniform(0.38, 0.6), rng.uniform(-0.2, 0.2), rng.uniform(0.14, 0.26)])
        self.q_command = HOME.copy()
        self.steps = self.done_steps = self.violations = 0
        self.touched = None
        for _ in range(20):
            self._solve_ik(self.command)
        d.qpos[self.qadr] = d.ctrl[:7] = self.q_command
        d.qpos[[self.fadr, self.fadr + 1]] = d.ctrl[self.grip] = GRIPPER_OPEN
        self._refresh(moved=False)
        self.task = options.get("task") or self.tasks[rng.integers(len(self.tasks))]
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        text = options.get("instruction")
        if text is None:
            block, pad = self.valid_pairs()[rng.integers(len(self.valid_pairs()))]
            text = make_instruction(self.task, dict(block=self.block_colors[block], pad=self.pad_colors[pad]), rng)
        self.set_instruction(text)
        return self.observe(), self._info()

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

    def valid_pairs(self):
        """(block, pad) index pairs that can be asked for now: the pad is free and the block is not there yet."""
        gap = np.linalg.norm(self.block_pos[:, None, :2] - self.pad_pos[None, :, :2], axis=-1)
        taken = gap < 0.07
        return [(b, p) for p in range(self.n_pads) if not taken[:, p].any() for b in range(self.n_blocks)]

    def set_instruction(self, text):
        """The sentence to be obeyed from now on; restarts the clock. Raises ValueError, in one sentence, for one that cannot be."""
        slots = parse_instruction(text)
        for kind, have in (("block", self.block_colors), ("pad", self.pad_colors)):
            if slots[kind] not in have:
                raise ValueError(f"there is no {slots[kind]} {kind} in this scene (seed {self.seed}); "
                                 f"it has {', '.join(self.block_colors)} blocks and {', '.join(self.pad_colors)} pads")
        self.instruction, self.slots = text, slots
        self.block = self.block_colors.index(slots["block"])
        self.pad = self.pad_colors.index(slots["pad"])
        self.steps, self.done_steps, self.touched = 0, 0, None

    # -- stepping
    def step(self, action):
        """One control step (50 ms). Returns obs, reward, terminated, truncated, info; info["success"] is strict."""
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers in [-1, 1], got {action!r}")
        clipped = np.clip(action, -1, 1)
        wanted = self.command + clipped[:3] * ACTION_SCALE
        target = np.clip(wanted, *WORKSPACE)
        self.violations += int((clipped != action).any()) + int((target != wanted).any())
        self.command = self.ee_pos + np.clip(target - self.ee_pos, -LEASH, LEASH)
        before = self.q_command
        self._solve_ik(self.command)
        self.data.ctrl[self.grip] = GRIPPER_OPEN if clipped[3] > 0 else 0.0
        for part in RAMP:                                      # a jump of the servos would shake the block loose
            self.data.ctrl[:7] = before + part * (self.q_command - before)
            mujoco.mj_step(self.model, self.data, SUBSTEPS // len(RAMP))
        self.steps += 1
        self._refresh()
        self.done_steps = self.done_steps + 1 if self.placed(self.block, self.pad) else 0
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
        dual = np.linalg.solve(jac @ jac.T + 1e-4 * np.eye(6), error - jac @ home)
        q = self.q_command + jac.T @ dual + home
        self.q_command = np.clip(q, self.limits[:, 0] + 0.02, self.limits[:, 1] - 0.02)
        self.violations += int((q != self.q_command).any())

    def _refresh(self, moved=True):
        """Brings what the rest reads up to date with the state: poses, hand velocity, contacts."""
        m, d = self.model, self.data
        mujoco.mj_kinematics(m, d)
        mujoco.mj_camlight(m, d)
        before = self.ee_pos if moved else d.site_xpos[self.hand]
        self.ee_vel = (d.site_xpos[self.hand] - before) * CONTROL_HZ
        self.ee_pos = d.site_xpos[self.hand].copy()
        self.opening = d.qpos[self.fadr] + d.qpos[self.fadr + 1]
        self.block_pos = d.xpos[self.block_body]
        self.pad_pos = d.xpos[self.pad_body]
        touching = [set(), set()]                              # blocks at the left and the right finger
        for a, b in d.contact.geom.tolist():
            for side, finger in enumerate(self.fingers):
                if finger in (a, b) and (other := b if a == finger else a) in self.block_of:
                    touching[side].add(self.block_of[other])
        both = touching[0] & touching[1]
        self.held = min(both) if both else None                # index of the block between the fingers
        if self.touched is None and (touching[0] | touching[1]):
            self.touched = self.block_colors[min(both or touching[0] | touching[1])]

    def placed(self, block, pad):
        """Strict success, this instant: the block rests near the pad's centre, released, with the hand withdrawn."""
        b, v = self.block_pos[block], self.block_vadr[block]
        return bool(np.hypot(*(b - self.pad_pos[pad])[:2]) < SUCCESS_RADIUS and abs(b[2] - BLOCK) < 0.005
                    and np.abs(self.data.qvel[v:v + 3]).max() < 0.02 and self.held != block
                    and self.opening > 0.055 and self.ee_pos[2] > b[2] + 0.06)

    def _reward(self, success):
        """Shaped, in [0, 1]: reaching up to 0.2, holding 0.2, carrying up to 0.4; 1 on success."""
        b, p = self.block_pos[self.block], self.pad_pos[self.pad]
        if success:
            return 1.0
        near = 1 - np.tanh(5 * np.linalg.norm(b - self.ee_pos))
        there = 1 - np.tanh(5 * np.hypot(*(b - p)[:2]))
        return float(0.2 * near + 0.2 * (self.held == self.block) + 0.4 * there)

    def _info(self):
        return dict(instruction=self.instruction, task=self.task, success=self.done_steps >= SUCCESS_STEPS,
                    touched=self.touched, violations=self.violations,
                    diverged=bool(self.data.warning.number.any()), **self.slots)

    def observe(self):
        """The observation dict of this instant; see the class."""
        d = self.data
        obs = {f"{name}_image": camera.render(d) for name, camera in self.cameras.items()}
        state = dict(joint_pos=d.qpos[self.qadr], ee_pos=self.ee_pos, ee_vel=self.ee_vel, gripper=[self.opening],
                     object_pos=self.block_pos[self.block], target_pos=self.pad_pos[self.pad])
        return obs | {k: np.array(v, np.float32) for k, v in state.items()}


# ----------------------------------------------------------------------------- the expert
TRAVEL = 0.13                          # m, height of the hand when moving sideways
GRASP = 0.019                          # m, height of the hand when closing


def expert(env, block=None, pad=None):
    """The scripted expert's action (4,) float32 for the instructed block and pad, or those with the given indices:
    a memoryless function of the privileged state.

    | what it sees                                  | what it does                                     |
    | the block rests on its pad                    | opens, rises straight up                         |
    | another block between the fingers             | carries it to the nearest free spot, lets go     |
    | the right block between the fingers           | carries it to the pad                            |
    | the block within reach of the open fingers    | closes                                           |
    | anything else                                 | opens, moves over the block, descends            |
    """
    wanted = env.block if block is None else block
    hand, block, pad = env.ee_pos, env.block_pos[wanted], env.pad_pos[env.pad if pad is None else pad]
    if np.hypot(*(block - pad)[:2]) < 0.02 and block[2] < BLOCK + 0.004:
        return _act([0, 0, TRAVEL - hand[2]], 1)
    if env.held is not None:
        load = env.block_pos[env.held]
        if env.held == wanted:
            goal = pad[:2]
        else:
            goal = _free_spot(env, load)
            if np.hypot(*(load[:2] - goal)) < 0.02 and load[2] < BLOCK + 0.004:
                return _act([0, 0, TRAVEL - hand[2]], 1)
        return _act(_approach(hand, goal - load[:2], BLOCK - 0.005 + hand[2] - load[2]), -1)
    gap = np.hypot(*(block - hand)[:2])
    if gap < 0.012 and hand[2] < block[2] + 0.008:
        return _act([0, 0, 0], -1)
    low = max(block[2] - BLOCK + GRASP, GRASP) if env.opening > 0.055 else TRAVEL
    return _act(_approach(hand, (block - hand)[:2], low), 1)


def _approach(hand, across, low):
    """Motion (3,) in m that goes `across` (2,) m at TRAVEL height and down to `low` m in a funnel over the goal."""
    far = np.hypot(*across)
    height = np.clip(low + 6 * (far - 0.008), low, TRAVEL)
    if far > 0.03:                                             # first rise, then travel
        across = across * np.clip((hand[2] - 0.06) / 0.05, 0, 1)
    return [*across, height - hand[2]]


def _act(motion, gripper):
    """Speed-limited action towards `motion` (3,) m."""
    a = 0.6 * np.asarray(motion) / ACTION_SCALE
    a[:2] /= max(1.0, np.hypot(*a[:2]))
    return np.array([*a[:2], np.clip(a[2], -0.8, 0.8), gripper], np.float32)


def _free_spot(env, load):
    """Place (2,) nearest to `load` (3,), 9 cm clear of every pad and other block, to put a wrong block down on."""
    x, y = np.meshgrid(np.arange(AREA[0, 0], AREA[1, 0], 0.03), np.arange(AREA[0, 1], AREA[1, 1], 0.03))
    spots = np.concatenate([load[None, :2], np.stack([x, y], -1).reshape(-1, 2)])
    others = [p[:2] for i, p in enumerate(env.block_pos) if i != env.held] + [p[:2] for p in env.pad_pos]
    clear = np.linalg.norm(spots[:, None] - np.array(others), axis=-1).min(1)
    cost = np.linalg.norm(spots - load[:2], axis=-1) + 10 * np.maximum(0.09 - clear, 0)
    return spots[cost.argmin()]


# ----------------------------------------------------------------------------- demonstrations
NOISE = 0.12                           # standard deviation of the white noise on the executed motion
PUSH = 0.03                            # probability a step of a push: 3 to 7 steps of a random direction at 0.8
DROP = 0.004                           # probability a step of the gripper doing the opposite for 3 steps
INTERRUPT = 0.6                        # share of sentences that are interrupted by another, after 4 to 59 steps
SENTENCES = 3                          # at most, per scene


def demonstrate(env, seed):
    """Plays one scene; returns ([episode, ...], {reason: dropped}). An episode is one sentence, from the moment it
    is given until it is done or the next one interrupts it. The expert's action plus noise is executed and the
    clean action recorded, so that recovery is in the data (DART, arXiv:1703.09327)."""
    rng = np.random.default_rng([seed, 1])
    obs, info = env.reset(seed)
    episodes, dropped = [], {}
    push, push_left, drop_left = np.zeros(3), 0, 0
    for part in range(SENTENCES):
        until = rng.integers(4, 60) if rng.random() < INTERRUPT else MAX_STEPS
        frames = []
        while True:
            action = expert(env)
            other = another_pair(env, rng)
            row = dict(obs, actions=action, objects_pos=np.concatenate([env.block_pos, env.pad_pos], dtype=np.float32),
                       other=np.array(other, np.uint8), other_action=expert(env, *other))
            for name, camera in env.cameras.items():
                row[f"{name}_uv"] = seen_at(env, camera)
            noisy = action.astype(np.float64)
            noisy[:3] += rng.normal(0, NOISE, 3)
            if push_left == 0 and rng.random() < PUSH:
                push, push_left = rng.normal(size=3), rng.integers(3, 8)
                push *= 0.8 / np.linalg.norm(push)
            if push_left:
                noisy[:3] += push
                push_left -= 1
            if drop_left == 0 and rng.random() < DROP:
                drop_left = 3
            if drop_left:
                noisy[3] = -noisy[3]
                drop_left -= 1
            obs, reward, success, truncated, info = env.step(np.clip(noisy, -1, 1))
            frames.append(row | dict(rewards=np.float32(reward), dones=np.uint8(success)))
            if success or truncated or info["diverged"] or len(frames) >= until:
                break
        reason = "diverged" if info["diverged"] else "not done in time" if truncated and not success else None
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            arrays = {k: np.stack([f[k] for f in frames]) for k in frames[0]}
            attrs = dict(instruction=env.instruction, task=env.task, num_samples=len(frames), success=bool(success),
                         interrupted=not success, scene_seed=seed, sentence=part,
                         block_colors=",".join(env.block_colors), pad_colors=",".join(env.pad_colors),
                         block=env.block, pad=env.pad)
            episodes.append((attrs, arrays))
        if info["diverged"] or truncated or until == MAX_STEPS:
            break
        block, pad = another_pair(env, rng)
        env.set_instruction(make_instruction(env.task, dict(block=env.block_colors[block], pad=env.pad_colors[pad]), rng))
        obs = env.observe()
    return episodes, dropped


def another_pair(env, rng):
    """(block, pad) indices of something else that could be asked for now, or the present pair if nothing can."""
    others = [pair for pair in env.valid_pairs() if pair != (env.block, env.pad)] or [(env.block, env.pad)]
    return others[rng.integers(len(others))]


def seen_at(env, camera):
    """(n_blocks + n_pads, 2) float32: where each block and pad is in the picture just rendered, 0..1 (x right,
    y down), -1 where fewer than 3 pixels of it show. The labels of train.py's grounding loss."""
    uv = camera.project(env.data, np.concatenate([env.block_pos, env.pad_pos]))
    pixels = np.bincount(camera.geom.reshape(-1) + 1, minlength=env.model.ngeom + 1)[1:]
    shows = (pixels[env.object_geom] >= 3) & (np.abs(uv - 0.5) < 0.5).all(1)
    return np.where(shows[:, None], uv, -1).astype(np.float32)


# ----------------------------------------------------------------------------- the data file
SCHEMA = "picovla-1"
CHUNK = 8                              # frames per compressed chunk of a camera's pictures


def start_worker(kwargs):
    global worker_env
    if parent := mp.parent_process():                          # a worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is the main process's to handle
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()     # and its death is ours
    worker_env = Env(**kwargs)


def play_scene(seed, env=None):
    """demonstrate() in a worker, the pictures already compressed as the file's chunks will hold them."""
    episodes, dropped = demonstrate(env or worker_env, seed)
    for _, arrays in episodes:
        for key in [k for k in arrays if k.endswith("_image")]:
            images = arrays[key]
            pad = np.zeros((-len(images) % CHUNK, *images.shape[1:]), np.uint8)
            padded = np.concatenate([images, pad])
            arrays[key] = [zlib.compress(padded[i:i + CHUNK].tobytes(), 1) for i in range(0, len(padded), CHUNK)]
    return episodes, dropped


def write_episode(file, index, attrs, arrays):
    """Appends one episode.

    attrs: schema, total, seed, tasks, control_hz, sentences (JSON {task: patterns}), env_args (JSON, with the cameras),
        versions, git_commit, settings, scenes_done, dropped (JSON), complete (written last)
    episode_0/                           T control steps
        attrs: instruction, task, num_samples, success, interrupted, scene_seed, sentence (0, 1, 2: how many came
            before it in this scene), block_colors, pad_colors ("red,blue,.."), block, pad (index of the instructed)
        observations/
            front_image, wrist_image     (T, 64, 64, 3) u1, one per camera
            joint_pos (T, 7) f4 rad      ee_pos (T, 3) f4 m      ee_vel (T, 3) f4 m/s      gripper (T, 1) f4 m
            object_pos (T, 3) f4 m       target_pos (T, 3) f4 m
        grounding/
            front_uv, wrist_uv           (T, blocks + pads, 2) f4, 0..1 in the picture, -1 where not visible
            objects_pos                  (T, blocks + pads, 3) f4 m
            other (T, 2) u1              another block and pad that could have been asked for at this moment,
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
            side = key.endswith("_uv") or key in ("objects_pos", "other", "other_action")
            group[("grounding/" if side else "observations/") + key] = value
    group["obs"] = h5py.SoftLink(f"/episode_{index}/observations")
    file[f"data/demo_{index}"] = h5py.SoftLink(f"/episode_{index}")
    group.attrs.update(attrs)


def fail(message):
    print(f"gen_data.py: {message}", file=sys.stderr)
    sys.exit(2)


def generate(out, episodes, seed, tasks, cameras, workers):
    """Writes `episodes` demonstrations to `out`; returns nothing. A killed run is carried on by the next."""
    part = out.with_name(out.name + ".part")
    kwargs = dict(tasks=tasks, cameras=cameras)
    settings = json.dumps(dict(seed=seed, tasks=tasks, cameras=cameras, schema=SCHEMA), sort_keys=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = h5py.File(part, "a")
        begun_with = file.attrs.get("settings", settings)
        written, scene = int(file.attrs.get("total", 0)), int(file.attrs.get("scenes_done", 0))
        dropped = json.loads(file.attrs.get("dropped", "{}"))
        for name in [f"episode_{written + i}" for i in range(SENTENCES)]:    # cut off in the middle of a scene
            for path in (name, name.replace("episode_", "data/demo_")):
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
    base = DEMO_SEED + 100_000 * seed

    def seeds_done(pool):
        """Scenes in order, a few in flight per worker: the file's content does not depend on their number."""
        todo = iter(range(base + scene, base + 100_000))
        if pool is None:
            start_worker(kwargs)
            yield from map(play_scene, todo)
            return
        waiting = [pool.submit(play_scene, seed) for seed in islice(todo, 4 * workers)]
        signal.signal(signal.SIGINT, stop)
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(play_scene, seed) for seed in islice(todo, 1)]

    stopped = []                                               # Ctrl-C is heeded between scenes: the file stays whole
    stop = lambda *_: stopped.append(True)
    signal.signal(signal.SIGINT, stop if workers == 1 else signal.SIG_IGN)     # workers inherit it as they start
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), initializer=start_worker, initargs=(kwargs,))
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
            if written == episodes or stopped:
                break
    except (OSError, BrokenProcessPool) as error:
        fail(f"stopped with {written} episodes in {part} ({error}); the same command carries on from there")
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    if written < episodes:
        file.close()
        print(f"stopped with {written} episodes in {part}; the same command carries on from there", file=sys.stderr)
        sys.exit(130)
    seconds = max(time.time() - start, 1e-9)
    scenes = {i: int(file[f"episode_{i}"].attrs["scene_seed"]) for i in range(written)}
    for name, chosen in (("train", lambda s: s % 20), ("valid", lambda s: not s % 20)):
        if f"mask/{name}" in file:
            del file[f"mask/{name}"]
        file[f"mask/{name}"] = np.array([f"demo_{i}" for i, s in scenes.items() if chosen(s)], "S16")
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')
    finished = sum(bool(file[f"episode_{i}"].attrs["success"]) for i in range(written))
    env_args = json.dumps(dict(env_name="picovla", type=0, env_kwargs=kwargs), sort_keys=True)
    file["data"].attrs.update(total=written, env_args=env_args)
    file.attrs.update(schema=SCHEMA, seed=seed, tasks=",".join(tasks), control_hz=CONTROL_HZ, env_args=env_args,
                      sentences=json.dumps({task: TASKS[task] for task in tasks}),
                      versions=f"mujoco {mujoco.__version__}, numpy {np.__version__}, h5py {h5py.__version__}",
                      git_commit="unknown" if failed else commit)
    file.attrs["complete"] = True
    file.close()
    os.replace(part, out)
    lost = sum(dropped.values())
    print(f"{out}: {written} episodes from {scene} scenes, {out.stat().st_size / 1e6:.0f} MB; dropped {lost} "
          f"({', '.join(f'{v} {k}' for k, v in dropped.items()) or 'none'}); of the sentences that were not interrupted the "
          f"expert, under noise, did {finished}/{finished + lost} = {100 * finished / max(finished + lost, 1):.1f}%")
    print(f"this run: {written - begun} episodes, {frames} frames in {seconds:.0f} s: {frames / seconds:.0f} frames/s, "
          f"{(written - begun) / seconds:.1f} episodes/s, {workers} workers")


def benchmark(scenes=25):
    """Prints recorded frames/s on one core beside the bare rate: physics and one full ray-cast picture a step."""
    env, recorders = Env(cameras=()), {"front": Env(cameras=["front"]), "front + wrist": Env(cameras=["front", "wrist"])}
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
    parser.add_argument("--episodes", type=int, default=2000, help="demonstrations to write (default 2000)")
    parser.add_argument("--out", type=Path, default=Path("data/demos.h5"), help="file to write (default data/demos.h5)")
    parser.add_argument("--seed", type=int, default=0, help="which 100,000 demonstration scenes to draw from (default 0)")
    parser.add_argument("--tasks", default="pick_place", help=f"comma list of {', '.join(TASKS)} (default pick_place)")
    parser.add_argument("--cameras", default="front,wrist", help=f"comma list of {', '.join(CAMERAS)} (default front,wrist)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 61), help="processes (default: all cores); does not change the data")
    parser.add_argument("--bench", action="store_true", help="only print the recording rate of one core beside bare physics")
    args = parser.parse_args()
    tasks, cameras = args.tasks.split(","), args.cameras.split(",")
    for flag, names, known in (("--tasks", tasks, TASKS), ("--cameras", cameras, CAMERAS)):
        if wrong := [n for n in names if n not in known]:
            fail(f"{flag} {wrong[0]!r} is not one of {', '.join(known)}")
    if args.bench:
        benchmark()
        sys.exit()
    for flag, value, low, high in (("--episodes", args.episodes, 1, 100_000), ("--workers", args.workers, 1, 61),
                                   ("--seed", args.seed, 0, 9999)):
        if not low <= value <= high:
            fail(f"{flag} must be from {low} to {high}, not {value}")
    if args.out.exists():
        fail(f"{args.out} exists; delete it or choose another --out")
    generate(args.out, args.episodes, args.seed, tasks, cameras, args.workers)
