"""Results of evaluations: counts, rates with intervals, tables.

Zero-shot, linear probe and nearest neighbours rank classes in different ways and count alike, so
that one table can hold their numbers.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from unicl_fast.evaluation.choices import Metric
from unicl_fast.system.wording import count_of, markdown_table, visible_text

Rate = Literal["top1", "top5", "mean_per_class"]
RATE_NAMES: dict[Rate, str] = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """Counts of one data set, and rates in 0 to 1 that follow from them."""

    class_names: tuple[str, ...]
    taken_for: tuple[tuple[int, int, int], ...]
    """Class, predicted class, and the number of such samples."""
    num_correct_top5: int
    num_without_label: int
    """Samples without a label, which are left out."""

    @cached_property
    def per_class(self) -> list[tuple[str, int, int]]:
        """Name, samples and correct samples of each class that has samples."""
        samples: Counter[int] = Counter()
        right: Counter[int] = Counter()
        for own, taken, count in self.taken_for:
            samples[own] += count
            right[own] += count * (taken == own)
        return [(self.class_names[own], samples[own], right[own]) for own in sorted(samples)]

    @property
    def num_samples(self) -> int:
        return sum(count for _, count, _ in self.per_class)

    @property
    def num_correct(self) -> int:
        return sum(right for _, _, right in self.per_class)

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
        return self.top1 if metric == "top1" else self.mean_per_class

    def interval(self, name: Rate) -> tuple[float, float]:
        """95 % interval of a rate; for the mean over classes by each class's binomial variance."""
        if name != "mean_per_class":
            right = self.num_correct if name == "top1" else self.num_correct_top5
            return wilson_interval(right, self.num_samples)
        # (right + 1) / (count + 2), or a class with all or none right would seem known exactly
        rates = [((right + 1) / (count + 2), count) for _, count, right in self.per_class]
        variance = sum(rate * (1 - rate) / count for rate, count in rates)
        half = 1.96 * math.sqrt(variance) / len(rates)
        return max(0.0, self.mean_per_class - half), min(1.0, self.mean_per_class + half)

    def to_json(self) -> dict[str, Any]:
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
        lines = [f"{'':16}{'%':>7}   95 % interval"]
        lines += [
            f"{title:16}{percent(getattr(self, name)):>7}   {interval_text(self.interval(name))}"
            for name, title in RATE_NAMES.items()
        ]
        found, named = len(self.per_class), count_of(len(self.class_names), "class")
        if unseen := len(self.class_names) - found:
            named = f"{found:,} of {named}: the other {unseen:,} are no sample's first label"
        lines.append(f"{count_of(self.num_samples, 'sample')}, {named}")
        ordered = sorted(self.per_class, key=lambda one: (one[2] / one[1], -one[1]))
        if found > 1:
            each = [f"{name} {right:,} of {count:,}" for name, count, right in ordered]
            each = each if found <= 6 else [*each[:3], "...", *each[-3:]]
            lines.append(f"worst to best: {visible_text(', '.join(each))}")
        if self.num_without_label:
            lines.append(f"left out, without a label: {count_of(self.num_without_label, 'sample')}")
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
    """Whether images of a class come first when all images are sorted by their scores for it."""

    num_samples: int  # images with a label; each class is ranked among them
    per_class: list[tuple[str, int, float]]
    """Name, images and average precision of each class that has images."""

    @property
    def mean(self) -> float:
        """Mean over classes (mAP), in 0 to 1."""
        return sum(precision for _, _, precision in self.per_class) / len(self.per_class)

    @property
    def chance(self) -> float:
        """Expected mean of images in random order: more than a class's part of them."""
        n = self.num_samples
        first = sum(1 / rank for rank in range(1, n + 1)) / n
        others = [(count - 1) / max(1, n - 1) for _, count, _ in self.per_class]
        return sum(other + (1 - other) * first for other in others) / len(others)

    def to_json(self) -> dict[str, Any]:
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
        return (
            f"mean average precision of {count_of(len(self.per_class), 'class')} over "
            f"{count_of(self.num_samples, 'sample')}: {percent(self.mean)} % "
            f"({percent(self.chance)} by chance)"
        )


def average_precisions(
    scores: Tensor, labels: Sequence[Sequence[int]], class_names: Sequence[str]
) -> PrecisionResult:
    """The average precision of each class, without interpolation, from scores [n k] of images.

    Images without labels are left out; at least one must have one.
    """
    kept = [row for row, own in enumerate(labels) if own]
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
    """Adds up rankings of samples."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = tuple(class_names)
        self._taken_for: Counter[tuple[int, int]] = Counter()
        self._in_five = self._without_label = 0

    def add(self, rankings: Iterable[Sequence[int]], labels: Iterable[Sequence[int]]) -> None:
        """Counts samples by their most likely classes, best first, up to five.

        Any label of a sample is right; it counts for the class of its first label.
        """
        for ranking, given in zip(rankings, labels, strict=True):
            if not given:
                self._without_label += 1
                continue
            self._taken_for[given[0], given[0] if ranking[0] in given else ranking[0]] += 1
            self._in_five += not set(given).isdisjoint(ranking)

    def result(self, *, what: str, num_without_label: int = 0) -> ClassificationResult:
        """The counts as a result; ValueError, which names `what`, if no sample has a label.

        `num_without_label` are the samples that were left out before.
        """
        if not self._taken_for:
            raise ValueError(f"no sample of this data set has a label: {what} needs some")
        return ClassificationResult(
            class_names=self._names,
            taken_for=tuple((*pair, count) for pair, count in sorted(self._taken_for.items())),
            num_correct_top5=self._in_five,
            num_without_label=self._without_label + num_without_label,
        )


def labels_by_column(
    labels: Sequence[Sequence[int]], columns: Mapping[str, Sequence[int]]
) -> dict[str, list[list[int]]]:
    """The labels of each image in each label column; columns without any label are left out.

    If no image has a label, all columns are returned, and `ClassificationCounts` raises. `columns`
    are as in `Manifest.columns`.
    """
    owns = {column: frozenset(numbers) for column, numbers in columns.items()}
    found = {
        column: [[label for label in one if label in own] for one in labels]
        for column, own in owns.items()
    }
    return {column: each for column, each in found.items() if any(each)} or found


def json_by_column(values: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A report's values, or for several label columns a list of them."""
    if list(values) == [""]:
        return values[""]
    return {"columns": [{"column": column} | each for column, each in values.items()]}


def percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def interval_text(interval: tuple[float, float]) -> str:
    return f"{percent(interval[0])} to {percent(interval[1])}"


def classification_table(
    results: Sequence[tuple[str, Metric, ClassificationResult]], *, mean: bool = True
) -> str:
    """One row for each (name, metric of its protocol, result), and the mean of several."""
    rows = []
    for name, metric, result in results:
        row = [name, f"{len(result.per_class):,}", f"{result.num_samples:,}", RATE_NAMES[metric]]
        row += [percent(result.value(metric)), interval_text(result.interval(metric))]
        rows.append(row + [percent(getattr(result, rate)) for rate in RATE_NAMES])
    if mean and len(results) > 1:
        average = sum(result.value(metric) for _, metric, result in results) / len(results)
        rows.append(["mean", "", "", "", percent(average), "", "", "", ""])
    header = ("data set", "classes", "samples", "metric", "%", "95 % interval")
    return markdown_table((*header, *RATE_NAMES.values()), rows)
