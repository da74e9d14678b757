"""From one packed data set to batches for evaluation: each sample once over all ranks."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.batch import EvaluationBatch, copied_ahead
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset

from .graph import build_evaluation_graph
from .host_batches import HostBatch, mean_image_bytes
from .plan.crop import evaluation_regions, fill_borders
from .read.ahead import READ_AHEAD, reading_ahead
from .read.samples import read_images
from .running import DecodingError, choose_pace, decode, find_undecodable, reason_of
from .train_loader import decoder_of
from .trial import try_decoder

# bytes of a batch's whole images on a CPU, which holds several batches: with twice as many, 332
# photographs of 1100 x 990 pixels need 1.25 GB instead of 1.09
_MOST_DECODED = 64_000_000


class EvaluationLoader:
    """Images of one data set for evaluation; implements `unicl_fast.batch.EvaluationLoader`.

    Rank r of w shows the samples r, r + w, r + 2 w, ...: each sample exactly once over all ranks,
    without padding, so that counts can be summed. It can be iterated any number of times.

    Nothing is replaced: accuracy on other images than the data set's would be another number. An
    image that cannot be read or decoded ends the evaluation with an error that names it.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        data: DataConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        samples: Sequence[int] | None = None,
    ) -> None:
        """As for `TrainLoader`; `batch_size` is this rank's, its last batch can be smaller.

        Shows the given `samples`, shared likewise, or all.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        self._dataset = dataset
        self._device = torch.device(device)
        self._decode_device = decoder_of(data, self._device)
        if self._decode_device.type == "cuda":
            try_decoder([dataset], data, self._decode_device)
        self._build = partial(build_evaluation_graph, data=data, device=self._decode_device)
        window_bytes = mean_image_bytes([dataset], data)
        self.pace = choose_pace(
            data, self._decode_device, num_images=batch_size, window_bytes=window_bytes
        )
        if self._decode_device.type == "cpu":
            while batch_size > 1 and batch_size * window_bytes > _MOST_DECODED:
                batch_size //= 2
        self._data, self._batch_size = data, batch_size
        chosen = np.arange(len(dataset)) if samples is None else np.asarray(samples)
        ids = chosen[rank::world_size].astype(np.int64)
        self._batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Iterates over the images once.

        Raises:
            DamagedSampleError: an image's bytes are gone or not those that were packed, or it has
                more than `data.max_pixels`.
            DecodingError: images that the decoder refuses; names them.
        """
        batches = self._decode()
        if self._device != self._decode_device:
            batches = copied_ahead(batches, self._device)
        return batches

    def _decode(self) -> Generator[EvaluationBatch, None, None]:
        if not self._batches:
            return
        outputs = decode(
            self._build,
            self._host_batches(),
            batch_size=len(self._batches[0]),
            device=self._decode_device,
            pace=self.pace,
        )
        try:
            with contextlib.closing(outputs):
                for images, ids in outputs:
                    sizes = self._dataset.samples[ids]
                    fill_borders(images, sizes["height"], sizes["width"], self._data)
                    yield EvaluationBatch(images=images, sample_ids=torch.from_numpy(ids))
                    del images
            return
        except DecodingError as error:
            failed, reason = error.in_flight, reason_of(error)
        for ids in failed:
            inputs = self._host_batch(ids).inputs
            reasons = find_undecodable(self._build, inputs, device=self._decode_device)
            if reasons:
                raise DecodingError(
                    "cannot be decoded, though the bytes are those that were packed; pack the data "
                    "again without: "
                    + "; ".join(
                        f"{self._dataset.describe(int(ids[row]))}: {reason}"
                        for row, reason in reasons.items()
                    )
                )
        raise DecodingError(
            f"{self._dataset.location}: decoding fails, though each image can be decoded alone: "
            f"{reason}"
        )

    def _host_batches(self) -> Generator[HostBatch[NDArray[np.int64]], None, None]:
        def schedule(batch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
            if batch >= len(self._batches):
                return None
            ids = self._batches[batch]
            return np.zeros(len(ids), np.int32), ids

        num_chunks = -(-READ_AHEAD // self._batch_size)
        with reading_ahead([self._dataset], schedule, num_chunks=num_chunks) as read_ahead_from:
            for batch, ids in enumerate(self._batches):
                read_ahead_from(batch)
                yield self._host_batch(ids)

    def _host_batch(self, ids: NDArray[np.int64]) -> HostBatch[NDArray[np.int64]]:
        self._dataset.check_arrays()
        samples = self._dataset.samples[ids]
        starts, ends = evaluation_regions(samples["height"], samples["width"], self._data)
        limit, sources = self._data.max_pixels, np.zeros(len(ids), np.int32)
        images, sound = read_images([self._dataset], sources, ids, max_pixels=limit)
        files = images.files()
        for row in np.flatnonzero(~sound).tolist():  # tries again, and says what is wrong
            files[row] = self._dataset.image_bytes(ids[row], verify=True, max_pixels=limit)
        return HostBatch(inputs=(files, starts, ends), metadata=ids)
