"""`--split`: divides samples into those for training and those held out.

Equal images and samples with one value of `--group-column` stay on one side: otherwise an
evaluation would reward memory. The same fraction of each class is held out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.packing.in_order import in_order
from unicl_fast.packing.samples import Samples, shuffled_order
from unicl_fast.packing.sources.entries import Entry, EntryError, PackedFile, PackedPixels
from unicl_fast.packing.sources.items import Label
from unicl_fast.system.bar import Bar

SIDES = ("train", "held-out")
"""The folders in OUT."""
KEPT_TOGETHER = "images kept on one side with others, which are equal or of one key"
_READERS = 4
_READ_TOGETHER = 64

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def split_samples(
    samples: Samples,
    numbers: Mapping[Label, int],
    *,
    train_fraction: float,
    seed: int,
    progress: bool,
) -> tuple[Samples, Samples, int]:
    """Divides samples; `numbers` are the classes of their labels.

    A sample's class is its first label's; samples without labels form one more class. A class with
    a single group is for training, and so are samples that cannot be packed.

    Returns samples for training, samples held out, and how many samples share a group; raises
    ValueError if nothing would be held out.
    """
    strata = np.full(len(samples), -1)
    sizes = np.zeros(len(samples), np.int64)
    groups, of_key = _Groups(len(samples)), dict[str, int]()
    for number, (_, item) in enumerate(samples):
        if item.problem is None and item.entry is not None:
            strata[number] = numbers[item.labels[0]] if item.labels else len(numbers)
            sizes[number] = item.entry.num_bytes
            for key in item.groups:
                groups.join(number, of_key.setdefault(key, number))
    is_sound = strata >= 0
    for number, first in _equal_images(samples, sizes, is_sound, progress=progress):
        groups.join(number, first)
    leaders = groups.leaders()
    held_out = _choose(strata, leaders, fraction=1 - train_fraction, seed=seed)
    if not held_out.any():
        raise ValueError(
            f"--split {train_fraction:g} holds none of {len(samples):,} images out: give a smaller "
            "number, or make two builds that select rows by --where"
        )
    num_together = int((np.bincount(leaders)[leaders] > 1).sum())
    train = samples.at(np.flatnonzero(~held_out))
    return train, samples.at(np.flatnonzero(held_out)), num_together


class _Groups:
    """Groups of numbers: a forest in which each points to a smaller one of its group."""

    def __init__(self, count: int) -> None:
        self._parents = array("q", range(count))

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self._leader(one), self._leader(other)))
        self._parents[other] = one

    def _leader(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def leaders(self) -> Indices:
        """The smallest number of each number's group."""
        return np.fromiter(map(self._leader, range(len(self._parents))), np.int64)


def _choose(strata: Indices, leaders: Indices, *, fraction: float, seed: int) -> Mask:
    """Masks the samples to hold out: a fraction of each stratum, whole groups in random order.

    The next stratum makes up for rounding errors.
    """
    count = len(strata)
    sizes = np.bincount(leaders, minlength=count)
    rank = np.argsort(shuffled_order(count, seed=seed))
    groups = np.flatnonzero((leaders == np.arange(count)) & (strata >= 0))
    groups = groups[np.lexsort([rank[groups], strata[groups]])]
    chosen = np.zeros(count, np.bool_)
    owed = 0.0
    for stratum in np.split(groups, np.flatnonzero(np.diff(strata[groups])) + 1):
        left, largest = int(sizes[stratum].sum()), int(sizes[stratum].max(initial=0))
        owed = min(max(owed, -largest), largest) + fraction * left
        for group in stratum.tolist():
            size = int(sizes[group])
            if size < left and size / 2 <= owed:
                chosen[group] = True
                owed -= size
                left -= size
    return chosen[leaders]


def _equal_images(
    samples: Samples, sizes: Indices, is_sound: Mask, *, progress: bool
) -> Iterator[tuple[int, int]]:
    """Yields each sample that repeats an earlier image, and the earlier one; compares bytes."""
    _, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    asked = np.flatnonzero((counts[which.reshape(-1)] > 1) & is_sound)

    def chunks() -> Iterator[tuple[list[int], list[Entry | None]]]:
        for first in range(0, len(asked), _READ_TOGETHER):
            numbers = asked[first : first + _READ_TOGETHER]
            yield numbers.tolist(), [item.entry for _, item in samples.at(numbers)]

    def read(chunk: tuple[list[int], list[Entry | None]]) -> list[tuple[int, int | None]]:
        return list(zip(chunk[0], map(_digest, chunk[1]), strict=True))

    bar = Bar(total=len(asked), desc="comparing", unit=" images", shown=progress)
    numbers, digests = array("q"), array("Q")
    with bar, ThreadPoolExecutor(_READERS, thread_name_prefix="unicl-split") as threads:
        for found in in_order(
            lambda chunk: threads.submit(read, chunk), chunks(), ahead=2 * _READERS
        ):
            bar.update(len(found))
            for number, digest in found:
                if digest is not None:
                    numbers.append(number)
                    digests.append(digest)
    _, firsts, which = np.unique(np.array(digests), return_index=True, return_inverse=True)
    first = firsts[which.reshape(-1)]
    for place in np.flatnonzero(first != np.arange(len(first))).tolist():
        yield numbers[place], numbers[first[place]]


def _digest(entry: Entry | None) -> int | None:
    """XXH3-64 of an image's file or of a packed image; None if it cannot be read."""
    if isinstance(entry, (PackedFile, PackedPixels)):
        return entry.xxh3
    try:
        return None if entry is None else xxhash.xxh3_64_intdigest(entry.read())
    except EntryError:
        return None
