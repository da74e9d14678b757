"""Zero-shot classification at the levels of a hierarchy, and how far its mistakes are off.

A level is a depth of the hierarchy, from 0 at the top. A mistake's distance is the number of levels
from the deeper of the two classes up to the lowest one that both are under: for equally deep
classes, the height of the lowest common ancestor of Bertinetto et al. (arXiv 1912.09393).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unicl_fast.evaluation.report import interval_text, percent, wilson_interval
from unicl_fast.system.wording import markdown_table
from unicl_fast.text.hierarchies import Hierarchy

_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    depth: int
    num_classes: int
    num_samples: int  # images with a label of this level or below
    num_right: int  # images classified right among the level's classes
    num_right_below: int
    """Images whose prediction among the data's own classes is, or lies under, a right class."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LevelsResult:
    """The levels from the top down, and the distances of mistakes among the data's own classes."""

    levels: Sequence[Level]
    num_samples: int
    num_mistakes: int
    sum_of_distances: int

    def to_json(self) -> dict[str, Any]:
        """Rates are in 0 to 1, distances in levels."""
        levels = []
        for one in self.levels:
            counts = {"top1": one.num_right, "top1_by_data_classes": one.num_right_below}
            rates = {name: count / one.num_samples for name, count in counts.items()}
            levels.append(dataclasses.asdict(one) | rates)
        return {
            "levels": levels,
            "num_mistakes": self.num_mistakes,
            "distance_of_mistakes": self.sum_of_distances / max(1, self.num_mistakes),
            "distance": self.sum_of_distances / self.num_samples,
        }

    def to_table(self) -> str:
        rows = []
        for level in self.levels:
            row = [str(level.depth), f"{level.num_classes:,}", f"{level.num_samples:,}"]
            for right in (level.num_right, level.num_right_below):
                row.append(percent(right / level.num_samples))
                row.append(interval_text(wilson_interval(right, level.num_samples)))
            rows.append(row)
        header = [
            *("level", "classes", "samples", "top-1 by its names", "95 % interval"),
            *("top-1 by the data's classes", "95 % interval"),
        ]
        values = self.to_json()
        return (
            f"{markdown_table(header, rows)}\n\n"
            f"levels up to a class in common: {values['distance_of_mistakes']:.3f} for "
            f"{self.num_mistakes:,} mistakes, {values['distance']:.3f} over all"
        )


def classify_at_levels(
    features: Float[Tensor, "n d"],
    classifier_of: Callable[[Sequence[str]], Float[Tensor, "k d"]],
    *,
    labels: Sequence[Sequence[int]],
    numbers: Sequence[int],
    class_names: Sequence[str],
    hierarchy: Hierarchy,
) -> LevelsResult:
    """Classifies images among the classes of each level, and among the data's own `numbers`.

    Any class above a label is right, and the nearest label gives the distance. Images without a
    label are left out; at least one must have one.

    Args:
        features: of unit norm.
        classifier_of: returns a unit-norm row for each class name.
        labels: of each image, all among `numbers`.
        numbers: the classes of a label column, or all.
        class_names: the data's own classes.
        hierarchy: these and the classes above them.
    """
    kept = [row for row, own in enumerate(labels) if own]
    features, labels = features[torch.tensor(kept)], [labels[row] for row in kept]
    chains = hierarchy.chains()
    names = (*class_names, *hierarchy.names)
    best = _best(features, classifier_of([names[number] for number in numbers]))
    predicted = [numbers[place] for place in best]
    within = sorted(set().union(*(chains[number] for number in numbers)))
    levels = []
    for depth in range(max(len(chains[number]) for number in within)):
        candidates = [number for number in within if len(chains[number]) == depth + 1]
        right = [
            {chains[label][depth] for label in own if len(chains[label]) > depth} for own in labels
        ]
        best = _best(features, classifier_of([names[number] for number in candidates]))
        found = zip(right, best, predicted, strict=True)
        counts = [
            (candidates[at_level] in own, bool(own.intersection(chains[below])))
            for own, at_level, below in found
            if own
        ]
        if counts:
            level = Level(
                depth=depth, num_classes=len(candidates), num_samples=len(counts),
                num_right=sum(at_level for at_level, _ in counts),
                num_right_below=sum(below for _, below in counts),
            )  # fmt: skip
            levels.append(level)
    distances = [
        min(_distance(chains[label], chains[one]) for label in own)
        for own, one in zip(labels, predicted, strict=True)
    ]
    return LevelsResult(
        levels=levels, num_samples=len(labels),
        num_mistakes=sum(map(bool, distances)), sum_of_distances=sum(distances),
    )  # fmt: skip


def _best(features: Float[Tensor, "n d"], classifier: Float[Tensor, "k d"]) -> list[int]:
    """The most similar row for each image."""
    rows = classifier.to(features).T
    parts = [(part @ rows).argmax(dim=1) for part in features.split(_ROWS_AT_ONCE)]
    best: list[int] = torch.cat(parts).tolist()
    return best


def _distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levels from the deeper of two chains' ends up to the lowest class in common."""
    in_common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return max(len(one), len(other)) - len(list(in_common))
