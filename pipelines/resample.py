"""From a decoded picture to a square in one pass: cut, resample with antialias, mirror.

DALI's resize on the CPU takes longer than decoding does. This kernel runs inside DALI's graph, on
its threads (or, of a raw data set, in front of it by the batch), and follows Pillow's and
torchvision's law: filters are widened when they shrink, and what lies outside the picture has no
weight. It goes down the square one row at a time: the rows under the filter are added up into one
line of floats (long, contiguous, vectorised, and small enough for the first-level cache), and the
line is then filtered to pixels. Values are rounded once, at the end.
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
_TAPS = 4
_LANES = 4
# Lines of small pictures are multiples of this: what LLVM's loops take at once.
_LINE = 32
_MOST_FLOATS = 1 << 14  # these stay in the cache
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
    size = out.shape[0]
    height, width = picture.shape[0], picture.shape[1]
    first_rows = np.empty(size, np.int64)
    taps = _find_taps(first_rows, height, top, bottom, cubic)
    row_weights = np.empty((size, taps), np.float32)
    _weigh_taps(row_weights, first_rows, height, top, bottom, cubic)
    first_columns = np.empty(size, np.int64)
    taps = _find_taps(first_columns, width, left, right, cubic)
    column_weights = np.empty((size, taps), np.float32)
    _weigh_taps(column_weights, first_columns, width, left, right, cubic)
    first_values = np.zeros(_padded(size, _PIXELS), np.int64)
    spread = np.zeros((first_values.size, -(-taps // _TAPS), _TAPS * _LANES), np.float32)
    _spread_taps(first_values, spread, first_columns, column_weights, mirror)
    rows = picture.reshape(height, width * _CHANNELS)
    # Vectors reach beyond the ends of lines: zeros are read there, and what is written is either
    # overwritten by the next line or, at the square's end, falls into a spare one.
    padded_line = np.zeros(rows.shape[1] + spread[0].size, np.float32)
    spare_pixels = np.empty(_spare_size(size), np.uint8)
    line = padded_line[: rows.shape[1]]
    _fill_square(
        out, rows, line, padded_line, first_rows, row_weights, first_values, spread, spare_pixels
    )


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def resample_windows(
    squares: Any,
    pictures: Any,
    starts: Any,
    shapes: Any,
    flips: Any,
    cubic: bool,
    begin: int,
    end: int,
    most_floats: int = _MOST_FLOATS,
) -> None:
    """Windows of pictures to squares: `resample_region` of each window cut out, bit for bit.

    For decoded pictures of one size, by the batch. Where pictures are small, a call and its memory
    cost as much as the filter does; here memory is taken once for all, and lines are as long as
    vectors like them.

    Args:
        squares: uint8 [b size size 3], written.
        pictures: uint8 [b h w 3].
        starts: int32 [b 2], first row and column of each window.
        shapes: int32 [b 2], its height and width, not 0; it lies in the picture.
        flips: int32 [b], whether it is mirrored.
        cubic: which filter.
        begin: the first picture to take, for threads that share a batch.
        end: behind the last one.
        most_floats: values of pictures up to which they are turned into floats whole.
    """
    height, width = pictures.shape[1], pictures.shape[2]
    size = squares.shape[1]
    most_taps = max(_most_taps(height, size, cubic), _most_taps(width, size, cubic))
    padded_size = _padded(size, _PIXELS)
    groups = -(-most_taps // _TAPS)
    first_rows = np.empty(size, np.int64)
    first_columns = np.empty(size, np.int64)
    first_values = np.zeros(padded_size, np.int64)
    row_memory = np.empty(size * most_taps, np.float32)
    column_memory = np.empty(size * most_taps, np.float32)
    spread_memory = np.zeros(padded_size * groups * _TAPS * _LANES, np.float32)
    stride = _padded(width * _CHANNELS, _LINE)
    line_memory = np.zeros(stride + groups * _TAPS * _LANES, np.float32)
    spare_pixels = np.empty(_spare_size(size), np.uint8)
    small = height * stride <= most_floats
    floats = np.zeros(height * stride if small else 0, np.float32)
    bytes_ = np.empty(0 if small else height * width * _CHANNELS, np.uint8)
    for i in range(begin, end):
        rows, columns = np.int64(shapes[i, 0]), np.int64(shapes[i, 1])
        taps = _find_taps(first_rows, rows, 0.0, rows, cubic)
        row_weights = row_memory[: size * taps].reshape(size, taps)
        _weigh_taps(row_weights, first_rows, rows, 0.0, rows, cubic)
        taps = _find_taps(first_columns, columns, 0.0, columns, cubic)
        column_weights = column_memory[: size * taps].reshape(size, taps)
        _weigh_taps(column_weights, first_columns, columns, 0.0, columns, cubic)
        groups = -(-taps // _TAPS)
        spread = spread_memory[: padded_size * groups * _TAPS * _LANES].reshape(
            padded_size, groups, _TAPS * _LANES
        )
        spread[:] = 0.0
        _spread_taps(first_values, spread, first_columns, column_weights, flips[i] != 0)
        length = columns * _CHANNELS
        picture = pictures[i].reshape(-1)
        offset = (starts[i, 0] * width + starts[i, 1]) * _CHANNELS
        if small:
            # A loop over whole vectors has no rest, which would take longer than the vectors do.
            padded_length = _padded(length, _LINE)
            window = floats[: rows * padded_length].reshape(rows, padded_length)
            for y in range(rows):
                source = picture[offset + y * width * _CHANNELS :]
                target = window[y]
                for j in range(length):
                    target[j] = np.float32(source[j])
                target[length:] = 0.0
            line = line_memory[:padded_length]
            _fill_square(
                squares[i], window, line, line_memory, first_rows, row_weights, first_values,
                spread, spare_pixels,
            )  # fmt: skip
        else:
            raw_window = bytes_[: rows * length].reshape(rows, length)
            for y in range(rows):
                source = picture[offset + y * width * _CHANNELS :]
                raw_window[y] = source[:length]
            line = line_memory[:length]
            line_memory[length : length + groups * _TAPS * _LANES] = 0.0
            _fill_square(
                squares[i], raw_window, line, line_memory, first_rows, row_weights, first_values,
                spread, spare_pixels,
            )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@njit(cache=True, nogil=True, inline="always")
def _spare_size(size: int) -> int:
    """Bytes that a line of the square takes, with what vectors write behind it."""
    return _padded(size, _PIXELS) * _CHANNELS + _PIXELS


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _fill_square(
    out: Any,
    rows: Any,
    line: Any,
    padded_line: Any,
    first_rows: Any,
    row_weights: Any,
    first_values: Any,
    spread: Any,
    spare_pixels: Any,
) -> None:
    """Both passes; `padded_line` is `line` and what vectors read behind it, which has no weight.

    One function without calls and without parts of arrays in its loops: both cost Numba atomic
    counts up and down, which for a short line take five times as long as the line.
    """
    size = out.shape[0]
    taps = row_weights.shape[1]
    length = line.size
    pixels = out.reshape(-1)
    for y in range(size):
        # line = the weighted sum of rows, two rows at once, to halve its traffic
        first = first_rows[y]
        a = row_weights[y, 0]
        for j in range(length):
            line[j] = a * np.float32(rows[first, j])
        for t in range(1, taps - 1, 2):
            a, b = row_weights[y, t], row_weights[y, t + 1]
            row = first + t
            for j in range(length):
                line[j] += a * np.float32(rows[row, j]) + b * np.float32(rows[row + 1, j])
        if taps % 2 == 0:
            a = row_weights[y, taps - 1]
            row = first + taps - 1
            for j in range(length):
                line[j] += a * np.float32(rows[row, j])
        start = y * size * _CHANNELS
        if start + spare_pixels.size <= pixels.size:
            for x in range(0, first_values.size, _PIXELS):
                _filter_pixels(pixels, start, padded_line, first_values, spread, x)
        else:
            for x in range(0, first_values.size, _PIXELS):
                _filter_pixels(spare_pixels, 0, padded_line, first_values, spread, x)
            for j in range(size * _CHANNELS):
                pixels[start + j] = spare_pixels[j]


@njit(cache=True, nogil=True, inline="always")
def _most_taps(length: int, size: int, cubic: bool) -> int:
    """Taps that no region of `length` needs more of."""
    return np.int64(2.0 * max(length / size, 1.0) * (2.0 if cubic else 1.0)) + 2


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _find_taps(first: Any, length: int, start: float, end: float, cubic: bool) -> int:
    """First input position of every output position [size], and the number of taps of all.

    All have the same number of taps, some of weight 0: a loop whose length changed from pixel to
    pixel would be mispredicted at every second one.
    """
    size = first.size
    scale = (end - start) / size
    support = max(scale, 1.0) * (2.0 if cubic else 1.0)
    taps = 0
    for i in range(size):
        center = start + (i + 0.5) * scale
        low = max(np.int64(center - support + 0.5), 0)
        high = min(np.int64(center + support + 0.5), length)
        first[i] = low
        taps = max(taps, high - low)
    for i in range(size):
        first[i] = min(first[i], length - taps)
    return taps


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _weigh_taps(
    weights: Any, first: Any, length: int, start: float, end: float, cubic: bool
) -> None:
    """Fills the weights [size taps] that belong to `_find_taps`."""
    size, taps = weights.shape
    scale = (end - start) / size
    widened = max(scale, 1.0)
    for i in range(size):
        center = start + (i + 0.5) * scale
        total = 0.0
        for t in range(taps):
            distance = abs(first[i] + t + 0.5 - center) / widened
            weight = _cubic(distance) if cubic else max(1.0 - distance, 0.0)
            weights[i, t] = weight
            total += weight
        for t in range(taps):
            weights[i, t] /= total


@njit(cache=True, nogil=True, fastmath={"contract"}, inline="always")
def _cubic(x: float) -> float:
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_taps(first_values: Any, spread: Any, first: Any, weights: Any, mirror: bool) -> None:
    """Columns' taps as `_filter_pixels` takes them, in the order of the output's pixels.

    First value [n], n a multiple of 4, and weights [n groups 16]: of four taps, each in four lanes.
    What is not written must be zeros.
    """
    size, taps = weights.shape
    for x in range(size):
        source = size - 1 - x if mirror else x
        first_values[x] = first[source] * _CHANNELS
        for t in range(taps):
            for lane in range(_LANES):
                spread[x, t // _TAPS, t % _TAPS * _LANES + lane] = weights[source, t]


@intrinsic  # type: ignore[untyped-decorator]
def _filter_pixels(
    typing_context: Any, pixels: Any, start: Any, line: Any, first_values: Any, weights: Any, x: Any
) -> Any:
    """Four pixels of three channels, from x on: the weighted sums of `line`, rounded and clipped.

    They go to `pixels` from `start` + 3 x on.

    Vector instructions are spelt out because no compiler finds them: a load brings four taps of
    three channels, which are spread to four lanes a tap; the fourth lane carries a neighbour's red
    and is dropped at the end. LLVM makes of them what the processor has.
    """
    index = ir.IntType(64)
    byte = ir.IntType(8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, line, first_values, weights = (
            context.make_array(signature.args[i])(context, builder, arguments[i])
            for i in (0, 2, 3, 4)
        )
        start, x = arguments[1], arguments[5]
        groups = builder.extract_value(weights.shape, 1)
        zeros = ir.Constant(_SIXTEEN, [0.0] * 16)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(_PIXELS)]
        with cgutils.for_range(builder, groups) as loop:
            for i in range(_PIXELS):
                pixel = builder.add(x, index(i))
                first = builder.load(builder.gep(first_values.data, [pixel]))
                done = builder.mul(loop.index, index(_TAPS * _CHANNELS))
                values = _load(builder, line.data, builder.add(first, done))
                values = _shuffle(
                    builder, values, values, [3 * t + c for t in range(4) for c in range(4)]
                )
                group = builder.add(builder.mul(pixel, groups), loop.index)
                factors = _load(builder, weights.data, builder.mul(group, index(16)))
                product = builder.fmul(values, factors, flags=["contract"])
                added = builder.fadd(builder.load(sums[i]), product, flags=["contract"])
                builder.store(added, sums[i])
        # a, b, c, d of four taps each -> ab and cd of two -> one vector with a sum in four lanes
        a, b, c, d = (builder.load(each) for each in sums)
        ab, cd = _add_halves(builder, a, b, 8), _add_halves(builder, c, d, 8)
        total = _add_halves(builder, ab, cd, 4)
        total = builder.fadd(total, ir.Constant(_SIXTEEN, [0.5] * 16))
        for comparison, bound in (("<", 0.0), (">", 255.0)):
            bounds = ir.Constant(_SIXTEEN, [bound] * 16)
            beyond = builder.fcmp_ordered(comparison, total, bounds)
            total = builder.select(beyond, bounds, total)
        levels = builder.fptosi(total, ir.VectorType(ir.IntType(32), 16))
        levels = builder.trunc(levels, ir.VectorType(byte, 16))
        kept = [_LANES * i + c for i in range(_PIXELS) for c in range(_CHANNELS)]
        levels = _shuffle(builder, levels, levels, kept + kept[:4])
        place = builder.add(start, builder.mul(x, index(_CHANNELS)))
        place = builder.gep(pixels.data, [place])
        builder.store(levels, builder.bitcast(place, levels.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pixels, types.int64, line, first_values, weights, types.int64), generate


def _load(builder: Any, data: Any, offset: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [offset]), _SIXTEEN.as_pointer())
    return builder.load(pointer, align=4)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _add_halves(builder: Any, a: Any, b: Any, width: int) -> Any:
    """Of every 2 * width lanes of a, then of b, the first half plus the second."""
    starts = range(0, 32, 2 * width)
    firsts = [start + lane for start in starts for lane in range(width)]
    seconds = [lane + width for lane in firsts]
    return builder.fadd(_shuffle(builder, a, b, firsts), _shuffle(builder, a, b, seconds))


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
