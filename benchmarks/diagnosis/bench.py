"""The user's run on the bench: built as `unicl-pretrain` builds it, to be measured in turns.

A changed setting is a `Contestant` with another loader or trainer on the same data.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.objectives.text_columns import asked_ahead
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import free_memory, usable_cores
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.build import build_trainer
from unicl_fast.training.data import longest_text
from unicl_fast.training.memory_plan import MemoryPlan
from unicl_fast.training.memory_plan import plan as plan_memory
from unicl_fast.training.step_clock import Part, StepClock
from unicl_fast.training.trainer import Trainer

from ..harness import timed, wait_for_gpu
from ..step.parts import StepInParts
from .model import Change, Cost, Stage, median

FIRST_STEP = 1
"""The first step of a run draws a contact sheet, which no other does."""
_LARGEST_BATCH = 1 << 16
_WAITS = 0.5
"""A step that waits for its batch for more than this part of the time has no queue before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """The run as it is, or with a change."""

    trainer: Trainer
    loader: TrainLoader
    batches: Iterator[Batch]
    """Keep coming between turns: a loader that starts anew would have to fill its queues again."""
    local_batch: int
    compute_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Some steps of loader and trainer together."""

    steps: int
    cost: Cost
    parts: dict[Part, float]
    """Seconds by the trainer's own names of its parts."""
    reading: float
    """Seconds in which a thread of the loader waited for storage."""


class Bench:
    """One rank of a run, ready to be measured."""

    def __init__(
        self, config: TrainConfig, *, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        """Builds data, loader and trainer. Raises as `unicl-pretrain` does."""
        # a run in stages is measured by its own settings, those of the last stage
        config = config.changed(
            run={"stages": ()}, data={"evaluate": (), "cache_folder": str(folder / "cache")}
        )
        require(
            not config.efficiency.image_features,
            "unicl-bench measures runs that decode and encode images: leave "
            "efficiency.image_features out",
        )
        self.ranks, self.device = ranks, device
        self.free_bytes = min(gather_integers(free_memory(device), ranks))
        self.parts: dict[str, Any] = {}
        """The arguments of the loader besides the config."""

        def build_loader(config: TrainConfig, **parts: Any) -> TrainLoader:
            self.parts = parts
            self.loader = TrainLoader(config, **parts)
            return self.loader

        trainer = build_trainer(
            config,
            run_folder=folder / "run",
            build_loader=build_loader,
            evaluate=lambda model, **_: {},
            ranks=ranks,
            device=device,
            progress=False,
        )
        self.config = trainer.config
        self.local_batch = ranks.local_batch_size(config.run.global_batch_size)
        # ranks of this machine share its cores
        self.cores = usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.now = Contestant(
            trainer=trainer,
            loader=self.loader,
            batches=self.loader.batches(FIRST_STEP),
            local_batch=self.local_batch,
            compute_threads=torch.get_num_threads(),
        )

    def close(self) -> None:
        self.loader.close()
        for dataset in self.parts["datasets"]:
            dataset.close()

    @contextlib.contextmanager
    def changed(self, change: Change) -> Iterator[Contestant]:
        """The run with a change.

        Raises:
            ValueError: settings that a run would refuse, or that need more memory than there is.
        """
        config, now = change.applied_to(self.config), self.now
        loader, batches, trainer = now.loader, now.batches, now.trainer
        if change.side in ("step", "both"):
            plan = self._plan(config, free_memory(self.device))
            require(
                plan.fits, f"it takes {plan.total / 1e9:.1f} GB next to the run's own model, of "
                f"{plan.device_bytes / 1e9:.1f} that are free",
            )  # fmt: skip
            feed = ListLoader([self.kept_batch()])
            trainer = make_trainer(
                config, feed, ranks=self.ranks, device=self.device, progress=False
            )
        if change.side in ("loader", "both"):
            loader = TrainLoader(config, **self.parts)
            batches = loader.batches(FIRST_STEP)
        try:
            yield Contestant(
                trainer=trainer,
                loader=loader,
                batches=batches,
                local_batch=self.ranks.local_batch_size(config.run.global_batch_size),
                compute_threads=change.compute_threads or now.compute_threads,
            )
        finally:
            if loader is not now.loader:
                loader.close()

    # Loader, step, and both together.

    def turn(self, one: Contestant, *, seconds: float) -> Turn:
        """Steps of `seconds`, or one if that takes longer.

        Those whose batches were made before are not timed, as many as come within `seconds`.
        """
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        clock = one.trainer.clock = StepClock(self.device)
        torch.set_num_threads(one.compute_threads)
        try:
            with self._asked(one) as batches:
                begun = last = time.perf_counter()
                for _ in range(one.loader.pace.batches_begun):
                    waited = self._step(one.trainer, clock, batches)
                    now = time.perf_counter()
                    is_empty = waited > _WAITS * (now - last)
                    if from_rank_0(is_empty or now - begun > seconds, self.ranks):
                        break
                    last = now
                gc.collect()
                wait_for_gpu()
                clock.cut()
                steps, reading = 0, one.loader.reading.blocked_seconds
                begun, cpu = time.perf_counter(), time.process_time()
                while from_rank_0(time.perf_counter() - begun < seconds or not steps, self.ranks):
                    self._step(one.trainer, clock, batches)
                    steps += 1
                wait_for_gpu()
            wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        finally:
            one.trainer.clock = None
            torch.set_num_threads(self.now.compute_threads)
        images = steps * one.local_batch
        return Turn(
            steps=steps,
            cost=Cost(wall=wall / images, cpu=cpu / images),
            parts=clock.cut()(),
            reading=(one.loader.reading.blocked_seconds - reading) / one.loader.reading.num_threads,
        )

    def _asked(self, one: Contestant) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        if self.config.objective.uses_texts:
            return asked_ahead(one.batches, self.ranks)
        return contextlib.nullcontext(one.batches)

    def _step(self, trainer: Trainer, clock: StepClock, batches: Iterator[Batch]) -> float:
        """Takes a step; returns the seconds until its batch came."""
        begun = time.perf_counter()
        clock.begin("data_wait")
        batch = next(batches).to(self.device)
        waited = time.perf_counter() - begun
        trainer.train_step(batch)
        clock.end_step()
        return waited

    def loader_cost(self, *, seconds: float) -> Cost:
        """The loader by itself, drained."""
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        take = iter(functools.partial(next, self.now.batches), None)
        begun = self.loader.pace.batches_begun
        return flow(take, images=self.local_batch, skip=begun, seconds=seconds)

    def kept_batch(self) -> Batch:
        """A batch on the device that outlives the loader's buffers."""
        return copy.deepcopy(next(self.now.batches)).to(self.device)

    def step_cost(self, batch: Batch, *, count: int) -> Cost:
        """The step by itself, on one batch."""
        work = functools.partial(self.now.trainer.train_step, batch)
        return repeated(work, images=batch.batch_size, count=count)

    # The parts of a step.

    def step_stages(self, batch: Batch, *, seconds: float) -> list[Stage]:
        """The parts of a step; none where micro-batches or an objective without texts split it.

        Nor are there any where labels are mixed.
        """
        config, objective = self.config, self.config.objective
        micro = 0 < config.efficiency.micro_batch_size < self.local_batch
        if micro or not objective.uses_texts or objective.mixes:
            return []
        step = StepInParts(self.now.trainer, batch)
        taken: dict[str, list[Cost]] = {}
        begun, is_over = time.perf_counter(), False
        while not is_over:
            walls = step.take()
            for name, cpu in step.cpu_seconds.items():
                cost = Cost(wall=walls[name] / self.local_batch, cpu=cpu / self.local_batch)
                taken.setdefault(name, []).append(cost)
            is_over = from_rank_0(time.perf_counter() - begun > seconds, self.ranks)
        self.now.trainer.optimizer.zero_grad()
        return [Stage(name=name, cost=median(costs), side="step") for name, costs in taken.items()]

    def copy_stage(self, batch: Batch) -> Stage | None:
        """The copy of a batch to a GPU; None on a CPU."""
        if self.device.type == "cpu":
            return None
        host = batch.to(torch.device("cpu"))
        cost = repeated(lambda: host.to(self.device), images=self.local_batch, count=8)
        return Stage(name="copy to the device", cost=cost, side="between")

    def collectives(self) -> Stage | None:
        """The sum of all gradients over the ranks; None for one rank."""
        if self.ranks.world_size == 1:
            return None
        model = self.now.trainer.model
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        gradient = torch.zeros(size, device=self.device)
        work = functools.partial(torch.distributed.all_reduce, gradient)
        work()
        cost = repeated(work, images=self.local_batch, count=3)
        return Stage(name="collectives", cost=cost, side="step", note=f"{size:,} gradients")

    # Memory.

    def _plan(self, config: TrainConfig, device_bytes: int) -> MemoryPlan:
        return plan_memory(
            config,
            world_size=self.ranks.world_size,
            device_bytes=device_bytes,
            device_type=self.device.type,
            longest_text=longest_text(self.parts["datasets"], self.parts["prompts"]),
        )

    def largest_batch(self) -> int:
        """The largest local batch, a power of two, that fits by the memory plan; 0 if none does."""
        largest, batch = 0, 1
        while batch <= _LARGEST_BATCH:
            config = self.config.changed(run={"global_batch_size": batch * self.ranks.world_size})
            if not self._plan(config, self.free_bytes).fits:
                break
            largest, batch = batch, 2 * batch
        return largest


def flow(batches: Iterable[object], *, images: float, skip: int, seconds: float) -> Cost:
    """The cost of an image of batches that are made ahead.

    The first `skip` are not timed, or as many of them as come within `seconds`: they were begun
    before the clock. As many are timed as `seconds` allow, at least two.
    """
    iterator, begun = iter(batches), time.perf_counter()
    try:
        for _ in range(skip):
            next(iterator)
            if time.perf_counter() - begun > seconds:
                break
        gc.collect()
        count = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in iterator:
            del batch  # its buffer can be used again
            count += 1
            if count >= 2 and time.perf_counter() - wall >= seconds:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if hasattr(iterator, "close"):  # a generator holds what it reads
            iterator.close()
    return Cost(wall=wall / (count * images), cpu=cpu / (count * images))


def repeated(work: Callable[[], object], *, images: int, count: int) -> Cost:
    """The cost of an image of work that is done `count` times; waits for a GPU."""
    turn = timed(work, calls=count)
    return Cost(wall=turn.wall_seconds / images, cpu=turn.cpu_seconds / images)
