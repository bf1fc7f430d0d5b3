"""Measures how far a policy's actions follow the sentence, and how long a forward pass takes.

    python examples/measure.py --ckpt assets/ckpt.pt --episodes 500

Run it from the project's root. With --results FILE.json, which `eval.py --out` has written, the
numbers are added to the rows of that checkpoint there.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gen_data import TEST_SEED, Env, make_instruction, number
from model import VLA, explain_errors


def sensitivity(model, seeds):
    """Mean distance of the next actions, in [-1, 1], for two sentences that fit the same scene:
    before and after training."""
    torch.manual_seed(0)
    fresh = VLA(model.config).eval()
    env = Env(model.config.tasks, model.config.cameras)
    distances = []
    for seed in seeds:
        obs, info = env.reset(seed)
        rng = np.random.default_rng([seed, 2])
        other = env.draw_request(rng, avoid=env.request) or env.request
        sentences = [info["instruction"], make_instruction(other, rng)]
        plans = [policy.plan([[obs], [obs]], sentences) for policy in (fresh, model)]
        distances.append([np.abs(one[0] - two[0]).mean() for one, two in plans])
    return np.mean(distances, 0).tolist()


def milliseconds(call):
    """p50 and p95 of how long a call takes."""
    times = []
    for _ in range(52):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return np.percentile(times[2:], (50, 95)).tolist()  # the first two warm up


def latency(model, seed):
    """Of a forward pass and of encoding a sentence, on one core. Actions from a chunk cost nothing."""
    torch.set_num_threads(1)
    obs, info = Env(model.config.tasks, model.config.cameras).reset(seed)
    sentence = info["instruction"]
    return dict(
        latency_ms=milliseconds(lambda: model.plan([[obs]], [sentence])),
        encoding_ms=milliseconds(lambda: model.understands(sentence)),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
    add(
        "--episodes",
        type=number(int, 1, 1_000_000),
        default=100,
        help="scenes to compare two sentences in (default 100)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31),
        default=TEST_SEED,
        help=f"of the first scene (default {TEST_SEED:,})",
    )
    add("--results", type=Path, help="a .json file of eval.py to add the numbers to")
    args = parser.parse_args()

    model = VLA.load(args.ckpt)
    measured = {}
    if model.config.model == "vla":
        seeds = range(args.seed, args.seed + args.episodes)
        measured["sensitivity"] = before, after = sensitivity(model, seeds)
        print(
            f"{model.path}: two sentences in one scene differ in the next action by {before:.3f} "
            f"before training and {after:.3f} after it"
        )
    measured |= latency(model, args.seed)
    for name, (p50, p95) in measured.items():
        if name.endswith("_ms"):
            print(f"{model.path}: {name} on one core {p50:.1f} (p95 {p95:.1f})")
    if args.results:
        results = json.loads(args.results.read_text())
        for row in results["rows"]:
            if row["ckpt"] == model.path and row["control"] == "none":
                row.update(measured)
        args.results.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    explain_errors("measure.py")
    main()
