"""From a decoded image to a crop: a region is resampled with antialias, and flipped or not.

DALI's resize on the CPU takes longer than decoding does. This filters as Pillow and torchvision do,
one row of the crop at a time: the rows under the filter are added up into one line in the
first-level cache, which is then filtered to pixels. All is in fixed point, since a vector holds
twice as many values of 16 bits as floats. A line has 128 steps a level, so that results are at most
one level from torchvision, which rounds between its two passes; the cubic filter equals it.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

from unicl_fast.system.kernels import kernel

cgutils: Any = untyped_cgutils
_CHANNELS = 3
# What one vector instruction of _filter_line works on: four pixels, of each eight values, which
# are two taps and what lies after them; four sums become of one pixel.
_PIXELS = 4
_VALUES = 8
_LANES = 4
# Places after the point: of a line's values, of the largest weights of rows and of columns. More
# would not fit into 16 and 32 bits.
_LINE_PLACES = 7
_ROW_PLACES = _LINE_PLACES + 16
_COLUMN_PLACES = 15
_FEW_TAPS = 16  # up to which products are added up by their upper halves; see `_add_rows`
# Lines of small images are multiples of this: what LLVM's loops take at once.
_LINE = 32
_MOST_VALUES = 1 << 15  # these stay in the cache
_EIGHT_SHORT = ir.VectorType(ir.IntType(16), 8)
_ALL_SHORT = ir.VectorType(ir.IntType(16), 32)
_SUMS = ir.VectorType(ir.IntType(32), 16)
_INDEX = ir.IntType(64)


@kernel(fastmath={"contract"}, error_model="numpy")
def resample_region(
    out: Any,
    image: Any,
    top: float,
    bottom: float,
    left: float,
    right: float,
    flip: bool,
    cubic: bool,
) -> None:
    """Fills a crop `out`, uint8 [size size 3], with a region of an image, uint8 [h w 3].

    Edges of the region are in pixels and may lie between two. It is not empty: nothing is checked
    here. The filter can reach beyond the region, but not beyond the image. Rows and columns of the
    crop that lie outside the image are undefined.
    `cubic` selects the cubic filter (a = -0.5) instead of the triangular one, called bilinear.
    """
    height, width = image.shape[0], image.shape[1]
    length = width * _CHANNELS
    (
        exact, first_rows, fixed_rows, first_columns, fixed_columns, first_values, spread, narrow,
        sums,
    ) = _memory_for(out.shape[0], height, width, cubic)  # fmt: skip
    padded_line = np.empty(length + _VALUES, np.uint16)
    _fill_crop(
        out, image.reshape(height, length), padded_line[:length], padded_line, exact, first_rows,
        fixed_rows, first_columns, fixed_columns, first_values, spread, narrow, sums, width, top,
        bottom, left, right, flip, cubic,
    )  # fmt: skip


@kernel(fastmath={"contract"}, error_model="numpy")
def resample_windows(
    crops: Any,
    content: Any,
    firsts: Any,
    widths: Any,
    starts: Any,
    shapes: Any,
    flips: Any,
    cubic: bool,
    begin: int,
    end: int,
) -> None:
    """Resamples windows of images to crops: `resample_region` of each window, bit for bit.

    For decoded images, by the batch. Where they are small, a call and its memory cost as much as
    the filter does; so memory is taken once for all, and lines are as long as vectors like them.

    Writes `crops` uint8 [b size size 3] from `begin` to `end`. The image of a crop has rows of
    widths[i] pixels, int64 [b], and begins at content[firsts[i]], of uint8 [n]. Windows lie in the
    images: first row and column `starts` int32 [b 2], height and width `shapes`, and `flips` int32
    [b]. Windows of few values are widened to 16 bits whole.
    """
    most_rows: Any = np.int64(0)
    most_columns: Any = np.int64(0)
    for i in range(begin, end):
        most_rows = max(most_rows, np.int64(shapes[i, 0]))
        most_columns = max(most_columns, np.int64(shapes[i, 1]))
    (
        exact, first_rows, fixed_rows, first_columns, fixed_columns, first_values, spread, narrow,
        sums,
    ) = _memory_for(crops.shape[1], most_rows, most_columns, cubic)  # fmt: skip
    stride = -(-most_columns * _CHANNELS // _LINE) * _LINE
    line = np.empty(stride + _VALUES, np.uint16)
    small = most_rows * stride <= _MOST_VALUES
    wide = np.empty(most_rows * stride if small else 0, np.uint16)
    bytes_ = np.empty(0 if small else most_rows * most_columns * _CHANNELS, np.uint8)
    for i in range(begin, end):
        num_rows: Any = np.int64(shapes[i, 0])
        num_columns: Any = np.int64(shapes[i, 1])
        top, bottom, left, right = 0.0, np.float64(num_rows), 0.0, np.float64(num_columns)
        length = num_columns * _CHANNELS
        image_stride = widths[i] * _CHANNELS
        image = content[firsts[i] + starts[i, 0] * image_stride + starts[i, 1] * _CHANNELS :]
        if small:
            # A loop over whole vectors has no rest, which would take longer than the vectors do.
            padded_length = -(-length // _LINE) * _LINE
            window = wide[: num_rows * padded_length].reshape(num_rows, padded_length)
            for y in range(num_rows):
                original = image[y * image_stride :]
                target = window[y]
                for j in range(length):
                    target[j] = original[j]
                target[length:] = 0
            _fill_crop(
                crops[i], window, line[:padded_length], line, exact, first_rows, fixed_rows,
                first_columns, fixed_columns, first_values, spread, narrow, sums, num_columns, top,
                bottom, left, right, flips[i] != 0, cubic,
            )  # fmt: skip
        else:
            # A copy, since rows far apart in memory are read slowly, and each more than once.
            raw_window = bytes_[: num_rows * length].reshape(num_rows, length)
            for y in range(num_rows):
                original, target = image[y * image_stride :], raw_window[y]
                for j in range(length):
                    target[j] = original[j]
            _fill_crop(
                crops[i], raw_window, line[:length], line, exact, first_rows, fixed_rows,
                first_columns, fixed_columns, first_values, spread, narrow, sums, num_columns, top,
                bottom, left, right, flips[i] != 0, cubic,
            )  # fmt: skip


@kernel
def _memory_for(size: int, height: int, width: int, cubic: bool) -> Any:
    """Memory for one image's crop after the other, of images that are no larger than these.

    That is exact, first_rows, fixed_rows, first_columns and fixed_columns (see `_weigh`),
    first_values and spread (see `_spread_taps`), narrow (uint8 rows of the crop's width: one, or
    for the cubic filter as many as the image has) and sums (a line of the crop).
    """
    reach = 4.0 if cubic else 2.0
    # No region needs more, nor an image that is shown whole: 1.5 pixels may be rounded to 1.
    taps = np.int64(1.5 * reach * max(max(height, width) / size, 1.0)) + 2
    groups = -(-size // _PIXELS)
    return (
        np.empty(size * taps, np.float64),
        np.empty(size, np.int64),
        np.empty(size * taps, np.int32),
        np.empty(size, np.int64),
        np.empty(size * taps, np.int32),
        np.zeros(groups * _PIXELS, np.int64),
        np.zeros(groups * ((taps + 1) // 2) * _PIXELS * _VALUES, np.int16),
        # with the bytes that vectors write after a line
        np.empty((height if cubic else 1, (groups * _CHANNELS + 1) * _PIXELS), np.uint8),
        np.empty(size * _CHANNELS, np.float32),
    )


@kernel(inline="always")
def _fill_crop(
    out: Any, rows: Any, line: Any, padded_line: Any, exact: Any, first_rows: Any,
    fixed_rows: Any, first_columns: Any, fixed_columns: Any, first_values: Any, spread: Any,
    narrow: Any, sums: Any, width: int, top: Any, bottom: Any, left: Any, right: Any, flip: bool,
    cubic: bool,
) -> None:  # fmt: skip
    """Fills a crop with the region of an image whose rows [h l], uint8 or uint16, are given.

    `line` is uint16 memory for one row [l], `padded_line` that and what vectors read after it.
    """
    size = out.shape[0]
    # numbers as int64, or Numba compiles `_weigh` for each of them
    row_taps, row_places = _weigh(
        exact, first_rows, fixed_rows, rows.shape[0], top, bottom, np.int64(16),
        np.int64(_ROW_PLACES), cubic,
    )  # fmt: skip
    column_taps, column_places = _weigh(
        exact, first_columns, fixed_columns, width, left, right, np.int64(15),
        np.int64(_COLUMN_PLACES), cubic,
    )  # fmt: skip
    row_weights = fixed_rows[: size * row_taps].reshape(size, row_taps)
    column_weights = fixed_columns[: size * column_taps].reshape(size, column_taps)
    columns = _spread_taps(first_values, spread, first_columns, column_weights, flip)
    if cubic:
        _fill_in_two_passes(
            out, rows, line, padded_line, first_rows, row_weights, row_places, first_values,
            columns, column_places, narrow, sums,
        )  # fmt: skip
    else:
        # levels are lifted so that a product of 32 bits has a value of the line in its upper half
        _fill_in_one_pass(
            out, rows, _ROW_PLACES - row_places, line, padded_line, first_rows, row_weights,
            first_values, columns, column_places, narrow,
        )  # fmt: skip


# Arrays come here one by one: in tuples they cost Numba atomic counts up and down, 5 % of the time
# for images of 32 pixels. In the loops below there are neither calls nor parts of arrays, for the
# same counts, which for a short line take five times as long as the line. Even one inlined function
# for the sums of rows in both takes 1.4 times as long for images of 32 pixels. Nor are places
# added up in an index: Numba allows for negative ones, and no such loop is vectorised (cubic then
# takes 4 times as long).


@kernel(error_model="numpy")
def _fill_in_one_pass(
    out: Any, rows: Any, lift: int, line: Any, padded_line: Any, first_rows: Any,
    row_weights: Any, first_values: Any, columns: Any, column_places: int, narrow: Any,
) -> None:  # fmt: skip
    """Rows are added up to one line, which is filtered to pixels."""
    size = out.shape[0]
    num_taps = row_weights.shape[1]
    length = line.size
    pixels = out.reshape(-1)
    spare = narrow.reshape(-1)
    places = _LINE_PLACES + column_places
    for y in range(size):
        first = first_rows[y]
        if length < _LINE:
            for j in range(length):
                halves, total = num_taps // 2, np.int64(1 << 15)
                for t in range(num_taps):
                    product = (np.int64(rows[first + t, j]) << lift) * np.int64(row_weights[y, t])
                    halves += product >> 16
                    total += product
                line[j] = halves if num_taps <= _FEW_TAPS else total >> 16
        else:
            for j in range(0, length - _LINE + 1, _LINE):
                _add_rows(line, rows, first, j, row_weights, y, lift)
            if length % _LINE:  # the last vector overlaps the one before
                _add_rows(line, rows, first, length - _LINE, row_weights, y, lift)
        # Vectors write beyond the ends of lines: that is overwritten by the next line or, at the
        # crop's end, falls into a spare one.
        start = y * size * _CHANNELS
        if start + spare.size <= pixels.size:
            _filter_line(pixels, start, padded_line, first_values, columns, places)
        else:
            _filter_line(spare, 0, padded_line, first_values, columns, places)
            for j in range(size * _CHANNELS):
                pixels[start + j] = spare[j]


@kernel(fastmath={"contract"}, error_model="numpy")
def _fill_in_two_passes(
    out: Any, rows: Any, line: Any, padded_line: Any, first_rows: Any, row_weights: Any,
    row_places: int, first_values: Any, columns: Any, column_places: int, narrow: Any, sums: Any,
) -> None:  # fmt: skip
    """Resamples as torchvision does a uint8 tensor: columns first, then rows.

    A cubic filter overshoots at edges, and torchvision clips and rounds between its passes: on
    noise, one pass was up to 24 levels away from it; two are equal to it in all but 3 of 36 million
    values, which are one level away. Two passes take 1.3 to 1.6 times as long as one.
    """
    size = out.shape[0]
    num_taps = row_weights.shape[1]
    low, high = first_rows[0], first_rows[size - 1] + num_taps
    bytes_ = narrow.reshape(-1)
    stride = narrow.shape[1]
    for y in range(low, high):
        for j in range(line.size):
            line[j] = np.uint16(rows[y, j])
        start = (y - low) * stride
        _filter_line(bytes_, start, padded_line, first_values, columns, column_places)
    width = size * _CHANNELS
    lines = out.reshape(size, width)
    # Sums of such weights times levels are exact in float32 unless an image shrinks by so much
    # that they have more than 16 places; then the last bit may be lost.
    unit = 0.5**row_places
    for y in range(size):
        first = first_rows[y] - low
        a = np.float32(row_weights[y, 0] * unit)
        for j in range(width):
            sums[j] = a * np.float32(narrow[first, j])
        for t in range(1, num_taps - 1, 2):
            a, b = np.float32(row_weights[y, t] * unit), np.float32(row_weights[y, t + 1] * unit)
            row = first + t
            for j in range(width):
                sums[j] += a * np.float32(narrow[row, j]) + b * np.float32(narrow[row + 1, j])
        if num_taps % 2 == 0:
            a = np.float32(row_weights[y, num_taps - 1] * unit)
            row = first + num_taps - 1
            for j in range(width):
                sums[j] += a * np.float32(narrow[row, j])
        for j in range(width):
            rounded = sums[j] + np.float32(0.5)
            lines[y, j] = np.uint8(min(max(rounded, np.float32(0.0)), np.float32(255.0)))


@kernel(error_model="numpy")
def _weigh(
    exact: Any,
    first: Any,
    memory: Any,
    length: Any,
    start: Any,
    end: Any,
    bits: Any,
    most_places: Any,
    cubic: bool,
) -> tuple[int, int]:
    """Finds, weighs and rounds the input rows or columns (taps) of every output position.

    All have the same number of taps, some of weight 0: a loop whose length changed from pixel to
    pixel would be mispredicted at every second one. Each weight is rounded by itself for the cubic
    filter, as torchvision's uint8 kernels do it; for the other, with what was lost of the one
    before, so that all of a pixel come to 1 and an even image stays as it is.

    Writes to `first` int64 [size] the first input position of every output position, and to
    `memory` int32 its weights [size taps], which are below 2**bits and have up to `most_places`
    binary places (15 and 22 for the cubic filter, as in torchvision). `length` are the rows or
    columns of the image. Returns the number of taps of a position, and of places of the weights.
    """
    size = first.size
    scale = (end - start) / size
    support = max(scale, 1.0) * (2.0 if cubic else 1.0)
    taps: Any = 0
    for i in range(size):
        center = start + (i + 0.5) * scale
        low = max(np.int64(center - support + 0.5), 0)
        high = min(np.int64(center + support + 0.5), length)
        first[i] = low
        taps = max(taps, high - low)
    weights = exact[: size * taps].reshape(size, taps)
    largest = 0.0
    narrowing = 1.0 / max(scale, 1.0)  # multiplied by, as torchvision does: rounding may hang on it
    for i in range(size):
        first[i] = min(first[i], length - taps)
        center = start + (i + 0.5) * scale
        if center < 0.0 or center > length:  # no pixel of the image
            for t in range(taps):
                weights[i, t] = 0.0
            continue
        total = 0.0
        for t in range(taps):
            distance = abs((first[i] + t - center + 0.5) * narrowing)
            weight = _cubic(distance) if cubic else max(1.0 - distance, 0.0)
            weights[i, t] = weight
            total += weight
        for t in range(taps):
            weights[i, t] /= total
            largest = max(largest, weights[i, t])
    limit = 1 << (15 if cubic else bits)
    rounding = 0.5 if cubic else 1.0
    places = 0
    while places < (22 if cubic else most_places) and (
        np.int64(rounding + largest * 2.0 ** (places + 1)) < limit
    ):
        places += 1
    unit = 2.0**places
    fixed = memory[: size * taps].reshape(size, taps)
    for i in range(size):
        lost = 0.0
        for t in range(taps):
            weight = weights[i, t] * unit + lost
            fixed[i, t] = np.int32(weight + (0.5 if weight >= 0 else -0.5))
            if not cubic:
                lost = weight - fixed[i, t]
    return taps, places


@kernel(inline="always")
def _cubic(x: float) -> float:
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@kernel(error_model="numpy")
def _spread_taps(first_values: Any, memory: Any, first: Any, weights: Any, flip: bool) -> Any:
    """Lays out columns' weights as `_filter_line` takes them, in the order of the crop's pixels.

    Fills `first_values` [n], n a multiple of 4, and returns weights int16 [n/4 pairs 32] in
    `memory`: of four pixels, those of two taps next to each other, for each channel, and two that
    mean nothing.
    """
    size, taps = weights.shape
    groups, pairs = first_values.size // _PIXELS, (taps + 1) // 2
    spread = memory[: groups * pairs * _PIXELS * _VALUES].reshape(groups, pairs, _PIXELS * _VALUES)
    spread[groups - 1] = 0
    for x in range(size):
        column = size - 1 - x if flip else x
        first_values[x] = first[column] * _CHANNELS
        at = x % _PIXELS * _VALUES
        for t in range(2 * pairs):
            weight = np.int16(weights[column, t] if t < taps else 0)
            for c in range(_CHANNELS):
                spread[x // _PIXELS, t // 2, at + 2 * c + t % 2] = weight
    return spread


def _define_add_rows(
    typing_context: Any, line: Any, rows: Any, first: Any, column: Any, weights: Any, y: Any,
    lift: Any,
) -> Any:  # fmt: skip
    """32 values of a line from `column` on: weighted sums of the rows from `first` on.

    Of few taps the upper halves of products are added up, and what the lower halves, which are
    dropped, come to on the average: at most 1/16 of a level is lost. Of many taps the products are
    added up whole. Spelt out since Numba multiplies in 64 bits and no compiler finds the
    instruction that gives the upper halves of products of 16 bits.
    """
    short, long = (ir.VectorType(ir.IntType(bits), _LINE) for bits in (16, 32))
    is_wide = rows.dtype == types.uint16
    loaded = short if is_wide else ir.VectorType(ir.IntType(8), _LINE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, rows, weights = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 4)
        )
        first, column, y = arguments[2], arguments[3], arguments[5]
        lift = repeat(builder, builder.trunc(arguments[6], ir.IntType(16)), _LINE)
        length = builder.extract_value(rows.shape, 1)
        taps = builder.extract_value(weights.shape, 1)
        few = builder.icmp_signed("<=", taps, ir.IntType(64)(_FEW_TAPS))
        upper_half = ir.Constant(long, [16] * _LINE)

        def products_of(tap: Any) -> Any:
            place = builder.add(builder.mul(builder.add(first, tap), length), column)
            levels = load(builder, rows.data, place, loaded, align=1)
            if not is_wide:
                levels = builder.zext(levels, short)
            levels = builder.zext(builder.shl(levels, lift), long)
            place = builder.add(builder.mul(y, taps), tap)
            weight = builder.load(builder.gep(weights.data, [place]))
            factors = repeat(builder, builder.trunc(weight, ir.IntType(16)), _LINE)
            return builder.mul(levels, builder.zext(factors, long))

        def store(values: Any) -> None:
            place = builder.bitcast(builder.gep(line.data, [column]), short.as_pointer())
            builder.store(values, place, align=2)

        with builder.if_else(few) as (is_few, is_many):
            with is_few:
                rest = builder.trunc(builder.lshr(taps, ir.IntType(64)(1)), ir.IntType(16))
                total_place = cgutils.alloca_once(builder, short)
                builder.store(repeat(builder, rest, _LINE), total_place)
                with cgutils.for_range(builder, taps) as loop:
                    upper = builder.lshr(products_of(loop.index), upper_half)
                    added = builder.add(builder.load(total_place), builder.trunc(upper, short))
                    builder.store(added, total_place)
                store(builder.load(total_place))
            with is_many:
                total_place = cgutils.alloca_once(builder, long)
                builder.store(ir.Constant(long, [1 << 15] * _LINE), total_place)
                with cgutils.for_range(builder, taps) as loop:
                    added = builder.add(builder.load(total_place), products_of(loop.index))
                    builder.store(added, total_place)
                upper = builder.lshr(builder.load(total_place), upper_half)
                store(builder.trunc(upper, short))
        return context.get_dummy_value()

    whole = types.int64
    return types.void(line, rows, whole, whole, weights, whole, whole), generate


_add_rows: Any = intrinsic(_define_add_rows)


def _define_filter_line(
    typing_context: Any, pixels: Any, start: Any, line: Any, first_values: Any, weights: Any,
    places: Any,
) -> Any:  # fmt: skip
    """Pixels of three channels: the weighted sums of `line`, rounded and clipped.

    They go to `pixels` from `start` on, four at a time, with four bytes after the last that mean
    nothing. `places` are those of line and weights together, to be rounded away.

    Vector instructions are spelt out because no compiler finds them: for each pair of taps four
    loads of two pixels make a vector, whose values are brought beside those that they are added to;
    then one instruction multiplies and adds. Of the four sums of a pixel the last means nothing and
    is dropped at the end. LLVM makes of it what the processor has.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, line, first_values, weights = (
            context.make_array(signature.args[i])(context, builder, arguments[i])
            for i in (0, 2, 3, 4)
        )
        target = builder.gep(pixels.data, [arguments[1]])
        num_groups, num_pairs = (builder.extract_value(weights.shape, i) for i in (0, 1))
        shift = repeat(builder, builder.trunc(arguments[5], ir.IntType(32)), 16)
        one = ir.Constant(_SUMS, [1] * 16)
        half = builder.lshr(builder.shl(one, shift), one)

        def products_of(group: Any, firsts: list[Any], pair: Any, count: Any) -> Any:
            """Sums of products of two taps, for each channel of four pixels."""
            done = builder.mul(pair, _INDEX(2 * _CHANNELS))
            a, b, c, d = (
                load(builder, line.data, builder.add(first, done), _EIGHT_SHORT) for first in firsts
            )
            ab, cd = (_shuffle(builder, *two, list(range(16))) for two in ((a, b), (c, d)))
            # red, green and blue of two pixels, each beside its fellow, and two values left over
            beside = [8 * i + j for i in range(4) for j in (0, 3, 1, 4, 2, 5, 6, 7)]
            row = builder.mul(builder.add(builder.mul(group, count), pair), _INDEX(32))
            factors = load(builder, weights.data, row, _ALL_SHORT)
            return _multiply_pairs(context, builder, _shuffle(builder, ab, cd, beside), factors)

        def filter_groups(known_pairs: int | None) -> None:
            """All groups of a line; without an inner loop if the number of pairs is known."""
            with cgutils.for_range(builder, num_groups) as groups_loop:
                group = groups_loop.index
                x = builder.mul(group, _INDEX(_PIXELS))
                firsts = [
                    builder.load(builder.gep(first_values.data, [builder.add(x, _INDEX(i))]))
                    for i in range(_PIXELS)
                ]
                total = half
                if known_pairs is None:
                    total_place = cgutils.alloca_once_value(builder, half)
                    builder.store(half, total_place)
                    with cgutils.for_range(builder, num_pairs) as loop:
                        products = products_of(group, firsts, loop.index, num_pairs)
                        builder.store(builder.add(builder.load(total_place), products), total_place)
                    total = builder.load(total_place)
                for pair in range(known_pairs or 0):
                    products = products_of(group, firsts, _INDEX(pair), _INDEX(known_pairs))
                    total = builder.add(total, products)
                levels = _levels_of(builder, builder.ashr(total, shift))
                place = builder.gep(target, [builder.mul(x, _INDEX(_CHANNELS))])
                builder.store(levels, builder.bitcast(place, levels.type.as_pointer()), align=1)

        one_pair, two_pairs = (
            builder.icmp_signed("==", num_pairs, _INDEX(known)) for known in (1, 2)
        )
        with builder.if_else(one_pair) as (is_one, is_more):
            with is_one:
                filter_groups(1)
            with is_more, builder.if_else(two_pairs) as (is_two, is_other):
                with is_two:
                    filter_groups(2)
                with is_other:
                    filter_groups(None)
        return context.get_dummy_value()

    arguments = pixels, types.int64, line, first_values, weights, types.int64
    return types.void(*arguments), generate


_filter_line: Any = intrinsic(_define_filter_line)


def _levels_of(builder: Any, sums: Any) -> Any:
    """Bytes of four pixels, and four that mean nothing."""
    zero, most = (ir.Constant(_SUMS, [bound] * 16) for bound in (0, 255))
    levels = builder.select(builder.icmp_signed("<", sums, zero), zero, sums)
    levels = builder.select(builder.icmp_signed(">", levels, most), most, levels)
    levels = builder.trunc(levels, ir.VectorType(ir.IntType(8), 16))
    kept = [_LANES * i + c for i in range(_PIXELS) for c in range(_CHANNELS)]
    return _shuffle(builder, levels, levels, kept + kept[:4])


def _multiply_pairs(context: Any, builder: Any, values: Any, factors: Any) -> Any:
    """Sums of the products of neighbours, int32 [16], of two times int16 [32].

    x86 has one instruction for it, which LLVM does not find; Numba says what it compiles for.
    """
    features = context.codegen().magic_tuple()[2].split(",")
    width = 32 if "+avx512bw" in features else 16 if "+avx2" in features else 0
    if not width:
        even, odd = list(range(0, 32, 2)), list(range(1, 32, 2))
        products = [
            builder.mul(
                builder.sext(_shuffle(builder, values, values, lanes), _SUMS),
                builder.sext(_shuffle(builder, factors, factors, lanes), _SUMS),
            )
            for lanes in (even, odd)
        ]
        return builder.add(*products)
    name = "llvm.x86.avx512.pmaddw.d.512" if width == 32 else "llvm.x86.avx2.pmadd.wd"
    kind = ir.FunctionType(
        ir.VectorType(ir.IntType(32), width // 2), [ir.VectorType(ir.IntType(16), width)] * 2
    )
    multiply = cgutils.get_or_insert_function(builder.module, kind, name)
    parts = []
    for begin in range(0, 32, width):
        lanes = list(range(begin, begin + width))
        parts.append(
            builder.call(multiply, [_shuffle(builder, v, v, lanes) for v in (values, factors)])
        )
    return parts[0] if width == 32 else _shuffle(builder, parts[0], parts[1], list(range(16)))


def repeat(builder: Any, value: Any, count: int) -> Any:
    """A vector that repeats one number."""
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, one, one, [0] * count)


def load(builder: Any, data: Any, offset: Any, kind: Any, align: int = 2) -> Any:
    """A vector of a kind from `data` on, `offset` elements after its beginning."""
    pointer = builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())
    return builder.load(pointer, align=align)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)
