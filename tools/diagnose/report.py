"""A diagnosis in plain text; page.py makes the page."""

import dataclasses
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from unicl_fast.system.wording import count_of

from .advise import advise, find_limit, hints, neighbours
from .model import Cost, Measured, Stage, rate_text

SIDES = {
    "feed": "the loader's feeding thread",
    "graph": "the loader's decoding threads",
    "between": "between loader and step",
    "step": "the step",
    "loop": "after a step",
}


Stored = Literal["", "could", "does"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that a diagnosis has found so far."""

    measured: Measured
    hours: float  # for all samples of the run, with checkpoints and evaluations
    applied: list[dict[str, Any]]
    """Changes that `--apply` has measured again, and whether it kept them."""
    config: dict[str, Any]
    num_images: int = 0
    stored: Stored = ""
    """Whether the run stores features of frozen encoders, or could."""

    @property
    def kept(self) -> list[str]:
        """The options that `--apply` has kept."""
        return [one["option"] for one in self.applied if one["is_kept"]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with limit and advice."""
        useful, idle = advise(self.measured)
        return dataclasses.asdict(self) | {
            "measured": self.measured.as_dict(),
            "limit": dataclasses.asdict(find_limit(self.measured)),
            "advice": [dataclasses.asdict(one) for one in useful],
            "does_not_matter": [dataclasses.asdict(one) for one in idle],
            "options": self.kept,
        }


def report_lines(found: Diagnosis) -> Iterator[str]:
    measured, limit = found.measured, find_limit(found.measured)
    if text := neighbours(measured):
        yield f"{text}\n"
    yield from _stages(measured)
    yield f"\nTHE LIMIT: {limit.sentence}"
    yield f"{limit.head_room}\n"
    yield from _advice(found)
    yield ""
    yield from _plan(found)
    for one in found.applied:
        again = ", ".join(f"{gain:+.0%}" for gain in one["again"])
        kept = "kept" if one["is_kept"] else "not kept"
        yield f"APPLIED {one['option']}: {one['gain']:+.0%}, then {again}: {kept}"
    if found.applied:
        yield f"USE: {' '.join(found.kept) or 'the options as they are'}"


def groups(measured: Measured) -> Iterator[tuple[str, list[Stage]]]:
    """Titles with the costs per image: along a batch's way, then of all together."""
    for side, title in SIDES.items():
        if stages := [stage for stage in measured.stages if stage.side == side]:
            yield title, stages
    for work in measured.periodic:
        if work.every_steps:
            cost = Cost(wall=measured.part_of(work) * measured.whole.wall, cpu=0.0)
            note = f"training waits {work.seconds:.3f} s" + (f"; {work.note}" if work.note else "")
            stage = Stage(name=work.name, cost=cost, side="", note=note)
            yield f"every {count_of(work.every_steps, 'step')}", [stage]
    together = {
        "loader only": measured.loader, "step only": measured.step, "all together": measured.whole
    }  # fmt: skip
    yield "loader and step", [Stage(name=n, cost=cost, side="") for n, cost in together.items()]


def _stages(measured: Measured) -> Iterator[str]:
    yield f"{'images/s on a rank, each stage alone':44} {'images/s':>24} {'CPU ms/image':>13}"
    for title, stages in groups(measured):
        yield f"  {title}"
        for stage in stages:
            rate, milliseconds = rate_text(stage.cost), 1e3 * stage.cost.cpu
            yield f"    {stage.name:40} {rate:>24} {milliseconds:13.3f}  {stage.note}".rstrip()
    for rank in measured.ranks if measured.world_size > 1 else ():
        step = f", step alone {1 / rank.step:,.0f}" if rank.step else ""
        yield f"  rank {rank.rank}: loader {1 / rank.loader:,.0f} images/s{step}"


def rate_of(measured: Measured) -> str:
    """The present rate, in the unit that compares changes."""
    if measured.by_cpu and measured.whole.cpu:
        return f"{1 / measured.whole.cpu:,.0f} images per CPU second"
    return f"{measured.rate:,.0f} images/s"


def _advice(found: Diagnosis) -> Iterator[str]:
    measured = found.measured
    useful, idle = advise(measured)
    yield f"ADVICE (now {rate_of(measured)}; each change alone: median, slowest, fastest round)"
    for number, one in enumerate(useful, 1):
        results = "" if one.change.same_results else " It changes what is learnt."
        yield f"  {number}. {one.change.option}: {one}"
        yield f"     {one.change.about}.{results}"
    if not measured.trials:
        yield "  no change could be measured in time: raise --seconds"
    elif not useful:
        yield "  no measured change gains 3 % in each round"
    for text in [*_stored_hint(found), *hints(measured)]:
        yield f"  worth a try, not measured: {text}"
    if idle:
        yield "  does not help: " + "; ".join(f"{one.change.option} {one}" for one in idle)
    for text in measured.not_measured:
        yield f"  not measured: {text}"


def _plan(found: Diagnosis) -> Iterator[str]:
    measured = found.measured
    if measured.largest_batch:
        yield (
            f"THE PLAN: the largest local batch that fits, by the memory plan, is "
            f"{measured.largest_batch:,}; now {measured.local_batch}"
        )
    then, ranks = str(_time(3600 * found.hours)), count_of(measured.world_size, "rank")
    if found.stored == "does":
        then = (
            f"{_time(found.num_images / measured.rate)} to encode {found.num_images:,} images once "
            "(efficiency.stored_features; measured with the rest of a step), and steps of the rest"
        )
    yield f"  start: {measured.start_seconds:.0f} s; then {then} on {ranks}"


def _stored_hint(found: Diagnosis) -> Iterator[str]:
    """The time that storing features would save, if an image is encoded alike each time."""
    seconds = found.num_images / found.measured.rate
    if found.stored == "could" and seconds < 3600 * found.hours / 2:
        yield (
            "--efficiency.stored-features FOLDER: the frozen encoder sees the same images in every "
            f"epoch; encoded once they need {_time(seconds)} instead of {_time(3600 * found.hours)}"
        )


def _time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))
