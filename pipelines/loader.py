"""From packed data sets to batches: plan, read, decode, hand over.

`TrainLoader` feeds a trainer without end, from any step; `EvaluationLoader` shows each sample of
one data set once. Both are thin: what a step holds is the plan's, pixels are the graph's, classes
are `unicl_fast.targets`', and running it all ahead of the step is feed.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.batch import Batch, EvaluationBatch
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.pipelines.crop import central_windows
from unicl_fast.pipelines.feed import HostBatch, run_graph
from unicl_fast.pipelines.graph import build_evaluation_graph, build_train_graph
from unicl_fast.pipelines.integer_block import pack_integers, unpack_integers
from unicl_fast.pipelines.plan import PlannedBatch, PlanSource, TrainPlan
from unicl_fast.pipelines.texts import gather_texts
from unicl_fast.prompts import ClassPrompts
from unicl_fast.shards import PackedDataset
from unicl_fast.targets import map_targets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _TrainFacts:
    """What the host knows of a batch that is being decoded."""

    planned: PlannedBatch
    text_lengths: NDArray[np.int64]


class TrainLoader:
    """One rank's batches of a run; implements `unicl_fast.batch.Loader`.

    Batches are the same whatever step they are asked from, and the ranks' batches of one step join
    to the same global batch whatever their number.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[PackedDataset],
        shares: Sequence[float] | None,
        prompts: ClassPrompts,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Checks that the data can be planned and that the ranks can share a batch.

        Args:
            config: the run's.
            datasets: what to train on, open; closing them is the caller's business.
            shares: each data set's part of every batch; None takes the numbers of samples.
            prompts: made of the same data sets in the same order.
            rank: which slice of a global batch this loader makes.
            world_size: how many slices there are.
            device: where pictures are decoded and batches lie.
        """
        self._config = config
        self._datasets = list(datasets)
        self._prompts = prompts
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device)
        self._running: Generator[Batch, None, None] | None = None
        self.plan = TrainPlan(
            [_plan_source(dataset, prompts, i) for i, dataset in enumerate(self._datasets)],
            data=config.data,
            global_batch_size=config.run.global_batch_size,
            seed=config.run.seed,
            shares=shares,
        )
        self.plan.batch(0, rank=rank, world_size=world_size)  # refuses what cannot be shared, now

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ... without end.

        One iterator runs at a time: asking for another closes the one before.
        """
        self.close()
        self._running = self._iterate(start_step)
        return self._running

    def close(self) -> None:
        """Stops decoding and frees its buffers; batches that are still held stay valid."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _iterate(self, start_step: int) -> Generator[Batch, None, None]:
        data = self._config.data
        graph = partial(
            build_train_graph,
            batch_size=self._config.run.global_batch_size // self._world_size,
            image_size=data.image_size,
            interpolation=data.interpolation,
            resample=data.resample,
            device=self._device,
            threads=decoding_threads(data.threads),
            prefetch=data.prefetch,
        )
        with contextlib.closing(
            run_graph(
                graph,
                self._host_batches(start_step),
                device=self._device,
                ahead=data.prefetch,
                describe=self._describe,
            )
        ) as running:
            for (images, integers), facts in running:
                planned = facts.planned
                yield Batch(
                    step=planned.step,
                    images=images,
                    text_lengths=facts.text_lengths,
                    sample_ids=torch.from_numpy(planned.sample_ids),
                    scheduled_ids=torch.from_numpy(planned.sample_ids),
                    source_ids=torch.from_numpy(planned.source_ids.astype(np.int64)),
                    **unpack_integers(integers, num_texts=len(facts.text_lengths)),
                )
                del images, integers  # held here, their buffers could not be reused

    def _host_batches(self, start_step: int) -> Iterator[HostBatch[_TrainFacts]]:
        step = start_step
        while True:
            yield self._host_batch(step)
            step += 1

    def _host_batch(self, step: int) -> HostBatch[_TrainFacts]:
        """Everything of one step that is not pixels, and the encoded pictures."""
        context_length = self._config.model.context_length
        planned = self.plan.batch(step, rank=self._rank, world_size=self._world_size)
        rows, classes = gather_texts(
            planned, self._datasets, self._prompts, context_length=context_length
        )
        # A rank's own texts are enough: a text with a label is always a prompt, and captions equal
        # to a prompt are found by look-up, so no other rank's labels can change a class here.
        targets = map_targets(rows, classes, self._prompts)
        encoded = [
            self._datasets[source].image_bytes(sample, verify=True)
            for source, sample in zip(
                planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True
            )
        ]
        integers = pack_integers(targets, planned.slots, context_length=context_length)
        return HostBatch(
            inputs=(
                encoded,
                planned.window_starts,
                planned.window_shapes,
                planned.flips[:, None],
                integers,
            ),
            facts=_TrainFacts(planned=planned, text_lengths=targets.text_lengths),
        )

    def _describe(self, facts: _TrainFacts) -> str:
        planned = facts.planned
        names = [
            self._datasets[source].describe(sample)
            for source, sample in zip(
                planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True
            )
        ]
        return _cannot_decode(names, where=f"step {planned.step}, rank {self._rank}")


class EvaluationLoader:
    """Pictures of one data set for evaluation; implements `unicl_fast.batch.EvaluationLoader`.

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
        self._ids = np.arange(rank, len(dataset), world_size, dtype=np.int64)

    def __len__(self) -> int:
        """Batches of this rank in one pass."""
        return -(-len(self._ids) // self._batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        if not len(self._ids):
            return
        graph = partial(
            build_evaluation_graph,
            batch_size=min(self._batch_size, len(self._ids)),
            image_size=self._data.image_size,
            interpolation=self._data.interpolation,
            resample=self._data.resample,
            device=self._device,
            threads=decoding_threads(self._data.threads),
            prefetch=self._data.prefetch,
        )
        with contextlib.closing(
            run_graph(
                graph,
                self._host_batches(),
                device=self._device,
                ahead=self._data.prefetch,
                describe=self._describe,
            )
        ) as running:
            for (images,), ids in running:
                yield EvaluationBatch(images=images, sample_ids=torch.from_numpy(ids))
                del images

    def close(self) -> None:
        """Nothing outlives a pass; here for the protocol."""

    def _host_batches(self) -> Iterator[HostBatch[NDArray[np.int64]]]:
        for start in range(0, len(self._ids), self._batch_size):
            ids = self._ids[start : start + self._batch_size]
            samples = self._dataset.samples[ids]
            starts, ends = central_windows(
                samples["height"],
                samples["width"],
                resize=self._data.evaluation_resize,
                crop=self._data.image_size,
            )
            encoded = [self._dataset.image_bytes(sample, verify=True) for sample in ids.tolist()]
            yield HostBatch(inputs=(encoded, starts, ends), facts=ids)

    def _describe(self, ids: NDArray[np.int64]) -> str:
        return _cannot_decode([self._dataset.describe(i) for i in ids.tolist()], where="evaluation")


def decoding_threads(threads: int) -> int:
    """Decoding threads of this rank: as given, or (0) its part of the cores it may run on."""
    if threads:
        return threads
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():  # else the launcher has bound this rank to its own part already
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores)


def _plan_source(dataset: PackedDataset, prompts: ClassPrompts, number: int) -> PlanSource:
    labels = np.arange(prompts.num_classes[number])
    return PlanSource(
        name=str(Path(dataset.folder)),
        samples=dataset.samples,
        labels=dataset.labels,
        num_templates=int(prompts.num_templates[number]),
        class_ids=prompts.classes_of(number, labels),
    )


def _cannot_decode(names: Sequence[str], *, where: str) -> str:
    return (
        f"{where}: a picture of this batch could not be decoded, though its bytes are those that "
        "were packed. The batch is " + "; ".join(names)
    )
