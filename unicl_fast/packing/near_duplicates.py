"""Finds images that look alike: their 64-bit perceptual hashes (pHash) differ little.

Copies in another size, quality or format differ in a few bits, unrelated photographs in about 32.
Not all pairs are compared. The bits are divided into r + m blocks: hashes that differ in at most r
bits agree in at least m blocks, so for each choice of m blocks the hashes are sorted by them, and
only neighbours with equal blocks are compared.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.limits import MAX_DISTANCE
from unicl_fast.packing.looks import LOOK
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.packed import image_entry
from unicl_fast.packing.workers import ImageOptions, Task, check_in_order
from unicl_fast.system.bar import Bar

MAX_PAIRS = 20_000_000
_BITS = 64
_BITS_OF_OCTET = np.array([number.bit_count() for number in range(1 << 8)], np.uint8)
_COMPARED_AT_ONCE = 1 << 14
_SPLIT_DISTANCE = 4
_MOST_DIFFERENCE, _LEAST_CONTRAST = 0.1, 2.0
"""Hashes alone would join digits. A copy's thumbnail differs by less than this part of its contrast
(JPEG at quality 20: 0.08 at most, of 3,000 photographs), other images' by more (2,500 digits, 3,000
of CIFAR-10: 0.13); flat images have none. Brighter copies are not found."""

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def look_at_images(
    tasks: Iterable[Task],
    count: int,
    *,
    images: ImageOptions,
    workers: int,
    doing: str,
    progress: bool,
) -> tuple[npt.NDArray[np.void], dict[int, Problem]]:
    """A `LOOK` [count] of each image, checked in processes; problems by number."""
    looks, problems = np.zeros(count, LOOK), dict[int, Problem]()
    options = dataclasses.replace(
        images, short_side=0, square_side=0, format="keep", in_place=False, look=True
    )
    results = check_in_order(tasks, options=options, context_length=0, workers=workers)
    shown = Bar(results, total=count, desc=doing, unit=" images", shown=progress)
    with contextlib.closing(results):
        for number, result in enumerate(shown):
            if isinstance(result, Problem):
                problems[number] = result
            else:
                looks[number] = np.frombuffer(result.data, LOOK)[0]
    return looks, problems


def hash_images(dataset: PackedDataset, *, workers: int, progress: bool) -> Hashes:
    """The hashes of all images, uint64 [n]; a bad image is a ValueError."""
    rows = dataset.samples
    largest = int((rows["height"].astype(np.int64) * rows["width"]).max(initial=1))
    looks, problems = look_at_images(
        (Task(str(index), image_entry(dataset, index)) for index in range(len(dataset))),
        len(dataset),
        images=ImageOptions(max_pixels=largest, seconds=0),
        workers=workers,
        doing="hashing",
        progress=progress,
    )
    for index, problem in problems.items():
        raise ValueError(
            f"{dataset.describe(index)} cannot be read ({problem.message}); unicl-pack verify "
            f"{dataset.folder} lists all damage, --no-near decodes no image"
        )
    hashes: Hashes = looks["hash"]
    return hashes


def find_copies(looks: npt.NDArray[np.void]) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """Pairs of near copies among `LOOK`s [n], int64 [pairs 2], and which of them are mirrored.

    Raises as `near_pairs`.
    """
    count = len(looks)
    # number n + i is the mirror image of i
    hashes = np.concatenate([looks["hash"], looks["mirrored"]])
    distinct, first, index = np.unique(hashes, return_index=True, return_inverse=True)
    equal = np.stack([first[index.reshape(-1)], np.arange(2 * count)], axis=1)
    pairs = np.concatenate([equal, first[near_pairs(distinct, _SPLIT_DISTANCE)]])
    pairs = pairs[(pairs[:, 0] % count != pairs[:, 1] % count) & (pairs.min(axis=1) < count)]
    are_mirrored = (pairs >= count).sum(axis=1) == 1
    pairs %= count
    are_alike = np.zeros(len(pairs), np.bool_)
    for start in range(0, len(pairs), _COMPARED_AT_ONCE):
        some = slice(start, start + _COMPARED_AT_ONCE)
        one, other = (looks["thumbnail"][each].astype(np.float32) for each in pairs[some].T)
        one[are_mirrored[some]] = one[are_mirrored[some], :, ::-1]
        difference = np.sqrt(np.square(one - other).mean(axis=(1, 2)))
        detail = np.minimum(one.std(axis=(1, 2)), other.std(axis=(1, 2)))
        are_alike[some] = (difference < _MOST_DIFFERENCE * detail) & (detail >= _LEAST_CONTRAST)
    return pairs[are_alike], are_mirrored[are_alike]


def find_leaders(hashes: Hashes, max_distance: int) -> Indices:
    """Finds the earlier image that each image looks like, int64 [n] for uint64 [n].

    An image follows the first earlier one within `max_distance` bits (0 to 12) that follows no
    other, so every copy is near its original; an image without such a leader has its own number.
    Raises ValueError if more than 20 million pairs are near each other.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"the distance must lie in 0 to {MAX_DISTANCE} bits, not {max_distance}")
    if not len(hashes):
        return np.empty(0, np.int64)
    distinct, first, index = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # distinct hashes as they first occur
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    leaders = np.arange(len(order))
    for later, earlier in near_pairs(distinct[order], max_distance)[:, ::-1].tolist():
        if leaders[later] == later and leaders[earlier] == earlier:
            leaders[later] = earlier
    result: Indices = first[order][leaders][rank[index.reshape(-1)]].astype(np.int64)
    return result


def near_pairs(hashes: Hashes, max_distance: int) -> Indices:
    """All pairs of distinct hashes, uint64 [n], within `max_distance` bits, as int64 [pairs, 2].

    Each pair has the smaller number first; pairs are sorted by the larger, then the smaller one.
    """
    num_exact = _choose_blocks(len(hashes), max_distance)
    num_blocks = max_distance + num_exact
    bounds = [_BITS * block // num_blocks for block in range(num_blocks + 1)]
    masks = [(1 << end) - (1 << start) for start, end in itertools.pairwise(bounds)]
    found: Indices = np.empty(0, np.int64)  # later * n + earlier, each pair once
    for blocks in itertools.combinations(masks, num_exact):
        found = np.union1d(found, _pairs_by_key(hashes, sum(blocks), max_distance))
        if len(found) > MAX_PAIRS:
            raise ValueError(
                f"more than {MAX_PAIRS:,} pairs of images are within {max_distance} bits of each "
                "other: such images have too little detail for perceptual hashes; choose a "
                "smaller distance"
            )
    later, earlier = np.divmod(found, max(1, len(hashes)))
    return np.stack([earlier, later], axis=1)


def _choose_blocks(count: int, max_distance: int) -> int:
    """How many blocks must agree for the least sorting and comparing."""

    def cost(num_exact: int) -> float:
        num_blocks = max_distance + num_exact
        by_chance = count * count / 2 ** (_BITS * num_exact / num_blocks + 1)
        return math.comb(num_blocks, num_exact) * (20 * count + by_chance)

    return min(range(1, 7), key=cost)


def _pairs_by_key(hashes: Hashes, mask: int, max_distance: int) -> Indices:
    """Near pairs among hashes that agree in the bits of `mask`, as later * n + earlier."""
    keys = hashes & np.uint64(mask)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    keys = keys[order]
    found = [np.empty(0, np.int64)]
    # positions whose neighbour `step` further has the same key; fewer with each step
    rows = np.flatnonzero(keys[1:] == keys[:-1])
    step = 1
    while len(rows):
        one, other = order[rows], order[rows + step]  # stable: `one` is the earlier
        near = count_bits(hashes[one] ^ hashes[other]) <= max_distance
        found.append(other[near] * len(hashes) + one[near])
        if sum(map(len, found)) > MAX_PAIRS:
            break
        step += 1
        rows = rows[rows + step < len(keys)]
        rows = rows[keys[rows] == keys[rows + step]]
    return np.concatenate(found)


def count_bits(values: Hashes) -> npt.NDArray[np.uint8]:
    """How many bits are set in each value; NumPy has `bitwise_count` since 2.0."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 8)
    counts: npt.NDArray[np.uint8] = _BITS_OF_OCTET[octets].sum(axis=-1, dtype=np.uint8)
    return counts
