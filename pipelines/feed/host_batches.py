"""What the host prepares of each step, in one thread: plan, texts, bytes.

Numbers and texts are made for many steps in one go, since calling NumPy costs more than small
batches do; images are read step by step, or, where they are decoded already, some steps at once
(raw_images.py). Decoding, and what a batch looks like in the end, are the loader's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.objectives.targets import TargetSteps, map_steps
from unicl_fast.text.prompts import ClassPrompts

from ..graph.graph import Images, decoding_threads
from ..plan.plan import PlannedBatch, TrainPlan, split_steps
from .bad_samples import BadSamples
from .feed import HostBatch
from .raw_images import CropResizer
from .read_ahead import ReadAhead, blocks_of_half_the_cache
from .text_block import pack_integers
from .texts import gather_texts
from .views import graph_inputs, square_inputs

_PLANNED_AT_ONCE = 4096
"""Samples whose plan and texts are made in one go: a megabyte of memory, a few milliseconds."""
_LOOKED_AT_TOGETHER = 128
"""Samples whose blocks are asked for in one go, where data sets lie under a URL."""


def steps_at_once(batch_size: int) -> int:
    """Steps that are planned together."""
    return max(1, _PLANNED_AT_ONCE // batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainFacts:
    """What the host knows of a batch that is being decoded."""

    fed: PlannedBatch
    """With substitutes in the places of bad samples."""
    scheduled_ids: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A step as long as nothing is bad: all of it but the images."""

    batch: PlannedBatch
    integers: NDArray[np.int64]
    text_lengths: NDArray[np.int64]


class HostBatches:
    """One rank's steps, as they go into the graph."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: Sequence[PackedDataset],
        prompts: ClassPrompts,
        plan: TrainPlan,
        bad: BadSamples,
        *,
        rank: int,
        world_size: int,
        images: Images,
    ) -> None:
        """As for `loader.TrainLoader`; `images` as for `graph.build_train_graph`."""
        self._config = config
        self._datasets = datasets
        self._prompts = prompts
        self._plan = plan
        self._bad = bad
        self._rank = rank
        self._world_size = world_size
        self._images = images
        self._batch_size = config.run.global_batch_size // world_size
        self._ahead: ReadAhead | None = None
        self._steps_of_stretch = max(1, _LOOKED_AT_TOGETHER // self._batch_size)

    @contextlib.contextmanager
    def reading_ahead(self, start_step: int) -> Iterator[None]:
        """Around a run of steps from one on: what lies under a URL is fetched before its turn."""
        config = self._config
        if not config.data.read_ahead or all(one.remote is None for one in self._datasets):
            yield
            return
        at_once = self._steps_of_stretch

        def draws(stretch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
            return self._plan.schedule(
                stretch * at_once, at_once, rank=self._rank, world_size=self._world_size
            )

        samples = at_once * config.run.global_batch_size
        self._ahead = ReadAhead(
            self._datasets,
            draws,
            start=start_step // at_once,
            stretches=-(-config.data.read_ahead // samples),
            most_blocks=blocks_of_half_the_cache(self._datasets),
        )
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def batches(self, start_step: int) -> Generator[HostBatch[TrainFacts], None, None]:
        """Every step from one on."""
        if self._images != "squares":
            count = steps_at_once(self._batch_size)
            for first in itertools.count(start_step, count):
                yield from map(self._with_images, self._plan_steps(first, count))
        with contextlib.closing(self.crop_resizer()) as maker:
            for first in itertools.count(start_step, maker.batches_at_once):
                yield from self.group(maker, first)

    def batch(self, step: int) -> HostBatch[TrainFacts]:
        """One step, of files or pixels."""
        return self._with_images(*self._plan_steps(step, 1))

    def group(self, maker: CropResizer, first_step: int) -> list[HostBatch[TrainFacts]]:
        """Some steps with squares instead of images; in any thread."""
        planned = self._plan_steps(first_step, maker.batches_at_once)
        self._follow(first_step)
        fed, pixels = self._bad.read_pixels(self._plan, [step.batch for step in planned])
        squares = [
            maker.make(pixels, [batch.cuts(view) for batch in fed])
            for view in range(self._plan.num_views)
        ]
        group = []
        for step, batch, *views in zip(planned, fed, *squares, strict=True):
            integers, facts = self._without_images(step, batch)
            group.append(HostBatch(inputs=square_inputs(batch, views, integers), facts=facts))
        return group

    def crop_resizer(self) -> CropResizer:
        """What `group` takes; to be closed."""
        data, shape = self._config.data, self._datasets[0].image_shape
        assert shape is not None
        return CropResizer(
            batch_size=self._batch_size,
            image_shape=shape,
            image_size=data.image_size,
            interpolation=data.interpolation,
            threads=decoding_threads(data.threads),
        )

    def _with_images(self, planned: _Planned) -> HostBatch[TrainFacts]:
        """A step with its images as files or pixels."""
        self._check_arrays()
        self._follow(planned.batch.step)
        images: Any
        if self._images == "files":
            fed, images = self._bad.read_batch(self._plan, planned.batch)
        else:
            (fed,), images = self._bad.read_pixels(self._plan, [planned.batch])
        integers, facts = self._without_images(planned, fed)
        return HostBatch(inputs=graph_inputs(fed, images, integers), facts=facts)

    def _follow(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead.follow(step // self._steps_of_stretch)

    def _plan_steps(self, first: int, count: int) -> list[_Planned]:
        """Some steps without their images, made in one go."""
        self._check_arrays()
        size = self._batch_size
        long = self._plan.long_batch(first, count, rank=self._rank, world_size=self._world_size)
        # A rank's own texts are enough: a text with a label is always a prompt, and captions equal
        # to a prompt are found by look-up, so no other rank's labels can change a class here.
        targets = self._targets_of(long)
        steps = split_steps(long, count, global_batch_size=self._plan.global_batch_size)
        context_length = self._config.model.context_length
        integers = pack_integers(targets, steps[0].global_index, context_length=context_length)
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

    def _without_images(
        self, planned: _Planned, fed: PlannedBatch
    ) -> tuple[NDArray[np.int64], TrainFacts]:
        """The integers of a step, and what the host knows of it."""
        integers, text_lengths = planned.integers, planned.text_lengths
        if fed is not planned.batch:  # substitutes come with texts of their own
            targets = self._targets_of(fed)
            context_length = self._config.model.context_length
            integers = pack_integers(targets, fed.global_index, context_length=context_length)
            text_lengths = targets.text_lengths[: targets.num_texts[0]]
        return integers, TrainFacts(
            fed=fed, scheduled_ids=planned.batch.sample_ids, text_lengths=text_lengths
        )

    def _targets_of(self, planned: PlannedBatch) -> TargetSteps:
        """Of some steps; what their samples' classes are is the objective's to say."""
        rows, labels = gather_texts(
            planned,
            self._datasets,
            self._prompts,
            context_length=self._config.model.context_length,
        )
        if self._config.objective.name == "clip":  # a text is its own class
            return map_steps(rows, np.full_like(labels, -1), None, size=self._batch_size)
        return map_steps(rows, labels, self._prompts, size=self._batch_size)

    def _check_arrays(self) -> None:
        for dataset in self._datasets:
            dataset.check_arrays()
