"""Compares batches of a loader bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from unicl_fast.batch import Batch


def assert_equal(one: Batch, other: Batch) -> None:
    """Every field of the batches, of their texts and of their targets."""
    for left, right in ((one, other), (one.texts, other.texts), (one.targets, other.targets)):
        values, others = (_fields(part) for part in (left, right))
        for name, value in values.items():
            assert np.array_equal(value, others[name]), (one.step, name)


def _fields(part: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(part)} - {"texts", "targets"}
    return {name: getattr(part, name) for name in names}
