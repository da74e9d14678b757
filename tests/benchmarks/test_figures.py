"""`make figures` finds the data of each committed result."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow
SITE = Path(__file__).parents[2] / "docs" / "site"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SITE))
    import figures as module

    return module


def test_data_of_all_results_is_found(figures, shared_data, tmp_path):
    """Packed data is known by its name, decoded images with it; all else is there."""
    for name, raw in (("decode-full", "decode-full-raw"), ("cifar10-simple", None)):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / f"{name}-raw").mkdir()
        settings = {"data": f"elsewhere/{name}", "raw_data": None}
        located = figures._located(settings, tmp_path / "few", tmp_path / "few")
        assert located["raw_data"] == (raw and str(tmp_path / "few" / raw))
    for name in figures.PACKED:
        (tmp_path / name).mkdir()
    for _, path, result in figures.results():
        settings = figures._located(result["settings"], shared_data, tmp_path)
        places = [settings.get("data"), settings.get("raw_data"), *(settings.get("files") or ())]
        assert all(Path(place).exists() for place in places if place), path.name
