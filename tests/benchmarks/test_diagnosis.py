"""The diagnosis of a run: its sentences by made-up numbers, its turns, its end, and a whole one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diagnoses import MS, cost, diagnosis, measured, trial
from packed_sets import Sample, pack
from program_runs import SMALL
from small_runs import labelled_batch, tiny_config

from unicl_fast.batch import Batch, ListLoader, ReadingTime
from unicl_fast.benchmarks.diagnosis.advise import advise, find_limit, hints, neighbours
from unicl_fast.benchmarks.diagnosis.bench import Bench, Contestant, flow
from unicl_fast.benchmarks.diagnosis.diagnose import Diagnoser
from unicl_fast.benchmarks.diagnosis.model import READ, Cost, RankFigures, rate_text
from unicl_fast.benchmarks.diagnosis.report import report_lines
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer

ON_CPU = {"device": "cpu", "cores": 2, "compute_threads": 2}


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, "image encoder backward"),
        (ON_CPU, "JPEG decode"),  # the most CPU time
        ({"waiting": 0.5}, "JPEG decode"),
        ({"waiting": 0.5, "reading": 0.9}, READ),
        ({"reading": 0.9}, "image encoder backward"),  # it reads ahead, and nobody waits
        (
            {
                "world_size": 3,
                "ranks": tuple(
                    RankFigures(rank=r, loader=0.8 * MS, step=s * MS)
                    for r, s in enumerate((0.4, 0.9, 0.4))
                ),
            },
            "rank 1",
        ),
    ],
)
def test_the_limit_is_named_with_its_evidence(changes: dict[str, Any], stage: str) -> None:
    limit = find_limit(measured(**changes))
    assert limit.stage == stage
    assert limit.sentence.startswith(f"{stage} limits the run to ")


def test_advice_gains_in_each_round_and_is_ordered_by_gain() -> None:
    trials = (
        trial("--a", 0.85, 0.9, 0.8), trial("--b", 0.5, 0.5), trial("--straddles", 0.5, 1.01),
        trial("--little", 0.99, 0.98), trial("--once", 0.5),
    )  # fmt: skip
    useful, idle = advise(measured(trials=trials))
    assert [one.change.option for one in useful] == ["--b", "--a"]
    assert useful[1].gain == pytest.approx(1 / 0.85 - 1)
    assert str(useful[1]) == "+18% (+11% to +25%)"
    assert {one.change.option for one in idle} == {"--straddles", "--little", "--once"}


def test_the_best_change_is_measured_again_since_coming_first_flatters_it() -> None:
    found = measured(trials=(trial("--a", 0.5, 0.6), trial("--b", 0.7, 0.7)))
    diagnoser = Diagnoser.__new__(Diagnoser)
    diagnoser.bench = SimpleNamespace(ranks=Ranks())  # type: ignore[assignment]
    diagnoser.seconds, diagnoser._begun = 1000.0, time.perf_counter()
    again = trial("--a", 0.9, 0.9)
    with mock.patch.object(Diagnoser, "trial", return_value=again):
        trials = diagnoser._with_the_best_again(found).trials
        assert {one.change.option: one for one in trials} == {"--a": again, "--b": found.trials[1]}
        diagnoser.seconds = -1.0
        assert diagnoser._with_the_best_again(found) == found
    assert diagnoser._with_the_best_again(measured()) == measured()


def test_a_busy_machine_is_named_first_and_changes_are_compared_by_cpu_time() -> None:
    trials = (trial("--wall", 0.5, 0.5), trial("--cpu", 2.0, 2.0, cpu=0.5))
    found = measured(others_cores=4.0, trials=trials)
    assert [one.change.option for one in advise(found)[0]] == ["--cpu"]
    first, *rest = report_lines(diagnosis(found))
    assert first.startswith("OTHER PROCESSES took 4.0 of 8 cores. So no ")
    assert any("now 625 images per CPU second" in line for line in rest)
    waits = dataclasses.replace(found, waiting=0.5)  # less of it takes no less CPU time
    assert [one.change.option for one in advise(waits)[0]] == ["--wall"]
    assert not neighbours(measured(others_cores=0.7))


def test_what_cannot_be_measured_is_a_hint() -> None:
    ranks = tuple(RankFigures(rank=r, loader=0.1 * MS, step=s * MS) for r, s in ((0, 0.5), (1, 1)))
    found = measured(world_size=2, ranks=ranks, gpus=8)
    assert list(hints(found)) == [
        "--nproc 8: a rank for each of the 8 GPUs", "mend or replace the machine of rank 1"
    ]  # fmt: skip
    assert not list(hints(measured(gpus=1)))
    assert any("--resize short:256" in one for one in hints(measured(waiting=0.5)))


def test_the_report_has_limit_advice_and_plan() -> None:
    found = measured(not_measured=("--x 1: no time was left",), trials=(trial("--a 1", 0.5, 0.4),))
    text = "\n".join(report_lines(diagnosis(found)))
    for words in (
        "THE LIMIT: image encoder backward",
        "ADVICE (now 1,000 images/s",
        "--a 1: +125% (+100% to +150%)",
        "not measured: --x 1",
        "take 0:16:40 on 1 rank",
    ):
        assert words in text
    assert rate_text(Cost(wall=MS, cpu=0.0, rounds=(MS, 2 * MS))) == "1,000 (500 to 1,000)"
    assert rate_text(cost(0.0)) == "-"


def test_a_flow_is_timed_without_what_was_begun_before() -> None:
    taken, closed = [], []

    def batches() -> Iterator[int]:
        try:
            for number in range(100):
                taken.append(number)
                yield number
        finally:
            closed.append(True)

    found = flow(batches(), images=4, skip=3, seconds=0)
    assert len(taken) in (1 + 2, 3 + 2)
    assert closed
    assert 0 < found.wall < 1


class SleepyLoader:
    """A loader whose batches take their time."""

    def __init__(self, batch: Batch, seconds: float) -> None:
        self.plain, self.seconds, self.starts = ListLoader([batch]), seconds, 0

    def batches(self, start_step: int) -> Iterator[Batch]:
        self.starts += 1
        for batch in self.plain.batches(start_step):
            time.sleep(self.seconds)
            yield batch

    def close(self) -> None:
        pass


def test_turns_end_in_time_and_continue_where_they_ended() -> None:
    """And say which part of the time goes where."""
    images = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    loader: Any = SleepyLoader(labelled_batch(images, objective="unicl"), 0.3)
    loader.pace, loader.reading = SimpleNamespace(batches_begun=100), ReadingTime()
    trainer = make_trainer(tiny_config(steps=1 << 20), loader, progress=False)
    bench = Bench.__new__(Bench)
    bench.ranks, bench.device, bench.config = Ranks(), trainer.device, trainer.config
    bench.now = Contestant(
        trainer=trainer, loader=loader, batches=loader.batches(0), local_batch=12,
        compute_threads=torch.get_num_threads(),
    )  # fmt: skip
    for number in range(2):
        begun = time.perf_counter()
        # of 100 steps that need not count, those that wait do count
        turn = bench.turn(bench.now, seconds=0.5)
        wall = 12 * turn.steps * turn.cost.wall
        assert 1 <= turn.steps <= 3
        assert turn.parts["data_wait"] > 0.5 * wall
        assert min(turn.parts[part] for part in ("forward", "backward", "optimizer")) > 0
        assert sum(turn.parts.values()) == pytest.approx(wall, rel=0.1)
        assert number == 0 or time.perf_counter() - begun < 0.5 + 4 * wall / turn.steps
    assert loader.starts == 1


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    files = sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:24]
    samples = [Sample(file.read_bytes(), labels=[n % 3]) for n, file in enumerate(files)]
    folder = tmp_path_factory.mktemp("diagnosis") / "packed"
    with pack(folder, samples, class_names=["dog", "cat", "horse"], tokenizer=Tokenizer()):
        return folder


SLEEPING = """
import sys, time
from unicl_fast.benchmarks.diagnosis import run
from unicl_fast.benchmarks.run import main
from unicl_fast.pipelines.loader import TrainLoader
run._START_SECONDS = 5.0
TrainLoader.batches = lambda self, start_step: time.sleep(1000)
main(sys.argv[1:])
"""


@pytest.mark.dali
@pytest.mark.slow
def test_a_loader_that_never_comes_back_does_not_hold_up_the_end(
    labelled: Path, tmp_path: Path
) -> None:
    options = ["run", "--data", str(labelled), "--seconds", "4", "--folder", str(tmp_path), *SMALL]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SLEEPING, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in <lambda>" in done.stderr  # what it was at
    assert time.monotonic() - begun < 60


@pytest.mark.dali
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_a_run_is_diagnosed_from_its_options(labelled: Path, tmp_path: Path, nproc: int) -> None:
    result = tmp_path / "result.json"
    options = ["--seconds", "10", "--json", str(result), *SMALL]
    shown = subprocess.run(
        [sys.executable, "-m", "unicl_fast.benchmarks.run", "run", "--data", str(labelled),
         "--nproc", str(nproc), "--folder", str(tmp_path), *options],
        check=True, stdout=subprocess.PIPE, text=True, timeout=400,
    ).stdout  # fmt: skip
    found = json.loads(result.read_text())
    names = {stage["name"] for stage in found["measured"]["stages"]}
    assert {READ, "checksums", "plan and target map", "JPEG decode", "resize and flip"} <= names
    assert {"image encoder forward", "loss and its gradient", "clip and update"} <= names
    assert found["limit"]["stage"] in {*names, "rank 0", "rank 1"}  # on a busy machine
    assert found["measured"]["local_batch"] == 8 // nproc
    assert found["measured"]["trials"]
    for part in ("loader", "step", "whole"):
        rounds = found["measured"][part]["rounds"]
        assert min(rounds) <= found["measured"][part]["wall"] <= max(rounds)
    assert found["hours"] > 0
    assert found["measured"]["largest_batch"] >= 8
    assert shown.count("THE LIMIT: ") == 1
    assert list(tmp_path.iterdir()) == [result]


def test_wrong_options_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unicl_fast.benchmarks.run import main

    with pytest.raises(SystemExit) as stopped:
        main(["run", "--data", str(tmp_path / "nowhere"), *SMALL])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
