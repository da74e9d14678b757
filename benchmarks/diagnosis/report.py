"""A diagnosis in plain text; page.py makes the page."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unicl_fast.system.wording import count_of

from .advise import Advice, Limit
from .model import CHECKPOINT, STORE, Cost, Measured, Stage, rate_text

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
    advice: tuple[Advice, ...]
    """Advice that gains something, the largest gain first."""
    does_not_matter: tuple[Advice, ...]
    """Changes that were found not to matter."""
    hours: float
    """For all samples of the run, checkpoints included."""
    largest_batch: int
    """The largest local batch that fits, by the memory plan; 0 where none does."""
    tried: dict[str, Any] | None
    """The change that `--try` has made."""
    config: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Itself for JSON."""
        return dataclasses.asdict(self) | {"measured": self.measured.as_dict()}

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
    yield from _advice(measured, found.advice, found.does_not_matter)
    yield ""
    yield from _plan(found)
    if found.tried is not None:
        yield f"TRIED {found.tried_sentence()}"


def groups(measured: Measured) -> Iterator[tuple[str, list[Stage]]]:
    """Titles with the costs of an image: in the order of a batch's way, then of all together."""
    if measured.store_wall:
        store = Cost(wall=measured.store_wall, cpu=0.0)
        yield "in the first epoch", [Stage(name=STORE, cost=store, side="")]
    for side, title in SIDES.items():
        if stages := [stage for stage in measured.stages if stage.side == side]:
            yield title, stages
    one = measured.checkpoint
    if seconds := measured.checkpoint_seconds(max(measured.resources().values())):
        note = (
            f"{one.num_bytes / 1e6:,.1f} MB: the step waits {one.blocking_seconds:.3f} s, written "
            f"in {one.writing_seconds:.2f} s"
        )
        cost = Cost(wall=seconds, cpu=0.0)
        title = f"every {count_of(one.every_steps, 'step')}"
        yield title, [Stage(name=CHECKPOINT, cost=cost, side="", note=note)]
    yield (
        "loader and step",
        [
            Stage(name="the loader alone", cost=measured.loader, side=""),
            Stage(name="the step alone", cost=measured.step, side=""),
            Stage(name="all together", cost=measured.whole, side=""),
        ],
    )


def _stages(measured: Measured) -> Iterator[str]:
    yield f"{'images/s on a rank, each stage alone':44} {'images/s':>24} {'CPU ms/image':>13}"
    for title, stages in groups(measured):
        yield f"  {title}"
        for stage in stages:
            rate, milliseconds = rate_text(stage.cost), 1e3 * stage.cost.cpu
            yield f"    {stage.name:40} {rate:>24} {milliseconds:13.3f}  {stage.note}".rstrip()
    modelled = measured.rate * measured.correction / measured.world_size
    yield f"    {'together, by the model of both alone':40} {modelled:24,.0f}"
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
    yield "THE PLAN (evaluations are not counted)"
    yield (
        f"  largest local batch that fits, by the memory plan: {batch}; "
        f"now {found.measured.local_batch}"
    )
    seconds = datetime.timedelta(seconds=round(3600 * found.hours))
    yield (
        f"  start: {found.measured.start_seconds:.0f} s; then {seconds} "
        f"on {count_of(found.measured.world_size, 'rank')}"
    )
