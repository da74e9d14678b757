"""Clocks of a diagnosis: the cost of an image, the way of each batch, and who else works."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from unicl_fast.system.machine import cpu_times
from unicl_fast.training.step_clock import NO_TRAINING, Part, StepClock

from ..harness import wait_for_gpu
from .model import Cost, StepTimes

if TYPE_CHECKING:  # clocks alone need no DALI
    from unicl_fast.batch import Batch, Loader
    from unicl_fast.pipelines.feed.host_batches import (
        CropResizer,
        HostBatch,
        HostBatches,
        TrainMetadata,
    )
    from unicl_fast.training.trainer import Trainer

_TICKS = os.sysconf("SC_CLK_TCK")
_BETWEEN_STEPS: tuple[Part, ...] = ("other", *NO_TRAINING)
"""Parts of a step's time that come before it waits for its batch."""


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
    wait_for_gpu()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        work()
    wait_for_gpu()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall=wall / (count * images), cpu=cpu / (count * images))


def in_turns(
    contestants: Mapping[str, Callable[[], Cost]],
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[Cost]]:
    """The costs of each, one a round."""
    found: dict[str, list[Cost]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, take in contestants.items():
            before()
            found[name].append(take())
    return found


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
    """A trainer's loader that notes when batches are made, asked for and given."""

    def __init__(self, loader: Loader, trainer: Trainer, host: HostBatches) -> None:
        """Takes the trainer that asks for the batches, and what makes them before the graph."""
        self._loader, self._trainer = loader, trainer
        self.moments: list[tuple[float, float, float]] = []
        """Asked, given, and the CPU time of the process when asked."""
        self._steps: list[int] = []
        self._made: dict[int, tuple[float, float]] = {}
        """When each step's batch was begun, and when it was ready for the graph."""
        self._clock: StepClock | None = None
        self._watch(host)

    def _watch(self, host: HostBatches) -> None:
        batches, group = host.batches, host.group

        def timed_batches(start_step: int) -> Generator[HostBatch[TrainMetadata], None, None]:
            with contextlib.closing(batches(start_step)) as made:
                begun = time.perf_counter()
                for batch in made:
                    self._note([batch], begun)
                    yield batch
                    del batch
                    begun = time.perf_counter()

        def timed_group(resizer: CropResizer, first_step: int) -> list[HostBatch[TrainMetadata]]:
            begun = time.perf_counter()
            made = group(resizer, first_step)
            self._note(made, begun)
            return made

        host.batches = timed_batches  # type: ignore[method-assign]
        host.group = timed_group  # type: ignore[method-assign]

    def _note(self, made: Sequence[HostBatch[TrainMetadata]], begun: float) -> None:
        span = (begun, time.perf_counter())
        for batch in made:
            # a group's batches are noted when they are made, and not when they are handed on
            self._made.setdefault(batch.metadata.actual.step, span)

    def clear(self) -> None:
        """Forgets the batches so far."""
        for notes in (self.moments, self._steps, self._made):
            notes.clear()

    def batches(self, start_step: int) -> Iterator[Batch]:
        """As the loader's."""
        self._clock = self._trainer.clock
        batches = self._loader.batches(start_step)
        while True:
            asked, cpu = time.perf_counter(), time.process_time()
            batch = next(batches)
            self.moments.append((asked, time.perf_counter(), cpu))
            self._steps.append(batch.step)
            yield batch
            del batch  # held here, its buffers could not be reused

    def timeline(self, first: int, count: int) -> tuple[list[StepTimes], list[tuple[float, float]]]:
        """The way of `count` batches since `clear`, from number `first` on; and what was made then.

        Only the parts of steps tell where a GPU waits. They follow each other without a gap from
        the first question for a batch on, when a GPU has nothing to do.
        """
        steps = [] if self._clock is None else list(self._clock.recent)
        if len(steps) != len(self.moments):  # more than a clock remembers
            return [], []
        begin = self.moments[0][0] - sum(steps[0][part] for part in _BETWEEN_STEPS)
        begins = [begin, *(begin + passed for passed in accumulate(sum(s.values()) for s in steps))]
        last = min(first + count, len(steps))
        origin, end = begins[first], begins[last] - begins[first]
        made = {step: (one - origin, two - origin) for step, (one, two) in self._made.items()}
        found = []
        for number in range(first, last):
            order = sorted(steps[number], key=lambda part: part not in _BETWEEN_STEPS)
            found.append(
                StepTimes(
                    made=made.get(self._steps[number]),
                    given=self.moments[number][1] - origin,
                    begin=begins[number] - origin,
                    parts={part: steps[number][part] for part in order if steps[number][part]},
                )
            )
        # a group's batches have one span
        meanwhile = {span for span in made.values() if span[1] > 0 and span[0] < end}
        return found, sorted(meanwhile)

    def close(self) -> None:
        """As the loader's."""
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
