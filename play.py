"""Watch the policy obey sentences. A few seconds a scene.

    python play.py                                         # type sentences in a browser
    python play.py --seed 3,4,5,6 --out grid.gif           # each scene with its own sentence
    python play.py --instruction "put the blue block on the red target" --out rollout.gif
    python play.py --seed 3 --attention --out sheet.png    # a contact sheet, with where it looks

Without --out a page opens in the browser, where you type sentences and drag blocks while the robot
moves: Stage.step. Over SSH forward its port. A picture shows the room and beside it all that the
policy sees; for that eval.py's play() plays the scene.
"""

import argparse
import copy
import io
import json
import os
import textwrap
import threading
import time
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil, cos, sin
from pathlib import Path

import mujoco
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval import play
from gen_data import ACTION_NAMES, CONTROL_HZ, GRIPPER_OPEN, LIGHT, WORKSPACE
from gen_data import Env, RayCamera, cast, explain_errors, pick
from model import VLA

EXAMPLES = dict(  # what a person might say, offered on the page
    pick_place="put the {block} block on the {pad} pad",
    lift="pick up the {block} block",
    push="push the {block} block {direction}",
    stack="stack the {block} block on the {lower} one",
    drawer="{way} the drawer",
)


# ----------------------------------------------------------------------------------- pictures
class Room(RayCamera):
    """A wide view of a scene, from anywhere around it, with shadows on the table."""

    MIDDLE = np.array([0.36, 0, 0.2])  # m, what it looks at
    DISTANCE = 1.5  # m
    SUN = MIDDLE + 5 * LIGHT  # m, where shadows come from
    SHADE = 0.65  # of the light that is left in them

    def __init__(self, model, size):
        super().__init__(model, "front", size)
        self.shown = mujoco.MjData(model)
        self.geom = np.full((size, size), -1)  # until there is a picture
        self.turn(-0.6, 0.5)

    def turn(self, azimuth, elevation):
        """Where it looks from, rad."""
        self.angles = azimuth, min(max(elevation, 0.1), 1.5)
        up, level = sin(self.angles[1]), cos(self.angles[1])
        back = np.array([level * cos(azimuth), level * sin(azimuth), up])
        right = np.array([-sin(azimuth), cos(azimuth), 0])
        # as MuJoCo's cameras have
        self.axes = np.stack([right, np.cross(back, right), back], 1)

    def show(self, env):
        """Remembers where everything is and its looks, for picture(), maybe in another thread."""
        self.model = copy.copy(env.model)
        mujoco.mj_copyData(self.shown, self.model, env.data)
        self.shown.cam_xpos[self.id] = self.MIDDLE + self.DISTANCE * self.axes[:, 2]
        self.shown.cam_xmat[self.id] = self.axes.ravel()

    def picture(self):
        """(size, size, 3) uint8"""
        image = self.render(self.shown)
        table = np.flatnonzero(self.geom == self.TABLE)
        rays = self.on_plane(table, 0) - self.SUN
        dark = table[cast(self.model, self.shown, self.SUN, rays)[0] > self.TABLE]
        flat = image.reshape(-1, 3)
        flat[dark] = flat[dark] * self.SHADE
        return image

    def on_plane(self, pixels, height):
        """World points (n, 3) m, so high, that are seen at these pixels (n,)."""
        rays = self.rays(self.shown)[pixels]
        eye = self.shown.cam_xpos[self.id]
        return eye + (height - eye[2]) / np.minimum(rays[:, 2:], -0.05) * rays


def look_inside(policy, obs, sentence):
    """How much each pointer looks at each pixel, (V, 2, H, W), in one forward pass."""
    attention = policy.look([obs], sentence)["attention"][0].exp()  # (2, P)
    side = policy.vision.side
    grid = attention.unflatten(1, (-1, side, side)).transpose(0, 1)  # (V, 2, side, side)
    return torch.nn.functional.interpolate(grid, policy.config.image_size).numpy()


def views_of(obs, policy=None, sentence=None):
    """What the policy sees, one picture above the other; with a policy, where its pointers look:
    red is the thing, green its place."""
    views = np.stack([image for key, image in obs.items() if key.endswith("_image")])
    if policy:
        heat = look_inside(policy, obs, sentence).transpose(0, 2, 3, 1)
        views = views // 3  # darker
        views[..., :2] += (160 * heat).astype(np.uint8)
    return np.concatenate(views)


def sheet_of(room, views, text):
    """One picture: the room, beside it the policy's views, text under it."""
    size = len(room)
    views = Image.fromarray(views)
    views = views.resize((size * views.width // views.height, size), Image.NEAREST)
    sheet = Image.new("RGB", (size + views.width, size + size // 5), "white")
    sheet.paste(Image.fromarray(room))
    sheet.paste(views, (size, 0))
    font = ImageFont.load_default(size // 18)
    ImageDraw.Draw(sheet).text((4, size + 2), textwrap.fill(text, 50), "black", font)
    return sheet


def understand(policy, sentence):
    """What the policy reads in a sentence, (task, slots). Raises ValueError if it declines it."""
    request = policy.request(sentence)
    if not request:
        raise ValueError(f"the policy reads nothing in {sentence!r} that it was taught")
    return request


def film(policy, env, seed, args):
    """Pictures of a scene being played by the policy; with --expert by the expert, who is told what
    the policy reads in the sentence."""
    room = Room(env.model, args.size)
    pictures, options = [], None
    if args.instruction:
        task, slots = understand(policy, args.instruction)
        options = dict(task=task, slots=slots)

    def watch(obs):
        room.show(env)
        sentence = args.instruction or env.instruction
        views = views_of(obs, policy if args.attention else None, sentence)
        pictures.append(sheet_of(room.picture(), views, sentence))

    actor = "expert" if args.expert else policy
    result = play(actor, env, seed, options, wording=args.instruction, watch=watch)
    print(
        f"scene {seed}, {result['told']!r}: {'done' if result['success'] else 'not done'}"
    )
    return pictures


def tile(pictures, columns):
    """Pictures of one size on a sheet, row by row."""
    width, height = pictures[0].size
    rows = ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save(films, path):
    """Writes films, each a list of pictures, side by side to a .gif, or a few moments to a .png."""
    columns = ceil(len(films) ** 0.5)
    last = max(map(len, films)) - 1
    # The last picture of each stays, that of the longest film for a second.
    films = [film + film[-1:] * (last + CONTROL_HZ - len(film)) for film in films]
    frames = [tile(pictures, columns) for pictures in zip(*films)]
    if path.suffix == ".png":
        moments = np.linspace(0, last, 8).astype(int)
        frames = [tile([frames[moment] for moment in moments], 4)]
    path.parent.mkdir(parents=True, exist_ok=True)
    step = 1000 // CONTROL_HZ  # ms
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=step)
    print(path)


# ------------------------------------------------------------------------------------ browser
class Stage:
    """A scene in real time, for pages in a browser. Whoever reads or changes it holds `lock`."""

    STIFFNESS, DAMPING = 100, 20  # 1/s^2 and 1/s, of the spring between mouse and block
    HOVER, LIFT = 0.01, 0.15  # m that a block is raised by: always, and with Shift

    def __init__(self, policy, env, size):
        self.policy, self.env, self.room = policy, env, Room(env.model, size)
        self.lock = threading.Lock()
        self.drawing = threading.Lock()  # of several pages, one at a time draws the room
        self.history = []  # entries [sentence, what the policy read in it, outcome]
        self.looking = False  # whether to show where the policy looks

    # -- what a page may ask for: the name without do_, and the arguments
    def do_say(self, sentence):
        """Gives the policy a sentence. If it declines it, or what it reads is not there, that is a
        ValueError, and all goes on as before."""
        request = understand(self.policy, sentence)
        self.env.set_request(request, sentence)
        task, slots = request
        self.entry = [sentence, " ".join([task, *slots.values()]), ""]
        self.history.append(self.entry)
        self.obs = self.env.observe()
        self.policy.reset()
        self.busy = True

    def do_scene(self, seed, randomize):
        """Another scene, which waits for a sentence."""
        self.env.randomize = float(randomize)
        self.obs, _ = self.env.reset(seed)
        self.busy = False  # whether the policy acts
        self.held = None  # the body that the mouse holds
        self.examples = []
        rng = np.random.default_rng(self.env.seed)
        for task in self.env.tasks:
            requests = self.env.requests(task)
            if requests and task in EXAMPLES:
                _, slots = pick(requests, rng)
                self.examples.append(EXAMPLES[task].format(**slots))

    def do_look(self, chosen):
        self.looking = chosen

    def do_turn(self, azimuth, elevation):
        self.room.turn(azimuth, elevation)

    def pixel(self, x, y):
        """The number of the room's pixel at this place of the picture, 0..1."""
        x, y = np.clip([x, y], 0, 1) * (self.room.size - 1)
        return int(y) * self.room.size + int(x)

    def do_grab(self, x, y):
        """Takes the block there, if there is one; returns whether."""
        geom = self.room.geom.flat[self.pixel(x, y)]
        if geom not in self.env.thing_geom[: self.env.n_blocks]:
            return False
        self.held = self.env.model.geom_bodyid[geom]
        # m, where it is drawn to
        self.goal = self.env.data.xpos[self.held] + [0, 0, self.HOVER]
        self.height = self.goal[2]
        return True

    def do_drag(self, x, y, lift):
        point = self.room.on_plane([self.pixel(x, y)], self.height)[0]
        if lift:
            point[2] += self.LIFT
        self.goal = point.clip(*WORKSPACE)

    def do_drop(self):
        self.held = None

    # -- what goes on by itself
    def step(self):
        env = self.env
        env.data.xfrc_applied[:] = 0
        if self.held is not None:
            pull = self.STIFFNESS * (self.goal - env.data.xpos[self.held])
            pull -= self.DAMPING * env.data.cvel[self.held, 3:] + env.model.opt.gravity
            env.data.xfrc_applied[self.held, :3] = env.model.body_mass[self.held] * pull
        action = np.zeros(len(ACTION_NAMES))  # stays as it is
        action[-1] = env.data.ctrl[7] - GRIPPER_OPEN / 2
        if self.busy:
            action = self.policy.predict(self.obs, env.instruction)
        self.obs, _, terminated, truncated, info = env.step(action)
        if self.busy:
            self.busy = not (terminated or truncated)
            self.entry[2] = (
                f"{env.steps / CONTROL_HZ:.1f} s{': done' if info['success'] else ''}"
            )

    def live(self):
        """Moves the robot in real time, forever."""
        while True:
            start = time.perf_counter()
            with self.lock:
                self.step()
            left = 1 / CONTROL_HZ - (time.perf_counter() - start)
            time.sleep(max(left, 0.001))  # s; others want the lock, too

    def state(self):
        return dict(
            seed=self.env.seed,
            randomize=self.env.randomize,
            history=self.history[-30:],
            examples=self.examples,
            angles=self.room.angles,
            look=self.looking,
        )

    def picture(self, name):
        """The room, or the views of the policy, as JPEG."""
        if name == "room":
            with self.drawing:
                with self.lock:
                    self.room.show(self.env)
                picture = self.room.picture()
        else:
            with self.lock:
                policy = self.policy if self.looking else None
                picture = views_of(self.obs, policy, self.env.instruction)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=0)
        return file.getvalue()


class Page(BaseHTTPRequestHandler):
    """One request of a browser: the page, its pictures as a stream, its state, or a command."""

    def answer(self, body, kind="application/json", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)

    def parse_request(self):
        """Refuses what another site makes a browser send: a foreign Origin, or DNS rebinding."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        own = self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        if own and host.rsplit(":", 1)[0] in self.server.names:
            return True
        self.send_error(403)
        return False

    def do_GET(self):
        stage = self.server.stage
        if self.path == "/":
            page = Path(__file__).with_name("assets") / "play.html"
            self.answer(page.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/state":
            with stage.lock:
                state = json.dumps(stage.state())
            self.answer(state.encode())
        elif self.path in ("/room", "/views"):
            self.send_response(200)
            self.send_header(
                "Content-Type", "multipart/x-mixed-replace; boundary=picture"
            )
            self.end_headers()
            while True:
                picture = stage.picture(self.path[1:])
                head = f"--picture\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")
                time.sleep(1 / CONTROL_HZ)
        else:
            self.send_error(404)

    def do_POST(self):
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            command, *values = json.loads(body, parse_constant=int)  # which refuses NaN
            with self.server.stage.lock:
                result = getattr(self.server.stage, f"do_{command}")(*values)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            return self.answer(str(error).encode(), "text/plain", 400)
        self.answer(json.dumps(result).encode())

    def handle(self):
        with suppress(ConnectionError):  # the page was closed
            super().handle()

    def log_message(self, *_):
        """Prints nothing about a request."""


def serve(stage, args):
    """A page in the browser, until Ctrl-C."""
    try:
        server = ThreadingHTTPServer((args.host, args.port), Page)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{args.host}:{args.port}: {error}; --port 0 takes a free one")
    server.stage = stage
    server.names = "localhost", "127.0.0.1", args.host
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://{args.host}:{server.server_port}"
    print(f"{address} (Ctrl-C ends)", flush=True)
    if not args.no_browser and "SSH_CONNECTION" not in os.environ:
        webbrowser.open(address)
    stage.live()


# ------------------------------------------------------------------------------------- script
if __name__ == "__main__":
    explain_errors()
    torch.set_num_threads(1)  # for one picture at a time, more only wait for each other
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", help="checkpoint (default out/ckpt.pt, else assets/ckpt.pt)")
    add(
        "--expert",
        action="store_true",
        help="film the expert, told what the policy reads",
    )
    add("--instruction", help="what to do (default: the scene's own sentence)")
    add("--seed", default="0", help="a scene, or with --out a comma list (default 0)")
    add(
        "--randomize",
        type=float,
        default=0.0,
        help="how much the world differs (default 0)",
    )
    add(
        "--attention",
        action="store_true",
        help="show where the policy looks, red and green",
    )
    add("--out", type=Path, help="write a .gif, or a .png, which is a contact sheet")
    add(
        "--size",
        type=int,
        default=480,
        help="px, edge of the room's picture (default 480)",
    )
    add(
        "--port",
        type=int,
        default=8000,
        help="of the page (default 8000); 0 takes a free one",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="of the page (default 127.0.0.1: this machine alone)",
    )
    add("--no_browser", action="store_true", help="only print the page's address")
    args = parser.parse_args()
    policy = VLA.load(args.ckpt)
    if policy.config.model == "bc" or args.attention and not policy.pointers:
        raise ValueError(f"{policy.path} hears no sentences, or has no pointers to show")
    env = Env(policy.config.tasks, policy.config.cameras, randomize=args.randomize)
    seeds = [int(seed) for seed in args.seed.split(",")]
    if not args.out:
        stage = Stage(policy, env, args.size)
        stage.do_scene(seeds[0], args.randomize)
        if args.instruction:
            stage.do_say(args.instruction)
        serve(stage, args)  # forever
    if args.out.suffix not in (".gif", ".png"):
        raise ValueError(f"--out must end in .gif or .png, not {args.out}")
    save([film(policy, env, seed, args) for seed in seeds], args.out)
