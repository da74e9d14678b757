"""Figures show texts as they are, and cannot end what they are drawn for."""

import contextlib
import logging

import pytest
import torch
from damage import HOSTILE
from matplotlib.figure import Figure
from matplotlib.text import Text

from unicl_fast.batch import Batch
from unicl_fast.evaluation.report import ClassificationCounts
from unicl_fast.objectives.targets import collate
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools.evaluate.figures import draw_confusion
from unicl_fast.training.figures import draw_contact_sheet, draw_curves, drawing
from unicl_fast.training.metrics import MetricsWriter, read_metrics


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts of figures as they are saved; none of them was looked at as a formula."""
    texts: list[str] = []
    save = Figure.savefig

    def remember(self: Figure, *arguments: object, **options: object) -> None:
        found = self.findobj(Text)
        assert not any(text.get_parse_math() for text in found)
        texts.extend(text.get_text() for text in found)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return texts


def hostile_batch(images: torch.Tensor) -> Batch:
    captions = [HOSTILE[number % len(HOSTILE)] for number in range(12)]
    return collate(images, Tokenizer()(captions), torch.full((12,), -1))


def test_a_contact_sheet_shows_any_text(images, tmp_path, drawn, caplog):
    path = tmp_path / "sheet.png"
    with drawing(path):
        draw_contact_sheet(hostile_batch(images), path)
    assert path.is_file()
    assert not caplog.records
    assert "pay $ 5 or $ 6" in drawn
    assert drawn.count("caption") == 12
    assert any("frames of one colour have one class" in text for text in drawn)


def test_classes_have_their_names_or_data_set_and_label(images, tmp_path, drawn):
    labels = torch.tensor([0, 1, (1 << 32) + 7] * 4)
    texts = ["a dog", "a cat", "a horse"] * 4
    names = [("dog", "cat, with a name that is longer than the width of an image")]
    with drawing(tmp_path / "sheet.png"):
        batch = collate(images, Tokenizer()(texts), labels)
        draw_contact_sheet(batch, tmp_path / "sheet.png", names)
    assert {"dog", "class 7 of data set 2"} <= set(drawn)
    assert any(text.startswith("cat, with") and len(text) <= 28 for text in drawn)


def test_curves_of_a_weak_run_fill_the_axis_over_a_line_of_chance(tmp_path, monkeypatch):
    with contextlib.closing(MetricsWriter(tmp_path)) as metrics:
        metrics.write({"step": 1, "samples_seen": 8, "loss": 1.0, "lr": 0.1})
        metrics.write({"step": 1, "zero_shot/x/top1": 0.042, "zero_shot/x/chance": 0.005})
    figures: list[Figure] = []
    monkeypatch.setattr("unicl_fast.training.figures.save_figure", lambda f, _: figures.append(f))
    draw_curves(tmp_path, tmp_path / "curves.png")
    (figure,) = figures
    axes = figure.axes[1]
    assert axes.get_ylim()[1] == pytest.approx(1.3 * 4.2)
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [0.5]


def test_curves_and_metrics_take_any_name_of_a_data_set(tmp_path, drawn, caplog):
    keys = [f"zero_shot/{name}/top1" for name in (*HOSTILE, "line\nbreak", "\udcff")]
    with contextlib.closing(MetricsWriter(tmp_path)) as metrics:
        for step in (1, 2):
            metrics.write({"step": step, "samples_seen": step, "loss": 1.0, "lr": 0.1})
            metrics.write({"step": step} | dict.fromkeys(keys, 0.5))
    assert list(read_metrics(tmp_path)[-1]) == ["step", *keys]
    with drawing(tmp_path / "curves.png"):
        draw_curves(tmp_path, tmp_path / "curves.png")
    assert not caplog.records
    assert "zero_shot/pay $5 or $6/top1" in drawn
    assert (tmp_path / "curves.png").is_file()


def test_a_confusion_matrix_shows_any_class_name(tmp_path, drawn, caplog):
    counts = ClassificationCounts(HOSTILE)
    rankings = [[(number + 1) % len(HOSTILE)] for number in range(len(HOSTILE))]
    counts.add(rankings, [[number] for number in range(len(HOSTILE))])
    draw_confusion(counts.result(what="test"), tmp_path, "set", title="set, 100 % of $ and $")
    assert (tmp_path / "confusion-set.png").is_file()
    assert not caplog.records
    assert "pay $5 or $6" in drawn
    assert "set, 100 % of $ and $" in drawn


@pytest.mark.parametrize("error", [ValueError("no such glyph"), OSError(28, "full"), MemoryError()])
def test_what_goes_wrong_in_a_figure_is_logged(tmp_path, caplog, error):
    with drawing(tmp_path / "x.png"):
        raise error
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"NO FIGURE {tmp_path / 'x.png'}: {type(error).__name__}" in record.getMessage()
