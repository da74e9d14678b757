"""The host's part of each step: plan, texts, images as the graph takes them.

Numbers and texts are made for many steps in one go, since calling NumPy costs more than small
batches do; encoded images are read step by step. Of raw data sets the images are read and cropped
some batches at a time, and what comes out needs no decoder. Two views are a batch of twice the
images, all first views and then all second ones; both are decoded, which an image shared by them
would save only where their windows overlap.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.feature_files import FeatureFile
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.objectives.targets import TargetSteps
from unicl_fast.system.machine import usable_cores
from unicl_fast.text.prompts import ClassPrompts

from ..kernels.jpeg_windows import cut_to_windows
from ..kernels.resample import resample_windows
from ..plan.plan import PlannedBatch, TrainPlan, split_steps, split_windows
from .reading import READ_AHEAD, BadSamples, reading_ahead
from .text_block import gather_labels, gather_texts, pack_integers

Metadata = TypeVar("Metadata")
ImageForm = Literal["files", "pixels", "crops", "features"]
"""The form of a graph's images: encoded files, raw images, or crops that were made of those.
Features of a frozen encoder, in place of images, go through no graph."""

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


def decoding_threads(threads: int) -> int:
    """Decoding threads of this rank: as given, or (0) one for each core that it may use."""
    return threads or usable_cores()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch(Generic[Metadata]):
    """The inputs of one run of a graph, and metadata that is kept beside them.

    DALI cannot carry numbers that the host must know without reading the device, or names for
    messages. Graphs give their batches in the order in which they took them, so metadata is queued.
    """

    inputs: tuple[Any, ...]
    metadata: Metadata


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetadata:
    """Metadata of a training batch."""

    actual: PlannedBatch
    """The plan, with substitutes for bad samples: what the batch holds."""
    scheduled_ids: NDArray[np.int64]
    text_lengths: NDArray[np.int64]
    image_classes: NDArray[np.int64] | None
    """As in `Batch`. Their number differs from batch to batch: no block of DALI's can hold them."""


class _Planned(NamedTuple):
    """A step without its images, as long as nothing is bad."""

    batch: PlannedBatch
    integers: NDArray[np.int64]
    text_lengths: NDArray[np.int64]
    image_classes: NDArray[np.int64] | None


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
        form: ImageForm,
    ) -> None:
        """As for `loader.TrainLoader`; `form` as for `graph.build_train_graph`."""
        self._config = config
        self._datasets = datasets
        self._prompts = prompts
        self._plan = plan
        self._bad = bad
        self._ranks = {"rank": rank, "world_size": world_size}
        self._form = form
        self._batch_size = config.run.global_batch_size // world_size
        self._classes_of_labels = [
            prompts.classes_of(number, np.arange(num_classes))
            for number, num_classes in enumerate(prompts.num_classes)
        ]
        self._steps_of_chunk = max(1, _SCHEDULED_AT_ONCE // self._batch_size)
        self._read_ahead_from: Callable[[int], None] = lambda step: None
        self.reading = ReadingTime(decodes_files=form == "files")
        """How long reading waited for storage."""

    def feed_features(self, features: Sequence[FeatureFile]) -> None:
        """Feeds stored features in place of images from now on, those of each data set."""
        self._form, self._bad.features = "features", features

    @contextlib.contextmanager
    def reading_ahead(self, start_step: int) -> Iterator[None]:
        """Within this context, samples under a URL are fetched before their turn."""
        if self._form == "features":
            yield
            return
        count = self._steps_of_chunk
        samples = count * self._config.run.global_batch_size
        with reading_ahead(
            self._datasets,
            lambda chunk: self._plan.schedule(start_step + chunk * count, count, **self._ranks),
            num_chunks=-(-READ_AHEAD // samples),
        ) as follow:
            self._read_ahead_from = lambda step: follow((step - start_step) // count)
            yield

    def batches(self, start_step: int) -> Generator[HostBatch[TrainMetadata], None, None]:
        """Yields every step from `start_step` on, without end."""
        if self._form == "crops":
            with contextlib.closing(self.crop_resizer()) as resizer:
                for first in itertools.count(start_step, resizer.batches_at_once):
                    yield from self.group(resizer, first)
        else:
            count = steps_at_once(self._batch_size)
            for first in itertools.count(start_step, count):
                yield from map(self._with_images, self.plan_steps(first, count))

    def batch(self, step: int) -> HostBatch[TrainMetadata]:
        """Prepares one step whose images are files or pixels."""
        return self._with_images(*self.plan_steps(step, 1))

    def batches_without_graph(
        self, start_step: int, *, ahead: int
    ) -> Generator[HostBatch[TrainMetadata], None, None]:
        """Yields every step from `start_step` on, its crops being made in threads.

        `ahead` is the number of groups that are made before they are asked for, beside those that
        are made at the same time.
        """
        ready: collections.deque[Future[list[HostBatch[TrainMetadata]]]] = collections.deque()
        with (
            contextlib.closing(self.crop_resizer()) as resizer,
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
                    yield from group
            finally:
                for future in ready:
                    future.cancel()

    def group(self, resizer: CropResizer, first_step: int) -> list[HostBatch[TrainMetadata]]:
        """Prepares some steps whose images are cropped and resized here; runs in any thread."""
        planned = self.plan_steps(first_step, resizer.batches_at_once)
        self._read_ahead_from(first_step)
        with self.reading.measuring():
            actual, pixels = self._bad.read_pixels([step.batch for step in planned])
        windows = np.concatenate([batch.windows for batch in actual])
        views = [
            np.split(resizer.crop(pixels, windows[:, view]), len(actual))
            for view in range(self._plan.num_views)
        ]
        return [
            self._host_batch(step, batch, crops[0] if len(crops) == 1 else np.concatenate(crops))
            for step, batch, *crops in zip(planned, actual, *views, strict=True)
        ]

    def crop_resizer(self) -> CropResizer:
        """Makes the resizer that `group` takes; the caller closes it."""
        shape = self._datasets[0].image_shape
        assert shape is not None
        return CropResizer(self._config.data, batch_size=self._batch_size, image_shape=shape)

    def _with_images(self, planned: _Planned) -> HostBatch[TrainMetadata]:
        """A step with its images as files or pixels, or with their features."""
        self._check_arrays()
        self._read_ahead_from(planned.batch.step)
        if self._form == "files":
            with self.reading.measuring():
                actual, files = self._bad.read_files(planned.batch)
            return self._host_batch(planned, actual, files)
        if self._form == "features":
            actual, rows = self._bad.read_files(planned.batch)
            return self._host_batch(planned, actual, np.stack(rows))
        with self.reading.measuring():
            (actual,), pixels = self._bad.read_pixels([planned.batch])
        return self._host_batch(planned, actual, pixels)

    def plan_steps(self, first: int, count: int) -> list[_Planned]:
        """Some steps without their images, made in one go."""
        self._check_arrays()
        size = self._batch_size
        long = self._plan.long_batch(first, count, **self._ranks)
        steps = split_steps(long, count, global_batch_size=self._plan.global_batch_size)
        targets, integers = self._texts_of(long, steps[0].global_index)
        parts = zip(range(0, count * size, size), targets.num_texts.tolist(), strict=True)
        lengths = [targets.text_lengths[start : start + num_texts] for start, num_texts in parts]
        parts_of_steps = integers.reshape(count, size, -1), lengths, targets.image_classes
        return list(map(_Planned, steps, *parts_of_steps))

    def _host_batch(
        self,
        planned: _Planned,
        actual: PlannedBatch,
        images: list[NDArray[np.uint8]] | NDArray[Any],
    ) -> HostBatch[TrainMetadata]:
        """Puts together a step; `actual` is its plan with substitutes."""
        integers, text_lengths = planned.integers, planned.text_lengths
        image_classes = planned.image_classes
        if actual is not planned.batch:  # substitutes come with texts and labels of their own
            targets, integers = self._texts_of(actual, actual.global_index)
            text_lengths = targets.text_lengths[: targets.num_texts[0]]
            image_classes = targets.image_classes[0]
        is_ready = self._form in ("crops", "features")
        return HostBatch(
            inputs=graph_inputs(actual, images, integers, are_ready=is_ready),
            metadata=TrainMetadata(
                actual=actual,
                scheduled_ids=planned.batch.sample_ids,
                text_lengths=text_lengths,
                image_classes=image_classes,
            ),
        )

    def _texts_of(
        self, planned: PlannedBatch, global_index: NDArray[np.int64]
    ) -> tuple[TargetSteps, NDArray[np.int64]]:
        """The targets of some steps, and the integers that DALI carries.

        The objective says what samples' classes are. A rank's own texts are enough: a text with a
        label is always a prompt, and captions equal to a prompt are found by look-up, so no other
        rank's labels can change a class here.
        """
        length = self._config.model.context_length
        rows, labels = gather_texts(planned, self._datasets, self._prompts, context_length=length)
        targets = self._config.objective.map_targets(
            rows,
            labels,
            self._prompts,
            size=self._batch_size,
            all_labels=lambda: gather_labels(planned, self._datasets, self._classes_of_labels),
        )
        return targets, pack_integers(targets, global_index, context_length=length)

    def _check_arrays(self) -> None:
        for dataset in self._datasets:
            dataset.check_arrays()


def graph_inputs(
    planned: PlannedBatch,
    images: list[NDArray[np.uint8]] | NDArray[Any],
    integers: NDArray[np.int64],
    *,
    are_ready: bool,
) -> tuple[Any, ...]:
    """The inputs of `graph.build_train_graph`: all first views, then all second ones.

    Args:
        planned: the batch.
        images: encoded images, a list of uint8 arrays, which are cut to what their windows need;
            or pixels uint8 [b h w 3]; or the crops of all views, uint8 [v*b size size 3]; or
            features [b w].
        integers: see `pack_integers`.
        are_ready: whether `images` are crops or features, to which nothing is done.
    """
    num_views, rows = planned.num_views, planned.augment_rows
    inputs: list[Any] = [images]
    if not are_ready:
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
        self, data: DataConfig, *, batch_size: int, image_shape: tuple[int, int, int]
    ) -> None:
        """As for `graph.build_train_graph`; `image_shape` is that of all images."""
        self._image_size = data.image_size
        self._cubic = data.interpolation == "bicubic"
        threads = decoding_threads(data.threads)
        bytes_of_one = 3 * data.image_size**2 + math.prod(image_shape)
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
        *rest, mine = (
            partial(resample_windows, crops, images, starts, shapes, flips, self._cubic, begin, end)
            for begin, end in edges
        )
        running = [self._pool.submit(part) for part in rest]
        mine()
        for future in running:
            future.result()
        return crops

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
