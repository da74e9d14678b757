"""The progress bar: only long work is shown, also if the clock is set back."""

import itertools
import re
import sys
import time

import pytest

from unicl_fast.system import bar
from unicl_fast.system.bar import Bar


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (60.0, True), (0.0, False)])
def test_a_log_gets_whole_lines_and_only_of_what_takes_long(seconds, shown, monkeypatch, capsys):
    monkeypatch.setattr(bar, "_LOG_SECONDS", seconds)
    with Bar(total=4, desc="train", shown=shown) as outer:
        for _ in Bar(range(4), desc="encode images", shown=shown, leave=False):
            outer.set_postfix_str("loss 1")
        Bar.write("evaluated", file=sys.stderr)
        outer.update(4)
    said = capsys.readouterr().err
    if shown and not seconds:
        assert re.search(r"^encode images:  25%.*\n", said, re.MULTILINE)
        assert re.search(r"^train: 100%.* loss 1]\n", said, re.MULTILINE)
    else:
        assert said == "evaluated\n"
    assert not re.search(r"\r|\x1b|\n\n", said)


def test_a_clock_that_is_set_back_does_not_stop_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(bar, "_LOG_SECONDS", 0.0)
    clock = itertools.count(10_000.0, -3600.0)
    monkeypatch.setattr("tqdm.std.time", clock.__next__)
    with Bar(total=3) as shown:
        started = time.monotonic()
        while time.monotonic() == started:
            pass
        shown.update(2)
        assert "2/3" in capsys.readouterr().err
