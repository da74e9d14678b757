"""A diagnosis in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .advise import Advice, Limit
from .model import Measured
from .outlook import OnRanks

_SIDES = {
    "feed": "the loader's feeding thread",
    "graph": "the loader's decoding threads",
    "between": "between loader and step",
    "step": "the step",
}


def report_lines(
    measured: Measured,
    limit: Limit,
    useful: Sequence[Advice],
    idle: Sequence[Advice],
    plans: Sequence[OnRanks],
    *,
    largest_batch: int,
    priced: bool,
    network_gbit: float = 0.0,
) -> Iterator[str]:
    """The report, line by line."""
    yield from _stages(measured)
    yield ""
    yield f"THE LIMIT: {limit.sentence}"
    yield limit.head_room
    if limit.besides:
        yield limit.besides
    yield ""
    yield from _advice(measured, useful, idle)
    yield ""
    yield from _plan(
        measured, plans, largest_batch=largest_batch, priced=priced, network_gbit=network_gbit
    )


def _stages(measured: Measured) -> Iterator[str]:
    yield f"{'images/s on a rank, each stage alone':44} {'images/s':>10} {'CPU ms/image':>13}"
    for side, title in _SIDES.items():
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
    for name, cost in (
        ("the loader alone", measured.loader),
        ("the step alone", measured.step),
        ("all together", measured.whole),
    ):
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


def _plan(
    measured: Measured,
    plans: Sequence[OnRanks],
    *,
    largest_batch: int,
    priced: bool,
    network_gbit: float,
) -> Iterator[str]:
    how = "evaluations and communication between ranks are not counted; --network-gbit counts these"
    if network_gbit:
        how = (
            "evaluations are not counted; communication is that of the model of `unicl-bench "
            f"scale` at {network_gbit:g} Gb/s"
        )
    yield f"THE PLAN ({how})"
    fits = f"{largest_batch:,}" if largest_batch else "none"
    yield f"  largest local batch that fits, by the memory plan: {fits}; now {measured.local_batch}"
    yield f"  start: {measured.start_seconds:.0f} s"
    for plan in plans:
        price = f", {plan.price:,.2f} for it" if priced else ""
        yield (
            f"  {plan.ranks:2} rank{'s' if plan.ranks > 1 else ' '}: "
            f"{plan.images_per_second:,.0f} images/s, {_time(plan.hours)}{price}; a checkpoint "
            f"every {plan.checkpoint_steps:,} steps loses {plan.lost:.1%}"
        )


def _time(hours: float) -> str:
    if hours < 1 / 30:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:,.1f} h"
