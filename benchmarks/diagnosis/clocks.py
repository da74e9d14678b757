"""Clocks of a diagnosis: the cost of an image of whatever flows or is repeated."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

from ..harness import timed
from .model import Cost

FIRST_STEP = 1
"""The first step of a run draws a contact sheet, which no other does."""


def flow(batches: Iterable[object], *, images: float, skip: int, seconds: float) -> Cost:
    """The cost of an image of batches that are made ahead.

    The first `skip` are not timed, or as many of them as come within `seconds`: they were begun
    before the clock. As many are timed as `seconds` allow, at least two.
    """
    iterator, begun = iter(batches), time.perf_counter()
    try:
        for _ in range(skip):
            next(iterator)
            if time.perf_counter() - begun > seconds:
                break
        gc.collect()
        count = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in iterator:
            del batch  # its buffer can be used again
            count += 1
            if count >= 2 and time.perf_counter() - wall >= seconds:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if hasattr(iterator, "close"):  # a generator holds what it reads
            iterator.close()
    return Cost(wall=wall / (count * images), cpu=cpu / (count * images))


def repeated(work: Callable[[], object], *, images: int, count: int) -> Cost:
    """The cost of an image of work that is done `count` times; waits for a GPU."""
    turn = timed(work, calls=count)
    return Cost(wall=turn.wall_seconds / images, cpu=turn.cpu_seconds / images)
