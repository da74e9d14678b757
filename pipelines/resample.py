"""From a decoded picture to a square: cut, resample with antialias, mirror.

DALI's resize on the CPU takes longer than decoding does. This kernel runs inside DALI's graph, on
its threads (or, of a raw data set, in front of it by the batch), and follows Pillow's and
torchvision's law: filters are widened when they shrink, and what lies outside the picture has no
weight. It goes down the square one row at a time: the rows under the filter are added up into one
line of floats (long, contiguous, vectorised, and small enough for the first-level cache), and the
line is then filtered to pixels. Values are rounded once, at the end: at most one level from
torchvision, which rounds between its two passes. The cubic filter takes these two passes itself,
for the reason given there, and equals torchvision.
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
# Lines of small pictures are multiples of this: what LLVM's loops take at once.
_LINE = 32
_MOST_FLOATS = 1 << 14  # these stay in the cache
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
    size = out.shape[0]
    height, width = picture.shape[0], picture.shape[1]
    first_rows = np.empty(size, np.int64)
    taps = _find_taps(first_rows, height, top, bottom, cubic)
    row_weights = np.empty((size, taps), np.float64)
    _weigh_taps(row_weights, first_rows, top, bottom, cubic)
    first_columns = np.empty(size, np.int64)
    taps = _find_taps(first_columns, width, left, right, cubic)
    column_weights = np.empty((size, taps), np.float64)
    _weigh_taps(column_weights, first_columns, left, right, cubic)
    groups = _groups(size)
    first_values = np.zeros(groups * _PIXELS, np.int64)
    spread = np.zeros((groups, taps, _PIXELS * _LANES), np.float32)
    _spread_taps(first_values, spread, first_columns, column_weights, mirror)
    rows = picture.reshape(height, width * _CHANNELS)
    padded_line = np.zeros(rows.shape[1] + _LANES, np.float32)
    line = padded_line[: rows.shape[1]]
    narrow = np.empty((height if cubic else 1, _stride(size)), np.uint8)
    sums = np.empty(size * _CHANNELS, np.float32)
    _fill_square(
        out,
        rows,
        line,
        padded_line,
        first_rows,
        row_weights,
        first_values,
        spread,
        narrow,
        sums,
        cubic,
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
    groups = _groups(size)
    first_rows = np.empty(size, np.int64)
    first_columns = np.empty(size, np.int64)
    first_values = np.zeros(groups * _PIXELS, np.int64)
    row_memory = np.empty(size * most_taps, np.float64)
    column_memory = np.empty(size * most_taps, np.float64)
    spread_memory = np.zeros(groups * most_taps * _PIXELS * _LANES, np.float32)
    stride = _padded(width * _CHANNELS, _LINE)
    line_memory = np.zeros(stride + _LANES, np.float32)
    narrow = np.empty((height if cubic else 1, _stride(size)), np.uint8)
    sums = np.empty(size * _CHANNELS, np.float32)
    small = height * stride <= most_floats
    floats = np.zeros(height * stride if small else 0, np.float32)
    bytes_ = np.empty(0 if small else height * width * _CHANNELS, np.uint8)
    for i in range(begin, end):
        rows, columns = np.int64(shapes[i, 0]), np.int64(shapes[i, 1])
        taps = _find_taps(first_rows, rows, 0.0, rows, cubic)
        row_weights = row_memory[: size * taps].reshape(size, taps)
        _weigh_taps(row_weights, first_rows, 0.0, rows, cubic)
        taps = _find_taps(first_columns, columns, 0.0, columns, cubic)
        column_weights = column_memory[: size * taps].reshape(size, taps)
        _weigh_taps(column_weights, first_columns, 0.0, columns, cubic)
        spread = spread_memory[: groups * taps * _PIXELS * _LANES].reshape(
            groups, taps, _PIXELS * _LANES
        )
        spread[groups - 1] = 0.0  # of pixels that are not there
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
                spread, narrow, sums, cubic,
            )  # fmt: skip
        else:
            raw_window = bytes_[: rows * length].reshape(rows, length)
            for y in range(rows):
                source = picture[offset + y * width * _CHANNELS :]
                raw_window[y] = source[:length]
            line = line_memory[:length]
            _fill_square(
                squares[i], raw_window, line, line_memory, first_rows, row_weights, first_values,
                spread, narrow, sums, cubic,
            )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@njit(cache=True, nogil=True, inline="always")
def _groups(size: int) -> int:
    """Of pixels that are filtered together, in a line of a square."""
    return -(-size // _PIXELS)


@njit(cache=True, nogil=True, inline="always")
def _stride(size: int) -> int:
    """Bytes that a line of the square takes, with what vectors write behind it."""
    return _groups(size) * _PIXELS * _CHANNELS + _PIXELS


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _fill_square(
    out: Any,
    rows: Any,
    line: Any,
    padded_line: Any,
    first_rows: Any,
    row_weights: Any,
    first_values: Any,
    spread: Any,
    narrow: Any,
    sums: Any,
    cubic: bool,
) -> None:
    """The square from rows of a picture [h l], floats or bytes.

    Args:
        out: as of `resample_region`.
        rows: of the picture.
        line: memory for one row as floats, as long as a row.
        padded_line: `line` and what vectors read behind it, which has no weight.
        first_rows: as of `_find_taps`.
        row_weights: as of `_weigh_taps`.
        first_values: as of `_spread_taps`.
        spread: as of `_spread_taps`.
        narrow: memory for rows of the square's width: of the whole picture if `cubic`, else one.
        sums: memory for a line of the square as floats.
        cubic: which filter.
    """
    if cubic:
        _fill_in_two_passes(
            out,
            rows,
            line,
            padded_line,
            first_rows,
            row_weights,
            first_values,
            spread,
            narrow,
            sums,
        )
    else:
        _fill_in_one_pass(
            out, rows, line, padded_line, first_rows, row_weights, first_values, spread, narrow
        )


# In the loops below there are neither calls nor parts of arrays: both cost Numba atomic counts up
# and down, which for a short line take five times as long as the line. Even one inlined function
# for the sums of rows in both takes 1.4 times as long for pictures of 32 pixels. Nor are places
# added up in an index: Numba allows for negative ones, and no such loop is vectorised (cubic then
# takes 4 times as long).


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _fill_in_one_pass(
    out: Any,
    rows: Any,
    line: Any,
    padded_line: Any,
    first_rows: Any,
    row_weights: Any,
    first_values: Any,
    spread: Any,
    narrow: Any,
) -> None:
    """Rows are added up to one line of floats, which is filtered to pixels."""
    size = out.shape[0]
    taps = row_weights.shape[1]
    length = line.size
    pixels = out.reshape(-1)
    spare = narrow.reshape(-1)
    for y in range(size):
        # line = the weighted sum of rows, two rows at once, to halve its traffic
        first = first_rows[y]
        a = np.float32(row_weights[y, 0])
        for j in range(length):
            line[j] = a * np.float32(rows[first, j])
        for t in range(1, taps - 1, 2):
            a, b = np.float32(row_weights[y, t]), np.float32(row_weights[y, t + 1])
            row = first + t
            for j in range(length):
                line[j] += a * np.float32(rows[row, j]) + b * np.float32(rows[row + 1, j])
        if taps % 2 == 0:
            a = np.float32(row_weights[y, taps - 1])
            row = first + taps - 1
            for j in range(length):
                line[j] += a * np.float32(rows[row, j])
        # Vectors write beyond the ends of lines: that is overwritten by the next line or, at the
        # square's end, falls into a spare one.
        start = y * size * _CHANNELS
        if start + spare.size <= pixels.size:
            for group in range(spread.shape[0]):
                _filter_pixels(pixels, start, padded_line, first_values, spread, group)
        else:
            for group in range(spread.shape[0]):
                _filter_pixels(spare, 0, padded_line, first_values, spread, group)
            for j in range(size * _CHANNELS):
                pixels[start + j] = spare[j]


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _fill_in_two_passes(
    out: Any,
    rows: Any,
    line: Any,
    padded_line: Any,
    first_rows: Any,
    row_weights: Any,
    first_values: Any,
    spread: Any,
    narrow: Any,
    sums: Any,
) -> None:
    """What torchvision makes of a uint8 tensor: columns first, then rows.

    A cubic filter overshoots at edges, and torchvision clips and rounds between its passes: on
    noise, one pass was up to 24 levels away from it; two are equal to it in all but 3 of 36 million
    values, which are one level away. Two passes take 1.3 to 1.6 times as long as one.
    """
    size = out.shape[0]
    taps = row_weights.shape[1]
    length = line.size
    low, high = first_rows[0], first_rows[size - 1] + taps
    bytes_ = narrow.reshape(-1)
    stride = narrow.shape[1]
    for y in range(low, high):
        for j in range(length):
            line[j] = np.float32(rows[y, j])
        for group in range(spread.shape[0]):
            _filter_pixels(bytes_, (y - low) * stride, padded_line, first_values, spread, group)
    width = size * _CHANNELS
    lines = out.reshape(size, width)
    for y in range(size):
        first = first_rows[y] - low
        a = np.float32(row_weights[y, 0])
        for j in range(width):
            sums[j] = a * np.float32(narrow[first, j])
        for t in range(1, taps - 1, 2):
            a, b = np.float32(row_weights[y, t]), np.float32(row_weights[y, t + 1])
            row = first + t
            for j in range(width):
                sums[j] += a * np.float32(narrow[row, j]) + b * np.float32(narrow[row + 1, j])
        if taps % 2 == 0:
            a = np.float32(row_weights[y, taps - 1])
            row = first + taps - 1
            for j in range(width):
                sums[j] += a * np.float32(narrow[row, j])
        for j in range(width):
            rounded = sums[j] + np.float32(0.5)
            lines[y, j] = np.uint8(min(max(rounded, np.float32(0.0)), np.float32(255.0)))


@njit(cache=True, nogil=True, inline="always")
def _most_taps(length: int, size: int, cubic: bool) -> int:
    """Taps that no region of `length` needs more of."""
    return np.int64(2.0 * max(length / size, 1.0) * (2.0 if cubic else 1.0)) + 2


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def _weigh_taps(weights: Any, first: Any, start: float, end: float, cubic: bool) -> None:
    """Fills the weights float64 [size taps] that belong to `_find_taps`."""
    size, taps = weights.shape
    scale = (end - start) / size
    narrowing = 1.0 / max(scale, 1.0)  # multiplied by, as torchvision does: rounding may hang on it
    for i in range(size):
        center = start + (i + 0.5) * scale
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


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_taps(first_values: Any, spread: Any, first: Any, weights: Any, mirror: bool) -> None:
    """Columns' taps as `_filter_pixels` takes them, in the order of the output's pixels.

    First value [n], n a multiple of 4, and weights float32 [n/4 taps 16]: of four pixels, each in
    four lanes. Weights of pixels that are not there must be zeros.
    """
    size, taps = weights.shape
    for x in range(size):
        source = size - 1 - x if mirror else x
        first_values[x] = first[source] * _CHANNELS
        for t in range(taps):
            for lane in range(_LANES):
                spread[x // _PIXELS, t, x % _PIXELS * _LANES + lane] = weights[source, t]


@intrinsic  # type: ignore[untyped-decorator]
def _filter_pixels(
    typing_context: Any,
    pixels: Any,
    start: Any,
    line: Any,
    first_values: Any,
    weights: Any,
    group: Any,
) -> Any:
    """Four pixels of three channels: the weighted sums of `line`, rounded and clipped.

    They go to `pixels` from `start` + 12 `group` on, with four bytes behind them that mean nothing.

    Vector instructions are spelt out because no compiler finds them: for each tap four loads of
    four lanes make a vector, whose fourth lanes carry a neighbour's red and are dropped at the end.
    LLVM makes of them what the processor has.
    """
    index = ir.IntType(64)
    byte = ir.IntType(8)
    whole = ir.VectorType(ir.IntType(32), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, line, first_values, weights = (
            context.make_array(signature.args[i])(context, builder, arguments[i])
            for i in (0, 2, 3, 4)
        )
        start, group = arguments[1], arguments[5]
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
        place = builder.add(start, builder.mul(x, index(_CHANNELS)))
        place = builder.gep(pixels.data, [place])
        builder.store(levels, builder.bitcast(place, levels.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pixels, types.int64, line, first_values, weights, types.int64), generate


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
