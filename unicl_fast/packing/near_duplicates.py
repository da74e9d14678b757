"""Finds images that look alike: their 64-bit perceptual hashes (pHash) differ little.

Copies in another size, quality or format differ in a few bits, unrelated photographs in about 32.
Not all pairs are compared. The bits are divided into r + 3 blocks: hashes that differ in at most r
bits agree in at least 3 blocks, so for each choice of 3 blocks the hashes are sorted by them, and
only neighbours with equal blocks are compared. (35 sorts for r = 4, 455 for r = 12. With 1 or 2
equal blocks there are fewer sorts, but millions of hashes have too many neighbours; a million and
r = 4 take some seconds with 3, and an hour's decoding before that.)
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.packing.looks import LOOK
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.packed import image_entry
from unicl_fast.packing.workers import ImageOptions, Task, check_in_order
from unicl_fast.system.bar import Bar

MAX_PAIRS = 20_000_000
_BITS = 64
_BITS_OF_OCTET = np.array([number.bit_count() for number in range(1 << 8)], np.uint8)
_EQUAL_BLOCKS = 3
_COMPARED_AT_ONCE = 1 << 14
_SPLIT_DISTANCE = 4
_MOST_OF_ONE_HASH = 16  # such images are compared with each other; drawings can be thousands
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
    results = check_in_order(tasks, options=options, workers=workers)
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
    left, firsts, found = np.arange(2 * count), list[Indices](), list[Indices]()
    while len(left) and len(firsts) < _MOST_OF_ONE_HASH:
        _, first, which = np.unique(hashes[left], return_index=True, return_inverse=True)
        pairs = np.stack([left[first[which.reshape(-1)]], left], axis=1)
        pairs = pairs[pairs[:, 0] != left]
        alike = _are_alike(looks, pairs)
        firsts.append(left[first])
        found.append(pairs[alike])
        left = pairs[~alike, 1]
    heads = np.sort(np.concatenate([left[:0], *firsts]))
    near = heads[near_pairs(hashes[heads], _SPLIT_DISTANCE)]
    pairs = np.concatenate([*found, near[_are_alike(looks, near)]])
    pairs = pairs[(pairs[:, 0] % count != pairs[:, 1] % count) & (pairs.min(axis=1) < count)]
    return pairs % count, (pairs >= count).sum(axis=1) == 1


def _are_alike(looks: npt.NDArray[np.void], pairs: Indices) -> npt.NDArray[np.bool_]:
    """Whether the thumbnails of each pair [n 2] are those of copies, bool [n]."""
    alike, count = np.zeros(len(pairs), np.bool_), len(looks)
    are_mirrored = (pairs >= count).sum(axis=1) == 1
    for start in range(0, len(pairs), _COMPARED_AT_ONCE):
        some = slice(start, start + _COMPARED_AT_ONCE)
        one, other = (looks["thumbnail"][each % count].astype(np.float32) for each in pairs[some].T)
        one[are_mirrored[some]] = one[are_mirrored[some], :, ::-1]
        difference = np.sqrt(np.square(one - other).mean(axis=(1, 2)))
        detail = np.minimum(one.std(axis=(1, 2)), other.std(axis=(1, 2)))
        alike[some] = (difference < _MOST_DIFFERENCE * detail) & (detail >= _LEAST_CONTRAST)
    return alike


def find_leaders(hashes: Hashes, max_distance: int) -> Indices:
    """Finds the earlier image that each image looks like, int64 [n] for uint64 [n].

    An image follows the first earlier one within `max_distance` bits that follows no other, so
    every copy is near its original; an image without such a leader has its own number. Raises as
    `near_pairs`.
    """
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = first[which.reshape(-1)]
    first.sort()
    leaders = np.arange(len(hashes))
    for earlier, later in first[near_pairs(hashes[first], max_distance)].tolist():
        if leaders[later] == later and leaders[earlier] == earlier:
            leaders[later] = earlier
    return leaders[firsts]


def near_pairs(hashes: Hashes, max_distance: int) -> Indices:
    """All pairs within `max_distance` bits, int64 [pairs 2] for uint64 [n].

    The earlier image comes first; sorted by the later, then the earlier one. Raises ValueError for
    more than 20 million pairs.
    """
    num_blocks = max_distance + _EQUAL_BLOCKS
    bounds = [_BITS * block // num_blocks for block in range(num_blocks + 1)]
    masks = [(1 << end) - (1 << start) for start, end in itertools.pairwise(bounds)]
    found: Indices = np.empty(0, np.int64)  # later * n + earlier, each pair once
    for blocks in itertools.combinations(masks, _EQUAL_BLOCKS):
        found = np.union1d(found, _pairs_by_key(hashes, sum(blocks), max_distance))
        if len(found) > MAX_PAIRS:
            raise ValueError(
                f"more than {MAX_PAIRS:,} pairs of images are within {max_distance} bits of each "
                "other: such images have too little detail for perceptual hashes; choose a "
                "smaller distance"
            )
    later, earlier = np.divmod(found, max(1, len(hashes)))
    return np.stack([earlier, later], axis=1)


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
