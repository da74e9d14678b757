"""Numbers of a run: metrics.jsonl with stable keys, TensorBoard, and what is averaged in between.

Only rank 0 writes. Tensors are kept as they are until a logging step reads them, so that no other
step waits for the device. A disk that fails costs lines, not the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from unicl_fast.system.atomic_files import write_text_atomically

logger = logging.getLogger(__name__)


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
    """Appends to `metrics.jsonl` and to TensorBoard files of a run folder.

    What cannot be written is said once, and left out: metrics.jsonl goes on when the disk does (in
    a new file, where the folder has gone), TensorBoard's files end there.
    """

    def __init__(self, run_folder: Path, *, start_step: int = 0) -> None:
        """Opens the files; lines of steps after `start_step` are of a run that was cut off.

        Raises:
            OSError: the folder cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0's alone

        self._path = run_folder / "metrics.jsonl"
        if self._path.is_file():
            kept = [
                line
                for line in self._path.read_text(encoding="utf-8").splitlines()
                if _step_of(line) <= start_step
            ]
            write_text_atomically(self._path, "".join(line + "\n" for line in kept))
        self._file = _open_to_append(self._path)
        self._fails = False
        self._tensorboard: SummaryWriter | None = SummaryWriter(
            str(run_folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def write(self, values: dict[str, float | int]) -> None:
        """One line; `step` is among the values."""
        step = int(values["step"])
        try:
            self._append((json.dumps(values) + "\n").encode())
        except OSError as error:
            if not self._fails:
                logger.error(
                    "NO LINE of step %d in %s: %s; training goes on, and writes again when it can",
                    step, self._path, error,
                )  # fmt: skip
            self._fails = True
        else:
            if self._fails:
                logger.warning("%s is written again, from step %d on", self._path, step)
            self._fails = False
        with self._tensorboard_or_none():
            if self._tensorboard is not None:
                for name, value in values.items():
                    if name != "step":
                        self._tensorboard.add_scalar(name, value, global_step=step)

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it: the next one must not stick to half a line."""
        if not self._path.exists():  # the folder was moved or removed
            self._file.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_to_append(self._path)
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self._file.truncate(size)
            raise

    @contextlib.contextmanager
    def _tensorboard_or_none(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # its thread has died of it
            logger.error("NO MORE TensorBoard files: %s; training goes on", error)
            self._tensorboard = None

    def close(self) -> None:
        """Closes the files; what TensorBoard could not write is said, not raised."""
        self._file.close()
        with self._tensorboard_or_none():
            if self._tensorboard is not None:
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


def unwritten_evaluations(
    lines: Iterable[Mapping[str, float]], names: Collection[str], *, step: int
) -> list[str]:
    """Those of the named evaluations that have no line among those of metrics.jsonl at `step`."""
    written = {key for line in lines if line["step"] == step for key in line}
    return [name for name in names if not any(key.startswith(f"{name}/") for key in written)]


def _open_to_append(path: Path) -> io.FileIO:
    return io.FileIO(path, "a")  # unbuffered: what is refused does not come back later


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off in the middle of writing
