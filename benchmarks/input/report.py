"""The report of `unicl-bench input`: verdict, table and chart of a result.

    python -m unicl_fast.benchmarks.input.report RESULT.json [--plot FILE.png] [--title TEXT]

Prints and draws a result that was written with --json, so that no table in the documentation is
typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import OURS

_RAW = "-raw"
_COLOURS = {"ours": "#c1440e", "peer": "#8a9ba8", "limit": "white"}
_LEGEND = {"ours": "unicl_fast", "peer": "others", "limit": "a part of the work"}
_OFF_THE_SCALE = 4
"""Limits this many times as fast as the fastest contestant are named in words instead: they would
squeeze the other bars."""
_Row = tuple[str, Mapping[str, Any]]
"""A contestant's name, and what the result says of it."""


def verdict(result: Mapping[str, Any]) -> str:
    """Compares our rate with the fastest peer's and the nearest limit's, in a sentence.

    A limit does only a part of the work, so nothing can be faster than the slowest of them.
    """
    figures, ours = result["figures"], OURS.name
    others = {
        kind: [name for name, facts in _by_rate(result) if facts["kind"] == kind]
        for kind in ("peer", "limit")
    }
    said = [f"{ours} makes {spread(figures[f'{ours}, images/s'])} images/s"]
    if peers := [name for name in others["peer"] if not name.endswith(_RAW)]:
        ratio = spread(figures[f"{ours} / {peers[0]}"])
        said.append(f"{ratio} times {peers[0]}, the fastest peer of {len(peers)}")
    if others["limit"]:
        limit = others["limit"][-1]
        ratio = spread(figures[f"{ours} / {limit}"])
        said.append(f"{ratio} of the nearest limit, {limit}")
    return ": ".join([said[0], ", and ".join(said[1:])]) if said[1:] else said[0]


def table(result: Mapping[str, Any]) -> str:
    """One row for each contestant, the fastest first within its kind; ratios are to ours.

    Readers of decoded images are compared with our loader of decoded images, if it ran.
    """
    figures = result["figures"]
    lines = [
        "| | images/s | ours, times that | by CPU time | memory, MB | levels from Pillow |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in _by_rate(result):
        ours = OURS.name
        if name.endswith(_RAW) and f"{ours}{_RAW}" in result["contenders"]:
            ours += _RAW
        cells = [
            spread(figures[f"{name}, images/s"]),
            spread(figures.get(f"{ours} / {name}")),
            spread(figures.get(f"{ours} / {name}, by CPU time")),
        ]
        memory, gap = figures.get(f"{name}, MB"), facts.get("levels_from_pillow")
        cells.append(_number(memory["median"]) if memory else "")
        cells.append(f"{gap['mean']:.2f}" if gap else "")
        kind = "" if facts["kind"] in ("ours", "peer") else f"{facts['kind']}: "
        lines.append(f"| {kind}{name} | {' | '.join(cells)} |")
    for name, reason in result["left_out"].items():
        lines.append(f"| {name} | left out: {reason} | | | | |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draws a bar with its spread for each contestant and limit.

    Letters are large for the width, so that a page of 360 pixels still shows them.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, beyond = _bars(result)
    rates = [result["figures"][f"{name}, images/s"] for name, _ in rows]
    kinds = [facts["kind"] for _, facts in rows]
    styles: dict[str, dict[str, Any]] = {
        kind: {
            "facecolor": colour,
            "edgecolor": "#4a4a4a" if kind == "limit" else colour,
            "hatch": "///" if kind == "limit" else "",
        }
        for kind, colour in _COLOURS.items()
    }
    figure = Figure(figsize=(6.6, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    top = max(rate["high"] for rate in rates)
    for row, (rate, kind) in enumerate(zip(rates, kinds, strict=True)):
        middle = rate["median"]
        error = [[middle - rate["low"]], [rate["high"] - middle]]
        axes.barh(
            row, middle, xerr=error, error_kw={"ecolor": "#222222", "capsize": 2}, **styles[kind]
        )
        axes.text(rate["high"] + 0.015 * top, row, f"{middle:,.0f}", va="center", fontsize=11)
    axes.set_yticks(np.arange(len(rows)), [name for name, _ in rows], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * top)
    axes.set_xticks([])
    axes.tick_params("y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left")
    axes.set_xlabel(_small_print(result, beyond), fontsize=10, loc="left")
    patches = [Patch(label=_LEGEND[kind], **styles[kind]) for kind in _LEGEND if kind in kinds]
    axes.legend(handles=patches, loc="lower right", fontsize=11, frameon=False)
    figure.savefig(path, dpi=160)


def _small_print(result: Mapping[str, Any], beyond: Sequence[str]) -> str:
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"images/s, median and spread of {settings['rounds']} rounds: batches of "
        f"{settings['batch_size']} at {settings['image_size']} pixels,",
        f"{settings['threads']} threads or workers on {machine['cores']} cores of "
        f"{machine['processor']}",
    ]
    if any(name.endswith(_RAW) for name in result["contenders"]):
        lines.append(f"{_RAW}: of images that are stored decoded")
    if beyond:
        lines.append(f"parts that are faster than drawn: {', '.join(beyond)}")
    return "\n".join(lines)


def _by_rate(result: Mapping[str, Any]) -> list[_Row]:
    def order(row: _Row) -> tuple[int, float]:
        kind, rate = row[1]["kind"], result["figures"][f"{row[0]}, images/s"]["median"]
        return {"limit": 1, "stage": 2}.get(kind, 0), -rate

    return sorted(result["contenders"].items(), key=order)


def _bars(result: Mapping[str, Any]) -> tuple[list[_Row], list[str]]:
    """Rows from top to bottom, limits first; and the limits that are off the scale, in words."""
    rate = {name: result["figures"][f"{name}, images/s"]["median"] for name in result["contenders"]}
    rows = _by_rate(result)
    whole = [row for row in rows if row[1]["kind"] in ("ours", "peer")]
    limits = [row for row in rows if row[1]["kind"] == "limit"]
    most = _OFF_THE_SCALE * max(rate[name] for name, _ in whole)
    beyond = [f"{name} {rate[name]:,.0f}" for name, _ in limits if rate[name] > most]
    return [row for row in limits if rate[row[0]] <= most] + whole, beyond


def spread(figure: Mapping[str, float] | None) -> str:
    """Median and spread as text; empty for no figure."""
    if figure is None:
        return ""
    low, middle, high = (_number(figure[key]) for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command above."""
    parser = argparse.ArgumentParser(description="Verdict, table and chart of a result.")
    parser.add_argument("result", type=Path, help="the JSON file of `unicl-bench input`")
    parser.add_argument("--plot", type=Path, help="file for the bar chart, as PNG")
    parser.add_argument("--title", default="", help="its title; else the name of the data set")
    chosen = parser.parse_args(arguments)
    result = json.loads(chosen.result.read_text(encoding="utf-8"))
    print(f"{verdict(result)}\n\n{table(result)}")
    if chosen.plot is not None:
        plot(result, chosen.plot, title=chosen.title or Path(result["settings"]["data"]).name)


if __name__ == "__main__":
    main()
