"""The numbers of a diagnosis: plain data for limits, advice, reports and pages."""

import dataclasses
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CHECKSUMS = "checksums"
COPY = "copy to the device"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
LOGGING = "logging"
READ = "storage read"
WAITING = "waiting for batches"
_NOTHING = 1e-9  # most seconds per image of a stage that does nothing
MUCH = 0.2  # above this part of the time, waiting or pauses are the limit
BUSY = 0.1  # above this part of the cores, other processes make rates and gains unreliable


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds per image on one rank."""

    wall: float
    cpu: float  # over all threads of the process
    rounds: tuple[float, ...] = ()
    """Wall seconds of each round, with `wall` as their median; empty if it was timed once."""

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest round."""
        return min(self.rounds, default=self.wall), max(self.rounds, default=self.wall)


def median(costs: Iterable[Cost]) -> Cost:
    """Median wall and CPU time, with the wall time of each round."""
    costs = list(costs)
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        cpu=statistics.median(cost.cpu for cost in costs),
        rounds=tuple(cost.wall for cost in costs),
    )


def rate_text(cost: Cost | None, *, ranks: int = 1) -> str:
    """Images/s with the slowest and the fastest round; a dash if nothing was measured."""
    if cost is None or cost.wall <= _NOTHING:
        return "-"
    rate = f"{ranks / cost.wall:,.0f}"
    low, high = cost.spread
    if len(cost.rounds) < 2 or low <= _NOTHING:
        return rate
    return f"{rate} ({ranks / high:,.0f} to {ranks / low:,.0f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a batch's way, measured alone."""

    name: str
    cost: Cost
    side: str
    """`feed` (the reading and planning thread), `graph` (decoding threads), `step`, `between`, or
    `loop`."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Work that interrupts training every so many steps."""

    name: str  # CHECKPOINT or EVALUATION
    every_steps: int  # 0: only at the end
    seconds: float  # seconds that training waits each time
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A changed setting to try."""

    option: str  # the option to type, or a thing to do
    about: str
    stage: str  # the stage that it relieves
    side: str
    """The part that it changes: `loader`, `step`, `both`, `images` (packed anew), or `nothing`."""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)  # changed config fields by group
    compute_threads: int = 0  # threads of torch's operators; 0 leaves them
    image: dict[str, Any] | None = None
    """Arguments of `check_image` for images packed anew; empty copies them."""
    same_results: bool = True  # false if the change trains a different model


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A change measured in turns with the unchanged run."""

    change: Change
    now: tuple[Cost, ...]  # the unchanged run, in each round
    then: tuple[Cost, ...]
    is_again: bool = False  # whether it came out first, and was then measured in longer turns

    def gains(self, *, by_cpu: bool) -> tuple[float, ...]:
        """The part that the change adds to images/s in each round; `by_cpu`, per CPU second."""
        # more threads save no CPU time
        unit = "cpu" if by_cpu and not self.change.compute_threads else "wall"
        pairs = zip(self.now, self.then, strict=True)
        return tuple(getattr(old, unit) / getattr(new, unit) - 1 for old, new in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFigures:
    """Seconds per image of one rank, without waiting for others."""

    rank: int
    loader: float
    step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All numbers of a diagnosis."""

    device: str
    cores: float  # cores of this rank
    threads: int
    compute_threads: int
    world_size: int
    local_batch: int
    loader: Cost
    step: Cost
    whole: Cost  # the trainer's own loop: loader, step and periodic work
    waiting: float  # part of its time in which the loop waits for a batch
    reading: float  # part of its time in which the loader's reading thread waits for storage
    periodic: tuple[Periodic, ...] = ()
    others_cores: float = 0.0  # cores that other processes used meanwhile
    others: tuple[tuple[str, float], ...] = ()  # the busiest of them, and the cores of each
    stages: tuple[Stage, ...] = ()
    ranks: tuple[RankFigures, ...] = ()
    trials: tuple[Trial, ...] = ()
    gpus: int = 0  # CUDA devices of each machine
    ranks_per_machine: int = 1
    start_seconds: float = 0.0
    largest_batch: int = 0  # the largest local batch that fits, by the memory plan; 0 if none does
    not_measured: tuple[str, ...] = ()
    decodes_files: bool = True  # whether images are encoded files, not raw
    is_remote: bool = False  # whether data sets are URLs

    @property
    def rate(self) -> float:
        """Images/s of all ranks."""
        return self.world_size / self.whole.wall

    @property
    def is_busy(self) -> bool:
        """Whether other processes make wall time unreliable."""
        return self.others_cores > BUSY * self.cores

    @property
    def by_cpu(self) -> bool:
        """Whether changes are compared by CPU seconds: others are busy, and the run computes."""
        # a run that waits for storage, or for one thread, saves no CPU time by waiting less
        computes = max(self.waiting, *map(self.part_of, self.periodic), 0.0) <= MUCH
        return self.is_busy and computes

    @property
    def logging(self) -> float:
        """The part of the run's time spent on metrics and trackers."""
        costs = [stage.cost for stage in self.stages if stage.name == LOGGING]
        if not costs or not self.whole.cpu:
            return 0.0
        # the rest beyond the loop's own time belongs to the threads of trackers
        return costs[0].wall / self.whole.wall + (costs[0].cpu - costs[0].wall) / self.whole.cpu

    def part_of(self, work: Periodic) -> float:
        """The part of the run's time spent on this work."""
        if not work.every_steps:
            return 0.0
        return work.seconds / (work.every_steps * self.local_batch * self.whole.wall)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with rates."""
        return dataclasses.asdict(self) | {
            "images_per_second": self.rate,
            "images_per_cpu_second": 1 / self.whole.cpu if self.whole.cpu else 0.0,
        }
