"""Classes that turn out to be one: which id they have together, and how ids are replaced."""

from __future__ import annotations

import numpy as np

from unicl_fast.text._row_kernels import Int64Array, union_find


def merge_classes(pairs: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Joins classes that must be one.

    Args:
        pairs: int64 [c, 2], ids of classes that are the same.

    Returns:
        members: int64 [m], the distinct ids of `pairs`, rising.
        merged: int64 [m], the smallest id that each of them is joined with.
    """
    members, positions = np.unique(pairs, return_inverse=True)
    return members, members[union_find(positions.reshape(pairs.shape), len(members))]


def replace_classes(class_ids: Int64Array, members: Int64Array, merged: Int64Array) -> Int64Array:
    """`class_ids`, each id that is in `members` (rising, not empty) replaced by its `merged`."""
    positions = np.minimum(np.searchsorted(members, class_ids), len(members) - 1)
    return np.where(members[positions] == class_ids, merged[positions], class_ids)
