"""Watch the policy obey sentences, and look inside it. A few seconds a scene.

    python play.py --instruction "pick up the blue block and place it at the red target" \\
        --seed 3 --out rollout.gif
    python play.py --seed 3,4,5,6 --out grid.gif           # each scene with its own sentence
    python play.py --seed 3 --attention --out sheet.png    # a contact sheet, with where it looks
    python play.py                                         # type sentences
    python play.py --seed 3 --pipeline --out pipeline.png  # one forward pass as a figure
    python play.py --attention --episodes 200              # does it look at what the words name?
    python play.py --data data/demos.h5 --episode 12 --out demo.gif      # a demonstration
    python play.py --data data/demos.h5 --replay --episodes 50        # do its actions work again?

Without --out sentences are typed: with a display beside MuJoCo's viewer, in real time (on macOS
start it with mjpython); without one each sentence writes a GIF. A picture shows the room through
the same ray caster that the policy sees with, and beside it the pictures that are all it sees.
"""

import argparse
import json
import os
import queue
import sys
import textwrap
import threading
import time
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from gen_data import (
    ACTION_NAMES,
    ACTION_SCALE,
    CONTROL_HZ,
    TASKS,
    Env,
    RayCamera,
    expert,
    number,
    parse_instruction,
    task_list,
)
from model import POINTERS, UNDERSTOOD, VLA, Config, explain_errors, split, tokenize

explain_errors("play.py")


# ---------------------------------------------------------------------------------- settings
def seed_list(text):
    return [number(int, 0, 2**31)(seed) for seed in text.split(",")]


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
either = parser.add_mutually_exclusive_group().add_argument
either("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
either("--expert", action="store_true", help="play the scripted expert instead")
either("--data", type=Path, help="show or replay demonstrations of this file instead")
add("--instruction", help="what to do (default: the scene's own sentence)")
add(
    "--tasks",
    help=f"what the scenes' own sentences ask for: all, or a comma list of {', '.join(TASKS)} "
    "(default: what the checkpoint was trained on)",
)
add("--seed", type=seed_list, default=[0], help="a scene, or a comma list of them (default 0)")
add(
    "--randomize",
    type=number(float, 0, 1),
    default=0.0,
    help="0 to 1: how far the scene's world is from normal (default 0)",
)
add(
    "--attention",
    action="store_true",
    help="show where the policy looks; with --episodes: how often that is what is named",
)
add("--pipeline", action="store_true", help="draw the first forward pass in the scene")
add(
    "--episode",
    type=number(int, 0, 10**9),
    default=0,
    help="which of --data, or the first of them (default 0)",
)
add("--replay", action="store_true", help="count how often recorded actions succeed again")
add(
    "--episodes",
    type=number(int, 1, 10**6),
    help="scenes for --attention, from --seed on, or demonstrations for --replay (default 1)",
)
add("--out", type=Path, help="write a .gif, or a .png, which is a contact sheet")
add(
    "--size",
    type=number(int, 128, 2048),
    default=320,
    help="px, edge of the room's picture (default 320)",
)
args = parser.parse_args()

torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
inside = args.attention or args.pipeline or args.episodes
suffix = args.out and args.out.suffix
if args.pipeline and (len(args.seed) > 1 or suffix != ".png"):
    raise ValueError(
        "--pipeline draws one scene; give one --seed and an --out that ends in .png"
    )
if args.replay and not args.data:
    raise ValueError("--replay needs --data, the file to replay")
if args.data and not args.replay and not args.out:
    raise ValueError("--data needs --out, a picture of an episode, or --replay")
if args.data and (args.attention or args.pipeline or args.instruction):
    raise ValueError("--data is a record; leave out --attention, --pipeline and --instruction")
if args.out and (args.replay or args.episodes):
    raise ValueError("--replay and --episodes only count; leave out --out")
if args.out and suffix not in (".gif", ".png"):
    raise ValueError(f"--out must end in .gif or .png, not {args.out}")

if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
size = args.size
font = ImageFont.load_default(size // 18)
COLUMNS = 50  # of text of this size, under a picture
ROWS = 4


# ----------------------------------------------------------------------------------- pictures
def draw(room, views, lines):
    """One picture: the room, beside it the policy's pictures [(H, W, 3), ..], text under it."""
    side = size // max(2, len(views))
    room = Image.fromarray(room).resize((size, size), Image.NEAREST)
    views = Image.fromarray(np.concatenate(views)).resize(
        (side, side * len(views)), Image.NEAREST
    )
    sheet = Image.new("RGB", (size + side + 8, size + ROWS * size // 14), "white")
    sheet.paste(room)
    sheet.paste(views, (size + 4, 0))
    text = "\n".join(textwrap.fill(line, COLUMNS) for line in lines)
    ImageDraw.Draw(sheet).text((4, size + 2), text, "black", font)
    return sheet


def tile(pictures, columns):
    """Pictures of one size on a sheet, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save(films, path):
    """Writes films, each a list of pictures, side by side to a .gif, or a few moments to a .png."""
    length = max(len(film) for film in films)
    for film in films:
        film += film[-1:] * (length - len(film))  # it waits for the others
    columns = int(np.ceil(len(films) ** 0.5))
    frames = [tile(pictures, columns) for pictures in zip(*films)]
    if path.suffix == ".png":
        moments = np.linspace(0, length - 1, 8).astype(int)
        tile([frames[t] for t in moments], 4).save(path)
    else:
        frames += frames[-1:] * CONTROL_HZ  # rests for a second
        frames[0].save(
            path, save_all=True, append_images=frames[1:], loop=0, duration=1000 // CONTROL_HZ
        )  # ms
    print(path)


# ------------------------------------------------------------------------------------ playing
class Scene:
    """One room, a policy or the expert in it, one sentence at a time."""

    def __init__(self):
        self.policy = None if args.expert else VLA.load(args.ckpt)
        config = self.policy.config if self.policy else Config(tasks=tuple(TASKS))
        if inside and not getattr(self.policy, "pointers", None):
            raise ValueError(
                "--attention and --pipeline show a policy's pointers from words to "
                "pictures, and --expert or this checkpoint has none; choose another"
            )
        tasks = task_list(args.tasks) if args.tasks else config.tasks
        self.env = Env(tasks, config.cameras, randomize=args.randomize)
        self.camera = RayCamera(self.env.model, "front", size)

    def reset(self, seed):
        self.obs, _ = self.env.reset(seed)
        like = self.env.cameras[min(self.env.cameras)]
        self.camera.light = like.light
        self.camera.strength = like.strength
        self.camera.refit()
        self.done = False
        self.scored = True
        if self.policy:
            self.policy.reset()
        if args.instruction is not None:
            self.tell(args.instruction)

    def tell(self, sentence):
        """A sentence to obey from now on. Raises ValueError if it asks for nothing that was taught, or
        for a block or pad that is not there."""
        if self.policy and self.policy.understands(sentence) < UNDERSTOOD:
            raise ValueError(
                f"{sentence!r} does not seem to ask for anything that this policy was taught: "
                f"{', '.join(self.policy.config.tasks)}"
            )
        scored = True
        try:
            request = parse_instruction(sentence)
        except ValueError:  # keywords do not tell, but the policy may know; nobody keeps score
            if not self.policy:
                raise
            scored = False
            request = self.env.request
        self.env.set_request(request, sentence)  # ValueError if something is not there
        self.scored = scored
        self.obs = self.env.observe()
        self.done = False
        if self.policy:
            self.policy.reset()

    def step(self):
        if self.policy:
            action = self.policy.predict(self.obs, self.env.instruction)
        else:
            action = expert(self.env)
        self.obs, _, terminated, truncated, info = self.env.step(action)
        self.done = truncated or info["diverged"] or terminated and self.scored

    def outcome(self):
        end = "done" if self.env.info()["success"] else "not done"
        if not self.scored:
            end = "over" if self.done else "on its way"
        return f"{self.env.steps / CONTROL_HZ:.1f} s: {end}"

    def picture(self):
        views = [self.obs[f"{name}_image"] for name in self.env.cameras]
        lines = [self.env.instruction, self.outcome()]
        if inside:
            _, heat, _ = look_inside(self)
            views = np.stack(views) // 3  # darker
            views[..., :2] += (160 * heat).byte().permute(0, 2, 3, 1).numpy()
            lines.append("red: pointer to the thing; green: to the place")
        return draw(self.camera.render(self.env.data), views, lines)

    def film(self):
        """Plays to the end; returns the pictures."""
        pictures = [self.picture()]
        while not self.done:
            self.step()
            pictures.append(self.picture())
        print(f"{self.env.instruction!r}, scene {self.env.seed}: {self.outcome()}")
        return pictures


# ----------------------------------------------------------------------------- looking inside
@torch.inference_mode()
def look_inside(scene):
    """One forward pass on what the scene shows now: actions (K, A); the pointers' attention, spread
    over the pixels, (V, 2, H, W); how much of its name each finds at each token (2, L)."""
    policy = scene.policy
    past = policy.memory[0].observations if policy.memory else []
    images, state = policy.read_observations([[scene.obs, *past]])
    text = tokenize(scene.env.instruction, policy.config)[None]
    actions, _, attention, heard = policy(images, state, text)
    side = policy.vision.side
    share = attention[0, : len(POINTERS)].exp()  # (2, P)
    grid = share.unflatten(1, (-1, side, side)).transpose(0, 1)  # (V, 2, side, side)
    newest = grid[: len(scene.env.cameras)]
    heat = torch.nn.functional.interpolate(newest, images.shape[2])
    return actions[0], heat, heard.reading[0]


def draw_pipeline(scene, path):
    """A figure of one forward pass: what is seen and read, and the actions."""
    actions, _, reading = look_inside(scene)
    config = scene.policy.config
    words = scene.env.instruction
    if config.text == "word":
        words = split(words)
    hand = scene.env.ee_pos + ACTION_SCALE * actions[:, :3].numpy().cumsum(0)  # (K, 3) m
    route = scene.camera.project(scene.env.data, hand) * size  # (K, 2) px
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplot_mosaic([["seen", "read"], ["seen", "done"]])
    seen, read, done = panels.values()
    seen.set_title("what it attends to, and the path it plans for the hand")
    seen.imshow(scene.picture())
    seen.plot(*route.T, ".-")
    seen.axis("off")
    read.set_title("where each pointer finds its name")
    read.imshow(reading[:, : len(words)], aspect="auto")
    read.set_xticks(range(len(words)), words, rotation=45)
    read.set_yticks(range(len(POINTERS)), POINTERS)
    done.set_title(f"{config.chunk} actions; the first {config.executed} are executed")
    done.plot(actions, ".-", label=ACTION_NAMES)
    done.legend()
    figure.savefig(path)
    print(path)


def count_attention(scene, seeds):
    """Prints in how many control steps the patch attended to most shows what the sentence names,
    and the word read most is its colour."""
    env = scene.env
    counts = defaultdict(list)
    for seed in seeds:
        scene.reset(seed)
        colors = env.block_colors + env.pad_colors  # the drawer's handle has none
        words = split(env.instruction)
        while not scene.done:
            _, heat, reading = look_inside(scene)
            shown = np.stack([camera.geom for camera in env.cameras.values()])  # (V, H, W)
            for i, thing in enumerate(env.things(env.slots)):
                pointer = f"pointer to the {POINTERS[i]}"
                at = shown == env.thing_geom[thing]
                patch = heat[:, i] == heat[:, i].max()
                if thing >= 0 and at.sum() >= 3:  # there is one, and it can be seen
                    counts[f"{pointer}, is on it"].append(at[patch].any())
                if 0 <= thing < len(colors) and scene.policy.config.text == "word":
                    word = words[reading[i].argmax()]
                    counts[f"{pointer}, reads its colour"].append(word == colors[thing])
            scene.step()
    for what, hits in counts.items():
        print(f"{what}: {sum(hits)}/{len(hits)} = {100 * np.mean(hits):.1f}%")


# ------------------------------------------------------------------------------ demonstrations
def demonstration(episode):
    """Pictures of a recorded episode; its first camera stands for the room."""
    sentence = episode.attrs["instruction"]
    end = "done" if episode.attrs["success"] else "interrupted"
    observations = episode["observations"]
    views = [observations[key][:] for key in observations if key.endswith("_image")]
    pictures = []
    for t, now in enumerate(zip(*views)):
        lines = [sentence, f"{t / CONTROL_HZ:.1f} s of a demonstration: {end}"]
        pictures.append(draw(now[0], now, lines))
    print(sentence)
    return pictures


def replay(file, first, episodes):
    """Prints how many of the demonstrations that succeeded do so again, when their recorded actions
    are fed to the simulator."""
    last = min(first + episodes, file.attrs["total"]) - 1
    first -= file[f"episode_{first}"].attrs["part"]  # to where its scene begins
    env = Env(**json.loads(file.attrs["env_args"])["env_kwargs"] | dict(cameras=()))
    again = []
    for i in range(first, last + 1):
        episode = file[f"episode_{i}"]
        about = episode.attrs
        if about["part"] == 0:
            env.set_randomize(about["randomize"])
            env.reset(about["scene_seed"])
        env.set_request((about["task"], json.loads(about["slots"])), about["instruction"])
        for action in episode["actions"]:
            *_, info = env.step(action)
        if about["success"]:
            again.append(info["success"])
    print(
        f"{sum(again)} of the {len(again)} successful demonstrations among episodes {first} to "
        f"{last} succeed again; those recorded with --noise 0 all should"
    )


# ------------------------------------------------------------------------------------- prompt
HELP = (
    "type a sentence, or: reset (the same scene again), seed N (another one), "
    "randomize X (0 to 1: how odd its world is), help, quit"
)


def obey(scene, line):
    """Carries out a line of the prompt; quit raises EOFError."""
    try:
        match line.split():
            case [] | ["help"]:
                print(HELP)
            case ["quit"]:
                raise EOFError
            case ["reset"]:
                wait(scene, scene.env.seed)
            case ["seed", seed]:
                wait(scene, int(seed))
            case ["randomize", amount]:
                scene.env.set_randomize(float(amount))
                wait(scene, scene.env.seed)
            case _:
                scene.tell(line)
    except ValueError as error:
        print(error)


def wait(scene, seed):
    """The scene `seed`, which waits for a sentence."""
    scene.reset(seed)
    scene.done = True
    print(
        f"scene {seed}: {', '.join(scene.env.block_colors)} blocks, "
        f"{', '.join(scene.env.pad_colors)} pads; for example: {scene.env.instruction}"
    )


def prompt(scene):
    """Each sentence typed writes a GIF."""
    Path("out").mkdir(exist_ok=True)
    paths = (Path(f"out/play_{n:03}.gif") for n in range(1000))
    while True:
        if not scene.done:
            save([scene.film()], next(path for path in paths if not path.exists()))
        obey(scene, input("> "))


def live(scene):
    """MuJoCo's viewer in real time; sentences typed in the terminal are obeyed at once."""
    import mujoco.viewer  # needs a window system

    env = scene.env
    env.model.vis.map.stiffness = 250  # 1/s^2; with 100, blocks hardly move
    typed = queue.Queue()

    def listen():
        for line in sys.stdin:
            typed.put(line)

    threading.Thread(target=listen, daemon=True).start()
    print("a double-clicked block follows the mouse with Ctrl and the right button")
    with mujoco.viewer.launch_passive(env.model, env.data) as window:
        while window.is_running():
            began = time.perf_counter()
            with window.lock():
                while not typed.empty():
                    obey(scene, typed.get().strip())
                env.data.xfrc_applied[:] = 0
                mujoco.mjv_applyPerturbForce(env.model, env.data, window.perturb)
                if scene.done:
                    env.step([0, 0, 0, env.data.ctrl[env.grip]])  # holds still
                else:
                    scene.step()
                    if scene.done:
                        print(scene.outcome())
            window.sync()
            passed = time.perf_counter() - began
            time.sleep(max(0, 1 / CONTROL_HZ - passed))


# ------------------------------------------------------------------------------------- script
if args.data:
    films = []
    try:
        with h5py.File(args.data) as file:
            if args.replay:
                replay(file, args.episode, args.episodes or 1)
            else:
                films.append(demonstration(file[f"episode_{args.episode}"]))
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{args.data} is not a data file of gen_data.py, or has no "
            f"--episode {args.episode} ({error})"
        ) from None
    if films:
        save(films, args.out)
    sys.exit()

scene = Scene()
first = args.seed[0]
if args.episodes:
    count_attention(scene, range(first, first + args.episodes))
elif args.pipeline:
    scene.reset(first)
    draw_pipeline(scene, args.out)
elif args.out:
    films = []
    for seed in args.seed:
        scene.reset(seed)
        films.append(scene.film())
    save(films, args.out)
else:
    print(HELP)
    wait(scene, first)
    scene.done = not args.instruction
    no_display = {"DISPLAY", "WAYLAND_DISPLAY"}.isdisjoint(os.environ)
    try:
        (prompt if sys.platform == "linux" and no_display else live)(scene)
    except (EOFError, KeyboardInterrupt):
        print()
    sys.stdout.flush()
    time.sleep(0.5)  # the viewer's thread crashes if the program ends before it
    os._exit(0)  # the thread that waits for a line cannot be ended in order
