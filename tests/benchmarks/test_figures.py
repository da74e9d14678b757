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

MOST_UNKNOWN = 6
"""Figures that were measured before results marked their sources; never more."""
UNKNOWN = "; of unmarked sources"
SITE = Path(__file__).parents[2] / "docs" / "site"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SITE))
    import figures as module

    return module


def test_no_figure_is_much_older_than_the_code_that_it_times(figures: ModuleType) -> None:
    """Those whose sources nobody knows are said to be so on the page, and get no company."""
    results = {path.name: result.get("sources") for _, path, result in figures.results()}
    stale = {name for name, known in results.items() if known and sources.is_stale(known)}
    assert not stale, "run `make figures`"
    unknown = sum(known is None for known in results.values())
    assert unknown == figures.benchmark_page.PAGE.read_text().count(UNKNOWN) <= MOST_UNKNOWN


def test_a_loader_s_figures_are_of_decoded_images_too_where_there_are_some(
    figures: ModuleType, tmp_path: Path
) -> None:
    for name, raw in (("decode-full", "decode-full-raw"), ("cifar10-simple", None)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-raw").mkdir()
        settings = {"data": f"elsewhere/{name}", "raw_data": None}
        located = figures._located(settings, tmp_path, tmp_path)
        assert located["raw_data"] == (raw and str(tmp_path / raw))


def test_a_figure_is_stale_once_a_tenth_of_its_functions_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    text = "\n".join(f"def f{number}():\n    return {number}" for number in range(20))
    (tmp_path / "part.py").write_text(text)
    known = sources.marks_of(["part.py"])
    for changed, stale in ((2, False), (3, True)):
        for number in range(changed):
            text = text.replace(f"return {number}\n", f"return -{number}\n")
        (tmp_path / "part.py").write_text(text)
        assert sources.is_stale(known) == stale
    assert sources.is_stale(None)


def test_a_mark_changes_with_the_code_and_not_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    file = tmp_path / "unicl_fast" / "room" / "part.py"
    file.parent.mkdir(parents=True)

    def mark(text: str) -> object:
        file.write_text(text)
        return sources.marks_of(["room"])

    plain = mark('"""A part."""\nx = 1\ndef f(a):\n    """Doc."""\n    return a + x\n')
    assert mark("# why\nx = 1\n\n\ndef f(a):\n    return (a +\n            x)\n") == plain
    for other in ("x = 2", "x = 1; y = 1"):
        assert mark(f"{other}\ndef f(a):\n    return a + x\n") != plain
    with pytest.raises(ValueError, match="no elsewhere"):
        sources.marks_of(["elsewhere"])


@pytest.mark.parametrize(
    "program",
    [
        Input(data=Path()), Pack(data=Path()), Step(),
        *(Loss(parts=(part,)) for part in ("tokens", "loss", "targets", "text")),
    ],
)  # fmt: skip
def test_every_program_of_the_page_marks_its_sources(program: Input | Pack | Step | Loss) -> None:
    rooms = sources.marks_of(program.timed_rooms())["rooms"]
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
