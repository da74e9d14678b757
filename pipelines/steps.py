"""One rank's steps, all but their images: samples, texts, targets, and substitutes for bad samples.

Plans and texts of many steps are made together, because calling NumPy costs more than a small batch
does.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch, Targets, Texts
from unicl_fast.config import DataConfig, ModelConfig, RunConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.weights import are_equal
from unicl_fast.objectives.objective import Objective
from unicl_fast.text.prompts import ClassPrompts

from .plan.plan import PlannedBatch, TrainPlan, split_steps
from .read.ahead import READ_AHEAD, reading_ahead
from .read.bad_samples import BadSamples
from .texts import gather_labels, gather_texts

_PLANNED_AT_ONCE = 4096
"""Samples whose plan and texts are made together: a megabyte of memory, a few milliseconds."""
_SCHEDULED_AT_ONCE = 128
"""Samples whose blocks are requested together, if data sets lie under a URL."""


class LoaderSettings(Protocol):
    """The groups of a run's config that its loader needs; a `TrainConfig` has them."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def run(self) -> RunConfig: ...


class PlannedStep(NamedTuple):
    """A step without its images, as planned: nothing is replaced yet."""

    batch: PlannedBatch
    texts: Texts
    targets: Targets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetadata:
    """Everything in a training batch except its images."""

    actual: PlannedBatch
    """The samples of the batch: the plan, with substitutes for bad samples."""
    scheduled_ids: NDArray[np.int64]
    texts: Texts
    targets: Targets
    weights: NDArray[np.float32] | None
    """Each sample's weight in the loss [b]; None if all are equal."""

    def with_images(self, images: Tensor) -> Batch:
        """The whole batch, of images uint8 [b h w c] or features [b w].

        Everything goes to the device of the images, if that is a GPU.
        """
        actual = self.actual
        batch = Batch(
            step=actual.step,
            images=images,
            texts=self.texts,
            targets=self.targets,
            weights=None if self.weights is None else torch.from_numpy(self.weights),
            global_index=torch.from_numpy(actual.global_index),
            sample_ids=torch.from_numpy(actual.sample_ids),
            scheduled_ids=torch.from_numpy(self.scheduled_ids),
            source_ids=torch.from_numpy(actual.source_ids.astype(np.int64)),
        )
        return batch.to(images.device) if images.is_cuda else batch


class RankSteps:
    """Plans this rank's steps, maps their texts and targets, and knows which samples are bad."""

    def __init__(
        self,
        config: LoaderSettings,
        datasets: Sequence[PackedDataset],
        prompts: ClassPrompts,
        plan: TrainPlan,
        *,
        rank: int,
        world_size: int,
        quarantine: Path | None,
    ) -> None:
        """Takes the arguments of `TrainLoader`, and the plan of its run.

        Raises ValueError: the ranks cannot share a global batch.
        """
        self.datasets, self.plan = list(datasets), plan
        self.bad = BadSamples(datasets, plan, quarantine)
        """The samples that are replaced."""
        self._prompts, self._objective = prompts, config.objective
        self._context_length = config.model.context_length
        self._ranks = {"rank": rank, "world_size": world_size}
        self.batch_size = plan.global_batch_size // world_size
        """Samples of a local batch."""
        self.at_once = max(1, _PLANNED_AT_ONCE // self.batch_size)
        """Steps that are planned together."""
        self._classes_of_labels = [
            prompts.classes_of(number, np.arange(num_classes))
            for number, num_classes in enumerate(prompts.num_classes)
        ]
        weights = [dataset.weights for dataset in datasets]
        is_weighted = config.data.sample_weights == "loss" and not are_equal(weights)
        self._weights = weights if is_weighted else None
        self._follow: Callable[[int], None] = lambda step: None
        self._planning, self._planned_ahead = threading.Lock(), dict[int, PlannedStep]()
        plan.batch(0, **self._ranks)  # fails early if ranks cannot share a batch

    @contextlib.contextmanager
    def reading_ahead(self, start_step: int) -> Iterator[None]:
        """Within this context, samples under a URL are fetched before their turn."""
        count = max(1, _SCHEDULED_AT_ONCE // self.batch_size)
        with reading_ahead(
            self.datasets,
            lambda chunk: self.plan.schedule(start_step + chunk * count, count, **self._ranks),
            num_chunks=-(-READ_AHEAD // (count * self.plan.global_batch_size)),
        ) as follow:
            self._follow = lambda step: follow((step - start_step) // count)
            yield

    def begin(self, step: int) -> None:
        """Announces that the images of a step are about to be read; from any thread.

        Raises DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        self._check_arrays()
        self._follow(step)

    def plan_steps(self, first: int, count: int) -> list[PlannedStep]:
        """Plans `count` steps from `first` on, with their texts and targets."""
        self._check_arrays()
        long = self.plan.long_batch(first, count, **self._ranks)
        batches = split_steps(long, count, global_batch_size=self.plan.global_batch_size)
        parts = zip(batches, self._texts_of(long), strict=True)
        return [PlannedStep(batch, *texts_and_targets) for batch, texts_and_targets in parts]

    def take_planned(self, first: int, count: int) -> list[PlannedStep]:
        """As `plan_steps`, but several threads share one long plan; they come nearly in order."""
        with self._planning:
            if not self._planned_ahead.keys() >= set(range(first, first + count)):
                steps = self.plan_steps(first, max(count, self.at_once))
                self._planned_ahead = dict(enumerate(steps, first))
            return [self._planned_ahead.pop(step) for step in range(first, first + count)]

    def metadata_of(self, step: PlannedStep, actual: PlannedBatch) -> TrainMetadata:
        """The metadata of a step; `actual` is its plan with substitutes."""
        _, texts, targets = step
        if actual is not step.batch:  # substitutes bring their own texts and labels
            ((texts, targets),) = self._texts_of(actual)
        weights = self._weights_of(actual)
        if weights is not None:
            sums = np.bincount(texts.index.numpy(), weights, len(texts.tokens)).astype(np.float32)
            texts = dataclasses.replace(texts, weights=torch.from_numpy(sums))
        return TrainMetadata(
            actual=actual, scheduled_ids=step.batch.sample_ids, texts=texts, targets=targets,
            weights=weights,
        )  # fmt: skip

    def _weights_of(self, planned: PlannedBatch) -> NDArray[np.float32] | None:
        """The weight of each sample in the loss [b]; None if all are equal."""
        if self._weights is None:
            return None
        found = np.ones(len(planned.sample_ids), np.float32)
        for number, weights in enumerate(self._weights):
            mine = planned.source_ids == number
            if weights is not None:
                found[mine] = weights[planned.sample_ids[mine]]
        return found

    def _texts_of(self, planned: PlannedBatch) -> list[tuple[Texts, Targets]]:
        """Texts and targets of some steps.

        A rank's own texts are enough: a text with a label is always a prompt, and a caption that
        equals a prompt is found by look-up, so no other rank's labels can change a class here.
        """
        rows, labels = gather_texts(
            planned, self.datasets, self._prompts, context_length=self._context_length
        )
        steps = self._objective.map_targets(
            rows,
            labels,
            self._prompts,
            size=self.batch_size,
            all_labels=lambda: gather_labels(planned, self.datasets, self._classes_of_labels),
        )
        return [targets.tensors() for targets in steps]

    def _check_arrays(self) -> None:
        for dataset in self.datasets:
            dataset.check_arrays()
