"""Limits of a run: non-finite steps, replaced samples, evaluations without progress.

Every rank counts steps and samples; they are judged at logging steps, on all ranks alike, so that
no other step waits for the device or another rank. A `Batch` has the ids of the samples that it
holds, and of the planned ones, on the host.
"""

import collections
import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.config import RunConfig
from unicl_fast.dataset.manifest import QUARANTINE_NAME
from unicl_fast.dataset.reader import TooManyBadSamplesError
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_objects
from unicl_fast.stages import Span, span_at
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.training.metrics import choose_best_metric, lines_until
from unicl_fast.training.trainer import Observer, Trainer

logger = logging.getLogger(__name__)

LEAST_DRAWS = 10_000
"""The limit on replaced samples is a part of at least this many: a few early ones stop no run."""
_REMEMBERED_STEPS = 512  # 50 MB at 4,096 samples a rank; older steps are reported without samples
_RECORDS = ("source_ids", "sample_ids", "scheduled_ids")


class NonfiniteSteps(Observer):
    """Finds steps whose loss or gradient norm is not finite, and stops a run with too many of them.

    Their update was masked on the device (`optim.update`); their samples are written to
    `non-finite-step-XXXXXXXX.json`.
    """

    def __init__(
        self, config: RunConfig, *, sources: Sequence[str], ranks: Ranks, run_folder: Path | None
    ) -> None:
        """The limit is the config's; samples of `sources` are listed in `run_folder`."""
        self.count = 0
        """Non-finite steps of this process so far."""
        self._config, self._ranks, self._run_folder = config, ranks, run_folder
        self._sources = [without_secrets(one) for one in sources]
        self._judged = 0
        self._last_metrics: dict[str, float] = {}
        self._remembered: collections.deque[tuple[int, dict[str, Tensor | None]]]
        self._remembered = collections.deque(maxlen=_REMEMBERED_STEPS)

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        """Judges steps anew that a resume repeats."""
        self._judged = run.step
        self._remembered.clear()
        yield

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        self._remembered.append((batch.step, {name: getattr(batch, name) for name in _RECORDS}))

    def measure(self, run: Trainer, sums: Mapping[str, float], values: dict[str, float]) -> None:
        values["nonfinite_steps"] = self.count

    def on_log(self, run: Trainer, batch: Batch, values: dict[str, float]) -> None:
        self._last_metrics = dict(values)

    def check(self, run: Trainer, steps: Sequence[tuple[float, float]], *, done: int) -> None:
        """Judges the steps that are new; all ranks call it together.

        The loss scaler, if enabled, handles gradient norms that are not finite.

        Raises FloatingPointError: one more than `run.max_bad_steps`, or gradients that overflow at
        any loss scale; names the step.
        """
        scales_loss = run.scaler.is_enabled()
        for step, (loss, grad_norm) in enumerate(steps, start=done - len(steps)):
            if step < self._judged:
                continue
            self._judged = step + 1
            if not math.isfinite(loss):
                fault = f"the loss of step {step} is {loss}"
            elif not (math.isfinite(grad_norm) or scales_loss):
                fault = f"the gradient norm of step {step} is {grad_norm}"
            else:
                continue
            self.count += 1
            written = self._write({"step": step, "loss": loss, "grad_norm": grad_norm})
            self._report(f"{fault}, and the update was left out", written)
        self._remembered.clear()
        overflowed = bool(steps) and not any(math.isfinite(norm) for _, norm in steps)
        # updates are left out while the scale halves; below 1 that cannot help
        if overflowed and scales_loss and run.scaler.get_scale() < 1:
            raise FloatingPointError(
                f"no gradient of the {len(steps)} steps before step {done} was finite in fp16, "
                "at any loss scale: use efficiency.precision=bf16"
            )

    def _report(self, fault: str, written: str) -> None:
        allowed = self._config.max_bad_steps
        if self.count > allowed:
            if allowed:
                fault += f" (non-finite step {self.count}, run.max_bad_steps={allowed})"
            raise FloatingPointError(
                f"{fault}: lower optim.lr or lengthen the warm-up; checkpoints are from "
                f"before{written}"
            )
        if self._ranks.is_main:
            logger.error(
                "NON-FINITE STEP %d of at most %d: %s; training continues%s",
                self.count, allowed, fault, written,
            )  # fmt: skip

    def _write(self, values: dict[str, Any]) -> str:
        """Writes the step with the samples of all ranks; returns the end of a message about it."""
        step = values["step"]
        columns = dict(self._remembered).get(step, dict.fromkeys(_RECORDS))
        own = {name: None if ids is None else ids.tolist() for name, ids in columns.items()}
        every = gather_objects(own, self._ranks)
        if self._run_folder is None:
            return ""
        path = self._run_folder / f"non-finite-step-{step:08d}.json"
        if self._ranks.is_main:
            content = {
                **_for_json(values),
                "last_metrics": _for_json(self._last_metrics),
                "seed": self._config.seed,
                "global_batch_size": span_at(self._config.spans, step).global_batch_size,
                "sources": self._sources,
                "ranks": [{"rank": rank, **samples} for rank, samples in enumerate(every)],
            }
            try:
                write_text_atomically(path, json.dumps(content, indent=1) + "\n")
            except OSError as error:
                logger.error("the samples of step %d cannot be written down: %s", step, error)
        return f"; its samples are in {path}"


class ReplacedSamples(Observer):
    """Counts draws of other samples than planned, since this process began to train."""

    def __init__(
        self, max_fraction: float, spans: Sequence[Span], *, run_folder: Path | None
    ) -> None:
        """`max_fraction` is the limit; `run_folder` is for the message."""
        self._max_fraction, self._spans = max_fraction, spans
        self._where = "the log" if run_folder is None else str(run_folder / QUARANTINE_NAME)
        self.replaced = 0
        """Replaced samples of this rank."""
        self._draws = 0

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        self._draws += span_at(self._spans, batch.step).global_batch_size
        if batch.sample_ids is not None and batch.scheduled_ids is not None:
            self.replaced += int((batch.sample_ids != batch.scheduled_ids).sum())

    def contribute(self, run: Trainer, batch: Batch, sums: dict[str, float | Tensor]) -> None:
        sums["replaced_samples"] = self.replaced

    def measure(self, run: Trainer, sums: Mapping[str, float], values: dict[str, float]) -> None:
        values["replaced_samples"] = int(sums["replaced_samples"])

    def on_log(self, run: Trainer, batch: Batch, values: dict[str, float]) -> None:
        """Stops a run that has replaced too many, once the line is written; on all ranks alike.

        Raises TooManyBadSamplesError: names the file that lists them.
        """
        total = int(values["replaced_samples"])
        if total > self._max_fraction * max(self._draws, LEAST_DRAWS):
            raise TooManyBadSamplesError(
                f"{total} of the {self._draws} samples since this start were bad and had to be "
                f"replaced, more than data.max_bad_fraction = {self._max_fraction} (of at least "
                f"{LEAST_DRAWS}) allows: {self._where} says which and why; mend the data, or set "
                "data.max_bad_fraction higher"
            )


class Patience(Observer):
    """Ends a run that `run.patience` evaluations in a row have not made better."""

    def __init__(self, patience: int, folder: Path | None) -> None:
        """0 is endless; `folder` has the metrics of earlier starts."""
        self._patience, self._folder = patience, folder
        self._metric: str | None = None
        self._values: dict[int, float] = {}  # by step: a resumed run can repeat an evaluation

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        """Reads the results of earlier starts."""
        self._metric = choose_best_metric(run.config.checkpoint.best, run.evaluations)
        if self._metric is None and self._patience:
            logger.warning(
                "run.patience=%d never ends the run: nothing is judged by checkpoint.best=%s; give "
                "data.evaluate", self._patience, run.config.checkpoint.best,
            )  # fmt: skip
        known: list[tuple[int, float]] = []
        if self._metric is not None and self._folder is not None and run.ranks.is_main:
            metric, lines = self._metric, lines_until(self._folder, run.step)
            known = [(int(one["step"]), one[metric]) for one in lines if metric in one]
        self._values = dict(from_rank_0(known, run.ranks))
        run.ends_early = self._has_waited()
        yield

    def on_evaluated(self, run: Trainer, values: Mapping[str, float], *, all_done: bool) -> None:
        if self._metric is not None and self._metric in values:
            self._values[run.step] = values[self._metric]
        if self._has_waited() and run.step < run.total_steps:
            run.ends_early = True
            logger.info(
                "the run ends at step %d of %d: %s has not risen in %s (run.patience)",
                run.step, run.total_steps, self._metric,
                count_of(self._patience, "evaluation"),
            )  # fmt: skip

    def _has_waited(self) -> bool:
        values = list(self._values.values())
        best = max(range(len(values)), key=values.__getitem__, default=0)
        return 0 < self._patience <= len(values) - 1 - best


def _for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spells numbers that are not finite as text, since JSON has none."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
