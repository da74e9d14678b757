"""Augmentation in numbers: each image's operators beyond cropping and flipping.

All that shapes an image is drawn here, into one row of float32 an image. The five operations that
move pixels are one operator, an affine warp, with a matrix each. `kernels/augment.py` (fused) and
`kernels/operators.py` (DALI's operators) do it to pixels.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.augmentation import LARGEST_MAGNITUDE, Augmentation
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import random_below, random_bits, random_unit


class Operator(enum.IntEnum):
    """The operators that a stage of a policy can apply to an image."""

    IDENTITY = 0
    WARP = 1
    """Six parameters: x and y of a pixel's source as affine functions of x, y and 1, in pixels."""
    BRIGHTNESS = 2
    CONTRAST = 3
    """About the mean grey of the image, as Pillow does it."""
    COLOR = 4
    SHARPNESS = 5
    POSTERIZE = 6
    """Keeps the bits of a mask."""
    SOLARIZE = 7
    """Inverts values from a threshold up."""
    SOLARIZE_ADD = 8
    """Adds a number to values below 128."""
    INVERT = 9
    EQUALIZE = 10
    AUTO_CONTRAST = 11


NUM_PARAMETERS = 6  # the most parameters that an operator has


class Column(enum.IntEnum):
    """Columns of an image's row."""

    IS_TWISTED = 0
    """1 if the next four are applied."""
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    """The hue's turn in degrees."""
    ERASED = 5
    """Top, left, height, width of the rectangle, in pixels; 0 rows high is none."""
    STAGES = 9
    """For each stage of a policy, an `Operator` and its parameters."""


STAGE_WIDTH = 1 + NUM_PARAMETERS


def num_stages(augmentations: Sequence[Augmentation]) -> int:
    """Stages that a row must have room for."""
    return max((augmentation.stages for augmentation in augmentations), default=0)


def row_width(augmentations: Sequence[Augmentation]) -> int:
    """Columns of a row; 0 if no source changes pixels."""
    if not any(augmentation.changes_pixels for augmentation in augmentations):
        return 0
    return Column.STAGES + num_stages(augmentations) * STAGE_WIDTH


def neutral_rows(size: int, *, stages: int) -> NDArray[np.float32]:
    """Rows [size k] that leave images alone."""
    rows = np.zeros((size, Column.STAGES + stages * STAGE_WIDTH), dtype=np.float32)
    rows[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    return rows


def draw_rows(
    augmentation: Augmentation, draws: NDArray[np.int64], *, key: int, image_size: int, stages: int
) -> NDArray[np.float32]:
    """Draws the rows of some images, float32 [b k]; columns as in `Column`.

    Args:
        augmentation: that of the images' data set.
        draws: number of each image's row in the stream of `key` [b].
        key: 64-bit key, as from `fold_key`.
        image_size: side of an image, in pixels.
        stages: stages that the rows have room for.
    """
    rows = neutral_rows(len(draws), stages=stages)
    if not augmentation.changes_pixels:
        return rows
    key = np.uint64(key)  # type: ignore[assignment]
    jitter = (augmentation.jitter_chance, *augmentation.strengths, augmentation.grayscale)
    erase = (augmentation.erase, *augmentation.erase_area, *augmentation.erase_ratio)
    _draw_colours(rows, draws, key, np.array(jitter))
    _draw_rectangles(rows, draws, key, np.array(erase), image_size)
    if augmentation.policy == "none":
        return rows
    _draw_stages(
        rows[:, Column.STAGES :],
        draws,
        key,
        augmentation.stages,
        TABLE,
        augmentation.policy_probability,
        augmentation.magnitude,
        augmentation.magnitude_std,
        image_size,
    )
    return rows


class _Kind(enum.IntEnum):
    """How a value becomes an operator's parameters."""

    PLAIN = 0
    FACTOR = 1
    SHEAR_X = 2
    SHEAR_Y = 3
    TRANSLATE_X = 4
    TRANSLATE_Y = 5
    ROTATE = 6
    BITS = 7
    """How many of the upper bits are kept."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of RandAugment: value = start + slope * level, level in 0 to 1, then a sign."""

    name: str
    operator: Operator
    kind: _Kind = _Kind.PLAIN
    start: float = 0.0
    slope: float = 0.0
    whole: bool = False
    """Whether slope * level is rounded down before it is added."""
    signed: bool = False
    """Whether half of all values are negated; of a factor, its distance from 1 is."""
    least: float = -math.inf
    """Lower values are raised to this."""


_FACTORS = Operator.BRIGHTNESS, Operator.CONTRAST, Operator.COLOR, Operator.SHARPNESS
# timm's "increasing" set of 15; translations are parts of the image's side
RAND = (
    Operation("ShearX", Operator.WARP, _Kind.SHEAR_X, slope=0.3, signed=True),
    Operation("ShearY", Operator.WARP, _Kind.SHEAR_Y, slope=0.3, signed=True),
    Operation("TranslateX", Operator.WARP, _Kind.TRANSLATE_X, slope=0.45, signed=True),
    Operation("TranslateY", Operator.WARP, _Kind.TRANSLATE_Y, slope=0.45, signed=True),
    Operation("Rotate", Operator.WARP, _Kind.ROTATE, slope=30.0, signed=True),
    *(Operation(op.name.capitalize(), op, _Kind.FACTOR, slope=0.9, signed=True, least=0.1)
      for op in _FACTORS),
    # at least 1 bit: with none, images would be black
    Operation("Posterize", Operator.POSTERIZE, _Kind.BITS, 4, -4, whole=True, least=1),
    Operation("Solarize", Operator.SOLARIZE, start=256, slope=-256, whole=True),
    Operation("SolarizeAdd", Operator.SOLARIZE_ADD, slope=110, whole=True),
    Operation("AutoContrast", Operator.AUTO_CONTRAST),
    Operation("Equalize", Operator.EQUALIZE),
    Operation("Invert", Operator.INVERT),
)  # fmt: skip


TABLE: NDArray[np.float64] = np.array(
    [(o.operator, o.kind, o.start, o.slope, o.whole, o.signed, o.least) for o in RAND]
)
"""The operations as rows [operations 7] for `write_operation`."""


@kernel
def write_operation(out: Any, row: Any, level: float, negate: bool, side: int) -> None:
    """Writes an operator's number and its parameters to `out`, float32 [1 + NUM_PARAMETERS].

    `row` is one of `TABLE`, `level` the strength in 0 to 1, `side` that of the image in pixels;
    `negate` negates the value, if the operation is signed.
    """
    step = abs(row[3]) * level
    if row[4] != 0:
        step = math.floor(step)
    value = row[2] + (step if row[3] >= 0 else -step)
    if negate and row[5] != 0:
        value = -value
    kind = row[1]
    if kind == 1:
        value += 1.0
    value = max(value, row[6])
    out[:] = 0.0
    out[0] = row[0]
    if kind == 7:
        value = 256.0 - 2.0 ** (8.0 - min(value, 8.0))
    if kind <= 1 or kind == 7:
        out[1] = value
        return
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if kind == 2:
        b = value
    elif kind == 3:
        d = value
    elif kind == 4:
        c = value * side
    elif kind == 5:
        f = value * side
    else:  # counter-clockwise about the centre, in degrees
        middle = side / 2
        cosine, sine = math.cos(math.radians(value)), math.sin(math.radians(value))
        a, b, c = cosine, -sine, middle - cosine * middle + sine * middle
        d, e, f = sine, cosine, middle - sine * middle - cosine * middle
    out[1], out[2], out[3], out[4], out[5], out[6] = a, b, c, d, e, f


# Uses of the numbers of an image's stream: part of a seed's meaning, never reuse one.
_JITTER_COIN = 0
_JITTER = 1  # and the three after it
_GRAYSCALE_COIN = 5
# 6 and 7 were a blur's
_ERASE_COIN = 8
_ERASE_TRIES = 16  # 4 each
_STAGES = 64  # 8 each: operation, coin, two for the strength, sign
_TRIES = 10


@kernel
def _draw_colours(rows: Any, draws: Any, key: Any, jitter: Any) -> None:
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


@kernel
def _draw_rectangles(rows: Any, draws: Any, key: Any, erase: Any, side: int) -> None:
    """Random erasing as in timm: the first of ten rectangles that fits."""
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
                rows[i, 5] = math.floor(random_unit(stream, draw + 2) * (side - height + 1))
                rows[i, 6] = math.floor(random_unit(stream, draw + 3) * (side - width + 1))
                rows[i, 7] = height
                rows[i, 8] = width
                break


@kernel
def _draw_stages(
    rows: Any, draws: Any, key: Any, num_stages: int, table: Any, chance: float, mean: float,
    deviation: float, side: int,
) -> None:  # fmt: skip
    """Draws an operation and its strength for each stage of RandAugment."""
    for i in range(draws.size):
        stream = random_bits(key, draws[i])
        for stage in range(num_stages):
            draw = _STAGES + 8 * stage
            if random_unit(stream, draw + 1) >= chance:
                continue
            number = random_below(stream, draw, table.shape[0])
            # Box and Muller; the first number lies in [0, 1), so that its logarithm exists.
            radius = math.sqrt(-2.0 * math.log(1.0 - random_unit(stream, draw + 2)))
            normal = radius * math.cos(2.0 * math.pi * random_unit(stream, draw + 3))
            magnitude = min(max(mean + deviation * normal, 0.0), LARGEST_MAGNITUDE)
            level = magnitude / LARGEST_MAGNITUDE
            write_operation(
                rows[i, stage * STAGE_WIDTH : (stage + 1) * STAGE_WIDTH],
                table[number],
                level,
                random_unit(stream, draw + 4) < 0.5,
                side,
            )
