"""Charts of the report as SVG in the page: the time line of some steps, and bars of rates.

matplotlib draws them, which is here anyway: a page with its SVG has 100 kB and no script, and one
with plotly's library 4 MB. Its SVG knows colours and sizes in points, and no style of a page, so
colours are numbers that stand for the page's CSS variables (dark and light), texts stay texts in
the page's font, and a chart is drawn twice, for a desktop and for a phone, of which CSS shows one.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unicl_fast.system.pages import visible

from .earlier import Rate
from .model import StepTimes

WIDTHS = {"wide": 1072, "narrow": 358}
"""Width of a chart in points, which are the page's pixels: on a desktop, and on a phone."""
PARTS = {
    "data_wait": "waits for its batch",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "communication": "waits for other ranks",
    "optimizer": "update",
    "checkpoint": "checkpoint",
    "other": "other",
}
"""Parts of a step in the time line, and their names; `evaluation` and `checks` count as other."""
_COLOURS = ("ink", "soft", "line", "accent", "peer", "made", "ready", *PARTS)
_LONGEST_NAME = 24
_SVG = "http://www.w3.org/2000/svg"


def colour(name: str) -> str:
    """The number that stands for a CSS variable; so dark that no eye would miss a forgotten one."""
    return f"#0000{_COLOURS.index(name) + 1:02x}"


def part_of(name: str) -> str:
    """The part in the time line that a part of the step's clock is shown as."""
    return name if name in PARTS else "other"


def draw_timeline(
    steps: Sequence[StepTimes], made_meanwhile: Sequence[tuple[float, float]]
) -> markupsafe.Markup:
    """Draws a row for each step: its batch being made and kept ready, and the step's parts.

    The row above them has all batches that were made meanwhile: a loader works for later steps.
    """

    def draw(axis: Axes) -> None:
        end = max(step.begin + sum(step.parts.values()) for step in steps)
        unit, scale = ("seconds", 1.0) if end > 2 else ("milliseconds", 1e3)

        def bar(row: int, span: tuple[float, float], name: str, *, height: float = 0.8) -> None:
            # cut here: elements that are only hidden would still reach over a phone's edge
            begun, ended = (min(max(0.0, moment), end) for moment in span)
            if begun < ended:
                where = [(scale * begun, scale * (ended - begun))]
                axis.broken_barh(where, (row - height / 2, height), color=colour(name))

        for span in made_meanwhile:
            bar(0, span, "made")
        for row, step in enumerate(steps, 1):
            if step.made is not None:
                bar(row, step.made, "made", height=0.4)
                bar(row, (step.made[1], step.given), "ready", height=0.1)
            left = step.begin
            for name, seconds in step.parts.items():
                bar(row, (left, left + seconds), part_of(name))
                left += seconds
        axis.set_xlim(0, scale * end)
        axis.set_ylim(len(steps) + 0.7, -0.7)
        rows = [row for row in range(1, len(steps) + 1) if row == 1 or row % 5 == 0]
        axis.set_yticks([0, *rows], ["loader", *(f"step {row}" for row in rows)])
        axis.set_xlabel(f"{unit} since the first of these steps began")
        axis.grid(axis="x", color=colour("line"), linewidth=1)

    return _in_both_widths(
        draw, height=81 + 17 * len(steps), label=f"Time line of {len(steps)} steps"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A rate with its name."""

    name: str
    rate: Rate
    is_ours: bool


def draw_bars(bars: Sequence[Bar], *, label: str) -> markupsafe.Markup:
    """Draws a bar for each rate, from the first one at the top down, with its spread."""

    def draw(axis: Axes) -> None:
        rates = [bar.rate for bar in bars]
        top = max(rate.high for rate in rates)
        axis.barh(
            range(len(bars)),
            [rate.median for rate in rates],
            height=0.66,
            color=[colour("accent" if bar.is_ours else "peer") for bar in bars],
            xerr=(
                [max(0.0, rate.median - rate.low) for rate in rates],
                [max(0.0, rate.high - rate.median) for rate in rates],
            ),
            error_kw={"ecolor": colour("ink"), "elinewidth": 1, "capsize": 3},
        )
        for row, rate in enumerate(rates):
            axis.text(
                max(rate.high, rate.median) + 0.015 * top, row, f"{rate.median:,.0f}",
                va="center", fontsize=12, color=colour("ink"),
            )  # fmt: skip
        axis.set_yticks(range(len(bars)), [_short(bar.name) for bar in bars])
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, 1.22 * top)
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("images/s: median and spread")

    return _in_both_widths(draw, height=52 + 27 * len(bars), label=label)


def _short(name: str) -> str:
    """A name that leaves room for its bar on a phone."""
    text: str = visible(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def _in_both_widths(draw: Callable[[Axes], None], *, height: int, label: str) -> markupsafe.Markup:
    """The chart for a desktop and for a phone; the page's style shows one of them."""
    both = []
    for name, width in WIDTHS.items():
        # texts stay texts, and none is a formula; a salt keeps the names inside two charts apart
        settings: dict[Any, Any] = {
            **{"svg.fonttype": "none", "svg.hashsalt": f"{label}, {name}"},
            **{"text.parse_math": False, "text.usetex": False, "axes.unicode_minus": False},
            **{"font.size": 12, "axes.linewidth": 1},
            **{key: colour("soft") for key in ("axes.edgecolor", "axes.labelcolor", "xtick.color")},
            **{"ytick.color": colour("soft"), "ytick.labelcolor": colour("ink")},
        }
        with rc_context(settings):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            axis = figure.subplots()
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            draw(axis)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
        both.append(_for_a_page(file.getvalue(), kind=name, label=label))
    return markupsafe.Markup("").join(both)


def _for_a_page(svg: str, *, kind: str, label: str) -> markupsafe.Markup:
    """An SVG document as an element of a page that is as wide as there is room."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    for found in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(found)
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)  # the same in every chart, and no one refers to it
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"class": f"chart {kind}", "role": "img", "aria-label": label}
    text = ET.tostring(root, encoding="unicode")
    for name in _COLOURS:
        text = text.replace(colour(name), f"var(--{name})")
    return markupsafe.Markup(text)  # in which matplotlib has escaped every text
