"""Trains a policy on the demonstrations and says how well it does on scenes it has never seen.

    python train.py --steps 800                        # minutes on 2 cores, data included
    python train.py --tasks all --out_dir out_all      # under an hour, in changed worlds, too
    python train.py --model bc --out_dir out_bc        # the behaviour-cloning baseline
    python train.py --recipe classic --out_dir out_c   # the setting of tutorials, see RECIPES
    torchrun --standalone --nproc_per_node=2 train.py  # data-parallel; needs the data

Leaves ckpt.pt, log.jsonl and curve.png in --out_dir. Ctrl-C saves; `--resume out` carries on. In
order: settings, demonstrations, losses, optimiser, preparation, the loop, curve and score.
"""

import argparse
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# How long GNU's OpenMP threads wait for each other in a busy loop before they sleep. Beside another
# busy program its default makes a step four times as long, this twice; alone they are the same.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    DROPPED,
    POLICIES,
    WORD,
    Config,
    add_flags,
    code_version,
    explain_errors,
    load_file,
    one_line,
    setting,
    tokenize,
)

explain_errors("train.py")
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
RANK = int(os.environ.get("RANK", 0))  # which process, of torchrun's
RANKS = int(os.environ.get("WORLD_SIZE", 1))
ROOT = Path(__file__).parent


# ---------------------------------------------------------------------------------- settings
@dataclass
class Settings(Config):
    """All of Config, and how it is trained."""

    recipe: str = setting(
        "picovla", "other defaults for many of these flags", ("picovla", "classic")
    )
    # optimisation
    steps: int = setting(1000, "optimiser steps; 9000 for all tasks", high=10**7)
    batch_size: int = setting(64, "frames per step; 96 for all tasks", high=10**6)
    optimizer: str = setting(
        "muon", "Muon with AdamW for the rest, or AdamW alone", ("muon", "adamw")
    )
    lr: float = setting(
        0.02,
        "Muon's learning rate, for matrices between hidden layers",
        low=1e-9,
        high=1e30,
        needs=("optimizer", ("muon",)),
    )
    adam_lr: float = setting(
        2e-3, "AdamW's learning rate, for everything else", low=1e-9, high=1e30
    )
    seed: int = setting(0, "seed of weights and batches", low=0, high=10**9)
    # labels
    labels: str = setting(
        "hindsight",
        "where thing and place are: as the demonstration itself shows afterwards, as a simulator "
        "knows (grounding/ of the file), or unknown",
        ("hindsight", "simulator", "none"),
    )
    state: str = setting(
        "proprio",
        "what the robot feels (proprio), with the answer (full), or none",
        ("proprio", "full", "none"),
    )
    relabel: float = setting(
        1.0,
        "with a simulator's labels: share of the batch shown again with another instruction and "
        "what the expert does then",
        low=0,
        high=1,
        needs=("labels", ("simulator",)),
    )
    attention_weight: float = setting(
        0.1,
        "weight of pulling attention onto the patches of thing and place, at first: it sinks with the "
        "learning rate",
        low=0,
        needs=("vision", ("vit_stem", "vit")),
    )
    goal_weight: float = setting(
        0.5, "weight of the regression of their positions", low=0, needs=("model", ("vla",))
    )
    release_weight: float = setting(
        5.0,
        "weight of the gripper's error where it should let go of a thing at its place",
        low=0,
    )
    language_weight: float = setting(
        0.2,
        "weight of telling what a sentence asks for and which words name thing and place",
        low=0,
    )
    # instructions
    typos: float = setting(0.04, "share of words that are misspelt", low=0, high=1)
    shuffle_names: int = setting(
        1,
        "1: shuffled colours in the words in context; the pointers' names keep the true ones",
        (0, 1),
        low=0,
        needs=("text", ("word",)),
    )
    shift: int = setting(
        0,
        "px that pictures are shifted by at random, at most, in training",
        low=0,
        high=64,
        needs=("model", ("vla",)),
    )
    # data and machine
    data: str = setting(
        "",
        "a file, made if missing, or 'shards/*.h5' (default data/demos.h5, or data/TASKS.h5)",
    )
    episodes: int = setting(
        1500, "how many to make if missing; 8000 for all tasks", high=100_000
    )
    randomize: float = setting(
        0.0,
        "how far two scenes in three are from the normal world, in demonstrations to be made; "
        "1 for all tasks",
        low=0,
        high=1,
    )
    max_episodes: int = setting(
        0, "learn from the file's first ones only; 0: all", low=0, high=10**9
    )
    device: str = setting(
        "auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps")
    )
    dtype: str = setting(
        "auto",
        "type of the matrix products; auto: bfloat16 where there are units for it",
        ("auto", "float32", "bfloat16"),
    )
    compile: bool = setting(
        False, "torch.compile the model (meant for GPUs; its speed was not measured)"
    )
    eval_interval: int = setting(
        500, "steps between checkpoints; 0: one at the end, and no score", low=0, high=10**7
    )
    eval_episodes: int = setting(200, "episodes of the closed-loop score", high=10**6)
    log_interval: int = setting(100, "steps between lines of the log", high=10**7)


RECIPES = dict(
    picovla={},
    classic=dict(  # small VLAs as tutorials build them
        vision="vit",
        keep_patches=64,
        cameras=("front",),
        text="char",
        pointers=0,
        fusion="transformer",
        head="continuous",
        head_layers=1,
        chunk=1,
        loss="mse",
        labels="none",
        language_weight=0.0,
        typos=0.0,
        optimizer="adamw",
        adam_lr=1e-4,
        batch_size=32,
    ),
)
BC = dict(state="full", cameras=(), chunk=1, optimizer="adamw")
ALL = dict(steps=9000, episodes=8000, randomize=1.0, batch_size=96)  # of --tasks all

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add_flags(parser, Settings)
place = parser.add_mutually_exclusive_group()
place.add_argument("--out_dir", type=Path, default="out", help="where results go (default out)")
parser.add_argument("--overwrite", action="store_true", help="replace what is in --out_dir")
place.add_argument(
    "--resume",
    type=Path,
    metavar="DIR",
    help="carry on from what is in DIR, with the settings it began with unless said otherwise",
)


@contextmanager
def explained(what):
    """Whatever goes wrong inside becomes one sentence for the user, `what` and why."""
    try:
        yield
    except (OSError, LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what}: {one_line(error)}") from None


said = vars(parser.parse_args())
out_dir, resume, overwrite = said.pop("out_dir"), said.pop("resume"), said.pop("overwrite")
out_dir = resume or out_dir
saved = load_file(out_dir / "resume.pt") if resume else {}
chosen = dict(ALL) if said.get("tasks") == ("all",) else {}
chosen |= RECIPES[said.get("recipe", "picovla")] | (BC if said.get("model") == "bc" else {})
chosen |= saved.get("settings", {}) | said  # explicit flags win
with explained(f"{out_dir}/resume.pt was begun by another train.py"):
    settings = Settings(**chosen)
settings.max_text = 40 if settings.text == "word" else 200
settings.check(said)
if settings.model == "bc":
    inside = vars(Config()).keys() - {"model", "tasks", "chunk", "state", "head_width"}
    inside |= {"labels"}
    if strange := inside & said.keys():
        raise ValueError(f"--{min(strange)} is about the vla; --model bc has only a state")
if not settings.data:
    names = "_".join(settings.tasks)
    settings.data = f"data/{'demos' if names == 'pick_place' else names}.h5"

accelerator = torch.accelerator.current_accelerator(check_available=True)
best = accelerator.type if accelerator else "cpu"
device = best if settings.device == "auto" else settings.device
if device not in ("cpu", best):
    raise ValueError(f"--device {device} is not available here; leave it at auto")
dtype = settings.dtype
if dtype == "auto":
    units = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    dtype = "bfloat16" if units else "float32"
autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
torch.set_deterministic_debug_mode("warn" if device == "cpu" else "default")  # order of sums
torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes nothing
# The momentum of a unit that died becomes denormal; Intel's cores take 100 times as long with it.
torch.set_flush_denormal(True)


# ---------------------------------------------------------------------------- demonstrations
class Batch(NamedTuple):
    """Frames with their own instruction, and then some of them again with another: R rows in all."""

    # what VLA.forward takes, in its order
    images: torch.Tensor  # (B, V, H, W, 3) uint8
    state: torch.Tensor  # (B, S) float32
    text: torch.Tensor  # (U, L, n) int64, as words in their context
    picture: torch.Tensor  # (R,) which frame
    sentence: torch.Tensor  # (R,) which sentence
    names: torch.Tensor  # (U, L, n) int64, as bare names
    target: torch.Tensor  # (R, K, A) the expert's actions
    valid: torch.Tensor  # (R, K) bool: whether they are known
    shift: torch.Tensor  # (B, V, 2) of the pictures, y and x, as a share of their size
    # what else the losses need
    weight: torch.Tensor  # (R, K, A) how much the actions count
    goal: torch.Tensor  # (R, G) m, world frame: thing and place
    known: torch.Tensor  # (R, G) bool: whether that can be told
    patch: torch.Tensor  # (R, 2, V', 4) int64: what attention should be on,
    patch_weight: torch.Tensor  # (R, 2, V', 4) and how much of it, see attention_target
    intent: torch.Tensor  # (U,) int64: what each sentence asks for, index in config.intents
    place: torch.Tensor  # (U, 2) int64: the word that names thing and place, -1: none


class Demonstrations:
    """Everything of the data files in memory, tensors with one row for each of N frames:

    images (N, V', H, W, 3) uint8 of V' cameras; state (N, S); opening (N,) of the gripper, a share of
    its widest; start, end (N,): frames of its episode. And by instruction, 0: the one that is carried
    out, 1, with the labels of a simulator: another that the scene allows: request (I, N), index of
    requests; action (I, N, A); goal (I, N, G) m, of thing and place, nan: unknown; uv (I, N, 2, V', 2),
    where in the pictures those are, 0..1, -1: not seen. train, valid: which frames are to learn from,
    and which are of held-out scenes.

    Sets the settings that follow from the files.
    """

    THERE = 0.03  # m from its place

    def __init__(self, paths, settings, chosen):
        files = [h5py.File(path) for path in paths]
        attrs = files[0].attrs
        for key in ("requests", "env_args", "proprio"):
            if any(file.attrs.get(key) != attrs.get(key) for file in files):
                raise ValueError("its files were made with different tasks or cameras")
        held_out = self._find_episodes(files, settings.max_episodes)
        self._find_keys(attrs, settings, chosen)
        self._find_sentences(files[0], settings)
        self._read_episodes(settings)
        labels = dict(
            hindsight=self._label_in_hindsight,
            simulator=self._label_as_simulated,
            none=self._label_nothing,
        )
        labels[settings.labels](settings.cameras)
        settings.state_size, settings.goal_size = self.state.shape[1], self.goal.shape[2]
        settings.action_size, settings.image_size = self.action.shape[2], self.images.shape[2]
        ends = np.cumsum(self.lengths)
        self.end = torch.from_numpy(np.repeat(ends, self.lengths))
        self.start = torch.from_numpy(np.repeat(ends - self.lengths, self.lengths))
        held_out = np.repeat(held_out, self.lengths)
        self.train, self.valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if not len(self.train) or not len(self.valid):
            raise ValueError(
                "it is too small: it must have scenes to train on and held-out ones"
            )

    def _find_episodes(self, files, most):
        """Sets episodes and lengths; returns which are held out (episodes,) bool."""
        self.episodes, held_out = [], []
        for file in files:
            total = file.attrs.get("total", sum(name.startswith("episode_") for name in file))
            masked = set(file["mask/valid"][:]) if "mask/valid" in file else None
            for i in range(total):
                self.episodes.append(file[f"episode_{i}"])
                held_out.append(i % 20 == 0 if masked is None else b"demo_%d" % i in masked)
        if most > len(self.episodes):
            raise ValueError(f"--max_episodes {most}: it has {len(self.episodes)}")
        self.episodes = self.episodes[: most or None]
        if not self.episodes:
            raise ValueError("it has no episode_0")
        self.lengths = [len(episode["actions"]) for episode in self.episodes]
        return np.array(held_out[: len(self.lengths)])

    def _find_keys(self, attrs, settings, chosen):
        """What the file says about itself, of which another robot's may lack everything."""
        observations = sorted(self.episodes[0]["observations"])
        pictures = [key[: -len("_image")] for key in observations if key.endswith("_image")]
        numbers = [key for key in observations if not key.endswith("_image")]
        world = json.loads(attrs.get("env_args", "{}")).get("env_kwargs", {})
        self.ours = bool(world)  # eval.py can score it
        self.randomized = world.get("randomize", 0.0)  # see other_light
        settings.cameras = tuple(chosen.get("cameras", world.get("cameras", pictures)))
        proprio = attrs.get("proprio", ",".join(numbers)).split(",")
        self.privileged = attrs["privileged"].split(",") if "privileged" in attrs else []
        keys = dict(proprio=proprio, full=proprio + self.privileged, none=[])
        settings.state_keys = tuple(keys[settings.state])
        names = attrs.get("action_names", "gripper").split(",")
        self.gripper = names.index("gripper") - len(names)  # from the end
        settings.tasks = tuple(attrs.get("tasks", "demonstrated").split(","))
        wanted = chosen.get("tasks", settings.tasks)
        if wanted == ("all",):
            wanted = attrs.get("all_tasks", "all").split(",")
        if set(wanted) != set(settings.tasks):
            raise ValueError(f"it holds {','.join(settings.tasks)}, not {','.join(wanted)}")

    def _find_sentences(self, file, settings):
        """Sets requests, [{intent, slots}, ..], the request of each frame, and wordings of each intent."""
        if "requests" in file.attrs:
            self.requests = json.loads(file.attrs["requests"])
            asked = [episode.attrs["request"] for episode in self.episodes]
            self.wordings = {
                name: wordings.asstr()[:] for name, wordings in file["wordings"].items()
            }
        else:  # each sentence stands for itself
            sentences = [episode.attrs["instruction"] for episode in self.episodes]
            distinct = list(dict.fromkeys(sentences))
            self.requests = [dict(intent=sentence, slots={}) for sentence in distinct]
            asked = [distinct.index(sentence) for sentence in sentences]
            self.wordings = {sentence: [sentence] for sentence in distinct}
        if max(asked) >= len(self.requests):
            raise ValueError(f"request of episode_{np.argmax(asked)} is {max(asked)}")
        self.request = torch.from_numpy(np.repeat(asked, self.lengths)).long()[None]
        settings.intents = (*sorted(self.wordings.keys() - {"none"}), "none")

    def _arrays(self, name, dtype=torch.float32, low=-1e30, high=1e30):
        """This array (T, ...) of each episode, checked; an attribute is the same in all its frames."""
        bar = tqdm(self.episodes, name, leave=False, disable=None)  # None: no terminal
        for episode, T in zip(bar, self.lengths):
            there = name in episode
            array = episode[name][:] if there else np.array([episode.attrs[name]] * T)
            array = torch.from_numpy(array)
            fits = len(array) == T and torch.can_cast(array.dtype, dtype)
            array = array.to(dtype)
            if not fits or not torch.equal(array.clamp(low, high), array):  # nor is nan
                raise ValueError(
                    f"{name} of {episode.name[1:]} is not {T} {dtype} from {low} to {high}"
                )
            yield array

    def _read(self, name, *kind):
        """The same of all, (N, ...)."""
        return torch.cat(list(self._arrays(name, *kind)))

    def _observed(self, keys):
        """These observations side by side, (N, n)."""
        columns = [self._read(f"observations/{key}") for key in keys]
        return torch.cat([torch.zeros(sum(self.lengths), 0), *columns], 1)

    def _read_episodes(self, settings):
        """Sets images, state, opening and the actions that were carried out."""
        names = [f"observations/{camera}_image" for camera in settings.cameras]
        size = self.episodes[0][names[0]].shape[2] if names else Config.image_size
        shape = sum(self.lengths), len(names), size, size, 3
        need = math.prod(shape) + 2000 * shape[0]
        meminfo = Path("/proc/meminfo")
        if meminfo.exists():  # Linux only
            free = int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1]) * 1024
            if need > free:
                raise MemoryError(
                    f"{settings.data} needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
                    "are free; --max_episodes needs less"
                )
        self.images = torch.empty(shape, dtype=torch.uint8)
        for v, name in enumerate(names):  # in place: they are large
            places = self.images[:, v].split(self.lengths)
            for place, array in zip(places, self._arrays(name, torch.uint8, 0, 255)):
                place.copy_(array)
        self.state = self._observed(settings.state_keys)
        opening = self._observed(["gripper"])[:, 0]
        self.opening = opening / opening.max().clamp_min(1e-9)
        self.action = self._read("actions", torch.float32, -1, 1)[None]

    def _label_nothing(self, cameras):
        N = len(self.state)
        self.goal = torch.full((1, N, 6), torch.nan)
        self.uv = torch.full((1, N, 2, len(cameras), 2), -1.0)

    def _label_in_hindsight(self, cameras):
        """From observations and actions alone, see hindsight()."""
        self._label_nothing(cameras)
        hand = self._observed(["ee_pos"]).numpy()
        close = (self.action[0, :, self.gripper] < 0).numpy()  # 0: neither
        mounts = [self.episodes[0].attrs.get(f"{camera}_mount") for camera in cameras]
        turn = np.zeros((len(hand), 3, 3))
        if "hand" in mounts:
            turn = rotations(self._observed(["ee_quat"]).numpy())
        for episode, end, T in zip(self.episodes, np.cumsum(self.lengths), self.lengths):
            at = slice(end - T, end)
            complete = not episode.attrs.get("interrupted", False)
            thing, place, under = hindsight(
                hand[at], self.opening[at].numpy(), close[at], complete
            )
            self.goal[0, at] = torch.from_numpy(np.concatenate([thing, place], 1))
            points = np.stack([thing, under], 1)
            for v, camera in enumerate(cameras):
                if mounts[v]:
                    uv = project(points, episode.attrs, camera, hand[at], turn[at])
                    self.uv[0, at, :, v] = torch.from_numpy(uv)

    def _label_as_simulated(self, cameras):
        """From grounding/, of the instruction that is carried out and of another."""
        if "grounding" not in self.episodes[0]:
            raise ValueError("it has no grounding/, which --labels simulator needs")
        N, kind = len(self.state), torch.int64
        relabel = self._read("grounding/relabel", kind, 0, len(self.requests) - 1)
        self.request = torch.cat([self.request, relabel[None]])
        action = self._read("grounding/relabel_action", torch.float32, -1, 1)
        self.action = torch.cat([self.action, action[None]])
        goals = self._observed(self.privileged), self._read("grounding/relabel_goal")
        self.goal = torch.stack(goals)
        count = self.episodes[0]["grounding/things_pos"].shape[1]
        names = "things", "grounding/relabel_things"
        things = torch.stack([self._read(name, kind, -1, count - 1) for name in names])
        self.uv = torch.empty(2, N, 2, len(cameras), 2)
        for v, camera in enumerate(cameras):
            uv = self._read(f"grounding/{camera}_uv")  # (N, things, 2)
            self.uv[..., v, :] = uv[torch.arange(N)[:, None], things]
        self.uv[things < 0] = -1

    def batch(self, frames, wordings, side, settings, rng, augment):
        """The Batch of `frames` (B,) int64, of which the first ones are shown again with another
        instruction, if there are any. side: patches across a picture. augment: whether shifted
        and in other light."""
        B = len(frames)
        relabelled = int(settings.relabel * B) if len(self.request) > 1 else 0
        row = torch.arange(B + relabelled)
        picture, instruction = row % B, row // B
        rows = frames[picture]
        at = instruction, rows
        requests, sentence = share(self.request[at])
        heard = wordings.draw(requests.tolist(), rng)
        moments = frames[:, None] - torch.arange(settings.frames)  # newest first
        moments = moments.maximum(self.start[frames, None])
        ahead = rows[:, None] + torch.arange(settings.chunk)
        valid = ahead < self.end[rows, None]  # nothing is known beyond the episode
        valid[B:, 1:] = False  # of the other instruction, one action
        ahead = ahead.clamp_max(len(self.end) - 1)
        target = self.action[instruction[:, None], ahead] * valid[..., None]

        # Letting go takes a step, being about to takes many; with little to tell them apart, a policy
        # of median actions stays closed for ever. So there the gripper counts more.
        goal = self.goal[at]
        thing, place = goal.chunk(2, 1)
        release = (thing - place).norm(dim=1) < self.THERE
        release &= self.opening[rows] < FULL
        opens = target[..., self.gripper] > 0
        weight = torch.ones_like(target)
        weight[..., self.gripper][release[:, None] & opens] = settings.release_weight

        images = self.images[moments].flatten(1, 2)
        uv = self.uv[at]  # of thing and place in each picture (R, 2, V', 2)
        shift = torch.zeros(*images.shape[:2], 2)
        if settings.shift and augment:
            images, uv, shift = shifted(images, uv, picture, settings.shift)
        patch, patch_weight = attention_target(uv, side, settings.pointers)
        if self.randomized and augment:
            images = other_light(images, self.randomized)
        tensors = dict(
            images=images,
            state=self.state[frames],
            picture=picture,
            sentence=sentence,
            target=target,
            valid=valid,
            weight=weight,
            goal=goal.nan_to_num(),
            known=goal.isfinite(),
            shift=shift,
            patch=patch,
            patch_weight=patch_weight,
            **heard,
        )
        return Batch(**{name: tensor.to(device) for name, tensor in tensors.items()})


# How far the gripper is open, as a share of its widest, with a thing in it: above EMPTY, below FULL.
EMPTY, FULL = 0.1, 0.65
LONG = 20  # steps half open: more than fingers take to close
SAME = 0.03  # m: what is let go and taken again as near as that is the same thing
UNDER = 0.04  # m from a hand that lets go down to the middle of what lies below the thing
LIFTED = 0.03  # m that a hand rises at least with what it has taken
SLACK = 0.01  # m that it sinks at most before
CARRIED = 0.1  # m sideways, of a thing that was not just lifted
LOW = 0.025  # m above its lowest: where the hand pushes
REACH = 0.03  # m from the hand to the middle of what it pushes
STRAIGHT = 0.03  # m: a way that keeps this near to a straight line has no corner
SHORT = 0.05  # m: a shorter way has little of a direction
PUSHED = 0.1  # m ahead of a thing is where it is pushed to: nobody sees where it came from


def hindsight(hand, opening, close, complete):
    """What an episode turned out to be about, by the robot's own numbers, at each moment (T, 3) m, nan:
    nobody knows. Where the thing was, where it was to go, and what is to be seen there: the middle
    of what it was put on, or the goal that it was carried to.

    | what the hand did              | the thing                         | the place          |
    | closed on something, see       | where it closes next, or the hand | where it opened,   |
    | holding() and holding_thin()   |                                   | or ended           |
    | ended shut, with nothing in it | was pushed, see pushed()          | ahead of the thing |
    | neither                        | nobody knows                      | where it ended     |

    Of an interrupted episode only the first row is known, and no place.

    hand (T, 3) m; opening (T,), share; close (T,) bool, the command; complete: not interrupted.
    """
    T, unknown = len(hand), np.full(hand.shape, np.nan)
    held = holding(opening, close)
    if complete and close[-1] and opening[-1] < EMPTY and held.sum() < LONG:
        held = holding_thin(hand, opening)
        if not held.any():
            thing, place = pushed(hand, opening)
            return thing, place, unknown
    if held[0]:  # from the start: what was asked for, or in the way
        end = T if held.all() else held.argmin()
        later = end + np.flatnonzero(held[end:])
        in_the_way = not complete
        if len(later):  # is it the same thing?
            in_the_way = np.linalg.norm((hand[later[0]] - hand[end - 1])[:2]) > SAME
        if in_the_way:
            held[:end] = False
    if not held.any():
        end = np.tile(hand[-1], (T, 1)) if complete else unknown
        return unknown, end, end
    moments = np.flatnonzero(held)
    following = np.searchsorted(moments, np.arange(T)).clip(max=len(moments) - 1)
    thing = hand[moments[following]]
    if not complete:
        return thing, unknown, unknown
    place = np.tile(hand[moments[-1]], (T, 1))
    if not held[-1]:
        return thing, place, place - [0, 0, UNDER]
    taken = max(np.flatnonzero(~held), default=-1) + 1
    carried = np.linalg.norm((hand[-1] - hand[taken])[:2]) > CARRIED
    return thing, place, place if carried else unknown


def holding(opening, close):
    """Whether something is in the hand, (T,) bool. A hold begins with two half-open steps in a row, since
    fingers that close on nothing pass through one, and lasts until they open or turn out to be empty.
    """
    half = (EMPTY < opening) & (opening < FULL)
    half &= np.append(half[1:], False)
    held = np.zeros(len(close), bool)
    for t in range(len(close)):
        still = t > 0 and held[t - 1] and opening[t] > EMPTY
        held[t] = close[t] and (half[t] or still)
    return held


def holding_thin(hand, opening):
    """The same of a thing too thin to be felt, in an episode that ends shut, (T,) bool: it was where the
    shut hand was lowest, if that ended higher.
    """
    shut = max(np.flatnonzero(opening >= EMPTY), default=-1) + 1
    height = hand[:, 2] - hand[shut:, 2].min()
    taken = shut + np.argmax(height[shut:] < SLACK)
    return (np.arange(len(hand)) >= taken) & (height[-1] > LIFTED)


def pushed(hand, opening):
    """Thing and place (T, 3) m of a push: the hand came down for good behind the thing, and went on as
    far beyond where that was, or round a corner to its place."""
    empty = opening < EMPTY
    low = empty & (hand[:, 2] <= hand[empty, 2].min() + LOW)
    first = max(np.flatnonzero(~low[:-1]), default=-1) + 1
    for corner in range(len(hand) - 1, first - 1, -1):
        way = toward(hand[first], hand[corner])
        x, y, _ = (hand[first : corner + 1] - hand[first]).T
        if np.abs(x * way[1] - y * way[0]).max() < STRAIGHT:
            break
    middle = (hand[first] + hand[corner]) / 2
    ahead = hand + REACH * way
    touched = (np.arange(len(hand)) >= first) & ((ahead - middle) @ way > 0)
    thing = np.where(touched[:, None], ahead, middle)
    place = thing + PUSHED * way
    if corner < len(hand) - 1:
        place[:] = hand[-1] + REACH * toward(hand[corner], hand[-1])
    return thing, place


def toward(start, end):
    """The level direction from one place to another (3,), less than 1 long if it is uncertain."""
    way = (end - start) * [1, 1, 0]
    return way / max(np.linalg.norm(way), SHORT)


def rotations(quat):
    """Quaternions (N, 4), w first, to matrices (N, 3, 3)."""
    w, x, y, z = quat.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def project(points, attrs, camera, hand, turn):
    """Points (T, n, 3) m, world frame, to a picture of this camera (T, n, 2): x right, y down, 0..1;
    -1: not in it, or unknown. attrs: of the episode, see write_episode in gen_data.py; hand (T, 3)
    m, turn (T, 3, 3): the hand's pose."""
    pose, fovy = attrs[f"{camera}_pose"], attrs[f"{camera}_fovy"]
    axes, position = pose[:3, :3], pose[:3, 3]
    if attrs[f"{camera}_mount"] == "hand":
        axes, position = turn @ axes, (hand + turn @ position)[:, None]
    local = (points - position) @ axes
    half = np.tan(np.radians(fovy) / 2)
    uv = local[..., :2] / np.maximum(local[..., 2:], 1e-3) / half * 0.5 + 0.5
    seen = (local[..., 2] > 0) & (np.abs(uv - 0.5) < 0.5).all(-1)
    return np.where(seen[..., None], uv, -1).astype(np.float32)


def share(requests, rows=3):
    """Lets at most so many rows of the same request have a sentence in common, since encoding it costs
    as much as a picture: the requests (U,) of the sentences, and which of them each row has."""
    order = requests.argsort(stable=True)
    _, group, count = requests[order].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    rank = torch.arange(len(requests)) - (count.cumsum(0) - count)[group]
    key = torch.empty_like(requests)
    key[order] = requests[order] * len(requests) + rank // rows
    key, sentence = key.unique(return_inverse=True)
    return key // len(requests), sentence


def other_light(images, amount):
    """Every second one of the pictures (B, V, H, W, 3) uint8, in other light and with a noisy
    camera: what differs among the worlds of --randomize and needs no simulator."""
    B, V = images.shape[:2]

    def around(center, width, *shape):
        return center + amount * width * (2 * torch.rand(shape) - 1)

    bright = around(1, 0.2, B, 1, 1, 1, 1) * around(1, 0.1, B, V, 1, 1, 3)
    noise = torch.randn(images[::2].shape) * around(0, 8, B, 1, 1, 1, 1)[::2]  # of 255
    images = images.clone()
    images[::2] = (images[::2] * bright[::2] + noise).clamp(0, 255).to(torch.uint8)
    return images


def shifted(images, uv, picture, most):
    """Random shifts, as in DrQ (arXiv:2004.13649): pictures (B, V, H, W, 3), each shifted by up to
    `most` px, its edge repeated; where things are seen in them now, (R, 2, V', 2); and by how much
    they are shifted, (B, V, 2), y and x, as a share of their size."""
    B, V, H = images.shape[:3]
    cameras = uv.shape[2]
    move = torch.randint(-most, most + 1, (B, cameras, 2))  # x and y
    source = (torch.arange(H) - move[..., None]).clamp(0, H - 1)  # (B, V', 2, H)
    x, y = source.repeat(1, V // cameras, 1, 1).unbind(2)  # all frames of a camera alike
    batch, view = torch.arange(B)[:, None, None, None], torch.arange(V)[:, None, None]
    images = images[batch, view, y[..., None], x[:, :, None]]
    now = uv + move[picture, None] / H
    seen = (uv[..., :1] >= 0) & ((now >= 0) & (now < 1)).all(-1, keepdim=True)
    shift = move.flip(-1).repeat(1, V // cameras, 1) / H
    return images, torch.where(seen, now, -1.0), shift


def attention_target(uv, side, bilinear):
    """Where things are seen, (R, 2, V', 2), see Demonstrations, to four patches (R, 2, V', 4) and
    their weights, 0 if nothing is seen: those of bilinear interpolation, so that the mean place is
    the thing's, or all for the patch that it is in."""
    first = torch.arange(uv.shape[2])[:, None] * side**2  # (V', 1) of each camera
    place = uv * side - 0.5 if bilinear else (uv * side).floor()
    corner = torch.cartesian_prod(torch.arange(2), torch.arange(2))  # (4, 2)
    cell = place.floor()[..., None, :] + corner  # (R, 2, V', 4, 2)
    weight = (1 - (place[..., None, :] - cell).abs()).prod(-1)
    x, y = cell.long().clamp(0, side - 1).unbind(-1)
    return first + y * side + x, weight * (uv[..., :1] >= 0)


class Wordings:
    """Sentences, worded afresh at every step. wordings: {intent: sentences with {names} left open}."""

    NONE = 16  # sentences in a batch that ask for nothing
    LONGEST = 24  # words, of a sentence to train on: the longest of a batch sets its cost

    def __init__(self, requests, wordings, settings):
        self.settings = settings
        self.wordings = {}  # each a list of words
        for intent, sentences in wordings.items():
            split = [re.findall(r"{\w+}|" + WORD, sentence.lower()) for sentence in sentences]
            short = [words for words in split if len(words) <= self.LONGEST]
            self.wordings[intent] = short or split
        every = set(itertools.chain(*itertools.chain(*self.wordings.values())))
        self.requests, names = [], set()
        for request in requests:
            slots = {"{%s}" % slot: word for slot, word in request["slots"].items()}
            slots = {slot: word for slot, word in slots.items() if slot in every}
            self.requests.append((request["intent"], slots))
            names.update(slots.values())
        self.names = sorted(names)
        self.open = sorted(word for word in every if word.startswith("{"))

    def draw(self, requests, rng):
        """What a Batch holds of language: text, names, intent and place, of a sentence for each of the
        distinct requests and of NONE more."""
        sentences = [self._draw(*self.requests[request], rng) for request in requests]
        for _ in range(self.NONE if "none" in self.wordings else 0):
            slots = dict(zip(self.open, rng.permutation(self.names).tolist()))
            sentences.append(self._draw("none", slots, rng))
        text, names, intent, place = zip(*sentences)
        return dict(
            text=torch.stack(text),
            names=torch.stack(names),
            intent=torch.tensor(intent),
            place=torch.tensor(place),
        )

    def _draw(self, intent, slots, rng):
        """One sentence: text and names (L, n), intent, place (2,). With other names in the text, the
        context cannot depend on them."""
        settings = self.settings
        choice = self.wordings[intent]
        wording = choice[rng.integers(len(choice))]
        place = [-1, -1]
        if intent != "none" and settings.text == "word":
            place[: len(slots)] = [wording.index(slot) for slot in slots]
        words = [self._misspell(word, rng) for word in wording]
        other = dict(zip(self.names, rng.permutation(self.names).tolist()))
        if settings.text == "char" or not settings.pointers or not settings.shuffle_names:
            other = {}
        names = " ".join(slots.get(word, word) for word in words)
        text = " ".join(other.get(slots.get(word), slots.get(word, word)) for word in words)
        text, names = tokenize(text, settings), tokenize(names, settings)
        return text, names, settings.intents.index(intent), place

    def _misspell(self, word, rng):
        """The word, or one time in many with a letter left out, doubled or swapped with the next."""
        if len(word) < 3 or word.startswith("{") or rng.random() >= self.settings.typos:
            return word
        i = rng.integers(len(word) - 1)
        one, next_one = word[i : i + 2]
        middle = (next_one, one + one + next_one, next_one + one)[rng.integers(3)]
        return word[:i] + middle + word[i + 2 :]


# ------------------------------------------------------------------------------------ losses
def compute_losses(net, batch, model):
    """The terms of the loss on a batch, by name: how far off are the actions, the read-out of thing
    and place (smooth L1, normalised), the attention on their patches, and what a sentence asks for
    and where its names are (cross-entropy)."""
    if model.config.model == "bc":
        error = (net(batch.state) - batch.target).abs()
    else:
        with autocast:
            error, goal, attention, heard = net(*batch[:9])
    error = (error.float() * batch.weight).mean(-1) * batch.valid  # (R, K)
    B, R = len(batch.state), len(batch.target)
    action = error[:B].sum() / batch.valid[:B].sum() + error[B:].sum() / max(R - B, 1)
    if model.config.model == "bc":
        return dict(action=action)
    wanted = (batch.goal - model.goal_mean) / model.goal_std
    error = F.smooth_l1_loss(goal.float(), wanted, reduction="none", beta=0.1)
    goal = (error * batch.known).sum() / batch.known.sum().clamp_min(1)
    terms = dict(action=action, goal=goal)
    M = attention.shape[1]
    if M > 1 and model.config.vision != "cnn":  # maps of thing and place in turn
        patch = batch.patch.flatten(2).repeat(1, M // 2, 1)  # (R, M, 4 V')
        found = attention.float().gather(2, patch)
        weight = batch.patch_weight.flatten(2).repeat(1, M // 2, 1) * (found > DROPPED)
        seen = (found * weight).sum(2) / weight.sum(2).clamp_min(1e-6)
        terms["attention"] = -seen.mean()
    if heard.intents is not None:
        terms["language"] = F.cross_entropy(heard.intents.float(), batch.intent)
    if heard.reading is not None:
        found = heard.reading.float().gather(2, batch.place[..., None].clamp_min(0))[..., 0]
        terms["language"] += -((found + 1e-9).log() * (batch.place >= 0)).mean()
    return terms


# --------------------------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iteration (Keller Jordan,
    github.com/KellerJordan/Muon), of all matrices of a shape at once and in `dtype`: torch.optim.Muon
    computes in bf16, 1.2 s a step on a CPU without bf16 units.

    Without weight decay (arXiv:2502.16982) the matrices grow at every step: after 11,000 steps logits
    of attention were in the thousands, where bf16 is exact to 16, and the pointers got lost."""

    MOMENTUM = 0.95
    DECAY = 0.1

    def __init__(self, params, lr, dtype):
        super().__init__(params, dict(lr=lr))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                params = [p for p in group["params"] if p.shape == shape]
                g = torch.stack([p.grad for p in params])
                buffer = self.state[params[0]].setdefault("momentum", torch.zeros_like(g))
                buffer.lerp_(g, 1 - self.MOMENTUM)
                g = g.lerp(buffer, self.MOMENTUM)  # Nesterov
                tall = shape[0] > shape[1]
                x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
                x = (x.mT if tall else x).to(self.dtype).contiguous()
                for _ in range(5):
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                    x = torch.baddbmm(x, gram, x, beta=3.4445)
                x = x.mT if tall else x
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, x):
                    p.mul_(1 - group["lr"] * self.DECAY)
                    p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, settings):
    """AdamW for all, or Muon for the matrices inside the transformers and the pointers, and those
    between hidden layers of what reads off positions and of the head."""
    inner = ".q. .kv. .out. .up. .down. pointers.query pointers.key goal.2".split()
    matrices, others = [], []
    for name, p in model.named_parameters():
        between = name.startswith("head.net.") and p.shape == (settings.head_width,) * 2
        inside = p.ndim == 2 and (between or any(part in name for part in inner))
        (matrices if inside and settings.optimizer == "muon" else others).append(p)
    optimizers = [
        torch.optim.AdamW(
            others, settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
    ]
    if matrices:
        optimizers.append(Muon(matrices, settings.lr, getattr(torch, dtype)))
    return optimizers


def schedule(step, steps):
    """Learning rate as a share of its peak: 50 steps up, then flat, the last 60% down to zero."""
    return min((step + 1) / 50, 1.0, (steps - step) / (0.6 * steps))


# ------------------------------------------------------------------------------- preparation
def run(script, *flags):
    """Runs another script of this repository; returns its exit status."""
    return subprocess.run([sys.executable, ROOT / script, *flags]).returncode


ckpt, resume_pt = out_dir / "ckpt.pt", out_dir / "resume.pt"
log, curve = out_dir / "log.jsonl", out_dir / "curve.png"
if ckpt.exists() and not resume and not overwrite:
    raise ValueError(
        f"{ckpt} exists; --resume {out_dir} carries on from it, --overwrite replaces it, "
        "--out_dir goes elsewhere"
    )
out_dir.mkdir(parents=True, exist_ok=True)
if RANK > 0:  # only the first prints
    sys.stdout = open(os.devnull, "w")
if RANKS > 1:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
start = time.time()
files = sorted(glob.glob(settings.data))
if not files:
    if RANKS > 1 or glob.has_magic(settings.data):
        raise ValueError(f"there is no {settings.data}; gen_data.py makes demonstrations")
    print(
        f"{settings.data} is not there: making {settings.episodes} demonstrations, about "
        f"{max(1, round(settings.episodes / 800))} minutes on 2 cores",
        flush=True,
    )
    failed = run(
        "gen_data.py",
        f"--episodes={settings.episodes}",
        f"--out={settings.data}",
        f"--tasks={','.join(settings.tasks)}",
        f"--randomize={settings.randomize}",
        "--normal_share=0.35",
        f"--cameras={','.join(dict.fromkeys(Config.cameras + settings.cameras))}",
    )
    if failed:
        sys.exit(failed)
    files = [settings.data]
data_minutes = (time.time() - start) / 60
with explained(f"{settings.data} cannot be used"):
    demos = Demonstrations(files, settings, chosen)
settings.check()
config = Config(**{name: getattr(settings, name) for name in vars(Config())})
wordings = Wordings(demos.requests, demos.wordings, settings)

torch.manual_seed(settings.seed)
model = POLICIES[config.model](config)
state = demos.state[demos.train]  # statistics of training frames alone
model.state_mean.copy_(state.mean(0))
model.state_std.copy_(state.std(0) + 1e-3)
if config.model == "vla":
    goal = demos.goal[0, demos.train]
    goal = goal[goal.isfinite().all(1)]
    if len(goal):
        model.goal_mean.copy_(goal.mean(0))
        model.goal_std.copy_(goal.std(0) + 1e-3)
    pictures = demos.images[demos.train[::97]].float()  # (n, V, H, W, 3)
    mean = pictures.mean((0, 2, 3), keepdim=True)  # (1, V, 1, 1, 3)
    std = (pictures - mean).square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1)
    model.vision.image_mean.copy_(mean[0].repeat(config.frames, 1, 1, 1))
    model.vision.image_std.copy_(std[0].repeat(config.frames, 1, 1, 1))
side = model.vision.side if config.model == "vla" else 1
model.to(device)
net = DistributedDataParallel(model) if RANKS > 1 else model
if settings.compile:
    net = torch.compile(net)
optimizers = make_optimizers(model, settings)
weights = dict(
    action=1.0,
    goal=settings.goal_weight,
    attention=settings.attention_weight,
    language=settings.language_weight,
)

digest = hashlib.sha256()
for x in (demos.images[::97], demos.action, demos.request, demos.goal):
    digest.update(x.numpy().tobytes())
fingerprint = dict(
    torch=str(torch.__version__),
    cpu=torch.backends.cpu.get_cpu_capability(),
    threads=torch.get_num_threads(),
    commit=code_version(),
    data=digest.hexdigest()[:12],
)
first_step, history = 0, []  # lines of the log
if resume:
    with explained(f"cannot resume from {resume_pt}"):
        same = saved["fingerprint"]["data"] == fingerprint["data"]
        if saved["config"] != dataclasses.asdict(config) or not same:
            raise ValueError("it is of another configuration or of other demonstrations")
        model.load_state_dict(saved["weights"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step, history = saved["step"], saved["history"]
print(", ".join(f"{key} {value}" for key, value in fingerprint.items()))
print(
    f"{settings.data}: {len(demos.train)} frames to train on, {len(demos.valid)} held out, of "
    f"{', '.join(config.tasks)}\n{config.model}: "
    f"{sum(p.numel() for p in model.parameters()):,} parameters; {device}, {dtype}",
    flush=True,
)


def draw(frames, rng, augment=False):
    """This process's share of a batch of `frames`, see Demonstrations.batch."""
    mine = torch.from_numpy(frames[RANK::RANKS])
    return demos.batch(mine, wordings, side, settings, rng, augment)


def average(value):
    """Of all processes, as a float."""
    if RANKS > 1:
        dist.all_reduce(value)
    return value.item() / RANKS


@torch.no_grad()
def validate():
    torch.manual_seed(0)
    frames = np.random.default_rng(0).choice(
        demos.valid, min(512, len(demos.valid)), replace=False
    )
    terms = compute_losses(model, draw(frames, np.random.default_rng(0)), model)
    return {f"val_{name}": average(value) for name, value in terms.items()}


def save(step):
    if RANK == 0:
        about = dict(step=step, settings=chosen, fingerprint=fingerprint)
        states = [optimizer.state_dict() for optimizer in optimizers]
        model.save(ckpt, **about)
        model.save(resume_pt, torch.float32, **about, history=history, optimizers=states)


# ---------------------------------------------------------------------------------- the loop
stopping = []  # Ctrl-C is heeded between steps
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: os._exit(130) if stopping else stopping.append(True))
began, measured = time.time(), first_step
bar = tqdm(range(first_step, settings.steps), disable=RANK > 0 or None)  # None: no terminal
for step in bar:
    rng = np.random.default_rng([settings.seed, step])  # a batch is a function of seed and step
    torch.manual_seed(1_000_000 * settings.seed + step + 10**12 * RANK)
    batch = draw(rng.choice(demos.train, settings.batch_size), rng, augment=True)
    terms = compute_losses(net, batch, model)
    rate = schedule(step, settings.steps)
    # Labels in hindsight are a little off. Pulled on to the end, attention learns that by heart.
    weights["attention"] = settings.attention_weight * rate
    loss = sum(weights[name] * value for name, value in terms.items())
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is {loss.item()} at step {step + 1}; {ckpt} is as it was. "
            "Lower --lr and --adam_lr, or look at the data"
        )
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate
        optimizer.step()
        optimizer.zero_grad()

    done = step + 1
    last = done == settings.steps
    if done % settings.log_interval == 0 or last:
        seconds = (time.time() - began) / (done - measured)
        losses = dict(loss=average(loss.detach()), **validate())
        lr, speed = optimizers[-1].param_groups[0]["lr"], settings.batch_size / seconds
        history.append(dict(step=done, **losses, lr=lr, samples_per_s=speed))
        if RANK == 0:
            log.write_text("".join(json.dumps(line) + "\n" for line in history))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        print(f"step {done:5d}  {shown}  {seconds * 1e3:.0f} ms/step", flush=True)
        began, measured = time.time(), done
    stop = average(torch.tensor(float(len(stopping)), device=device))  # all of them together
    if stop or last or settings.eval_interval and done % settings.eval_interval == 0:
        save(done)
    if stop and not last:
        print(
            f"stopped after {done} steps; python train.py --resume {shlex.quote(str(out_dir))} "
            "carries on",
            file=sys.stderr,
        )
        sys.exit(130)
if RANKS > 1:
    dist.destroy_process_group()
if RANK > 0:
    sys.exit()

# ---------------------------------------------------------------------------- curve and score
figure = Figure(figsize=(6, 3.5), layout="constrained")  # no pyplot: draws without a display
axes = figure.subplots()
steps = [line["step"] for line in history]
for name in ("loss", "val_action"):  # all terms, and the actions on held-out scenes
    axes.plot(steps, [line[name] for line in history], label=name)
axes.set(yscale="log", xlabel="step")
axes.legend()
figure.savefig(curve, dpi=110)
print(
    f"{ckpt}, {log}, {curve}; data {data_minutes:.1f} min, "
    f"training {(time.time() - start) / 60 - data_minutes:.1f} min",
    flush=True,
)
if settings.eval_interval and demos.ours:
    episodes = f"--episodes={settings.eval_episodes}"
    sys.exit(run("eval.py", "--ckpt", ckpt, "--seed=0", episodes))
