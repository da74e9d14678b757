"""The classes above each training class, as arrays, joined over data sets.

Apart from `hierarchies`, which manifests need and which does without NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unicl_fast.text.hierarchies import Hierarchy

Int64Array = npt.NDArray[np.int64]


def flat_chains(hierarchy: Hierarchy) -> tuple[Int64Array, Int64Array]:
    """Its chains, one after another: where each begins and the last one ends, and all classes."""
    chains = hierarchy.chains()
    starts = np.cumsum([0, *map(len, chains)], dtype=np.int64)
    return starts, np.array([one for chain in chains for one in chain], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class AncestorTable:
    """The classes above each training class, over all data sets."""

    classes: Int64Array
    """int64 [m]: the classes that have a place in a hierarchy, rising."""
    starts: Int64Array
    """int64 [m + 1]: class i has chains[starts[i]:starts[i + 1]]."""
    chains: Int64Array
    """int64: classes from the top down to the class itself."""

    @property
    def depths(self) -> Int64Array:
        """int64 [m]: the number of classes above each class."""
        return np.diff(self.starts) - 1

    def at_depths(self, width: int) -> Int64Array:
        """int64 [m width]: the ancestor of each class (or itself) at each depth, else -1."""
        table = np.full((len(self.classes), width), -1, dtype=np.int64)
        lengths = np.diff(self.starts)
        for depth in range(width):
            has = lengths > depth
            table[has, depth] = self.chains[self.starts[:-1][has] + depth]
        return table


def join_hierarchies(
    hierarchies: Sequence[Hierarchy | None], class_ids: Sequence[Int64Array]
) -> tuple[AncestorTable, int]:
    """One forest of training classes.

    `class_ids` has the training class of each class of each data set. A training class that is
    several of these (data sets that share it, equal names) keeps the parent that the first of them
    has.

    Returns:
        The table, and the number of classes that others place elsewhere.
    """
    parents: dict[int, int] = {}
    elsewhere: set[int] = set()
    for hierarchy, ids in zip(hierarchies, class_ids, strict=True):
        for child, number in enumerate(() if hierarchy is None else hierarchy.parents):
            own, parent = int(ids[child]), int(ids[number]) if number >= 0 else -1
            if own not in parents and not _is_above(own, parent, parents):
                parents[own] = parent
            elif parents.get(own, own) != parent:
                elsewhere.add(own)
                parents.setdefault(own, -1)
    classes = sorted(parents)
    numbers = {class_id: number for number, class_id in enumerate(classes)}
    forest = Hierarchy(
        names=(), parents=tuple(numbers.get(parents[class_id], -1) for class_id in classes)
    )
    starts, chains = flat_chains(forest)
    own_ids = np.array(classes, dtype=np.int64)
    return AncestorTable(classes=own_ids, starts=starts, chains=own_ids[chains]), len(elsewhere)


def _is_above(class_id: int, other: int, parents: Mapping[int, int]) -> bool:
    """Whether a class is another one or above it."""
    while other >= 0 and other != class_id:
        other = parents.get(other, -1)
    return other == class_id
