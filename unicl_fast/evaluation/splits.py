"""Splits labelled samples into those that fit a probe and those that choose its C."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
_FRACTION = 0.2
_FEWEST_HELD_OUT = 4  # held-out samples of each class, on average, that suffice to choose C


def hold_out(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to fit on and rows held out: one split, the folds of a cross-validation, or nothing.

    A fifth of each class is held out. Fewer than four samples a class on average would choose C at
    random, so then there are folds.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    if _FRACTION * len(labels) < _FEWEST_HELD_OUT * len(np.unique(labels)):
        return split_folds(labels, seed=seed)
    once = StratifiedShuffleSplit(1, test_size=_FRACTION, random_state=seed)
    return _split(once, labels)


def split_folds(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """As many folds as the smallest class has samples, from 2 to 5; none if no class has two."""
    from sklearn.model_selection import StratifiedKFold

    smallest = np.unique(labels, return_counts=True)[1].min()
    folds = max(2, min(5, int(smallest)))
    return _split(StratifiedKFold(folds, shuffle=True, random_state=seed), labels)


def _split(splitter: Any, labels: Rows) -> list[tuple[Rows, Rows]]:
    """Splits that never hold out a class's only sample."""
    several = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(several):
        return []
    splits = splitter.split(several, labels[several])
    held_out = [several[rows] for _, rows in splits]
    return [(np.setdiff1d(np.arange(len(labels)), rows), rows) for rows in held_out]


def draw_shots(labels: Rows, *, shots: int, seed: int) -> tuple[Rows, Rows]:
    """Rows of `shots` samples of each class to fit on, and min(shots, 4) others to choose C by.

    The rule of CoOp (Zhou et al., arXiv 2109.01134): validation is no larger than few-shot learning
    could afford. A class with too few samples fills training first.
    """
    order = np.random.default_rng((seed, shots)).permutation(len(labels))
    classes = [order[labels[order] == label] for label in np.unique(labels)]
    aside = [rows[shots : shots + min(shots, 4)] for rows in classes]
    return np.concatenate([rows[:shots] for rows in classes]), np.concatenate(aside)
