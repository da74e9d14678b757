"""Squares of decoded images, made by the batch.

What a raw data set needs instead of a decoder: the operator that resamples files' images inside
DALI's graph takes windows of pixels here, in front of it. An image of 32 pixels a side takes 3 us,
less than DALI spends on handling it, so nothing is done for a single image in Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import Interpolation
from unicl_fast.dataset.reader import PackedDataset

from ..kernels.resample import resample_windows

_MOST_AT_ONCE = 2048
_BYTES_AT_ONCE = 32_000_000
"""Images, and bytes of them before and after, that one thread reads and resamples in one go."""


def are_decoded(datasets: Sequence[PackedDataset]) -> bool:
    """Whether all images of all data sets are decoded and of one size."""
    shapes = {dataset.image_shape for dataset in datasets}
    return len(shapes) == 1 and shapes != {None}


class CropResizer:
    """Cuts windows out of images, resamples and mirrors them; close it at the end.

    Small batches are made several at a time, each such group by one thread from its plan to its
    squares, since a thread that takes work over waits to be woken and for Python's lock: with
    batches of 64 such pauses took two thirds of the time. A large batch is shared by all threads;
    two are made at a time, so that one is resampled while the other is read: that is one more in
    memory.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        image_shape: tuple[int, int, int],
        image_size: int,
        interpolation: Interpolation,
        threads: int,
    ) -> None:
        """As for `graph.build_train_graph`; `image_shape` is that of all images."""
        self._image_size = image_size
        self._cubic = interpolation == "bicubic"
        bytes_of_one = 3 * image_size**2 + math.prod(image_shape)
        most = min(_MOST_AT_ONCE, _BYTES_AT_ONCE // bytes_of_one)
        self.batches_at_once = max(1, most // batch_size)
        """How many batches make a group."""
        self.groups_at_once = threads if batch_size <= most else min(2, threads)
        """How many groups may be made at the same time."""
        self._threads = threads if batch_size > most else 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="unicl-resample")

    def make(
        self, images: NDArray[np.uint8], cuts: Sequence[tuple[NDArray[np.int32], ...]]
    ) -> list[NDArray[np.uint8]]:
        """The squares of each batch, uint8 [b size size 3].

        Args:
            images: uint8 [b h w 3] of all batches, one behind the other.
            cuts: of each batch, window starts [b 2], window shapes [b 2] and flips [b].
        """
        size = len(images)
        squares = np.empty((size, self._image_size, self._image_size, 3), dtype=np.uint8)
        windows = [np.concatenate(column) for column in zip(*cuts, strict=True)]
        num_parts = min(self._threads, size)
        edges = itertools.pairwise(size * part // num_parts for part in range(num_parts + 1))
        *others, mine = (
            partial(resample_windows, squares, images, *windows, self._cubic, *edge)
            for edge in edges
        )
        running = [self._pool.submit(other) for other in others]
        mine()
        for part in running:
            part.result()
        return np.split(squares, np.cumsum([len(flips) for _, _, flips in cuts])[:-1])

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
