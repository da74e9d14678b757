"""Fixtures of the tests of packing."""

import functools

import pytest
from inline_checks import check_inline
from pack_runs import Pack, run_pack


@pytest.fixture
def pack(capsys: pytest.CaptureFixture[str]) -> Pack:
    """Runs unicl-pack in this process; checks its exit code, and returns all that was printed."""
    return functools.partial(run_pack, capsys=capsys)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images are checked in this process; the names of those that were, a list that grows."""
    return check_inline(monkeypatch)
