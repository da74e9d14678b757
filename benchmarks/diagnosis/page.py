"""A diagnosis as one screen of HTML: the verdict, a chart of the stages, three changes to make.

The template page.html is in this folder; the bars are its elements. All else is in report.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unicl_fast.system.pages import fill_page
from unicl_fast.system.wording import count_of

from .advise import LEAST_GAIN
from .earlier import Comparison
from .model import CHECKPOINT, STORE, Cost, rate_text
from .report import SIDES, Diagnosis, totals

_SHOWN_CHANGES = 3


def make_page(
    found: Diagnosis, machine: Mapping[str, Any], *, comparison: Comparison | None
) -> str:
    """Returns the page as text, to be written in UTF-8; `machine` is the result file's."""
    measured = found.measured
    return fill_page(
        Path(__file__).with_name("page.html"),
        rate=rate_text(measured.whole, ranks=measured.world_size),
        about=_about(found),
        limit=found.limit,
        comparison=comparison,
        groups=list(_groups(found)),
        advice=found.useful[:_SHOWN_CHANGES],
        least_gain=f"{LEAST_GAIN:.0%}",
        tried=found.tried_sentence(),
        machine=", ".join(
            f"{name} {machine[name]}"
            for name in ("processor", "cores", "gpu", "torch", "commit", "date")
            if name in machine
        ),
    )


def _about(found: Diagnosis) -> str:
    measured, config = found.measured, found.config
    return (
        f"{config['model']['image_encoder']} on {', '.join(config['data']['train'])}: "
        f"{count_of(measured.world_size, 'rank')} on {measured.device}, a local batch of "
        f"{count_of(measured.local_batch, 'image')} of {config['data']['image_size']} pixels, "
        f"{config['efficiency']['precision']}"
    )


def _groups(found: Diagnosis) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Titles of groups with their bars, whose widths are percentages of the longest time."""
    groups = dict(_costs(found))
    longest = max(cost.wall for costs in groups.values() for cost in costs.values()) or 1.0
    slowest = STORE if found.limit.resource == "store" else found.limit.stage
    for title, costs in groups.items():
        yield (
            title,
            [
                {
                    "name": name,
                    "rate": rate_text(cost),
                    "width": f"{100 * cost.wall / longest:.2f}",
                    "is_limit": name == slowest,
                }
                for name, cost in costs.items()
            ],
        )


def _costs(found: Diagnosis) -> Iterator[tuple[str, dict[str, Cost]]]:
    """The costs in the order of a batch's way, then those of loader and step."""
    measured = found.measured
    if measured.store_wall:
        yield "in the first epoch", {STORE: Cost(wall=measured.store_wall, cpu=0.0)}
    for side, title in SIDES.items():
        if costs := {each.name: each.cost for each in measured.stages if each.side == side}:
            yield title, costs
    if seconds := measured.checkpoint_seconds(max(measured.resources().values())):
        every = f"every {count_of(measured.checkpoint.every_steps, 'step')}"
        yield every, {CHECKPOINT: Cost(wall=seconds, cpu=0.0)}
    yield "loader and step", dict(totals(measured))
