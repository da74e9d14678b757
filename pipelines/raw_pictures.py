"""Squares of decoded pictures, made by the batch on threads of our own.

What a raw data set needs instead of a decoder: the operator that resamples files' pictures inside
DALI's graph takes windows of pixels here, in front of it. A picture of 32 pixels a side takes 3 us,
less than DALI spends on handling it, so nothing is done for a single picture in Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import Interpolation
from unicl_fast.pipelines.plan import PlannedBatch
from unicl_fast.pipelines.resample import resample_windows
from unicl_fast.shards import PackedDataset

_PART_BYTES = 500_000
"""Of squares that are worth another thread: handing work over takes as long as 10 small pictures.
Batches smaller than that are made side by side."""


def are_decoded(datasets: Sequence[PackedDataset]) -> bool:
    """Whether all pictures of all data sets are decoded and of one size."""
    shapes = {dataset.picture_shape for dataset in datasets}
    return len(shapes) == 1 and shapes != {None}


class Squares:
    """The squares of one batch, while they are made."""

    def __init__(self, pictures: NDArray[np.uint8], parts: Sequence[Future[None]]) -> None:
        self._pictures = pictures
        self._parts = parts

    def result(self) -> NDArray[np.uint8]:
        """uint8 [b size size 3], waited for."""
        for part in self._parts:
            part.result()
        return self._pictures


class SquareMaker:
    """Cuts windows out of pictures, resamples and mirrors them; close it at the end."""

    def __init__(self, *, image_size: int, interpolation: Interpolation, threads: int) -> None:
        """As for `graph.build_train_graph`."""
        self._image_size = image_size
        self._cubic = interpolation == "bicubic"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="unicl-resample")

    def start(self, pictures: NDArray[np.uint8], planned: PlannedBatch) -> Squares:
        """Begins with a batch of pictures uint8 [b h w 3]; they must stay as they are until then.

        Args:
            pictures: uint8 [b h w 3].
            planned: says which windows, and which are mirrored.
        """
        size = len(pictures)
        squares = np.empty((size, self._image_size, self._image_size, 3), dtype=np.uint8)
        num_parts = min(self._threads, 1 + squares.nbytes // _PART_BYTES, size)
        edges = [size * part // num_parts for part in range(num_parts + 1)]
        windows = planned.window_starts, planned.window_shapes, planned.flips
        parts = [
            self._pool.submit(resample_windows, squares, pictures, *windows, self._cubic, *edge)
            for edge in itertools.pairwise(edges)
        ]
        return Squares(squares, parts)

    def close(self) -> None:
        """Ends the threads; what has not begun is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)
