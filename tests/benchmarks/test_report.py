"""The report of a diagnosis: its page in a browser, its Markdown, a run against an earlier one."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser import look_at
from diagnoses import MS, NO_CHECKPOINT, STAGES, cost, diagnosis, measured

from unicl_fast.benchmarks.diagnosis import clocks
from unicl_fast.benchmarks.diagnosis.earlier import (
    Comparison,
    KeptReport,
    Peers,
    as_kept,
    compare,
    read_peers,
    read_report,
)
from unicl_fast.benchmarks.diagnosis.model import (
    CHECKPOINT,
    Cost,
    Measured,
    RankFigures,
    Stage,
    StepTimes,
    Variant,
)
from unicl_fast.benchmarks.diagnosis.page import make_page
from unicl_fast.benchmarks.diagnosis.report import Diagnosis, markdown
from unicl_fast.benchmarks.diagnosis.run import Run
from unicl_fast.benchmarks.run import main
from unicl_fast.training.step_clock import StepClock

HOSTILE = "<script>parent.broken = broken = true</script><img src=x onerror=parent.broken=true>"
SECRET = "s3://user:secret@bucket/set"
INPUT = Path(__file__).parents[2] / "docs" / "results" / "input-256.json"
STEPS = tuple(
    StepTimes(
        made=(0.1 * number - 0.65, 0.1 * number - 0.59),  # the first ones before the time line
        given=0.1 * number + 0.02,
        begin=0.1 * number,
        parts={"data_wait": 0.02, "forward": 0.03, "loss": 0.003, "backward": 0.04,
               "optimizer": 0.007},
    )
    for number in range(20)
)  # fmt: skip
VARIANTS = (
    Variant(option=f"--data.train {HOSTILE}", about=HOSTILE, step=Cost(wall=0.7, cpu=1.0)),
    Variant(option="--efficiency.channels-last", about="the order of images"),
)


def run_of(**changes: Any) -> Measured:
    plain = measured(
        whole=cost(1.0, 1.6, spread=0.02), timeline=STEPS, variants=VARIANTS,
        made_meanwhile=((-0.65, 0.01), (0.05, 0.11), (1.9, 2.8)),
        not_measured=(f"--x {HOSTILE}: no time was left", f"{SECRET} cannot be read"), **changes,
    )  # fmt: skip
    return plain


def result_of(found: Diagnosis, given: tuple[str, ...] = ("--data", HOSTILE)) -> str:
    return Run(given=given, data=(SECRET,)).result_text({}, **found.as_dict())


def kept(wall: float, *, spread: float = 0.01, **changes: Any) -> KeptReport:
    found = as_kept(result_of(diagnosis(measured(whole=cost(wall, 1.6, spread=spread)))))
    return dataclasses.replace(found, **changes)


def page_of(
    found: Diagnosis, comparison: Comparison | None = None, peers: tuple[Peers, ...] = ()
) -> str:
    return make_page(found, json.loads(result_of(found)), comparison=comparison, peers=peers)


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
    whole = diagnosis(
        found,
        tried={"option": HOSTILE, "predicted_gain": 1.4, "measured_gain": 1.3, "now": 1, "then": 2},
    )
    old, new = kept(0.3), as_kept(result_of(whole))
    comparison = compare(old, new, name=HOSTILE, tolerance=0.05)
    peers = read_peers(INPUT)
    peers.rates[HOSTILE] = peers.rates["dali"]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(whole, comparison, (peers,)), encoding="utf-8")
    return path


HEADINGS = [
    "What limits this run", "The limit", "Against an earlier run", "The batch's way",
    "20 steps, one by one", "Advice", "Beside other programs", "The plan", "Machine and versions",
]  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_a_browser_shows_all_parts_on_a_phone_and_on_a_desktop(
    full_page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    found = look_at(full_page, tmp_path, width=width, dark=dark)
    assert found["headings"] == HEADINGS
    assert (found["plots"], found["shown_plots"]) == (4, 2)  # each is drawn for both widths
    assert found["scroll_width"] == width
    assert found["beside"] == []
    assert found["smallest_font"] >= 12
    assert found["smallest_drawn_font"] >= 10
    assert (found["scripts"], found["handlers"], found["broken"]) == (0, 0, False)
    assert (found["images"], set(found["addresses"])) == (0, set())
    brightness = sum(map(int, re.findall(r"\d+", found["background"])[:3])) / 3
    assert (brightness < 60) if dark else (brightness > 200)
    for text in ("the bottleneck", "REGRESSION", "JPEG decode", "torchvision-v2", HOSTILE[:40]):
        assert text in found["text"]


def test_a_page_asks_for_nothing_outside_of_itself(full_page: Path) -> None:
    text = full_page.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {
        f"#{name}" for name in re.findall(r'<clipPath id="([^"]+)"', text)
    }
    assert re.search(r"#0000[0-9a-f]{2}", text) is None  # every colour is the page's
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert len(text) < 300_000


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({}, "image encoder backward"),
        ({"loader": cost(2.0, 1.5)}, "JPEG decode"),
        ({"loader": cost(10.0), "store_wall": 10 * MS, "cached_wall": 0.5 * MS}, "object store"),
        ({"checkpoint": dataclasses.replace(NO_CHECKPOINT, every_steps=1)}, CHECKPOINT),
    ],
)
def test_the_bottleneck_is_marked_where_it_is(changes: dict[str, Any], slow: str) -> None:
    text = page_of(diagnosis(measured(**changes)))
    marked = re.findall(r'<div class="stage is-limit"><b>([^<]*)</b>', text)
    assert marked == [slow]
    assert text.count('<li class="slow">') == text.count(">the bottleneck</span>") == 1
    assert "1,000 images/s" in text


def test_a_slow_rank_is_marked() -> None:
    ranks = tuple(RankFigures(rank=r, loader=0.1 * MS, step=s * MS) for r, s in ((0, 0.5), (1, 1)))
    found = diagnosis(measured(world_size=2, ranks=ranks, loader=cost(0.1, 0.1)))
    assert "rank 1, the bottleneck" in page_of(found)


def test_parts_without_data_are_left_out_with_a_sentence() -> None:
    text = html.unescape(page_of(diagnosis(measured(variants=()))))
    assert "<svg" not in text
    assert "No step was timed by itself" in text
    assert "Nothing that was tried gains 3 %." in text
    assert "No result of other programs was given." in text
    assert "Against an earlier run" not in text
    assert "waits for batches" not in text


def test_markdown_has_the_page_s_tables_and_no_markup_from_outside() -> None:
    found = diagnosis(run_of())
    comparison = compare(kept(0.7), as_kept(result_of(found)), name=HOSTILE, tolerance=0.05)
    machine = json.loads(result_of(found))["machine"]
    text = markdown(found, machine, comparison=comparison, peers=[read_peers(INPUT)])
    for heading in ("Against an earlier run", "Stages", "Advice", "input-256.json", "The plan"):
        assert f"\n## {heading}\n" in text
    assert "| JPEG decode " in text
    assert "| this run: loader alone " in text
    assert re.search(r"(?<!\\)<", text) is None
    rows = [line for line in text.splitlines() if line.startswith("| dali ")]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("new", "spread", "is_regression", "words"),
    [
        (1.00, 0.01, False, "No regression: the run is 0.0% faster"),
        (0.50, 0.01, False, "No regression: the run is 100.0% faster"),
        (1.04, 0.01, False, "No regression: the run is 3.8% slower"),
        # 9 % slower, but a twentieth more than the spread of both
        (1.10, 0.03, False, "No regression that can be told: the run is 9.1% slower"),
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
    assert found.changes[-1].name == "all together"
    assert found.changes[-1].rate == pytest.approx(1 / new - 1)
    assert found.warnings == []


def test_a_tolerance_may_be_larger() -> None:
    assert not compare(kept(1.0), kept(1.5), name="", tolerance=0.4).is_regression


def test_stages_that_came_or_went_are_in_the_table() -> None:
    old, new = kept(1.0), kept(1.0)
    stages = (Stage(name="PNG decode", cost=cost(0.5, 1.0), side="graph"), *STAGES[3:])
    old = dataclasses.replace(old, measured=dataclasses.replace(old.measured, stages=stages))
    changes = {one.name: one for one in compare(old, new, name="", tolerance=0.05).changes}
    assert changes["PNG decode"].new is None
    assert changes["JPEG decode"].rate is None
    assert changes["augment"].rate == 0


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
        (("--peers", str(INPUT)), "--peers are shown in the report: give a folder for it too"),
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


@pytest.mark.parametrize("text", ["{}", '{"figures": {}, "settings": {}, "machine": {}}'])
def test_what_is_no_result_of_peers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text(text)
    with pytest.raises(ValueError, match=r"--peers: .*input.json is no result of `unicl-bench inp"):
        read_peers(tmp_path / "input.json")


def test_peers_are_those_that_do_the_whole_work() -> None:
    found = read_peers(INPUT)
    assert list(found.rates)[:3] == ["unicl_fast-raw", "unicl_fast", "ffcv-raw"]
    assert len(found.rates) == 11
    assert found.differences({"threads": 4, "image_size": 224, "gpu": "none"}) == [
        "threads was 2 and is now 4"
    ]


@pytest.mark.parametrize(("wall", "code"), [(1.0, None), (2.0, 1)])
def test_a_report_is_written_and_a_regression_ends_with_1(
    wall: float, code: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    expected = pytest.raises(SystemExit) if code else contextlib.nullcontext()
    with expected as stopped:
        run.conclude(found, read_report(out / "report.json"), [])
    assert getattr(getattr(stopped, "value", None), "code", None) == code
    verdict = "REGRESSION: the run is 50.0% slower" if code else "No regression: the run is"
    assert verdict in capsys.readouterr().out
    for name in ("report.html", "report.md", "report.json", "again.json"):
        text = (out / name).read_text(encoding="utf-8")
        assert verdict in text
        assert "secret" not in text
    # and is itself a report to compare with
    assert read_report(out / "report.json").measured.whole.wall == pytest.approx(wall * MS)


def test_rounds_are_kept_beside_their_median() -> None:
    costs = [cost(wall, 1.0) for wall in (3.0, 1.0, 2.0)]
    found = clocks.median(costs)
    assert found.rounds == pytest.approx((3 * MS, MS, 2 * MS))
    assert found.spread == pytest.approx((MS, 3 * MS))
    ratio = clocks.median_ratio(costs, [cost(1.0, 1.0)] * 3)
    assert cost(10.0).times(ratio).rounds == pytest.approx((30 * MS, 10 * MS, 20 * MS))
    assert cost(2.0).spread == (2 * MS, 2 * MS)


class Host:
    """Makes batches of numbered steps, as `HostBatches` does."""

    def __init__(self, tick: Any) -> None:
        self._tick = tick

    def batches(self, start_step: int) -> Iterator[Any]:
        for step in range(start_step, 1000):
            self._tick(0.5)
            yield self._batch(step)

    def group(self, resizer: Any, step: int) -> list[Any]:
        self._tick(3.0)
        return [self._batch(number) for number in (step, step + 1)]

    def _batch(self, step: int) -> Any:
        return SimpleNamespace(metadata=SimpleNamespace(actual=SimpleNamespace(step=step)))


@pytest.mark.parametrize("in_groups", [False, True])
def test_the_way_of_a_batch_is_on_one_clock(
    in_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that makes one batch ahead, and a step of 2 seconds in three parts."""
    now = [100.0]

    def tick(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    host: Any = Host(tick)
    trainer: Any = SimpleNamespace(clock=None)

    class Inner:
        def batches(self, start_step: int) -> Iterator[Any]:
            if in_groups:
                for first in range(start_step, 1000, 2):
                    for batch in host.group(None, first):
                        yield SimpleNamespace(step=batch.metadata.actual.step)
            for batch in host.batches(start_step):
                tick(0.25)  # decoding
                yield SimpleNamespace(step=batch.metadata.actual.step)

    loader: Any = Inner()
    timed = clocks.TimedLoader(loader, trainer, host)
    clock = trainer.clock = StepClock(torch.device("cpu"))
    tick(7.0)  # before the first batch is asked for
    batches = timed.batches(5)
    for _ in range(6):
        clock.begin("data_wait")
        next(batches)
        clock.begin("forward")
        tick(1.5)
        clock.begin("optimizer")
        tick(0.5)
        clock.end_step()
        tick(0.125)  # a line of the log
    clock.read()
    found, meanwhile = timed.timeline(2, 3)
    assert len(found) == 3
    assert found[0].begin == 0.0
    first = found[0]
    wait = 3.0 if in_groups else 0.75
    assert list(first.parts.items()) == [
        ("other", 0.125), ("data_wait", wait), ("forward", 1.5), ("optimizer", 0.5)
    ]  # fmt: skip
    assert first.given == 0.125 + wait
    assert first.made == ((0.125, 3.125) if in_groups else (0.125, 0.625))
    assert found[1].begin == sum(first.parts.values())
    if in_groups:  # the second of its group was made with it
        assert found[1].made == first.made
        assert "data_wait" not in found[1].parts
        assert meanwhile == [found[0].made, found[2].made]
    else:
        assert meanwhile == [step.made for step in found]
    timed.clear()
    assert timed.moments == []
