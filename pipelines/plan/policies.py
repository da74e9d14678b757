"""RandAugment, TrivialAugment and AutoAugment as tables: which operations, and how strong.

A policy's operation turns a magnitude and a sign into an `Operator` of the graph and its numbers.
The five that move pixels are one operator, an affine warp, with a matrix each; brightness,
contrast, colour and sharpness take a factor, of which 1 changes nothing. What the operators do to
pixels is written in augment_kernels.py and augment.py.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.augmentation import Policy
from unicl_fast.system.kernels import kernel


class Operator(enum.IntEnum):
    """What can be done to an image in a stage of a policy."""

    IDENTITY = 0
    WARP = 1
    """Six numbers: x and y of a pixel's source as an affine function of x, y and 1, in pixels."""
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


NUM_PARAMETERS = 6
"""Most numbers that an operator takes."""


class _Kind(enum.IntEnum):
    """How a value becomes an operator's numbers."""

    PLAIN = 0
    FACTOR = 1
    SHEAR_X = 2
    SHEAR_Y = 3
    TRANSLATE_X = 4
    TRANSLATE_Y = 5
    ROTATE = 6
    BITS = 7
    """How many of the upper bits are kept."""


class _Rounding(enum.IntEnum):
    """Of slope * level, before it is added."""

    NONE = 0
    DOWN = 1
    NEAREST = 2


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a policy: value = start + slope * level, level in 0 to 1, then a sign."""

    name: str
    operator: Operator
    kind: _Kind = _Kind.PLAIN
    start: float = 0.0
    slope: float = 0.0
    rounding: _Rounding = _Rounding.NONE
    signed: bool = False
    """Whether half of all values are negated. Of a factor, that is its distance from 1."""
    relative: bool = False
    """Whether the value is a part of the image's side."""
    least: float = -math.inf
    """Lower values are raised to this."""


def _moves(shear: float, translate: float, rotate: float, *, relative: bool) -> list[Operation]:
    shifts = {"slope": translate, "signed": True, "relative": relative}
    warp = Operator.WARP
    return [
        Operation("ShearX", warp, _Kind.SHEAR_X, slope=shear, signed=True),
        Operation("ShearY", warp, _Kind.SHEAR_Y, slope=shear, signed=True),
        Operation("TranslateX", warp, _Kind.TRANSLATE_X, **shifts),
        Operation("TranslateY", warp, _Kind.TRANSLATE_Y, **shifts),
        Operation("Rotate", warp, _Kind.ROTATE, slope=rotate, signed=True),
    ]


def _factors(slope: float, *, least: float = 0.0) -> list[Operation]:
    rule = {"slope": slope, "signed": True, "least": least}
    names = {
        "Brightness": Operator.BRIGHTNESS,
        "Contrast": Operator.CONTRAST,
        "Color": Operator.COLOR,
        "Sharpness": Operator.SHARPNESS,
    }
    return [Operation(name, op, _Kind.FACTOR, **rule) for name, op in names.items()]


def _posterize(start: float, slope: float, rounding: _Rounding, *, least: float = 0) -> Operation:
    return Operation(
        "Posterize", Operator.POSTERIZE, _Kind.BITS, start, slope, rounding, least=least
    )


_AUTO_CONTRAST = Operation("AutoContrast", Operator.AUTO_CONTRAST)
_EQUALIZE = Operation("Equalize", Operator.EQUALIZE)
_INVERT = Operation("Invert", Operator.INVERT)

RAND = (
    # timm's "increasing" set of 15. The least is 1 bit: with none, images would be black.
    *_moves(0.3, 0.45, 30.0, relative=True),
    *_factors(0.9, least=0.1),
    _posterize(4, -4, _Rounding.DOWN, least=1),
    Operation("Solarize", Operator.SOLARIZE, start=256, slope=-256, rounding=_Rounding.DOWN),
    Operation("SolarizeAdd", Operator.SOLARIZE_ADD, slope=110, rounding=_Rounding.DOWN),
    _AUTO_CONTRAST,
    _EQUALIZE,
    _INVERT,
)  # fmt: skip

TRIVIAL = (
    # Table 7 of arXiv 2103.10158, the wide space; shifts are 32 pixels whatever the image's size.
    *_moves(0.99, 32.0, 135.0, relative=False),
    *_factors(0.99),
    Operation(
        "Posterize", Operator.POSTERIZE, _Kind.BITS, start=8, slope=-6, rounding=_Rounding.NEAREST
    ),
    Operation("Solarize", Operator.SOLARIZE, start=255, slope=-255),
    _AUTO_CONTRAST,
    _EQUALIZE,
    Operation("Identity", Operator.IDENTITY),
)
TRIVIAL_LEVELS = 31
"""Strengths that TrivialAugment draws from."""

_AUTO_FACTOR = {"kind": _Kind.PLAIN, "start": 0.1, "slope": 1.8}
AUTO = (
    Operation("ShearX", Operator.WARP, _Kind.SHEAR_X, slope=0.3, signed=True),
    Operation("Rotate", Operator.WARP, _Kind.ROTATE, slope=30.0, signed=True),
    Operation("Contrast", Operator.CONTRAST, **_AUTO_FACTOR),
    Operation("Color", Operator.COLOR, **_AUTO_FACTOR),
    Operation("Sharpness", Operator.SHARPNESS, **_AUTO_FACTOR),
    Operation(
        "Posterize", Operator.POSTERIZE, _Kind.BITS, start=4, slope=4, rounding=_Rounding.DOWN
    ),
    Operation("Solarize", Operator.SOLARIZE, slope=256, rounding=_Rounding.DOWN),
    _AUTO_CONTRAST,
    _EQUALIZE,
    _INVERT,
)
# The 25 pairs for ImageNet, Table 9 of arXiv 1805.09501: operation, chance, magnitude of 10.
_AUTO_PAIRS = """
    Posterize 0.4 8 Rotate 0.6 9    Solarize 0.6 5 AutoContrast 0.6 5  Equalize 0.8 8 Equalize 0.6 3
    Posterize 0.6 7 Posterize 0.6 6 Equalize 0.4 7 Solarize 0.2 4      Equalize 0.4 4 Rotate 0.8 8
    Solarize 0.6 3 Equalize 0.6 7   Posterize 0.8 5 Equalize 1.0 2     Rotate 0.2 3 Solarize 0.6 8
    Equalize 0.6 8 Posterize 0.4 6  Rotate 0.8 8 Color 0.4 0           Rotate 0.4 9 Equalize 0.6 2
    Equalize 0.0 7 Equalize 0.8 8   Invert 0.6 4 Equalize 1.0 8        Color 0.6 4 Contrast 1.0 8
    Rotate 0.8 8 Color 1.0 2        Color 0.8 8 Solarize 0.8 7         Sharpness 0.4 7 Invert 0.6 8
    ShearX 0.6 5 Equalize 1.0 9     Color 0.4 0 Equalize 0.6 3         Equalize 0.4 7 Solarize 0.2 4
    Solarize 0.6 5 AutoContrast 0.6 5  Invert 0.6 4 Equalize 1.0 8     Color 0.6 4 Contrast 1.0 8
    Equalize 0.8 8 Equalize 0.6 3
"""

OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "none": (),
    "rand": RAND,
    "trivial": TRIVIAL,
    "auto": AUTO,
}


def operators_of(policy: Policy) -> set[Operator]:
    """Those that a policy may ask for, `IDENTITY` left out."""
    return {operation.operator for operation in OPERATIONS[policy]} - {Operator.IDENTITY}


@functools.cache
def table_of(operations: tuple[Operation, ...]) -> NDArray[np.float64]:
    """The operations as a table [operations 8] for `write_operation`."""
    rows = [
        (o.operator, o.kind, o.start, o.slope, o.rounding, o.signed, o.relative, o.least)
        for o in operations
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 8)


@functools.cache
def auto_pairs() -> NDArray[np.float64]:
    """AutoAugment's pairs [25 2 3]: operation's place in `AUTO`, chance, level in 0 to 1."""
    words = _AUTO_PAIRS.split()
    places = {operation.name: place for place, operation in enumerate(AUTO)}
    rows = [
        (places[name], float(chance), int(magnitude) / 10)
        for name, chance, magnitude in zip(words[::3], words[1::3], words[2::3], strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2, 3)


@kernel
def write_operation(out: Any, row: Any, level: float, negate: bool, side: int) -> None:
    """Writes an operator's number and its parameters.

    Args:
        out: float32 [1 + NUM_PARAMETERS], written.
        row: of a table of `table_of`.
        level: strength in 0 to 1.
        negate: what a sign that the operation draws came out as.
        side: of the square image, in pixels.
    """
    step = abs(row[3]) * level
    if row[4] == 1:
        step = math.floor(step)
    elif row[4] == 2:
        step = np.rint(step)
    value = row[2] + (step if row[3] >= 0 else -step)
    if negate and row[5] != 0:
        value = -value
    if row[6] != 0:
        value *= side
    kind = row[1]
    if kind == 1:
        value += 1.0
    value = max(value, row[7])
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
        c = value
    elif kind == 5:
        f = value
    else:  # counter-clockwise about the centre, in degrees
        middle = side / 2
        cosine, sine = math.cos(math.radians(value)), math.sin(math.radians(value))
        a, b, c = cosine, -sine, middle - cosine * middle + sine * middle
        d, e, f = sine, cosine, middle - sine * middle - cosine * middle
    out[1], out[2], out[3], out[4], out[5], out[6] = a, b, c, d, e, f
