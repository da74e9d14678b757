"""Draws a sheet of images of a packed data set, and of what an augmentation does to them.

The first row has the images as they are; then, for an augmentation, each of its steps alone has a
row, with the numbers that were drawn, and the last rows show all together. Pixels come out of the
training graph and numbers out of the plan's distributions, so the sheet shows what a model gets.
`unicl-pack show` calls this.
"""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unicl_fast.augmentation import LARGEST_MAGNITUDE, Augmentation, parse_augmentation
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.pipelines.feed.host_batches import HostBatch
from unicl_fast.pipelines.graph import build_train_graph, run_graphs
from unicl_fast.pipelines.kernels.operators import parts_for
from unicl_fast.pipelines.plan.augment import (
    AUTO,
    OPERATIONS,
    STAGE_WIDTH,
    TRIVIAL_LEVELS,
    Column,
    Operation,
    Operator,
    auto_pairs,
    draw_rows,
    neutral_rows,
    table_of,
    write_operation,
)
from unicl_fast.pipelines.plan.crop import random_windows
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.keyed_random import fold_key, random_below, random_unit
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.figures import new_figure, plain_texts

if TYPE_CHECKING:
    from .__main__ import Show

_INK, _FAINT = "#1f2933", "#52606d"
_WHOLE_ROWS = 3
_STREAM = 0x5348  # of numbers that are drawn for a sheet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Strip:
    """One row of the sheet before its images are made."""

    title: str
    starts: NDArray[np.int32]
    shapes: NDArray[np.int32]
    flips: NDArray[np.int32]
    rows: NDArray[np.float32]
    notes: list[str]


def show_dataset(options: Show) -> Path:
    """Draws the sheet as a PNG; returns its path.

    Raises:
        ValueError: an augmentation that cannot be read, or no sample to show.
        FileNotFoundError: not a packed data set.
    """
    augmentation = parse_augmentation(options.augment) if options.augment else None
    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1, not {options.samples}")
    with PackedDataset(options.folder) as dataset:
        if not len(dataset):
            raise ValueError(f"{dataset.folder} has no samples to show")
        count = min(options.samples, len(dataset))
        ids = np.unique(np.linspace(0, len(dataset) - 1, count, dtype=int))
        encoded = [dataset.image_bytes(index, verify=True) for index in ids.tolist()]
        originals = [
            np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB")) for data in encoded
        ]
        strips: list[tuple[str, list[Any], list[str]]] = [
            ("as packed", originals, [_text_of(dataset, index) for index in ids.tolist()])
        ]
        if augmentation is not None:
            data = DataConfig(
                image_size=options.image_size,
                evaluation_resize=options.image_size,
                interpolation=options.interpolation,
            )
            planned = list(_strips(augmentation, dataset.samples[ids], data, seed=options.seed))
            images = _run(planned, encoded, augmentation, data)
            strips += [
                (strip.title, list(shown), strip.notes)
                for strip, shown in zip(planned, images, strict=True)
            ]
    with plain_texts():
        _draw(strips, options)
    return options.out


def _strips(
    augmentation: Augmentation, samples: NDArray[Any], data: DataConfig, *, seed: int
) -> Iterator[_Strip]:
    """Each step of the augmentation alone on the images' centres, then all together."""
    count = len(samples)
    heights, widths = (samples[name].astype(np.int64) for name in ("height", "width"))
    side = np.minimum(heights, widths)
    centre = {
        "starts": np.stack([heights - side, widths - side], axis=1).astype(np.int32) // 2,
        "shapes": np.stack([side, side], axis=1).astype(np.int32),
        "flips": np.zeros(count, dtype=np.int32),
    }
    draw = partial(
        draw_rows,
        draws=np.arange(count, dtype=np.int64),
        image_size=data.image_size,
        stages=augmentation.stages,
    )
    neutral, no_notes = neutral_rows(count, stages=augmentation.stages), [""] * count
    yield _Strip(title="centre", rows=neutral, notes=no_notes, **centre)
    for operation in OPERATIONS[augmentation.policy]:
        if operation.operator != Operator.IDENTITY:
            rows, notes = neutral.copy(), []
            key = fold_key(seed, _STREAM, *operation.name.encode())
            for i, row in enumerate(rows[:, Column.STAGES : Column.STAGES + STAGE_WIDTH]):
                level = _draw_level(augmentation, operation, key, i)
                negate = random_unit(np.uint64(key), 100 + i) < 0.5
                write_operation(row, table_of((operation,))[0], level, negate, data.image_size)
                notes.append(_describe(operation, row[1:]))
            yield _Strip(title=operation.name, rows=rows, notes=notes, **centre)
    for title, alone, note in _steps(augmentation):
        rows = draw(alone, key=fold_key(seed, _STREAM, 1))
        yield _Strip(title=title, rows=rows, notes=[note(row) for row in rows], **centre)
    for number in range(_WHOLE_ROWS if augmentation.views == 1 else 2):
        key = fold_key(seed, _STREAM, 2, number)
        starts, shapes = random_windows(
            heights,
            widths,
            np.arange(count, dtype=np.int64),
            key=key,
            scale=augmentation.crop_scale or data.crop_scale,
            ratio=data.crop_ratio,
        )
        chance = data.flip_probability if augmentation.flip is None else augmentation.flip
        flip_key, row_key = (fold_key(key, number) for number in (1, 2))
        flips = [random_unit(np.uint64(flip_key), i) < chance for i in range(count)]
        yield _Strip(
            title="all together" if augmentation.views == 1 else f"view {number + 1}",
            starts=starts,
            shapes=shapes,
            flips=np.array(flips, dtype=np.int32),
            rows=draw(augmentation, key=row_key),
            notes=no_notes,
        )


def _steps(
    augmentation: Augmentation,
) -> Iterator[tuple[str, Augmentation, Callable[[NDArray[np.float32]], str]]]:
    """Title, augmentation of that step alone and always, and the text below an image."""
    nothing = dataclasses.replace(augmentation, policy="none", grayscale=0.0, blur=0.0, erase=0.0)
    quiet = dataclasses.replace(nothing, jitter_probability=0.0)
    if nothing.changes_colours:
        yield "colour jitter", dataclasses.replace(nothing, jitter_probability=1.0), _describe_twist
    if augmentation.grayscale:
        yield "grayscale", dataclasses.replace(quiet, grayscale=1.0), lambda row: ""
    if augmentation.blur:
        blurred = dataclasses.replace(quiet, blur=1.0)
        yield "blur", blurred, lambda row: f"sigma {row[Column.SIGMA]:.2f}"
    if augmentation.erase:
        erased, height = dataclasses.replace(quiet, erase=1.0), Column.ERASED + 2
        yield "erasing", erased, lambda row: f"{row[height + 1]:.0f} x {row[height]:.0f} pixels"


def _draw_level(augmentation: Augmentation, operation: Operation, key: int, index: int) -> float:
    """Strength in 0 to 1, by the policy's distribution."""
    stream = np.uint64(key)
    if augmentation.policy == "trivial":
        return float(random_below(stream, index, TRIVIAL_LEVELS) / (TRIVIAL_LEVELS - 1))
    if augmentation.policy == "auto":
        number = AUTO.index(operation)
        levels = [level for at, _, level in auto_pairs().reshape(-1, 3) if at == number]
        return float(levels[random_below(stream, index, len(levels))])
    first, second = random_unit(stream, 2 * index), random_unit(stream, 2 * index + 1)
    normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
    magnitude = augmentation.magnitude + augmentation.magnitude_std * normal
    return min(max(magnitude, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE


def _describe(operation: Operation, numbers: NDArray[np.float32]) -> str:
    """The numbers of an operator in a few words."""
    value = float(numbers[0])
    if operation.operator == Operator.WARP:
        b, c, d, f = (float(numbers[i]) for i in (1, 2, 3, 5))
        return {
            "ShearX": f"{b:+.2f}",
            "ShearY": f"{d:+.2f}",
            "TranslateX": f"{c:+.0f} pixels",
            "TranslateY": f"{f:+.0f} pixels",
            "Rotate": f"{math.degrees(math.atan2(d, value)):+.0f} degrees",
        }[operation.name]
    if operation.operator == Operator.POSTERIZE:
        bits = int(value).bit_count()
        return "1 bit" if bits == 1 else f"{bits} bits"
    if operation.operator == Operator.SOLARIZE:
        return f"from {value:.0f}"
    if operation.operator == Operator.SOLARIZE_ADD:
        return f"{value:+.0f} below 128"
    return "" if operation.slope == 0 else f"factor {value:.2f}"


def _describe_twist(row: NDArray[np.float32]) -> str:
    brightness, contrast, saturation, hue = row[Column.BRIGHTNESS : Column.HUE + 1]
    turned = f", hue {hue:+.0f}°" if hue else ""
    return f"b {brightness:.2f} c {contrast:.2f} s {saturation:.2f}{turned}"


def _run(
    strips: list[_Strip],
    encoded: list[NDArray[np.uint8]],
    augmentation: Augmentation,
    data: DataConfig,
) -> NDArray[np.uint8]:
    """All images of all strips through the training graph at once, [strips n s s 3]."""
    parts = parts_for([augmentation], data.mean)
    size = len(strips) * len(encoded)
    starts, shapes, flips, rows = (
        np.concatenate([getattr(strip, name) for strip in strips])
        for name in ("starts", "shapes", "flips", "rows")
    )
    integers = np.zeros((size, 1), dtype=np.int64)
    inputs = [encoded * len(strips), starts, shapes, flips[:, None], integers]
    if parts is not None:
        inputs.append(rows)
    device = torch.device("cpu")
    build = partial(
        build_train_graph,
        data=dataclasses.replace(data, threads=0, prefetch=1),
        batch_size=size,
        augmentation=parts,
        device=device,
    )
    batches = iter([HostBatch(inputs=tuple(inputs), metadata=None)])
    ((images, _), _) = next(run_graphs([build], batches, device=device, ahead=1))
    return images.numpy().reshape(len(strips), len(encoded), *images.shape[1:])


def _text_of(dataset: PackedDataset, index: int) -> str:
    """A sample's labels by name, or else its first caption."""
    names = dataset.manifest.class_names
    labels = [names[label] if names else str(label) for label in dataset.labels_of(index).tolist()]
    if labels:
        return ", ".join(labels)
    if int(dataset.samples[index]["captions_count"]):
        return Tokenizer().decode(dataset.caption_tokens(index, 0).tolist())
    return "(no text)"


def _draw(strips: list[tuple[str, list[Any], list[str]]], options: Show) -> None:
    columns = len(strips[0][1])
    size = (1.5 * columns + 0.6, 1.72 * len(strips) + 0.4)
    figure = new_figure(*size, layout="constrained")
    title = Path(options.folder).name + (f": {options.augment}" if options.augment else "")
    figure.suptitle(title, fontsize=10, color=_INK)
    axes = figure.subplots(len(strips), columns, squeeze=False)
    for line, (name, images, notes) in zip(axes, strips, strict=True):
        line[0].set_ylabel(name, fontsize=9, color=_INK)
        for axis, image, note in zip(line, images, notes, strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            wrapped = textwrap.wrap(note, 24, max_lines=3, placeholder=" ...")
            axis.set_xlabel("\n".join(wrapped), fontsize=7, color=_FAINT)
    make_folder(options.out.parent)
    figure.savefig(options.out, format="png")
