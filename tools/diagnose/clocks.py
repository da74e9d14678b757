"""Clocks of a diagnosis: the trainer's loop in turns, its parts, and other processes."""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unicl_fast.batch import Batch, Loader
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.system.machine import cpu_times
from unicl_fast.training.trackers import OPENERS
from unicl_fast.training.trainer import Observer, Trainer

from .measuring import timed, wait_for_gpu
from .model import Cost

_WAITS = 0.5  # a step that waits longer for its batch, as part of its time, has no queue before it
_NOTEWORTHY_CORES = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")
FIRST_STEP = 1  # the first step of a run draws a contact sheet, which no other does


def flow(batches: Iterable[object], *, images: float, skip: int, seconds: float) -> Cost:
    """The cost per image of batches that are prepared ahead, at least two, during `seconds`.

    The first `skip` of them (or those that arrive within `seconds`) were begun before the clock and
    are not timed.
    """
    iterator, begun = iter(batches), time.perf_counter()
    try:
        for _ in range(skip):
            next(iterator)
            if time.perf_counter() - begun > seconds:
                break
        gc.collect()
        count = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in iterator:
            del batch  # frees its buffer
            count += 1
            if count >= 2 and time.perf_counter() - wall >= seconds:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if hasattr(iterator, "close"):  # a generator holds what it reads
            iterator.close()
    return Cost(wall=wall / (count * images), cpu=cpu / (count * images))


def repeated(work: Callable[[], object], *, images: int, count: int) -> Cost:
    """The cost per image of work that is done `count` times; waits for a GPU."""
    turn = timed(work, calls=count)
    return Cost(wall=turn.wall_seconds / images, cpu=turn.cpu_seconds / images)


class TurnIsOver(Exception):  # noqa: N818 - it is no error
    """Ends `Trainer.fit` at the end of a turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A turn of a trainer's loop."""

    steps: int
    wall: float
    cpu: float
    parts: dict[str, float]  # wall seconds by the trainer's names for its parts
    saves: int  # checkpoints that were begun
    reading: float  # seconds in which a thread of the loader waited for storage
    trackers: float  # CPU seconds of threads that talk to trackers


class LoopClock(Observer):
    """Host time of each part of the loops of trainers in turns; their first observer."""

    def __init__(self) -> None:
        self._part, self._since = "other", time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._saves = 0

    def follow(self, trainer: Trainer) -> None:
        """Records the parts of a trainer from now on."""
        plain = trainer.begin

        def begin(part: Any) -> None:
            self._begin(part)
            plain(part)

        setattr(trainer, "begin", begin)  # noqa: B010 - mypy allows no other way

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        """Ends a step."""
        self._begin("other")

    def on_save(self, run: Trainer, *, required: bool) -> None:
        """Counts a checkpoint."""
        self._saves += 1

    def restart(self) -> tuple[dict[str, float], int]:
        """The seconds and the checkpoints since the last call."""
        self._begin(self._part)
        found = self._seconds, self._saves
        self._seconds, self._saves = {}, 0
        return found

    def _begin(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now


class PacedLoader:
    """A loader that continues between calls of `fit`, which it ends at the end of a turn.

    Otherwise each turn would have to fill its queues again.
    """

    def __init__(self, loader: Any, clock: LoopClock) -> None:
        """`loader` is a `TrainLoader`, or any `Loader`."""
        self._loader: Loader = loader
        self._reading = getattr(loader, "reading", None)
        self.batches_begun: int = loader.pace.batches_begun if hasattr(loader, "pace") else 1
        self._clock = clock
        self._iterator: Iterator[Batch] | None = None
        self._is_over: Callable[[], bool] = lambda: False
        self._waited = 0.0  # seconds of waiting for the last batch

    def take(self) -> Batch:
        begun = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._loader.batches(FIRST_STEP)
        batch = next(self._iterator)
        self._waited = time.perf_counter() - begun
        return batch

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches until the turn is over, whatever the step."""
        while not self._is_over():
            yield self.take()
        raise TurnIsOver

    def close(self) -> None:
        self._iterator = None
        self._loader.close()

    def turn(self, trainer: Trainer, *, seconds: float, skip: int, least: int) -> Loop:
        """Trains for `seconds`, and for at least `least` steps.

        The first `skip` steps, whose batches were prepared before, are not timed; timing starts
        earlier if `seconds` pass or a step waits for its batch.
        """
        found: Loop
        begun: tuple[float, ...] = ()
        steps, start = -1, time.perf_counter()
        last = start

        def is_over() -> bool:
            nonlocal steps, begun, found, last
            steps += 1
            now = time.perf_counter()
            passed, waits, last = now - start, self._waited > _WAITS * (now - last), now
            if not begun:
                if from_rank_0(
                    steps >= skip or (steps > 0 and (waits or passed > seconds)), trainer.ranks
                ):
                    steps = 0
                    self._clock.restart()
                    begun = self._now()
                return False
            passed = now - begun[0]
            if not from_rank_0(steps >= least and passed >= seconds, trainer.ranks):
                return False
            wall, cpu, reading, trackers = (
                now - before for now, before in zip(self._now(), begun, strict=True)
            )
            parts, saves = self._clock.restart()
            found = Loop(
                steps=steps, wall=wall, cpu=cpu, parts=parts, saves=saves, reading=reading,
                trackers=trackers,
            )  # fmt: skip
            return True

        self._is_over = is_over
        with contextlib.suppress(TurnIsOver):
            trainer.fit()
        return found

    def _now(self) -> tuple[float, float, float, float]:
        wait_for_gpu()
        reading = 0.0
        if self._reading is not None:
            reading = self._reading.blocked_seconds / self._reading.num_threads
        return time.perf_counter(), time.process_time(), reading, _tracker_seconds()


def keep_open(observer: Observer, stack: contextlib.ExitStack) -> None:
    """Keeps an observer open from its first `fit` on until the stack is closed.

    Trackers would otherwise start and end in each turn.
    """
    plain, is_open = observer.fitting, False

    @contextlib.contextmanager
    def fitting(run: Trainer) -> Iterator[None]:
        nonlocal is_open
        if not is_open:
            stack.enter_context(plain(run))
            is_open = True
        yield

    setattr(observer, "fitting", fitting)  # noqa: B010 - mypy allows no other way


def _tracker_seconds() -> float:
    """CPU seconds of the threads that talk to trackers."""
    total = 0.0
    for thread in threading.enumerate():
        if thread.name.removeprefix("unicl-") in OPENERS:
            path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            with contextlib.suppress(OSError):  # it has ended
                total += int(path.read_text(encoding="utf-8").split()[0]) / 1e9
    return total


class Watch:
    """Watches the users of this machine's cores from now on."""

    def __init__(self, own: Collection[int]) -> None:
        """`own` are the ranks' process ids."""
        self._own, self._begun = own, time.perf_counter()
        self._busy, self._processes = cpu_times().busy, _process_seconds()

    def look(self) -> tuple[float, tuple[tuple[str, float], ...]]:
        """The cores that others have used so far, and the busiest of them with theirs."""
        seconds = time.perf_counter() - self._begun
        busy, processes = cpu_times().busy - self._busy, _process_seconds()
        used = {key: now - self._processes.get(key, 0.0) for key, now in processes.items()}
        mine = sum(spent for (number, _), spent in used.items() if number in self._own)
        rest = [(f"{name}, process {number}", round(spent / seconds, 2))
                for (number, name), spent in used.items() if number not in self._own]  # fmt: skip
        rest.sort(key=lambda entry: -entry[1])
        busiest = tuple(entry for entry in rest[:3] if entry[1] > _NOTEWORTHY_CORES)
        return max(0.0, busy - mine) / seconds, busiest


def _process_seconds() -> dict[tuple[int, str], float]:
    """CPU seconds of all visible processes, by number and name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="utf-8")
        except OSError:
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]
        numbers = text[text.rindex(")") + 2 :].split()
        found[int(folder.name), name] = (int(numbers[11]) + int(numbers[12])) / _TICKS
    return found
