"""A diagnosis in plain text; page.py makes the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .advise import Advice, Limit
from .model import Cost, Measured
from .outlook import OnRanks

SIDES = {
    "feed": "the loader's feeding thread",
    "graph": "the loader's decoding threads",
    "between": "between loader and step",
    "step": "the step",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that a diagnosis has found."""

    measured: Measured
    limit: Limit
    useful: tuple[Advice, ...]
    """Advice that gains something, the largest gain first."""
    idle: tuple[Advice, ...]
    """Changes that were found not to matter."""
    plans: tuple[OnRanks, ...]
    largest_batch: int
    """The largest local batch that fits, by the memory plan; 0 where none does."""
    tried: dict[str, Any] | None
    """The change that `--try` has made."""
    config: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Itself for JSON."""
        return {
            "measured": self.measured.as_dict(),
            "limit": dataclasses.asdict(self.limit),
            "advice": [dataclasses.asdict(one) for one in self.useful],
            "does_not_matter": [dataclasses.asdict(one) for one in self.idle],
            "plan": [dataclasses.asdict(one) for one in self.plans],
            "largest_batch": self.largest_batch,
            "tried": self.tried,
            "config": self.config,
        }

    def tried_sentence(self) -> str:
        """The change that was made and what came of it; empty where none was."""
        if self.tried is None:
            return ""
        return (
            f"{self.tried['option']}: {self.tried['predicted_gain']:.2f} times the rate was "
            f"predicted, {self.tried['measured_gain']:.2f} times came ({self.tried['now']:,.0f} "
            f"and {self.tried['then']:,.0f} images/s in the same turns)"
        )


def report_lines(found: Diagnosis) -> Iterator[str]:
    """The report, line by line."""
    measured, limit = found.measured, found.limit
    yield from _stages(measured)
    yield ""
    yield f"THE LIMIT: {limit.sentence}"
    yield limit.head_room
    if limit.besides:
        yield limit.besides
    yield ""
    yield from _advice(measured, found.useful, found.idle)
    yield ""
    yield from _plan(found)
    if found.tried is not None:
        yield f"TRIED {found.tried_sentence()}"


def _stages(measured: Measured) -> Iterator[str]:
    yield f"{'images/s on a rank, each stage alone':44} {'images/s':>10} {'CPU ms/image':>13}"
    for side, title in SIDES.items():
        stages = [stage for stage in measured.stages if stage.side == side]
        if stages:
            yield f"  {title}"
        for stage in stages:
            rate = f"{1 / stage.cost.wall:,.0f}" if stage.cost.wall > 1e-9 else "-"
            note = f"  {stage.note}" if stage.note else ""
            yield f"    {stage.name:40} {rate:>10} {1e3 * stage.cost.cpu:13.3f}{note}"
    one = measured.checkpoint
    yield (
        f"    {'checkpoint':40} {'':10} {one.num_bytes / 1e6:,.1f} MB: the step waits "
        f"{one.blocking_seconds:.3f} s, written in {one.writing_seconds:.2f} s"
    )
    if measured.store_wall:
        yield f"    {'object store':40} {1 / measured.store_wall:10,.0f}"
    for name, cost in totals(measured):
        yield f"  {name:42} {1 / cost.wall:10,.0f} {1e3 * cost.cpu:13.3f}"
    yield (
        f"  {'together, by the model of both alone':42} "
        f"{measured.rate * measured.correction / measured.world_size:10,.0f}"
    )
    for rank in measured.ranks if measured.world_size > 1 else ():
        yield (
            f"  rank {rank.rank}: loader {1 / rank.loader:,.0f} images/s"
            + (f", step by itself {1 / rank.step:,.0f}" if rank.step else "")
        )


def _advice(measured: Measured, useful: Sequence[Advice], idle: Sequence[Advice]) -> Iterator[str]:
    yield f"ADVICE (now {measured.rate:,.0f} images/s; each by itself)"
    for number, advice in enumerate(useful, 1):
        variant = advice.variant
        results = "" if variant.same_results else " It changes what is learnt."
        yield (
            f"  {number}. {variant.option}: {advice.images_per_second:,.0f} images/s "
            f"({advice.gain:+.0%})"
        )
        yield f"     {variant.about}.{results}"
    if not useful:
        yield "  nothing that was tried gains 3 %"
    if idle:
        yield "  does not matter: " + "; ".join(
            f"{advice.variant.option} ({advice.gain:+.0%})" for advice in idle
        )
    for text in measured.not_measured:
        yield f"  not measured: {text}"


def _plan(found: Diagnosis) -> Iterator[str]:
    batch = f"{found.largest_batch:,}" if found.largest_batch else "none"
    yield (
        "THE PLAN (evaluations and communication between ranks are not counted; "
        "`unicl-bench scale` models communication)"
    )
    yield (
        f"  largest local batch that fits, by the memory plan: {batch}; "
        f"now {found.measured.local_batch}"
    )
    yield f"  start: {found.measured.start_seconds:.0f} s"
    for plan in found.plans:
        yield (
            f"  {plan.ranks:2} rank{'s' if plan.ranks > 1 else ' '}: "
            f"{plan.images_per_second:,.0f} images/s, {time_of(plan.hours)}; a checkpoint "
            f"every {plan.checkpoint_steps:,} steps loses {plan.lost:.1%}"
        )


def time_of(hours: float) -> str:
    """Hours in words."""
    if hours < 1 / 30:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:,.1f} h"


def totals(measured: Measured) -> list[tuple[str, Cost]]:
    """Loader and step, alone and together."""
    return [
        ("the loader alone", measured.loader),
        ("the step alone", measured.step),
        ("all together", measured.whole),
    ]
