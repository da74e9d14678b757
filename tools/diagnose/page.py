"""A diagnosis as one screen of HTML: the verdict, a chart of the stages, three changes to make.

The template is page.html; report.json has all numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_fast.system.pages import fill_page

from .advise import LEAST_GAIN, advise, find_limit, neighbours
from .model import rate_text
from .report import Diagnosis, groups, rate_of

_SHOWN_CHANGES = 3


def make_page(found: Diagnosis, machine: Mapping[str, Any]) -> str:
    """The page, for UTF-8; `machine` is the result file's."""
    measured, shown = found.measured, list(groups(found.measured))
    names = ("processor", "cores", "gpu", "torch", "commit", "date")
    return fill_page(
        Path(__file__).with_name("page.html"),
        rate=rate_text(measured.whole, ranks=measured.world_size), rate_text=rate_text,
        measured=measured, config=found.config, busy=neighbours(measured),
        limit=find_limit(measured), groups=shown, now=rate_of(measured),
        longest=max(stage.cost.wall for _, stages in shown for stage in stages) or 1.0,
        advice=advise(measured)[0][:_SHOWN_CHANGES], least_gain=f"{LEAST_GAIN:.0%}",
        applied=found.applied, options=" ".join(found.kept),
        machine=", ".join(f"{name} {machine[name]}" for name in names if name in machine),
    )  # fmt: skip
