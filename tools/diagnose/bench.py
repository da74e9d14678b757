"""The user's run on the bench: built as `unicl-pretrain` builds it, to be measured in turns.

A changed setting is a `Contestant` with another loader or trainer on the same data. All contestants
share the run's observers and trackers; checkpoints and evaluations are timed by themselves.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import math
import os
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
from unicl_fast.training.observers import Checkpoints, WeightsAgree
from unicl_fast.training.step_clock import StepClock
from unicl_fast.training.trainer import Trainer

from ..pretrain import evaluate_in_run
from .measuring import timed
from .model import CHECKPOINT, EVALUATION, Change, Cost, Periodic, Stage, median
from .step_parts import StepInParts
from .turns import Loop, PacedLoader, follow

_EVALUATED_AT_ONCE = 256
_ENDLESS = 1 << 32


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
    compute_threads: int


class Bench:
    """One rank of a run, ready to be measured."""

    def __init__(
        self, config: TrainConfig, *, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        """Builds data, loader and trainer. Raises as `unicl-pretrain` does."""
        # a run in stages is measured with its own settings, those of the last stage
        config = config.changed(run={"stages": ()})
        self.ranks, self.device, self._folder = ranks, device, folder
        self._clock, self._opened = StepClock(device), contextlib.ExitStack()
        self._evaluated: list[float] = []  # seconds of each evaluation
        built: list[TrainLoader] = []

        def build_loader(config: TrainConfig, **parts: Any) -> TrainLoader:
            self.parts = Parts(*(parts[name] for name in Parts._fields))
            self.config = config
            built.append(TrainLoader(config, **parts))
            return built[0]

        trainer = build_trainer(
            config, run_folder=folder, build_loader=build_loader, evaluate=self._evaluate,
            ranks=ranks, device=device, progress=False,
        )  # fmt: skip
        # `step_stages` trains each rank by itself, after which weights differ
        observers = [one for one in trainer.observers if not isinstance(one, WeightsAgree)]
        for one in observers:  # open in all turns: trackers would start and end in each
            self._opened.enter_context(one.fitting(trainer))
            setattr(one, "fitting", contextlib.nullcontext)  # noqa: B010 - mypy allows no other way
        self._checkpoints = next(one for one in observers if isinstance(one, Checkpoints))
        self._observers = [one for one in observers if one is not self._checkpoints]
        self._evaluations, trainer.evaluations = trainer.evaluations, {}
        (self.loader,) = built
        self.config = dataclasses.replace(trainer.config, data=self.config.data)
        self.local_batch = ranks.local_batch_size(config.run.global_batch_size)
        # this machine's ranks share its cores
        self.cores = usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.now = self._contestant(self.config, trainer, PacedLoader(self.loader, self._clock))

    def close(self) -> None:
        """Closes the trackers, the loader and the data."""
        self._opened.close()
        self.now.loader.close()
        for dataset in self.parts.datasets:
            dataset.close()

    @functools.cached_property
    def batch(self) -> Batch:
        """A copy of a batch, on the device."""
        return copy.deepcopy(self.now.loader.take()).to(self.device)

    # The run, unchanged and with a change.

    def _contestant(
        self, config: TrainConfig, trainer: Trainer, loader: PacedLoader, threads: int = 0
    ) -> Contestant:
        if trainer.observers is not self._observers:
            follow(trainer, self._clock)
            trainer.observers, trainer.total_steps = self._observers, _ENDLESS
        batch = self.ranks.local_batch_size(config.run.global_batch_size)
        return Contestant(
            config=config, trainer=trainer, loader=loader, local_batch=batch,
            compute_threads=threads or torch.get_num_threads(),
        )  # fmt: skip

    @contextlib.contextmanager
    def changed(self, change: Change, parts: Parts | None) -> Iterator[Contestant]:
        """The run with a change; `parts` are other data.

        ValueError for settings that a run would refuse, or that need more memory than there is.
        """
        config = self.config.changed(**change.set)
        loader, trainer = self.now.loader, self.now.trainer
        if change.side in ("step", "both"):
            gc.collect()
            torch.cuda.empty_cache()  # or blocks that torch keeps would count as used
            plan = plan_memory(
                config, world_size=self.ranks.world_size, device_type=self.device.type,
                device_bytes=min(gather_integers(free_memory(self.device), self.ranks)),
                longest_text=longest_text(self.parts.datasets, self.parts.prompts),
            )  # fmt: skip
            require(
                plan.fits, f"it needs {plan.total / 1e9:.1f} GB beside the run's own model, of "
                f"{plan.device_bytes / 1e9:.1f} that are free",
            )  # fmt: skip
            trainer = make_trainer(
                config, ListLoader([self.batch]), ranks=self.ranks, device=self.device,
                progress=False,
            )  # fmt: skip
        if change.side in ("loader", "both", "images"):
            rank, world_size = self.ranks.rank, self.ranks.world_size
            new = TrainLoader(
                config, *(parts or self.parts), device=self.device, rank=rank, world_size=world_size
            )
            loader = PacedLoader(new, self._clock)
        try:
            yield self._contestant(config, trainer, loader, change.compute_threads)
        finally:
            if loader is not self.now.loader:
                loader.close()

    # Loader, step, and both together.

    def loop(self, one: Contestant, *, seconds: float, skips: bool) -> Loop:
        """A turn of the trainer's own loop; `skips` the steps of batches that were made before."""
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        trainer = one.trainer
        trainer.step = self.now.trainer.step  # all write the same files
        trainer.config, trainer.loader = one.config, one.loader  # the config has the cadences
        # the first batch of a turn also goes through DDP's throwaway pass
        skip = one.loader.batches_begun if skips else int(trainer.parallel.has_buckets)
        try:
            torch.set_num_threads(one.compute_threads)
            return one.loader.turn(trainer, seconds=seconds, skip=skip)
        finally:
            torch.set_num_threads(self.now.compute_threads)
            self.now.trainer.step = trainer.step

    def loader_cost(self, one: Contestant, *, seconds: float) -> Cost:
        """Only the loader, drained for `seconds`; batches that were begun before do not count."""
        gather_integers(0, self.ranks)  # all ranks measure the same at the same time
        begun = time.perf_counter()
        for _ in range(one.loader.batches_begun):
            one.loader.take()
            if time.perf_counter() - begun > seconds:
                break
        gc.collect()
        count, begun, cpu = 0, time.perf_counter(), time.process_time()
        while count < 2 or time.perf_counter() - begun < seconds:
            one.loader.take()
            count += 1
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        return self._cost(wall / count, cpu / count)

    def step_cost(self, *, count: int) -> Cost:
        """Only the step, on one batch."""
        turn = timed(functools.partial(self.now.trainer.train_step, self.batch), calls=count)
        return self._cost(turn.wall_seconds, turn.cpu_seconds)

    def _cost(self, wall: float, cpu: float) -> Cost:
        return Cost(wall=wall / self.local_batch, cpu=cpu / self.local_batch)

    # The parts of a step.

    def step_stages(self, *, seconds: float) -> list[Stage]:
        """The parts of a step; empty for micro-batches, and without texts."""
        micro = 0 < self.config.efficiency.micro_batch_size < self.local_batch
        if micro or not self.config.objective.uses_texts:
            return []
        step = StepInParts(self.now.trainer, self.batch)
        taken: dict[str, list[Cost]] = {}
        begun, is_over = time.perf_counter(), False
        while not is_over:
            walls = step.take()
            for name, cpu in step.cpu_seconds.items():
                taken.setdefault(name, []).append(self._cost(walls[name], cpu))
            is_over = from_rank_0(time.perf_counter() - begun > seconds, self.ranks)
        self.now.trainer.optimizer.zero_grad()
        return [Stage(name=name, cost=median(costs), side="step") for name, costs in taken.items()]

    def collectives(self) -> list[Stage]:
        """The sum of all gradients over the ranks, if there are several."""
        if self.ranks.world_size == 1:
            return []
        model = self.now.trainer.model
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        work = functools.partial(
            torch.distributed.all_reduce, torch.zeros(size, device=self.device)
        )
        work()
        turn = timed(work, calls=3)
        cost, note = self._cost(turn.wall_seconds, turn.cpu_seconds), f"{size:,} gradients"
        return [Stage(name="collectives", cost=cost, side="step", note=note)]

    # Periodic work.

    def checkpoint(self, *, seconds: float) -> Periodic:
        """Writes a checkpoint as a run does; waits for it for at most `seconds`."""
        begun = time.perf_counter()
        self._checkpoints.on_save(self.now.trainer, required=False)
        blocked = time.perf_counter() - begun
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(max(0.0, begun + seconds - time.perf_counter()))
        written = time.perf_counter() - begun
        files = self._folder.glob("checkpoints/step-*/*")
        size = sum(path.stat().st_size for path in files) / 1e6
        note = f"{size:,.1f} MB, written in {written:.2f} s" if size else f"over {written:.2f} s"
        return Periodic(
            name=CHECKPOINT, every_steps=self.config.checkpoint.every_steps, seconds=blocked,
            writing=written - blocked, note=note,
        )  # fmt: skip

    def evaluation(self, *, seconds: float) -> list[Periodic]:
        """Evaluates as a run does, if it does; each for at most about `seconds`."""
        every = self.config.run.evaluate_every_steps
        if not (self._evaluations and every):
            return []
        self._most_seconds = seconds
        with self.now.trainer.parallel.evaluated() as model:
            for evaluate in self._evaluations.values():
                evaluate(model.eval())
        self.now.trainer.model.train()
        return [Periodic(name=EVALUATION, every_steps=every, seconds=sum(self._evaluated))]

    def _evaluate(
        self, model: UniCL, *, dataset: PackedDataset, **more: Any
    ) -> Mapping[str, float]:
        """Evaluates until the time is up, from which the whole time is extrapolated."""
        begun, num_batches = time.perf_counter(), 0

        def is_stopped() -> bool:
            nonlocal num_batches
            num_batches += 1
            return time.perf_counter() - begun > self._most_seconds

        part = 1.0
        try:
            with stopping_when(is_stopped):
                evaluate_in_run(model, dataset=dataset, quiet=True, **more)
        except EvaluationStopped:
            all_batches = math.ceil(len(dataset) / (_EVALUATED_AT_ONCE * self.ranks.world_size))
            part = min(1.0, max(1, num_batches - 1) / all_batches)
        self._evaluated.append((time.perf_counter() - begun) / part)
        return {}


@contextlib.contextmanager
def on_bench(
    config: TrainConfig, scratch: Path, *, ranks: Ranks, device: torch.device
) -> Iterator[Bench]:
    """A run on this rank's bench; caches of object stores start empty."""
    config = config.changed(data={"cache_folder": str(scratch / "cache")})
    bench = Bench(config, folder=scratch / "run", ranks=ranks, device=device)
    with contextlib.closing(bench):
        # each measurement collects garbage first: 0.3 s, unless the survivors are frozen
        gc.collect()
        gc.freeze()
        try:
            yield bench
        finally:
            gc.unfreeze()
