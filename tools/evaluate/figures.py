"""The figures of `--figures`: which classes are taken for which."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from unicl_fast.evaluation.report import ClassificationResult
from unicl_fast.training.figures import INK, drawing, new_figure, save_figure

_MAX_CLASSES, _MAX_NAMED_CLASSES = 4096, 120
"""More classes would not fit into a matrix of 128 MiB; more names would not be legible."""


def draw_confusion(result: ClassificationResult, folder: Path, name: str, *, title: str) -> None:
    """Draws a confusion matrix and the most frequent mistakes as confusion-NAME.png.

    Rows are classes, columns the classes they were taken for, in parts of the row. Classes without
    samples are left out.
    """
    path = folder / f"confusion-{name}.png"
    with drawing(path):
        _draw_confusion(result, path, title=title)
        print(f"written to {path}")


def most_confused(
    result: ClassificationResult, *, count: int = 15
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: class, taken for, samples, part of the class."""
    samples: Counter[int] = Counter()
    for own, _, number in result.taken_for:
        samples[own] += number
    wrong = sorted((-number, own, taken) for own, taken, number in result.taken_for if own != taken)
    return [
        (result.class_names[own], result.class_names[taken], -number, -number / samples[own])
        for number, own, taken in wrong[:count]
    ]


def _draw_confusion(result: ClassificationResult, path: Path, *, title: str) -> None:
    present = sorted({one for own, taken, _ in result.taken_for for one in (own, taken)})
    if len(present) > _MAX_CLASSES:
        raise ValueError(f"{len(present):,} classes; {_MAX_CLASSES:,} can be drawn")
    row_of = {number: row for row, number in enumerate(present)}
    shown = np.zeros((len(present), len(present)), np.int64)
    for own, taken, number in result.taken_for:
        shown[row_of[own], row_of[taken]] = number
    names = [_short(result.class_names[number], 24) for number in present]
    parts = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1)
    has_names = len(names) <= _MAX_NAMED_CLASSES
    side = max(4.5, min(0.24 * len(names), 14.0 if has_names else 7.0))
    figure = new_figure(side + 5.5, side + 1.6, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.0))
    image = left.imshow(parts, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    left.set_title(title, loc="left", color=INK)
    left.set_xlabel("taken for")
    left.set_ylabel("class")
    if has_names:
        size = min(7.0, 0.75 * 72 * side / len(names))  # of a row's height, in points
        left.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        left.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) <= 20:
        for row, column in np.argwhere(shown).tolist():
            part = parts[row, column]
            left.text(
                *(column, row, f"{100 * part:.0f}"),
                ha="center", va="center", fontsize=6, color="white" if part > 0.6 else INK,
            )  # fmt: skip
    figure.colorbar(image, ax=left, shrink=0.6, label="part of the class")
    left.set_anchor("N")  # the list next to it begins at the top too
    right.set_axis_off()
    right.set_title("most frequent mistakes", loc="left", color=INK)
    lines = [
        f"{100 * part:5.1f} %  {count:5,}   {_short(own, 22)} -> {_short(taken, 22)}"
        for own, taken, count, part in most_confused(result)
    ]
    right.text(
        *(0, 0.98, "\n".join(lines) or "none"),
        va="top", fontsize=8, family="monospace", color=INK, transform=right.transAxes,
    )  # fmt: skip
    save_figure(figure, path)


def _short(name: str, width: int) -> str:
    return textwrap.shorten(name, width, placeholder="...")
