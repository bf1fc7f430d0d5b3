"""Datasets of LeRobot, versions 3.0 and 2.1, to one data file of ours, without lerobot.

    pip install -r examples/requirements-lerobot.txt
    python examples/lerobot.py DATASET [ANOTHER ..] data/robot.h5
    python examples/prepare.py data/robot.h5 data/ready.h5
    python train.py --data data/ready.h5 --steps 2000 --out_dir out_ready

The robot's joints take the place of the hand. The last action is the gripper's, low is shut. If the
others are targets of the joints in the state, they become differences from these joints. All are
scaled to -1..1; targets() undoes that. Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder, where `lerobot`, which others import from Python, would be this file.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import itertools
import json

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm import tqdm

from gen_data import explain_errors, write_episode

MOST = (
    0.1,
    99.9,
)  # percent of actions that -1 and 1 stand for: a few are out of all proportion


def read(folder):
    """The parquet files in a folder's folders, as one table."""
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("*/*.parquet"))))


class Dataset:
    """A folder of LeRobot's: state (N, S) and action (N, A) of all N rows; moves (N, A), which are
    the actions, less the joints if `relative`; pictures one by one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.info = json.loads((self.folder / "meta/info.json").read_text("utf-8"))
        self.rows = read(self.folder / "data")
        self.state, self.action = (
            np.array(self.rows[key].to_pylist(), np.float32)
            for key in ("observation.state", "action")
        )
        self.moves = self.action.copy()
        alike = self.action.shape == self.state.shape
        self.relative = alike and bool(
            np.std(self.action - self.state) < np.std(self.state) / 2
        )
        if self.relative:
            self.moves[:, :-1] -= self.state[:, :-1]

    def metadata(self):
        """{task_index: sentence}, and of each episode a dict that says where its films are."""
        meta = self.folder / "meta"
        version = self.info["codebase_version"]
        if version == "v3.0":
            columns = pq.read_table(meta / "tasks.parquet").to_pydict()
            tasks = zip(columns.pop("task_index"), *columns.values())
            return dict(tasks), read(meta / "episodes").to_pylist()
        if version == "v2.1":
            tasks, episodes = (
                [
                    json.loads(line)
                    for line in (meta / name).read_text("utf-8").splitlines()
                ]
                for name in ("tasks.jsonl", "episodes.jsonl")
            )
            return {task["task_index"]: task["task"] for task in tasks}, episodes
        raise ValueError(f"{self.folder} is of version {version}, not v3.0 or v2.1")

    def pictures(self, key, episode, rows):
        """A camera's pictures of an episode, from its first on."""
        if self.info["features"][key]["dtype"] == "image":
            for cell in self.rows[key][rows]:
                yield Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB")
            return
        number = episode["episode_index"]
        path = self.info["video_path"].format(
            video_key=key,
            episode_index=number,
            episode_chunk=number // self.info.get("chunks_size", 1000),
            chunk_index=episode.get(f"videos/{key}/chunk_index"),
            file_index=episode.get(f"videos/{key}/file_index"),
        )
        start = episode.get(f"videos/{key}/from_timestamp", 0)  # s
        with av.open(self.folder / path) as film:
            film.seek(int(start * av.time_base))  # or shortly before
            for frame in film.decode(video=0):
                if frame.time > start - 0.5 / self.info["fps"]:
                    yield frame.to_image()

    def episodes(self, size):
        """Of each episode: its rows, a slice; its sentence; and of each camera its pictures, of each
        the middle square, shrunk: {name: (T, size, size, 3) uint8}."""
        sentences, episodes = self.metadata()
        numbers = self.rows["episode_index"].to_numpy()
        for episode in episodes:
            start, end = np.searchsorted(numbers, episode["episode_index"] + np.arange(2))
            rows = slice(start, end)
            views = {}
            for key, about in self.info["features"].items():
                if about["dtype"] in ("image", "video"):
                    some = itertools.islice(
                        self.pictures(key, episode, rows), end - start
                    )
                    small = [ImageOps.fit(one, (size, size), Image.BOX) for one in some]
                    if len(small) < end - start:
                        raise ValueError(
                            f"{self.folder}: {key} has fewer pictures than rows"
                        )
                    views[key.removeprefix("observation.images.")] = np.array(small)
            yield rows, sentences[self.rows["task_index"][start].as_py()], views


def targets(units, action, state):
    """A policy's action (A,) in the robot's own units. units: JSON in the data file, attribute of
    `data`; state: the joints and the gripper."""
    units = json.loads(units)
    low, high = np.array(units["low"]), np.array(units["high"])
    action = low + (high - low) * (action + 1) / 2
    if units["relative"]:
        action[:-1] += state[:-1]
    return action


def convert(sets, file, size):
    """Writes the episodes of these datasets to an open file, and the units of their actions."""
    low, high = np.percentile(np.concatenate([one.moves for one in sets]), MOST, 0)
    units = dict(low=low.tolist(), high=high.tolist(), relative=sets[0].relative)
    number = 0
    for dataset in sets:
        moves = 2 * (dataset.moves - low) / np.maximum(high - low, 1e-6) - 1
        for rows, sentence, views in tqdm(dataset.episodes(size), disable=None):
            columns = {f"observations/{name}_image": view for name, view in views.items()}
            columns["observations/ee_pos"] = dataset.state[rows, :-1]
            columns["observations/gripper"] = dataset.state[rows, -1:]
            columns["actions"] = moves[rows].clip(-1, 1)
            frames = [dict(zip(columns, row)) for row in zip(*columns.values())]
            write_episode(file, number, dict(instruction=sentence), frames)
            number += 1
    file["data"].attrs.update(units=json.dumps(units), fps=dataset.info["fps"])


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
    part = args.out.with_suffix(".part")
    try:
        with h5py.File(part, "w") as file:
            convert(sets, file, args.size)
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
