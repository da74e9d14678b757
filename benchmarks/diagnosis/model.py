"""How fast a run is, by the costs of its parts: a model with three resources that work at once.

A batch costs the loader some time, the step some time, and both together CPU time of the same
cores. While the step works on one batch the loader makes the next, so the slowest of the three
sets the rate, and checkpoints come on top. On a machine without a GPU the cores are nearly always
the slowest; on one with a GPU they matter where the loader takes them all.

The model is held against the run: what it misses in the run as it is (`Measured.correction`), it is
taken to miss in every changed run too. Nothing here measures anything, so all of it can be tested
with made-up numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

CHECKSUMS = "checksums"
COPY = "copy to the device"
CHECKPOINT = "checkpoint"
OTHERS = "other processes"
READ = "storage read"
STORE = "object store"
_NOTHING = 1e-9
"""Seconds of an image that a stage takes at most where it does nothing."""


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

    def times(self, ratio: Cost) -> Cost:
        return Cost(
            wall=self.wall * ratio.wall,
            cpu=self.cpu * ratio.cpu,
            rounds=tuple(self.wall * one for one in ratio.rounds),
        )

    def over(self, other: Cost) -> Cost:
        """The ratio of two costs; 1 where there is no CPU time to compare."""
        cpu = self.cpu / other.cpu if other.cpu else 1.0
        return Cost(wall=self.wall / other.wall, cpu=cpu)


def rate_text(cost: Cost | None, *, ranks: int = 1) -> str:
    """Writes images/s with the slowest and the fastest round; a dash where nothing was measured."""
    if cost is None or cost.wall <= _NOTHING:
        return "-"
    rate = f"{ranks / cost.wall:,.0f}"
    low, high = cost.spread
    if not cost.rounds or low <= _NOTHING:
        return rate
    return f"{rate} ({ranks / high:,.0f} to {ranks / low:,.0f})"


SAME = Cost(wall=1.0, cpu=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the batch's way, measured alone."""

    name: str
    cost: Cost
    side: str
    """`feed` (one thread reads and plans), `graph` (decoding threads), `step` or `between`."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointing:
    """The cost of one checkpoint."""

    blocking_seconds: float
    """The step waits as long for the copy."""
    writing_seconds: float
    """Until it is on the disk, while training continues."""
    writing_cpu_seconds: float
    num_bytes: int
    every_steps: int
    """0: only at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A changed setting, to be measured in turns with the run's own, or measured already."""

    option: str
    """An option to type, or a thing to do."""
    about: str
    side: str = ""
    """The part of a run that changes: `loader`, `step`, `both`, or `images` (packed anew)."""
    loader: Cost = SAME
    """Times what an image costs the loader now."""
    step: Cost = SAME
    batch_factor: float = 1.0
    """Times the local batch."""
    every_steps: int | None = None
    """Another cadence of checkpoints."""
    frees_cores: float = 0.0
    ranks_factor: float = 1.0
    """Times the ranks, on the same machines and cores."""
    same_results: bool = True
    """False where the model that comes out is another one."""
    stage: str = ""
    """The stage that it relieves."""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of the config by group, where options are enough."""
    packing: dict[str, Any] = field(default_factory=dict)
    """Arguments of `check_image` for images that are packed anew."""
    data: tuple[str, ...] = ()
    """Data sets to train on instead."""


AS_IT_IS = Variant(option="", about="")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFigures:
    """The costs that one rank found of itself, without waiting for others."""

    rank: int
    loader: float
    """Seconds of an image."""
    step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All numbers of a diagnosis; plain, so that a report or a page can be made from it."""

    device: str
    cores: float
    """That this rank may use."""
    threads: int
    world_size: int
    local_batch: int
    loader: Cost
    step: Cost
    whole: Cost
    """Loader and step together, by the trainer's own loop, checkpoints included."""
    stages: tuple[Stage, ...]
    checkpoint: Checkpointing
    others_cores: float = 0.0
    """Cores that other processes took meanwhile."""
    others: tuple[tuple[str, float], ...] = ()
    """The busiest of them, and the cores of each."""
    step_ran: float = 1.0
    """The step alone: of the time in which its threads could run, the part in which they did."""
    ranks: tuple[RankFigures, ...] = ()
    variants: tuple[Variant, ...] = ()
    store_wall: float = 0.0
    """Seconds of an image out of the object store; 0 for folders."""
    cached_wall: float = 0.0
    """Seconds of an image for the loader, once all of it is in the cache."""
    larger_cache: int = 0
    """Bytes of a cache that would hold all images; 0 where they fit."""
    gpus: int = 0
    """CUDA devices of each machine."""
    ranks_per_machine: int = 1
    start_seconds: float = 0.0
    not_measured: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Images/s of all ranks, as measured."""
        return self.world_size / self.whole.wall

    @property
    def correction(self) -> float:
        """Measured seconds over those of the model."""
        return self.whole.wall / self.seconds()

    def resources(self, variant: Variant = AS_IT_IS) -> dict[str, float]:
        """Seconds of an image by each resource, were it the only one."""
        loader, step = self.loader.times(variant.loader), self.step.times(variant.step)
        free = max(self.cores - self.others_cores, self.cores / 10)
        more = min(self.cores, free + variant.frees_cores)
        return {
            "loader": loader.wall,
            "step": step.wall,
            "cores": (loader.cpu + step.cpu) * variant.ranks_factor / more,
        }

    def checkpoint_seconds(self, seconds: float, variant: Variant = AS_IT_IS) -> float:
        """Seconds that checkpoints add to an image which takes `seconds` without them."""
        one = self.checkpoint
        every = one.every_steps if variant.every_steps is None else variant.every_steps
        if not every:
            return 0.0
        batch = int(self.local_batch * variant.batch_factor)
        between = every * batch * seconds
        # the thread that writes takes a core from the others where there is none to spare
        used = self.loader.times(variant.loader).cpu + self.step.times(variant.step).cpu
        idle = max(0.0, self.cores * seconds - used) * every * batch
        busy = max(0.0, one.writing_cpu_seconds - idle) / self.cores
        waits = max(0.0, one.writing_seconds - between)  # the next one waits for the one before
        return (one.blocking_seconds + max(busy, waits)) / (every * batch)

    def seconds(self, variant: Variant = AS_IT_IS) -> float:
        """The model's seconds of an image."""
        slowest = max(self.resources(variant).values())
        return slowest + self.checkpoint_seconds(slowest, variant)

    def predict(self, variant: Variant = AS_IT_IS) -> float:
        """Images/s of all ranks with a variant."""
        ranks = self.world_size * variant.ranks_factor
        return ranks / (self.correction * self.seconds(variant))

    def as_dict(self) -> dict[str, Any]:
        """Itself for JSON, with what follows from it."""
        return {
            **dataclasses.asdict(self),
            "images_per_second": self.rate,
            "model_correction": self.correction,
            "resources": {name: 1 / seconds for name, seconds in self.resources().items()},
        }
