"""The training loop (`Trainer.fit`): next batch, update, log, save, evaluate.

The trainer accepts any `Loader`, such as a `ListLoader` on a laptop. A step's batch, drop path and
learning rate are functions of the step, so a run's state is the step, the weights, the optimizer
and the loss scaler. `Observer`s write metrics, ledger and checkpoints.
`assembly.make_trainer` puts the parts together.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from unicl_fast.batch import Batch, Loader
from unicl_fast.checkpoints.load import read_state
from unicl_fast.checkpoints.state import refuse_another_run, restore_checkpoint
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.distributed.signals import Interrupted, Interruption
from unicl_fast.models.blocks import BatchNormBackup
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.text_columns import asked_ahead
from unicl_fast.stages import span_at
from unicl_fast.system.phases import (
    OR_WAITING,
    START_PATIENCE,
    EvaluationStopped,
    mark,
    stopping_when,
)
from unicl_fast.training.metrics import MEAN_METRIC, StepMeter, add_up, mean_of_main
from unicl_fast.training.optim import (
    build_optimizer,
    build_schedule,
    gradient_norm,
    set_rates,
    steps_of_samples,
    update,
)
from unicl_fast.training.parallel import Parallel
from unicl_fast.training.settle import Setup
from unicl_fast.training.stages import describe_stage
from unicl_fast.training.step import back_propagate
from unicl_fast.training.step_clock import Part, StepClock

logger = logging.getLogger(__name__)

Evaluation = Callable[[UniCL], Mapping[str, float]]
"""Returns named numbers of a model, for example `{"top1": 0.6}`."""

COMPILING_STEPS = 16
"""Steps in which caches fill and kernels compile; torch.compile has met most sizes by then."""


class Observer:
    """Follows a run. All ranks have those that exchange anything, and call them together."""

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        """Around one call of `fit`, from the step that the run is at."""
        yield

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        """After each step; reads nothing from the device."""

    def check(self, run: Trainer, steps: Sequence[tuple[float, float]], *, done: int) -> None:
        """Before a line, a checkpoint or an evaluation; an error ends the run.

        `steps` are (loss, gradient norm) of the latest steps, up to step `done`.
        """

    def contribute(self, run: Trainer, batch: Batch, sums: dict[str, float | Tensor]) -> None:
        """At a logging step: adds numbers [0-d] to sum over ranks; reads nothing off the device."""

    def measure(self, run: Trainer, sums: Mapping[str, float], values: dict[str, float]) -> None:
        """Adds numbers to the line of a logging step, from the sums over all ranks.

        On a GPU the next step has been launched by then; `values` has the line's step.
        """

    def on_log(self, run: Trainer, batch: Batch, values: dict[str, float]) -> None:
        """Receives a whole line of metrics; `batch` is of its step, or the next one's on a GPU."""

    def allows_save(self, *, required: bool) -> bool:
        """Writes data that must be on disk before a checkpoint; returns whether it is there."""
        return True

    def on_save(self, run: Trainer, *, required: bool) -> None:
        """Saves the state of the run; a required save is on disk when this returns."""

    def on_evaluation(self, run: Trainer, values: Mapping[str, float]) -> None:
        """Receives the numbers of one evaluation."""

    def on_evaluated(self, run: Trainer, values: Mapping[str, float], *, all_done: bool) -> None:
        """After the evaluations of a step; `all_done` says whether all of them ran."""

    def results_of(self, step: int) -> Mapping[str, float] | None:
        """Evaluation results that an earlier start has written; None if unknown."""
        return None


class Trainer:
    """Trains a `UniCL` model on the batches of a `Loader`."""

    _line: Callable[[Batch], None] | None = None
    """Finishes the pending line of metrics."""

    def __init__(
        self,
        setup: Setup,
        model: UniCL,
        loader: Loader,
        *,
        evaluations: Mapping[str, Evaluation],
        data: Mapping[str, Any],
        observers: Sequence[Observer],
    ) -> None:
        """Puts the parts together; nothing is trained or written yet.

        `setup` is settled for its ranks; `model` is on its device, frozen as `optim.freeze` says,
        and not compiled. `observers` are called in this order. The rest is as in `make_trainer`.
        """
        self.config, self.given, self.ranks = setup.config, setup.given, setup.ranks
        self.model, self.loader = model, loader
        config, ranks = self.config, self.ranks
        self.evaluations, self.data, self.observers = dict(evaluations), dict(data), observers
        self.device = model.device
        self.run_id: str = from_rank_0(secrets.token_hex(8), ranks)
        """Identifies the run over all its starts, in its checkpoints and its ledger."""
        self.stages, self.total_steps = config.stages, config.run.total_steps
        self.stage = self.stages[0]
        self.step = self.start_step = 0
        self.saved_step = -1  # the start can be the best
        self._written: dict[str, float] = {}  # results of this step by an earlier start
        self.ends_early = False
        """Set by an observer: the run ends with the present step."""
        self.compiled_from = 0
        """The step at which compilation last started afresh."""
        self.parallel = Parallel(model, config.efficiency, ranks)
        self.optimizer = build_optimizer(model, config)
        length = steps_of_samples(config, self.total_steps)
        self.schedule = build_schedule(self.optimizer, config, length)
        self.scaler = Precision(config.efficiency.precision).build_scaler(self.device.type)
        self._batch_norms = BatchNormBackup(model) if config.run.max_bad_steps else None
        model.set_stage(self.stage.config.data, self.stage.config.model)
        self.clock: StepClock | None = None  # set within `fit` only

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of a checkpoint of this run; all ranks call it together.

        Only rank 0 reads it, and sends its content to the others.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: it is damaged, or has another model, objective or other data.
        """
        state = read_state(checkpoint, self.ranks)
        refuse_another_run(state, self.model, self.data)
        restore_checkpoint(
            checkpoint, state, model=self.model, optimizer=self.optimizer, scaler=self.scaler,
            ranks=self.ranks,
        )  # fmt: skip
        self.step = self.saved_step = state.step
        self._enter_stage()
        self.run_id = state.run_id
        logger.info("resumed from %s: %d of %d steps done", checkpoint, self.step, self.total_steps)

    def fit(self) -> None:
        """Trains to the end of the run, or until a signal requests a stop (see `Interruption`).

        Raises:
            Interrupted: a signal came; a checkpoint of the step just done is written.
            FloatingPointError: the loss or gradient norm of more than `run.max_bad_steps` steps was
                not finite; names the step. Raised at a logging, checkpoint or evaluation step.
            TooManyBadSamplesError: too many samples were replaced. Raised at a logging step.
            ValueError: no evaluation gives `checkpoint.best`, the loader ends before the run does,
                or batches have classes that the objective ignores.
            OSError: the run folder or the last checkpoint cannot be written, or the ledger was
                moved or removed. Raised at the next checkpoint.
            RuntimeError: the weights of ranks differ.
        """
        run = self.config.run
        with self._fitting() as (meter, interruption), self.batches() as batches:
            self._evaluate(meter, interruption, self._missing_evaluations())
            while self.step < self.total_steps and not self.ends_early:
                batch = self._next_batch(batches)
                loss, grad_norm = self.train_step(batch)
                self._write_line(batch)  # of the step before: the device is busy with this one
                meter.add(loss=loss, grad_norm=grad_norm)
                for observer in self.observers:
                    observer.on_step(self, batch, loss=loss, grad_norm=grad_norm)
                is_stopped = interruption.has_come(self.ranks)
                saves = is_stopped or self.is_due(self.config.checkpoint.every_steps)
                evaluates = self.is_due(run.evaluate_every_steps)
                if self.is_due(run.log_every_steps):
                    self._log(meter, batch)
                if saves or evaluates or self.ends_early or not self._lets_lines_wait():
                    self._write_line(batch)
                if saves:
                    self._check(meter)
                    self.save(required=is_stopped or self.step == self.total_steps)
                if is_stopped and self.step < self.total_steps:
                    self._stop(interruption)
                if evaluates:
                    self._evaluate(meter, interruption, self.evaluations)
                del batch  # before the next one is requested
            if self.ends_early and self.saved_step < self.step:
                self._check(meter)
                self.save()

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Updates the weights once, unless the loss or the gradient norm is not finite.

        The host does not wait for the device, except with optimizers that need it to (see
        `optim.update`), so a non-finite value is reported at the next logging step.

        Returns:
            The loss of the global batch and the gradient norm before clipping, both on the device.
        """
        if self._enter_stage():
            self._settle_buckets(batch)
        self.mark("step: encoding", part="forward", waits_for_ranks=True)
        self.model.train()
        if self._batch_norms is not None:
            self._batch_norms.keep()
        self.model.zero_grad()
        loss = self.back_propagate(batch)
        # the host may wait for the device's norm
        self.mark("step: update", part="optimizer", waits_for_ranks=True)
        grad_norm = self.update(loss)
        if self._batch_norms is not None:
            is_finite = loss.isfinite()
            if not self.scaler.is_enabled():  # activations are valid if its gradients overflow
                is_finite &= grad_norm.isfinite()
            self._batch_norms.restore_where(~is_finite)
        return loss, grad_norm

    def back_propagate(self, batch: Batch) -> Tensor:
        """Returns the loss of the global batch, and adds its gradient to the parameters' `.grad`.

        Under fp16 the gradient is multiplied by the loss scaler's factor.
        """
        self.parallel.begin_step()
        loss = back_propagate(
            self.model, self.parallel.encode, batch, self.stage.config, self.ranks,
            scale_loss=self._scale_loss, begin=self.begin,
        )  # fmt: skip
        self.parallel.join_gradients()
        return loss

    def _scale_loss(self, loss: Tensor) -> Tensor:
        # the backward pass follows, at whose end DDP waits for the others
        self.mark("step: back-propagating", part="backward", waits_for_ranks=True)
        # DDP averages parameter gradients over ranks; ours are to be summed
        return self.scaler.scale(loss * self.ranks.world_size)

    def update(self, loss: Tensor) -> Tensor:
        """Updates the weights with the gradients in `.grad`; returns their norm."""
        set_rates(self.optimizer, self.schedule, self.config, step=self.step)
        self.scaler.unscale_(self.optimizer)
        grad_norm = gradient_norm(self.model, self.ranks)
        leave_out = ~(loss.isfinite() & grad_norm.isfinite())
        clip_norm = self.config.optim.clip_norm
        with self.parallel.updating():
            update(self.optimizer, grad_norm, clip_norm=clip_norm, leave_out=leave_out)
        self.scaler.update()
        with torch.no_grad():
            self.config.objective.limit(self.model.learnt)
        self.step += 1
        return grad_norm

    def save(self, *, required: bool = True) -> None:
        """Lets observers save the present step; all ranks call it together.

        A required checkpoint is on disk when this returns. Others are written while training
        continues; their failure is only logged, loudly, since the next one may fit.

        Raises:
            OSError: a required one cannot be written, or the ledger was moved or removed.
        """
        self.mark("checkpoint", part="checkpoint", waits_for_ranks=True)
        if all(observer.allows_save(required=required) for observer in self.observers):
            self.saved_step = self.step
            for observer in self.observers:
                observer.on_save(self, required=required)
        self.begin("other")

    def _enter_stage(self) -> bool:
        """Switches to the current step's stage; returns whether it is a new one."""
        span = span_at(self.config.run.spans, self.step)
        if span.number == self.stage.span.number:
            return False
        self.stage = self.stages[span.number]
        logger.info("from step %d on: %s", span.first_step, describe_stage(self.stage))
        self.model.set_stage(self.stage.config.data, self.stage.config.model)
        if self.config.efficiency.compile != "off":
            torch.compiler.reset()  # a fresh start would compile the same graphs
        self.parallel.rebuild()
        self.compiled_from = self.step
        return True

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[tuple[StepMeter, Interruption]]:
        """Opens clock, observers and signals for `fit`, and closes them at the end."""
        self.start_step = self.compiled_from = self.step
        with contextlib.ExitStack() as stack:
            interruption = stack.enter_context(Interruption())
            for observer in self.observers:
                stack.enter_context(observer.fitting(self))
            meter = StepMeter(self.device)
            self.clock = meter.clock
            stack.callback(setattr, self, "clock", None)
            stack.callback(setattr, self, "_line", None)
            stack.enter_context(meter.clock.watching())
            yield meter, interruption

    def _missing_evaluations(self) -> list[str]:
        """Evaluations of the step we resume from whose numbers were not written.

        A run from a whole model is measured before its first step, if it writes results.
        """
        is_due = self.is_due(self.config.run.evaluate_every_steps)
        if not (is_due if self.step else self.config.model.init):
            return []
        written = [
            values for one in self.observers if (values := one.results_of(self.step)) is not None
        ]
        self._written = from_rank_0({k: v for each in written for k, v in each.items()}, self.ranks)
        missing = [
            name for name in self.evaluations
            if written and not any(key.startswith(f"{name}/") for key in self._written)
        ]  # fmt: skip
        if written and len(self.evaluations) > 1 and MEAN_METRIC not in self._written:
            missing = missing or list(self.evaluations)[-1:]  # killed before the mean was written
        return from_rank_0(missing, self.ranks)

    def batches(self) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The batches of the remaining steps."""
        left = self.total_steps - self.step
        batches = itertools.islice(self.loader.batches(self.step), left)
        if self.config.objective.uses_texts:
            return asked_ahead(batches, self.ranks)
        return contextlib.nullcontext(batches)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        self.mark("waiting for the next batch", part="data_wait")
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"the loader ended before step {self.step} of {self.total_steps}: batches of a "
                "Loader come without end"
            )
        if self.step > self.start_step:
            return batch.to(self.device)
        self.config.objective.check_targets(batch.targets)
        batch = batch.to(self.device)
        self._settle_buckets(batch)
        return batch

    def _settle_buckets(self, batch: Batch) -> None:
        """Runs a throwaway backward pass, so that a restart does not change results.

        DDP puts gradients into buckets by the order of parameters, and after its first backward
        pass by the order in which they arrived. A gradient's place decides in which order three or
        more ranks are summed, so the first step of each start would be rounded differently.
        """
        if not self.parallel.has_buckets:
            return
        self.mark("step: encoding", part="checks", waits_for_ranks=True)
        clock, self.clock = self.clock, None
        self.model.train()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.back_propagate(batch)
        self.clock = clock
        self.model.zero_grad()
        self.parallel.order_buckets()
        for name, buffer in self.model.named_buffers():  # BatchNorm's averages
            buffer.copy_(buffers[name])

    def _check(self, meter: StepMeter) -> None:
        self._mark_reading()
        self._check_steps(meter.read(), done=self.step)

    def _check_steps(self, steps: Sequence[tuple[float, float]], *, done: int) -> None:
        for observer in self.observers:
            observer.check(self, steps, done=done)

    def _log(self, meter: StepMeter, batch: Batch) -> None:
        """Begins a line of metrics, which `_write_line` ends."""
        self._mark_reading()
        sums: dict[str, float | Tensor] = {}
        for observer in self.observers:
            observer.contribute(self, batch, sums)
        learnt = {name: one for name, one in self.model.learnt.items() if one.ndim == 0}
        run, done, group = self.config.run, self.step, self.optimizer.param_groups[0]
        seen, before = run.draws_before(done), run.draws_before(done - len(meter))
        head: dict[str, float] = {"step": done, "samples_seen": seen}
        if len(self.stages) > 1:
            head["stage"] = self.stage.span.number + 1
        rate = group["lr"] / group["lr_scale"]  # without layer decay
        read = meter.begin_line([*add_up(sums, self.ranks, self.device), *learnt.values()])

        def write(batch: Batch) -> None:
            line = read()
            self._check_steps(line.steps, done=done)
            summary = meter.summary(
                line, samples=seen - before, world_size=self.ranks.world_size,
                steps_left=self.total_steps - done,
            )  # fmt: skip
            of_learnt = dict(zip(learnt, line.numbers[len(sums) :], strict=True))
            values = {**head, **summary, **of_learnt, "lr": rate}
            totals = dict(zip(sums, line.numbers, strict=False))
            for observer in self.observers:
                observer.measure(self, totals, values)
            for observer in self.observers:
                observer.on_log(self, batch, values)

        self._line = write

    def _write_line(self, batch: Batch) -> None:
        """Reads and writes the line that was begun, if there is one."""
        if self._line is not None:
            self._mark_reading()
            write, self._line = self._line, None
            write(batch)

    def _lets_lines_wait(self) -> bool:
        """Whether lines are written after the next launch, so that the device keeps working."""
        return self.device.type == "cuda" and self.step < self.stage.span.end_step

    def _mark_reading(self) -> None:
        self.mark("reading the loss", part="other", waits_for_ranks=True)

    def _evaluate(
        self, meter: StepMeter, interruption: Interruption, names: Collection[str]
    ) -> None:
        """Runs the named evaluations of the present step.

        Raises:
            Interrupted: a signal came; a resumed run does the missing evaluations.
        """
        if not names:
            return
        self._check(meter)
        values: dict[str, float] = {}
        try:
            with stopping_when(lambda: bool(interruption.signal_name)):
                for name in names:
                    values |= self._evaluate_one(name)
        except EvaluationStopped:
            self.save()  # also if one was begun, which may have failed
            self._stop(interruption)
        all_done = len(names) == len(self.evaluations)
        known, self._written = self._written | values, {}
        if mean := mean_of_main(self.evaluations, known):
            values |= self._announce(mean)
        for observer in self.observers:
            observer.on_evaluated(self, values, all_done=all_done)

    def _announce(self, values: dict[str, float]) -> dict[str, float]:
        for observer in self.observers:
            observer.on_evaluation(self, values)
        return values

    def _evaluate_one(self, name: str) -> dict[str, float]:
        """Evaluates with the run's own sizes, in every stage."""
        self.mark(f"evaluation {name}", part="evaluation")
        with self.parallel.evaluated() as evaluated:
            evaluated.set_stage(self.config.data, self.config.model)
            try:
                results = self.evaluations[name](evaluated.eval())
            finally:
                evaluated.set_stage(self.stage.config.data, self.stage.config.model)
        return self._announce({f"{name}/{key}": value for key, value in results.items()})

    def _stop(self, interruption: Interruption) -> NoReturn:
        if self.ranks.world_size > 1:  # no rank leaves before the checkpoint is whole
            self.mark("leaving", waits_for_ranks=True)
            torch.distributed.barrier(group=self.ranks.host_group)
        name = interruption.signal_name or "another rank's signal"
        raise Interrupted(f"stopped by {name} after step {self.step} of {self.total_steps}")

    def is_due(self, every_steps: int) -> bool:
        """Whether an action of every `every_steps` steps (0: only at the end) is due now."""
        return self.step == self.total_steps or (every_steps > 0 and self.step % every_steps == 0)

    def begin(self, part: Part) -> None:
        """Counts the time from now on towards this part of a step."""
        if self.clock is not None:
            self.clock.begin(part)

    def mark(self, phase: str, *, part: Part | None = None, waits_for_ranks: bool = False) -> None:
        """Tells a watchdog which phase begins, and whether some of it waits in a collective.

        `part` is the part of a step that the time counts towards; None continues the present one.
        """
        if part is not None:
            self.begin(part)
        steps_done = self.step - self.compiled_from
        patience = 1.0 if steps_done else START_PATIENCE
        may_compile = steps_done < COMPILING_STEPS or phase.startswith("evaluation")
        if self.config.efficiency.compile != "off" and may_compile:
            patience = 6.0
        waits_for_ranks = waits_for_ranks and self.ranks.world_size > 1
        phase += OR_WAITING if waits_for_ranks else ""
        mark(phase, self.step, patience=patience, waits_for_ranks=waits_for_ranks)
