"""Trains a policy on the demonstrations and says how well it does on scenes it has never seen.

    python train.py --steps 800                         # minutes on 2 cores, data included
    python train.py --tasks all --out_dir out_all       # five tasks, in changed worlds, too
    python train.py --recipe bc --out_dir out_bc        # behaviour cloning, told where things are
    python train.py --recipe classic --out_dir out_c    # the setting of tutorials
    torchrun --standalone --nproc_per_node=2 train.py   # data-parallel; needs the data

Leaves ckpt.pt, resume.pt and log.jsonl in --out_dir. Ctrl-C saves; `--resume out` carries on.
`Demonstrations` loads episodes and labels them in hindsight; its `batch` takes moments, for which
`Sentences` words requests anew. Letters of shapes are model.py's, V' and P' of the newest pictures.
"""

import argparse
import dataclasses
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

# How long GNU's OpenMP threads wait for each other in a busy loop before they sleep. Beside another
# busy program its default makes a step four times as long, this twice; alone they are the same.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from gen_data import PRIVILEGED, TASKS, explain_errors, pick, project
from model import CHOICES, DROPPED, POINTERS, POLICIES, Config
from model import code_version, load_file, split, tokenize

explain_errors()

# ---------------------------------------------------------------------------------- settings
SETTINGS = dict(  # flags and their defaults: --steps 800
    recipe="",  # one of RECIPES, which are other defaults; '': all if there are several --tasks
    # files
    out_dir="out",  # where results go; --overwrite replaces what is there
    resume="",  # the out_dir of a training to carry on
    data="",  # folder, file or 'pattern' of demonstrations; '': data/TASKS, made if missing
    tasks="pick_place",  # what to learn: all, or a comma list
    episodes=1500,  # demonstrations to make
    randomize=0.0,  # how much worlds differ, 0 to 1, in demonstrations to make and in their light
    cameras="",  # comma list of the data's cameras to use; '': all
    # optimisation
    steps=1000,  # of the optimisers
    batch_size=64,  # moments per step
    optimizer="muon",  # for matrices between hidden layers, or adamw for all
    lr=0.02,  # Muon's learning rate
    adam_lr=2e-3,  # AdamW's learning rate, for everything else
    seed=0,  # of weights and batches
    # weights of the losses, see compute_losses()
    attention_weight=0.1,  # of pulling attention onto thing and place; falls with the rate
    goal_weight=0.5,  # of the regression of their positions
    language_weight=0.2,  # of what a sentence asks for and which words name thing and place
    # the rest
    shift=0,  # px that pictures are shifted by at random, at most
    device="",  # cuda, mps or cpu; '': the fastest there is
    eval_interval=100,  # steps between validations, each with a checkpoint; 0: at the end alone
    eval_episodes=200,  # of the closed-loop score; 0: none
)
RECIPES = dict(
    all=dict(tasks="all", steps=9000, batch_size=96, episodes=8000, randomize=1.0),
    bc=dict(model="bc", chunk=1, optimizer="adamw"),
    classic=dict(  # small VLAs as tutorials build them
        vision="vit",
        keep_patches=64,
        cameras="front",
        text="char",
        pointers=0,
        fusion="transformer",
        head="continuous",
        head_layers=1,
        chunk=1,
        loss="mse",
        language_weight=0.0,
        optimizer="adamw",
        adam_lr=1e-4,
        batch_size=32,
    ),
)
# The model's own; its sizes are no flags, as they follow from the data.
own = {
    field.name: field.default
    for field in dataclasses.fields(Config)
    if field.type in (int, str) and not field.name.endswith("_size")
}
choices = CHOICES | dict(recipe=RECIPES, optimizer=("muon", "adamw"))
# --help says what the comments beside the settings say.
comments = dict(
    re.findall(r"^    (\w+)=.*?  # (.*)", Path(__file__).read_text("utf-8"), re.M)
)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--overwrite", action="store_true", help="replace what is in --out_dir"
)
for name, default in (SETTINGS | own).items():
    parser.add_argument(
        f"--{name}",
        type=type(default),
        default=default,
        choices=choices.get(name),
        help=f"{comments.get(name, 'see Config in model.py')} (default {default!r})",
    )

said = parser.parse_args()
several = said.tasks == "all" or "," in said.tasks
parser.set_defaults(**RECIPES.get(said.recipe or ("all" if several else ""), {}))
saved = load_file(Path(said.resume, "resume.pt")) if said.resume else dict(settings={})
parser.set_defaults(**saved["settings"])
args = parser.parse_args()
out_dir = Path(args.resume or args.out_dir)
if args.steps < 1:
    raise ValueError("--steps must be at least 1")
config = Config(**{name: getattr(args, name) for name in own})  # the rest: see below

RANK = int(os.environ.get("RANK", 0))  # which process, of torchrun's
RANKS = int(os.environ.get("WORLD_SIZE", 1))
fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
device = args.device or str(fastest)
bf16 = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
# In bf16 on a CPU, fused attention over so few tokens makes a backward pass 1.7 times as long.
torch.backends.cuda.enable_flash_sdp(not bf16)
# The order of sums is fixed; filling new memory would cost time and change nothing.
torch.set_deterministic_debug_mode("warn" if device == "cpu" else "default")
torch.utils.deterministic.fill_uninitialized_memory = False
# The momentum of a unit that died becomes denormal; Intel's cores take 100 times as long with it.
torch.set_flush_denormal(True)


# ------------------------------------------------------------------------------ augmentation
def other_light(images, amount):
    """The pictures (B, V, H, W, 3) uint8 of every second moment, changed in place: in other light,
    which may have a tint, and with a camera's noise. That differs among the worlds of --randomize
    and needs no simulator."""
    some = images[::2]
    light = torch.empty(*some.shape[:2], 1, 1, 3).uniform_(-0.2, 0.2)
    noise = 8 * torch.rand(len(some), 1, 1, 1, 1) * torch.randn(some.shape)  # of 255
    some[:] = (some * (1 + amount * light) + amount * noise).clamp(0, 255)


def shifted(images, uv, most):
    """Random shifts, as in DrQ (arXiv:2004.13649): the pictures of each moment (B, V, H, W, 3), all
    shifted by up to `most` px alike, their edges repeated; where things are in them now, (B, 2, V',
    2), x and y; and by how much they are shifted, (B, 2), y and x, as a share of the picture."""
    size = images.shape[2]
    move = torch.randint(-most, most + 1, (len(images), 2))  # px, of rows and of columns
    origin = (torch.arange(size) - move[..., None]).clamp(0, size - 1)
    images = [
        views[:, rows][:, :, columns] for views, (rows, columns) in zip(images, origin)
    ]
    shift = move / size
    return torch.stack(images), uv + shift.flip(1)[:, None, None], shift


def attention_target(uv, side):
    """Where things are seen, (B, 2, V', 2), x and y, inside the picture 0..1, nan: unknown, to how
    much attention each patch of these views should have, (B, 2, V' * side * side): that of bilinear
    interpolation, so that the mean place is the thing's."""
    away = (uv[..., None] * side - 0.5 - torch.arange(side)).abs()  # patches
    x, y = (1 - away).clamp_min(0).nan_to_num().unbind(3)
    return (y[..., None] * x[..., None, :]).flatten(2)


# --------------------------------------------------------------------------------- sentences
class Sentences:
    """Sentences, worded afresh at every step if there are wordings, {intent: sentences with {names}
    left open}; else an episode's own. requests: [(intent, slots as JSON), ..], sorted.
    Makes of them Config's `intents`: {"push left": {"block": None, "direction": "left"}}."""

    NONE = 16  # sentences in a batch that ask for nothing

    def __init__(self, requests, wordings):
        self.wordings = wordings
        self.requests = []
        self.intents = {}
        for intent, slots in requests:
            slots = json.loads(slots)
            # Words that are no part of the intent are names.
            names = {
                slot: word for slot, word in slots.items() if word not in intent.split()
            }
            self.requests.append((intent, names))
            self.intents[intent] = slots | dict.fromkeys(names)
        self.intents["none"] = {}
        self.vocabulary = sorted(
            {word for _, names in self.requests for word in names.values()}
        )

    def draw(self, requests, rng):
        """phrase() for these requests, indices without repeats, so once for all moments that have
        one, and for NONE more that belong to no moment, stacked: U in all."""
        asked = [self.requests[request] for request in requests]
        if "none" in self.wordings:
            asked += [("none", {})] * self.NONE
        text, true_text, intent, spoken = zip(*[self.phrase(*one, rng) for one in asked])
        return dict(
            text=pad_sequence(text, True),
            true_text=pad_sequence(true_text, True),
            intent=torch.tensor(intent),
            spoken=torch.tensor(spoken),
        )

    def phrase(self, intent, names, rng):
        """One sentence: text and true_text (L, NGRAMS), the number of its intent, and spoken (2,),
        at which words it names thing and place, -1: at none. names: {slot: word}. The policy reads
        `text` in context and takes only the names from `true_text`, so that it cannot learn
        combinations of them by heart:

        wording      put the {block} cube on the {pad} disc
        true_text    put the red cube on the green disc
        text         put the blue cube on the purple disc
        """
        wording = pick(self.wordings[intent], rng)
        blanks = re.findall(r"{(\w+)}", wording)
        # Random names of the vocabulary; if there are too few, the bare slot: "block".
        shuffled = dict(zip(blanks, [*rng.permutation(self.vocabulary), *blanks]))
        true = shuffled | names  # where nothing is asked for, they stay random
        spoken = [-1] * len(POINTERS)
        if config.pointers and config.text == "word":
            for pointer, slot in zip(range(len(POINTERS)), names):
                before, named, _ = wording.partition("{%s}" % slot)
                if named:
                    spoken[pointer] = len(split(before))
        else:
            shuffled = true  # names are learned in their context
        text = tokenize(wording.format(**shuffled), config)
        true_text = tokenize(wording.format(**true), config)
        return text, true_text, list(self.intents).index(intent), spoken


# ---------------------------------------------------------------------- labels in hindsight
# Where a gripper that holds a thing is: EMPTY to FULL of its way from shut, 0 or less, to open.
EMPTY = 0.1
FULL = 0.65
UNDER = 0.04  # m from the opening hand down to what lies below the thing: a pad 3, a block 5 cm
PUSHED = 0.08  # m that a push moves a thing, at the least
REACH = 0.03  # m from the hand to the middle of what it pushes


def hindsight(hand, opening, close, complete):
    """What an episode turned out to be about, by the robot's own numbers: where the thing was,
    where it was to go, and the point there that the place's pointer should look at, each (T, 3) m,
    or (3,) if it is the same at all moments, or nan: unknown.

    | in the hand               | thing                      | place             | done by    |
    | nothing, and it ends shut | ahead of the hand          | beyond that       | pushed()   |
    | something                 | where it closes next       | where it opens    | moved()    |
    | nothing                   | nan                        | where it ends     | here       |

    hand (T, 3) m, or joints; opening (T,), share; close (T,), the command; complete: not cut short,
    else nobody knows where it would have gone."""
    if complete and close[-1] and opening[-1] < EMPTY:
        return pushed(hand)
    half = close & (opening > EMPTY) & (opening < FULL)
    # With a half-open neighbour: fingers that close on nothing are half open for one step.
    held = half & np.convolve(half, [True, False, True], "same")
    # What was in the hand from the start counts only if it is the last thing that is held; else the
    # expert just put it away to take what was asked for.
    put_away = np.append(held, False).argmin()  # the first step without it
    if held[put_away:].any() or not complete:
        held[:put_away] = False
    thing, place, seen = np.nan, hand[-1], hand[-1]
    if held.any():
        thing, place, seen = moved(hand, held, close)
    return (thing, place, seen) if complete else (thing, np.nan, np.nan)


def moved(hand, held, close):
    """Something was in the hand, and what it was put on is below where the hand opened.

    hand   ───▶ thing ════════▶ place ───▶     ═ held
                closes          opens, or ends
    """
    moments = np.flatnonzero(held)
    following = np.searchsorted(moments[:-1], np.arange(len(hand)))
    thing = hand[moments[following]]  # where it is held, or will be next
    place = hand[close][-1]
    return thing, place, np.nan if close[-1] else place - UNDER * np.eye(3, len(place))[2]


def pushed(hand):
    """The hand ended shut with nothing in it: it went behind the thing and pushed it straight on.
    Before that it lay where the push began. Its place is PUSHED ahead of it all the way.

    hand   ╲
            └▶ thing ───────▶ end ─ ─ ─▶ place
               |── PUSHED ────|
    """
    far = np.linalg.norm(hand - hand[-1], axis=1) > PUSHED
    begin = np.flatnonzero(far).max(initial=0)
    way = (hand[-1] - hand[begin]) / PUSHED  # about 1 long, less if the hand hardly moved
    thing = hand + REACH * way
    thing[:begin] = thing[begin]
    return thing, thing + PUSHED * way, np.nan


# ---------------------------------------------------------------------------- demonstrations
def packed(dataset):
    """The pictures of an episode, each compressed, as they are in the file if it has them so."""
    if dataset.compression == "gzip" and dataset.chunks == (1, *dataset.shape[1:]):
        return [
            dataset.id.read_direct_chunk((t, 0, 0, 0))[1] for t in range(len(dataset))
        ]
    return [zlib.compress(picture, 1) for picture in dataset[:]]


class Demonstrations:
    """Everything of the data files, see write_episode(), in memory, a row for each of N moments:

    pictures: N tuples of one compressed picture a camera; state (N, S); action (N, A); goal (N, G),
    hand at thing and place; uv (N, 2, V', 2), where they are seen, x and y, inside the picture
    0..1; nan: unknown. episode (N,): its episode's number. Of each episode: start, end (rows) and
    request (index in sentences.requests). train, held_out: rows, one scene in twenty held out."""

    def __init__(self, paths):
        self.pictures = []
        self.state_keys = ()  # not known yet
        episodes = []
        wordings = {}
        for path in paths:
            try:
                with h5py.File(path) as file:
                    for episode in file["data"].values():
                        episodes.append(self.load(episode, len(episodes)))
                    for intent, sentences in file.get("wordings", {}).items():
                        wordings.setdefault(intent, []).extend(sentences.asstr()[:])
                    self.units = file["data"].attrs.get("units")  # of its actions
            except (KeyError, ValueError, OSError) as error:
                raise ValueError(f"{path}: {error}")
        # without wordings each sentence stands for itself, and there are no intents
        known = bool(wordings)
        for episode in episodes:
            wordings.setdefault(episode["intent"], [episode["instruction"]])
        asked = [(episode["intent"], episode["slots"]) for episode in episodes]
        requests, request = np.unique(asked, axis=0, return_inverse=True)
        self.request = torch.from_numpy(request)
        self.sentences = Sentences(requests.tolist(), wordings)
        self.intents = self.sentences.intents if known else {}
        self.tasks = tuple(dict.fromkeys(episode["task"] for episode in episodes))

        every = np.hstack([0, *[episode["opening"] for episode in episodes]])
        for episode in episodes:
            self.label(episode, (episode["opening"] - every.min()) / np.ptp(every))
        for name in ("state", "action", "goal", "uv"):
            column = np.concatenate([episode[name] for episode in episodes])
            setattr(self, name, torch.from_numpy(column).float())
        lengths = torch.tensor([len(episode["action"]) for episode in episodes])
        self.episode = torch.arange(len(episodes)).repeat_interleave(lengths)
        self.end = lengths.cumsum(0)
        self.start = self.end - lengths
        _, scene = np.unique(
            [episode["scene_seed"] for episode in episodes], return_inverse=True
        )
        held_out = (scene % 20 == 0)[self.episode]
        self.train = np.flatnonzero(~held_out)
        self.held_out = np.flatnonzero(held_out)

    def load(self, episode, number):
        """An episode of T moments as a dict: its attributes, and its arrays but for the pictures.
        The first one says what there is in all."""
        if not self.state_keys:
            keys = list(episode["observations"])
            pictures = [key for key in keys if key.endswith("_image")]
            names = [key.removesuffix("_image") for key in pictures]
            self.cameras = tuple(args.cameras.split(",") if args.cameras else names)
            self.image_size = episode[f"observations/{self.cameras[0]}_image"].shape[1]
            # bc is told where things are
            other = pictures if config.model == "bc" else [*pictures, *PRIVILEGED]
            self.state_keys = tuple(key for key in keys if key not in other)
        T = len(episode["actions"])

        def read(key):
            array = episode[key][:].astype(np.float32)
            if len(array) != T or not np.isfinite(array).all():
                raise ValueError(
                    f"{episode.name}/{key} is not {T} rows of finite numbers"
                )
            return array

        action = read("actions")
        if np.abs(action).max() > 1:
            raise ValueError(f"{episode.name}/actions must be from -1 to 1")
        self.pictures += zip(
            *[packed(episode[f"observations/{name}_image"]) for name in self.cameras]
        )
        sentence = episode.attrs["instruction"]
        about = dict(intent=sentence, slots="{}", task="demonstrated", interrupted=False)
        about |= {"scene_seed": number, **episode.attrs}
        return about | dict(
            action=action,
            state=np.hstack([read(f"observations/{key}") for key in self.state_keys]),
            hand=read("observations/ee_pos"),
            opening=read("observations/gripper")[:, 0],
            matrices={
                name: read(f"cameras/{name}") for name in episode.get("cameras", ())
            },
        )

    def label(self, episode, opening):
        """Adds goal and uv to an episode, see hindsight(). opening (T,), share."""
        hand = episode["hand"]
        close = episode["action"][:, -1] < 0  # the command
        labels = hindsight(hand, opening, close, not episode["interrupted"])
        _, thing, place, seen = np.broadcast_arrays(hand, *labels)
        episode["goal"] = np.hstack([thing, place])
        episode["uv"] = np.full((len(hand), 2, len(self.cameras), 2), np.nan)
        for v, name in enumerate(self.cameras):
            if name in episode["matrices"]:
                points = np.stack([thing, seen], 1)
                episode["uv"][:, :, v], _ = project(points, episode["matrices"][name])

    def spread(self, x):
        """Mean and standard deviation of each column, of training moments where it is known."""
        x = x[self.train]
        mean = x.nanmean(0).nan_to_num()
        return mean, (x - mean).square().nanmean(0).sqrt().nan_to_num() + 1e-3

    def pictures_of(self, rows):
        """Pictures (B, V, H, W, 3) uint8 of these rows (B,), the newest of each camera first."""
        past = rows[:, None] - torch.arange(config.frames)
        past = past.maximum(self.start[self.episode[rows], None])
        moments = [self.pictures[row] for row in past.flatten()]
        raw = bytearray().join(
            zlib.decompress(view) for moment in moments for view in moment
        )
        shape = len(rows), -1, self.image_size, self.image_size, 3
        return torch.frombuffer(raw, dtype=torch.uint8).view(shape)

    def batch(self, rows, rng, augment=False):
        """What the policy is trained on at these moments (B,), a dict: see VLA.forward, and goal
        (B, G), nan: unknown; spot (B, 2, P'), wanted attention. Each different request has one
        sentence: intent (U,), the number of what it asks; spoken (U, 2), see Sentences."""
        rows = torch.from_numpy(rows)
        images = self.pictures_of(rows)
        uv = self.uv[rows]
        shift = torch.zeros(len(rows), 2)
        if args.shift and augment:
            images, uv, shift = shifted(images, uv, args.shift)
        if args.randomize and augment:
            other_light(images, args.randomize)

        episode = self.episode[rows]
        ahead = rows[:, None] + torch.arange(config.chunk)
        end = self.end[episode, None]  # beyond it nothing is known
        requests, number = self.request[episode].unique(return_inverse=True)
        batch = dict(
            self.sentences.draw(requests.tolist(), rng),
            images=images,
            shift=shift,
            state=self.state[rows],
            number=number,
            target=self.action[ahead.minimum(end - 1)],
            valid=ahead < end,
            goal=self.goal[rows],
            spot=attention_target(uv, self.image_size // config.patch),
        )
        return {name: tensor.to(device) for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------ losses
EVEN = 1e-3  # attention wanted at every patch, or a pointer may settle on a useless one


def compute_losses(net, batch):
    """The terms of the loss on a batch, by name: the error of the head, of the read-out of thing
    and place (smooth L1, normalised), the attention on their patches, and what a sentence asks for
    and where its names are (cross-entropy)."""
    with autocast:
        found = net(batch)
    error = found["error"].float().mean(-1) * batch["valid"]  # (B, K)
    terms = dict(action=error.sum() / batch["valid"].sum())
    if "goal" in found:
        goal = (batch["goal"] - model.goal_mean) / model.goal_std
        known = goal.isfinite()
        error = F.smooth_l1_loss(
            found["goal"].float()[known], goal[known], beta=0.1, reduction="sum"
        )
        terms["goal"] = error / known.sum().clamp_min(1)
    if "attention" in found and config.vision != "cnn":
        spot = batch["spot"]
        attention = found["attention"].float()[..., : spot.shape[2]]  # logarithms
        spot = (spot + EVEN) * (attention > DROPPED / 2)  # at kept patches
        terms["attention"] = -(
            (attention * spot).sum(2) / spot.sum(2).clamp_min(1)
        ).mean()
    if "intent" in found:
        terms["intent"] = F.cross_entropy(found["intent"].float(), batch["intent"])
    if "reading" in found:
        words = (found["reading"].float() + 1e-9).log().mT  # (U, L, 2)
        error = F.nll_loss(words, batch["spoken"], ignore_index=-1, reduction="sum")
        terms["names"] = error / batch["spoken"].numel()
    return terms


# --------------------------------------------------------------------------------- optimiser
@autocast
def orthogonalize(matrix):
    """The nearest orthogonal matrix, nearly, by five steps of a Newton-Schulz iteration whose
    coefficients bring all singular values close to 1 (Keller Jordan, github.com/KellerJordan/Muon),
    in the type that is fast here: torch.optim.Muon's bf16 takes 1.2 s a step without bf16 units."""
    tall = len(matrix) > len(matrix.T)  # its transpose has the smaller x @ x.T
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Without weight decay (arXiv:2502.16982) the matrices grow at every
    step: after 11,000 steps attention's logits were in the thousands, where bf16 is exact to 16."""

    MOMENTUM = 0.95
    DECAY = 0.1

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                update = orthogonalize(p.grad.lerp(momentum, self.MOMENTUM))  # Nesterov
                scale = max(1, len(p) / len(p.T)) ** 0.5
                p.mul_(1 - group["lr"] * self.DECAY)
                p.sub_(update, alpha=group["lr"] * scale)


def make_optimizers(model):
    """Muon for the matrices between hidden layers, AdamW for the rest, or for all."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and min(p.shape) >= config.width and "table" not in name
        (matrices if hidden and args.optimizer == "muon" else others).append(p)
    adamw = torch.optim.AdamW(others, args.adam_lr, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(matrices, dict(lr=args.lr))] if matrices else [adamw]


def schedule(step):
    """Learning rate as a share of its peak: 50 steps up, then flat, the last 60% down to zero."""
    return min((step + 1) / 50, 1.0, (args.steps - step) / (0.6 * args.steps))


# ------------------------------------------------------------------------------- preparation
def run(script, *flags):
    """Runs another script of this repository; ends where that fails."""
    status = subprocess.call([sys.executable, Path(__file__).with_name(script), *flags])
    if status:
        sys.exit(status)


ckpt = out_dir / "ckpt.pt"
resume_pt = out_dir / "resume.pt"
log = out_dir / "log.jsonl"
if ckpt.exists() and not args.resume and not args.overwrite:
    raise ValueError(
        f"{ckpt} exists; --resume {out_dir} carries on from it, --overwrite replaces it, "
        "--out_dir goes elsewhere"
    )
if RANKS > 1:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
start = time.time()
if not args.data and RANKS == 1:  # what is there already is not made again
    run(
        "gen_data.py",
        f"--episodes={args.episodes}",
        f"--tasks={args.tasks}",
        f"--randomize={args.randomize}",
    )
data = args.data or f"data/{args.tasks}"
paths = sorted(glob.glob(f"{data}/*.h5") or glob.glob(data))
if not paths:
    raise ValueError(f"there is no {data}; gen_data.py makes demonstrations")
demos = Demonstrations(paths)
out_dir.mkdir(parents=True, exist_ok=True)
full = dataclasses.replace(
    config,
    cameras=demos.cameras,
    tasks=demos.tasks,
    intents=demos.intents,
    state_keys=demos.state_keys,
    state_size=demos.state.shape[1],
    action_size=demos.action.shape[1],
    goal_size=demos.goal.shape[1],
    image_size=demos.image_size,
)

torch.manual_seed(args.seed)
model = POLICIES[config.model](full)
model.state_mean, model.state_std = demos.spread(demos.state)
if config.model == "vla":
    model.goal_mean, model.goal_std = demos.spread(demos.goal)
    some = demos.pictures_of(torch.from_numpy(demos.train[::499])).float()
    model.vision.image_mean.fill_(some.mean())
    model.vision.image_std.fill_(some.std() + 1)
model.to(device)
net = DistributedDataParallel(model) if RANKS > 1 else model
optimizers = make_optimizers(model)
first_step = 0
history = []  # lines of the log
if args.resume:
    if saved["config"] != dataclasses.asdict(full):
        raise ValueError(
            f"{resume_pt} is of another configuration or of other demonstrations"
        )
    model.load_state_dict(saved["weights"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    first_step = saved["step"]
    history = saved["history"]
code = code_version()
if RANK == 0:
    print(
        f"{data}: {len(demos.train)} moments of {', '.join(demos.tasks)} to train on, "
        f"{len(demos.held_out)} held out, thing unknown in {demos.goal[:, 0].isnan().sum()}\n"
        f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {device}, "
        f"{'bfloat16' if bf16 else 'float32'}, torch {torch.__version__}, code {code}",
        flush=True,
    )


def heard_stop():
    """Whether any of the processes is to stop."""
    heard = torch.tensor(len(stopping), device=device)
    if RANKS > 1:
        dist.all_reduce(heard)
    return bool(heard)


@torch.no_grad()
def validate():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = rng.permutation(demos.held_out)[:512]
    terms = compute_losses(model, demos.batch(rows, rng))
    return {f"val_{name}": value.item() for name, value in terms.items()}


def save(step):
    settings = vars(args) | dict(out_dir="", resume="", overwrite=False)
    states = [optimizer.state_dict() for optimizer in optimizers]
    model.save(ckpt, step=step, code=code, units=demos.units)
    model.save(
        resume_pt, step=step, settings=settings, history=history, optimizers=states
    )
    log.write_text("".join(json.dumps(line) + "\n" for line in history))


# ---------------------------------------------------------------------------------- the loop
stopping = []  # Ctrl-C is heeded between steps
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: stopping.append(True))
weights = dict(action=1.0, goal=args.goal_weight)
weights["intent"] = weights["names"] = args.language_weight
for step in range(first_step, args.steps):
    # a batch is a function of seed and step
    rng = np.random.default_rng([args.seed, step])
    torch.manual_seed(1_000_000 * args.seed + step + 10**12 * RANK)
    rows = rng.choice(demos.train, args.batch_size)
    batch = demos.batch(rows[RANK::RANKS], rng, augment=True)
    terms = compute_losses(net, batch)
    rate = schedule(step)
    # Labels in hindsight are a little off. Pulled on to the end, attention learns that by heart.
    weights["attention"] = args.attention_weight * rate
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
    stop = heard_stop()
    last = done == args.steps
    if RANK == 0 and (stop or last or done % (args.eval_interval or args.steps) == 0):
        losses = dict(loss=loss.item(), **validate())
        history.append(dict(step=done, **losses, lr=args.lr * rate))
        save(done)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        print(
            f"step {done:5d}  {shown}  {(time.time() - start) / 60:.1f} min", flush=True
        )
    if stop and not last:
        print(
            f"stopped after {done} steps; --resume {out_dir} carries on", file=sys.stderr
        )
        sys.exit(130)
if RANK > 0:
    sys.exit()

# ------------------------------------------------------------------------------------- score
print(f"{ckpt}, {log}", flush=True)
if args.eval_episodes and set(demos.tasks) <= set(TASKS):
    run("eval.py", f"--ckpt={ckpt}", "--seed=0", f"--episodes={args.eval_episodes}")
