"""The report of a diagnosis: its page and its files."""

import html
import json
import re

import pytest
from diagnoses import MS, STAGES, cost, measured, trial
from pages import Page

from unicl_fast.tools.diagnose.model import Measured, Stage
from unicl_fast.tools.diagnose.report import make_page
from unicl_fast.tools.diagnose.run import Run

HOSTILE = "<script>parent.broken = broken = true</script><img src=x onerror=parent.broken=true>"
SECRET = "s3://user:secret@bucket/set"


@pytest.fixture(scope="module")
def full() -> Measured:
    """A run with all that a page shows, and hostile texts wherever a text comes from outside."""
    noted = Stage(name=f"augment {HOSTILE}", cost=cost(0.2, 0.4), side="loader", note=HOSTILE)
    hostile = trial(f"--data.train {HOSTILE}", 0.7, 0.8, cpu=0.7, about=HOSTILE)
    return measured(
        stages=(*STAGES, noted, Stage(name="clip and update", cost=cost(0.0), side="step")),
        others_cores=4.0, world_size=2, ranks=((0.8 * MS, MS), (0.8 * MS, MS)),
        trials=(hostile, trial("--idle", 1.0)),
        not_measured=(f"--x {HOSTILE}: no time was left", f"{SECRET} cannot be read"),
        applied=({"option": HOSTILE, "gain": 0.4, "again": [0.3], "is_kept": True},),
    )  # fmt: skip


def test_a_report_loads_nothing_holds_no_secret_and_shows_all_parts(full, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    Run(out=out, given=("--data", HOSTILE, SECRET), data=(SECRET,)).conclude(full)
    assert "THE LIMIT: " in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["whole"]["wall"] == MS
    for name in ("report.html", "report.json"):
        assert "secret" not in (out / name).read_text(encoding="utf-8")
    assert (out / "report.html").stat().st_size < 30_000
    page = Page(out / "report.html")
    assert page.headings == ["What limits this run", "The time of an image", "Advice"]
    for text in ("the bottleneck", "OTHER PROCESSES", "JPEG decode", HOSTILE[:40]):
        assert text in page.text


def test_at_most_three_changes_are_advised_and_empty_parts_left_out():
    trials = tuple(trial(f"--by {ratio}", ratio, ratio) for ratio in (0.9, 0.95, 0.85, 0.92))
    text = make_page(measured(world_size=2, trials=trials), {})
    assert "<b>2,000 images/s</b>" in text  # of both ranks
    shown = re.findall(r'<li><span class="option">(.*)</span>', text)
    assert shown == ["--by 0.85", "--by 0.9", "--by 0.92"]
    assert "No change could be measured" in make_page(measured(), {})
    text = html.unescape(make_page(measured(trials=(trial("--idle", 1.0),)), {}))
    assert "No measured change gains 3% in each round." in text
    for absent in ("kept", 'class="warn"', "checkpoint"):
        assert absent not in text.split("<footer>")[0].split("<main>")[1], absent
