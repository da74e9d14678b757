"""Order and weights: every sample once an epoch, every source its part, at any step."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.pipelines.plan.order import (
    ShuffleGroups,
    assign_sources,
    draws_before,
    integer_weights,
    permute,
    permute_in_shuffle_windows,
    shuffle_groups_of,
)
from unicl_fast.system.keyed_random import fold_key, random_bits


def feistel(index: int, *, size: int, key: int) -> int:
    """The definition, one value at a time."""
    half = max(3, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for step in range(8):
            mixed = int(random_bits(np.uint64(key), np.uint64(step << 32 | right)))
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 7, 64, 65, 1000, 2**48])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_the_permutation_is_its_definition_however_many_are_asked(size, count):
    """A resumed run must meet the order that it began with, whatever computes it."""
    index = np.arange(count) * 999_999_937 % size
    expected = [feistel(one, size=size, key=12345) for one in index.tolist()]
    assert permute(index, size=size, key=12345).tolist() == expected


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    image = permute(np.arange(size), size=size, key=key)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_tiny_set_are_equally_likely(size):
    tries = 8_000
    orders = Counter(
        tuple(permute(np.arange(size), size=size, key=fold_key(size, i)).tolist())
        for i in range(tries)
    )
    expected = tries / math.factorial(size)
    assert len(orders) == math.factorial(size)
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    freedom = math.factorial(size) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("size", [0, -1, 2**48 + 1])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=r"1 to 2\*\*48"):
        permute(np.zeros(1, int), size=size, key=0)


@given(size=st.integers(1, 3000), window=st.integers(1, 3500), key=st.integers(0, 2**64 - 1))
def test_windows_hold_each_sample_once_and_few_stretches(size, window, key):
    image = permute_in_shuffle_windows(np.arange(size), size=size, window=window, key=key)
    assert np.array_equal(np.sort(image), np.arange(size))
    some = permute_in_shuffle_windows(np.arange(size)[::7], size=size, window=window, key=key)
    assert np.array_equal(some, image[::7])
    if window >= size:
        assert np.array_equal(image, permute(np.arange(size), size=size, key=key))
        return
    piece = -(-window // 16)
    pieces = image // piece
    last = {int(number): row for row, number in enumerate(pieces.tolist())}
    first = {int(number): row for row, number in reversed(list(enumerate(pieces.tolist())))}
    # once begun, a stretch is done with within a window
    assert max(last[number] - first[number] for number in last) < window


def test_windows_mix_their_stretches_and_meet_others_in_each_pass():
    images = [
        permute_in_shuffle_windows(np.arange(4096), size=4096, window=512, key=fold_key(1, i))
        for i in range(2)
    ]
    for image in images:
        counts = np.bincount(image[:128] // 32, minlength=128)  # a quarter of the first window
        assert np.count_nonzero(counts) == 16
        assert counts.max() < 20
    first, second = ({*(image[:512] // 32).tolist()} for image in images)
    assert len(first) == 16
    assert len(first & second) < 10


def test_the_order_of_one_group_stays_what_it_is():
    """Runs are resumed in it, and their ledgers planned again."""
    image = permute_in_shuffle_windows(np.arange(1000), size=1000, window=100, key=5)
    assert image[:8].tolist() == [286, 609, 708, 446, 442, 645, 447, 258]
    assert int((image * np.arange(1000) ** 2 % 1_000_003).sum()) == 500_432_709


weights_strategy = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def draws_of_epoch(groups: ShuffleGroups, size: int, epoch: int) -> np.ndarray:
    """The draws in which an epoch of a source is shown, among those of all sources."""
    quota = size * sum(groups.weights) // groups.weights[groups.source]
    start = max(0, epoch * quota - 10 * sum(groups.weights))
    draws = np.arange(start, (epoch + 1) * quota + 10 * sum(groups.weights) + size)
    source_ids, source_draws = assign_sources(draws, groups.weights)
    return draws[(source_ids == groups.source) & (source_draws // size == epoch)]


def permuted(
    groups: ShuffleGroups, *, size: int, window: int, epoch: int = 0, key: int = 0, every: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The samples of an epoch (or of some of its draws), and the group of each draw."""
    draws = draws_of_epoch(groups, size, epoch)[::every]
    options = {"size": size, "window": window, "key": key, "groups": groups, "epoch": epoch}
    samples = permute_in_shuffle_windows(np.arange(size)[::every], draws=draws, **options)
    edges = np.arange(1, groups.count) * groups.global_batch_size // groups.count
    return samples, np.searchsorted(edges, draws % groups.global_batch_size, side="right")


@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    size=st.integers(1, 2000),
    window=st.integers(1, 2500),
    batch=st.integers(1, 200),
    count=st.integers(2, 130),
    epoch=st.integers(0, 3),
    key=st.integers(0, 2**64 - 1),
)
@examples(60)
def test_groups_take_each_sample_once(weights, size, window, batch, count, epoch, key):
    for source in range(len(weights)):
        groups = shuffle_groups_of(
            count, global_batch_size=batch, weights=tuple(weights), source=source
        )
        if groups is None:
            assert batch * weights[source] < count * sum(weights)
            continue
        options = {"size": size, "window": window, "epoch": epoch, "key": key}
        samples, found = permuted(groups, **options)
        assert np.array_equal(np.sort(samples), np.arange(size))
        assert np.array_equal(permuted(groups, every=7, **options)[0], samples[::7])
        if window >= size:  # a group's part is contiguous, but for 16 pieces and the rotation
            piece = -(-size // 16)
            for group in np.unique(found):
                mine = np.sort(samples[found == group])
                jumps = np.count_nonzero(np.diff(mine) > 1)
                assert jumps <= len(mine) // piece + 3


@pytest.mark.parametrize("count", [8, 64])
def test_each_sample_meets_each_group_equally_often(count):
    """Chi-square over epochs; parts of two stretches of a window, and of a quarter of one."""
    groups = ShuffleGroups(count=count, global_batch_size=64, weights=(1,), source=0)
    size, epochs = 1024, 60
    counts = np.zeros((size, count))
    for epoch in range(epochs):
        key = fold_key(3, epoch)
        samples, found = permuted(groups, size=size, window=256, epoch=epoch, key=key)
        counts[samples, found] += 1
    chi_square = ((counts - epochs / count) ** 2 / (epochs / count)).sum(axis=1)
    # Neighbours share their part, so that some 64 samples are independent.
    assert abs(chi_square.mean() - (count - 1)) < 4 * math.sqrt(2 * (count - 1) / 64)


@pytest.mark.parametrize("count", [1, 8])
def test_samples_of_a_window_share_a_batch_as_often_with_groups(count):
    """Within the same piece, and whatever the groups: a batch is a quarter of a window of 256."""
    groups = shuffle_groups_of(count, global_batch_size=64, weights=(1,), source=0)
    together = []
    for epoch in range(200):
        draws = np.arange(1024) + 1024 * epoch
        samples = permute_in_shuffle_windows(
            np.arange(1024), size=1024, window=256, key=fold_key(4, epoch), groups=groups,
            epoch=epoch, draws=draws,
        )  # fmt: skip
        batch_of = np.empty(1024, int)
        batch_of[samples] = np.arange(1024) // 64
        pairs = batch_of.reshape(-1, 16)
        together.append([np.mean(pairs[:, i] == pairs[:, j]) for i, j in ((0, 1), (0, 15), (7, 8))])
    means, expected = np.mean(together, axis=0), 63 / 255
    assert np.allclose(means, expected, atol=0.03)


@given(weights=weights_strategy, start=st.integers(0, 2**50))
def test_every_source_keeps_its_weight_at_any_draw(weights, start):
    whole = integer_weights(weights)
    source_ids, draws = assign_sources(np.arange(start, start + 500), whole)
    for source, weight in enumerate(weights):
        mine = np.flatnonzero(source_ids == source)
        # numbered without a gap ...
        assert np.array_equal(np.diff(draws[mine]), np.ones(max(len(mine) - 1, 0)))
        # ... and the count before each draw is the exact weight, within half a sample a level
        level = min(source + 1, len(weights) - 1)
        for row in mine[:3]:
            exact = Fraction(start + int(row)) * weight / sum(weights)
            assert abs(int(draws[row]) - exact) <= Fraction(1, 2) * level + 1
            assert draws_before(start + int(row), whole)[source] == draws[row]


def test_weights_become_the_integers_that_were_meant():
    for given_weights, expected in (
        ([1.0], (1,)),
        ([0.5, 0.3, 0.2], (5, 3, 2)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([1_281_167, 3_318_333], (1_281_167, 3_318_333)),
        ([0.1, 100], (1, 1000)),
    ):
        assert integer_weights(given_weights) == expected
    counts = [5_000_000_001, 3_000_000_019]
    first, second = integer_weights(counts)
    assert first + second < 2**31
    assert abs(first / (first + second) - counts[0] / sum(counts)) < 2e-9
    for weights in ([], [1.0, 0.0], [1.0, -1], [math.inf], [math.nan], [1, 1e12]):
        with pytest.raises(ValueError, match="source"):
            integer_weights(weights)
