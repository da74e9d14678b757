"""Counts of right and wrong classifications, and what follows from them.

Zero-shot, linear probe, k nearest neighbours and fine-tuning differ in how they rank classes; what
is counted is the same, so that their numbers can stand in one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from tqdm import tqdm

from unicl_fast.batch import EvaluationLoader
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, heartbeat_and_check_stop

Metric = Literal["top1", "mean_per_class"]

MOST_CONFUSED_CLASSES = 4096
"""Classes for which a confusion matrix is kept: 128 MiB of counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationResult:
    """Counts of one pass, exact over all ranks, and what follows from them. Rates in 0 to 1."""

    num_samples: int
    num_correct: int
    num_correct_top5: int
    num_without_label: int
    """Samples of the data set that have no label and were left out."""
    per_class: list[tuple[str, int, int]]
    """Name, samples and correct ones of each class that has samples."""
    confusion: npt.NDArray[np.int64] | None = None
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

    @property
    def mean_per_class_interval(self) -> tuple[float, float]:
        """95 % interval of the mean over classes, from each class's binomial variance.

        The variance is taken at (right + 1) / (count + 2), so that a class of which all or none
        were right is not thought to be known exactly.
        """
        rates = [((right + 1) / (count + 2), count) for _, count, right in self.per_class]
        variance = sum(rate * (1 - rate) / count for rate, count in rates)
        half = 1.96 * math.sqrt(variance) / len(rates)
        return max(0.0, self.mean_per_class - half), min(1.0, self.mean_per_class + half)

    def value(self, metric: Metric) -> float:
        """The number that a protocol reports."""
        return self.top1 if metric == "top1" else self.mean_per_class

    @property
    def top1_interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_correct, self.num_samples)

    @property
    def top5_interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_correct_top5, self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types; rates in 0 to 1."""
        return {
            "num_samples": self.num_samples,
            "num_without_label": self.num_without_label,
            "num_classes": len(self.per_class),
            "top1": self.top1,
            "top1_interval_95": self.top1_interval,
            "top5": self.top5,
            "top5_interval_95": self.top5_interval,
            "mean_per_class": self.mean_per_class,
            "mean_per_class_interval_95": self.mean_per_class_interval,
            "per_class": [
                {"class": name, "num_samples": count, "top1": right / count}
                for name, count, right in self.per_class
            ],
        }

    def to_table(self) -> str:
        """The rates in percent with their 95 % intervals, as text."""
        rows = [
            ("top-1", self.top1, self.top1_interval),
            ("top-5", self.top5, self.top5_interval),
            ("mean per class", self.mean_per_class, self.mean_per_class_interval),
        ]
        lines = [f"{'':16}{'%':>7}   95 % interval"]
        lines += [
            f"{name:16}{100 * rate:7.2f}   {100 * low:.2f} to {100 * high:.2f}"
            for name, rate, (low, high) in rows
        ]
        lines.append(f"{self.num_samples} samples, {len(self.per_class)} classes")
        if self.num_without_label:
            lines.append(f"{self.num_without_label} samples without a label were left out")
        return "\n".join(lines)


def wilson_interval(num_right: int, num_tried: int, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); z = 1.96 for 95 %."""
    rate = num_right / num_tried
    centre = rate + z * z / (2 * num_tried)
    half = z * math.sqrt(rate * (1 - rate) / num_tried + z * z / (4 * num_tried**2))
    scale = 1 + z * z / num_tried
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class ClassificationCounts:
    """Adds up rankings of samples, on one rank or many."""

    def __init__(self, class_names: Sequence[str], *, confusion: bool = False) -> None:
        """Starts from nothing.

        Args:
            class_names: k names.
            confusion: also count which class is taken for which.

        Raises:
            ValueError: too many classes for a confusion matrix.
        """
        if confusion and len(class_names) > MOST_CONFUSED_CLASSES:
            raise ValueError(
                f"a confusion matrix of {len(class_names):,} classes is too large; one is made of "
                f"up to {MOST_CONFUSED_CLASSES:,}: leave --figures out"
            )
        self._names = tuple(class_names)
        # labelled, right, right in five, without label
        self._totals = torch.zeros(4, dtype=torch.int64)
        self._per_class = torch.zeros(len(class_names), 2, dtype=torch.int64)
        k = len(class_names)
        self._confusion = torch.zeros(k, k, dtype=torch.int64) if confusion else None

    def add(self, rankings: Iterable[Sequence[int]], labels: Iterable[Sequence[int]]) -> None:
        """Counts samples.

        Args:
            rankings: of each sample the most likely classes, best first, up to five.
            labels: of each sample. With several, any of them is right and the first is the class
                it counts for. Samples without labels are left out and counted.
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
        """What was counted.

        Args:
            what: needs labels, for the message.

        Raises:
            ValueError: no sample has a label.
        """
        if self._totals[0] == 0:
            raise ValueError(f"no sample of this data set has a label: {what} needs some")
        return ClassificationResult(
            num_samples=int(self._totals[0]),
            num_correct=int(self._totals[1]),
            num_correct_top5=int(self._totals[2]),
            num_without_label=int(self._totals[3]),
            per_class=[
                (name, int(count), int(right))
                for name, (count, right) in zip(self._names, self._per_class.tolist(), strict=True)
                if count
            ],
            confusion=None if self._confusion is None else self._confusion.numpy(),
        )


def rank_classes(scores: torch.Tensor) -> list[list[int]]:
    """The five best columns of each row of scores [b k], best first; all if there are fewer."""
    best: list[list[int]] = scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()
    return best


@torch.no_grad()
def classify(
    loader: EvaluationLoader,
    scores_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    labels_of: Callable[[int], Sequence[int]],
    class_names: Sequence[str],
    what: str,
    ranks: Ranks | None = None,
    num_batches: int | None = None,
    confusion: bool = False,
) -> ClassificationResult:
    """Classifies what the loader yields, on one rank or many.

    Args:
        loader: over all ranks, each sample once.
        scores_of: scores [b k] of images, uint8 [b h w c].
        labels_of: labels of a sample of the data set; see `ClassificationCounts.add`.
        class_names: k names.
        what: is evaluated, for messages.
        ranks: whose counts are added up.
        num_batches: for the progress bar; None shows none.
        confusion: also count which class is taken for which.

    Raises:
        ValueError: no sample has a label.
        EvaluationStopped: it was asked to leave off, on all ranks.
    """
    ranks = ranks or Ranks()
    counts = ClassificationCounts(class_names, confusion=confusion)
    stopped = False
    for batch in tqdm(loader, desc="classify", total=num_batches, disable=num_batches is None):
        if not heartbeat_and_check_stop():
            stopped = True
            break
        counts.add(
            rank_classes(scores_of(batch.images)),
            ([int(label) for label in labels_of(sample)] for sample in batch.sample_ids.tolist()),
        )
    if any(gather_integers(int(stopped), ranks)):
        raise EvaluationStopped
    counts.sum_over(ranks)
    return counts.result(what=what)
