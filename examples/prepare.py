"""Prepares data with plain sentences: says what looks odd, finds the words that name things.

    pip install -r examples/requirements-lerobot.txt
    python examples/prepare.py data/robot.h5 data/ready.h5
    python train.py --data data/ready.h5 --steps 2000 --out_dir out_ready

Nobody lists the names: they are the words that can be predicted from the pictures at the moments
when the gripper closes and opens, by ridge regression from the mean colours of their cells. If a
sentence has two, these pictures and the words around them decide which is the thing and which the
place. Training then learns where a sentence says a name apart from which name it is.

The new file has the pictures, the robot's numbers, the actions and the sentences of the old one, or
of all in a folder, without interrupted episodes. So with data/pick_place in place of data/robot.h5
it shows what our own demonstrations are worth when nothing explains them; `eval.py --tasks
pick_place` scores that. Run this script from the project's root.
"""

import sys
from pathlib import Path

# In place of this folder: its `inspect` is not the one that others import from Python.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import itertools
import json
import re
from collections import defaultdict

import h5py
import numpy as np
from PIL import Image
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, cross_val_predict

from gen_data import CONTROL_HZ, PRIVILEGED, explain_errors
from model import Config, split

SLOTS = ("thing", "place")  # what is named when the gripper closes, and when it opens
CELLS = 8  # across a picture
NOISE = 3.0  # of a cell's colour, of 255
RIDGE = 300.0  # penalty of the regression from pictures to words
AROUND = 3  # words on each side of a name
FORM = 0.3  # inverse of the penalty of the regression on them
ROUNDS = 3  # of that, each with the orders of the one before
FOLDS = KFold(5, shuffle=True, random_state=0)  # each fifth is predicted from the others
FEWEST = 20  # episodes in which names are looked for
MOST = 10  # numbers of episodes to print
STILL = 0.01  # of a number's range in the episode: less is no move
EMPTY = 0.1  # of the gripper's way from shut to open: less is nothing in it


# ------------------------------------------------------------------------------------- the data
def copy(paths, file):
    """Copies all episodes, but for what only a simulator knows; returns their groups, without
    `instruction`, and their sentences."""
    groups, sentences = [], []
    for path in paths:
        try:
            with h5py.File(path) as source:
                # demo_2 before demo_10
                for _, name in sorted((len(name), name) for name in source["data"]):
                    episode = source["data"][name]
                    if episode.attrs.get("interrupted"):
                        continue
                    group = file.create_group(f"data/demo_{len(groups)}")
                    for key in ("observations", "actions"):
                        episode.copy(key, group)
                    for key in PRIVILEGED:
                        group["observations"].pop(key, None)
                    sentence = episode.attrs["instruction"]
                    if isinstance(sentence, bytes):
                        sentence = sentence.decode()
                    groups.append(group)
                    sentences.append(sentence)
                    check(episode.name, group, groups[0], sentence)
                file["data"].attrs.update(source["data"].attrs)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
    return groups, sentences


def check(name, group, first, sentence):
    """Refuses an episode that cannot be learned from, or not with the first."""
    keys, wanted = list(group["observations"]), list(first["observations"])
    if keys != wanted:
        raise ValueError(f"{name} has {keys}, the first episode {wanted}")
    for view in views_of(group):
        if view.shape[1:] != (view.shape[1], view.shape[1], 3) or view.dtype != np.uint8:
            raise ValueError(
                f"pictures are (T, size, size, 3) uint8, not {view.shape} {view.dtype} as "
                f"{name}'s {view.name.split('/')[-1]}"
            )
    if len(split(sentence)) > Config().max_text:
        raise ValueError(
            f"{name} has a sentence of more than {Config().max_text} words: {sentence}"
        )


def views_of(group):
    return [data for key, data in group["observations"].items() if key.endswith("_image")]


def oddities(group, fps):
    """What looks odd in an episode, as ends of a sentence about it."""
    actions = group["actions"][:]
    state = np.hstack([group[f"observations/{key}"] for key in ("ee_pos", "gripper")])
    first = np.ptp(state[:fps], 0)
    told, gripper = actions[:, -1], state[:, -1]
    # A gripper follows with some delay, so the whole episode is compared.
    inverted = np.cov(told, gripper)[0, 1] < -STILL * np.ptp(gripper)
    facts = {
        "are shorter than a second": len(actions) < fps,
        "begin with a second without a move": (first <= STILL * np.ptp(state, 0)).all(),
        "never move the gripper": np.ptp(told) < STILL,
        "never tell the gripper to shut, by a last action below 0": told.min() >= 0,
        "never tell the gripper to open, by a last action above 0": told.max() <= 0,
        "open the gripper where the last action is below 0": inverted,
        "never move anything else": np.ptp(actions[:, :-1]) < STILL,
        "have a camera that always shows the same": any(
            (data[:] == data[0]).all() for data in views_of(group)
        ),
    }
    return [why for why, so in facts.items() if so]


def cut_ways_home(groups):
    """Cuts episodes where the gripper shuts again, on nothing, after it has put something down. The
    rest is the way home, of which training would take the end for the place. Returns how many."""
    gripper = np.concatenate([group["observations/gripper"][:, -1] for group in groups])
    empty = gripper.min() + EMPTY * np.ptp(gripper)
    count = 0
    for group in groups:
        close = group["actions"][:, -1] < 0
        closes = 1 + np.flatnonzero(close[1:] & ~close[:-1])
        if len(closes) < 2 or not close[-1] or group["observations/gripper"][-1] > empty:
            continue
        for parent in (group, group["observations"]):
            for key, data in list(parent.items()):
                if isinstance(data, h5py.Dataset):
                    about = dict(chunks=data.chunks, compression=data.compression)
                    kept = data[: closes[-1]]
                    del parent[key]
                    parent.create_dataset(key, data=kept, **about)
        count += 1
    return count


# ------------------------------------------------------------------------------------- the names
def look(group):
    """What is seen when the gripper closes for the last time, at the first step if it never does,
    and when it opens after that, or at the end: the mean colours of cells, (2, F)."""
    close = group["actions"][:, -1] < 0
    closes = max([0, *np.flatnonzero(close & ~np.roll(close, 1))])
    opens = closes + np.append(~close[closes:], True).argmax()
    moments = [closes, min(opens, len(close) - 1)]
    cells = [
        Image.fromarray(data[t]).resize((CELLS, CELLS), Image.BOX)
        for t in moments
        for data in views_of(group)
    ]
    return np.array(cells, float).reshape(2, -1)


def evidence(looks, said):
    """How much looks (N, F) speak for each word's being said (N, W), in standard deviations."""
    looks = (looks - looks.mean(0)) / (looks.std(0) + NOISE)
    predicted = cross_val_predict(Ridge(RIDGE), looks, said, cv=FOLDS)
    return (predicted - predicted.mean(0)) / (predicted.std(0) + 1e-6)


def words_around(words, names):
    """The words around the first mention of each of two names, as features."""
    features = {}
    for order, name in enumerate(names):
        middle = words.index(name)
        for i in range(max(0, middle - AROUND), min(len(words), middle + AROUND + 1)):
            if words[i] not in names:
                features[f"{order} {i - middle} {words[i]}"] = 1
                features[f"{order} {i < middle} {words[i]}"] = 1
    return features


def find_names(sentences, looks):
    """Of each episode {"thing": word, "place": word}, or fewer, as its sentence names them."""
    heard = [split(sentence) for sentence in sentences]
    words = sorted(set(itertools.chain(*heard)))
    said = np.array([[word in sentence for word in words] for sentence in heard], float)
    scores = np.stack([evidence(looks[:, k], said) for k in (0, 1)])  # (2, N, W)
    said = (said - said.mean(0)) / (said.std(0) + 1e-6)
    correlation = (scores * said).mean(1).max(0)  # (W,)
    by_chance = 2 / len(said) ** 0.5
    names = [words[w] for w in np.flatnonzero(correlation > 0.3 + by_chance)]
    print(
        "words that name things:",
        ", ".join(names) or "none found, as if all sentences said the same",
    )

    # In the order in which a sentence says them. Where there are two, that may be the wrong order.
    found = [sorted({*names} & {*sentence}, key=sentence.index)[:2] for sentence in heard]
    two = [i for i in range(len(found)) if len(found[i]) == 2]
    by_pictures = np.zeros(len(two))  # how much speaks for this order
    for k, i in enumerate(two):
        first, second = [words.index(name) for name in found[i]]
        closes, opens = scores[:, i]
        by_pictures[k] = closes[first] + opens[second] - closes[second] - opens[first]
    order = by_pictures
    around = [words_around(heard[i], found[i]) for i in two]
    for _ in range(ROUNDS):
        # The words around names tell more, if there are both orders to learn from, and the better
        # these are known the more they tell (self-training, Yarowsky, 1995).
        if FOLDS.n_splits <= (order > 0).sum() <= len(order) - FOLDS.n_splits:
            order = by_pictures + cross_val_predict(
                LogisticRegression(C=FORM),
                DictVectorizer().fit_transform(around),
                order > 0,
                cv=FOLDS,
                method="decision_function",
            )
    for k, i in enumerate(two):
        if order[k] < 0:
            found[i].reverse()
    return [dict(zip(SLOTS, names)) for names in found]


if __name__ == "__main__":
    explain_errors()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="data file, or a folder of them")
    parser.add_argument("out", type=Path, help="data file to make")
    parser.add_argument(
        "--plain", action="store_true", help="look for no names, as a control"
    )
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"{args.out} exists; give another name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part")
    try:
        with h5py.File(part, "w") as file:
            groups, sentences = copy(sorted(args.data.glob("*.h5")) or [args.data], file)
            units = json.loads(file["data"].attrs.get("units", "{}"))
            odd = defaultdict(list)
            for number, group in enumerate(groups):
                for why in oddities(group, int(units.get("fps", CONTROL_HZ))):
                    odd[why].append(number)
            for why, numbers in odd.items():
                some = ", ".join(map(str, numbers[:MOST]))
                print(f"{len(numbers)} of {len(groups)} episodes {why}, such as {some}")
            if units and (count := cut_ways_home(groups)):
                print(
                    f"{count} of {len(groups)} episodes shut the gripper again, on nothing, after "
                    "they put something down; they are cut there"
                )
            found = [{}] * len(groups)
            if not args.plain:
                if len(groups) < FEWEST:
                    raise ValueError(
                        f"{args.data} has {len(groups)} episodes; names are found in {FEWEST} or "
                        "more. --plain looks for none"
                    )
                looks = np.array([look(group) for group in groups])
                found = find_names(sentences, looks)
            for group, sentence, names in zip(groups, sentences, found):
                wording = re.sub("[{}]", "", sentence.lower())
                for slot, word in names.items():
                    wording = re.sub(rf"\b{word}\b", "{%s}" % slot, wording)
                group.attrs.update(
                    instruction=wording, slots=json.dumps(names), sentence=sentence
                )
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
