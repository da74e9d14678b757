"""Everything that augmentation does to an image's pixels on the CPU, in one pass of one operator.

DALI's own operators take 1 to 3 ms an image of 224 pixels for a colour twist, a warp or a blur on
one core, more than decoding and resampling together, and splitting a batch among them costs more.
This does the same arithmetic (augment.py is the twin, and what a GPU runs) in place, while the
image lies in the second-level cache. Loops are written so that LLVM vectorises them: long, over
values that lie side by side, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from unicl_fast.system.kernels import kernel

from ..plan.augment import STAGE_WIDTH, Column
from ..plan.policies import Operator
from .warp import warp

_CHANNELS = 3
# As plain numbers, which Numba can fold.
_STAGES, _ERASED, _SIGMA = int(Column.STAGES), int(Column.ERASED), int(Column.SIGMA)
_WARP, _BRIGHTNESS, _CONTRAST, _COLOR, _SHARPNESS, _POSTERIZE = (
    int(operator)
    for operator in (
        Operator.WARP,
        Operator.BRIGHTNESS,
        Operator.CONTRAST,
        Operator.COLOR,
        Operator.SHARPNESS,
        Operator.POSTERIZE,
    )
)
_SOLARIZE, _SOLARIZE_ADD, _INVERT, _EQUALIZE, _AUTO_CONTRAST = (
    int(operator)
    for operator in (
        Operator.SOLARIZE,
        Operator.SOLARIZE_ADD,
        Operator.INVERT,
        Operator.EQUALIZE,
        Operator.AUTO_CONTRAST,
    )
)
_compiled = kernel(fastmath={"contract"}, error_model="numpy")
_inlined = kernel(fastmath={"contract"}, error_model="numpy", inline="always")


@_compiled
def augment_square(image: Any, row: Any, fill: Any) -> None:
    """Does to an image what its row of the plan says.

    Args:
        image: uint8 [s s 3], changed in place.
        row: float32 [k], columns as in `Column`.
        fill: uint8 [3], what an erased rectangle shows; its mean is shown where a warp uncovers.
    """
    for start in range(_STAGES, row.size, STAGE_WIDTH):
        _apply_operator(image, int(row[start]), row[start + 1 : start + STAGE_WIDTH], fill)
    if row[0] != 0.0:
        _twist(image, row[1], row[2], row[3], row[4])
    if row[_SIGMA] > 0.0:
        _blur(image, row[_SIGMA])
    top, left = int(row[_ERASED]), int(row[_ERASED + 1])
    for y in range(top, top + int(row[_ERASED + 2])):
        for x in range(left, left + int(row[_ERASED + 3])):
            for c in range(_CHANNELS):
                image[y, x, c] = fill[c]


@_compiled
def _apply_operator(image: Any, operator: int, numbers: Any, fill: Any) -> None:
    a = numbers[0]
    if operator == _WARP:
        warp(image, numbers, grey_of(fill))
    elif operator == _COLOR:
        _twist(image, np.float32(1.0), np.float32(1.0), a, np.float32(0.0))
    elif operator == _SHARPNESS:
        _sharpen(image, a)
    elif operator == _EQUALIZE:
        _equalize(image)
    elif operator == _AUTO_CONTRAST:
        _stretch(image)
    elif operator == _BRIGHTNESS:
        _scale(image, a, np.float32(0.0))
    elif operator == _CONTRAST:
        _scale(image, a, _mean_grey(image) * (np.float32(1.0) - a))
    elif operator >= _POSTERIZE and operator <= _INVERT:
        _look_up_bits(image, operator, a)


@_compiled
def grey_of(fill: Any) -> int:
    """What a warp shows where there was no image: DALI takes one number for all channels."""
    return (int(fill[0]) + int(fill[1]) + int(fill[2]) + 1) // 3


@_inlined
def _level(value: Any) -> Any:
    """To the nearest of the 256 levels."""
    return np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)) + np.float32(0.5))


@_compiled
def _scale(image: Any, factor: Any, shift: Any) -> None:
    values = image.reshape(-1)
    for i in range(values.size):
        values[i] = _level(np.float32(values[i]) * factor + shift)


@_compiled
def _mean_grey(image: Any) -> Any:
    sums = np.zeros(_CHANNELS, np.int64)
    for y in range(image.shape[0]):
        line = image[y]
        red, green, blue = 0, 0, 0
        for x in range(line.shape[0]):
            red += line[x, 0]
            green += line[x, 1]
            blue += line[x, 2]
        sums[0] += red
        sums[1] += green
        sums[2] += blue
    grey = 0.299 * sums[0] + 0.587 * sums[1] + 0.114 * sums[2]
    return np.float32(grey / (image.shape[0] * image.shape[1]))


@_compiled
def _look_up_bits(image: Any, operator: int, a: Any) -> None:
    table = np.empty(256, np.uint8)
    for level in range(256):
        if operator == _POSTERIZE:
            value = level & int(a)
        elif operator == _SOLARIZE:
            value = level if level < a else 255 - level
        elif operator == _SOLARIZE_ADD:
            value = min(level + int(a), 255) if level < 128 else level
        else:
            value = 255 - level
        table[level] = value
    values = image.reshape(-1)
    for i in range(values.size):
        values[i] = table[values[i]]


@_compiled
def _look_up(image: Any, tables: Any) -> None:
    values = image.reshape(-1)
    for i in range(values.size // _CHANNELS):
        for c in range(_CHANNELS):
            values[_CHANNELS * i + c] = tables[c, values[_CHANNELS * i + c]]


@_compiled
def _histograms(image: Any) -> Any:
    """Of each channel, [3 256]; counted in two, since equal neighbours wait for each other."""
    counts = np.zeros((2, _CHANNELS, 256), np.int32)
    values = image.reshape(-1)
    for i in range(values.size // _CHANNELS):
        for c in range(_CHANNELS):
            counts[i & 1, c, values[_CHANNELS * i + c]] += 1
    for c in range(_CHANNELS):
        for level in range(256):
            counts[0, c, level] += counts[1, c, level]
    return counts[0]


@_compiled
def _equalize(image: Any) -> None:
    """OpenCV's formula, which is DALI's: the darkest level goes to 0."""
    counts = _histograms(image)
    tables = np.empty((_CHANNELS, 256), np.uint8)
    total = image.shape[0] * image.shape[1]
    for c in range(_CHANNELS):
        darkest = 0
        while counts[c, darkest] == 0:
            darkest += 1
        rest = total - counts[c, darkest]
        below = 0
        for level in range(256):
            if rest == 0:  # a channel of one level stays as it is
                tables[c, level] = level
                continue
            if level > darkest:
                below += counts[c, level]
            tables[c, level] = _level(np.float32(below) * (np.float32(255.0) / np.float32(rest)))
    _look_up(image, tables)


@_compiled
def _stretch(image: Any) -> None:
    """Auto contrast: each channel's darkest level to 0 and its brightest to 255."""
    counts = _histograms(image)
    tables = np.empty((_CHANNELS, 256), np.uint8)
    for c in range(_CHANNELS):
        darkest, brightest = 0, 255
        while counts[c, darkest] == 0:
            darkest += 1
        while counts[c, brightest] == 0:
            brightest -= 1
        spread = brightest - darkest
        for level in range(256):
            scaled = np.float32(level - darkest) * (np.float32(255.0) / np.float32(spread or 1))
            tables[c, level] = _level(scaled) if spread > 0 else np.uint8(level)
    _look_up(image, tables)


@_compiled
def twist_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> Any:
    """The colour twist as a matrix [3 4]: hue and saturation in YIQ, contrast about 128."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    cosine = saturation * math.cos(math.radians(hue))
    sine = saturation * math.sin(math.radians(hue))
    turn = np.array([[1.0, 0.0, 0.0], [0.0, cosine, sine], [0.0, -sine, cosine]])
    # the inverse by Cramer's rule: Numba's needs SciPy
    inverse = np.empty((3, 3))
    determinant = 0.0
    for i in range(3):
        for j in range(3):
            a, b, c, d = (j + 1) % 3, (j + 2) % 3, (i + 1) % 3, (i + 2) % 3
            inverse[i, j] = to_yiq[a, c] * to_yiq[b, d] - to_yiq[a, d] * to_yiq[b, c]
    for j in range(3):
        determinant += to_yiq[j, 0] * inverse[0, j]
    matrix = np.zeros((3, 4), np.float32)
    for i in range(3):
        for j in range(3):
            total = 0.0
            for k in range(3):
                for m in range(3):
                    total += inverse[i, k] * turn[k, m] * to_yiq[m, j]
            matrix[i, j] = brightness * contrast * total / determinant
        matrix[i, 3] = brightness * 128.0 * (1.0 - contrast)
    return matrix


@_compiled
def _twist(image: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any) -> None:
    m = twist_matrix(brightness, contrast, saturation, hue)
    rr, rg, rb, r0 = m[0, 0], m[0, 1], m[0, 2], m[0, 3]
    gr, gg, gb, g0 = m[1, 0], m[1, 1], m[1, 2], m[1, 3]
    br, bg, bb, b0 = m[2, 0], m[2, 1], m[2, 2], m[2, 3]
    values = image.reshape(-1)
    for i in range(values.size // 3):
        r = np.float32(values[3 * i])
        g = np.float32(values[3 * i + 1])
        b = np.float32(values[3 * i + 2])
        values[3 * i] = _level(rr * r + rg * g + rb * b + r0)
        values[3 * i + 1] = _level(gr * r + gg * g + gb * b + g0)
        values[3 * i + 2] = _level(br * r + bg * g + bb * b + b0)


@_compiled
def _mirrored(position: int, size: int) -> int:
    """Where a position beyond the edge is looked up: mirrored about the edge pixel's centre."""
    last = size - 1
    if last == 0:
        return 0
    position = abs(position) % (2 * last)
    return 2 * last - position if position > last else position


@_compiled
def _sharpen(image: Any, factor: Any) -> None:
    """Away from (or, below 1, towards) Pillow's smoothed image."""
    size = image.shape[0]
    padded = np.empty((size + 2, (size + 2) * _CHANNELS), np.float32)
    for y in range(size + 2):
        line = image[_mirrored(y - 1, size)].reshape(-1)
        target = padded[y, _CHANNELS:]
        for i in range(line.size):
            target[i] = line[i]
        for c in range(_CHANNELS):
            padded[y, c] = line[_mirrored(-1, size) * _CHANNELS + c]
            padded[y, (size + 1) * _CHANNELS + c] = line[_mirrored(size, size) * _CHANNELS + c]
    neighbour = (np.float32(1.0) - factor) / np.float32(13.0)
    centre = factor + np.float32(4.0) * neighbour  # and once more with the sum of all nine
    sums = np.empty(padded.shape[1], np.float32)
    for y in range(size):
        above, here, below = padded[y], padded[y + 1], padded[y + 2]
        out = image[y].reshape(-1)
        for i in range(sums.size):
            sums[i] = above[i] + here[i] + below[i]
        for i in range(out.size):
            total = sums[i] + sums[i + _CHANNELS] + sums[i + 2 * _CHANNELS]
            out[i] = _level(neighbour * total + centre * here[i + _CHANNELS])


@_compiled
def _blur(image: Any, sigma: Any) -> None:
    size = image.shape[0]
    radius = max(math.ceil(3.0 * sigma), 1)
    taps = 2 * radius + 1
    weights = np.empty(taps, np.float32)
    total = 0.0
    for t in range(taps):
        total += math.exp(-((t - radius) ** 2) / (2.0 * sigma * sigma))
    for t in range(taps):
        weights[t] = math.exp(-((t - radius) ** 2) / (2.0 * sigma * sigma)) / total
    length = size * _CHANNELS
    margin = radius * _CHANNELS
    line = np.empty(length + 2 * margin, np.float32)
    rows = np.empty((size, length), np.float32)
    for y in range(size):
        pixels = image[y].reshape(-1)
        inside = line[margin : margin + length]
        for i in range(length):
            inside[i] = pixels[i]
        for x in range(radius):
            before, behind = _mirrored(x - radius, size), _mirrored(size + x, size)
            for c in range(_CHANNELS):
                line[x * _CHANNELS + c] = pixels[before * _CHANNELS + c]
                line[margin + length + x * _CHANNELS + c] = pixels[behind * _CHANNELS + c]
        out = rows[y]
        middle = weights[radius]
        for i in range(length):
            out[i] = middle * inside[i]
        for t in range(radius):  # the filter is even: two taps a multiplication
            weight = weights[t]
            left, right = line[t * _CHANNELS :], line[(taps - 1 - t) * _CHANNELS :]
            for i in range(length):
                out[i] += weight * (left[i] + right[i])
    added = np.empty(length, np.float32)
    for y in range(size):
        middle, here = weights[radius], rows[y]
        for i in range(length):
            added[i] = middle * here[i]
        for t in range(radius):
            weight = weights[t]
            above = rows[_mirrored(y + t - radius, size)]
            below = rows[_mirrored(y + radius - t, size)]
            for i in range(length):
                added[i] += weight * (above[i] + below[i])
        out_pixels = image[y].reshape(-1)
        for i in range(length):
            out_pixels[i] = _level(added[i])
