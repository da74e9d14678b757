"""The trainer's loop in turns: `PacedLoader` ends and times each."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicl_fast.batch import Batch, ReadingTime
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.training.step_clock import Part, StepClock
from unicl_fast.training.trackers import OPENERS
from unicl_fast.training.trainer import Trainer

from .measuring import wait_for_gpu

_WAITS = 0.5  # a step that waits longer for its batch, as part of its time, has no queue before it
FIRST_STEP = 1  # the first step of a run draws a contact sheet, which no other does


class TurnIsOver(Exception):  # noqa: N818 - it is no error
    """Ends `Trainer.fit` at the end of a turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A turn of a trainer's loop."""

    steps: int
    wall: float
    cpu: float
    parts: dict[Part, float]  # seconds of each
    reading: float  # seconds in which a thread of the loader waited for storage
    trackers: float  # CPU seconds of threads that talk to trackers


def follow(trainer: Trainer, clock: StepClock) -> None:
    """Lets a clock record the parts of a trainer's steps, beside the trainer's own."""
    plain = trainer.begin

    def begin(part: Part) -> None:
        clock.begin(part)
        plain(part)

    setattr(trainer, "begin", begin)  # noqa: B010 - mypy allows no other way


class PacedLoader:
    """A loader that continues between calls of `fit`, which it ends at the end of a turn.

    Otherwise each turn would have to fill its queues again.
    """

    def __init__(self, loader: Any, clock: StepClock) -> None:
        """`loader` is a `TrainLoader`, or any `Loader`."""
        self._loader, self._clock = loader, clock
        self._reading = getattr(loader, "reading", None) or ReadingTime()
        self.batches_begun: int = loader.pace.batches_begun if hasattr(loader, "pace") else 1
        self._iterator: Iterator[Batch] | None = None
        self._turn: Iterator[Batch] = iter(())
        self._waited = 0.0  # seconds of waiting for the last batch

    def take(self) -> Batch:
        begun = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._loader.batches(FIRST_STEP)
        batch = next(self._iterator)
        self._waited = time.perf_counter() - begun
        return batch

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches until the turn is over; they do not depend on the step."""
        return self._turn

    def close(self) -> None:
        self._iterator = None
        self._loader.close()

    def turn(self, trainer: Trainer, *, seconds: float, skip: int) -> Loop:
        """Trains for `seconds`, at least one step.

        The first `skip` steps, whose batches were prepared before, are not timed; timing starts
        earlier if `seconds` pass or a step waits for its batch.
        """
        found: list[Loop] = []

        def batches() -> Iterator[Batch]:
            begun = now = time.perf_counter()
            steps, waits = 0, False
            while steps < skip and not from_rank_0(waits or now - begun > seconds, trainer.ranks):
                yield self.take()
                steps, last, now = steps + 1, now, time.perf_counter()
                waits = self._waited > _WAITS * (now - last)
            self._clock.cut()()
            first, before = trainer.step, self._now()
            while from_rank_0(
                trainer.step == first or time.perf_counter() - before[0] < seconds, trainer.ranks
            ):
                yield self.take()
            wall, cpu, reading, trackers = (
                now - then for now, then in zip(self._now(), before, strict=True)
            )
            loop = Loop(
                steps=trainer.step - first, wall=wall, cpu=cpu, parts=self._clock.cut()(),
                reading=reading, trackers=trackers,
            )  # fmt: skip
            found.append(loop)
            raise TurnIsOver

        self._turn = batches()
        with contextlib.suppress(TurnIsOver):
            trainer.fit()
        return found[0]

    def _now(self) -> tuple[float, float, float, float]:
        wait_for_gpu()
        reading = self._reading.blocked_seconds / self._reading.num_threads
        return time.perf_counter(), time.process_time(), reading, _tracker_seconds()


def _tracker_seconds() -> float:
    """CPU seconds of the threads that talk to trackers."""
    total = 0.0
    for thread in threading.enumerate():
        if thread.name.removeprefix("unicl-") in OPENERS:
            path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            with contextlib.suppress(OSError):  # it has ended
                total += int(path.read_text(encoding="utf-8").split()[0]) / 1e9
    return total
