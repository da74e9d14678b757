"""The order of samples in closed formulas: no state, no array of all samples.

The draws of a run are numbered: step * n + global index, for global batches of n (in stages, from
the end of the one before). `assign_sources` says which source a draw uses, `permute` which sample.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import fold_key, random_bits

Int64Array = NDArray[np.int64]

_ROUNDS = 8
_AT_ONCE = 64
_PIECES_OF_A_SHUFFLE_WINDOW = 16
_MAX_SIZE = 1 << 48
# Keeps remainder * weight below 2**62 in the closed formula of `_count_before`.
_MAX_TOTAL_WEIGHT = 1 << 31


def permute(index: Int64Array, *, size: int, key: int) -> Int64Array:
    """Permuted positions of `index`: `key` chooses the permutation of [0, size).

    A Feistel network (Luby and Rackoff 1988) permutes a power of four that is not below `size`; a
    value that falls outside is permuted again until it is inside ("cycle walking", Black and
    Rogaway 2002). `index` is int64 of any shape, each in [0, size); `key` has 64 bits.
    """
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"a permutation needs 1 to 2**48 elements, not {size}")
    # At least 64 elements are permuted: with fewer, eight rounds do not reach all orders evenly
    # (chi-square over the 24 orders of 4 elements: 14 deviations too high on 16, none on 64).
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    flat = np.ascontiguousarray(index, dtype=np.int64).reshape(-1)
    result: Int64Array = permute_kernel(flat, np.uint64(size), np.uint64(half_bits), np.uint64(key))
    return result.reshape(index.shape)


@kernel
def permute_kernel(index: Any, size: Any, half_bits: Any, key: Any) -> Any:
    """`permute` of many [n], round by round, so that several values fit into vectors."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = np.empty(index.size, np.uint64)
    outside = np.empty(index.size, np.int64)
    left, right = np.empty(_AT_ONCE, np.uint64), np.empty(_AT_ONCE, np.uint64)
    for i in range(index.size):
        values[i], outside[i] = np.uint64(index[i]), i
    num_outside: Any = index.size
    while num_outside:
        for start in range(0, num_outside, _AT_ONCE):
            count = min(_AT_ONCE, num_outside - start)
            for i in range(count):
                value = values[outside[start + i]]
                left[i], right[i] = value >> half_bits, value & mask
            for step in range(_ROUNDS):
                for i in range(count):
                    counter = (np.uint64(step) << np.uint64(32)) | right[i]
                    mixed = left[i] ^ (random_bits(key, counter) & mask)
                    left[i], right[i] = right[i], mixed
            for i in range(count):
                values[outside[start + i]] = (left[i] << half_bits) | right[i]
        kept: Any = 0
        for i in range(num_outside):
            outside[kept] = outside[i]
            kept += np.int64(values[outside[i]] >= size)
        num_outside = kept
    return values.view(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleGroups:
    """Groups of neighbouring global indices; each group uses its own part of every shuffle window.

    Ranks have ranges of global indices, so a machine needs the parts of its own groups and little
    else of a window, for any number of ranks. A group's part holds as many samples as it has
    draws from the window.
    """

    count: int
    """Groups of a global batch; see `shuffle_groups_of`."""
    global_batch_size: int
    weights: tuple[int, ...]
    """All sources' weights, from `integer_weights`."""
    source: int


def shuffle_groups_of(
    count: int, *, global_batch_size: int, weights: tuple[int, ...], source: int
) -> ShuffleGroups | None:
    """Groups of one source: `count`, halved until each has a draw; None if one is left."""
    draws = global_batch_size * weights[source] // sum(weights)
    while count > max(1, draws):
        count //= 2
    if count == 1:
        return None
    return ShuffleGroups(
        count=count, global_batch_size=global_batch_size, weights=weights, source=source
    )


def permute_in_shuffle_windows(
    index: Int64Array,
    *,
    size: int,
    window: int,
    key: int,
    groups: ShuffleGroups | None = None,
    epoch: int = 0,
    draws: Int64Array | None = None,
) -> Int64Array:
    """Permutes as `permute`, but positions that are close together need little of the storage.

    [0, size) is cut into pieces of `window` / 16 neighbours, and the pieces are permuted. 16 pieces
    that then follow each other are a shuffle window (fewer where windows are to be of nearly equal
    size), of at most `window` elements. So all draws from one shuffle window need its pieces and
    nothing else. Packing has shuffled the samples, or in place the files of samples.

    Without `groups` the elements of a window are permuted. With them the window is cut into a part
    for each group, beginning anywhere in it, and each part is permuted. Two samples of a window
    come into the same batch as often either way if they are of different parts, and (c - 1) / c
    times as often if a batch takes c samples of their part. `groups` needs the `epoch` that `index`
    [b] is of, and the number of each draw [b] among those of all sources.
    """
    if window >= size and groups is None:
        return permute(index, size=size, key=key)
    piece = -(-min(window, size) // _PIECES_OF_A_SHUFFLE_WINDOW)
    pieces, firsts, edges = _shuffle_windows(size, piece, max(1, window // piece), key)
    flat = np.ascontiguousarray(index, dtype=np.int64).reshape(-1)
    windows = np.searchsorted(edges, flat, side="right") - 1
    permuted = np.empty_like(flat)
    for number in np.unique(windows).tolist():
        mine = windows == number
        start, end = int(edges[number]), int(edges[number + 1])
        window_key = fold_key(key, number)
        if groups is None:
            within = permute(flat[mine] - start, size=end - start, key=window_key)
        else:
            assert draws is not None
            first = epoch * size + start
            table = _group_table(groups, first, first + end - start)
            within = _permute_in_groups(
                flat[mine] - start, draws[mine], groups.global_batch_size, *table,
                np.uint64(window_key),
            )  # fmt: skip
        permuted[mine] = start + within
    which = np.searchsorted(firsts, permuted, side="right") - 1
    result: Int64Array = pieces[which] * piece + (permuted - firsts[which])
    return result.reshape(index.shape)


@functools.lru_cache(maxsize=32)
def _group_table(
    groups: ShuffleGroups, first: int, end: int
) -> tuple[int, NDArray[np.int32], Int64Array]:
    """Numbers the draws [first, end) of a source, one shuffle window, within each group.

    Returns the step of the first draw, what is to be added to a draw's position in the window to
    have its number in its group [steps groups], and the group's edges in the window [groups + 1].
    """
    size, weights, source = groups.global_batch_size, groups.weights, groups.source
    first_step, last_step = (
        _draw_of_source(draw, weights, source) // size for draw in (first, end - 1)
    )
    steps = np.arange(first_step, last_step + 1, dtype=np.int64)
    firsts = np.arange(groups.count + 1, dtype=np.int64) * size // groups.count
    ends = (steps[:, None] * size + firsts).reshape(-1)
    before = _draws_of_source_before(ends, np.asarray(weights, dtype=np.int64), source)
    before = before.reshape(len(steps), -1).clip(first, end) - first
    counts = np.diff(before, axis=1)
    offsets = (np.cumsum(counts, axis=0) - counts - before[:, :-1]).astype(np.int32)
    return first_step, offsets, np.concatenate([[0], np.cumsum(counts.sum(axis=0))])


@kernel
def _permute_in_groups(
    positions: Any, draws: Any, batch_size: Any, first_step: Any, offsets: Any, edges: Any, key: Any
) -> Any:
    """Permutes positions in a shuffle window within their groups' parts; see `_group_table`."""
    numbers = np.empty(positions.size, np.int64)
    found = np.empty(positions.size, np.int64)
    num_groups, window = offsets.shape[1], edges[-1]
    for i in range(positions.size):
        step = draws[i] // batch_size
        global_index = draws[i] - step * batch_size
        group = ((global_index + 1) * num_groups - 1) // batch_size
        numbers[i] = positions[i] + offsets[step - first_step, group]
        found[i] = group
    rotation = random_bits(key, num_groups) % np.uint64(window)
    start = 0
    while start < positions.size:
        group, end = found[start], start + 1
        while end < positions.size and found[end] == group:
            end += 1
        size, half_bits = edges[group + 1] - edges[group], 3
        while np.int64(1) << (2 * half_bits) < size:
            half_bits += 1
        part = permute_kernel(
            numbers[start:end], np.uint64(size), np.uint64(half_bits), random_bits(key, group)
        )
        for i in range(start, end):
            place = edges[group] + part[i - start] + np.int64(rotation)
            numbers[i] = place - window if place >= window else place
        start = end
    return numbers


@functools.lru_cache(maxsize=16)
def _shuffle_windows(
    size: int, piece: int, most: int, key: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Permuted pieces, the position at which each begins, and the edges of the shuffle windows."""
    num_pieces = -(-size // piece)
    pieces = permute(np.arange(num_pieces, dtype=np.int64), size=num_pieces, key=fold_key(key, -1))
    lengths = np.minimum(piece, size - pieces * piece)
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    num_windows = -(-num_pieces // most)
    edges = firsts[np.arange(num_windows + 1) * num_pieces // num_windows]
    return pieces, firsts[:-1], edges


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive integers in the proportion of `weights`, which need not sum to anything.

    Fractions of small denominators and sample counts are kept exactly; anything else is rounded
    to a billionth of the whole.

    Raises ValueError: a weight that is not a positive finite number, or is below a billionth.
    """
    if not weights:
        raise ValueError("there must be at least one source of samples")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weights must be positive numbers, not {weight}; leave out a source that is unused"
            )
    exact = [_small_fraction(weight) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * denominator) for fraction in exact]
    divisor = math.gcd(*whole)
    whole = [part // divisor for part in whole]
    if sum(whole) > _MAX_TOTAL_WEIGHT:
        total = sum(exact)
        whole = [round(fraction * (1 << 30) / total) for fraction in exact]
    if min(whole) < 1:
        raise ValueError(
            f"a source's weight of {min(weights)} beside {max(weights)} is less than a billionth "
            "of the whole; leave it out or give it more"
        )
    return tuple(whole)


def _small_fraction(weight: float) -> Fraction:
    """The fraction that was meant: 0.1 becomes 1/10; a float that is no such fraction stays."""
    exact = Fraction(weight)
    small = exact.limit_denominator(1_000_000)
    return small if abs(small - exact) <= exact * Fraction(1, 10**12) else exact


def assign_sources(
    draws: Int64Array, weights: tuple[int, ...]
) -> tuple[NDArray[np.int32], Int64Array]:
    """The source that each draw takes, and the number of that draw among the source's own.

    After k draws, source 0 should have had its weight times k of them, rounded: it gets the draws
    at which that number rises. The draws left over are numbered anew, and source 1 gets its part
    of them in the same way, and so on. So a source's draws are spread evenly, and its count differs
    from its exact quota by half a sample at most for each source but one.
    """
    draws = np.ascontiguousarray(draws, dtype=np.int64)
    if len(weights) == 1:
        return np.zeros(draws.shape, dtype=np.int32), draws.copy()
    source_ids, source_draws = _assign_sources(draws, np.asarray(weights, dtype=np.int64))
    return source_ids, source_draws


def draws_before(draw: int, weights: tuple[int, ...]) -> list[int]:
    """How many of the draws [0, draw) each source has: the totals of `assign_sources`."""
    counts, total = [], sum(weights)
    for weight in weights:
        counts.append(int(_count_before(draw, weight, total)))
        draw -= counts[-1]
        total -= weight
    return counts


def _draw_of_source(source_draw: int, weights: tuple[int, ...], source: int) -> int:
    """The draw in which a source has its draw number `source_draw`: undoes `assign_sources`."""
    total, weight = sum(weights), weights[source]
    # Counts are less than a draw a source away from the quota.
    slack = len(weights)
    low = max(0, (source_draw - slack) * total // weight)
    high = (source_draw + 1 + slack) * total // weight
    return low + bisect.bisect_left(
        range(low + 1, high + 1),
        source_draw + 1,
        key=lambda draw: draws_before(draw, weights)[source],
    )


@kernel(inline="always")
def _count_before(draw: Any, weight: Any, total: Any) -> Any:
    """How many of the draws [0, draw) `weight` of `total` gets: draw * weight / total, rounded."""
    # Whole multiples of `total` are taken out first, so that no product leaves int64.
    return (draw // total) * weight + ((draw % total) * weight + total // 2) // total


@kernel
def _draws_of_source_before(draws: Any, weights: Any, source: Any) -> Any:
    """`draws_before` of many, for one source: int64 [n]."""
    counts = np.empty(draws.size, np.int64)
    for i in range(draws.size):
        draw, total = draws[i], weights.sum()
        for one in range(source):
            draw -= _count_before(draw, weights[one], total)
            total -= weights[one]
        counts[i] = _count_before(draw, weights[source], total)
    return counts


@kernel
def _assign_sources(draws: Any, weights: Any) -> Any:
    source_ids = np.empty(draws.size, np.int32)
    source_draws = np.empty(draws.size, np.int64)
    for i in range(draws.size):
        draw = draws[i]
        total = weights.sum()
        for source in range(weights.size):
            before = _count_before(draw, weights[source], total)
            if _count_before(draw + 1, weights[source], total) > before:
                source_ids[i] = source
                source_draws[i] = before
                break
            draw -= before
            total -= weights[source]
    return source_ids, source_draws
