"""From the numbers of a diagnosis to sentences: the limit, useful and useless changes."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from unicl_fast.training.bottleneck import Pause, Usage, find_bottleneck

from .model import (
    CHECKPOINT,
    EVALUATION,
    LOGGING,
    MUCH,
    READ,
    Change,
    Measured,
    RankFigures,
    Stage,
    rate_text,
)

LEAST_GAIN = 0.03  # part of the rate that a change must gain to be advice
_SLOW_RANK = 1.5  # a rank that needs this multiple of the median's time holds up the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The stage that limits a run, and the evidence."""

    stage: str
    sentence: str
    head_room: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change and its gain, as part of the rate: median, least and most of the rounds."""

    change: Change
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.gain:+.0%} ({self.low:+.0%} to {self.high:+.0%})"


def advise(measured: Measured) -> tuple[list[Advice], list[Advice]]:
    """Advice, the largest gain first, and the changes that do not matter.

    Advice gains in all of its rounds, at least two.
    """
    found: dict[bool, list[Advice]] = {True: [], False: []}
    for trial in measured.trials:
        gains = trial.gains(by_cpu=measured.by_cpu)
        gain, low = statistics.median(gains), min(gains)
        is_useful = gain >= LEAST_GAIN and low > 0 and len(gains) > 1
        one = Advice(change=trial.change, gain=gain, low=low, high=max(gains))
        found[is_useful].append(one)
    for each in found.values():
        each.sort(key=lambda one: -one.gain)
    return found[True], found[False]


def hints(measured: Measured) -> Iterator[str]:
    """Changes that cannot be measured here."""
    if measured.ranks_per_machine < measured.gpus:
        yield f"--nproc {measured.gpus}: a rank for each of the {measured.gpus} GPUs"
    if (slow := slow_rank(measured)) is not None:
        yield f"mend or replace the machine of rank {slow[0].rank}"


def neighbours(measured: Measured) -> str:
    """A sentence on the machine's other processes, if they are busy."""
    if not measured.is_busy:
        return ""
    who = "".join(f"; {name}: {cores:.1f}" for name, cores in measured.others)
    how = "images per CPU second" if measured.by_cpu else "wall time beside them"
    return (
        f"OTHER PROCESSES used {measured.others_cores:.1f} of {measured.cores:g} cores{who}. "
        f"Gains in images/s are unreliable: changes are compared by {how}."
    )


def usage_of(measured: Measured) -> Usage:
    """The numbers of a run for the table of limits, per second of the run."""
    options = {CHECKPOINT: "checkpoint.every_steps", EVALUATION: "run.evaluate_every_steps"}
    logging = measured.logging
    evidence = f"metrics and trackers are {logging:.0%} of the time"
    pauses = [Pause(LOGGING, logging, evidence, "run.log_every_steps")]
    for work in measured.periodic:
        note, part = f" ({work.note})" if work.note else "", measured.part_of(work)
        evidence = (
            f"{work.name}s are {part:.0%} of the time: training waits {work.seconds:.2f} s every "
            f"{work.every_steps} steps{note}"
        )
        pauses.append(Pause(work.name, part, evidence, options[work.name]))
    return Usage(
        seconds=1.0, data_wait_seconds=measured.waiting, reading_blocked=measured.reading,
        cores=measured.cores, cpu_seconds=measured.whole.cpu / measured.whole.wall,
        on_gpu=measured.device != "cpu", compute_threads=measured.compute_threads,
        threads=measured.threads, decodes_files=measured.decodes_files,
        is_remote=measured.is_remote, pauses=tuple(pauses), least_part=MUCH,
    )  # fmt: skip


def find_limit(measured: Measured) -> Limit:
    """Names the stage that sets the rate, with its evidence and the options that help."""
    if (slow := slow_rank(measured)) is not None:
        rank, usual, part = slow
        mine = 1e3 * getattr(rank, part)
        return _limit(
            measured, f"rank {rank.rank}",
            f"rank {rank.rank} is slow, and the others wait for it: its {part} needs {mine:.2f} ms "
            f"per image, the others' {1e3 * usual:.2f}",
        )  # fmt: skip
    usage = usage_of(measured)
    name, sentence = find_bottleneck(usage) or ("", "")
    if name == "pauses" and usage.longest_pause is not None:
        return _limit(measured, usage.longest_pause.name, sentence)
    if name == "storage":
        return _limit(measured, READ, sentence)
    if name and (stages := _of_loader(measured)):
        largest = max(stages, key=lambda one: one.cost.wall)
        took = _part_of(largest, measured.loader.wall, largest.cost.wall)
        evidence = f"the loop waits for batches, and {took} the loader's time: {sentence}"
        return _limit(measured, largest.name, evidence)
    if measured.device == "cpu":
        return _cores(measured)
    steps = [stage for stage in measured.stages if stage.side in ("step", "between")]
    largest = max(steps, key=lambda one: one.cost.wall)
    took = _part_of(largest, measured.step.wall, largest.cost.wall)
    return _limit(measured, largest.name, f"the step does not wait for batches; {took} it")


def _of_loader(measured: Measured) -> list[Stage]:
    """The stages of the slower side: the reading thread, or the decoding threads."""
    sides = [[one for one in measured.stages if one.side == side] for side in ("feed", "graph")]
    return max(sides, key=lambda stages: sum(one.cost.wall for one in stages))


def _cores(measured: Measured) -> Limit:
    """Loader and step share the cores; names their largest user."""
    largest = max(measured.stages, key=lambda one: one.cost.cpu)
    threads = ""
    if measured.compute_threads < int(measured.cores):
        threads = f", torch's operators on {measured.compute_threads} of them"
    return _limit(
        measured, largest.name,
        f"{measured.cores:g} cores do it all{threads}: an image needs "
        f"{1e3 * measured.whole.cpu:.2f} ms of CPU time; "
        f"{_part_of(largest, measured.whole.cpu, largest.cost.cpu)} that",
    )  # fmt: skip


def slow_rank(measured: Measured) -> tuple[RankFigures, float, str] | None:
    """The rank that the others wait for, their median seconds per image, and the slow part."""
    if len(measured.ranks) < 2:
        return None
    for part in ("step", "loader"):
        worst = max(measured.ranks, key=lambda one: getattr(one, part))
        usual = statistics.median(getattr(one, part) for one in measured.ranks if one != worst)
        mine = getattr(worst, part)
        if mine > _SLOW_RANK * usual and mine > 0.5 * measured.whole.wall:
            return worst, usual, part
    return None


def _limit(measured: Measured, stage: str, evidence: str) -> Limit:
    loader, step = rate_text(measured.loader), rate_text(measured.step)
    head_room = f"Alone, a rank's loader makes {loader} images/s, and its step trains {step}."
    sentence = f"{stage} limits the run to {measured.rate:,.0f} images/s: {evidence}."
    return Limit(stage=stage, sentence=sentence, head_room=head_room)


def _part_of(stage: Stage, total: float, own: float) -> str:
    note = f" ({stage.note})" if stage.note else ""
    return f"{stage.name}{note} is {min(1.0, own / total) if total else 0.0:.0%} of"
