"""The report of a diagnosis: its page in a browser, and a run against an earlier one."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import look_at
from diagnoses import MS, STAGES, cost, diagnosis, measured, trial

from unicl_fast.benchmarks.diagnosis.earlier import (
    Comparison,
    KeptReport,
    as_kept,
    compare,
    read_report,
)
from unicl_fast.benchmarks.diagnosis.model import (
    CHECKPOINT,
    Measured,
    Periodic,
    RankFigures,
    Stage,
)
from unicl_fast.benchmarks.diagnosis.page import make_page
from unicl_fast.benchmarks.diagnosis.report import Diagnosis
from unicl_fast.benchmarks.diagnosis.run import Run
from unicl_fast.benchmarks.run import main

HOSTILE = "<script>parent.broken = broken = true</script><img src=x onerror=parent.broken=true>"
SECRET = "s3://user:secret@bucket/set"
INPUT = Path(__file__).parents[2] / "docs" / "results" / "input-256.json"
TRIALS = (trial(f"--data.train {HOSTILE}", 0.7, 0.8, cpu=0.7, about=HOSTILE), trial("--idle", 1.0))


def run_of(**changes: Any) -> Measured:
    return measured(
        whole=cost(1.0, 1.6, spread=0.02), trials=TRIALS,
        not_measured=(f"--x {HOSTILE}: no time was left", f"{SECRET} cannot be read"), **changes,
    )  # fmt: skip


def result_of(found: Diagnosis, given: tuple[str, ...] = ("--data", HOSTILE)) -> str:
    return Run(given=given, data=(SECRET,)).result_text({}, **found.as_dict())


def kept(wall: float, *, spread: float = 0.01, **changes: Any) -> KeptReport:
    found = as_kept(result_of(diagnosis(measured(whole=cost(wall, 1.6, spread=spread)))))
    return dataclasses.replace(found, **changes)


def page_of(found: Diagnosis, comparison: Comparison | None = None) -> str:
    return make_page(found, json.loads(result_of(found))["machine"], comparison=comparison)


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
    old, new = kept(0.3), as_kept(result_of(whole))
    comparison = compare(old, new, name=HOSTILE, tolerance=0.05)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(whole, comparison), encoding="utf-8")
    return path


def test_a_browser_shows_all_parts(full_page: Path, tmp_path: Path) -> None:
    found = look_at(full_page, tmp_path)
    assert found["headings"] == ["What limits this run", "The time of an image", "Advice"]
    assert (found["scripts"], found["handlers"], found["broken"]) == (0, 0, False)
    assert (found["images"], set(found["addresses"])) == (0, set())
    for text in ("the bottleneck", "REGRESSION", "OTHER PROCESSES", "JPEG decode", HOSTILE[:40]):
        assert text in found["text"]


def test_a_page_asks_for_nothing_outside_of_itself(full_page: Path) -> None:
    text = full_page.read_text(encoding="utf-8")
    assert re.findall(r"https?://|url\(", text) == []
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert len(text) < 30_000


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({}, "image encoder backward"),
        ({"waiting": 0.5}, "JPEG decode"),
        ({"periodic": (Periodic(name=CHECKPOINT, every_steps=1, seconds=1.0),)}, CHECKPOINT),
    ],
)
def test_the_bottleneck_is_marked_where_it_is(changes: dict[str, Any], slow: str) -> None:
    text = page_of(diagnosis(measured(**changes)))
    marked = re.findall(
        r'<div class="bar is-limit"><span class="name">(.*), the bottleneck</span>', text
    )
    assert marked == [slow]
    assert text.count("the bottleneck") == 1


def test_three_changes_at_most_are_advised() -> None:
    trials = tuple(trial(f"--by {ratio}", ratio, ratio) for ratio in (0.9, 0.95, 0.85, 0.92))
    found = measured(whole=cost(1.0, 1.6, spread=0.1), world_size=2, trials=trials)
    text = page_of(diagnosis(found))
    assert "<b>2,000 (1,818 to 2,222) images/s</b>" in text  # of both ranks
    shown = re.findall(r'<li><span class="option">(.*)</span>', text)
    assert shown == ["--by 0.85", "--by 0.9", "--by 0.92"]


def test_parts_without_data_are_left_out_or_said_in_a_sentence() -> None:
    assert "No change could be measured" in page_of(diagnosis(measured()))
    page = page_of(diagnosis(measured(trials=(trial("--idle", 1.0),))))
    text = html.unescape(page)
    assert "Nothing that was tried gains 3% in each round." in text
    for absent in ("egression", "kept", 'class="warn"', "checkpoint"):
        assert absent not in text.split("<footer>")[0].split("<main>")[1], absent


@pytest.mark.parametrize(
    ("new", "spread", "is_regression", "words"),
    [
        (1.00, 0.01, False, "No regression: the run is 0.0% faster"),
        (0.50, 0.01, False, "No regression: the run is 100.0% faster"),
        (1.04, 0.01, False, "No regression: the run is 3.8% slower"),
        # 9 % slower, but a twentieth more than the spread of both
        (1.10, 0.03, False, "No sure regression: the run is 9.1% slower"),
        (1.10, 0.01, True, "REGRESSION: the run is 9.1% slower"),
        (1.50, 0.10, True, "REGRESSION: the run is 33.3% slower"),
    ],
)
def test_a_regression_is_slower_by_more_than_spread_and_tolerance(
    new: float, spread: float, is_regression: bool, words: str
) -> None:
    before, after = kept(1.0, spread=spread), kept(new, spread=spread)
    found = compare(before, after, name="old.json", tolerance=0.05)
    assert found.is_regression == is_regression
    assert found.verdict.startswith(words)
    assert list(found.changes)[-1] == "all together"
    assert found.warnings == []


def test_stages_that_came_or_went_are_in_the_table() -> None:
    old, new = kept(1.0), kept(1.0)
    stages = (Stage(name="PNG decode", cost=cost(0.5, 1.0), side="graph"), *STAGES[3:])
    old = dataclasses.replace(old, measured=dataclasses.replace(old.measured, stages=stages))
    text = compare(old, new, name="", tolerance=0.05).table()
    shown = {cells[0]: cells[1:] for line in text.splitlines()
             if (cells := [cell.strip() for cell in line.strip("|").split("|")])}  # fmt: skip
    assert shown["PNG decode"][1:3] == ["-", "-"]
    assert shown["JPEG decode"][0] == "-"
    assert shown["augment"][2:] == ["+0.0%", "+0.0%"]


def test_another_machine_other_settings_and_other_programs_are_warned_of() -> None:
    old = kept(1.0)
    config = old.config | {"run": old.config["run"] | {"global_batch_size": 7, "seed": 5}}
    config |= {"data": old.config["data"] | {"cache_folder": "elsewhere"}}
    busy = dataclasses.replace(old.measured, others_cores=4.0)
    machine = old.machine | {"processor": "Z80", "commit": "another", "load_average": [9, 9, 9]}
    machine |= {"date": "2025-01-01"}
    other = dataclasses.replace(old, config=config, machine=machine, measured=busy)
    machine_text, settings, programs = compare(other, old, name="o.json", tolerance=0).warnings
    assert machine_text.startswith(
        "o.json comes from another machine: processor was 'Z80' and is now "
    )
    assert machine_text.count(" was ") == 1
    assert settings.startswith("o.json has other settings: ")
    assert "run.global_batch_size was 7 and is now" in settings
    assert "run.seed was 5" in settings
    assert "cache_folder" not in settings
    assert programs == "Other processes took 4.0 of 8 cores during o.json."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "truncated"),
        ("{}", "required field `measured`"),
        ("[1, 2]", "Expected `object`"),
        (INPUT.read_text(encoding="utf-8"), "required field `measured`"),
        ("\xff", "malformed"),
    ],
)
def test_what_is_no_report_is_refused_before_anything_is_measured(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--against", str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"--against: {path} is no report of `unicl-bench run`" in said
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tolerance", "1"), "--tolerance must be in 0 to 1, not 1"),
        (("--against", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_options_that_make_no_report_are_refused(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_report_whose_run_took_no_time_is_refused(tmp_path: Path) -> None:
    values = json.loads(result_of(diagnosis(measured())))
    values["measured"]["whole"]["wall"] = 0
    (tmp_path / "old.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="its run took no time"):
        read_report(tmp_path / "old.json")


@pytest.mark.parametrize("wall", [1.0, 2.0])
def test_a_report_is_written_with_its_comparison(
    wall: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(
        result_of(diagnosis(measured(whole=cost(1.0, 1.6, spread=0.01))))
    )
    given = ("--data", SECRET)
    run = Run(
        out=out, against=out / "report.json", json=out / "again.json", given=given, data=(SECRET,)
    )
    found = diagnosis(dataclasses.replace(run_of(), whole=cost(wall, 1.6, spread=0.01)))
    is_regression = run.conclude(read_report(out / "report.json"), found)
    assert is_regression == (wall > 1)
    verdict = (
        "REGRESSION: the run is 50.0% slower" if is_regression else "No regression: the run is"
    )
    assert verdict in capsys.readouterr().out
    for name in ("report.html", "report.json", "again.json"):
        text = (out / name).read_text(encoding="utf-8")
        assert verdict in text
        assert "secret" not in text
    # and is itself a report to compare with
    assert read_report(out / "report.json").measured.whole.wall == pytest.approx(wall * MS)
