"""Clocks of a diagnosis: the cost of an image, and who else works on the machine."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from unicl_fast.system.machine import cpu_times

from ..harness import timed
from .model import Cost

if TYPE_CHECKING:  # clocks need no DALI
    from unicl_fast.batch import Batch, Loader

_TICKS = os.sysconf("SC_CLK_TCK")


def flow(batches: Iterable[object], *, images: int, skip: int, seconds: float) -> Cost:
    """The cost of an image of batches that are made ahead.

    The first `skip` are not timed: they were begun before the clock. As many are timed as `seconds`
    allow, at least two, and at least as many as were skipped: those that wait in a queue when the
    clock starts come at once, and are no rate. Where they end before that, all are timed.
    """
    iterator = iter(batches)
    try:
        for _ in range(skip):
            next(iterator)
        gc.collect()
        count = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in iterator:
            del batch  # its buffer can be used again
            count += 1
            if count >= max(2, skip) and time.perf_counter() - wall >= seconds:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if hasattr(iterator, "close"):  # a generator holds what it reads
            iterator.close()
    return Cost(wall=wall / (count * images), cpu=cpu / (count * images))


def repeated(work: Callable[[], object], *, images: int, count: int) -> Cost:
    """The cost of an image of work that is done `count` times; waits for a GPU."""
    turn = timed(work, calls=count)
    return Cost(wall=turn.wall_seconds / images, cpu=turn.cpu_seconds / images)


def median(costs: Iterable[Cost]) -> Cost:
    """The medians of wall time and of CPU time, with the wall time of each round."""
    costs = list(costs)
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        cpu=statistics.median(cost.cpu for cost in costs),
        rounds=tuple(cost.wall for cost in costs),
    )


def median_ratio(ones: Iterable[Cost], others: Iterable[Cost]) -> Cost:
    """The medians of the ratios within the rounds."""
    return median(one.over(other) for one, other in zip(ones, others, strict=True))


class TimedLoader:
    """A trainer's loader that notes when its batches are asked for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.moments: list[tuple[float, float]] = []
        """The time at which each batch was asked for, and the CPU time of the process then."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yields the loader's batches."""
        batches = self._loader.batches(start_step)
        while True:
            asked = time.perf_counter(), time.process_time()
            batch = next(batches)
            self.moments.append(asked)
            yield batch
            del batch  # held here, its buffers could not be reused

    def close(self) -> None:
        """Closes the loader."""
        self._loader.close()


@dataclass(slots=True)
class Watch:
    """The users of this machine's cores while something was measured."""

    own: set[int] = field(default_factory=lambda: {os.getpid()})
    """Processes that are not others: the ranks of this measurement."""
    seconds: float = 0.0
    cores: float = 0.0
    """Cores that others took."""
    busiest: tuple[tuple[str, float], ...] = ()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches during the block."""
        busy, processes, started = cpu_times().busy, _process_seconds(), time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        used = {
            key: seconds - processes.get(key, 0.0) for key, seconds in _process_seconds().items()
        }
        mine = sum(seconds for (number, _), seconds in used.items() if number in self.own)
        self.cores = max(0.0, cpu_times().busy - busy - mine) / self.seconds
        rest = [(key, seconds) for key, seconds in used.items() if key[0] not in self.own]
        rest.sort(key=lambda entry: -entry[1])
        self.busiest = tuple(
            (f"{name}, process {number}", round(seconds / self.seconds, 2))
            for (number, name), seconds in rest[:3]
            if seconds > 0.05 * self.seconds
        )


def _process_seconds() -> dict[tuple[int, str], float]:
    """CPU time of all processes that can be seen, by number and name."""
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
