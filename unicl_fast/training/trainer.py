"""The training loop (`Trainer.fit`): take a batch, update, log, save, evaluate.

The trainer takes any `Loader`, a `ListLoader` on a laptop too. The batch of a step, its drop path
and its learning rate are functions of the step, so the state of a run is the step, the weights and
their average, the optimizer and the loss scaler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from unicl_fast.augmentation import check_views
from unicl_fast.batch import Batch, Loader, ReadingTime
from unicl_fast.checkpoints.files import choose_best_metric
from unicl_fast.checkpoints.load import read_state
from unicl_fast.checkpoints.state import (
    collect_tensors,
    describe_state,
    refuse_another_run,
    restore_checkpoint,
)
from unicl_fast.checkpoints.writer import CheckpointWriter
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.ranks import Ranks, from_rank_0
from unicl_fast.distributed.signals import Interrupted, Interruption
from unicl_fast.ledger.writer import Ledger
from unicl_fast.models.efficiency import (
    fuse_window_attention,
    resolve_compilation,
    resolve_window_attention,
)
from unicl_fast.models.freezing import freeze, unfreeze, without_freezing
from unicl_fast.models.precision import (
    Precision,
    place_module,
    resolve_precision,
    set_device_arithmetic,
)
from unicl_fast.models.sharding import check_sharding, divides_all
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.mixup import check_pairs_on_one_rank
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.stages import span_at
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.machine import choose_device
from unicl_fast.system.progress import (
    OR_WAITING,
    START_PATIENCE,
    EvaluationStopped,
    mark,
    stopping_when,
)
from unicl_fast.training.agreement import check_weights_agree
from unicl_fast.training.bottleneck import BottleneckWatch
from unicl_fast.training.cached_gradients import (
    back_propagate_in_micro_batches,
    check_micro_batches,
)
from unicl_fast.training.global_loss import global_loss, shown_indices
from unicl_fast.training.limits import BatchNormBackup, NonfiniteSteps, ReplacedSamples
from unicl_fast.training.metrics import (
    METRICS_NAME,
    DatasetMeter,
    MetricsWriter,
    StepMeter,
    read_metrics,
)
from unicl_fast.training.mfu import Utilisation
from unicl_fast.training.optim import (
    add_unfrozen,
    build_optimizer,
    build_schedule,
    build_weight_average,
    gradient_norm,
    set_rates,
    steps_of_samples,
    update,
)
from unicl_fast.training.parallel import Parallel
from unicl_fast.training.progress_bar import ProgressBar, progress_bar, write_line
from unicl_fast.training.stages import describe_stage
from unicl_fast.training.step_clock import Part, StepClock
from unicl_fast.training.trackers import Trackers, require_trackers

logger = logging.getLogger(__name__)

Evaluation = Callable[[UniCL], Mapping[str, float]]
"""Gives named numbers of a model, for example `{"top1": 0.6}`."""

# A first step fills caches and makes kernels, and torch.compile meets most sizes in a few steps.
_COMPILING_STEPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """One call of `fit`: the files and counters that it keeps."""

    metrics: MetricsWriter | None
    """None on ranks that write nothing."""
    bar: ProgressBar
    bottlenecks: BottleneckWatch
    interruption: Interruption
    meter: StepMeter
    replaced_samples: ReplacedSamples
    best_metric: str | None
    missing_evaluations: list[str]
    """Evaluations that were due at the step we resume from and have not written their numbers."""


class Trainer:
    """Trains a `UniCL` model on the batches of a `Loader`."""

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
        dataset_meter: DatasetMeter | None = None,
        ledger: Ledger | None = None,
        reading: ReadingTime | None = None,
        check_run_folder: Callable[[], None] | None = None,
        progress: bool = True,
    ) -> None:
        """Puts the parts together; nothing is trained or written yet.

        Args:
            config: the run's settings.
            loader: gives the local batches of this rank.
            run_folder: where metrics and checkpoints go; None writes nothing.
            model: None builds one from the config.
            ranks: None is one process alone.
            device: None takes the one that `run.device` means.
            evaluations: by name; all ranks call them together.
            data: what the run is trained on, in JSON's types; stored in checkpoints and compared
                when a run is resumed.
            dataset_meter: measures each data set at logging steps.
            ledger: records the samples of every step.
            reading: how long the loader waits for storage, where it tells.
            check_run_folder: is called before rank 0 writes a checkpoint, and raises if another
                process has taken the run folder over (`atomic_files.sole_writer`).
            progress: show a progress bar on rank 0.

        Raises:
            ValueError: settings that cannot work together, or with this number of ranks.
        """
        self.ranks = ranks or Ranks()
        _check_settings(config, self.ranks)
        self.device = device or choose_device(config.run.device, local_rank=self.ranks.local_rank)
        config = resolve_precision(config, self.device, ranks=self.ranks)
        self.model = model or UniCL(config)
        for resolve in (resolve_compilation, resolve_window_attention):
            config = resolve(config, self.model, self.device, ranks=self.ranks)
        check_sharding(config)  # of what `auto` has become
        if run_folder is not None:
            require_trackers(config.run.trackers)
        self.config = self.model.config = config
        freeze(self.model)
        self.loader, self.dataset_meter, self.ledger = loader, dataset_meter, ledger
        self._reading = reading
        self.evaluations, self.data = dict(evaluations or {}), dict(data or {})
        self.run_folder, self._check_run_folder = run_folder, check_run_folder
        self.run_id: str = from_rank_0(secrets.token_hex(8), self.ranks)
        """The run, over all its starts: in every file of its checkpoints, and in its ledger."""
        self.total_steps = config.run.total_steps
        self.stages = config.stages
        self.stage = self.stages[0]
        """The part of the run that the present step is of."""
        self.step = self._start_step = self._saved_step = 0
        self._compiled_from = 0
        """The step before which nothing was compiled that is used now."""
        self._show_progress = progress and self.ranks.is_main

        if any(stage.config.efficiency.micro_batch_size for stage in self.stages):
            check_micro_batches(self.model)
        self._place_model()
        optim = config.optim
        self.ema = build_weight_average(self.model, optim) if optim.ema_decay else None
        self.parallel = Parallel(self.model, self.ema, config, self.ranks)
        self.optimizer = build_optimizer(self.model, config)
        self.schedule = self._build_schedule()
        self.scaler = Precision(config.efficiency.precision).build_scaler(self.device.type)
        self.model.set_stage(self.stage.config)

        self._checkpoints: CheckpointWriter | None = None
        if run_folder is not None and self.ranks.is_main:
            folder = run_folder / "checkpoints"
            self._checkpoints = CheckpointWriter(folder, keep=config.checkpoint.keep)
        self._batch_norms = BatchNormBackup(self.model) if config.run.max_bad_steps else None
        self._nonfinite_steps = NonfiniteSteps(
            config, ranks=self.ranks, run_folder=run_folder, scaler=self.scaler
        )
        self._last_metrics: dict[str, float] = {}
        self._clock: StepClock | None = None
        self._utilisation = Utilisation(self.stage.config, self.device)

    def _place_model(self) -> None:
        """Moves the model to the device, in the types and memory formats that it is trained in."""
        efficiency = self.config.efficiency
        set_device_arithmetic(efficiency, self.device)
        place_module(self.model, device=self.device, precision=Precision(efficiency.precision))
        # torch divides tensors in no other order of dimensions
        if efficiency.channels_last and not divides_all(self.config, self.ranks):
            self.model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if efficiency.window_attention == "triton":
            fuse_window_attention(self.model.image_encoder)

    @property
    def clock(self) -> StepClock | None:
        """The clock of the `fit` that is under way; None beside one."""
        return self._clock

    def resume(self, checkpoint: Path) -> None:
        """Restores the state that a checkpoint of this run holds; all ranks call it together.

        Rank 0 alone reads it, and the others get what it holds.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: it is damaged, or of another model, objective or other data.
        """
        state = read_state(checkpoint, self.ranks)
        refuse_another_run(state, self.config, self.data)
        self._unfreeze_at(state.step)
        if self.ema is not None:
            self.ema.separate()
        restore_checkpoint(
            checkpoint,
            state,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            scaler=self.scaler,
            ranks=self.ranks,
        )
        self.step = self._saved_step = state.step
        self._enter_stage()
        self.run_id = state.run_id
        self._nonfinite_steps.start_at(self.step)
        logger.info("resumed from %s: %d of %d steps done", checkpoint, self.step, self.total_steps)

    def fit(self) -> None:
        """Trains to the end of the run, or until a signal asks for a stop (see `Interruption`).

        Raises:
            Interrupted: a signal came; a checkpoint of the last step is written.
            FloatingPointError: a loss or a gradient norm was not finite in more than
                `run.max_bad_steps` steps; names the step. Raised at the next logging, checkpoint or
                evaluation step.
            TooManyBadSamplesError: more samples had to be replaced than the config allows. Raised
                at the next logging step.
            ValueError: `checkpoint.best` names what no evaluation gives, or samples have classes
                that the objective does not look at.
            OSError: the run folder, or the last checkpoint, cannot be written; or the ledger was
                moved or removed. Raised at the next checkpoint.
            RuntimeError: the weights of ranks differ (`run.check_ranks_every_steps`).
        """
        every = self.config.run
        with self._session() as session:
            self._evaluate(session, session.missing_evaluations)
            batches = self.loader.batches(self.step)
            while self.step < self.total_steps:
                batch = self._next_batch(session, batches)
                loss, grad_norm = self.train_step(batch)
                self._record(session, batch, loss=loss, grad_norm=grad_norm)
                if self._is_due(every.check_ranks_every_steps):
                    self._check_weights(session)
                is_stopped = session.interruption.has_come(self.ranks)
                if self._is_due(every.log_every_steps):
                    self._log(session, batch)
                if is_stopped or self._is_due(self.config.checkpoint.every_steps):
                    self._save(session, required=is_stopped or self.step == self.total_steps)
                if is_stopped and self.step < self.total_steps:
                    self._stop(session)
                if self._is_due(every.evaluate_every_steps):
                    self._evaluate(session, self.evaluations)
                del batch  # before the next one is requested

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Updates the weights once, unless the loss or the gradient norm is not finite.

        The host does not wait for the device here, except with optimizers that need it to (see
        `optim.update`). So the next logging step is the first that can report a non-finite one.

        Returns:
            The loss of the global batch and the gradient norm before clipping, both on the device.
        """
        has_begun = self._enter_stage()
        if self._unfreeze_at(self.step) or has_begun:
            self._settle_buckets(batch)
        self._mark("step: encoding", part="forward", waits_for_ranks=True)
        self.model.train()
        if self._batch_norms is not None:
            self._batch_norms.keep()
        self.model.zero_grad()
        loss = self.back_propagate(batch)
        # the host may wait for the device's norm
        self._mark("step: update", part="optimizer", waits_for_ranks=True)
        grad_norm = self.update(loss)
        if self._batch_norms is not None:
            is_finite = loss.isfinite()
            if not self.scaler.is_enabled():  # an overflow of its gradients has sound activations
                is_finite &= grad_norm.isfinite()
            self._batch_norms.restore_where(~is_finite)
        return loss, grad_norm

    def _unfreeze_at(self, step: int) -> bool:
        """Begins to train what is frozen, if it is due at this step; returns whether it is."""
        unlock_at = self.config.optim.unlock_at_step
        if not self.model.frozen.names or not 0 < unlock_at <= step:
            return False
        logger.info("from step %d on all is trained (optim.unlock_at_step)", unlock_at)
        if self.ema is not None:
            self.ema.separate()
        unfreeze(self.model)
        self.parallel.take_up_unfrozen()
        add_unfrozen(self.optimizer, self.model, self.config)
        self.schedule = self._build_schedule()
        self._begin_anew()
        return True

    def _enter_stage(self) -> bool:
        """Takes up the settings of the present step's stage; returns whether they are others."""
        span = span_at(self.config.run.spans, self.step)
        if span.number == self.stage.span.number:
            return False
        self.stage = self.stages[span.number]
        logger.info("from step %d on: %s", span.first_step, describe_stage(self.stage))
        self.model.set_stage(self.stage.config)
        if self.config.efficiency.compile != "off":
            torch.compiler.reset()  # so that graphs are those that a start would compile
        self.parallel.rebuild()
        self._begin_anew()
        return True

    def _build_schedule(self) -> CosineLRScheduler:
        length = steps_of_samples(self.config, self.config.run.total_steps)
        return build_schedule(self.optimizer, self.config, length)

    def _begin_anew(self) -> None:
        """Counts the work of a step again, which has changed."""
        config = (
            self.stage.config if self.model.frozen.names else without_freezing(self.stage.config)
        )
        self._utilisation = Utilisation(config, self.device)
        self._compiled_from = self.step

    def back_propagate(self, batch: Batch) -> Tensor:
        """Returns the loss of the global batch, and adds its gradient to the parameters' `.grad`.

        Under fp16 the gradient is multiplied by the loss scaler's factor.
        """
        self.parallel.begin_step()
        loss = self._back_propagate(batch)
        self.parallel.join_gradients()
        return loss

    def _back_propagate(self, batch: Batch) -> Tensor:
        config = self.stage.config
        if 0 < config.efficiency.micro_batch_size < batch.batch_size:
            return back_propagate_in_micro_batches(
                self.model,
                self.parallel.encode,
                batch,
                config,
                self.ranks,
                self._scale_loss,
                begin=self._begin,
            )
        global_index = shown_indices(batch, global_batch_size=config.run.global_batch_size)
        self.model.set_drop_path_key(step=batch.step, global_index=global_index)
        loss = global_loss(
            self.parallel.encode,
            batch,
            config,
            self.ranks,
            begin=self._begin,
        )
        self._scale_loss(loss).backward()
        return loss.detach()

    def _scale_loss(self, loss: Tensor) -> Tensor:
        # the backward pass follows, at whose end DDP waits for the others
        self._mark("step: back-propagating", part="backward", waits_for_ranks=True)
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
        self.model.clamp_logit_scale()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return grad_norm

    def save(self, *, required: bool = True) -> None:
        """Writes a checkpoint of the present step into the run folder; all ranks call it together.

        A required one is on the disk when this returns. Another is written while training
        continues, and where that fails it is only logged, loudly: the next one may fit.

        Raises:
            OSError: a required one cannot be written, or the ledger was moved or removed.
        """
        self._mark("checkpoint", part="checkpoint", waits_for_ranks=self.ledger is not None)
        if self.ledger is not None and not self.ledger.flush(required=required):
            return
        self._saved_step = self.step
        if self.run_folder is None or (self._checkpoints is None and not self.parallel.is_divided):
            return
        tensors = collect_tensors(
            model=self.model, ema=self.ema, optimizer=self.optimizer, ranks=self.ranks
        )
        if self._checkpoints is None:
            return
        if self._check_run_folder is not None:
            self._check_run_folder()
        state = describe_state(
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            data=self.data,
            run_id=self.run_id,
        )
        self._checkpoints.write(tensors, state, step=self.step, required=required)

    def finish_writing(self) -> None:
        """Returns when the checkpoint that `save` began is on the disk, or has failed."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    @contextlib.contextmanager
    def _session(self) -> Iterator[_Session]:
        """Opens what a `fit` writes to, from the present step on, and closes it at the end."""
        folder = self.run_folder
        self._start_step = self._compiled_from = self.step
        if self.ema is not None:
            self.ema.share_frozen(self.model)
        best_metric = choose_best_metric(self.config.checkpoint.best, self.evaluations)
        metrics: MetricsWriter | None = None
        lines: list[dict[str, float]] = []
        with contextlib.ExitStack() as stack:
            if folder is not None and self.ranks.is_main:
                make_folder(folder)
                if (folder / METRICS_NAME).is_file():
                    lines = read_metrics(folder)
                trackers = Trackers(
                    self.config.run.trackers,
                    folder,
                    run_id=self.run_id,
                    config=config_to_dict(self.config),
                    start_step=self.step,
                    lines=lines,
                )
                metrics = MetricsWriter(folder, start_step=self.step, trackers=trackers)
                stack.callback(metrics.close)
                lines = [line for line in lines if line["step"] <= self.step]
            bar = stack.enter_context(
                progress_bar(done=self.step, total=self.total_steps, hidden=not self._show_progress)
            )
            interruption = stack.enter_context(Interruption())
            if self.ledger is not None:
                stack.enter_context(self.ledger.segment(self.step, run_id=self.run_id))
            if self._checkpoints is not None:
                stack.enter_context(self._checkpoints.finishing())
                self._checkpoints.begin(step=self.step, metric=best_metric, lines=lines)
            missing: list[str] = []
            every_steps = self.config.run.evaluate_every_steps
            if folder is not None and self.step > 0 and self._is_due(every_steps):
                keys = {key for line in lines if line["step"] == self.step for key in line}
                names = self.evaluations
                missing = [n for n in names if not any(key.startswith(f"{n}/") for key in keys)]
                missing = from_rank_0(missing, self.ranks)
            meter = StepMeter(self.device)
            self._clock = meter.clock
            stack.callback(setattr, self, "_clock", None)
            stack.enter_context(meter.clock.watching())
            yield _Session(
                metrics=metrics,
                bar=bar,
                bottlenecks=BottleneckWatch(
                    self.config,
                    ranks=self.ranks,
                    on_gpu=self.device.type == "cuda",
                    reading=self._reading,
                ),
                interruption=interruption,
                meter=meter,
                replaced_samples=ReplacedSamples(self.config, run_folder=folder),
                best_metric=best_metric,
                missing_evaluations=missing,
            )

    def _next_batch(self, session: _Session, batches: Iterator[Batch]) -> Batch:
        self._mark("waiting for the next batch", part="data_wait")
        batch = next(batches)
        if self.step > self._start_step:
            return batch.to(self.device)
        _check_classes(batch, self.config)
        batch = batch.to(self.device)
        self._settle_buckets(batch)
        return batch

    def _settle_buckets(self, batch: Batch) -> None:
        """Does a backward pass that does not count, so that a start cannot be seen in the results.

        DDP puts gradients into buckets by the order of parameters, and after its first backward
        pass by the order in which they came. A gradient's place decides in which order three or
        more ranks are added up, so the first step of each start would be rounded in another way.
        """
        if not self.parallel.has_buckets:
            return
        self._mark("step: encoding", part="checks", waits_for_ranks=True)
        clock, self._clock = self._clock, None
        self.model.train()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.back_propagate(batch)
        self._clock = clock
        self.model.zero_grad()
        self.parallel.order_buckets()
        for name, buffer in self.model.named_buffers():  # BatchNorm's averages
            buffer.copy_(buffers[name])

    def _record(self, session: _Session, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        """Notes the samples and the results of a step; reads nothing from the device."""
        if self.ledger is not None:
            self.ledger.record(batch)
        session.meter.add(loss=loss, grad_norm=grad_norm)
        session.replaced_samples.add(batch)
        self._nonfinite_steps.remember(batch)
        session.bar.update()

    def _log(self, session: _Session, batch: Batch) -> None:
        num_replaced = session.replaced_samples.total(self.ranks)
        self._check_finite(session.meter)
        num_steps = len(session.meter)
        samples_seen = self.config.run.draws_before(self.step)
        values = {
            "step": self.step,
            "samples_seen": samples_seen,
            **({"stage": self.stage.span.number + 1} if len(self.stages) > 1 else {}),
            **session.meter.summary(
                samples=samples_seen - self.config.run.draws_before(self.step - num_steps),
                world_size=self.ranks.world_size,
                steps_left=self.total_steps - self.step,
            ),
            "nonfinite_steps": self._nonfinite_steps.count,
            **self._scale_and_bias(),
            "lr": self._learning_rate(),
            "replaced_samples": num_replaced,
        }
        if self.dataset_meter is not None:
            values |= self.dataset_meter.describe(batch, self.ranks, num_steps=self.step)
        self._last_metrics = values
        if self.ranks.is_main:
            self._show(session, batch, values, num_steps=num_steps)
        session.replaced_samples.check(num_replaced)

    def _scale_and_bias(self) -> dict[str, float]:
        values, bias = {"logit_scale": self.model.logit_scale.item()}, self.model.logit_bias
        return values if bias is None else values | {"logit_bias": bias.item()}

    def _learning_rate(self) -> float:
        """The rate of what belongs to no encoder."""
        group = self.optimizer.param_groups[0]
        rate: float = group["lr"] / group["lr_scale"]
        return rate

    def _show(
        self, session: _Session, batch: Batch, values: dict[str, float], *, num_steps: int
    ) -> None:
        """Writes a line of metrics, shows it, and says what limits; rank 0 alone."""
        if session.metrics is not None:
            if self.step - self._compiled_from > _COMPILING_STEPS:
                self._begin("checks")
                values |= self._utilisation.values(batch, step_seconds=values["step_seconds"])
                self._begin("other")
            session.metrics.write(values)
        session.bar.show(values)
        if advice := session.bottlenecks.look(values, num_steps=num_steps):
            logger.warning("%s", advice)

    def _check_finite(self, meter: StepMeter) -> None:
        self._mark("reading the loss", part="other", waits_for_ranks=True)
        self._nonfinite_steps.judge(meter.read(), done=self.step, last_metrics=self._last_metrics)

    def _check_weights(self, session: _Session) -> None:
        if self.config.run.check_ranks_every_steps and self.ranks.world_size > 1:
            self._mark("comparing the weights of all ranks", part="checks", waits_for_ranks=True)
            check_weights_agree(self.model, self.ranks, step=self.step)
            self._begin("other")

    def _save(self, session: _Session, *, required: bool) -> None:
        self._check_finite(session.meter)
        self.save(required=required)
        self._begin("other")

    def _evaluate(self, session: _Session, names: Collection[str]) -> None:
        """Runs the named evaluations of the present step, and keeps its checkpoint if it is best.

        Raises:
            Interrupted: a signal came; a resumed run does the evaluations that are missing.
        """
        if not names:
            return
        self._check_finite(session.meter)
        values: dict[str, float] = {}
        try:
            with stopping_when(lambda: bool(session.interruption.signal_name)):
                for name in names:
                    values |= self._evaluate_one(session, name)
        except EvaluationStopped:
            if self._saved_step != self.step:
                self.save()
            self._stop(session)
        # `begin` has read the best number of evaluations that ran before we resumed
        if len(names) == len(self.evaluations) or session.best_metric in values:
            self._keep_if_best(values)

    def _evaluate_one(self, session: _Session, name: str) -> dict[str, float]:
        self._mark(f"evaluation {name}", part="evaluation")
        model = self.model if self.ema is None else self.ema.module
        with self.parallel.evaluated(model) as evaluated, self._at_full_size(evaluated):
            results = self.evaluations[name](evaluated.eval())
        values = {f"{name}/{key}": value for key, value in results.items()}
        if session.metrics is not None:
            session.metrics.write({"step": self.step, **values})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            # a program's log shows it, and keeps it in a file; without one it is still shown
            say = logger.info if logger.isEnabledFor(logging.INFO) else write_line
            say(f"step {self.step}: {shown}")
        return values

    @contextlib.contextmanager
    def _at_full_size(self, model: UniCL) -> Iterator[None]:
        """Evaluates by the run's own sizes, whatever the stage."""
        model.set_stage(self.config)
        try:
            yield
        finally:
            model.set_stage(self.stage.config)

    def _keep_if_best(self, values: Mapping[str, float]) -> None:
        """Keeps the checkpoint of this step, written now if need be, if none is better."""
        best = None
        if self._checkpoints is not None:
            best = self._checkpoints.better_than_best(self.step, values)
        # no checkpoint may be due at a step that evaluates
        if self._saved_step != self.step and from_rank_0(best is not None, self.ranks):
            self.save(required=False)
        if self._checkpoints is not None and best is not None:
            self._checkpoints.keep_as_best(best)

    def _stop(self, session: _Session) -> NoReturn:
        if self.ranks.world_size > 1:  # no rank leaves before the checkpoint is whole
            self._mark("leaving", waits_for_ranks=True)
            torch.distributed.barrier(group=self.ranks.host_group)
        name = session.interruption.signal_name or "another rank's signal"
        raise Interrupted(f"stopped by {name} after step {self.step} of {self.total_steps}")

    def _is_due(self, every_steps: int) -> bool:
        return self.step == self.total_steps or (every_steps > 0 and self.step % every_steps == 0)

    def _begin(self, part: Part) -> None:
        if self._clock is not None:
            self._clock.begin(part)

    def _mark(self, stage: str, *, part: Part | None = None, waits_for_ranks: bool = False) -> None:
        """Tells a watchdog what begins now, and whether some of it waits in a collective.

        `part` is what the time is counted as from now on; None goes with the present part.
        """
        if part is not None:
            self._begin(part)
        steps_done = self.step - self._compiled_from
        patience = 1.0 if steps_done else START_PATIENCE
        may_compile = steps_done < _COMPILING_STEPS or stage.startswith("evaluation")
        if self.config.efficiency.compile != "off" and may_compile:
            patience = 6.0
        waits_for_ranks = waits_for_ranks and self.ranks.world_size > 1
        stage += OR_WAITING if waits_for_ranks else ""
        mark(stage, self.step, patience=patience, waits_for_ranks=waits_for_ranks)


def _check_settings(config: TrainConfig, ranks: Ranks) -> None:
    """Refuses settings that cannot work together, before anything is built."""
    check_views(config.data.augment, objective=config.objective.name)
    for stage in config.settings_of_stages:
        local_batch_size = ranks.local_batch_size(stage.run.global_batch_size)
        check_pairs_on_one_rank(stage, local_batch_size=local_batch_size)
    if not config.run.total_steps:
        raise ValueError("the run has no length: set run.samples or run.steps")


def _check_classes(batch: Batch, config: TrainConfig) -> None:
    """Refuses batches whose classes are not those of the objective.

    The classes of images and texts are decided where the batch is made: the loss takes them as they
    are, and would take CLIP's for UniCL's.
    """
    if (batch.image_classes is None) != (config.objective.positives == "text"):
        found = "none" if batch.image_classes is None else "some"
        raise ValueError(
            f"objective.positives={config.objective.positives}, but the loader's batches have "
            f"{found} of Batch.image_classes: objective.positives=text goes without, and labels "
            "needs all classes of each image (collate makes them of image_labels)"
        )
    if config.objective.name == "clip" and (batch.text_class_ids < CAPTION_KEYS_START).any():
        raise ValueError(
            "objective.name=clip: the loader's samples have classes, and the loss would take those "
            "of one class for positives of each other: make batches with labels of -1 and without "
            "prompts, or choose objective.name=unicl"
        )
