"""The figures of `--figures`: confusion matrices, and images and captions that retrieval finds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.evaluation.report import ClassificationResult
from unicl_fast.evaluation.retrieval import RetrievalFeatures, own_images, own_texts
from unicl_fast.training.figures import FAINT, INK, drawing, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CLASSES, _MAX_NAMED_CLASSES = 4096, 120
"""More classes would not fit into a matrix of 128 MiB; more names would not be legible."""
_RIGHT, _WRONG = "#1a7f37", "#b42318"
_SIDE, _CAPTIONS = 2.9, 1.3
"""Height of an image, and of three captions under it, in inches."""
_LEGEND = "Green is right. Places count from the most similar; the similarity is in brackets."


def draw_confusion(result: ClassificationResult, folder: Path, name: str, *, title: str) -> None:
    """Draws a confusion matrix and the most frequent mistakes as confusion-NAME.png.

    Rows are classes, columns predictions, in parts of the row; only classes with samples.
    """
    path = folder / f"confusion-{name}.png"
    with drawing(path):
        _draw_confusion(result, path, title=title)
        print(f"written to {path}")


def draw_found(found: RetrievalFeatures, dataset: PackedDataset, folder: Path) -> None:
    """Draws captions-found.png (images over captions) and images-found.png (the reverse)."""
    on_host = ("image_features", "text_features", "image_of_text", "text_ids")
    found = dataclasses.replace(found, **{name: getattr(found, name).cpu() for name in on_host})
    drawings = {"captions-found.png": draw_captions_found, "images-found.png": draw_images_found}
    for name, draw in drawings.items():
        with drawing(folder / name):
            draw(found, dataset, folder / name)
            print(f"written to {folder / name}")


def most_confused(
    result: ClassificationResult, *, count: int = 15
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: class, prediction, samples, part of the class."""
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
    left.set_anchor("N")  # the list beside it starts at the top too
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


def draw_captions_found(found: RetrievalFeatures, dataset: PackedDataset, path: Path) -> None:
    """Draws 12 images over the 3 captions they find, with cosines; an image's own are green.

    If none is its own, the last one is its best own caption, with its rank.
    """
    chosen = _spread(len(found.samples), 12)
    is_own = own_texts(torch.tensor(chosen), found.image_of_text, found.text_ids)
    answers = _answers(found.image_features[chosen], found.text_features, is_own, count=3)
    texts = _read_captions(found, dataset, sorted({one[1] for row in answers for one in row}))
    rows, columns = -(-len(chosen) // 4), 4
    height = rows * (_SIDE + _CAPTIONS)
    figure = new_figure(1.05 * _SIDE * columns, height)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        *(0.01, _CAPTIONS / height, 0.99, 1 - 0.05 / height), wspace=0.05, hspace=_CAPTIONS / _SIDE
    )
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    for axis, image, row in zip(axes, chosen, answers, strict=False):
        _show_image(axis, dataset, int(found.samples[image]))
        for line, (place, text, score, right) in enumerate(row):
            words = f"{place:,}. ({score:.2f}) {texts[text]}"
            axis.annotate(
                "\n".join(textwrap.wrap(words, 46, max_lines=2, placeholder=" ...")),
                *((0, 0), (0, -5 - 24 * line)),
                xycoords="axes fraction", textcoords="offset points", va="top", fontsize=8,
                color=_RIGHT if right else _WRONG,
            )  # fmt: skip
    figure.text(0.01, 0.06 / height, _LEGEND, fontsize=8, color=INK)
    save_figure(figure, path)


def draw_images_found(found: RetrievalFeatures, dataset: PackedDataset, path: Path) -> None:
    """Draws 8 captions over the 5 images they find, with cosines; own images have a green frame.

    If none is its own, the last one is its own image, with its rank.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    chosen = _spread(len(found.text_features), 8)
    columns = min(5, len(found.image_features))
    is_own = own_images(
        found.text_ids[chosen], found.image_of_text, found.text_ids,
        num_images=len(found.image_features),
    )  # fmt: skip
    answers = _answers(found.text_features[chosen], found.image_features, is_own, count=columns)
    texts = _read_captions(found, dataset, chosen)
    layout = ConstrainedLayoutEngine(h_pad=0.21)  # inches, for the captions over the rows
    figure = new_figure(2.1 * columns, 2.5 * len(chosen), layout=layout)
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    for axes, text, row in zip(grid, chosen, answers, strict=True):
        for axis, (place, image, score, right) in zip(axes, row, strict=True):
            _show_image(axis, dataset, int(found.samples[image]))
            colour = _RIGHT if right else FAINT
            axis.set_xlabel(f"{place:,}. ({score:.2f})", fontsize=8, color=colour)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=4 if right else 1)
        above = axes[0].annotate(
            textwrap.shorten(texts[text], 24 * columns, placeholder=" ..."),
            *((0, 1), (0, 5)),
            xycoords="axes fraction", textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
        above.set_in_layout(False)  # or its column becomes half as wide as the text
    figure.supxlabel(_LEGEND, x=0.01, ha="left", fontsize=8, color=INK)
    save_figure(figure, path)


def _answers(
    queries: Tensor, others: Tensor, is_own: Tensor, *, count: int
) -> list[list[tuple[int, int, float, bool]]]:
    """For each query's best: rank from 1 on, row of `others`, cosine, whether it is its own.

    The last one is the best of its own if none before is.
    """
    scores = queries @ others.T
    order = scores.argsort(dim=1, descending=True, stable=True)
    found = []
    for row, ranking, own in zip(scores, order.tolist(), is_own.gather(1, order), strict=True):
        places = [*range(count - 1), max(int(own.int().argmax()), count - 1)]
        found.append(
            [(place + 1, ranking[place], float(row[ranking[place]]), bool(own[place]))
             for place in places if place < len(ranking)]
        )  # fmt: skip
    return found


def _read_captions(
    found: RetrievalFeatures, dataset: PackedDataset, numbers: Iterable[int]
) -> dict[int, str]:
    """Captions by their number among all captions of the compared images."""
    first = torch.searchsorted(found.image_of_text, torch.arange(len(found.samples)))
    texts = {}
    with contextlib.closing(SampleReader(dataset)) as reader:
        for number in numbers:
            owner = int(found.image_of_text[number])
            captions = reader.read_description(int(found.samples[owner])).captions
            texts[number] = captions[number - int(first[owner])]
    return texts


def _spread(total: int, count: int) -> list[int]:
    """Numbers below `total`, evenly spread."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def _show_image(axis: Axes, dataset: PackedDataset, sample: int) -> None:
    data = dataset.image_bytes(sample, verify=True)
    with Image.open(io.BytesIO(data.tobytes())) as image:
        # squares, so that rows and columns are even
        axis.imshow(np.asarray(ImageOps.pad(image.convert("RGB"), (320, 320), color="white")))
    axis.set_xticks([])
    axis.set_yticks([])
