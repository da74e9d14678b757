"""Draws by weight: how often each sample comes in an epoch, exactly and without random numbers.

An epoch of N samples has N draws with any weights. Sample i's share is N w_i / sum(w) draws,
rounded down or up (systematic sampling): the shares lie one after another on a line of length N,
and row k of the epoch is the sample at k + u, with u in [0, 1) the epoch's. From epoch to epoch u
advances by the golden ratio, which spreads its values so evenly that a sample's draws stay within a
few of its share of all epochs so far. It costs 8 bytes of memory a sample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Weights = NDArray[np.float32]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio


def are_equal(weights: Sequence[Weights | None]) -> bool:
    """Whether all samples of some data sets have one weight; without weights it is 1."""
    ends = {float(end(one)) for one in weights if one is not None for end in (np.min, np.max)}
    return len(ends | {1.0 for one in weights if one is None}) <= 1


class WeightedDraws:
    """The draws of a data set's samples by weight."""

    def __init__(self, weights: Weights, *, seed: int, source: int) -> None:
        """`weights` [N] are positive; seed and number of the data set decide the first u."""
        self.weights = weights
        ends = np.cumsum(weights, dtype=np.float64)
        self._ends = ends * (len(ends) / ends[-1])
        self._ends[-1] = np.inf  # rounding must leave no draw beyond the last sample
        self._first = xxhash.xxh3_64_intdigest(f"{seed} {source}".encode())

    def samples_of(self, rows: Int64Array, epoch: int) -> Int64Array:
        """The sample of each row of an epoch, both in [0, N)."""
        part = ((self._first + epoch * _GOLDEN) % (1 << 64)) >> 11
        found: NDArray[Any] = np.searchsorted(self._ends, rows + part * 2.0**-53, side="right")
        return found

    def counts(self, epoch: int) -> Int64Array:
        """How often an epoch draws each sample, [N]; N in all."""
        rows = np.arange(len(self._ends))
        return np.bincount(self.samples_of(rows, epoch), minlength=len(rows))
