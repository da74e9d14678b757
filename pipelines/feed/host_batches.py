"""The host's part of each step: plan, texts, images as the graph takes them.

Numbers and texts are made for many steps in one go, since calling NumPy costs more than small
batches do; encoded images are read step by step. Of raw data sets the images are read and cropped
some batches at a time, and what comes out needs no decoder. Two views are a batch of twice the
images, all first views and then all second ones; both are decoded, which an image shared by them
would save only where their windows overlap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.config import Interpolation, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.objectives.targets import TargetSteps, map_steps
from unicl_fast.text.prompts import ClassPrompts

from ..graph import HostBatch, Images, decoding_threads
from ..kernels.jpeg_windows import cut_to_windows
from ..kernels.resample import resample_windows
from ..plan.plan import PlannedBatch, TrainPlan, split_steps, split_windows
from .bad_samples import BadSamples
from .read_ahead import reading_ahead
from .text_block import gather_texts, pack_integers

_PLANNED_AT_ONCE = 4096
"""Samples whose plan and texts are made in one go: a megabyte of memory, a few milliseconds."""
_SCHEDULED_AT_ONCE = 128
"""Samples whose blocks are asked for in one go, where data sets lie under a URL."""
_CROPPED_AT_ONCE = 2048
_CROPPED_BYTES_AT_ONCE = 32_000_000
"""Raw images, and bytes of them and their crops, that one thread reads and crops in one go."""


def steps_at_once(batch_size: int) -> int:
    """Steps that are planned together."""
    return max(1, _PLANNED_AT_ONCE // batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainFacts:
    """Facts of a batch that the host keeps while it is decoded."""

    fed: PlannedBatch
    """The plan, with substitutes for bad samples."""
    scheduled_ids: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A step without its images, as long as nothing is bad."""

    batch: PlannedBatch
    integers: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


class HostBatches:
    """One rank's steps, as they go into the graph."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[PackedDataset],
        prompts: ClassPrompts,
        plan: TrainPlan,
        bad: BadSamples,
        *,
        rank: int,
        world_size: int,
        images: Images,
    ) -> None:
        """As for `loader.TrainLoader`; `images` as for `graph.build_train_graph`."""
        self._config = config
        self._datasets = datasets
        self._prompts = prompts
        self._plan = plan
        self._bad = bad
        self._ranks = {"rank": rank, "world_size": world_size}
        self._images = images
        self._batch_size = config.run.global_batch_size // world_size
        self._steps_of_stretch = max(1, _SCHEDULED_AT_ONCE // self._batch_size)
        self._read_ahead_from: Callable[[int], None] = lambda stretch: None

    @contextlib.contextmanager
    def reading_ahead(self, start_step: int) -> Iterator[None]:
        """Within this context, samples under a URL are fetched before their turn."""
        count = self._steps_of_stretch
        samples = count * self._config.run.global_batch_size
        with reading_ahead(
            self._datasets,
            lambda stretch: self._plan.schedule(stretch * count, count, **self._ranks),
            start=start_step // count,
            stretches=-(-self._config.data.read_ahead // samples),
        ) as self._read_ahead_from:
            yield

    def batches(self, start_step: int) -> Generator[HostBatch[TrainFacts], None, None]:
        """Yields every step from `start_step` on, without end."""
        if self._images == "crops":
            with contextlib.closing(self.crop_resizer()) as resizer:
                for first in itertools.count(start_step, resizer.batches_at_once):
                    yield from self.group(resizer, first)
        else:
            count = steps_at_once(self._batch_size)
            for first in itertools.count(start_step, count):
                yield from map(self._with_images, self._plan_steps(first, count))

    def batch(self, step: int) -> HostBatch[TrainFacts]:
        """Prepares one step whose images are files or pixels."""
        return self._with_images(*self._plan_steps(step, 1))

    def group(self, resizer: CropResizer, first_step: int) -> list[HostBatch[TrainFacts]]:
        """Prepares some steps whose images are cropped and resized here; runs in any thread."""
        planned = self._plan_steps(first_step, resizer.batches_at_once)
        self._say_where(first_step)
        fed, pixels = self._bad.read_pixels(self._plan, [step.batch for step in planned])
        windows = np.concatenate([batch.windows for batch in fed])
        views = [
            np.split(resizer.crop(pixels, windows[:, view]), len(fed))
            for view in range(self._plan.num_views)
        ]
        return [
            self._host_batch(step, batch, crops[0] if len(crops) == 1 else np.concatenate(crops))
            for step, batch, *crops in zip(planned, fed, *views, strict=True)
        ]

    def crop_resizer(self) -> CropResizer:
        """Makes the resizer that `group` takes; the caller closes it."""
        data, shape = self._config.data, self._datasets[0].image_shape
        assert shape is not None
        return CropResizer(
            batch_size=self._batch_size,
            image_shape=shape,
            image_size=data.image_size,
            interpolation=data.interpolation,
            threads=decoding_threads(data.threads),
        )

    def _with_images(self, planned: _Planned) -> HostBatch[TrainFacts]:
        """A step with its images as files or pixels."""
        self._check_arrays()
        self._say_where(planned.batch.step)
        if self._images == "files":
            return self._host_batch(planned, *self._bad.read_batch(self._plan, planned.batch))
        (fed,), pixels = self._bad.read_pixels(self._plan, [planned.batch])
        return self._host_batch(planned, fed, pixels)

    def _say_where(self, step: int) -> None:
        self._read_ahead_from(step // self._steps_of_stretch)

    def _plan_steps(self, first: int, count: int) -> list[_Planned]:
        """Some steps without their images, made in one go."""
        self._check_arrays()
        size = self._batch_size
        long = self._plan.long_batch(first, count, **self._ranks)
        # A rank's own texts are enough: a text with a label is always a prompt, and captions equal
        # to a prompt are found by look-up, so no other rank's labels can change a class here.
        targets = self._targets_of(long)
        steps = split_steps(long, count, global_batch_size=self._plan.global_batch_size)
        context_length = self._config.model.context_length
        integers = pack_integers(targets, steps[0].global_index, context_length=context_length)
        starts = range(0, count * size, size)
        return [
            _Planned(
                batch=batch,
                integers=integers[start : start + size],
                text_lengths=targets.text_lengths[start : start + num_texts],
            )
            for batch, start, num_texts in zip(
                steps, starts, targets.num_texts.tolist(), strict=True
            )
        ]

    def _host_batch(
        self,
        planned: _Planned,
        fed: PlannedBatch,
        images: list[NDArray[np.uint8]] | NDArray[np.uint8],
    ) -> HostBatch[TrainFacts]:
        """Puts together a step; `fed` is its plan with substitutes."""
        integers, text_lengths = planned.integers, planned.text_lengths
        if fed is not planned.batch:  # substitutes come with texts of their own
            targets = self._targets_of(fed)
            context_length = self._config.model.context_length
            integers = pack_integers(targets, fed.global_index, context_length=context_length)
            text_lengths = targets.text_lengths[: targets.num_texts[0]]
        return HostBatch(
            inputs=graph_inputs(fed, images, integers, are_crops=self._images == "crops"),
            facts=TrainFacts(
                fed=fed, scheduled_ids=planned.batch.sample_ids, text_lengths=text_lengths
            ),
        )

    def _targets_of(self, planned: PlannedBatch) -> TargetSteps:
        """The targets of some steps; the objective says what samples' classes are."""
        rows, labels = gather_texts(
            planned,
            self._datasets,
            self._prompts,
            context_length=self._config.model.context_length,
        )
        if self._config.objective.name == "clip":  # a text is its own class
            return map_steps(rows, np.full_like(labels, -1), None, size=self._batch_size)
        return map_steps(rows, labels, self._prompts, size=self._batch_size)

    def _check_arrays(self) -> None:
        for dataset in self._datasets:
            dataset.check_arrays()


def graph_inputs(
    planned: PlannedBatch,
    images: list[NDArray[np.uint8]] | NDArray[np.uint8],
    integers: NDArray[np.int64],
    *,
    are_crops: bool,
) -> tuple[Any, ...]:
    """The inputs of `graph.build_train_graph`: all first views, then all second ones.

    Args:
        planned: the batch.
        images: encoded images, which are cut to what their windows need; or pixels [b h w 3]; or
            the crops of all views, [v*b size size 3].
        integers: see `pack_integers`.
        are_crops: whether `images` are crops.
    """
    num_views, rows = planned.num_views, planned.augment_rows
    inputs: list[Any] = [images]
    if not are_crops:
        starts, shapes, flips = split_windows(planned.windows.transpose(1, 0, 2).reshape(-1, 5))
        if isinstance(images, list):
            inputs[0], starts = cut_to_windows(images * num_views, starts, shapes)
        elif num_views == 2:
            inputs[0] = np.concatenate([images] * 2)
        inputs += [starts, shapes, flips[:, None]]
    if num_views == 2:
        # the second half of the integers is never looked at
        integers = np.concatenate([integers, np.zeros_like(integers)])
    inputs.append(integers)
    if rows.shape[2]:
        inputs.append(np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1, rows.shape[2]))
    return tuple(inputs)


def split_views(images: Tensor, *, num_views: int) -> tuple[Tensor, Tensor | None]:
    """First and second views [b h w c] of the graph's output for `graph_inputs`."""
    if num_views == 1:
        return images, None
    size = len(images) // 2
    return images[:size], images[size:]


def are_decoded(datasets: Sequence[PackedDataset]) -> bool:
    """Whether all images of all data sets are raw and of one size."""
    shapes = {dataset.image_shape for dataset in datasets}
    return len(shapes) == 1 and shapes != {None}


class CropResizer:
    """Crops raw images, resizes and flips the crops; close it at the end.

    This is what raw data sets need instead of a decoder: the kernel that resamples files' images
    inside DALI's graph takes windows of pixels here. An image of 32 pixels a side takes 3 us, less
    than DALI spends on handling it, so nothing is done for a single image in Python.

    Small batches are made several at a time, each such group by one thread from its plan to its
    crops, since a thread that takes work over waits to be woken and for Python's lock: with batches
    of 64 such pauses took two thirds of the time. A large batch is split among all threads; two are
    made at a time, so that one is resampled while the other is read: that is one more in memory.
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
        most = min(_CROPPED_AT_ONCE, _CROPPED_BYTES_AT_ONCE // bytes_of_one)
        self.batches_at_once = max(1, most // batch_size)
        """How many batches make a group."""
        self.groups_at_once = threads if batch_size <= most else min(2, threads)
        """How many groups may be made at the same time."""
        self._threads = threads if batch_size > most else 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="unicl-resample")

    def crop(self, images: NDArray[np.uint8], windows: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Crops [b size size 3] of images uint8 [b h w 3]; `windows` as `PlannedBatch.windows`."""
        size = len(images)
        crops = np.empty((size, self._image_size, self._image_size, 3), dtype=np.uint8)
        starts, shapes, flips = split_windows(windows)
        num_parts = min(self._threads, size)
        edges = itertools.pairwise(size * part // num_parts for part in range(num_parts + 1))
        *others, mine = (
            partial(resample_windows, crops, images, starts, shapes, flips, self._cubic, begin, end)
            for begin, end in edges
        )
        running = [self._pool.submit(other) for other in others]
        mine()
        for part in running:
            part.result()
        return crops

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
