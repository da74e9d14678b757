"""The samples of all sources as one sequence: chosen, filtered, joined, and in another order.

No list of ten million samples is ever made: each step of a build keeps numbers, 8 bytes a sample,
and a sample is made when it is asked for. A sample is the name of its source, and its item. What is
left out on the way stays in the sequence with a problem, so that it is listed by name and counted
by kind, as damaged images are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from unicl_fast.packing.limited_processes import in_order
from unicl_fast.packing.quarantine import DUPLICATE, duplicate_message
from unicl_fast.packing.sources.entries import Entry, EntryError
from unicl_fast.packing.sources.items import MAX_TEXTS, Item, Problem, Source
from unicl_fast.packing.sources.spool import READ_ITEMS, ItemStore

_AHEAD = 64
"""Files under way for each thread that looks for duplicates."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

Sample = tuple[str, Item]


class Samples:
    """Samples that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[Sequence[int]], list[Sample]]) -> None:
        """`make` is given numbers, and makes the samples of all of them."""
        self._count = count
        self.make = make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Sample:
        return self.make([number])[0]

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, self._count, READ_ITEMS):
            yield from self.make(range(first, min(first + READ_ITEMS, self._count)))


def all_samples(sources: Sequence[Source]) -> Samples:
    """The samples of all sources, in the order of the sources."""
    starts = [0, *accumulate(len(source.items) for source in sources)]

    def make(numbers: Sequence[int]) -> list[Sample]:
        which = [bisect_right(starts, number) - 1 for number in numbers]
        wanted: dict[int, list[int]] = {each: [] for each in which}
        for each, number in zip(which, numbers, strict=True):
            wanted[each].append(number - starts[each])
        items = {each: iter(_items_of(sources[each], wanted[each])) for each in wanted}
        found = [(sources[each].name, next(items[each])) for each in which]
        return [(item.source or name, item) for name, item in found]

    return Samples(starts[-1], make)


def _items_of(source: Source, numbers: Sequence[int]) -> list[Item]:
    assert isinstance(source.items, ItemStore), "which all readers make"
    return source.items.at(numbers)


def reorder(samples: Samples, numbers: npt.NDArray[np.int64]) -> Samples:
    """Samples by their numbers in another sequence, in any order."""
    return Samples(len(numbers), lambda some: samples.make(numbers[some].tolist()))


def choose(samples: Samples, wanted: Callable[[Sample], bool]) -> Samples:
    """The samples that are wanted, in their order."""
    numbers = (number for number, sample in enumerate(samples) if wanted(sample))
    return reorder(samples, np.fromiter(numbers, np.int64))


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, in the same order for the same seed, anywhere.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the numbers are sorted by raw 64-bit numbers. `system.keyed_random` would do as well,
    and would change the order of every data set that is packed again.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def join_duplicates(
    samples: Samples, changed: ItemStore, *, max_file_bytes: int, workers: int, progress: bool
) -> Samples:
    """Makes one sample of files that are equal byte for byte, with the texts of all.

    The first of them gets the captions and labels of the others that it has not yet; the others get
    a problem. What cannot be read stays as it is: packing will say why. Files of different sizes
    are different, so only those that share their size with another are read. Images that merely
    look alike are found by `near_duplicates`.

    `changed` is an empty store for the items that change, `workers` the number of threads that
    read. Some 50 bytes a sample are in memory.
    """
    candidates = _equal_in_size(samples)
    digests = np.zeros((len(candidates), 2), np.uint64)
    is_read = np.zeros(len(candidates), np.bool_)
    entries = (item.entry for _, item in reorder(samples, candidates))
    read = tqdm(
        _digests(entries, max_file_bytes=max_file_bytes, workers=workers),
        total=len(candidates),
        desc="looking for duplicates",
        unit=" images",
        disable=not progress,
        smoothing=0.1,
    )
    for number, digest in enumerate(read):
        if digest is not None:
            digests[number] = np.frombuffer(digest, np.uint64)
            is_read[number] = True
    rows = np.full(len(samples), -1, np.int64)  # of changed items in their store
    for group in _equal_rows(digests[is_read]):
        numbers = candidates[is_read][group].tolist()
        for number, item in _joined(samples, numbers):
            rows[number] = changed.append(item)

    def make(numbers: Sequence[int]) -> list[Sample]:
        return [
            (source, item if rows[number] < 0 else changed[int(rows[number])])
            for number, (source, item) in zip(numbers, samples.make(numbers), strict=True)
        ]

    return Samples(len(samples), make)


def _equal_in_size(samples: Samples) -> npt.NDArray[np.int64]:
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

    with ThreadPoolExecutor(workers, thread_name_prefix="unicl-digest") as threads:
        # not all at once: results would pile up, and an interruption would wait for them
        yield from in_order(
            lambda entry: threads.submit(digest, entry), entries, ahead=workers * _AHEAD
        )


def _equal_rows(rows: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Groups of two or more equal rows [N 2], as rising numbers."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable, so numbers rise within a group
    ends = np.flatnonzero(np.any(np.diff(rows[order], axis=0) != 0, axis=1)) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    for first in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield order[bounds[first] : bounds[first + 1]]


def _joined(samples: Samples, group: list[int]) -> Iterator[tuple[int, Item]]:
    """Numbers and new items of the samples of one image, which are joined into the first."""
    source, first = samples[group[0]]
    captions, labels = dict.fromkeys(first.captions), dict.fromkeys(first.labels)
    for number in group[1:]:
        _, item = samples[number]
        new_captions = dict.fromkeys(text for text in item.captions if text not in captions)
        new_labels = dict.fromkeys(label for label in item.labels if label not in labels)
        counts = len(captions) + len(new_captions), len(labels) + len(new_labels)
        if max(counts) > MAX_TEXTS:
            # A placeholder, which may stand for any number of images. Those whose texts one sample
            # cannot hold stay samples of their own.
            continue
        captions |= new_captions
        labels |= new_labels
        item.problem = Problem(DUPLICATE, duplicate_message(source, first.name))
        yield number, item
    first.captions, first.labels = list(captions), list(labels)
    yield group[0], first


def filter_captions(samples: Samples, *, fewest: int, most: int) -> tuple[Samples, int]:
    """Drops captions of fewer or more words; a sample that has no other text gets a problem.

    Args:
        samples: of any kind.
        fewest: words of the shortest caption that is kept.
        most: words of the longest one; 0 sets no limit.

    Returns:
        The samples, and how many captions were dropped.
    """

    def fits(caption: str) -> bool:
        count = sum(1 for _ in _WORD.finditer(caption))
        return count >= fewest and (not most or count <= most)

    def make(numbers: Sequence[int]) -> list[Sample]:
        made = samples.make(numbers)
        for _, item in made:
            if item.problem is None and item.captions:
                before, item.captions = item.captions, list(filter(fits, item.captions))
                if not item.captions and not item.labels:
                    limits = f"{fewest} to {most}" if most else f"{fewest} or more"
                    message = f"no caption has {limits} words: {before[0][:100]!r}"
                    item.problem = Problem("caption length", message)
        return made

    def num_captions(some: Samples) -> int:
        return sum(len(item.captions) for _, item in some)

    filtered = Samples(len(samples), make)
    return filtered, num_captions(samples) - num_captions(filtered)
