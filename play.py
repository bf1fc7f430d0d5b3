"""Watch the policy obey sentences, and look inside.

    python play.py --instruction "pick up the blue block and place it at the red target" --seed 3 --out rollout.gif
    python play.py --seed 3,4,5,6 --out grid.gif           # several scenes side by side, each with its own sentence
    python play.py --seed 3 --out sheet.png --attention    # a contact sheet, with where the policy looks
    python play.py                                         # type sentences; with a display, in MuJoCo's viewer
    python play.py --seed 3 --out pipeline.png --pipeline  # one forward pass, from pictures and words to actions
    python play.py --attention --episodes 200              # how often what is looked at is what the words name
    python play.py --data data/demos.h5 --episode 12 --out demo.gif        # a demonstration
    python play.py --data data/demos.h5 --episodes 50 --replay             # do its actions succeed again?

Pictures show the room through the same ray caster that the policy sees with, and beside it the two 64x64 pictures that
are all it gets to see. With --attention those two carry the attention of its two pointers: red for what is to be
moved, green for the pad or block that it is to be moved to; and each word is underlined where a pointer reads it.
"""
import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import mujoco
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

from gen_data import ACTION_NAMES, ACTION_SCALE, CONTROL_HZ, TASKS, Env, RayCamera, expert, task_list
from model import POINTERS, VLA, split, tokenize

try:
    import termios
except ImportError:                                            # Windows
    termios = None


def fail(message):
    print(f"play.py: {message}", file=sys.stderr)
    sys.exit(2)


def find_ffmpeg():
    """Path of the program, from the system or from the package imageio-ffmpeg; None if there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        return shutil.which("ffmpeg")
    return shutil.which("ffmpeg") or get_ffmpeg_exe()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error, add = fail, parser.add_argument                 # one sentence, without the usage
add("--ckpt", type=Path, default=None, help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
add("--instruction", default=None, help="what to do in the scene (default: the scene's own sentence)")
add("--tasks", default=None, help=f"all, or a comma list of {', '.join(TASKS)}: what the scenes' own sentences ask for (default: what "
    "the checkpoint was trained on)")
add("--seed", default="0", help="scene seed, or a comma list of them for a grid (default 0)")
add("--expert", action="store_true", help="play the scripted expert instead of a checkpoint")
add("--attention", action="store_true", help="show where the policy looks; with --episodes: count how often it is what the words name")
add("--pipeline", action="store_true", help="draw what happens in one look at the scene, into a .png")
add("--data", type=Path, default=None, help="show or replay demonstrations of this file instead of playing")
add("--episode", type=int, default=0, help="which of them, or the first of them (default 0)")
add("--replay", action="store_true", help="feed the recorded actions to the simulator and count how often they succeed again")
add("--episodes", type=int, default=None, help="scenes to count in, from the first --seed on, or demonstrations to --replay (default 1)")
add("--out", type=Path, default=None, help="write a .gif, .mp4 or .png (contact sheet) here instead of asking for sentences")
add("--size", type=int, default=None, help="height of a scene's picture in px (default 384; 256 in a grid)")
args = parser.parse_args()


try:
    seeds = [int(s) for s in args.seed.split(",")]
except ValueError:
    fail(f"--seed wants a number or a comma list of them, got {args.seed!r}")
size = (384 if len(seeds) == 1 else 256) if args.size is None else args.size
if min(seeds) < 0:
    fail(f"--seed must not be negative, got {min(seeds)}")
if not 128 <= size <= 2048:
    fail(f"--size must be from 128 to 2048 px, not {size}")
if len(seeds) > 1 and not args.out:
    fail("several scenes need --out; the prompt plays one")
if (args.attention or args.pipeline) and args.expert:
    fail("--attention and --pipeline show the inside of a policy; the expert has none")
if args.pipeline and not (args.out and args.out.suffix == ".png"):
    fail("--pipeline needs an --out that ends in .png")
if args.replay and not args.data:
    fail("--replay needs the --data to replay")
if args.data and not (args.replay or args.out):
    fail("--data needs --out, a picture of an episode, or --replay")
if args.episodes is not None and (args.episodes < 1 or not (args.replay or args.attention)):
    fail("--episodes counts, 1 or more, with --attention or --replay")
if args.instruction and args.episodes:
    fail("--episodes counts in scenes with sentences of their own, without --instruction")
if args.expert and args.ckpt:
    fail("--expert plays instead of a checkpoint, without --ckpt")
if args.out and (args.replay or args.episodes):
    fail("--replay and --episodes only count; a picture is made without them")
if args.data and (args.attention or args.pipeline or args.expert or args.instruction or args.ckpt):
    fail("--data shows what was recorded; --attention, --pipeline, --expert, --instruction and --ckpt are for playing")
if args.pipeline and len(seeds) > 1:
    fail("--pipeline draws one scene; give one --seed")
if args.out:
    if args.out.suffix not in (".gif", ".mp4", ".png"):
        fail(f"--out must end in .gif, .mp4 or .png, got {args.out}")
    if not args.out.resolve().parent.is_dir():
        fail(f"there is no folder {args.out.parent} to write {args.out.name} in")
    if args.out.suffix == ".mp4" and not (ffmpeg := find_ffmpeg()):
        fail("an .mp4 needs the program ffmpeg, which is not on the PATH; install it, or pip install imageio-ffmpeg, or write a .gif")
has_display = not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
font = ImageFont.load_default(15 if size >= 384 else 11)


def load_policy():
    policy = VLA.load(args.ckpt)
    config = policy.config
    if (args.attention or args.pipeline) and (config.model != "vla" or config.vision == "cnn" or not config.pointers):
        raise ValueError("--attention and --pipeline show two pointers on the patches of pictures, and this checkpoint has none")
    return policy


class Scene:
    """One room, one policy, one sentence at a time."""

    def __init__(self, seed, instruction=None):
        self.policy = None if args.expert else load_policy()
        config = self.policy and self.policy.config
        tasks = task_list(args.tasks) if args.tasks else config.tasks if config else tuple(TASKS)
        self.env = Env(tasks, config and config.cameras or ("front", "wrist"))
        self.camera = RayCamera(self.env.model, "front", size)
        self.reset(seed, instruction)

    def reset(self, seed, instruction=None):
        self.seed, self.done = seed, False
        self.obs, self.info = self.env.reset(seed, dict(instruction=instruction))
        like = next(iter(self.env.cameras.values()))           # the same light and, in a randomised world, field of view
        self.camera.light, self.camera.strength = like.light, like.strength
        self.camera.refit()
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
        """Attention (M, P) on the patches of all views: of the pointers to thing and place, then of two heads of the CLS
        token, as far as there are any. And how much of its name each pointer finds at each token of the sentence, (2, tokens)."""
        policy, past = self.policy, [self.obs]                 # newest first, see Policy.act
        if policy.memory:
            past += policy.memory[0]["seen"]
        images, state = policy.read_obs([past])
        text = tokenize(self.info["instruction"], policy.config)[None]
        return policy(images, state, text)[2][0].exp(), policy.pointers.weigh(policy.text(text), text == 0)[0, :, :(text > 0).sum()]

    def heat(self, attention):
        """Attention (2, P) as one picture (side, side, 3) for each view, 0..1: thing in red, place in green."""
        sides = self.policy.vision.sides
        parts = (attention / attention.amax(1, keepdim=True)).split([s * s for s in sides], 1)
        return [np.pad(part.T.unflatten(0, (s, s)).numpy(), ((0, 0), (0, 0), (0, 1))) for part, s in zip(parts, sides)]

    def picture(self):
        """One frame: the room, what the policy sees beside it, the sentence and the outcome under it."""
        side, line = size // max(2, len(self.env.cameras)), font.size + 6
        sheet = Image.new("RGB", (size + side, size + 2 * line + 6), "white")
        sheet.paste(Image.fromarray(self.camera.render(self.env.data)), (0, 0))
        attention, reading = self.looks() if args.attention else (None, None)
        looks = self.heat(attention[:2]) if args.attention else None
        for i, name in enumerate(self.env.cameras):
            small = self.obs[f"{name}_image"]
            if looks:
                tint = looks[i].repeat(64 // len(looks[i]), 0).repeat(64 // len(looks[i]), 1)
                small = (0.35 * small + 0.65 * 255 * tint).astype(np.uint8)
            sheet.paste(Image.fromarray(small).resize((side, side), Image.NEAREST), (size, i * side))
        draw = ImageDraw.Draw(sheet)
        draw.text((6, size + 3), self.info["instruction"], "black", font)
        if args.attention and self.policy.config.text == "word":         # underline what each pointer reads
            at = 0
            for word, weights in zip(split(self.info["instruction"]), reading.T.tolist()):
                at = self.info["instruction"].lower().index(word, at)
                left, right = (6 + draw.textlength(self.info["instruction"][:n], font) for n in (at, at + len(word)))
                for k, (color, weight) in enumerate(zip(((220, 0, 0), (0, 150, 0)), weights)):
                    if weight > 0.2:
                        draw.line((left, size + line + 2 * k, right, size + line + 2 * k), color, 2)
                at += len(word)
        draw.text((6, size + 3 + line), self.outcome(), "darkgreen" if self.info["success"] else "dimgray", font)
        return sheet


class Demo:
    """A recorded episode, to be shown like a Scene."""

    def __init__(self, path, number):
        with h5py.File(path) as file:
            if not 0 <= number < file.attrs["total"]:
                raise ValueError(f"--episode {number} is not in {path}, which has 0 to {file.attrs['total'] - 1}")
            episode, about = file[f"episode_{number}"], file[f"episode_{number}"].attrs
            views = [value[:] for key, value in episode["observations"].items() if key.endswith("_image")]
            self.pictures, self.actions, self.at = np.concatenate(views, 2), episode["actions"][:], 0
            self.info, self.seed, self.success = dict(instruction=about["instruction"]), about["scene_seed"], about["success"]

    @property
    def done(self):
        return self.at == len(self.pictures) - 1

    def step(self):
        self.at += not self.done

    def outcome(self):
        end = ("done" if self.success else "interrupted") if self.done else ""
        return f"{self.at / CONTROL_HZ:.1f} s  {end}"

    def picture(self):
        pixels, line = self.pictures[self.at], font.size + 6
        sheet = Image.new("RGB", (pixels.shape[1] * size // 64, size + 3 * line + 6), "white")
        sheet.paste(Image.fromarray(pixels).resize((sheet.width, size), Image.NEAREST), (0, 0))
        draw = ImageDraw.Draw(sheet)
        actions = "  ".join(f"{name} {value:+.2f}" for name, value in zip(ACTION_NAMES, self.actions[self.at]))
        for i, text in enumerate((self.info["instruction"], actions, self.outcome())):
            draw.text((6, size + 3 + i * line), text, "black", font)
        return sheet


def replay(path, first, n):
    """Prints how many of the n demonstrations from `first` on, of those that succeeded, do so again when the actions that were
    recorded for their scene, sentence by sentence, are fed to the simulator."""
    again = recorded = 0
    with h5py.File(path) as file:
        if not 0 <= first < file.attrs["total"]:
            raise ValueError(f"--episode {first} is not in {path}, which has 0 to {file.attrs['total'] - 1}")
        env = Env(**json.loads(file.attrs["env_args"])["env_kwargs"] | dict(cameras=()))
        noise = json.loads(file.attrs["settings"])["noise"]
        last = min(first + n, file.attrs["total"])
        for i in range(first - int(file[f"episode_{first}"].attrs["sentence"]), last):
            about = file[f"episode_{i}"].attrs
            if about["sentence"] == 0:
                env.reset(int(about["scene_seed"]))
            env.set_request((about["task"], json.loads(about["slots"])), about["instruction"])
            success = False
            for action in file[f"episode_{i}/actions"][:]:
                success = env.step(action)[4]["success"]
            if i >= first and about["success"]:
                recorded, again = recorded + 1, again + success
    print(f"{again} of the {recorded} successful demonstrations among episodes {first} to {last - 1} succeed again; they were "
          f"recorded with --noise {noise:g}" + (", which is not in the recorded actions" if noise else ""))


@torch.inference_mode()
def count_attention(n):
    """Prints in how many control steps of n scenes the patch that is looked at most lies on what the sentence names."""
    scene, names = Scene(seeds[0]), [*(f"pointer to the {p}" for p in POINTERS), "CLS head 1", "CLS head 2"]
    hits, reads, done = np.zeros((4, 2), int), np.zeros((2, 2), int), 0     # (hits, of)
    for seed in range(seeds[0], seeds[0] + n):
        scene.reset(seed)
        env = scene.env
        while not scene.done:
            attention, reading = scene.looks()
            shown = [camera.geom.reshape(side, 64 // side, side, 64 // side).swapaxes(1, 2).reshape(side * side, -1)
                     for camera, side in zip(env.cameras.values(), scene.policy.vision.sides)]
            newest = sum(len(view) for view in shown)          # with --frames, the patches of older pictures come after
            for row, patch in enumerate(attention[:, :newest].argmax(1).tolist()):
                thing = env.things(env.slots)[row % 2]
                on = np.concatenate([(view == env.thing_geom[thing]).sum(1) for view in shown])
                if thing >= 0 and on.sum() >= 3:               # there is such a thing, and it can be seen
                    hits[row] += on[patch] > 0, 1
            words = split(env.instruction)
            for row, slot in enumerate((env.slots.get("block"), env.slots.get("pad", env.slots.get("lower")))):
                if slot and scene.policy.config.text == "word":
                    reads[row] += words[reading[row].argmax()] == slot, 1
            scene.step()
        done += scene.info["success"]
    print(f"{n} scenes from seed {seeds[0]}, {done} done; control steps in which the patch that is looked at most lies on the object:")
    for name, (k, of) in zip(names, hits):
        if of:
            print(f"  {name:22} {k}/{of} = {100 * k / of:.1f}%")
    if reads.any():
        print("and in which the word that is read most is its colour:")
    for name, (k, of) in zip(names, reads):
        if of:
            print(f"  {name:22} {k}/{of} = {100 * k / of:.1f}%")


def draw_pipeline(scene, path):
    """One figure of one look: pictures as patches, words, state, what each encoder makes of them, the pointers, the fused vector,
    and the chunk of actions."""
    policy, env, seen, sentence = scene.policy, scene.env, {}, scene.info["instruction"]
    hooks = [getattr(policy, name).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
             for name in ("vision", "text", "fusion")]
    actions = policy.plan([scene.obs], [sentence])[0]          # (K, 4)
    for hook in hooks:
        hook.remove()
    attention, reading = scene.looks()
    kept, first = seen["vision"][1][0].numpy(), 0
    figure = Figure(figsize=(14, 8.4), layout="constrained")    # no pyplot: draws without a display
    grid = figure.add_gridspec(3, 12, height_ratios=(4, 1.2, 3))

    def panel(row, columns, title):
        axes = figure.add_subplot(grid[row, columns])
        axes.set_title(title, fontsize=9)
        return axes

    width = 8 // len(env.cameras)
    for i, (name, side, heat) in enumerate(zip(env.cameras, policy.vision.sides, scene.heat(attention[:2]))):
        axes = panel(0, slice(width * i, width * (i + 1)), f"{name}: of {side} x {side} patches the framed ones are kept\n"
                     "red: pointer to the thing, green: to the place")
        cell = 64 // side
        axes.imshow((0.6 * scene.obs[f"{name}_image"] + 130 * heat.repeat(cell, 0).repeat(cell, 1)).clip(0, 255).astype(np.uint8))
        for patch in kept[(kept >= first) & (kept < first + side * side)] - first:
            corner = patch % side * cell - 0.5, patch // side * cell - 0.5
            axes.add_patch(Rectangle(corner, cell, cell, fill=False, ec="white", lw=0.8))
        first += side * side
        axes.axis("off")
    axes = panel(0, slice(8, 12), f"the chunk: {len(actions)} actions as the hand's path; {policy.config.execute} are executed")
    hand = env.ee_pos + np.cumsum(np.concatenate([np.zeros((1, 3)), actions[:, :3] * ACTION_SCALE]), 0)
    axes.imshow(scene.camera.render(env.data))
    axes.plot(*scene.camera.project(env.data, hand).T * size, "o-", color="crimson", ms=4, mec="white")
    axes.axis("off")
    axes = panel(1, slice(0, 8), "at which words each pointer finds its name")
    words = split(sentence) if policy.config.text == "word" else list(sentence)
    axes.imshow(reading.numpy(), vmin=0, vmax=1, cmap="Greys", aspect="auto")
    axes.set_yticks((0, 1), POINTERS), axes.set_xticks(range(reading.shape[1]), words[:reading.shape[1]])
    state = (policy.read_obs(scene.obs)[1] - policy.state_mean) / policy.state_std
    axes = panel(1, slice(8, 12), f"state: {state.shape[1]} numbers, normalised")
    axes.bar(range(state.shape[1]), state[0].numpy()), axes.set_xticks([])
    patches, words, fused = seen["vision"][0][0], seen["text"][0, :len(words)], seen["fusion"][0]
    for i, (title, tokens) in enumerate(((f"patch tokens {tuple(patches.shape)}, less their mean", patches - patches.mean(0)),
                                         (f"word tokens {tuple(words.shape)}, less their mean", words - words.mean(0)),
                                         (f"fused: {fused.numel()} numbers", fused.reshape(np.gcd(fused.numel(), 8), -1)))):
        axes, limit = panel(2, slice(3 * i, 3 * i + 3), title), 2 * tokens.std().item()
        axes.imshow(tokens.numpy(), vmin=-limit, vmax=limit, cmap="coolwarm", aspect="auto")
        axes.set_xticks([]), axes.set_yticks([])
    axes = panel(2, slice(9, 12), "the first action")
    axes.barh(ACTION_NAMES, actions[0], color=["tab:red", "tab:green", "tab:blue", "gray"])
    axes.set_xlim(-1, 1), axes.invert_yaxis(), axes.axvline(0, color="black", lw=0.8)
    figure.suptitle(f"{sentence!r}, scene {scene.seed}")
    try:
        figure.savefig(path, dpi=90)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


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
            command = f"-y -loglevel error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {CONTROL_HZ} -i - -pix_fmt yuv420p"
            subprocess.run([ffmpeg, *command.split(), str(path)], check=True,
                           input=b"".join(f.crop((0, 0, w, h)).tobytes() for f in frames))
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
or: reset (the scene again), seed N (another scene), randomize X (0 to 1: how odd the next scenes' worlds are), help, quit"""


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
        elif word == "randomize" and rest and rest[0].replace(".", "", 1).isdigit():
            scene.env.set_randomize(float(rest[0]))
            scene.reset(scene.seed)
            scene.done = True
            print(scene.contents())
        elif word in ("help", "seed", "randomize", ""):
            print(HELP.format(scene.info["instruction"]))
        else:
            scene.tell(line)
            return True
    except ValueError as error:
        print(error)


def use_readline(scene):
    """Arrow keys bring back lines, tab completes the words that the policy knows, where the platform has it."""
    try:
        import readline
    except ImportError:
        return
    words = [*(scene.policy.config.words if scene.policy else ()), "reset", "seed", "randomize", "help", "quit"]
    readline.set_completer(lambda text, n: [*(f"{w} " for w in words if w.startswith(text)), None][n])
    readline.parse_and_bind("tab: complete")


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
    env.model.vis.map.stiffness = 250                          # 1/s^2: a block follows the mouse; MuJoCo's 100 hardly moves it
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
    print(f"{scene.info['instruction']!r}; type another sentence at any moment, or help; a block that is double-clicked follows the mouse "
          "with Ctrl and the right button; close the window to end")
    terminal = termios.tcgetattr(sys.stdin) if termios and sys.stdin.isatty() else None
    steps, begun, told = 0, time.perf_counter(), False
    due = begun
    try:
        while window.is_running():
            while not lines.empty():
                if command(scene, lines.get()) is False:
                    raise KeyboardInterrupt                    # quit
                told = False
            with window.lock():
                env.data.xfrc_applied[:] = 0
                mujoco.mjv_applyPerturbForce(env.model, env.data, window.perturb)     # blocks dragged with the mouse
                if scene.done:
                    mujoco.mj_step(env.model, env.data, 10)
                    env._refresh()                             # where blocks are now, for the next sentence
                scene.step()
            if scene.done and scene.env.steps and not told:
                print(scene.outcome())
                told = True
            window.sync()
            steps += 1
            due = max(due + 1 / CONTROL_HZ, time.perf_counter() - 0.2)         # small delays are made up for
            time.sleep(max(0, due - time.perf_counter()))
    except KeyboardInterrupt:
        pass
    window.close()
    print(f"{steps / (time.perf_counter() - begun):.1f} control steps a second", flush=True)
    time.sleep(0.5)                                            # its thread crashes if the program ends before it
    if terminal:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, terminal)
    os._exit(0)                                                # the other waits for a line and cannot be ended in order


signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print(f"torch {torch.__version__}, mujoco {mujoco.__version__}, numpy {np.__version__}, cpu {torch.backends.cpu.get_cpu_capability()}, "
      f"threads {torch.get_num_threads()}")
try:
    if args.replay:
        replay(args.data, args.episode, args.episodes or 1)
        sys.exit()
    if args.attention and args.episodes:
        count_attention(args.episodes)
        sys.exit()
    if args.data:
        scenes = [Demo(args.data, args.episode)]
    else:
        scenes = [Scene(seed, args.instruction) for seed in (seeds if args.out else seeds[:1])]
except ValueError as error:
    fail(error)
except (OSError, KeyError, TypeError, RuntimeError) as error:
    fail(f"{args.data} is not a data file of gen_data.py ({str(error).splitlines()[0]})")
if args.pipeline:
    draw_pipeline(scenes[0], args.out)
elif args.out:
    record(scenes, args.out)
else:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    use_readline(scenes[0])
    (live if has_display else prompt_without_window)(scenes[0])
