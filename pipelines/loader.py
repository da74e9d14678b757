"""From packed data sets to a trainer's batches, without end: plan, feed, graph, `Batch`.

Each chapter has its own place: `plan/` says what a step is fed, `feed/` reads it and replaces bad
samples, `graph.py` decodes it, `unicl_fast.objectives.targets` finds classes.
evaluation_loader.py shows each sample of one data set once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unicl_fast.augmentation import augmentations_of
from unicl_fast.batch import Batch
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.prompts import ClassPrompts

from .feed.bad_samples import BadSamples, find_undecodable, reason_of
from .feed.host_batches import HostBatches, TrainFacts, are_decoded, split_views
from .feed.text_block import unpack_integers
from .graph import (
    DecodingError,
    Images,
    Outputs,
    Pipeline,
    batches_ahead,
    build_train_graph,
    is_fused,
    run_graphs,
    run_without_graph,
    split_threads,
)
from .kernels.operators import parts_for
from .plan.plan import PlannedBatch, PlanSource, TrainPlan


class TrainLoader:
    """One rank's batches of a run; implements `unicl_fast.batch.Loader`.

    Batches are the same whatever step they are asked from, and the ranks' batches of one step join
    to the same global batch whatever their number. Bad samples are replaced, and change nothing
    else.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float] | None,
        prompts: ClassPrompts,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
    ) -> None:
        """Checks that the data can be planned and that the ranks can share a batch.

        Args:
            config: the run's.
            datasets: the data sets to train on, open; closing them is the caller's business.
            weights: each data set's part of every batch; None takes the numbers of samples.
            prompts: made of the same data sets in the same order.
            rank: number of this loader's local batch in a global batch.
            world_size: how many local batches there are.
            device: where images are decoded and batches lie.
            quarantine: the file that lists bad samples, shared by all ranks; None writes none.
        """
        data = config.data
        self._data = data
        self._rank = rank
        self._device = torch.device(device)
        self._running: Generator[Batch, None, None] | None = None
        self._images: Images = "files"
        if are_decoded(datasets):
            self._images = "crops" if is_fused(data.resample, self._device) else "pixels"
        augmentations = augmentations_of(data.augment, [dataset.place for dataset in datasets])
        self._augmentation = parts_for(augmentations, data.mean)
        self._bad = BadSamples(datasets, quarantine)
        self.plan = TrainPlan(
            [_plan_source(dataset, prompts, i) for i, dataset in enumerate(datasets)],
            data=data,
            global_batch_size=config.run.global_batch_size,
            seed=config.run.seed,
            weights=weights,
            augmentations=augmentations,
        )
        self.plan.batch(0, rank=rank, world_size=world_size)  # refuses what cannot be shared, now
        self._num_images = self.plan.num_views * (config.run.global_batch_size // world_size)
        self._host = HostBatches(
            config,
            list(datasets),
            prompts,
            self.plan,
            self._bad,
            rank=rank,
            world_size=world_size,
            images=self._images,
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ... without end.

        One iterator runs at a time: asking for another closes the one before.

        Raises:
            DecodingError: decoding fails, and no image is the cause.
            TooManyBadSamplesError: so many samples are bad that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        self.close()
        self._running = self._iterate(start_step)
        return self._running

    def host_batches(self, num_steps: int) -> Iterator[TrainFacts]:
        """Facts of the first steps, each read and not decoded: for measuring storage."""
        with self._host.reading_ahead(0), contextlib.closing(self._host.batches(0)) as batches:
            for batch in itertools.islice(batches, num_steps):
                yield batch.facts

    def close(self) -> None:
        """Stops decoding and frees its buffers; batches that are still held stay valid."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _iterate(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on; after a failure, again from the failed one with substitutes."""
        step = start_step
        while True:
            try:
                yield from self._decode(step)
            except DecodingError as error:
                # Not the error itself: through its traceback it would keep the dead graph alive
                # beside the one that looks for the cause.
                failed, reason = error.in_flight, reason_of(error)
            else:
                return
            step = failed[0].fed.step
            if self._images != "files":  # nothing is decoded, so no image is the cause
                raise DecodingError(f"step {step}, rank {self._rank}: the graph fails: {reason}")
            if not any(self._find_bad(facts.fed) for facts in failed):
                raise DecodingError(
                    f"step {step}, rank {self._rank}: decoding fails, though each image can be "
                    f"decoded alone: {reason}"
                )

    def _decode(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on, until there is one that cannot be decoded."""
        with (
            self._host.reading_ahead(start_step),
            contextlib.closing(self._run(start_step)) as running,
        ):
            for (images, integers), facts in running:
                first, second = split_views(images, num_views=self.plan.num_views)
                yield Batch(
                    step=facts.fed.step,
                    images=first,
                    second_images=second,
                    text_lengths=facts.text_lengths,
                    sample_ids=torch.from_numpy(facts.fed.sample_ids),
                    scheduled_ids=torch.from_numpy(facts.scheduled_ids),
                    source_ids=torch.from_numpy(facts.fed.source_ids.astype(np.int64)),
                    **unpack_integers(integers[: len(first)], num_texts=len(facts.text_lengths)),
                )
                del images, first, second, integers  # held here, their buffers could not be reused

    def _run(self, start_step: int) -> Outputs[TrainFacts]:
        """Images and integers of every batch, and its facts."""
        ahead = batches_ahead(self._data, self._num_images)
        if self._images == "crops" and self._augmentation is None:
            with contextlib.closing(self._host.crop_resizer()) as resizer:
                yield from run_without_graph(
                    partial(self._host.group, resizer),
                    itertools.count(start_step, resizer.batches_at_once),
                    workers=resizer.groups_at_once,
                    ahead=ahead + resizer.groups_at_once - 1,
                )
            return
        graphs = [
            self._graph(data, batch_size=self._num_images)
            for data in split_threads(self._data, self._device)
        ]
        with contextlib.closing(self._host.batches(start_step)) as host_batches:
            yield from run_graphs(graphs, host_batches, device=self._device, ahead=ahead)

    def _graph(self, data: DataConfig, *, batch_size: int) -> partial[Pipeline]:
        return partial(
            build_train_graph,
            data=data,
            batch_size=batch_size,
            device=self._device,
            images=self._images,
            augmentation=self._augmentation,
        )

    def _find_bad(self, failed: PlannedBatch) -> bool:
        """Finds what the decoder refuses of a batch; whether another is to be fed from now on."""
        batch = self._host.batch(failed.step)
        one = self._graph(dataclasses.replace(self._data, threads=1, prefetch=1), batch_size=1)
        fed = batch.facts.fed
        reasons = find_undecodable(one, batch.inputs, device=self._device)
        for row, reason in reasons.items():
            row %= len(fed.sample_ids)  # of the second view
            source, sample = int(fed.source_ids[row]), int(fed.sample_ids[row])
            self._bad.add(source, sample, f"the decoder refuses it: {reason}")
        return bool(reasons) or not np.array_equal(fed.sample_ids, failed.sample_ids)


def _plan_source(dataset: PackedDataset, prompts: ClassPrompts, number: int) -> PlanSource:
    labels = np.arange(prompts.num_classes[number])
    return PlanSource(
        name=dataset.place,
        samples=dataset.samples,
        labels=dataset.labels,
        num_templates=int(prompts.num_templates[number]),
        class_ids=prompts.classes_of(number, labels),
    )
