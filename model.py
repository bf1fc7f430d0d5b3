"""The whole vision-language-action model, and a behaviour-cloning baseline. `python model.py` prints its size.

    front_image ──┐ conv stem   ┌──────────┐
    wrist_image ──┴─ patches ──▶│ ViT, 2   │──┬▶ P tokens ──┐
                                └──────────┘  │             │
                                       2 pointers ▶ 2 tokens┤   ┌───────────┐      ┌──────┐
    "pick up the red block .." ▶│ text, 2  │──┴▶ L tokens ──┼──▶│ fusion, 2 │─CLS─▶│ head │──▶ K actions
    joints, hand, gripper ─────▶│ MLP      │───▶ 1 token  ──┤   └───────────┘      └──────┘
                                             learned CLS ───┘

Dimension letters, used everywhere: B batch, V views (cameras), H W pixels, P patch tokens of all views, L text tokens,
N all tokens, C width, S state numbers, K actions in a chunk, A numbers in an action.
"""
import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

A = 4                                                     # dx, dy, dz, gripper
PROPRIO = ("joint_pos", "ee_pos", "ee_vel", "gripper")    # 14 numbers
STATES = {"proprio": PROPRIO, "full": PROPRIO + ("object_pos", "target_pos")}    # full: 20, gives the answer away
STATE_SIZES = dict(joint_pos=7, ee_pos=3, ee_vel=3, gripper=1, object_pos=3, target_pos=3)
POINTERS = ("thing", "place")                             # what is to be moved, and the pad or block that it is to be moved to


@dataclasses.dataclass
class Config:
    model: str = "vla"                # vla or bc
    tasks: tuple = ("pick_place",)    # what it was trained to do
    cameras: tuple = ("front", "wrist")
    coarse: tuple = ("wrist",)        # cameras whose patches are merged 2 x 2: 16 tokens instead of 64
    keep: int = 40                    # patches kept of each look: those that differ most from the picture's median colour
    state: str = "proprio"            # key of STATES
    text: str = "word"                # word or char
    words: tuple = ()                 # every word of the training sentences
    max_text: int = 16                # L: words, or characters; shorter sentences are padded to it
    image_size: int = 64              # px
    patch: int = 8                    # px
    width: int = 128                  # C
    heads: int = 4
    layers: int = 2                   # of each of the three transformers
    chunk: int = 8                    # K actions predicted at a look
    execute: int = 4                  # of them carried out before the next look

    @property
    def state_size(self):
        return sum(STATE_SIZES[k] for k in STATES[self.state])


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

    def keys(self, x):
        """(B, N, C) to keys and values (B, heads, N, 2 C / heads)."""
        return self.kv(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, others=None, rows=None):
        """(B, N, C) to (B, N, C). The tokens look at themselves and at `others`, keys() of more tokens, (B, heads, M,
        2 C / heads), which stay as they are. With `rows`, only that many first tokens are computed, and the attention
        logits (B, heads, rows, N + M) come back too: the last layer needs nothing but the CLS row."""
        keys = self.keys(x) if others is None else torch.cat([self.keys(x), others], 2)
        k, v = keys.chunk(2, -1)
        x = x[:, :rows]
        q = self.q(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
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


# ----------------------------------------------------------------------------- the policies
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
        self.queue, self.language, self.known = [], None, None

    @property
    def device(self):
        return self.state_mean.device

    def read_obs(self, obs):
        """Observation dict, or a list of them, to images (B, V, H, W, 3) uint8 and state (B, S) float32."""
        many = obs if isinstance(obs, list) else [obs]
        keys = [f"{c}_image" for c in self.config.cameras] + list(STATES[self.config.state])
        for key in keys:
            if key not in many[0]:
                raise ValueError(f"the observation has no {key!r}; this checkpoint reads {', '.join(keys)}")
        side = self.config.image_size
        for key in keys[:len(self.config.cameras)]:
            got = np.asarray(many[0][key])
            if got.shape != (side, side, 3) or got.dtype != np.uint8:
                raise ValueError(f"{key} must be ({side}, {side}, 3) uint8, got {got.shape} {got.dtype}")
        images = np.stack([[o[f"{c}_image"] for c in self.config.cameras] for o in many]) if self.config.cameras else None
        state = np.stack([np.concatenate([np.asarray(o[k], np.float32) for k in STATES[self.config.state]]) for o in many])
        return (torch.from_numpy(images).to(self.device) if self.config.cameras else None,
                torch.from_numpy(state).to(self.device))

    @torch.inference_mode()
    def predict(self, obs, language=None):
        """One action (4,) float32 in [-1, 1] for the observation dict of gen_data.Env and a sentence. Looks afresh
        every config.execute calls, and at once when the sentence changes. Raises ValueError for an unknown word."""
        if language != self.language:
            self.queue, self.language = [], language
        if not self.queue:
            self.queue = list(self.plan([obs], [language])[0, :self.config.execute])
        return self.queue.pop(0)

    def save(self, path, **extra):
        """Writes config, weights and `extra` (plain values) to one file that load() opens."""
        part = Path(path).with_name(Path(path).name + ".part")
        torch.save(dict(config=dataclasses.asdict(self.config), weights=self.state_dict(), **extra), part)
        part.replace(path)                                     # never half a checkpoint

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
        except FileNotFoundError:
            raise ValueError(f"there is no checkpoint {path}; python train.py makes out/ckpt.pt") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is not a checkpoint of this model ({reason})") from None
        model.step = saved.get("step")
        return model.to(device).eval()


class VLA(Policy):
    def __init__(self, config):
        super().__init__(config)
        C, side = config.width, config.image_size // config.patch
        self.register_buffer("image_mean", torch.full((len(config.cameras), 1, 1, 3), 127.0))
        self.register_buffer("image_std", torch.full((len(config.cameras), 1, 1, 3), 64.0))
        self.register_buffer("goal_mean", torch.zeros(6))
        self.register_buffer("goal_std", torch.ones(6))
        self.sides = [side // 2 if camera in config.coarse else side for camera in config.cameras]   # tokens across
        self.register_buffer("grid", sincos_2d(side, C), persistent=False)
        self.register_buffer("coarse_grid", sincos_2d(side // 2, C), persistent=False)
        # 4x4 patches, then an overlapping convolution to one token per 8x8 (early convolutions: arXiv:2106.14881)
        self.stem = nn.Linear(4 * 4 * 3, 64)
        self.patch = nn.Conv2d(64, C, 3, config.patch // 4, 1)
        if set(config.coarse) & set(config.cameras):
            self.merge = nn.Conv2d(C, C, 2, 2)                 # 2 x 2 patches to one
        self.view = nn.Parameter(torch.randn(len(config.cameras), C) * 0.02)
        self.vision = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers))
        self.embed = nn.Embedding(1 + (len(config.words) if config.text == "word" else len(CHARS)), C)
        self.text_position = nn.Parameter(torch.randn(config.max_text, C) * 0.02)
        self.text = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers))
        self.state = nn.Sequential(nn.Linear(config.state_size, C), nn.ReLU(), nn.Linear(C, C))
        self.roles = nn.Parameter(torch.randn(len(POINTERS), C) * 0.02)
        self.point_query, self.point_key = nn.Linear(C, C), nn.Linear(C, C)
        self.word_norm, self.patch_norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.cls = nn.Parameter(torch.randn(C) * 0.02)
        self.fusion = nn.ModuleList(Block(C, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(C)
        self.goal = nn.Linear(C, 6)                            # object_pos and target_pos: an auxiliary answer
        self.head = nn.Sequential(nn.Linear(C + 6 + config.state_size, 2 * C), nn.ReLU(),
                                  nn.Linear(2 * C, config.chunk * A), nn.Tanh())

    def see(self, images):
        """(B, V, H, W, 3) uint8 to patch tokens (B, keep, C) and which patches of all views they are, (B, keep).

        Bare table is most of every picture. Only the patches with the pixels farthest from the picture's median colour
        become tokens, which halves the work."""
        side = self.grid.shape[0]
        x = images.flatten(0, 1).float()                                                    # (B V, H, W, 3)
        odd = (x - x[:, ::8, ::8].flatten(1, 2).median(1).values[:, None, None]).abs().amax(-1)
        odd = odd.unflatten(1, (side, -1)).unflatten(3, (side, -1)).amax((2, 4)).unflatten(0, images.shape[:2])
        x = (x.unflatten(0, images.shape[:2]) - self.image_mean).div(self.image_std).flatten(0, 1)
        x = x.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).transpose(2, 3).flatten(3)        # (B V, H/4, W/4, 48)
        x = self.patch(F.relu(self.stem(x)).permute(0, 3, 1, 2)).unflatten(0, images.shape[:2])   # (B, V, C, side, side)
        views, scores = [], []
        for i, camera in enumerate(self.config.cameras):
            y, grid, score = x[:, i], self.grid, odd[:, i]
            if camera in self.config.coarse:
                y, grid, score = self.merge(y), self.coarse_grid, F.max_pool2d(score, 2)
            views.append(y.flatten(2).transpose(1, 2) + grid.flatten(0, 1) + self.view[i])
            scores.append(score.flatten(1))
        x, scores = torch.cat(views, 1), torch.cat(scores, 1)                               # (B, P, C), (B, P)
        kept = scores.topk(min(self.config.keep, scores.shape[1])).indices.sort().values
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        for block in self.vision:
            x = block(x)
        return x, kept

    def read(self, text, names=None):
        """(B, L) int64 to word tokens (B, L, C) and, per pointer, the query for what it is called, (B, 2, C).

        Grammar and meaning are kept apart (arXiv:1904.09708): the words in their context say at which words a pointer gets its
        name and what kind of thing it is, the name itself is the bare embedding of those words. So a pair of colours that
        never came together in training is no surprise. `names`: the same sentences, if in `text` the colours are not the
        true ones (train.py shuffles them there, so that nothing but the names can depend on them)."""
        words = self.embed(text) + self.text_position
        for block in self.text:
            words = block(words)
        context = self.word_norm(words)
        weights = context @ self.roles.T * self.roles.shape[1] ** -0.5 - 1e4 * (text == 0)[..., None]        # (B, L, 2)
        bare = self.embed(text if names is None else names) if self.config.text == "word" else 0    # characters name nothing
        return words, self.point_query(weights.softmax(1).transpose(1, 2) @ (context + bare))

    def fuse(self, patches, words, queries, state, frame=slice(None)):
        """(B, keep, C), (R, L, C), (R, 2, C), (R, S) raw state to actions (R, K, A), goals (R, 6) (object_pos and target_pos,
        world frame, normalised) and log-attention on the patches (R, 4, keep): the two pointers', then that of the CLS token's
        first two heads, which look again at what was pointed at. Row i sees patches[frame[i]].

        The CLS token, the words, what is pointed at and the state look at everything; the patches are only looked at."""
        state = (state - self.state_mean) / self.state_std
        logits = queries @ self.point_key(self.patch_norm(patches))[frame].transpose(1, 2) * queries.shape[-1] ** -0.5
        pointed = logits.softmax(-1) @ patches[frame]                                       # (R, 2, C)
        x = torch.cat([self.cls.expand(len(state), 1, -1), words, pointed, self.state(state)[:, None]], 1)   # (R, 1+L+2+1, C)
        for block in self.fusion[:-1]:
            x = block(x, block.keys(patches)[frame])
        x, looks = self.fusion[-1](x, self.fusion[-1].keys(patches)[frame], rows=1)
        x = self.norm(x[:, 0])
        goal = self.goal(x)
        actions = self.head(torch.cat([x, goal, state], 1)).unflatten(1, (-1, A))
        looks = looks[:, :len(POINTERS), 0].log_softmax(-1)[..., -patches.shape[1]:]
        return actions, goal, torch.cat([logits.log_softmax(-1), looks], 1)

    def forward(self, images, state, text, frame=slice(None), sentence=slice(None), names=None):
        """images (B, V, H, W, 3) uint8, state (B, S), text (U, L): each picture and each sentence is encoded once.
        Row i of the answer pairs picture frame[i] with sentence[i]; by default picture i with sentence i. Returns actions
        (R, K, A), goals (R, 6) and log-attention (R, 4, P), as in fuse, on the patches of all views in turn."""
        patches, kept = self.see(images)
        words, queries = self.read(text, names)
        actions, goal, attention = self.fuse(patches, words[sentence], queries[sentence], state[frame], frame)
        kept = kept[frame][:, None].expand(-1, attention.shape[1], -1)
        everywhere = attention.new_full((*attention.shape[:2], sum(s * s for s in self.sides)), -20.0)
        return actions, goal, everywhere.scatter(2, kept, attention)

    @torch.inference_mode()
    def plan(self, observations, sentences):
        """Chunks of actions (B, K, 4) float32 numpy for B observation dicts and sentences."""
        distinct = list(dict.fromkeys(sentences))
        if None in distinct:
            raise ValueError("this policy needs a sentence: predict(obs, language=...)")
        if self.known is None or self.known[0] != distinct:
            text = torch.stack([tokenize(s, self.config) for s in distinct]).to(self.device)
            self.known = distinct, self.read(text)
        images, state = self.read_obs(observations)
        words, queries = (part[[distinct.index(s) for s in sentences]] for part in self.known[1])
        return self.fuse(self.see(images)[0], words, queries, state)[0].float().cpu().numpy()


class BC(Policy):
    """Behaviour cloning from the full state, without eyes or words: (B, 20) to one action (B, 1, 4)."""

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
    parts = dict(stem=(model.stem, model.patch, model.merge), vision=model.vision, text=(model.embed, *model.text),
                 state=(model.state,), pointers=(model.point_query, model.point_key), fusion=model.fusion,
                 goal=(model.goal,), head=(model.head,))
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
    print(f"{'keys':10}{'':>20}{'(fusion)':>12}{rest // 2:15,}{rest / total:8.1%}")
    print(f"{'all':10}{'':>20}{sum(p.numel() for p in model.parameters()):12,}{total // 2:15,}{1:8.1%}")
