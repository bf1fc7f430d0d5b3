"""The whole vision-language-action model, and a behaviour-cloning baseline.

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

Dimension letters, used everywhere: B moments in a batch, V views (pictures of a moment: every
camera's newest, then the ones before), H W pixels, P patches of all views, U sentences, L text
tokens, N tokens of any kind, C width, S state numbers, G goal numbers, K actions in a chunk, A
numbers in an action; n numbers of a token.
"""

import dataclasses
import io
import math
import pickle
import re
import subprocess
import zlib
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

POINTERS = ("thing", "place")  # what is to be moved, and what it is to be moved to
DROPPED = -1e4  # log-attention on a patch that was not kept: none
CELL = 4  # px: patches are made of cells of 4x4
UNDERSTOOD = 0.05  # probability of understands() below which a sentence is declined


@dataclass
class Config:
    """What a policy is made of; saved in its checkpoint."""

    model: str = "vla"  # or bc: an MLP on the state alone
    # of the data file
    cameras: tuple = ("front", "wrist")
    tasks: tuple = ("pick_place",)
    # What sentences ask for, and the slots of each, with None for a name: {"push left":
    # {"block": None, "direction": "left"}}; the last is "none".
    intents: dict = field(default_factory=dict)
    state_keys: tuple = ("joint_pos", "ee_pos", "ee_vel", "gripper")
    state_size: int = 14  # S: numbers in them
    goal_size: int = 6  # G: where thing and place are, m
    action_size: int = 4  # A
    image_size: int = 64  # px
    # vision
    vision: str = "vit_stem"  # two small convolutions; or a linear map (vit), or a CNN (cnn)
    patch: int = 8  # px, edge of a patch
    keep_patches: int = 56  # times frames: those farthest from the picture's median colour
    frames: int = 1  # pictures of each camera: the last ones, a control step apart
    # language
    text: str = "word"  # tokens: words, each by its letters; or letters (char)
    text_encoder: str = "transformer"  # or lstm
    buckets: int = 4096  # rows of the table that parts of words are hashed into
    pointers: int = 1  # 1: both pointers from words to patches, for thing and place; 0: none
    # fusion
    fusion: str = "attention"  # of one vector for each modality; or a transformer over all tokens
    width: int = 128  # C
    heads: int = 4  # of attention
    layers: int = 2  # of each encoder
    # action head
    head: str = "mixture"  # several chunks; regression (continuous), bins (tokens), or flow
    head_layers: int = 3  # hidden layers of the head; one more if flow
    head_width: int = 256  # numbers in a hidden layer of the head, or of bc
    loss: str = "l1"  # of the continuous head, or mse
    bins: int = 256  # of the head of tokens, for each number of an action
    flow_steps: int = 4  # integration steps of the flow head
    chunk: int = 8  # K, actions predicted in a forward pass
    execute: int = 0  # actions carried out before the next one; 0: half the chunk
    ensemble: int = 0  # 1: a forward pass in every step, all chunks averaged (ACT)

    def __post_init__(self):
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of 4 and of heads {self.heads}")
        if self.patch % CELL or self.image_size % self.patch:
            raise ValueError(
                f"patch {self.patch} is no multiple of {CELL} that divides {self.image_size} px"
            )
        if self.execute > self.chunk:
            raise ValueError(f"execute {self.execute} is more than chunk {self.chunk}")
        if self.ensemble and self.head == "mixture":
            raise ValueError("ensemble averages chunks, which a mixture is there to avoid")

    @property
    def max_text(self):
        """L; shorter sentences are padded to it."""
        return 200 if self.text == "char" else 40

    @property
    def executed(self):
        """How many actions of a chunk are carried out, or averaged."""
        if self.ensemble:
            return self.chunk
        return self.execute or (self.chunk + 1) // 2


# -------------------------------------------------------------------------------------- text
WORD = r"\w+(?:'\w+)*"
NGRAMS = 24  # numbers of a token, at most


def split(text):
    return re.findall(WORD, text.lower().replace("’", "'"))


@cache
def ngrams(word, buckets):
    """Numbers of a word and of its parts of 3 to 5 letters, hashed, as in fastText
    (arXiv:1607.04606), so that no word is unknown and a misspelt one is much like itself."""
    word = f"<{word}>"
    parts = [word]
    for n in (3, 4, 5):
        parts += [word[i : i + n] for i in range(len(word) - n + 1)]
    return [1 + zlib.crc32(part.encode()) % (buckets - 1) for part in dict.fromkeys(parts)]


def tokenize(text, config):
    """Sentence to (L, NGRAMS) int64: of each word its ngrams, or of each letter one number; 0 is
    padding. Raises ValueError for a sentence that is too long."""
    words = split(text)
    if config.text == "char":
        tokens = [[1 + ord(letter) % (config.buckets - 1)] for letter in " ".join(words)]
    else:
        tokens = [ngrams(word, config.buckets) for word in words]
    if len(tokens) > config.max_text:
        raise ValueError(f"longer than {config.max_text} {config.text}s: {text!r}")
    rows = np.zeros((config.max_text, NGRAMS), np.int64)
    for row, token in zip(rows, tokens):
        row[: len(token)] = token[:NGRAMS]
    return torch.from_numpy(rows)


# -------------------------------------------------------------------------------------- parts
def squared_relu(x):
    return F.relu(x).square()  # Primer, arXiv:2109.08668


def block(config):
    """Pre-norm transformer layer. Its outputs start at zero, so that it starts as the identity."""
    C = config.width
    options = dict(dropout=0.0, activation=squared_relu, batch_first=True, norm_first=True)
    layer = nn.TransformerEncoderLayer(C, config.heads, 4 * C, **options)
    # What is added to every key alike changes no attention, so nothing but rounding would move the
    # biases of keys; Adam made that large steps, until bf16 could not tell logits apart.
    layer.self_attn.in_proj_bias = None
    nn.init.zeros_(layer.self_attn.out_proj.weight)
    nn.init.zeros_(layer.linear2.weight)
    return layer


def encoder(config, layers):
    """A stack of them: (B, N, C) to (B, N, C)."""
    return nn.Sequential(*[block(config) for _ in range(layers)])


def mlp(*sizes, layer=nn.Linear):
    """Layers with ReLU between them."""
    parts = []
    for pair in pairwise(sizes):
        parts += [layer(*pair), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


# ------------------------------------------------------------------------------------- vision
# An embedding turns windows (n, 3, h, w) into tokens (n, C).
def stem(patch, width):
    """Two small convolutions, of cells and of all cells of a patch and its margin, where they are
    needed (early convolutions: arXiv:2106.14881)."""
    cells = (1 + patch // CELL) ** 2
    first = nn.Conv2d(3, 64, CELL, CELL)
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(64 * cells, width))


def linear(patch, width):
    """A linear map of each patch, as in ViT (arXiv:2010.11929)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * patch**2, width))


def cnn(patch, width):
    """Of whole pictures: three convolutions and the mean over the picture."""
    conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    net = mlp(3, 32, 64, width, layer=conv)
    return nn.Sequential(net, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


EMBEDDINGS = dict(vit_stem=stem, vit=linear, cnn=cnn)


class Vision(nn.Module):
    """Pictures (B, V, H, W, 3) uint8 to tokens (B, kept, C), which of the P patches of all views
    they are, (B, kept), and where their middles are, (B, kept, 2), y and x, 0..1.

    Bare table is most of every picture. Only the patches with the pixels farthest from the
    picture's median colour become tokens, which halves the work. A CNN gives one token for each
    picture, and no transformer follows it."""

    def __init__(self, config):
        super().__init__()
        V, C = len(config.cameras) * config.frames, config.width
        self.register_buffer("image_mean", torch.full((V, 3, 1, 1), 127.0))
        self.register_buffer("image_std", torch.full((V, 3, 1, 1), 64.0))
        whole = config.vision == "cnn"
        self.patch = config.image_size if whole else config.patch  # px
        self.margin = CELL * (config.vision == "vit_stem")  # px that are seen above and to the left
        self.side = config.image_size // self.patch  # patches across a picture
        self.patches = V * self.side**2  # P
        self.keep = min(config.keep_patches * config.frames, self.patches)
        self.embed = EMBEDDINGS[config.vision](self.patch, C)
        self.view = nn.Parameter(torch.randn(V, C) * 0.02)
        self.blocks = encoder(config, 0 if whole else config.layers)

    def forward(self, images, shift):
        """shift (B, 2), y and x: by how much pictures were shifted, as a share of their size.
        The places of patches are those before that."""
        x = images.movedim(4, 2).float()  # (B, V, 3, H, W)
        kept = self.score(x).topk(self.keep).indices.sort().values
        view, patch = kept // self.side**2, kept % self.side**2
        cell = torch.stack([patch // self.side, patch % self.side], 2)  # (B, kept, 2), y and x

        x = (x - self.image_mean) / self.image_std
        x = F.pad(x, (self.margin, 0, self.margin, 0, 0, 0), "replicate")
        size = self.patch + self.margin
        windows = x.unfold(3, size, self.patch).unfold(
            4, size, self.patch
        )  # of all patches, not copied
        batch = torch.arange(len(images), device=images.device)[:, None]
        chosen = windows[batch, view, :, cell[..., 0], cell[..., 1]]  # (B, kept, 3, size, size)
        x = self.embed(chosen.flatten(0, 1)).unflatten(0, kept.shape)
        cell = cell - self.side * shift[:, None]
        x = x + F.embedding(view, self.view) + sincos_2d(cell, x.shape[2])
        return self.blocks(x), kept, (cell + 0.5) / self.side

    def score(self, x):
        """How far from its picture's median colour each patch of (B, V, 3, H, W) has a pixel, (B,
        P)."""
        half = F.avg_pool2d(x.flatten(0, 1), 2)  # with less noise
        some = half[:, :, ::4, ::4].flatten(2)  # a few pixels are enough for a median
        distance = (half - some.median(2).values[..., None, None]).abs().amax(1)
        return F.max_pool2d(distance, self.patch // 2).view(len(x), -1)


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
        self.table = nn.EmbeddingBag(config.buckets, C, mode="sum", padding_idx=0)
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
            return self.lstm(words)[0] * real
        words = words + self.position[: text.shape[1]]
        padding = ~real[..., 0]
        padding[:, 0] = False  # an empty sentence attends to something, too
        for layer in self.blocks:
            words = layer(words, src_key_padding_mask=padding)
        return words * real


def mean_word(words):
    """(U, L, C) to (U, C), without the padding, which is zero."""
    n = (words != 0).any(2).sum(1, keepdim=True)
    return words.sum(1) / n.clamp_min(1)


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
        # No biases in keys, see block().
        self.patch_norm = nn.LayerNorm(C, bias=False)
        self.key = nn.Linear(C, C, bias=False)

    def read(self, words, names, padding):
        """Words in their context and bare names, (U, L, C) each, padding (U, L) bool: queries
        (U, 2, C), and how much of its name each pointer finds at each word, (U, 2, L), of sum 1."""
        words = self.word_norm(words)
        logits = words @ self.roles.T * self.roles.shape[1] ** -0.5
        reading = (logits - 1e4 * padding[..., None]).softmax(1).mT
        return self.query(reading @ (words + names)), reading

    def forward(self, queries, patches):
        """Queries (B, 2, C) and patches (B, kept, C) to what they point at, (B, 2, C), and their
        log-attention (B, 2, kept)."""
        keys = self.key(self.patch_norm(patches))
        logits = queries @ keys.mT * queries.shape[-1] ** -0.5
        return logits.softmax(-1) @ patches, logits.log_softmax(-1)


def spatial_softmax(attention, view, place):
    """Where pointers look (arXiv:1509.06113), (B, 2 * 3 V), from their log-attention (B, 2, kept):
    of each, in each view, how much of its attention is there, and the mean place of that, y and x
    from the picture's middle. view (B, kept, V) one-hot and place (B, kept, 2) 0..1: of the
    patches."""
    share = attention.float().exp()[..., None] * view[:, None]  # (B, 2, kept, V)
    total = share.sum(2)[..., None]  # (B, 2, V, 1)
    # A sum, not a matrix product, which bf16 would make too coarse.
    place = (share[..., None] * (place - 0.5)[:, None, :, None]).sum(2)  # (B, 2, V, 2)
    return torch.cat([total, place / (total + 1e-3)], 3).flatten(1)


# ------------------------------------------------------------------------------------- fusion
# A fusion turns patches (B, kept, C), words (B, L, C) and others (B, N, C), what is pointed at and
# the state, into one vector (B, C).
class Transformer(nn.Module):
    """All tokens, with a CLS token that becomes the vector."""

    def __init__(self, config):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = encoder(config, config.layers)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, patches, words, others):
        cls = self.cls.expand(len(words), 1, -1)
        x = torch.cat([cls, others, patches, words], 1)
        padding = F.pad((words == 0).all(2), (x.shape[1] - words.shape[1], 0), value=False)
        for layer in self.blocks:
            x = layer(x, src_key_padding_mask=padding)
        return self.norm(x[:, 0])


class OneEach(nn.Module):
    """What the others share: one vector for each modality, the mean of its tokens. mix() makes one
    (B, C) of these (B, n, C)."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.build(config, 3 + len(POINTERS) * config.pointers, config.width)

    def forward(self, patches, words, others):
        means = torch.stack([patches.mean(1), mean_word(words)], 1)
        return self.norm(self.mix(torch.cat([means, others], 1)))


class Attention(OneEach):
    """The vectors attend to each other once and are averaged."""

    def build(self, config, n, C):
        self.block = block(config)

    def mix(self, x):
        return self.block(x).mean(1)


class Concat(OneEach):
    """The vectors side by side, through an MLP."""

    def build(self, config, n, C):
        self.mix = nn.Sequential(nn.Flatten(), mlp(n * C, 2 * C, C))


class Multiply(OneEach):
    """The product of the vectors, each through a linear map and about 1, so that it starts tame."""

    def build(self, config, n, C):
        self.maps = nn.Parameter(torch.randn(n, C, C) * 0.05)

    def mix(self, x):
        return (1 + torch.einsum("bnc, ncd -> bnd", x, self.maps)).prod(1)


FUSIONS = dict(attention=Attention, transformer=Transformer, concat=Concat, multiply=Multiply)


# -------------------------------------------------------------------------------- action heads
# A head has forward(features), the actions (B, K, A) in [-1, 1], and error(features, target,
# valid), what is trained: one number for each number of the actions, which train.py weights and
# averages. Of the targets (B, K, A) only the `valid` (B, K) bool count.
def chunk_mlp(config, size, layers, last=()):
    """An MLP with `layers` hidden layers that ends in (K, A, *last) numbers."""
    shape = config.chunk, config.action_size, *last
    sizes = [size, *[config.head_width] * layers, math.prod(shape)]
    return mlp(*sizes).append(nn.Unflatten(1, shape))


class Continuous(nn.Module):
    """Regression."""

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

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        self.register_buffer("noise", torch.randn(config.chunk, config.action_size))
        inputs = size + self.noise.numel() + 1
        self.net = chunk_mlp(config, inputs, config.head_layers + 1)

    def velocity(self, x, actions, time):
        """Features (B, size), actions on their way (B, K, A), time (B, 1) from 0, noise, to 1."""
        return self.net(torch.cat([x, actions.flatten(1), time], 1))

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
        return (self.velocity(x, between, time).float() - (target - noise)).square()


class Mixture(nn.Module):
    """Several candidate chunks and their probabilities: a mixture density network (Bishop, 1994) of
    Laplace distributions of a chunk's mean error. Where an expert acts now in one way and now in
    another, the median may be neither."""

    MODES = 4
    SCALE = 0.05  # of the Laplace distributions, in units of an action

    def __init__(self, config, size):
        super().__init__()
        self.dice = np.random.default_rng(0)  # Policy.reset() takes another
        self.shape = config.chunk, config.action_size, self.MODES
        hidden = [config.head_width] * config.head_layers
        self.net = mlp(size, *hidden, self.MODES + math.prod(self.shape))

    def modes(self, x):
        """Features (B, size) to log-probabilities (B, MODES) and chunks (B, K, A, MODES)."""
        logits, chunks = self.net(x).float().tensor_split([self.MODES], 1)
        return logits.log_softmax(1), chunks.unflatten(1, self.shape).tanh()

    def forward(self, x):
        """One of them, drawn by their probabilities."""
        log_prob, chunks = self.modes(x)
        below = log_prob.exp().cumsum(1) <= self.dice.random()
        mode = below.sum(1).clamp_max(self.MODES - 1)
        return chunks[torch.arange(len(x)), ..., mode]

    def error(self, x, target, valid):
        log_prob, chunks = self.modes(x)
        error = (chunks - target[..., None]).abs()
        cost = (error.mean(2) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        share = (
            (log_prob - cost / self.SCALE).softmax(1).detach()
        )  # that each mode is responsible for
        cross_entropy = -(share * log_prob).sum(1)
        return (error * share[:, None, None]).sum(3) + self.SCALE * cross_entropy[:, None, None]


HEADS = dict(mixture=Mixture, continuous=Continuous, tokens=Tokens, flow=Flow)


# ---------------------------------------------------------------------------------- policies
class Policy(nn.Module):
    """What the VLA and the baseline share: acting in an episode, saving, loading."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("state_mean", torch.zeros(config.state_size))
        self.register_buffer("state_std", torch.ones(config.state_size))
        self.reset()

    def reset(self, seed=0):
        """Call it when an episode starts. seed: of what a mixture draws in it."""
        self.sentence = None
        self.chunks = []  # actions still to come, (k, A) each
        self.history = []  # the last observations, newest first
        self.dice = np.random.default_rng(seed)

    def normalize(self, state):
        return (state - self.state_mean) / self.state_std

    def read_observations(self, history):
        """Observation dicts, newest first, to images (1, V, H, W, 3) uint8 and state (1, S). Where
        there are fewer than config.frames, the oldest is repeated."""
        config, device = self.config, self.state_mean.device
        history = [*history, *[history[-1]] * config.frames][: config.frames]
        images = [obs[f"{name}_image"] for obs in history for name in config.cameras]
        size = config.image_size
        for image in images:
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise ValueError(f"a picture is ({size}, {size}, 3) uint8, not {image.shape}")
        state = np.concatenate([np.ravel(history[0][key]) for key in config.state_keys])
        if len(state) != config.state_size or not np.isfinite(state).all():
            raise ValueError(f"{config.state_keys} are {config.state_size} finite numbers")
        state = torch.tensor(state[None], dtype=torch.float32, device=device)
        return torch.tensor(np.array(images)[None], device=device), state

    def predict(self, obs, language=None):
        """One action (A,) float32 in [-1, 1] for an observation dict and a sentence. There is a
        forward pass when the actions of the last one are used up or the sentence is another. Raises
        ValueError for a sentence that is too long, or an observation that it cannot read."""
        config = self.config
        if language != self.sentence:
            self.sentence, self.chunks, self.history = language, [], []
        self.history = [obs, *self.history][: config.frames]
        if config.ensemble or not self.chunks:
            chunk = self.plan(self.history, language)
            self.chunks.append(chunk[: config.executed])
        weights = np.exp(-0.01 * np.arange(len(self.chunks)))  # the oldest most: arXiv:2304.13705
        action = np.average([chunk[0] for chunk in self.chunks], 0, weights)
        self.chunks = [chunk[1:] for chunk in self.chunks if len(chunk) > 1]
        return action.astype(np.float32)

    def understands(self, sentence):
        """The probability that a sentence asks for something that was taught."""
        return 1.0

    def save(self, path, **extra):
        """Writes config, weights and `extra` (plain values) to one file that load() opens."""
        config = dataclasses.asdict(self.config)
        save_file(path, dict(config=config, weights=self.state_dict(), **extra))

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
            model = POLICIES[config.model](config)
            model.load_state_dict(saved["weights"])
        except (KeyError, TypeError, RuntimeError) as error:  # what is missing or does not fit
            kind = type(error).__name__
            raise ValueError(f"{path} is not a checkpoint of this model ({kind})") from error
        model.path, model.step, model.code = str(path), saved["step"], saved["code"]
        return model.to(device).eval()


class VLA(Policy):
    def __init__(self, config):
        super().__init__(config)
        C, G, S = config.width, config.goal_size, config.state_size
        self.heard = None, None  # a sentence and what was made of it
        self.register_buffer("goal_mean", torch.zeros(G))
        self.register_buffer("goal_std", torch.ones(G))
        self.vision = Vision(config)
        self.text = Text(config)
        self.state = mlp(S, C, C)
        self.pointers = Pointers(config) if config.pointers else None
        self.intent = None
        if config.intents:
            self.intent = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, len(config.intents)))
        self.fusion = FUSIONS[config.fusion](config)
        if config.pointers:
            spots = len(POINTERS) * 3 * len(config.cameras) * config.frames
            self.goal = mlp(spots + S, 2 * C, C, G)  # where thing and place are
        self.head = HEADS[config.head](config, C + G * config.pointers + S)

    def encode_text(self, text, names):
        """Sentences (U, L, n) to a dict: `words` (U, L, C) in their context; with pointers, their
        `queries` (U, 2, C) and the `reading` (U, 2, L), where each finds its name; with intents,
        `intent` (U, intents), logits of what is asked for. names: the same sentences with their
        true names, which train.py shuffles in `text`, so that nothing else can depend on them."""
        longest = max(1, int((text[..., 0] > 0).sum(1).max()))
        text = text[:, :longest]
        words = self.text(text)
        found = dict(words=words)
        if self.intent:
            found["intent"] = self.intent(mean_word(words))
        if self.pointers:
            bare = self.text.embed(names[:, :longest])
            padding = text[..., 0] == 0
            found["queries"], found["reading"] = self.pointers.read(words, bare, padding)
        return found

    def forward(self, batch):
        """batch: a dict of images (B, V, H, W, 3) uint8 and their shift, see Vision; state (B, S);
        text and names, see encode_text, or `heard`, what that makes of them; sentence (B,), which
        of these each moment has; in training also target (B, K, A) and valid (B, K).

        Returns a dict: what is heard, and actions (B, K, A), or with a target the head's error
        (B, K, A); goal (B, G), m, normalised; of pointers, attention (B, 2, P), the logarithm of
        how much they look at the patches of all views in turn."""
        images, sentence = batch["images"], batch["sentence"]
        patches, kept, place = self.vision(images, batch["shift"])
        heard = batch.get("heard") or self.encode_text(batch["text"], batch["names"])
        state = self.normalize(batch["state"])
        answer = dict(heard)
        others, features = [self.state(state)[:, None]], [state]
        if self.pointers:
            found, attention = self.pointers(heard["queries"][sentence], patches)
            view = F.one_hot(kept // self.vision.side**2, images.shape[1])
            goal = self.goal(torch.cat([spatial_softmax(attention, view, place), state], 1))
            others.append(found)
            features.insert(0, goal)
            everywhere = attention.new_full((*attention.shape[:2], self.vision.patches), DROPPED)
            attention = everywhere.scatter(2, kept[:, None].expand_as(attention), attention)
            answer |= dict(goal=goal, attention=attention)
        x = self.fusion(patches, heard["words"][sentence], torch.cat(others, 1))
        features = torch.cat([x, *features], 1)
        if "target" in batch:
            answer["error"] = self.head.error(features, batch["target"], batch["valid"])
        else:
            answer["actions"] = self.head(features)
        return answer

    @torch.inference_mode()
    def hear(self, sentence):
        """encode_text() of one sentence, which is kept until there is another."""
        if sentence is None:
            raise ValueError("this policy needs a sentence: predict(obs, language=...)")
        if self.heard[0] != sentence:
            text = tokenize(sentence, self.config)[None].to(self.state_mean.device)
            self.heard = sentence, self.encode_text(text, text)
        return self.heard[1]

    @torch.inference_mode()
    def look(self, images, state, sentence):
        """The forward pass of one moment: what read_observations() gives, and a sentence."""
        first = torch.zeros(1, dtype=torch.long, device=images.device)
        still = torch.zeros(1, 2, device=images.device)
        batch = dict(images=images, state=state, sentence=first, shift=still)
        return self(batch | dict(heard=self.hear(sentence)))

    def plan(self, history, sentence):
        """A chunk of actions (K, A) for the last observations, newest first."""
        self.head.dice = self.dice  # for a mixture, of this episode
        found = self.look(*self.read_observations(history), sentence)
        return found["actions"][0].float().cpu().numpy()

    def understands(self, sentence):
        """The probability that a sentence asks for something that was taught."""
        if not self.intent:
            return 1.0
        return 1 - self.hear(sentence)["intent"].softmax(1)[0, -1].item()

    def request(self, sentence):
        """What the policy reads in a sentence: (task, slots); None if it declines it, or was not
        taught what sentences ask for."""
        if not (self.intent and self.pointers) or self.understands(sentence) < UNDERSTOOD:
            return None
        heard = self.hear(sentence)
        best = heard["intent"][0, :-1].argmax().item()
        intent, slots = list(self.config.intents.items())[best]
        words = split(sentence)
        read = [words[i] for i in heard["reading"][0].argmax(1).tolist()]
        names = [slot for slot, word in slots.items() if word is None]
        return intent.split()[0], slots | dict(zip(names, read))


class BC(Policy):
    """Behaviour cloning from the state, without eyes or words: (B, S) to actions (B, K, A)."""

    def __init__(self, config):
        super().__init__(config)
        self.net = chunk_mlp(config, config.state_size, 3)

    def forward(self, batch):
        actions = self.net(self.normalize(batch["state"])).tanh()
        if "target" in batch:
            return dict(error=(actions - batch["target"]).abs())
        return dict(actions=actions)

    @torch.inference_mode()
    def plan(self, history, sentence):
        _, state = self.read_observations(history)
        return self(dict(state=state))["actions"][0].cpu().numpy()


POLICIES = dict(vla=VLA, bc=BC)
CHOICES = dict(  # of Config's fields that are names
    model=POLICIES,
    vision=EMBEDDINGS,
    text=("word", "char"),
    text_encoder=("transformer", "lstm"),
    fusion=FUSIONS,
    head=HEADS,
    loss=("l1", "mse"),
)


# ------------------------------------------------------------------------------------- files
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
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        kind = type(error).__name__  # torch's message may advise to trust the file
        raise ValueError(f"{path} is not a checkpoint of this model ({kind})") from error


def code_version():
    """git's name of the code that runs, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return git.stdout.strip() or "unknown"
