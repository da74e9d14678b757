"""Squares of decoded pictures, made by the batch on threads of our own.

What a raw data set needs instead of a decoder: the operator that resamples files' pictures inside
DALI's graph takes windows of pixels here, in front of it. A picture of 32 pixels a side takes 3 us,
less than DALI spends on handling it, so nothing is done for a single picture in Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import Interpolation
from unicl_fast.pipelines.resample import resample_windows
from unicl_fast.shards import PackedDataset

_PART_BYTES = 500_000
"""Of squares that are worth another thread: handing work over takes as long as 30 small pictures.
What is smaller is made side by side."""
_MOST_AT_ONCE = 1024
_BYTES_AT_ONCE = 8_000_000
"""Pictures, and bytes of them before and after, that are read and resampled in one go."""


def are_decoded(datasets: Sequence[PackedDataset]) -> bool:
    """Whether all pictures of all data sets are decoded and of one size."""
    shapes = {dataset.picture_shape for dataset in datasets}
    return len(shapes) == 1 and shapes != {None}


class Squares:
    """The squares of some batches of one size, while they are made."""

    def __init__(self, pictures: NDArray[np.uint8], parts: Sequence[Future[None]]) -> None:
        self._pictures = pictures
        self._parts = parts

    def result(self, begin: int, end: int) -> NDArray[np.uint8]:
        """uint8 [end - begin size size 3], a view, waited for."""
        for part in self._parts:
            part.result()
        return self._pictures[begin:end]


class SquareMaker:
    """Cuts windows out of pictures, resamples and mirrors them; close it at the end."""

    def __init__(self, *, image_size: int, interpolation: Interpolation, threads: int) -> None:
        """As for `graph.build_train_graph`."""
        self._image_size = image_size
        self._cubic = interpolation == "bicubic"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="unicl-resample")

    def batches_at_once(self, batch_size: int, picture_shape: tuple[int, int, int]) -> int:
        """How many batches to make in one go.

        Each thread that takes over waits to be woken and for Python's lock: with batches of 64 such
        pauses took two thirds of the time.
        """
        bytes_of_one = 3 * self._image_size**2 + math.prod(picture_shape)
        return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // bytes_of_one) // batch_size)

    def start(
        self, pictures: NDArray[np.uint8], cuts: Sequence[tuple[NDArray[np.int32], ...]]
    ) -> list[Callable[[], NDArray[np.uint8]]]:
        """Begins with the pictures of some batches.

        Args:
            pictures: uint8 [b h w 3] of all batches, one behind the other; must stay as they are.
            cuts: of each batch, window starts [b 2], window shapes [b 2] and flips [b].

        Returns:
            For each batch what waits for its squares, uint8 [b size size 3].
        """
        size = len(pictures)
        squares = np.empty((size, self._image_size, self._image_size, 3), dtype=np.uint8)
        num_parts = min(self._threads, 1 + squares.nbytes // _PART_BYTES, size)
        edges = [size * part // num_parts for part in range(num_parts + 1)]
        windows = [np.concatenate(column) for column in zip(*cuts, strict=True)]
        parts = [
            self._pool.submit(resample_windows, squares, pictures, *windows, self._cubic, *edge)
            for edge in itertools.pairwise(edges)
        ]
        made = Squares(squares, parts)
        ends = np.cumsum([len(flips) for _, _, flips in cuts]).tolist()
        return [partial(made.result, begin, end) for begin, end in itertools.pairwise([0, *ends])]

    def close(self) -> None:
        """Ends the threads; what has not begun is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)
