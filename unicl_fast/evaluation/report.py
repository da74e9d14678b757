"""Results of evaluations on the screen and in files: JSON for programs, Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unicl_fast.evaluation.classification import ClassificationResult, Metric

METRIC_NAMES: dict[Metric, str] = {"top1": "top-1", "mean_per_class": "mean per class"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well on a screen too; the first column is aligned left."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in escaped) for column in range(len(header))]
    lines = []
    for number, row in enumerate(escaped):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rule = [
                ":" + "-" * (width - 1) if column == 0 else "-" * (width - 1) + ":"
                for column, width in enumerate(max(2, width) for width in widths)
            ]
            lines.append(f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def classification_table(results: Sequence[tuple[str, Metric, ClassificationResult]]) -> str:
    """One row for each (name, metric of its protocol, result), and the mean of several."""
    rows = []
    for name, metric, result in results:
        low, high = result.top1_interval if metric == "top1" else result.mean_per_class_interval
        rows.append(
            [
                name,
                f"{len(result.per_class):,}",
                f"{result.num_samples:,}",
                METRIC_NAMES[metric],
                percent(result.value(metric)),
                f"{percent(low)} to {percent(high)}",
                percent(result.top1),
                percent(result.top5),
                percent(result.mean_per_class),
            ]
        )
    if len(results) > 1:
        mean = sum(result.value(metric) for _, metric, result in results) / len(results)
        rows.append(["mean", "", "", "", percent(mean), "", "", "", ""])
    header = (
        *("data set", "classes", "samples", "metric", "%", "95 % interval"),
        *("top-1", "top-5", "mean per class"),
    )
    return markdown_table(header, rows)


def percent(rate: float) -> str:
    """A rate in percent with two digits behind the point."""
    return f"{100 * rate:.2f}"


def write_results(
    values: dict[str, Any], text: str, *, json_path: Path | None, markdown_path: Path | None
) -> None:
    """Writes what was asked for, and says where it is.

    Args:
        values: for the JSON.
        text: Markdown.
        json_path: None writes none.
        markdown_path: None writes none.
    """
    for path, content in (
        (json_path, json.dumps(values, indent=1) + "\n"),
        (markdown_path, text.rstrip() + "\n"),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(f"written to {path}")
