"""The tests: the real scripts at toy size, and what the parts promise. About 5 minutes on 2 cores, no GL, no display.

    python -m pytest -q test_smoke.py
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
os.environ.update(MUJOCO_GL="disabled", OMP_NUM_THREADS="1")    # one thread: at this size two only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)       # in the background it is ignored, by our children too

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import gen_data
from gen_data import (CAMERAS, COLORS, DEMO_SEED, FACTORS, FORCE_LIMIT, HELD_OUT, SPLITS, TASKS, TEST_SEED, Env, all_requests, expert, fill,
                      is_held_out, parse_instruction, patterns, seen_at)
from model import BC, CHARS, PROPRIO, VLA, Block, Config, split, tokenize

ROOT = Path(__file__).resolve().parent
TRAIN = ("train.py --data demos.h5 --device cpu --steps 12 --batch_size 8 --relabel 4 --log_interval 1 --eval_interval 6 "
         "--eval_episodes 2")
STATE = dict(joint_pos=7, ee_pos=3, ee_vel=3, gripper=1, object_pos=3, target_pos=3)
OBSERVATION = {k: ((n,), "float32") for k, n in STATE.items()} | {f"{c}_image": ((64, 64, 3), "uint8") for c in ("front", "wrist")}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")                            # there is no file to register the mark in
    slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def skip_slow(request):
    if request.node.get_closest_marker("slow") and request.config.getoption("-m") != "slow":
        pytest.skip("takes long; -m slow runs it")


def start(command, folder, **kwargs):
    """One of the scripts with its arguments, running in `folder`, its output kept."""
    script, *rest = shlex.split(command)
    return subprocess.Popen([sys.executable, ROOT / script, *rest], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def run(command, folder, code=0):
    """Runs it to its end and returns what it printed; on stderr if it is to fail."""
    process = start(command, folder)
    out, err = process.communicate(timeout=150)
    assert process.returncode == code, out + err
    return err if code else out


def stop_when(ready, command, folder, how=signal.SIGKILL):
    """Starts it, sends it a signal once ready() is true, and returns its exit status."""
    process = start(command, folder, start_new_session=True)
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(how)
        process.communicate(timeout=20)                        # returns when its worker processes have ended too
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


# ----------------------------------------------------------------------------- the world
@pytest.mark.parametrize("module, strangers", [("gen_data", {"torch"}), ("model", {"mujoco", "h5py"})])
def test_import_does_no_work(module, strangers, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print({strangers} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("set()\n", "", [])


def test_culled_picture_equals_full_ray_cast():
    env, labels = Env(cameras=CAMERAS), []
    for seed in (1, 2):
        env.reset(seed)
        while not env.step(expert(env))[2]:
            if env.steps % 5:
                continue
            for camera in env.cameras.values():
                culled, geoms = camera.render(env.data), camera.geom.copy()
                np.testing.assert_array_equal(culled, camera.render(env.data, cull=False))
                np.testing.assert_array_equal(geoms, camera.geom)
                for (x, y), geom in zip(seen_at(env, camera), env.block_geom):   # and labels are where the blocks are
                    if x >= 0:
                        labels.append(geoms[int(y * 64), int(x * 64)] == geom)
    assert len(labels) > 50 and np.mean(labels) > 0.8


def play(env, seed):
    """All that an expert's episode returns."""
    trace, over = [env.reset(seed)], False
    while not over:
        trace.append(env.step(expert(env)))
        over = trace[-1][2] or trace[-1][3]
    return trace


def test_env_is_a_function_of_its_seed_and_the_expert_succeeds():
    env, sentences = Env(), set()
    for seed in (DEMO_SEED, 3, 4, 5, TEST_SEED):
        trace = play(env, seed)
        obs, reward, terminated, truncated, info = trace[-1]
        assert (terminated, truncated, info["success"], info["diverged"]) == (True, False, True, False)
        assert info["touched"] == info["block"] and f" {info['block']} " in info["instruction"]
        rewards = [step[1] for step in trace[1:]]
        assert all(isinstance(r, float) and 0 <= r <= 1 for r in rewards) and rewards[-1] == 1 > rewards[0] + 0.3
        assert {k: (v.shape, v.dtype.name) for k, v in obs.items()} == OBSERVATION
        sentences.add(info["instruction"])
    assert len(sentences) > 2
    again = play(Env(), seed)                                  # a fresh world against one that has been used
    assert len(again) == len(trace)
    for a, b in zip(again, trace):
        assert a[1:] == b[1:] and all(a[0][k].tobytes() == b[0][k].tobytes() for k in a[0])


def test_env_takes_a_sentence_by_hand():
    env = Env(cameras=())
    env.reset(7)
    block, pad = env.block_colors[2], env.pad_colors[1]
    text = f"please put the {block} thing on {pad}, thanks"
    obs, info = env.reset(7, options=dict(instruction=text))
    assert (info["instruction"], info["block"], info["pad"]) == (text, block, pad)
    np.testing.assert_allclose(obs["object_pos"], env.block_pos[2], atol=1e-6)
    np.testing.assert_allclose(obs["target_pos"], env.pad_pos[1], atol=1e-6)
    for action in ([0, 0, 0], [0, 0, 0, np.nan]):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)
    slots = dict(HELD_OUT["pick_place"][0])                    # who asks for it by name gets it
    assert env.reset(7, dict(slots=slots))[1]["instruction"] and env.slots == slots
    env.set_randomize(0.5)                                     # is of the next scene
    env.step([0, 0, 0, 1])
    with pytest.raises(ValueError, match="5 colours"):
        Env(n_blocks=6)


# ----------------------------------------------------------------------------- the tasks
def solve(env, seed, **options):
    """The expert's episode; returns its last info."""
    env.reset(seed, options)
    while True:
        _, _, terminated, truncated, info = env.step(expert(env))
        if terminated or truncated:
            return info


@pytest.mark.parametrize("task", TASKS)
def test_expert_does_every_task_and_the_guard_never_acts(task):
    env = Env(tuple(TASKS), cameras=())
    for seed in range(6):
        info = solve(env, seed, task=task)
        assert (info["task"], info["success"], info["violations"]) == (task, True, 0) and info["force"] < FORCE_LIMIT
        assert len(patterns(task)) >= 6 and len(patterns(task, held_out=True)) == 2


def test_success_is_what_the_sentence_says():
    """Each task done is not the others done, nor the same with another block or direction."""
    env = Env(tuple(TASKS), cameras=())
    for seed, task in enumerate(TASKS):
        solve(env, seed, task=task)
        for other in [r for name in TASKS for r in env.requests(name) if (name, r) != env.request and len(set(r.values())) == len(r)]:
            name = next(n for n in TASKS if set(TASKS[n].slots) == set(other))
            assert not TASKS[name].success(env, **env.resolve(other)) or "drawer" in (name, task), (env.request, other)
    env.reset(1, dict(task="push", slots=dict(direction="left")))
    block, start = env.which["block"], env.data.qpos.copy()
    moves = {"left": (0, 0.09, 0), "right": (0, -0.09, 0), "forward": (0.09, 0, 0), "back": (-0.09, 0, 0)}
    for way, move in moves.items():                            # carried there by hand: only left is left
        env.data.qpos[:] = start
        env.data.qpos[env.block_qadr[block]:][:3] += move
        env._refresh()
        assert TASKS["push"].success(env, **env.which) == (way == "left")
    env.data.qpos[env.block_qadr[block]:][:3] = start[env.block_qadr[block]:][:3] + (0, 0.09, 0.05)
    env._refresh()
    env.data.qpos[env.block_qadr[block] + 2] = start[env.block_qadr[block] + 2]
    env._refresh()
    assert not TASKS["push"].success(env, **env.which)         # it has been lifted


def test_parsing_finds_the_meaning_of_every_sentence():
    for task, slots in all_requests(TASKS):
        if slots.get("block") != slots.get("lower", ""):
            for pattern in TASKS[task].sentences:
                assert parse_instruction(fill(pattern, slots)) == (task, slots), pattern
    assert parse_instruction("please shut that drawer") == ("drawer", dict(way="close"))
    assert parse_instruction("push the drawer open") == ("drawer", dict(way="open"))
    for nonsense in ("", "dance", "put it on the red target", "red green blue", "put the red block in the drawer"):
        with pytest.raises(ValueError, match="not clear"):
            parse_instruction(nonsense)


def test_splits():
    """What is held out is asked for in its own split and nowhere else, in known words."""
    train = {w for task, slots in all_requests(TASKS) for p in patterns(task) for w in split(fill(p, slots))}
    for part in SPLITS:
        env = Env(tuple(TASKS), cameras=(), split=part)
        assert env.n_blocks == (5 if part == "crowd" else 3)
        for seed, task in enumerate(["pick_place", "stack", "push"] * 4):
            info = env.reset(seed, dict(task=task))[1]
            unseen = {fill(p, env.slots) for p in patterns(task, held_out=True)}
            assert is_held_out(*env.request) == (part == "combo") and (info["instruction"] in unseen) == (part == "phrasing")
            assert set(split(info["instruction"])) <= train


def test_guard_stops_what_is_unsafe():
    env, wild = Env(cameras=()), Env(cameras=(), guard=False)
    for e in (env, wild):
        e.reset(0)
        for action in [(2, 0, 0, 1), (1, 1, 1, 1)] + [(0, 0, 1, 1)] * 15:
            info = e.step(np.array(action, float))[4]
        assert info["violations"] == sum(info["guard"].values())
    assert env.guarded["action"] == 1 and env.guarded["speed"] == 1 and env.guarded["box"] > 3 and not any(wild.guarded.values())
    assert wild.ee_pos[2] > 0.4 > 0.36 > env.ee_pos[2]         # without the guard it left the box

    forces = []
    for e in (env, wild):                                      # a block pressed into the table from above
        e.reset(3)
        for _ in range(80):
            above = e.block_pos[e.which["block"]] + [0, 0, 0.1] - e.ee_pos
            down = np.hypot(*above[:2]) < 0.004
            e.step(np.clip([*above[:2] / 0.03, -0.5 if down else above[2] / 0.03, -1], -1, 1))
        forces.append((e.force, e.guarded["force"]))
    assert forces[0][1] > 0 == forces[1][1] and forces[0][0] < forces[1][0]


def test_randomised_worlds_differ_by_their_factor_alone():
    def world(**kwargs):
        env = Env(("push",), ("front",), **kwargs)
        picture = env.reset(5)[0]["front_image"]
        m = env.model
        return env, dict(picture=picture, camera=m.cam_pos, friction=m.geom_friction, mass=m.body_mass, damping=m.dof_damping,
                         servo=m.actuator_gainprm, light=env.cameras["front"].light, color=m.geom_rgba, delay=env.late)

    normal, changed = world()[1], world(randomize=1.0)[1]
    for factor in FACTORS:
        env, alone = world(randomize=1.0, randomize_only=factor)
        differs = {k for k in alone if not np.array_equal(alone[k], normal[k])}
        shows = {"picture"} if factor in ("light", "color", "camera", "noise", "mass") else set()
        assert differs - shows == {factor} - {"noise", "delay"} and shows <= differs, factor
        if factor not in ("noise", "delay"):
            np.testing.assert_allclose(alone[factor], changed[factor])         # as in all at once
        again = world(randomize=1.0, randomize_only=factor)[1]
        assert all(np.array_equal(again[k], alone[k]) for k in alone)
    late = [seed for seed in range(12) if env.reset(seed) and env.late]
    assert 0 < len(late) < 12
    env = Env(tuple(TASKS), cameras=(), randomize=1.0)
    assert sum(solve(env, seed)["success"] for seed in range(12)) >= 9


def test_readme_example_of_another_task(monkeypatch):
    """The forking guide's code, run as it stands, makes a task that can be asked for and demonstrated."""
    code = re.search(r"```python\n(# a sixth task.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.setattr(gen_data, "TASKS", dict(TASKS))
    exec(code, {"TASKS": gen_data.TASKS, **{k: getattr(gen_data, k) for k in ("Task", "act", "put_away", "graspable", "np")}})
    name = list(gen_data.TASKS)[-1]
    env = Env(tuple(gen_data.TASKS), ())
    for seed in range(5):
        info = solve(env, seed, task=name)
        assert info["success"] and info["task"] == parse_instruction(info["instruction"])[0] == name
    monkeypatch.setattr(TASKS["lift"], "setup", lambda env, rng: env.data.qpos.__setitem__(env.block_qadr[0], 0.5), raising=False)
    env.reset(0, dict(task="lift"))
    assert env.block_pos[0, 0] == env.origin[0, 0] == 0.5      # what setup() moves is there when the first picture is taken
    episodes, _ = gen_data.demonstrate(Env((name, "lift"), ("front",)), DEMO_SEED)
    assert {attrs["task"] for attrs, _ in episodes} <= {name, "lift"}


# ----------------------------------------------------------------------------- the data file
def content(path):
    """Every array and attribute of a data file."""
    found = {}

    def keep(name, item):
        found.update({(name, key): np.asarray(value).tolist() for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = item.dtype, item.shape, item[()].tobytes()

    with h5py.File(path) as file:
        keep("", file)
        file.visititems(keep)
    return found


def test_data_file(data):
    with h5py.File(data / "demos.h5") as file:
        assert file.attrs["complete"] and file.attrs["total"] == file["data"].attrs["total"] == 24
        assert {"schema", "seed", "tasks", "control_hz", "versions", "git_commit"} <= set(file.attrs)
        assert json.loads(file["data"].attrs["env_args"])["env_kwargs"]["cameras"] == ["front", "wrist"]
        train, valid = ({name.decode() for name in file[f"mask/{part}"]} for part in ("train", "valid"))
        assert train and valid and not train & valid and train | valid == {f"demo_{i}" for i in range(24)}
        env, interrupted, requests = Env(tuple(TASKS)), 0, json.loads(file.attrs["requests"])
        assert [(r["task"], r["slots"]) for r in requests] == all_requests(TASKS)
        for i in range(24):
            episode, demo = file[f"episode_{i}"], file[f"data/demo_{i}"]
            a, n, images = episode.attrs, episode.attrs["num_samples"], episode["observations/front_image"]
            assert demo == episode and demo["obs"] == episode["observations"] and set(demo["obs"]) == set(OBSERVATION)
            assert (f"demo_{i}" in valid) == (a["scene_seed"] % 20 == 0)       # whole scenes are held out
            assert images.chunks[0] <= 8 and images.compression
            for key, (shape, dtype) in OBSERVATION.items():
                assert (demo["obs"][key].shape, demo["obs"][key].dtype) == ((n, *shape), dtype)
            for key, shape, dtype, low in (("actions", (n, 4), "f4", -1), ("rewards", (n,), "f4", 0), ("dones", (n,), "u1", 0)):
                values = demo[key][:]
                assert (values.shape, values.dtype) == (shape, dtype) and low <= values.min() <= values.max() <= 1
            assert a["success"] != a["interrupted"] and list(demo["dones"]) == [0] * (n - 1) + [a["success"]]
            interrupted += a["interrupted"]
            asked = [requests[k] for k in {int(a["request"]), *demo["grounding/other"][:]}]
            assert a["instruction"] in requests[a["request"]]["sentences"] and parse_instruction(a["instruction"])[0] == a["task"]
            assert not any(is_held_out(r["task"], r["slots"]) for r in asked)          # these are never demonstrated
            if a["sentence"] == 0:                             # what the environment shows, what the expert does, unperturbed
                obs, info = env.reset(int(a["scene_seed"]))
                assert info["instruction"] == a["instruction"] and np.array_equal(demo["actions"][0], expert(env))
                assert all(np.array_equal(value, demo["obs"][key][0]) for key, value in obs.items())
        assert 0 < interrupted < 24


def test_data_does_not_depend_on_the_number_of_workers(data, tmp_path):
    assert "24 episodes" in run("gen_data.py --tasks all --episodes 24 --workers 1 --out new/demos.h5", tmp_path)
    assert content(tmp_path / "new/demos.h5") == content(data / "demos.h5")


def test_stopped_generation_carries_on(data, tmp_path):
    command, part = "gen_data.py --tasks all --episodes 24 --out demos.h5 --workers", tmp_path / "demos.h5.part"
    for share, how, workers, code in ((0.2, signal.SIGKILL, 2, -9), (0.4, signal.SIGINT, 1, 130), (0.6, signal.SIGINT, 2, 130)):
        limit = share * (data / "demos.h5").stat().st_size
        assert code == stop_when(lambda: part.exists() and part.stat().st_size > limit, f"{command} {workers}", tmp_path, how)
        assert not (tmp_path / "demos.h5").exists()
        with h5py.File(part) as file:
            assert "complete" not in file.attrs and 0 < file.attrs["total"] < 24
    assert "carrying on from" in run(command + " 2", tmp_path)
    assert content(tmp_path / "demos.h5") == content(data / "demos.h5") and not part.exists()


# ----------------------------------------------------------------------------- the model
WORDS = tuple(sorted({w for task, slots in all_requests(TASKS) for pattern in patterns(task) for w in split(fill(pattern, slots))}))


def make_batch(n=4):
    """n pictures, two sentences that both fit each of them, and what the expert does: (2, n, 4), by sentence. The robot's
    own state is the same in all, so that neither it nor the words nor the picture alone can tell what to do."""
    env, observations, actions = Env(), [], []
    sentences = [TASKS["pick_place"].sentences[0].format(block=block, pad="green") for block in ("red", "blue")]
    for seed in range(1000):
        obs, info = env.reset(seed)
        if {"red", "blue"} <= set(env.block_colors) and "green" in env.pad_colors:
            actions.append([expert(env, ("pick_place", dict(block=block, pad="green"))) for block in ("red", "blue")])
            observations.append(obs | {k: (observations or [obs])[0][k] for k in PROPRIO})
        if len(actions) == n:
            break
    return observations, sentences, torch.tensor(np.array(actions)).transpose(0, 1)


def fit(model, batch, steps):
    """Steps of AdamW on the L1 error of the first action; returns the losses and leaves the last gradients in place."""
    observations, sentences, actions = batch
    images, state = model.read_obs(observations)
    text = torch.stack([tokenize(s, model.config) for s in sentences])
    frame, sentence = torch.arange(len(images)).repeat(2), torch.arange(2).repeat_interleave(len(images))
    optimizer, losses = torch.optim.AdamW(model.parameters()), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-4 * (1 - step / steps)
        optimizer.zero_grad()
        planned, goal, attention = model(images, state, text, frame, sentence)
        loss = (planned[:, 0] - actions.flatten(0, 1)).abs().mean()
        (loss + 1e-3 * (planned.square().mean() + goal.square().mean() - attention[..., 0].mean())).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="session")
def batch():
    return make_batch()


@pytest.fixture(scope="session")
def fitted(batch):
    """A VLA after 100 steps on one small batch; that batch; the losses."""
    torch.manual_seed(0)
    model = VLA(Config(words=WORDS))
    losses = fit(model, batch, 100)
    return model.eval(), batch, losses


@pytest.mark.parametrize("choice", [dict(), *(dict([pair]) for pair in [
    ("vision", "vit"), ("vision", "cnn"), ("keep", 80), ("frames", 3), ("cameras", ("front",)), ("cameras", CAMERAS), ("coarse", ()),
    ("text", "char"), ("text_encoder", "lstm"), ("pointers", 0), ("fusion", "transformer"), ("fusion", "concat"), ("fusion", "multiply"),
    ("head", "tokens"), ("bins", 16), ("head", "flow"), ("flow_steps", 10), ("loss", "mse"), ("chunk", 1), ("chunk", 16),
    ("ensemble", True), ("state", "full"), ("state", "none"), ("width", 64), ("heads", 8), ("layers", 1)])], ids=str)
def test_every_choice_builds_learns_saves_and_acts(choice, batch, tmp_path):
    torch.manual_seed(0)
    needs = dict(bins=dict(head="tokens"), flow_steps=dict(head="flow"), text=dict(max_text=96), chunk=dict(execute=1))
    config = Config(words=WORDS, **choice, **needs.get(next(iter(choice), None), {}))
    config.check()
    model, (observations, sentences, actions) = VLA(config), batch
    assert choice or 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    observations = [o | dict(top_image=o["front_image"]) for o in observations]
    images, state = model.read_obs(observations)
    text = torch.stack([tokenize(sentences[0], config)] * len(images))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):                                         # outputs start at zero: not yet at the first step
        optimizer.zero_grad()
        wanted = actions[0][:, None].repeat(1, config.chunk, 1)
        error, goal, attention = model(images, state, text, wanted=wanted)
        assert error.shape == (4, config.chunk, 4) and attention.shape[0] == 4
        (error.mean() + goal.square().mean() - 0.01 * attention.sum()).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.save(tmp_path / "ckpt.pt")
    policies = model.eval(), VLA.load(tmp_path / "ckpt.pt")
    model.reset()
    for obs in observations * 3:
        a, b = (policy.predict(obs, sentences[0]) for policy in policies)
        assert a.tobytes() == b.tobytes() and a.shape == (4,) and a.dtype == np.float32 and np.abs(a).max() <= 1


def test_acting_follows_the_config(batch):
    """Chunk, ensemble and integration steps of one and the same set of weights."""
    torch.manual_seed(0)
    (obs, *_), (sentence, other), _ = batch
    model, taken = VLA(Config(words=WORDS, head="flow")).eval(), {}
    for name, choice in dict(default={}, steps=dict(flow_steps=1), execute=dict(flow_steps=4, execute=1), ensemble=dict(ensemble=True)).items():
        vars(model.config).update(choice)
        model.reset()
        moved = [obs | dict(ee_pos=obs["ee_pos"] + 0.1 * t) for t in range(3)]
        taken[name] = [model.predict(o, sentence) for o in moved]
    chunks = np.stack([model.plan([o], [sentence])[0] for o in moved])           # (3, K, A)
    np.testing.assert_allclose(taken["default"], chunks[0, :3], atol=1e-6)
    np.testing.assert_allclose(taken["execute"], chunks[:, 0], atol=1e-6)
    assert not np.allclose(taken["steps"][0], taken["default"][0], atol=1e-3)
    weights = np.exp(-0.01 * np.arange(3))
    np.testing.assert_allclose(taken["ensemble"][2], weights / weights.sum() @ [chunks[0, 2], chunks[1, 1], chunks[2, 0]], atol=1e-6)


def test_computing_only_the_cls_row_is_the_same_function():
    torch.manual_seed(0)
    block, x, others = Block(32, 4), torch.randn(3, 9, 32), torch.randn(3, 4, 5, 16)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for more in (None, others):
        row, logits = block(x, more, rows=1)
        assert logits.shape == (3, 4, 1, 9 if more is None else 14)
        torch.testing.assert_close(row, block(x, more)[:, :1], atol=1e-4, rtol=1e-4)


def test_what_is_called_by_name_does_not_depend_on_the_other_name():
    """With the colours in context shuffled, as train.py does, a pointer's query depends on its own colour alone."""
    torch.manual_seed(0)
    model = VLA(Config(words=WORDS))
    told = [f"pick up the {a} block and place it at the {b} target" for a, b in (("red", "blue"), ("red", "green"), ("green", "red"))]
    text = torch.stack([tokenize(s, model.config) for s in told])
    same = text[:1].expand(3, -1)
    words, queries = model.read(same, text)
    torch.testing.assert_close(words, model.read(same)[0])     # names do not reach the words in their context
    assert not torch.allclose(queries[0], queries[1]) and not torch.allclose(model.read(text)[0][0], model.read(text)[0][1])


def test_one_batch_overfits_by_looking_and_listening(fitted):
    model, (observations, sentences, actions), losses = fitted
    deaf, blind = ((actions - actions.median(dim, keepdim=True).values).abs().mean() for dim in (0, 1))
    assert losses[-1] < 0.6 * min(deaf, blind), losses[::10]   # out of reach for who ignores either
    planned = np.stack([model.plan(observations, [s] * len(observations))[:, 0] for s in sentences])
    assert np.abs(planned[0] - planned[1]).mean() > 0.1        # other words, same picture
    assert np.abs(planned - np.roll(planned, 1, axis=1)).mean() > 0.1      # other picture, same words and joints


def test_reloaded_checkpoint_acts_identically(fitted, trained, tmp_path):
    model, (observations, sentences, _), _ = fitted
    model.save(tmp_path / "ckpt.pt", step=100)
    assert list(tmp_path.iterdir()) == [tmp_path / "ckpt.pt"] and (trained / "out/ckpt.pt").stat().st_size <= 6e6
    model.reset()
    policies = model, VLA.load(tmp_path / "ckpt.pt")
    for obs in observations * 3:
        a, b = (policy.predict(obs, sentences[0]) for policy in policies)
        assert a.tobytes() == b.tobytes()


def test_predict_executes_the_chunk_and_listens(fitted, monkeypatch):
    model, (observations, sentences, _), _ = fitted
    looks, plan = [], model.plan
    monkeypatch.setattr(model, "plan", lambda *a: looks.append(plan(*a)) or looks[-1])
    model.reset()
    keys = ("front_image", "wrist_image", *PROPRIO)
    obs = {k: observations[0][k] for k in keys}                # proprio needs no more than this
    actions = [model.predict(obs, sentences[0]) for _ in range(model.config.execute)]
    assert len(looks) == 1 and np.array_equal(actions, looks[0][0, :model.config.execute])
    assert actions[0].shape == (4,) and actions[0].dtype == np.float32 and np.abs(actions).max() <= 1
    model.predict(obs, sentences[0])
    assert len(looks) == 2                                     # the chunk was used up
    model.predict(obs, sentences[1])
    assert len(looks) == 3                                     # a new sentence, at once
    with pytest.raises(ValueError, match="wrist_image"):
        model.predict({k: v for k, v in obs.items() if k != "wrist_image"}, sentences[0])
    model.reset()
    with pytest.raises(ValueError, match="needs a sentence"):
        model.predict(obs)
    bc = BC(Config(model="bc", state="full", cameras=(), chunk=1, execute=1))
    assert np.array_equal(bc.predict(observations[0]), bc.predict(observations[0], "anything"))


def test_text():
    config = Config(words=WORDS)
    sentence = "Pick up the RED block, and place it at the green target."
    assert torch.equal(tokenize(sentence, config), tokenize(sentence.lower().replace(",", ""), config))
    with pytest.raises(ValueError, match="'banana'.*" + " ".join(WORDS)):
        tokenize("pick up the red banana and place it at the green target", config)
    chars = Config(words=WORDS, text="char", max_text=96)
    with pytest.warns(UserWarning, match="'banana'"):
        ids = tokenize("red banana", chars)
    assert "".join(CHARS[i - 1] for i in ids if i) == "red banana" and ids.shape == (96,)
    with pytest.raises(ValueError, match="too long"):
        tokenize("red " * 99, chars)


# ----------------------------------------------------------------------------- the scripts
def read_log(path):
    """{step: losses}; a resumed run may log a step twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if "loss" in k or k.startswith("val_")} for line in lines}


def test_training_is_a_function_of_its_seed_and_resumes_exactly(trained, tmp_path):
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    whole, log = read_log(trained / "out/log.jsonl"), tmp_path / "out/log.jsonl"
    assert list(whole) == list(range(1, 13)) and all(np.isfinite(v) for line in whole.values() for v in line.values())
    assert stop_when((tmp_path / "out/resume.pt").exists, TRAIN, tmp_path) == -signal.SIGKILL     # written after step 6
    assert 6 <= len(read_log(log)) < 12
    run("train.py --resume out --eval_interval 0", tmp_path)   # with the settings it was started with
    assert read_log(log) == whole
    for name in ("ckpt.pt", "resume.pt"):                      # bit for bit; the one before is kept
        there, here = (torch.load(folder / "out" / name, weights_only=True) for folder in (trained, tmp_path))
        assert all(torch.equal(there["weights"][k], v) for k, v in here["weights"].items()) and there["fingerprint"] == here["fingerprint"]
        assert torch.load(tmp_path / "out" / f"previous_{name}", weights_only=True)["step"] == 6
    run("train.py --resume out --eval_interval 0 --steps 14 --lr 0.01", tmp_path)        # what is said goes before what was
    assert list(read_log(log)) == list(range(1, 15)) and VLA.load(tmp_path / "out/ckpt.pt").step == 14
    assert json.loads(log.read_text().splitlines()[-1])["lr"] == pytest.approx(0.01 / (0.6 * 14))        # the last of the way down


@slow                                                          # two threads wait for each other wherever something else runs
def test_two_threads_train_the_same_twice(trained, tmp_path):
    logs = []
    for name in "ab":
        process = start(f"{TRAIN} --steps 20 --batch_size 64 --relabel 16 --eval_interval 0 --data {trained / 'demos.h5'} --out_dir {name}", tmp_path,
                        env=os.environ | {"OMP_NUM_THREADS": "2"})
        assert process.wait(150) == 0, process.communicate()
        logs.append(read_log(tmp_path / name / "log.jsonl"))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_saves_and_says_how_to_go_on(how, trained, tmp_path):
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    log = tmp_path / "out/log.jsonl"
    assert stop_when(lambda: log.exists() and log.stat().st_size, TRAIN + " --steps 500 --eval_interval 1000", tmp_path, how) == 130
    step = VLA.load(tmp_path / "out/ckpt.pt").step
    assert 1 <= step < 500 and len(read_log(log)) == step


def test_a_training_that_is_stopped_while_its_data_is_made_stops_that_too(tmp_path):
    part = tmp_path / "new.h5.part"
    ready = lambda: part.exists() and part.stat().st_size > 500_000
    assert stop_when(ready, "train.py --data new.h5 --episodes 2000", tmp_path, signal.SIGTERM) == 130
    with h5py.File(part) as file:                              # whole, and nobody writes it any more
        assert 0 < file.attrs["total"] < 2000


def test_bad_numbers_stop_the_run_and_spoil_nothing(trained, tmp_path):
    """In the file: refused with the episode's name. In training: the step and the episodes, and the last checkpoint stays."""
    shutil.copy(trained / "demos.h5", tmp_path)
    process = start(TRAIN + " --adam_lr 1e30 --lr 1e30 --eval_interval 1", tmp_path)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and re.search(r"train.py: the loss is (nan|inf) at step (\d+), on episodes \d+, ", err), err
    assert VLA.load(tmp_path / "out/ckpt.pt").step == int(re.search(r"at step (\d+)", err)[1]) - 1
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        file["episode_7/observations/ee_vel"][3, 1] = np.nan
    assert "ee_vel of episode_7 is not all finite" in run(TRAIN + " --out_dir new", tmp_path, code=2)
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        file["episode_7/observations/ee_vel"][3, 1] = 0
        file["episode_5/actions"][0, 2] = 1.5
    assert "actions of episode_5 is not all finite numbers in [-1, 1]" in run(TRAIN + " --out_dir new", tmp_path, code=2)
    with h5py.File(tmp_path / "demos.h5", "a") as file:        # now it is a good file, but another one
        file["episode_5/actions"][0, 2] = 0.5
    assert "other demonstrations" in run(f"train.py --resume {trained}/out --steps 20 --data demos.h5", tmp_path, code=2)


def test_what_only_a_simulator_knows_may_be_zeros(trained, tmp_path):
    shutil.copy(trained / "demos.h5", tmp_path)
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        for i in range(file.attrs["total"]):
            for value in (*file[f"episode_{i}/grounding"].values(), *(file[f"episode_{i}/observations/{k}"] for k in ("object_pos", "target_pos"))):
                value[:] = 0
    run(TRAIN.replace("--relabel 4", "--relabel 0") + " --ground 0 --goal 0 --release 1 --steps 2 --eval_interval 0", tmp_path)
    assert read_log(tmp_path / "out/log.jsonl")[2]["loss"] > 0


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(trained, tmp_path):
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    (tmp_path / "out/ckpt.pt.part").mkdir(parents=True)        # where it is to be written first
    process = start(TRAIN, tmp_path)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and err.startswith("train.py: cannot write a checkpoint in out (") and err.count("\n") == 1, err


@pytest.mark.parametrize("command, room", [("gen_data.py --episodes 40 --workers 1 --out new.h5", 300_000), (TRAIN, 3_000_000)])
def test_a_full_disk_is_one_sentence_and_spoils_nothing(command, room, trained, tmp_path):
    """No file may grow beyond `room` bytes, which is what a full disk looks like from inside."""
    resource = pytest.importorskip("resource")
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    full = start(command, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    err = full.communicate(timeout=100)[1]
    assert full.returncode == 1 and err.splitlines()[-1].startswith(command.split()[0] + ": cannot write"), err      # HDF5 complains first
    assert not (tmp_path / "new.h5").exists() and not (tmp_path / "out/ckpt.pt").exists()


def test_data_larger_than_memory_is_refused_before_loading(trained):
    code = ("import pathlib, runpy, sys; read = pathlib.Path.read_text; sys.argv[1:] = '--data demos.h5 --out_dir new'.split(); "
            "pathlib.Path.read_text = lambda p, *a, **k: 'MemAvailable: 900 kB' if p.name == 'meminfo' else read(p, *a, **k); "
            f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, text=True, capture_output=True, timeout=100)
    assert done.returncode == 2 and re.fullmatch("train.py: demos.h5 needs 0.0 GB of memory and 0.0 GB are free; .*\n", done.stderr), done.stderr


def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path):
    """One byte of it is another: it is refused, or it loads, but it never does anything else."""
    whole, dice, refused = (trained / "out/ckpt.pt").read_bytes(), np.random.default_rng(0), 0
    for at in [*dice.integers(0, len(whole), 20), *dice.integers(0, 3000, 20), *dice.integers(len(whole) - 3000, len(whole), 20)]:
        (tmp_path / "ckpt.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(dice.integers(8))]) + whole[at + 1:])
        try:
            VLA.load(tmp_path / "ckpt.pt")
        except ValueError as error:
            assert "is not a checkpoint of this model" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 5


@slow
def test_damaged_data_is_one_sentence(trained, tmp_path):
    whole, dice = (trained / "demos.h5").read_bytes(), np.random.default_rng(0)
    for at in [*dice.integers(0, len(whole), 10), *dice.integers(0, 5000, 15), *dice.integers(len(whole) - 5000, len(whole), 15)]:
        (tmp_path / "demos.h5").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(dice.integers(8))]) + whole[at + 1:])
        process = start(f"{TRAIN} --steps 1 --eval_interval 0 --out_dir {at}", tmp_path)
        err = process.communicate(timeout=100)[1]
        assert process.returncode == 0 or process.returncode == 2 and err.count("\n") == 1, (at, err)


@slow
def test_several_processes_and_files_train_as_one(tmp_path):
    """Two processes, each with the pictures of half of the episodes of two files, do what one does with all."""
    for i in (1, 2):
        run(f"gen_data.py --tasks all --episodes 12 --shard {i}/2 --out shards/{i}.h5", tmp_path)
    seeds = []
    for i in (1, 2):
        with h5py.File(tmp_path / f"shards/{i}.h5") as file:
            seeds += [int(file[f"episode_{n}"].attrs["scene_seed"]) for n in range(12)]
    assert len({*seeds[:12]} & {*seeds[12:]}) == 0 and min(seeds) == DEMO_SEED and max(seeds) < DEMO_SEED + 100_000
    command = TRAIN.replace("demos.h5", "'shards/*.h5'") + " --eval_interval 0 --dtype float32 --out_dir "
    run(command + "one", tmp_path)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *shlex.split(f"{ROOT}/{command} two")]
    done = subprocess.run(two, cwd=tmp_path, text=True, capture_output=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert list(one) == list(two) == list(range(1, 13))
    for step in one:
        assert one[step] == pytest.approx(two[step], rel=2e-3), step
    assert done.stdout.count("validation") == 12               # one of them speaks


def test_eval(trained, tmp_path):
    for out, flags in (("all.json", "--policies expert,random,policy --controls"), ("again.json", "")):
        run(f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 3 --out {out} {flags}", tmp_path)
    result, again = (json.loads((tmp_path / name).read_text()) for name in ("all.json", "again.json"))
    lines, lines_again = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                          for name in ("all.jsonl", "again.jsonl"))
    rows = {(row["policy"], row["control"]): row for row in result["rows"] if row["task"] == "all"}
    assert list(rows) == [("expert", "none"), ("random", "none"), *(("vla", c) for c in ("none", "blind", "deaf", "swap", "retarget"))]
    for (policy, control), row in rows.items():
        assert {"split", "reward", "steps", "violations", "guard", "force_p95", "force_max"} <= set(row) and row["n"] == 3
        assert 0 <= row["low"] <= row["k"] / 3 <= row["high"] <= 1 and row["high"] - row["low"] > 0.4
        parts = [r for r in result["rows"] if (r["policy"], r["control"]) == (policy, control) and r["task"] != "all"]
        assert [r["task"] for r in parts] == list(TASKS)[:3] and sum(r["k"] for r in parts) == row["k"]
        mine = [line for line in lines if (line["policy"], line["control"]) == (policy, control)]
        assert [line["seed"] for line in mine] == [TEST_SEED, TEST_SEED + 1, TEST_SEED + 2]
        assert sum(line["success"] for line in mine) == row["k"] and {"told", "touched"} <= set(mine[0])
        for line in mine:
            assert dict(deaf=line["told"] == "", swap=line["told"] != line["original"], retarget=line["told"] != line["original"]).get(
                control, line["told"] == line["original"])
    assert rows["expert", "none"]["k"] == 3 and rows["random", "none"]["k"] == 0
    assert rows["expert", "none"]["violations"] == 0 < rows["random", "none"]["violations"]
    assert abs(rows["expert", "none"]["low"] - 0.4385) < 1e-3  # Wilson at 3 of 3: n / (n + 1.96^2)
    assert 0.01 < rows["expert", "none"]["chance"] < 0.2 and result["fingerprint"]["torch"] == torch.__version__
    mine = [row for row in result["rows"] if (row["policy"], row["control"]) == ("vla", "none")]     # the same scenes again:
    seconds = again["rows"][0]["seconds"]                                                            # the same to the last bit
    assert again["rows"] == [row | dict(seconds=seconds) for row in mine]
    assert lines_again == [line for line in lines if (line["policy"], line["control"]) == ("vla", "none")]


def test_eval_does_not_depend_on_the_number_of_threads(trained, tmp_path):
    code = (f"import os, runpy, sys; os.cpu_count = lambda: int(os.environ['CORES']); sys.path.insert(0, {str(ROOT)!r}); "
            f"runpy.run_path({str(ROOT / 'eval.py')!r}, run_name='__main__')")
    flags = f"--ckpt {trained}/out/ckpt.pt --episodes 3 --out"
    both = [subprocess.Popen([sys.executable, "-c", code, *flags.split(), f"{cores}.json"], cwd=tmp_path, env=os.environ | dict(CORES=cores))
            for cores in "14"]
    assert [process.wait(100) for process in both] == [0, 0]
    one, four = ((tmp_path / f"{cores}.jsonl").read_text() for cores in "14")
    assert one == four and one.count("\n") == 3


def test_eval_in_other_words_and_worlds(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("lift\tgrab the {block} cube and raise it\ndrawer\tshut the drawer\npush\tkick the {block} cube {towards}\n")
    out = run(f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 2 --instructions mine.txt --sensitivity --out a.json", tmp_path)
    assert "does not know the word 'kick'" in out and "sensitivity: two sentences" in out
    run(f"eval.py --ckpt {trained}/out/ckpt.pt,{trained}/out/ckpt.pt --episodes 2 --tasks lift,drawer --sensitivity --latency --out b.json", tmp_path)
    told = [("sensitivity" in row, "latency_ms" in row, row["task"]) for row in json.loads((tmp_path / "b.json").read_text())["rows"]]
    assert told == [(False, False, "lift"), (False, False, "drawer"), (True, True, "all")] * 2
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["task"], row["n"]) for row in rows] == [("lift", 2), ("drawer", 2)]
    told = [json.loads(line)["told"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert re.fullmatch("grab the [a-z]+ cube and raise it", told[0]) and told[2:] == ["shut the drawer"] * 2
    run(f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 1 --transfer --tasks lift --out t.json", tmp_path)
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["world"] for row in rows] == ["normal", *FACTORS, "all"] and Image.open(tmp_path / "t.png").width > 500


def test_ablations_train_and_score_each_line_once(trained, tmp_path):
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    (tmp_path / "a.txt").write_text("all: --data demos.h5 --steps 2 --batch_size 8 --relabel 4 --log_interval 1 --state none\n"
                                    "words by lstm: --text_encoder lstm --frames 2\nflow: --head flow --chunk 4 --use_episodes 12\n"
                                    "classic: --recipe classic --steps 3\nsteps 2: --head flow --chunk 4 --use_episodes 12\n"
                                    "steps 3: --recipe classic --steps 3\n")
    command = "eval.py --ablate a.txt --episodes 1 --tasks lift --out a.json"
    run(command, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/ablate/*/*")}
    (tmp_path / "a.json").unlink()
    (tmp_path / "out/ablate/flow/curve.png").unlink()          # as if that one had been stopped
    files = {path: at for path, at in files.items() if path.parent.name != "flow"}
    table = run(command, tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in files}        # not trained again
    assert (tmp_path / "out/ablate/flow/curve.png").exists()
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == ["words by lstm", "flow, steps 2", "classic, steps 3"] and not (tmp_path / "out/ablate/steps 2").exists()
    assert all(f"| {name} | 0/1 = " in table for name in ("words by lstm", "flow", "classic", "steps 2", "steps 3"))
    assert Image.open(tmp_path / "a.png").width > 400          # a curve of the lines steps 2 and steps 3
    assert all(row["n"] == 1 and row["parameters"] > 5e5 and row["samples_per_s"] > 0 and row["latency_ms"] for row in rows.values())
    (tmp_path / "a.txt").write_text("flow: --data demos.h5 --steps 3 --head flow\n")
    assert "other flags" in run(command, tmp_path, code=2)
    classic = VLA.load(tmp_path / "out/ablate/classic/ckpt.pt")
    assert (classic.step, classic.config.vision, classic.config.chunk, classic.config.pointers) == (3, "vit", 1, 0)


def test_play_writes_a_gif(trained, tmp_path):
    out = run(f"play.py --ckpt {trained}/out/ckpt.pt --seed 3 --size 256 --out a.gif", tmp_path)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames > 5 and min(gif.size) >= 256 and "scene 3" in out


def test_play_shows_several_scenes_and_attention(trained, tmp_path):
    out = run(f"play.py --ckpt {trained}/out/ckpt.pt --seed 0,1 --size 128 --attention --out a.png", tmp_path)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 4 * 2 * (128 + 64) and "scene 0" in out and "scene 1" in out


def test_play_shows_the_inside_and_counts_where_it_looks(trained, tmp_path):
    run(f"play.py --ckpt {trained}/out/ckpt.pt --seed 1 --size 128 --pipeline --out a.png", tmp_path)
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.width > 1000 and np.std(np.asarray(figure)) > 20
    found = re.findall(r"pointer to the (\w+) +(\d+)/(\d+)", run(f"play.py --ckpt {trained}/out/ckpt.pt --attention --episodes 1 --tasks stack", tmp_path))
    assert [name for name, *_ in found[:2]] == ["thing", "place"] and all(0 <= int(k) <= int(n) <= 200 for _, k, n in found)
    VLA(Config(words=WORDS, text="char", max_text=96, frames=2, width=100, tasks=("lift",))).save(tmp_path / "char.pt")
    run("play.py --ckpt char.pt --seed 1 --size 128 --pipeline --out b.png", tmp_path)
    assert "its colour" not in run("play.py --ckpt char.pt --attention --episodes 1", tmp_path)


def test_demonstrations_without_noise_replay_exactly(data, tmp_path):
    """Sentence after sentence; what noise had a hand in mostly does not."""
    run("gen_data.py --tasks all --episodes 12 --noise 0 --workers 1 --out clean.h5", tmp_path)
    k, n = re.search(r"(\d+) of the (\d+) ", run("play.py --data clean.h5 --replay --episodes 12", tmp_path)).groups()
    assert k == n and int(n) > 4
    k, n = re.search(r"(\d+) of the (\d+) ", run(f"play.py --data {data}/demos.h5 --replay --episodes 24", tmp_path)).groups()
    assert int(k) < int(n)
    out = run("play.py --data clean.h5 --episode 2 --size 128 --out a.png", tmp_path)
    with h5py.File(tmp_path / "clean.h5") as file, Image.open(tmp_path / "a.png") as sheet:
        assert file["episode_2"].attrs["instruction"] in out and sheet.width == 4 * 2 * 128


def test_info_says_what_is_in_a_file(data, tmp_path):
    (tmp_path / "demos.h5").symlink_to(data / "demos.h5")
    out = run("gen_data.py --info demos.h5", tmp_path)
    with h5py.File(data / "demos.h5") as file:
        episodes = [dict(file[f"episode_{i}"].attrs) for i in range(24)]
    for task in TASKS:
        mine = [e for e in episodes if e["task"] == task]
        assert f"{len(mine)} episodes, {sum(e['interrupted'] for e in mine)} of them interrupted" in out
    with Image.open(tmp_path / "demos.png") as figure:
        assert figure.width > 600 and np.std(np.asarray(figure)) > 20


def test_play_asks_for_sentences_without_a_display(trained, tmp_path):
    """An unknown word, a block that is not there and another scene on the way; end of input ends it."""
    env = Env(cameras=())
    env.reset(0)
    absent = next(c for c in COLORS if c not in env.block_colors)
    done = subprocess.run([sys.executable, ROOT / "play.py", "--ckpt", trained / "out/ckpt.pt", "--seed", "0", "--size", "128"],
                          cwd=tmp_path, text=True, capture_output=True, input=f"hello there\npick the {absent} block and put it on "
                          f"the {env.pad_colors[0]} target\nseed 7\nhelp\nrandomize 3\nrandomize 0.5\nreset\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr and not list(tmp_path.glob("out/*"))
    assert "does not know the word 'hello'" in done.stdout and f"no {absent} block" in done.stdout and "scene 7" in done.stdout
    assert "from 0 to 1, not 3.0" in done.stdout


def test_bc_trains_on_data_that_it_makes(tmp_path):
    out = run("train.py --model bc --data new/demos.h5 --episodes 6 --steps 30 --log_interval 15 --eval_interval 30 "
              "--eval_episodes 1 --out_dir bc", tmp_path)
    assert "making 6 demonstrations" in out and re.search(r"bc +- +[01]/1 = ", out)
    log = read_log(tmp_path / "bc/log.jsonl")
    assert log[30]["loss"] < log[15]["loss"] and VLA.load(tmp_path / "bc/ckpt.pt").config.state == "full"


# ----------------------------------------------------------------------------- bad input
@pytest.fixture(scope="session")
def hostile(trained):
    """The trained folder with broken and foreign files added."""
    whole = (trained / "demos.h5").read_bytes()
    (trained / "cut.h5").write_bytes(whole[:len(whole) // 2])
    (trained / "text").write_text("neither a checkpoint nor data\n")
    (trained / "empty.txt").write_text("\n")
    (trained / "settings.txt").write_text("default: --data demos.h5 --steps 2\n")
    (trained / "quote.txt").write_text("default: --data 'demos.h5\n")
    (trained / "slot.txt").write_text("lift\traise the {thing}\n")
    (trained / "task.txt").write_text("juggle\tjuggle the {block} block\n")
    with h5py.File(trained / "foreign.h5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((5, 7))
    saved = torch.load(trained / "out/ckpt.pt", weights_only=True)
    saved["config"]["width"] = 64
    torch.save(saved, trained / "other.pt")
    saved["config"].update(width=128, words=[word[::-1] for word in saved["config"]["words"]])
    torch.save(saved, trained / "foreign.pt")
    (trained / "torn").mkdir()
    (trained / "torn/resume.pt").write_bytes((trained / "out/resume.pt").read_bytes()[:-5000])
    (trained / "older").mkdir()                                # as of a train.py that did not have --spread yet
    resume = torch.load(trained / "out/resume.pt", weights_only=True)
    del resume["settings"]["spread"]
    torch.save(resume, trained / "older/resume.pt")
    BC(Config(model="bc", state="full", cameras=(), chunk=1, execute=1)).save(trained / "bc.pt")
    return trained


BAD = [
    ("gen_data.py --episodes 0 --out new.h5", "--episodes"),
    ("gen_data.py --shard 3/2 --out new.h5", "--shard"),
    ("train.py --data 'shards/*.h5' --out_dir new", "there is no shards/*.h5"),
    ("gen_data.py --workers -2 --out new.h5", "--workers"),
    ("gen_data.py --tasks juggle --out new.h5", "'juggle'"),
    ("gen_data.py --cameras front,rear --out new.h5", "'rear'"),
    ("gen_data.py --episodes 2 --out demos.h5", "demos.h5 exists"),
    ("gen_data.py --episodes 2 --out text/new.h5", "cannot write"),
    ("train.py --data demos.h5 --out_dir new --steps 0", "--steps"),
    ("train.py --data demos.h5 --out_dir new --batch_size -8", "--batch_size"),
    ("train.py --data demos.h5 --out_dir new --release -1", "--release"),
    ("train.py --data demos.h5 --out_dir new --execute 9", "--execute 9"),
    ("train.py --data demos.h5 --out_dir new --execute 0", "--execute must be at least 1"),
    ("train.py --data new.h5 --out_dir new --cameras front,top", "without camera top"),
    ("train.py --bench --model bc", "--bench is about the vla"),
    ("train.py --data demos.h5 --out_dir new --vision cnn --ground 1", "--vision cnn"),
    ("train.py --data demos.h5 --out_dir new --pointers 0 --ground 1", "without pointers only --fusion transformer"),
    ("train.py --data demos.h5 --out_dir new --head flow --bins 16", "--head tokens"),
    ("train.py --data demos.h5 --out_dir new --pointers 0 --shuffle_names 1", "--pointers 0"),
    ("train.py --data demos.h5 --out_dir new --text char --spread 1", "--text char"),
    ("train.py --data demos.h5 --out_dir new --text char --shuffle_names 1", "--text char"),
    ("eval.py --ckpt out/ckpt.pt --flow_steps 2", "--head flow"),
    ("train.py --data demos.h5 --out_dir new --head tokens --bins 1", "--bins"),
    ("train.py --data demos.h5 --out_dir new --model bc --head flow", "--head is about the vla"),
    ("train.py --data demos.h5 --out_dir new --model bc --state none", "--state none"),
    ("train.py --data demos.h5 --out_dir new --width 100 --heads 3", "--width 100"),
    ("train.py --data demos.h5 --out_dir new --ensemble --chunk 1", "--chunk"),
    ("train.py --data demos.h5 --out_dir new --use_episodes 900", "--use_episodes 900"),
    ("eval.py --ablate empty.txt", "NAME"),
    ("eval.py --ablate missing.txt", "cannot read missing.txt"),
    ("eval.py --ablate quote.txt", "quotation"),
    ("eval.py --ckpt out/ckpt.pt --seed 999990 --episodes 20", "the range for choosing into that for reporting"),
    ("eval.py --ckpt out/ckpt.pt --policies expert --instructions task.txt", "--policies"),
    ("eval.py --ablate settings.txt --tasks juggle", "'juggle'"),      # before anything is trained
    ("eval.py --ablate settings.txt --out text/a.json", "cannot write"),
    ("eval.py --ablate settings.txt --policies expert", "--ablate scores"),
    ("play.py --ckpt out/ckpt.pt --pipeline --seed 1,2 --out a.png", "one --seed"),
    ("play.py --data demos.h5 --replay --out a.gif", "only count"),
    ("play.py --data demos.h5 --attention --out a.gif", "what was recorded"),
    ("play.py --data cut.h5 --out a.gif", "cut.h5"),
    ("gen_data.py --info cut.h5", "cut.h5 is not a data file"),
    ("eval.py --ckpt out/ckpt.pt --execute 9", "--execute 9"),
    ("train.py --data cut.h5 --out_dir new", "cut.h5"),
    ("train.py --data cut.h5 --out_dir out --overwrite", "cut.h5"),
    ("train.py --data foreign.h5 --out_dir new", "foreign.h5"),
    ("train.py --data demos.h5 --out_dir text/new", "cannot write"),
    ("train.py --data demos.h5 --out_dir out", "--overwrite"),
    ("train.py --data demos.h5 --resume new", "nothing to resume"),
    ("train.py --data demos.h5 --resume out --out_dir new", "without --out_dir"),
    ("train.py --data demos.h5 --out_dir new --optimizer adamw --lr 1e-3", "--adam_lr"),
    ("train.py --data demos.h5 --out_dir new --pointers 0 --fusion transformer --heads 1 --ground 1", "--heads 2 or more"),
    ("train.py --data demos.h5 --out_dir new --model bc --relabel 3", "--relabel is about the vla"),
    ("train.py --data demos.h5 --resume torn", "cannot be resumed from"),
    ("train.py --data demos.h5 --resume older", "--spread is new or gone"),
    ("train.py --data demos.h5 --out_dir out --resume --model bc", "another configuration"),
    ("gen_data.py --randomize 3 --out new.h5", "--randomize must be from 0 to 1"),
    ("gen_data.py --randomize 1 --randomize_only gravity --out new.h5", "'light'"),
    ("train.py --data demos.h5 --out_dir new --tasks lift", "not lift"),
    ("eval.py --ckpt out/ckpt.pt --split other", "'crowd'"),
    ("eval.py --ckpt out/ckpt.pt --split combo --tasks lift", "no colours are held out"),
    ("eval.py --ckpt out/ckpt.pt --split combo --controls", "another split"),
    ("eval.py --ckpt out/ckpt.pt --randomize 3", "--randomize must be from 0 to 1"),
    ("eval.py --ckpt out/ckpt.pt --randomize 1 --randomize_only gravity", "light"),
    ("eval.py --ckpt out/ckpt.pt --instructions empty.txt", "empty.txt is empty"),
    ("eval.py --ckpt out/ckpt.pt --instructions slot.txt", "{{block}}"),
    ("eval.py --ckpt out/ckpt.pt --instructions task.txt", "pick_place"),
    ("eval.py --ckpt out/ckpt.pt --transfer", "--out"),
    ("eval.py --ckpt out/ckpt.pt --controls --instructions task.txt", "one at a time"),
    ("eval.py --ckpt out/ckpt.pt --randomize_only light", "--randomize"),
    ("gen_data.py --randomize_only light --out new.h5", "--randomize"),
    ("play.py --ckpt out/ckpt.pt --out a.gif --tasks juggle", "'juggle'"),
    ("eval.py --ckpt missing.pt", "no checkpoint missing.pt"),
    ("eval.py --ckpt text", "not a checkpoint"),
    ("eval.py --ckpt other.pt", "not a checkpoint"),
    ("eval.py --ckpt foreign.pt --episodes 1", "does not know the word"),
    ("eval.py --ckpt out/ckpt.pt --episodes 0", "--episodes"),
    ("eval.py --ckpt out/ckpt.pt --tasks juggle", "'juggle'"),
    ("eval.py --ckpt out/ckpt.pt --episodes 1 --out text/a.json", "cannot write"),
    ("eval.py --ckpt out/ckpt.pt --episodes 1 --out out", "cannot write"),
    ("play.py --ckpt missing.pt --out a.gif", "no checkpoint missing.pt"),
    ("play.py --ckpt demos.h5 --out a.gif", "not a checkpoint"),
    ("gen_data.py --noise 2 --out new.h5", "--noise"),
    ("gen_data.py --info text", "text is not a data file"),
    ("play.py --ckpt out/ckpt.pt --pipeline --out a.gif", ".png"),
    ("play.py --ckpt bc.pt --attention --out a.gif", "this checkpoint has none"),
    ("play.py --replay", "--data"),
    ("play.py --expert --ckpt out/ckpt.pt --out a.gif", "--ckpt"),
    ("play.py --attention --episodes 2 --instruction 'open the drawer'", "--instruction"),
    ("play.py --data demos.h5", "--out"),
    ("play.py --data demos.h5 --episode 99 --out a.gif", "--episode 99"),
    ("play.py --data text --replay", "text is not a data file"),
    ("play.py --ckpt out/ckpt.pt --episodes 3 --out a.gif", "--replay"),
    ("play.py --ckpt out/ckpt.pt --out a.bmp", ".gif, .mp4 or .png"),
    ("play.py --ckpt out/ckpt.pt --out a.gif --seed three", "'three'"),
    ("play.py --ckpt out/ckpt.pt --out text/a.gif", "text"),
    ("play.py --ckpt out/ckpt.pt --out a.gif --instruction 'lift the orange block to the {pad} target'", "not clear"),
    ("play.py --ckpt out/ckpt.pt --out a.gif --instruction 'put the {absent} block on the {pad} target'", "no {absent} block"),
    ("play.py --ckpt out/ckpt.pt --out a.gif --instruction 'teleport the {block} block to the {pad} target'", "'teleport'"),
]


TELLER = """
import contextlib, io, json, runpy, shlex, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
for command in sys.stdin.read().splitlines():
    sys.argv, said, code = shlex.split(command), io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(f"{folder}/{sys.argv[0]}", run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""                                                            # the scripts one after the other: starting torch for each takes longest


@pytest.fixture(scope="session")
def complaints(hostile):
    """What each of the commands of BAD says on stderr, in two processes, and the colours of scene 0 that are in some of them."""
    env = Env(cameras=())
    env.reset(0)
    colors = dict(block=env.block_colors[0], pad=env.pad_colors[0], absent=next(c for c in COLORS if c not in env.block_colors))
    files = lambda: {p: p.stat().st_mtime_ns for p in hostile.rglob("*") if p.is_file()}
    before = files()

    def tell(rows):
        told = subprocess.run([sys.executable, "-c", TELLER, ROOT], cwd=hostile, text=True, capture_output=True, timeout=150,
                              input="\n".join(row[0].format(**colors) for row in rows))
        assert told.returncode == 0, told.stderr               # a traceback
        return zip(rows, map(json.loads, told.stdout.splitlines()), strict=True)

    with ThreadPoolExecutor(2) as pool:
        said = dict(row for rows in pool.map(tell, (BAD[::2], BAD[1::2])) for row in rows)
    assert files() == before                                   # nothing overwritten, lost or left behind
    return said, colors


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[0])
def test_bad_input_is_one_sentence(row, complaints):
    (code, said), colors = complaints[0][row], complaints[1]
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(row[0].split()[0] + ": ") and row[1].format(**colors) in lines[0], said
