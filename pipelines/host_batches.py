"""The host's part of a step whose images are encoded files or raw pixels: a DALI graph's inputs.

Two views are a batch of twice the images: all first views, then all second ones.
"""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.encoded_images import EncodedImages

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
        form: Literal["files", "pixels"],
        reading: ReadingTime,
    ) -> None:
        """`form` is as for `graph.build_train_graph`; `reading` counts the waits for storage."""
        self._steps, self._reader, self._form, self.reading = steps, reader, form, reading

    def batches(self, start_step: int) -> Generator[HostBatch[TrainMetadata], None, None]:
        """Yields every step from `start_step` on, without end."""
        at_once = self._steps.at_once
        for first in itertools.count(start_step, at_once):
            yield from map(self._with_images, self._steps.plan_steps(first, at_once))

    def batch(self, step: int) -> HostBatch[TrainMetadata]:
        """Prepares one step."""
        return self._with_images(*self._steps.plan_steps(step, 1))

    def _with_images(self, step: PlannedStep) -> HostBatch[TrainMetadata]:
        self._steps.begin(step.batch.step)
        images: EncodedImages | NDArray[np.uint8]
        with self.reading.measuring():
            if self._form == "files":
                (actual,), images = self._reader.read_files([step.batch])
            else:
                (actual,), images = self._reader.read_pixels([step.batch])
        return HostBatch(
            inputs=graph_inputs(actual, images), metadata=self._steps.metadata_of(step, actual)
        )


def graph_inputs(
    planned: PlannedBatch, images: EncodedImages | NDArray[np.uint8]
) -> tuple[Any, ...]:
    """The inputs of `graph.build_train_graph`.

    Encoded images are cut to what their windows need; others are pixels uint8 [b h w 3].
    """
    num_views = planned.num_views
    starts, shapes, flips = split_windows(planned.windows.transpose(1, 0, 2).reshape(-1, 5))
    entering: Any = images
    if isinstance(images, EncodedImages):
        entering, starts = cut_to_windows(images.repeated(num_views), starts, shapes)
    elif num_views == 2:
        entering = np.concatenate([images] * 2)
    return (entering, starts, shapes, flips[:, None], *augment_inputs(planned))


def augment_inputs(planned: PlannedBatch) -> tuple[NDArray[np.float32], ...]:
    """The rows of a batch's augmentation [v*b k]; nothing if no data set augments."""
    rows = planned.augment_rows
    if not rows.shape[2]:
        return ()
    return (np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1, rows.shape[2]),)


def mean_image_bytes(datasets: Sequence[PackedDataset], data: DataConfig) -> float:
    """Mean bytes of a decoded image, for the data set with the largest."""
    # packing has shuffled the samples, so the first ones are representative
    samples = [dataset.samples[:_SAMPLES_MEASURED] for dataset in datasets]
    means = [np.mean(rows["height"].astype(np.float64) * rows["width"]) for rows in samples]
    return 3 * min(float(max(means)), data.max_pixels)  # larger images are not decoded
