"""The progress bar: only long work is shown, also if the clock is set back."""

from __future__ import annotations

import itertools
import time

import pytest

from unicl_fast.system import bar
from unicl_fast.system.bar import Bar


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)


@pytest.mark.parametrize(("soon", "shown"), [(0.0, True), (60.0, True), (0.0, False)])
def test_only_what_takes_long_is_shown(
    soon: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bar, "_SOON", soon)
    for _ in Bar(range(4), desc="encode images", shown=shown):
        pass
    said = capsys.readouterr().err
    assert ("encode images: 100%" in said) == (shown and not soon)
    assert bool(said) == (shown and not soon)


def test_a_clock_that_is_set_back_does_not_stop_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bar, "_SOON", 0.0)
    clock = itertools.count(10_000.0, -3600.0)
    monkeypatch.setattr("tqdm.std.time", clock.__next__)
    with Bar(total=3) as shown:
        started = time.monotonic()
        while time.monotonic() == started:
            pass
        shown.update(2)
        assert "2/3" in capsys.readouterr().err
