"""Looks inside a policy and a data file.

    python examples/inspect.py pass --seed 3 --out pass.png    # one forward pass as a figure
    python examples/inspect.py count --episodes 100            # does it look at what words name?
    python examples/inspect.py time                            # how long a forward pass takes
    python examples/inspect.py data --data data/pick_place/0000.h5 --episode 12 --out demo.gif

The first three take --ckpt, by default out/ckpt.pt or else assets/ckpt.pt. `count` plays each scene
to its end and takes a second or two for it. Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder, where `inspect`, which others import from Python, would be this file.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import timeit
from collections import defaultdict

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure

from eval import play
from gen_data import ACTION_NAMES, ACTION_SCALE, NAMES, Env, explain_errors, project
from model import POINTERS, VLA, split
from play import Room, look_inside, save, sheet_of, views_of

SIZE = 480  # px, edge of the big picture
VISIBLE = 3  # px of a thing, at least, for it to be seen
CALLS = 100  # that a time is measured on


def draw_pass(args, policy, env):
    """A figure of the first forward pass in a scene: what is seen and read, and the actions."""
    obs, info = env.reset(args.seed)
    sentence = args.instruction or info["instruction"]
    policy.reset(args.seed)
    actions = policy.look([obs], sentence)["actions"][0].numpy()  # (K, A)
    reading = policy.hear(sentence)["reading"][0]  # (2, L)
    room = Room(env.model, SIZE)
    room.show(env)
    hand = env.ee_pos + ACTION_SCALE * actions[:, :3].cumsum(0)  # (K, 3) m
    route = SIZE * project(hand, room.matrix(room.shown))[0]  # (K, 2) px

    figure = Figure(figsize=(14, 7), layout="constrained")
    # The big one over both rows on the left; on the right, what is read above what is done.
    seen, read, done = figure.subplot_mosaic("sr;sd").values()
    seen.set_title(
        "where its pointers look, red and green, and the path it plans for the hand"
    )
    seen.imshow(sheet_of(room.picture(), views_of(obs, policy, sentence), sentence))
    seen.plot(*route.T, ".-")
    seen.axis("off")
    words = split(sentence)
    read.set_title("where each pointer finds its name")
    read.imshow(reading[:, : len(words)], aspect="auto", vmin=0, vmax=1)
    read.set_xticks(range(len(words)), words, rotation=45)
    read.set_yticks(range(len(POINTERS)), POINTERS)
    done.set_title(
        f"{len(actions)} actions, of which {policy.config.executed} are executed"
    )
    done.plot(actions, ".-", label=ACTION_NAMES)
    done.legend()
    figure.savefig(args.out)
    print(args.out)


def count_attention(args, policy, env):
    """Prints in how many control steps the patch that a pointer looks at most shows the thing that
    it should look for, and the word that it reads most is the thing's colour."""
    counts = defaultdict(list)

    def watch(obs):
        heat = look_inside(policy, obs, env.instruction)  # (V, 2, H, W)
        reading = policy.hear(env.instruction)["reading"][0]  # (2, L)
        shown = np.stack([camera.geom for camera in env.cameras.values()])  # (V, H, W)
        # Slots that are names come first, in the order of the pointers; a drawer has no name.
        named = [thing for slot, thing in zip(env.slots, env.meaning) if slot in NAMES]
        for i, thing in enumerate(named or [env.thing]):
            pointer = f"the pointer to the {POINTERS[i]}"
            at = shown == env.thing_geom[thing]  # (V, H, W), the pixels that show it
            patch = heat[:, i] == heat[:, i].max()  # (V, H, W), the pixels looked at most
            if at.sum() >= VISIBLE:
                counts[f"{pointer} is on it"].append(at[patch].any())
            if named:
                word = split(env.instruction)[reading[i].argmax()]
                counts[f"{pointer} reads its colour"].append(word == env.colors[thing])

    for seed in range(args.seed, args.seed + args.episodes):
        play(policy, env, seed, watch=watch)
    for what, hits in counts.items():
        print(
            f"{what} in {sum(hits)}/{len(hits)} = {100 * np.mean(hits):.1f}% of control steps"
        )


def duration(call):
    """How long a call takes, in words: the median, and what 95% of the calls stay below."""
    seconds = timeit.repeat(call, number=1, repeat=CALLS)
    middle, most = 1e3 * np.percentile(seconds, (50, 95))
    return f"{middle:.1f} ms (p95 {most:.1f})"


def measure_time(args, policy, env):
    """Prints how long a forward pass and a new sentence take on one core. The other actions of a
    chunk cost nothing."""
    obs, info = env.reset(args.seed)
    sentence = info["instruction"]

    def hear_anew():
        policy.heard = {}  # forgets the sentence, which it would keep
        policy.hear(sentence)

    look = duration(lambda: policy.look([obs], sentence))
    hear = duration(hear_anew)
    print(f"{policy.path}, one core: a forward pass takes {look}, a new sentence {hear}")


def show_demonstration(args):
    """Pictures of a recorded demonstration; its first camera stands for the room."""
    try:
        with h5py.File(args.data) as file:
            episode = file[f"data/demo_{args.episode}"]
            arrays = episode["observations"].items()
            pictures = [array[:] for key, array in arrays if key.endswith("_image")]
            text = episode.attrs.get("sentence", episode.attrs["instruction"])
            if episode.attrs.get("interrupted"):
                text += " (interrupted)"
    except (
        KeyError,
        OSError,
    ) as error:  # there is no such file or episode, or it is cut short
        raise ValueError(f"{args.data}: {error}") from None
    views = np.concatenate(
        pictures, 1
    )  # (T, V H, W, 3): of a moment, one above the other
    scale = SIZE // views.shape[2]
    film = []
    for now in views:
        first = now[: now.shape[1]].repeat(scale, 0).repeat(scale, 1)
        film.append(sheet_of(first, now, text))
    save([film], args.out)


if __name__ == "__main__":
    explain_errors()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"pass": draw_pass, "count": count_attention, "time": measure_time}
    add = parser.add_argument
    add("command", choices=(*commands, "data"))
    add("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
    add("--seed", type=int, default=0, help="of the first scene (default 0)")
    add("--instruction", help="of pass: what to do (default: the scene's own sentence)")
    add("--episodes", type=int, default=100, help="of count: scenes (default 100)")
    add(
        "--data",
        default="data/pick_place/0000.h5",
        help="of data: a file of demonstrations",
    )
    add("--episode", type=int, default=0, help="of data: which demonstration (default 0)")
    add("--out", type=Path, default="inspect.png", help="a .png; of data, a .gif, too")
    args = parser.parse_args()
    if args.command == "data":
        show_demonstration(args)
    else:
        policy = VLA.load(args.ckpt)
        if not getattr(policy, "pointers", None) or policy.config.text != "word":
            raise ValueError(
                f"{policy.path} has no pointers from words to pictures to look at"
            )
        commands[args.command](
            args, policy, Env(policy.config.tasks, policy.config.cameras)
        )
