"""What a probe is fitted on and what its C is chosen by: each class has its part, by the seed."""

from __future__ import annotations

import numpy as np
import pytest

from unicl_fast.evaluation.splits import hold_out


@pytest.mark.parametrize(
    ("sizes", "folds"),
    [((20, 20), 1), ((19, 21), 1), ((9, 7, 6), 5), ((4, 3), 3), ((5, 2), 2), ((4, 1), 2),
     ((60, 10, 1), 1), ((1, 1, 1), 0)],
)  # fmt: skip
def test_each_class_is_held_out_in_part_but_never_its_only_sample(
    sizes: tuple[int, ...], folds: int
) -> None:
    """A fifth where that has four samples a class, or every sample once in one of the folds."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    found = hold_out(labels, seed=0)
    assert len(found) == folds
    for kept, aside in found:
        assert sorted([*kept, *aside]) == list(range(len(labels)))
        assert set(labels[kept]) == set(labels)
    held_out = sorted(row for _, aside in found for row in aside)
    if folds == 1:
        expected = [round(size / 5) if size > 1 else 0 for size in sizes]
        assert np.bincount(labels[held_out], minlength=len(sizes)).tolist() == expected
    else:
        assert held_out == [row for row, label in enumerate(labels) if sizes[label] > 1]
    if len(labels) > 10:
        assert not np.array_equal(hold_out(labels, seed=1)[0][1], found[0][1])
