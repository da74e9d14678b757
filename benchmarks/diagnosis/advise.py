"""From the numbers of a diagnosis to sentences: the limit, what to change, what does not matter.

A piece of advice is a variant that was measured, with the rate that the model gives it; one that
gains less than `LEAST_GAIN` is listed as not mattering. Nothing here measures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from .model import CHECKPOINT, OTHERS, READ, Cost, Measured, Stage, Variant

LEAST_GAIN = 0.03
"""Part of the rate that a change must gain to be advice: less is noise here."""
_SLOW_RANK = 1.5
"""A rank that takes this multiple of the median's time holds up the others."""
_MUCH = 0.2
"""Part of the time that checkpoints must take to be the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The stage that a run waits for, and the evidence."""

    stage: str
    resource: str
    """loader, step, cores, checkpoint, rank or store."""
    sentence: str
    head_room: str
    besides: str = ""
    """The cores that other processes take; empty where they take few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change and the rate that it would give."""

    variant: Variant
    images_per_second: float
    gain: float
    """Part of the present rate that it adds."""


def find_limit(measured: Measured) -> Limit:
    """Names the stage that sets the rate, with its evidence, and what would come next."""
    resources = measured.resources()
    slowest = max(resources, key=lambda name: resources[name])
    checkpoints = measured.checkpoint_seconds(resources[slowest])
    if slow := slow_rank(measured):
        return slow
    if checkpoints > _MUCH * measured.seconds():
        part = checkpoints / measured.seconds()
        return _limit(
            measured, CHECKPOINT, "checkpoint",
            f"checkpoints take {part:.0%} of the time: one of "
            f"{measured.checkpoint.num_bytes / 1e6:,.0f} MB every "
            f"{measured.checkpoint.every_steps} steps is copied in "
            f"{measured.checkpoint.blocking_seconds:.2f} s and written in "
            f"{measured.checkpoint.writing_seconds:.2f} s",
        )  # fmt: skip
    if slowest == "loader" and measured.store_wall >= measured.loader.wall:
        return _limit(
            measured, READ, "store",
            f"the object store gives {1 / measured.store_wall:,.0f} images/s in the first epoch, "
            f"and the loader could take {1 / measured.cached_wall:,.0f}",
        )  # fmt: skip
    if slowest == "loader":
        stage = _slowest_of_loader(measured)
        where = _share_of(stage, measured.loader.wall, unit="wall")
        return _limit(
            measured, stage.name, "loader",
            f"the loader alone makes {1 / measured.loader.wall:,.0f} images/s on "
            f"{measured.threads} threads; {where}",
        )  # fmt: skip
    if slowest == "step":
        stage = _largest(measured, {"step", "between"}, by="wall")
        where = _share_of(stage, measured.step.wall, unit="wall")
        return _limit(
            measured, stage.name, "step",
            f"the step alone takes {1 / measured.step.wall:,.0f} images/s; {where}",
        )  # fmt: skip
    return _cores(measured)


def _cores(measured: Measured) -> Limit:
    """The cores are what loader and step share; the largest user of them is named."""
    stage = _largest(measured, {"feed", "graph", "step", "between"}, by="cpu")
    where = _share_of(stage, measured.loader.cpu + measured.step.cpu, unit="cpu")
    return _limit(
        measured, stage.name, "cores",
        f"{measured.cores:g} cores do it all: an image takes {1e3 * measured.loader.cpu:.2f} ms of "
        f"CPU time in the loader and {1e3 * measured.step.cpu:.2f} ms in the step; {where}",
    )  # fmt: skip


def slow_rank(measured: Measured) -> Limit | None:
    """The rank that the others wait for, if one is clearly slower."""
    if len(measured.ranks) < 2:
        return None
    for part in ("step", "loader"):
        seconds = {one.rank: getattr(one, part) for one in measured.ranks}
        worst = max(seconds, key=lambda rank: seconds[rank])
        usual = statistics.median(value for rank, value in seconds.items() if rank != worst)
        if seconds[worst] > _SLOW_RANK * usual and seconds[worst] > 0.5 * measured.whole.wall:
            return _limit(
                measured, f"rank {worst}", "rank",
                f"rank {worst} is slow, and the others wait for it: its {part} takes "
                f"{1e3 * seconds[worst]:.2f} ms an image, the others' {1e3 * usual:.2f}",
            )  # fmt: skip
    return None


def _limit(measured: Measured, stage: str, resource: str, evidence: str) -> Limit:
    return Limit(
        stage=stage,
        resource=resource,
        sentence=f"{stage} limits the run to {measured.rate:,.0f} images/s: {evidence}.",
        head_room=_head_room(measured, resource),
        besides=_neighbours(measured),
    )


def _neighbours(measured: Measured) -> str:
    """The other processes of the machine, where they take much of it."""
    if measured.others_cores < _MUCH * measured.cores:
        return ""
    return (
        f"Other processes took {measured.others_cores:.1f} of {measured.cores:g} cores meanwhile"
        f"{_busiest(measured)}: all rates here are those of a busy machine."
    )


def _busiest(measured: Measured) -> str:
    return "".join(f"; {who}: {cores:.1f}" for who, cores in measured.others[:3])


def _head_room(measured: Measured, resource: str) -> str:
    """How far the next limit is."""
    seconds = measured.resources()
    first = max(seconds, key=lambda name: seconds[name])
    rest = {name: value for name, value in seconds.items() if name != first}
    if resource in ("checkpoint", "rank"):
        rest = seconds
    following = max(rest, key=lambda name: rest[name])
    rate = measured.world_size / (measured.correction * rest[following])
    names = {"loader": "the loader alone", "step": "the step alone", "cores": "the cores"}
    return (
        f"Next comes {names[following]}, at {rate:,.0f} images/s: "
        f"{rate / measured.rate:.2f} times the present rate."
    )


def _slowest_of_loader(measured: Measured) -> Stage:
    """The largest stage of whichever is slower: the thread that reads, or the decoding threads."""
    sides = {
        side: [stage for stage in measured.stages if stage.side == side]
        for side in ("feed", "graph")
    }
    slower = max(sides, key=lambda side: sum(stage.cost.wall for stage in sides[side]))
    return max(sides[slower], key=lambda stage: stage.cost.wall)


def _largest(measured: Measured, sides: set[str], *, by: str) -> Stage:
    stages = [stage for stage in measured.stages if stage.side in sides]
    return max(stages, key=lambda stage: getattr(stage.cost, by))


def _share_of(stage: Stage, total: float, *, unit: str) -> str:
    part = min(1.0, getattr(stage.cost, unit) / total) if total else 0.0
    note = f" ({stage.note})" if stage.note else ""
    return f"{stage.name}{note} takes {part:.0%} of that"


def advise(measured: Measured) -> tuple[list[Advice], list[Advice]]:
    """Advice that gains something, the largest gain first; and what was found not to matter."""
    every = []
    for variant in (*measured.variants, *_without_measuring(measured)):
        rate = measured.predict(variant)
        every.append(Advice(variant=variant, images_per_second=rate, gain=rate / measured.rate - 1))
    every.sort(key=lambda advice: -advice.gain)
    useful = [advice for advice in every if advice.gain >= LEAST_GAIN]
    return useful, [advice for advice in every if advice.gain < LEAST_GAIN]


def _without_measuring(measured: Measured) -> Iterator[Variant]:
    """Changes whose effect follows from what was measured anyway."""
    if (every := sparse_cadence(measured)) > measured.checkpoint.every_steps > 0:
        yield Variant(
            option=f"--checkpoint.every-steps {every}",
            about="checkpoints then take 1 % of the time; a failure costs more steps",
            every_steps=every,
            stage=CHECKPOINT,
            set={"checkpoint": {"every_steps": every}},
        )
    if measured.others_cores > 0.1 * measured.cores:
        # threads that find a core whenever they can run are faster by as much
        undisturbed = Cost(wall=measured.step_ran, cpu=1.0)
        yield Variant(
            option="end or move the other processes" + _busiest(measured),
            about=f"they took {measured.others_cores:.1f} of {measured.cores:g} cores",
            loader=undisturbed,
            step=undisturbed,
            frees_cores=measured.others_cores,
            stage=OTHERS,
        )
    if (limit := slow_rank(measured)) is not None:
        yield Variant(
            option=f"mend or replace the machine of {limit.stage}",
            about="the rate if it were as fast as the others",
            stage=limit.stage,
            loader=_without_the_slowest(measured, "loader"),
            step=_without_the_slowest(measured, "step"),
        )
    if measured.ranks_per_machine < measured.gpus:
        yield Variant(
            option=f"--nproc {measured.gpus}",
            about=f"a rank for each of the {measured.gpus} GPUs; the global batch stays",
            ranks_factor=measured.gpus / measured.ranks_per_machine,
            batch_factor=measured.ranks_per_machine / measured.gpus,
            stage="ranks",
        )
    if measured.store_wall:
        yield _of_the_store(measured)


def _of_the_store(measured: Measured) -> Variant:
    """A cache that holds all images of the data sets under URLs."""
    option = "wait: from the second epoch on, images come from --data.cache-folder"
    about = "or copy the data set to a disk of the machine before the run"
    if measured.larger_cache:
        option = f"--data.cache-bytes {measured.larger_cache}"
        about = (
            "from the second epoch on, all images come from --data.cache-folder, whose disk must "
            "have as much room"
        )
    cached = Cost(wall=measured.cached_wall / measured.loader.wall, cpu=1.0)
    return Variant(option=option, about=about, loader=cached, stage=READ)


def _without_the_slowest(measured: Measured, part: str) -> Cost:
    """The ratio of a part's seconds, were its slowest rank as fast as the others usually are."""
    seconds = sorted(getattr(one, part) for one in measured.ranks)
    surplus = seconds[-1] - statistics.median(seconds[:-1])
    whole = getattr(measured, part).wall
    return Cost(wall=max(0.01, 1 - surplus / whole), cpu=1.0)


def sparse_cadence(measured: Measured) -> int:
    """Steps between checkpoints that take 1 % of the time; none waits for the one before."""
    one = measured.checkpoint
    step_seconds = max(measured.resources().values()) * measured.local_batch
    cost = one.blocking_seconds + one.writing_cpu_seconds / measured.cores
    return max(
        1, math.ceil(100 * cost / step_seconds), math.ceil(one.writing_seconds / step_seconds)
    )
