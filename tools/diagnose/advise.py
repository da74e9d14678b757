"""From the numbers of a diagnosis to sentences: the limit, useful and useless changes."""

import statistics
from dataclasses import dataclass

from unicl_fast.training.bottleneck import Usage, find_bottleneck

from .model import CHECKPOINT, EVALUATION, LOGGING, MUCH, READ, Change, Measured, Stage

LEAST_GAIN = 0.03  # part of the rate that a change must gain to be advice
_SLOW_RANK = 1.5  # a rank that needs this multiple of the median's time holds up the others
_RARER = {
    LOGGING: "run.log_every_steps",
    CHECKPOINT: "checkpoint.every_steps",
    EVALUATION: "run.evaluate_every_steps",
}


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


def neighbours(measured: Measured) -> str:
    """A sentence on the machine's other processes, if they are busy."""
    if not measured.is_busy:
        return ""
    how = "images per CPU second" if measured.by_cpu else "wall time beside them"
    return (
        f"OTHER PROCESSES used {measured.others_cores:.1f} of {measured.cores:g} cores. "
        f"Gains in images/s are unreliable: changes are compared by {how}."
    )


def usage_of(measured: Measured) -> Usage:
    """The numbers of a run for the table of limits, per second of the run."""
    return Usage(
        seconds=1.0, data_wait_seconds=measured.waiting, reading_blocked=measured.reading,
        cores=measured.cores, cpu_seconds=measured.whole.cpu / measured.whole.wall,
        on_gpu=measured.device != "cpu", compute_threads=measured.compute_threads,
        threads=measured.threads, decodes_files=measured.decodes_files,
        is_remote=measured.is_remote, least_part=MUCH,
    )  # fmt: skip


def find_limit(measured: Measured) -> tuple[str, str]:
    """The stage that sets the rate, and a sentence: evidence, and the options that help."""
    stage, evidence = slow_rank(measured) or _pause(measured) or _stage(measured)
    return stage, f"{stage} limits the run to {measured.rate:,.0f} images/s: {evidence}."


def slow_rank(measured: Measured) -> tuple[str, str] | None:
    """The rank that the others wait for, and the evidence."""
    for part, seconds in zip(("loader", "step"), zip(*measured.ranks, strict=True), strict=False):
        mine = max(seconds)
        rank = seconds.index(mine)
        others = [one for number, one in enumerate(seconds) if number != rank]
        usual = statistics.median(others or seconds)
        if mine > _SLOW_RANK * usual and mine > 0.5 * measured.whole.wall:
            return f"rank {rank}", (
                f"rank {rank} is slow, and the others wait for it: its {part} needs "
                f"{1e3 * mine:.2f} ms per image, the others' {1e3 * usual:.2f}"
            )
    return None


def _pause(measured: Measured) -> tuple[str, str] | None:
    """The work for which training waits longest, if it waits less for batches."""
    logging = measured.logging
    parts = {LOGGING: (logging, f"metrics and trackers are {logging:.0%} of the time")}
    for work in measured.periodic:
        part, note = measured.part_of(work), f" ({work.note})" if work.note else ""
        evidence = f"{work.name}s are {part:.0%} of the time: training waits {work.seconds:.2f} s "
        parts[work.name] = part, f"{evidence}every {work.every_steps} steps{note}"
    name = max(parts, key=lambda one: parts[one][0])
    part, evidence = parts[name]
    if part <= max(MUCH, measured.waiting):
        return None
    return name, f"{evidence}; raise {_RARER[name]}"


def _stage(measured: Measured) -> tuple[str, str]:
    """The stage of the loader, of the step, or of both if they share the cores."""
    name, sentence = find_bottleneck(usage_of(measured)) or ("", "")
    if name == "storage":
        return READ, sentence
    if name and (stages := [one for one in measured.stages if one.side == "loader"]):
        largest = max(stages, key=lambda one: one.cost.wall)
        took = _part_of(largest, measured.loader.wall, largest.cost.wall)
        return largest.name, (
            f"the loop waits for batches, and {took} the loader's time: {sentence}"
        )
    if measured.device == "cpu":  # loader and step share the cores
        largest = max(measured.stages, key=lambda one: one.cost.cpu)
        threads, cpu = "", measured.whole.cpu
        if measured.compute_threads < int(measured.cores):
            threads = f", torch's operators on {measured.compute_threads} of them"
        return largest.name, (
            f"{measured.cores:g} cores do it all{threads}: an image needs {1e3 * cpu:.2f} ms of "
            f"CPU time; {_part_of(largest, cpu, largest.cost.cpu)} that"
        )
    steps = [stage for stage in measured.stages if stage.side == "step"]
    largest = max(steps, key=lambda one: one.cost.wall)
    took = _part_of(largest, measured.step.wall, largest.cost.wall)
    return largest.name, f"the step does not wait for batches; {took} it"


def _part_of(stage: Stage, total: float, own: float) -> str:
    note = f" ({stage.note})" if stage.note else ""
    return f"{stage.name}{note} is {min(1.0, own / total) if total else 0.0:.0%} of"
