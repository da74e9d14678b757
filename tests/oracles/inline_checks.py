"""Pictures checked in this process, for tests that build often and of what workers do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from unicl_fast.tools import build_dataset as build_module
from unicl_fast.tools.items import Problem
from unicl_fast.tools.picture_worker import Checked, PictureOptions, Task, _Checker


def check_inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces worker processes; returns the names of the pictures checked, which grows."""
    names: list[str] = []

    def check(
        tasks: Iterable[Task], *, options: PictureOptions, context_length: int, **_: object
    ) -> Iterator[Checked | Problem]:
        checker = _Checker(options, context_length)
        for task in tasks:
            names.append(task.name)
            checker.prepare(task)
            yield checker.check(task)

    monkeypatch.setattr(build_module, "check_in_order", check)
    return names
