"""The tests: the real scripts at toy size, and what the parts promise. No GL and no display.

    python -m pytest -q test_smoke.py                          # about 4 minutes on 2 cores
    python -m pytest -q test_smoke.py -m slow                  # those that take minutes
"""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

for name in ("DISPLAY", "WAYLAND_DISPLAY"):
    os.environ.pop(name, None)
# one thread: at this size two only wait for each other
os.environ.update(MUJOCO_GL="disabled", OMP_NUM_THREADS="1")
# in the background Ctrl-C is ignored, by our children too
signal.signal(signal.SIGINT, signal.default_int_handler)

import h5py
import mujoco
import numpy as np
import pytest
import torch
from PIL import Image

from gen_data import (CAMERAS, COLORS, DEMO_SEED, FACTORS, FORCE_LIMIT, HELD_OUT, PRIVILEGED,
                      PROPRIO, SPLITS, TASKS, TEST_SEED, Env, all_requests, expert,
                      fill, is_held_out, parse_instruction, patterns)
from model import BC, CHARS, VLA, Config, split, tokenize

ROOT = Path(__file__).resolve().parent
TRAIN = ("train.py --data demos.h5 --device cpu --steps 12 --batch_size 8 --relabel 0.5 "
         "--log_interval 1 --eval_interval 6 --eval_episodes 2")
STATE = dict(joint_pos=7, ee_pos=3, ee_vel=3, gripper=1, object_pos=3, target_pos=3)
OBSERVATION = {key: ((n,), "float32") for key, n in STATE.items()}
OBSERVATION |= {f"{name}_image": ((64, 64, 3), "uint8") for name in ("front", "wrist")}
FULL = dict(state_keys=PROPRIO + PRIVILEGED, state_size=20)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")                # there is no file to register the mark in
    slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def skip_slow(request):
    if request.node.get_closest_marker("slow") and request.config.getoption("-m") != "slow":
        pytest.skip("takes long; -m slow runs it")


def start(command, folder, **options):
    """One of the scripts with its arguments, running in `folder`, its output kept."""
    script, *rest = shlex.split(command)
    return subprocess.Popen([sys.executable, ROOT / script, *rest], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(command, folder, code=0, **options):
    """Runs it to its end and returns what it printed; on stderr if it is to fail."""
    process = start(command, folder, **options)
    out, err = process.communicate(timeout=150)
    assert process.returncode == code, out + err
    return err if code else out


def run_code(code, folder):
    """Runs Python in a fresh interpreter that can import the repository; returns it, ended."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, text=True,
                          capture_output=True, timeout=150)


def stop_when(ready, command, folder, how=signal.SIGKILL):
    """Starts it, sends it a signal once ready() is true, and returns its exit status."""
    process = start(command, folder, start_new_session=True)
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(how)
        process.communicate(timeout=20)            # returns when its workers have ended too
        return process.returncode
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)             # what a failure would leave running
        except ProcessLookupError:
            pass


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 24 demonstrations of all tasks in demos.h5."""
    folder = tmp_path_factory.mktemp("toy")
    run("gen_data.py --tasks all --episodes 24 --workers 2 --out demos.h5", folder)
    return folder


@pytest.fixture(scope="session")
def trained(data):
    """The same folder with a barely trained VLA in out/."""
    run(TRAIN, data)
    return data


@pytest.fixture
def place(trained, tmp_path):
    """An empty folder with the demonstrations."""
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    return tmp_path


# --------------------------------------------------------------------------------- the world
@pytest.mark.parametrize("module, strangers", [("gen_data", "torch"), ("model", "mujoco")])
def test_import_does_no_work(module, strangers, tmp_path):
    done = run_code(f"import {module}; print({strangers!r} in sys.modules)", tmp_path)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not list(tmp_path.iterdir())


def test_culled_picture_equals_full_ray_cast():
    env = Env(cameras=CAMERAS)
    right = []                                     # labels that are where the blocks are
    for seed in (1, 2):
        env.reset(seed)
        while not env.step(expert(env))[2]:
            if env.steps % 5:
                continue
            for camera in env.cameras.values():
                culled = camera.render(env.data)
                geoms = camera.geom.copy()
                labels = camera.visible(env.data, env.thing_pos, env.thing_geom)
                np.testing.assert_array_equal(culled, camera.render(env.data, cull=False))
                np.testing.assert_array_equal(geoms, camera.geom)
                for (x, y), geom in zip(labels, env.block_geom):
                    if x >= 0:
                        right.append(geoms[int(y * 64), int(x * 64)] == geom)
    assert len(right) > 50 and np.mean(right) > 0.8


def play(env, seed, **options):
    """All that an expert's episode returns."""
    trace = [env.reset(seed, options)]
    over = False
    while not over:
        trace.append(env.step(expert(env)))
        over = trace[-1][2] or trace[-1][3]
    return trace


def same(a, b):
    """Whether two dicts of arrays are, to the last bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_env_is_a_function_of_its_seed_and_the_expert_succeeds():
    env = Env()
    sentences = set()
    for seed in (DEMO_SEED, 3, 4, 5, TEST_SEED):
        trace = play(env, seed)
        obs, reward, terminated, truncated, info = trace[-1]
        assert (terminated, truncated, info["success"]) == (True, False, True)
        assert info["touched"] == info["block"] and not info["diverged"]
        assert f" {info['block']} " in info["instruction"]
        rewards = [step[1] for step in trace[1:]]
        assert all(isinstance(r, float) and 0 <= r <= 1 for r in rewards)
        assert rewards[-1] == 1 > rewards[0] + 0.3
        assert {k: (v.shape, v.dtype.name) for k, v in obs.items()} == OBSERVATION
        sentences.add(info["instruction"])
    assert len(sentences) > 2
    again = play(Env(), seed)                      # a fresh world against one that was used
    for a, b in zip(again, trace, strict=True):
        assert a[1:] == b[1:] and same(a[0], b[0])


def test_resets_without_a_seed_continue_the_last_ones_stream():
    scenes = []
    for _ in range(2):
        env = Env(cameras=())
        env.reset(5)
        scenes.append([env.reset()[0]["object_pos"].tolist() for _ in range(3)])
    assert scenes[0] == scenes[1]
    assert scenes[0][0] != scenes[0][1] != scenes[0][2]


def test_env_takes_a_sentence_by_hand():
    env = Env(cameras=())
    with pytest.raises(ValueError, match="reset"):
        env.step([0, 0, 0, 1])
    env.reset(7)
    block, pad = env.block_colors[2], env.pad_colors[1]
    text = f"please put the {block} thing on {pad}, thanks"
    obs, info = env.reset(7, dict(instruction=text))
    assert (info["instruction"], info["block"], info["pad"]) == (text, block, pad)
    np.testing.assert_allclose(obs["object_pos"], env.block_pos[2], atol=1e-6)
    np.testing.assert_allclose(obs["target_pos"], env.pad_pos[1], atol=1e-6)
    for action in ([0, 0, 0], [0, 0, 0, np.nan]):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)
    with pytest.raises(ValueError, match="'blocks' is not an option"):
        env.reset(7, dict(blocks=4))
    colors = HELD_OUT["pick_place"][0].split()     # who asks for them by name gets them
    slots = dict(zip(TASKS["pick_place"].slots, colors))
    env.reset(7, dict(slots=slots))
    assert env.slots == slots


def test_palm_touches_count_and_a_diverged_simulation_is_over():
    env = Env(("lift",), ())
    env.reset(0)
    here = env.block_qpos[1]
    env.data.qpos[here:here + 3] = env.data.geom("palm").xpos
    mujoco.mj_forward(env.model, env.data)
    env._refresh()
    assert env.memory.touched == {1} and env.memory.first == env.block_colors[1]
    env.data.qvel[:] = 1e12
    _, _, terminated, _, info = env.step([0, 0, 0, 1])
    assert terminated and info["diverged"] and not info["success"]


# --------------------------------------------------------------------------------- the tasks
@pytest.mark.parametrize("task", TASKS)
def test_expert_does_every_task_and_the_guard_never_acts(task):
    env = Env(tuple(TASKS), ())
    for seed in range(6):
        info = play(env, seed, task=task)[-1][4]
        assert (info["task"], info["success"], info["violations"]) == (task, True, 0)
        assert info["force"] < FORCE_LIMIT


def test_success_is_what_the_sentence_says():
    """Each task done is not the others done, nor the same with another block or direction."""
    env = Env(tuple(TASKS), ())
    for seed, task in enumerate(TASKS):
        play(env, seed, task=task)
        for other in TASKS:
            for slots in env.requests(other):
                same_block = slots.get("block") == slots.get("lower", "")
                if (other, slots) == env.request or same_block or "drawer" in (other, task):
                    continue
                assert not TASKS[other].success(env, **env.resolve(slots)), (env.request, slots)

    env.reset(1, dict(task="push", slots=dict(direction="left")))
    here = env.block_qpos[env.meaning["block"]]
    at = env.data.qpos[here:here + 3]
    begin = at.copy()

    def pushed(*move):
        """Whether it is done when the block is carried there by hand."""
        at[:] = begin + move
        env._refresh()
        return TASKS["push"].success(env, **env.meaning)

    assert pushed(0, 0.09, 0)
    assert not pushed(0, -0.09, 0) and not pushed(0.09, 0, 0) and not pushed(-0.09, 0, 0)
    pushed(0, 0.09, 0.05)
    assert not pushed(0, 0.09, 0)                  # it has been lifted


def test_parsing_finds_the_meaning_of_every_sentence():
    for task, slots in all_requests(TASKS):
        if slots.get("block") != slots.get("lower", ""):
            for pattern in TASKS[task].sentences:
                assert parse_instruction(fill(pattern, slots)) == (task, slots), pattern
    assert parse_instruction("please shut that drawer") == ("drawer", dict(way="close"))
    assert parse_instruction("push the drawer open") == ("drawer", dict(way="open"))
    for nonsense in ("", "dance", "put it on the red target", "red green blue",
                     "put the red block in the drawer"):
        with pytest.raises(ValueError, match="not clear"):
            parse_instruction(nonsense)


def words_of(tasks):
    """Every word of the training sentences."""
    sentences = [fill(p, slots) for task, slots in all_requests(tasks) for p in patterns(task)]
    return tuple(sorted(set(split(" ".join(sentences)))))


WORDS = words_of(TASKS)


@pytest.mark.parametrize("part", SPLITS)
def test_splits(part):
    """What is held out is asked for in its own split and nowhere else, in known words."""
    env = Env(tuple(TASKS), (), split=part)
    assert env.n_blocks == (5 if part == "crowd" else 3)
    for seed, task in enumerate(["pick_place", "stack", "push"] * 4):
        info = env.reset(seed, dict(task=task))[1]
        unseen = {fill(pattern, env.slots) for pattern in patterns(task, held_out=True)}
        assert len(unseen) == 2
        assert is_held_out(*env.request) == (part == "combo")
        assert (info["instruction"] in unseen) == (part == "phrasing")
        assert set(split(info["instruction"])) <= set(WORDS)


def test_guard_stops_what_is_unsafe():
    guarded, wild = Env(cameras=()), Env(cameras=(), guard=False)
    forces = []
    for env in (guarded, wild):
        env.reset(0)
        for action in [(2, 0, 0, 1), (1, 1, 1, 1)] + [(0, 0, 1, 1)] * 15:
            info = env.step(action)[4]
        assert info["violations"] == sum(info["guard"].values())
    assert guarded.guarded["action"] == 1 and guarded.guarded["speed"] == 1
    assert guarded.guarded["box"] > 3 and not any(wild.guarded.values())
    assert wild.ee_pos[2] > 0.4 > 0.36 > guarded.ee_pos[2]     # without it the hand left the box
    for env in (guarded, wild):                    # a block pressed into the table from above
        env.reset(3)
        for _ in range(80):
            x, y, z = env.block_pos[env.meaning["block"]] + [0, 0, 0.1] - env.ee_pos
            over_it = np.hypot(x, y) < 0.004
            action = [x / 0.03, y / 0.03, -0.5 if over_it else z / 0.03, -1]
            env.step(np.clip(action, -1, 1))
        forces.append(env.force)
    assert guarded.guarded["force"] > 0 and not any(wild.guarded.values())
    assert forces[0] < forces[1]


def world(**options):
    """What of a scene's world is there to be randomised."""
    env = Env(("push",), ("front",), **options)
    picture = env.reset(5)[0]["front_image"]
    m = env.model
    return dict(
        picture=picture, camera=m.cam_pos, friction=m.geom_friction, mass=m.body_mass,
        damping=m.dof_damping, servo=m.actuator_gainprm, light=env.cameras["front"].light,
        color=m.geom_rgba)


@pytest.mark.parametrize("factor", FACTORS)
def test_randomised_worlds_differ_by_their_factor_alone(factor):
    normal, alone = world(), world(randomize=1.0, randomize_only=factor)
    differs = {key for key in alone if not np.array_equal(alone[key], normal[key])}
    assert ("picture" in differs) == (factor in ("light", "color", "camera", "noise", "mass"))
    assert differs - {"picture"} == {factor} - {"noise", "delay"}
    assert same(alone, world(randomize=1.0, randomize_only=factor))
    if factor not in ("noise", "delay"):           # as in all at once
        np.testing.assert_allclose(alone[factor], world(randomize=1.0)[factor])


def test_expert_copes_with_randomised_worlds():
    env = Env(tuple(TASKS), (), randomize=1.0)
    late = done = 0
    for seed in range(12):
        done += play(env, seed)[-1][4]["success"]
        late += env.late
    assert done >= 9 and 0 < late < 12


# ------------------------------------------------------------------------- the data file
def content(path):
    """Every array and attribute of a data file."""
    found = {}

    def keep(name, item):
        for key, value in item.attrs.items():
            found[name, key] = np.asarray(value).tolist()
        if isinstance(item, h5py.Dataset):
            found[name] = item.dtype, item.shape, item[()].tobytes()

    with h5py.File(path) as file:
        keep("", file)
        file.visititems(keep)
    return found


def test_data_file(data):
    with h5py.File(data / "demos.h5") as file:
        about, view = file.attrs, file["data"].attrs
        requests = json.loads(about["requests"])
        assert [(r["task"], r["slots"]) for r in requests] == all_requests(TASKS)
        assert about["complete"] and about["schema"] == "picovla-3" and about["total"] == 24
        assert about["proprio"].split(",") + about["privileged"].split(",") == list(STATE)
        env_args = json.loads(view["env_args"])
        assert env_args["type"] == 2 and env_args["env_kwargs"]["cameras"] == ["front", "wrist"]
        train, valid = ({name.decode() for name in file[f"mask/{part}"]}
                        for part in ("train", "valid"))
        assert train and valid and not train & valid and len(train | valid) == 24
        env = Env(tuple(TASKS))
        first = set()                              # tasks that validation scenes begin with
        scenes = dict(train=set(), valid=set())
        samples = interrupted = 0
        for i in range(24):
            episode, demo = file[f"episode_{i}"], file[f"data/demo_{i}"]
            a = dict(episode.attrs)
            n = a["num_samples"]
            samples += n
            interrupted += a["interrupted"]
            assert demo == episode and demo["obs"] == episode["observations"]
            shapes = {key: (v.shape, v.dtype.name) for key, v in demo["obs"].items()}
            assert shapes == {k: ((n, *shape), kind) for k, (shape, kind) in OBSERVATION.items()}
            assert demo["obs/front_image"].chunks[0] <= 8 and demo["obs/front_image"].compression
            assert demo["actions"].shape == (n, 4) and np.abs(demo["actions"]).max() <= 1
            assert 0 <= np.min(demo["rewards"]) <= np.max(demo["rewards"]) <= 1
            assert a["success"] != a["interrupted"]
            assert list(demo["dones"]) == [0] * (n - 1) + [a["success"]]
            asked = [requests[k] for k in {int(a["request"]), *demo["grounding/relabel"]}]
            assert not any(is_held_out(r["task"], r["slots"]) for r in asked)
            assert a["instruction"] in requests[a["request"]]["sentences"]
            part = "valid" if f"demo_{i}" in valid else "train"
            scenes[part].add(a["scene_seed"])
            if a["part"]:
                continue
            if part == "valid":
                first.add(a["task"])
            obs, info = env.reset(a["scene_seed"])             # what it shows, what the expert does
            assert info["instruction"] == a["instruction"]
            assert np.array_equal(demo["actions"][0], expert(env))
            assert same(obs, {key: demo["obs"][key][0] for key in obs})
        assert view["total"] == samples and 0 < interrupted < 24
        assert not scenes["train"] & scenes["valid"] and first == set(TASKS)


def test_stopped_generation_carries_on_with_any_number_of_workers(tmp_path):
    command = "gen_data.py --tasks lift,drawer --cameras front --episodes 120 --shard 2 2"
    run(f"{command} --workers 1 --out new/whole.h5", tmp_path)
    whole = content(tmp_path / "new/whole.h5")
    seeds = [value for key, value in whole.items() if key[1:] == ("scene_seed",)]
    assert min(seeds) == DEMO_SEED + 50_000
    part, command = tmp_path / "demos.h5.part", command + " --out demos.h5 --workers"
    ends = ((signal.SIGKILL, 2, -9), (signal.SIGINT, 1, 130), (signal.SIGTERM, 2, 130))
    for how, workers, code in ends:
        kept = len(list(part.glob("*.h5")))
        ready = lambda: len(list(part.glob("*.h5"))) > kept
        assert stop_when(ready, f"{command} {workers}", tmp_path, how) == code
        assert part.exists() and not (tmp_path / "demos.h5").exists()
    assert "other settings" in run(f"{command} 2 --noise 0", tmp_path, code=2)
    kept = {path: path.stat().st_mtime_ns for path in part.glob("*.h5")}
    begun = time.time_ns()
    run(f"{command} 2", tmp_path)
    assert len(kept) >= 3 and max(kept.values()) < begun
    assert content(tmp_path / "demos.h5") == whole and not part.exists()


# --------------------------------------------------------------------------------- the model
@pytest.fixture(scope="session")
def batch():
    """Four pictures, two sentences that both fit each of them, and what the expert does, (2, 4, A).
    The robot's own state is the same in all, so that neither it nor the words nor the picture alone
    can tell what to do."""
    requests = [("pick_place", dict(block=block, pad="green")) for block in ("red", "blue")]
    sentences = [fill(TASKS[task].sentences[0], slots) for task, slots in requests]
    env = Env()
    observations, actions = [], []
    seed = 0
    while len(actions) < 4:
        obs, _ = env.reset(seed)
        seed += 1
        if {"red", "blue"} <= set(env.block_colors) and "green" in env.pad_colors:
            robot = (observations or [obs])[0]
            observations.append(obs | {key: robot[key] for key in PROPRIO})
            actions.append([expert(env, request) for request in requests])
    return observations, sentences, torch.tensor(np.array(actions)).transpose(0, 1)


def inputs(model, observations, sentences):
    images, state = model.read_observations([[obs] for obs in observations])
    return images, state, torch.stack([tokenize(text, model.config) for text in sentences])


@pytest.fixture(scope="session")
def fitted(batch):
    """A VLA after 100 steps on the first actions of that batch, and its losses."""
    observations, sentences, actions = batch
    torch.manual_seed(0)
    model = VLA(Config(words=WORDS))
    pairs = inputs(model, observations, sentences)
    picture, sentence = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-4 * (1 - step / 100)
        optimizer.zero_grad()
        planned, *_ = model(*pairs, picture, sentence)
        loss = (planned[:, 0] - actions.flatten(0, 1)).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


CHOICES = [
    {}, dict(vision="vit"), dict(vision="cnn"), dict(keep_patches=80), dict(frames=3),
    dict(cameras=("front",)), dict(cameras=CAMERAS), dict(coarse_cameras=()),
    dict(text="char", max_text=96), dict(text_encoder="lstm"), dict(pointers=0),
    dict(fusion="transformer"), dict(fusion="concat"), dict(fusion="multiply"),
    dict(head="tokens"), dict(head="tokens", bins=16), dict(head="flow"), dict(loss="mse"),
    dict(chunk=1), dict(chunk=16, execute=3), dict(ensemble=True), FULL,
    dict(state_keys=(), state_size=0), dict(width=64), dict(heads=8), dict(layers=1)]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_builds_learns_saves_and_acts(choice, batch, tmp_path):
    torch.manual_seed(0)
    config = Config(words=WORDS, **choice)
    config.check()
    model = VLA(config)
    assert choice or 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    observations, (sentence, _), actions = batch
    observations = [obs | dict(top_image=obs["front_image"]) for obs in observations]
    known = inputs(model, observations, [sentence] * 4)
    target = actions[0][:, None].repeat(1, config.chunk, 1)
    valid = torch.ones(4, config.chunk, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):                             # outputs start at zero: not yet at the first
        optimizer.zero_grad()
        error, goal, attention = model(*known, target=target, valid=valid)
        assert error.shape == (4, config.chunk, 4)
        (error.mean() + goal.square().mean() - 0.01 * attention.sum()).backward()
        optimizer.step()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    model.save(tmp_path / "ckpt.pt")
    loaded = VLA.load(tmp_path / "ckpt.pt")
    model.eval()
    for obs in observations * 3:
        action = model.predict(obs, sentence)
        assert action.tobytes() == loaded.predict(obs, sentence).tobytes()
        assert action.shape == (4,) and action.dtype == np.float32 and np.abs(action).max() <= 1


def test_acting_follows_the_config(batch):
    """Chunk, ensemble and integration steps of one and the same set of weights."""
    torch.manual_seed(0)
    (obs, *_), (sentence, _), _ = batch
    moved = [obs | dict(ee_pos=obs["ee_pos"] + 0.1 * t) for t in range(3)]
    model = VLA(Config(words=WORDS, head="flow")).eval()
    chunks = np.stack([model.plan([[obs]], [sentence])[0] for obs in moved])       # (3, K, A)

    def acted(**choice):
        vars(model.config).update(choice)
        model.reset()
        return [model.predict(obs, sentence) for obs in moved]

    np.testing.assert_allclose(acted(), chunks[0, :3], atol=1e-6)
    np.testing.assert_allclose(acted(execute=1), chunks[:, 0], atol=1e-6)
    weights = np.exp(-0.01 * np.arange(3))
    average = weights / weights.sum() @ [chunks[0, 2], chunks[1, 1], chunks[2, 0]]
    np.testing.assert_allclose(acted(ensemble=True)[2], average, atol=1e-6)
    assert not np.allclose(acted(flow_steps=1)[0], chunks[0, 0], atol=1e-3)


def test_what_is_called_by_name_does_not_depend_on_the_other_name():
    """With other colours in the context, as in training, a pointer knows its own name alone."""
    torch.manual_seed(0)
    model = VLA(Config(words=WORDS))
    pattern = TASKS["pick_place"].sentences[0]
    pairs = [dict(block=a, pad=b) for a, b in (("red", "blue"), ("green", "blue"))]
    text = torch.stack([tokenize(pattern.format(**pair), model.config) for pair in pairs])
    context = text[:1].expand(2, -1)
    words, queries = model.encode_text(context, text)
    torch.testing.assert_close(words, model.encode_text(context)[0])
    assert not torch.allclose(queries[0], queries[1])
    assert not torch.allclose(*model.encode_text(text)[0])


def test_one_batch_overfits_by_looking_and_listening(fitted, batch):
    model, losses = fitted
    observations, sentences, actions = batch
    for axis in (0, 1):                            # who is deaf, who is blind
        best = (actions - actions.median(axis, keepdim=True).values).abs().mean()
        assert losses[-1] < 0.6 * best, losses[::10]
    histories = [[obs] for obs in observations]
    planned = np.stack([model.plan(histories, [text] * 4)[:, 0] for text in sentences])
    assert np.abs(planned[0] - planned[1]).mean() > 0.1        # other words
    assert np.abs(planned - np.roll(planned, 1, axis=1)).mean() > 0.1      # another picture


def test_predict_executes_the_chunk_and_listens(fitted, batch, monkeypatch):
    model, _ = fitted
    observations, sentences, _ = batch
    plans, plan = [], model.plan
    monkeypatch.setattr(model, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    model.reset()
    obs = {key: observations[0][key] for key in ("front_image", "wrist_image", *PROPRIO)}
    n = model.config.executed
    actions = [model.predict(obs, sentences[0]) for _ in range(n)]
    assert n == 4 and len(plans) == 1 and np.array_equal(actions, plans[0][0, :n])
    model.predict(obs, sentences[0])
    assert len(plans) == 2                         # the chunk was used up
    model.predict(obs, sentences[1])
    assert len(plans) == 3                         # a new sentence, at once


@pytest.mark.parametrize("key, value", [
    ("wrist_image", None), ("wrist_image", np.zeros((64, 64, 3))), ("ee_pos", None),
    ("front_image", np.zeros((32, 32, 3), np.uint8)), ("ee_pos", [0, np.nan, 0]), ("gripper", [])])
def test_policies_refuse_what_they_cannot_read(key, value, batch):
    (obs, *_), (sentence, _), _ = batch
    obs = {k: v for k, v in (obs | {key: value}).items() if v is not None}
    with pytest.raises(ValueError, match="must be|has no"):
        VLA(Config(words=WORDS)).predict(obs, sentence)


def test_only_the_vla_needs_a_sentence(batch):
    (obs, *_), _, _ = batch
    with pytest.raises(ValueError, match="needs a sentence"):
        VLA(Config(words=WORDS)).predict(obs)
    bc = BC(Config(model="bc", cameras=(), chunk=1, **FULL))
    assert np.array_equal(bc.predict(obs), bc.predict(obs, "anything"))


def test_text():
    config = Config(words=WORDS)
    sentence = "Pick up the RED block, and place it at the green target."
    plain = sentence.lower().replace(",", "")
    assert torch.equal(tokenize(sentence, config), tokenize(plain, config))
    with pytest.raises(ValueError, match="'banana'.*" + " ".join(WORDS)):
        tokenize("pick up the red banana", config)
    chars = Config(words=WORDS, text="char", max_text=96)
    with pytest.warns(UserWarning, match="'banana'"):
        ids = tokenize("red banana", chars)
    assert "".join(CHARS[i - 1] for i in ids if i) == "red banana" and ids.shape == (96,)
    for settings in (config, chars):
        with pytest.raises(ValueError, match="too long"):
            tokenize("red " * 99, settings)


@pytest.mark.parametrize("wrong", [
    dict(layers="2"), dict(layers=10**9), dict(patch=7), dict(patch=48), dict(width=100, heads=3),
    dict(words=(1, 2)), dict(frames=True), dict(ensemble=1), dict(head="hand"), dict(cameras=None),
    dict(chunk=2, execute=3), dict(ensemble=True, chunk=1), dict(state_size=-1)], ids=str)
def test_config_checks_itself(wrong):
    with pytest.raises(ValueError):
        Config(**wrong).check()


def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path):
    """One bit of it is another: it is refused, or it loads, but it never does anything else."""
    whole = (trained / "out/ckpt.pt").read_bytes()
    assert len(whole) < 6e6
    path = tmp_path / "ckpt.pt"
    dice = np.random.default_rng(0)
    end = len(whole)
    refused = 0
    for low, high in ((0, end), (0, 3000), (end - 3000, end)):
        for at in dice.integers(low, high, 15):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(dice.integers(8))
            path.write_bytes(damaged)
            try:
                VLA.load(path)
            except ValueError as error:
                assert "is not a checkpoint of this model" in str(error)
                assert "\n" not in str(error)
                refused += 1
    assert refused > 5


# ------------------------------------------------------------------------------- training
def read_log(folder):
    """[losses of step 1, ..]"""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{key: line[key] for key in ("loss", "val_action", "val_goal", "val_attention")}
            for line in lines]


def test_training_is_a_function_of_its_seed_and_resumes_exactly(trained, place):
    whole = read_log(trained / "out")
    assert len(whole) == 12 and np.isfinite([list(line.values()) for line in whole]).all()
    resume = place / "out/resume.pt"               # written after step 6
    assert stop_when(resume.exists, TRAIN, place) == -signal.SIGKILL
    assert torch.load(resume, weights_only=True)["step"] == 6
    run("train.py --resume out --eval_interval 0", place)      # with the settings it began with
    assert read_log(place / "out") == whole
    there = torch.load(trained / "out/ckpt.pt", weights_only=True)
    here = torch.load(place / "out/ckpt.pt", weights_only=True)
    assert same(there["weights"], here["weights"])
    assert there["fingerprint"] == here["fingerprint"]
    run("train.py --resume out --eval_interval 0 --steps 14 --lr 0.01", place)
    assert len(read_log(place / "out")) == 14 and VLA.load(place / "out/ckpt.pt").step == 14
    last = (place / "out/log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["lr"] == pytest.approx(0.01 / (0.6 * 14))      # what is said goes first


def test_a_stopped_training_saves_or_can_be_begun_again(place):
    log, long = place / "out/log.jsonl", TRAIN + " --steps 500 --eval_interval 1000"
    ready = lambda: log.exists() and log.stat().st_size
    assert stop_when(ready, long, place) == -signal.SIGKILL    # before there was a checkpoint
    for how in (signal.SIGINT, signal.SIGTERM):
        log.unlink()
        assert stop_when(ready, long, place, how) == 130
        step = VLA.load(place / "out/ckpt.pt").step
        assert 1 <= step < 500 and len(read_log(place / "out")) == step
        long += " --overwrite"


def test_a_training_that_is_stopped_while_its_data_is_made_stops_that_too(tmp_path):
    part = tmp_path / "new.h5.part"
    ready = lambda: len(list(part.glob("*.h5"))) > 1
    command = "train.py --data new.h5 --episodes 2000"
    assert stop_when(ready, command, tmp_path, signal.SIGTERM) == 130
    batches = list(part.glob("*.h5"))
    for path in batches:                           # whole, and nobody writes any more
        assert h5py.File(path).attrs["total"] > 0
    time.sleep(1)
    assert batches == list(part.glob("*.h5"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwrite_spoils_nothing_before_there_is_something_better(trained, place):
    shutil.copytree(trained / "out", place / "out")
    before = contents(place / "out")
    (place / "foreign.h5").write_text("something else")
    run(f"{TRAIN} --overwrite --data foreign.h5", place, code=2)
    assert contents(place / "out") == before
    explode = f"{TRAIN} --overwrite --adam_lr 1e30 --lr 1e30 --log_interval 100 --eval_interval"
    assert "train.py: the loss is" in run(f"{explode} 100", place, code=2)
    assert contents(place / "out") == before
    said = run(f"{explode} 1", place, code=2)
    assert VLA.load(place / "out/ckpt.pt").step == int(re.search(r"at step (\d+)", said)[1]) - 1


def test_what_only_a_simulator_knows_may_be_zeros(trained, tmp_path):
    shutil.copy(trained / "demos.h5", tmp_path)
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        for i in range(file.attrs["total"]):
            episode = file[f"episode_{i}"]
            known = [episode["observations"][key] for key in PRIVILEGED]
            for array in (*episode["grounding"].values(), *known):
                array[:] = 0
    run(f"{TRAIN} --relabel 0 --attention_weight 0 --goal_weight 0 --release_weight 1 --steps 2 "
        "--eval_interval 0", tmp_path)
    assert read_log(tmp_path / "out")[1]["loss"] > 0


@pytest.mark.parametrize("command, room", [
    ("gen_data.py --episodes 40 --workers 1 --out new.h5", 300_000), (TRAIN, 3_000_000)])
def test_a_full_disk_is_one_sentence_and_spoils_nothing(command, room, place):
    """No file may grow beyond `room` bytes, which is what a full disk looks like from inside."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    said = run(command, place, code=2, preexec_fn=limit)
    assert said.startswith(command.split()[0] + ": ") and said.count("\n") == 1, said
    assert not (place / "new.h5").exists() and not (place / "out/ckpt.pt").exists()


def test_data_larger_than_memory_is_refused_before_loading(trained):
    done = run_code(f"""
import pathlib, runpy
read = pathlib.Path.read_text
def little(path, **kind):
    return "MemAvailable: 900 kB" if path.name == "meminfo" else read(path, **kind)
pathlib.Path.read_text = little
sys.argv = "train.py --data demos.h5 --out_dir new".split()
runpy.run_path({str(ROOT / "train.py")!r})""", trained)
    assert done.returncode == 2
    assert re.fullmatch("train.py: demos.h5 needs .* GB of memory .*\n", done.stderr), done.stderr


@slow
def test_several_processes_and_files_train_as_one(tmp_path):
    """Two processes with half of each batch do what one does with all of it, but for the dice."""
    for i in (1, 2):
        run(f"gen_data.py --tasks all --episodes 24 --shard {i} 2 --out shards/{i}.h5", tmp_path)
    command = (f"{TRAIN} --data 'shards/*.h5' --eval_interval 0 --dtype float32 --steps 60 "
               "--batch_size 32 --out_dir")
    run(f"{command} one", tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", *shlex.split(f"{ROOT}/{command} two")]
    done = subprocess.run(torchrun, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step    60") == 1    # one of them speaks
    one, two = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two"))
    assert np.isfinite(two).all() and VLA.load(tmp_path / "two/ckpt.pt").step == 60
    assert np.mean(two[-20:]) == pytest.approx(np.mean(one[-20:]), rel=0.05)


def test_bc_trains_on_data_that_it_makes(tmp_path):
    out = run("train.py --model bc --data new/demos.h5 --episodes 12 --steps 30 --log_interval 15 "
              "--eval_interval 30 --eval_episodes 1 --out_dir bc", tmp_path)
    assert "making 12 demonstrations" in out and re.search("[01]/1 = ", out)
    first, last = map(json.loads, (tmp_path / "bc/log.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
    assert VLA.load(tmp_path / "bc/ckpt.pt").config.state_size == 20


# --------------------------------------------------------------------- evaluating and playing
def test_eval(trained, tmp_path):
    ckpt = f"--ckpt {trained}/out/ckpt.pt --episodes 3"
    run(f"eval.py {ckpt} --policies expert,random,policy --controls --out all.json", tmp_path)
    run(f"eval.py {ckpt} --out again.json", tmp_path)
    result, again = (json.loads((tmp_path / f"{name}.json").read_text())
                     for name in ("all", "again"))
    text, text_again = ((tmp_path / f"{name}.jsonl").read_text() for name in ("all", "again"))
    lines = [json.loads(line) for line in text.splitlines()]
    rows = {}
    for row in result["rows"]:
        name = row["policy"] if row["control"] == "none" else row["control"]
        mine = [line for line in lines if line["label"] == row["label"]]
        if row["task"] != "all":
            mine = [line for line in mine if line["task"] == row["task"]]
        assert row["k"] == sum(line["success"] for line in mine) and row["n"] == len(mine)
        assert 0 <= row["low"] <= row["k"] / row["n"] <= row["high"] <= 1
        if row["task"] == "all":
            rows[name] = row
            assert [line["seed"] for line in mine] == [TEST_SEED, TEST_SEED + 1, TEST_SEED + 2]
            changed = name in ("deaf", "deaf_shuffled", "swap", "retarget")
            assert all((line["told"] != line["original"]) == changed for line in mine)
    assert list(rows) == ["expert", "random", "vla", "blind", "blind_shuffled", "deaf",
                          "deaf_shuffled", "swap", "retarget"]
    assert rows["expert"]["k"] == 3 and rows["random"]["k"] == 0
    assert rows["expert"]["violations"] == 0 < rows["random"]["violations"]
    assert abs(rows["expert"]["low"] - 0.4385) < 1e-3          # Wilson: n / (n + 1.96^2)
    assert 0.01 < rows["expert"]["chance"] < 0.5
    seconds = dict(seconds=0)                      # the same scenes again: the same to the last bit
    once = [row | seconds for row in result["rows"] if row["label"] == rows["vla"]["label"]]
    assert [row | seconds for row in again["rows"]] == once


def test_eval_in_other_words(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("lift\tgrab the {block} cube and raise it\n"
                                       "drawer\tshut the drawer\npush\tkick the {block} cube {towards}\n")
    out = run(f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 2 --instructions mine.txt "
              "--randomize 1 --sensitivity --latency --no_guard --out a.json", tmp_path)
    assert "'kick'" in out and "two sentences" in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["task"], row["n"], row["violations"]) for row in rows] == [
        ("lift", 2, 0), ("drawer", 2, 0)]
    told = [json.loads(line)["told"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert re.fullmatch("grab the [a-z]+ cube and raise it", told[0])
    assert told[2:] == ["shut the drawer"] * 2


def test_ablations_train_and_score_each_line_once(place):
    (place / "a.txt").write_text(
        "all: --data demos.h5 --steps 2 --batch_size 8 --log_interval 1  # short\n"
        "classic: --recipe classic --steps 3\nflow: --head flow --chunk 4 --max_episodes 18\n"
        "again: --recipe classic --steps 3\n")
    command = "examples/ablations.py a.txt --episodes 1"
    run(command, place)
    runs = place / "out/ablations"
    (runs / "flow/curve.png").unlink()             # as if that one had been stopped
    before = {path: path.stat().st_mtime_ns for path in runs.glob("classic/*.pt")}
    table = run(command, place)
    assert before and all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert (runs / "flow/curve.png").exists() and not (runs / "again").exists()
    found = re.findall(r"^\| (\w+) +\| ([01])/1 = ", table, re.M)
    assert [name for name, _ in found] == ["classic", "flow", "again"]
    classic = VLA.load(runs / "classic/ckpt.pt")
    assert (classic.step, classic.config.vision, classic.config.pointers) == (3, "vit", 0)


@pytest.mark.parametrize("flags, width", [
    ("--seed 3 --size 256 --out a.gif", 256), ("--seed 3 --pipeline --out a.png", 1000),
    ("--seed 0,1 --size 128 --attention --out a.png", 4 * 2 * 128)])
def test_play_draws(flags, width, trained, tmp_path):
    run(f"play.py --ckpt {trained}/out/ckpt.pt {flags}", tmp_path)
    with Image.open(next(tmp_path.glob("a.*"))) as picture:
        assert picture.width > width and np.std(np.asarray(picture.convert("L"))) > 10
        assert picture.format == "PNG" or picture.n_frames > 5


def test_play_counts_where_it_looks(trained, tmp_path):
    out = run(f"play.py --ckpt {trained}/out/ckpt.pt --attention --episodes 1 --tasks stack",
              tmp_path)
    counts = re.findall(r"pointer to the (\w+), is on it: (\d+)/(\d+)", out)
    assert [name for name, *_ in counts[:2]] == ["thing", "place"]
    assert all(0 <= int(k) <= int(n) <= 200 for _, k, n in counts)


def test_demonstrations_without_noise_replay_exactly(data, tmp_path):
    """Instruction after instruction; what noise had a hand in mostly does not."""
    run("gen_data.py --tasks all --episodes 12 --noise 0 --workers 1 --out clean.h5", tmp_path)
    shares = []
    for path in ("clean.h5", data / "demos.h5"):
        out = run(f"play.py --data {path} --replay --episodes 12", tmp_path)
        again, all_of_them = re.search(r"(\d+) of the (\d+) ", out).groups()
        shares.append(int(again) / int(all_of_them))
    assert shares[0] == 1 > shares[1]
    out = run("play.py --data clean.h5 --episode 2 --size 128 --out a.png", tmp_path)
    about = run("gen_data.py --info clean.h5", tmp_path)
    with h5py.File(tmp_path / "clean.h5") as file:
        assert file["episode_2"].attrs["instruction"] in out
        tasks = [file[f"episode_{i}"].attrs["task"] for i in range(12)]
    for task in set(tasks):
        assert f"{task} {tasks.count(task)}" in about


def test_play_asks_for_sentences_without_a_display(trained, tmp_path):
    """An unknown word, a block that is not there, other scenes; end of input ends it."""
    env = Env(cameras=())
    env.reset(0)
    absent = min(set(COLORS) - set(env.block_colors))
    lines = ["hello there", f"lift the {absent} block", "seed 7", "help", "randomize 3", "reset"]
    command = [ROOT / "play.py", "--ckpt", trained / "out/ckpt.pt", "--size", "128"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, text=True, timeout=100,
                          capture_output=True, input="\n".join(lines))
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.glob("out/*"))
    for words in ("'hello'", f"no {absent} block", "scene 7", "from 0 to 1"):
        assert words in done.stdout


# ------------------------------------------------------------------------------- bad input
def change_config(**settings):
    return lambda saved: saved["config"].update(settings)


def change_settings(**settings):
    return lambda saved: saved["settings"].update(settings)


CHECKPOINTS = {
    "string.pt": change_config(layers="2"),
    "deep.pt": change_config(layers=10**9),
    "wide.pt": change_config(width=4096),
    "numbers.pt": change_config(words=[1, 2]),
    "strange.pt": change_config(wings=2),
    "many/resume.pt": change_settings(steps="many"),
    "none/resume.pt": change_settings(layers=None),
    "older/resume.pt": change_settings(spread=0.5),
}


def write(path, value):
    return lambda file: file[path].__setitem__(0, value)


def replace(path, change):
    """In every episode of a data file the array at `path` by another."""
    def spoil(file):
        for i in range(24):
            old = file[f"episode_{i}/{path}"][:]
            del file[f"episode_{i}/{path}"]
            file[f"episode_{i}/{path}"] = change(old)
    return spoil


def declare_huge(file):
    """All arrays of the first episode have 10^12 rows, none of them written."""
    episode = file["episode_0"]
    for group in (episode, episode["observations"], episode["grounding"]):
        for key, old in group.items():
            if isinstance(old, h5py.Dataset):
                del group[key]
                shape = (10**12, *old.shape[1:])
                group.create_dataset(key, shape, old.dtype, chunks=(8, *old.shape[1:]))


DATA = {
    "no.h5": lambda file: file.attrs.update(total=0),
    "mute.h5": lambda file: file.attrs.update(requests="[]"),
    "prose.h5": lambda file: file.attrs.update(requests="all of them"),
    "request.h5": lambda file: file["episode_3"].attrs.update(request=9999),
    "things.h5": write("episode_3/grounding/relabel_things", 99),
    "nan.h5": write("episode_3/observations/ee_vel", np.nan),
    "wild.h5": write("episode_3/actions", 1.5),
    "short.h5": replace("actions", lambda old: old[:-1]),
    "float.h5": replace("observations/front_image", lambda old: old / np.float32(255)),
    "huge.h5": declare_huge,
}


@pytest.fixture(scope="session")
def hostile(trained):
    """The trained folder with broken and foreign files added."""
    for name, spoil in DATA.items():
        shutil.copy(trained / "demos.h5", trained / name)
        with h5py.File(trained / name, "a") as file:
            spoil(file)
    for name, spoil in CHECKPOINTS.items():
        path = trained / name
        path.parent.mkdir(exist_ok=True)
        whole = "resume.pt" if path.name == "resume.pt" else "ckpt.pt"
        saved = torch.load(trained / "out" / whole, weights_only=True)
        spoil(saved)
        torch.save(saved, path)
    (trained / "torn").mkdir()
    for whole, cut in (("demos.h5", "cut.h5"), ("out/ckpt.pt", "cut.pt"),
                       ("out/resume.pt", "torn/resume.pt")):
        content = (trained / whole).read_bytes()
        (trained / cut).write_bytes(content[:len(content) // 2])
    torch.save(dict(config=Path("/")), trained / "pickle.pt")
    BC(Config(model="bc", cameras=(), chunk=1, **FULL)).save(trained / "bc.pt")
    (trained / "text").write_text("neither a checkpoint nor data\n")
    (trained / "empty.txt").write_text("\n")
    (trained / "slot.txt").write_text("lift\traise the {thing}\n")
    (trained / "task.txt").write_text("juggle\tjuggle the {block} block\n")
    return trained


# What is wrong => words that the complaint has. NEW is --data demos.h5 --out_dir new.
BAD = """
gen_data.py --episodes 0 --out new.h5 => --episodes
gen_data.py --seed 1180591620717411303424 --out new.h5 => --seed
gen_data.py --shard 3 2 --out new.h5 => shard
gen_data.py --workers -2 --out new.h5 => --workers
gen_data.py --noise 2 --out new.h5 => --noise
gen_data.py --noise nan --out new.h5 => --noise
gen_data.py --tasks juggle --out new.h5 => 'juggle'
gen_data.py --tasks lift,lift --out new.h5 => lift
gen_data.py --cameras front,rear --out new.h5 => 'rear'
gen_data.py --cameras front,front --out new.h5 => twice
gen_data.py --randomize 3 --out new.h5 => --randomize
gen_data.py --randomize 1 --randomize_only gravity --out new.h5 => 'gravity'
gen_data.py --randomize_only light --out new.h5 => --randomize
gen_data.py --episodes 2 --out demos.h5 => demos.h5 exists
gen_data.py --episodes 2 --out text/new.h5 => text
gen_data.py --info cut.h5 => cut.h5
gen_data.py --info text => text
gen_data.py --info missing.h5 => missing.h5
train.py NEW --steps 0 => --steps
train.py NEW --batch_size -8 => --batch_size
train.py NEW --batch_size 1000000000 => --batch_size
train.py NEW --chunk 1000000000 => --chunk
train.py NEW --seed 1180591620717411303424 => --seed
train.py NEW --word_dropout 2 => --word_dropout
train.py NEW --word_dropout nan => --word_dropout
train.py NEW --relabel 4 => --relabel
train.py NEW --release_weight -1 => --release_weight
train.py NEW --execute 9 => --execute 9
train.py NEW --tasks lift => lift
train.py NEW --tasks lift,lift => lift
train.py NEW --cameras front,front => twice
train.py NEW --cameras front,top => 'top'
train.py NEW --vision cnn --attention_weight 1 => --vision
train.py NEW --head flow --bins 16 => --head tokens
train.py NEW --head tokens --bins 1 => --bins
train.py NEW --text char --position_gaps 1 => --text
train.py NEW --text char --shuffle_names 1 => --text
train.py NEW --model bc --head flow => --head
train.py NEW --model bc --relabel 1 => --relabel
train.py NEW --model bc --state none => --state
train.py NEW --optimizer adamw --lr 1e-3 => --optimizer
train.py NEW --width 100 --heads 3 => --width 100
train.py NEW --patch 7 => --patch 7
train.py NEW --ensemble --chunk 1 => --chunk
train.py NEW --max_episodes 900 => --max_episodes 900
train.py NEW --device tpu => 'tpu'
train.py --data 'shards/*.h5' --out_dir new => there is no shards/*.h5
train.py --data demos.h5 --out_dir text/new => text
train.py --data demos.h5 --out_dir out => --overwrite
train.py --data cut.h5 --out_dir out --overwrite => cut.h5
train.py --data text --out_dir new => text
train.py --data no.h5 --out_dir new => no.h5
train.py --data mute.h5 --out_dir new => mute.h5
train.py --data prose.h5 --out_dir new => prose.h5
train.py --data request.h5 --out_dir new => request of episode_3
train.py --data things.h5 --out_dir new => relabel_things of episode_3
train.py --data nan.h5 --out_dir new => ee_vel of episode_3
train.py --data wild.h5 --out_dir new => actions of episode_3
train.py --data short.h5 --out_dir new => short.h5
train.py --data float.h5 --out_dir new => front_image
train.py --data huge.h5 --out_dir new => huge.h5
train.py --resume new => new
train.py --resume torn => torn
train.py --resume many --data demos.h5 => steps
train.py --resume none --data demos.h5 => layers
train.py --resume older --data demos.h5 => spread
train.py --resume out --data demos.h5 --model bc => another configuration
eval.py --ckpt missing.pt => missing.pt
eval.py --ckpt text => not a checkpoint
eval.py --ckpt cut.pt => not a checkpoint
eval.py --ckpt pickle.pt => not a checkpoint
eval.py --ckpt string.pt => not a checkpoint
eval.py --ckpt deep.pt => not a checkpoint
eval.py --ckpt wide.pt => not a checkpoint
eval.py --ckpt numbers.pt => not a checkpoint
eval.py --ckpt strange.pt => not a checkpoint
eval.py --ckpt demos.h5 => not a checkpoint
eval.py CKPT --episodes 0 => --episodes
eval.py CKPT --seed 999990 --episodes 20 => choosing
eval.py CKPT --seed 1180591620717411303424 => --seed
eval.py CKPT --parallel 0 => --parallel
eval.py CKPT --policies expert --instructions task.txt => --policies
eval.py CKPT --execute 9 => --execute 9
eval.py CKPT --flow_steps 2 => --head flow
eval.py CKPT --tasks juggle => 'juggle'
eval.py CKPT --split other => 'other'
eval.py CKPT --split combo --tasks lift => combo
eval.py CKPT --split combo --controls => another split
eval.py CKPT --randomize 3 => --randomize
eval.py CKPT --randomize_only light => --randomize
eval.py CKPT --instructions empty.txt => empty.txt is empty
eval.py CKPT --instructions missing.txt => missing.txt
eval.py CKPT --instructions slot.txt => {block}
eval.py CKPT --instructions task.txt => pick_place
eval.py CKPT --controls --instructions task.txt => --controls
eval.py CKPT --episodes 1 --out text/a.json => text
eval.py CKPT --episodes 1 --out out => .json
play.py --ckpt missing.pt --out a.gif => missing.pt
play.py --ckpt bc.pt --attention --out a.gif => this checkpoint has none
play.py CKPT --out a.gif --tasks juggle => 'juggle'
play.py CKPT --out a.gif --seed three => three
play.py CKPT --out a.gif --seed 1180591620717411303424 => --seed
play.py CKPT --out a.bmp => .gif or .png
play.py CKPT --out text/a.gif => text
play.py CKPT --out a.gif --size 5 => --size
play.py CKPT --out a.gif --instruction '' => ''
play.py CKPT --out a.gif --instruction 'lift it onto the target' => not clear
play.py CKPT --out a.gif --instruction 'lift the ABSENT block' => no ABSENT block
play.py CKPT --out a.gif --instruction 'teleport the red block' => 'teleport'
play.py CKPT --pipeline --out a.gif => .png
play.py CKPT --pipeline --seed 1,2 --out a.png => one --seed
play.py CKPT --episodes 3 --out a.gif => --episodes
play.py --expert CKPT --out a.gif => --ckpt
play.py --replay => --data
play.py --data demos.h5 => --out
play.py --data demos.h5 --episode 99 --out a.gif => --episode 99
play.py --data demos.h5 --replay --out a.gif => --out
play.py --data demos.h5 --attention --out a.gif => --attention
play.py --data cut.h5 --out a.gif => cut.h5
play.py --data text --replay => text
examples/ablations.py missing.txt => missing.txt
examples/ablations.py empty.txt => empty.txt
examples/ablations.py task.txt => task.txt
"""
env = Env(cameras=())
env.reset(0)
ABSENT = min(set(COLORS) - set(env.block_colors))              # a colour that scene 0 has no block of
BAD = BAD.replace("ABSENT", ABSENT).replace("NEW", "--data demos.h5 --out_dir new")
BAD = BAD.replace("CKPT", "--ckpt out/ckpt.pt").strip().splitlines()

# Runs the scripts one after the other in one process: importing torch for each takes longest.
TELLER = """
import json, os, runpy, shlex, signal, sys, tempfile
repository = sys.argv[1]
sys.path.insert(0, repository)
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os._exit = sys.exit
signal.signal(signal.SIGALRM, lambda *_: sys.exit("still running after 15 s"))
for command in sys.stdin.read().splitlines():
    sys.argv = shlex.split(command)
    sys.excepthook = sys.__excepthook__
    code = 0
    signal.alarm(15)
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 2)
        try:
            try:
                runpy.run_path(f"{repository}/{sys.argv[0]}", run_name="__main__")
            except Exception as error:
                sys.excepthook(type(error), error, error.__traceback__)
                code = 1
        except SystemExit as end:
            code = end.code
        sys.stderr.flush()
        said.seek(0)
        print(json.dumps([code, said.read()]), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def complaints(hostile):
    """Exit status and stderr of each command of BAD, found in two processes."""
    def state():
        return {path: path.stat().st_mtime_ns for path in hostile.rglob("*") if path.is_file()}

    def tell(rows):
        commands = "\n".join(row.split(" => ")[0] for row in rows)
        told = subprocess.run([sys.executable, "-c", TELLER, ROOT], cwd=hostile, text=True,
                              capture_output=True, timeout=200, input=commands)
        return dict(zip(rows, map(json.loads, told.stdout.splitlines())))

    before = state()
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(tell, (BAD[::2], BAD[1::2]))
    assert state() == before                       # nothing overwritten, lost or left behind
    return one | two


@pytest.mark.parametrize("row", BAD)
def test_bad_input_is_one_sentence(row, complaints):
    code, said = complaints[row]
    command, words = row.split(" => ")
    *usage, last = said.strip().splitlines() or [""]
    assert code == 2 and words in last, said
    assert last.startswith(Path(command.split()[0]).name + ": "), said
    assert not usage or usage[0].startswith("usage: "), said   # argparse's own


# ------------------------------------------------------------------------- the README's recipes
PREPARED = """
import numpy as np, torch, gen_data, model
from gen_data import *
from model import *
"""
RECIPES = {
    "# a sixth task": """
name = list(gen_data.TASKS)[-1]
env = gen_data.Env((name,), ())
for seed in range(5):
    env.reset(seed)
    over = False
    while not over:
        _, _, done, late, info = env.step(gen_data.expert(env))
        over = done or late
    assert info["success"] and info["task"] == name""",
    "# another action head": """
config = model.Config(words=("lift",), head=list(model.HEADS)[-1])
net = model.VLA(config)
error, *_ = net(torch.zeros(2, 2, 64, 64, 3).byte(), torch.zeros(2, 14), torch.ones(2, 16).long(),
                target=torch.zeros(2, 8, 4), valid=torch.ones(2, 8).bool())
assert error.shape == (2, 8, 4)
error.mean().backward()
assert any(p.grad is not None and p.grad.any() for p in net.head.parameters())""",
    "# a second camera on the arm": """
name = gen_data.CAMERAS[-1]
obs, _ = gen_data.Env(cameras=("wrist", name)).reset(0)
assert name not in ("front", "wrist", "top") and obs[name + "_image"].std() > 5
assert (obs[name + "_image"] != obs["wrist_image"]).any()""",
    "# one more number in the state": """
key = gen_data.PROPRIO[-1]
env = gen_data.Env(cameras=())
obs, _ = env.reset(0)
assert key not in ("joint_pos", "ee_pos", "ee_vel", "gripper") and obs[key].dtype == np.float32
(_, arrays), *_ = gen_data.demonstrate(env, gen_data.DEMO_SEED)[0]
assert key in arrays
size = sum(obs[key].size for key in gen_data.PROPRIO)
model.Config(state_keys=gen_data.PROPRIO, state_size=size).check()""",
    "# the hand's rotation as a fifth action": """
env = Env(cameras=())
env.reset(0)
before = env.data.site_xmat[env.hand].copy()
for _ in range(10):
    env.step([0, 0, 0, 1, 1])
assert np.abs(env.data.site_xmat[env.hand] - before).max() > 0.1""",
}


@pytest.mark.parametrize("title", RECIPES)
def test_readme_recipes_do_what_they_say(title, tmp_path):
    """The block of Python that begins with this comment, run as it stands."""
    text = (ROOT / "README.md").read_text()
    block = re.search(rf"```python\n({re.escape(title)}.*?)```", text, re.S)
    assert block, f"README.md has no block {title!r}"
    done = run_code(PREPARED + block[1] + RECIPES[title], tmp_path)
    assert done.returncode == 0, done.stderr
