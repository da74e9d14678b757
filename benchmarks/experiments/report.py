"""What an experiment leaves: numbers as JSON, tables as Markdown, and every run as a dot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unicl_fast.config import PrecisionName

from ..harness import describe_machine
from .intervals import Difference, Mean
from .runs import Row

INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#2563a8"
_KEPT = ("images_per_second", "samples_seen", "step", "loss")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """What every experiment is told."""

    out: Path
    """Folder for runs, tables, plots and numbers. What is done in it is not done again."""
    jobs: int = 2
    """Runs beside each other, which share the cores; on GPUs take 1."""
    length: float = 1.0
    """Part of each run's length, to try an experiment out."""
    precision: PrecisionName = "auto"
    """efficiency.precision of all runs; each row says what it came to."""

    def execution(self) -> tuple[str, ...]:
        """Of every run: beside others, one decoding thread is enough for small images."""
        return ("--data.threads", "1") if self.jobs > 1 else ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Groups (rows) of arms (columns), each a mean over seeds, and differences between arms."""

    title: str
    unit: str
    cells: Mapping[str, Mapping[str, Mean]]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    """What guessing gives, for groups where it is worth saying."""

    def markdown(self) -> str:
        arms = list(next(iter(self.cells.values())))
        lines = [
            f"| {self.title}, {self.unit} | {' | '.join(arms)} |" + " chance |" * bool(self.chance),
            "|---|" + "---|" * (len(arms) + bool(self.chance)),
        ]
        for group, means in self.cells.items():
            chance = f" {self.chance[group]:g} |" if self.chance else ""
            lines.append(f"| {group} | {' | '.join(str(means[arm]) for arm in arms)} |{chance}")
        if self.differences:
            lines += ["", "| difference (95 % interval) | points | Hedges' g |", "|---|---|---|"]
        for name, found in self.differences.items():
            g = f"{found.effect:+.1f} ({found.effect_low:+.1f} to {found.effect_high:+.1f})"
            lines.append(f"| {name} | {found} | {g} |")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "cells": {
                group: {arm: mean.numbers() for arm, mean in means.items()}
                for group, means in self.cells.items()
            },
            "differences": {name: found.numbers() for name, found in self.differences.items()},
            "chance": dict(self.chance),
        }


def write_report(
    name: str,
    settings: ExperimentSettings,
    tables: list[Table],
    rows: Mapping[str, Row],
    **more: object,
) -> None:
    """Prints the tables and writes NAME.md, NAME.png and NAME.json into `settings.out`."""
    text = "\n\n".join(table.markdown() for table in tables)
    print(text)
    (settings.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    _draw(tables, settings.out / f"{name}.png")
    result = {
        "tables": [table.numbers() for table in tables],
        **more,
        "runs": [_shortened(row) for row in rows.values()],
        "machine": describe_machine("timm", "nvidia-dali-cuda120"),
    }
    path = settings.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}, and .md and .png beside it")


def _shortened(row: Row) -> Row:
    """Without where this machine keeps its data, and without what evaluations say at length."""
    options = [
        str(Path(*Path(word).parts[-2:])) if "/" in word else word for word in row["pretrain"]
    ]
    last = {
        key: value
        for key, value in row["last"].items()
        if key in _KEPT or key.endswith(("/top1", "/top5"))
    }
    evaluated = {
        key: _numbers_of(value)
        for key, value in row.items()
        if isinstance(value, dict) and key != "last"
    }
    described = {"name": row["name"], "pretrain": options, "precision": row["precision"]}
    return {**described, "last": last, **evaluated}


def _numbers_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _draw(tables: list[Table], path: Path) -> None:
    """One panel for each group of each table: a dot a seed, and the mean of an arm as a line."""
    panels = [(table, group) for table in tables for group in table.cells]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (table, group) in zip(grid, panels, strict=False):
        for place, mean in enumerate(table.cells[group].values()):
            count = len(mean.values)
            spots = [place + 0.06 * (number - (count - 1) / 2) for number in range(count)]
            axes.plot(spots, mean.values, "o", color=ACCENT, alpha=0.75, markersize=5)
            axes.hlines(mean.mean, place - 0.3, place + 0.3, color=INK, linewidth=1.5)
            axes.annotate(
                f"{mean.mean:.1f}", (place + 0.32, mean.mean), va="center", fontsize=8, color=INK
            )
        if group in table.chance:
            axes.axhline(table.chance[group], color=FAINT, linestyle="--", linewidth=1)
        axes.set_xticks(range(len(table.cells[group])), list(table.cells[group]), fontsize=8)
        axes.set_xlim(-0.6, len(table.cells[group]) - 0.2)
        axes.set_title(f"{table.title}\n{group}", fontsize=8, color=INK)
        axes.set_ylabel(table.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=130)
