"""Crops that are made without DALI: of small JPEGs, and of images that are stored decoded.

An image of 32 pixels a side takes 3 us here, less than DALI spends on handling it, so a batch is
one call.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.dataset.arrays import CHANNELS
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.images.codec import JPEG_BEGINS, decode_files
from unicl_fast.system.machine import usable_cores

from .host_batches import HostBatch, augment_inputs, mean_image_bytes
from .kernels.resample import resample_windows
from .plan.plan import PlannedBatch, split_windows
from .read.samples import SampleReader
from .steps import RankSteps, TrainMetadata

_Result = TypeVar("_Result")
_Decoded = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]
"""Memory with decoded images uint8 [n], the first byte of each int64 [b], and its width."""

_SMALL_IMAGE_BYTES = 70_000
"""JPEGs of at most these mean bytes when decoded (about 150 x 150 pixels) are decoded whole, one
call each: what DALI does around its decoder costs more than what lies outside the windows. One of
32 pixels takes 15 instead of 23 us of a core, of 60 x 80 40 instead of 56, of 128 x 170 117 instead
of 147. Threads hand Python's lock to each other between these calls: with 2 to 16 threads on two
cores that cost less than it saved. PNGs go to DALI, because Pillow needs twice its time."""
_SAMPLES_LOOKED_AT = 4
_CROPPED_AT_ONCE = 2048
_CROPPED_BYTES_AT_ONCE = 32_000_000
"""Decoded images, and bytes of them and their crops, that one thread reads and crops together."""
_GROUP_BYTES = 8_000_000
"""The same bytes over several batches; with 32 MB a loader was no faster and held 90 MB more."""


def are_small_jpegs(datasets: Sequence[PackedDataset], data: DataConfig) -> bool:
    """Whether images are small, and the first ones of each data set are JPEGs.

    The first ones are typical, as for `mean_image_bytes`.
    """
    try:
        return mean_image_bytes(datasets, data) <= _SMALL_IMAGE_BYTES and all(
            dataset.is_decoded or dataset.image_bytes(sample)[:2].tobytes() == JPEG_BEGINS
            for dataset in datasets
            for sample in range(min(_SAMPLES_LOOKED_AT, len(dataset)))
        )
    except DamagedSampleError:
        return False


class CropBatches:
    """One rank's steps with their crops."""

    def __init__(
        self, steps: RankSteps, reader: SampleReader, data: DataConfig, *, reading: ReadingTime
    ) -> None:
        """`reading` counts the waits for storage."""
        self._steps, self._reader, self._data, self.reading = steps, reader, data, reading
        self._datasets = steps.datasets
        self._is_decoded = all(dataset.is_decoded for dataset in self._datasets)

    def batches(self, start_step: int) -> Generator[HostBatch[TrainMetadata], None, None]:
        """Yields every step from `start_step` on, without end; made in the calling thread."""
        with contextlib.closing(self.resizer()) as resizer:
            for first in itertools.count(start_step, resizer.batches_at_once):
                yield from self.group(resizer, first)

    def batches_in_threads(
        self, start_step: int, *, ahead: int
    ) -> Generator[tuple[Tensor, TrainMetadata], None, None]:
        """Yields crops uint8 [b h w c] and metadata of every step from `start_step` on.

        One thread makes each group of steps.

        `ahead` is the number of groups that are made before they are requested, besides those that
        are made at the same time.
        """
        ready: collections.deque[Future[list[HostBatch[TrainMetadata]]]] = collections.deque()
        with (
            contextlib.closing(self.resizer()) as resizer,
            ThreadPoolExecutor(resizer.groups_at_once, thread_name_prefix="unicl-feed") as pool,
        ):
            self.reading.num_threads = resizer.groups_at_once
            starts = itertools.count(start_step, resizer.batches_at_once)
            try:
                for start in itertools.islice(starts, ahead + resizer.groups_at_once - 1):
                    ready.append(pool.submit(self.group, resizer, start))
                while True:
                    group = ready.popleft().result()
                    ready.append(pool.submit(self.group, resizer, next(starts)))
                    for batch in group:
                        yield torch.from_numpy(*batch.inputs), batch.metadata
            finally:
                for future in ready:
                    future.cancel()

    def resizer(self) -> CropResizer:
        """Makes the resizer that `group` takes; the caller closes it."""
        size = round(mean_image_bytes(self._datasets, self._data))
        return CropResizer(self._data, batch_size=self._steps.batch_size, image_bytes=size)

    def group(self, resizer: CropResizer, first_step: int) -> list[HostBatch[TrainMetadata]]:
        """Prepares some steps from plan to crops; from any thread."""
        planned = self._steps.take_planned(first_step, resizer.batches_at_once)
        self._steps.begin(first_step)
        actual, images = self._decoded([step.batch for step in planned], resizer)
        crops = resizer.crop(*images, np.concatenate([batch.windows for batch in actual]))
        parts = np.split(crops, len(actual))
        return [
            HostBatch(
                inputs=(own, *augment_inputs(batch)), metadata=self._steps.metadata_of(step, batch)
            )
            for step, batch, own in zip(planned, actual, parts, strict=True)
        ]

    def _decoded(
        self, batches: Sequence[PlannedBatch], resizer: CropResizer
    ) -> tuple[list[PlannedBatch], _Decoded]:
        """Some batches, with substitutes, and their decoded images."""
        while True:
            with self.reading.measuring():
                actual, images = self._reader.read_files(batches)
            shapes = np.empty((len(images), 2), np.int64)
            source_ids = np.concatenate([batch.source_ids for batch in actual])
            sample_ids = np.concatenate([batch.sample_ids for batch in actual])
            for number, dataset in enumerate(self._datasets):
                mine = np.flatnonzero(source_ids == number)
                rows = dataset.samples.take(sample_ids[mine])
                shapes[mine, 0], shapes[mine, 1] = rows["height"], rows["width"]
            sizes, widths = CHANNELS * shapes.prod(axis=1), shapes[:, 1].copy()
            if self._is_decoded:  # a header comes before the pixels
                return actual, (images.content, images.starts + images.sizes - sizes, widths)
            pixels = np.empty(int(sizes.sum()), np.uint8)
            parts = resizer.in_parts(partial(decode_files, pixels, images, shapes), len(images))
            faults = [fault for part in parts for fault in part.items()]
            if not faults:
                return actual, (pixels, np.cumsum(sizes) - sizes, widths)
            self._steps.bad.mark_undecodable(
                (int(source_ids[row]), int(sample_ids[row]), fault) for row, fault in faults
            )


class CropResizer:
    """Crops decoded images, resizes and flips the crops; close it at the end.

    Small batches are made several at a time, each such group by one thread from its plan to its
    crops: handing work to another thread costs a wakeup and Python's lock, which with batches of 64
    took two thirds of the time. A large batch is split among all threads; two are made at a time,
    so that one is resampled while the other is read, at the price of one more in memory.
    """

    def __init__(self, data: DataConfig, *, batch_size: int, image_bytes: int) -> None:
        """`data` and `batch_size` are as for `graph.build_train_graph`; `image_bytes` is a mean."""
        self._image_size = data.image_size
        self._cubic = data.interpolation == "bicubic"
        threads = data.threads or usable_cores()
        bytes_of_one = 3 * data.image_size**2 + image_bytes
        most = min(_CROPPED_AT_ONCE, _CROPPED_BYTES_AT_ONCE // bytes_of_one)
        self.batches_at_once = max(1, min(most, _GROUP_BYTES // bytes_of_one) // batch_size)
        """How many batches make a group."""
        self.groups_at_once = threads if batch_size <= most else min(2, threads)
        """How many groups may be made at the same time."""
        self._threads = threads if batch_size > most else 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="unicl-resample")

    def crop(
        self,
        content: NDArray[np.uint8],
        firsts: NDArray[np.int64],
        widths: NDArray[np.int64],
        windows: NDArray[np.int32],
    ) -> NDArray[np.uint8]:
        """Crops [b size size 3] of images as `resample_windows` takes them.

        `windows` [b 5] are as in `PlannedBatch.windows`.
        """
        crops = np.empty((len(firsts), self._image_size, self._image_size, 3), dtype=np.uint8)
        starts, shapes, flips = split_windows(windows)
        images = crops, content, firsts, widths, starts, shapes, flips, self._cubic
        self.in_parts(partial(resample_windows, *images), len(firsts))
        return crops

    def in_parts(self, work: Callable[[int, int], _Result], count: int) -> list[_Result]:
        """Calls `work(begin, end)` for each part of `count` images, one part a thread."""
        parts = min(self._threads, count)
        edges = itertools.pairwise(count * part // parts for part in range(parts + 1))
        mine, *rest = (partial(work, begin, end) for begin, end in edges)
        running = [self._pool.submit(part) for part in rest]
        return [mine(), *(future.result() for future in running)]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
