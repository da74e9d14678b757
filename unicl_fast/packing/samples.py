"""The samples of all sources as one sequence, filtered and reordered.

A build keeps 8 bytes a sample, its number; the sample is made when it is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.spool import READ_ITEMS, Source

Sample = tuple[str, Item]
"""The name of a sample's source, and its item."""


class Samples:
    """Samples of some sources, in the order of `numbers`."""

    def __init__(
        self, sources: Sequence[Source], numbers: npt.NDArray[np.int64] | None = None
    ) -> None:
        """`numbers` count through all sources, in their order; None selects all samples."""
        self._sources = sources
        self._starts = [0, *accumulate(len(source.items) for source in sources)]
        self._numbers = np.arange(self._starts[-1]) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, len(self), READ_ITEMS):
            yield from self._make(self._numbers[first : first + READ_ITEMS].tolist())

    def at(self, positions: npt.NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order."""
        return Samples(self._sources, self._numbers[positions])

    def checksum(self) -> str:
        """XXH3-128 of which samples these are."""
        return xxhash.xxh3_128_hexdigest(self._numbers.tobytes())

    def _make(self, numbers: list[int]) -> list[Sample]:
        """Makes some samples, with one read for each source."""
        which = [bisect_right(self._starts, number) - 1 for number in numbers]
        wanted: dict[int, list[int]] = {each: [] for each in which}
        for each, number in zip(which, numbers, strict=True):
            wanted[each].append(number - self._starts[each])
        items = {each: iter(self._sources[each].items.at(some)) for each, some in wanted.items()}
        found = [(self._sources[each].name, next(items[each])) for each in which]
        return [(item.source or name, item) for name, item in found]


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, int64 [count]; a seed gives the same order everywhere."""
    # NumPy keeps the raw stream of a bit generator stable (NEP 19), `permutation` not
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
