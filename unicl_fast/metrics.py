"""Numbers of a run: metrics.jsonl with stable keys, TensorBoard, and what is averaged in between.

Only rank 0 writes. Tensors are kept as they are until a logging step reads them, so that no other
step waits for the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class StepMeter:
    """Collects between two logging steps; only `read` and `summary` wait for the device."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._on_device: list[Tensor] = []
        self._wait_seconds = 0.0
        self._started = time.perf_counter()

    def add(self, *, loss: Tensor, grad_norm: Tensor, wait_seconds: float) -> None:
        self._on_device.append(torch.stack([loss.detach(), grad_norm.detach()]))
        self._wait_seconds += wait_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training, and does not count in the rates."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def read(self) -> list[tuple[float, float]]:
        """Loss and gradient norm before clipping, of each step since the last summary."""
        if not self._on_device:
            return []
        return [(loss, norm) for loss, norm in torch.stack(self._on_device).double().tolist()]

    def summary(self, *, global_batch_size: int) -> dict[str, float]:
        """Means since the last summary, and rates; starts anew.

        Args:
            global_batch_size: samples of all ranks in a step.
        """
        steps = self.read()
        values = {}
        # JSON knows no infinity: steps that were left out, and overflows of the loss scaler
        for name, column in (("loss", 0), ("grad_norm", 1)):
            finite = [step[column] for step in steps if math.isfinite(step[column])]
            if finite:
                values[name] = _mean(finite)
        elapsed = time.perf_counter() - self._started
        values["images_per_second"] = len(steps) * global_batch_size / elapsed
        values["data_wait_fraction"] = self._wait_seconds / elapsed
        values["step_seconds"] = elapsed / len(steps)
        self._start_anew()
        return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard files of a run folder."""

    def __init__(self, run_folder: Path, *, start_step: int = 0) -> None:
        """Opens the files; lines of steps after `start_step` are of a run that was cut off."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0's alone

        self._path = run_folder / "metrics.jsonl"
        if self._path.is_file():
            kept = [
                line
                for line in self._path.read_text(encoding="utf-8").splitlines()
                if _step_of(line) <= start_step
            ]
            self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(run_folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def write(self, values: dict[str, float | int]) -> None:
        """One line; `step` is among the values."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        step = int(values["step"])
        for name, value in values.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: no such file.
    """
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def unwritten_evaluations(run_folder: Path, names: Collection[str], *, step: int) -> list[str]:
    """Those of the named evaluations that have no line in metrics.jsonl at `step`."""
    lines = [line for line in read_metrics(run_folder) if line["step"] == step]
    written = {key for line in lines for key in line}
    return [name for name in names if not any(key.startswith(f"{name}/") for key in written)]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off in the middle of writing
