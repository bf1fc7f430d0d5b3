"""Data files of ours to a dataset of LeRobot's, version 3.0, which its policies can be trained on.

    python examples/export.py data/pick_place data/lerobot
    lerobot-train --dataset.repo_id=local/picovla --dataset.root=data/lerobot --policy.type=act \\
        --policy.device=cpu --policy.pretrained_backbone_weights=null --policy.push_to_hub=false \\
        --output_dir=out_act

Without the interrupted episodes. lerobot itself writes it, so this needs what is in
examples/requirements-so101.txt, in a virtual environment of its own with Python 3.12; its training
needs `pip install "lerobot[training]==0.6.1"`, too. Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder, where `lerobot` would be our lerobot.py.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import tempfile

import h5py
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

from gen_data import CONTROL_HZ, PRIVILEGED, explain_errors


def read(path):
    """Of each episode in a file its sentence and its columns, {LeRobot's name: (T, ..)}."""
    try:
        with h5py.File(path) as file:
            for episode in file["data"].values():
                if episode.attrs.get("interrupted"):
                    continue
                columns, numbers = {}, []
                for key, data in episode["observations"].items():
                    if key.endswith("_image"):
                        name = key.removesuffix("_image")
                        columns[f"observation.images.{name}"] = data[:]
                    elif key not in PRIVILEGED:
                        numbers.append(data[:])
                columns["observation.state"] = np.hstack(numbers).astype(np.float32)
                columns["action"] = episode["actions"][:].astype(np.float32)
                yield episode.attrs["instruction"], columns
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def make(out, columns):
    """An empty dataset for such columns."""
    features = {}
    for name, column in columns.items():
        features[name] = {"dtype": "float32", "shape": column.shape[1:], "names": None}
        if "images" in name:
            features[name].update(dtype="image", names=["height", "width", "channels"])
    return LeRobotDataset.create(
        "local/picovla", CONTROL_HZ, features, root=out, use_videos=False
    )


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="data file, or a folder of them")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"{args.out} exists; give another name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dataset = None
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        part = Path(folder, "dataset")
        for path in tqdm(sorted(args.data.glob("*.h5")) or [args.data]):
            for sentence, columns in read(path):
                dataset = dataset or make(part, columns)
                for row in zip(*columns.values()):
                    dataset.add_frame(dict(zip(columns, row), task=sentence))
                dataset.save_episode()
        if not dataset:
            raise ValueError(f"{args.data} has no whole episode")
        dataset.finalize()
        part.rename(args.out)
