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
from .model import STORE, rate_text
from .report import Diagnosis, groups

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
        groups=list(_bars(found)),
        advice=found.advice[:_SHOWN_CHANGES],
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


def _bars(found: Diagnosis) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Titles of groups with their bars, whose widths are percentages of the longest time."""
    shown = list(groups(found.measured))
    longest = max(stage.cost.wall for _, stages in shown for stage in stages) or 1.0
    slowest = STORE if found.limit.resource == "store" else found.limit.stage
    for title, stages in shown:
        yield (
            title,
            [
                {
                    "name": stage.name,
                    "rate": rate_text(stage.cost),
                    "width": f"{100 * stage.cost.wall / longest:.2f}",
                    "is_limit": stage.name == slowest,
                }
                for stage in stages
            ],
        )
