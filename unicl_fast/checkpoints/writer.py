"""Writes checkpoints while training continues, one at a time, and keeps the best one.

Training waits for the copy to the host (0.3 s for 1.5 GB, on one core) and for the previous
checkpoint: none is skipped, and only one copy needs memory.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicl_fast.checkpoints.files import (
    Best,
    checkpoint_name,
    find_best,
    remove_old,
    set_later_checkpoints_aside,
    write_best,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

_NOTEWORTHY_SECONDS = 1.0
_ALIGNMENT = 8  # bytes of the widest type


class CheckpointWriter:
    """Writes the checkpoints of one run; used by one thread."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Writes nothing yet. The `keep` newest checkpoints and the best will stay (0: all)."""
        self.folder, self.keep = folder, keep
        self.best: Best | None = None
        """The best step whose checkpoint is on the disk."""
        self._copies = HostCopies()
        self._metric: str | None = None
        self._thread: threading.Thread | None = None
        self._pinning: threading.Thread | None = None
        self._fault: BaseException | None = None

    def begin(self, *, step: int, metric: str | None, lines: Iterable[Mapping[str, float]]) -> None:
        """Prepares the folder for a run that resumes from `step`: renames later checkpoints.

        The best has the highest value of `metric` in `lines`, which are those of metrics.jsonl up
        to the step; without a metric there is no new best. Raises OSError if the disk fails.
        """
        self.wait()
        set_later_checkpoints_aside(self.folder, step=step)
        self._metric = metric
        self.best = find_best(self.folder, metric=metric, lines=lines)
        if self.folder.is_dir():
            write_best(self.folder, self.best)

    def write(
        self,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        step: int,
        required: bool,
    ) -> None:
        """Copies the tensors now, and writes `step-XXXXXXXX` now (if `required`) or in a thread.

        Raises OSError if it is `required` and cannot be written. Otherwise the error is logged and
        training continues: the next one can fit on the disk.
        """
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if waited > _NOTEWORTHY_SECONDS:
            logger.warning(
                "training waited %.1f s at step %d for the previous checkpoint: raise "
                "checkpoint.every_steps, or write to a faster disk", waited, step,
            )  # fmt: skip
        copies = self._copies.take(files)

        def write_and_tidy() -> None:
            self._copies.wait()
            write_checkpoint(self.folder, step=step, files=copies, state=state)
            self._remove_old()

        if required:
            write_and_tidy()
        else:
            self._thread = self._start(write_and_tidy, failed=f"NO CHECKPOINT of step {step}")

    def better_than_best(self, step: int, numbers: Mapping[str, float]) -> Best | None:
        """Returns the step as the new best if its result is higher than the best so far."""
        if self._metric is None:
            return None
        if self._metric not in numbers:
            logger.warning(
                "no best checkpoint is kept: checkpoint.best means %s, but evaluations give %s",
                self._metric, ", ".join(numbers) or "nothing",
            )  # fmt: skip
            self._metric = None
            return None
        if self._pinning is not None:
            self._pinning.join()  # of an earlier evaluation
        value = numbers[self._metric]
        if not math.isfinite(value) or (self.best is not None and value <= self.best.value):
            return None
        return Best(step, self._metric, value)

    def keep_as_best(self, best: Best) -> None:
        """Makes the step the best once its checkpoint, which must have been begun, is written."""

        def pin() -> None:
            if not (self.folder / checkpoint_name(best.step)).is_dir():
                raise OSError("its checkpoint could not be written")
            write_best(self.folder, best)
            self.best = best
            self._remove_old()

        failed = f"step {best.step} is the best so far, but its checkpoint is not kept"
        self._thread = self._pinning = self._start(pin, failed=failed)

    def wait(self) -> None:
        """Waits until all is written; raises RuntimeError for errors other than OSError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._pinning = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise RuntimeError(f"writing a checkpoint failed: {fault!r}") from fault

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Waits until all is written when the block ends, but not after a KeyboardInterrupt."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            if self._thread is not None:
                self._thread.join()
            raise
        self.wait()

    def _start(self, job: Callable[[], None], *, failed: str) -> threading.Thread:
        """Runs a job after the previous one, in a daemon thread: Ctrl-C waits for no slow disk."""
        before = self._thread

        def work() -> None:
            if before is not None:
                before.join()
            try:
                job()
            except OSError as error:
                logger.error("%s: %s; training continues", failed, error)
            except BaseException as fault:  # raised by the next `wait`
                self._fault = fault

        thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        thread.start()
        return thread

    def _remove_old(self) -> None:
        remove_old(self.folder, keep=self.keep, pinned={self.best.step} if self.best else set())


class HostCopies:
    """Copies tensors into one block of host memory, which is reused; from CUDA on its stream."""

    def __init__(self) -> None:
        self._layout: list[tuple[str, str, torch.Size, torch.dtype, bool]] = []
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._event: torch.cuda.Event | None = None

    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Starts the copies, which are valid from `wait` to the next `take`."""
        every = [(file, name, one) for file in files for name, one in files[file].items()]
        layout = [(file, name, one.shape, one.dtype, one.is_cuda) for file, name, one in every]
        if layout != self._layout:
            self._copies = {}  # frees the old block first
            self._copies, self._layout = _empty_like(files), layout
        for file, name, tensor in every:
            self._copies[file][name].copy_(tensor.detach(), non_blocking=True)
        self._event = None
        for *_, tensor in every:
            if tensor.is_cuda:  # all are on one device, which need not be the current one
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(tensor.device))
                break
        return self._copies

    def wait(self) -> None:
        """Waits until the copies are complete."""
        if self._event is not None:
            self._event.synchronize()


def _empty_like(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Allocates contiguous host tensors of the same shapes and types, in one block."""
    every = [tensor for tensors in files.values() for tensor in tensors.values()]
    spaces = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in every]
    num_bytes, page_locked = sum(spaces), any(tensor.is_cuda for tensor in every)
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=page_locked)
    except RuntimeError as error:
        if not page_locked:
            raise
        logger.warning("no page-locked memory (%s): each checkpoint waits for its copy", error)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
    pieces = iter(memory.split(spaces))
    return {
        file: {
            name: next(pieces)[: one.nbytes].view(one.dtype).view(one.shape)
            for name, one in tensors.items()
        }
        for file, tensors in files.items()
    }
