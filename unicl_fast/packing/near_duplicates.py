"""Finds images that look alike: their 64-bit perceptual hashes (ImageHash's pHash) differ little.

Copies in another size, quality or format differ in a few bits, unrelated photographs in about 32.
Not all pairs are compared. The bits are divided into r + m blocks: hashes that differ in at most r
bits agree in at least m blocks, so for each choice of m blocks the hashes are sorted by them, and
only neighbours with equal blocks are compared.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.packing.in_order import in_order
from unicl_fast.system.bar import Bar
from unicl_fast.system.machine import usable_cores

MAX_DISTANCE = 12  # beyond this, unrelated images are near each other, and the search is slow
MAX_PAIRS = 20_000_000
_BITS = 64
_BITS_OF_OCTET = np.array([number.bit_count() for number in range(1 << 8)], np.uint8)
_CHUNK = 64
_CHUNKS_AHEAD = 64
_DRAFT = 128
"""JPEGs are decoded at the smallest eighth of their size with this many pixels a side, four times
as many as the hash uses."""

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def has_imagehash() -> bool:
    return importlib.util.find_spec("imagehash") is not None


def hash_images(folder: Path, count: int, *, workers: int, progress: bool) -> Hashes:
    """The hashes of samples 0 to `count` - 1, uint64 [count]; a bad image is a ValueError."""
    parts = [np.empty(0, np.uint64)]
    with (
        ProcessPoolExecutor(
            workers or usable_cores(),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open,
            initargs=(folder,),
        ) as processes,
        Bar(total=count, desc="hashing", unit=" images", shown=progress) as bar,
    ):
        try:
            for part in in_order(
                lambda start: processes.submit(_hash, start, min(start + _CHUNK, count)),
                range(0, count, _CHUNK),
                ahead=_CHUNKS_AHEAD,
            ):
                parts.append(part)
                bar.update(len(part))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that decodes images died, possibly out of memory or in a crash of the "
                f"decoder: unicl-pack verify {folder} finds such an image, --no-near decodes none"
            ) from error
    return np.concatenate(parts)


_dataset: PackedDataset | None = None  # of a worker process


def _open(folder: Path) -> None:
    global _dataset
    _dataset = PackedDataset(folder, verify=False)  # the main process has verified it


def _hash(start: int, end: int) -> Hashes:
    assert _dataset is not None
    hashes = np.empty(end - start, np.uint64)
    for index in range(start, end):
        try:
            hashes[index - start] = perceptual_hash(_dataset.image_bytes(index, verify=True).data)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{_dataset.describe(index)} has more pixels than are decoded to find near copies: "
                "--no-near decodes none"
            ) from error
        except (DamagedSampleError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{_dataset.describe(index)} cannot be read ({error}); unicl-pack verify "
                f"{_dataset.folder} lists all damage"
            ) from error
    return hashes


def perceptual_hash(data: bytes | memoryview) -> int:
    """The 64-bit pHash of a packed image, which is 8-bit and opaque."""
    import imagehash  # an optional package

    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (_DRAFT, _DRAFT))
        return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


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
