"""Reports of evaluations: counts, rates with intervals, tables, JSON and confusion matrices.

Zero-shot, linear probe, k nearest neighbours and fine-tuning differ in how they rank classes. What
is counted is the same, so that their numbers can stand in one table.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.checkpoints.load import weights_checksum
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.requests import COMMANDS, Evaluation, Metric
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.progress import WaitingForRanks
from unicl_fast.system.wording import count_of, markdown_table, without_secrets
from unicl_fast.training.figures import INK, drawing, new_figure, save_figure

Rate = Literal["top1", "top5", "mean_per_class"]
RATE_NAMES: dict[Rate, str] = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
MAX_CONFUSION_CLASSES = 4096
"""Classes for which a confusion matrix is kept: 128 MiB of counts."""
_MAX_NAMED_CLASSES = 120
"""More names would not be legible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationResult:
    """Counts of one data set, exact over all ranks, and rates in 0 to 1 that follow from them."""

    num_samples: int
    num_correct: int
    num_correct_top5: int
    num_without_label: int
    """Samples of the data set that have no label and were left out."""
    per_class: list[tuple[str, int, int]]
    """Name, samples and correct ones of each class that has samples."""
    confusion: NDArray[np.int64] | None = None
    """[k k] over all class names: samples of a class (row) taken for a class (column)."""

    @property
    def top1(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def top5(self) -> float:
        return self.num_correct_top5 / self.num_samples

    @property
    def mean_per_class(self) -> float:
        return sum(right / count for _, count, right in self.per_class) / len(self.per_class)

    def value(self, metric: Metric) -> float:
        """The number that a protocol reports."""
        return self.top1 if metric == "top1" else self.mean_per_class

    def interval(self, name: Rate) -> tuple[float, float]:
        """95 % interval of a rate.

        That of the mean over classes comes from each class's binomial variance, taken at
        (right + 1) / (count + 2), so that a class of which all or none were right is not thought to
        be known exactly.
        """
        if name != "mean_per_class":
            right = self.num_correct if name == "top1" else self.num_correct_top5
            return wilson_interval(right, self.num_samples)
        rates = [((right + 1) / (count + 2), count) for _, count, right in self.per_class]
        variance = sum(rate * (1 - rate) / count for rate, count in rates)
        half = 1.96 * math.sqrt(variance) / len(rates)
        return max(0.0, self.mean_per_class - half), min(1.0, self.mean_per_class + half)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types; rates in 0 to 1."""
        values: dict[str, Any] = {
            "num_samples": self.num_samples,
            "num_without_label": self.num_without_label,
            "num_classes": len(self.per_class),
        }
        for name in RATE_NAMES:
            values |= {name: getattr(self, name), f"{name}_interval_95": self.interval(name)}
        values["per_class"] = [
            {"class": name, "num_samples": count, "top1": right / count}
            for name, count, right in self.per_class
        ]
        return values

    def to_table(self) -> str:
        """The rates in percent with their 95 % intervals, as text."""
        lines = [f"{'':16}{'%':>7}   95 % interval"]
        lines += [
            f"{title:16}{percent(getattr(self, name)):>7}   {interval_text(self.interval(name))}"
            for name, title in RATE_NAMES.items()
        ]
        lines.append(
            f"{count_of(self.num_samples, 'sample')}, {count_of(len(self.per_class), 'class')}"
        )
        if self.num_without_label:
            num_left_out = count_of(self.num_without_label, "sample")
            lines.append(f"left out for want of a label: {num_left_out}")
        return "\n".join(lines)


def wilson_interval(num_right: int, num_tried: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), for 95 %."""
    z = 1.96
    rate = num_right / num_tried
    centre = rate + z * z / (2 * num_tried)
    half = z * math.sqrt(rate * (1 - rate) / num_tried + z * z / (4 * num_tried**2))
    scale = 1 + z * z / num_tried
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionResult:
    """How well the images of each class come first when all are sorted by their scores for it."""

    num_samples: int
    """Images with a label, among which those of a class are looked for."""
    per_class: list[tuple[str, int, float]]
    """Name, images and average precision of each class that has images."""

    @property
    def mean(self) -> float:
        """The mean over classes (mAP), in 0 to 1."""
        return sum(precision for _, _, precision in self.per_class) / len(self.per_class)

    @property
    def chance(self) -> float:
        """The mean of images in an order of no meaning: more than a class's part of them."""
        n = self.num_samples
        first = sum(1 / rank for rank in range(1, n + 1)) / n
        others = [(count - 1) / max(1, n - 1) for _, count, _ in self.per_class]
        return sum(other + (1 - other) * first for other in others) / len(others)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            "num_samples": self.num_samples,
            "mean": self.mean,
            "chance": self.chance,
            "per_class": [
                {"class": name, "num_samples": count, "average_precision": precision}
                for name, count, precision in self.per_class
            ],
        }

    def to_table(self) -> str:
        """The mean in percent, as text."""
        return (
            f"mean average precision of {count_of(len(self.per_class), 'class')} over "
            f"{count_of(self.num_samples, 'sample')}: {percent(self.mean)} % "
            f"({percent(self.chance)} by chance)"
        )


def average_precisions(
    scores: Tensor, labels: Sequence[Sequence[int]], class_names: Sequence[str]
) -> PrecisionResult:
    """The average precision of each class over images, from their scores [n k].

    It is the mean, over the images of a class, of the precision among all images down to that one,
    without interpolation. Images without labels are left out, since what they show is not known.

    Raises:
        ValueError: no image has a label.
    """
    kept = [row for row, own in enumerate(labels) if own]
    if not kept:
        raise ValueError("no sample of this data set has a label: average precision needs some")
    rows_of: dict[int, list[int]] = {}
    for row, sample in enumerate(kept):
        for label in set(labels[sample]):
            rows_of.setdefault(label, []).append(row)
    scores = scores[torch.tensor(kept)]
    per_class = []
    for label, rows in sorted(rows_of.items()):  # one after another: arrays of all would be large
        ranks = torch.empty(len(kept), dtype=torch.float64)
        order = scores[:, label].argsort(descending=True, stable=True)
        ranks[order] = torch.arange(1, len(kept) + 1, dtype=torch.float64)
        hits = ranks[rows].sort().values
        precisions = torch.arange(1, len(rows) + 1, dtype=torch.float64) / hits
        per_class.append((class_names[label], len(rows), precisions.mean().item()))
    return PrecisionResult(num_samples=len(kept), per_class=per_class)


class ClassificationCounts:
    """Adds up rankings of samples, on one rank or many."""

    def __init__(self, class_names: Sequence[str], *, confusion: bool = False) -> None:
        """Starts with all counts at 0; `confusion` also counts which class is taken for which."""
        k = len(class_names)
        if confusion and k > MAX_CONFUSION_CLASSES:
            raise ValueError(
                f"a confusion matrix of {k:,} classes is too large; one is made of up to "
                f"{MAX_CONFUSION_CLASSES:,}: leave --figures out"
            )
        self._names = tuple(class_names)
        # labelled, right, right in five, without label
        self._totals = torch.zeros(4, dtype=torch.int64)
        self._per_class = torch.zeros(k, 2, dtype=torch.int64)
        self._confusion = torch.zeros(k, k, dtype=torch.int64) if confusion else None

    def add(self, rankings: Iterable[Sequence[int]], labels: Iterable[Sequence[int]]) -> None:
        """Counts samples by their most likely classes, best first, up to five.

        With several labels any of them is right, and the first is the class it counts for. Samples
        without labels are left out and counted.
        """
        for ranking, given in zip(rankings, labels, strict=True):
            if not given:
                self._totals[3] += 1
                continue
            right = ranking[0] in given
            in_five = not set(given).isdisjoint(ranking)
            self._totals += torch.tensor([1, right, in_five, 0])
            self._per_class[given[0]] += torch.tensor([1, right])
            if self._confusion is not None:
                self._confusion[given[0], given[0] if right else ranking[0]] += 1

    def sum_over(self, ranks: Ranks) -> None:
        """Adds the counts of all ranks, on all of them."""
        if ranks.world_size == 1:
            return
        with WaitingForRanks():
            for counts in (self._totals, self._per_class, self._confusion):
                if counts is not None:
                    dist.all_reduce(counts, group=ranks.host_group)

    def result(self, *, what: str) -> ClassificationResult:
        """The counts as a result; without any label it is a ValueError that names `what`."""
        labelled, right, in_five, without = self._totals.tolist()
        if labelled == 0:
            raise ValueError(f"no sample of this data set has a label: {what} needs some")
        return ClassificationResult(
            num_samples=labelled,
            num_correct=right,
            num_correct_top5=in_five,
            num_without_label=without,
            per_class=[
                (name, count, right)
                for name, (count, right) in zip(self._names, self._per_class.tolist(), strict=True)
                if count
            ],
            confusion=None if self._confusion is None else self._confusion.numpy(),
        )


def rank_classes(scores: Tensor) -> list[list[int]]:
    """The five best columns of each row of scores [b k], best first; all if there are fewer."""
    best: list[list[int]] = scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()
    return best


def percent(rate: float) -> str:
    """A rate in percent with two decimals."""
    return f"{100 * rate:.2f}"


def interval_text(interval: tuple[float, float]) -> str:
    """An interval of rates in percent."""
    return f"{percent(interval[0])} to {percent(interval[1])}"


def classification_table(
    results: Sequence[tuple[str, Metric, ClassificationResult]], *, mean: bool = True
) -> str:
    """One row for each (name, metric of its protocol, result), and the mean of several."""
    rows = []
    for name, metric, result in results:
        interval = interval_text(result.interval(metric))
        rows.append(
            [
                *(name, f"{len(result.per_class):,}", f"{result.num_samples:,}"),
                *(RATE_NAMES[metric], percent(result.value(metric)), interval),
                *map(percent, (result.top1, result.top5, result.mean_per_class)),
            ]
        )
    if mean and len(results) > 1:
        average = sum(result.value(metric) for _, metric, result in results) / len(results)
        rows.append(["mean", "", "", "", percent(average), "", "", "", ""])
    header = (
        *("data set", "classes", "samples", "metric", "%", "95 % interval"),
        *("top-1", "top-5", "mean per class"),
    )
    return markdown_table(header, rows)


def write_results(command: Evaluation, values: Mapping[str, Any], table: str) -> dict[str, Any]:
    """Writes the JSON (which it returns) and the Markdown that a command asks for.

    It names the protocol, and the file of weights by its checksum, by which a model card knows
    figures of its own model (`unicl_fast.conversion.card`).
    """
    described = {
        "protocol": next(name for name, kind in COMMANDS.items() if kind is type(command)),
        "checkpoint": str(command.checkpoint),
        "weights": command.weights,
        "weights_xxh3": weights_checksum(command.checkpoint, weights=command.weights),
        **values,
    }
    for path, content in (
        (command.json, without_secrets(json.dumps(described, indent=1))),
        (command.markdown, table.rstrip()),
    ):
        if path is not None:
            make_folder(path.parent)
            path.write_text(content + "\n", encoding="utf-8")
            print(f"written to {path}")
    return described


def most_confused(
    confusion: NDArray[np.int64], class_names: Sequence[str], *, count: int = 15
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: class, taken for, samples, part of the class."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    found = []
    for cell in order.tolist():
        row, column = divmod(cell, len(wrong))
        if number := int(wrong[row, column]):
            part = number / int(confusion[row].sum())
            found.append((class_names[row], class_names[column], number, part))
    return found


def draw_confusion(
    result: ClassificationResult,
    class_names: Sequence[str],
    folder: Path | None,
    name: str,
    *,
    title: str,
) -> None:
    """Draws a confusion matrix and the most frequent mistakes as confusion-NAME.png.

    Rows are classes, columns the classes they were taken for, in parts of the row. Classes without
    samples are left out. Without a folder, as without --figures, nothing is drawn.
    """
    confusion = result.confusion
    if folder is None or confusion is None:
        return
    path = folder / f"confusion-{name}.png"
    with drawing(path):
        _draw_confusion(confusion, class_names, path, title=title)
        print(f"written to {path}")


def _draw_confusion(
    confusion: NDArray[np.int64], class_names: Sequence[str], path: Path, *, title: str
) -> None:
    present = np.flatnonzero(confusion.sum(axis=1) + confusion.sum(axis=0))
    shown = confusion[np.ix_(present, present)]
    names = [_short(class_names[i], 24) for i in present.tolist()]
    parts = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1)
    has_names = len(names) <= _MAX_NAMED_CLASSES
    side = max(4.5, min(0.24 * len(names), 14.0 if has_names else 7.0))
    figure = new_figure(side + 5.5, side + 1.6, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.0))
    image = left.imshow(parts, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    left.set_title(title, loc="left", color=INK)
    left.set_xlabel("taken for")
    left.set_ylabel("class")
    if has_names:
        size = min(7.0, 0.75 * 72 * side / len(names))  # of a row's height, in points
        left.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        left.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) <= 20:
        for row, column in np.argwhere(shown).tolist():
            part = parts[row, column]
            left.text(
                *(column, row, f"{100 * part:.0f}"),
                ha="center", va="center", fontsize=6, color="white" if part > 0.6 else INK,
            )  # fmt: skip
    figure.colorbar(image, ax=left, shrink=0.6, label="part of the class")
    left.set_anchor("N")  # the list beside it begins at the top too
    right.set_axis_off()
    right.set_title("most frequent mistakes", loc="left", color=INK)
    lines = [
        f"{100 * part:5.1f} %  {count:5,}   {_short(own, 22)} -> {_short(taken, 22)}"
        for own, taken, count, part in most_confused(confusion, class_names)
    ]
    right.text(
        *(0, 0.98, "\n".join(lines) or "none"),
        va="top", fontsize=8, family="monospace", color=INK, transform=right.transAxes,
    )  # fmt: skip
    save_figure(figure, path)


def _short(name: str, width: int) -> str:
    return textwrap.shorten(name, width, placeholder="...")
