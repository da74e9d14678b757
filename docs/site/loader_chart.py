"""Draws docs/results/input.png, the loaders' rates, from a result of `unicl-bench input`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.input.report import by_rate

_RESULTS = Path(__file__).resolve().parents[1] / "results"
RESULT, CHART = _RESULTS / "input-256.json", _RESULTS / "input.png"
_TITLE = "Loading 256-pixel JPEGs on two CPU cores"
_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"facecolor": "#c1440e", "edgecolor": "#c1440e"},
    "peer": {"facecolor": "#8a9ba8", "edgecolor": "#8a9ba8"},
    "limit": {"facecolor": "white", "edgecolor": "#4a4a4a", "hatch": "///"},
}
_LEGEND = {"ours": "unicl_fast", "peer": "others", "limit": "a part of the work"}
_OFF_THE_SCALE = 4
"""Limits this many times as fast as the fastest loader are named in words instead: they would
squeeze the other bars."""


def draw(path: Path = CHART) -> None:
    """Draws a bar with its spread for each limit and each loader.

    Letters are large for the width, so that a page of 360 pixels still shows them.
    """
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rates = {name: result["figures"][f"{name}, images/s"] for name in result["contenders"]}
    kinds = {name: facts["kind"] for name, facts in by_rate(result)}
    fastest = max(rates[name]["median"] for name in kinds if kinds[name] != "limit")
    beyond = [name for name in kinds if rates[name]["median"] > _OFF_THE_SCALE * fastest]
    names = sorted(
        (name for name in kinds if name not in beyond), key=lambda n: kinds[n] != "limit"
    )
    figure = Figure(figsize=(6.6, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    top = max(rates[name]["high"] for name in names)
    for row, name in enumerate(names):
        low, middle, high = (rates[name][key] for key in ("low", "median", "high"))
        axes.barh(
            row, middle, xerr=[[middle - low], [high - middle]],
            error_kw={"ecolor": "#222222", "capsize": 2}, **_STYLES[kinds[name]],
        )  # fmt: skip
        axes.text(high + 0.015 * top, row, f"{middle:,.0f}", va="center", fontsize=11)
    axes.set_yticks(np.arange(len(names)), names, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * top)
    axes.set_xticks([])
    axes.tick_params("y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(_TITLE, fontsize=13, fontweight="bold", loc="left")
    off = [f"{name} {rates[name]['median']:,.0f}" for name in beyond]
    axes.set_xlabel(_small_print(result, ", ".join(off)), fontsize=10, loc="left")
    patches = [Patch(label=label, **_STYLES[kind]) for kind, label in _LEGEND.items()]
    axes.legend(handles=patches, loc="lower right", fontsize=11, frameon=False)
    figure.savefig(path, dpi=160)


def _small_print(result: Mapping[str, Any], beyond: str) -> str:
    settings, machine = result["settings"], result["machine"]
    return (
        f"images/s, median and spread of {settings['rounds']} rounds: batches of "
        f"{settings['batch_size']} at {settings['image_size']} pixels,\n"
        f"{settings['threads']} threads or workers on {machine['cores']} cores of "
        f"{machine['processor']}\n"
        "-raw: of images that are stored decoded\n"
        f"parts that are faster than drawn: {beyond}"
    )
