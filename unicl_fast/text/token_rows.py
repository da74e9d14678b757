"""Numba kernels on token rows: hashes, equal rows, merged classes.

Rows are uint16 [b, l], or uint32 for vocabularies beyond 65,536 tokens, C-contiguous; callers
check that. Zeros at the end of a row are padding: rows are equal, and have the same hash, if they
are equal after padding to the same length.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import mix64

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_INDEX_BITS = np.uint64(0xFFFFFFFF)


@functools.lru_cache(maxsize=16)
def position_factors(length: int) -> UInt64Array:
    """Odd random factors, one for each token of a row, for `hash_rows`."""
    counters = [np.uint64((number + 1) * _GOLDEN % 2**64) for number in range(length)]
    return np.array([mix64(one) | np.uint64(1) for one in counters], dtype=np.uint64)


@kernel
def hash_rows(rows: TokenArray, factors: UInt64Array) -> UInt64Array:
    """64-bit hashes of rows: mixed sums of pairs of tokens times their position's factor.

    A sum vectorises, unlike a chain, and padding adds nothing. Rows that differ in one pair never
    collide: factors are odd and pairs are below 2**32. 32-bit tokens are not paired.
    """
    num_rows, length = rows.shape
    num_pairs = length // 2
    hashes = np.empty(num_rows, np.uint64)
    for row in range(num_rows):
        total = np.uint64(0)
        if np.iinfo(rows.dtype).bits == 16:
            for pair in range(num_pairs):
                low, high = np.uint32(rows[row, 2 * pair]), np.uint32(rows[row, 2 * pair + 1])
                total += np.uint64(low | (high << np.uint32(16))) * factors[pair]
            if length % 2:
                total += np.uint64(rows[row, length - 1]) * factors[num_pairs]
        else:
            for position in range(length):
                total += np.uint64(rows[row, position]) * factors[position]
        hashes[row] = mix64(total)
    return hashes


@kernel(inline="always")
def _equal(left: Any, left_row: Any, right: Any, right_row: Any) -> Any:
    """Whether two rows are equal up to padding; no early exit, so that it vectorises."""
    common = min(left.shape[1], right.shape[1])
    difference = left.dtype.type(0)
    for position in range(common):
        difference |= left[left_row, position] ^ right[right_row, position]
    for position in range(common, left.shape[1]):
        difference |= left[left_row, position]
    for position in range(common, right.shape[1]):
        difference |= right[right_row, position]
    return difference == 0


@kernel
def make_table(capacity: int) -> UInt64Array:
    """An empty hash table for `capacity` rows: upper half of a hash, row number plus 1."""
    size = 16
    while size < 2 * capacity:
        size *= 2
    return np.zeros(size, np.uint64)


@kernel
def unique_rows(
    rows: TokenArray, hashes: UInt64Array, table: UInt64Array
) -> tuple[Int64Array, Int64Array, Int64Array, TokenArray, Int64Array]:
    """Finds equal rows; fills `table` with the distinct ones.

    Rows are grouped by hash and compared later, while the distinct ones are copied: comparing
    during the search stalls on memory. Only if rows then differ are they grouped again, comparing
    at once.

    Returns:
        first: int64 [u], where each distinct row occurs first, ascending.
        index: int64 [b], the distinct row of each row.
        counts: int64 [u].
        distinct: [u, l], rows[first].
        lengths: int64 [u], in tokens without padding.
    """
    for compare in (False, True):
        first, index, counts = _group_rows(rows, hashes, table, compare)
        agree, distinct, lengths = _take_rows(rows, index, first.size)
        if agree:
            break
        table[:] = 0
    return first, index, counts, distinct, lengths


@kernel
def _take_rows(
    rows: TokenArray, index: Int64Array, num_groups: int
) -> tuple[bool, TokenArray, Int64Array]:
    """The first row of each group and its length; and whether all rows equal their group's first.

    Each row is read once. Unsigned indices avoid a test at each token for counting from the end.
    """
    num_rows, length = rows.shape
    taken = np.empty((num_groups, length), rows.dtype)
    lengths = np.empty(num_groups, np.int64)
    agree = True
    num_taken = 0
    for row in range(num_rows):
        source, target = np.uint64(row), np.uint64(index[row])
        if index[row] == num_taken:  # the first of its group: groups are numbered in order
            # the largest position of a token, not the first from the end: this loop vectorises
            tokens = np.int32(0)
            for position in range(length):
                token = rows[source, np.uint64(position)]
                taken[target, np.uint64(position)] = token
                tokens = max(tokens, np.int32(position + 1) if token != 0 else np.int32(0))
            lengths[num_taken] = tokens
            num_taken += 1
        else:
            agree &= _equal(rows, source, taken, target)
    return agree, taken, lengths


@kernel
def _group_rows(
    rows: TokenArray, hashes: UInt64Array, table: UInt64Array, compare: bool
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Implements `unique_rows`; without `compare`, equal hashes count as equal rows."""
    num_rows = rows.shape[0]
    mask = np.uint64(table.shape[0] - 1)
    first = np.empty(num_rows, np.int64)
    index = np.empty(num_rows, np.int64)
    counts = np.zeros(num_rows, np.int64)
    num_unique = 0
    for row in range(num_rows):
        tag = hashes[row] & ~_INDEX_BITS
        position = hashes[row] & mask
        while True:
            entry = table[position]
            if entry == 0:
                table[position] = tag | np.uint64(num_unique + 1)
                first[num_unique] = row
                counts[num_unique] = 1
                index[row] = num_unique
                num_unique += 1
                break
            if (entry & ~_INDEX_BITS) == tag:
                known = np.int64(entry & _INDEX_BITS) - 1
                if not compare or _equal(rows, row, rows, first[known]):
                    index[row] = known
                    counts[known] += 1
                    break
            position = (position + np.uint64(1)) & mask
    return first[:num_unique].copy(), index, counts[:num_unique].copy()


@kernel
def find_rows(
    queries: TokenArray, hashes: UInt64Array, table: UInt64Array, known: TokenArray
) -> Int64Array:
    """int64 [k]: which `known` row each query equals, or -1; `unique_rows` filled `table`."""
    num_queries = queries.shape[0]
    mask = np.uint64(table.shape[0] - 1)
    found = np.full(num_queries, -1, np.int64)
    for query in range(num_queries):
        tag = hashes[query] & ~_INDEX_BITS
        position = hashes[query] & mask
        while table[position] != 0:
            entry = table[position]
            if (entry & ~_INDEX_BITS) == tag:
                candidate = np.int64(entry & _INDEX_BITS) - 1
                if _equal(queries, query, known, candidate):
                    found[query] = candidate
                    break
            position = (position + np.uint64(1)) & mask
    return found


def distinct_texts(*parts: TokenArray) -> TokenArray:
    """The distinct rows of texts [k l], padded with 0, by length and then by their tokens.

    Parts can be of different l; the result has the largest.
    """
    longest = max(one.shape[1] for one in parts)
    rows = np.concatenate([
        np.pad(np.asarray(one, np.uint32), ((0, 0), (0, longest - one.shape[1]))) for one in parts
    ])  # fmt: skip
    *_, distinct, lengths = unique_rows(rows, hashes_of(rows), make_table(len(rows)))
    order = np.lexsort((*distinct.T[::-1], lengths))
    return np.asarray(distinct[order])


def hashes_of(tokens: TokenArray) -> UInt64Array:
    """64-bit hashes of texts [k l], padded with 0, for any l and type.

    Of ten million texts, two have the same hash once in 400,000 such sets.
    """
    rows = np.ascontiguousarray(tokens, np.uint32)
    return np.asarray(hash_rows(rows, position_factors(rows.shape[1])))


def lengths_of(tokens: TokenArray) -> Int64Array:
    """The number of tokens int64 [k] of texts [k l], padded with 0."""
    ends = np.where(tokens, np.arange(1, tokens.shape[1] + 1), 0)
    return np.asarray(ends.max(axis=1, initial=0), np.int64)


@kernel
def union_find(pairs: Int64Array, num_members: int) -> Int64Array:
    """int64 [num_members]: the smallest member that the pairs [c, 2] connect each one with."""
    parent = np.arange(num_members)
    for pair in range(pairs.shape[0]):
        left, right = pairs[pair, 0], pairs[pair, 1]
        while parent[left] != left:
            parent[left] = parent[parent[left]]
            left = parent[left]
        while parent[right] != right:
            parent[right] = parent[parent[right]]
            right = parent[right]
        if left < right:
            parent[right] = left
        else:
            parent[left] = right
    for member in range(num_members):  # parents are smaller, so their roots are final
        parent[member] = parent[parent[member]]
    return parent


def merge_classes(pairs: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Merges classes by `pairs` of equal ones, int64 [c, 2].

    Returns:
        members: int64 [m], the distinct ids of `pairs`, ascending.
        merged: int64 [m], the smallest id that each is merged with.
    """
    members, positions = np.unique(pairs, return_inverse=True)
    return members, members[union_find(positions.reshape(pairs.shape), len(members))]


def replace_classes(class_ids: Int64Array, members: Int64Array, merged: Int64Array) -> Int64Array:
    """Replaces each of `class_ids` that is in `members` (ascending) by its `merged`."""
    if not len(members):
        return class_ids
    positions = np.minimum(np.searchsorted(members, class_ids), len(members) - 1)
    return np.where(members[positions] == class_ids, merged[positions], class_ids)
