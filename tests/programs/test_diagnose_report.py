"""The report of a diagnosis: its page in a browser, and its files."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import look_at
from diagnoses import MS, STAGES, cost, diagnosis, measured, trial

from unicl_fast.tools.diagnose.measuring import result_text
from unicl_fast.tools.diagnose.model import CHECKPOINT, Measured, Periodic, RankFigures, Stage
from unicl_fast.tools.diagnose.page import make_page
from unicl_fast.tools.diagnose.report import Diagnosis
from unicl_fast.tools.diagnose.run import Run

HOSTILE = "<script>parent.broken = broken = true</script><img src=x onerror=parent.broken=true>"
SECRET = "s3://user:secret@bucket/set"
TRIALS = (trial(f"--data.train {HOSTILE}", 0.7, 0.8, cpu=0.7, about=HOSTILE), trial("--idle", 1.0))


def run_of(**changes: Any) -> Measured:
    return measured(
        whole=cost(1.0, 1.6, spread=0.02), trials=TRIALS,
        not_measured=(f"--x {HOSTILE}: no time was left", f"{SECRET} cannot be read"), **changes,
    )  # fmt: skip


def page_of(found: Diagnosis) -> str:
    result = result_text(Run(given=("--data", HOSTILE), data=(SECRET,)), **found.as_dict())
    return make_page(found, json.loads(result)["machine"])


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all its parts, and hostile texts wherever a text comes from outside."""
    noted = Stage(name=f"augment {HOSTILE}", cost=cost(0.2, 0.4, spread=0.1), side="graph",
                  note=HOSTILE)  # fmt: skip
    found = run_of(
        stages=(*STAGES, noted, Stage(name="clip and update", cost=cost(0.0), side="step")),
        others_cores=4.0, others=((HOSTILE, 3.9),), world_size=2,
        ranks=tuple(RankFigures(rank=rank, loader=0.8 * MS, step=MS) for rank in range(2)),
    )  # fmt: skip
    applied = {"option": HOSTILE, "gain": 0.4, "again": [0.3], "is_kept": True}
    whole = diagnosis(found, applied=[applied])
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(whole), encoding="utf-8")
    return path


def test_a_page_loads_nothing_and_a_browser_shows_all_parts(full_page, tmp_path):
    text = full_page.read_text(encoding="utf-8")
    assert re.findall(r"https?://|url\(", text) == []
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert len(text) < 30_000
    found = look_at(full_page, tmp_path)
    assert found["headings"] == ["What limits this run", "The time of an image", "Advice"]
    assert (found["scripts"], found["handlers"], found["broken"]) == (0, 0, False)
    assert (found["images"], set(found["addresses"])) == (0, set())
    for text in ("the bottleneck", "OTHER PROCESSES", "JPEG decode", HOSTILE[:40]):
        assert text in found["text"]


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({}, "image encoder backward"),
        ({"waiting": 0.5}, "JPEG decode"),
        ({"periodic": (Periodic(name=CHECKPOINT, every_steps=1, seconds=1.0),)}, CHECKPOINT),
    ],
)
def test_the_bottleneck_is_marked_where_it_is(changes, slow):
    text = page_of(diagnosis(measured(**changes)))
    marked = re.findall(
        r'<div class="bar is-limit"><span class="name">(.*), the bottleneck</span>', text
    )
    assert marked == [slow]
    assert text.count("the bottleneck") == 1


def test_at_most_three_changes_are_advised_and_empty_parts_left_out():
    trials = tuple(trial(f"--by {ratio}", ratio, ratio) for ratio in (0.9, 0.95, 0.85, 0.92))
    found = measured(whole=cost(1.0, 1.6, spread=0.1), world_size=2, trials=trials)
    text = page_of(diagnosis(found))
    assert "<b>2,000 (1,818 to 2,222) images/s</b>" in text  # of both ranks
    shown = re.findall(r'<li><span class="option">(.*)</span>', text)
    assert shown == ["--by 0.85", "--by 0.9", "--by 0.92"]
    assert "No change could be measured" in page_of(diagnosis(measured()))
    page = page_of(diagnosis(measured(trials=(trial("--idle", 1.0),))))
    text = html.unescape(page)
    assert "No measured change gains 3% in each round." in text
    for absent in ("kept", 'class="warn"', "checkpoint"):
        assert absent not in text.split("<footer>")[0].split("<main>")[1], absent


def test_a_report_is_written_and_holds_no_secret(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    run = Run(out=out, json=out / "again.json", given=("--data", SECRET), data=(SECRET,))
    run.conclude(diagnosis(run_of()))
    assert "THE LIMIT: " in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["measured"]["whole"]["wall"] == MS
    assert (out / "again.json").read_text() == (out / "report.json").read_text()
    for name in ("report.html", "report.json", "again.json"):
        assert "secret" not in (out / name).read_text(encoding="utf-8")
