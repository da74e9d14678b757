"""Reads the images of planned batches, as files in memory, with substitutes."""

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
        self,
        datasets: Sequence[PackedDataset],
        bad: BadSamples,
        *,
        max_pixels: int,
        headers: bool = True,
    ) -> None:
        """`max_pixels` is the largest encoded image that is not bad; checked before decoding.

        Without `headers` raw images need not have one: only their last bytes, the pixels, count.
        """
        self._datasets, self._bad = list(datasets), bad
        self._max_pixels, self._headers = max_pixels, headers

    def read_files(
        self, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], EncodedImages]:
        """Returns the batches, with substitutes, and the images of all.

        Raises TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        images, sound = read_images(
            self._datasets,
            np.concatenate([batch.source_ids for batch in batches]),
            np.concatenate([batch.sample_ids for batch in batches]),
            max_pixels=self._max_pixels,
            headers=self._headers,
        )
        actual, start = [], 0
        for batch in batches:
            end = start + len(batch.global_index)
            replaced, rows, others = self._bad.replace(batch, sound[start:end], self._read_one)
            if others:
                images = images.replaced(start + rows, others)
            actual.append(replaced)
            start = end
        return actual, images

    def _read_one(self, source: int, sample: int) -> NDArray[np.uint8]:
        dataset = self._datasets[source]
        try:
            return dataset.image_bytes(sample, verify=True, max_pixels=self._max_pixels)
        except DamagedSampleError as error:
            raise BadSampleError(
                str(error).removeprefix(f"{dataset.describe(sample)}: ")
            ) from error


def read_images(
    datasets: Sequence[PackedDataset],
    source_ids: NDArray[np.int32],
    sample_ids: NDArray[np.int64],
    *,
    max_pixels: int,
    headers: bool = True,
) -> tuple[EncodedImages, NDArray[np.bool_]]:
    """Reads the images of a batch, and compares their checksums.

    Returns:
        The images, and bool [b]: whether each is as it was packed and has at most `max_pixels` (0
        sets no limit). `PackedDataset.image_bytes` says what is wrong with the others.
    """
    sizes = np.zeros(len(sample_ids), np.int64)
    rows_of = [np.flatnonzero(source_ids == number) for number in range(len(datasets))]
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sizes[rows] = dataset.image_sizes(sample_ids[rows], max_pixels=max_pixels, headers=headers)
    images = EncodedImages.empty(sizes)
    sound = np.zeros(len(sizes), np.bool_)
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sound[rows] = dataset.read_images(
            sample_ids[rows], images.content, images.starts[rows], sizes[rows], headers=headers
        )
    return images, sound
