"""The user's run on the bench: built as `unicl-pretrain` builds it, to be measured in turns.

A changed setting is a `Contestant` with another loader or trainer on the same data. All contestants
share the run's observers, trackers and evaluations.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import free_memory, usable_cores
from unicl_fast.system.phases import EvaluationStopped, stopping_when
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.build import build_trainer
from unicl_fast.training.data import longest_text
from unicl_fast.training.memory_plan import plan as plan_memory
from unicl_fast.training.observers import WeightsAgree
from unicl_fast.training.trainer import Trainer

from ..pretrain import evaluate_in_run
from .clocks import Loop, LoopClock, PacedLoader, flow, keep_open, repeated
from .model import CHECKPOINT, COPY, EVALUATION, Change, Cost, Periodic, Stage, median
from .step_parts import StepInParts

_LARGEST_BATCH = 1 << 16
_EVALUATED_AT_ONCE = 256
_ENDLESS = 1 << 40


class Parts(NamedTuple):
    """The data, weights and prompts of a loader."""

    datasets: Sequence[PackedDataset]
    weights: Sequence[float] | None
    prompts: ClassPrompts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """The run, unchanged or with a change."""

    config: TrainConfig
    trainer: Trainer
    loader: PacedLoader
    local_batch: int
    begun: int  # batches that the loader prepares ahead
    compute_threads: int


class Bench:
    """One rank of a run, ready to be measured."""

    def __init__(
        self, config: TrainConfig, *, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        """Builds data, loader and trainer. Raises as `unicl-pretrain` does."""
        # a run in stages is measured with its own settings, those of the last stage
        config = config.changed(run={"stages": ()})
        self.ranks, self.device, self.folder = ranks, device, folder
        self.free_bytes = min(gather_integers(free_memory(device), ranks))
        self.clock, self._opened = LoopClock(), contextlib.ExitStack()
        self.most_seconds = math.inf  # a longer evaluation is stopped, and its time estimated
        self._evaluated: list[float] = []
        built: list[TrainLoader] = []

        def build_loader(config: TrainConfig, **parts: Any) -> TrainLoader:
            self.parts = Parts(*(parts[name] for name in Parts._fields))
            self.data_config = config
            built.append(TrainLoader(config, **parts))
            return built[0]

        trainer = build_trainer(
            config, run_folder=folder, build_loader=build_loader, evaluate=self._evaluate,
            ranks=ranks, device=device, progress=False,
        )  # fmt: skip
        # `step_stages` trains each rank alone, after which weights differ
        kept = [one for one in trainer.observers if not isinstance(one, WeightsAgree)]
        for observer in kept:
            keep_open(observer, self._opened)
        self._observers = [self.clock, *kept]
        (self.loader,) = built
        self.config = dataclasses.replace(trainer.config, data=self.data_config.data)
        self.local_batch = ranks.local_batch_size(config.run.global_batch_size)
        # this machine's ranks share its cores
        self.cores = usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.now = self._contestant(self.config, trainer, PacedLoader(self.loader, self.clock))

    def close(self) -> None:
        """Closes the trackers, the loader and the data."""
        self._opened.close()
        self.now.loader.close()
        for dataset in self.parts.datasets:
            dataset.close()

    # The run, unchanged and with a change.

    def _contestant(self, config: TrainConfig, trainer: Trainer, loader: PacedLoader) -> Contestant:
        if trainer.observers is not self._observers:
            self.clock.follow(trainer)
            trainer.observers, trainer.total_steps = self._observers, _ENDLESS
        batch = self.ranks.local_batch_size(config.run.global_batch_size)
        return Contestant(
            config=config, trainer=trainer, loader=loader, local_batch=batch,
            begun=loader.batches_begun, compute_threads=torch.get_num_threads(),
        )  # fmt: skip

    @contextlib.contextmanager
    def changed(self, change: Change, parts: Parts | None) -> Iterator[Contestant]:
        """The run with a change; `parts` are other data.

        ValueError for settings that a run would refuse, or that need more memory than there is.
        """
        config = self.config.changed(**change.set)
        loader, trainer = self.now.loader, self.now.trainer
        if change.side in ("step", "both"):
            plan = self._plan(config, free_memory(self.device))
            require(
                plan.fits, f"it needs {plan.total / 1e9:.1f} GB beside the run's own model, of "
                f"{plan.device_bytes / 1e9:.1f} that are free",
            )  # fmt: skip
            feed = ListLoader([self.kept_batch()])
            trainer = make_trainer(
                config, feed, ranks=self.ranks, device=self.device, progress=False
            )
            trainer.run_id = self.now.trainer.run_id
            trainer.evaluations = self.now.trainer.evaluations
        if change.side in ("loader", "both", "images"):
            rank, world_size = self.ranks.rank, self.ranks.world_size
            new = TrainLoader(
                config, *(parts or self.parts), device=self.device, rank=rank, world_size=world_size
            )
            loader = PacedLoader(new, self.clock)
        try:
            then = self._contestant(config, trainer, loader)
            yield dataclasses.replace(
                then, compute_threads=change.compute_threads or then.compute_threads
            )
        finally:
            if loader is not self.now.loader:
                loader.close()

    # Loader, step, and both together.

    def loop(self, one: Contestant, *, seconds: float, skip: int, least: int) -> Loop:
        """A turn of the trainer's own loop, with checkpoints, evaluations and logging."""
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        trainer, now = one.trainer, self.now.trainer
        trainer.step, trainer.saved_step = now.step, now.saved_step  # all write the same files
        trainer.config, trainer.loader = one.config, one.loader  # the config has the cadences
        try:
            torch.set_num_threads(one.compute_threads)
            return one.loader.turn(trainer, seconds=seconds, skip=skip, least=least)
        finally:
            torch.set_num_threads(self.now.compute_threads)
            now.step = trainer.step
            self._join_writer(seconds)

    def _join_writer(self, seconds: float) -> None:
        """Waits for a checkpoint to be written, or it would disturb the next turn."""
        deadline = time.perf_counter() + seconds
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(max(0.0, deadline - time.perf_counter()))

    def loader_cost(self, *, seconds: float) -> Cost:
        """The loader alone, drained."""
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        take = iter(self.now.loader.take, None)
        return flow(take, images=self.local_batch, skip=self.now.begun, seconds=seconds)

    def kept_batch(self) -> Batch:
        """A copy of a batch, on the device."""
        return copy.deepcopy(self.now.loader.take()).to(self.device)

    def step_cost(self, batch: Batch, *, count: int) -> Cost:
        """The step alone, on one batch."""
        work = functools.partial(self.now.trainer.train_step, batch)
        return repeated(work, images=batch.batch_size, count=count)

    # The parts of a step.

    def step_stages(self, batch: Batch, *, seconds: float) -> list[Stage]:
        """The parts of a step; empty for micro-batches, and without texts."""
        micro = 0 < self.config.efficiency.micro_batch_size < self.local_batch
        if micro or not self.config.objective.uses_texts:
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
        return Stage(name=COPY, cost=cost, side="between")

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

    # Periodic work.

    def checkpoint(self, *, seconds: float) -> Periodic:
        """Writes a checkpoint as a run does; waits for it for at most `seconds`."""
        trainer = self.now.trainer
        begun = time.perf_counter()
        trainer.save(required=False)
        blocked = time.perf_counter() - begun
        self._join_writer(seconds)
        written = time.perf_counter() - begun
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in found[-1].iterdir()) if found else 0
        note = f"{size / 1e6:,.1f} MB, written in {written:.2f} s"
        return Periodic(
            name=CHECKPOINT,
            every_steps=self.config.checkpoint.every_steps,
            seconds=blocked,
            note=note if found else f"not written after {written:.2f} s",
        )

    def evaluation(self) -> Periodic | None:
        """Evaluates as a run does; None for a run without evaluations."""
        evaluations, every = self.now.trainer.evaluations, self.config.run.evaluate_every_steps
        if not (evaluations and every):
            return None
        for evaluate in evaluations.values():
            evaluate(self.now.trainer.model.eval())
        self.now.trainer.model.train()
        return Periodic(name=EVALUATION, every_steps=every, seconds=self.evaluation_seconds)

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of a step's evaluations, from those so far."""
        return statistics.fmean(self._evaluated) * len(self.now.trainer.evaluations)

    def _evaluate(
        self, model: UniCL, *, dataset: PackedDataset, **more: Any
    ) -> Mapping[str, float]:
        """Evaluates for at most `most_seconds`, from which the whole time is extrapolated."""
        begun, num_batches = time.perf_counter(), 0

        def is_stopped() -> bool:
            nonlocal num_batches
            num_batches += 1
            return time.perf_counter() - begun > self.most_seconds

        part, results = 1.0, {}
        try:
            with stopping_when(is_stopped):
                results = dict(evaluate_in_run(model, dataset=dataset, quiet=True, **more))
        except EvaluationStopped:
            all_batches = math.ceil(len(dataset) / (_EVALUATED_AT_ONCE * self.ranks.world_size))
            part = min(1.0, max(1, num_batches - 1) / all_batches)
        self._evaluated.append((time.perf_counter() - begun) / part)
        return results

    # Memory.

    def _plan(self, config: TrainConfig, device_bytes: int) -> Any:
        return plan_memory(
            config, world_size=self.ranks.world_size,
            device_bytes=device_bytes, device_type=self.device.type,
            longest_text=longest_text(self.parts.datasets, self.parts.prompts),
        )  # fmt: skip

    def largest_batch(self) -> int:
        """The largest local batch, a power of two, that fits by the memory plan; 0 if none does."""
        largest, batch = 0, 1
        while batch <= _LARGEST_BATCH:
            larger = self.config.changed(run={"global_batch_size": batch * self.ranks.world_size})
            if not self._plan(larger, self.free_bytes).fits:
                break
            largest, batch = batch, 2 * batch
        return largest
