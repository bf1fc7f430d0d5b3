"""Trains every line of a file of settings, evaluates them on the same scenes, prints one table.

    python examples/ablations.py examples/ablations.txt --episodes 200     # minutes a line

Run it from the project's root. A line is NAME: FLAGS OF train.py; the flags of the line named `all`
apply to every other, and # begins a comment. Everything goes to out/ablations/NAME; lines with the
same flags share a run. What is trained already stays, so the same command carries on after Ctrl-C.
"""
import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import percent
from gen_data import number
from measure import latency
from model import VLA, explain_errors


def read_settings(path):
    """{name: flags} of the lines of a file."""
    found = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        line = line.partition("#")[0].strip()
        name, colon, flags = line.partition(":")
        if line and (not colon or name in found or not re.fullmatch(r"\w[\w .+-]*", name)):
            raise ValueError(f"{path}: a line should be NAME: FLAGS OF train.py, with a name of "
                             f"its own in letters, digits and spaces, not {line!r}")
        if line:
            try:
                found[name] = shlex.split(flags)
            except ValueError as error:
                raise ValueError(f"{path}: in {line!r}: {error}") from None
    common = found.pop("all", [])
    if not found:
        raise ValueError(f"{path} has no line NAME: FLAGS OF train.py")
    return {name: common + flags for name, flags in found.items()}


def run(script, *flags):
    command = [sys.executable, str(ROOT / script), *flags]
    print(shlex.join(command[1:]), flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)


def train(folder, flags):
    """Trains in `folder`, as far as it is not done. A finished training leaves curve.png."""
    note = folder / "flags.txt"
    told = shlex.join(flags)
    if note.exists() and note.read_text() != told:
        raise ValueError(f"{folder} was trained with other flags ({note.read_text()}); delete it "
                         f"or give the line another name")
    if (folder / "curve.png").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(told)
    where = ["--overwrite", "--out_dir", str(folder)]
    if (folder / "resume.pt").exists():
        where = ["--resume", str(folder)]
    run("train.py", *flags, "--eval_interval", "0", *where)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="lines of NAME: FLAGS OF train.py")
    parser.add_argument("--episodes", type=number(int, 1, 10**6), default=200,
                        help="scenes to evaluate each on (default 200)")
    args = parser.parse_args()
    # Ctrl-C is for train.py, which saves and ends; its exit status then ends this
    signal.signal(signal.SIGINT, lambda *_: None)

    settings = read_settings(args.file)
    folders = {}                                   # of distinct flags
    for name, flags in settings.items():
        folders.setdefault(shlex.join(flags), Path("out/ablations") / name)
    for flags, folder in folders.items():
        train(folder, shlex.split(flags))
        run("eval.py", "--ckpt", str(folder / "ckpt.pt"), "--seed", "0", "--episodes",
            str(args.episodes), "--out", str(folder / "eval.json"))

    print("| settings | success | parameters | samples/s | forward pass |")
    print("| --- | --- | --- | --- | --- |")
    for name, flags in settings.items():
        folder = folders[shlex.join(flags)]
        row = json.loads((folder / "eval.json").read_text())["rows"][-1]
        model = VLA.load(folder / "ckpt.pt")
        size = sum(p.numel() for p in model.parameters())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        speed = np.median([entry["samples_per_s"] for entry in log if "samples_per_s" in entry])
        p50, _ = latency(model, seed=0)["latency_ms"]
        print(f"| {name} | {percent(row['k'], row['n'])} | {size:,} | {speed:.0f} | {p50:.1f} ms |")


if __name__ == "__main__":
    explain_errors("ablations.py")
    main()
