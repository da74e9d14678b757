"""Loaders for tests of `unicl-bench resume`: they count, and some forget, refuse or stop."""

import functools
import itertools
from typing import Any

from benchmarks.resume.contenders import Loop, Task


def exact(task: Task, state: Any) -> Loop:
    per_epoch = task.epoch_size // task.batch_size
    for step in itertools.count(state or 0):
        start = step % per_epoch * task.batch_size + task.rank * task.local_batch
        ids = range(start, start + task.local_batch)
        yield step // per_epoch, ids, functools.partial(int, step + 1)


def forgets(task: Task, state: Any) -> Loop:
    return exact(task, None)


def refuses(task: Task, state: Any) -> Loop:
    if state is not None and state != task.world_size:
        raise ValueError(f"the state is that of {state} ranks, not {task.world_size}")
    for epoch, ids, _ in exact(task, None):
        yield epoch, ids, functools.partial(int, task.world_size)
