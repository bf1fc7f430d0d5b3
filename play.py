"""Watch the policy obey a sentence.

    python play.py --instruction "pick up the blue block and place it at the red target" --seed 3 --out rollout.gif
    python play.py --seed 3                     # with a display: MuJoCo's viewer, in real time

Without --instruction the scene's own sentence is used. The GIF shows the room through the same ray caster that the
policy sees with, and at the right the two 64x64 pictures that are all it gets to see.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gen_data import CONTROL_HZ, MAX_STEPS, Env, RayCamera, expert
from model import VLA

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--ckpt", type=Path, default=None, help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
add("--instruction", default=None, help="what to do, naming a block and a target of the scene (default: the scene's own)")
add("--seed", type=int, default=0, help="scene seed (default 0)")
add("--expert", action="store_true", help="play the scripted expert instead of a checkpoint")
add("--out", type=Path, default=None, help="write a .gif here instead of opening the viewer")
add("--size", type=int, default=384, help="height of the picture in px (default 384)")
args = parser.parse_args()


def fail(message):
    print(f"play.py: {message}", file=sys.stderr)
    sys.exit(2)


if args.seed < 0:
    fail(f"--seed must not be negative, got {args.seed}")
if not 128 <= args.size <= 2048:
    fail(f"--size must be from 128 to 2048 px, not {args.size}")
if args.out and args.out.suffix != ".gif":
    fail(f"--out must end in .gif, got {args.out}")
if args.out and not args.out.resolve().parent.is_dir():
    fail(f"there is no folder {args.out.parent} to write {args.out.name} in")
if not args.out and sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    fail("there is no display to open a window on; use --out rollout.gif")

try:
    cameras = ("front", "wrist")
    if not args.expert:
        here = Path(__file__).parent
        policy = VLA.load(args.ckpt or next((p for p in (Path("out/ckpt.pt"), here / "assets/ckpt.pt") if p.exists()), "out/ckpt.pt"))
        cameras = policy.config.cameras or cameras
    env = Env(cameras=cameras)
    obs, info = env.reset(args.seed, dict(instruction=args.instruction))
    if not args.expert:
        policy.predict(obs, info["instruction"])               # an unknown word is told here, before anything moves
        policy.reset()
except ValueError as error:
    fail(error)


def act():
    return expert(env) if args.expert else policy.predict(obs, info["instruction"])


def outcome():
    if info["success"]:
        return f"done in {env.steps / CONTROL_HZ:.1f} s"
    return f"failed: not done in {MAX_STEPS / CONTROL_HZ:.0f} s" if env.steps >= MAX_STEPS else f"{env.steps / CONTROL_HZ:.1f} s"


def picture(camera, font):
    """One frame: the scene, what the policy sees beside it, the sentence and the outcome under it."""
    side = args.size // 2
    sheet = Image.new("RGB", (args.size + side, args.size + 48), "white")
    sheet.paste(Image.fromarray(camera.render(env.data)), (0, 0))
    for i, name in enumerate(env.cameras):
        sheet.paste(Image.fromarray(obs[f"{name}_image"]).resize((side, side), Image.NEAREST), (args.size, i * side))
    draw = ImageDraw.Draw(sheet)
    draw.text((6, args.size + 4), info["instruction"], "black", font)
    draw.text((6, args.size + 25), outcome(), "darkgreen" if info["success"] else "dimgray", font)
    return sheet


if args.out:
    camera = RayCamera(env.model, "front", args.size)
    words = ImageFont.load_default(15 if args.size >= 256 else 10)
    frames = [picture(camera, words)]
    success = truncated = False
    while not (success or truncated):
        obs, _, success, truncated, info = env.step(act())
        frames.append(picture(camera, words))
    # one palette for all frames, else the colours flicker
    palette = frames[len(frames) // 2].quantize(128, dither=Image.Dither.NONE)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    try:
        frames[0].save(args.out, save_all=True, append_images=frames[1:], loop=0,
                       duration=[1000 // CONTROL_HZ] * (len(frames) - 1) + [1500])
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror}")
    print(f"{info['instruction']!r}, scene {args.seed}: {outcome()}; {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
else:
    import mujoco.viewer                                       # needs a window system; on macOS run with mjpython
    try:
        window = mujoco.viewer.launch_passive(env.model, env.data)
    except RuntimeError as error:
        fail(f"the viewer did not open ({error}); on macOS start this with mjpython, or use --out rollout.gif")
    with window:
        print(f"{info['instruction']!r}; close the window to end")
        success = truncated = False
        while window.is_running():
            tick = time.perf_counter()
            if not (success or truncated):
                obs, _, success, truncated, info = env.step(act())
                if success or truncated:
                    print(outcome())
            window.sync()
            time.sleep(max(0, 1 / CONTROL_HZ - (time.perf_counter() - tick)))
