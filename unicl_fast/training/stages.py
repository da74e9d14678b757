"""Stages of a run (`run.stages`) in training: their loaders, one after the other, and a summary."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from unicl_fast.batch import Batch, Loader, ReadingTime
from unicl_fast.config import RunConfig, Stage
from unicl_fast.pipelines.plan.plan import TrainPlan
from unicl_fast.pipelines.steps import RankSteps
from unicl_fast.stages import Span
from unicl_fast.system.wording import count_of


class PlannedLoader(Loader, Protocol):
    """A loader whose batches follow a plan, which the ledger and the metrics read."""

    plan: TrainPlan
    reading: ReadingTime  # time that it waited for storage
    steps: RankSteps  # its steps without images, for a `FeatureLoader`


class StagedLoader:
    """Chains the loaders of stages. Its plan is the last stage's, which counts all epochs."""

    def __init__(self, loaders: Sequence[PlannedLoader], spans: Sequence[Span]) -> None:
        """Needs one loader for each span."""
        self._loaders, self._spans = list(loaders), list(spans)
        self.plan, self.reading = loaders[-1].plan, loaders[-1].reading
        for loader in loaders:
            loader.reading = self.reading

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yields all steps from `start_step` on; one loader at a time has decoders.

        The first batch of a stage is waited for: nothing is decoded ahead across stages.
        """
        self.close()
        for loader, span in zip(self._loaders, self._spans, strict=True):
            if span is self._spans[-1]:
                yield from loader.batches(max(start_step, span.first_step))
            elif start_step < span.end_step:
                first = max(start_step, span.first_step)
                yield from itertools.islice(loader.batches(first), span.end_step - first)
                loader.close()

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


def in_stages(loaders: Sequence[PlannedLoader], run: RunConfig) -> StagedLoader | PlannedLoader:
    """Joins the loaders of stages into the run's."""
    return StagedLoader(loaders, run.spans) if run.stages else loaders[0]


def describe_stage(stage: Stage) -> str:
    """Describes the images and texts of a stage, and its batches."""
    config, steps = stage.config, stage.span.end_step - stage.span.first_step
    crops = "{:g} to {:g}".format(*config.data.crop_scale)
    parts = [
        f"stage {stage.span.number + 1}, {count_of(steps, 'step')} of "
        f"{count_of(config.run.global_batch_size, 'image')} at {config.data.image_size} pixels",
        f"crops of {crops} of the area",
    ]
    if config.objective.uses_texts:
        parts.append(f"texts of up to {count_of(config.model.context_length, 'token')}")
    if size := config.efficiency.micro_batch_size:
        parts.append(f"{count_of(size, 'image')} at once")
    return ", ".join(parts)
