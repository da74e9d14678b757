"""What is done to each image of a step beyond cropping and mirroring, in numbers.

Nothing is drawn in the graph: everything that shapes an image is a function of a key and the
visit, written here into one row of float32 an image, which travels through DALI as one input. Read
by augment.py (DALI's operators) and augment_kernels.py (the fused one).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.augmentation import LARGEST_MAGNITUDE, Augmentation
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import random_below, random_bits, random_unit

from .policies import (
    NUM_PARAMETERS,
    OPERATIONS,
    TRIVIAL_LEVELS,
    auto_pairs,
    table_of,
    write_operation,
)


class Column(enum.IntEnum):
    """Where a number stands in an image's row."""

    IS_TWISTED = 0
    """1 where the next four are to be applied."""
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    """In degrees."""
    SIGMA = 5
    """Of the blur, in pixels; 0 is none."""
    ERASED = 6
    """Top, left, height, width of the rectangle, in pixels; 0 rows high is none."""
    STAGES = 10
    """For each stage of a policy an `Operator` and its numbers."""


STAGE_WIDTH = 1 + NUM_PARAMETERS


def num_stages(augmentations: Sequence[Augmentation]) -> int:
    """Stages that rows must have room for."""
    return max((augmentation.stages for augmentation in augmentations), default=0)


def row_width(augmentations: Sequence[Augmentation]) -> int:
    """Numbers of an image's row; 0 if no source changes pixels."""
    if not any(augmentation.changes_pixels for augmentation in augmentations):
        return 0
    return Column.STAGES + num_stages(augmentations) * STAGE_WIDTH


def neutral_rows(size: int, *, stages: int) -> NDArray[np.float32]:
    """Rows [size k] that leave images alone."""
    rows = np.zeros((size, Column.STAGES + stages * STAGE_WIDTH), dtype=np.float32)
    rows[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    return rows


def draw_rows(
    augmentation: Augmentation,
    draws: NDArray[np.int64],
    *,
    key: int,
    image_size: int,
    stages: int,
) -> NDArray[np.float32]:
    """The rows of images of one source.

    Args:
        augmentation: the source's.
        draws: which row of the stream `key` each image gets [b].
        key: 64-bit key, as from `fold_key`.
        image_size: side of the square, in pixels.
        stages: that the rows have room for.

    Returns:
        float32 [b k]; columns as in `Column`.
    """
    rows = neutral_rows(len(draws), stages=stages)
    if not augmentation.changes_pixels:
        return rows
    key = np.uint64(key)  # type: ignore[assignment]
    jitter = (augmentation.jitter_chance, *augmentation.strengths, augmentation.grayscale)
    blur = (augmentation.blur, *augmentation.blur_sigma)
    erase = (augmentation.erase, *augmentation.erase_area, *augmentation.erase_ratio)
    _draw_colours(rows, draws, key, np.array(jitter), np.array(blur))
    _draw_rectangles(rows, draws, key, np.array(erase), image_size)
    table = table_of(OPERATIONS[augmentation.policy])
    start = int(Column.STAGES)
    if augmentation.policy == "rand":
        strength = (
            augmentation.policy_probability, augmentation.magnitude, augmentation.magnitude_std
        )  # fmt: skip
        _draw_rand(
            rows, draws, key, table, np.array(strength), augmentation.policy_ops, image_size, start
        )
    elif augmentation.policy == "trivial":
        _draw_trivial(rows, draws, key, table, image_size, start)
    elif augmentation.policy == "auto":
        _draw_auto(rows, draws, key, table, auto_pairs(), image_size, start)
    return rows


# Which numbers of an image's stream are for what: part of what a seed means, never reuse.
_JITTER_COIN = 0
_JITTER = 1  # and the three behind it
_GRAYSCALE_COIN = 5
_BLUR_COIN = 6
_BLUR_SIGMA = 7
_ERASE_COIN = 8
_ERASE_TRIES = 16  # 4 each
_PAIR = 60
_STAGES = 64  # 8 each: operation, coin, two for the strength, sign
_TRIES = 10


@kernel
def _draw_colours(rows: Any, draws: Any, key: Any, jitter: Any, blur: Any) -> None:
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        if random_unit(stream, _JITTER_COIN) < jitter[0]:
            rows[i, 0] = 1.0
            for k in range(3):
                strength = jitter[1 + k]
                low, high = max(1.0 - strength, 0.0), 1.0 + strength
                rows[i, 1 + k] = low + (high - low) * random_unit(stream, _JITTER + k)
            rows[i, 4] = 360.0 * jitter[4] * (2.0 * random_unit(stream, _JITTER + 3) - 1.0)
        if random_unit(stream, _GRAYSCALE_COIN) < jitter[5]:
            rows[i, 0] = 1.0
            rows[i, 3] = 0.0
        if random_unit(stream, _BLUR_COIN) < blur[0]:
            rows[i, 5] = blur[1] + (blur[2] - blur[1]) * random_unit(stream, _BLUR_SIGMA)


@kernel
def _draw_rectangles(rows: Any, draws: Any, key: Any, erase: Any, side: int) -> None:
    """Random erasing by timm's law: the first of ten rectangles that fits."""
    log_low, log_high = math.log(erase[3]), math.log(erase[4])
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        if random_unit(stream, _ERASE_COIN) >= erase[0]:
            continue
        for attempt in range(_TRIES):
            draw = _ERASE_TRIES + 4 * attempt
            area = erase[1] + (erase[2] - erase[1]) * random_unit(stream, draw)
            area *= side * side
            aspect = math.exp(log_low + (log_high - log_low) * random_unit(stream, draw + 1))
            height = np.rint(math.sqrt(area * aspect))
            width = np.rint(math.sqrt(area / aspect))
            if 0 < height < side and 0 < width < side:
                rows[i, 6] = math.floor(random_unit(stream, draw + 2) * (side - height + 1))
                rows[i, 7] = math.floor(random_unit(stream, draw + 3) * (side - width + 1))
                rows[i, 8] = height
                rows[i, 9] = width
                break


@kernel
def _draw_rand(
    rows: Any, draws: Any, key: Any, table: Any, strength: Any, num_ops: int, side: int, start: int
) -> None:
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        for stage in range(num_ops):
            draw = _STAGES + 8 * stage
            if random_unit(stream, draw + 1) >= strength[0]:
                continue
            # Box and Muller; the first number lies in [0, 1), so that its logarithm exists.
            radius = math.sqrt(-2.0 * math.log(1.0 - random_unit(stream, draw + 2)))
            normal = radius * math.cos(2.0 * math.pi * random_unit(stream, draw + 3))
            magnitude = strength[1] + strength[2] * normal
            level = min(max(magnitude, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
            at = start + stage * STAGE_WIDTH
            write_operation(
                rows[i, at : at + STAGE_WIDTH],
                table[random_below(stream, draw, table.shape[0])],
                level,
                random_unit(stream, draw + 4) < 0.5,
                side,
            )


@kernel
def _draw_trivial(rows: Any, draws: Any, key: Any, table: Any, side: int, start: int) -> None:
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        write_operation(
            rows[i, start : start + STAGE_WIDTH],
            table[random_below(stream, _STAGES, table.shape[0])],
            random_below(stream, _STAGES + 2, TRIVIAL_LEVELS) / (TRIVIAL_LEVELS - 1),
            random_unit(stream, _STAGES + 4) < 0.5,
            side,
        )


@kernel
def _draw_auto(
    rows: Any, draws: Any, key: Any, table: Any, pairs: Any, side: int, start: int
) -> None:
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        pair = pairs[random_below(stream, _PAIR, pairs.shape[0])]
        for stage in range(2):
            draw = _STAGES + 8 * stage
            if random_unit(stream, draw + 1) < pair[stage, 1]:
                at = start + stage * STAGE_WIDTH
                write_operation(
                    rows[i, at : at + STAGE_WIDTH],
                    table[np.int64(pair[stage, 0])],
                    pair[stage, 2],
                    random_unit(stream, draw + 4) < 0.5,
                    side,
                )
