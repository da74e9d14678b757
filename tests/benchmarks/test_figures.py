"""Figures in the documentation are of the code that is here; `make figures` renews them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from unicl_fast.benchmarks import sources
from unicl_fast.benchmarks.input.run import Input
from unicl_fast.benchmarks.loss.run import Loss
from unicl_fast.benchmarks.packing import Pack
from unicl_fast.benchmarks.step.run import Step

SITE = Path(__file__).parents[2] / "docs" / "site"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SITE))
    import figures as module

    return module


@pytest.mark.xfail(strict=True, reason="they were measured before results marked their sources")
def test_no_figure_is_older_than_the_code_that_it_times(figures: ModuleType) -> None:
    stale = [path.name for _, path, result in figures.results() if figures.is_stale(result)]
    assert stale == [], "run `make figures`"


def test_a_mark_changes_with_the_code_and_not_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    file = tmp_path / "unicl_fast" / "room" / "part.py"
    file.parent.mkdir(parents=True)

    def mark(text: str) -> object:
        file.write_text(text)
        return sources.mark_of(["room"])

    plain = mark('"""A part."""\nx = 1\ndef f(a):\n    """Doc."""\n    return a + x\n')
    assert mark("# why\nx = 1\n\n\ndef f(a):\n    return (a +\n            x)\n") == plain
    for other in ("x = 2", "x = 1; y = 1"):
        assert mark(f"{other}\ndef f(a):\n    return a + x\n") != plain
    with pytest.raises(ValueError, match="no elsewhere"):
        sources.mark_of(["elsewhere"])


@pytest.mark.parametrize(
    "program",
    [
        Input(data=Path()), Pack(data=Path()), Step(),
        *(Loss(parts=(part,)) for part in ("tokens", "loss", "targets", "text")),
    ],
)  # fmt: skip
def test_every_program_of_the_page_marks_its_sources(program: Input | Pack | Step | Loss) -> None:
    rooms = sources.mark_of(program.timed_rooms())["rooms"]
    assert rooms == list(program.timed_rooms()) != []


def test_data_of_all_results_is_found(
    figures: ModuleType, shared_data: Path, tmp_path: Path
) -> None:
    """What is packed is known by its name; all else is there."""
    for name in figures.PACKED:
        (tmp_path / name).mkdir()
    for _, path, result in figures.results():
        settings = figures._located(result["settings"], shared_data, tmp_path)
        places = [settings.get("data"), settings.get("raw_data"), *(settings.get("files") or ())]
        assert all(Path(place).exists() for place in places if place), path.name
