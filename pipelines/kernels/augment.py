"""Everything that augmentation does to an image's pixels on the CPU, in one call of one operator.

DALI's own operators take 1 to 3 ms an image of 224 pixels for a colour twist or a warp, more than
decoding and resampling together. This does the same arithmetic (operators.py has the twin) in
place, while the image lies in the second-level cache, in loops that LLVM vectorises.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from unicl_fast.system.kernels import kernel

from ..plan.augment import STAGE_WIDTH, Column, Operator
from .resample import load, repeat

_CHANNELS = 3
# Plain numbers, which Numba can index with.
_STAGES, _ERASED = int(Column.STAGES), int(Column.ERASED)
_compiled = kernel(fastmath={"contract"}, error_model="numpy")
_inlined = kernel(fastmath={"contract"}, error_model="numpy", inline="always")


@_compiled
def augment_image(image: Any, row: Any, fill: Any) -> None:
    """Augments an image, uint8 [s s 3], in place as its row of the plan says, float32 [k].

    `fill` uint8 [3] is the colour of erased rectangles; its mean is shown where a warp uncovers.
    """
    for start in range(_STAGES, row.size, STAGE_WIDTH):
        _apply_operator(image, int(row[start]), row[start + 1 : start + STAGE_WIDTH], fill)
    if row[0] != 0.0:
        _twist(image, row[1], row[2], row[3], row[4])
    top, left = int(row[_ERASED]), int(row[_ERASED + 1])
    for y in range(top, top + int(row[_ERASED + 2])):
        for x in range(left, left + int(row[_ERASED + 3])):
            for c in range(_CHANNELS):
                image[y, x, c] = fill[c]


@_compiled
def _apply_operator(image: Any, operator: int, numbers: Any, fill: Any) -> None:
    a = numbers[0]
    if operator == Operator.WARP:
        # DALI takes one level for all channels
        warp(image, numbers, (int(fill[0]) + int(fill[1]) + int(fill[2]) + 1) // 3)
    elif operator == Operator.COLOR:
        _twist(image, np.float32(1.0), np.float32(1.0), a, np.float32(0.0))
    elif operator == Operator.SHARPNESS:
        _sharpen(image, a)
    elif operator == Operator.EQUALIZE or operator == Operator.AUTO_CONTRAST:
        _spread_levels(image, operator == Operator.EQUALIZE)
    elif operator == Operator.BRIGHTNESS:
        _scale(image, a, np.float32(0.0))
    elif operator == Operator.CONTRAST:
        _scale(image, a, _mean_grey(image) * (np.float32(1.0) - a))
    elif operator >= Operator.POSTERIZE and operator <= Operator.INVERT:
        _look_up_bits(image, operator, a)


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
    values = image.reshape(-1)
    red, green, blue = 0, 0, 0
    for i in range(values.size // _CHANNELS):
        red += values[_CHANNELS * i]
        green += values[_CHANNELS * i + 1]
        blue += values[_CHANNELS * i + 2]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.float32(grey / (image.shape[0] * image.shape[1]))


@_compiled
def _look_up_bits(image: Any, operator: int, a: Any) -> None:
    tables = np.empty((_CHANNELS, 256), np.uint8)
    for level in range(256):
        if operator == Operator.POSTERIZE:
            value = level & int(a)
        elif operator == Operator.SOLARIZE:
            value = level if level < a else 255 - level
        elif operator == Operator.SOLARIZE_ADD:
            value = min(level + int(a), 255) if level < 128 else level
        else:
            value = 255 - level
        tables[:, level] = value
    _look_up(image, tables)


@_compiled
def _look_up(image: Any, tables: Any) -> None:
    values = image.reshape(-1)
    for i in range(values.size // _CHANNELS):
        for c in range(_CHANNELS):
            values[_CHANNELS * i + c] = tables[c, values[_CHANNELS * i + c]]


@_compiled
def _histograms(image: Any) -> Any:
    """Counts levels by channel, [3 256]; in two, since equal neighbours wait for each other."""
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
def _spread_levels(image: Any, equalize: bool) -> None:
    """Brings each channel's darkest level to 0 and its brightest to 255.

    To equalize by OpenCV's formula, which is DALI's, or linearly (auto contrast). A channel of one
    level stays as it is.
    """
    counts = _histograms(image)
    tables = np.empty((_CHANNELS, 256), np.uint8)
    for c in range(_CHANNELS):
        darkest, brightest = 0, 255
        while counts[c, darkest] == 0:
            darkest += 1
        while counts[c, brightest] == 0:
            brightest -= 1
        rest = brightest - darkest
        if equalize:
            rest = image.shape[0] * image.shape[1] - counts[c, darkest]
        place = 0
        for level in range(256):
            if rest == 0:
                tables[c, level] = level
                continue
            if not equalize:
                place = level - darkest
            elif level > darkest:
                place += counts[c, level]
            tables[c, level] = _level(np.float32(place) * (np.float32(255.0) / np.float32(rest)))
    _look_up(image, tables)


_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
# [i j k l]: what part k of YIQ contributes to colour i where its part l is taken of colour j
_PARTS = np.einsum("ik,lj->ijkl", np.linalg.inv(_TO_YIQ), _TO_YIQ, order="C")


@_compiled
def twist_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> Any:
    """The colour twist as a matrix [3 4]: hue and saturation in YIQ, contrast about 128."""
    cosine = saturation * math.cos(math.radians(hue))
    sine = saturation * math.sin(math.radians(hue))
    matrix = np.zeros((3, 4), np.float32)
    for i in range(3):
        for j in range(3):
            part = _PARTS[i, j]
            turned = cosine * (part[1, 1] + part[2, 2]) + sine * (part[1, 2] - part[2, 1])
            matrix[i, j] = brightness * contrast * (part[0, 0] + turned)
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
def _reflected(position: int, size: int) -> int:
    """Reflects a position beyond the edge about the edge pixel's centre."""
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
        line = image[_reflected(y - 1, size)].reshape(-1)
        target = padded[y, _CHANNELS:]
        for i in range(line.size):
            target[i] = line[i]
        for c in range(_CHANNELS):
            padded[y, c] = line[_reflected(-1, size) * _CHANNELS + c]
            padded[y, (size + 1) * _CHANNELS + c] = line[_reflected(size, size) * _CHANNELS + c]
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


# An affine warp, bilinear. DALI's takes 2.4 ms an image of 224 pixels on one core. Most pixels have
# all four neighbours within the image: their run in a row is found in advance, and gone through
# without a question and with a vector of channels for each neighbour.

# A pixel's load is one channel too long.
_SPARE_BYTES = 1
_SLACK = 1e-3


@_compiled
def warp(image: Any, matrix: Any, grey: int) -> None:
    """Takes each pixel of an image, uint8 [s s 3], from the position that the matrix gives it.

    `matrix` float32 [6] has the x and the y of a pixel's source as functions of its x, y and 1, in
    pixels whose centres lie at halves. `grey` is the level outside the image.
    """
    size = image.shape[0]
    original = np.empty(image.size + _SPARE_BYTES, np.uint8)
    pixels = image.reshape(-1)
    # Loops, not slices: those bring error messages along, which take Numba seconds to compile.
    for i in range(pixels.size):
        original[i] = pixels[i]
    half = np.float32(0.5)
    step_x, step_y = matrix[0], matrix[3]
    for y in range(size):
        start_x = matrix[0] * half + matrix[1] * (np.float32(y) + half) + matrix[2] - half
        start_y = matrix[3] * half + matrix[4] * (np.float32(y) + half) + matrix[5] - half
        # [first, last) touches the image, [low, high) of it lies inside with all neighbours.
        first, last = _run(start_x, step_x, -1.0, size, -_SLACK, 0, size)
        first, last = _run(start_y, step_y, -1.0, size, -_SLACK, first, last)
        low, high = _run(start_x, step_x, 0.0, size - 1, _SLACK, first, last)
        low, high = _run(start_y, step_y, 0.0, size - 1, _SLACK, low, high)
        for i in range(y * size * _CHANNELS, (y * size + first) * _CHANNELS):
            pixels[i] = grey
        for i in range((y * size + last) * _CHANNELS, (y + 1) * size * _CHANNELS):
            pixels[i] = grey
        for x in range(first, low):
            _blend_at_border(pixels, original, size, x, y, start_x, step_x, start_y, step_y, grey)
        for x in range(low, high):
            at_x, at_y = start_x + step_x * np.float32(x), start_y + step_y * np.float32(x)
            left, upper = np.int64(at_x), np.int64(at_y)  # not negative here
            _blend_pixel(
                pixels,
                original,
                (y * size + x) * _CHANNELS,
                (upper * size + left) * _CHANNELS,
                size * _CHANNELS,
                at_x - np.float32(left),
                at_y - np.float32(upper),
            )
        for x in range(high, last):
            _blend_at_border(pixels, original, size, x, y, start_x, step_x, start_y, step_y, grey)


@_compiled
def _run(
    start: Any, step: Any, lowest: Any, limit: Any, slack: float, first: int, last: int
) -> Any:
    """The x of [first, last) with lowest <= start + step * x < limit; an empty run lies in it too.

    A positive slack, in pixels of x, leaves out what rounding might put outside; with a negative
    one nothing is missing.
    """
    if step == 0.0:
        inside = lowest <= start and start < limit
        return (first, last) if inside else (first, first)
    enter, leave = (lowest - start) / step, (limit - start) / step
    if step < 0.0:
        enter, leave = leave, enter
    far = 1e6  # beyond any side; keeps the conversions to integers defined
    enter = min(max(enter, -far), far)
    leave = min(max(leave, -far), far)
    low = min(max(math.ceil(enter + slack), first), last)
    high = min(max(math.floor(leave - slack) + 1, low), last)
    return low, high


@_compiled
def _blend_at_border(
    pixels: Any, original: Any, size: int, x: int, y: int, start_x: Any, step_x: Any,
    start_y: Any, step_y: Any, grey: int,
) -> None:  # fmt: skip
    """Blends one pixel, some of whose neighbours lie outside the image: those are grey."""
    at_x, at_y = start_x + step_x * np.float32(x), start_y + step_y * np.float32(x)
    floor_x, floor_y = math.floor(at_x), math.floor(at_y)
    left, upper = int(floor_x), int(floor_y)
    target = (y * size + x) * _CHANNELS
    if left < -1 or upper < -1 or left >= size or upper >= size:
        for c in range(_CHANNELS):
            pixels[target + c] = grey
        return
    right, down = at_x - np.float32(floor_x), at_y - np.float32(floor_y)
    for c in range(_CHANNELS):
        total = np.float32(0.5)
        for dy in range(2):
            for dx in range(2):
                value = np.float32(grey)
                if 0 <= left + dx < size and 0 <= upper + dy < size:
                    value = np.float32(original[((upper + dy) * size + left + dx) * _CHANNELS + c])
                weight = right if dx == 1 else np.float32(1.0) - right
                weight *= down if dy == 1 else np.float32(1.0) - down
                total += weight * value
        pixels[target + c] = np.uint8(total)


def _define_blend_pixel(
    typing_context: Any, pixels: Any, original: Any, target: Any, upper_left: Any,
    row_bytes: Any, right: Any, down: Any,
) -> Any:  # fmt: skip
    """Blends one pixel from its four neighbours."""
    bytes_of = ir.VectorType(ir.IntType(8), 4)
    floats = ir.VectorType(ir.FloatType(), 4)
    lanes = ir.VectorType(ir.IntType(32), 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, original = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        )
        target, upper_left, row_bytes = arguments[2:5]
        right, down = (repeat(builder, part, 4) for part in arguments[5:])
        index = ir.IntType(64)

        def pixel_at(offset: Any) -> Any:
            wide = builder.zext(load(builder, original.data, offset, bytes_of, align=1), lanes)
            return builder.sitofp(wide, floats)

        def blend(one: Any, other: Any, part: Any) -> Any:
            step = builder.fmul(builder.fsub(other, one), part, flags=["contract"])
            return builder.fadd(one, step, flags=["contract"])

        below = builder.add(upper_left, row_bytes)
        pixel = ir.Constant(index, _CHANNELS)
        upper = blend(pixel_at(upper_left), pixel_at(builder.add(upper_left, pixel)), right)
        lower = blend(pixel_at(below), pixel_at(builder.add(below, pixel)), right)
        total = builder.fadd(blend(upper, lower, down), ir.Constant(floats, [0.5] * 4))
        # Byte by byte: the store that narrows a vector takes longer than all before on Zen 4.
        levels = builder.fptosi(total, lanes)
        for c in range(_CHANNELS):
            level = builder.extract_element(levels, ir.Constant(ir.IntType(32), c))
            pointer = builder.gep(pixels.data, [builder.add(target, ir.Constant(index, c))])
            builder.store(builder.trunc(level, ir.IntType(8)), pointer)
        return context.get_dummy_value()

    signature = types.void(
        pixels, original, types.int64, types.int64, types.int64, types.float32, types.float32
    )
    return signature, generate


_blend_pixel: Any = intrinsic(_define_blend_pixel)
