"""The report of `unicl-bench input`: verdict and table of a result, also one that is committed."""

from collections.abc import Mapping
from typing import Any

from unicl_fast.system.wording import markdown_table

from .contenders import OURS

RAW = "-raw"
Row = tuple[str, Mapping[str, Any]]
"""A contestant's name, and what the result says of it."""


def verdict(result: Mapping[str, Any]) -> str:
    """Compares our rate with the fastest peer's and the nearest limit's, in a sentence.

    A limit does only a part of the work, so nothing can be faster than the slowest of them.
    """
    figures, ours = result["figures"], OURS.name
    others = {
        kind: [name for name, facts in by_rate(result) if facts["kind"] == kind]
        for kind in ("peer", "limit")
    }
    said = [f"{ours} makes {spread(figures[f'{ours}, images/s'])} images/s"]
    if peers := [name for name in others["peer"] if not name.endswith(RAW)]:
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
    figures, rows = result["figures"], []
    for name, facts in by_rate(result):
        ours = OURS.name
        if name.endswith(RAW) and f"{ours}{RAW}" in result["contenders"]:
            ours += RAW
        ratio, gap = f"{ours} / {name}", facts.get("levels_from_pillow")
        kind = "" if facts["kind"] in ("ours", "peer") else f"{facts['kind']}: "
        memory = figures.get(f"{name}, MB")
        rows.append(
            [
                f"{kind}{name}",
                spread(figures[f"{name}, images/s"]),
                spread(figures.get(f"{ratio}, by CPU time")),
                _number(memory["median"]) if memory else "",
                f"{gap['mean']:.2f}" if gap else "",
            ]
        )
    rows += [[name, f"left out: {why}", *[""] * 3] for name, why in result["left_out"].items()]
    head = ["", "images/s", "ours / this, by CPU time", "memory, MB", "levels from Pillow"]
    return markdown_table(head, rows)


def by_rate(result: Mapping[str, Any]) -> list[Row]:
    def order(row: Row) -> tuple[bool, float]:
        kind, rate = row[1]["kind"], result["figures"][f"{row[0]}, images/s"]["median"]
        return kind == "limit", -rate

    return sorted(result["contenders"].items(), key=order)


def spread(figure: Mapping[str, float] | None) -> str:
    """Median and spread as text; empty for no figure."""
    if figure is None:
        return ""
    low, middle, high = (_number(figure[key]) for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"
