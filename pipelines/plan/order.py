"""In which order samples are visited, as closed formulas: no state, no array of all samples.

Two questions are answered for any slot of any step in constant time. Which sample is visit number
`q` of a pass? A keyed permutation says so (`permute`). Which source does global slot `g` belong
to, and how many slots did that source have before? Fixed shares say so (`assign_sources`).
This module knows neither images nor texts; plan.py puts the answers together.
"""

from __future__ import annotations

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
_MAX_SIZE = 1 << 48
# Keeps remainder * share below 2**62 in the closed formula of `_count_before`.
_MAX_TOTAL_SHARE = 1 << 31


def permute(index: Int64Array, *, size: int, key: int) -> Int64Array:
    """Images of `index` under the permutation of [0, size) that `key` stands for.

    A Feistel network (Luby and Rackoff 1988) permutes a power of four that is not below `size`; a
    value that falls outside is permuted again until it is inside ("cycle walking", Black and
    Rogaway 2002), fewer than four times on average (more below 64 elements).

    Args:
        index: int64 of any shape, each in [0, size).
        size: number of elements, at least 1.
        key: 64-bit key, as from `fold_key`.

    Returns:
        int64 of the shape of `index`.
    """
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"a permutation needs 1 to 2**48 elements, not {size}")
    # At least 64 elements are permuted: with fewer, eight rounds do not reach all orders evenly
    # (chi-square over the 24 orders of 4 elements: 14 deviations too high on 16, none on 64).
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    flat = np.ascontiguousarray(index, dtype=np.int64).reshape(-1)
    result: Int64Array = _permute(flat, np.uint64(size), np.uint64(half_bits), np.uint64(key))
    return result.reshape(index.shape)


@kernel
def _permute(index: Any, size: Any, half_bits: Any, key: Any) -> Any:
    """Many at once, round by round; values outside go around together until none is left.

    The rounds of one value wait for each other, those of several do not, and fit into vectors.
    """
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = np.empty(index.size, np.uint64)
    outside = np.empty(index.size, np.int64)
    left, right = np.empty(_AT_ONCE, np.uint64), np.empty(_AT_ONCE, np.uint64)
    for i in range(index.size):
        values[i], outside[i] = np.uint64(index[i]), i
    num_outside = index.size
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
        kept = 0
        for i in range(num_outside):
            outside[kept] = outside[i]
            kept += np.int64(values[outside[i]] >= size)
        num_outside = kept
    return values.view(np.int64)


PIECES_OF_A_WINDOW = 16


def permute_in_windows(index: Int64Array, *, size: int, window: int, key: int) -> Int64Array:
    """As `permute`, but whatever comes close together lies in few places of storage.

    [0, size) is cut into pieces of `window` / 16 neighbours. The pieces are permuted; 16 of them
    that then follow each other are a window (fewer where windows are to be of nearly equal size),
    and the elements of a window are permuted. So while one window is gone through, all of it and
    nothing else is needed. Packing has shuffled the samples, so which ones are neighbours means
    nothing; with each key other pieces meet.

    Args:
        index: int64 of any shape, each in [0, size).
        size: number of elements, at least 1.
        window: most elements of a window; with `size` or more of them it is one `permute`.
        key: 64-bit key, as from `fold_key`.
    """
    if window >= size:
        return permute(index, size=size, key=key)
    piece = -(-window // PIECES_OF_A_WINDOW)
    pieces, firsts, edges = _windows(size, piece, max(1, window // piece), key)
    flat = np.ascontiguousarray(index, dtype=np.int64).reshape(-1)
    windows = np.searchsorted(edges, flat, side="right") - 1
    places = np.empty_like(flat)
    for number in np.unique(windows).tolist():
        mine = windows == number
        start, end = int(edges[number]), int(edges[number + 1])
        within = permute(flat[mine] - start, size=end - start, key=fold_key(key, number))
        places[mine] = start + within
    which = np.searchsorted(firsts, places, side="right") - 1
    result: Int64Array = pieces[which] * piece + (places - firsts[which])
    return result.reshape(index.shape)


@functools.lru_cache(maxsize=16)
def _windows(
    size: int, piece: int, most: int, key: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The pieces in their order, the place where each begins, and where the windows do.

    The last of the edges is the end of all. Some 10 bytes for each piece, kept for a few passes.
    """
    num_pieces = -(-size // piece)
    pieces = permute(np.arange(num_pieces, dtype=np.int64), size=num_pieces, key=fold_key(key, -1))
    lengths = np.minimum(piece, size - pieces * piece)
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    num_windows = -(-num_pieces // most)
    edges = firsts[np.arange(num_windows + 1) * num_pieces // num_windows]
    return pieces, firsts[:-1], edges


def integer_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """Positive integers in the proportion of `shares`, which need not sum to anything.

    Fractions of small denominators and sample counts are kept exactly; what would not fit is
    rounded to a billionth of the whole.

    Raises:
        ValueError: a share that is not a positive finite number, or is below a billionth.
    """
    if not shares:
        raise ValueError("there must be at least one source of samples")
    for share in shares:
        if not (math.isfinite(share) and share > 0):
            raise ValueError(
                f"shares must be positive numbers, not {share}; leave out a source that is unused"
            )
    exact = [_small_fraction(share) for share in shares]
    denominator = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * denominator) for fraction in exact]
    divisor = math.gcd(*whole)
    whole = [part // divisor for part in whole]
    if sum(whole) > _MAX_TOTAL_SHARE:
        total = sum(exact)
        whole = [round(fraction * (1 << 30) / total) for fraction in exact]
    if min(whole) < 1:
        raise ValueError(
            f"a source's share of {min(shares)} beside {max(shares)} is less than a billionth of "
            "the whole; leave it out or give it more"
        )
    return tuple(whole)


def _small_fraction(share: float) -> Fraction:
    """The fraction that was meant: 0.1 becomes 1/10; a float that is no such fraction stays."""
    exact = Fraction(share)
    small = exact.limit_denominator(1_000_000)
    return small if abs(small - exact) <= exact * Fraction(1, 10**12) else exact


def assign_sources(
    global_index: Int64Array, shares: tuple[int, ...]
) -> tuple[NDArray[np.int32], Int64Array]:
    """Which source each global slot belongs to, and which visit of that source it is.

    Slots are numbered through the whole run (step * n + slot). Source 0 takes a slot when its
    rounded quota of all slots so far rises there; the slots it leaves are numbered anew and split
    among the others in the same way. So a source's slots lie evenly, and its count after any
    number of slots differs from the exact share by half a sample for one or two sources, and by
    less than half a sample more for each further one.

    Args:
        global_index: int64, global slot numbers, not negative.
        shares: integers from `integer_shares`.

    Returns:
        int32 source ids, and int64 numbers of the slots that source had before.
    """
    global_index = np.ascontiguousarray(global_index, dtype=np.int64)
    if len(shares) == 1:
        return np.zeros(global_index.shape, dtype=np.int32), global_index.copy()
    source_ids, draws = _assign_sources(global_index, np.asarray(shares, dtype=np.int64))
    return source_ids, draws


def draws_before(slot: int, shares: tuple[int, ...]) -> list[int]:
    """How many of the global slots [0, slot) each source has: what `assign_sources` comes to."""
    draws, total = [], sum(shares)
    for share in shares:
        draws.append(int(_count_before(slot, share, total)))
        slot -= draws[-1]
        total -= share
    return draws


@kernel(inline="always")
def _count_before(slot: Any, share: Any, total: Any) -> Any:
    """How many of the slots [0, slot) go to `share` of `total`: slot * share / total, rounded.

    Whole multiples of `total` are taken out first, so that no product leaves int64.
    """
    return (slot // total) * share + ((slot % total) * share + total // 2) // total


@kernel
def _assign_sources(global_index: Any, shares: Any) -> Any:
    source_ids = np.empty(global_index.size, np.int32)
    draws = np.empty(global_index.size, np.int64)
    for i in range(global_index.size):
        slot = global_index[i]
        total = shares.sum()
        for source in range(shares.size):
            before = _count_before(slot, shares[source], total)
            if _count_before(slot + 1, shares[source], total) > before:
                source_ids[i] = source
                draws[i] = before
                break
            slot -= before
            total -= shares[source]
    return source_ids, draws
