"""The measurement of a build's memory runs, on a few samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from unicl_fast.benchmarks.packing import many_samples


@pytest.mark.slow
@pytest.mark.dist
def test_a_small_list_is_built_and_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["many_samples", "--samples", "1200", "--workers", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    many_samples.main()
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 1200
    assert 50 < result["peak_megabytes"] < 1000
    assert 0 < result["seconds_to_open"] < result["seconds"]
    assert list(tmp_path.iterdir()) == []
