"""The samples of all sources as one sequence: in another order, some of them, or joined.

No list of ten million samples is ever made: each step of a build keeps numbers, 8 bytes a sample,
and a sample is made when it is asked for. A sample is the name of its source, and its item.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from typing import overload

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from unicl_fast.packing.quarantine import DUPLICATE, duplicate_message
from unicl_fast.packing.sources.entries import Entry, EntryError
from unicl_fast.packing.sources.item_store import ItemStore
from unicl_fast.packing.sources.items import MAX_TEXTS, Item, Problem, Source

_AHEAD = 64
"""Files under way for each thread that looks for duplicates."""

Sample = tuple[str, Item]


class _Samples(Sequence[Sample]):
    """A sequence that makes its elements."""

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


class AllSamples(_Samples):
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


class ChosenSamples(_Samples):
    """Samples by their numbers in another sequence, in any order."""

    def __init__(self, samples: Sequence[Sample], numbers: npt.NDArray[np.int64]) -> None:
        self._samples = samples
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _make(self, number: int) -> Sample:
        return self._samples[int(self._numbers[number])]


class ChangedSamples(_Samples):
    """Another sequence in which some items have become others."""

    def __init__(self, samples: Sequence[Sample], changed: ItemStore) -> None:
        """`changed` is the store of the new items."""
        self._samples = samples
        self._changed = changed
        self._rows = np.full(len(samples), -1, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def change(self, number: int, item: Item) -> None:
        """Replaces the item of a sample."""
        self._rows[number] = self._changed.append(item)

    def _make(self, number: int) -> Sample:
        source, item = self._samples[number]
        row = int(self._rows[number])
        return source, item if row < 0 else self._changed[row]


def choose(samples: Sequence[Sample], wanted: Callable[[Sample], bool]) -> ChosenSamples:
    """The samples that are wanted, in their order."""
    numbers = np.fromiter(
        (number for number, sample in enumerate(samples) if wanted(sample)), np.int64
    )
    return ChosenSamples(samples, numbers)


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, in the same order for the same seed, anywhere.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the numbers are sorted by raw 64-bit numbers. `system.keyed_random` would do as well,
    and would change the order of every data set that is packed again.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def join_duplicates(
    samples: Sequence[Sample],
    changed: ItemStore,
    *,
    max_file_bytes: int,
    workers: int,
    progress: bool,
) -> Sequence[Sample]:
    """Makes one sample of files that are equal byte for byte, with the texts of all.

    The first of them gets the captions and labels of the others that it has not yet; the others get
    a problem. What cannot be read is left alone: packing will say why. Files of different sizes
    are different, so only those that share their size with another are read. Images that merely
    look alike are found by `near_duplicates`.

    Args:
        samples: in the order in which sources were named.
        changed: an empty store, for the items that change.
        max_file_bytes: larger files are not read.
        workers: threads that read.
        progress: show a progress bar.

    Returns:
        The samples, with these changes. In memory are some 50 bytes for each.
    """
    joined = ChangedSamples(samples, changed)
    candidates = _equal_in_size(samples)
    digests = np.zeros((len(candidates), 2), np.uint64)
    is_read = np.zeros(len(candidates), np.bool_)
    entries = (item.entry for _, item in ChosenSamples(samples, candidates))
    for row, digest in enumerate(
        tqdm(
            _digests(entries, max_file_bytes=max_file_bytes, workers=workers),
            total=len(candidates),
            desc="looking for duplicates",
            unit=" images",
            disable=not progress,
            smoothing=0.1,
        )
    ):
        if digest is not None:
            digests[row] = np.frombuffer(digest, np.uint64)
            is_read[row] = True
    for group in _equal_rows(digests[is_read]):
        _join(samples, candidates[is_read][group], joined)
    return joined


def _equal_in_size(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The numbers of samples whose files share their size with another's."""
    sizes = np.full(len(samples), -1, np.int64)
    is_sound = np.zeros(len(samples), np.bool_)
    for number, (_, item) in enumerate(samples):
        if item.entry is not None:
            sizes[number] = item.entry.num_bytes
            is_sound[number] = item.problem is None
    _, kinds, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(is_sound & (counts[kinds] > 1))


def _digests(
    entries: Iterable[Entry | None], *, max_file_bytes: int, workers: int
) -> Iterator[bytes | None]:
    """XXH3-128 of each, in order; None for what cannot be read."""

    def digest(entry: Entry | None) -> bytes | None:
        if entry is None:
            return None
        try:
            return bytes(xxhash.xxh3_128_digest(entry.read(max_bytes=max_file_bytes)))
        except EntryError:
            return None

    waiting = iter(entries)
    with ThreadPoolExecutor(workers, thread_name_prefix="unicl-digest") as threads:
        # not all at once: results would pile up, and an interruption would wait for them
        while chunk := list(islice(waiting, workers * _AHEAD)):
            yield from threads.map(digest, chunk)


def _equal_rows(rows: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Groups of two or more equal rows [N 2], as rising numbers."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable, so numbers rise within a group
    ends = np.flatnonzero(np.any(np.diff(rows[order], axis=0) != 0, axis=1)) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    for first in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield order[bounds[first] : bounds[first + 1]]


def _join(samples: Sequence[Sample], group: npt.NDArray[np.int64], joined: ChangedSamples) -> None:
    """Joins the samples of one image into the first of them.

    A placeholder may have as many texts as one sample can have, so what is known stays a dict.
    """
    first_source, first = samples[int(group[0])]
    captions, labels = dict.fromkeys(first.captions), dict.fromkeys(first.labels)
    for number in group[1:].tolist():
        _, item = samples[number]
        more_captions = dict.fromkeys(text for text in item.captions if text not in captions)
        more_labels = dict.fromkeys(label for label in item.labels if label not in labels)
        counts = len(captions) + len(more_captions), len(labels) + len(more_labels)
        if max(counts) > MAX_TEXTS:  # it stays a sample of its own, so no text is lost
            continue
        captions |= more_captions
        labels |= more_labels
        message = duplicate_message(first_source, first.name)
        item.problem = Problem(kind=DUPLICATE, message=message)
        joined.change(number, item)
    first.captions, first.labels = list(captions), list(labels)
    joined.change(int(group[0]), first)
