"""The split of labelled samples into those that fit a probe and those that choose its C.

Splits are drawn for each class by keyed random numbers, which do not depend on NumPy's version.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.system.keyed_random import fold_key, uniform_tensor

Rows = NDArray[np.int64]
_SPLIT, _SHOTS, _FOLDS = 1, 2, 3
"""Purposes of random numbers, so that those of one seed differ."""
_FRACTION = 0.2
_FEWEST_HELD_OUT = 4
"""Held-out samples of each class, on average, that are enough to choose C by."""


def hold_out(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to fit on and rows held out: one split, the folds of a cross-validation, or nothing.

    A fifth of each class is held out. Where that is fewer than four samples a class on average,
    C would be chosen at random, so there are folds instead.
    """
    kept, aside = split_validation(labels, seed=seed)
    if len(aside) >= _FEWEST_HELD_OUT * len(np.unique(labels)):
        return [(kept, aside)]
    return split_folds(labels, seed=seed)


def split_validation(labels: Rows, *, seed: int) -> tuple[Rows, Rows]:
    """Rows of training and of validation samples, rising.

    A class gives a fifth of its samples, rounded, but keeps one at least for training.
    """
    parts = [
        rows[: min(round(_FRACTION * len(rows)), len(rows) - 1)]
        for rows in _shuffled_classes(labels, fold_key(seed, _SPLIT))
    ]
    validation = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def split_folds(labels: Rows, *, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows to fit on and rows held out, for each fold of a cross-validation.

    There are as many folds as the smallest class has samples, from 2 to 5, and each holds out its
    part of every class. A class's only sample is never held out; without a class of two there are
    no folds.
    """
    classes = _shuffled_classes(labels, fold_key(seed, _FOLDS))
    count = max(2, min(5, min(map(len, classes))))
    several = [rows for rows in classes if len(rows) > 1]
    held_out = [np.sort(np.concatenate([rows[fold::count] for rows in several]))
                for fold in range(count) if several]  # fmt: skip
    return [(np.setdiff1d(np.arange(len(labels)), rows), rows) for rows in held_out]


def draw_shots(labels: Rows, *, shots: int, seed: int) -> tuple[Rows, Rows]:
    """Rows of `shots` samples of each class to fit on, and min(shots, 4) others to choose C by.

    The rule of CoOp (Zhou et al., arXiv 2109.01134): validation is no larger than few-shot learning
    could afford. A class with too few samples gives all it has, to training first.
    """
    classes = _shuffled_classes(labels, fold_key(seed, _SHOTS, shots))
    aside = [rows[shots : shots + min(shots, 4)] for rows in classes]
    return np.concatenate([rows[:shots] for rows in classes]), np.concatenate(aside)


def _shuffled_classes(labels: Rows, key: int) -> list[Rows]:
    """The rows of each class, in an order that a key decides, with any version of NumPy."""
    order = uniform_tensor(key, torch.arange(len(labels))).argsort(stable=True).numpy()
    return [order[labels[order] == label] for label in np.unique(labels)]
