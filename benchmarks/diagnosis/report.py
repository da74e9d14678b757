"""A diagnosis in plain text, and as Markdown; page.py makes the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unicl_fast.system.wording import count_of, markdown_table, markdown_text

from .advise import Advice, Limit
from .earlier import Comparison, Peers, Rate, rate_of
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
    is_priced: bool
    network_gbit: float
    """The network for which the plans count communication; 0 where they do not."""
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

    def plan_sentence(self) -> str:
        """Says what the plans count."""
        if not self.network_gbit:
            return (
                "evaluations and communication between ranks are not counted; --network-gbit "
                "counts communication"
            )
        return (
            "evaluations are not counted; communication is that of the model of `unicl-bench "
            f"scale` at {self.network_gbit:g} Gb/s"
        )

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
    yield f"THE PLAN ({found.plan_sentence()})"
    yield (
        f"  largest local batch that fits, by the memory plan: {batch}; "
        f"now {found.measured.local_batch}"
    )
    yield f"  start: {found.measured.start_seconds:.0f} s"
    for plan in found.plans:
        price = f", {plan.price:,.2f} for it" if found.is_priced else ""
        yield (
            f"  {plan.ranks:2} rank{'s' if plan.ranks > 1 else ' '}: "
            f"{plan.images_per_second:,.0f} images/s, {time_of(plan.hours)}{price}; a checkpoint "
            f"every {plan.checkpoint_steps:,} steps loses {plan.lost:.1%}"
        )


def time_of(hours: float) -> str:
    """Hours in words."""
    if hours < 1 / 30:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:,.1f} h"


# Tables, which the page and the Markdown have in common.

Table = tuple[list[str], list[list[str]]]
"""A header and rows."""


def stage_table(measured: Measured) -> Table:
    """Every stage alone, and the parts together: images/s on a rank, and CPU time."""
    rows = []
    for side, title in SIDES.items():
        for stage in measured.stages:
            if stage.side == side:
                rows.append([stage.name, title, *_costs(stage.cost), stage.note])
    for name, cost in totals(measured):
        rows.append([name, "", *_costs(cost), ""])
    return ["stage", "where", "images/s on a rank", "CPU ms/image", "note"], rows


def totals(measured: Measured) -> list[tuple[str, Cost]]:
    """Loader and step, alone and together."""
    return [
        ("the loader alone", measured.loader),
        ("the step alone", measured.step),
        ("all together", measured.whole),
    ]


def _costs(cost: Cost) -> list[str]:
    return [rate_text(cost), f"{1e3 * cost.cpu:.3f}"]


def rate_text(cost: Cost | None) -> str:
    """The rate with its spread, as far as there are rounds; a dash where nothing was measured."""
    if cost is None or cost.wall <= 1e-9:
        return "-"
    rate = rate_of(cost) if cost.spread[0] > 1e-9 else None
    if rate is None or not cost.rounds:
        return f"{1 / cost.wall:,.0f}"
    return f"{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})"


def advice_table(found: Sequence[Advice]) -> Table:
    """Changes of settings, with the rate that each would give."""
    rows = [
        [
            one.variant.option,
            f"{one.gain:+.0%}",
            f"{one.images_per_second:,.0f}",
            f"{one.variant.about}{'' if one.variant.same_results else '; changes what is learnt'}",
        ]
        for one in found
    ]
    return ["change", "rate", "images/s", "about"], rows


def change_table(comparison: Comparison) -> Table:
    """Every stage before and now."""
    rows = [
        [
            one.name,
            *(rate_text(one.old), rate_text(one.new)),
            *("-" if part is None else f"{part:+.1%}" for part in (one.rate, one.cpu)),
        ]
        for one in comparison.changes
    ]
    return ["stage", "images/s before", "images/s now", "rate", "CPU time"], rows


def peer_table(peers: Peers, measured: Measured) -> Table:
    """Rates of a part by us and by others, the run's own first."""
    rows = [
        [name, f"{rate.median:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}"]
        for name, rate in peer_rates(peers, measured).items()
    ]
    return ["", "images/s", "spread"], rows


def peer_rates(peers: Peers, measured: Measured) -> dict[str, Rate]:
    """The rate of this run's part, then those of the file."""
    name, cost = totals(measured)[0 if peers.is_of_loader else 1]
    return {f"this run: {name.removeprefix('the ')}": rate_of(cost), **peers.rates}


def plan_table(found: Diagnosis) -> Table:
    """The run on several numbers of ranks."""
    head = ["ranks", "images/s", "time", "steps between checkpoints", "lost by them and failures"]
    rows = [
        [
            *(f"{plan.ranks}", f"{plan.images_per_second:,.0f}", time_of(plan.hours)),
            *(f"{plan.checkpoint_steps:,}", f"{plan.lost:.1%}"),
            *([f"{plan.price:,.2f}"] if found.is_priced else []),
        ]
        for plan in found.plans
    ]
    return head + (["price"] if found.is_priced else []), rows


def checkpoint_sentence(measured: Measured) -> str:
    """The cost of a checkpoint."""
    one = measured.checkpoint
    every = f"every {one.every_steps:,} steps" if one.every_steps else "at the end alone"
    return (
        f"A checkpoint of {one.num_bytes / 1e6:,.1f} MB is written {every}: the step waits "
        f"{one.blocking_seconds:.3f} s, and it is on the disk after {one.writing_seconds:.2f} s."
    )


def waits_sentence(measured: Measured) -> str:
    """How long the steps of the time line waited; empty where there are none."""
    steps = measured.timeline
    total = sum(sum(step.parts.values()) for step in steps)
    waits = [step.parts.get("data_wait", 0.0) for step in steps]
    if not total:
        return ""
    return (
        f"{count_of(len(steps), 'step')} took {total:.2f} s, of which they waited {sum(waits):.2f} "
        f"s for their batches ({sum(waits) / total:.0%}; the longest wait: {1e3 * max(waits):,.0f} "
        "ms)."
    )


def markdown(
    found: Diagnosis,
    machine: Mapping[str, Any],
    *,
    comparison: Comparison | None,
    peers: Sequence[Peers],
) -> str:
    """The report as Markdown; texts that would be markup are escaped."""
    limit = found.limit
    parts = ["# What limits this run"]
    parts += [markdown_text(text) for text in (limit.sentence, limit.head_room, limit.besides)]
    if comparison is not None:
        parts += ["## Against an earlier run", markdown_text(comparison.verdict)]
        parts += [markdown_text(text) for text in comparison.warnings]
        parts.append(markdown_table(*change_table(comparison)))
    parts += ["## Stages", markdown_table(*stage_table(found.measured))]
    parts += [waits_sentence(found.measured), checkpoint_sentence(found.measured), "## Advice"]
    parts.append(
        markdown_table(*advice_table(found.useful))
        if found.useful
        else "Nothing that was tried gains 3 %."
    )
    if found.tried is not None:
        parts.append(f"Tried: {markdown_text(found.tried_sentence())}.")
    if found.idle:
        parts += ["These do not matter:", markdown_table(*advice_table(found.idle))]
    parts += [f"Not measured: {markdown_text(text)}." for text in found.measured.not_measured]
    for each in peers:
        table = markdown_table(*peer_table(each, found.measured))
        parts += [f"## {markdown_text(each.file)}", table]
    parts += ["## The plan", markdown_table(*plan_table(found)), "## Machine"]
    rows = [[name, str(value)] for name, value in machine.items()]
    parts.append(markdown_table(["", ""], rows))
    return "\n\n".join(filter(None, parts)) + "\n"
