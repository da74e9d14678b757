"""Images of evaluations: which classes are confused, and what retrieval finds."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.evaluation.run_on_dataset import RetrievalFeatures
from unicl_fast.training.figures import FAINT, INK, save_figure

_RIGHT, _WRONG = "#1a7f37", "#b42318"
_NAMED_CLASSES = 60
"""More names would not be legible."""
_LISTED = 15
_SIDE, _CAPTIONS = 2.9, 1.15
"""Height of an image, and of three captions under it, in inches."""


def most_confused(
    confusion: NDArray[np.int64], class_names: Sequence[str], *, count: int = _LISTED
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: class, taken for, samples, part of the class."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    found = []
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, column]:
            number = int(wrong[row, column])
            part = number / int(confusion[row].sum())
            found.append((class_names[row], class_names[column], number, part))
    return found


def draw_confusion(
    confusion: NDArray[np.int64], class_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Rows are classes, columns what they were taken for, in parts of the row, as a PNG.

    Classes without samples are left out. Beside the matrix are the most frequent mistakes.
    """
    present = np.flatnonzero(confusion.sum(axis=1) + confusion.sum(axis=0))
    shown = confusion[np.ix_(present, present)]
    names = [class_names[place] for place in present]
    parts = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1)
    few = len(names) <= _NAMED_CLASSES
    side = max(4.5, min(0.24 * len(names), 12.0))
    figure = Figure(figsize=(side + 5.5, side + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.0))
    image = left.imshow(parts, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    left.set_title(title, loc="left", color=INK)
    left.set_xlabel("taken for")
    left.set_ylabel("class")
    if few:
        short = [textwrap.shorten(name, 24, placeholder="...") for name in names]
        left.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
        left.set_yticks(range(len(names)), short, fontsize=7)
        if len(names) <= 20:
            for row, column in np.ndindex(*parts.shape):
                if shown[row, column]:
                    colour = "white" if parts[row, column] > 0.6 else INK
                    left.text(
                        *(column, row, f"{100 * parts[row, column]:.0f}"),
                        ha="center", va="center", fontsize=6, color=colour,
                    )  # fmt: skip
    figure.colorbar(image, ax=left, shrink=0.6, label="part of the class")
    right.set_axis_off()
    right.set_title("most frequent mistakes", loc="left", fontsize=9, color=INK)
    lines = [
        f"{100 * part:5.1f} %  {count:5,}   "
        f"{textwrap.shorten(name, 22, placeholder='...')} -> "
        f"{textwrap.shorten(taken, 22, placeholder='...')}"
        for name, taken, count, part in most_confused(confusion, class_names)
    ]
    right.text(
        *(0, 0.98, "\n".join(lines) or "none"),
        va="top", fontsize=7.5, family="monospace", color=INK, transform=right.transAxes,
    )  # fmt: skip
    save_figure(figure, path)


def draw_captions_found(
    found: RetrievalFeatures, dataset: PackedDataset, path: Path, *, count: int = 12, top: int = 3
) -> None:
    """Images, evenly spread, over the captions they find; an image's own are green, as a PNG."""
    places = _spread(len(found.samples), count)
    columns = 4
    rows = -(-len(places) // columns)
    height = rows * (_SIDE + _CAPTIONS)
    figure = Figure(figsize=(1.05 * _SIDE * columns, height))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        *(0.01, _CAPTIONS / height, 0.99, 1 - 0.05 / height), wspace=0.05, hspace=_CAPTIONS / _SIDE
    )
    scores = found.image_features[places] @ found.text_features.T
    with _Captions(found, dataset) as captions:
        for axis, place, best in zip(
            axes, places, scores.topk(min(top, scores.shape[1])).indices.tolist(), strict=False
        ):
            _show_image(axis, dataset, int(found.samples[place]))
            for line, text in enumerate(best):
                right = int(found.image_of_text[text]) == place
                shown = "\n".join(textwrap.wrap(captions.text(text), 44, max_lines=2))
                axis.annotate(
                    f"{line + 1}. {shown}",
                    *((0, 0), (0, -5 - 24 * line)),
                    xycoords="axes fraction", textcoords="offset points", va="top", fontsize=7,
                    color=_RIGHT if right else _WRONG,
                )  # fmt: skip
    for axis in axes[len(places) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def draw_images_found(
    found: RetrievalFeatures, dataset: PackedDataset, path: Path, *, count: int = 8, top: int = 5
) -> None:
    """Captions, evenly spread, over the images they find; its own has a green frame, as a PNG."""
    places = _spread(len(found.text_features), count)
    columns = min(top, len(found.image_features))
    figure = Figure(figsize=(2.1 * columns, 2.35 * len(places)), layout="constrained")
    grid = figure.subplots(len(places), columns, squeeze=False)
    scores = found.text_features[places] @ found.image_features.T
    with _Captions(found, dataset) as captions:
        for row, text, best in zip(
            grid, places, scores.topk(columns).indices.tolist(), strict=True
        ):
            for axis, image in zip(row, best, strict=True):
                _show_image(axis, dataset, int(found.samples[image]))
                right = image == int(found.image_of_text[text])
                for spine in axis.spines.values():
                    spine.set(color=_RIGHT if right else FAINT, linewidth=4 if right else 1)
            row[0].set_title(
                textwrap.shorten(captions.text(text), 26 * columns, placeholder=" ..."),
                loc="left", fontsize=8, color=INK,
            )  # fmt: skip
    save_figure(figure, path)


class _Captions:
    """Texts of captions by their number among all captions of the images compared."""

    def __init__(self, found: RetrievalFeatures, dataset: PackedDataset) -> None:
        self._owner = found.image_of_text.tolist()
        self._first = torch.searchsorted(
            found.image_of_text, torch.arange(len(found.samples))
        ).tolist()
        self._samples = found.samples
        self._reader = SampleReader(dataset)

    def __enter__(self) -> _Captions:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    def text(self, number: int) -> str:
        owner = self._owner[number]
        description = self._reader.read_description(int(self._samples[owner]))
        return description.captions[number - self._first[owner]]


def _spread(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [place * total // count for place in range(count)]


def _show_image(axis: Axes, dataset: PackedDataset, sample: int) -> None:
    data = dataset.image_bytes(sample, verify=True)
    with Image.open(io.BytesIO(data.tobytes())) as image:
        # all squares, so that rows and columns are even
        axis.imshow(np.asarray(ImageOps.pad(image.convert("RGB"), (320, 320), color="white")))
    axis.set_xticks([])
    axis.set_yticks([])
