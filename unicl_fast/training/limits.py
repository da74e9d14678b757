"""Limits of a run: non-finite steps and replaced samples.

Steps and samples are counted on every rank and judged at logging steps, on all ranks alike, so that
no other step waits for the device or for another rank. What is counted is on the host anyway: a
`Batch` tells which samples it holds and which were planned.
"""

from __future__ import annotations

import collections
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import QUARANTINE_NAME, TooManyBadSamplesError
from unicl_fast.distributed.ranks import Ranks, gather_objects, sum_integers
from unicl_fast.stages import span_at
from unicl_fast.system.wording import without_secrets

logger = logging.getLogger(__name__)

LEAST_DRAWS = 10_000
"""The limit on replaced samples is a fraction of at least so many draws: a few at the start of a
run do not stop it."""
_REMEMBERED_STEPS = 512
"""At 4,096 samples a rank that is 50 MB. A run that logs more seldom still knows the step."""
_RECORDS = ("source_ids", "sample_ids", "scheduled_ids")


class NonfiniteSteps:
    """Finds steps whose loss or gradient norm is not finite, and stops a run with too many of them.

    Their update has been masked on the device (`optim.update`); the samples they saw are written
    to `non-finite-step-XXXXXXXX.json`.
    """

    def __init__(
        self, config: TrainConfig, *, ranks: Ranks, run_folder: Path | None, scaler: GradScaler
    ) -> None:
        """Gradient norms that are not finite are the scaler's business where it is enabled."""
        self.count = 0
        """Non-finite steps of this process so far."""
        self._config, self._ranks, self._run_folder = config, ranks, run_folder
        self._scaler = scaler
        self._judged = 0
        self._remembered: collections.deque[tuple[int, dict[str, Tensor | None]]]
        self._remembered = collections.deque(maxlen=_REMEMBERED_STEPS)

    def start_at(self, step: int) -> None:
        """Resumes from `step`: steps that were judged before may come again."""
        self._judged = step
        self._remembered.clear()

    def remember(self, batch: Batch) -> None:
        """Keeps which samples a batch holds, until its step is judged."""
        self._remembered.append((batch.step, {name: getattr(batch, name) for name in _RECORDS}))

    def judge(
        self, steps: Sequence[tuple[float, float]], *, done: int, last_metrics: Mapping[str, float]
    ) -> None:
        """Looks at the steps that were not judged yet; all ranks call it together.

        `steps` holds loss and gradient norm of the last ones of the `done` steps of the run.

        Raises:
            FloatingPointError: one more than `run.max_bad_steps`, or gradients that overflow at
                any loss scale; names the step.
        """
        scales_loss = self._scaler.is_enabled()
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
            values = {"step": step, "loss": loss, "grad_norm": grad_norm}
            where = self._write(values, last_metrics)
            self._report(f"{fault}, and the update was left out", where)
        self._remembered.clear()
        overflowed = bool(steps) and not any(math.isfinite(norm) for _, norm in steps)
        # updates are left out while the scale halves; below 1 it has nothing more to give
        if overflowed and scales_loss and self._scaler.get_scale() < 1:
            raise FloatingPointError(
                f"no gradient of the {len(steps)} steps before step {done} was finite in fp16, "
                "whatever the loss scale: use efficiency.precision=bf16"
            )

    def _report(self, fault: str, where: str) -> None:
        allowed = self._config.run.max_bad_steps
        if self.count > allowed:
            if allowed:
                fault += f" (non-finite step {self.count}, run.max_bad_steps={allowed})"
            raise FloatingPointError(
                f"{fault}: lower optim.lr or lengthen the warm-up; checkpoints are from "
                f"before{where}"
            )
        if self._ranks.is_main:
            logger.error(
                "NON-FINITE STEP %d of at most %d: %s; training continues%s",
                self.count, allowed, fault, where,
            )  # fmt: skip

    def _write(self, values: dict[str, Any], last_metrics: Mapping[str, float]) -> str:
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
                "last_metrics": _for_json(last_metrics),
                "seed": self._config.run.seed,
                "global_batch_size": span_at(self._config.run.spans, step).global_batch_size,
                "sources": list(map(without_secrets, self._config.data.train)),
                "ranks": [{"rank": rank, **samples} for rank, samples in enumerate(every)],
            }
            try:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                logger.error("the samples of step %d cannot be written down: %s", step, error)
        return f"; its samples are in {path}"


class BatchNormBackup:
    """Puts back BatchNorm's averages, which the forward pass of a non-finite step has changed."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._buffers: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the averages, before a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_where(self, is_bad: Tensor) -> None:
        """Restores them after it, where `is_bad` (bool [] on the device, which is not read)."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(is_bad, kept, buffer))


def count_replaced(batch: Batch) -> int:
    """Samples of a local batch that stand for bad ones."""
    if batch.sample_ids is None or batch.scheduled_ids is None:
        return 0
    differ = batch.sample_ids.numpy() != batch.scheduled_ids.numpy()  # both on the host
    return int(np.count_nonzero(differ))


class ReplacedSamples:
    """Counts draws of another sample than the planned one, since this process began to train."""

    def __init__(self, config: TrainConfig, *, run_folder: Path | None) -> None:
        """Takes the limit from the config; `run_folder` is for the message."""
        self._max_fraction = config.data.max_bad_fraction
        self._spans = config.run.spans
        self._where = "the log" if run_folder is None else str(run_folder / QUARANTINE_NAME)
        self._replaced = 0
        self._draws = 0

    def add(self, batch: Batch) -> None:
        """Counts this rank's samples of one step."""
        self._draws += span_at(self._spans, batch.step).global_batch_size
        self._replaced += count_replaced(batch)

    def total(self, ranks: Ranks) -> int:
        """Adds up the counts of all ranks, which call it together."""
        return sum_integers([self._replaced], ranks)[0]

    def check(self, total: int) -> None:
        """Stops a run whose limit `total` exceeds; the same on all ranks.

        Raises:
            TooManyBadSamplesError: names the file that lists them.
        """
        if total > self._max_fraction * max(self._draws, LEAST_DRAWS):
            raise TooManyBadSamplesError(
                f"{total} of the {self._draws} samples since this start were bad and had to be "
                f"replaced, more than data.max_bad_fraction = {self._max_fraction} (of at least "
                f"{LEAST_DRAWS}) allows: {self._where} says which and why; mend the data, or set "
                "data.max_bad_fraction higher"
            )


def _for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spells numbers that are not finite as text, since JSON has none."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
