"""From packed data sets to a trainer's batches: plan, read, decode, hand over; without end.

Thin: what a step holds is the plan's, pixels are the graph's, classes are `unicl_fast.targets`',
running it all ahead of the step is feed.py's, and what is fed instead of a bad sample is
bad_samples.py's. evaluation_loader.py shows each sample of one data set once.
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
from numpy.typing import NDArray

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.pipelines.bad_samples import BadSamples
from unicl_fast.pipelines.culprits import find_undecodable, reason_of
from unicl_fast.pipelines.feed import (
    DecodingError,
    HostBatch,
    Outputs,
    run_graph,
    run_without_graph,
)
from unicl_fast.pipelines.graph import (
    Pictures,
    Pipeline,
    build_train_graph,
    decoding_threads,
    is_fused,
)
from unicl_fast.pipelines.integer_block import pack_integers, unpack_integers
from unicl_fast.pipelines.plan import PlannedBatch, PlanSource, TrainPlan, split_steps
from unicl_fast.pipelines.raw_pictures import SquareMaker, are_decoded
from unicl_fast.pipelines.texts import gather_texts
from unicl_fast.prompts import ClassPrompts
from unicl_fast.shards import PackedDataset
from unicl_fast.targets import map_steps

_PLANNED_AT_ONCE = 4096
"""Samples whose plan and texts are made in one go: a megabyte of memory, a few milliseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A step as long as nothing is bad: all of it but the pictures."""

    batch: PlannedBatch
    integers: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _TrainFacts:
    """What the host knows of a batch that is being decoded."""

    fed: PlannedBatch
    """With substitutes in the places of bad samples."""
    scheduled_ids: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


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
        shares: Sequence[float] | None,
        prompts: ClassPrompts,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
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
            quarantine: the file that lists bad samples, shared by all ranks; None writes none.
        """
        self._config = config
        self._datasets = list(datasets)
        self._prompts = prompts
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device)
        self._running: Generator[Batch, None, None] | None = None
        self._batch_size = config.run.global_batch_size // world_size
        self._pictures: Pictures = "files"
        if are_decoded(self._datasets):
            fused = is_fused(config.data.resample, self._device)
            self._pictures = "squares" if fused else "pixels"
        self._bad = BadSamples(self._datasets, quarantine)
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

        Raises:
            DecodingError: decoding fails, and no picture is to blame.
            TooManyBadSamplesError: so many samples are bad that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
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
        step = start_step
        while True:
            try:
                yield from self._decode(step)
            except DecodingError as error:
                # Not the error itself: through its traceback it would keep the dead graph alive
                # beside the one that looks for the culprits.
                failed, reason = error.in_flight, reason_of(error)
            else:
                return
            step = failed[0].fed.step
            if self._pictures != "files":  # nothing is decoded, so no picture is to blame
                raise DecodingError(f"step {step}, rank {self._rank}: the graph fails: {reason}")
            if not any(self._blame(facts.fed) for facts in failed):
                raise DecodingError(
                    f"step {step}, rank {self._rank}: decoding fails, though each picture can be "
                    f"decoded alone: {reason}"
                )

    def _graph(self, *, batch_size: int, threads: int, prefetch: int) -> partial[Pipeline]:
        return partial(
            build_train_graph,
            batch_size=batch_size,
            image_size=self._config.data.image_size,
            interpolation=self._config.data.interpolation,
            resample=self._config.data.resample,
            device=self._device,
            threads=threads,
            prefetch=prefetch,
            pictures=self._pictures,
        )

    def _decode(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on, until there is one that cannot be decoded."""
        with contextlib.closing(self._run(start_step)) as running:
            for (images, integers), facts in running:
                yield Batch(
                    step=facts.fed.step,
                    images=images,
                    text_lengths=facts.text_lengths,
                    sample_ids=torch.from_numpy(facts.fed.sample_ids),
                    scheduled_ids=torch.from_numpy(facts.scheduled_ids),
                    source_ids=torch.from_numpy(facts.fed.source_ids.astype(np.int64)),
                    **unpack_integers(integers, num_texts=len(facts.text_lengths)),
                )
                del images, integers  # held here, their buffers could not be reused

    def _run(self, start_step: int) -> Outputs[_TrainFacts]:
        """Pictures and integers of every batch, and what the host knows of it."""
        data = self._config.data
        if self._pictures == "squares":  # and nothing follows
            with contextlib.closing(self._square_maker()) as maker:
                yield from run_without_graph(
                    partial(self._host_group, maker),
                    itertools.count(start_step, maker.batches_at_once),
                    workers=maker.groups_at_once,
                    ahead=data.prefetch + maker.groups_at_once - 1,
                )
            return
        graph = self._graph(
            batch_size=self._batch_size,
            threads=decoding_threads(data.threads),
            prefetch=data.prefetch,
        )
        with contextlib.closing(self._host_batches(start_step)) as host_batches:
            yield from run_graph(graph, host_batches, device=self._device, ahead=data.prefetch)

    def _blame(self, failed: PlannedBatch) -> bool:
        """Finds what the decoder refuses of a batch; whether another is to be fed from now on."""
        batch = next(self._host_batches(failed.step))
        one = self._graph(batch_size=1, threads=1, prefetch=1)
        reasons = find_undecodable(one, batch.inputs, device=self._device)
        fed = batch.facts.fed
        for place, reason in reasons.items():
            self._bad.add(
                int(fed.source_ids[place]),
                int(fed.sample_ids[place]),
                f"the decoder refuses it: {reason}",
            )
        return bool(reasons) or not np.array_equal(fed.sample_ids, failed.sample_ids)

    def _host_batches(self, start_step: int) -> Generator[HostBatch[_TrainFacts], None, None]:
        """What goes into the graph at each step, pictures as files or pixels."""
        count = max(1, _PLANNED_AT_ONCE // self._batch_size)
        firsts = itertools.count(start_step, count)
        for planned in itertools.chain.from_iterable(
            self._plan_steps(first, count) for first in firsts
        ):
            self._check_arrays()
            if self._pictures == "files":
                fed, pictures = self._bad.read_batch(self.plan, planned.batch)
            else:
                (fed,), pictures = self._bad.read_pixels(self.plan, [planned.batch])
            windows = fed.window_starts, fed.window_shapes, fed.flips[:, None]
            integers, facts = self._without_pictures(planned, fed)
            yield HostBatch(inputs=(pictures, *windows, integers), facts=facts)

    def _host_group(self, maker: SquareMaker, first_step: int) -> list[HostBatch[_TrainFacts]]:
        """Squares and integers of some steps; in any thread."""
        planned = self._plan_steps(first_step, maker.batches_at_once)
        fed, pixels = self._bad.read_pixels(self.plan, [step.batch for step in planned])
        group = []
        for step, fed_batch, squares in zip(planned, fed, maker.make(pixels, fed), strict=True):
            integers, facts = self._without_pictures(step, fed_batch)
            group.append(HostBatch(inputs=(squares, integers), facts=facts))
        return group

    def _square_maker(self) -> SquareMaker:
        data, shape = self._config.data, self._datasets[0].picture_shape
        assert shape is not None
        return SquareMaker(
            batch_size=self._batch_size,
            picture_shape=shape,
            image_size=data.image_size,
            interpolation=data.interpolation,
            threads=decoding_threads(data.threads),
        )

    def _plan_steps(self, first: int, count: int) -> list[_Planned]:
        """Some steps without their pictures, made in one go."""
        self._check_arrays()
        size = self._batch_size
        long = self.plan.long_batch(first, count, rank=self._rank, world_size=self._world_size)
        # A rank's own texts are enough: a text with a label is always a prompt, and captions equal
        # to a prompt are found by look-up, so no other rank's labels can change a class here.
        targets = map_steps(*self._texts_of(long), self._prompts, size=size)
        steps = split_steps(long, count, global_batch_size=self.plan.global_batch_size)
        context_length = self._config.model.context_length
        integers = pack_integers(targets, steps[0].slots, context_length=context_length)
        starts = range(0, count * size, size)
        return [
            _Planned(
                batch=batch,
                integers=integers[start : start + size],
                text_lengths=targets.text_lengths[start : start + num_texts],
            )
            for batch, start, num_texts in zip(
                steps, starts, targets.num_texts.tolist(), strict=True
            )
        ]

    def _without_pictures(
        self, planned: _Planned, fed: PlannedBatch
    ) -> tuple[NDArray[np.int64], _TrainFacts]:
        """The integers of a step, and what the host knows of it."""
        integers, text_lengths = planned.integers, planned.text_lengths
        if fed is not planned.batch:  # substitutes come with texts of their own
            targets = map_steps(*self._texts_of(fed), self._prompts, size=len(fed.slots))
            context_length = self._config.model.context_length
            integers = pack_integers(targets, fed.slots, context_length=context_length)
            text_lengths = targets.text_lengths[: targets.num_texts[0]]
        return integers, _TrainFacts(
            fed=fed, scheduled_ids=planned.batch.sample_ids, text_lengths=text_lengths
        )

    def _texts_of(self, planned: PlannedBatch) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        return gather_texts(
            planned,
            self._datasets,
            self._prompts,
            context_length=self._config.model.context_length,
        )

    def _check_arrays(self) -> None:
        for dataset in self._datasets:
            dataset.check_arrays()


def _plan_source(dataset: PackedDataset, prompts: ClassPrompts, number: int) -> PlanSource:
    labels = np.arange(prompts.num_classes[number])
    return PlanSource(
        name=str(Path(dataset.folder)),
        samples=dataset.samples,
        labels=dataset.labels,
        num_templates=int(prompts.num_templates[number]),
        class_ids=prompts.classes_of(number, labels),
    )
