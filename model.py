"""The whole vision-language-action model, and a behaviour-cloning baseline. `python model.py` prints
its parts and their sizes.

    front_image ──┐ conv stem   ┌──────────┐
    wrist_image ──┴─ patches ──▶│ ViT, 2   │──┬▶ P tokens ─mean▶ 1 ┐
                                └──────────┘  │                    │
                                         2 pointers ───────────▶ 2 ┤  ┌─────────────┐
    "pick up the red block .." ▶│ text, 2  │──┴▶ L tokens ─mean▶ 1 ┼─▶│ attention,  │─mean─▶ fused ┐
    joints, hand, gripper ──┬──▶│ MLP      │───────────────────▶ 1 ┘  │ 5 tokens, 1 │         │    │
                            │                                         └─────────────┘       goal ──┤
                            └──────────────────────────────────────────────────────────────────────┴▶ head

A sentence reaches the action like this: `tokenize` makes word numbers, `Text` words in their context,
`Pointers` looks in the patches for what the words name, `fusion` mixes what it found with the mean
word and everything else, `goal` reads off where thing and place are, and the head turns all that into K actions.

Dimension letters, used everywhere: B batch (moments), V views (pictures of a moment: every camera's
newest, then the ones before), H W pixels, P patches of all views, L text tokens, N tokens of any kind,
E more of them, C width, S state numbers, G goal numbers, K actions in a chunk, A numbers in an action;
U distinct sentences, R rows (pairs of a moment and a sentence), M attention maps.
"""

import argparse
import dataclasses
import io
import os
import pickle
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

POINTERS = ("thing", "place")  # what is to be moved, and what it is to be moved to
DROPPED = -20.0  # log-attention on a patch that was not kept: next to none


# ---------------------------------------------------------------------------------- settings
def setting(default, help=None, choices=None, low=1, high=10_000, needs=None):
    """A dataclass field that knows what values it may have. With `help` it is a flag of train.py, too;
    without, its value follows from the data. needs: (other setting, values of it) without which it
    means nothing."""
    about = dict(help=help, choices=choices, low=low, high=high, needs=needs)
    return dataclasses.field(default=default, metadata=about)


def add_flags(parser, settings):
    """Gives the parser a flag for each setting of a dataclass; what is not said stays unset."""

    def words(text):
        return tuple(text.split(","))

    for field in dataclasses.fields(settings):
        about = field.metadata
        options = dict(
            type=words if field.type is tuple else field.type, choices=about["choices"]
        )
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if about["help"]:
            shown = isinstance(field.default, (int, float)) or about["choices"]
            default = f" (default {field.default})" if shown else ""
            parser.add_argument(
                f"--{field.name}",
                default=argparse.SUPPRESS,
                help=about["help"] + default,
                **options,
            )


def check_fields(settings, explicit=()):
    """Raises ValueError, with a sentence for the user, if a value of a dataclass of settings is of
    the wrong type or out of range, or if an `explicit` flag means nothing beside the others."""
    for field in dataclasses.fields(settings):
        value, about = getattr(settings, field.name), field.metadata
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or isinstance(value, bool) and field.type is not bool:
            raise ValueError(f"--{field.name} must be {field.type.__name__}, not {value!r}")
        if about["choices"] and value not in about["choices"]:
            raise ValueError(f"--{field.name} must be one of {about['choices']}, not {value!r}")
        if field.type in (int, float) and not about["low"] <= value <= about["high"]:
            raise ValueError(
                f"--{field.name} must be from {about['low']} to {about['high']}, not {value}"
            )
        if field.type is tuple:
            if len(set(value)) < len(value) or not all(isinstance(item, str) for item in value):
                raise ValueError(
                    f"--{field.name} must be names, none of them twice, not {value!r}"
                )
        if about["needs"] and field.name in explicit:
            other, values = about["needs"]
            if getattr(settings, other) not in values:
                raise ValueError(
                    f"--{field.name} goes with --{other} {' or '.join(map(str, values))}, "
                    f"not with {getattr(settings, other)}"
                )


@dataclass
class Config:
    """What a policy is made of; saved in its checkpoint."""

    model: str = setting("vla", "vla, or bc: an MLP on the state alone", ("vla", "bc"))
    # of the data file
    tasks: tuple = setting(("pick_place",), "what to learn: all, or a comma list")
    cameras: tuple = setting(
        ("front", "wrist"), "comma list of the file's cameras to look through"
    )
    words: tuple = setting(())  # every word of the training sentences
    state_keys: tuple = setting(("joint_pos", "ee_pos", "ee_vel", "gripper"))
    state_size: int = setting(14, low=0)  # S: numbers in them
    goal_size: int = setting(6)  # G: object_pos and target_pos
    action_size: int = setting(4, high=100)  # A: dx, dy, dz, gripper
    image_size: int = setting(64, low=8, high=512)  # px
    # vision
    vision: str = setting(
        "vit_stem",
        "patches by two small convolutions (vit_stem), by one linear "
        "map (vit), or one vector for each picture (cnn)",
        ("vit_stem", "vit", "cnn"),
    )
    patch: int = setting(8, "px, edge of a patch", low=4, high=64)
    coarse_cameras: tuple = setting(("wrist",))  # their patches are merged 2 x 2
    keep_patches: int = setting(
        40,
        "patches kept of each moment: those with the pixels farthest from "
        "the picture's median colour",
    )
    frames: int = setting(
        1, "pictures of each camera: the last ones, a control step apart", high=64
    )
    # language
    text: str = setting("word", "tokens of the sentence", ("word", "char"))
    text_encoder: str = setting(
        "transformer", "encoder of the sentence", ("transformer", "lstm")
    )
    max_text: int = setting(16, high=1000)  # L; shorter sentences are padded to it
    pointers: int = setting(
        1, "1: two pointers from words to patches, for the thing and its place", (0, 1), low=0
    )
    # fusion
    fusion: str = setting(
        "attention",
        "one vector for each modality, mixed by attention, concat or "
        "multiply; or a transformer over all tokens",
        ("attention", "concat", "multiply", "transformer"),
    )
    width: int = setting(128, "C, numbers in a token", low=4, high=4096)
    heads: int = setting(4, "attention heads", high=64)
    layers: int = setting(2, "transformer layers of each encoder", high=64)
    # action head
    head: str = setting(
        "continuous",
        "regression (continuous), bins and cross-entropy (tokens), or " "flow matching (flow)",
        ("continuous", "tokens", "flow"),
    )
    loss: str = setting(
        "l1", "loss of the continuous head", ("l1", "mse"), needs=("head", ("continuous",))
    )
    bins: int = setting(
        256, "bins for each number of an action", low=2, needs=("head", ("tokens",))
    )
    flow_steps: int = setting(
        4, "integration steps of the flow head", high=1000, needs=("head", ("flow",))
    )
    chunk: int = setting(8, "K, actions predicted in a forward pass", high=256)
    execute: int = setting(
        0,
        "actions carried out before the next forward pass; 0: half the chunk",
        low=0,
        high=256,
    )
    ensemble: bool = setting(False, "make a forward pass in every step and average all chunks")

    @property
    def views(self):
        """The camera of each of the V pictures: the newest of every camera, then the ones before."""
        return tuple(self.cameras) * self.frames

    @property
    def executed(self):
        return self.execute or (self.chunk + 1) // 2

    def check(self, explicit=()):
        """Raises ValueError, with a sentence for the user, if the parts do not fit together."""
        check_fields(self, explicit)
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}"
            )
        if self.image_size % self.patch or self.patch % 4:
            raise ValueError(
                f"--patch {self.patch} must be a multiple of 4 and divide the pictures' "
                f"{self.image_size} px"
            )
        if self.execute > self.chunk:
            raise ValueError(f"--execute {self.execute} is more than the chunk of {self.chunk}")
        if self.ensemble and self.chunk == 1:
            raise ValueError(
                "--ensemble averages several chunks; it needs a --chunk of 2 or more"
            )
        if self.model == "bc" and self.chunk > 1:
            raise ValueError(
                f"--model bc predicts one action at a time, not a --chunk of {self.chunk}"
            )
        if self.model == "bc" and not self.state_size:
            raise ValueError(
                "--model bc has nothing but the state to act on; --state none leaves nothing"
            )


# -------------------------------------------------------------------------------------- text
CHARS = " abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def split(text):
    return re.findall(r"[\w']+", text.lower())


def tokenize(text, config):
    """Sentence to (L,) int64; 0 is padding. Raises ValueError for an unknown word (word text)."""
    words = split(text)
    unknown = [word for word in words if word not in config.words]
    if unknown:
        message = f"the model does not know the word {unknown[0]!r}; it knows: {' '.join(config.words)}"
        if config.text == "word":
            raise ValueError(message)
        warnings.warn(message)
    tokens = words
    vocabulary = config.words
    if config.text == "char":
        tokens = [char for char in " ".join(words) if char in CHARS]
        vocabulary = CHARS
    if len(tokens) > config.max_text:
        raise ValueError(
            f"the sentence is too long: {len(tokens)} {config.text}s, at most "
            f"{config.max_text}: {text!r}"
        )
    ids = [vocabulary.index(token) + 1 for token in tokens]
    return torch.tensor(ids + [0] * (config.max_text - len(ids)), dtype=torch.long)


# -------------------------------------------------------------------------------------- parts
class Block(nn.Module):
    """Pre-norm transformer layer. Its outputs start at zero, so that it starts as the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def by_head(self, x):
        """(B, N, n) to (B, heads, N, n / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x):
        """Tokens (B, N, C) to their keys and values (B, heads, N, 2 C / heads)."""
        return self.by_head(self.kv(self.norm1(x)))

    def forward(self, x, context=None):
        """(B, N, C) to (B, N, C), and attention logits (B, heads, N, N + E). The tokens attend to
        themselves and to `context`, the keys() of E more tokens, which stay as they are."""
        y = self.norm1(x)
        q = self.by_head(self.q(y))
        kv = self.by_head(self.kv(y))
        if context is not None:
            kv = torch.cat([kv, context], 2)
        k, v = kv.chunk(2, -1)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        hidden = F.relu(self.up(self.norm2(x))).square()  # Primer, arXiv:2109.08668
        return x + self.down(hidden), logits


class Encoder(nn.ModuleList):
    """A stack of Blocks: (B, N, C) to (B, N, C)."""

    def __init__(self, config, layers):
        super().__init__(Block(config.width, config.heads) for _ in range(layers))

    def forward(self, x):
        for block in self:
            x, _ = block(x)
        return x


def mlp(*sizes):
    """Linear layers with ReLU between them."""
    parts = []
    for i in range(len(sizes) - 1):
        parts += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


# ------------------------------------------------------------------------------------- vision
def cut(x, size):
    """Pictures (n, H, W, 3) to their patches (n, H / size, W / size, size * size * 3)."""
    x = x.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (n, rows, size, columns, size, 3)
    return x.transpose(2, 3).flatten(3)


class Patches(nn.Module):
    """Pictures (n, H, W, 3) to (n, C, side, side): a linear map of each patch, as in ViT
    (arXiv:2010.11929)."""

    def __init__(self, config):
        super().__init__()
        self.size = config.patch
        self.linear = nn.Linear(config.patch**2 * 3, config.width)

    def forward(self, x):
        return self.linear(cut(x, self.size)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """The same in two steps: 4x4 patches, then an overlapping convolution (early convolutions:
    arXiv:2106.14881)."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(4 * 4 * 3, 64)
        self.conv = nn.Conv2d(64, config.width, 3, config.patch // 4, 1)
        self.conv.to(memory_format=torch.channels_last)  # as its input: no copy each time

    def forward(self, x):
        return self.conv(F.relu(self.linear(cut(x, 4))).permute(0, 3, 1, 2))


class CNN(nn.Module):
    """Pictures (n, H, W, 3) to (n, C, 1, 1): three convolutions and the mean over the picture."""

    def __init__(self, config):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, config.width, 3, 2, 1),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.net(x.permute(0, 3, 1, 2)).mean((2, 3), keepdim=True)


EMBEDDINGS = dict(vit_stem=Stem, vit=Patches, cnn=CNN)


class Vision(nn.Module):
    """Pictures (B, V, H, W, 3) uint8 to tokens (B, kept, C) and which of the P patches of all views
    they are, (B, kept).

    Bare table is most of every picture. Only the patches with the pixels farthest from the picture's
    median colour become tokens, which halves the work. A CNN gives one token for each picture, and
    no transformer follows it."""

    def __init__(self, config):
        super().__init__()
        V, C = len(config.views), config.width
        self.register_buffer("image_mean", torch.full((V, 1, 1, 3), 127.0))
        self.register_buffer("image_std", torch.full((V, 1, 1, 3), 64.0))
        self.embed = EMBEDDINGS[config.vision](config)
        self.keep = config.keep_patches * config.frames
        side = 1 if config.vision == "cnn" else config.image_size // config.patch
        self.sides = []  # patches across, of each view
        for camera in config.views:
            coarse = camera in config.coarse_cameras and side > 1
            self.sides.append(side // 2 if coarse else side)
        if min(self.sides) < side:
            self.merge = nn.Conv2d(C, C, 2, 2).to(memory_format=torch.channels_last)
        for n in set(self.sides):
            grid = sincos_2d(n, C).flatten(0, 1) if side > 1 else torch.zeros(1, C)
            self.register_buffer(f"grid{n}", grid, persistent=False)
        self.view = nn.Parameter(torch.randn(V, C) * 0.02)
        self.blocks = Encoder(config, config.layers if side > 1 else 0)

    def forward(self, images):
        x = images.flatten(0, 1).float()  # (B V, H, W, 3)
        median = x[:, ::8, ::8].flatten(1, 2).median(1).values  # of a few pixels; (B V, 3)
        distance = (x - median[:, None, None]).abs().amax(-1)  # (B V, H, W)
        distance = distance.unflatten(0, images.shape[:2])  # (B, V, H, W)
        x = x.unflatten(0, images.shape[:2])
        x = (x - self.image_mean).div(self.image_std).flatten(0, 1)
        x = self.embed(x).unflatten(0, images.shape[:2])  # (B, V, C, side, side)
        tokens, scores = [], []
        for i, side in enumerate(self.sides):
            view = x[:, i] if side == x.shape[-1] else self.merge(x[:, i])
            view = view.flatten(2).transpose(1, 2)  # (B, side side, C)
            tokens.append(view + getattr(self, f"grid{side}") + self.view[i])
            cell = images.shape[2] // side
            scores.append(F.max_pool2d(distance[:, i : i + 1], cell).flatten(1))
        x = torch.cat(tokens, 1)  # (B, P, C)
        scores = torch.cat(scores, 1)  # (B, P)
        kept = scores.topk(min(self.keep, scores.shape[1])).indices.sort().values
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return self.blocks(x), kept


def sincos_2d(side, width):
    """Fixed 2-D sine-cosine positions (side, side, width), half the channels for y, half for x (as
    in MAE, arXiv:2111.06377)."""
    freq = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * freq
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # (side, C / 2)
    y = wave[:, None].expand(-1, side, -1)
    x = wave.expand(side, -1, -1)
    return torch.cat([y, x], 2)


# ----------------------------------------------------------------------------------- language
class Text(nn.Module):
    """Sentences (U, L) int64 to words in their context (U, L, C).

    There is no padding mask: 0 is padding, a gap or a word left out, and its embedding is learned.
    """

    def __init__(self, config):
        super().__init__()
        C = config.width
        vocabulary = config.words if config.text == "word" else CHARS
        self.embed = nn.Embedding(1 + len(vocabulary), C)
        self.lstm = self.blocks = None
        if config.text_encoder == "lstm":
            self.lstm = nn.LSTM(C, C // 2, batch_first=True, bidirectional=True)
        else:
            self.position = nn.Parameter(torch.randn(config.max_text, C) * 0.02)
            self.blocks = Encoder(config, config.layers)

    def forward(self, text):
        words = self.embed(text)
        if self.lstm:
            return self.lstm(words)[0]
        return self.blocks(words + self.position)


class Pointers(nn.Module):
    """Two queries, for what is to be moved and for its place, that look for one patch each.

    Grammar and meaning are kept apart (arXiv:1904.09708): the words in their context say at which
    words a pointer finds its name and what kind of thing it is; the name itself is the bare embedding
    of those words. So colours that never came together in training are no surprise."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.roles = nn.Parameter(torch.randn(len(POINTERS), C) * 0.02)
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C)
        self.word_norm = nn.LayerNorm(C)
        self.patch_norm = nn.LayerNorm(C)

    def reading(self, words, padding):
        """How much of its name each pointer finds at each word: (U, L, C) and padding (U, L) bool
        to (U, 2, L), of sum 1."""
        logits = self.word_norm(words) @ self.roles.T * self.roles.shape[1] ** -0.5
        return (logits - 1e4 * padding[..., None]).softmax(1).transpose(1, 2)

    def queries(self, words, padding, names):
        """Words in their context (U, L, C), padding (U, L), bare names (U, L, C) to (U, 2, C)."""
        return self.query(self.reading(words, padding) @ (self.word_norm(words) + names))

    def forward(self, queries, patches, picture):
        """Queries (R, 2, C) and patches (B, kept, C) to what they point at, (R, 2, C), and their
        log-attention (R, 2, kept). Row i sees patches[picture[i]]."""
        keys = self.key(self.patch_norm(patches))[picture]
        logits = queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
        return logits.softmax(-1) @ patches[picture], logits.log_softmax(-1)


# ------------------------------------------------------------------------------------- fusion
class Transformer(nn.Module):
    """All tokens: patches (B, kept, C), words (R, L, C) and others (R, E, C) to one vector (R, C),
    and the log-attention (R, 2, kept) of the CLS token's first two heads in the last layer.

    The CLS token, the words, what is pointed at and the state attend to everything; the patches are
    only attended to."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = Encoder(config, config.layers)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, patches, words, others, picture):
        cls = self.cls.expand(len(words), 1, -1)
        x = torch.cat([cls, words, others], 1)  # (R, 1 + L + E, C)
        for block in self.blocks:
            x, logits = block(x, block.keys(patches)[picture])
        maps = logits[:, : len(POINTERS), 0].log_softmax(-1)
        return self.norm(x[:, 0]), maps[..., -patches.shape[1] :]


class OneEach(nn.Module):
    """What the other fusions share: one vector for each modality, the mean of its tokens, and no
    attention map. build(config, n) makes the layers, mix() one (R, C) of the n vectors (R, n, C).
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        n = 2 + len(POINTERS) * config.pointers
        self.build(config, n + 1 if config.state_size else n)

    def forward(self, patches, words, others, picture):
        seen = patches.mean(1)[picture][:, None]
        x = torch.cat([seen, words.mean(1, keepdim=True), others], 1)
        return self.norm(self.mix(x)), patches.new_zeros(len(words), 0, patches.shape[1])


class Attention(OneEach):
    """The vectors attend to each other once and are averaged."""

    def build(self, config, n):
        self.block = Block(config.width, config.heads)

    def mix(self, x):
        return self.block(x)[0].mean(1)


class Concat(OneEach):
    """The vectors side by side, through an MLP."""

    def build(self, config, n):
        self.net = mlp(n * config.width, 2 * config.width, config.width)

    def mix(self, x):
        return self.net(x.flatten(1))


class Multiply(OneEach):
    """The product of the vectors, each through a linear map and about 1, so that it starts tame."""

    def build(self, config, n):
        self.maps = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(n))

    def mix(self, x):
        return torch.stack([1 + layer(x[:, i]) for i, layer in enumerate(self.maps)]).prod(0)


FUSIONS = dict(attention=Attention, transformer=Transformer, concat=Concat, multiply=Multiply)


# -------------------------------------------------------------------------------- action heads
# A head has forward(features), the actions, and error(features, target, valid), what is trained: one
# number for each number of the actions, not reduced; train.py weights and averages them.
class Continuous(nn.Module):
    """Regression: features (R, size) to actions (R, K, A) in [-1, 1]; error() is (R, K, A), of each
    number on its own, for targets (R, K, A), of which only the `valid` (R, K) bool count."""

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        self.net = mlp(size, 2 * config.width, config.chunk * config.action_size).append(
            nn.Tanh()
        )

    def forward(self, x):
        return self.net(x).unflatten(1, (-1, self.config.action_size))

    def error(self, x, target, valid):
        difference = self(x).float() - target
        return difference.abs() if self.config.loss == "l1" else difference.square()


class Tokens(nn.Module):
    """Each number of an action is one of `bins` tokens, as in RT-2 (arXiv:2307.15818), all of a
    chunk at once."""

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        tokens = config.chunk * config.action_size * config.bins
        self.net = mlp(size, 2 * config.width, tokens)

    def logits(self, x):
        return self.net(x).unflatten(1, (-1, self.config.action_size, self.config.bins))

    def forward(self, x):
        bin_size = 2 / self.config.bins
        return (self.logits(x).argmax(-1) + 0.5) * bin_size - 1  # the middle of the bin

    def error(self, x, target, valid):
        bins = self.config.bins
        token = ((target + 1) * (bins / 2)).long().clamp(0, bins - 1)
        return F.cross_entropy(self.logits(x).float().movedim(-1, 1), token, reduction="none")


class Flow(nn.Module):
    """Flow matching, as in pi0 (arXiv:2410.24164): noise is carried to a chunk along a learned
    velocity field, in a few steps. The noise is always the same, so that an action is a function of
    what is seen and heard."""

    FREQUENCIES = 8  # of the sine-cosine code of time

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        self.register_buffer("noise", torch.randn(config.chunk, config.action_size))
        inputs = size + self.noise.numel() + 2 * self.FREQUENCIES
        self.net = mlp(inputs, 2 * config.width, 2 * config.width, self.noise.numel())

    def velocity(self, x, actions, time):
        """Features (R, size), actions on their way (R, K, A), time (R, 1) from 0, noise, to 1."""
        angle = time * 2 ** torch.arange(self.FREQUENCIES, device=time.device)
        x = torch.cat([x, actions.flatten(1), angle.sin(), angle.cos()], 1)
        return self.net(x).unflatten(1, (-1, self.config.action_size))

    def forward(self, x):
        actions = self.noise.expand(len(x), -1, -1)
        steps = self.config.flow_steps
        for i in range(steps):
            time = x.new_full((len(x), 1), i / steps)
            actions = actions + self.velocity(x, actions, time) / steps
        return actions.clamp(-1, 1)

    def error(self, x, target, valid):
        noise = torch.randn_like(target)
        time = torch.rand(len(target), 1, device=target.device)
        between = noise.lerp(target, time[..., None])
        between = torch.where(valid[..., None], between, noise)  # as input, no made-up action
        return (self.velocity(x, between, time).float() - (target - noise)).square()


HEADS = dict(continuous=Continuous, tokens=Tokens, flow=Flow)


# ---------------------------------------------------------------------------------- policies
@dataclass
class Memory:
    """What a policy remembers of an episode between forward passes."""

    sentence: str
    chunks: list  # actions still to come, (k, A) each
    observations: list  # the last ones, newest first


class Policy(nn.Module):
    """What the VLA and the baseline share: normalisation, acting, saving, loading."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("state_mean", torch.zeros(config.state_size))
        self.register_buffer("state_std", torch.ones(config.state_size))
        self.reset()

    def reset(self):
        """Forget everything; call it when an episode starts."""
        self.memory = []
        self.encoded = None

    @property
    def device(self):
        return self.state_mean.device

    def normalize(self, state):
        return (state - self.state_mean) / self.state_std

    def read_observations(self, histories):
        """Observation dicts, for each episode a list of the last ones, newest first, to images (B, V,
        H, W, 3) uint8 and state (B, S) float32. Where there are fewer than config.frames, the oldest
        is repeated. Raises ValueError for what is missing or not of the right kind."""
        config, size = self.config, self.config.image_size
        keys = [f"{camera}_image" for camera in config.cameras]
        images, states = [], []
        for history in histories:
            for key in (*keys, *config.state_keys):
                if key not in history[0]:
                    raise ValueError(
                        f"the observation has no {key!r}; this checkpoint reads "
                        f"{', '.join((*keys, *config.state_keys))}"
                    )
            for age in range(config.frames):
                obs = history[min(age, len(history) - 1)]
                images += [np.asarray(obs[key]) for key in keys]
                for key, image in zip(keys, images[-len(keys) :] if keys else ()):
                    if image.shape != (size, size, 3) or image.dtype != np.uint8:
                        raise ValueError(
                            f"{key} must be ({size}, {size}, 3) uint8, not "
                            f"{image.shape} {image.dtype}"
                        )
            numbers = [np.ravel(history[0][key]) for key in config.state_keys]
            states.append(np.concatenate([np.zeros(0), *numbers]).astype(np.float32))
            if states[-1].shape != (config.state_size,) or not np.isfinite(states[-1]).all():
                raise ValueError(
                    f"the state must be {config.state_size} finite numbers "
                    f"({', '.join(config.state_keys)}), not {states[-1]}"
                )
        images = np.array(images, np.uint8).reshape(len(histories), -1, size, size, 3)
        state = torch.from_numpy(np.array(states))
        return torch.from_numpy(images).to(self.device), state.to(self.device)

    def act(self, observations, sentences):
        """One action each, (B, A) float32, for B episodes that go on side by side: an observation dict
        and a sentence of every one. There is a forward pass, of the whole batch, when some episode has
        used up its actions or got a new sentence; the others go on with the ones they have."""
        config = self.config
        if not self.memory:
            self.memory = [Memory(sentence, [], []) for sentence in sentences]
        for memory, obs, sentence in zip(self.memory, observations, sentences, strict=True):
            if memory.sentence != sentence:
                memory.sentence, memory.chunks, memory.observations = sentence, [], []
            memory.observations = [obs, *memory.observations[: config.frames - 1]]
        if config.ensemble or not all(memory.chunks for memory in self.memory):
            chunks = self.plan([memory.observations for memory in self.memory], sentences)
            for memory, chunk in zip(self.memory, chunks):
                if config.ensemble:
                    memory.chunks.append(chunk)
                elif not memory.chunks:
                    memory.chunks = [chunk[: config.executed]]
        actions = []
        for memory in self.memory:  # the oldest chunk weighs most: ACT, arXiv:2304.13705
            weights = np.exp(-0.01 * np.arange(len(memory.chunks)))
            now = [chunk[0] for chunk in memory.chunks]
            actions.append(weights / weights.sum() @ now)
            memory.chunks = [chunk[1:] for chunk in memory.chunks if len(chunk) > 1]
        return np.array(actions, np.float32)

    def predict(self, obs, language=None):
        """One action (A,) float32 in [-1, 1] for an observation dict and a sentence; call reset() when
        an episode starts. Raises ValueError for an unknown word, or an observation that the
        checkpoint cannot read."""
        return self.act([obs], [language])[0]

    def save(self, path, **extra):
        """Writes config, weights and `extra` (plain values) to one file that load() opens."""
        save_file(
            path,
            dict(config=dataclasses.asdict(self.config), weights=self.state_dict(), **extra),
        )

    @staticmethod
    def load(path=None, device="cpu"):
        """The policy (VLA or BC) in a checkpoint of train.py; without a path, out/ckpt.pt or else the
        one in assets/. Raises ValueError with a sentence for the user."""
        if path is None:
            path = Path("out/ckpt.pt")
            if not path.exists():
                path = Path(__file__).parent / "assets/ckpt.pt"
        saved = load_file(path)
        try:
            config = Config(**saved["config"])
            config.check()
            with torch.device("meta"):  # its shapes, before any memory is asked for
                shapes = {
                    name: x.shape
                    for name, x in POLICIES[config.model](config).state_dict().items()
                }
            if shapes != {name: x.shape for name, x in saved["weights"].items()}:
                raise ValueError("its weights do not fit its settings")
            model = POLICIES[config.model](config)
            model.load_state_dict(saved["weights"])
            model.step = saved.get("step")
            model.fingerprint = dict(saved.get("fingerprint", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this model ({one_line(error)})"
            ) from None
        model.path = str(path)
        return model.to(device).eval()


class VLA(Policy):
    def __init__(self, config):
        super().__init__(config)
        C, G = config.width, config.goal_size
        self.register_buffer("goal_mean", torch.zeros(G))
        self.register_buffer("goal_std", torch.ones(G))
        self.vision = Vision(config)
        self.text = Text(config)
        self.state = mlp(config.state_size, C, C) if config.state_size else None
        self.pointers = Pointers(config) if config.pointers else None
        self.fusion = FUSIONS[config.fusion](config)
        self.goal = nn.Linear(C, G)  # where thing and place are: an auxiliary answer
        self.head = HEADS[config.head](config, C + G + config.state_size)

    def encode_text(self, text, names=None):
        """Sentences (U, L) to words in their context (U, L, C), and the pointers' queries (U, 2, C) or
        None. names: the same sentences, if the colours in `text` are not the true ones (train.py
        shuffles them there, so that nothing but the names can depend on them)."""
        words = self.text(text)
        if not self.pointers:
            return words, None
        bare = 0  # characters name nothing
        if self.config.text == "word":
            bare = self.text.embed(text if names is None else names)
        return words, self.pointers.queries(words, text == 0, bare)

    def fuse(self, patches, words, queries, state, picture):
        """Patches (B, kept, C), words (R, L, C), queries (R, 2, C) or None, state (R, S) to features
        for the head (R, C + G + S), goals (R, G) (metres, normalised) and log-attention on the
        patches (R, M, kept): of the two pointers, if any, then of two CLS heads, if any. Row i
        sees patches[picture[i]]."""
        state = self.normalize(state)
        others = [words[:, :0]]  # (R, 0, C): cat never meets an empty list
        maps = []
        if self.pointers:
            found, attention = self.pointers(queries, patches, picture)
            others.append(found)
            maps.append(attention)
        if self.state:
            others.append(self.state(state)[:, None])
        x, attention = self.fusion(patches, words, torch.cat(others, 1), picture)
        goal = self.goal(x)
        return torch.cat([x, goal, state], 1), goal, torch.cat([*maps, attention], 1)

    def forward(
        self,
        images,
        state,
        text,
        picture=None,
        sentence=None,
        names=None,
        target=None,
        valid=None,
    ):
        """images (B, V, H, W, 3) uint8, state (B, S), text (U, L): each picture and each sentence is
        encoded once. Row i pairs picture[i] with sentence[i]; by default picture i with sentence i.

        Returns actions (R, K, A), or with `target` (R, K, A) and `valid` (R, K) the head's error (R, K,
        A); goals (R, G); log-attention (R, M, P) on the patches of all views in turn."""
        if picture is None:
            picture = sentence = torch.arange(len(images), device=images.device)
        patches, kept = self.vision(images)
        words, queries = self.encode_text(text, names)
        if queries is not None:
            queries = queries[sentence]
        features, goal, attention = self.fuse(
            patches, words[sentence], queries, state[picture], picture
        )
        if target is None:
            answer = self.head(features)
        else:
            answer = self.head.error(features, target, valid)
        R, M, _ = attention.shape
        P = sum(side * side for side in self.vision.sides)
        everywhere = attention.new_full((R, M, P), DROPPED)
        return (
            answer,
            goal,
            everywhere.scatter(2, kept[picture][:, None].expand(-1, M, -1), attention),
        )

    @torch.inference_mode()
    def plan(self, histories, sentences):
        """Chunks of actions (B, K, A) float32 numpy for B episodes, see read_observations."""
        distinct = list(dict.fromkeys(sentences))
        if None in distinct:
            raise ValueError("this policy needs a sentence: predict(obs, language=...)")
        if self.encoded is None or self.encoded[0] != distinct:
            text = torch.stack([tokenize(sentence, self.config) for sentence in distinct])
            self.encoded = distinct, *self.encode_text(text.to(self.device))
        _, words, queries = self.encoded
        images, state = self.read_observations(histories)
        sentence = [distinct.index(sentence) for sentence in sentences]
        if queries is not None:
            queries = queries[sentence]
        picture = torch.arange(len(images), device=self.device)
        patches, _ = self.vision(images)
        features, *_ = self.fuse(patches, words[sentence], queries, state, picture)
        return self.head(features).float().cpu().numpy()


class BC(Policy):
    """Behaviour cloning from the state, without eyes or words: (B, S) to one action (B, 1, A)."""

    def __init__(self, config):
        super().__init__(config)
        self.net = mlp(config.state_size, 256, 256, 256, config.action_size).append(nn.Tanh())

    def forward(self, state):
        return self.net(self.normalize(state))[:, None]

    @torch.inference_mode()
    def plan(self, histories, sentences):
        return self(self.read_observations(histories)[1]).cpu().numpy()


POLICIES = dict(vla=VLA, bc=BC)


# ------------------------------------------------------------------------- files and errors
def save_file(path, content):
    """torch.save that never leaves half a file, not even when the power fails."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    buffer = io.BytesIO()  # so that a full disk is Python's OSError
    torch.save(content, buffer)
    with open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_file(path):
    """The dict that save_file wrote. Untrusted files are never executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError("it holds something else")
    except OSError as error:
        raise ValueError(
            f"cannot read the checkpoint {path}: {error.strerror}; python train.py makes "
            "out/ckpt.pt"
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint of this model (it holds something else than "
            "weights and plain values)"
        ) from None
    except Exception as error:  # whatever a damaged file may cause in torch
        raise ValueError(
            f"{path} is not a checkpoint of this model ({one_line(error)})"
        ) from None
    return saved


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def explain_errors(script):
    """What the scripts do about errors: what the user can mend is one sentence and exit status 2,
    Ctrl-C is status 130. PICOVLA_TRACEBACK=1 in the environment shows where it came from."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            os._exit(130)
        mendable = issubclass(kind, (ValueError, OSError, MemoryError))
        if not mendable or os.environ.get("PICOVLA_TRACEBACK"):
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        print(
            f"{script}: {' '.join(str(error).split()) or kind.__name__}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    sys.excepthook = hook


if __name__ == "__main__":
    model = VLA(Config(words=tuple(f"word{i}" for i in range(30))))
    parts = dict(model.named_children()) | dict(all=model)
    for name, part in parts.items():
        print(f"{name:10}{sum(p.numel() for p in part.parameters()):12,}")
