"""A diagnosis in plain text, as JSON, and as a page: one screen of HTML, by page.html."""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unicl_fast.system.pages import fill_page
from unicl_fast.system.wording import count_of

from .advise import LEAST_GAIN, advise, find_limit, neighbours
from .model import Cost, Measured, Stage

_SHOWN_CHANGES = 3
_SIDES = {"loader": "the loader", "step": "the step", "loop": "after a step"}


def as_dict(measured: Measured) -> dict[str, Any]:
    """All numbers for JSON, with rates, limit and advice."""
    useful, idle = advise(measured)
    stage, sentence = find_limit(measured)
    return dataclasses.asdict(measured) | {
        "images_per_second": measured.rate,
        "seconds": measured.seconds,
        "limit": {"stage": stage, "sentence": sentence},
        "advice": [dataclasses.asdict(one) for one in useful],
        "does_not_matter": [dataclasses.asdict(one) for one in idle],
        "options": measured.kept,
    }


def report_lines(measured: Measured) -> Iterator[str]:
    if text := neighbours(measured):
        yield f"{text}\n"
    yield f"{'images/s on a rank, each stage alone':44} {'images/s':>12} {'CPU ms/image':>13}"
    for title, stages in groups(measured):
        yield f"  {title}"
        for stage in stages:
            cost = f"{stage.cost.rate:>12} {1e3 * stage.cost.cpu:13.3f}"
            yield f"    {stage.name:40} {cost}  {stage.note}".rstrip()
    yield f"\nTHE LIMIT: {find_limit(measured)[1]}\n"
    yield from _advice(measured)
    yield f"\n{_plan(measured)}"
    for one in measured.applied:
        again = ", ".join(f"{gain:+.0%}" for gain in one["again"])
        kept = "kept" if one["is_kept"] else "not kept"
        yield f"APPLIED {one['option']}: {one['gain']:+.0%}, then {again}: {kept}"
    if measured.applied:
        yield f"USE: {' '.join(measured.kept) or 'the options as they are'}"


def groups(measured: Measured) -> Iterator[tuple[str, list[Stage]]]:
    """Titles with the costs per image: along a batch's way, then of all together."""
    for side, title in _SIDES.items():
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
    if measured.world_size > 1:
        for rank, (loader, step) in enumerate(measured.ranks):
            together[f"rank {rank}, loader only"] = Cost(wall=loader, cpu=0.0)
            together[f"rank {rank}, step only"] = Cost(wall=step, cpu=0.0)
    yield "loader and step", [Stage(name=n, cost=cost, side="") for n, cost in together.items()]


def rate_of(measured: Measured) -> str:
    """The present rate, in the unit that compares changes."""
    if measured.by_cpu and measured.whole.cpu:
        return f"{1 / measured.whole.cpu:,.0f} images per CPU second"
    return f"{measured.rate:,.0f} images/s"


def _advice(measured: Measured) -> Iterator[str]:
    useful, idle = advise(measured)
    yield f"ADVICE (now {rate_of(measured)}; each change alone: median, slowest, fastest round)"
    for number, one in enumerate(useful, 1):
        results = "" if one.change.same_results else " It changes what is learnt."
        yield f"  {number}. {one.change.option}: {one}"
        yield f"     {one.change.about}.{results}"
    if not measured.trials:
        yield "  no change could be measured in time: raise --seconds"
    elif not useful:
        yield f"  no measured change gains {LEAST_GAIN:.0%} in each round"
    encoding = measured.num_images / measured.rate
    if measured.stored == "could" and encoding < measured.seconds / 2:
        yield (
            "  worth a try, not measured: --efficiency.stored-features FOLDER: the frozen encoder "
            "sees the same images in every epoch; encoded once they need "
            f"{_time(encoding)} instead of {_time(measured.seconds)}"
        )
    if idle:
        yield "  does not help: " + "; ".join(f"{one.change.option} {one}" for one in idle)
    for text in measured.not_measured:
        yield f"  not measured: {text}"


def _plan(measured: Measured) -> str:
    then = f"{_time(measured.seconds)} for {count_of(measured.samples, 'sample')}"
    if measured.stored == "does":
        encoding = _time(measured.num_images / measured.rate)
        then = (
            f"{encoding} to encode {count_of(measured.num_images, 'image')} once "
            "(efficiency.stored_features; measured with the rest of a step), and steps of the rest"
        )
    return f"THE RUN: {then}, on {count_of(measured.world_size, 'rank')}"


def _time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))


def make_page(measured: Measured, machine: Mapping[str, Any]) -> str:
    """The page, for UTF-8; `machine` is the result file's."""
    shown, limit = list(groups(measured)), find_limit(measured)
    names = ("processor", "cores", "gpu", "torch", "commit", "date")
    return fill_page(
        Path(__file__).with_name("page.html"),
        measured=measured, config=measured.config, busy=neighbours(measured), limit=limit,
        groups=shown, now=rate_of(measured), advice=advise(measured)[0][:_SHOWN_CHANGES],
        longest=max(stage.cost.wall for _, stages in shown for stage in stages) or 1.0,
        least_gain=f"{LEAST_GAIN:.0%}", options=" ".join(measured.kept),
        machine=", ".join(f"{name} {machine[name]}" for name in names if name in machine),
    )  # fmt: skip
