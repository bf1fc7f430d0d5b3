"""Trains the policy on demonstrations and says how well it does on unseen scenes.

    python train.py --steps 2000                       # data if missing, training, closed-loop score
    python train.py --model bc --state full            # the behaviour-cloning baseline
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import BC, GROUNDED, STATES, VLA, Config, split, tokenize

# ----------------------------------------------------------------------------- settings
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--steps", type=int, default=2000, help="optimiser steps (default 2000)")
add("--batch_size", type=int, default=64, help="frames per step (default 64)")
add("--relabel", type=int, default=64, help="of them also shown with another sentence (default 64)")
add("--lr", type=float, default=0.02, help="Muon's learning rate (default 0.02)")
add("--adam_lr", type=float, default=2e-3, help="AdamW's learning rate")
add("--ground", type=float, default=0.1)
add("--goal", type=float, default=0.5)
add("--other", type=float, default=1.0)
add("--seed", type=int, default=0)
add("--data", type=Path, default=Path("data/demos.h5"))
add("--out_dir", type=Path, default=Path("out"))
add("--log_interval", type=int, default=50)
add("--model", default="vla")
add("--state", default=None)
add("--text", default="word")
add("--execute", type=int, default=4)
add("--coarse", default="wrist")
add("--max_episodes", type=int, default=10**9)
args = parser.parse_args()
torch.manual_seed(args.seed)

# ----------------------------------------------------------------------------- data
start = time.time()
state_kind = args.state or ("full" if args.model == "bc" else "proprio")
with h5py.File(args.data) as file:
    total = min(int(file.attrs["total"]), args.max_episodes)
    valid_names = {n.decode() for n in file["mask/valid"][:]}
    cameras = tuple(json.loads(file.attrs["env_args"])["env_kwargs"]["cameras"])
    lengths = [int(file[f"episode_{i}"].attrs["num_samples"]) for i in range(total)]
    T = sum(lengths)
    images = np.empty((T, len(cameras), 64, 64, 3), np.uint8)
    parts, sentences, keys, own, other_key = [], {}, {}, np.empty((T, 2), np.int64), None
    at = 0
    fields = {}
    episode_end, is_valid = np.empty(T, np.int64), np.zeros(T, bool)
    sentence_of, key_of, other_of = np.empty(T, np.int64), np.empty(T, np.int64), np.empty(T, np.int64)
    pool = {}
    for i in range(total):
        e = file[f"episode_{i}"]
        n = lengths[i]
        for v, c in enumerate(cameras):
            images[at:at + n, v] = e[f"observations/{c}_image"][:]
        row = dict(state=np.concatenate([e[f"observations/{k}"][:] for k in STATES[state_kind]], 1),
                   actions=e["actions"][:], goal=np.concatenate([e["observations/object_pos"][:], e["observations/target_pos"][:]], 1),
                   objects=e["grounding/objects_pos"][:], other=e["grounding/other"][:], other_action=e["grounding/other_action"][:],
                   uv=np.stack([e[f"grounding/{c}_uv"][:] for c in cameras], 1))
        row["pair"] = np.tile([e.attrs["block"], e.attrs["pad"]], (n, 1))
        for k, v in row.items():
            fields.setdefault(k, []).append(v)
        episode_end[at:at + n] = at + n
        is_valid[at:at + n] = f"demo_{i}" in valid_names
        text = e.attrs["instruction"]
        sid = sentences.setdefault(text, len(sentences))
        sentence_of[at:at + n] = sid
        bc, pc = e.attrs["block_colors"].split(","), e.attrs["pad_colors"].split(",")
        key = (e.attrs["task"], bc[e.attrs["block"]], pc[e.attrs["pad"]])
        pool.setdefault(key, []).append(sid)
        o = row["other"]
        task = e.attrs["task"]
        m = np.array([[keys.setdefault((task, x, y), len(keys)) for y in pc] for x in bc])
        other_of[at:at + n] = m[o[:, 0], o[:, 1]]
        key_of[at:at + n] = keys.setdefault(key, len(keys))
        at += n
fields = {k: torch.from_numpy(np.concatenate(v)) for k, v in fields.items()}
images = torch.from_numpy(images)
pool = [torch.tensor(sorted(set(pool[k]))) for k in keys]
n_blocks = fields["objects"].shape[1] - 2
train_ix, valid_ix = np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
print(f"{total} episodes, {T} frames, {len(valid_ix)} for validation; {len(sentences)} sentences; loaded in {time.time() - start:.0f} s")

words = tuple(sorted({w for s in sentences for w in split(s)}))
config = Config(model=args.model, cameras=cameras if args.model == "vla" else (), state=state_kind, text=args.text, words=words,
                max_text=16 if args.text == "word" else 96, execute=args.execute, coarse=tuple(args.coarse.split(",")))
if args.model == "bc":
    config.chunk = config.execute = 1
model = (VLA if args.model == "vla" else BC)(config)
with torch.no_grad():
    s = fields["state"][train_ix]
    model.state_mean.copy_(s.mean(0)); model.state_std.copy_(s.std(0) + 1e-3)
    if args.model == "vla":
        some = images[train_ix[::97]].float()
        model.image_mean.copy_(some.mean((0, 2, 3))[:, None, None]); model.image_std.copy_(some.std((0, 2, 3))[:, None, None])
        g = fields["goal"][train_ix]
        model.goal_mean.copy_(g.mean(0)); model.goal_std.copy_(g.std(0) + 1e-3)
        table = torch.stack([tokenize(s, config) for s in sentences])
K = config.chunk
steps_ahead = torch.arange(K)
side = config.image_size // config.patch


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Keller Jordan, github.com/KellerJordan/Muon), in fp32 and with all
    matrices of a shape in one batch: torch.optim.Muon works in bf16, which takes 1.2 s a step on a CPU without it."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                g = torch.stack([p.grad for p in params])
                buffer = self.state[params[0]].setdefault("momentum", torch.zeros_like(g))
                buffer.lerp_(g, 1 - group["momentum"])
                g = g.lerp(buffer, group["momentum"])
                tall = g.shape[1] > g.shape[2]
                x = g.transpose(1, 2) if tall else g
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.transpose(1, 2)
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.transpose(1, 2) if tall else x
                scale = group["lr"] * max(1, g.shape[1] / g.shape[2]) ** 0.5
                for p, update in zip(params, x):
                    p.add_(update, alpha=-scale)


matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.split(".")[0] in ("vision", "text", "fusion") and n.split(".")[-2] in ("q", "kv", "out", "up", "down")]
ids = {id(p) for p in matrices}
rest = [p for p in model.parameters() if id(p) not in ids]
optimizers = [torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01)]
if matrices:
    optimizers.append(Muon(matrices, lr=args.lr))
base_lr = [g["lr"] for o in optimizers for g in o.param_groups]


def losses(ix, relabel, rng):
    """Loss terms on frames `ix`, of which the first `relabel` are also shown with another sentence."""
    ix = torch.from_numpy(ix)
    ahead = ix[:, None] + steps_ahead
    there = (ahead < torch.from_numpy(episode_end)[ix, None]).float()      # nothing is asked beyond the episode's end
    wanted = fields["actions"][ahead.clamp_max(T - 1)]
    state = fields["state"][ix]
    if args.model == "bc":
        return dict(action=((model(state) - wanted).abs().mean(-1) * there).sum() / there.sum())
    r = ix[:relabel]
    sentence = torch.from_numpy(np.concatenate([sentence_of[ix], [pool[k][rng.integers(len(pool[k]))] for k in other_of[r]]]).astype(np.int64))
    used, sentence = sentence.unique(return_inverse=True)
    frame = torch.cat([torch.arange(len(ix)), torch.arange(len(r))])
    actions, goal, attention = model(images[ix], state, table[used], frame, sentence)
    both = torch.cat([ix, r])
    pair = torch.cat([fields["pair"][ix], fields["other"][r].long()])
    slots = pair + torch.tensor([0, n_blocks])                              # index among blocks + pads
    rows = torch.arange(len(both))[:, None]
    position = fields["objects"][both][rows, slots].flatten(1)
    goal_loss = F.smooth_l1_loss(goal, (position - model.goal_mean) / model.goal_std, beta=0.1)
    uv = fields["uv"][both]                                                 # rows, V, objects, 2
    ground, first, count = 0, 0, 0
    hits = []
    for v, camera in enumerate(cameras):
        s = side // 2 if camera in config.coarse else side
        spot = uv[:, v][rows, slots]                                        # rows, 2 (block, pad), 2
        cell = (spot * s).long().clamp(0, s - 1)
        target = first + cell[..., 1] * s + cell[..., 0]
        seen = (spot[..., 0] >= 0).float()
        logp = attention[:, :2].gather(2, target[..., None])[..., 0]        # heads 0 and 1: block and pad
        ground = ground - logp * seen
        count = count + seen
        hits.append(((attention[:, :2, first:first + s * s].argmax(-1) + first == target).float() * seen).sum(0) / seen.sum(0))
        first += s * s
    ground = (ground / count.clamp_min(1)).mean()
    L = len(ix)
    action = ((actions[:L] - wanted).abs().mean(-1) * there).sum() / there.sum()
    out = dict(action=action, goal=goal_loss, ground=ground)
    if relabel:
        out["other"] = (actions[L:, 0] - fields["other_action"][r]).abs().mean()
    out["hits"] = torch.stack(hits)
    out["goal_cm"] = ((goal * model.goal_std + model.goal_mean - position).unflatten(1, (2, 3))[..., :2].norm(dim=-1).mean(0) * 100).detach()
    return out


weights = dict(action=1.0, goal=args.goal, ground=args.ground, other=args.other)
args.out_dir.mkdir(parents=True, exist_ok=True)
log = open(args.out_dir / "log.jsonl", "w")
t0 = time.time()
valid_pick = np.random.default_rng(0).choice(valid_ix, min(512, len(valid_ix)), replace=False)
for step in range(args.steps + 1):
    if step % args.log_interval == 0 or step == args.steps:
        model.eval()
        with torch.no_grad():
            v = losses(valid_pick, len(valid_pick) // 2, np.random.default_rng(0))
        model.train()
        ms = (time.time() - t0) / max(step, 1) * 1e3
        print(f"step {step} train {' '.join(f'{k} {x.item():.4f}' for k, x in out.items() if x.ndim == 0) if step else ''} | valid "
              f"{' '.join(f'{k} {x.item():.4f}' for k, x in v.items() if x.ndim == 0)} hits {v['hits'].mul(100).round().tolist() if 'hits' in v else ''} cm {v['goal_cm'].tolist() if 'goal_cm' in v else ''} {ms:.0f} ms/step", flush=True)
    if step == args.steps:
        break
    rng = np.random.default_rng([args.seed, step])
    out = losses(rng.choice(train_ix, args.batch_size), args.relabel, rng)
    loss = sum(weights[k] * out[k] for k in weights if k in out)
    warm = min(1, (step + 1) / 50)
    decay = min(1, (args.steps - step) / (0.6 * args.steps))
    for o in optimizers:
        for g in o.param_groups:
            g.setdefault("base", g["lr"])
            g["lr"] = g["base"] * warm * decay
    for o in optimizers:
        o.zero_grad()
    loss.backward()
    for o in optimizers:
        o.step()
model.save(args.out_dir / "ckpt.pt", step=args.steps)
