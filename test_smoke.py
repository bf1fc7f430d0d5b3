"""The tests: the real scripts at toy size, and what their parts promise. No OpenGL, no display.

    python -m pytest -q test_smoke.py                          # minutes on 2 cores

Scripts run in this process, since importing torch for each would take longest. They have processes
of their own where that is the point: what an import does, kill, Ctrl-C, exit status.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize as lexer
from pathlib import Path
from unittest import mock
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent
# One thread: at this size two only wait for each other, and sums have one order.
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gen_data
from gen_data import (
    CAMERAS,
    CHANGED,
    NAMES,
    SLOTS,
    SPLITS,
    TASKS,
    TEST_SEED,
    Env,
    expert,
    grammar,
)
from gen_data import is_held_out, make_wording, project, slots_of
from model import CHOICES, VLA, Config, Mixture, ngrams, split, tokenize

# Code tokens, without comments and docstrings, that each file may have. They only ever go down: what
# is new pays for itself.
BUDGET = dict(
    gen_data=8_000, model=5_500, train=5_200, eval=2_100, play=3_200, test_smoke=7_000
)
LINES = 3_000  # that are not blank, of the five scripts together

TRAIN = "train.py --data demos --device cpu --steps 6 --batch_size 8 --eval_interval 1 --eval_episodes 0"
SHIPPED = ROOT / "assets/ckpt.pt"
FRONT = "observations/front_image"
SENTENCES = [
    "pick up the red block and place it at the green target",
    "pick up the blue block and place it at the green target",
]


# ------------------------------------------------------------------------- running the scripts


def run(command, status=0):
    """Runs a script in this process to its end, which should be with this exit status; returns its
    globals, and as `said` what it printed."""
    script, *flags = shlex.split(command)
    said = io.StringIO()
    found, end = {}, 0
    ctrl_c = signal.getsignal(signal.SIGINT)
    with (
        mock.patch.multiple(
            sys, argv=[script, *flags], path=["", *sys.path], excepthook=None
        ),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            found = runpy.run_path(f"{ROOT}/{script}", run_name="__main__")
        except SystemExit as stop:
            end = stop.code or 0
        except (ValueError, OSError, KeyError, MemoryError) as error:
            if not status:
                raise
            end = 2  # explain_errors() makes these one sentence
            print(error)
    signal.signal(signal.SIGINT, ctrl_c)
    torch.set_flush_denormal(False)
    assert end == status, said.getvalue()
    return found | dict(said=said.getvalue())


@contextlib.contextmanager
def process(command):
    """A script in a process of its own, and of its own group, which is killed at the end."""
    script, *flags = shlex.split(command)
    running = subprocess.Popen(
        [sys.executable, ROOT / script, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield running
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


def interrupt(running):
    """Ctrl-C, which ends it with status 130; returns what it says then."""
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    return said


def read_until(running, word):
    """The first line of what it says with `word` in it."""
    for line in running.stdout:
        if word in line:
            return line
    raise AssertionError(f"it never said {word!r}")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with 50 demonstrations of all tasks in changed worlds, and in out/ a policy that had
    six steps of training."""
    folder = tmp_path_factory.mktemp("toy")
    with contextlib.chdir(folder):
        run("gen_data.py --tasks all --randomize 1 --episodes 50 --workers 2 --out demos")
        run(TRAIN)
    return folder


def read_log(folder):
    return [
        json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """A folder of its own, with these demonstrations and a copy of that policy in toy/."""
    (tmp_path / "demos").symlink_to(toy / "demos")
    shutil.copytree(toy / "out", tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder):
    """When each of its files was written, ns."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def episodes_of(folder):
    """The episodes of all its files, in the order in which train.py has them."""
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            yield from [file[name] for name in file if name.startswith("episode_")]


def same(a, b):
    """Whether two dicts of arrays are the same to the last bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------- size
def count_tokens(path):
    """Python's tokens, without comments, docstrings, newlines and indentation."""
    layout = "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()
    count = 0
    with open(path, "rb") as file:
        for kind, *_, line in lexer.tokenize(file.readline):
            count += lexer.tok_name[kind] not in layout and not line.lstrip().startswith(
                '"""'
            )
    return count


def test_size():
    """It is a feature: who adds something takes something else away."""
    tokens = {name: count_tokens(ROOT / f"{name}.py") for name in BUDGET}
    assert not [name for name in BUDGET if tokens[name] > BUDGET[name]], tokens
    del tokens["test_smoke"]
    text = "".join((ROOT / f"{name}.py").read_text() for name in tokens)
    assert len(re.findall(r"\S.*", text)) <= LINES


# --------------------------------------------------------------------------------- the world
@pytest.mark.parametrize("module, stranger", [("gen_data", "torch"), ("model", "mujoco")])
def test_import_does_no_work(module, stranger, tmp_path):
    code = f"import os, sys, {module}; print({stranger!r} in sys.modules, os.listdir())"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path)
    assert said == b"False []\n"


def test_culled_picture_equals_full_ray_cast():
    env = Env(cameras=CAMERAS, randomize=1.0)
    env.reset(1)
    right = []  # whether a block is seen where its camera matrix says it is
    for _ in range(12):
        for _ in range(5):
            env.step(expert(env))
        for camera in env.cameras.values():
            culled = camera.render(env.data)
            uv, _ = project(env.block_pos, camera.matrix(env.data))
            x, y = (64 * uv).astype(int).clip(0, 63).T
            right.append(camera.geom[y, x] == env.thing_geom[: env.n_blocks])
            with mock.patch.object(
                camera, "_pixels_to_cast", lambda data: np.arange(64 * 64)
            ):
                assert np.array_equal(culled, camera.render(env.data))
    assert np.mean(right) > 0.6  # others are outside or hidden


@pytest.mark.parametrize("randomize", [0.0, 1.0])
def test_a_scene_is_a_function_of_its_seed(randomize):
    used, new = Env(randomize=randomize), Env(randomize=randomize)
    used.reset(3)
    for env in (used, new):
        obs, _ = env.reset(TEST_SEED)
        env.seen = [obs, *[env.step(expert(env))[0] for _ in range(20)]]
    assert all(map(same, used.seen, new.seen))


@pytest.mark.parametrize("randomize", [0.0, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_expert_does_what_the_sentence_says_and_nothing_else(task, randomize):
    env = Env(tuple(TASKS), (), randomize=randomize)
    for seed in range(4):
        env.reset(seed, dict(task=task))
        over = False
        while not over:
            _, _, success, over, info = env.step(expert(env))
            over |= success
        assert info["success"] and info["touched"] == info.get("block")
        done = []
        for other in {*TASKS} - {"drawer"} | {
            task
        }:  # it may always have been open or shut
            for slots in slots_of(other, env.words):
                if TASKS[other].success(env, *env.resolve(slots)):
                    done.append((other, slots))
        assert done == [env.request]


# From where it began to where the block is put, m, one after the other.
PUSHES = """\
0 -0.09 0 wrong
0.09 0 0 wrong
0.06 0.09 0 wrong
0 0.09 0 done
0 0.09 0.05 lifted
0 0.09 0 it-was-lifted
"""


def test_push_is_along_its_direction_and_on_the_table():
    env = Env(("push",), ())
    env.reset(1, dict(slots=dict(direction="left")))
    at = env.data.qpos[9 + 7 * env.meaning[0] :][:3]
    begin = at.copy()
    for row in PUSHES.splitlines():
        *move, done = row.split()
        at[:] = begin + np.array(move, float)
        env.step([0, 0, 0, 1])
        assert TASKS["push"].success(env, *env.meaning) == (done == "done"), row


@pytest.mark.parametrize("part", SPLITS)
def test_splits(part):
    """Held-out combinations are asked for in their own split and nowhere else."""
    env = Env(("pick_place", "stack", "push"), (), split=part)
    for seed in range(12):
        env.reset(seed)
        assert is_held_out(*env.request) == (part == "combo")


def test_grammar():
    """Each request has very many wordings; what is held out is never heard in training."""
    rng = np.random.default_rng(0)
    words = {}
    for held_out in (False, True):
        words[held_out] = " ".join(
            " ".join(texts) for texts in grammar(held_out).values()
        )
    secret = {*split(words[True])} - {*split(words[False])}
    assert len(secret) > 20
    for task in TASKS:
        for slots in slots_of(task, SLOTS)[::9]:
            for held_out in words:
                said = {make_wording(task, slots, rng, held_out) for _ in range(300)}
                assert len(said) > (130 if held_out else 270)
                names = {"{%s}" % slot for slot in slots if slot in NAMES}
                assert not [
                    text for text in said if {*re.findall("{.*?}", text)} != names
                ]
                said = " ".join(said)
                assert not re.search(r"[<>()|*]", said)
                assert secret.isdisjoint(split(said)) != held_out


FACTORS = f"light_dir light_diffuse {CHANGED}"


def factors(env):
    """What of scene 5 --randomize changes, by name, and what it leaves as it is."""
    obs, info = env.reset(5)
    world = {name: getattr(env.model, name).copy() for name in FACTORS.split()}
    world |= dict(table=world["geom_rgba"][0], tint=env.tint, noise=env.pixel_noise)
    places = env.thing_pos[:, :2].tolist()  # the handle, too
    scene = places, env.colors, info["instruction"]
    return world | dict(picture=obs["front_image"]), scene


def test_randomised_worlds_differ_in_every_factor_but_not_in_the_scene():
    env = Env(("push",), ("front",))
    normal, scene = factors(env)
    env.randomize = 1.0
    changed, again = factors(env)
    assert again == scene
    assert not [key for key in normal if np.array_equal(normal[key], changed[key])]
    late = set()  # whether a world is, and whether the hand moves at once
    for seed in range(12):
        env.reset(seed)
        before = env.command[1]
        env.step([0, 1, 0, 1])
        late.add((env.late, env.command[1] - before > 0.02))
    assert late == {(True, False), (False, True)}
    env.randomize = 0.0  # and nothing of it stays
    assert same(normal, factors(env)[0])


# ------------------------------------------------------------------------- the data file
LAYOUT = """actions (4,) float32
cameras/wrist (3, 4) float32
observations/front_image (64, 64, 3) uint8
observations/wrist_image (64, 64, 3) uint8
observations/joint_pos (7,) float32
observations/ee_pos (3,) float32
observations/ee_vel (3,) float32
observations/gripper (1,) float32
observations/object_pos (3,) float32
observations/target_pos (3,) float32"""


def test_data_file(toy):
    env = Env(tuple(TASKS))
    fresh = []  # whether a scene's first episode begins as its reset does: not after a mistake
    samples = interrupted = 0
    seen = set()  # scenes
    for episode in episodes_of(toy / "demos"):
        file, about = episode.file, dict(episode.attrs)
        request = about["task"], json.loads(about["slots"])
        samples += about["num_samples"]
        interrupted += about["interrupted"]
        assert file[episode.name.replace("/episode", "data/demo")] == episode
        for row in LAYOUT.splitlines():
            name, shape = row.split(" ", 1)
            array = episode[name]
            assert f"{array.shape[1:]} {array.dtype}" == shape
            assert len(array) == about["num_samples"]
        assert episode[FRONT].chunks[0] == 1
        assert (episode["rewards"][-1] == 1) != about["interrupted"]
        assert (
            not is_held_out(*request) and len(file[f"wordings/{about['intent']}"]) == 50
        )
        if about["scene_seed"] in seen:
            continue
        seen.add(about["scene_seed"])
        env.randomize = about["randomize"]
        env.reset(about["scene_seed"])
        env.pixel_noise = 0
        now = env.observe()
        assert env.request == request and env.instruction == about["instruction"]
        fresh.append(
            all(np.array_equal(episode[f"obs/{key}"][0], now[key]) for key in now)
        )
        assert not fresh[-1] or np.array_equal(episode["actions"][0], expert(env))
    assert 0 < interrupted < 25 and 0.3 < np.mean(fresh) < 0.9
    for path in (toy / "demos").iterdir():
        with h5py.File(path) as file:
            view = file["data"]
            samples -= view.attrs["total"]
            assert json.loads(view.attrs["env_args"])["type"] == 2 and len(view) == 25
    assert samples == 0


def test_a_killed_recording_carries_on_with_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (
        "gen_data.py --tasks lift,drawer --cameras front --seed 3 --episodes 28 --out"
    )
    before = {}
    with process(f"{command} killed --workers 2") as running:
        while ".h5" not in str(before):
            assert running.poll() is None
            before = written(tmp_path)
    run(f"{command} killed --workers 1")
    assert "28 demonstrations in 2 files" in run(f"{command} whole --workers 2")["said"]
    assert before.items() & written(tmp_path).items()  # what was there is not made twice
    for name in ("0000.h5", "0001.h5"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


# --------------------------------------------------------------------------------- the model
@pytest.fixture(scope="session")
def moments():
    """Four observations that both SENTENCES fit, and what the expert does, (2, 4, A). The robot's own
    state is the same in all, so that neither it nor the words nor the picture alone can tell what to
    do."""
    env = Env(cameras=CAMERAS)
    observations, actions = [], ([], [])
    for seed in range(99):
        obs, _ = env.reset(seed)
        if {"red", "blue"} <= {*env.words["block"]} and "green" in env.words["pad"]:
            robot = (observations or [obs])[0]
            observations.append(obs | {key: robot[key] for key in Config().state_keys})
            for block, column in zip(("red", "blue"), actions):
                env.set_request(("pick_place", dict(block=block, pad="green")), "")
                column.append(expert(env))
    return observations[:4], torch.tensor(np.array(actions))[:, :4]


def texts(model, sentences):
    text = [tokenize(sentence, model.config) for sentence in sentences]
    text = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
    return dict(text=text, true_text=text)


def make_batch(model, observations, sentence):
    """What VLA.forward takes; sentence: which of SENTENCES each moment has."""
    read = [model.read_observations([obs]) for obs in observations]
    batch = {name: torch.cat([moment[name] for moment in read]) for name in read[0]}
    return batch | texts(model, SENTENCES) | dict(number=torch.tensor(sentence))


def fit(model, loss, steps, rate):
    """Minimises loss(); returns the last one."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value


# More than one change, or one of a number; the names are in model.py's CHOICES.
VARIANTS = """\
keep_patches=80
frames=3
cameras=("front",)
cameras=("front", "wrist", "top")
patch=16
pointers=0
head="tokens", bins=16
head="continuous", head_layers=1, loss="mse"
head="continuous", ensemble=1
chunk=1
chunk=16, execute=3
state_keys=("joint_pos", "target_pos"), state_size=10
intents={}
width=64, heads=8, layers=1
model="bc", chunk=1
"""
VARIANTS = VARIANTS.splitlines()
VARIANTS += [f"{field}={name!r}" for field, names in CHOICES.items() for name in names]


@pytest.mark.parametrize("choice", VARIANTS)
def test_every_choice_builds_learns_saves_and_acts(choice, moments, tmp_path):
    torch.manual_seed(0)
    intents = {"pick_place": dict(block=None, pad=None), "none": {}}
    config = Config(**dict(intents=intents) | eval(f"dict({choice})"))
    model = CHOICES["model"][config.model](config)
    observations, actions = moments
    batch = make_batch(model, observations, [0, 1, 0, 1])
    batch["target"] = actions[0, :, None].repeat(1, config.chunk, 1)
    batch["valid"] = torch.ones(4, config.chunk, dtype=torch.bool)

    def loss():
        return sum(
            value.clamp_min(-100).square().mean() for value in model(batch).values()
        )

    fit(
        model, loss, 3, 1e-3
    )  # outputs start at zero: not all have a gradient at the first step
    assert not [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    model.half().float()  # a checkpoint may round parameters
    model.state_mean.fill_(1e5)  # more than fp16 holds
    model.save(tmp_path / "ckpt.pt", step=3, code="")
    loaded = VLA.load(tmp_path / "ckpt.pt")
    assert loaded.config == config
    model.eval()
    for obs in observations * 3:
        action = model.predict(obs, SENTENCES[0])
        loaded.look([obs], SENTENCES[0])  # changes nothing
        assert np.array_equal(action, loaded.predict(obs, SENTENCES[0]))


def test_a_mixture_does_one_or_the_other():
    """Where the median of what was shown is what nobody did."""
    torch.manual_seed(0)
    head, x, valid = Mixture(Config(), 3), torch.zeros(64, 3), torch.ones(64, 8)
    shown = torch.tensor([0.8, -0.8]).repeat(32)[:, None, None].expand(64, 8, 4)
    fit(head, lambda: head.error(x, shown, valid).mean(), 200, 3e-3)
    done = torch.cat([head(x[:1]) for head.dice in np.linspace(0, 0.99, 40)])
    assert torch.allclose(done, 0.8 * done[:, :1, :1].sign(), atol=0.1)
    assert 0.3 < (done > 0).float().mean() < 0.7


# Of chunks of four that say 0 1 2 3, 10 11 12 13, .., what is done in five steps, and then when the
# sentence is another.
ACTED = """\
{} | 0 1 10 11 20 30
{"execute": 1} | 0 10 20 30 40 50
{"execute": 3} | 0 1 2 10 11 20
{"ensemble": 1, "head": "flow"} | 0 5.477 10.94 16.387 26.387 50
"""


def test_acting_follows_the_config_and_listens():
    for row in ACTED.splitlines():
        settings, expected = row.split(" | ")
        model = VLA(Config(chunk=4, **json.loads(settings)))
        starts = itertools.count(0, 10)
        model.look = lambda *_: dict(
            actions=next(starts) + torch.arange(4.0)[None, :, None]
        )
        acted = [model.predict({}, sentence).item() for sentence in "aaaaab"]
        assert acted == pytest.approx([*map(float, expected.split())], abs=0.01)


def test_flow_steps_follow_the_config(moments):
    obs = moments[0][0]
    model = VLA(Config(head="flow"))
    before = model.look([obs], "go")["actions"]
    model.config.flow_steps = 1
    assert not torch.equal(model.look([obs], "go")["actions"], before)


def test_what_is_called_by_name_does_not_depend_on_the_other_name():
    """With other colours in the context, as in training, a pointer knows its own name alone."""
    model = VLA(Config())
    text = texts(model, SENTENCES)
    text["text"] = text["text"][:1].expand(2, -1, -1)
    found = model.encode_text(**text)
    assert torch.equal(*found["words"]) and not torch.allclose(*found["queries"])


def test_one_batch_overfits_by_looking_and_listening(moments):
    observations, actions = moments
    torch.manual_seed(0)
    model = VLA(Config(head="continuous"))
    batch = make_batch(model, observations * 2, [0] * 4 + [1] * 4)
    loss = lambda: (model(batch)["actions"][:, 0] - actions.flatten(0, 1)).abs().mean()
    error = fit(model, loss, 100, 3e-4)
    for axis in (0, 1):  # who is deaf, who is blind
        assert (
            error
            < 0.6 * (actions - actions.median(axis, keepdim=True).values).abs().mean()
        )
    acted = [
        model.look([obs], text)["actions"] for text in SENTENCES for obs in observations
    ]
    answer = model(batch)
    assert torch.allclose(torch.cat(acted), answer["actions"], atol=1e-4)
    thing = answer["goal"][:, :3].sum()  # from which its own pointer alone learns
    (moves,) = torch.autograd.grad(thing, answer["attention"])
    assert moves[:, 0].any() and not moves[:, 1].any()


def test_text():
    config, chars = Config(), Config(text="char")
    one, other = "Pick up the RED block, and don’t.", "pick up the red block and don't"
    assert torch.equal(tokenize(one, config), tokenize(other, config))
    right, wrong, other = [
        {*ngrams(word, 4096)} for word in ("purple", "purpel", "green")
    ]
    assert len(right & wrong) > len(right & other) + 2  # misspelt, but much like it
    assert (tokenize("red banana", chars) > 0).sum() == 10


def test_understanding_is_learned():
    torch.manual_seed(0)
    asked = ["lift the red block", "pick up the green cube please", "raise the blue one"]
    nothing = ["make me a coffee", "hello", "what is the red block"]
    model = VLA(Config(intents=dict(lift={}, none={})))
    text = texts(model, asked + nothing)
    truth = torch.tensor([0, 0, 0, 1, 1, 1])
    fit(
        model,
        lambda: F.cross_entropy(model.encode_text(**text)["intent"], truth),
        40,
        2e-3,
    )
    assert min(map(model.understands, [*asked, "lift the redd block"])) > 0.9
    assert max(map(model.understands, nothing)) < 0.1


REQUESTS = """\
put the red block on the green pad | pick_place red green
please move the yellow cube to the blue circle | pick_place yellow blue
lift the purple block | lift purple
pick up the green cube | lift green
push the red block to the left | push red left
shove the blue cube away from you | push blue forward
pull the green block back | push green back
slide the purple cube to your right | push purple right
stack the red block on the blue one | stack red blue
put the green block on top of the purple block | stack green purple
open the drawer | drawer open
shut the drawer please | drawer close
make me a coffee | None
what time is it | None
"""


def test_the_policy_that_is_shipped_reads_what_is_asked():
    vla = VLA.load(SHIPPED)
    for row in REQUESTS.splitlines():
        sentence, meaning = row.split(" | ")
        task, slots = vla.request(sentence) or ("None", {})
        assert " ".join([task, *slots.values()]) == meaning, sentence


def test_the_policy_that_is_shipped_does_it(here):
    command = f"eval.py --ckpt {SHIPPED} --episodes 10 --seed 0 --out"
    run(f"{command} a.json")
    run(f"{command} b.json --set execute=8")
    row, other = results("a.json")[0][-1], results("b.json")[0][-1]
    assert row["k"] >= 8 and row["n"] == 10 and row["steps"] != other["steps"]


# ----------------------------------------------------------------------------------- training
def test_training_is_a_function_of_its_seed_and_resumes_exactly(toy, here):
    with process(TRAIN) as running:
        read_until(running, "step     3")  # after the checkpoint
    assert 3 <= torch.load("out/resume.pt")["step"] < 6
    run("train.py --resume out")  # with the settings it began with
    assert read_log("out") == read_log("toy")
    assert same(
        *[torch.load(f"{folder}/ckpt.pt")["weights"] for folder in ("toy", "out")]
    )
    run("train.py --resume out --steps 8 --lr 0.01")  # but what is said goes first
    assert read_log("out")[-1]["lr"] == pytest.approx(0.01 * 8 / 50)


def test_a_stopped_training_saves(here):
    with process(f"{TRAIN} --steps 500") as running:
        read_until(running, "step     2")
        assert "--resume out carries on" in interrupt(running)
    step = VLA.load("out/ckpt.pt").step
    assert 2 <= step < 500 and read_log("out")[-1]["step"] == step


def test_overwrite_keeps_the_old_until_there_is_something_new(here):
    before = written(here)
    command = f"{TRAIN} --eval_interval 6 --out_dir toy --overwrite"
    said = run(f"{command} --adam_lr 1e30 --lr 1e30", status=2)["said"]
    assert re.search("the loss is .* at step .* is as it was", said)
    run(f"{command} --data toy/ckpt.pt", status=2)
    assert written(here) == before
    run(f"{command} --steps 1")
    assert VLA.load("toy/ckpt.pt").step == len(read_log("toy")) == 1


def test_pictures_actions_and_sentences_alone_are_enough(toy, here):
    """No intents, no wordings, no camera matrices, and pictures in any chunks."""
    with h5py.File("robot.h5", "w") as file:
        for i, episode in enumerate(episodes_of(toy / "demos")):
            group = file.create_group(f"data/demo_{i}")
            group.attrs["instruction"] = episode.attrs["instruction"]
            for key in ("actions", "observations/ee_pos", "observations/gripper", FRONT):
                group.create_dataset(key, data=episode[key][:], chunks=True)
        first = file[f"data/demo_0/{FRONT}"][:9]
    demos = run(f"{TRAIN} --data robot.h5 --steps 2")["demos"]
    assert np.array_equal(demos.pictures_of(torch.arange(9))[:, 0], first)
    vla = VLA.load("out/ckpt.pt")
    assert vla.config.state_keys == ("ee_pos", "gripper") and not vla.request("go")


# How far off labels may be, the median of a task: m of thing and place, px of where the thing is
# seen from the front. Nobody feels where a block that is pushed is.
MISSES = dict.fromkeys(TASKS, (0.02, 0.04, 2)) | dict(push=(0.05, 0.09, 4))


def test_hindsight_finds_what_the_simulator_knows(toy, here):
    demos = run(f"{TRAIN} --steps 1")["demos"]
    truth, tasks, interrupted = [], [], []
    for episode in episodes_of(toy / "demos"):
        thing = episode["observations/object_pos"][:]
        uv, _ = project(thing[:, None], episode["cameras/front"][:])
        truth.append(
            np.hstack([thing, episode["observations/target_pos"], 64 * uv[:, 0]])
        )
        tasks += [episode.attrs["task"]] * len(thing)
        interrupted += [episode.attrs["interrupted"]] * len(thing)
    uv = demos.uv[:, 0, 0].where(demos.uv[:, 0, 0] >= 0, np.nan)
    off = np.hstack([demos.goal, 64 * uv]) - np.concatenate(truth)
    assert np.isnan(off[interrupted, 3:6]).all()  # who knows where it would have gone
    for task in TASKS:
        for part, most in zip(
            np.split(off[np.equal(tasks, task)], [3, 6], 1), MISSES[task]
        ):
            miss = np.linalg.norm(part, axis=1)
            assert np.nanmedian(miss) < most and np.isfinite(miss).mean() > 0.5, task


def test_labels_of_pushes_and_of_pictures_that_move(here):
    """A hand that ends shut on nothing pushed what was ahead of it. Where a thing is seen moves
    with its picture."""
    script = run(f"{TRAIN} --steps 1")
    corners = np.array([[0, 0, 0.1], [0, 0, 0], [0.2, 0, 0]])
    way = np.concatenate(np.linspace(corners[:-1], corners[1:], 11, axis=1))
    thing, place, _ = script["hindsight"](way, np.zeros(22), np.ones(22, bool), True)
    assert (
        np.allclose(thing[[0, -1], 0], [0.15, 0.23], atol=0.03)
        and (thing[:15] == thing[0]).all()
    )
    assert np.allclose(place - thing, [0.1, 0, 0], atol=0.03)

    images = torch.zeros(8, 2, 64, 64, 3)  # one camera, two frames
    images[:, :, 30, 20] = 255
    uv = torch.tensor([20.5, 30.5]).expand(8, 2, 1, 2) / 64
    moved, seen, shift = script["shifted"](images, uv, 4)
    spots = moved[:, 1, :, :, 0].nonzero()[:, 1:]  # y, x
    assert torch.equal(seen[:, 0, 0].flip(1), (spots + 0.5) / 64)
    assert torch.equal(shift * 64, spots - torch.tensor([30, 20])) and shift.any()
    between = torch.tensor([3 / 8, 3.5 / 8]).expand(
        1, 2, 1, 2
    )  # two patches of the fourth row
    target = script["attention_target"](between, 8)[0, 1]
    assert target.nonzero()[:, 0].tolist() == [26, 27] and target[26] == target[27] == 0.5


def test_bc_trains_on_data_that_it_makes_and_is_scored(here):
    flags = "--recipe bc --episodes 8 --steps 30 --device cpu"
    run(f"train.py {flags} --eval_interval 15 --eval_episodes 1")
    first, last = read_log("out")
    assert last["loss"] < first["loss"] and [*here.glob("data/*/0000.h5")]
    bc = VLA.load("out/ckpt.pt")
    obs, _ = Env().reset(0)
    assert bc.config.state_size == 20
    assert np.array_equal(bc.predict(obs), bc.predict(obs, "anything"))


def test_classic_recipe(here):
    run(f"{TRAIN} --recipe classic --steps 2")
    known = dict(vision="vit", text="char", head="continuous", chunk=1)
    assert known.items() <= vars(VLA.load("out/ckpt.pt").config).items()


# --------------------------------------------------------------------- evaluating and playing
def results(name):
    """The rows in a file of eval.py, and its episodes."""
    found = json.loads(Path(name).read_text())
    return found["rows"], found["episodes"]


def test_eval(here, monkeypatch):
    """A row for each policy, control and task; the same scenes again give the same."""
    monkeypatch.setattr(gen_data, "MAX_STEPS", 50)
    command = (
        "eval.py --ckpt toy/ckpt.pt --tasks lift,drawer --episodes 2 --randomize 1 --out"
    )
    run(f"{command} all.json --policies expert,random,policy --controls")
    run(f"{command} again.json")
    rows, episodes = results("all.json")
    controls = (
        "expert random none blind blind_shuffled deaf deaf_shuffled swap retarget".split()
    )
    assert [row["control"] for row in rows[2::3]] == controls  # two tasks, and all
    assert rows[2]["k"] == rows[2]["n"] == 2 and rows[5]["k"] == 0
    assert rows[2]["low"] == pytest.approx(0.3424, abs=1e-3)  # n / (n + 1.96^2)
    told = {control: set() for control in controls}  # which sentences
    for episode in episodes:
        told[episode["control"]].add(episode["told"])
    assert told["expert"] == told["blind"] == told["blind_shuffled"] == told["none"]
    assert told["deaf"] == {""}
    for control in controls[-3:]:
        assert not told[control] & told["none"]
    assert results("again.json")[0] == rows[6:9]


def test_eval_in_other_words(here, monkeypatch):
    """Beside the same scenes in their own words, and how much is declined."""
    monkeypatch.setattr(gen_data, "MAX_STEPS", 5)
    lines = (
        "lift\tgrab the {block} cube",
        "drawer\tshut the drawer\tclose",
        "none\tmake tea",
    )
    Path("mine.tsv").write_text("\n".join(lines))
    run(f"eval.py --ckpt {SHIPPED} --instructions mine.tsv --out a.json")
    rows, episodes = results("a.json")
    assert rows[-1]["task"] == "none" and rows[-1]["k"] == 1
    told = " ".join(episode["told"] for episode in episodes[2:])
    assert re.fullmatch(r"grab the \w+ cube shut the drawer", told)


FILMS = """\
play.py --size 128 --seed 3 --out new/a.gif
play.py --size 128 --ckpt toy/ckpt.pt --seed 0,1 --attention --randomize 1 --out a.png
play.py --size 128 --expert --out a.gif
play.py --size 128 --instruction 'open the drawer' --out a.png
examples/inspect.py pass --ckpt toy/ckpt.pt --out a.png
examples/inspect.py data --data demos/0000.h5 --episode 1 --out a.gif
"""


@pytest.mark.parametrize("command", FILMS.splitlines())
def test_films(command, here, monkeypatch):
    monkeypatch.setattr(gen_data, "MAX_STEPS", 10)
    run(command)
    picture = Image.open(command.split()[-1])
    assert picture.width > 160 and np.std(picture.convert("L")) > 10
    assert command.endswith("png") or picture.n_frames > 5


@pytest.fixture(scope="module")
def page():
    """A function that asks play.py's page for something; returns status and answer."""
    command = f"play.py --ckpt {SHIPPED} --seed 3 --size 128 --port 0 --no_browser"
    with process(command) as running:
        address = read_until(running, "http").split()[0]

        def ask(path, command=None, **headers):
            body = None if command is None else json.dumps(command).encode()
            try:
                with urlopen(
                    Request(address + path, body, headers), timeout=20
                ) as answer:
                    return answer.status, answer.read(8000)
            except OSError as error:
                return getattr(error, "code", 0), error

        yield ask
        assert not interrupt(running)


def wait_for(ready):
    """Asks until it is so."""
    end = time.time() + 30
    while not ready():
        assert time.time() < end
        time.sleep(0.1)


def test_a_page_shows_a_sentence_being_obeyed(page):
    assert b"<script>" in page("/")[1]
    picture = page("/room")[1].partition(b"\r\n\r\n")[2]
    assert Image.open(io.BytesIO(picture)).size == (128, 128)
    page("/", ["scene", 4, 0.5])
    state = json.loads(page("/state")[1])
    page("/", ["say", state["examples"][1]])
    wait_for(lambda: b": done" in page("/state")[1])
    assert state["seed"] == 4


def test_a_page_moves_blocks_with_the_mouse(page):
    page("/", ["scene", 3, 0])
    page("/room")
    grab = lambda x, y: page("/", ["grab", x, y])[1] == b"true"
    grid = np.linspace(0.2, 0.8, 25)
    x, y = next((x, y) for x in grid for y in grid if grab(x, y))
    page("/", ["drag", x, y + 0.1, False])
    wait_for(lambda: page("/room") and grab(x, y + 0.1))


# Status, path, command, headers.
REFUSED = """\
[400, "/", 5, {}]
[400, "/", ["picture", "room"], {}]
[400, "/", ["say"], {}]
[400, "/", ["say", 5], {}]
[400, "/", ["say", "make me a coffee"], {}]
[400, "/", ["grab", 1, null], {}]
[400, "/", ["scene", -1, 0], {}]
[400, "/", ["scene", 3, NaN], {}]
[400, "/", ["turn", NaN, 0], {}]
[403, "/state", null, {"Origin": "http://example.com"}]
[403, "/", null, {"Host": "example.com"}]
[404, "/model.py", null, {}]
[200, "/state", null, {}]
"""


@pytest.mark.parametrize("row", REFUSED.splitlines())
def test_a_page_refuses(row, page):
    status, path, command, headers = json.loads(row)
    assert page(path, command, **headers)[0] == status


# ------------------------------------------------------------------------------- bad input
BAD = """\
gen_data.py --tasks juggle => 'juggle'
gen_data.py --cameras front,rear => 'rear'
gen_data.py --randomize 3 => --randomize
gen_data.py --seed -5 => --seed
gen_data.py --episodes 2 --workers 1 --out demos => other settings
gen_data.py --out text => text
train.py --data missing => missing
train.py --data demos --steps 0 => --steps
train.py --data cut.h5 => cut.h5
train.py --data text => text
train.py --data nan.h5 => demo_3/actions
train.py --data demos --cameras front,top => top
train.py --data demos --out_dir toy => --overwrite
train.py --data demos --steps 1 --out_dir . => disk
train.py --data demos --width 100 --heads 3 => width 100
train.py --data demos --patch 7 => patch 7
train.py --data demos --execute 9 => execute 9
train.py --data demos --head hand => 'hand'
train.py --resume demos => resume.pt
train.py --resume toy --width 64 => another configuration
eval.py --ckpt missing.pt => missing.pt
eval.py --ckpt cut.pt => cut.pt is not a checkpoint
eval.py --ckpt text => text is not a checkpoint
eval.py --ckpt pickle.pt => pickle.pt is not a checkpoint
eval.py --ckpt toy/ckpt.pt --episodes 0 => --episodes
eval.py --ckpt toy/ckpt.pt --tasks juggle => 'juggle'
eval.py --ckpt toy/ckpt.pt --split other => 'other'
eval.py --ckpt toy/ckpt.pt --split combo --tasks lift => no scene
eval.py --ckpt toy/ckpt.pt --episodes 1 --set execute=9 => execute 9
eval.py --ckpt toy/ckpt.pt --episodes 1 --set wings=2 => wings
eval.py --ckpt toy/ckpt.pt --instructions missing.tsv => missing.tsv
eval.py --ckpt toy/ckpt.pt --instructions text => text
eval.py --ckpt toy/ckpt.pt --episodes 1 --instructions long.tsv => longer than 40 words
eval.py --policies expert --episodes 1 --instructions long.tsv => polic
play.py --ckpt missing.pt --out a.gif => missing.pt
play.py --ckpt toy/ckpt.pt --out a.bmp => .gif
play.py --ckpt toy/ckpt.pt --out a.gif --seed three => 'three'
play.py --out a.gif --instruction 'make me a coffee' => 'make me a coffee'
play.py --no_browser --host 192.0.2.1 => address
examples/inspect.py data --data cut.h5 => cut.h5
examples/inspect.py data --data demos/0000.h5 --episode 99 => 0000.h5
"""


@pytest.fixture
def broken(here):
    """The folder with broken and foreign files added."""
    for whole, cut in (("demos/0000.h5", "cut.h5"), ("toy/ckpt.pt", "cut.pt")):
        Path(cut).write_bytes(Path(whole).read_bytes()[:100_000])
    shutil.copy("demos/0000.h5", "nan.h5")
    with h5py.File("nan.h5", "a") as file:
        file["episode_3/actions"][0] = np.nan
    torch.save(dict(config=here), "pickle.pt")
    Path("ckpt.pt.part").symlink_to("/dev/full")
    Path("text").write_text("neither a checkpoint nor data")
    Path("long.tsv").write_text("none\t" + "now " * 50)
    return here


@pytest.mark.parametrize("row", BAD.splitlines())
def test_bad_input_is_one_sentence(row, broken):
    before = written(broken)
    command, words = row.split(" => ")
    assert words in run(command, status=2)["said"].splitlines()[-1]
    assert written(broken) == before  # nothing overwritten, lost or left behind


def test_a_complaint_has_an_exit_status_and_no_traceback(tmp_path):
    with process(f"gen_data.py --tasks juggle --out {tmp_path}/new") as running:
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 2
    assert re.fullmatch("gen_data.py: there is no 'juggle'; choose from .*\n", said)


# --------------------------------------------------------------------- recipes and examples
RECIPES = re.findall(r"```python\n(.*?)```", Path(ROOT, "docs/FORK.md").read_text(), re.S)


@pytest.mark.parametrize("code", RECIPES, ids=[code.splitlines()[0] for code in RECIPES])
def test_recipes_run(code, here):
    """As they stand. They change the modules, so each has a copy of this process."""
    Path("assets").symlink_to(ROOT / "assets")
    Path("recipe.py").write_text(code)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=runpy.run_path, args=["recipe.py"])
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_the_example_of_another_simulator(here):
    pytest.importorskip("metaworld")
    run("examples/metaworld.py eval --tasks reach --episodes 1")
