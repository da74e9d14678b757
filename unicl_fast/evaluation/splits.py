"""The split of labelled samples into those that fit a probe and those that choose its C."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
_FRACTION = 0.2
_FEWEST_HELD_OUT = 4
"""Held-out samples of each class, on average, that are enough to choose C by."""


def hold_out(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to fit on and rows held out: one split, the folds of a cross-validation, or nothing.

    A fifth of each class is held out. Where that is fewer than four samples a class on average,
    C would be chosen at random, so there are folds instead.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    if _FRACTION * len(labels) < _FEWEST_HELD_OUT * len(np.unique(labels)):
        return _split_folds(labels, seed=seed)
    once = StratifiedShuffleSplit(1, test_size=_FRACTION, random_state=seed)
    return _split(once, labels)


def _split_folds(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """As many folds as the smallest class has samples, from 2 to 5; none if no class has two."""
    from sklearn.model_selection import StratifiedKFold

    smallest = np.unique(labels, return_counts=True)[1].min()
    folds = max(2, min(5, int(smallest)))
    return _split(StratifiedKFold(folds, shuffle=True, random_state=seed), labels)


def _split(splitter: Any, labels: Rows) -> list[tuple[Rows, Rows]]:
    """Splits by scikit-learn, which never hold out a class's only sample."""
    several = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(several):
        return []
    splits = splitter.split(several, labels[several])
    held_out = [several[rows] for _, rows in splits]
    return [(np.setdiff1d(np.arange(len(labels)), rows), rows) for rows in held_out]
