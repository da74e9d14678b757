"""The numbers of a diagnosis: plain data for limits, advice and reports."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

CHECKPOINT, EVALUATION, LOGGING, READ = "checkpoint", "evaluation", "logging", "storage read"
MUCH = 0.2  # above this part of the time, waiting or pauses are the limit
BUSY = 0.1  # above this part of the cores, other processes make rates and gains unreliable


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds per image on one rank."""

    wall: float
    cpu: float  # over all threads of the process

    @property
    def rate(self) -> str:
        """Images/s; a dash if nothing was measured."""
        return f"{1 / self.wall:,.0f}" if self.wall > 1e-9 else "-"


def median(costs: Iterable[Cost]) -> Cost:
    """Median wall and CPU time."""
    costs = list(costs)
    walls, cpus = ([getattr(one, name) for one in costs] for name in ("wall", "cpu"))
    return Cost(wall=statistics.median(walls), cpu=statistics.median(cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a batch's way, measured by itself."""

    name: str
    cost: Cost
    side: str  # `loader`, `step`, or `loop`
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Work that interrupts training at a fixed interval of steps."""

    name: str  # CHECKPOINT or EVALUATION
    every_steps: int  # 0: only at the end
    seconds: float  # seconds that training waits each time
    writing: float = 0.0  # seconds that it lasts in the background, before it can begin again
    note: str = ""

    def seconds_of_step(self, every_steps: int, step_seconds: float) -> float:
        """Seconds that it adds to a step of `step_seconds`, if it is done at that interval."""
        if not every_steps:
            return 0.0
        return (self.seconds + max(0.0, self.writing - every_steps * step_seconds)) / every_steps


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

    def gains(self, *, by_cpu: bool) -> tuple[float, ...]:
        """The part that the change adds to images/s in each round; `by_cpu`, per CPU second."""
        # more threads save no CPU time
        unit = "cpu" if by_cpu and not self.change.compute_threads else "wall"
        pairs = zip(self.now, self.then, strict=True)
        return tuple(getattr(old, unit) / getattr(new, unit) - 1 for old, new in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Everything that a diagnosis has found so far."""

    config: dict[str, Any]
    device: str
    cores: float  # cores of this rank
    threads: int
    compute_threads: int
    world_size: int
    local_batch: int
    samples: int  # of the whole run
    num_images: int  # of its data sets
    loader: Cost
    step: Cost
    whole: Cost  # the trainer's own loop: loader, step and periodic work
    waiting: float  # part of its time in which the loop waits for a batch
    reading: float  # part of its time in which the loader's reading thread waits for storage
    periodic: tuple[Periodic, ...] = ()
    others_cores: float = 0.0  # cores that other processes used meanwhile
    stages: tuple[Stage, ...] = ()
    ranks: tuple[tuple[float, float], ...] = ()
    """Seconds per image of each rank's loader and step, without waiting for other ranks."""
    trials: tuple[Trial, ...] = ()
    not_measured: tuple[str, ...] = ()
    applied: tuple[dict[str, Any], ...] = ()
    """Changes that `--apply` has measured again, and whether it kept them."""
    stored: Literal["", "could", "does"] = ""
    """Whether the run stores features of frozen encoders, or could."""
    decodes_files: bool = True  # whether images are encoded files, not raw
    is_remote: bool = False  # whether data sets are URLs

    @property
    def rate(self) -> float:
        """Images/s of all ranks."""
        return self.world_size / self.whole.wall

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, with checkpoints and evaluations."""
        return self.samples / self.rate

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
        step = self.whole.wall * self.local_batch
        return work.seconds_of_step(work.every_steps, step) / step

    @property
    def kept(self) -> list[str]:
        """The options that `--apply` has kept."""
        return [one["option"] for one in self.applied if one["is_kept"]]
