"""The order in which samples are packed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, in the same order for the same seed, anywhere.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the numbers are sorted by raw 64-bit numbers.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
