"""What a probe is fitted on and what its C is chosen by: each class has its part, by the seed."""

from __future__ import annotations

import numpy as np
import pytest

from unicl_fast.evaluation.splits import draw_shots, hold_out, split_folds, split_validation


def test_splits_and_draws_hold_each_class_and_follow_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    train, validation = split_validation(labels, seed=0)
    assert np.bincount(labels[validation], minlength=3).tolist() == [10, 2, 0]
    assert sorted([*train, *validation]) == list(range(62))
    assert not np.array_equal(validation, split_validation(labels, seed=1)[1])
    shots, others = draw_shots(labels, shots=8, seed=0)
    assert np.bincount(labels[shots]).tolist() == [8, 8, 2]
    assert np.bincount(labels[others], minlength=3).tolist() == [4, 2, 0]
    assert not set(shots) & set(others)
    assert not np.array_equal(shots, draw_shots(labels, shots=8, seed=1)[0])
    assert [len(places) for places in draw_shots(labels, shots=64, seed=0)] == [62, 0]
    assert [len(rows) for rows in split_validation(np.arange(3), seed=0)] == [3, 0]


@pytest.mark.parametrize(
    ("sizes", "folds"), [((9, 7, 6), 5), ((4, 3), 3), ((5, 2), 2), ((4, 1), 2)]
)
def test_folds_hold_out_each_sample_once_but_never_a_class_s_only_one(
    sizes: tuple[int, ...], folds: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    found = split_folds(labels, seed=0)
    assert len(found) == folds
    held_out = np.concatenate([aside for _, aside in found])
    assert sorted(held_out) == [row for row, label in enumerate(labels) if sizes[label] > 1]
    for kept, aside in found:
        assert sorted([*kept, *aside]) == list(range(len(labels)))
        assert set(labels[kept]) == set(labels)
    assert not np.array_equal(split_folds(labels, seed=1)[0][1], found[0][1])
    assert split_folds(np.arange(3), seed=0) == []


@pytest.mark.parametrize(("per_class", "expected"), [(20, 1), (19, 1), (15, 5), (3, 3), (1, 0)])
def test_a_part_is_held_out_where_it_has_four_samples_a_class(
    per_class: int, expected: int
) -> None:
    found = hold_out(np.repeat(np.arange(6), per_class), seed=0)
    assert len(found) == expected
    for kept, aside in found:
        assert sorted([*kept, *aside]) == list(range(6 * per_class))
