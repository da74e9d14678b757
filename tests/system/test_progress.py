"""Work that takes long is shown, also in a log; short work prints nothing."""

from __future__ import annotations

import time

import pytest

from unicl_fast.system import progress


@pytest.mark.parametrize("soon", [0.02, 60.0])
def test_only_what_takes_long_is_shown(
    soon: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SOON", soon)
    is_long = soon < 1
    with progress.said_if_slow("reading weights"):
        time.sleep(0.2 * is_long)
    assert capsys.readouterr().err == "reading weights ...\n" * is_long
    with progress.bar_if_slow("encode images", total=4, shown=True) as bar:
        for _ in range(4):
            time.sleep(0.05 * is_long)
            bar.update()
    said = capsys.readouterr().err
    assert ("encode images: 100%" in said) == is_long
    assert is_long or not said
    with progress.bar_if_slow("encode images", total=1, shown=False) as bar:
        time.sleep(0.1 * is_long)
        bar.update()
    with progress.said_if_slow("reading weights", shown=False):
        time.sleep(0.1 * is_long)
    assert capsys.readouterr() == ("", "")
