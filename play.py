"""Watch the policy obey sentences.

    python play.py --instruction "pick up the blue block and place it at the red target" --seed 3 --out rollout.gif
    python play.py --seed 3,4,5,6 --out grid.gif           # several scenes side by side, each with its own sentence
    python play.py --seed 3 --out sheet.png --attention    # a contact sheet, with where the policy looks
    python play.py                                         # type sentences; with a display, in MuJoCo's viewer

Pictures show the room through the same ray caster that the policy sees with, and beside it the two 64x64 pictures that
are all it gets to see. With --attention those two carry the attention of its two pointers: red for what is to be
moved, green for the pad or block that it is to be moved to.
"""
import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mujoco
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gen_data import CONTROL_HZ, TASKS, Env, RayCamera, expert, task_list
from model import VLA, tokenize


def fail(message):
    print(f"play.py: {message}", file=sys.stderr)
    sys.exit(2)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error, add = fail, parser.add_argument                 # one sentence, without the usage
add("--ckpt", type=Path, default=None, help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
add("--instruction", default=None, help="what to do in the scene (default: the scene's own sentence)")
add("--tasks", default=None, help=f"all, or a comma list of {', '.join(TASKS)}: what the scenes' own sentences ask for (default: what "
    "the checkpoint was trained on)")
add("--seed", default="0", help="scene seed, or a comma list of them for a grid (default 0)")
add("--expert", action="store_true", help="play the scripted expert instead of a checkpoint")
add("--attention", action="store_true", help="show where the policy looks")
add("--out", type=Path, default=None, help="write a .gif, .mp4 or .png (contact sheet) here instead of asking for sentences")
add("--size", type=int, default=None, help="height of a scene's picture in px (default 384; 256 in a grid)")
args = parser.parse_args()


try:
    seeds = [int(s) for s in args.seed.split(",")]
except ValueError:
    fail(f"--seed wants a number or a comma list of them, got {args.seed!r}")
size = args.size or (384 if len(seeds) == 1 else 256)
if min(seeds) < 0:
    fail(f"--seed must not be negative, got {min(seeds)}")
if not 128 <= size <= 2048:
    fail(f"--size must be from 128 to 2048 px, not {size}")
if len(seeds) > 1 and not args.out:
    fail("several scenes need --out; the prompt plays one")
if args.attention and args.expert:
    fail("--attention shows a policy's attention; the expert has none")
if args.out:
    if args.out.suffix not in (".gif", ".mp4", ".png"):
        fail(f"--out must end in .gif, .mp4 or .png, got {args.out}")
    if not args.out.resolve().parent.is_dir():
        fail(f"there is no folder {args.out.parent} to write {args.out.name} in")
    if args.out.suffix == ".mp4" and not shutil.which("ffmpeg"):
        fail("an .mp4 needs the program ffmpeg, which is not on the PATH; install it or write a .gif")
has_display = not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
font = ImageFont.load_default(15 if size >= 384 else 11)


def load_policy():
    policy = VLA.load(args.ckpt)
    if args.attention and (policy.config.model != "vla" or policy.config.vision == "cnn" or not policy.config.pointers):
        raise ValueError("--attention shows what the two pointers look at, and this checkpoint has none, or no patches")
    return policy


class Scene:
    """One room, one policy, one sentence at a time."""

    def __init__(self, seed, instruction=None):
        self.policy = None if args.expert else load_policy()
        config = self.policy and self.policy.config
        self.env = Env(task_list(args.tasks) if args.tasks else config.tasks if config else tuple(TASKS), config and config.cameras or ("front", "wrist"))
        self.camera = RayCamera(self.env.model, "front", size)
        self.reset(seed, instruction)

    def reset(self, seed, instruction=None):
        self.seed, self.done = seed, False
        self.obs, self.info = self.env.reset(seed, dict(instruction=instruction))
        if self.policy:
            self.policy.predict(self.obs, self.info["instruction"])      # an unknown word is told before anything moves
            self.policy.reset()

    def tell(self, sentence):
        """A new sentence, obeyed from the next step on; ValueError if it cannot be."""
        if self.policy:
            self.policy.predict(self.obs, sentence)
            self.policy.reset()
        self.env.set_instruction(sentence)
        self.obs, self.info, self.done = self.env.observe(), self.env._info(), False

    def step(self):
        if not self.done:
            action = self.policy.predict(self.obs, self.info["instruction"]) if self.policy else expert(self.env)
            self.obs, _, success, truncated, self.info = self.env.step(action)
            self.done = success or truncated

    def outcome(self):
        seconds = f"{self.env.steps / CONTROL_HZ:.1f} s"
        return f"done in {seconds}" if self.info["success"] else f"failed: not done in {seconds}" if self.done else seconds

    def contents(self):
        return f"scene {self.seed}: blocks {', '.join(self.env.block_colors)}; targets {', '.join(self.env.pad_colors)}"

    @torch.inference_mode()
    def looks(self):
        """Attention (V, side, side, 2) of the pointers on each view's patches, for thing and place, 0..1."""
        images, state = self.policy.read_obs(self.obs)
        text = tokenize(self.info["instruction"], self.policy.config)
        attention = self.policy(images, state, text[None])[2][0, :2].exp()           # (2, P)
        sides = self.policy.vision.sides
        views = attention.split([s * s for s in sides], 1)
        return [(v / attention.amax(1, keepdim=True)).T.unflatten(0, (s, s)).numpy() for v, s in zip(views, sides)]

    def picture(self):
        """One frame: the room, what the policy sees beside it, the sentence and the outcome under it."""
        side, line = size // 2, font.size + 6
        sheet = Image.new("RGB", (size + side, size + 2 * line + 6), "white")
        sheet.paste(Image.fromarray(self.camera.render(self.env.data)), (0, 0))
        looks = self.looks() if args.attention else None
        for i, name in enumerate(self.env.cameras):
            small = self.obs[f"{name}_image"]
            if looks:
                heat = looks[i].repeat(64 // len(looks[i]), 0).repeat(64 // len(looks[i]), 1)
                tint = np.stack([heat[..., 0], heat[..., 1], 0 * heat[..., 0]], -1)
                small = (0.35 * small + 0.65 * 255 * tint).astype(np.uint8)
            sheet.paste(Image.fromarray(small).resize((side, side), Image.NEAREST), (size, i * side))
        draw = ImageDraw.Draw(sheet)
        draw.text((6, size + 3), self.info["instruction"], "black", font)
        draw.text((6, size + 3 + line), self.outcome(), "darkgreen" if self.info["success"] else "dimgray", font)
        return sheet


def tile(pictures, columns):
    """Pictures of one size on a sheet, row by row."""
    w, h = pictures[0].size
    sheet = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
    for i, p in enumerate(pictures):
        sheet.paste(p, (i % columns * w, i // columns * h))
    return sheet


def record(scenes, path):
    """Plays the scenes to their ends and writes what happened to a .gif, .mp4 or .png."""
    columns = int(np.ceil(len(scenes) ** 0.5))
    frames = [tile([s.picture() for s in scenes], columns)]
    while not all(s.done for s in scenes):
        for s in scenes:
            s.step()
        frames.append(tile([s.picture() for s in scenes], columns))
    try:
        if path.suffix == ".png":
            tile([frames[i] for i in np.linspace(0, len(frames) - 1, 8).round().astype(int)], 4).save(path)
        elif path.suffix == ".mp4":
            w, h = (x // 2 * 2 for x in frames[0].size)        # the codec wants even sides
            command = f"ffmpeg -y -loglevel error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {CONTROL_HZ} -i - -pix_fmt yuv420p"
            subprocess.run([*command.split(), str(path)], check=True, input=b"".join(f.crop((0, 0, w, h)).tobytes() for f in frames))
        else:
            frames = frames[::2] if len(scenes) > 1 else frames
            palette = frames[len(frames) // 2].quantize(96, dither=Image.Dither.NONE)    # one for all: no flicker
            frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
            tick = 1000 // CONTROL_HZ * (2 if len(scenes) > 1 else 1)
            frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=[tick] * (len(frames) - 1) + [1500])
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"cannot write {path}: {error}")
    for s in scenes:
        print(f"{s.info['instruction']!r}, scene {s.seed}: {s.outcome()}")
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB", flush=True)


HELP = """type a sentence, such as: {}
or: reset (the scene again), seed N (another scene), help, quit"""


def command(scene, line):
    """Obeys a line typed at the prompt. Returns False to quit, True if there is a new sentence to play, else None."""
    word, *rest = line.split() or [""]
    try:
        if word in ("quit", "exit"):
            return False
        if word == "reset" or word == "seed" and rest and rest[0].isdigit():
            scene.reset(int(rest[0]) if rest else scene.seed)
            scene.done = True                                  # wait for a sentence
            print(scene.contents())
        elif word in ("help", "seed", ""):
            print(HELP.format(scene.info["instruction"]))
        else:
            scene.tell(line)
            return True
    except ValueError as error:
        print(error)


def prompt_without_window(scene):
    """Each sentence typed writes its GIF."""
    print("no display: each sentence writes a GIF to out/ (a window opens where DISPLAY is set)")
    try:
        Path("out").mkdir(exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder out for the GIFs: {error.strerror}")
    print(HELP.format(scene.info["instruction"]))
    print(scene.contents())
    free = (path for n in range(10**6) if not (path := Path(f"out/play_{n:03d}.gif")).exists())
    try:
        if args.instruction:
            record([scene], next(free))
        while (answer := command(scene, input("> "))) is not False:
            if answer:
                record([scene], next(free))
    except (EOFError, KeyboardInterrupt):
        print()


def live(scene):
    """MuJoCo's viewer in real time; sentences typed in the terminal are obeyed at once."""
    import mujoco.viewer                                       # needs a window system
    env, lines = scene.env, queue.Queue()
    try:
        window = mujoco.viewer.launch_passive(env.model, env.data, show_left_ui=False, show_right_ui=False)
    except RuntimeError as error:
        fail(f"the viewer did not open ({error}); on macOS start this with mjpython, or use --out rollout.gif")

    window.cam.lookat[:], window.cam.distance, window.cam.azimuth, window.cam.elevation = (0.42, 0, 0.15), 1.5, 155, -28

    def read():
        try:
            while True:
                lines.put(input())
        except EOFError:
            pass                                               # end of input: the window stays until it is closed

    threading.Thread(target=read, daemon=True).start()
    print(f"{scene.info['instruction']!r}; type another sentence at any moment, or help; close the window to end")
    steps, begun, told = 0, time.perf_counter(), False
    try:
        while window.is_running():
            tick = time.perf_counter()
            while not lines.empty():
                if command(scene, lines.get()) is False:
                    raise KeyboardInterrupt                    # quit
                told = False
            with window.lock():
                env.data.xfrc_applied[:] = 0
                mujoco.mjv_applyPerturbForce(env.model, env.data, window.perturb)     # blocks dragged with the mouse
                if scene.done:
                    mujoco.mj_step(env.model, env.data, 10)
                scene.step()
            if scene.done and scene.env.steps and not told:
                print(scene.outcome())
                told = True
            window.sync()
            steps += 1
            time.sleep(max(0, 1 / CONTROL_HZ - (time.perf_counter() - tick)))
    except KeyboardInterrupt:
        pass
    window.close()
    time.sleep(0.5)                                            # its thread crashes if the program ends before it
    print(f"{steps / (time.perf_counter() - begun):.1f} control steps a second")


try:
    scenes = [Scene(seed, args.instruction) for seed in (seeds if args.out else seeds[:1])]
except ValueError as error:
    fail(error)
if args.out:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    record(scenes, args.out)
elif has_display:
    live(scenes[0])
else:
    prompt_without_window(scenes[0])
