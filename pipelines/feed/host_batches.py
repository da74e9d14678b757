"""The host's part of each step: plan, texts and targets, images as the graph takes them.

Plans and texts are made for many steps in one go, since calling NumPy costs more than small batches
do. Two views are a batch of twice the images, all first views and then all second ones.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from unicl_fast.batch import ReadingTime, Targets, Texts
from unicl_fast.config import DataConfig, ModelConfig, RunConfig
from unicl_fast.dataset.arrays import CHANNELS
from unicl_fast.dataset.feature_files import FeatureFile
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.codec import decode_files
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.objectives.objective import Objective
from unicl_fast.objectives.targets import ImageLabels
from unicl_fast.system.kernels import kernel
from unicl_fast.system.machine import usable_cores
from unicl_fast.text.prompts import ClassPrompts

from ..kernels.jpeg_windows import cut_to_windows
from ..kernels.resample import resample_windows
from ..plan.plan import PlannedBatch, TrainPlan, split_steps, split_windows
from .reading import READ_AHEAD, SampleReader, reading_ahead

Metadata = TypeVar("Metadata")
_Result = TypeVar("_Result")
ImageForm = Literal["files", "pixels", "crops", "features"]
"""The form of a graph's images: encoded files, raw images, or crops that were made of those.
Features of a frozen encoder, in place of images, go through no graph."""

_Decoded = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]
"""Memory with decoded images uint8 [n], the first byte of each int64 [b], and its width."""

_PLANNED_AT_ONCE = 4096
"""Samples whose plan and texts are made in one go: a megabyte of memory, a few milliseconds."""
_SCHEDULED_AT_ONCE = 128
"""Samples whose blocks are asked for in one go, where data sets lie under a URL."""
_SAMPLES_MEASURED = 100_000
SMALL_IMAGE_BYTES = 70_000
"""JPEGs of at most these bytes when decoded, on average (some 150 x 150 pixels), are decoded
whole, by a call each: what DALI does around its decoder costs more than what lies outside the
windows. One of 32 pixels takes 15 instead of 23 us of a core, of 60 x 80 40 instead of 56, of 128 x
170 117 instead of 147. Between these calls Python's lock changes hands: with 2 to 16 threads on two
cores it cost less than was won. PNGs go to DALI: Pillow takes twice its time."""
_CROPPED_AT_ONCE = 2048
_CROPPED_BYTES_AT_ONCE = 32_000_000
"""Decoded images, and bytes of them and their crops, that one thread reads and crops in one go."""
_GROUP_BYTES = 8_000_000
"""The same bytes of several batches; with 32 MB a loader was no faster and held 90 MB more."""


def steps_at_once(batch_size: int) -> int:
    """Steps that are planned together."""
    return max(1, _PLANNED_AT_ONCE // batch_size)


def decoding_threads(threads: int) -> int:
    """Decoding threads of this rank: as given, or (0) one for each core that it may use."""
    return threads or usable_cores()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch(Generic[Metadata]):
    """The inputs of one run of a graph, and what comes out again with its images.

    Graphs give their batches in the order in which they took them, so metadata is queued.
    """

    inputs: tuple[Any, ...]
    metadata: Metadata


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetadata:
    """All of a training batch but its images."""

    actual: PlannedBatch
    """The plan, with substitutes for bad samples: what the batch holds."""
    scheduled_ids: NDArray[np.int64]
    texts: Texts
    targets: Targets


class _PlannedStep(NamedTuple):
    """A step without its images, as planned: nothing is replaced yet."""

    batch: PlannedBatch
    texts: Texts
    targets: Targets


class LoaderSettings(Protocol):
    """The groups of a run's config that its loader needs; a `TrainConfig` has them."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def run(self) -> RunConfig: ...


class HostBatches:
    """One rank's steps, as they go into the graph."""

    def __init__(
        self,
        config: LoaderSettings,
        datasets: Sequence[PackedDataset],
        prompts: ClassPrompts,
        plan: TrainPlan,
        reader: SampleReader,
        *,
        rank: int,
        world_size: int,
        form: ImageForm,
    ) -> None:
        """As for `loader.TrainLoader`; `form` as for `graph.build_train_graph`."""
        self._datasets, self._prompts, self._plan, self._reader = datasets, prompts, plan, reader
        self._data, self._objective = config.data, config.objective
        self._context_length = config.model.context_length
        self._ranks = {"rank": rank, "world_size": world_size}
        self._form = form
        shapes = {dataset.image_shape for dataset in datasets}
        self._shape = shapes.pop() if len(shapes) == 1 else None
        self._is_decoded = all(dataset.is_decoded for dataset in datasets)
        self._batch_size = plan.global_batch_size // world_size
        self._classes_of_labels = [
            prompts.classes_of(number, np.arange(num_classes))
            for number, num_classes in enumerate(prompts.num_classes)
        ]
        self._steps_of_chunk = max(1, _SCHEDULED_AT_ONCE // self._batch_size)
        self._read_ahead_from: Callable[[int], None] = lambda step: None
        self._planning, self._planned_ahead = threading.Lock(), dict[int, _PlannedStep]()
        self.reading = ReadingTime(decodes_files=form == "files" or not self._is_decoded)
        """How long reading waited for storage."""

    def feed_features(self, features: Sequence[FeatureFile]) -> None:
        """Feeds stored features in place of images from now on, those of each data set."""
        self._form, self._reader.features = "features", features

    @contextlib.contextmanager
    def reading_ahead(self, start_step: int) -> Iterator[None]:
        """Within this context, samples under a URL are fetched before their turn."""
        if self._form == "features":
            yield
            return
        count = self._steps_of_chunk
        with reading_ahead(
            self._datasets,
            lambda chunk: self._plan.schedule(start_step + chunk * count, count, **self._ranks),
            num_chunks=-(-READ_AHEAD // (count * self._plan.global_batch_size)),
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

        `ahead` is the number of groups that are made before they are asked for, besides those that
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
        planned = self._take_planned(first_step, resizer.batches_at_once)
        self._check_arrays()
        self._read_ahead_from(first_step)
        actual, images = self._decoded([step.batch for step in planned], resizer)
        windows = np.concatenate([batch.windows for batch in actual])
        views = [
            np.split(resizer.crop(*images, windows[:, view]), len(actual))
            for view in range(self._plan.num_views)
        ]
        return [
            self._host_batch(step, batch, crops[0] if len(crops) == 1 else np.concatenate(crops))
            for step, batch, *crops in zip(planned, actual, *views, strict=True)
        ]

    def _take_planned(self, first: int, count: int) -> list[_PlannedStep]:
        """As `plan_steps`, which groups of few samples share; from any thread, nearly in order."""
        with self._planning:
            if not self._planned_ahead.keys() >= set(range(first, first + count)):
                steps = self.plan_steps(first, max(count, steps_at_once(self._batch_size)))
                self._planned_ahead = dict(enumerate(steps, first))
            return [self._planned_ahead.pop(step) for step in range(first, first + count)]

    def _decoded(
        self, batches: Sequence[PlannedBatch], resizer: CropResizer
    ) -> tuple[list[PlannedBatch], _Decoded]:
        """Decoded images of some batches, and these with substitutes."""
        if self._shape is not None:
            with self.reading.measuring():
                actual, pixels = self._reader.read_pixels(batches)
            count, size = len(pixels), math.prod(self._shape)
            firsts, widths = np.arange(0, count * size, size), np.full(count, self._shape[1])
            return actual, (pixels.reshape(-1), firsts, widths)
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
            if self._is_decoded:  # a header is before the pixels
                return actual, (images.content, images.starts + images.sizes - sizes, widths)
            pixels = np.empty(int(sizes.sum()), np.uint8)
            parts = resizer.in_parts(partial(decode_files, pixels, images, shapes), len(images))
            faults = [fault for part in parts for fault in part.items()]
            if not faults:
                return actual, (pixels, np.cumsum(sizes) - sizes, widths)
            self._reader.mark_undecodable(
                (int(source_ids[row]), int(sample_ids[row]), fault) for row, fault in faults
            )

    def crop_resizer(self) -> CropResizer:
        """Makes the resizer that `group` takes; the caller closes it."""
        size = round(image_bytes(self._datasets, self._data))
        return CropResizer(self._data, batch_size=self._batch_size, image_bytes=size)

    def _with_images(self, step: _PlannedStep) -> HostBatch[TrainMetadata]:
        """A step with its images as files or pixels, or with their features."""
        self._check_arrays()
        self._read_ahead_from(step.batch.step)
        images: Any
        if self._form == "features":
            actual, images = self._reader.read_features(step.batch)
            return self._host_batch(step, actual, images)
        with self.reading.measuring():
            if self._form == "files":
                (actual,), images = self._reader.read_files([step.batch])
            else:
                (actual,), images = self._reader.read_pixels([step.batch])
        return self._host_batch(step, actual, images)

    def plan_steps(self, first: int, count: int) -> list[_PlannedStep]:
        """Some steps without their images, made in one go."""
        self._check_arrays()
        long = self._plan.long_batch(first, count, **self._ranks)
        batches = split_steps(long, count, global_batch_size=self._plan.global_batch_size)
        parts = zip(batches, self._texts_of(long), strict=True)
        return [_PlannedStep(batch, *texts_and_targets) for batch, texts_and_targets in parts]

    def _host_batch(
        self,
        step: _PlannedStep,
        actual: PlannedBatch,
        images: EncodedImages | NDArray[Any],
    ) -> HostBatch[TrainMetadata]:
        """Puts together a step; `actual` is its plan with substitutes."""
        _, texts, targets = step
        if actual is not step.batch:  # substitutes come with texts and labels of their own
            ((texts, targets),) = self._texts_of(actual)
        return HostBatch(
            inputs=graph_inputs(actual, images, are_ready=self._form in ("crops", "features")),
            metadata=TrainMetadata(
                actual=actual,
                scheduled_ids=step.batch.sample_ids,
                texts=texts,
                targets=targets,
            ),
        )

    def _texts_of(self, planned: PlannedBatch) -> list[tuple[Texts, Targets]]:
        """Texts and targets of some steps.

        A rank's own texts are enough: a text with a label is always a prompt, and captions equal to
        a prompt are found by look-up, so no other rank's labels can change a class here.
        """
        rows, labels = gather_texts(
            planned, self._datasets, self._prompts, context_length=self._context_length
        )
        steps = self._objective.map_targets(
            rows,
            labels,
            self._prompts,
            size=self._batch_size,
            all_labels=lambda: gather_labels(planned, self._datasets, self._classes_of_labels),
        )
        return [targets.tensors() for targets in steps]

    def _check_arrays(self) -> None:
        for dataset in self._datasets:
            dataset.check_arrays()


def image_bytes(datasets: Sequence[PackedDataset], data: DataConfig) -> float:
    """Bytes of a decoded image on average, of the data set with the largest."""
    # packing has shuffled the samples, so the first ones are like all
    samples = [dataset.samples[:_SAMPLES_MEASURED] for dataset in datasets]
    means = [np.mean(rows["height"].astype(np.float64) * rows["width"]) for rows in samples]
    return 3 * min(float(max(means)), data.max_pixels)  # larger images are not decoded


def gather_texts(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    context_length: int,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Gathers token rows and training classes of a planned batch: stored captions, and prompts.

    A text longer than `context_length` is cut and keeps its end token, as the tokenizer does it.

    Returns:
        Rows [b context_length] padded with 0, of the prompts' type, and int64 [b] classes, -1
        where the text is a caption.
    """
    size = len(planned.global_index)
    rows = np.zeros((size, context_length), dtype=prompts.tokens.dtype)
    classes = np.full(size, -1, dtype=np.int64)
    for number, dataset in enumerate(datasets):
        mine = planned.source_ids == number
        chosen = np.flatnonzero(mine & (planned.captions >= 0))
        samples = dataset.samples.take(planned.sample_ids[chosen])
        positions = samples["captions_start"].astype(np.int64) + planned.captions[chosen]
        captions = dataset.captions.take(positions)
        starts = captions["tokens_start"].astype(np.int64)
        lengths = captions["tokens_length"].astype(np.int64)
        _copy_texts(np.asarray(dataset.tokens), starts, lengths, chosen, rows)
        chosen = np.flatnonzero(mine & (planned.labels >= 0))
        if len(chosen):
            labels = planned.labels[chosen]
            found = prompts.tokens[prompts.rows_of(number, labels, planned.templates[chosen])]
            # Up to the end token: 0 is padding after it, and "!" before.
            lengths = (found.shape[1] - np.argmax(found[:, ::-1] != 0, axis=1)).astype(np.int64)
            starts = np.arange(len(chosen), dtype=np.int64) * found.shape[1]
            _copy_texts(found.reshape(-1), starts, lengths, chosen, rows)
            classes[chosen] = prompts.classes_of(number, labels)
    return rows, classes


def gather_labels(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    classes_of_labels: Sequence[NDArray[np.int64]],
) -> ImageLabels:
    """Gathers all labels of each sample of a planned batch, also if it is shown with a caption.

    `classes_of_labels` has the training class of each label of each data set.
    """
    firsts, counts = np.zeros((2, len(planned.global_index)), dtype=np.int64)
    of_dataset = [np.flatnonzero(planned.source_ids == number) for number in range(len(datasets))]
    for mine, dataset in zip(of_dataset, datasets, strict=True):
        samples = dataset.samples.take(planned.sample_ids[mine])
        firsts[mine], counts[mine] = samples["labels_start"], samples["labels_count"]
    starts = np.concatenate([[0], np.cumsum(counts)])
    found = np.empty(starts[-1], dtype=np.int64)
    for mine, dataset, classes in zip(of_dataset, datasets, classes_of_labels, strict=True):
        _copy_classes(np.asarray(dataset.labels), firsts, counts, mine, classes, starts, found)
    return ImageLabels(classes=found, starts=starts)


@kernel
def _copy_classes(
    labels: Any, firsts: Any, counts: Any, samples: Any, classes: Any, starts: Any, found: Any
) -> None:
    """Writes the classes of labels[firsts[i]:][:counts[i]] for each i of `samples`."""
    for i in samples:
        for j in range(counts[i]):
            found[starts[i] + j] = classes[labels[firsts[i] + j]]


@kernel
def _copy_texts(tokens: Any, starts: Any, lengths: Any, targets: Any, rows: Any) -> None:
    """Copies text i to row targets[i]; one that is too long ends in its own last token."""
    longest = rows.shape[1]
    for i in range(targets.size):
        length = min(lengths[i], longest)
        for j in range(length):
            rows[targets[i], j] = tokens[starts[i] + j]
        rows[targets[i], length - 1] = tokens[starts[i] + lengths[i] - 1]


def graph_inputs(
    planned: PlannedBatch, images: EncodedImages | NDArray[Any], *, are_ready: bool
) -> tuple[Any, ...]:
    """The inputs of `graph.build_train_graph`: all first views, then all second ones.

    Args:
        planned: the batch.
        images: encoded images, which are cut to what their windows need; or pixels uint8
            [b h w 3]; or the crops of all views, uint8 [v*b size size 3]; or features [b w].
        are_ready: whether `images` are crops or features, to which nothing is done.
    """
    num_views, rows = planned.num_views, planned.augment_rows
    inputs: list[Any] = [images]
    if not are_ready:
        starts, shapes, flips = split_windows(planned.windows.transpose(1, 0, 2).reshape(-1, 5))
        if isinstance(images, EncodedImages):
            inputs[0], starts = cut_to_windows(images.repeated(num_views), starts, shapes)
        elif num_views == 2:
            inputs[0] = np.concatenate([images] * 2)
        inputs += [starts, shapes, flips[:, None]]
    if rows.shape[2]:
        inputs.append(np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1, rows.shape[2]))
    return tuple(inputs)


class CropResizer:
    """Crops decoded images, resizes and flips the crops; close it at the end.

    This is what these need instead of a decoder. An image of 32 pixels a side takes 3 us, less than
    DALI spends on handling it, so nothing is done for a single image in Python.

    Small batches are made several at a time, each such group by one thread from its plan to its
    crops, since a thread that takes work over waits to be woken and for Python's lock: with batches
    of 64 such pauses took two thirds of the time. A large batch is split among all threads; two are
    made at a time, so that one is resampled while the other is read: that is one more in memory.
    """

    def __init__(self, data: DataConfig, *, batch_size: int, image_bytes: int) -> None:
        """As for `graph.build_train_graph`; `image_bytes` are those of an image on average."""
        self._image_size = data.image_size
        self._cubic = data.interpolation == "bicubic"
        threads = decoding_threads(data.threads)
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

        `windows` as `PlannedBatch.windows`.
        """
        crops = np.empty((len(firsts), self._image_size, self._image_size, 3), dtype=np.uint8)
        starts, shapes, flips = split_windows(windows)
        images = crops, content, firsts, widths, starts, shapes, flips, self._cubic
        self.in_parts(partial(resample_windows, *images), len(firsts))
        return crops

    def in_parts(self, work: Callable[[int, int], _Result], count: int) -> list[_Result]:
        """Does `work` from the first image to the last of a part, for each part of `count`."""
        parts = min(self._threads, count)
        edges = itertools.pairwise(count * part // parts for part in range(parts + 1))
        mine, *rest = (partial(work, begin, end) for begin, end in edges)
        running = [self._pool.submit(part) for part in rest]
        return [mine(), *(future.result() for future in running)]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
