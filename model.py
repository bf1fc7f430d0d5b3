"""The whole vision-language-action model, and a behaviour-cloning baseline. `python model.py`
prints its parts and their sizes.

    front_image ──┐ conv stem   ┌──────────┐
    wrist_image ──┴─ patches ──▶│ ViT, 2   │──┬▶ P tokens ─mean▶ 1 ┐
                                └──────────┘  │                    │
                                         2 pointers ───────────▶ 2 ┤  ┌─────────────┐
    "pick up the red block .." ▶│ text, 2  │──┴▶ L tokens ─mean▶ 1 ┼─▶│ attention,  │─mean─┐
    joints, hand, gripper ──┬──▶│ MLP      │───────────────────▶ 1 ┘  │ 5 tokens, 1 │      │
                            │                                         └─────────────┘      │
                            ├─ and where the 2 pointers look ──▶ goal ─────────────────────┤
                            └──────────────────────────────────────────────────────────────┴▶ head

A sentence reaches the action like this: `tokenize` hashes the letters of each word, `Text` makes
them words in their context, `Pointers` looks in the patches for what the words name, `goal` reads
off where thing and place are from where it looks, `fusion` mixes what it found with the mean word
and everything else, and the head turns all that into several chunks of K actions, of which one is
drawn.

Dimension letters, used everywhere: B batch (moments), V views (pictures of a moment: every
camera's newest, then the ones before), H W pixels, P patches of all views, L text tokens, N tokens
of any kind, E more of them, C width, S state numbers, G goal numbers, K actions in a chunk, A
numbers in an action; n numbers of a token; U distinct sentences, R rows (pairs of a moment and a
sentence), M attention maps.
"""

import argparse
import dataclasses
import io
import math
import os
import re
import subprocess
import sys
import textwrap
import zlib
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

POINTERS = ("thing", "place")  # what is to be moved, and what it is to be moved to
DROPPED = -1e4  # log-attention on a patch that was not kept: none
UNDERSTOOD = 0.05  # probability of understands() below which a sentence is declined


# ---------------------------------------------------------------------------------- settings
def setting(default, help, choices=None, low=1, high=10_000, needs=None):
    """A dataclass field that is a flag of train.py and knows what values it may have. needs: (other
    setting, values of it) without which it means nothing."""
    about = dict(help=help, choices=choices, low=low, high=high, needs=needs)
    return dataclasses.field(default=default, metadata=about)


def comma_list(text):
    return tuple(text.split(","))


def add_flags(parser, settings):
    """Gives the parser a flag for each setting of a dataclass; what is not said stays unset."""
    special = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=comma_list)}
    for field in dataclasses.fields(settings):
        if field.metadata:
            help, choices = field.metadata["help"], field.metadata["choices"]
            if choices or field.type in (int, float, bool):
                help += f" (default {field.default})"
            options = special.get(field.type, dict(type=field.type, choices=choices))
            parser.add_argument(
                f"--{field.name}", default=argparse.SUPPRESS, help=help, **options
            )


def check_fields(settings, explicit=()):
    """Raises ValueError, with a sentence for the user, if a setting is of the wrong type or out of
    range, or if an `explicit` flag means nothing beside the others."""
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue
        value = getattr(settings, field.name)
        _, choices, low, high, needs = field.metadata.values()
        wanted = None
        if type(value) is not field.type:
            wanted = field.type.__name__
        elif choices and value not in choices:
            wanted = f"one of {choices}"
        elif field.type in (int, float) and not choices and not low <= value <= high:
            wanted = f"from {low} to {high}"
        elif field.type is tuple and len(set(value)) < len(value):
            wanted = "names, none of them twice"
        if wanted:
            raise ValueError(f"--{field.name} must be {wanted}, not {value!r}")
        if needs and field.name in explicit:
            other, values = needs
            found = getattr(settings, other)
            if found not in values:
                good = " or ".join(values)
                raise ValueError(f"--{field.name} goes with --{other} {good}, not with {found}")


@dataclass
class Config:
    """What a policy is made of; saved in its checkpoint."""

    model: str = setting("vla", "vla, or bc: an MLP on the state alone", ("vla", "bc"))
    # of the data file
    tasks: tuple = setting(("pick_place",), "what to learn: all, or a comma list")
    cameras: tuple = setting(("front", "wrist"), "comma list of the file's cameras to use")
    intents: tuple = ()  # what the training sentences ask for, names apart; the last is "none"
    state_keys: tuple = ("joint_pos", "ee_pos", "ee_vel", "gripper")
    state_size: int = 14  # S: numbers in them
    goal_size: int = 6  # G: object_pos and target_pos
    action_size: int = 4  # A: dx, dy, dz, gripper
    image_size: int = 64  # px
    # vision
    vision: str = setting(
        "vit_stem",
        "patches by two small convolutions or a linear map (vit), or a vector a picture (cnn)",
        ("vit_stem", "vit", "cnn"),
    )
    patch: int = setting(8, "px, edge of a patch")
    keep_patches: int = setting(
        56, "patches kept, times --frames: those farthest from the picture's median colour"
    )
    frames: int = setting(1, "pictures of each camera: the last ones, a control step apart")
    # language
    text: str = setting(
        "word",
        "tokens of the sentence: words, each by its letters, or letters",
        ("word", "char"),
    )
    text_encoder: str = setting(
        "transformer", "what encodes the sentence", ("transformer", "lstm")
    )
    buckets: int = setting(
        4096,
        "rows of the table that parts of words are hashed into",
        low=2,
        needs=("text", ("word",)),
    )
    max_text: int = 40  # L; shorter sentences are padded to it
    pointers: int = setting(
        1, "1: two pointers from words to patches, for the thing and its place", (0, 1)
    )
    # fusion
    fusion: str = setting(
        "attention",
        "mixes one vector for each modality; or a transformer over all tokens",
        ("attention", "concat", "multiply", "transformer"),
    )
    width: int = setting(128, "C, numbers in a token")
    heads: int = setting(4, "attention heads")
    layers: int = setting(2, "transformer layers of each encoder")
    # action head
    head: str = setting(
        "mixture",
        "several candidate chunks, one of them drawn (mixture), regression (continuous), bins and "
        "cross-entropy (tokens), or flow matching (flow)",
        ("mixture", "continuous", "tokens", "flow"),
    )
    head_layers: int = setting(3, "hidden layers of the head; one more if flow")
    head_width: int = setting(256, "numbers in a hidden layer of the head, or of bc")
    loss: str = setting(
        "l1", "loss of the continuous head", ("l1", "mse"), needs=("head", ("continuous",))
    )
    bins: int = setting(
        256, "bins for each number of an action", low=2, needs=("head", ("tokens",))
    )
    flow_steps: int = setting(
        4, "integration steps of the flow head", needs=("head", ("flow",))
    )
    chunk: int = setting(8, "K, actions predicted in a forward pass")
    execute: int = setting(
        0, "actions carried out before the next forward pass; 0: half the chunk", low=0
    )
    ensemble: bool = setting(
        False,
        "make a forward pass in every step and average all chunks; not with --head mixture",
    )

    @property
    def executed(self):
        """How many actions of a chunk are carried out, or averaged."""
        if self.ensemble:
            return self.chunk
        return self.execute or (self.chunk + 1) // 2

    def check(self, explicit=()):
        """Raises ValueError, with a sentence for the user, if the parts do not fit together."""
        check_fields(self, explicit)
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}"
            )
        if self.patch % 4 or self.image_size % self.patch:
            raise ValueError(
                f"--patch {self.patch} must be a multiple of 4 and divide {self.image_size} px"
            )
        if self.ensemble and self.head == "mixture":
            raise ValueError(
                "--ensemble averages chunks, which --head mixture is there to avoid; use "
                "--head continuous"
            )
        if self.execute > self.chunk:
            raise ValueError(f"--execute {self.execute} is more than the chunk of {self.chunk}")


# -------------------------------------------------------------------------------------- text
CHARS = " abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
NGRAMS = 24  # of a word, at most


WORD = r"\w+(?:'\w+)*"


def split(text):
    return re.findall(WORD, text.lower().replace("’", "'"))


@cache
def ngrams(word, buckets):
    """(NGRAMS,) int64: numbers of a word and of its parts of 3 to 5 letters, hashed, as in fastText
    (arXiv:1607.04606), so that no word is unknown and a misspelt one is much like itself; 0: none.
    """
    word = f"<{word}>"
    parts = [word]
    for n in (3, 4, 5):
        parts += [word[i : i + n] for i in range(len(word) - n + 1)]
    numbers = np.zeros(NGRAMS, np.int64)
    hashed = [1 + zlib.crc32(part.encode()) % (buckets - 1) for part in dict.fromkeys(parts)]
    numbers[: len(hashed)] = hashed[:NGRAMS]
    return numbers


def tokenize(text, config):
    """Sentence to (L, n) int64: of each word its NGRAMS, or of each letter one number; 0 is padding.
    Raises ValueError for a sentence that is too long."""
    if config.text == "char":
        tokens = [[1 + CHARS.index(char)] for char in text.lower() if char in CHARS]
    else:
        tokens = [ngrams(word, config.buckets) for word in split(text)]
    if len(tokens) > config.max_text:
        raise ValueError(f"longer than {config.max_text} {config.text}s: {text!r}")
    row = np.zeros((config.max_text, 1 if config.text == "char" else NGRAMS), np.int64)
    row[: len(tokens)] = tokens or 0
    return torch.from_numpy(row)


# -------------------------------------------------------------------------------------- parts
class Block(nn.Module):
    """Pre-norm transformer layer. Its outputs start at zero, so that it starts as the identity."""

    def __init__(self, config):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.q = nn.Linear(C, C, bias=False)
        self.kv = nn.Linear(C, 2 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C)
        self.down = nn.Linear(4 * C, C)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def by_head(self, x):
        """(B, N, n) to (B, heads, N, n / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x):
        """Tokens (B, N, C) to their keys and values (B, heads, N, 2 C / heads)."""
        return self.by_head(self.kv(self.norm1(x)))

    def forward(self, x):
        return self.attend(x)[0]

    def attend(self, x, context=None, mask=None):
        """(B, N, C) to (B, N, C), and attention logits (B, heads, N, N + E). The tokens attend to
        themselves and to `context`, the keys() of E more tokens, which stay as they are. mask:
        (B, 1, 1, N + E) bool, which of them may be attended to."""
        y = self.norm1(x)
        q = self.by_head(self.q(y))
        kv = self.by_head(self.kv(y))
        if context is not None:
            kv = torch.cat([kv, context], 2)
        k, v = kv.chunk(2, -1)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -1e4)
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        hidden = F.relu(self.up(self.norm2(x))).square()  # Primer, arXiv:2109.08668
        return x + self.down(hidden), logits


def encoder(config, layers):
    """A stack of Blocks: (B, N, C) to (B, N, C)."""
    return nn.Sequential(*[Block(config) for _ in range(layers)])


def mlp(*sizes, layer=nn.Linear):
    """Layers with ReLU between them."""
    parts = []
    for pair in pairwise(sizes):
        parts += [layer(*pair), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


# ------------------------------------------------------------------------------------- vision
CELL = 4  # px: pictures are cut into cells of 4x4, of which patches are made


class Patches(nn.Module):
    """Patches of pictures, as their cells (n, E, E, 48), to (n, C): a linear map of each patch, as in
    ViT (arXiv:2010.11929)."""

    MARGIN = 0  # cells above and to the left of a patch that are seen with it

    def __init__(self, cells, width):
        super().__init__()
        self.linear = nn.Linear(cells**2 * CELL**2 * 3, width)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Stem(nn.Module):
    """The same in two steps: a linear map of each cell, then one of all cells of a patch and its margin.
    That is an overlapping convolution (early convolutions: arXiv:2106.14881) where it is needed.
    """

    MARGIN = 1

    def __init__(self, cells, width):
        super().__init__()
        self.first = nn.Linear(CELL**2 * 3, 64)
        self.second = nn.Linear(64 * (1 + cells) ** 2, width)

    def forward(self, x):
        return self.second(F.relu(self.first(x)).flatten(1))


class CNN(nn.Module):
    """Whole pictures, as their cells (n, E, E, 48), to (n, C): three convolutions and the mean over
    the picture."""

    MARGIN = 0

    def __init__(self, cells, width):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        self.net = mlp(3, 32, 64, width, layer=conv)

    def forward(self, x):
        x = x.unflatten(3, (CELL, CELL, 3)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return F.relu(self.net(x.permute(0, 3, 1, 2))).mean((2, 3))


EMBEDDINGS = dict(vit_stem=Stem, vit=Patches, cnn=CNN)


class Vision(nn.Module):
    """Pictures (B, V, H, W, 3) uint8 to tokens (B, kept, C), which of the P patches of all views
    they are, (B, kept), and where their middles are, (B, kept, 2), y and x, 0..1.

    Bare table is most of every picture. Only the patches with the pixels farthest from the
    picture's median colour become tokens, which halves the work. A CNN gives one token for each
    picture, and no transformer follows it."""

    def __init__(self, config):
        super().__init__()
        V, C = len(config.cameras) * config.frames, config.width
        self.register_buffer("image_mean", torch.full((V, 1, 1, 3), 127.0))
        self.register_buffer("image_std", torch.full((V, 1, 1, 3), 64.0))
        self.side = 1 if config.vision == "cnn" else config.image_size // config.patch
        self.patches = V * self.side**2  # P
        self.keep = min(config.keep_patches * config.frames, self.patches)
        self.cells = config.image_size // self.side // CELL  # across a patch
        self.embed = EMBEDDINGS[config.vision](self.cells, C)
        self.view = nn.Parameter(torch.randn(V, C) * 0.02)
        self.blocks = encoder(config, config.layers if self.side > 1 else 0)

    def forward(self, images, shift=None):
        """shift (B, V, 2), y and x: by how much pictures were shifted, as a share of their size.
        The places of patches are those before that."""
        kept = self.score(images).topk(self.keep).indices.sort().values
        view, patch = kept // self.side**2, kept % self.side**2
        cell = torch.stack([patch // self.side, patch % self.side], 2)  # (B, kept, 2)
        x = self.embed(self.cut(images, view, cell).flatten(0, 1))
        x = x.unflatten(0, kept.shape) + F.embedding(view, self.view)
        if shift is not None:
            cell = cell - self.side * shift.take_along_dim(view[..., None], 1)
        if self.side > 1:
            x = x + sincos_2d(cell, x.shape[2])
        return self.blocks(x), kept, (cell + 0.5) / self.side

    def score(self, images):
        """How far from its picture's median colour each patch has a pixel, (B, P)."""
        x = images.to(torch.int16)
        x = x[:, :, ::2] + x[:, :, 1::2]
        half = (x[:, :, :, ::2] + x[:, :, :, 1::2]) / 4  # with less noise
        some = half[:, :, ::4, ::4].flatten(2, 3)  # a few pixels
        median = some.median(2, keepdim=True).values[:, :, None]  # (B, V, 1, 1, 3)
        distance = (half - median).abs().amax(-1)  # (B, V, H / 2, W / 2)
        return F.max_pool2d(distance, half.shape[2] // self.side).flatten(1)

    def cut(self, images, view, patch):
        """The cells, normalised (B, kept, E, E, 48), of patches and their margins. view (B, kept) and
        patch (B, kept, 2), y and x: which ones. Beyond the edge there is what is at the edge.
        """
        side = images.shape[2] // CELL
        cells = images.unflatten(3, (side, CELL)).unflatten(2, (side, CELL))
        cells = cells.transpose(3, 4).flatten(4)  # (B, V, side, side, 48)
        span = torch.arange(-self.embed.MARGIN, self.cells, device=images.device)
        y, x = (self.cells * patch[..., None] + span).clamp_min(0).unbind(2)  # (B, kept, E)
        batch = torch.arange(len(images))[:, None, None, None]
        cells = cells[batch, view[..., None, None], y[..., None], x[..., None, :]]
        mean, std = self.image_mean[view], self.image_std[view]  # (B, kept, 1, 1, 3)
        return (cells - mean.repeat(1, 1, 1, 1, CELL**2)) / std.repeat(1, 1, 1, 1, CELL**2)


def sincos_2d(place, width):
    """2-D sine-cosine code (.., width) of places (.., 2), half the channels for y, half for x (as
    in MAE, arXiv:2111.06377)."""
    freq = 1.0 / 100 ** (torch.arange(width // 4, device=place.device) / (width // 4))
    angle = place[..., None] * freq
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


# ----------------------------------------------------------------------------------- language
class Text(nn.Module):
    """Sentences (U, L, n) int64 to words in their context (U, L, C), zero where there is padding.

    A convolution tells each word its neighbours before the transformer: which colour is said of
    which thing is a matter of the words next to it."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        size = config.buckets if config.text == "word" else 1 + len(CHARS)
        self.table = nn.EmbeddingBag(size, C, mode="sum", padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.3)
        nn.init.zeros_(self.table.weight[0])
        self.neighbours = nn.Conv1d(C, C, 5, padding=2)
        self.lstm = None
        if config.text_encoder == "lstm":
            self.lstm = nn.LSTM(C, C // 2, batch_first=True, bidirectional=True)
        else:
            self.position = nn.Parameter(torch.randn(config.max_text, C) * 0.02)
            self.blocks = encoder(config, config.layers)

    def embed(self, text):
        """The words as they are, (U, L, C)."""
        return self.table(text.flatten(0, 1)).unflatten(0, text.shape[:2])

    def forward(self, text):
        words = self.embed(text)
        words = words + self.neighbours(words.mT).mT
        real = text[..., :1] > 0  # (U, L, 1)
        if self.lstm:
            lengths = real.sum((1, 2)).clamp_min(1).cpu()
            packed = pack_padded_sequence(words, lengths, True, enforce_sorted=False)
            return pad_packed_sequence(self.lstm(packed)[0], True)[0] * real
        words = words + self.position[: text.shape[1]]
        for block in self.blocks:
            words, _ = block.attend(words, mask=real.mT[:, None])
        return words * real


class Pointers(nn.Module):
    """Two queries, for what is to be moved and for its place, that look for one spot each.

    Grammar and meaning are kept apart (arXiv:1904.09708): the words in their context say at which
    words a pointer finds its name and what kind of thing it is; the name itself is the bare
    embedding of those words. So colours that never came together in training are no surprise.
    """

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.roles = nn.Parameter(torch.randn(len(POINTERS), C) * 0.02)
        self.query = nn.Linear(C, C)
        self.word_norm = nn.LayerNorm(C)
        # What is added to every key alike changes no attention, so nothing but rounding would move
        # biases; Adam made that large steps, until logits were too large for bf16 to tell apart.
        self.patch_norm = nn.LayerNorm(C, bias=False)
        self.key = nn.Linear(C, C, bias=False)

    def reading(self, words, padding):
        """How much of its name each pointer finds at each word: (U, L, C) and padding (U, L) bool
        to (U, 2, L), of sum 1."""
        logits = self.word_norm(words) @ self.roles.T * self.roles.shape[1] ** -0.5
        return (logits - 1e4 * padding[..., None]).softmax(1).mT

    def queries(self, words, reading, names):
        """Words in their context (U, L, C), reading (U, 2, L), bare names (U, L, C) to (U, 2, C)."""
        return self.query(reading @ (self.word_norm(words) + names))

    def forward(self, queries, patches, picture):
        """Queries (R, 2, C) and patches (B, kept, C) to what they point at, (R, 2, C), and their
        log-attention (R, 2, kept). Row i sees patches[picture[i]]."""
        keys = self.key(self.patch_norm(patches))[picture]
        logits = queries @ keys.mT * queries.shape[-1] ** -0.5
        return logits.softmax(-1) @ patches[picture], logits.log_softmax(-1)

    def spatial_softmax(self, attention, view, place, picture):
        """Where they look (arXiv:1509.06113), (R, 2 * 3 V): of each pointer, in each view, how much
        of its attention is there, and the mean place of that, y and x from the picture's middle.
        view (B, kept, V) one-hot and place (B, kept, 2) 0..1: of the patches."""
        spots = view[..., None] * F.pad(place - 0.5, (1, 0), value=1.0)[:, :, None]
        # In fp32, which a matrix product would not be.
        found = (attention.exp()[..., None, None] * spots[picture][:, None]).sum(2)
        total, place = found.split([1, 2], 3)  # (R, 2, V, 1 and 2)
        return torch.cat([total, place / (total + 1e-3)], 3).flatten(1)


# ------------------------------------------------------------------------------------- fusion
class Transformer(nn.Module):
    """All tokens: patches (B, kept, C), words (R, L, C) and others (R, E, C) to one vector (R, C),
    and the log-attention (R, 2, kept) of the CLS token's first two heads in the last layer.

    The CLS token, the words, what is pointed at and the state attend to everything; the patches are
    only attended to."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = encoder(config, config.layers)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, patches, words, others, picture):
        cls = self.cls.expand(len(words), 1, -1)
        x = torch.cat([cls, words, others], 1)  # (R, 1 + L + E, C)
        more = others.shape[1] + patches.shape[1]
        real = F.pad((words != 0).any(2), (1, more), value=True)[:, None, None]
        for block in self.blocks:
            x, logits = block.attend(x, block.keys(patches)[picture], real)
        maps = logits[:, : len(POINTERS), 0].log_softmax(-1)
        return self.norm(x[:, 0]), maps[..., -patches.shape[1] :]


def mean_word(words):
    """(U, L, C) to (U, C), without the padding, which is zero."""
    n = (words != 0).any(2).sum(1, keepdim=True)
    return words.sum(1) / n.clamp_min(1)


class OneEach(nn.Module):
    """What the other fusions share: one vector for each modality, the mean of its tokens, and no
    attention map. build() makes the layers for n vectors, mix() one (R, C) of them (R, n, C).
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        n = 2 + len(POINTERS) * config.pointers + bool(config.state_size)
        self.build(config, n)

    def forward(self, patches, words, others, picture):
        seen = patches.mean(1)[picture][:, None]
        x = torch.cat([seen, mean_word(words)[:, None], others], 1)
        return self.norm(self.mix(x)), patches.new_zeros(len(words), 0, patches.shape[1])


class Attention(OneEach):
    """The vectors attend to each other once and are averaged."""

    def build(self, config, n):
        self.block = Block(config)

    def mix(self, x):
        return self.block(x).mean(1)


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
# A head has forward(features), the actions, and error(features, target, valid), what is trained:
# one number for each number of the actions, not reduced; train.py weights and averages them.
def chunk_mlp(config, size, layers, last=()):
    """An MLP with `layers` hidden layers that ends in (K, A, *last) numbers."""
    shape = config.chunk, config.action_size, *last
    sizes = [size, *[config.head_width] * layers, math.prod(shape)]
    return mlp(*sizes).append(nn.Unflatten(1, shape))


class Continuous(nn.Module):
    """Regression: features (R, size) to actions (R, K, A) in [-1, 1]; error() is (R, K, A), of each
    number on its own, for targets (R, K, A), of which only the `valid` (R, K) bool count."""

    def __init__(self, config, size):
        super().__init__()
        self.loss = dict(l1=torch.abs, mse=torch.square)[config.loss]
        self.net = chunk_mlp(config, size, config.head_layers)

    def forward(self, x):
        return self.net(x).tanh()

    def error(self, x, target, valid):
        return self.loss(self(x).float() - target)


class Tokens(nn.Module):
    """Each number of an action is one of `bins` tokens, as in RT-2 (arXiv:2307.15818), all of a
    chunk at once."""

    def __init__(self, config, size):
        super().__init__()
        self.bins = config.bins
        self.net = chunk_mlp(config, size, config.head_layers, (self.bins,))

    def forward(self, x):
        return (self.net(x).argmax(-1) + 0.5) * (2 / self.bins) - 1  # the middle of the bin

    def error(self, x, target, valid):
        token = ((target + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        return F.cross_entropy(self.net(x).float().movedim(-1, 1), token, reduction="none")


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
        self.net = chunk_mlp(config, inputs, config.head_layers + 1)

    def velocity(self, x, actions, time):
        """Features (R, size), actions on their way (R, K, A), time (R, 1) from 0, noise, to 1."""
        angle = time * 2 ** torch.arange(self.FREQUENCIES, device=time.device)
        x = torch.cat([x, actions.flatten(1), angle.sin(), angle.cos()], 1)
        return self.net(x)

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


class Mixture(nn.Module):
    """Several candidate chunks and their probabilities: a mixture density network (Bishop, 1994) of
    Laplace distributions of a chunk's mean error. Where an expert acts now in one way and now in
    another, the median may be neither."""

    MODES = 4
    SCALE = 0.05  # of the Laplace distributions, in units of an action

    def __init__(self, config, size):
        super().__init__()
        self.turn = 0  # how many plans this episode has had
        self.shape = config.chunk, config.action_size, self.MODES
        hidden = [config.head_width] * config.head_layers
        self.net = mlp(size, *hidden, self.MODES + math.prod(self.shape))

    def modes(self, x):
        """Features (R, size) to log-probabilities (R, MODES) and chunks (R, K, A, MODES)."""
        x = self.net(x).float()
        chunks = x[:, self.MODES :].unflatten(1, self.shape).tanh()
        return x[:, : self.MODES].log_softmax(1), chunks

    def forward(self, x):
        """One of them, drawn by their probabilities. The draw follows from the turn, so that an
        episode that is played again is the same."""
        log_prob, chunks = self.modes(x)
        below = log_prob.exp().cumsum(1) <= np.random.default_rng(self.turn).random()
        mode = below.sum(1).clamp_max(self.MODES - 1)
        return chunks.take_along_dim(mode[:, None, None, None], 3)[..., 0]

    def error(self, x, target, valid):
        log_prob, chunks = self.modes(x)
        error = (chunks - target[..., None]).abs()
        cost = (error.mean(2) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        responsibility = (log_prob - cost / self.SCALE).softmax(1).detach()
        cross_entropy = -(responsibility * log_prob).sum(1)
        error = (error * responsibility[:, None, None]).sum(3)
        return error + self.SCALE * cross_entropy[:, None, None]


HEADS = dict(mixture=Mixture, continuous=Continuous, tokens=Tokens, flow=Flow)


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
        self.plans = 0  # chunks made in this episode
        self.heard = None

    def normalize(self, state):
        return (state - self.state_mean) / self.state_std

    def read_observations(self, histories):
        """Observation dicts, for each episode a list of the last ones, newest first, to images (B,
        V, H, W, 3) uint8 and state (B, S) float32. Where there are fewer than config.frames, the
        oldest is repeated. Raises ValueError for what is missing or not of the right kind."""
        config, device = self.config, self.state_mean.device
        shape = config.image_size, config.image_size, 3
        images, states = [], []
        try:
            for history in histories:
                for age in range(config.frames):
                    obs = history[min(age, len(history) - 1)]
                    images += [obs[f"{camera}_image"] for camera in config.cameras]
                numbers = [np.ravel(history[0][key]) for key in config.state_keys]
                states.append(np.concatenate([[], *numbers]))
        except KeyError as error:
            raise ValueError(f"the observation has no {error}") from None
        for image in images:
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(
                    f"pictures must be {shape} uint8, not {image.shape} {image.dtype}"
                )
        state = np.array(states, np.float32)
        if state.shape[1] != config.state_size or not np.isfinite(state).all():
            raise ValueError(
                f"{', '.join(config.state_keys)} must be {config.state_size} finite numbers"
            )
        images = np.array(images, np.uint8).reshape(len(histories), -1, *shape)
        return torch.tensor(images, device=device), torch.tensor(state, device=device)

    def act(self, observations, sentences):
        """One action each, (B, A) float32, for B episodes that go on side by side: an observation
        dict and a sentence of every one. There is a forward pass, of the whole batch, when some
        episode has used up its actions or got a new sentence; the others go on with the ones they
        have."""
        config = self.config
        self.memory = self.memory or [Memory(None, [], []) for _ in sentences]
        for memory, obs, sentence in zip(self.memory, observations, sentences):
            if memory.sentence != sentence:
                memory.sentence, memory.chunks, memory.observations = sentence, [], []
            memory.observations = [obs, *memory.observations][: config.frames]
        if config.ensemble or not all(memory.chunks for memory in self.memory):
            chunks = self.plan([memory.observations for memory in self.memory], sentences)
            for memory, chunk in zip(self.memory, chunks):
                if config.ensemble or not memory.chunks:
                    memory.chunks.append(chunk[: config.executed])
        actions = []
        for memory in self.memory:  # the oldest chunk weighs most: ACT, arXiv:2304.13705
            weights = np.exp(-0.01 * np.arange(len(memory.chunks)))
            actions.append(np.average([chunk[0] for chunk in memory.chunks], 0, weights))
            memory.chunks = [chunk[1:] for chunk in memory.chunks if len(chunk) > 1]
        return np.array(actions, np.float32)

    def understands(self, sentence):
        """The probability that a sentence asks for something that was taught."""
        return 1.0

    def predict(self, obs, language=None):
        """One action (A,) float32 in [-1, 1] for an observation dict and a sentence; call reset()
        when an episode starts. Raises ValueError for a sentence that is too long, or an observation
        that the checkpoint cannot read."""
        return self.act([obs], [language])[0]

    def save(self, path, dtype=torch.float16, **extra):
        """Writes config, weights and `extra` (plain values) to one file that load() opens. fp16 is
        exact enough for parameters to act with, but not for the statistics of any robot's state.
        """
        rounded = {name: p.detach().to(dtype) for name, p in self.named_parameters()}
        weights = self.state_dict() | rounded
        save_file(path, dict(config=dataclasses.asdict(self.config), weights=weights, **extra))

    @staticmethod
    def load(path=None, device="cpu"):
        """The policy (VLA or BC) in a checkpoint of train.py; without a path, out/ckpt.pt or else
        the one in assets/. Raises ValueError with a sentence for the user."""
        if path is None:
            path = Path("out/ckpt.pt")
            if not path.exists():
                path = Path(__file__).parent / "assets/ckpt.pt"
        saved = load_file(path)
        try:
            config = Config(**saved["config"])
            config.check()
            with torch.device("meta"):  # asks for no memory: its weights are those of the file
                model = POLICIES[config.model](config)
            model.load_state_dict(saved["weights"], assign=True)
        except Exception as error:  # whatever is missing or does not fit
            raise ValueError(
                f"{path} is not a checkpoint of this model ({one_line(error)})"
            ) from error
        model.path = str(path)
        model.step = saved.get("step")
        model.fingerprint = saved.get("fingerprint", {})
        return model.to(device).float().eval()


class Heard(NamedTuple):
    """What the encoder of text makes of U sentences."""

    words: torch.Tensor  # (U, L, C) in their context
    queries: torch.Tensor  # (U, 2, C) of the pointers, or (U, 0, C) without any
    reading: torch.Tensor  # (U, 2, L) where each pointer finds its name: a share of 1, or None
    intents: torch.Tensor  # (U, intents) logits of what is asked for, or None


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
        self.intent = None
        if config.intents:
            self.intent = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, len(config.intents)))
        self.fusion = FUSIONS[config.fusion](config)
        self.goal = nn.Linear(C, G)  # where thing and place are: an auxiliary answer
        if config.pointers:
            spots = len(POINTERS) * 3 * len(config.cameras) * config.frames
            self.goal = mlp(spots + config.state_size, 2 * C, C, G)
        self.head = HEADS[config.head](config, C + G + config.state_size)

    def encode_text(self, text, names=None):
        """Sentences (U, L, n) to what is Heard. names: the same sentences, if the colours in `text`
        are not the true ones (train.py shuffles them there, so that nothing but the names can
        depend on them)."""
        longest = max(1, int((text[..., 0] > 0).sum(1).max()))
        text = text[:, :longest]
        words = self.text(text)
        intents = self.intent(mean_word(words)) if self.intent else None
        if not self.pointers:
            return Heard(words, words[:, :0], None, intents)
        bare = 0  # characters name nothing
        if self.config.text == "word":
            bare = self.text.embed(text if names is None else names[:, :longest])
        reading = self.pointers.reading(words, text[..., 0] == 0)
        return Heard(words, self.pointers.queries(words, reading, bare), reading, intents)

    @torch.inference_mode()
    def understands(self, sentence):
        """The probability that a sentence asks for something that was taught."""
        text = tokenize(sentence, self.config)[None].to(self.state_mean.device)
        heard = self.encode_text(text)
        return 1.0 if heard.intents is None else 1 - heard.intents.softmax(1)[0, -1].item()

    def forward(
        self,
        images,
        state,
        text,
        picture=slice(None),
        sentence=slice(None),
        names=None,
        target=None,
        valid=None,
        shift=None,
    ):
        """images (B, V, H, W, 3) uint8, state (B, S), text (U, L, n) or what encode_text() makes of
        it: each picture and each sentence is encoded once. Row i pairs picture[i] with sentence[i];
        by default picture i with sentence i. shift: see Vision.

        Returns actions (R, K, A), or with `target` (R, K, A) and `valid` (R, K) the head's error
        (R, K, A); goals (R, G) (metres, normalised); log-attention (R, M, P) on the patches of all
        views in turn: of the two pointers, if any, then of two CLS heads, if any; and what is Heard.
        """
        patches, kept, place = self.vision(images, shift)
        heard = text if isinstance(text, Heard) else self.encode_text(text, names)
        words, queries = heard.words[sentence], heard.queries[sentence]
        state = self.normalize(state)[picture]
        others, maps = queries, []
        if self.pointers:
            others, attention = self.pointers(queries, patches, picture)
            maps.append(attention)
            view = F.one_hot(kept // self.vision.side**2, images.shape[1])
            spots = self.pointers.spatial_softmax(attention, view, place, picture)
        if self.state:
            others = torch.cat([others, self.state(state)[:, None]], 1)
        x, attention = self.fusion(patches, words, others, picture)
        maps = torch.cat([*maps, attention], 1)  # (R, M, kept)
        goal = self.goal(torch.cat([spots, state], 1) if self.pointers else x)
        features = torch.cat([x, goal, state], 1)
        if target is None:
            answer = self.head(features)
        else:
            answer = self.head.error(features, target, valid)
        everywhere = maps.new_full((*maps.shape[:2], self.vision.patches), DROPPED)
        where = kept[picture][:, None].expand_as(maps)
        return answer, goal, everywhere.scatter(2, where, maps), heard

    @torch.inference_mode()
    def plan(self, histories, sentences):
        """Chunks of actions (B, K, A) float32 numpy for B episodes, see read_observations."""
        distinct = list(dict.fromkeys(sentences))
        if self.heard != distinct:  # they are encoded once
            if None in distinct:
                raise ValueError("this policy needs a sentence: predict(obs, language=...)")
            text = torch.stack([tokenize(sentence, self.config) for sentence in distinct])
            self.encoded = self.encode_text(text.to(self.state_mean.device))
            self.heard = distinct
        images, state = self.read_observations(histories)
        self.head.turn = self.plans
        self.plans += 1
        sentence = [distinct.index(sentence) for sentence in sentences]
        actions, *_ = self(images, state, self.encoded, sentence=sentence)
        return actions.float().cpu().numpy()


class BC(Policy):
    """Behaviour cloning from the state, without eyes or words: (B, S) to actions (B, K, A)."""

    def __init__(self, config):
        super().__init__(config)
        self.net = chunk_mlp(config, config.state_size, 3)

    def forward(self, state):
        return self.net(self.normalize(state)).tanh()

    @torch.inference_mode()
    def plan(self, histories, sentences):
        _, state = self.read_observations(histories)
        return self(state).cpu().numpy()


POLICIES = dict(vla=VLA, bc=BC)


# ------------------------------------------------------------------------- files and errors
def save_file(path, content):
    """torch.save that never leaves half a file."""
    buffer = io.BytesIO()  # so that a full disk is Python's OSError
    torch.save(content, buffer)
    part = Path(f"{path}.part")
    part.write_bytes(buffer.getbuffer())
    part.replace(path)


def load_file(path):
    """The dict that save_file wrote. Untrusted files are never executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except Exception as error:  # whatever a damaged file may cause in torch
        kind = type(error).__name__  # its message may advise to trust the file
        raise ValueError(f"{path} is not a checkpoint of this model ({kind})") from error


def code_version():
    """git's name of the code that runs, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return git.stdout.strip() or "unknown"


def one_line(error, longest=200):
    return textwrap.shorten(str(error), longest) or type(error).__name__


def explain_errors(script):
    """What the scripts do about errors: what the user can mend is one sentence and exit status 2,
    Ctrl-C is status 130. PICOVLA_TRACEBACK=1 in the environment shows where it came from."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8

    def hook(kind, error, trace):
        if kind is KeyboardInterrupt:
            os._exit(130)
        mendable = issubclass(kind, (ValueError, OSError, MemoryError))
        if not mendable or "PICOVLA_TRACEBACK" in os.environ:
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        print(f"{script}: {one_line(error, 10_000)}", file=sys.stderr)
        os._exit(2)

    sys.excepthook = hook


if __name__ == "__main__":
    model = VLA(Config())
    for name, part in [*model.named_children(), ("all", model)]:
        print(f"{name:10}{sum(p.numel() for p in part.parameters()):12,}")
