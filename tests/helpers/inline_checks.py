"""Images and tables read in this process, for tests that build often and not of what workers do."""

from collections.abc import Iterable, Iterator

import pytest

from unicl_fast.packing import build as build_module
from unicl_fast.packing import near_duplicates, verify
from unicl_fast.packing.sources import tables
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.workers import Checked, ImageOptions, Task, check_sample


def check_inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces worker processes; returns the names of the images checked, which grows."""
    names: list[str] = []

    def check(
        tasks: Iterable[Task], *, options: ImageOptions, **_: object
    ) -> Iterator[Checked | Problem]:
        for task in tasks:
            names.append(task.name)
            yield check_sample(task, options)

    for module in (build_module, near_duplicates, verify):
        monkeypatch.setattr(module, "check_in_order", check)
    monkeypatch.setattr(tables, "run_limited", lambda work, tasks, **_: map(work, tasks))
    return names
