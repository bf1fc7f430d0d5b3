"""The whole vision-language-action model, and a behaviour-cloning baseline. `python model.py` prints its size.

    front_image ──┐ conv stem   ┌──────────┐
    wrist_image ──┴─ patches ──▶│ ViT, 2   │──┬▶ P tokens ─mean▶ 1 ┐
                                └──────────┘  │                    │
                                         2 pointers ───────────▶ 2 ┤   ┌─────────────┐        ┌──────┐
    "pick up the red block .." ▶│ text, 2  │──┴▶ L tokens ─mean▶ 1 ┼──▶│ attention,  │─mean──▶│ head │──▶ K actions
    joints, hand, gripper ─────▶│ MLP      │───────────────────▶ 1 ┘   │ 5 tokens, 1 │        └──────┘
                                                                       └─────────────┘

Dimension letters, used everywhere: B batch, V views (cameras), H W pixels, P patch tokens of all views, L text tokens,
N all tokens, C width, S state numbers, K actions in a chunk, A numbers in an action; U distinct sentences, R pairs of a
picture and a sentence, M maps of where they look.
"""
import dataclasses
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

A = 4                                                     # dx, dy, dz, gripper
PROPRIO = ("joint_pos", "ee_pos", "ee_vel", "gripper")    # 14 numbers
STATES = {"proprio": PROPRIO, "full": PROPRIO + ("object_pos", "target_pos"), "none": ()}    # full: 20, gives the answer away
STATE_SIZES = dict(joint_pos=7, ee_pos=3, ee_vel=3, gripper=1, object_pos=3, target_pos=3)
POINTERS = ("thing", "place")                             # what is to be moved, and the pad or block that it is to be moved to


@dataclasses.dataclass
class Config:
    """What a policy is made of; saved in its checkpoint. The choices are the keys of EMBEDDINGS, FUSIONS and HEADS."""
    model: str = "vla"                # vla or bc
    tasks: tuple = ("pick_place",)    # what it was trained to do
    cameras: tuple = ("front", "wrist")
    frames: int = 1                   # pictures of each camera, 1 / CONTROL_HZ apart
    vision: str = "vit_stem"          # vit_stem, vit or cnn
    coarse: tuple = ("wrist",)        # cameras whose patches are merged 2 x 2: 16 tokens instead of 64
    keep: int = 40                    # patches kept of each moment: those that differ most from the picture's median colour
    state: str = "proprio"            # key of STATES
    text: str = "word"                # word or char
    text_encoder: str = "transformer"    # or lstm
    words: tuple = ()                 # every word of the training sentences
    max_text: int = 16                # L: words, or characters; shorter sentences are padded to it
    pointers: int = 1                 # 1: with the two pointers
    fusion: str = "attention"         # attention, transformer, concat or multiply
    head: str = "continuous"          # continuous, tokens or flow
    loss: str = "l1"                  # l1 or mse, of the continuous head
    bins: int = 256                   # of the tokens head, for each number of an action
    flow_steps: int = 4               # of the flow head's integration
    image_size: int = 64              # px
    patch: int = 8                    # px
    width: int = 128                  # C
    heads: int = 4
    layers: int = 2                   # of each transformer; the fusion's attention has one
    chunk: int = 8                    # K actions predicted at a look
    execute: int = 4                  # of them carried out before the next look
    ensemble: bool = False            # instead: look at every step and average what all chunks say about it

    @property
    def state_size(self):
        return sum(STATE_SIZES[k] for k in STATES[self.state])

    @property
    def views(self):
        """The camera of each of the V pictures of a look: the newest of every camera, then the ones before."""
        return tuple(self.cameras) * self.frames

    def check(self):
        """Raises ValueError with a sentence for the user if the parts do not fit together."""
        for name in ("frames", "keep", "flow_steps", "heads", "layers", "chunk", "execute"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}")
        if self.execute > self.chunk:
            raise ValueError(f"--execute {self.execute} is more than the chunk of {self.chunk}")
        if self.ensemble and self.chunk == 1:
            raise ValueError("--ensemble averages what several chunks say about one step; it needs a --chunk of 2 or more")
        if self.bins < 2:
            raise ValueError(f"--bins must be at least 2, not {self.bins}")
        if self.model == "bc" and self.state == "none":
            raise ValueError("--model bc has nothing but the state to act on; --state none leaves it nothing")


# ----------------------------------------------------------------------------- text
CHARS = " abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def split(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def tokenize(text, config):
    """Sentence to (L,) int64; 0 is padding. An unknown word raises ValueError (word text) or warns (char text)."""
    words = split(text)
    unknown = [w for w in words if w not in config.words]
    if unknown:
        message = f"the model does not know the word {unknown[0]!r}; it knows: {' '.join(config.words)}"
        if config.text == "word":
            raise ValueError(message)
        warnings.warn(message)
    if config.text == "word":
        ids = [config.words.index(w) + 1 for w in words]
    else:
        ids = [CHARS.index(c) + 1 for c in " ".join(words)]
    if len(ids) > config.max_text:
        raise ValueError(f"the sentence is too long: {len(ids)} {config.text}s, at most {config.max_text}: {text!r}")
    return torch.tensor(ids + [0] * (config.max_text - len(ids)))


# ----------------------------------------------------------------------------- parts
class Block(nn.Module):
    """Pre-norm transformer layer. Its outputs start at zero, so that it starts as the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def by_head(self, x):
        """(B, N, n) to (B, heads, N, n / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x):
        """(B, N, C) to keys and values (B, heads, N, 2 C / heads)."""
        return self.by_head(self.kv(self.norm1(x)))

    def forward(self, x, others=None, rows=None):
        """(B, N, C) to (B, N, C). The tokens look at themselves and at `others`, keys() of E more tokens, (B, heads, E,
        2 C / heads), which stay as they are. With `rows`, only that many first tokens are computed, and the attention
        logits (B, heads, rows, N + E) come back too: the last layer of Transformer needs nothing but the CLS row."""
        y = self.norm1(x)
        keys = self.by_head(self.kv(y))
        k, v = (keys if others is None else torch.cat([keys, others], 2)).chunk(2, -1)
        x, q = x[:, :rows], self.by_head(self.q(y[:, :rows]))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(self.norm2(x))).square())       # ReLU squared: Primer, arXiv:2109.08668
        return x if rows is None else (x, logits)


def sincos_2d(side, width):
    """Fixed 2-D sine-cosine positions (side, side, width), half the channels for y, half for x (as in MAE)."""
    freq = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    wave = torch.arange(side)[:, None] * freq
    wave = torch.cat([wave.sin(), wave.cos()], 1)                         # (side, C / 2)
    return torch.cat([wave[:, None].expand(-1, side, -1), wave.expand(side, -1, -1)], 2)


# ----------------------------------------------------------------------------- vision
def cut(x, size):
    """Pictures (n, H, W, 3) to their patches (n, H / size, W / size, size * size * 3)."""
    return x.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3).flatten(3)


class Patches(nn.Module):
    """Pictures (n, H, W, 3) to (n, C, side, side): a linear map of each patch, as in ViT (arXiv:2010.11929)."""

    def __init__(self, config):
        super().__init__()
        self.size, self.side = config.patch, config.image_size // config.patch
        self.linear = nn.Linear(config.patch ** 2 * 3, config.width)

    def forward(self, x):
        return self.linear(cut(x, self.size)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """The same in two steps: 4x4 patches, then an overlapping convolution (early convolutions: arXiv:2106.14881)."""

    def __init__(self, config):
        super().__init__()
        self.side = config.image_size // config.patch
        self.linear, self.conv = nn.Linear(4 * 4 * 3, 64), nn.Conv2d(64, config.width, 3, config.patch // 4, 1)
        self.conv.to(memory_format=torch.channels_last)        # as what it gets: no copy at every look

    def forward(self, x):
        return self.conv(F.relu(self.linear(cut(x, 4))).permute(0, 3, 1, 2))


class CNN(nn.Module):
    """Pictures (n, H, W, 3) to (n, C, 1, 1): three convolutions and the mean over the picture."""
    side = 1

    def __init__(self, config):
        super().__init__()
        sizes = (3, 32, 64, config.width)
        self.net = nn.Sequential(*(part for i in range(3) for part in (nn.Conv2d(*sizes[i:i + 2], 3, 2, 1), nn.ReLU())))

    def forward(self, x):
        return self.net(x.permute(0, 3, 1, 2)).mean((2, 3), keepdim=True)


EMBEDDINGS = dict(vit_stem=Stem, vit=Patches, cnn=CNN)


class Vision(nn.Module):
    """Pictures (B, V, H, W, 3) uint8 to tokens (B, keep, C) and which of the P patches of all views they are, (B, keep).

    Bare table is most of every picture. Only the patches with the pixels farthest from the picture's median colour
    become tokens, which halves the work. A CNN gives one token for each picture, and no transformer follows it."""

    def __init__(self, config):
        super().__init__()
        C, self.config = config.width, config
        self.register_buffer("image_mean", torch.full((len(config.views), 1, 1, 3), 127.0))
        self.register_buffer("image_std", torch.full((len(config.views), 1, 1, 3), 64.0))
        self.embed = EMBEDDINGS[config.vision](config)
        patches, side = config.vision != "cnn", self.embed.side
        self.coarse = [patches and camera in config.coarse for camera in config.views]
        self.sides = [side // 2 if coarse else side for coarse in self.coarse]              # tokens across
        for i in {*self.sides} if patches else ():
            self.register_buffer(f"grid{i}", sincos_2d(i, C).flatten(0, 1), persistent=False)
        if any(self.coarse):
            self.merge = nn.Conv2d(C, C, 2, 2).to(memory_format=torch.channels_last)   # 2 x 2 patches to one
        self.view = nn.Parameter(torch.randn(len(config.views), C) * 0.02)
        self.blocks = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers * patches))

    def forward(self, images):
        side, x = self.embed.side, images.flatten(0, 1).float()                             # (B V, H, W, 3)
        odd = (x - x[:, ::8, ::8].flatten(1, 2).median(1).values[:, None, None]).abs().amax(-1)
        odd = odd.unflatten(1, (side, -1)).unflatten(3, (side, -1)).amax((2, 4)).unflatten(0, images.shape[:2])
        x = (x.unflatten(0, images.shape[:2]) - self.image_mean).div(self.image_std).flatten(0, 1)
        x = self.embed(x).unflatten(0, images.shape[:2])                                    # (B, V, C, side, side)
        views, scores = [], []
        for i, coarse in enumerate(self.coarse):
            y, score = (self.merge(x[:, i]), F.max_pool2d(odd[:, i:i + 1], 2)) if coarse else (x[:, i], odd[:, i])
            grid = getattr(self, f"grid{self.sides[i]}") if self.blocks else 0
            views.append(y.flatten(2).transpose(1, 2) + grid + self.view[i])
            scores.append(score.flatten(1))
        x, scores = torch.cat(views, 1), torch.cat(scores, 1)                               # (B, P, C), (B, P)
        kept = scores.topk(min(self.config.keep * self.config.frames, scores.shape[1])).indices.sort().values
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return x, kept


# ----------------------------------------------------------------------------- language
class Text(nn.Module):
    """Sentences (U, L) int64 to words in their context (U, L, C)."""

    def __init__(self, config):
        super().__init__()
        C, lstm = config.width, config.text_encoder == "lstm"
        self.embed = nn.Embedding(1 + (len(config.words) if config.text == "word" else len(CHARS)), C)
        self.position = None if lstm else nn.Parameter(torch.randn(config.max_text, C) * 0.02)
        self.lstm = nn.LSTM(C, C // 2, batch_first=True, bidirectional=True) if lstm else None
        self.blocks = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers * (not lstm)))

    def forward(self, text):
        if self.lstm:
            return self.lstm(self.embed(text))[0]
        words = self.embed(text) + self.position
        for block in self.blocks:
            words = block(words)
        return words


class Pointers(nn.Module):
    """Two queries, for what is to be moved and for the place it is to be moved to, that look for one patch each.

    Grammar and meaning are kept apart (arXiv:1904.09708): the words in their context say at which words a pointer gets its
    name and what kind of thing it is, the name itself is the bare embedding of those words. So a pair of colours that
    never came together in training is no surprise."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.roles = nn.Parameter(torch.randn(len(POINTERS), C) * 0.02)
        self.query, self.key = nn.Linear(C, C), nn.Linear(C, C)
        self.word_norm, self.patch_norm = nn.LayerNorm(C), nn.LayerNorm(C)

    def weigh(self, words, padding):
        """How much of its name each pointer finds at each word: (U, L, C) and padding (U, L) bool to (U, 2, L), of sum 1."""
        logits = self.word_norm(words) @ self.roles.T * self.roles.shape[1] ** -0.5 - 1e4 * padding[..., None]
        return logits.softmax(1).transpose(1, 2)

    def read(self, words, padding, names):
        """Words in their context (U, L, C), padding (U, L) bool, bare names (U, L, C) to queries (U, 2, C)."""
        return self.query(self.weigh(words, padding) @ (self.word_norm(words) + names))

    def forward(self, queries, patches, frame):
        """Queries (R, 2, C) and patches (B, keep, C) to what they point at, (R, 2, C), and log-attention (R, 2, keep)."""
        logits = queries @ self.key(self.patch_norm(patches))[frame].transpose(1, 2) * queries.shape[-1] ** -0.5
        return logits.softmax(-1) @ patches[frame], logits.log_softmax(-1)


# ----------------------------------------------------------------------------- fusion
class Transformer(nn.Module):
    """All tokens: patches (B, keep, C), words (R, L, C) and others (R, E, C) to one vector (R, C), and the log-attention
    (R, 2, keep) on the patches of the CLS token's first two heads in the last layer. Row i sees patches[frame[i]].

    The CLS token, the words, what is pointed at and the state look at everything; the patches are only looked at."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, patches, words, others, frame):
        x = torch.cat([self.cls.expand(len(words), 1, -1), words, others], 1)               # (R, 1+L+E, C)
        for block in self.blocks[:-1]:
            x = block(x, block.keys(patches)[frame])
        x, looks = self.blocks[-1](x, self.blocks[-1].keys(patches)[frame], rows=1)
        return self.norm(x[:, 0]), looks[:, :len(POINTERS), 0].log_softmax(-1)[..., -patches.shape[1]:]


class OneEach(nn.Module):
    """What the other fusions share: one vector for each modality, the mean of its tokens. No map of where it looks."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.build(config.width, config.heads, 2 + bool(config.state_size) + len(POINTERS) * config.pointers)

    def forward(self, patches, words, others, frame):
        x = torch.cat([patches.mean(1)[frame][:, None], words.mean(1, keepdim=True), others], 1)             # (R, n, C)
        return self.norm(self.mix(x)), patches.new_zeros(len(words), 0, patches.shape[1])


class Attention(OneEach):
    """They look at each other once, and are averaged."""

    def build(self, width, heads, n):
        self.block = Block(width, heads)

    def mix(self, x):
        return self.block(x).mean(1)


class Concat(OneEach):
    """Side by side, through an MLP."""

    def build(self, width, heads, n):
        self.net = nn.Sequential(nn.Linear(n * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def mix(self, x):
        return self.net(x.flatten(1))


class Multiply(OneEach):
    """Their product, each through a linear map and about 1, so that it starts tame."""

    def build(self, width, heads, n):
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(n))

    def mix(self, x):
        return torch.stack([1 + layer(x[:, i]) for i, layer in enumerate(self.maps)]).prod(0)


FUSIONS = dict(attention=Attention, transformer=Transformer, concat=Concat, multiply=Multiply)


# ----------------------------------------------------------------------------- action heads
class Continuous(nn.Module):
    """Regression: features (R, size) to actions (R, K, A) in [-1, 1]; error() is (R, K, A), of each number on its own."""

    def __init__(self, config, size):
        super().__init__()
        self.squared = config.loss == "mse"
        self.net = nn.Sequential(nn.Linear(size, 2 * config.width), nn.ReLU(), nn.Linear(2 * config.width, config.chunk * A), nn.Tanh())

    def forward(self, x):
        return self.net(x).unflatten(1, (-1, A))

    def error(self, x, wanted):
        difference = self(x).float() - wanted
        return difference.square() if self.squared else difference.abs()


class Tokens(nn.Module):
    """Each number of an action is one of `bins` tokens, as in RT-2 (arXiv:2307.15818), all of a chunk at once."""

    def __init__(self, config, size):
        super().__init__()
        self.bins = config.bins
        self.net = nn.Sequential(nn.Linear(size, 2 * config.width), nn.ReLU(),
                                 nn.Linear(2 * config.width, config.chunk * A * config.bins))

    def logits(self, x):
        return self.net(x).unflatten(1, (-1, A, self.bins))                                 # (R, K, A, bins)

    def forward(self, x):
        return (self.logits(x).argmax(-1) + 0.5) * (2 / self.bins) - 1                      # the middle of the bin

    def error(self, x, wanted):
        token = ((wanted + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        return F.cross_entropy(self.logits(x).float().movedim(-1, 1), token, reduction="none")


class Flow(nn.Module):
    """Flow matching, as in pi0 (arXiv:2410.24164): noise is carried to a chunk along a learned velocity field, in a few
    steps. The noise is always the same, so that an action is a function of what is seen and heard."""

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        self.register_buffer("noise", torch.randn(config.chunk, A))
        sizes = (size + config.chunk * A + 16, 2 * config.width, 2 * config.width)
        self.net = nn.Sequential(*(part for i in range(2) for part in (nn.Linear(*sizes[i:i + 2]), nn.ReLU())),
                                 nn.Linear(sizes[-1], config.chunk * A))

    def velocity(self, x, actions, time):
        """Features (R, size), actions on their way (R, K, A), time (R, 1) from 0, noise, to 1; returns (R, K, A)."""
        angle = time * 2 ** torch.arange(8, device=time.device)
        return self.net(torch.cat([x, actions.flatten(1), angle.sin(), angle.cos()], 1)).unflatten(1, (-1, A))

    def forward(self, x):
        actions = self.noise.expand(len(x), -1, -1)
        steps = self.config.flow_steps
        for i in range(steps):
            actions = actions + self.velocity(x, actions, x.new_full((len(x), 1), i / steps)) / steps
        return actions.clamp(-1, 1)

    def error(self, x, wanted):
        noise, time = torch.randn_like(wanted), torch.rand(len(wanted), 1, device=wanted.device)
        between = noise.lerp(wanted, time[..., None])
        return (self.velocity(x, between, time).float() - (wanted - noise)).square()


HEADS = dict(continuous=Continuous, tokens=Tokens, flow=Flow)


# ----------------------------------------------------------------------------- the policies
def write(path, content):
    """torch.save that never leaves half a file, not even when the power fails. What was there before stays beside it as
    previous_NAME."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copyfile(path, path.with_name("previous_" + path.name))
    part.replace(path)


class Policy(nn.Module):
    """What the VLA and the baseline share: normalisation, acting, saving, loading."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("state_mean", torch.zeros(config.state_size))
        self.register_buffer("state_std", torch.ones(config.state_size))
        self.reset()

    def reset(self):
        """Forget what is left of the chunk; call it when an episode starts."""
        self.memory, self.known = [], None

    @property
    def device(self):
        return self.state_mean.device

    def read_obs(self, obs):
        """Observation dict, or a list of them, to images (B, V, H, W, 3) uint8 and state (B, S) float32. In place of each may
        stand a list of the last ones, newest first; where there are fewer than config.frames, the oldest is repeated."""
        many = [o if isinstance(o, list) else [o] for o in (obs if isinstance(obs, list) else [obs])]
        cameras, states, side = [f"{c}_image" for c in self.config.cameras], STATES[self.config.state], self.config.image_size
        for key in (*cameras, *states):
            if key not in many[0][0]:
                raise ValueError(f"the observation has no {key!r}; this checkpoint reads {', '.join((*cameras, *states))}")
        for key in cameras:
            got = np.asarray(many[0][0][key])
            if got.shape != (side, side, 3) or got.dtype != np.uint8:
                raise ValueError(f"{key} must be ({side}, {side}, 3) uint8, got {got.shape} {got.dtype}")
        ages = range(self.config.frames)
        images = np.stack([[o[min(age, len(o) - 1)][key] for age in ages for key in cameras] for o in many]) if cameras else None
        state = np.stack([np.concatenate([np.zeros(0, np.float32), *(np.asarray(o[0][k], np.float32) for k in states)]) for o in many])
        return torch.from_numpy(images).to(self.device) if cameras else None, torch.from_numpy(state).to(self.device)

    def act(self, observations, sentences):
        """One action each, (B, 4) float32, for B episodes that go on side by side: an observation dict of gen_data.Env and a
        sentence of every one. Looks afresh when a chunk's first config.execute actions are used up, or a sentence is new."""
        self.memory = self.memory or [dict(told=False) for _ in observations]                     # nothing yet, not even None
        for past, obs, sentence in zip(self.memory, observations, sentences, strict=True):
            if past["told"] != sentence:
                past.update(told=sentence, chunks=[], seen=[])
            past["seen"] = [obs, *past["seen"][:self.config.frames - 1]]
        if self.config.ensemble or not all(past["chunks"] for past in self.memory):
            for past, chunk in zip(self.memory, self.plan([past["seen"] for past in self.memory], sentences)):
                if self.config.ensemble:
                    past["chunks"].append(chunk)
                elif not past["chunks"]:
                    past["chunks"] = [chunk[:self.config.execute]]
        actions = []
        for past in self.memory:                               # the oldest chunk weighs most (ACT, arXiv:2304.13705)
            weights = np.exp(-0.01 * np.arange(len(past["chunks"])))
            actions.append(weights / weights.sum() @ [chunk[0] for chunk in past["chunks"]])
            past["chunks"] = [chunk[1:] for chunk in past["chunks"] if len(chunk) > 1]
        return np.array(actions, np.float32)

    def predict(self, obs, language=None):
        """One action (4,) float32 in [-1, 1] for the observation dict of gen_data.Env and a sentence, as in act(). Raises
        ValueError for an unknown word."""
        return self.act([obs], [language])[0]

    def save(self, path, **extra):
        """Writes config, weights and `extra` (plain values) to one file that load() opens."""
        write(path, dict(config=dataclasses.asdict(self.config), weights=self.state_dict(), **extra))

    @staticmethod
    def load(path=None, device="cpu"):
        """The policy (VLA or BC) in a checkpoint of train.py; without a path, out/ckpt.pt or else the one in assets/.
        Raises ValueError with a sentence for the user."""
        if path is None:
            shipped = Path(__file__).parent / "assets/ckpt.pt"
            path = shipped if shipped.exists() and not Path("out/ckpt.pt").exists() else Path("out/ckpt.pt")
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            config = Config(**saved["config"])
            model = {"vla": VLA, "bc": BC}[config.model](config)
            model.load_state_dict(saved["weights"])
            model.path, model.step, model.fingerprint = str(path), saved.get("step"), dict(saved.get("fingerprint", {}))
        except FileNotFoundError:
            raise ValueError(f"there is no checkpoint {path}; python train.py makes out/ckpt.pt") from None
        except pickle.UnpicklingError:                         # nothing in a stranger's file is ever run
            raise ValueError(f"{path} is not a checkpoint of this model (it holds something else than weights and plain values)") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is not a checkpoint of this model ({reason})") from None
        return model.to(device).eval()


class VLA(Policy):
    def __init__(self, config):
        super().__init__(config)
        C = config.width
        self.register_buffer("goal_mean", torch.zeros(6))
        self.register_buffer("goal_std", torch.ones(6))
        self.vision = Vision(config)
        self.text = Text(config)
        self.state = nn.Sequential(nn.Linear(config.state_size, C), nn.ReLU(), nn.Linear(C, C)) if config.state_size else None
        self.pointers = Pointers(config) if config.pointers else None
        self.fusion = FUSIONS[config.fusion](config)
        self.goal = nn.Linear(C, 6)                            # object_pos and target_pos: an auxiliary answer
        self.head = HEADS[config.head](config, C + 6 + config.state_size)

    def read(self, text, names=None):
        """(U, L) int64 to words in their context (U, L, C) and the pointers' queries (U, 2, C), or None without pointers.
        `names`: the same sentences, if in `text` the colours are not the true ones (train.py shuffles them there, so that
        nothing but the names can depend on them)."""
        words = self.text(text)
        if not self.pointers:
            return words, None
        bare = self.text.embed(text if names is None else names)
        return words, self.pointers.read(words, text == 0, bare if self.config.text == "word" else 0)    # characters name nothing

    def fuse(self, patches, words, queries, state, frame=slice(None)):
        """(B, keep, C), (R, L, C), (R, 2, C) or None, (R, S) raw state to features for the action head (R, C + 6 + S), goals
        (R, 6) (object_pos and target_pos, world frame, normalised) and log-attention on the patches (R, M, keep): that of the
        two pointers and of two heads of the CLS token, as far as there are any. Row i sees patches[frame[i]]."""
        state = (state - self.state_mean) / self.state_std
        others, looks = [], []
        if self.pointers:
            pointed, look = self.pointers(queries, patches, frame)
            others, looks = [pointed], [look]
        if self.state:
            others.append(self.state(state)[:, None])
        x, look = self.fusion(patches, words, torch.cat(others or [words[:, :0]], 1), frame)
        goal = self.goal(x)
        return torch.cat([x, goal, state], 1), goal, torch.cat([*looks, look], 1)

    def forward(self, images, state, text, frame=slice(None), sentence=slice(None), names=None, wanted=None):
        """images (B, V, H, W, 3) uint8, state (B, S), text (U, L): each picture and each sentence is encoded once.
        Row i of the answer pairs picture frame[i] with sentence[i]; by default picture i with sentence i. Returns actions
        (R, K, A), or with `wanted` (R, K, A) the head's error (R, K, A); goals (R, 6) and log-attention (R, M, P), as in fuse,
        on the patches of all views in turn."""
        patches, kept = self.vision(images)
        words, queries = self.read(text, names)
        features, goal, attention = self.fuse(patches, words[sentence], queries[sentence] if self.pointers else None, state[frame], frame)
        kept = kept[frame][:, None].expand(-1, attention.shape[1], -1)
        everywhere = attention.new_full((*attention.shape[:2], sum(s * s for s in self.vision.sides)), -20.0)
        answer = self.head(features) if wanted is None else self.head.error(features, wanted)
        return answer, goal, everywhere.scatter(2, kept, attention)

    @torch.inference_mode()
    def plan(self, observations, sentences):
        """Chunks of actions (B, K, 4) float32 numpy for B observation dicts (or lists of them, see read_obs) and sentences."""
        distinct = list(dict.fromkeys(sentences))
        if None in distinct:
            raise ValueError("this policy needs a sentence: predict(obs, language=...)")
        if self.known is None or self.known[0] != distinct:
            text = torch.stack([tokenize(s, self.config) for s in distinct]).to(self.device)
            self.known = distinct, self.read(text)
        images, state = self.read_obs(observations)
        which = [distinct.index(s) for s in sentences]
        words, queries = (None if part is None else part[which] for part in self.known[1])
        return self.head(self.fuse(self.vision(images)[0], words, queries, state)[0]).float().cpu().numpy()


class BC(Policy):
    """Behaviour cloning from the state, without eyes or words: (B, S) to one action (B, 1, 4)."""

    def __init__(self, config):
        super().__init__(config)
        sizes = [config.state_size, 256, 256, 256]
        hidden = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(256, A), nn.Tanh())

    def forward(self, state):
        return self.net((state - self.state_mean) / self.state_std)[:, None]

    @torch.inference_mode()
    def plan(self, observations, sentences):
        return self(self.read_obs(observations)[1]).cpu().numpy()


if __name__ == "__main__":
    # the architecture as a table: what goes through, its size, what it costs for one look
    from torch.utils.flop_counter import FlopCounterMode

    model = VLA(Config(words=tuple(f"word{i}" for i in range(30)))).eval()
    config, shapes, work = model.config, {}, {}
    parts = dict(patches=(model.vision.embed, model.vision.merge), vision=model.vision.blocks, text=(model.text,), state=(model.state,),
                 pointers=(model.pointers,), fusion=(model.fusion,), goal=(model.goal,), head=(model.head,))
    images = torch.zeros(1, len(config.cameras), config.image_size, config.image_size, 3, dtype=torch.uint8)
    for name, modules in parts.items():
        list(modules)[-1].register_forward_hook(lambda m, i, o, name=name: shapes.__setitem__(
            name, tuple((o[0] if isinstance(o, tuple) else o).shape)))
    with torch.no_grad(), FlopCounterMode(display=False, depth=2) as counter:
        model(images, torch.zeros(1, config.state_size), torch.zeros(1, config.max_text, dtype=torch.long))
    flops = {name.removeprefix("VLA."): sum(f.values()) for name, f in counter.get_flop_counts().items()}
    total = flops["Global"]
    print(f"{'component':10}{'output':>20}{'parameters':>12}{'multiply-adds':>15}{'share':>8}")
    for name, modules in parts.items():
        own = [n for n, m in model.named_modules() if any(m is x for x in modules)]
        work[name] = sum(flops.get(n, 0) for n in own)
        print(f"{name:10}{str(shapes[name]):>20}{sum(p.numel() for m in modules for p in m.parameters()):12,}"
              f"{work[name] // 2:15,}{work[name] / total:8.1%}")
    rest = total - sum(work.values())
    print(f"{'rest':10}{'':>32}{rest // 2:15,}{rest / total:8.1%}")
    print(f"{'all':10}{'':>20}{sum(p.numel() for p in model.parameters()):12,}{total // 2:15,}{1:8.1%}")
