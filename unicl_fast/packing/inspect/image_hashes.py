"""Perceptual hashes of the images of a packed data set, in worker processes.

The hash is ImageHash's pHash: the image in grey at 32 x 32, the signs of its 64 lowest
frequencies against their median. Copies in another size, quality or format differ in a few bits,
unrelated photographs in about 32. What near ones are is decided in `near_duplicates`.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from unicl_fast.dataset.errors import DamagedSampleError
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.machine import usable_cores

_CHUNK = 64
_DRAFT = 128
"""A JPEG is decoded at the smallest eighth of its size that still has so many pixels a side: four
times what the hash looks at."""

_dataset: PackedDataset | None = None
"""In a worker process: what it reads from."""


def has_imagehash() -> bool:
    """Whether ImageHash is installed."""
    return importlib.util.find_spec("imagehash") is not None


def require_imagehash() -> None:
    """Says what to install, before anything is read.

    Raises:
        ValueError: ImageHash is not installed.
    """
    if not has_imagehash():
        raise ValueError(
            "near duplicates are found with the package ImageHash: pip install "
            "'unicl_fast[inspect]', or leave them out by --no-near"
        )


def hash_images(
    folder: Path, count: int, *, workers: int, progress: bool
) -> npt.NDArray[np.uint64]:
    """The hashes of samples 0 to `count` - 1.

    Returns:
        uint64 [count].

    Raises:
        ValueError: an image cannot be read; says which.
    """
    hashes = np.zeros(count, np.uint64)
    context = multiprocessing.get_context("spawn")
    starts = iter(range(0, count, _CHUNK))
    with (
        ProcessPoolExecutor(
            workers or usable_cores(),
            mp_context=context,
            initializer=_open,
            initargs=(folder,),
        ) as processes,
        tqdm(total=count, desc="hashing", unit=" images", disable=not progress) as bar,
    ):
        try:
            for start, part in _in_turn(processes, starts, count=count):
                hashes[start : start + len(part)] = part
                bar.update(len(part))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that decodes images ended before its time, for want of memory or by a "
                f"crash of the decoder: unicl-pack verify {folder} finds such an image, --no-near "
                "does without decoding"
            ) from error
    return hashes


def _in_turn(
    processes: ProcessPoolExecutor, starts: Iterator[int], *, count: int
) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Results in order, with few chunks under way."""
    under_way: list[tuple[int, Future[npt.NDArray[np.uint64]]]] = []
    for start in starts:
        under_way.append((start, processes.submit(_hash, start, min(start + _CHUNK, count))))
        if len(under_way) > 64:
            first, future = under_way.pop(0)
            yield first, future.result()
    for first, future in under_way:
        yield first, future.result()


def _open(folder: Path) -> None:
    global _dataset
    _dataset = PackedDataset(folder, verify=False)  # the main process has verified it


def _hash(start: int, end: int) -> npt.NDArray[np.uint64]:
    assert _dataset is not None
    hashes = np.empty(end - start, np.uint64)
    for index in range(start, end):
        try:
            hashes[index - start] = perceptual_hash(_dataset.image_bytes(index, verify=True).data)
        except (DamagedSampleError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{_dataset.describe(index)} cannot be read ({error}); see what else is damaged by "
                f"unicl-pack verify {_dataset.folder}"
            ) from error
    return hashes


def perceptual_hash(data: bytes | memoryview) -> int:
    """The 64-bit pHash of an encoded image."""
    import imagehash  # an optional package

    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (_DRAFT, _DRAFT))
        bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
