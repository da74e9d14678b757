"""Reads the images of planned batches, as encoded files or as pixels, with substitutes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.images.encoded_images import EncodedImages

from ..plan.plan import PlannedBatch
from .bad_samples import BadSampleError, BadSamples


class SampleReader:
    """Reads the images of planned batches; from any thread."""

    def __init__(
        self, datasets: Sequence[PackedDataset], bad: BadSamples, *, max_pixels: int
    ) -> None:
        """`max_pixels` is the largest encoded image that is not bad; checked before decoding."""
        self._datasets, self._bad, self._max_pixels = list(datasets), bad, max_pixels

    def read_files(
        self, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], EncodedImages]:
        """Reads encoded images; returns the batches, with substitutes, and the images of all.

        Raises TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        source_ids, sample_ids = _ids_of(batches)
        limit = self._max_pixels
        images, sound = read_images(self._datasets, source_ids, sample_ids, max_pixels=limit)
        actual, start = [], 0
        for batch in batches:
            end = start + len(batch.global_index)
            replaced, rows, others = self._bad.replace(batch, sound[start:end], self._read_one)
            if others:
                images = images.replaced(start + rows, others)
            actual.append(replaced)
            start = end
        return actual, images

    def read_pixels(
        self, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], NDArray[np.uint8]]:
        """As `read_files`, from raw data sets of one image size; images are uint8 [b h w 3]."""
        source_ids, sample_ids = _ids_of(batches)
        shape = self._datasets[0].image_shape or ()
        pixels = np.empty((len(sample_ids), *shape), dtype=np.uint8)
        sound = np.zeros(len(sample_ids), dtype=np.bool_)
        for number, dataset in enumerate(self._datasets):
            mine = np.flatnonzero(source_ids == number)
            sound[mine] = dataset.read_pixels(sample_ids[mine], pixels, mine)
        actual, start = [], 0
        for batch in batches:
            end = start + len(batch.global_index)
            replaced, rows, others = self._bad.replace(batch, sound[start:end], self._read_one)
            for row, image in zip(rows.tolist(), others, strict=True):
                dataset = self._datasets[replaced.source_ids[row]]
                pixels[start + row] = dataset.pixels_of(image)
            actual.append(replaced)
            start = end
        return actual, pixels

    def _read_one(self, source: int, sample: int) -> NDArray[np.uint8]:
        dataset = self._datasets[source]
        try:
            return dataset.image_bytes(sample, verify=True, max_pixels=self._max_pixels)
        except DamagedSampleError as error:
            raise BadSampleError(
                str(error).removeprefix(f"{dataset.describe(sample)}: ")
            ) from error


def _ids_of(batches: Sequence[PlannedBatch]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sources and samples of some batches, concatenated."""
    sources = np.concatenate([batch.source_ids for batch in batches])
    return sources, np.concatenate([batch.sample_ids for batch in batches])


def read_images(
    datasets: Sequence[PackedDataset],
    source_ids: NDArray[np.int32],
    sample_ids: NDArray[np.int64],
    *,
    max_pixels: int,
) -> tuple[EncodedImages, NDArray[np.bool_]]:
    """Reads the images of a batch, and compares their checksums.

    Returns:
        The images, and bool [b]: whether each is as it was packed and has at most `max_pixels` (0
        sets no limit). `PackedDataset.image_bytes` says what is wrong with the others.
    """
    sizes = np.zeros(len(sample_ids), np.int64)
    rows_of = [np.flatnonzero(source_ids == number) for number in range(len(datasets))]
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sizes[rows] = dataset.image_sizes(sample_ids[rows], max_pixels=max_pixels)
    images = EncodedImages.empty(sizes)
    sound = np.zeros(len(sizes), np.bool_)
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sound[rows] = dataset.read_images(
            sample_ids[rows], images.content, images.starts[rows], sizes[rows]
        )
    return images, sound
