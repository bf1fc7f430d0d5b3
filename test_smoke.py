"""The tests: the real scripts at toy size, and what the parts promise. No GL and no display.

    python -m pytest -q test_smoke.py                          # about 5 minutes on 2 cores
    python -m pytest -q test_smoke.py -m slow                  # those that take minutes
"""
import ast
import importlib.util
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
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent
for name in ("DISPLAY", "WAYLAND_DISPLAY"):
    os.environ.pop(name, None)
# one thread: at this size two only wait for each other
os.environ.update(MUJOCO_GL="disabled", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
# in the background Ctrl-C is ignored, by our children too
signal.signal(signal.SIGINT, signal.default_int_handler)

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import gen_data
from gen_data import (CAMERAS, COLORS, DEMO_SEED, FACTORS, FORCE_LIMIT, HELD_OUT, PRIVILEGED,
                      GRAMMAR, NAMES, PROPRIO, SPLITS, TASKS, TEST_SEED, Disturbance, Env, all_requests,
                      blunder, expert, is_held_out, make_wording, parse_instruction, write_episode)
from model import CHARS, VLA, Config, Mixture, ngrams, split, tokenize

TRAIN = ("train.py --data demos.h5 --device cpu --steps 6 --batch_size 8 "
         "--log_interval 3 --eval_interval 3 --eval_episodes 1")
STATE = dict(joint_pos=7, ee_pos=3, ee_quat=4, ee_vel=3, gripper=1, object_pos=3, target_pos=3)
OBSERVATION = {key: ((n,), "float32") for key, n in STATE.items()}
OBSERVATION |= {f"{name}_image": ((64, 64, 3), "uint8") for name in ("front", "wrist")}
SENTENCE = "pick up the {block} block and place it at the {pad} target"
warnings.filterwarnings("ignore", "Unknown pytest.mark.slow")  # no file to register it in


def start(command, folder, **options):
    """One of the scripts with its arguments, running in `folder`, its output kept."""
    script, *rest = shlex.split(command)
    return subprocess.Popen([sys.executable, ROOT / script, *rest], cwd=folder, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def run(command, folder, status=0, typed=None, **options):
    """Runs it to its end, which should be with this exit status; returns what it printed."""
    process = start(command, folder, **options)
    said, _ = process.communicate(typed, timeout=300)
    assert process.returncode == status, said
    return said


def run_code(code, folder, **options):
    """The same with Python that can import the repository."""
    (folder / "code.py").write_text(code)
    return run(f"{folder}/code.py", folder, **options)


def written(folder, pattern):
    """When each file of such a name was, ns."""
    files = filter(Path.is_file, folder.rglob(pattern))
    return {path: path.stat().st_mtime_ns for path in files}


def stop_when(ready, command, folder, how=signal.SIGKILL):
    """Starts it, sends it a signal once ready() is true, and returns its exit status."""
    process = start(command, folder)
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(how)
    process.communicate(timeout=20)                # returns when its workers have ended too
    return process.returncode


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with 24 demonstrations of all tasks, and a barely trained VLA in out/."""
    folder = tmp_path_factory.mktemp("toy")
    run("gen_data.py --tasks all --episodes 24 --workers 2 --out demos.h5", folder)
    run(TRAIN, folder)
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """An empty folder with the demonstrations."""
    (tmp_path / "demos.h5").symlink_to(trained / "demos.h5")
    return tmp_path


# --------------------------------------------------------------------------------- the world
@pytest.mark.parametrize("module, stranger", [("gen_data", "torch"), ("model", "mujoco")])
def test_import_does_no_work(module, stranger, tmp_path):
    said = run_code(f"import os, sys, {module}; print({stranger!r} in sys.modules, os.listdir())",
                    tmp_path)
    assert said == "False ['code.py']\n"


def test_culled_picture_equals_full_ray_cast():
    env = Env(cameras=CAMERAS)
    env.reset(1)
    right = []                                     # labels that are where the blocks are
    for step in range(80):
        env.step(expert(env))
        for camera in env.cameras.values() if step % 5 == 0 else ():
            culled = camera.render(env.data)
            labels = camera.visible(env.data, env.thing_pos, env.thing_geom)
            np.testing.assert_array_equal(culled, camera.render(env.data, cull=False))
            for (x, y), geom in zip(labels, env.block_geom):
                if x >= 0:
                    right.append(camera.geom[int(y * 64), int(x * 64)] == geom)
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
    for seed in (DEMO_SEED, 3, TEST_SEED):
        trace = play(env, seed)
        _, _, terminated, truncated, info = trace[-1]
        assert terminated and info["success"] and not truncated
        assert info["touched"] == info["block"] in info["instruction"].split()
        rewards = [step[1] for step in trace[1:]]
        assert 0 <= min(rewards) <= rewards[0] < 0.7 and rewards[-1] == 1
    again = play(Env(), seed)                      # a fresh world against one that was used
    for a, b in zip(again, trace, strict=True):
        assert a[1:] == b[1:] and same(a[0], b[0])


def test_resets_without_a_seed_continue_the_last_ones_stream():
    env = Env(cameras=())
    scenes = []
    for _ in range(2):
        env.reset(5)
        scenes.append([env.reset()[0]["object_pos"].tolist() for _ in range(2)])
    assert scenes[0] == scenes[1] and scenes[0][0] != scenes[0][1]


def test_env_takes_a_sentence_by_hand():
    env = Env(cameras=())
    with pytest.raises(ValueError, match="reset"):
        env.step([0, 0, 0, 1])
    env.reset(7)
    text = f"please put the {env.block_colors[2]} thing on {env.pad_colors[1]}, thanks"
    obs, info = env.reset(7, dict(instruction=text))
    assert info["instruction"] == text
    there = env.block_pos[2], env.pad_pos[1]
    np.testing.assert_allclose([obs["object_pos"], obs["target_pos"]], there, atol=1e-6)
    for action in ([0, 0, 0], [0, 0, 0, np.nan]):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)
    with pytest.raises(ValueError, match="option 'blocks'"):
        env.reset(7, dict(blocks=4))
    block, pad = HELD_OUT["pick_place"][0].split()             # who asks by name gets it
    env.reset(7, dict(slots=dict(block=block, pad=pad)))
    assert (env.slots["block"], env.slots["pad"]) == (block, pad)


def put(env, block, *position):
    """Moves a block there, m, and returns the info of a step in which the hand rests."""
    here = env.block_qpos[block]
    env.data.qpos[here:here + 3] = position
    return env.step([0, 0, 0, 1])[4]


def test_palm_touches_count_and_a_diverged_simulation_is_over():
    env = Env(("lift",), ())
    env.reset(0)
    assert put(env, 1, *env.data.geom("palm").xpos)["touched"] == env.block_colors[1]
    env.data.qvel[:] = 1e12
    _, _, terminated, _, info = env.step([0, 0, 0, 1])
    assert terminated and info["diverged"] and not info["success"]


# --------------------------------------------------------------------------------- the tasks
@pytest.mark.parametrize("task", TASKS)
def test_expert_does_what_the_sentence_says_and_the_guard_never_acts(task):
    """Nothing else is done then: no other task, nor the same with another block or direction."""
    env = Env(tuple(TASKS), ())
    for seed in range(6):
        info = play(env, seed, task=task)[-1][4]
        assert info["success"] and not info["violations"] and info["force"] < FORCE_LIMIT
        done = [(other, slots) for other in TASKS for slots in env.requests(other)
                if TASKS[other].success(env, **env.resolve(slots))]
        assert [one for one in done if task == "drawer" or one[0] != "drawer"] == [env.request]


# From where it began to where the block is put, m, one after the other.
PUSHES = """
0 -0.09 0 wrong
0.09 0 0 wrong
-0.09 0 0 wrong
0 0.09 0 done
0 0.09 0.05 lifted
0 0.09 0 lifted before
"""


def test_push_is_along_its_direction_and_on_the_table():
    env = Env(("push",), ())
    env.reset(1, dict(slots=dict(direction="left")))
    block = env.meaning["block"]
    begin = env.block_pos[block].copy()
    for row in PUSHES.strip().splitlines():
        *move, done = row.split()[:4]
        put(env, block, *begin + np.array(move, float))
        assert TASKS["push"].success(env, **env.meaning) == (done == "done"), row


PARSED = """
please shut that drawer | drawer close
push the drawer open | drawer open
on the red target i want the blue cube | pick_place blue red
could you set the green brick on top of the yellow one | stack green yellow
nudge the purple thing away from you | push purple forward
up with the red block | lift red
grab the red block from the table | lift red
lift the 'red' block, don’t wait | lift red
put the red block on green over there | pick_place red green
"""


def test_parsing_by_keywords():
    for row in PARSED.strip().splitlines():
        text, meaning = row.split(" | ")
        task, slots = parse_instruction(text)
        assert [task, *slots.values()] == meaning.split(), row
    for nonsense in ("", "put it on the red target", "red green blue",
                     "put the red block in the drawer"):
        with pytest.raises(ValueError, match="not clear"):
            parse_instruction(nonsense)


def test_grammar():
    """Each task is asked for in very many ways; what is held out is never heard in training."""
    rng = np.random.default_rng(0)
    texts = [text for rule in GRAMMAR.values() for text in rule]
    marked = " ".join(text for text in texts if text.startswith("*"))
    plain = " ".join(text for text in texts if not text.startswith("*"))
    secret = set(split(marked)) - set(split(plain))
    assert len(secret) > 20
    for task, slots in all_requests(TASKS)[::9]:
        heard, held_out = ([make_wording(task, slots, rng, hidden) for _ in range(500)]
                           for hidden in (False, True))
        assert len(set(heard)) > 475               # so of tens of thousands
        assert not re.search(r"[<>()|*]", " ".join(heard + held_out))
        names = {"{%s}" % slot for slot in slots if slot in NAMES}
        for wording in heard + held_out:
            assert set(re.findall(r"{\w+}", wording)) == names, wording
        assert secret.isdisjoint(split(" ".join(heard)))
        assert not secret.isdisjoint(split(" ".join(held_out)))


@pytest.mark.parametrize("part", SPLITS)
def test_splits(part):
    """Held-out combinations are asked for in their own split and nowhere else."""
    env = Env(tuple(TASKS), (), split=part)
    assert env.n_blocks == (5 if part == "crowd" else 3)
    for seed, task in enumerate(["pick_place", "stack", "push"] * 4):
        env.reset(seed, dict(task=task))
        assert is_held_out(*env.request) == (part == "combo")


def test_guard_stops_what_is_unsafe():
    infos = []
    for guard in (True, False):
        env = Env(cameras=(), guard=guard)
        env.reset(3)
        for _ in range(80):                        # presses a block into the table from above
            x, y, z = env.block_pos[env.meaning["block"]] + [0, 0, 0.1] - env.ee_pos
            over_it = np.hypot(x, y) < 0.004
            action = [x / 0.03, y / 0.03, -0.5 if over_it else z / 0.03, -1]
            env.step(np.clip(action, -1, 1))
        for action in [(2, 0, 0, 1), (1, 1, 1, 1)] + [(0, 0, 1, 1)] * 30:
            info = env.step(action)[4]
        infos.append(info | dict(height=env.ee_pos[2]))
    guarded, wild = infos
    assert guarded["violations"] == sum(guarded["guard"].values()) and not wild["violations"]
    assert {name for name, n in guarded["guard"].items() if not n} == {"joint"}
    assert guarded["force"] < wild["force"]
    assert guarded["height"] < 0.36 < 0.4 < wild["height"]     # without it the hand left the box


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
    seen = factor in ("light", "color", "camera", "noise", "mass")
    assert differs == {factor} - {"noise", "delay"} | ({"picture"} if seen else set())
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
def test_data_file(trained):
    env = Env(tuple(TASKS))
    held_out = {}                                  # whether a scene is, in each of its episodes
    first = set()                                  # tasks that held-out scenes begin with
    fresh = []                                     # whether a scene's first episode is as at its reset
    samples = interrupted = 0
    with h5py.File(trained / "demos.h5") as file:
        requests = json.loads(file.attrs["requests"])
        assert [(r["task"], r["slots"]) for r in requests] == all_requests(TASKS)
        view = file["data"]
        train, valid = [list(file[f"mask/{part}"]) for part in ("train", "valid")]
        assert sorted(train + valid) == sorted(name.encode() for name in view)
        for i in range(24):
            episode = file[f"episode_{i}"]
            a, obs = dict(episode.attrs), episode["obs"]
            n = a["num_samples"]
            samples += n
            interrupted += a["interrupted"]
            assert view[f"demo_{i}"] == episode
            assert {k: (v.shape[1:], v.dtype.name) for k, v in obs.items()} == OBSERVATION
            assert obs["front_image"].chunks[0] <= 8 and obs["front_image"].compression
            assert a["success"] != a["interrupted"] and len(episode["rewards"]) == n
            assert list(episode["dones"]) == [0] * (n - 1) + [a["success"]]
            asked = [requests[k] for k in {a["request"], *episode["grounding/relabel"]}]
            assert not any(is_held_out(r["task"], r["slots"]) for r in asked)
            asked = requests[a["request"]]
            assert asked["slots"] == json.loads(a["slots"])
            assert len(file["wordings"][asked["intent"]]) > 1000
            held_out.setdefault(a["scene_seed"], set()).add(f"demo_{i}".encode() in valid)
            if a["part"]:
                continue
            if held_out[a["scene_seed"]] == {True}:
                first.add(a["task"])
            now, info = env.reset(a["scene_seed"])             # what it shows, what the expert does
            assert info["instruction"] == a["instruction"]
            fresh.append(same(now, {key: obs[key][0] for key in now}))   # not after a mistake
            assert not fresh[-1] or np.array_equal(episode["actions"][0], expert(env))
        assert view.attrs["total"] == samples and json.loads(view.attrs["env_args"])["type"] == 2
    assert 0 < interrupted < 24 and first == set(TASKS)
    assert 0.3 < np.mean(fresh) < 0.9
    assert all(len(parts) == 1 for parts in held_out.values())


def test_stopped_generation_carries_on_with_any_number_of_workers(tmp_path):
    command = "gen_data.py --tasks lift,drawer --cameras front --episodes 60 --shard 2 2"
    run(f"{command} --workers 1 --out new/whole.h5", tmp_path)
    part, command = tmp_path / "demos.h5.part", command + " --out demos.h5 --workers"
    batches = lambda: written(part, "*.h5")
    ends = ((signal.SIGKILL, 2, -9), (signal.SIGINT, 1, 130), (signal.SIGTERM, 2, 130))
    for how, workers, code in ends:
        kept = batches()
        ready = lambda: len(batches()) > len(kept)
        assert stop_when(ready, f"{command} {workers}", tmp_path, how) == code
        assert kept.items() <= batches().items()               # nothing is made twice
        assert not (tmp_path / "demos.h5").exists()
    assert "other settings" in run(f"{command} 2 --noise 0", tmp_path, status=2)
    run(f"{command} 2", tmp_path)
    assert (tmp_path / "demos.h5").read_bytes() == (tmp_path / "new/whole.h5").read_bytes()
    assert not part.exists()
    with h5py.File(tmp_path / "demos.h5") as file:
        assert file["episode_0"].attrs["scene_seed"] == DEMO_SEED + 50_000


# --------------------------------------------------------------------------------- the model
@pytest.fixture(scope="session")
def batch():
    """Four pictures, two sentences that both fit each of them, and what the expert does, (2, 4, A).
    The robot's own state is the same in all, so that neither it nor the words nor the picture alone
    can tell what to do."""
    slots = [dict(block=block, pad="green") for block in ("red", "blue")]
    env = Env(cameras=CAMERAS)
    observations, actions = [], []
    for seed in range(99):
        obs, _ = env.reset(seed)
        if {"red", "blue"} <= set(env.block_colors) and "green" in env.pad_colors:
            robot = (observations or [obs])[0]
            observations.append(obs | {key: robot[key] for key in PROPRIO})
            actions.append([expert(env, ("pick_place", one)) for one in slots])
    sentences = [SENTENCE.format(**one) for one in slots]
    return observations[:4], sentences, torch.tensor(np.array(actions[:4])).transpose(0, 1)


def inputs(model, observations, sentences):
    images, state = model.read_observations([[obs] for obs in observations])
    return images, state, torch.stack([tokenize(text, model.config) for text in sentences])


CHOICES = """
{}
{"vision": "vit"}
{"vision": "cnn"}
{"keep_patches": 80}
{"frames": 3}
{"cameras": ("front",)}
{"cameras": ("front", "wrist", "top")}
{"text": "char", "max_text": 200}
{"text_encoder": "lstm"}
{"pointers": 0}
{"fusion": "transformer"}
{"fusion": "concat"}
{"fusion": "multiply"}
{"head": "tokens"}
{"head": "tokens", "bins": 16}
{"head": "flow"}
{"head": "continuous", "head_layers": 1}
{"head": "continuous", "loss": "mse"}
{"chunk": 1}
{"chunk": 16, "execute": 3}
{"head": "continuous", "ensemble": True}
{"state_keys": ("joint_pos", "ee_pos", "ee_vel", "gripper", "target_pos"), "state_size": 17}
{"state_keys": (), "state_size": 0}
{"width": 64}
{"heads": 8}
{"layers": 1}
"""


@pytest.mark.parametrize("choice", CHOICES.strip().splitlines())
def test_every_choice_builds_learns_saves_and_acts(choice, batch, tmp_path):
    torch.manual_seed(0)
    model = VLA(Config(**ast.literal_eval(choice)))
    if choice == "{}":
        assert 1.6e6 < sum(p.numel() for p in model.parameters()) < 2e6
    observations, (sentence, _), actions = batch
    known = inputs(model, observations, [sentence] * 4)
    K = model.config.chunk
    target, valid = actions[0][:, None].repeat(1, K, 1), torch.ones(4, K, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):                             # outputs start at zero: not yet at the first
        optimizer.zero_grad()
        error, goal, attention, _ = model(*known, target=target, valid=valid)
        assert error.shape == (4, K, 4)
        (error.mean() + goal.square().mean() - 0.01 * attention.sum()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.state_mean.fill_(1e5)                    # more than fp16 holds
    model.state_std.fill_(1e5)
    model.save(tmp_path / "ckpt.pt")
    loaded = VLA.load(tmp_path / "ckpt.pt")
    for p in model.parameters():                   # which a checkpoint rounds
        p.data = p.data.half().float()
    model.eval()
    for obs in observations * 3:
        action = model.predict(obs, sentence)
        assert action.tobytes() == loaded.predict(obs, sentence).tobytes()
        assert action.shape == (4,) and action.dtype == np.float32 and np.abs(action).max() <= 1


def test_a_mixture_does_one_or_the_other():
    """Where the median of what was shown is what nobody did."""
    torch.manual_seed(0)
    head, x = Mixture(Config(), 3), torch.zeros(64, 3)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(100):
        shown = 0.8 * (2 * torch.rand(64, 1, 1).round() - 1).expand(64, 8, 4)
        optimizer.zero_grad()
        head.error(x, shown, torch.ones(64, 8)).mean().backward()
        optimizer.step()
    chunks = []
    for head.turn in range(40):
        chunks.append(head(x[:1])[0])
    done = torch.stack(chunks)
    assert ((done.abs() - 0.8).abs() < 0.1).all()
    assert 0.3 < (done[:, 0, 0] > 0).float().mean() < 0.7
    assert (done.sign() == done[:, :1, :1].sign()).all()


def test_acting_follows_the_config_and_listens(batch):
    """Chunk, ensemble and integration steps of one and the same set of weights."""
    torch.manual_seed(0)
    (obs, *_), (sentence, other), _ = batch
    moved = [obs | dict(ee_pos=obs["ee_pos"] + 0.1 * t) for t in range(5)]
    model = VLA(Config(head="flow")).eval()
    chunks = np.stack([model.plan([[obs]], [sentence])[0] for obs in moved])       # (5, K, A)

    def acted(**choice):
        vars(model.config).update(choice)
        model.reset()
        return [model.predict(obs, sentence) for obs in moved]

    expected = [*chunks[0, :4], chunks[4, 0]]      # half of the chunk
    np.testing.assert_allclose(acted(), expected, atol=1e-6)
    heard = model.predict(moved[1], other)         # at once
    np.testing.assert_array_equal(heard, model.plan([moved[1:2]], [other])[0, 0])
    np.testing.assert_allclose(acted(execute=1), chunks[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match="needs a sentence"):
        model.predict(obs)
    weights = np.exp(-0.01 * np.arange(3))
    average = weights / weights.sum() @ [chunks[0, 2], chunks[1, 1], chunks[2, 0]]
    np.testing.assert_allclose(acted(ensemble=True)[2], average, atol=1e-6)
    assert not np.allclose(acted(flow_steps=1)[0], chunks[0, 0], atol=1e-3)


def test_what_is_called_by_name_does_not_depend_on_the_other_name():
    """With other colours in the context, as in training, a pointer knows its own name alone."""
    torch.manual_seed(0)
    model = VLA(Config())
    text = torch.stack([tokenize(SENTENCE.format(block=block, pad="blue"), model.config)
                        for block in ("red", "green")])
    context = text[:1].expand(2, -1, -1)
    words, queries, *_ = model.encode_text(context, text)
    torch.testing.assert_close(words, model.encode_text(context)[0])
    assert not torch.allclose(queries[0], queries[1])
    assert not torch.allclose(*model.encode_text(text)[0])


def test_one_batch_overfits_by_looking_and_listening(batch):
    observations, sentences, actions = batch
    torch.manual_seed(0)
    model = VLA(Config(head="continuous"))
    pairs = inputs(model, observations, sentences)
    picture, sentence = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-4 * (1 - step / 100)
        optimizer.zero_grad()
        planned, *_ = model(*pairs, picture, sentence)
        loss = (planned[:, 0] - actions.flatten(0, 1)).abs().mean()
        loss.backward()
        optimizer.step()
    for axis in (0, 1):                            # who is deaf, who is blind
        assert loss < 0.6 * (actions - actions.median(axis, keepdim=True).values).abs().mean()
    histories = [[obs] for obs in observations]
    acted = np.stack([model.plan(histories, [text] * 4)[:, 0] for text in sentences])
    np.testing.assert_allclose(acted.reshape(8, 4), planned[:, 0].detach(), atol=0.05)


@pytest.mark.parametrize("key, value", [
    ("wrist_image", None), ("wrist_image", np.zeros((64, 64, 3))), ("gripper", []),
    ("front_image", np.zeros((32, 32, 3), np.uint8)), ("ee_pos", [0, np.nan, 0])])
def test_policies_refuse_what_they_cannot_read(key, value, batch):
    (obs, *_), (sentence, _), _ = batch
    obs = {k: v for k, v in (obs | {key: value}).items() if v is not None}
    with pytest.raises(ValueError, match="must be|has no"):
        VLA(Config()).predict(obs, sentence)


def test_text():
    config, chars = Config(), Config(text="char", max_text=200)
    sentences = "Pick up the RED block, and lift it.", "pick up the red block and lift it"
    assert torch.equal(*[tokenize(sentence, config) for sentence in sentences])
    assert split("Lift the 'red' cube, don’t push") == ["lift", "the", "red", "cube", "don't", "push"]
    right, wrong, other = (set(ngrams(word, 4096).tolist()) for word in ("purple", "purpel", "green"))
    assert len(right & wrong) > len(right & other) + 2         # misspelt, but much like it
    ids = tokenize("red banana", chars)
    assert "".join(CHARS[i - 1] for i in ids[:, 0] if i) == "red banana" and len(ids) == 200
    for settings in (config, chars):
        assert tokenize("", settings).sum() == 0
        with pytest.raises(ValueError, match="longer than"):
            tokenize("red " * 99, settings)


def test_understanding_is_learned():
    torch.manual_seed(0)
    asked = ["lift the red block", "pick up the green cube please", "raise the blue one"]
    nothing = ["make me a coffee", "hello", "what is the red block"]
    model = VLA(Config(intents=("lift", "none")))
    text = torch.stack([tokenize(sentence, model.config) for sentence in asked + nothing])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        intents = model.encode_text(text).intents
        torch.nn.functional.cross_entropy(intents, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
        optimizer.step()
    model.eval()
    assert min(map(model.understands, [*asked, "lift the redd block"])) > 0.9
    assert max(map(model.understands, nothing)) < 0.1


def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path):
    """One bit of it is another: it is refused, or it loads, but it never does anything else."""
    whole = (trained / "out/ckpt.pt").read_bytes()
    assert len(whole) < 9e6
    path = tmp_path / "ckpt.pt"
    dice = np.random.default_rng(0)
    end = len(whole)
    refused = 0
    for at in dice.integers((0, 0, end - 3000), (end, 3000, end), (15, 3)).flat:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(dice.integers(8))
        path.write_bytes(damaged)
        try:
            VLA.load(path)
        except ValueError as error:
            assert re.fullmatch(".* is not a checkpoint of this model .*", str(error))
            refused += 1
    assert refused > 5


# ------------------------------------------------------------------------------- training
def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_log(folder):
    """[what is known of step 1, ..], but for the speed."""
    lines = read_lines(folder / "log.jsonl")
    for line in lines:
        del line["samples_per_s"]
    return lines


def test_training_is_a_function_of_its_seed_and_resumes_exactly(trained, place):
    resume = place / "out/resume.pt"               # written after step 3
    assert stop_when(resume.exists, TRAIN, place) == -signal.SIGKILL
    assert torch.load(resume, weights_only=True)["step"] == 3
    run("train.py --resume out --eval_interval 0", place)      # with the settings it began with
    log = read_log(place / "out")
    assert log == read_log(trained / "out")
    assert [line["step"] for line in log] == [3, 6]
    there, here = [torch.load(folder / "out/ckpt.pt", weights_only=True)
                   for folder in (trained, place)]
    assert same(there["weights"], here["weights"])
    assert there["fingerprint"] == here["fingerprint"]
    run("train.py --resume out --eval_interval 0 --steps 10 --lr 0.01", place)
    last = read_log(place / "out")[-1]             # what is said goes first
    assert last["step"] == 10 and last["lr"] == pytest.approx(0.01 / (0.6 * 10))


def test_a_stopped_training_saves_or_can_be_begun_again(place):
    log, long = place / "out/log.jsonl", TRAIN + " --steps 500 --log_interval 1 --eval_interval 1000"
    ready = lambda: log.exists() and log.stat().st_size
    assert stop_when(ready, long, place) == -signal.SIGKILL    # before there was a checkpoint
    for how in (signal.SIGINT, signal.SIGTERM):
        log.unlink()
        assert stop_when(ready, long, place, how) == 130
        step = VLA.load(place / "out/ckpt.pt").step
        assert 1 <= step < 500 and read_log(place / "out")[-1]["step"] == step
        long += " --overwrite"


def test_a_training_that_is_stopped_while_its_data_is_made_stops_that_too(tmp_path):
    batches = lambda: written(tmp_path, "*.h5")
    command = "train.py --data new.h5 --episodes 2000"
    assert stop_when(lambda: len(batches()) > 1, command, tmp_path, signal.SIGTERM) == 130
    there = batches()
    for path in there:                             # whole, and nobody writes any more
        assert h5py.File(path).attrs["total"] > 0
    time.sleep(1)
    assert batches() == there


def test_overwrite_spoils_nothing_before_there_is_something_better(trained, place):
    out = shutil.copytree(trained / "out", place / "out")
    before = written(out, "*")
    (place / "foreign.h5").write_text("something else")
    run(f"{TRAIN} --overwrite --data foreign.h5", place, status=2)
    explode = f"{TRAIN} --overwrite --adam_lr 1e30 --lr 1e30 --log_interval 100 --eval_interval"
    assert "train.py: the loss is" in run(f"{explode} 100", place, status=2)
    assert written(out, "*") == before
    said = run(f"{explode} 1", place, status=2)
    assert VLA.load(out / "ckpt.pt").step == int(re.search(r"at step (\d+)", said)[1]) - 1


def test_a_file_of_demonstrations_alone_trains_with_the_default_command(trained, tmp_path):
    """Pictures, the robot's own numbers, actions and a sentence are all there is."""
    with h5py.File(trained / "demos.h5") as ours, h5py.File(tmp_path / "demos.h5", "w") as file:
        for i in range(24):
            episode = ours[f"episode_{i}"]
            keys = episode["observations"].keys() - {*PRIVILEGED}
            arrays = {key: episode[f"observations/{key}"][:] for key in keys}
            arrays["actions"] = episode["actions"][:]
            write_episode(file, i, dict(instruction=episode.attrs["instruction"]), arrays)
    said = run(TRAIN, tmp_path)
    assert "| all |" not in said                   # there is no world to score it in
    vla = VLA.load(tmp_path / "out/ckpt.pt")
    assert len(vla.config.intents) == 25 and vla.config.state_size == 18
    assert "no grounding/" in run(f"{TRAIN} --labels simulator --overwrite", tmp_path, status=2)


def test_hindsight_finds_what_the_simulator_knows(trained, tmp_path):
    """For each task, where thing and place are, in metres and in the pictures."""
    said = run_code(f"""
import runpy, sys, h5py, numpy as np
file = h5py.File({str(trained / 'demos.h5')!r})
sys.argv = "train.py --data {trained}/demos.h5 --device cpu --steps 1 --eval_interval 0".split()
demos = runpy.run_path({str(ROOT / 'train.py')!r}, run_name="__main__")["demos"]
goal, told, first = demos.goal[0].numpy(), demos.uv[0].numpy(), 0
def px(which, v, camera):
    uv, seen = episode[f"grounding/{{camera}}_uv"][:, episode.attrs["things"][which]], told[at, which, v]
    both = (uv[:, 0] >= 0) & (seen[:, 0] >= 0) & (episode.attrs["things"][which] >= 0)
    return np.median(64 * np.abs(uv - seen)[both].max(1)) if both.any() else np.nan
for i in range(24):
    episode = file[f"episode_{{i}}"]
    at = slice(first, first + len(episode["actions"]))
    first = at.stop
    where = episode["observations/object_pos"][:]
    miss = np.linalg.norm(goal[at, :3] - where, axis=1)
    known = np.isfinite(goal[at]).mean(0)[[0, 3]]
    print("row", episode.attrs["task"], episode.attrs["success"], *known,
          np.median(miss), px(0, 0, "front"), px(1, 1, "wrist"))
""", tmp_path)
    rows = [line.split()[1:] for line in said.splitlines() if line.startswith("row")]
    done = [(task, *map(float, numbers)) for task, success, *numbers in rows if success == "True"]
    told = [(task, *far) for task, thing, place, *far in done if thing == place == 1]
    assert {task for task, *_ in told} == set(TASKS)
    assert len(told) > 0.8 * len(done)             # some were done before they began
    for task, miss, thing, place in told:
        assert miss < (0.06 if task == "push" else 0.03), task
        assert not thing >= 6 and not place >= 6, task    # px, nan: never seen
    assert sum(thing < 6 for *_, thing, place in told) >= 5
    assert sum(place < 6 for *_, place in told) >= 2
    for task, success, thing, place, *_ in rows:
        assert success == "True" or float(place) == 0     # who knows where it would have gone


def test_labels_of_hands_that_feel_nothing_and_of_pictures_that_move(tmp_path):
    """An open hand was to go where it ended; a shut one that ends higher than it was took something
    thin. Where a thing is seen moves with its picture."""
    run_code(f"""
import runpy, sys, h5py, numpy as np, torch
from gen_data import write_episode
height = np.r_[np.linspace(0.2, 0, 10), np.linspace(0, 0.1, 10)]
hand, down = np.stack([np.linspace(0, 1, 20), 0 * height, height], 1), np.arange(20) < 10
with h5py.File("robot.h5", "w") as file:
    for i in range(40):
        opened = down if i % 2 else down | True
        write_episode(file, i, dict(instruction="go"), dict(
            ee_pos=hand.astype("f"), gripper=opened[:, None].astype("f"),
            front_image=np.zeros((20, 64, 64, 3), np.uint8),
            actions=np.where(opened, 1, -1)[:, None].astype("f") * np.ones((1, 4), "f")))
sys.argv = "train.py --data robot.h5 --device cpu --steps 1 --eval_interval 0".split()
train = runpy.run_path({str(ROOT / 'train.py')!r}, run_name="__main__")
goal = train["demos"].goal[0].numpy()
assert np.isnan(goal[:20, :3]).all() and np.allclose(goal[:20, 3:], hand[-1])
assert np.allclose(goal[20:31, :3], hand[10]) and np.allclose(goal[20:40, 3:], hand[-1])
corners = np.array([[0, 0, 0.1], [0, 0, 0], [0.2, 0, 0], [0.2, 0.3, 0]])
way = np.concatenate([np.linspace(a, b, 10) for a, b in zip(corners, corners[1:])])
shut = np.zeros(len(way)), np.ones(len(way), bool), True
thing, place, _ = train["hindsight"](way, *shut)              # pushed round a corner
assert np.allclose(thing[0], [0.1, 0, 0], atol=0.02) and np.allclose(place, [0.2, 0.33, 0])
thing, place, _ = train["hindsight"](way[::-1], *shut)        # lifted at the end
assert np.allclose(thing[0], [0.2, 0.3, 0]) and np.allclose(place, way[0])
images = torch.zeros(8, 4, 64, 64, 3, dtype=torch.uint8)       # two cameras, two frames
images[:, ::2, 30, 20], images[:, 1::2, 2, 2] = 255, 255
uv = torch.tensor([[20.5, 30.5], [2.5, 2.5]]).expand(8, 2, 2, 2) / 64
moved, seen, shift = train["shifted"](images, uv, torch.arange(8), 4)
assert torch.equal(moved[:, :2], moved[:, 2:]) and not torch.equal(moved, images)
for b in range(8):
    x, y = (64 * seen[b, 0, 0]).int()
    assert moved[b, 0].amax(2).nonzero().tolist() == [[y, x]]
    assert torch.allclose(shift[b, 0] * 64, torch.tensor([y - 30., x - 20.]))
assert (seen[:, :, 1] == -1).any() and (seen[:, :, 1] > 0).any()
patch, weight = train["attention_target"](seen, 8, False)
assert (patch[weight == 1] % 64)[0] == (seen[0, 0, 0] * 8).long() @ torch.tensor([1, 8])
patch, weight = train["attention_target"](seen, 8, True)
x, y = patch[:, 0, 0] % 8 + 0.5, patch[:, 0, 0] % 64 // 8 + 0.5
mean = torch.stack([(x * weight[:, 0, 0]).sum(1), (y * weight[:, 0, 0]).sum(1)], 1) / 8
assert torch.allclose(mean, seen[:, 0, 0]) and not weight[:, :, 1][seen[:, :, 1, 0] < 0].any()
""", tmp_path)


@pytest.mark.parametrize("command, room", [
    ("gen_data.py --episodes 40 --workers 1 --out new.h5", 300_000), (TRAIN, 3_000_000)])
def test_a_full_disk_is_one_sentence_and_spoils_nothing(command, room, place):
    """No file may grow beyond `room` bytes, which is what a full disk looks like from inside."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    said = run(command, place, status=2, preexec_fn=limit)
    last = said.splitlines()[-1]
    assert last.startswith(command.split()[0] + ": ") and "Traceback" not in said, said
    assert not (place / "new.h5").exists() and not (place / "out/ckpt.pt").exists()


def test_data_larger_than_memory_is_refused_before_loading(place):
    said = run_code("""
import pathlib, runpy, sys, h5py
read, load = pathlib.Path.read_text, h5py.Dataset.__getitem__
def little(path, **kind):
    return "MemAvailable: 900 kB" if path.name == "meminfo" else read(path, **kind)
def small(array, *key):
    assert array.ndim < 2, "loading"
    return load(array, *key)
pathlib.Path.read_text, h5py.Dataset.__getitem__ = little, small
sys.argv = "train.py --data demos.h5 --out_dir new".split()
import train""", place, status=2)
    assert re.search("^train.py: demos.h5 needs .* GB of memory", said, re.M), said


def test_recording_with_an_older_mujoco_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mujoco.__version__", "3.3.0")
    with pytest.raises(ValueError, match="needs MuJoCo 4, and this is 3.3.0"):
        gen_data.generate(tmp_path / "new.h5", 1, 0, (1, 1), {}, 0.0, 1.0, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("config.option.markexpr != 'slow'", reason="takes long; -m slow runs it")
def test_several_processes_and_files_train_as_one(tmp_path):
    """Two processes with half of each batch do what one does with all of it, but for the dice."""
    for i in (1, 2):
        run(f"gen_data.py --tasks all --episodes 24 --shard {i} 2 --out shards/{i}.h5", tmp_path)
    command = (f"{TRAIN} --data 'shards/*.h5' --eval_interval 0 --dtype float32 --steps 60 "
               "--batch_size 32 --out_dir")
    run(f"{command} one", tmp_path)
    torchrun = shlex.split(f"--standalone --nproc_per_node=2 {ROOT}/{command} two")
    said = run_code(f"from torch.distributed.run import main\nmain({torchrun})", tmp_path)
    assert said.count("step    60") == 1           # one of them speaks
    one, two = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two")]
    assert VLA.load(tmp_path / "two/ckpt.pt").step == len(two) == 60
    assert np.mean(two[-20:]) == pytest.approx(np.mean(one[-20:]), rel=0.05)


def test_bc_trains_on_data_that_it_makes(tmp_path):
    said = run("train.py --model bc --data new/demos.h5 --episodes 12 --steps 30 "
               "--eval_interval 30 --log_interval 15 --eval_episodes 1 --out_dir bc", tmp_path)
    assert "making 12 demonstrations" in said and re.search("[01]/1 = ", said)
    first, last = read_log(tmp_path / "bc")
    assert last["loss"] < first["loss"]
    bc = VLA.load(tmp_path / "bc/ckpt.pt")
    obs, _ = Env(cameras=()).reset(0)
    assert bc.config.state_size == 20
    assert np.array_equal(bc.predict(obs), bc.predict(obs, "anything"))
    said = run("play.py --ckpt bc/ckpt.pt --attention --out a.gif", tmp_path, status=2)
    assert "this checkpoint has none" in said


# --------------------------------------------------------------------- evaluating and playing
def test_eval(trained, tmp_path):
    command = f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 2 --out"
    run(f"{command} all.json --policies expert,random,policy --controls", tmp_path)
    run(f"{command} again.json", tmp_path)
    rows, again = [json.loads((tmp_path / name).read_text())["rows"]
                   for name in ("all.json", "again.json")]
    lines = read_lines(tmp_path / "all.jsonl")
    whole = {}                                     # the row of all tasks, for each label
    for row in rows + again:
        del row["seconds"]
    for row in rows:
        label, task = row["label"], row["task"]
        mine = [line for line in lines if line["label"] == label and task in ("all", line["task"])]
        assert (row["k"], row["n"]) == (sum(line["success"] for line in mine), len(mine))
        if task == "all":
            whole[label] = row
            assert [line["seed"] - TEST_SEED for line in mine] == [0, 1]
            changed = label in ("deaf", "deaf_shuffled", "swap", "retarget")
            assert all((line["told"] != line["original"]) == changed for line in mine)
    assert list(whole) == ["expert", "random", "vla", "blind", "blind_shuffled", "deaf",
                           "deaf_shuffled", "swap", "retarget"]
    ceiling, floor = whole["expert"], whole["random"]
    assert ceiling["k"] == 2 and floor["k"] == 0
    assert ceiling["violations"] == 0 < floor["violations"]
    wilson = pytest.approx([0.3424, 1, 0, 0.6576], abs=1e-3)   # 0.3424 = n / (n + 1.96^2)
    assert [ceiling["low"], ceiling["high"], floor["low"], floor["high"]] == wilson
    assert 0.01 < ceiling["chance"] < 0.5
    # the same scenes again: the same to the last bit
    assert again == [row for row in rows if row["label"] == "vla"]


def test_eval_in_other_words(trained, tmp_path):
    """A row a task, beside the same scenes in their own words, and how much is declined."""
    (tmp_path / "mine.txt").write_text("lift\tgrab the {block} cube and raise it\n"
                                       "drawer\tshut the drawer\tclose\nnone\tmake tea\n")
    run(f"eval.py --ckpt {trained}/out/ckpt.pt --episodes 2 --instructions mine.txt "
        "--randomize 1 --no_guard --out a.json", tmp_path)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["task"], row["n"]) for row in rows] == [
        ("lift", 2), ("drawer", 2), ("all", 4)] * 2 + [("none", 1)]
    lines = read_lines(tmp_path / "a.jsonl")
    told = " ".join(line["told"] for line in lines[4:])
    assert re.fullmatch(r"(grab the \w+ cube and raise it shut the drawer ?){2}", told)
    assert [line["block"] for line in lines if line["task"] == "lift"][:2] == [
        line["block"] for line in lines if line["task"] == "lift"][2:]


def test_ablations_train_and_score_each_line_once(place):
    command, runs = "examples/ablations.py a.txt --episodes 1", place / "out/ablations"
    lines = """
all: --data demos.h5 --steps 2 --batch_size 8  # short
classic: --recipe classic --steps 3
"""
    (place / "a.txt").write_text(lines)
    run(command, place)
    before = written(runs / "classic", "*.pt")
    (runs / "flow").mkdir()                        # as if that one had been stopped
    shutil.copy(runs / "classic/ckpt.pt", runs / "flow")
    (place / "a.txt").write_text(lines + """
flow: --head flow --chunk 4 --max_episodes 18
again: --recipe classic --steps 3
""")
    table = run(command, place)
    assert before and written(runs / "classic", "*.pt") == before
    assert (runs / "flow/curve.png").exists() and not (runs / "again").exists()
    assert re.findall(r"^\| (\w+) +\| [01]/1 = ", table, re.M) == ["classic", "flow", "again"]
    classic = VLA.load(runs / "classic/ckpt.pt")
    assert (classic.step, classic.config.vision, classic.config.pointers) == (3, "vit", 0)


@pytest.mark.parametrize("flags, width", [
    ("--seed 3 --size 128 --out a.gif", 128), ("--seed 3 --pipeline --out a.png", 1000),
    ("--seed 0,1 --size 128 --randomize 0,1 --instruction 'open the drawer' "
     "--instruction 'close the drawer' --attention --out a.png", 4 * 2 * 128)])
def test_play_draws(flags, width, trained, tmp_path):
    run(f"play.py --ckpt {trained}/out/ckpt.pt {flags}", tmp_path)
    with Image.open(next(tmp_path.glob("a.*"))) as picture:
        assert picture.width > width and np.std(np.asarray(picture.convert("L"))) > 10
        assert picture.format == "PNG" or picture.n_frames > 5


def test_play_counts_where_it_looks(trained, tmp_path):
    said = run(f"play.py --ckpt {trained}/out/ckpt.pt --attention --episodes 1 --tasks stack",
               tmp_path)
    counts = re.findall(r"pointer to the (\w+), is on it: (\d+)/(\d+)", said)
    assert [name for name, *_ in counts[:2]] == ["thing", "place"]
    assert all(int(k) <= int(n) <= 200 for _, k, n in counts)


def replay(path):
    """Whether each of the demonstrations that succeeded does so again, by its recorded actions."""
    again = []
    with h5py.File(path) as file:
        env = Env(**json.loads(file.attrs["env_args"])["env_kwargs"] | dict(cameras=()))
        for i in range(file.attrs["total"]):
            about = file[f"episode_{i}"].attrs
            if about["part"] == 0:
                env.set_randomize(about["randomize"])
                env.reset(about["scene_seed"])
            env.set_request((about["task"], json.loads(about["slots"])), about["instruction"])
            for action in file[f"episode_{i}/actions"]:
                *_, info = env.step(action)
            if about["success"]:
                again.append(info["success"])
    return again


def test_demonstrations_without_noise_replay_exactly(trained, tmp_path):
    """Instruction after instruction; what noise had a hand in mostly does not."""
    run("gen_data.py --tasks all --episodes 12 --noise 0 --workers 1 --out clean.h5", tmp_path)
    assert all(replay(tmp_path / "clean.h5")) and not all(replay(trained / "demos.h5"))
    said = run("play.py --data clean.h5 --episode 2 --size 128 --out a.png", tmp_path)
    about = run("gen_data.py --info clean.h5", tmp_path)
    with h5py.File(tmp_path / "clean.h5") as file:
        assert file["episode_2"].attrs["instruction"] in said
        tasks = [file[f"episode_{i}"].attrs["task"] for i in range(12)]
    assert all(f"{task} {tasks.count(task)}" in about for task in tasks)


def test_the_expert_mends_what_a_mistaken_one_did():
    """Which moved things, and left no trace but that."""
    env = Env(tasks=["stack", "pick_place"], cameras=["wrist"])
    rng = np.random.default_rng(0)
    moved, mended = [], []
    for seed in range(10):
        env.reset(seed)
        before = env.request, env.instruction, env.block_pos.copy()
        blunder(env, rng, Disturbance(rng, 0))
        assert (env.request, env.instruction, env.steps) == (*before[:2], 0)
        assert list(env.cameras) == ["wrist"] and env.observe()["wrist_image"].any()
        moved.append(abs(env.block_pos - before[2]).max() > 0.01)
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(expert(env))
            over = terminated or truncated
        mended.append(info["success"])
    assert sum(moved) >= 3 and sum(mended) >= 9


env = Env(cameras=())
env.reset(0)
ABSENT = min(set(COLORS) - set(env.block_colors))              # of no block in scene 0


@pytest.fixture
def page(tmp_path):
    """A function that asks the page of play.py for something; returns status and answer."""
    process = start("play.py --expert --seed 3 --size 128 --port 0 --no_browser", tmp_path)
    address = process.stdout.readline().split()[0]

    def ask(path, command=None, **headers):
        body = command if command is None else json.dumps(command).encode()
        try:
            with urlopen(Request(address + path, body, headers), timeout=20) as answer:
                return answer.status, answer.read().decode()
        except OSError as error:
            return getattr(error, "code", 413), ""  # it may stop listening to what is too long

    yield ask
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=5) == ("", None) and process.returncode == 130


def test_a_page_shows_a_sentence_being_obeyed(page):
    assert "<script>" in page("/")[1]
    first = frame = json.loads(page("/frame?0")[1])
    assert frame["seed"] == 3 and not frame["history"]
    sentence = frame["examples"][0]
    assert page("/", ["say", sentence])[0] == 200
    while not frame["history"] or ": done" not in frame["history"][0][2]:
        frame = json.loads(page(f"/frame?{frame['number']}")[1])
        assert frame["number"] < 1000
    assert frame["history"][0][0] == sentence and frame["pictures"][0] != first["pictures"][0]
    page("/", ["say", "make me a coffee " * 100])
    page("/", ["scene", 4, 0.5])
    frame = json.loads(page(f"/frame?{frame['number']}")[1])
    assert frame["seed"] == 4 and "coffee" in frame["history"][1][0]


def test_a_page_moves_blocks_with_the_mouse(page):
    number = json.loads(page("/frame?0")[1])["number"]
    grid = np.linspace(0, 1, 60)
    at = next((x, y) for x in grid for y in grid if page("/", ["grab", x, y])[1] == "true")
    page("/", ["drag", at[0] + 0.1, at[1], False])
    first = number
    while page("/", ["grab", at[0] + 0.1, at[1]])[1] == "false":
        number = json.loads(page(f"/frame?{number}")[1])["number"]
        assert number < first + 200


def test_a_page_refuses(page):
    for status, path, command, headers in [
            (413, "/", "x" * 1_000_000, {}), (400, "/", 5, {}), (400, "/", ["frame"], {}),
            (400, "/", ["slow", "x"], {}), (400, "/", ["slow", 10**400], {}),
            (400, "/", ["say"], {}), (400, "/", ["grab", 1, None], {}),
            (403, "/", ["drop"], dict(Origin="http://example.com")), (200, "/", ["drop"], {}),
            (403, "/", None, dict(Host="example.com")), (403, "/", None, dict(Host="[")),
            (404, "/model.py", None, {}), (404, "/frame?-1", None, {})]:
        assert page(path, command, **headers)[0] == status, command


# ------------------------------------------------------------------------------- bad input
# What is broken: file, the part of it, and what goes there: attributes or settings, one number
# in place of all, or a list in place of the array.
BROKEN = """
string/ckpt.pt config {"layers": "2"}
true/ckpt.pt config {"frames": true}
none/ckpt.pt config {"cameras": null}
hand/ckpt.pt config {"head": "hand"}
deep/ckpt.pt config {"layers": 1000000000}
wide/ckpt.pt config {"width": 4096}
numbers/ckpt.pt config {"intents": 3}
strange/ckpt.pt config {"wings": 2}
many/resume.pt settings {"steps": "many"}
none/resume.pt settings {"layers": null}
older/resume.pt settings {"spread": 0.5}
no.h5 / {"total": 0}
mute.h5 / {"requests": "[]"}
prose.h5 / {"requests": "all of them"}
request.h5 episode_3 {"request": 9999}
things.h5 episode_3/grounding/relabel_things 99
nan.h5 episode_3/observations/ee_vel NaN
wild.h5 episode_3/actions 1.5
short.h5 episode_3/actions [[0, 0, 0, 0]]
float.h5 episode_0/observations/front_image 0.5
"""


@pytest.fixture(scope="session")
def hostile(trained):
    """The trained folder with broken and foreign files added."""
    for row in BROKEN.strip().splitlines():
        name, part, value = row.split(" ", 2)
        path, value = trained / name, json.loads(value)
        if path.suffix == ".pt":
            path.parent.mkdir(exist_ok=True)
            saved = torch.load(trained / "out" / path.name, weights_only=True)
            saved[part].update(value)
            torch.save(saved, path)
            continue
        shutil.copy(trained / "demos.h5", path)
        with h5py.File(path, "a") as file:
            if isinstance(value, dict):
                file[part].attrs.update(value)
                continue
            array = value if isinstance(value, list) else np.full(file[part].shape, value)
            del file[part]
            file[part] = array
    (trained / "torn").mkdir()
    for whole, cut in (("demos.h5", "cut.h5"), ("out/ckpt.pt", "cut.pt"),
                       ("out/resume.pt", "torn/resume.pt")):
        content = (trained / whole).read_bytes()
        (trained / cut).write_bytes(content[:len(content) // 2])
    torch.save(dict(config=Path("/")), trained / "pickle.pt")
    for name, text in (("text", "neither a checkpoint nor data"), ("empty.txt", ""),
                       ("slot.txt", "lift\traise the {thing}"),
                       ("more.txt", "lift\traise the {block} cube off the {pad} pad"),
                       ("long.txt", "none\t" + "now " * 50),
                       ("task.txt", "juggle\tjuggle the {block} block")):
        (trained / name).write_text(text + "\n")
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
train.py NEW --typos 2 => --typos
train.py NEW --typos nan => --typos
train.py NEW --relabel 4 => --relabel
train.py NEW --relabel 1 => --labels
train.py NEW --release_weight -1 => --release_weight
train.py NEW --ensemble => --ensemble
train.py NEW --execute 9 => --execute 9
train.py NEW --tasks lift => lift
train.py NEW --tasks lift,lift => lift
train.py NEW --cameras front,front => twice
train.py NEW --cameras front,top => top_image
train.py NEW --vision cnn --attention_weight 1 => --vision
train.py NEW --head flow --bins 16 => --head tokens
train.py NEW --head tokens --bins 1 => --bins
train.py NEW --text char --shuffle_names 1 => --text
train.py NEW --model bc --head flow => --head
train.py NEW --model bc --relabel 1 => --relabel
train.py NEW --model bc --labels simulator => --labels
train.py NEW --optimizer adamw --lr 1e-3 => --optimizer
train.py NEW --width 100 --heads 3 => --width 100
train.py NEW --patch 7 => --patch 7
train.py NEW --patch 48 => --patch 48
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
train.py --data things.h5 --labels simulator --out_dir new => relabel_things of episode_3
train.py --data nan.h5 --out_dir new => ee_vel of episode_3
train.py --data wild.h5 --out_dir new => actions of episode_3
train.py --data short.h5 --out_dir new => short.h5
train.py --data float.h5 --out_dir new => front_image
train.py --resume new => new
train.py --resume out --out_dir new => not allowed
train.py --resume torn => torn
train.py --resume many --data demos.h5 => steps
train.py --resume none --data demos.h5 => layers
train.py --resume older --data demos.h5 => spread
train.py --resume out --data demos.h5 --model bc => another configuration
eval.py --ckpt missing.pt => there is no missing.pt
eval.py --ckpt text => not a checkpoint
eval.py --ckpt cut.pt => not a checkpoint
eval.py --ckpt pickle.pt => not a checkpoint
eval.py --ckpt string/ckpt.pt => not a checkpoint
eval.py --ckpt true/ckpt.pt => not a checkpoint
eval.py --ckpt none/ckpt.pt => not a checkpoint
eval.py --ckpt hand/ckpt.pt => not a checkpoint
eval.py --ckpt deep/ckpt.pt => not a checkpoint
eval.py --ckpt wide/ckpt.pt => not a checkpoint
eval.py --ckpt numbers/ckpt.pt => not a checkpoint
eval.py --ckpt strange/ckpt.pt => not a checkpoint
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
eval.py CKPT --instructions more.txt => {block}
eval.py CKPT --instructions long.txt => longer than 40 words
eval.py CKPT --instructions task.txt => pick_place
eval.py CKPT --controls --instructions task.txt => --controls
eval.py CKPT --episodes 1 --out text/a.json => text
eval.py CKPT --episodes 1 --out out => .json
play.py --ckpt missing.pt --out a.gif => missing.pt
play.py CKPT --out a.gif --tasks juggle => 'juggle'
play.py CKPT --out a.gif --seed three => three
play.py CKPT --out a.gif --seed 1180591620717411303424 => --seed
play.py CKPT --out a.bmp => .gif or .png
play.py CKPT --out text/a.gif => text
play.py CKPT --out a.gif --size 5 => --size
play.py --expert --out a.gif --instruction '' => ''
play.py --expert --out a.gif --instruction 'lift it onto the target' => not clear
play.py CKPT --out a.gif --instruction 'lift the ABSENT block' => no ABSENT block
play.py CKPT --pipeline --out a.gif => .png
play.py CKPT --pipeline --seed 1,2 --out a.png => one --seed
play.py CKPT --episodes 3 --out a.gif => --episodes
play.py --expert CKPT --out a.gif => --ckpt
play.py --data demos.h5 => --out
play.py CKPT --seed 1,2 => one --seed
play.py CKPT --out a.gif --randomize 0,1 => one for each --seed
play.py CKPT --attention --episodes 2 --seed 1,2 => --episodes
play.py CKPT --out a.gif --port 80 => --port
play.py CKPT --no_browser --host 192.0.2.1 => 192.0.2.1
play.py --data demos.h5 --episode 99 --out a.gif => --episode 99
play.py --data demos.h5 --attention --out a.gif => --attention
play.py --data cut.h5 --out a.gif => cut.h5
play.py --data text --out a.gif => text
examples/ablations.py missing.txt => missing.txt
examples/ablations.py empty.txt => empty.txt
examples/ablations.py task.txt => task.txt
"""
BAD = BAD.replace("ABSENT", ABSENT).replace("NEW", "--data demos.h5 --out_dir new")
BAD = BAD.replace("CKPT", "--ckpt out/ckpt.pt").strip().splitlines()

# Runs the scripts one after the other in one process: importing torch for each takes longest.
TELLER = """
import json, os, runpy, shlex, signal, sys, tempfile
repository = sys.argv[1]
sys.path[:0] = ["", repository]
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os._exit = sys.exit
signal.signal(signal.SIGALRM, lambda *_: sys.exit("still running after 15 s"))
for command in sys.stdin.read().splitlines():
    sys.argv = shlex.split(command)
    sys.path[0] = f"{repository}/{os.path.dirname(sys.argv[0])}"
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
    """Exit status and stderr of each command of BAD."""
    before = written(hostile, "*")
    commands = "\n".join(row.split(" => ")[0] for row in BAD)
    told = subprocess.run([sys.executable, "-c", TELLER, ROOT], cwd=hostile, text=True,
                          capture_output=True, timeout=300, input=commands)
    assert written(hostile, "*") == before         # nothing overwritten, lost or left behind
    return dict(zip(BAD, map(json.loads, told.stdout.splitlines())))


@pytest.mark.parametrize("row", BAD)
def test_bad_input_is_one_sentence(row, complaints):
    code, said = complaints[row]
    command, words = row.split(" => ")
    script = Path(command.split()[0]).name         # argparse may say its usage first
    sentence = rf"(usage: (.*\n)+)?{script}: .*{re.escape(words)}.*\n"
    assert code == 2 and re.fullmatch(sentence, said), said


@pytest.mark.skipif(bool(importlib.util.find_spec("metaworld")), reason="Meta-World is installed")
@pytest.mark.parametrize("flags, words", [("record", "requirements-metaworld.txt"),
                                          ("eval --tasks reach,dance", "'dance' is not mt10")])
def test_metaworld_is_asked_for_in_one_sentence(flags, words, tmp_path):
    said = run(f"examples/metaworld.py {flags}", tmp_path, status=2)
    assert words in said and "Traceback" not in said and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- the README's recipes
PREPARED = """
import numpy as np, torch, gen_data, model
from gen_data import *
from model import *
"""
RECIPES = {
    "# demonstrations of another robot": """
import subprocess, sys
flags = "--data robot.h5 --device cpu --steps 1 --batch_size 2".split()
train = gen_data.__file__.replace("gen_data.py", "train.py")
assert subprocess.run([sys.executable, train, *flags]).returncode == 0
assert model.VLA.load("out/ckpt.pt").config.state_keys == ("ee_pos", "gripper")""",
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
config = model.Config(head=list(model.HEADS)[-1])
net = model.VLA(config)
error, *_ = net(torch.zeros(2, 2, 64, 64, 3).byte(), torch.zeros(2, 14), torch.ones(2, 16, 24).long(),
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
    run_code(PREPARED + block[1] + RECIPES[title], tmp_path)
