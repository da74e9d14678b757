"""The user's run on the bench: built as `unicl-pretrain` builds it, then taken apart.

`Bench` holds the trainer and the loader of a run, and measures them alone and together. A changed
setting is another loader (`new_loader`) or another trainer (`other_trainer`) on the same data.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import free_memory, usable_cores
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.build import build_trainer
from unicl_fast.training.data import longest_text
from unicl_fast.training.memory_plan import plan as plan_memory
from unicl_fast.training.observers import Checkpoints, WeightsAgree
from unicl_fast.training.trainer import Trainer

from ..harness import wait_for_gpu
from ..step.parts import StepInParts
from .clocks import TimedLoader, flow, median, repeated
from .loader_parts import FIRST_STEP, LoaderParts, batches_begun
from .model import COPY, Checkpointing, Cost, Stage

_LARGEST_BATCH = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The data, its weights and its prompts, of which a loader is built."""

    datasets: Sequence[PackedDataset]
    weights: Sequence[float] | None
    prompts: ClassPrompts


class Bench:
    """One rank of a run, ready to be measured."""

    def __init__(
        self, config: TrainConfig, *, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        """Builds data, loader and trainer. Raises as `unicl-pretrain` does."""
        # Evaluations are no part of a step. A run in stages is measured by its own settings, those
        # of the last stage.
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, evaluate=()),
            run=dataclasses.replace(config.run, stages=()),
        )
        require(
            not config.efficiency.image_features,
            "unicl-bench measures runs that decode and encode images: leave "
            "efficiency.image_features out",
        )
        self.ranks, self.device, self.folder = ranks, device, folder
        self.free_bytes = min(gather_integers(free_memory(device), ranks))
        built: list[TrainLoader] = []

        def build_loader(
            config: TrainConfig,
            datasets: Sequence[PackedDataset],
            weights: Sequence[float] | None,
            prompts: ClassPrompts,
            **more: Any,
        ) -> TrainLoader:
            self.parts = Parts(datasets, weights, prompts)
            self.data_config = config
            built.append(TrainLoader(config, datasets, weights, prompts, **more))
            return built[0]

        self.trainer = build_trainer(
            config,
            run_folder=folder,
            build_loader=build_loader,
            evaluate=lambda *_, **__: {},
            ranks=ranks,
            device=device,
            progress=False,
        )
        # each rank takes the parts of a step by itself (`step_stages`), after which weights differ
        self.trainer.observers = [
            one for one in self.trainer.observers if not isinstance(one, WeightsAgree)
        ]
        (self.loader,) = built
        self.config = dataclasses.replace(self.trainer.config, data=self.data_config.data)
        self.timed_loader = TimedLoader(self.trainer.loader)
        self.trainer.loader = self.timed_loader
        self.local_batch = ranks.local_batch_size(config.run.global_batch_size)
        self.loader_parts = LoaderParts(
            self.loader,
            self.parts.datasets,
            self.data_config.data,
            ranks=ranks,
            local_batch=self.local_batch,
            device=device,
        )
        self.process = os.getpid()
        # ranks of this machine share its cores
        self.cores = usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def close(self) -> None:
        """Closes the loader and the data."""
        self.loader.close()
        for dataset in self.parts.datasets:
            dataset.close()

    def changed(self, changes: dict[str, dict[str, Any]]) -> TrainConfig:
        """The run's config with changes of its groups."""
        groups = {
            group: dataclasses.replace(getattr(self.config, group), **fields)
            for group, fields in changes.items()
        }
        return dataclasses.replace(self.config, **groups)

    # The loader.

    def new_loader(self, config: TrainConfig, parts: Parts | None = None) -> TrainLoader:
        """The loader of this rank with other settings or other data."""
        parts = parts or self.parts
        return TrainLoader(
            config,
            parts.datasets,
            parts.weights,
            parts.prompts,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.device,
        )

    def meet(self) -> None:
        """Waits for the other ranks, so that all measure the same at the same time."""
        gather_integers(0, self.ranks)

    def loader_cost(self, loader: TrainLoader, config: TrainConfig, *, seconds: float) -> Cost:
        """The loader alone, drained."""
        self.meet()
        images = self.ranks.local_batch_size(config.run.global_batch_size)
        batches = (batch.step for batch in loader.batches(FIRST_STEP))
        skip = batches_begun(config.data, images, self.device)
        try:
            return flow(batches, images=images, skip=skip, seconds=seconds)
        finally:
            loader.close()

    def kept_batch(self, loader: TrainLoader) -> Batch:
        """A batch on the device that outlives the loader's buffers."""
        try:
            return copy.deepcopy(next(iter(loader.batches(FIRST_STEP)))).to(self.device)
        finally:
            loader.close()

    # The step.

    def step_stages(self, batch: Batch, *, rounds: int) -> list[Stage]:
        """The parts of a step; none where micro-batches or an objective without texts split it.

        Nor are there any where labels are mixed.
        """
        config, objective = self.trainer.config, self.trainer.config.objective
        micro = 0 < config.efficiency.micro_batch_size < self.local_batch
        if micro or not objective.uses_texts or objective.mixes:
            return []
        step = StepInParts(self.trainer, batch)
        step.take()
        wall: dict[str, list[Cost]] = {}
        for _ in range(rounds):
            seconds = step.take()
            for name, cpu in step.cpu_seconds.items():
                cost = Cost(wall=seconds[name] / self.local_batch, cpu=cpu / self.local_batch)
                wall.setdefault(name, []).append(cost)
        self.trainer.optimizer.zero_grad()
        return [Stage(name=name, cost=median(costs), side="step") for name, costs in wall.items()]

    def copy_stage(self) -> Stage | None:
        """The copy of a batch to a GPU; None on a CPU."""
        if self.device.type == "cpu":
            return None
        batch = self.kept_batch(self.loader).to(torch.device("cpu"))
        cost = repeated(lambda: batch.to(self.device), images=self.local_batch, count=8)
        return Stage(name=COPY, cost=cost, side="between")

    def collectives(self) -> Stage | None:
        """The sum of all gradients over the ranks; None for one rank."""
        if self.ranks.world_size == 1:
            return None
        size = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        gradient = torch.zeros(size, device=self.device)
        work = functools.partial(torch.distributed.all_reduce, gradient)
        work()
        cost = repeated(work, images=self.local_batch, count=3)
        return Stage(name="collectives", cost=cost, side="step", note=f"{size:,} gradients")

    def other_trainer(self, config: TrainConfig, batch: Batch) -> Trainer:
        """A trainer with other settings, on a kept batch. Raises as a run does."""
        loader = ListLoader([batch])
        return make_trainer(config, loader, ranks=self.ranks, device=self.device, progress=False)

    def largest_batch(self) -> int:
        """The largest local batch, a power of two, that fits by the memory plan; 0 if none does."""
        text = longest_text(self.parts.datasets, self.parts.prompts)
        largest, batch = 0, 1
        while batch <= _LARGEST_BATCH:
            config = self.changed({"run": {"global_batch_size": batch * self.ranks.world_size}})
            found = plan_memory(
                config,
                world_size=self.ranks.world_size,
                device_bytes=self.free_bytes,
                device_type=self.device.type,
                longest_text=text,
            )
            if not found.fits:
                break
            largest, batch = batch, 2 * batch
        return largest

    # Together.

    def whole(self, steps: int, *, loader_may_limit: bool = True) -> Cost:
        """The cost of an image in the trainer's own loop, checkpoints and log included.

        The first steps are not timed: where the loader may limit the run, as many as there are
        batches that it makes ahead.
        """
        self.meet()
        images = self.loader.num_images
        skip = batches_begun(self.data_config.data, images, self.device) if loader_may_limit else 2
        trainer, moments = self.trainer, self.timed_loader.moments
        moments.clear()
        trainer.total_steps = trainer.step + skip + steps + 1
        try:
            trainer.fit()
        finally:
            self.loader.close()
        (first, cpu), (last, last_cpu) = moments[skip], moments[-1]
        count = (len(moments) - 1 - skip) * self.local_batch
        return Cost(wall=(last - first) / count, cpu=(last_cpu - cpu) / count)

    def checkpointing(self) -> Checkpointing:
        """Writes a checkpoint, and then another as a run does, without training."""
        trainer = self.trainer
        trainer.save()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.save(required=False)
        blocking = time.perf_counter() - wall
        for observer in trainer.observers:
            if isinstance(observer, Checkpoints):
                observer.finish_writing()
        writing = time.perf_counter() - wall
        cpu = time.process_time() - cpu
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in found[-1].iterdir()) if found else 0
        return Checkpointing(
            blocking_seconds=blocking,
            writing_seconds=writing,
            writing_cpu_seconds=max(0.0, cpu),
            num_bytes=size,
            every_steps=self.config.checkpoint.every_steps,
        )


def step_cost(trainer: Trainer, batch: Batch, *, count: int) -> Cost:
    """The step alone, on one batch that is kept; an image of a rank."""
    return repeated(lambda: trainer.train_step(batch), images=batch.batch_size, count=count)


def steps_within(trainer: Trainer, batch: Batch, seconds: float, *, most: int = 200) -> int:
    """Steps that take so long, agreed by all ranks; takes two to find out."""
    trainer.train_step(batch)
    wait_for_gpu()
    one = step_cost(trainer, batch, count=1).wall * batch.batch_size
    return int(from_rank_0(max(1, min(most, round(seconds / one))), trainer.ranks))
