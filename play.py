"""Watch the policy obey sentences, and look inside it. A few seconds a scene.

    python play.py --instruction "pick up the blue block and place it at the red target" \\
        --seed 3 --out rollout.gif
    python play.py --seed 3,4,5,6 --out grid.gif           # each scene with its own sentence
    python play.py --seed 3 --attention --out sheet.png    # a contact sheet, with where it looks
    python play.py                                         # type sentences in a browser
    python play.py --seed 3 --pipeline --out pipeline.png  # one forward pass as a figure
    python play.py --attention --episodes 200              # does it look at what the words name?
    python play.py --data data/demos.h5 --episode 12 --out demo.gif      # a demonstration

Without --out a page opens in the browser, where you type sentences and drag blocks while the robot
moves. Over SSH forward its port, and open the address that is printed. A picture shows the room
through the same ray caster that the policy sees with, and beside it all that the policy sees.
"""

import argparse
import base64
import copy
import io
import ipaddress
import json
import os
import re
import sys
import textwrap
import threading
import time
import webbrowser
from collections import defaultdict, deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import mujoco
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from gen_data import (
    ACTION_NAMES,
    ACTION_SCALE,
    CONTROL_HZ,
    TASKS,
    WORKSPACE,
    Env,
    RayCamera,
    expert,
    make_instruction,
    number,
    parse_instruction,
    task_list,
)
from model import POINTERS, UNDERSTOOD, VLA, Config, explain_errors, split, tokenize

explain_errors("play.py")


# ---------------------------------------------------------------------------------- settings
def numbers(kind, low, high):
    """A type for argparse: a comma list of them."""

    def comma_list(text):
        return [number(kind, low, high)(part) for part in text.split(",")]

    comma_list.__name__ = "comma list"  # for argparse's own message
    return comma_list


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
either = parser.add_mutually_exclusive_group().add_argument
either("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
either("--expert", action="store_true", help="play the scripted expert instead")
either("--data", type=Path, help="show a demonstration of this file instead")
add(
    "--instruction",
    action="append",
    help="what to do (default: the scene's own sentence); repeat it for further scenes",
)
add(
    "--tasks",
    help=f"what the scenes' own sentences ask for: all, or a comma list of {', '.join(TASKS)} "
    "(default: what the checkpoint was trained on)",
)
add(
    "--seed",
    type=numbers(int, 0, 2**31),
    default=[0],
    help="a scene, or with --out a comma list (default 0)",
)
add(
    "--randomize",
    type=numbers(float, 0, 1),
    default=[0.0],
    help="0 to 1: how far the scene's world is from normal (default 0), or a comma list",
)
add(
    "--attention",
    action="store_true",
    help="show where the policy looks; with --episodes: how often that is what is named",
)
add("--pipeline", action="store_true", help="draw the first forward pass in the scene")
add("--episode", type=number(int, 0, 10**9), default=0, help="which of --data (default 0)")
add("--episodes", type=number(int, 1, 10**6), help="scenes for --attention, from --seed on")
add("--out", type=Path, help="write a .gif, or a .png, which is a contact sheet")
add(
    "--size",
    type=number(int, 128, 2048),
    help="px, edge of the room's picture (default 320; 480 on the page)",
)
add(
    "--port",
    type=number(int, 0, 65535),
    help="port of the page; 0 takes a free one (default 8000)",
)
add("--host", help="address the page is served on (default 127.0.0.1, this machine alone)")
add("--no_browser", action="store_true", help="only print the page's address")
args = parser.parse_args()

torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
inside = args.attention or args.pipeline or args.episodes
suffix = args.out and args.out.suffix
if args.pipeline and (len(args.seed) > 1 or suffix != ".png"):
    raise ValueError(
        "--pipeline draws one scene; give one --seed and an --out that ends in .png"
    )
if args.data and not args.out:
    raise ValueError("--data needs --out, for a picture of an episode")
if args.data and (args.attention or args.pipeline or args.instruction):
    raise ValueError("--data is a record; leave out --attention, --pipeline and --instruction")
page = not (args.out or args.episodes)
if page and len(args.seed) > 1:
    raise ValueError("the page shows one scene; give one --seed, or --out for pictures")
if args.episodes and len(args.seed) > 1:
    raise ValueError("--episodes plays scenes in a row; give the first as --seed")
said, randomize = args.instruction or [None], args.randomize
if not {len(said), len(randomize)} <= {1, len(args.seed)}:
    raise ValueError("give one --instruction and one --randomize, or one for each --seed")
if not page and (args.port is not None or args.host or args.no_browser):
    raise ValueError("--port, --host and --no_browser are of the page; leave out --out")
if args.out and args.episodes:
    raise ValueError("--episodes only counts; leave out --out")
if args.out and suffix not in (".gif", ".png"):
    raise ValueError(f"--out must end in .gif or .png, not {args.out}")

if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
size = args.size or (320 if args.out else 480)
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
class Room(RayCamera):
    """A wide view of a scene, from anywhere around it, with shadows on the table."""

    MIDDLE = np.array([0.36, 0, 0.2])  # m, what it looks at
    DISTANCE = 1.5  # m
    SUN = MIDDLE + 5 * RayCamera.LIGHT  # m, where shadows come from
    SHADE = 0.65  # of the light that is left in them
    COARSE = 2  # px, of a shadow's edge

    def __init__(self, model, size):
        super().__init__(model, "front", size)
        self.shown = mujoco.MjData(model)
        self.geom = np.full((size, size), -1)  # until there is a picture
        self.turn(-0.6, 0.5)

    def turn(self, azimuth, elevation):
        """Where it looks from, rad."""
        self.angles = azimuth, min(max(elevation, 0.1), 1.5)
        up, level = np.sin(self.angles[1]), np.cos(self.angles[1])
        back = np.array([level * np.cos(azimuth), level * np.sin(azimuth), up])
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
        self.axes = np.stack([right, np.cross(back, right), back], 1)

    def show(self, data):
        """Remembers where everything is, for picture(). Both may be in another thread than the scene,
        and drawing marks in the model what is in sight, so there is a copy of the model, too.
        """
        self.model = copy.copy(data.model)
        mujoco.mj_copyData(self.shown, self.model, data)
        self.shown.cam_xpos[self.id] = self.MIDDLE + self.DISTANCE * self.axes[:, 2]
        self.shown.cam_xmat[self.id] = self.axes.ravel()

    def picture(self):
        """(size, size, 3) uint8"""
        image = self.render(self.shown)
        coarse = np.s_[:: self.COARSE, :: self.COARSE]
        table = self.geom == self.TABLE
        x, y = np.meshgrid(*[np.arange(0, self.size, self.COARSE)] * 2)
        bare = table[coarse]
        rays = self.on_plane(x[bare], y[bare], 0) - self.SUN
        n = len(rays)
        geom, distance = np.empty(n, np.int32), np.empty(n)
        mujoco.mj_multiRay(
            self.model,
            self.shown,
            self.SUN,
            rays.ravel(),
            None,
            True,
            -1,
            geom,
            distance,
            None,
            n,
            1e9,
        )
        dark = np.zeros_like(bare)
        dark[bare] = geom > self.TABLE
        dark = dark.repeat(self.COARSE, 0).repeat(self.COARSE, 1)[: self.size, : self.size]
        image[dark & table] = image[dark & table] * self.SHADE
        return image

    def on_plane(self, x, y, height):
        """World points (..., 3) m, so high, that are seen at pixels x, y."""
        rays = self.rays.reshape(self.size, self.size, 3)[y, x] @ self.axes.T
        eye = self.shown.cam_xpos[self.id]
        far = (height - eye[2]) / np.minimum(rays[..., 2:], -0.05)
        return eye + far * rays


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
        if not config.cameras:
            raise ValueError(f"{args.ckpt} sees no pictures to show; score it with eval.py")
        tasks = task_list(args.tasks) if args.tasks else config.tasks
        self.env = Env(tasks, config.cameras, randomize=randomize[0])
        self.camera = Room(self.env.model, size)

    def reset(self, seed, sentence=None):
        """Another scene, with its own sentence unless there is another."""
        self.obs, _ = self.env.reset(seed)
        like = self.env.cameras[min(self.env.cameras)]
        self.camera.light = like.light
        self.camera.strength = like.strength
        self.camera.refit()
        self.done = False
        self.scored = True
        if self.policy:
            self.policy.reset()
        if sentence is not None:
            self.tell(sentence)

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

    def views(self, attention):
        """What the policy sees, (V, 64, 64, 3) uint8, and where its pointers look, if asked for."""
        views = np.stack([self.obs[f"{name}_image"] for name in self.env.cameras])
        if attention:
            _, heat, _ = look_inside(self)
            views = views // 3  # darker
            views[..., :2] += (160 * heat).byte().permute(0, 2, 3, 1).numpy()
        return views

    def picture(self):
        lines = [self.env.instruction, self.outcome()]
        if inside:
            lines.append("red: pointer to the thing; green: to the place")
        self.camera.show(self.env.data)
        return draw(self.camera.picture(), self.views(inside), lines)

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
    picture = scene.picture()
    actions, _, reading = look_inside(scene)
    config = scene.policy.config
    words = scene.env.instruction
    if config.text == "word":
        words = split(words)
    hand = scene.env.ee_pos + ACTION_SCALE * actions[:, :3].numpy().cumsum(0)  # (K, 3) m
    route = scene.camera.project(scene.camera.shown, hand) * size  # (K, 2) px
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplot_mosaic([["seen", "read"], ["seen", "done"]])
    seen, read, done = panels.values()
    seen.set_title("what it attends to, and the path it plans for the hand")
    seen.imshow(picture)
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


# ------------------------------------------------------------------------------------ browser
class Stage(Scene):
    """A scene in real time, for pages in a browser. Whoever reads or changes it holds `lock`."""

    STIFFNESS, DAMPING = 100, 20  # 1/s^2 and 1/s, of the spring between mouse and block
    HOVER, LIFT = 0.01, 0.15  # m that a block is raised by: always, and with Shift

    def __init__(self):
        super().__init__()
        self.learned = self.policy
        self.history = deque(maxlen=30)  # [sentence, how it was understood, outcome]
        self.times = deque([time.perf_counter()], maxlen=2 * CONTROL_HZ)  # s, of control steps
        self.slower = 1
        self.attention = args.attention
        self.number, self.frame = 0, ""
        self.lock, self.drawn = threading.Lock(), threading.Condition()
        self.wanted = threading.Event()

    # -- what a page asks for: do() with one of these names, and what they take
    COMMANDS = "say", "scene", "expert", "slow", "look", "turn", "grab", "drag", "drop"

    def do(self, command, *values):
        if command not in self.COMMANDS:
            raise ValueError(f"no command {command!r}")
        with self.lock:
            return getattr(self, command)(*values)

    def say(self, sentence):
        sentence = str(sentence)
        try:
            self.tell(sentence)
        except ValueError as error:
            self.history.append([sentence, str(error), ""])
            return
        task, slots = self.env.request
        words = " ".join([task, *slots.values()])
        self.entry = [sentence, words if self.scored else "in the policy's own way", ""]
        self.history.append(self.entry)

    def scene(self, seed, randomize):
        """Another one, which waits for a sentence."""
        seed = number(int, 0, 2**31)(seed)
        self.env.set_randomize(randomize)
        self.reset(seed)
        self.done = True
        self.held, self.height = None, 0
        rng = np.random.default_rng(seed)
        requests = [self.env.draw_request(rng, (task,)) for task in self.env.tasks]
        self.examples = [make_instruction(request, rng) for request in requests if request]

    def expert(self, chosen):
        """Who is to act. Raises ValueError if that one cannot read what was said last."""
        if chosen:
            parse_instruction(self.env.instruction)
        elif self.learned:
            self.learned.understands(self.env.instruction)
            self.learned.reset()
        self.policy = None if chosen else self.learned

    def slow(self, times):
        self.slower = number(float, 1, 10)(times)

    def look(self, chosen):
        self.attention = bool(chosen and getattr(self.learned, "pointers", None))

    def turn(self, azimuth, elevation):
        self.camera.turn(*[number(float, -1e3, 1e3)(angle) for angle in (azimuth, elevation)])

    def pixel(self, x, y):
        return [int(np.clip(value, 0, 1) * (size - 1)) for value in (x, y)]

    def grab(self, x, y):
        """Takes the block at this place of the picture, 0..1; returns whether there is one."""
        x, y = self.pixel(x, y)
        geom = self.camera.geom[y, x]
        if geom in self.env.block_geom:
            self.held = self.env.model.geom_bodyid[geom]
            self.goal = self.env.data.xpos[self.held] + [0, 0, self.HOVER]
            self.height = self.goal[2]
        return geom in self.env.block_geom

    def drag(self, x, y, lift):
        point = self.camera.on_plane(*self.pixel(x, y), self.height)
        self.goal = (point + [0, 0, self.LIFT * bool(lift)]).clip(*WORKSPACE)

    def drop(self):
        self.held = None

    # -- what goes on by itself
    def live(self):
        """Moves the robot in real time, for ever."""
        env, due = self.env, time.perf_counter()
        while True:
            with self.lock:
                env.data.xfrc_applied[:] = 0
                if self.held is not None:
                    pull = self.STIFFNESS * (self.goal - env.data.xpos[self.held])
                    pull -= self.DAMPING * env.data.cvel[self.held, 3:] + env.model.opt.gravity
                    mass = env.model.body_mass[self.held]
                    env.data.xfrc_applied[self.held, :3] = mass * pull
                if self.done:
                    still = np.eye(len(ACTION_NAMES))[3] * env.data.ctrl[env.grip]
                    self.obs, *_ = env.step(still)
                else:
                    self.step()
                    self.entry[2] = self.outcome()
            now = time.perf_counter()
            self.times.append(now)
            due = max(due + self.slower / CONTROL_HZ, now)
            time.sleep(max(due - now, 0.001))  # s; others want the lock, too

    def draw(self):
        """Makes a frame when one is wanted, for ever; drawing may take longer than a step."""
        while True:
            self.wanted.wait()
            self.wanted.clear()
            with self.lock:
                self.camera.show(self.env.data)
                views = self.views(self.attention and self.policy)
                frame = dict(
                    number=self.number + 1,
                    seed=self.env.seed,
                    rate=(len(self.times) - 1) / (self.times[-1] - self.times[0] + 1e-9),
                    history=list(self.history),
                    examples=self.examples,
                    angles=self.camera.angles,
                    expert=self.policy is None,
                    slow=self.slower > 1,
                    look=self.attention,
                    randomize=self.env.randomize,
                )
            frame["pictures"] = [encode(view) for view in (self.camera.picture(), *views)]
            with self.drawn:
                self.number, self.frame = frame["number"], json.dumps(frame)
                self.drawn.notify_all()

    def next_frame(self, number):
        """The first one after this, as JSON."""
        self.wanted.set()
        with self.drawn:
            self.drawn.wait_for(lambda: self.number > number, 5)
            return self.frame


def encode(picture):
    """A picture as an address that holds it all."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Page(BaseHTTPRequestHandler):
    """One connection of a browser."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers are not to wait
    timeout = 60  # s
    REFUSED = ValueError, TypeError, ArithmeticError, RecursionError, argparse.ArgumentTypeError

    def answer(self, content, kind="application/json", status=200):
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", len(body))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def handle(self):
        with suppress(ConnectionError):  # the page was closed
            super().handle()

    def parse_request(self):
        """Refuses what another site makes a browser send: a name that leads here by DNS rebinding,
        or a foreign Origin."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            name = urlsplit(f"//{host}").hostname
            own = name in ("localhost", (args.host or "").lower()) or ipaddress.ip_address(name)
        except ValueError:
            own = False
        if not own or origin not in (None, f"http://{host}"):
            self.send_error(403)
            return False
        return True

    def do_GET(self):
        address = urlsplit(self.path)
        if address.path == "/":
            page = Path(__file__).parent / "assets/play.html"
            self.answer(page.read_text("utf-8"), "text/html")
        elif address.path == "/frame" and re.fullmatch("[0-9]{1,15}", address.query):
            self.answer(self.server.stage.next_frame(int(address.query)))
        else:
            self.send_error(404)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,4}", length):
            return self.send_error(413)
        try:
            result = self.server.stage.do(*json.loads(self.rfile.read(int(length))))
        except self.REFUSED as error:
            return self.answer(str(error), "text/plain", 400)
        self.answer(json.dumps(result))

    def log_message(self, *_):
        """Nothing is printed of each request."""


def serve(seed):
    """A page in the browser, until Ctrl-C."""
    stage = Stage()
    stage.scene(seed, *randomize)
    if args.instruction:
        stage.say(*said)
    host = args.host or "127.0.0.1"
    port = 8000 if args.port is None else args.port
    try:
        server = ThreadingHTTPServer((host, port), Page)
    except OSError as error:
        raise ValueError(f"no page at {host}:{port} ({error}); try --port 0") from None
    server.stage = stage
    for work in (server.serve_forever, stage.draw):
        threading.Thread(target=work, daemon=True).start()
    address = f"http://{host}:{server.server_port}"
    print(f"{address} (Ctrl-C ends)", flush=True)
    if not args.no_browser and "SSH_CONNECTION" not in os.environ:
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    stage.live()


# ------------------------------------------------------------------------------------- script
if args.data:
    try:
        with h5py.File(args.data) as file:
            save([demonstration(file[f"episode_{args.episode}"])], args.out)
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{args.data} is not a data file of gen_data.py, or has no "
            f"--episode {args.episode} ({error})"
        ) from None
    sys.exit()

first = args.seed[0]
if page:
    serve(first)
scene = Scene()
if args.episodes:
    count_attention(scene, range(first, first + args.episodes))
elif args.pipeline:
    scene.reset(first, *said)
    draw_pipeline(scene, args.out)
else:
    films = []
    for seed, sentence, amount in zip(args.seed, cycle(said), cycle(randomize)):
        scene.env.set_randomize(amount)
        scene.reset(seed, sentence)
        films.append(scene.film())
    save(films, args.out)
