"""From a decoded picture to a square in one pass: cut, resample with antialias, mirror.

DALI's resize on the CPU takes longer than decoding does. This kernel runs inside DALI's graph, on
its threads, and follows Pillow's and torchvision's law: filters are widened when they shrink,
and what lies outside the picture has no weight. It goes down the square one row at a time: the
rows under the filter are added up into one line of floats (long, contiguous, vectorised, and small
enough for the first-level cache), and the line is then filtered to pixels. Values are rounded once,
at the end: at most one level from torchvision, which rounds between its two passes. The cubic
filter takes these two passes itself, for the reason given there, and equals torchvision.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_CHANNELS = 3
# What one vector instruction of _filter_pixels works on.
_PIXELS = 4
_LANES = 4
_FOUR = ir.VectorType(ir.FloatType(), 4)
_SIXTEEN = ir.VectorType(ir.FloatType(), 16)


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def resample_region(
    out: Any,
    picture: Any,
    top: float,
    bottom: float,
    left: float,
    right: float,
    mirror: bool,
    cubic: bool,
) -> None:
    """Fills a square with a region of a picture.

    The filter may look beyond the region, but not beyond the picture.

    Args:
        out: uint8 [size size 3], a square, written.
        picture: uint8 [h w 3].
        top: first row of the region, in pixels; may lie between two. The region is not empty and
            lies in the picture: nothing is checked here.
        bottom: end of its rows.
        left: first column.
        right: end of its columns.
        mirror: whether left and right are exchanged.
        cubic: cubic filter (a = -0.5) instead of the triangular one that is called bilinear.
    """
    if cubic:
        _resample_in_two_passes(out, picture, top, bottom, left, right, mirror)
    else:
        _resample_in_one_pass(out, picture, top, bottom, left, right, mirror)


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _resample_in_one_pass(
    out: Any, picture: Any, top: float, bottom: float, left: float, right: float, mirror: bool
) -> None:
    size = out.shape[0]
    height, width = picture.shape[0], picture.shape[1]
    first_rows, row_weights = _taps(height, top, bottom, size, False)
    first_columns, column_weights = _taps(width, left, right, size, False)
    first_values, spread_weights = _spread_taps(first_columns, column_weights, mirror)
    rows = picture.reshape(height, width * _CHANNELS)
    # Vectors reach beyond the ends of lines: zeros are read there, and what is written is either
    # overwritten by the next line or, at the square's end, falls into a spare one.
    padded_line = np.zeros(rows.shape[1] + spread_weights[0].size, np.float32)
    line = padded_line[: rows.shape[1]]
    pixels = out.reshape(-1)
    spare_pixels = np.empty(first_values.size * _CHANNELS + _PIXELS, np.uint8)
    for y in range(size):
        _add_rows(line, rows, first_rows[y], row_weights[y])
        start = y * size * _CHANNELS
        if start + spare_pixels.size <= pixels.size:
            _filter_line(pixels[start:], padded_line, first_values, spread_weights)
        else:
            _filter_line(spare_pixels, padded_line, first_values, spread_weights)
            pixels[start : start + size * _CHANNELS] = spare_pixels[: size * _CHANNELS]


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _resample_in_two_passes(
    out: Any, picture: Any, top: float, bottom: float, left: float, right: float, mirror: bool
) -> None:
    """What torchvision makes of a uint8 tensor: columns first, then rows.

    A cubic filter overshoots at edges, and torchvision clips and rounds between its passes: on
    noise, one pass was up to 24 levels away from it; two are equal to it in all but 3 of 36 million
    values, which are one level away. Two passes take 1.3 to 1.6 times as long as one.
    """
    size = out.shape[0]
    height, width = picture.shape[0], picture.shape[1]
    first_rows, row_weights = _taps(height, top, bottom, size, True)
    first_columns, column_weights = _taps(width, left, right, size, True)
    first_values, spread_weights = _spread_taps(first_columns, column_weights, mirror)
    rows = picture.reshape(height, width * _CHANNELS)
    line = np.zeros(rows.shape[1] + spread_weights[0].size, np.float32)
    low, high = first_rows[0], first_rows[size - 1] + row_weights.shape[1]
    narrow = np.empty((high - low, first_values.size * _CHANNELS + _PIXELS), np.uint8)
    for y in range(low, high):
        row = rows[y]
        for j in range(row.size):
            line[j] = np.float32(row[j])
        _filter_line(narrow[y - low], line, first_values, spread_weights)
    pixels = out.reshape(size, size * _CHANNELS)
    used = narrow[:, : size * _CHANNELS]
    sums = np.empty(size * _CHANNELS, np.float32)
    for y in range(size):
        _add_rows(sums, used, first_rows[y] - low, row_weights[y])
        row = pixels[y]
        for j in range(sums.size):
            rounded = sums[j] + np.float32(0.5)
            row[j] = np.uint8(min(max(rounded, np.float32(0.0)), np.float32(255.0)))


@njit(cache=True, nogil=True, error_model="numpy")
def _taps(length: int, start: float, end: float, size: int, cubic: bool) -> Any:
    """First input position [size] and weights float32 [size taps] of every output position.

    All have the same number of taps, some of weight 0: a loop whose length changed from pixel to
    pixel would be mispredicted at every second one.
    """
    scale = (end - start) / size
    widened = max(scale, 1.0)
    narrowing = 1.0 / widened  # multiplied by, as torchvision does it: rounding may hang on it
    support = widened * (2.0 if cubic else 1.0)
    first = np.empty(size, np.int64)
    taps = 0
    for i in range(size):
        center = start + (i + 0.5) * scale
        low = max(np.int64(center - support + 0.5), 0)
        high = min(np.int64(center + support + 0.5), length)
        first[i] = low
        taps = max(taps, high - low)
    weights = np.empty((size, taps), np.float64)
    for i in range(size):
        center = start + (i + 0.5) * scale
        first[i] = min(first[i], length - taps)
        total = 0.0
        for t in range(taps):
            distance = abs((first[i] + t - center + 0.5) * narrowing)
            weight = _cubic(distance) if cubic else max(1.0 - distance, 0.0)
            weights[i, t] = weight
            total += weight
        for t in range(taps):
            weights[i, t] /= total
    if cubic:
        _round_as_torchvision(weights)
    return first, weights.astype(np.float32)


@njit(cache=True, nogil=True, error_model="numpy")
def _round_as_torchvision(weights: Any) -> None:
    """To the fixed point of its uint8 kernels: as many binary places as 16 bits leave the largest.

    Sums of such weights times levels are exact in float32 unless a picture shrinks by so much that
    there are more than 16 places; then the last bit may be lost.
    """
    largest = weights.max()
    places = 0
    while places < 22 and np.int64(0.5 + largest * 2.0 ** (places + 1)) < 2**15:
        places += 1
    unit = 2.0**places
    for i in range(weights.shape[0]):
        for t in range(weights.shape[1]):
            weight = weights[i, t] * unit
            weights[i, t] = np.int64(weight + (0.5 if weight >= 0 else -0.5)) / unit


@njit(cache=True, nogil=True, inline="always")
def _cubic(x: float) -> float:
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _add_rows(line: Any, rows: Any, first: int, weights: Any) -> None:
    """line[j] = sum of weights[t] * rows[first + t, j]; two rows at once, to halve its traffic."""
    taps = weights.size
    a = weights[0]
    row_a = rows[first]
    for j in range(line.size):
        line[j] = a * np.float32(row_a[j])
    for t in range(1, taps - 1, 2):
        a, b = weights[t], weights[t + 1]
        row_a, row_b = rows[first + t], rows[first + t + 1]
        for j in range(line.size):
            line[j] += a * np.float32(row_a[j]) + b * np.float32(row_b[j])
    if taps % 2 == 0:
        a = weights[taps - 1]
        row_a = rows[first + taps - 1]
        for j in range(line.size):
            line[j] += a * np.float32(row_a[j])


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_taps(first: Any, weights: Any, mirror: bool) -> Any:
    """Columns' taps as `_filter_pixels` takes them, in the order of the output's pixels.

    First value [n], n a multiple of 4, and weights [n/4 taps 16]: of four pixels, each in four
    lanes. What was added has weights of 0.
    """
    size, taps = weights.shape
    groups = -(-size // _PIXELS)
    first_values = np.zeros(groups * _PIXELS, np.int64)
    spread = np.zeros((groups, taps, _PIXELS * _LANES), np.float32)
    for x in range(size):
        source = size - 1 - x if mirror else x
        first_values[x] = first[source] * _CHANNELS
        for t in range(taps):
            for lane in range(_LANES):
                spread[x // _PIXELS, t, x % _PIXELS * _LANES + lane] = weights[source, t]
    return first_values, spread


@njit(cache=True, nogil=True, error_model="numpy")
def _filter_line(pixels: Any, line: Any, first_values: Any, weights: Any) -> None:
    for group in range(weights.shape[0]):
        _filter_pixels(pixels, line, first_values, weights, group)


@intrinsic  # type: ignore[untyped-decorator]
def _filter_pixels(
    typing_context: Any, pixels: Any, line: Any, first_values: Any, weights: Any, group: Any
) -> Any:
    """Four pixels of three channels: the weighted sums of `line`, rounded and clipped.

    Vector instructions are spelt out because no compiler finds them: for each tap four loads of
    four lanes make a vector, whose fourth lanes carry a neighbour's red and are dropped at the end.
    LLVM makes of them what the processor has.
    """
    index = ir.IntType(64)
    byte = ir.IntType(8)
    whole = ir.VectorType(ir.IntType(32), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, line, first_values, weights = (
            context.make_array(array_type)(context, builder, value)
            for array_type, value in zip(signature.args, arguments[:4], strict=False)
        )
        group = arguments[4]
        x = builder.mul(group, index(_PIXELS))
        taps = builder.extract_value(weights.shape, 1)
        places = [
            builder.load(builder.gep(first_values.data, [builder.add(x, index(i))]))
            for i in range(_PIXELS)
        ]
        total_place = cgutils.alloca_once_value(builder, ir.Constant(_SIXTEEN, [0.5] * 16))
        with cgutils.for_range(builder, taps) as loop:
            done = builder.mul(loop.index, index(_CHANNELS))
            a, b, c, d = (
                _load(builder, line.data, builder.add(place, done), _FOUR) for place in places
            )
            ab, cd = (_shuffle(builder, *pair, list(range(8))) for pair in ((a, b), (c, d)))
            values = _shuffle(builder, ab, cd, list(range(16)))
            row = builder.add(builder.mul(group, taps), loop.index)
            factors = _load(builder, weights.data, builder.mul(row, index(16)), _SIXTEEN)
            product = builder.fmul(values, factors, flags=["contract"])
            added = builder.fadd(builder.load(total_place), product, flags=["contract"])
            builder.store(added, total_place)
        levels = builder.fptosi(builder.load(total_place), whole)
        for comparison, bound in (("<", 0), (">", 255)):
            bounds = ir.Constant(whole, [bound] * 16)
            beyond = builder.icmp_signed(comparison, levels, bounds)
            levels = builder.select(beyond, bounds, levels)
        levels = builder.trunc(levels, ir.VectorType(byte, 16))
        kept = [_LANES * i + c for i in range(_PIXELS) for c in range(_CHANNELS)]
        levels = _shuffle(builder, levels, levels, kept + kept[:4])
        place = builder.gep(pixels.data, [builder.mul(x, index(_CHANNELS))])
        builder.store(levels, builder.bitcast(place, levels.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pixels, line, first_values, weights, types.int64), generate


def _load(builder: Any, data: Any, offset: Any, kind: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())
    return builder.load(pointer, align=4)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


@functools.cache
def resample_function() -> Any:
    """`resample_region` as a ctypes function of addresses, compiled once for a machine.

    For code that is compiled anew in each process: the kernel as such would be compiled with it.
    Arguments: address of the square, its side, address of the picture, its height and width, then
    those of `resample_region` from `top` on.
    """

    @cfunc(
        types.void(
            *(types.CPointer(types.uint8), types.int64),
            *(types.CPointer(types.uint8), types.int64, types.int64),
            *([types.float64] * 4),
            *([types.boolean] * 2),
        ),
        cache=True,
    )
    def resample(
        square: Any,
        size: int,
        picture: Any,
        height: int,
        width: int,
        top: float,
        bottom: float,
        left: float,
        right: float,
        mirror: bool,
        cubic: bool,
    ) -> None:
        square = carray(square, (size, size, _CHANNELS))
        picture = carray(picture, (height, width, _CHANNELS))
        resample_region(square, picture, top, bottom, left, right, mirror, cubic)

    return resample.ctypes
