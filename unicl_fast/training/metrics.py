"""The numbers of a run: metrics.jsonl with stable keys, and averages between its lines.

Only rank 0 writes. Tensors are kept until a logging step reads them, so that no other step waits
for the device. A disk that fails costs lines, not the run.
"""

import collections
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl_fast.batch import Batch, send
from unicl_fast.distributed.ranks import Ranks, sum_over_ranks
from unicl_fast.system.atomic_files import is_at, write_text_atomically
from unicl_fast.system.machine import resident_bytes
from unicl_fast.system.untrusted_files import open_file, read_file
from unicl_fast.system.wording import shorten
from unicl_fast.training.step_clock import NO_TRAINING, Part, StepClock
from unicl_fast.training.trackers import Trackers

logger = logging.getLogger(__name__)

MEAN_METRIC = "evaluated/mean"
"""The mean of the main metrics, if a run has several evaluations; each label column is one."""
METRICS_NAME = "metrics.jsonl"
_MOST_BYTES = 4 << 30  # of a file that is read: some five million lines
_RECENT_SUMMARIES = 20  # whose steps predict the time of the next ones


class Reading(NamedTuple):
    """Numbers of the steps of a line, on the host."""

    steps: list[tuple[float, float]]  # loss and gradient norm before clipping, of each step
    numbers: list[float]  # the numbers given to `begin_line`
    seconds: dict[Part, float]


class StepMeter:
    """Collects the results of steps between two lines; only reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        """Its clock begins now."""
        self.clock = StepClock(device)
        self._device = device
        self._on_device: list[Tensor] = []
        self._num_steps, self._num_summaries, self._seconds_beside = 0, 0, 0.0
        self._recent = collections.deque[tuple[float, int]](maxlen=_RECENT_SUMMARIES)

    def __len__(self) -> int:
        """Steps since the last line."""
        return len(self._on_device)

    def add(self, *, loss: Tensor, grad_norm: Tensor) -> None:
        """Notes the results of a step, which ends here."""
        self._on_device.append(torch.stack([loss.detach(), grad_norm.detach()]))
        self.clock.begin("other")

    def read(self) -> list[tuple[float, float]]:
        """Loss and gradient norm before clipping, of each step since the last line."""
        if not self._on_device:
            return []
        return [(loss, norm) for loss, norm in torch.stack(self._on_device).double().tolist()]

    def begin_line(self, numbers: Sequence[Tensor]) -> Callable[[], Reading]:
        """Ends the steps of a line; returns a function that waits for the device to finish them.

        `numbers` [0-d] on the device are read together with the results of the steps.
        """
        steps, self._on_device = torch.stack(self._on_device).double(), []
        more = [number.detach().double().reshape(1) for number in numbers]
        on_host = torch.cat([steps.flatten(), *more]).to("cpu", non_blocking=True)
        read_seconds = self.clock.cut()  # the copy comes before

        def read() -> Reading:
            seconds, values = read_seconds(), on_host.tolist()
            of_steps, others = values[: 2 * len(steps)], values[2 * len(steps) :]
            pairs = zip(of_steps[::2], of_steps[1::2], strict=True)
            return Reading(list(pairs), others, seconds)

        return read

    def summary(
        self, line: Reading, *, samples: int, world_size: int = 1, steps_left: int = 0
    ) -> dict[str, float]:
        """Means and rates of a line whose steps had `samples`.

        `seconds/PART` are means of the steps, and sum to all the time that has passed; rates leave
        out the parts in `NO_TRAINING`.
        """
        steps, sums = line.steps, line.seconds
        values: dict[str, float] = {}
        # JSON has no infinity: skips bad steps and overflows of the loss scaler
        for name, column in zip(("loss", "grad_norm"), zip(*steps, strict=True), strict=True):
            if finite := [value for value in column if math.isfinite(value)]:
                values[name] = sum(finite) / len(finite)
        beside = sum(sums[part] for part in NO_TRAINING)
        elapsed = sum(sums.values()) - beside
        values["images_per_second"] = samples / elapsed
        values["images_per_second_per_device"] = values["images_per_second"] / world_size
        values["data_wait_fraction"] = sums["data_wait"] / elapsed
        values["step_seconds"] = elapsed / len(steps)
        values |= {f"seconds/{part}": seconds / len(steps) for part, seconds in sums.items()}
        values["eta_seconds"] = steps_left * self._pace(elapsed, beside, len(steps))
        return values | _memory(self._device)

    def _pace(self, elapsed: float, beside: float, num_steps: int) -> float:
        """Seconds that a coming step will need, evaluations and checkpoints included.

        Training is averaged over recent steps; the rest, which is rare, over all.
        """
        if self._num_summaries == 1:  # the first compiled kernels and filled caches
            self._recent.clear()
        self._recent.append((elapsed, num_steps))
        self._num_summaries += 1
        self._num_steps += num_steps
        self._seconds_beside += beside
        recent = sum(seconds for seconds, _ in self._recent) / sum(n for _, n in self._recent)
        return recent + self._seconds_beside / self._num_steps


def _memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, and a GPU's peak allocation since the last call."""
    values: dict[str, float] = {"host_memory_bytes": resident_bytes()}
    if device.type == "cuda":
        values["device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return values


def add_up(
    sums: Mapping[str, float | Tensor], ranks: Ranks, device: torch.device
) -> Float[Tensor, " n"]:
    """Sums numbers [0-d] of host or device over ranks; on the device, in their order."""
    of_host = [0.0 if isinstance(one, Tensor) else float(one) for one in sums.values()]
    added = send(torch.tensor(of_host, dtype=torch.float64), device)
    for row, one in enumerate(sums.values()):
        if isinstance(one, Tensor):
            added[row] = one
    return sum_over_ranks(added, ranks)


def count_positives(batch: Batch, text_classes: Int[Tensor, " n"]) -> Int[Tensor, " b"]:
    """For each image, the samples of the global batch with a text of its classes."""
    classes = batch.targets.class_ids
    samples = torch.arange(batch.batch_size, device=classes.device)
    if batch.targets.image_classes is not None:
        samples, classes = batch.targets.image_classes
    known = text_classes.sort().values
    found = torch.searchsorted(known, classes, right=True) - torch.searchsorted(known, classes)
    return torch.zeros_like(batch.targets.class_ids).index_add_(0, samples, found)


class MetricsWriter:
    """Appends to `metrics.jsonl` of a run folder, and hands each line to the run's trackers.

    Lines that cannot be written are reported once and left out. Writing continues when the disk
    works again (in a new file, if the folder is gone).
    """

    def __init__(
        self, run_folder: Path, *, start_step: int = 0, trackers: Trackers | None = None
    ) -> None:
        """Opens the file; drops lines of steps after `start_step`, which a crash left.

        Raises OSError: the folder cannot be written.
        """
        self._path = run_folder / METRICS_NAME
        if self._path.is_file():
            lines = [json.dumps(line) + "\n" for line in lines_until(run_folder, start_step)]
            write_text_atomically(self._path, "".join(lines))
        self._open()
        self._fails, self._trackers = False, trackers

    def write(self, values: Mapping[str, float]) -> None:
        """Writes one line; `step` is among the values."""
        step = int(values["step"])
        try:
            self._append((json.dumps(values) + "\n").encode())
        except OSError as error:
            if not self._fails:
                logger.error(
                    "NO LINE of step %d in %s: %s; training continues, and writes again when it "
                    "can", step, self._path, error,
                )  # fmt: skip
            self._fails = True
        else:
            if self._fails:
                logger.warning("%s is written again, from step %d on", self._path, step)
            self._fails = False
        if self._trackers is not None:
            self._trackers.log(values)

    def _open(self) -> None:
        # unbuffered: refused bytes must not come back later
        self._file = open_file(self._path, "ab", buffering=0)

    def _append(self, line: bytes) -> None:
        """Appends the whole line or nothing: the next one must not stick to half a line."""
        if not is_at(self._file.fileno(), self._path):
            self._file.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            logger.warning(
                "%s was moved, removed or replaced while the run wrote to it: its lines continue "
                "in the file that is there now", self._path,
            )  # fmt: skip
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; damaged ones are left out, with a warning.

    A last line that was cut off is left out too: the run was ended there.
    """
    path = run_folder / METRICS_NAME
    *lines, cut_off = read_file(path, most_bytes=_MOST_BYTES).split(b"\n")
    found = [_parse_line(line) for line in lines]
    damaged = [number for number, values in enumerate(found) if values is None]
    if damaged:
        logger.warning(
            "%s: line %d is damaged and is left out: %s (%d of %d lines are)",
            path, damaged[0] + 1, shorten(lines[damaged[0]]), len(damaged), len(lines),
        )  # fmt: skip
    return [values for values in [*found, _parse_line(cut_off)] if values is not None]


def main_metrics(evaluations: Iterable[str]) -> dict[str, str]:
    """The key of metrics.jsonl by which each evaluation is judged."""
    return {
        name: f"{name}/{'recall_at_1' if name.startswith('retrieval/') else 'top1'}"
        for name in evaluations
    }


def mean_of_main(evaluations: Iterable[str], values: Mapping[str, float]) -> dict[str, float]:
    """`MEAN_METRIC` of several evaluations, if `values` have all of them; else nothing."""
    keys = main_metrics(evaluations).values()
    if len(keys) < 2 or not all(key in values for key in keys):
        return {}
    columns = ([one for name, one in values.items() if name.startswith(f"{key}/")] for key in keys)
    each = [own or [values[key]] for key, own in zip(keys, columns, strict=True)]
    return {MEAN_METRIC: fmean(itertools.chain(*each))}


def choose_best_metric(choice: str, evaluations: Iterable[str]) -> str | None:
    """The key of metrics.jsonl for `checkpoint.best`; ValueError if no evaluation measures it."""
    defaults = main_metrics(evaluations)
    if choice == "none" or not (choice or defaults):
        return None
    if not choice:
        return MEAN_METRIC if len(defaults) > 1 else next(iter(defaults.values()))
    if choice != MEAN_METRIC and not any(choice.startswith(f"{name}/") for name in defaults):
        known = ", ".join(defaults.values()) or "none: set data.evaluate"
        raise ValueError(
            f"checkpoint.best={choice}: no evaluation of this run gives that number; it has {known}"
        )
    return choice


def lines_until(run_folder: Path, step: int) -> list[dict[str, float]]:
    """The lines that a run keeps when it resumes from a step; none if there is no file."""
    if not (run_folder / METRICS_NAME).is_file():
        return []
    return [line for line in read_metrics(run_folder) if line["step"] <= step]


def _parse_line(line: bytes) -> dict[str, float] | None:
    """Reads numbers by name, a step among them; None for any other line."""
    try:
        values = json.loads(line.decode("utf-8"))
        is_sound = type(values["step"]) is int and all(
            type(value) is float or (type(value) is int and abs(value) < 2**63)
            for value in values.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return values if is_sound else None
