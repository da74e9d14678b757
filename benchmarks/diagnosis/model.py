"""The numbers of a diagnosis: plain data, of which limits, advice and the report are made."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unicl_fast.config import TrainConfig

READ = "storage read"
_NOTHING = 1e-9
"""Seconds of an image that a stage takes at most where it does nothing."""
MUCH = 0.2
"""Part of the time from which on waiting for batches is the limit."""
BUSY = 0.1
"""Part of the cores from which on other processes make rates and gains unreliable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds that one image takes on one rank."""

    wall: float
    cpu: float
    """Over all threads of the process."""
    rounds: tuple[float, ...] = ()
    """Wall seconds of each round, of which `wall` is the median; empty where it was timed once."""

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest round."""
        return min(self.rounds, default=self.wall), max(self.rounds, default=self.wall)


def median(costs: Iterable[Cost]) -> Cost:
    """The medians of wall time and of CPU time, with the wall time of each round."""
    costs = list(costs)
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        cpu=statistics.median(cost.cpu for cost in costs),
        rounds=tuple(cost.wall for cost in costs),
    )


def rate_text(cost: Cost) -> str:
    """Writes images/s with the slowest and the fastest round; a dash where nothing was measured."""
    if cost.wall <= _NOTHING:
        return "-"
    rate = f"{1 / cost.wall:,.0f}"
    low, high = cost.spread
    if len(cost.rounds) < 2 or low <= _NOTHING:
        return rate
    return f"{rate} ({1 / high:,.0f} to {1 / low:,.0f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the batch's way, measured separately."""

    name: str
    cost: Cost
    side: str
    """`feed` (one thread reads and plans), `graph` (decoding threads), `between` or `step`."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A changed setting that is worth a try."""

    option: str
    """The option to type."""
    about: str
    stage: str
    """The stage that it relieves."""
    side: str
    """The part that it changes: `loader`, `step`, `both`, or `nothing`."""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of the config by group."""
    compute_threads: int = 0
    """Threads of torch's operators; 0 leaves them."""
    same_results: bool = True
    """False where the model that comes out is another one."""

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        return config.changed(**self.set)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A change that was measured in turns with the run as it is."""

    change: Change
    now: tuple[Cost, ...]
    """An image of the run as it is, in each round."""
    then: tuple[Cost, ...]

    def gains(self, *, by_cpu: bool) -> tuple[float, ...]:
        """The part of the rate that the change adds, in each round.

        The rate is in images per second; with `by_cpu`, per CPU second, which more threads do not
        save.
        """
        unit = "cpu" if by_cpu and not self.change.compute_threads else "wall"
        pairs = zip(self.now, self.then, strict=True)
        return tuple(getattr(old, unit) / getattr(new, unit) - 1 for old, new in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFigures:
    """The costs that one rank found of itself, without waiting for others."""

    rank: int
    loader: float
    """Seconds of an image."""
    step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All numbers of a diagnosis."""

    device: str
    cores: float
    """That this rank may use."""
    threads: int
    compute_threads: int
    world_size: int
    local_batch: int
    loader: Cost
    step: Cost
    whole: Cost
    """Loader and step together."""
    waiting: float
    """Part of that time in which the step waits for a batch."""
    reading: float
    """Part of it in which the loader's reading thread waits for storage."""
    others_cores: float = 0.0
    """Cores that other processes took meanwhile."""
    stages: tuple[Stage, ...] = ()
    ranks: tuple[RankFigures, ...] = ()
    trials: tuple[Trial, ...] = ()
    gpus: int = 0
    """CUDA devices of each machine."""
    ranks_per_machine: int = 1
    largest_batch: int = 0
    """The largest local batch that fits, by the memory plan; 0 where none does."""
    not_measured: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        return self.world_size / self.whole.wall

    @property
    def by_cpu(self) -> bool:
        """Whether changes are compared by CPU seconds: others are busy, and the run computes.

        A run that waits for storage, or for one thread, gains no CPU seconds by waiting less.
        """
        return self.others_cores > BUSY * self.cores and self.waiting <= MUCH
