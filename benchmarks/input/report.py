"""What `unicl-bench input` found, as a table for Markdown and a bar chart, from its JSON files.

    python -m unicl_fast.benchmarks.input.report RESULT.json ... [--plot FILE.png]

So that a table in the documentation is never typed by hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

_COLOURS = {"ours": "#c1440e", "peer": "#8a9ba8", "limit": "white"}
_RAW = "-raw"
_OFF_THE_SCALE = 4
"""A limit beyond so many times the fastest contender is told in words: it would squeeze the
others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Prints a table of each result; draws all of them if told where."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files of `unicl-bench input`."""
    plot: Path | None = None
    """Where the bar charts are written, as PNG."""


def table(result: Mapping[str, Any]) -> str:
    """One row a contender, the fastest first within its kind; ratios are to ours.

    Who reads decoded images is compared with our loader of decoded images, if it ran.
    """
    figures = result["figures"]
    lines = [
        "| | images/s | ours, times that | by CPU time | memory, MB | levels from Pillow |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in _by_rate(result):
        ours = "unicl_fast"
        if name.endswith(_RAW) and f"{ours}{_RAW}" in result["contenders"]:
            ours += _RAW
        cells = [
            _spread(figures[f"{name}, images/s"]),
            _spread(figures.get(f"{ours} / {name}")),
            _spread(figures.get(f"{ours} / {name}, by CPU time")),
            _median(figures.get(f"{name}, MB")),
        ]
        gap = facts.get("levels_from_pillow")
        cells.append(f"{gap['mean']:.2f}" if gap else "")
        kind = "" if facts["kind"] in ("ours", "peer") else f"{facts['kind']}: "
        lines.append(f"| {kind}{name} | {' | '.join(cells)} |")
    for name, reason in result["left_out"].items():
        lines.append(f"| {name} | passed over: {reason} | | | | |")
    return "\n".join(lines)


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel of bars for each result: median rate and spread; memory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [_bars(result) for result in results.values()]
    height = 1.2 + 0.36 * max(map(len, bars))
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(6.4 * len(results), height), squeeze=False, layout="constrained"
    )
    for panel, (title, result), rows in zip(panels[0], results.items(), bars, strict=True):
        top = max(result["figures"][f"{name}, images/s"]["high"] for name, _ in rows)
        for place, (name, kind) in enumerate(reversed(rows)):
            rate = result["figures"][f"{name}, images/s"]
            memory = result["figures"].get(f"{name}, MB")
            middle = rate["median"]
            panel.barh(
                place,
                middle,
                color=_COLOURS[kind],
                edgecolor="#4a4a4a" if kind == "limit" else _COLOURS[kind],
                hatch="///" if kind == "limit" else None,
                xerr=[[middle - rate["low"]], [rate["high"] - middle]],
                error_kw={"ecolor": "#222222", "capsize": 2, "elinewidth": 0.8},
            )
            label = f"{middle:,.0f}" + (f"  ({memory['median']:,.0f} MB)" if memory else "")
            panel.text(rate["high"] + 0.01 * top, place, label, va="center", fontsize=8)
        panel.set_yticks(
            range(len(rows)),
            [f"limit: {name}" if kind == "limit" else name for name, kind in reversed(rows)],
        )
        panel.set_xlim(0, 1.32 * top)
        panel.set_xlabel(_axis_label(result), fontsize=8)
        panel.set_title(title, fontsize=10)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_rate(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, bool, float]:
        name, facts = item
        rate = result["figures"][f"{name}, images/s"]["median"]
        return facts["kind"] == "stage", facts["kind"] == "limit", -rate

    return sorted(result["contenders"].items(), key=order)


def _bars(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and kinds from top to bottom: limits, then whole pipelines, the fastest first."""
    rows = [(name, facts["kind"]) for name, facts in _by_rate(result)]
    whole = [(name, kind) for name, kind in rows if kind in ("ours", "peer")]
    beyond = _beyond(result)
    return [row for row in rows if row[1] == "limit" and row not in beyond] + whole


def _beyond(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Limits that are off the scale."""
    rates = {
        (name, facts["kind"]): result["figures"][f"{name}, images/s"]["median"]
        for name, facts in result["contenders"].items()
    }
    fastest = max(rate for (_, kind), rate in rates.items() if kind in ("ours", "peer"))
    return [
        row for row, rate in rates.items() if row[1] == "limit" and rate > _OFF_THE_SCALE * fastest
    ]


def _axis_label(result: Mapping[str, Any]) -> str:
    label = "images/s: median and spread (memory of all processes)"
    beyond = [
        f"{name} {result['figures'][f'{name}, images/s']['median']:,.0f}"
        for name, _ in _beyond(result)
    ]
    return f"{label}\nlimits off the scale: {', '.join(beyond)}" if beyond else label


def _spread(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    low, middle, high = (_number(figure[key]) for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _median(figure: Mapping[str, float] | None) -> str:
    return "" if figure is None else _number(figure["median"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


def main() -> None:
    """Prints the tables, draws the plot."""
    settings = tyro.cli(Settings, prog="python -m unicl_fast.benchmarks.input.report")
    results = {path.stem: json.loads(path.read_text()) for path in settings.results}
    for name, result in results.items():
        print(f"\n{name}\n\n{table(result)}")
    if settings.plot is not None:
        plot(results, settings.plot)


if __name__ == "__main__":
    main()
