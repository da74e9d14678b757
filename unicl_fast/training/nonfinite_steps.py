"""Steps whose loss or gradient norm is not finite: which samples they saw, and how many may be.

The update of such a step is masked on the device (`optim.update`), and the host learns of it
at the next logging or checkpoint. Until then it remembers which samples each step had, from records
that are on the host anyway. All ranks see the same loss and norm, so all judge alike.
"""

from __future__ import annotations

import collections
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks, gather_objects

logger = logging.getLogger(__name__)

_REMEMBERED_STEPS = 512
"""At 4,096 samples a rank that is 50 MB; who logs more seldom still has the step's number."""

_RECORDS = ("source_ids", "sample_ids", "scheduled_ids")


class BadSteps:
    """Finds them, writes down what they had seen, and stops the run when they are too many."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        ranks: Ranks,
        run_folder: Path | None,
        scales_loss: bool,
    ) -> None:
        """Of a run that starts with step 0.

        Args:
            config: the run's; `run.max_bad_steps` is how many are left out before the run stops.
            ranks: this process among its peers.
            run_folder: where `non-finite-step-XXXXXXXX.json` goes; None writes nothing.
            scales_loss: whether a loss scaler tries how far gradients can go (fp16): then a norm
                that is not finite is its business.
        """
        self.count = 0
        """Bad steps of this process so far."""
        self._config, self._ranks, self._run_folder = config, ranks, run_folder
        self._scales_loss = scales_loss
        self._judged = 0
        self._remembered: collections.deque[tuple[int, dict[str, Tensor | None]]]
        self._remembered = collections.deque(maxlen=_REMEMBERED_STEPS)

    def start_at(self, step: int) -> None:
        """The run goes on from `step`; what was judged before may come again."""
        self._judged = step
        self._remembered.clear()

    def remember(self, batch: Batch) -> None:
        """Keeps which samples a batch holds, until it is judged. Reads nothing from the device."""
        self._remembered.append((batch.step, {name: getattr(batch, name) for name in _RECORDS}))

    def judge(
        self,
        steps: Sequence[tuple[float, float]],
        *,
        done: int,
        last_metrics: Mapping[str, float],
    ) -> None:
        """Looks at the steps that were not judged yet; all ranks together.

        Args:
            steps: loss and gradient norm of the last steps.
            done: how many steps the run has done; `steps` ends there.
            last_metrics: what was logged last.

        Raises:
            FloatingPointError: one bad step more than `run.max_bad_steps`; names it.
        """
        for step, (loss, grad_norm) in enumerate(steps, start=done - len(steps)):
            if step < self._judged:
                continue
            self._judged = step + 1
            watched = {"loss": loss}
            if not self._scales_loss:
                watched["gradient norm"] = grad_norm
            what = [name for name, value in watched.items() if not math.isfinite(value)]
            if what:
                self._meet(step, what[0], loss, grad_norm, last_metrics)
        self._remembered.clear()

    def _meet(
        self,
        step: int,
        what: str,
        loss: float,
        grad_norm: float,
        last_metrics: Mapping[str, float],
    ) -> None:
        self.count += 1
        allowed = self._config.run.max_bad_steps
        value = loss if what == "loss" else grad_norm
        told = f"the {what} of step {step} is {value}, and the update was left out"
        where = self._write(step, loss, grad_norm, last_metrics)
        if self.count > allowed:
            many = f" (bad step {self.count}, run.max_bad_steps={allowed})" if allowed else ""
            raise FloatingPointError(
                f"{told}{many}: lower optim.lr or lengthen the warm-up; checkpoints are from "
                f"before{where}"
            )
        if self._ranks.is_main:
            logger.error(
                "BAD STEP %d of at most %d: %s; training goes on%s",
                self.count,
                allowed,
                told,
                where,
            )

    def _write(
        self, step: int, loss: float, grad_norm: float, last_metrics: Mapping[str, float]
    ) -> str:
        """Writes down the step with the samples of all ranks; says where, for a message."""
        records: Mapping[str, Tensor | None] = dict(self._remembered).get(step, {})
        mine = {
            name: None if records.get(name) is None else records[name].tolist()  # type: ignore[union-attr]
            for name in _RECORDS
        }
        shares = gather_objects(mine, self._ranks)
        if self._run_folder is None:
            return ""
        path = self._run_folder / f"non-finite-step-{step:08d}.json"
        if self._ranks.is_main:
            values = {
                "step": step,
                "loss": _in_json(loss),
                "grad_norm": _in_json(grad_norm),
                "last_metrics": {name: _in_json(value) for name, value in last_metrics.items()},
                "seed": self._config.run.seed,
                "global_batch_size": self._config.run.global_batch_size,
                "sources": list(self._config.data.train),
                "ranks": [{"rank": rank, **share} for rank, share in enumerate(shares)],
            }
            try:
                path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                logger.error("the samples of step %d cannot be written down: %s", step, error)
        return f"; its samples are in {path}"


class KeptStatistics:
    """BatchNorm's averages, put back after a bad step, whose activations they have taken in.

    Weights and the optimizer's state are masked; these a forward pass has changed by then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[Tensor] = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers()
        ]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Before a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def put_back_where(self, is_bad: Tensor) -> None:
        """After it; `is_bad` is bool [] on the device, and stays there."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(is_bad, kept, buffer))


def _in_json(value: Any) -> Any:
    """JSON knows no infinity."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
