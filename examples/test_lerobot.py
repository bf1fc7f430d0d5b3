"""Tests of lerobot.py and prepare.py: `python -m pytest -q examples/test_lerobot.py`, from the root."""

import io
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from examples.prepare import find_names

ROOT = Path(__file__).resolve().parent.parent
EPISODES = 60
STEPS = 6  # of each
SENTENCES = ["please take the red one", "please take the blue one"]
NAME = "observation.images.top"
COLORS = "red", "blue", "green", "white", "black"


def run(command, status=0):
    """Runs a script of the repository; returns what it says."""
    running = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True
    )
    assert running.returncode == status, running.stderr
    return running.stdout + running.stderr


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return dict(bytes=buffer.getvalue(), path="a.png")


def write_film(path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        film.mux(stream.encode())


@pytest.fixture
def rows():
    """What each row of a dataset is: pictures of what is asked for, joints and their targets."""
    rng = np.random.default_rng(0)
    asked = np.repeat(rng.integers(2, size=EPISODES), STEPS)
    pictures = rng.integers(60, size=(len(asked), 48, 64, 3)).astype(np.uint8)
    pictures[np.arange(len(asked)), ..., 2 * asked] += 150  # red or blue
    state = rng.random((len(asked), 3), np.float32)
    state[:, -1] = np.tile([90, 90, 10, 10, 90, 90], EPISODES)  # of 100, the gripper
    action = state + 0.1 * rng.random((len(asked), 3), np.float32)
    return dict(asked=asked, pictures=pictures, state=state, action=action)


@pytest.fixture(params=["v3.0", "v2.1"])
def dataset(request, rows, tmp_path, monkeypatch):
    """A folder as LeRobot writes it, with pictures in the table and the same as films."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    number = np.repeat(np.arange(EPISODES), STEPS)
    table = pa.table(
        {
            "observation.state": list(rows["state"]),
            "action": list(rows["action"]),
            "observation.images.wrist": [png(picture) for picture in rows["pictures"]],
            "episode_index": number,
            "task_index": rows["asked"],
        }
    )
    features = {
        NAME: dict(dtype="video"),
        "observation.images.wrist": dict(dtype="image"),
    }
    info = dict(
        codebase_version=request.param, fps=10, chunks_size=1000, features=features
    )
    for name in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / name).mkdir(parents=True)
    if request.param == "v3.0":
        tasks = pa.table(dict(task_index=[0, 1], task=SENTENCES))
        pq.write_table(tasks, folder / "meta/tasks.parquet")
        pq.write_table(table, folder / "data/chunk-000/file-000.parquet")
        episodes = {
            f"videos/{NAME}/{part}_index": [0] * EPISODES for part in ("chunk", "file")
        }
        episodes |= {
            "episode_index": range(EPISODES),
            f"videos/{NAME}/from_timestamp": STEPS / 10 * np.arange(EPISODES),
            f"videos/{NAME}/to_timestamp": STEPS / 10 * np.arange(1, EPISODES + 1),
        }
        pq.write_table(
            pa.table(episodes), folder / "meta/episodes/chunk-000/file-000.parquet"
        )
        info["video_path"] = (
            "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        )
        write_film(folder / f"videos/{NAME}/chunk-000/file-000.mp4", rows["pictures"])
    else:
        lines = [json.dumps(dict(task_index=i, task=SENTENCES[i])) for i in (0, 1)]
        (folder / "meta/tasks.jsonl").write_text("\n".join(lines))
        lines = [json.dumps(dict(episode_index=i)) for i in range(EPISODES)]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lines))
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        for i in range(EPISODES):
            name = f"episode_{i:06}"
            part = slice(STEPS * i, STEPS * (i + 1))
            pq.write_table(table[part], folder / f"data/chunk-000/{name}.parquet")
            write_film(
                folder / f"videos/chunk-000/{NAME}/{name}.mp4", rows["pictures"][part]
            )
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def test_everything_arrives(dataset, rows):
    run(f"{ROOT}/examples/lerobot.py set robot.h5 --size 48")
    with h5py.File("robot.h5") as file:
        units = json.loads(file["data"].attrs["units"])
        episodes = [file[f"episode_{i}"] for i in range(EPISODES)]

        def column(name):
            return np.concatenate([episode[name][:] for episode in episodes])

        middle = rows["pictures"][:, :, 8:56]
        assert np.array_equal(column("observations/wrist_image"), middle)
        colour = column("observations/top_image").mean((1, 2))
        assert np.abs(colour - middle.mean((1, 2))).max() < 12
        hand, gripper = column("observations/ee_pos"), column("observations/gripper")
        assert np.array_equal(np.hstack([hand, gripper]), rows["state"])
        actions = column("actions")
        assert np.abs(actions).max() <= 1
        low, high = np.array(units["low"]), np.array(units["high"])
        back = low + (high - low) * (actions + 1) / 2
        back[:, :-1] += hand
        assert (
            np.quantile(np.abs(back - rows["action"]), 0.99) < 1e-3
        )  # extremes are clipped


def test_words_that_pictures_tell_are_found_and_learned_from(dataset, rows):
    run(f"{ROOT}/examples/lerobot.py set robot.h5 --size 48")
    said = run(f"{ROOT}/examples/prepare.py robot.h5 ready.h5")
    assert f"{EPISODES} of {EPISODES} episodes are shorter than a second" in said
    assert said.endswith("words that name things: blue, red\n")
    with h5py.File("ready.h5") as file:
        for episode in file["data"].values():
            attrs = episode.attrs
            assert attrs["instruction"] == "please take the {thing} one"
            assert (
                attrs["instruction"].format(**json.loads(attrs["slots"]))
                == attrs["sentence"]
            )
            red, _, blue = episode["observations/wrist_image"][0].mean((0, 1))
            assert ("red" in attrs["sentence"]) == (red > blue)
        assert len(file["data"]) == EPISODES and "units" in file["data"].attrs
    train = f"{ROOT}/train.py --data ready.h5 --steps 2 --batch_size 8 --eval_episodes 0"
    assert "step     2" in run(f"{train} --device cpu --keep_patches 30")


def test_a_name_is_the_thing_or_the_place_by_the_words_around_it():
    """Pictures that tell little leave some in the wrong order; what is like others goes with them."""
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(len(COLORS))[:2] for _ in range(400)]
    wordings = "put the {} cube on the {} disc", "on the {1} disc put the {0} cube"
    sentences = [
        wordings[rng.random() < 0.2].format(*[COLORS[color] for color in pair])
        for pair in drawn
    ]
    looks = rng.normal(0, 1, (len(drawn), 2, len(COLORS)))
    for look, (thing, place) in zip(looks, drawn):  # at closing, and at opening
        look[[0, 1, 0, 1], [thing, place, place, thing]] += 2.5, 2.5, 1.5, 1.5
    found = find_names(sentences, 10 * looks)
    right = [
        names == dict(thing=COLORS[thing], place=COLORS[place])
        for names, (thing, place) in zip(found, drawn)
    ]
    assert all(right)


def refuse():
    """What lerobot.py says of the dataset, one sentence; it leaves nothing behind."""
    [line] = run(f"{ROOT}/examples/lerobot.py set robot.h5", status=2).splitlines()
    assert [path.name for path in Path().iterdir()] == ["set"]
    return line


def test_what_cannot_be_read_is_one_sentence(dataset):
    info = dataset / "meta/info.json"
    text = info.read_text()
    for before, after, complaint in (
        ('version": "v', 'version": "v9', "of version v9"),
        ("observation.images.wrist", "observation.images.arm", "observation.images.arm"),
        (".mp4", ".avi", ".avi"),
    ):
        info.write_text(text.replace(before, after))
        assert complaint in refuse()


def test_missing_pictures_are_noticed(dataset, rows):
    film = max(dataset.glob("videos/**/*.mp4"))
    write_film(film, rows["pictures"][: STEPS - 1])
    last = "episode_" in film.name
    assert refuse() == (
        f"lerobot.py: set: episode {(EPISODES - 1) * last} has {STEPS} rows and "
        f"{STEPS - 1} pictures of {NAME}"
    )


def test_a_picture_dropped_inside_a_film_is_noticed(dataset):
    path = dataset / "meta/episodes/chunk-000/file-000.parquet"
    if not path.exists():
        pytest.skip("only version 3.0 has several episodes in a film")
    episodes = pq.read_table(path).to_pylist()
    for part in ("to", "from"):  # as lerobot notes it down, so that all later ones shift
        for episode in episodes[2 + (part == "from") :]:
            episode[f"videos/{NAME}/{part}_timestamp"] -= 0.1  # s
    pq.write_table(pa.Table.from_pylist(episodes), path)
    assert f"episode 2 has {STEPS} rows and {STEPS - 1} pictures" in refuse()


def gripper_range(file):
    """The lowest and the highest opening of the gripper in all episodes."""
    episodes = file["data"].values()
    gripper = np.concatenate([episode["observations/gripper"] for episode in episodes])
    return gripper.min(), gripper.max()


@pytest.mark.parametrize("dataset", ["v3.0"], indirect=True)
def test_what_looks_odd_is_said_and_what_is_wrong_refused(dataset):
    run(f"{ROOT}/examples/lerobot.py set robot.h5 --size 48")
    prepare = f"{ROOT}/examples/prepare.py robot.h5 ready.h5 --plain"
    with h5py.File("robot.h5", "a") as file:
        file["episode_3/actions"][:, -1] *= -1
        file["episode_4/actions"][:, -1] = 0, 1, 0, 1, 0, 1
        lowest, highest = gripper_range(file)
        middle = (lowest + highest) / 2
        for episode in (5, 15):  # grasps, lets go, and shuts: on nothing in episode 5
            file[f"episode_{episode}/actions"][:, -1] = 1, -1, -1, 1, -1, -1
            file[f"episode_{episode}/observations/gripper"][:, 0] = (
                *(highest, middle, middle, highest, middle),
                lowest if episode == 5 else middle,
            )
    said = run(prepare)
    for about in (
        "open the gripper where the last action is below 0, such as 3",
        "never tell the gripper to shut, by a last action below 0, such as 4",
        "shut the gripper again, on nothing",
    ):
        assert f"1 of {EPISODES} episodes {about}" in said
    with h5py.File("ready.h5") as file:
        lengths = {name: len(file[f"data/demo_{name}/actions"]) for name in (4, 5, 15)}
        assert lengths == {4: STEPS, 5: STEPS - 2, 15: STEPS}
        assert {len(array) for array in file["data/demo_5/observations"].values()} == {4}
    Path("ready.h5").unlink()
    with h5py.File("robot.h5", "a") as file:
        file["episode_7"].attrs["instruction"] = "very " * 45
    assert "/data/demo_7 has a sentence of more than 40 words" in run(prepare, status=2)
    with h5py.File("robot.h5", "a") as file:
        file["episode_6/observations"].move("top_image", "front_image")
    said = run(prepare, status=2)
    assert (
        "/data/demo_6 has ['ee_pos', 'front_image', 'gripper', 'wrist_image'], the"
        in said
    )
    assert not Path("ready.h5").exists()


def test_what_export_writes_comes_back(tmp_path):
    pytest.importorskip("lerobot")
    ours, theirs, back = (tmp_path / name for name in ("a.h5", "set", "b.h5"))
    run(f"gen_data.py --episodes 3 --out {tmp_path / 'ours'}")
    (tmp_path / "ours/0000.h5").rename(ours)
    run(f"examples/export.py {ours} {theirs}")
    assert "exists" in run(f"examples/export.py {ours} {theirs}", status=2)
    run(f"examples/lerobot.py {theirs} {back}")
    with h5py.File(ours) as a, h5py.File(back) as b:
        whole = [x for x in a["data"].values() if not x.attrs["interrupted"]]
        assert len(whole) == len(b["data"])
        for one, other in zip(whole, b["data"].values()):
            assert one.attrs["instruction"] == other.attrs["instruction"]
            view = "observations/wrist_image"
            assert (one[view][:] == other[view][:]).all()
            assert len(one["actions"]) == len(other["actions"])
