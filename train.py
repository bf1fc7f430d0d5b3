"""Trains a policy on the demonstrations and says how well it does on scenes it has never seen.

    python train.py --steps 2000                       # 8 to 14 minutes on 2 cores, data included
    python train.py --tasks all --steps 6000 --out_dir out_all             # about half an hour
    python train.py --model bc --out_dir out_bc        # the behaviour-cloning baseline
    python train.py --recipe classic --out_dir out_c   # the setting of tutorials, see RECIPES
    torchrun --standalone --nproc_per_node=2 train.py  # data-parallel

Leaves ckpt.pt, log.jsonl and curve.png in --out_dir. Ctrl-C saves; `--resume out` carries on. In
order: settings, demonstrations, losses, optimiser, preparation, the loop, curve and score.
"""

import argparse
import dataclasses
import glob
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    POLICIES,
    Config,
    add_flags,
    explain_errors,
    load_file,
    one_line,
    save_file,
    setting,
    split,
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
        "picovla", "other defaults for all that follows", ("picovla", "classic")
    )
    # optimisation
    steps: int = setting(2000, "optimiser steps", high=10**7)
    batch_size: int = setting(64, "frames per step", high=10**6)
    optimizer: str = setting(
        "muon", "Muon with AdamW for the rest, or AdamW alone", ("muon", "adamw")
    )
    lr: float = setting(
        0.02,
        "Muon's learning rate, for the matrices inside the transformers",
        low=1e-9,
        high=1e30,
        needs=("optimizer", ("muon",)),
    )
    adam_lr: float = setting(
        2e-3, "AdamW's learning rate, for everything else", low=1e-9, high=1e30
    )
    seed: int = setting(0, "seed of weights and batches", low=0, high=10**9)
    # task
    state: str = setting(
        "proprio",
        "what the robot feels (proprio), with the answer (full), or none",
        ("proprio", "full", "none"),
    )
    relabel: float = setting(
        1.0,
        "share of the batch that is shown a second time, with another "
        "instruction that the scene allows and what the expert would do then; "
        "their mean counts as much as that of the others",
        low=0,
        high=1,
        needs=("model", ("vla",)),
    )
    attention_weight: float = setting(
        0.1,
        "weight of pulling attention onto the patches of thing and place",
        low=0,
        needs=("vision", ("vit_stem", "vit")),
    )
    goal_weight: float = setting(
        0.5, "weight of the regression of their positions", low=0, needs=("model", ("vla",))
    )
    release_weight: float = setting(
        5.0,
        "how many times more the gripper's error counts where closed "
        "fingers should let go of a thing at its place",
        low=0,
    )
    # instructions
    word_dropout: float = setting(
        0.1,
        "share of words that are left out, but for those that carry " "the meaning",
        low=0,
        high=1,
        needs=("model", ("vla",)),
    )
    position_gaps: int = setting(
        1,
        "1: gaps at random between the words, so that their order counts "
        "and not their places",
        (0, 1),
        low=0,
        needs=("text", ("word",)),
    )
    shuffle_names: int = setting(
        1,
        "1: other colours in the words that are read in their context, so "
        "that only the pointers' names depend on them",
        (0, 1),
        low=0,
        needs=("text", ("word",)),
    )
    # data and machine
    data: str = setting(
        "",
        "demonstrations: a file, or a pattern such as 'shards/*.h5'; made if "
        "missing (default data/demos.h5, or data/TASKS.h5)",
    )
    episodes: int = setting(
        0, "how many to make if missing; 0: 3000, or 8000 for all tasks", low=0, high=100_000
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
    compile: bool = setting(False, "torch.compile the model (pays on a GPU only)")
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
        chunk=1,
        loss="mse",
        attention_weight=0.0,
        goal_weight=0.0,
        relabel=0.0,
        release_weight=1.0,
        word_dropout=0.0,
        optimizer="adamw",
        adam_lr=1e-4,
        batch_size=32,
    ),
)
BC = dict(state="full", cameras=(), chunk=1, optimizer="adamw")

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add_flags(parser, Settings)
parser.add_argument(
    "--out_dir", type=Path, default=Path("out"), help="where results go (default out)"
)
parser.add_argument("--overwrite", action="store_true", help="replace what is in --out_dir")
parser.add_argument(
    "--resume",
    type=Path,
    metavar="DIR",
    help="carry on from what is in DIR, with the "
    "settings it was started with where nothing else is said",
)
said = vars(parser.parse_args())
resume, overwrite, out_dir = said.pop("resume"), said.pop("overwrite"), said.pop("out_dir")
if resume:
    out_dir = resume
saved = load_file(out_dir / "resume.pt") if resume else {}
chosen = RECIPES[said.get("recipe", "picovla")] | (BC if said.get("model") == "bc" else {})
try:
    chosen = chosen | saved.get("settings", {}) | said  # explicit flags win
    settings = Settings(**chosen)
except TypeError as error:
    raise ValueError(
        f"{out_dir}/resume.pt was begun by another train.py ({one_line(error)})"
    ) from None
settings.max_text = 16 if settings.text == "word" else 96
settings.check(said)
if settings.model == "bc":
    inside = {f.name for f in dataclasses.fields(Config)} - {"model", "tasks", "chunk", "state"}
    if strange := [flag for flag in said if flag in inside]:
        raise ValueError(
            f"--{strange[0]} is about the vla; --model bc has only a state and one action"
        )
if not settings.data:
    names = "_".join(settings.tasks)
    settings.data = f"data/{'demos' if names == 'pick_place' else names}.h5"
device = settings.device
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = "mps" if torch.backends.mps.is_available() else device
available = dict(
    cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available()
)
if not available[device]:
    raise ValueError(f"--device {device} is not available here; leave it at auto")
dtype = settings.dtype
if dtype == "auto":
    units = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    dtype = "bfloat16" if units else "float32"
autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
torch.use_deterministic_algorithms(device == "cpu", warn_only=True)  # sums in a fixed order


# ---------------------------------------------------------------------------- demonstrations
@dataclass
class Batch:
    """Frames with their own instruction, and then some of them again with another: R rows in all."""

    images: torch.Tensor  # (B, V, H, W, 3) uint8
    state: torch.Tensor  # (B, S) float32
    text: torch.Tensor  # (U, L) int64, as words in their context
    names: torch.Tensor  # (U, L) int64, as bare names
    picture: torch.Tensor  # (R,) which frame
    sentence: torch.Tensor  # (R,) which sentence
    target: torch.Tensor  # (R, K, A) the expert's actions
    valid: torch.Tensor  # (R, K) bool: whether they are known
    weight: torch.Tensor  # (R, K, A) how much they count
    goal: torch.Tensor  # (R, G) m, world frame: thing and place
    patch: torch.Tensor  # (R, 2, V') int64: where those two are seen,
    visible: torch.Tensor  # (R, 2, V') in which of the newest pictures


class Demonstrations:
    """Everything of the data files in memory, tensors with one row for each of N frames:

    images (N, V', H, W, 3) uint8 of V' cameras; state (N, S); action (N, A); goal (N, G) m; opening
    (N,) m; start, end, episode (N,): frames of its episode, and which; held_out (N,) bool; request
    (N,) index of requests; things (N, 2), -1: none; uv (N, V', things, 2), -1: not visible; and
    relabel_request, relabel_things, relabel_goal, relabel_action: the same of another instruction.
    """

    CLOSED = 0.055  # m between the fingers: less with a block in them
    THERE = 0.03  # m from its place

    def __init__(self, paths, settings, chosen):
        with ExitStack() as stack:
            files = [stack.enter_context(h5py.File(path)) for path in paths]
            attrs = dict(files[0].attrs)
            for path, file in zip(paths, files):
                if any(
                    file.attrs[key] != attrs[key] for key in ("requests", "env_args", "proprio")
                ):
                    raise ValueError(
                        f"{path} was made with other tasks or cameras than {paths[0]}"
                    )
            self.requests = json.loads(attrs["requests"])
            self.tasks = tuple(attrs["tasks"].split(","))
            recorded = tuple(json.loads(attrs["env_args"])["env_kwargs"]["cameras"])
            self.cameras = tuple(chosen.get("cameras", recorded))
            proprio, privileged = attrs["proprio"].split(","), attrs["privileged"].split(",")
            keys = dict(proprio=proprio, full=proprio + privileged, none=[])
            self.state_keys = tuple(keys[settings.state])
            self.gripper = attrs["action_names"].split(",").index("gripper")
            self._check_choice(settings, chosen, recorded, attrs)

            groups, held_out = [], []
            for file in files:
                masked = set(file["mask/valid"][:])
                for i in range(int(file.attrs["total"])):
                    groups.append(file[f"episode_{i}"])
                    held_out.append(f"demo_{i}".encode() in masked)
            if settings.max_episodes > len(groups):
                raise ValueError(
                    f"--max_episodes {settings.max_episodes} is more than the "
                    f"{len(groups)} of {settings.data}"
                )
            groups = groups[: settings.max_episodes or None]
            self._read(groups, held_out, privileged, settings)
        self._check_labels(settings)

    def _check_choice(self, settings, chosen, recorded, attrs):
        """Whether the file holds what is asked of it."""
        for camera in self.cameras:
            if camera not in recorded:
                raise ValueError(
                    f"--cameras {camera!r} is not in {settings.data}, which has "
                    f"{', '.join(recorded)}"
                )
        wanted = chosen.get("tasks", self.tasks)
        if tuple(wanted) == ("all",):
            wanted = attrs["all_tasks"].split(",")
        if set(wanted) != set(self.tasks):
            raise ValueError(
                f"{settings.data} holds {', '.join(self.tasks)}, not "
                f"{', '.join(wanted)}; give another --data"
            )

    def _read(self, groups, held_out, privileged, settings):
        """Reads the arrays of all episodes, after checking that all are of the same kinds."""
        observed = dict.fromkeys(["gripper", *self.state_keys, *privileged])
        images = [f"observations/{camera}_image" for camera in self.cameras]
        uvs = [f"grounding/{camera}_uv" for camera in self.cameras] or ["grounding/things_pos"]
        names = ["actions", *images, *uvs, *[f"observations/{key}" for key in observed]]
        names += [f"grounding/relabel{end}" for end in ("", "_things", "_goal", "_action")]
        size = groups[0][images[0]].shape[2] if images else Config.image_size
        kinds = {
            name: (groups[0][name].shape[1:], groups[0][name].dtype.kind) for name in names
        }
        for name in images:
            if kinds[name][1] != "u" or kinds[name][0] != (size, size, 3):
                raise ValueError(
                    f"{settings.data}: {name} must be (T, size, size, 3) uint8, not "
                    f"{groups[0][name].shape} {groups[0][name].dtype}"
                )
        lengths = []
        for group in groups:
            lengths.append(len(group["actions"]))
            for name, (shape, kind) in kinds.items():
                array = group[name]
                if array.shape != (lengths[-1], *shape) or array.dtype.kind != kind:
                    raise ValueError(
                        f"{settings.data}: {name} of {group.name[1:]} is {array.shape} "
                        f"{array.dtype}, unlike the first episode's"
                    )
        N = sum(lengths)
        self._check_memory(N * (len(images) * size**2 * 3 + 2000), len(groups), settings)
        self.images = torch.empty(N, len(images), size, size, 3, dtype=torch.uint8)
        columns = {name: [] for name in names if name not in images}
        start = 0
        bar = tqdm(
            zip(groups, lengths),
            "loading",
            len(groups),
            disable=RANK > 0 or not sys.stderr.isatty(),
        )
        for group, n in bar:
            for v, name in enumerate(images):
                self.images[start : start + n, v] = torch.from_numpy(group[name][:])
            for name, column in columns.items():
                column.append(group[name][:])
                if column[-1].dtype.kind == "f" and not np.isfinite(column[-1]).all():
                    raise ValueError(
                        f"{settings.data}: {name} of {group.name[1:]} is not all finite"
                    )
            start += n
        column = {
            name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()
        }

        def joined(keys):
            return torch.cat(
                [torch.zeros(N, 0), *[column[f"observations/{key}"] for key in keys]], 1
            )

        def each(values):
            """One value an episode, for every frame of it."""
            return torch.tensor(np.array(values)).repeat_interleave(torch.tensor(lengths), 0)

        ends = np.cumsum(lengths)
        self.state = joined(self.state_keys)
        self.goal = joined(privileged)
        self.action = column["actions"]
        self.opening = column["observations/gripper"][:, 0]
        self.start = each(ends - lengths)
        self.end = each(ends)
        self.episode = each(np.arange(len(groups)))
        self.held_out = each(held_out[: len(groups)])
        self.request = each([int(group.attrs["request"]) for group in groups])
        self.things = each([group.attrs["things"].astype(np.int64) for group in groups])
        self.relabel_request = column["grounding/relabel"].long()
        self.relabel_things = column["grounding/relabel_things"].long()
        self.relabel_goal = column["grounding/relabel_goal"]
        self.relabel_action = column["grounding/relabel_action"]
        self.uv = torch.stack([column[name][..., :2] for name in uvs], 1)  # (N, V', things, 2)

    def _check_memory(self, need, episodes, settings):
        try:
            text = Path("/proc/meminfo").read_text()  # Linux only
            free = int(re.search(r"MemAvailable: *(\d+)", text)[1]) * 1024
        except (OSError, TypeError):
            return
        if need > free:
            raise ValueError(
                f"{settings.data} needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
                f"are free; --max_episodes {int(episodes * free / need)} needs less"
            )

    def _check_labels(self, settings):
        """Whether every index points at something and every action is one."""
        ranges = [
            ("actions", self.action, -1, 1),
            ("relabel_action", self.relabel_action, -1, 1),
            ("request", self.request, 0, len(self.requests) - 1),
            ("relabel", self.relabel_request, 0, len(self.requests) - 1),
            ("things", self.things, -1, self.uv.shape[2] - 1),
            ("relabel_things", self.relabel_things, -1, self.uv.shape[2] - 1),
        ]
        for name, values, low, high in ranges:
            wrong = (values < low) | (values > high)
            if wrong.any():
                episode = self.episode[wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong][0]
                raise ValueError(
                    f"{settings.data}: {name} of episode_{episode} is not all from {low} to "
                    f"{high}"
                )
        for part, frames in (
            ("train on", ~self.held_out),
            ("validate on, of another scene", self.held_out),
        ):
            if not frames.any():
                raise ValueError(f"{settings.data} is too small: it has no episode to {part}")

    def batch(self, frames, relabelled, wordings, sides, config, release_weight, rng):
        """The Batch of `frames` (B,) int64, of which the first `relabelled` are shown again with
        another instruction. sides: patches across in each view."""
        B = len(frames)
        again = frames[:relabelled]
        rows = torch.cat([frames, again])
        requests = torch.cat([self.request[frames], self.relabel_request[again]])
        distinct, sentence = requests.unique(return_inverse=True)
        text, names = wordings.draw(distinct.tolist(), rng)
        moments = [
            torch.maximum(frames - age, self.start[frames]) for age in range(config.frames)
        ]

        ahead = frames[:, None] + torch.arange(config.chunk)
        inside = ahead < self.end[frames, None]  # nothing is known beyond the episode
        target = self.action[ahead.clamp_max(len(self.action) - 1)] * inside[..., None]
        known = torch.zeros(relabelled, config.chunk, dtype=torch.bool)
        known[:, 0] = True  # of the other instruction, one action
        other = self.relabel_action[again][:, None] * known[..., None]
        target, valid = torch.cat([target, other]), torch.cat([inside, known])
        goal = torch.cat([self.goal[frames], self.relabel_goal[again]])

        # Letting go takes a step, being about to takes many; with little to tell them apart, a policy
        # of median actions stays closed for ever. So there the gripper counts more.
        half = goal.shape[1] // 2
        there = (goal[:, :half] - goal[:, half:]).norm(dim=1) < self.THERE
        release = there & (self.opening[rows] < self.CLOSED)
        opens = target[..., self.gripper] > 0
        weight = torch.ones_like(target)
        weight[..., self.gripper][release[:, None] & opens] = release_weight

        things = torch.cat([self.things[frames], self.relabel_things[again]])  # (R, 2)
        # of thing and place in each picture (R, 2, V', 2): x, y or -1; "no thing", -1, is masked
        uv = self.uv[rows[:, None], :, things]
        visible = (uv[..., 0] >= 0) & (things >= 0)[..., None]
        side = torch.tensor(sides[: uv.shape[2]])
        first = torch.cat([torch.zeros(1, dtype=torch.long), (side**2).cumsum(0)[:-1]])
        cell = (uv * side[:, None]).long().clamp_min(0).minimum(side[:, None] - 1)
        patch = first + cell[..., 1] * side + cell[..., 0]
        tensors = dict(
            images=torch.cat([self.images[moment] for moment in moments], 1),  # newest first
            state=self.state[frames],
            text=text,
            names=names,
            picture=torch.cat([torch.arange(B), torch.arange(relabelled)]),
            sentence=sentence,
            target=target,
            valid=valid,
            weight=weight,
            goal=goal,
            patch=patch,
            visible=visible,
        )
        return Batch(**{name: tensor.to(device) for name, tensor in tensors.items()})


class Wordings:
    """The sentences of each request as tokens, and how training varies them."""

    def __init__(self, requests, config, settings):
        self.settings = settings
        self.tokens = [
            torch.stack([tokenize(sentence, config) for sentence in request["sentences"]])
            for request in requests
        ]
        self.size = 1 + max(int(tokens.max()) for tokens in self.tokens)
        number = {word: i + 1 for i, word in enumerate(config.words)}
        meaning, names = set(), set()  # words
        for task in {request["task"] for request in requests}:
            mine = [
                {word for sentence in request["sentences"] for word in split(sentence)}
                for request in requests
                if request["task"] == task
            ]
            meaning |= set.union(*mine) - set.intersection(*mine)  # what tells requests apart
        for request in requests:
            names |= {
                word
                for slot, word in request["slots"].items()
                if slot in ("block", "pad", "lower")
            }
        self.is_word = config.text == "word"  # characters are neither moved nor left out
        self.meaning = torch.tensor([number[word] for word in config.words if word in meaning])
        if not self.is_word:
            self.meaning = torch.arange(self.size)
        self.names = torch.tensor([number[word] for word in config.words if word in names])

    def draw(self, requests, rng):
        """Text and names (U, L) for the distinct requests, each worded in one way: as words in their
        context, some of them left out and with other colours, and as they are; both with gaps.

        Words left out teach other wordings than those of the file. So do gaps: a longer sentence has
        words at places where there was never one (randomized positions, arXiv:2305.16843)."""
        names = []
        for request in requests:
            choice = self.tokens[request]
            names.append(choice[rng.integers(len(choice))])
        names = torch.stack(names)
        if self.is_word and self.settings.position_gaps:
            names = torch.stack([self._with_gaps(sentence, rng) for sentence in names])
        keep = torch.from_numpy(rng.random(names.shape) >= self.settings.word_dropout)
        keep |= torch.isin(names, self.meaning)
        text = names.clone()
        if self.is_word and self.settings.pointers and self.settings.shuffle_names:
            for row in text:
                other = torch.arange(self.size)
                other[self.names] = self.names[rng.permutation(len(self.names))]
                row[:] = other[row]
        return text * keep, names

    def _with_gaps(self, sentence, rng):
        """The tokens (L,) in order at random places, from side by side to all over the row."""
        words = sentence[sentence > 0]
        room = len(words) + rng.integers(len(sentence) - len(words) + 1)
        places = np.sort(rng.permutation(room)[: len(words)])
        spread = torch.zeros_like(sentence)
        spread[places] = words
        return spread


# ------------------------------------------------------------------------------------ losses
def compute_losses(net, batch, model):
    """The terms of the loss on a batch, by name: how far off are the actions, the read-out of thing
    and place (smooth L1, normalised), and the attention on their patches (cross-entropy)."""
    if model.config.model == "bc":
        error = (net(batch.state) - batch.target).abs()
    else:
        with autocast:
            error, goal, attention = net(
                batch.images,
                batch.state,
                batch.text,
                batch.picture,
                batch.sentence,
                batch.names,
                batch.target,
                batch.valid,
            )
    error = (error.float() * batch.weight).mean(-1) * batch.valid  # (R, K)
    B, R = len(batch.state), len(batch.target)
    action = error[:B].sum() / batch.valid[:B].sum() + error[B:].sum() / max(R - B, 1)
    if model.config.model == "bc":
        return dict(action=action)
    wanted = (batch.goal - model.goal_mean) / model.goal_std
    terms = dict(action=action, goal=F.smooth_l1_loss(goal.float(), wanted, beta=0.1))
    M = attention.shape[1]
    if M and model.config.vision != "cnn":  # maps of thing and place in turn
        patch = batch.patch.repeat(1, M // 2, 1)  # (R, M, V')
        visible = batch.visible.repeat(1, M // 2, 1)
        seen = (attention.float().gather(2, patch) * visible).sum(2) / visible.sum(2).clamp_min(
            1
        )
        terms["attention"] = -seen.mean()
    return terms


# --------------------------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iteration (Keller Jordan,
    github.com/KellerJordan/Muon), in fp32 and all matrices of a shape at once: torch.optim.Muon
    computes in bf16, 1.2 s a step on a CPU without bf16 units."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                params = [p for p in group["params"] if p.shape == shape]
                g = torch.stack([p.grad for p in params])
                buffer = self.state[params[0]].setdefault("momentum", torch.zeros_like(g))
                buffer.lerp_(g, 1 - group["momentum"])
                g = g.lerp(buffer, group["momentum"])  # Nesterov
                tall = shape[0] > shape[1]
                x = g.mT if tall else g
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, x):
                    p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, settings):
    """AdamW for all, or Muon for the matrices inside the transformers and the pointers."""
    inner = (".q.", ".kv.", ".out.", ".up.", ".down.", "pointers.query", "pointers.key")
    matrices, others = [], []
    for name, p in model.named_parameters():
        muon = (
            settings.optimizer == "muon" and p.ndim == 2 and any(part in name for part in inner)
        )
        (matrices if muon else others).append(p)
    optimizers = [
        torch.optim.AdamW(others, settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.01)
    ]
    if matrices:
        optimizers.append(Muon(matrices, settings.lr))
    return optimizers


def schedule(step, steps):
    """Learning rate as a share of its peak: 50 steps up, then flat, the last 60% down to zero."""
    return min((step + 1) / 50, 1.0, (steps - step) / (0.6 * steps))


# ------------------------------------------------------------------------------- preparation
paths = {name: out_dir / name for name in ("ckpt.pt", "resume.pt", "log.jsonl", "curve.png")}
for path in (paths["ckpt.pt"], paths["resume.pt"]):
    if path.exists() and not resume and not overwrite and RANK == 0:
        raise ValueError(
            f"{path} exists; --resume {out_dir} carries on from it, --overwrite replaces "
            "it, --out_dir goes elsewhere"
        )
out_dir.mkdir(parents=True, exist_ok=True)
(out_dir / f"rank{RANK}").touch()  # can we write here?
(out_dir / f"rank{RANK}").unlink()
if RANKS > 1:
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # only the first prints
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
clock = time.time()
files = [settings.data] if Path(settings.data).exists() else sorted(glob.glob(settings.data))
if not files:
    if RANKS > 1 or glob.has_magic(settings.data):
        raise ValueError(f"there is no {settings.data}; gen_data.py makes demonstrations")
    if missing := set(chosen.get("cameras", ())) - set(Config.cameras):
        raise ValueError(
            f"{settings.data} is not there, and would be made without camera "
            f"{min(missing)}; make it with gen_data.py --cameras"
        )
    episodes = settings.episodes or (3000 if settings.tasks == Config.tasks else 8000)
    print(
        f"{settings.data} is not there: making {episodes} demonstrations, about "
        f"{max(1, round(episodes / 1000))} minutes on 2 cores",
        flush=True,
    )
    command = [
        "--episodes",
        str(episodes),
        "--out",
        settings.data,
        "--tasks",
        ",".join(settings.tasks),
    ]
    made = subprocess.run([sys.executable, str(ROOT / "gen_data.py"), *command])
    if made.returncode:
        sys.exit(made.returncode)
    files = [settings.data]
data_minutes = (time.time() - clock) / 60
try:
    demos = Demonstrations(files, settings, chosen)
except (
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    json.JSONDecodeError,
) as error:
    raise ValueError(
        f"{settings.data} cannot be used ({one_line(error)}); give another --data, or move "
        "it away and have one made"
    ) from None
train_frames = np.flatnonzero(~demos.held_out.numpy())
valid_frames = np.flatnonzero(demos.held_out.numpy())
vocabulary = {
    word for request in demos.requests for s in request["sentences"] for word in split(s)
}
settings = dataclasses.replace(
    settings,
    tasks=demos.tasks,
    cameras=demos.cameras,
    words=tuple(sorted(vocabulary)),
    state_keys=demos.state_keys,
    state_size=demos.state.shape[1],
    goal_size=demos.goal.shape[1],
    action_size=demos.action.shape[1],
    image_size=demos.images.shape[2],
)
settings.check()
config = Config(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(Config)})
wordings = Wordings(demos.requests, config, settings)

torch.manual_seed(settings.seed)
model = POLICIES[config.model](config)
some = train_frames[::97]
pictures = demos.images[some].float()  # (n, V, H, W, 3)
if config.state_size:  # statistics of training frames alone
    model.state_mean.copy_(demos.state[train_frames].mean(0))
    model.state_std.copy_(demos.state[train_frames].std(0) + 1e-3)
if config.model == "vla":
    model.goal_mean.copy_(demos.goal[train_frames].mean(0))
    model.goal_std.copy_(demos.goal[train_frames].std(0) + 1e-3)
    pixels = len(some) * config.image_size**2
    mean = pictures.sum((0, 2, 3)) / pixels  # (V, 3)
    std = ((pictures - mean[:, None, None]).square().sum((0, 2, 3)) / pixels).sqrt()
    model.vision.image_mean.copy_(mean[:, None, None].repeat(config.frames, 1, 1, 1))
    model.vision.image_std.copy_(std[:, None, None].repeat(config.frames, 1, 1, 1))
model.to(device)
net = DistributedDataParallel(model) if RANKS > 1 else model
if settings.compile:
    net = torch.compile(net)
optimizers = make_optimizers(model, settings)
sides = model.vision.sides if config.model == "vla" else [1]
weights = dict(action=1.0, goal=settings.goal_weight, attention=settings.attention_weight)
content = [
    getattr(demos, name).numpy().tobytes()
    for name in ("action", "state", "request", "goal", "uv")
]
content = b"".join(content) + str(int(pictures.sum())).encode()
commit = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
)
fingerprint = dict(
    torch=str(torch.__version__),
    numpy=np.__version__,
    h5py=h5py.__version__,
    cpu=torch.backends.cpu.get_cpu_capability(),
    threads=torch.get_num_threads(),
    commit=commit.stdout.strip() or "unknown",
    data=hashlib.sha256(content).hexdigest()[:12],
)
first_step, history = 0, []  # lines of the log
if resume:
    try:
        if saved["config"] != dataclasses.asdict(config):
            raise ValueError(
                "it is of another configuration; resume with the flags it began with"
            )
        if saved["fingerprint"]["data"] != fingerprint["data"]:
            raise ValueError(f"it was trained on other demonstrations than {settings.data}")
        model.load_state_dict(saved["weights"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = int(saved["step"])
        history = [dict(line) for line in saved["history"]]
        if settings.steps < first_step:
            raise ValueError(f"it is at step {first_step} already; --steps must not be less")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot resume from {paths['resume.pt']}: {one_line(error)}"
        ) from None
print(", ".join(f"{key} {value}" for key, value in fingerprint.items()))
print(
    f"{settings.data}: {len(train_frames)} frames to train on, {len(valid_frames)} held out, of "
    f"{', '.join(config.tasks)}"
)
print(
    f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {device}, {dtype}, "
    f"{torch.get_num_threads()} threads",
    flush=True,
)


def draw(frames, rng):
    """This process's share of a batch of `frames`, see Demonstrations.batch."""
    mine = torch.from_numpy(frames[RANK::RANKS])
    relabelled = int(settings.relabel * len(mine)) if config.model == "vla" else 0
    return demos.batch(mine, relabelled, wordings, sides, config, settings.release_weight, rng)


def average(value):
    """Of all processes, as a float."""
    if RANKS > 1:
        dist.all_reduce(value)
    return value.item() / RANKS


@torch.no_grad()
def validate():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    frames = rng.choice(valid_frames, min(512, len(valid_frames)), replace=False)
    terms = compute_losses(model, draw(frames, np.random.default_rng(0)), model)
    return {name: average(value) for name, value in terms.items()}


def save(step):
    if RANK == 0:
        about = dict(step=step, settings=chosen, fingerprint=fingerprint)
        model.save(paths["ckpt.pt"], **about)
        save_file(
            paths["resume.pt"],
            dict(
                about,
                history=history,
                config=dataclasses.asdict(config),
                weights=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
            ),
        )


# ---------------------------------------------------------------------------------- the loop
stopping = []  # Ctrl-C is heeded between steps
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: os._exit(130) if stopping else stopping.append(True))
began, measured = time.time(), first_step
for step in tqdm(
    range(first_step, settings.steps),
    initial=first_step,
    total=settings.steps,
    disable=RANK > 0 or not sys.stderr.isatty(),
):
    rng = np.random.default_rng([settings.seed, step])  # a batch is a function of seed and step
    torch.manual_seed(1_000_000 * settings.seed + step + 10**12 * RANK)
    batch = draw(rng.choice(train_frames, settings.batch_size), rng)
    terms = compute_losses(net, batch, model)
    loss = sum(weights[name] * value for name, value in terms.items())
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is {loss.item()} at step {step + 1}; {paths['ckpt.pt']} is as it was. "
            "Lower --lr and --adam_lr, or look at the data"
        )
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * schedule(step, settings.steps)
        optimizer.step()
        optimizer.zero_grad()

    done = step + 1
    if done % settings.log_interval == 0 or done == settings.steps:
        ms = (time.time() - began) / (done - measured) * 1e3
        losses = {f"val_{name}": value for name, value in validate().items()}
        history.append(
            dict(
                step=done,
                loss=average(loss.detach()),
                **losses,
                ms_per_step=ms,
                lr=optimizers[-1].param_groups[0]["lr"],
                samples_per_s=settings.batch_size / ms * 1e3,
            )
        )
        if RANK == 0:
            lines = [json.dumps(line) + "\n" for line in history]
            paths["log.jsonl"].write_text("".join(lines))
        print(
            f"step {done:5d}  loss {history[-1]['loss']:.4f}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            + f"  {ms:.0f} ms/step",
            flush=True,
        )
        began, measured = time.time(), done
    stop = bool(
        average(torch.tensor(float(len(stopping)), device=device))
    )  # all of them stop together
    if (
        stop
        or done == settings.steps
        or settings.eval_interval
        and done % settings.eval_interval == 0
    ):
        save(done)
    if stop and done < settings.steps:
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
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, signal.SIG_DFL)
figure = Figure(figsize=(6, 3.5), layout="constrained")  # no pyplot: draws without a display
axes = figure.subplots()
steps = [line["step"] for line in history]
axes.plot(steps, [line["loss"] for line in history], label="training loss (all terms)")
axes.plot(steps, [line["val_action"] for line in history], label="action term, held-out scenes")
axes.set_yscale("log")
axes.set_xlabel("step")
axes.legend()
axes.grid(alpha=0.3)
figure.savefig(paths["curve.png"], dpi=110)
minutes = (time.time() - clock) / 60 - data_minutes
print(
    f"{paths['ckpt.pt']}, {paths['log.jsonl']}, {paths['curve.png']}; data {data_minutes:.1f} min, "
    f"training {minutes:.1f} min",
    flush=True,
)
if settings.eval_interval:
    sys.exit(
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "eval.py"),
                "--ckpt",
                str(paths["ckpt.pt"]),
                "--seed",
                "0",
                "--episodes",
                str(settings.eval_episodes),
            ]
        ).returncode
    )
