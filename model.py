"""The whole vision-language-action model, and a behaviour-cloning baseline.

    front_image ──┐ conv stem   ┌──────────┐
    wrist_image ──┴─ patches ──▶│ ViT x2   │──┬▶ kept P ───mean▶ 1 ┐
                                └──────────┘  │                    │
                                         2 pointers ───────────▶ 2 ┤  ┌─────────────┐
    "pick up the red block .." ▶│ text x2  │──┴▶ L tokens ─mean▶ 1 ┼─▶│ attention x1│─mean─┐
    joints, hand, gripper ──┬──▶│ MLP      │───────────────────▶ 1 ┘  │ of 5 vectors│      │
                            │                                         └─────────────┘      │
                            ├─ and where the 2 pointers look ──▶ goal ─────────────────────┤
                            └──────────────────────────────────────────────────────────────┴▶ head

Read on downwards to follow a sentence to an action; parts come in the order of their use, layers
last. Policy.predict calls VLA.forward: `tokenize` hashes the letters of each word, `Text` puts them
in their context, `Pointers` takes the names from the bare words and looks for them in the patches,
`goal` is read off where they look, `fusion` mixes all of it, and from that, goal and state the head
makes several chunks of K actions: one is drawn. eval.play and Env.step are around it.

Dimension letters, used everywhere: B moments in a batch, V views (pictures of a moment: every
camera's newest, then the ones before), H W pixels, P patches of all views, of which some are
`kept`, U sentences, L text tokens, N tokens of any kind, C width, S state numbers, G numbers of
where thing and place are, K actions in a chunk, A numbers in an action. x2: two layers.
"""

import math
import pickle
import re
import subprocess
import zlib
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

POINTERS = ("thing", "place")  # what is to be moved, and what it is to be moved to
DROPPED = -1e4  # log-attention on a patch that was not kept: as good as none
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
    goal_size: int = 6  # G: where thing and place are, m, or joints there
    action_size: int = 4  # A: dx, dy, dz, gripper, see Env in gen_data.py
    image_size: int = 64  # px
    # vision
    vision: str = "vit_stem"  # two small convolutions; vit: a linear map; or cnn
    patch: int = 8  # px, edge of a patch
    keep_patches: int = 56  # times frames: those farthest from the median colour
    frames: int = 1  # pictures of each camera: the last ones, a control step apart
    # language
    text: str = "word"  # tokens: words, each by its letters; or letters (char)
    text_encoder: str = "transformer"  # or lstm
    buckets: int = 4096  # rows of the table that parts of words are hashed into
    pointers: int = 1  # 1: those of POINTERS; 0: none
    # fusion
    fusion: str = "attention"  # of one vector a modality; or transformer: of all tokens
    width: int = 128  # C
    heads: int = 4  # of attention
    layers: int = 2  # of each encoder
    # action head
    head: str = "mixture"  # several chunks; or continuous, tokens (bins), flow
    head_layers: int = 3  # hidden layers of the head
    head_width: int = 256  # numbers in each of them
    loss: str = "l1"  # of the mixture and the continuous head, or mse
    bins: int = 256  # of the head of tokens, for each number of an action
    flow_steps: int = 4  # integration steps of the flow head
    chunk: int = 8  # K, actions predicted in a forward pass
    execute: int = 0  # actions before the next forward pass; 0: half the chunk
    ensemble: int = 0  # 1: a pass in every step, chunks averaged (ACT); not for mixture

    def __post_init__(self):
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"width {self.width} is no multiple of 4 and of heads {self.heads}"
            )
        if self.patch % CELL or self.image_size % self.patch:
            raise ValueError(
                f"patch {self.patch} is no multiple of {CELL} that divides {self.image_size} px"
            )
        if self.execute > self.chunk:
            raise ValueError(f"execute {self.execute} is more than chunk {self.chunk}")

    @property
    def max_text(self):
        """Tokens of a sentence, at most."""
        return 200 if self.text == "char" else 40

    @property
    def executed(self):
        """How many actions of a chunk are carried out, or averaged."""
        if self.ensemble:
            return self.chunk
        return self.execute or (self.chunk + 1) // 2


# ---------------------------------------------------------------------------------- policies
class Policy(nn.Module):
    """What the VLA and the baseline share: acting in an episode, saving, loading.

    predict() is called at every control step. Now and then it calls look(), for which forward()
    turns what read_observations() and hear() give into a chunk of actions."""

    def __init__(self, config, head):
        super().__init__()
        self.config = config
        self.head = head
        self.register_buffer("state_mean", torch.zeros(config.state_size))
        self.register_buffer("state_std", torch.ones(config.state_size))
        self.reset()

    def reset(self, seed=0):
        """Call it when an episode starts. seed: of what a mixture draws in it."""
        self.sentence = None
        self.plans = []  # what is left of chunks, (k, A) each; one, unless ensemble
        self.history = []  # the last observations, newest first
        self.rng = np.random.default_rng(seed)

    def predict(self, obs, language=None):
        """One action (A,) float32 in [-1, 1] for an observation dict and a sentence (`language`).
        There is a forward pass when the actions of the last one are used up or the sentence is
        another. Raises ValueError for a sentence too long, or an observation it cannot read."""
        config = self.config
        if language != self.sentence:
            self.plans = []
        self.sentence = language
        self.history = [obs, *self.history][: config.frames]
        if config.ensemble or not self.plans:
            self.head.dice = self.rng.random()
            chunk = self.look(self.history, language)["actions"][0].numpy(force=True)
            self.plans.append(chunk[: config.executed])  # half of them by default
        # The next action of the only plan; if ensemble, the mean of those of one plan from each
        # step, the oldest weighing most (arXiv:2304.13705).
        weights = np.exp(-0.01 * np.arange(len(self.plans)))
        action = np.average([plan[0] for plan in self.plans], 0, weights)
        self.plans = [plan[1:] for plan in self.plans if len(plan) > 1]
        return action.astype(np.float32)

    @torch.inference_mode()
    def look(self, history, sentence):
        """One forward pass: of the last observations, newest first, and of a sentence."""
        return self(self.read_observations(history) | dict(heard=self.hear(sentence)))

    def read_observations(self, history):
        """Observation dicts, newest first, to a batch of one moment: images, shift, state and the
        number of its sentence, see VLA.forward. If frames are missing, the oldest is repeated."""
        config = self.config
        history = history + history[-1:] * (config.frames - len(history))
        images = [obs[f"{name}_image"] for obs in history for name in config.cameras]
        size = config.image_size
        for image in images:
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"a picture is ({size}, {size}, 3) uint8, not {image.shape}"
                )
        state = np.hstack([history[0][key] for key in config.state_keys])
        if len(state) != config.state_size or not np.isfinite(state).all():
            raise ValueError(
                f"{config.state_keys} are {config.state_size} finite numbers"
            )
        moment = dict(
            images=torch.from_numpy(np.array(images, np.uint8)),
            shift=torch.zeros(2),  # only training shifts pictures
            state=torch.from_numpy(state).float(),
            number=torch.tensor(0),  # of its sentence: only one is heard
        )
        return {
            name: tensor[None].to(self.state_mean.device)
            for name, tensor in moment.items()
        }

    def hear(self, sentence):
        """Nothing: the baseline is deaf. A sentence enters by VLA.hear, below."""
        return {}

    def finish(self, features, batch):
        """The end of forward(): actions (B, K, A) or, given a target (B, K, A), the head's error
        (B, K, A), of which `valid` (B, K) counts."""
        if "target" in batch:
            return dict(error=self.head.error(features, batch["target"], batch["valid"]))
        return dict(actions=self.head(features))

    def understands(self, sentence):
        """The probability that a sentence asks for what was taught; 1 if training heard no others."""
        heard = self.hear(sentence)
        if "intent" not in heard:
            return 1.0
        return 1 - heard["intent"].softmax(1)[0, -1].item()  # the last is "none"

    def save(self, path, **extra):
        """Writes config, weights and `extra` for load(). What was there stays until it is whole."""
        content = dict(config=asdict(self.config), weights=self.state_dict(), **extra)
        part = Path(f"{path}.part")
        try:
            torch.save(content, part)
        except RuntimeError:
            part.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written; is the disk full?") from None
        part.replace(path)

    @staticmethod
    def load(path=None):
        """The policy in a checkpoint; without a path, in out/ckpt.pt or else in assets/ckpt.pt."""
        if path is None:
            path = Path("out/ckpt.pt")
            if not path.exists():
                path = Path(__file__).parent / "assets/ckpt.pt"
        saved = load_file(path)
        config = Config(**saved["config"])
        model = POLICIES[config.model](config)
        model.load_state_dict(saved["weights"])
        model.path = str(path)
        model.step = saved["step"]
        model.code = saved["code"]
        return model.eval()


class VLA(Policy):
    def __init__(self, config):
        C, G, S = config.width, config.goal_size, config.state_size
        super().__init__(config, HEADS[config.head](config, C + G * config.pointers + S))
        self.heard = {}  # {the last sentence: what encode_text() made of it}
        self.register_buffer("goal_mean", torch.zeros(G))  # m; train.py normalises by it
        self.register_buffer("goal_std", torch.ones(G))
        self.vision = Vision(config)
        self.text = Text(config)
        self.state = mlp(S, C, C)
        self.pointers = Pointers(config) if config.pointers else None
        self.intent = None
        if config.intents:
            self.intent = nn.Sequential(
                nn.LayerNorm(C), nn.Linear(C, len(config.intents))
            )
        self.fusion = FUSIONS[config.fusion](config)
        if config.pointers:
            spots = len(POINTERS) * 3 * len(config.cameras) * config.frames  # share, y, x
            self.goal = mlp(spots + S, 2 * C, C, G)

    @torch.inference_mode()
    def hear(self, sentence):
        """encode_text() of one sentence; kept until there is another."""
        if sentence not in self.heard:
            text = tokenize(sentence, self.config)[None].to(self.state_mean.device)
            self.heard = {sentence: self.encode_text(text, true_text=text)}
        return self.heard[sentence]

    def encode_text(self, text, true_text):
        """Sentences (U, L, NGRAMS) to a dict: `words` (U, L, C) in context; with pointers, their
        `queries` (U, 2, C) and the `reading` (U, 2, L), where each finds its name; with intents,
        `intent` (U, intents), logits of what is asked for. true_text: the same as text; in training
        alone `text` has random names in place of the true ones."""
        words = self.text(text)
        heard = dict(words=words)
        if self.intent:
            heard["intent"] = self.intent(mean_word(words))
        if self.pointers:
            bare = self.text.embed(true_text)
            heard["queries"], heard["reading"] = self.pointers.read(words, bare)
        return heard

    def forward(self, batch):
        """batch: a dict of images (B, V, H, W, 3) uint8; shift (B, 2), by how much training moved
        them; state (B, S); text and true_text, see encode_text, or `heard`, what it makes of them;
        number (B,), which of these each moment has; when training target and valid, see finish().

        Returns a dict: what is heard; of pointers, goal (B, G), normalised, and attention (B, 2,
        P), the logarithm of how much they look at the patches of all views in turn; and actions or
        error, see finish()."""
        # What is heard, seen and felt.
        heard = batch.get("heard") or self.encode_text(batch["text"], batch["true_text"])
        number = batch["number"]  # (B,), which of the U sentences heard
        shift = batch["shift"]
        patches, kept = self.vision(batch["images"], shift)  # (B, kept, C), and which
        state = (batch["state"] - self.state_mean) / self.state_std
        others = self.state(state)[:, None]  # (B, 1, C); what is found is added
        goal = state[:, :0]  # (B, 0), which it stays without pointers
        answer = dict(heard)

        # What pointers find; log-attention to kept patches, to all P; where thing and place are.
        if self.pointers:
            found, log_kept = self.pointers(heard["queries"][number], patches)
            others = torch.cat([others, found], 1)  # (B, 3, C)
            dropped = log_kept.new_full((*found.shape[:2], self.vision.patches), DROPPED)
            log_all = dropped.scatter(2, kept[:, None].expand_as(log_kept), log_kept)
            thing, place = mean_places(log_all, self.vision.side, shift)
            # Each pointer learns from its own goal. Else both look at what is easier to find.
            of_thing = self.goal(torch.cat([thing, place.detach(), state], 1))
            of_place = self.goal(torch.cat([thing.detach(), place, state], 1))
            half = self.config.goal_size // 2
            goal = torch.hstack([of_thing[:, :half], of_place[:, half:]])
            answer |= dict(goal=goal, attention=log_all)

        # What is done: finish() calls the head.
        x = self.fusion(patches, heard["words"][number], others)
        return answer | self.finish(torch.cat([x, goal, state], 1), batch)

    def request(self, sentence):
        """What the policy reads in a sentence, (task, slots), or None if it declines it."""
        reads = self.intent and self.pointers and self.config.text == "word"
        if not reads or self.understands(sentence) < UNDERSTOOD:
            return None
        heard = self.hear(sentence)
        best = heard["intent"][0, :-1].argmax()
        intent, slots = list(self.config.intents.items())[best]
        words = split(sentence)
        read = [words[i] for i in heard["reading"][0].argmax(1)]
        names = [slot for slot, word in slots.items() if word is None]
        return intent.split()[0], slots | dict(zip(names, read))


class BC(Policy):
    """Behaviour cloning from the state, without eyes or words: (B, S) to actions (B, K, A)."""

    def __init__(self, config):
        super().__init__(config, Continuous(config, config.state_size))

    def forward(self, batch):
        state = (batch["state"] - self.state_mean) / self.state_std
        return self.finish(state, batch)


# -------------------------------------------------------------------------------------- text
WORD = r"\w+(?:'\w+)*"
NGRAMS = 24  # hashed parts of a token, at most


def tokenize(sentence, config):
    """A sentence to (L, NGRAMS) int64: of each word, or letter, its ngrams. Without words it is one
    row of padding. Raises ValueError for a sentence that is too long."""
    tokens = split(sentence)
    if config.text == "char":
        tokens = " ".join(tokens)
    if len(tokens) > config.max_text:
        raise ValueError(f"longer than {config.max_text} {config.text}s: {sentence!r}")
    rows = [ngrams(token, config.buckets) for token in tokens] or [[0] * NGRAMS]
    numbers = np.array(rows)  # on the way to a tensor faster than a list
    return torch.from_numpy(numbers)


def split(sentence):
    return re.findall(WORD, sentence.lower().replace("’", "'"))


@cache
def ngrams(word, buckets):
    """NGRAMS rows of Text.table for a word: itself and its parts of 3 to 5 letters, hashed as in
    fastText (arXiv:1607.04606): no word is unknown, and a misspelt one is like itself. 0 pads."""
    word = f"<{word}>"
    parts = [word]
    for n in (3, 4, 5):
        parts += [word[i : i + n] for i in range(len(word) - n + 1)]
    numbers = [
        1 + zlib.crc32(part.encode()) % (buckets - 1) for part in dict.fromkeys(parts)
    ]
    return (numbers + [0] * NGRAMS)[:NGRAMS]


class Text(nn.Module):
    """Sentences (U, L, NGRAMS) int64 to words in their context (U, L, C), zero at padding.

    A convolution tells each word its neighbours before the transformer: which colour is said of
    which thing is a matter of the words next to it."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.table = nn.EmbeddingBag(config.buckets, C, mode="sum", padding_idx=0)
        self.table.weight.data *= 0.3  # row 0, padding, stays zero
        self.neighbours = nn.Conv1d(C, C, 5, padding=2)
        self.lstm = None
        if config.text_encoder == "lstm":
            self.lstm = nn.LSTM(C, C // 2, batch_first=True, bidirectional=True)
        else:
            self.position = nn.Parameter(torch.randn(config.max_text, C) * 0.02)
            self.blocks = encoder(config, config.layers)  # a transformer

    def embed(self, text):
        """The bare words, (U, L, C)."""
        return self.table(text.flatten(0, 1)).unflatten(0, text.shape[:2])

    def forward(self, text):
        words = self.embed(text)
        words = words + self.neighbours(words.mT).mT
        real = text[..., :1] > 0  # (U, L, 1)
        if self.lstm:
            return self.lstm(words)[0] * real
        words = words + self.position[: text.shape[1]]
        padding = ~real[..., 0]
        padding[:, 0] = False  # a sentence without words attends to something
        for layer in self.blocks:
            words = layer(words, src_key_padding_mask=padding)
        return words * real


def is_padding(tokens):
    """Which of the tokens (B, N, C) are none, (B, N) bool: Text makes words zero there."""
    return (tokens == 0).all(2)


def mean_word(words):
    """(U, L, C) to (U, C)."""
    n = (~is_padding(words)).sum(1, keepdim=True)
    return words.sum(1) / n.clamp_min(1)


# ------------------------------------------------------------------------------------- vision
class Vision(nn.Module):
    """Pictures (B, V, H, W, 3) uint8 to tokens (B, kept, C), and which of all views' P patches
    they are, (B, kept).

    Bare table is most of every picture. Only the patches with the pixels farthest from the
    picture's median colour become tokens, less than half. A CNN gives one token for each
    picture, and no transformer follows it."""

    def __init__(self, config):
        super().__init__()
        V = len(config.cameras) * config.frames
        self.register_buffer("image_mean", torch.full((V, 3, 1, 1), 127.0))
        self.register_buffer("image_std", torch.full((V, 3, 1, 1), 64.0))
        whole = config.vision == "cnn"  # its only patch is the picture
        self.patch = config.image_size if whole else config.patch  # px
        # px seen above and to the left
        self.margin = CELL if config.vision == "vit_stem" else 0
        self.side = config.image_size // self.patch  # patches across a picture
        self.patches = V * self.side**2  # P
        self.keep = min(config.keep_patches * config.frames, self.patches)
        self.embed = EMBEDDINGS[config.vision](self.patch, config.width)
        self.view = nn.Parameter(torch.randn(V, config.width) * 0.02)
        self.blocks = encoder(config, 0 if whole else config.layers)

    def forward(self, images, shift):
        """shift (B, 2), y and x: by how much the pictures of a moment were shifted, as a share of
        their size. Tokens say where patches were before that."""
        x = images.movedim(4, 2).float().contiguous()  # (B, V, 3, H, W)
        kept = self.score(x).topk(self.keep).indices
        view, row, column = torch.unravel_index(kept, (x.shape[1], self.side, self.side))

        x = (x - self.image_mean) / self.image_std
        x = F.pad(x, (self.margin, 0, self.margin, 0, 0, 0), "replicate")
        size = self.patch + self.margin
        # The windows of all patches, (B, V, 3, side, side, size, size), of which few are copied.
        windows = x.unfold(3, size, self.patch).unfold(4, size, self.patch)
        moment = torch.arange(len(x), device=x.device)[:, None]
        chosen = windows[moment, view, :, row, column]  # (B, kept, 3, size, size)
        x = self.embed(chosen.flatten(0, 1)).unflatten(0, kept.shape)
        place = torch.stack([row, column], 2) - self.side * shift[:, None]
        x = x + self.view[view] + sincos_2d(place, x.shape[2])
        return self.blocks(x), kept

    def score(self, x):
        """Each patch's largest distance from its picture's median colour, (B, P)."""
        half = F.avg_pool2d(x.flatten(0, 1), 2)  # with less noise
        some = half[..., ::4, ::4].flatten(2)  # a few pixels are enough for a median
        distance = (half - some.median(2).values[..., None, None]).abs().amax(1)
        return F.max_pool2d(distance, self.patch // 2).view(len(x), -1)


def sincos_2d(place, width):
    """2-D sine-cosine code (.., width) of places (.., 2), y and x (MAE, arXiv:2111.06377)."""
    freq = 1.0 / 100 ** (torch.arange(width // 4, device=place.device) / (width // 4))
    angle = place[..., None] * freq
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


# An embedding turns windows (n, 3, h, w) into tokens (n, C).
def stem(patch, width):
    """Early convolutions (arXiv:2106.14881): one of each cell; the second is a linear map of the
    cells of a patch and its margin, at kept patches alone."""
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


# ----------------------------------------------------------------------------------- pointers
class Pointers(nn.Module):
    """Two queries, for what is to be moved and for its place, that look for one spot each.

    Grammar and meaning are kept apart (arXiv:1904.09708): words in context say where a pointer's
    name stands and what kind of thing it is, but not the name, which training swaps there; that is
    in the bare words. So colours that never came together in training are no surprise."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.scale = C**-0.5
        self.roles = nn.Parameter(torch.randn(len(POINTERS), C))
        self.query = nn.Linear(C, C)
        self.word_norm = nn.LayerNorm(C)
        # No biases in keys, see block().
        self.patch_norm = nn.LayerNorm(C, bias=False)
        self.key = nn.Linear(C, C, bias=False)

    def read(self, words, bare):
        """Words (U, L, C) in context and bare to queries (U, 2, C) and readings (U, 2, L) of sum 1,
        where each pointer's name stands. There context gives the kind of thing, bare its name."""
        context = self.word_norm(words)
        logits = context @ self.roles.T * self.scale  # (U, L, 2)
        logits = logits.masked_fill(is_padding(words)[..., None], -1e4)
        reading = logits.softmax(1).mT
        return self.query(reading @ (context + bare)), reading

    def forward(self, queries, patches):
        """Queries (B, 2, C) and patches (B, kept, C) to what is found, (B, 2, C), and log-attention
        (B, 2, kept)."""
        keys = self.key(self.patch_norm(patches))
        logits = queries @ keys.mT * self.scale
        return logits.softmax(-1) @ patches, logits.log_softmax(-1)


def mean_places(attention, side, shift):
    """Where pointers look, (B, 3 V) each, from their log-attention (B, 2, P), in the manner of a
    spatial softmax (arXiv:1509.06113): of each, in each view, how much of its attention is there,
    and the mean place of that, y and x from the picture's middle, before the shift."""
    share = attention.float().exp().unflatten(2, (-1, side**2))  # (B, 2, V, side * side)
    middle = (torch.arange(side, device=shift.device) + 0.5) / side - 0.5
    place = torch.cartesian_prod(middle, middle) - shift[:, None]  # (B, side * side, 2)
    total = share.sum(3, keepdim=True)  # (B, 2, V, 1)
    # A sum, not a matrix product, in which bf16 would be too coarse.
    place = (share[..., None] * place[:, None, None]).sum(3)  # (B, 2, V, 2)
    return torch.cat([total, place / (total + 1e-3)], 3).flatten(2).unbind(1)


# ------------------------------------------------------------------------------------- fusion
# A fusion turns patches (B, kept, C), words (B, L, C) and others (B, N, C), which are the state and
# what is pointed at, into one vector (B, C).
class OneEach(nn.Module):
    """What these three fusions share: one vector of each. mix(): (B, n, C) to (B, C)."""

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
        self.block = block(config)  # a transformer layer

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
        padding = is_padding(x)
        for layer in self.blocks:
            x = layer(x, src_key_padding_mask=padding)
        return self.norm(x[:, 0])


FUSIONS = dict(
    attention=Attention, transformer=Transformer, concat=Concat, multiply=Multiply
)


# -------------------------------------------------------------------------------- action heads
# A head has forward(features), a chunk of actions (B, K, A) in [-1, 1], and error(features, target,
# valid), what is trained: one number for each number of the chunk, which train.py averages. Of the
# target (B, K, A) only the `valid` (B, K) bool count.
def head_mlp(config, inputs, outputs):
    hidden = [config.head_width] * config.head_layers
    return mlp(inputs, *hidden, outputs)


class Mixture(nn.Module):
    """Several candidate chunks and their probabilities: a mixture density network (Bishop, 1994) of
    Laplace distributions of a chunk's mean error, or of normal ones if loss is mse. Where an expert
    acts now in one way and now in another, the median may be neither."""

    MODES = 4
    SCALE = 0.05  # of these distributions, in units of an action
    dice = 0.0  # 0..1, which chunk is drawn; Policy.predict() rolls it

    def __init__(self, config, size):
        super().__init__()
        self.loss = dict(l1=torch.abs, mse=torch.square)[config.loss]
        self.shape = config.chunk, config.action_size, self.MODES
        self.net = head_mlp(config, size, self.MODES + math.prod(self.shape))

    def modes(self, x):
        """Features (B, size) to log-probabilities (B, MODES) and chunks (B, K, A, MODES)."""
        logits, chunks = self.net(x).float().tensor_split([self.MODES], 1)
        return logits.log_softmax(1), chunks.unflatten(1, self.shape).tanh()

    def forward(self, x):
        """One of the chunks, drawn by their probabilities."""
        log_prob, chunks = self.modes(x)
        limits = log_prob.exp().cumsum(1)[:, :-1]
        drawn = (limits <= self.dice).sum(1)
        return chunks[torch.arange(len(x)), ..., drawn]  # (B, K, A)

    def error(self, x, target, valid):
        """The negative log-likelihood of the target, in units of an action, alike for a chunk."""
        log_prob, chunks = self.modes(x)
        error = self.loss(chunks - target[..., None]).mean(2)  # (B, K, MODES)
        valid = valid[..., None]
        cost = (error * valid).sum(1) / valid.sum(1)  # (B, MODES)
        log_likelihood = (log_prob - cost / self.SCALE).logsumexp(1)
        return -self.SCALE * log_likelihood[:, None, None].expand_as(target)


class Continuous(Mixture):
    """Regression, a mixture of one: the negative log-likelihood is the mean error of the chunk."""

    MODES = 1


class Tokens(nn.Module):
    """Each number of an action is one of `bins` tokens, as in RT-2 (arXiv:2307.15818)."""

    def __init__(self, config, size):
        super().__init__()
        self.bins = config.bins
        shape = config.chunk, config.action_size, self.bins
        self.net = head_mlp(config, size, math.prod(shape)).append(nn.Unflatten(1, shape))

    def forward(self, x):
        return (self.net(x).argmax(-1) + 0.5) * (2 / self.bins) - 1

    def error(self, x, target, valid):
        token = ((target + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        return F.cross_entropy(
            self.net(x).float().movedim(-1, 1), token, reduction="none"
        )


class Flow(nn.Module):
    """Flow matching, as in pi0 (arXiv:2410.24164): noise is carried to a chunk along a learned
    velocity field, in a few steps. The noise is always the same: same moment, same action."""

    def __init__(self, config, size):
        super().__init__()
        self.config = config
        self.register_buffer("noise", torch.randn(config.chunk, config.action_size))
        numbers = self.noise.numel()
        self.net = head_mlp(config, size + numbers + 1, numbers)

    def velocity(self, x, actions, time):
        """Features (B, size), actions on their way (B, K, A), time (B, 1) from 0, noise, to 1."""
        return self.net(torch.cat([x, actions.flatten(1), time], 1)).view_as(actions)

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


HEADS = dict(mixture=Mixture, continuous=Continuous, tokens=Tokens, flow=Flow)


# -------------------------------------------------------------------------------------- parts
def squared_relu(x):
    return F.relu(x).square()  # Primer, arXiv:2109.08668


def block(config):
    """Pre-norm transformer layer. Its outputs start at zero, so that it starts as the identity."""
    C = config.width
    layer = nn.TransformerEncoderLayer(
        C, config.heads, 4 * C, 0.0, squared_relu, batch_first=True, norm_first=True
    )
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


# ------------------------------------------------------------------------------------- files
def load_file(path):
    """The dict that save() wrote. Untrusted files are never executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        saved = {}  # torch's message may advise to trust the file
    if "config" not in saved:
        raise ValueError(f"{path} is not a checkpoint of this model")
    return saved


def code_version():
    """git's name of the code that runs, or "unknown"."""
    folder = Path(__file__).parent
    # By a shell, to which a machine without git is no exception.
    status, name = subprocess.getstatusoutput(
        f'git -C "{folder}" describe --always --dirty'
    )
    return "unknown" if status else name


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
