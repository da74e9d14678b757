"""The training loop: batches in, updates, then the cadence of logging, evaluating and saving.

Knows no DALI and no command line: it takes any `Loader` (a `ListLoader` on a laptop will do). The
batch of a step, its drop path and its learning rate are functions of the step, so the state of a
run is the step, the weights and their average, the optimizer and the loss scaler; resuming restores
these.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from unicl_fast.augmentation import check_views
from unicl_fast.batch import Batch, Loader
from unicl_fast.checkpoints.best import choose_metric
from unicl_fast.checkpoints.load import read_state
from unicl_fast.checkpoints.state import collect_tensors, describe_state, restore_checkpoint
from unicl_fast.checkpoints.writer import CheckpointWriter
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.ranks import Ranks, from_rank_0
from unicl_fast.distributed.signals import Interrupted, Interruption
from unicl_fast.ledger.writer import Ledger
from unicl_fast.models.compilation import compile_encoders
from unicl_fast.models.ema import WeightAverage
from unicl_fast.models.precision import Precision, place_module, settle_precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.mixup import check_pairs_on_one_rank
from unicl_fast.system.devices import choose_device
from unicl_fast.system.differences import refuse_differences
from unicl_fast.system.stages import OR_WAITING, mark
from unicl_fast.training.cached_gradients import (
    back_propagate_in_micro_batches,
    refuse_batch_statistics,
    refuse_without_texts,
)
from unicl_fast.training.evaluations import (
    Evaluation,
    evaluate_by_name,
    owed_evaluations,
)
from unicl_fast.training.metrics import MetricsWriter, StepMeter, read_metrics
from unicl_fast.training.nonfinite_steps import BadSteps, KeptStatistics
from unicl_fast.training.optim import build_optimizer, build_schedule, gradient_norm, update
from unicl_fast.training.replaced_samples import ReplacedSamples
from unicl_fast.training.source_meter import SourceMeter
from unicl_fast.training.step import global_loss, shown_indices

logger = logging.getLogger(__name__)

# Samples are numbered by step, batch size and seed: with others a run would go on elsewhere.
_MUST_NOT_CHANGE = {
    "run": ("seed", "global_batch_size"),
    "efficiency": ("precision",),
    "data": ("shuffle_window",),
}

# A first step fills caches and makes kernels, and torch.compile meets most sizes in a few steps.
_COMPILING_STEPS = 16


class Trainer:
    """Trains a `UniCL` model on what a `Loader` feeds."""

    def __init__(
        self,
        config: TrainConfig,
        loader: Loader,
        *,
        run_folder: Path | None = None,
        model: UniCL | None = None,
        ranks: Ranks | None = None,
        device: torch.device | None = None,
        evaluations: Mapping[str, Evaluation] | None = None,
        data: Mapping[str, Any] | None = None,
        sources: SourceMeter | None = None,
        ledger: Ledger | None = None,
        progress: bool = True,
    ) -> None:
        """Puts the parts together; nothing is trained or written yet.

        Args:
            config: the run's settings.
            loader: feeds this rank's share of each global batch.
            run_folder: where metrics and checkpoints go; None writes nothing.
            model: None builds one from the config.
            ranks: this process among its peers; None is one process alone.
            device: where to train; None takes the one that `run.device` means.
            evaluations: name -> function of the model that returns named numbers; all ranks call
                them together.
            data: what the run is trained on, in JSON's types; stored in checkpoints and compared
                when a run is resumed.
            sources: says at logging steps what each data set gives; None says nothing of them.
            ledger: writes down what every step was fed; None writes none.
            progress: show a progress bar on rank 0.

        Raises:
            ValueError: the run has no length, the ranks cannot share the global batch, the model
                or objective cannot be trained in micro-batches or compiled as the config asks, or
                the objective needs another number of views.
        """
        check_views(config.data.augment, objective=config.objective.name)
        self.ranks = ranks or Ranks()
        check_pairs_on_one_rank(
            config.objective,
            local_batch_size=self.ranks.share_of(config.run.global_batch_size),
            micro_batch_size=config.efficiency.micro_batch_size,
        )
        self.total_steps = config.run.total_steps
        if not self.total_steps:
            raise ValueError("the run has no length: set run.samples or run.steps")
        self.device = device or choose_device(config.run.device, local_rank=self.ranks.local_rank)
        self.config = config = settle_precision(config, self.device)
        self.loader = loader
        self.run_folder = run_folder
        self.evaluations = dict(evaluations or {})
        self.data = dict(data or {})
        self.sources = sources
        self.ledger = ledger
        self.step = 0
        self._start_step = 0  # of this process
        self._saved_step = 0
        self._show_progress = progress and self.ranks.is_main

        precision = Precision(config.efficiency.precision)
        self.model = model or UniCL(config)
        if config.efficiency.micro_batch_size:
            refuse_batch_statistics(self.model)
            refuse_without_texts(config.objective)
        place_module(self.model, device=self.device, precision=precision)
        if config.efficiency.channels_last:
            self.model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = WeightAverage(self.model, config.optim) if config.optim.ema_decay else None
        if config.efficiency.compile:
            compile_encoders(self.model)
        self._encode: Callable[..., tuple[Tensor, Tensor, Tensor]] = self.model
        if self.ranks.world_size > 1:
            self._encode = DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(self.model, config)
        self.schedule = build_schedule(self.optimizer, config, self.total_steps)
        self.scaler = precision.build_scaler(self.device.type)
        self._checkpoints: CheckpointWriter | None = None
        if run_folder is not None and self.ranks.is_main:
            self._checkpoints = CheckpointWriter(
                run_folder / "checkpoints", keep=config.checkpoint.keep
            )
        self._statistics = KeptStatistics(self.model) if config.run.max_bad_steps else None
        self._bad_steps = BadSteps(
            config,
            ranks=self.ranks,
            run_folder=run_folder,
            scales_loss=self.scaler.is_enabled(),
        )
        self._last_metrics: dict[str, float] = {}
        self._best_metric: str | None = None

    @property
    def evaluated_model(self) -> UniCL:
        """What evaluations are given: the average of the weights, where the run keeps one."""
        return self.model if self.ema is None else self.ema.model

    def resume(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint of this run.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: it is damaged, or of another model, objective or other data.
        """
        state = read_state(checkpoint)
        stored = config_to_dict(state.config)
        refuse_differences("model", stored["model"], self._dict("model"))
        refuse_differences("objective", stored["objective"], self._dict("objective"))
        refuse_differences("data", state.data, self.data)
        for group, names in _MUST_NOT_CHANGE.items():
            refuse_differences(
                group,
                {name: stored[group][name] for name in names},
                {name: self._dict(group)[name] for name in names},
            )
        for group in ("data", "optim", "run"):
            for name, value in stored[group].items():
                if value != self._dict(group)[name]:
                    logger.warning(
                        "resuming with %s.%s = %r; the checkpoint was written with %r",
                        group, name, self._dict(group)[name], value,
                    )  # fmt: skip
        restore_checkpoint(
            checkpoint,
            state,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            scaler=self.scaler,
        )
        self.step = self._saved_step = state.step
        self._bad_steps.start_at(self.step)
        logger.info("resumed from %s: %d of %d steps done", checkpoint, self.step, self.total_steps)

    def fit(self) -> None:
        """Trains to the end of the run.

        Signals that ask for an end (see `interruption`) are watched for meanwhile.

        Raises:
            Interrupted: a signal came; a checkpoint of the last step is written.
            FloatingPointError: a loss or a gradient norm was not finite, once more than
                `run.max_bad_steps`; names the step. Told at the next logging, checkpoint or
                evaluation.
            TooManyBadSamplesError: more samples had to be replaced than the config allows. Told at
                the next logging.
            ValueError: `checkpoint.best` names what no evaluation gives.
            OSError: the run folder, or the last checkpoint, cannot be written.
        """
        self._start_step = self.step
        self._best_metric = choose_metric(self.config.checkpoint.best, self.evaluations)
        replaced_samples = ReplacedSamples(
            max_fraction=self.config.data.max_bad_fraction,
            global_batch_size=self.config.run.global_batch_size,
            run_folder=self.run_folder,
        )
        with (
            self._metrics() as metrics,
            self._progress_bar() as bar,
            Interruption() as interruption,
            self.ledger.segment(self.step) if self.ledger else contextlib.nullcontext(),
            self._checkpoints.finishing() if self._checkpoints else contextlib.nullcontext(),
        ):
            lines = read_metrics(self.run_folder) if metrics and self.run_folder else []
            if self._checkpoints is not None:
                self._checkpoints.begin(step=self.step, metric=self._best_metric, lines=lines)
            if self.step > 0 and self._is_due(self.config.run.evaluate_every_steps):
                owed = owed_evaluations(
                    lines,
                    self.evaluations if self.run_folder else (),
                    step=self.step,
                    ranks=self.ranks,
                )
                if not self._evaluate(metrics, interruption, owed):
                    self._leave(interruption)
            batches = self.loader.batches(self.step)
            meter = StepMeter()
            while self.step < self.total_steps:
                self._mark("waiting for the next batch")
                started = time.perf_counter()
                batch = next(batches).to(self.device)
                wait_seconds = time.perf_counter() - started
                loss, grad_norm = self.train_step(batch)
                if self.ledger is not None:
                    self.ledger.record(batch)
                meter.add(loss=loss, grad_norm=grad_norm, wait_seconds=wait_seconds)
                replaced_samples.add(batch)
                self._bad_steps.remember(batch)
                bar.update()
                stops = interruption.has_come(self.ranks)
                if self._is_due(self.config.run.log_every_steps):
                    num_bad = replaced_samples.total(self.ranks)
                    self._log(meter, metrics, bar, batch, bad_samples=num_bad)
                    replaced_samples.check(num_bad)
                with meter.paused():
                    if self._is_due(self.config.checkpoint.every_steps) or stops:
                        self._check_finite(meter)
                        self.save(must=stops or self.step == self.total_steps)
                    if stops and self.step < self.total_steps:
                        self._leave(interruption)
                    if self._is_due(self.config.run.evaluate_every_steps):
                        self._check_finite(meter)
                        if not self._evaluate(metrics, interruption, self.evaluations):
                            if self._saved_step != self.step:
                                self.save()
                            self._leave(interruption)

    def _mark(self, stage: str, *, waits_for_ranks: bool = False) -> None:
        """Tells a watchdog what begins now (see `stages`).

        Args:
            stage: its name.
            waits_for_ranks: whether some of it is a collective, for example DDP's.
        """
        steps_done = self.step - self._start_step
        patience = 1.0 if steps_done else 3.0
        compiles = steps_done < _COMPILING_STEPS or stage.startswith("evaluation")
        if self.config.efficiency.compile and compiles:
            patience = 6.0
        waits_for_ranks = waits_for_ranks and self.ranks.world_size > 1
        if waits_for_ranks:
            stage += OR_WAITING
        mark(stage, self.step, patience=patience, waits_for_ranks=waits_for_ranks)

    def _leave(self, interruption: Interruption) -> NoReturn:
        if self.ranks.world_size > 1:  # nobody leaves before the checkpoint is whole
            self._mark("leaving", waits_for_ranks=True)
            torch.distributed.barrier(group=self.ranks.host_group)
        name = interruption.signal_name or "another rank's signal"
        raise Interrupted(f"stopped by {name} after step {self.step} of {self.total_steps}")

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update; none if the loss or the gradient norm is not finite.

        Nothing here waits for the device, as far as the optimizer allows (see `optim.update`): a
        bad step is told at the next logging.

        Returns:
            The loss of the global batch and the gradient norm before clipping, both on the device.
        """
        self._mark("step: encoding", waits_for_ranks=True)
        self.model.train()
        if self._statistics is not None:
            self._statistics.keep()
        self.optimizer.zero_grad()  # sets them to None; apex's takes no argument that would say so
        loss = self.back_propagate(batch)
        self._mark("step: update", waits_for_ranks=True)  # the host may wait for the device's norm
        grad_norm = self.update(loss)
        if self._statistics is not None:
            # the loss scaler's overflows are no bad steps: their activations are sound
            is_good = loss.isfinite()
            if not self.scaler.is_enabled():
                is_good &= grad_norm.isfinite()
            self._statistics.put_back_where(~is_good)
        return loss, grad_norm

    def update(self, loss: Tensor) -> Tensor:
        """The second half of `train_step`, when gradients are there; returns their norm."""
        self.schedule.step_update(self.step + 1)
        self.scaler.unscale_(self.optimizer)
        grad_norm = gradient_norm(self.model)
        update(
            self.optimizer,
            grad_norm,
            clip_norm=self.config.optim.clip_norm,
            leave_out=~(loss.isfinite() & grad_norm.isfinite()),
        )
        self.scaler.update()
        self.model.clamp_logit_scale()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return grad_norm

    def back_propagate(self, batch: Batch) -> Tensor:
        """Adds the gradient of the global batch's loss to the parameters' `.grad`.

        It is the loss scaler's multiple of the gradient where there is a scaler (fp16).

        Returns:
            The loss of the global batch, on the device.
        """
        if 0 < self.config.efficiency.micro_batch_size < batch.batch_size:
            return back_propagate_in_micro_batches(
                self.model,
                self._encode,
                batch,
                self.config,
                self.ranks,
                scale_loss=self._scale_loss,
            )
        global_index = shown_indices(batch, global_batch_size=self.config.run.global_batch_size)
        self.model.set_drop_path_key(step=batch.step, global_index=global_index)
        loss = global_loss(self._encode, batch, self.config, self.ranks)
        self._scale_loss(loss).backward()
        return loss.detach()

    def _scale_loss(self, loss: Tensor) -> Tensor:
        # what follows is the backward pass, at whose end DDP waits for the others
        self._mark("step: back-propagating", waits_for_ranks=True)
        # DDP averages parameter gradients over ranks; ours are to be summed
        return self.scaler.scale(loss * self.ranks.world_size)

    def save(self, *, must: bool = True) -> None:
        """Writes a checkpoint of the present step into the run folder; all ranks call it together.

        Args:
            must: come back when it is on the disk; otherwise it is written while training goes on.

        Raises:
            OSError: it cannot be written, and it `must`. Otherwise that is only said, loudly:
                training goes on, and the next one may fit.
        """
        self._mark("checkpoint", waits_for_ranks=self.ledger is not None)
        if self.ledger is not None and not self.ledger.settle(must=must):
            return
        self._saved_step = self.step
        if self._checkpoints is None:
            return
        self._checkpoints.write(
            collect_tensors(model=self.model, ema=self.ema, optimizer=self.optimizer),
            describe_state(
                model=self.model, optimizer=self.optimizer, scaler=self.scaler, data=self.data
            ),
            step=self.step,
            must=must,
        )

    def finish_writing(self) -> None:
        """Comes back when what `save` began is on the disk, or was said to have failed."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def _is_due(self, every_steps: int) -> bool:
        return self.step == self.total_steps or (every_steps > 0 and self.step % every_steps == 0)

    def _log(
        self,
        meter: StepMeter,
        metrics: MetricsWriter | None,
        bar: tqdm[Any],
        batch: Batch,
        *,
        bad_samples: int,
    ) -> None:
        self._check_finite(meter)
        global_batch_size = self.config.run.global_batch_size
        values = {
            "step": self.step,
            "samples_seen": self.step * global_batch_size,
            **meter.summary(global_batch_size=global_batch_size),
            "bad_steps": self._bad_steps.count,
            "logit_scale": float(self.model.logit_scale.detach()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "bad_samples": bad_samples,
        }
        if self.sources is not None:
            values |= self.sources.describe(batch, self.ranks, num_steps=self.step)
        self._last_metrics = values
        if metrics is not None:
            metrics.write(values)
        bar.set_postfix_str(
            f"loss {values.get('loss', math.nan):.3f}, {values['images_per_second']:.0f} images/s, "
            f"{values['data_wait_fraction']:.0%} waiting for data",
            refresh=False,
        )

    def _evaluate(
        self, metrics: MetricsWriter | None, interruption: Interruption, names: Collection[str]
    ) -> bool:
        """Writes what the named evaluations say of the present step.

        Returns:
            Whether all came to their end, the same on all ranks; a signal stops them, and they are
            made up for when the run goes on.
        """
        values = evaluate_by_name(
            self.evaluations,
            names,
            self.evaluated_model,
            step=self.step,
            ranks=self.ranks,
            metrics=metrics,
            begin=lambda name: self._mark(f"evaluation {name}"),
            is_stopped=lambda: bool(interruption.signal_name),
        )
        if values is None:
            return False
        # of evaluations that were made up for, the others' numbers are known since the start
        if len(names) == len(self.evaluations) or self._best_metric in values:
            self._keep_if_best(values)
        return True

    def _keep_if_best(self, values: Mapping[str, float]) -> None:
        """Pins the checkpoint of this step, written now if need be, if none is better."""
        best = None
        if self._checkpoints is not None:
            best = self._checkpoints.better_than_best(self.step, values)
        # evaluations have a cadence of their own
        if self._saved_step != self.step and from_rank_0(best is not None, self.ranks):
            self.save(must=False)
        if self._checkpoints is not None and best is not None:
            self._checkpoints.keep_as_best(best)

    def _check_finite(self, meter: StepMeter) -> None:
        self._mark("reading the loss", waits_for_ranks=True)
        steps = meter.read()
        self._bad_steps.judge(steps, done=self.step, last_metrics=self._last_metrics)
        overflowed = bool(steps) and not any(math.isfinite(norm) for _, norm in steps)
        # updates are left out while the scale halves; below 1 it has nothing more to give
        if overflowed and self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError(
                f"no gradient of the {len(steps)} steps before step {self.step} was finite in "
                "fp16, whatever the loss scale: use efficiency.precision=bf16"
            )

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[MetricsWriter | None]:
        if self.run_folder is None or not self.ranks.is_main:
            yield None
            return
        self.run_folder.mkdir(parents=True, exist_ok=True)
        with MetricsWriter(self.run_folder, start_step=self.step) as metrics:
            yield metrics

    def _progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            # a log file wants a line now and then, a terminal a live image
            mininterval=0.2 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
            disable=not self._show_progress,
        )

    def _dict(self, group: str) -> dict[str, Any]:
        values: dict[str, Any] = config_to_dict(self.config)[group]
        return values
