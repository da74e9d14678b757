"""The samples of all sources as one sequence, some of them, or in another order.

Views, so that no list of ten million samples is ever made: each step of a build keeps numbers, 8
bytes a sample, and a sample is made when it is asked for. A sample is the name of its source, and
its item.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
import numpy.typing as npt

from unicl_fast.packing.sources.items import Item, Source
from unicl_fast.packing.sources.spool import ItemStore

Sample = tuple[str, Item]


class _View(Sequence[Sample]):
    """A sequence that makes its elements; what it is made of is up to its kind."""

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self._make(each) for each in range(*number.indices(len(self)))]
        return self._make(number)

    def __iter__(self) -> Iterator[Sample]:
        return (self._make(number) for number in range(len(self)))

    def _make(self, number: int) -> Sample:
        raise NotImplementedError


class AllSamples(_View):
    """The samples of all sources, in the order of the sources."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._starts = [0, *accumulate(len(source.items) for source in sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _make(self, number: int) -> Sample:
        which = bisect_right(self._starts, number) - 1
        source = self._sources[which]
        return source.name, source.items[number - self._starts[which]]


class ChosenSamples(_View):
    """Samples by their numbers in another view, in any order."""

    def __init__(self, samples: Sequence[Sample], numbers: npt.NDArray[np.int64]) -> None:
        self._samples = samples
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _make(self, number: int) -> Sample:
        return self._samples[int(self._numbers[number])]


class ChangedSamples(_View):
    """Another view in which some items have become others."""

    def __init__(self, samples: Sequence[Sample], changed: ItemStore) -> None:
        """`changed` is where the new items are put."""
        self._samples = samples
        self._changed = changed
        self._places = np.full(len(samples), -1, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def change(self, number: int, item: Item) -> None:
        """Puts another item in the place of a sample's."""
        self._places[number] = self._changed.append(item)

    def _make(self, number: int) -> Sample:
        source, item = self._samples[number]
        place = int(self._places[number])
        return source, item if place < 0 else self._changed[place]


def choose(samples: Sequence[Sample], wanted: Callable[[Sample], bool]) -> ChosenSamples:
    """The samples that are wanted, in their order."""
    numbers = np.fromiter(
        (number for number, sample in enumerate(samples) if wanted(sample)), np.int64
    )
    return ChosenSamples(samples, numbers)
