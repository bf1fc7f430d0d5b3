"""Datasets of LeRobot, versions 3.0 and 2.1, to one data file of ours, without lerobot.

    pip install -r examples/requirements-lerobot.txt
    python examples/lerobot.py DATASET [ANOTHER ..] data/robot.h5
    python examples/prepare.py data/robot.h5 data/ready.h5
    python train.py --data data/ready.h5 --steps 2000 --out_dir out_ready

The robot's joints take the place of the hand. The last action is the gripper's, low is shut. If the
others are targets of the joints in the state, they become differences from these joints. All are
scaled to -1..1; targets() undoes that. export.py goes the other way, with our own demonstrations.
Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder, where `lerobot`, which others import from Python, would be this file.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pyarrow.json import read_json
from tqdm import tqdm

from gen_data import explain_errors, write_episode

# -1 and 1 stand for these percentiles of actions: a few are out of all proportion.
RANGE = 0.1, 99.9


class Dataset:
    """A folder of LeRobot's: state (N, S) and action (N, A) of all N rows, pictures one by one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.info = json.loads((self.folder / "meta/info.json").read_text("utf-8"))
        self.rows = pq.read_table((self.folder / "data").resolve(strict=True))
        self.state, self.action = (
            np.array(self.rows[key].to_pylist(), np.float32)
            for key in ("observation.state", "action")
        )

    def metadata(self):
        """{task_index: sentence}, and of each episode a dict that says where its films are."""
        meta = self.folder / "meta"
        version = self.info["codebase_version"]
        if version == "v3.0":
            columns = pq.read_table(meta / "tasks.parquet").to_pydict()
            tasks = zip(columns.pop("task_index"), *columns.values())
            return dict(tasks), pq.read_table(meta / "episodes").to_pylist()
        if version == "v2.1":
            tasks, episodes = (
                read_json(meta / name).to_pylist()
                for name in ("tasks.jsonl", "episodes.jsonl")
            )
            return {task["task_index"]: task["task"] for task in tasks}, episodes
        raise ValueError(f"{self.folder} is of version {version}, not v3.0 or v2.1")

    def pictures(self, key, episode, rows):
        """A camera's pictures of an episode."""
        if self.info["features"][key]["dtype"] == "image":
            for cell in self.rows[key][rows]:
                yield Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB")
            return
        number = episode["episode_index"]
        path = self.info["video_path"].format(
            video_key=key,
            episode_index=number,
            episode_chunk=number // self.info["chunks_size"],
            chunk_index=episode.get(f"videos/{key}/chunk_index"),
            file_index=episode.get(f"videos/{key}/file_index"),
        )
        start = episode.get(f"videos/{key}/from_timestamp", 0)  # s
        end = episode.get(f"videos/{key}/to_timestamp", np.inf)
        try:
            with av.open(self.folder / path) as film:
                film.seek(int(start * av.time_base))  # or shortly before
                for frame in film.decode(video=0):
                    middle = frame.time + 0.5 / self.info["fps"]
                    if middle > end:
                        break
                    if middle > start:
                        yield frame.to_image()
        except av.FFmpegError as error:
            raise ValueError(f"{path}: {error}")

    def episodes(self, size):
        """Of each episode its rows, a slice; its sentence; and of each camera the middle squares of
        its pictures, shrunk: {name: (T, size, size, 3) uint8}."""
        sentences, episodes = self.metadata()
        numbers = self.rows["episode_index"].to_numpy()
        for episode in episodes:
            start, end = np.searchsorted(numbers, episode["episode_index"] + np.arange(2))
            rows = slice(start, end)
            views = {}
            for key, about in self.info["features"].items():
                if about["dtype"] in ("image", "video"):
                    pictures = self.pictures(key, episode, rows)
                    small = [
                        ImageOps.fit(one, (size, size), Image.BOX) for one in pictures
                    ]
                    # lerobot's streaming_encoding drops pictures when it is late.
                    if len(small) != end - start:
                        raise ValueError(
                            f"{self.folder}: episode {episode['episode_index']} has "
                            f"{end - start} rows and {len(small)} pictures of {key}"
                        )
                    views[key.removeprefix("observation.images.")] = np.array(small)
            yield rows, sentences[self.rows["task_index"][start].as_py()], views


def targets(units, action, state):
    """A policy's action (A,) in the robot's own units. units: dict(low, high, relative, fps), as
    JSON in the data file, file["data"].attrs["units"], and in a checkpoint; state: the joints and
    the gripper."""
    low, high = np.array(units["low"]), np.array(units["high"])
    action = low + (high - low) * (action + 1) / 2
    if units["relative"]:
        action[:-1] += state[:-1]
    return action


def convert(sets, file, size):
    """Writes the episodes of these datasets to an open file, and the units of their actions."""
    state = np.concatenate([dataset.state for dataset in sets])
    action = np.concatenate([dataset.action for dataset in sets])
    # Targets are near the joints, compared with how far these move.
    relative = action.shape == state.shape and bool(
        np.std(action - state) < np.std(state) / 2
    )
    if relative:
        action[:, :-1] -= state[:, :-1]
    low, high = np.percentile(action, RANGE, 0)
    action = (2 * (action - low) / np.maximum(high - low, 1e-6) - 1).clip(-1, 1)
    units = dict(
        low=low.tolist(), high=high.tolist(), relative=relative, fps=sets[0].info["fps"]
    )

    number = offset = 0  # of the episode, and of the dataset's rows among all
    for dataset in sets:
        for rows, sentence, views in tqdm(dataset.episodes(size), disable=None):
            columns = {f"observations/{name}_image": view for name, view in views.items()}
            columns["observations/ee_pos"] = state[offset:][rows, :-1]
            columns["observations/gripper"] = state[offset:][rows, -1:]
            columns["actions"] = action[offset:][rows]
            frames = [dict(zip(columns, row)) for row in zip(*columns.values())]
            write_episode(file, number, dict(instruction=sentence), frames)
            number += 1
        offset += len(dataset.state)
    file["data"].attrs["units"] = json.dumps(units)
    print(units)


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", help="folders, of one robot")
    parser.add_argument("out", type=Path, help="data file to make, .h5")
    parser.add_argument("--size", type=int, default=64, help="px (default 64)")
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"{args.out} exists; give another name")
    sets = [Dataset(folder) for folder in args.datasets]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part")
    try:
        with h5py.File(part, "w") as file:
            convert(sets, file, args.size)
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
