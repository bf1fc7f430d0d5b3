"""Trains a policy on the demonstrations and says how well it does on scenes it has never seen.

    python train.py --steps 2000                       # demonstrations if missing, training, closed-loop score
    python train.py --model bc --out_dir out_bc        # the behaviour-cloning baseline, from the full state
    python train.py --recipe classic --out_dir out_c   # the tutorial setting, see --help
    python train.py --bench                            # samples/s beside a plain nn.TransformerEncoder build

    torchrun --standalone --nproc_per_node=2 train.py  # the same batches, shared among two processes

Leaves ckpt.pt, log.jsonl and curve.png in --out_dir. Ctrl-C saves; python train.py --resume out carries on.
"""
import argparse
import contextlib
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
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import A, BC, EMBEDDINGS, FUSIONS, HEADS, STATE_SIZES, STATES, VLA, Config, split, tokenize, write


RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # which of how many processes: torchrun's


def fail(message):
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------- settings
RECIPES = dict(picovla={}, classic=dict(                       # as small VLAs are taught: no clue but the actions
    vision="vit", keep=64, cameras="front", text="char", pointers=0, fusion="transformer", chunk=1, loss="mse", ground=0.0, goal=0.0,
    relabel=0, release=1.0, word_dropout=0.0, spread=0, shuffle_names=0, optimizer="adamw", adam_lr=1e-4, batch_size=32, steps=2000))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error, add = fail, parser.add_argument                 # one sentence, without the usage
add("--recipe", default="picovla", choices=tuple(RECIPES), help="other defaults for all that follows: classic is the tutorial setting "
    f"({' '.join(f'--{k} {v}' for k, v in RECIPES['classic'].items())})")
add("--steps", type=int, default=2000, help="optimiser steps (default 2000)")
add("--batch_size", type=int, default=64, help="frames per step (default 64)")
add("--relabel", type=int, default=None, help="how many of them are also shown with another sentence that is valid in "
    "the scene, and what the expert would do then (default 64, or all of a smaller batch)")
add("--lr", type=float, default=None, help="Muon's learning rate, for the transformers' matrices (default 0.02)")
add("--adam_lr", type=float, default=2e-3, help="AdamW's, for everything else (default 0.002)")
add("--optimizer", default="muon", choices=("muon", "adamw"), help="adamw: AdamW for everything (default muon)")
add("--word_dropout", type=float, default=0.1, help="share of a sentence's other words than colours and directions that are "
    "left out in training (default 0.1; characters stay)")
add("--spread", type=int, default=None, choices=(0, 1), help="1: gaps at random between the words of a sentence, so that their order "
    "counts and not their places (default 1 with word text)")
add("--shuffle_names", type=int, default=None, choices=(0, 1), help="1: other colours in the words that are read in their context, "
    "so that only the pointers' names depend on them (default 1 with pointers and word text)")
add("--ground", type=float, default=None, help="weight of the attention supervision (default 0.1 where pointers, or CLS heads of "
    "--fusion transformer, look at patches)")
add("--goal", type=float, default=0.5, help="weight of the two positions' regression (default 0.5)")
add("--release", type=float, default=5.0, help="how many times more the gripper's error counts where closed fingers should let go of "
    "a thing at its place (default 5)")
add("--model", default="vla", choices=("vla", "bc"), help="vla, or bc: an MLP on the state alone (default vla)")
add("--vision", default="vit_stem", choices=tuple(EMBEDDINGS), help="vit_stem: patches by two small convolutions; vit: by one linear "
    "map; cnn: three convolutions, one vector for each picture (default vit_stem)")
add("--keep", type=int, default=Config.keep, help=f"patches kept of each look, those that differ from the table (default {Config.keep})")
add("--cameras", default=None, help="comma list of the file's cameras to look through (default all of them)")
add("--frames", type=int, default=1, help="pictures of each camera: the last ones, a control step apart (default 1)")
add("--text", default="word", choices=("word", "char"), help="tokens of the sentence (default word)")
add("--text_encoder", default="transformer", choices=("transformer", "lstm"), help="what reads them (default transformer)")
add("--state", default=None, choices=tuple(STATES), help="proprio: 14 numbers the robot feels; full: 20, with the "
    "answer; none (default proprio; bc: full)")
add("--pointers", type=int, default=1, choices=(0, 1), help="1: two pointers from words to patches, for the thing and "
    "its place (default 1)")
add("--fusion", default="attention", choices=tuple(FUSIONS), help="of one vector for each modality: attention between them, concat or "
    "multiply; or a transformer over all tokens (default attention)")
add("--head", default="continuous", choices=tuple(HEADS), help="continuous: regression; tokens: bins and cross-entropy; flow: flow "
    "matching (default continuous)")
add("--loss", default=None, choices=("l1", "mse"), help="of the continuous head (default l1)")
add("--bins", type=int, default=None, help=f"of the tokens head, for each number of an action (default {Config.bins})")
add("--flow_steps", type=int, default=None, help=f"of the flow head's integration when acting (default {Config.flow_steps})")
add("--chunk", type=int, default=Config.chunk, help=f"actions predicted at a look (default {Config.chunk})")
add("--execute", type=int, default=None, help="of them carried out before the next look (default half)")
add("--ensemble", action="store_true", help="instead: look at every step and average what all chunks say about it")
add("--width", type=int, default=Config.width, help=f"numbers in a token (default {Config.width})")
add("--heads", type=int, default=Config.heads, help=f"attention heads (default {Config.heads})")
add("--layers", type=int, default=Config.layers, help=f"of each of the three transformers (default {Config.layers})")
add("--tasks", default=None, help="what to learn: all, or a comma list (default: what --data holds; pick_place if it is to be made)")
add("--data", type=Path, default=None, help="demonstrations, a file or a pattern such as 'shards/*.h5'; made if missing (default data/demos.h5; "
    "with other --tasks data/TASKS.h5)")
add("--episodes", type=int, default=None, help="how many to make if missing (default 3000; for all tasks 8000)")
add("--use_episodes", type=int, default=None, help="learn from that many of the file's (default all)")
add("--out_dir", type=Path, default=Path("out"), help="where results go (default out)")
add("--resume", nargs="?", const="", default=None, metavar="DIR", help="carry on from what is in DIR (default --out_dir), with the settings "
    "it was started with where nothing else is said")
add("--overwrite", action="store_true", help="replace what is in --out_dir")
add("--seed", type=int, default=0, help="of weights and batches (default 0)")
add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default auto: cuda, else mps, else cpu")
add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the matrix products (default auto: "
    "bfloat16 where the processor has units for it)")
add("--compile", action="store_true", help="torch.compile the model (pays on a GPU; on 2 CPU cores it did not)")
add("--eval_interval", type=int, default=500, help="steps between checkpoints (default 500); 0: only one at the end, "
    "and no closed-loop evaluation")
add("--eval_episodes", type=int, default=200, help="episodes of the closed-loop evaluation (default 200)")
add("--log_interval", type=int, default=100, help="steps between lines of the log (default 100)")
add("--bench", action="store_true", help="only time training steps of the default model against the plain build, on made-up data")
args = parser.parse_args()
kept = vars(args).keys() - {"resume", "overwrite", "out_dir"}  # settings that a checkpoint holds
parser.set_defaults(**RECIPES[args.recipe])
if args.resume is not None:
    resume_path = Path(args.resume or args.out_dir) / "resume.pt"
    if not resume_path.exists():
        fail(f"there is nothing to resume: {resume_path} is missing")
    try:
        saved = torch.load(resume_path, map_location="cpu", weights_only=True)
        if odd := saved["settings"].keys() ^ kept:
            raise ValueError(f"--{min(odd)} is new or gone since it was begun; go on with the train.py of then")
        parser.set_defaults(**saved["settings"], out_dir=resume_path.parent)
    except Exception as error:                                 # whatever a damaged file may cause
        fail(f"{resume_path} cannot be resumed from ({' '.join(str(error).split())[:200] or type(error).__name__}); if there is a "
             "previous_resume.pt beside it, give that its name")
args = parser.parse_args()                                     # what is said goes before what a recipe or an earlier run has set
if args.resume is not None and args.out_dir != resume_path.parent:
    fail(f"--resume {args.resume} carries on in that folder, without --out_dir; copy it to keep it as it is")

args.data = args.data or Path("data") / ("demos.h5" if args.tasks in (None, "pick_place") else f"{args.tasks.replace(',', '_')}.h5")
if args.episodes is None:
    args.episodes = 8000 if args.tasks == "all" else 3000
for flag in ("steps", "batch_size", "episodes", "use_episodes", "eval_episodes", "log_interval", "lr", "adam_lr"):
    if getattr(args, flag) is not None and not getattr(args, flag) > 0:
        fail(f"--{flag} must be more than 0, not {getattr(args, flag)}")
for flag in ("relabel", "ground", "goal", "release", "seed", "eval_interval", "word_dropout"):
    if getattr(args, flag) is not None and not getattr(args, flag) >= 0:
        fail(f"--{flag} must not be negative, got {getattr(args, flag)}")
if (args.relabel or 0) > args.batch_size:
    fail(f"--relabel {args.relabel} is more than --batch_size {args.batch_size}")
if args.lr is not None and args.optimizer != "muon":
    fail(f"--lr is Muon's; the learning rate of --optimizer {args.optimizer} is --adam_lr")
for flag, head in (("loss", "continuous"), ("bins", "tokens"), ("flow_steps", "flow")):
    if args.head != head and getattr(args, flag) not in (None, parser.get_default(flag)):
        fail(f"--{flag} belongs to --head {head}, not to {args.head}")
parts = ("vision", "keep", "frames", "text", "text_encoder", "pointers", "fusion", "head", "loss", "bins", "flow_steps", "chunk",
         "ensemble", "width", "heads", "layers")               # flags that are fields of Config
if args.model == "bc":
    if odd := [flag for flag in (*parts, "cameras", "execute", "lr", "relabel", "word_dropout", "spread", "shuffle_names", "ground", "goal")
               if getattr(args, flag) != parser.get_default(flag)]:
        fail(f"--{odd[0]} is about the vla; --model bc has only a state and one action, and AdamW")
    parts, args.chunk, args.execute = ("chunk",), 1, 1
elif args.optimizer == "muon" and args.lr is None:
    args.lr = 0.02
args.relabel = min(64, args.batch_size) if args.relabel is None else args.relabel
args.execute = (args.chunk + 1) // 2 if args.execute is None else args.execute
state_kind = args.state or ("full" if args.model == "bc" else "proprio")
chosen_cameras = [] if args.model == "bc" else None if args.cameras is None else args.cameras.split(",")
groundable = args.vision != "cnn" and (args.pointers or args.fusion == "transformer" and args.heads > 1)
if args.ground and not groundable:
    fail("--ground pulls attention onto patches; " + ("--vision cnn has none" if args.vision == "cnn" else
                                                      "without pointers only --fusion transformer with --heads 2 or more looks at them"))
args.ground = 0.1 * groundable if args.ground is None else args.ground
if args.shuffle_names and not args.pointers:
    fail("--shuffle_names leaves colours to the pointers' names; with --pointers 0 nobody would hear them")
if args.text == "char" and (args.spread or args.shuffle_names):
    fail(f"--{'spread' if args.spread else 'shuffle_names'} is about words; --text char has none")
args.shuffle_names = args.pointers * (args.text == "word") if args.shuffle_names is None else args.shuffle_names
args.spread = int(args.text == "word") if args.spread is None else args.spread
try:
    config = Config(model=args.model, state=state_kind, execute=args.execute, max_text=16 if args.text == "word" else 96,
                    **{flag: getattr(args, flag) for flag in parts if getattr(args, flag) is not None})
    config.check()
except ValueError as error:
    fail(error)
device = args.device
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
    fail(f"--device {device} is not available here; leave it at auto")
dtype = args.dtype
if dtype == "auto":
    matrix_units = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    dtype = "bfloat16" if matrix_units else "float32"
if RANKS > 1:
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")         # one of them speaks and writes
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
ckpt_path, resume_path, log_path = (args.out_dir / n for n in ("ckpt.pt", "resume.pt", "log.jsonl"))


# ----------------------------------------------------------------------------- data
def load(paths, state_keys, cameras):
    """The files in memory, or of their pictures those of `cameras`. Returns cameras, tasks, tensors by name with one row per
    frame, and the files' requests, each a dict(task, slots, sentences); `key` and `other_key` of a frame are indices into
    that. Rows of `things` name what is to be moved and the place it is to be moved to, -1 where that is nothing one sees.
    Of several processes each holds the pictures of its share of the episodes; a frame's is images[picture[frame]]."""
    rows, at, stored = {}, 0, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(h5py.File(path)) for path in paths]
        recorded, requests = ([json.loads(f.attrs["env_args"])["env_kwargs"]["cameras"] for f in files], [f.attrs["requests"] for f in files])
        for path, *own in zip(paths, recorded, requests):
            if own != [recorded[0], requests[0]]:
                fail(f"{path} was made with other tasks or cameras than {paths[0]}")
        cameras = tuple(recorded[0] if cameras is None else cameras)
        if missing := [c for c in cameras if c not in recorded[0]]:
            fail(f"--cameras {missing[0]!r} is not in {paths[0]}, which has {', '.join(recorded[0])}")
        tasks = tuple(files[0].attrs["tasks"].split(","))
        wanted = files[0].attrs["all_tasks"] if args.tasks == "all" else args.tasks or ",".join(tasks)
        if set(wanted.split(",")) != set(tasks):
            fail(f"{args.data} holds {', '.join(tasks)}, not {wanted}; give another --data")
        groups = [f[f"episode_{i}"] for f in files for i in range(f.attrs["total"])]
        held_out = [f"demo_{i}".encode() in names for f in files for names in [set(f["mask/valid"][:])] for i in range(f.attrs["total"])]
        if (args.use_episodes or 0) > len(groups):
            fail(f"--use_episodes {args.use_episodes} is more than the {len(groups)} of {args.data}")
        groups = groups[:args.use_episodes]
        length = [int(g.attrs["num_samples"]) for g in groups]
        need, free = sum(length[RANK::RANKS]) * len(cameras) * 64 * 64 * 3 + sum(length) * 2000, free_memory()       # bytes
        need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))     # processes on this machine
        if need > free:
            fail(f"{args.data} needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; --use_episodes "
                 f"{int(len(groups) * free / need)} or fewer --cameras need less, and of several machines (torchrun) each holds a share")
        images = np.empty((sum(length[RANK::RANKS]), len(cameras), 64, 64, 3), np.uint8)
        for i, (group, n) in enumerate(zip(tqdm(groups, "loading", disable=RANK or not sys.stderr.isatty()), length)):
            observed, labels = group["observations"], group["grounding"]
            numbers = {k: observed[k][:] for k in STATE_SIZES} | dict(actions=group["actions"][:])
            for name, values in numbers.items():
                if not np.isfinite(values).all() or name == "actions" and abs(values).max() > 1:
                    fail(f"{group.file.filename}: {name} of {group.name[1:]} is not all finite numbers" + " in [-1, 1]" * (name == "actions"))
            for v, camera in enumerate(cameras if i % RANKS == RANK else ()):
                images[stored:stored + n, v] = observed[f"{camera}_image"][:]
            at += n
            for name, value in dict(
                    state=np.concatenate([np.zeros((n, 0), np.float32), *(numbers[k] for k in state_keys)], 1),
                    action=numbers["actions"], opening=numbers["gripper"],
                    goal=np.concatenate([numbers["object_pos"], numbers["target_pos"]], 1),
                    start=np.full(n, at - n), end=np.full(n, at), episode=np.full(n, i), picture=np.arange(stored, stored + n),
                    key=np.full(n, group.attrs["request"]), valid=np.full(n, held_out[i]),
                    things=np.tile(group.attrs["things"].astype(np.int64), (n, 1)),
                    other_action=labels["other_action"][:], other_goal=labels["other_goal"][:],
                    other_key=labels["other"][:].astype(np.int64), other_things=labels["other_things"][:].astype(np.int64),
                    uv=np.stack([labels[f"{c}_uv"][:] for c in cameras] or [labels["things_pos"][..., :2]], 1)).items():
                rows.setdefault(name, []).append(value)
            stored += n * (i % RANKS == RANK)
    data = {name: torch.from_numpy(np.concatenate(values)) for name, values in rows.items()}
    return cameras, tasks, data | dict(images=torch.from_numpy(images)), json.loads(requests[0])


def free_memory():
    """Bytes that can be had without swapping, as far as the system says so (Linux); elsewhere unlimited."""
    try:
        return int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return float("inf")


def here(frames):
    """Which of `frames` (B,) have their pictures in this process."""
    return data["episode"][frames] % RANKS == RANK


def together(x):
    """The sum of all processes' tensors `x`."""
    if RANKS > 1:
        dist.all_reduce(x)
    return x


def draw_text(keys, rng):
    """Sentences (U, L) for the distinct requests `keys`, each worded in one way, twice: as words in their context, with some
    left out and with other colours, and as they are, for the names (see VLA.read); both with the same gaps. What is left out
    teaches other wordings than those of the file; colours and the like, which carry the meaning, stay. Gaps do so too: longer
    sentences than those of the file have words at places where there never was one (randomized positions: arXiv:2305.16843)."""
    names = torch.stack([tokens[k][rng.integers(len(tokens[k]))] for k in keys])
    if args.spread:
        for i, row in enumerate(names.tolist()):
            words = [word for word in row if word]
            room = len(words) + rng.integers(len(row) - len(words) + 1)        # from as they are to all over the row
            names[i] = 0
            names[i, np.sort(rng.permutation(room)[:len(words)])] = torch.tensor(words)
    dropped = torch.from_numpy(rng.random(names.shape) < args.word_dropout) & ~torch.isin(names, meaning)
    table = torch.arange(1 + max(len(config.words), 99)).repeat(len(names), 1)
    if args.shuffle_names:
        for row in table:
            row[naming] = naming[rng.permutation(len(naming))]
    return torch.where(dropped, 0, table.gather(1, names)).to(device), names.to(device)


CLOSED = 0.055                                                 # m between the fingers, less than this with a block in them
THERE = 0.03                                                   # m from its place


def weigh(wanted, frames, goal):
    """How much the errors of the actions `wanted` (B, K, A) from `frames` (B,) on count: the gripper's more where closed fingers
    should let go of a thing that is at its place, by `goal` (B, 6), object_pos and target_pos. Letting go takes a step, being
    about to takes many, and with little to tell them apart by, a policy of median actions stays closed for ever."""
    there = (goal[:, :3] - goal[:, 3:]).norm(dim=1) < THERE
    release = (there & (data["opening"][frames, 0] < CLOSED)).to(device)[:, None] & (wanted[..., -1] > 0)
    return F.pad(release[..., None] * (args.release - 1), (A - 1, 0)) + 1


def losses(frames, relabel, rng):
    """Loss terms on `frames` (B,) int64, of which the first `relabel` are also shown with another sentence. Several processes
    share the frames, and what each returns adds up to the terms."""
    ahead = frames[:, None] + torch.arange(config.chunk)
    inside = (ahead < data["end"][frames, None]).float()       # nothing is asked beyond the episode's end
    asked, relabelled, rows = inside.sum().item(), max(relabel, 1), len(frames) + relabel           # of all processes
    if config.model == "vla":
        keys, sentence = torch.cat([data["key"][frames], data["other_key"][frames[:relabel]]]).unique(return_inverse=True)
        text, names = draw_text(keys.tolist(), rng)
    mine = here(frames)                                        # all of them, in a single process
    my_rows = torch.cat([mine, mine[:relabel]])
    frames, ahead, inside, relabel = frames[mine], ahead[mine], inside[mine].to(device), int(mine[:relabel].sum())
    wanted = data["action"][ahead.clamp_max(len(data["action"]) - 1)].to(device) * inside[..., None]
    state = data["state"][frames].to(device)
    if config.model == "bc":
        error = ((net(state) - wanted).abs() * weigh(wanted, frames, data["goal"][frames])).mean(-1)
        return dict(action=(error * inside).sum() / asked)
    twice, sentence = torch.cat([frames, frames[:relabel]]), sentence[my_rows].to(device)
    frame = torch.cat([torch.arange(len(frames)), torch.arange(relabel)]).to(device)
    other = F.pad(data["other_action"][frames[:relabel], None], (0, 0, 0, config.chunk - 1)).to(device)     # only their first is known
    past = [torch.maximum(frames - age, data["start"][frames]) for age in range(config.frames)]
    images = torch.cat([data["images"][data["picture"][moment]] for moment in past], 1).to(device)           # newest first
    wanted = torch.cat([wanted, other])
    with autocast:
        error, goal, attention = net(images, state, text, frame, sentence, names, wanted)
    error, goal, attention = error.float(), goal.float(), attention.float()
    position = torch.cat([data["goal"][frames], data["other_goal"][frames[:relabel]]])       # (R, 6) m
    error = (error * weigh(wanted, twice, position)).mean(-1)  # (R, K)
    action = (error[:len(frames)] * inside).sum() / asked + error[len(frames):, 0].sum() / relabelled
    misplaced = F.smooth_l1_loss(goal, (position.to(device) - model.goal_mean) / model.goal_std, beta=0.1, reduction="sum")
    terms = dict(action=action, goal=misplaced / (6 * rows))
    if not groundable:
        return terms
    # the pointers, and after them two heads of the CLS token where there is one, are to look at the patches of thing and place
    things = torch.cat([data["things"][frames], data["other_things"][frames[:relabel]]]).repeat(1, attention.shape[1] // 2)
    row = torch.arange(len(twice))[:, None]
    uv, first, looks, seen_in = data["uv"][twice], 0, 0, 0
    for view, side in enumerate(model.vision.sides[:len(config.cameras)]):     # of the newest pictures
        spot = uv[:, view][row, things]                        # (R, M, 2): x, y of each, -1 where not visible
        cell = (spot * side).long().clamp(0, side - 1)
        patch = (first + cell[..., 1] * side + cell[..., 0]).to(device)
        seen = ((spot[..., 0] >= 0) & (things >= 0)).float().to(device)
        looks = looks + attention.gather(2, patch[..., None])[..., 0] * seen
        seen_in = seen_in + seen
        first += side * side
    return terms | dict(ground=-(looks / seen_in.clamp_min(1)).sum() / (rows * things.shape[1]))


# ----------------------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iteration (Keller Jordan, github.com/KellerJordan/Muon), in fp32 and
    all matrices of a shape in one batch: torch.optim.Muon computes in bf16, 1.2 s a step on a CPU without bf16."""

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
                g = g.lerp(buffer, group["momentum"])          # Nesterov
                x = g.mT if shape[0] > shape[1] else g
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if shape[0] > shape[1] else x
                for p, update in zip(params, x):
                    p.add_(update, alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def make_optimizers(model):
    inner = (".q.", ".kv.", ".out.", ".up.", ".down.", "pointers.query", "pointers.key")   # the transformers' matrices
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and any(part in name for part in inner)
                and args.optimizer == "muon"]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01)
    return [adamw, Muon(matrices, args.lr)] if matrices else [adamw]


def rate(step):
    """Learning rate as a share of its peak: 50 steps up, 40% of the way flat, then down to zero in a line."""
    return min((step + 1) / 50, 1.0, (args.steps - step) / (0.6 * args.steps))


def saves_after(step):
    """Whether there is a checkpoint after this step."""
    return step + 1 == args.steps or args.eval_interval and (step + 1) % args.eval_interval == 0


def train_step(step):
    """One optimiser step; the batch is a pure function of (seed, step)."""
    rng = np.random.default_rng([args.seed, step])
    torch.manual_seed(1_000_000 * args.seed + step + 10 ** 12 * RANK)          # for the flow head's noise
    frames = torch.from_numpy(rng.choice(train_frames, args.batch_size))
    loss = sum(weights[name] * value for name, value in losses(frames, args.relabel, rng).items())
    asked = device == "cpu" or saves_after(step) or (step + 1) % args.log_interval == 0            # elsewhere asking costs time
    if asked and not torch.isfinite(loss):
        episodes = ", ".join(str(e) for e in data["episode"][frames].unique().tolist())
        sys.exit(f"train.py: the loss is {loss.item()} at step {step + 1}, on episodes {episodes}; {ckpt_path} is as it was. "
                 "Lower --lr and --adam_lr, or look at these episodes")
    (RANKS * loss).backward()                                  # several processes average their gradients
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


# ----------------------------------------------------------------------------- the plain build, for --bench
class Plain(torch.nn.Module):
    """What a first draft would build: nn.TransformerEncoderLayer with dropout 0.1, every patch a token, all tokens fused, every
    row in every layer, the sentence encoded once per sample."""

    def __init__(self, model):
        super().__init__()
        self.model, c = model, model.config
        encoder = lambda: torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(
            c.width, c.heads, 4 * c.width, 0.1, "gelu", batch_first=True, norm_first=True), c.layers, enable_nested_tensor=False)
        self.vision, self.text, self.fusion = encoder(), encoder(), encoder()
        model.vision.blocks, model.text.blocks = torch.nn.ModuleList(), torch.nn.ModuleList()

    def forward(self, images, state, text):
        m = self.model
        state = (state - m.state_mean) / m.state_std
        x = torch.cat([m.fusion.cls.expand(len(state), 1, -1), self.vision(m.vision(images)[0]), self.text(m.text(text)),
                       m.state(state)[:, None]], 1)
        x = m.fusion.norm(self.fusion(x)[:, 0])
        return m.head(torch.cat([x, m.goal(x), state], 1))


def bench(rounds=12):
    """Training steps of this build, in --dtype, and of the plain one, in fp32, alternately, each with its own batch size and
    optimiser; and how much of the rate of large matrix products the former reach."""
    config = Config(words=tuple(f"word{i}" for i in range(40)))
    fast, plain = VLA(config).to(device), Plain(VLA(dataclasses.replace(config, keep=80, fusion="transformer"))).to(device)
    matrix = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))

    def fast_loss(images, state, text, requests=25):
        """As in train_step: a batch words each of the 25 requests in one way; no frame has a second sentence."""
        with autocast:
            out = fast(images, state, text[:requests], sentence=torch.arange(len(images)) % requests)
        return sum(o.float().abs().mean() for o in out)

    def step(loss, optimizers, n):
        loss(torch.randint(0, 256, (n, 2, 64, 64, 3), dtype=torch.uint8, device=device),
             torch.randn(n, config.state_size, device=device),
             torch.randint(1, 40, (n, config.max_text), device=device)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def seconds(work, *given):
        begun = time.perf_counter()
        work(*given)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    n, builds = args.batch_size, ((fast_loss, make_optimizers(fast), args.batch_size),
                                  (lambda *batch: plain(*batch).abs().mean(), [torch.optim.AdamW(plain.parameters(), lr=1e-4)], 32))
    times = [(*(seconds(step, *build) for build in builds), seconds(torch.mm, matrix, matrix)) for _ in range(rounds + 2)]
    mine, theirs, product = np.median(times[2:], 0)
    with FlopCounterMode(display=False) as counter:
        step(*builds[0])
    flops, peak = counter.get_total_flops(), 2 * 2048 ** 3 / product
    print(f"{n / mine:.0f} samples/s, plain build {32 / theirs:.0f} samples/s: {n / mine * theirs / 32:.1f} times; {flops / n / 1e9:.2f} GFLOP a "
          f"sample, {100 * flops / mine / peak:.0f}% of the {peak / 1e9:.0f} GFLOP/s of large matrix products ({dtype}, {device}, "
          f"{torch.get_num_threads()} threads)")


torch.use_deterministic_algorithms(device == "cpu", warn_only=True)   # two threads add up a gradient in a fixed order
if args.bench:
    if args.model == "bc":
        fail("--bench is about the vla, not --model bc")
    bench()
    sys.exit()

# ----------------------------------------------------------------------------- prepare
existing = [p for p in (ckpt_path, resume_path, log_path) if p.exists()]
if existing and args.resume is None and not args.overwrite and RANK == 0:
    fail(f"{existing[0]} exists; --resume carries on from it, --overwrite replaces it, --out_dir goes elsewhere")
try:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    open(args.out_dir / f"log.part{RANK}", "w").close()        # can we write here? nothing is replaced yet
    (args.out_dir / f"log.part{RANK}").unlink()
except OSError as error:
    fail(f"cannot write in {args.out_dir}: {error.strerror}")
clock = time.time()
files = [args.data] if args.data.exists() else [Path(path) for path in sorted(glob.glob(str(args.data)))]
if not files and (RANKS > 1 or glob.has_magic(str(args.data))):
    fail(f"there is no {args.data}; gen_data.py makes demonstrations")
if not files:
    if other := [c for c in chosen_cameras or () if c not in Config.cameras]:
        fail(f"{args.data} is not there, and would be made without camera {other[0]}; make it with gen_data.py --cameras {args.cameras}")
    files = [args.data]
    print(f"{args.data} is not there: making {args.episodes} demonstrations, about {max(1, round(args.episodes / 1000))} minutes "
          "on 2 cores", flush=True)
    command = [sys.executable, str(Path(__file__).parent / "gen_data.py"), "--episodes", str(args.episodes), "--out", str(args.data),
               "--tasks", args.tasks or "pick_place"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)               # Ctrl-C is for gen_data.py, which stops cleanly
    maker = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: maker.send_signal(signal.SIGINT))
    if code := maker.wait():
        sys.exit(code)
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: sys.exit(130))
made = time.time() - clock
try:
    cameras, known_tasks, data, requests = load(files, STATES[state_kind], chosen_cameras)
except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
    fail(f"{args.data} cannot be used ({str(error).strip()}); give another --data, or move it away and have one made")
train_frames, valid_frames = (np.flatnonzero(data["valid"].numpy() == v) for v in (False, True))
if not len(train_frames) or not len(valid_frames):
    fail(f"{args.data} is too small: it needs episodes to train on and, from another scene, to validate on")
some = train_frames[::97]
pictures = data["images"][data["picture"][some[here(some).numpy()]]].to(device)          # (n, V, H, W, 3)
data_hash = hashlib.sha256(b"".join(data[k].numpy().tobytes() for k in ("action", "state", "key", "goal", "uv"))
                           + str(together(pictures.sum()).item()).encode()).hexdigest()[:12]
failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')
fingerprint = dict(torch=str(torch.__version__), numpy=np.__version__, h5py=h5py.__version__, cpu=torch.backends.cpu.get_cpu_capability(),
                   threads=torch.get_num_threads(), commit="unknown" if failed else commit, data=data_hash)
print(", ".join(f"{k} {v}" for k, v in fingerprint.items()))
print(f"{args.data}: {len(train_frames)} frames to train on, {len(valid_frames)} held out, of {', '.join(known_tasks)}; made in "
      f"{made:.0f} s, loaded in {time.time() - clock - made:.0f} s", flush=True)

torch.manual_seed(args.seed)
config = dataclasses.replace(config, tasks=known_tasks, cameras=cameras,
                             words=tuple(sorted({w for r in requests for s in r["sentences"] for w in split(s)})))
model = {"vla": VLA, "bc": BC}[args.model](config)
if config.state_size:                                          # statistics of the training frames alone
    model.state_mean.copy_(data["state"][train_frames].mean(0))
    model.state_std.copy_(data["state"][train_frames].std(0) + 1e-3)
if args.model == "vla":
    pictures = pictures.float()
    mean = together(pictures.sum((0, 2, 3))) / (len(some) * 64 * 64)
    std = (together((pictures - mean[:, None, None]).square().sum((0, 2, 3))) / (len(some) * 64 * 64)).sqrt()
    model.vision.image_mean.copy_(mean[:, None, None].repeat(config.frames, 1, 1, 1))
    model.vision.image_std.copy_(std[:, None, None].repeat(config.frames, 1, 1, 1))
    model.goal_mean.copy_(data["goal"][train_frames].mean(0))
    model.goal_std.copy_(data["goal"][train_frames].std(0) + 1e-3)
    try:
        tokens = [torch.stack([tokenize(s, config) for s in r["sentences"]]) for r in requests]
    except ValueError as error:
        fail(f"{args.data} cannot be used ({error})")
    meaning = set()                                            # words that tell one request of a task from another
    for task in known_tasks if args.text == "word" else ():
        vocabularies = [{w for s in r["sentences"] for w in split(s)} for r in requests if r["task"] == task]
        meaning |= set.union(*vocabularies) - set.intersection(*vocabularies)
    meaning = torch.tensor([i + 1 for i, w in enumerate(config.words) if w in meaning] if args.text == "word" else range(99))
    colors = {word for r in requests for slot, word in r["slots"].items() if slot in ("block", "pad", "lower")}
    naming = torch.tensor([i + 1 for i, w in enumerate(config.words) if w in colors and args.text == "word"], dtype=torch.long)
model.to(device)
if device == "cuda" and data["images"].nbytes < 0.8 * torch.cuda.mem_get_info()[0]:
    data["images"] = data["images"].to(device)                 # a batch of pictures never crosses the bus
if args.compile:
    import torch._dynamo
    torch._dynamo.config.suppress_errors = True                # no compiler here: go on without
net = model if RANKS == 1 else torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
net = torch.compile(net) if args.compile else net
optimizers = make_optimizers(model)
weights = dict(action=1.0, goal=args.goal, ground=args.ground)
first_step = 0
if args.resume is not None:
    try:
        if saved["config"] != dataclasses.asdict(config):
            fail(f"{resume_path} is of another configuration; resume with the flags it was started with")
        if saved["fingerprint"]["data"] != data_hash:
            fail(f"{resume_path} was trained on other demonstrations than {args.data}; give those, as --data")
        model.load_state_dict(saved["weights"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = saved["step"]
        if args.steps < first_step:
            fail(f"{resume_path} is at step {first_step} already; --steps must not be less")
    except (RuntimeError, ValueError, KeyError) as error:
        fail(f"{resume_path} cannot be resumed from ({' '.join(str(error).split())[:200]})")


def save(step):
    if RANK:
        return
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k in kept}
    about = dict(step=step, settings=settings, fingerprint=fingerprint)
    try:
        model.save(ckpt_path, **about)
        write(resume_path, dict(about, config=dataclasses.asdict(config), weights=model.state_dict(),
                                optimizers=[o.state_dict() for o in optimizers]))
    except (OSError, RuntimeError) as error:
        sys.exit(f"train.py: cannot write a checkpoint in {args.out_dir} ({str(error).splitlines()[0]}); the one before is as it was")


# ----------------------------------------------------------------------------- train
print(f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {device}, {dtype}, "
      f"{torch.get_num_threads()} threads", flush=True)
before = []
if args.resume is not None and log_path.exists():
    for line in log_path.read_text().splitlines():
        try:
            before += [line] if json.loads(line)["step"] <= first_step else []
        except ValueError:
            pass                                               # cut off when the run was killed
log = open(os.devnull if RANK else log_path, "w")              # only now: no bad flag or file has cost anything
log.writelines(line + "\n" for line in before)
if args.resume is None and RANK == 0:
    resume_path.unlink(missing_ok=True)
stopped = []                                                   # Ctrl-C is heeded between steps; a second one at once
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: os._exit(130) if stopped and RANKS == 1 else stopped.append(True))
held_out = torch.from_numpy(np.random.default_rng(0).choice(valid_frames, min(512, len(valid_frames)), replace=False))
began, measured = time.time(), first_step
bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=RANK or not sys.stderr.isatty())
for step in range(first_step, args.steps):
    loss = train_step(step)
    bar.update()
    done = step + 1
    if done % args.log_interval == 0 or done == args.steps:
        ms = (time.time() - began) / (done - measured) * 1e3
        with torch.no_grad():
            torch.manual_seed(0)
            valid = losses(held_out, min(args.relabel, len(held_out)), np.random.default_rng(0))
            valid = {k: together(v) for k, v in valid.items()}
        line = dict(step=done, loss=together(loss).item(), val_loss=valid["action"].item(), lr=optimizers[-1].param_groups[0]["lr"],
                    ms_per_step=ms, samples_per_s=args.batch_size / ms * 1e3,
                    **{f"val_{k}": v.item() for k, v in valid.items() if k != "action"})
        print(json.dumps(line), file=log, flush=True)
        left = (args.steps - done) * ms / 60e3
        bar.write(f"step {done:5d}  loss {line['loss']:.4f}  validation " + "  ".join(
            f"{k} {v.item():.4f}" for k, v in valid.items()) + f"  {ms:.0f} ms/step  {left:.1f} min left", sys.stdout)
        sys.stdout.flush()
        began, measured = time.time(), done
    if saves_after(step) and done < args.steps:
        save(done)
    if RANKS > 1:                                              # they stop at the same step, and ask each other in every tenth
        stop = done % 10 == 0 and together(torch.tensor(len(stopped), device=device)).item()
    else:
        stop = stopped
    if stop and done < args.steps:
        save(done)
        print(f"stopped after {done} steps; python train.py --resume {shlex.quote(str(args.out_dir))} carries on", file=sys.stderr)
        sys.exit(130)
bar.close()
save(args.steps)
log.close()
trained = time.time() - clock - made
if RANKS > 1:
    dist.destroy_process_group()
if RANK:
    sys.exit()

# ----------------------------------------------------------------------------- the curve and the score
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, signal.SIG_DFL)
lines = [json.loads(line) for line in log_path.read_text().splitlines()]
figure = Figure(figsize=(6, 3.5), layout="constrained")        # no pyplot: draws without a display
axes = figure.subplots()
for name, label in (("loss", "training loss (all terms)"), ("val_loss", "action error, held-out episodes")):
    axes.plot([l["step"] for l in lines], [l[name] for l in lines], label=label)
axes.set_yscale("log"), axes.set_xlabel("step"), axes.legend(), axes.grid(alpha=0.3)
figure.savefig(args.out_dir / "curve.png", dpi=110)
print(f"{ckpt_path}, {log_path}, {args.out_dir / 'curve.png'}; data {made / 60:.1f} min, training {trained / 60:.1f} min", flush=True)
if args.eval_interval:
    sys.exit(subprocess.run([sys.executable, str(Path(__file__).parent / "eval.py"), "--ckpt", str(ckpt_path), "--seed", "0",
                             "--episodes", str(args.eval_episodes)]).returncode)
