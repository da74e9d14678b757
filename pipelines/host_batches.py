"""The host's part of a step whose images are encoded files or raw pixels: a DALI graph's inputs."""

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset

from .kernels.jpeg_windows import cut_to_windows
from .plan.plan import PlannedBatch, split_windows
from .read.samples import SampleReader
from .steps import PlannedStep, RankSteps, TrainMetadata

Metadata = TypeVar("Metadata")
ImageForm = Literal["files", "pixels", "crops"]
"""The form in which images enter a graph: encoded files, raw images of one size, or crops."""
_SAMPLES_MEASURED = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch(Generic[Metadata]):
    """The inputs of one run of a graph, and the metadata that goes with its images.

    Graphs return batches in the order in which they got them, so metadata is queued.
    """

    inputs: tuple[Any, ...]
    metadata: Metadata


class HostBatches:
    """One rank's steps with their images, as they go into a graph."""

    def __init__(
        self,
        steps: RankSteps,
        reader: SampleReader,
        *,
        image_shape: tuple[int, int, int] | None,
        reading: ReadingTime,
    ) -> None:
        """`image_shape` is that of raw images, which enter as pixels; None for files.

        `reading` counts the waits for storage.
        """
        self._steps, self._reader, self._shape, self.reading = steps, reader, image_shape, reading

    def batches(self, start_step: int) -> Generator[HostBatch[TrainMetadata], None, None]:
        """Yields every step from `start_step` on, without end."""
        at_once = self._steps.at_once
        for first in itertools.count(start_step, at_once):
            yield from map(self._with_images, self._steps.plan_steps(first, at_once))

    def _with_images(self, step: PlannedStep) -> HostBatch[TrainMetadata]:
        """The inputs of `graph.build_train_graph`; files are cut to what their windows need."""
        self._steps.begin(step.batch.step)
        with self.reading.measuring():
            (actual,), images = self._reader.read_files([step.batch])
        starts, shapes, flips = split_windows(actual.windows)
        entering: Any
        if self._shape is None:
            entering, starts = cut_to_windows(images, starts, shapes)
        else:  # in one piece, which costs DALI less than many
            size, pixels = math.prod(self._shape), images.content
            in_order = np.array_equal(images.starts, np.arange(len(images)) * size)
            if not (in_order and (images.sizes == size).all()):  # substitutes follow
                pixels = np.concatenate([file[-size:] for file in images.files()])
            entering = pixels.reshape(-1, *self._shape)
        return HostBatch(
            inputs=(entering, starts, shapes, flips[:, None], *augment_inputs(actual)),
            metadata=self._steps.metadata_of(step, actual),
        )


def augment_inputs(planned: PlannedBatch) -> tuple[NDArray[np.float32], ...]:
    """The rows of a batch's augmentation [b k]; nothing if no data set augments."""
    return (planned.augment_rows,) if planned.augment_rows.size else ()


def mean_image_bytes(datasets: Sequence[PackedDataset], data: DataConfig) -> float:
    """Mean bytes of a decoded image, for the data set with the largest."""
    # packing has shuffled the samples, or in place their files: the first ones are typical
    samples = [dataset.samples[:_SAMPLES_MEASURED] for dataset in datasets]
    means = [np.mean(rows["height"].astype(np.float64) * rows["width"]) for rows in samples]
    return 3 * min(float(max(means)), data.max_pixels)  # larger images are not decoded
