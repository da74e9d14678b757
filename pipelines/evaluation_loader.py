"""Each image of one packed data set once, for evaluation.

Here nothing is replaced: an accuracy over other images than those of the data set would be
another number. An image that cannot be read or decoded ends the evaluation, with its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.batch import EvaluationBatch
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset

from .feed.bad_samples import find_undecodable, reason_of
from .feed.read_ahead import reading_ahead
from .graph import (
    DecodingError,
    HostBatch,
    Pipeline,
    batches_ahead,
    build_evaluation_graph,
    run_graphs,
    split_threads,
)
from .plan.crop import central_windows


class EvaluationLoader:
    """Images of one data set for evaluation; implements `unicl_fast.batch.EvaluationLoader`.

    Rank r of w shows the samples r, r + w, r + 2 w, ...: over all ranks each sample exactly once,
    without padding, so that counts can be summed. May be iterated any number of times.
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
    ) -> None:
        """Args as for `TrainLoader`; `batch_size` is this rank's, its last batch may be smaller."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        self._dataset = dataset
        self._data = data
        self._batch_size = batch_size
        self._device = torch.device(device)
        ids = np.arange(rank, len(dataset), world_size, dtype=np.int64)
        self._batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Iterates over the images once.

        Raises:
            DamagedSampleError: an image's bytes are gone or not those that were packed.
            DecodingError: images that the decoder refuses; names them.
        """
        if not self._batches:
            return
        try:
            yield from self._decode()
        except DecodingError as error:
            failed, reason = error.in_flight, reason_of(error)
        else:
            return
        for ids in failed:
            self._refuse_undecodable(ids)
        raise DecodingError(
            f"{self._dataset.place}: decoding fails, though each image can be decoded alone: "
            f"{reason}"
        )

    def _decode(self) -> Generator[EvaluationBatch, None, None]:
        batch_size = len(self._batches[0])
        graphs = [
            self._graph(data, batch_size=batch_size)
            for data in split_threads(self._data, self._device)
        ]
        ahead = batches_ahead(self._data, batch_size)
        with (
            contextlib.closing(self._host_batches()) as host_batches,
            contextlib.closing(
                run_graphs(graphs, host_batches, device=self._device, ahead=ahead)
            ) as running,
        ):
            for (images,), ids in running:
                yield EvaluationBatch(images=images, sample_ids=torch.from_numpy(ids))
                del images

    def _host_batches(self) -> Generator[HostBatch[NDArray[np.int64]], None, None]:
        def schedule(batch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
            if batch >= len(self._batches):
                return None
            ids = self._batches[batch]
            return np.zeros(len(ids), np.int32), ids

        with reading_ahead(
            [self._dataset],
            schedule,
            start=0,
            stretches=-(-self._data.read_ahead // self._batch_size),
        ) as read_ahead_from:
            for batch, ids in enumerate(self._batches):
                read_ahead_from(batch)
                yield self._host_batch(ids)

    def _host_batch(self, ids: NDArray[np.int64]) -> HostBatch[NDArray[np.int64]]:
        self._dataset.check_arrays()
        samples = self._dataset.samples[ids]
        starts, ends = central_windows(
            samples["height"],
            samples["width"],
            resize=self._data.evaluation_resize,
            crop=self._data.image_size,
        )
        encoded = [self._dataset.image_bytes(sample, verify=True) for sample in ids.tolist()]
        return HostBatch(inputs=(encoded, starts, ends), facts=ids)

    def _graph(self, data: DataConfig, *, batch_size: int) -> partial[Pipeline]:
        return partial(
            build_evaluation_graph, data=data, batch_size=batch_size, device=self._device
        )

    def _refuse_undecodable(self, ids: NDArray[np.int64]) -> None:
        data = dataclasses.replace(self._data, threads=1, prefetch=1)
        one = self._graph(data, batch_size=1)
        reasons = find_undecodable(one, self._host_batch(ids).inputs, device=self._device)
        if reasons:
            raise DecodingError(
                "cannot be decoded, though the bytes are those that were packed; pack the data "
                "again without: "
                + "; ".join(
                    f"{self._dataset.describe(int(ids[row]))}: {reason}"
                    for row, reason in reasons.items()
                )
            )

    def close(self) -> None:
        """Nothing outlives an iteration; here for the protocol."""
