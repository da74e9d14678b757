"""The diagnosis of a run: its model and its sentences by made-up numbers, then a whole one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import look_at
from diagnoses import MS, NO_CHECKPOINT, STAGES, cost, diagnosis, measured
from packed_sets import Sample, pack
from program_runs import SMALL

from unicl_fast.benchmarks.diagnosis import clocks
from unicl_fast.benchmarks.diagnosis.advise import advise, find_limit, sparse_cadence
from unicl_fast.benchmarks.diagnosis.earlier import as_kept, compare
from unicl_fast.benchmarks.diagnosis.model import (
    CHECKPOINT,
    READ,
    Cost,
    RankFigures,
    Stage,
    Variant,
)
from unicl_fast.benchmarks.diagnosis.report import report_lines
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.tokenizer import Tokenizer


def test_the_slowest_resource_sets_the_rate() -> None:
    gpu = measured()
    assert gpu.seconds() == pytest.approx(1.0 * MS)
    assert gpu.predict() == pytest.approx(1000)
    cpu = measured(device="cpu", cores=2, loader=cost(0.5, 1.0), step=cost(1.0, 2.0))
    assert cpu.seconds() == pytest.approx(1.5 * MS)  # both share two cores: times add


def test_what_the_model_misses_is_missed_in_every_variant() -> None:
    found = measured(whole=cost(1.25))
    half = Variant(option="", about="", step=Cost(wall=0.9, cpu=1.0))
    assert found.predict() == pytest.approx(800)
    assert found.predict(half) == pytest.approx(800 / 0.9)


def test_a_faster_step_gains_no_more_than_the_loader_gives() -> None:
    tenth = Variant(option="", about="", step=Cost(wall=0.1, cpu=1.0))
    assert measured().predict(tenth) == pytest.approx(1250)


@pytest.mark.parametrize(
    ("changes", "stage", "resource"),
    [
        ({}, "image encoder backward", "step"),
        ({"loader": cost(2.0, 1.5)}, "JPEG decode", "loader"),
        (
            {
                "loader": cost(5.0, 1.5),
                "stages": (Stage(name=READ, cost=cost(4.9, 0.1), side="feed"), *STAGES[1:]),
            },
            READ,
            "loader",
        ),
        ({"cores": 1, "device": "cpu"}, "JPEG decode", "cores"),
        (
            {"checkpoint": dataclasses.replace(NO_CHECKPOINT, every_steps=1)},
            CHECKPOINT,
            "checkpoint",
        ),
        (
            {
                "world_size": 3,
                "ranks": tuple(
                    RankFigures(rank=r, loader=0.8 * MS, step=s * MS)
                    for r, s in enumerate((0.4, 0.9, 0.4))
                ),
            },
            "rank 1",
            "rank",
        ),
    ],
)
def test_the_limit_is_named_with_its_evidence(
    changes: dict[str, Any], stage: str, resource: str
) -> None:
    limit = find_limit(measured(**changes))
    assert (limit.stage, limit.resource) == (stage, resource)
    assert limit.sentence.startswith(f"{stage} limits the run to ")
    assert "times the present rate" in limit.head_room
    assert not limit.besides


def test_other_processes_are_named_beside_the_limit() -> None:
    found = measured(others_cores=4.0, others=(("burner, process 7", 3.9),))
    assert "burner, process 7: 3.9" in find_limit(found).besides
    (advice, *_), _ = advise(measured(device="cpu", others_cores=4.0, step=cost(1.0, 8.0)))
    assert advice.variant.option.startswith("end or move the other processes")
    assert advice.gain == pytest.approx(1.0)  # four of eight cores were left
    # one thread, which had a core for two thirds of the time
    serial = measured(
        device="cpu", cores=2, others_cores=1.4, loader=cost(0.1, 0.1), step=cost(1.5, 0.9),
        whole=cost(1.6, 1.0), step_ran=2 / 3,
    )  # fmt: skip
    (advice, *_), _ = advise(serial)
    assert advice.gain == pytest.approx(2 / 3)  # from 1.0 / 0.6 ms, on the cores, to 1.5 * 2 / 3


def test_on_a_busy_machine_the_cores_are_the_limit() -> None:
    """Loader and step, each alone, look slow because they wait for others."""
    found = measured(
        device="cpu", cores=2, others_cores=1.7, loader=cost(1.3, 0.5), step=cost(2.4, 0.5),
        whole=cost(5.0, 1.2),
    )  # fmt: skip
    assert found.resources()["cores"] == pytest.approx(1.0 / 0.3 * MS)
    assert find_limit(found).stage == "JPEG decode"  # the most CPU time


def test_advice_is_ordered_by_gain_and_small_gains_do_not_matter() -> None:
    variants = tuple(
        Variant(option=f"--by {ratio}", about="", step=Cost(wall=ratio, cpu=1.0))
        for ratio in (0.99, 0.85, 0.9, 1.2)
    )
    useful, idle = advise(measured(variants=variants))
    assert [one.variant.option for one in useful] == ["--by 0.85", "--by 0.9"]
    assert useful[0].gain == pytest.approx(1 / 0.85 - 1)
    assert [one.variant.option for one in idle] == ["--by 0.99", "--by 1.2"]


def test_checkpoints_that_come_too_often_are_advised_against() -> None:
    found = measured(checkpoint=dataclasses.replace(NO_CHECKPOINT, every_steps=5))
    # a step takes 0.1 s, so one of 1 s is not written after 0.5 s: 0.5 s of waiting, 0.1 of copying
    assert found.checkpoint_seconds(1.0 * MS) == pytest.approx(0.6 / 500)
    assert sparse_cadence(found) == math.ceil(100 * (0.1 + 0.2 / 8) / 0.1)
    (advice, *_), _ = advise(found)
    assert advice.variant.set == {"checkpoint": {"every_steps": sparse_cadence(found)}}


def test_a_slow_rank_is_advised_to_be_as_fast_as_the_others() -> None:
    ranks = tuple(RankFigures(rank=r, loader=0.1 * MS, step=s * MS) for r, s in ((0, 0.5), (1, 1)))
    found = measured(world_size=2, ranks=ranks, loader=cost(0.1, 0.1))
    (advice, *_), _ = advise(found)
    assert advice.variant.stage == "rank 1"
    assert advice.images_per_second == pytest.approx(2 * found.rate)


def test_a_store_is_a_limit_of_the_first_epoch_only() -> None:
    found = measured(loader=cost(10.0, 1.0), whole=cost(10.0), store_wall=10 * MS,
                     cached_wall=0.5 * MS)  # fmt: skip
    assert find_limit(found).stage == READ
    (advice, *_), _ = advise(found)
    assert advice.images_per_second == pytest.approx(1000)  # then the step limits


def test_a_larger_cache_is_advised_where_it_helps() -> None:
    found = measured(loader=cost(10.0, 1.0), whole=cost(10.0), store_wall=10 * MS,
                     cached_wall=0.5 * MS, larger_cache=40 * 10**9)  # fmt: skip
    (advice, *more), idle = advise(found)
    assert (advice.variant.option, more, idle) == ("--data.cache-bytes 40000000000", [], [])
    assert advice.images_per_second == pytest.approx(1000)


def test_a_rank_for_each_gpu_is_advised_as_far_as_the_cores_carry_them() -> None:
    found = measured(gpus=8)  # a step takes 1 ms, and both together 0.5 ms of each of 8 cores
    (advice, *_), _ = advise(found)
    assert advice.variant.option == "--nproc 8"
    busy = found.resources()["cores"]
    assert advice.images_per_second == pytest.approx(8 / max(1 * MS, 8 * busy))
    useful, idle = advise(measured(gpus=1))
    assert all(one.variant.stage != "ranks" for one in (*useful, *idle))


def test_a_flow_is_timed_without_what_was_begun_before() -> None:
    taken = []
    closed = []

    def batches() -> Any:
        try:
            for number in range(100):
                taken.append(number)
                yield number
        finally:
            closed.append(True)

    found = clocks.flow(batches(), images=4, skip=3, seconds=0)
    assert len(taken) == 3 + 3  # as many as may have waited in a queue
    assert closed
    assert 0 < found.wall < 1


def test_who_else_works_is_seen() -> None:
    watch = clocks.Watch()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burner:
        with watch.watching(), contextlib.suppress(subprocess.TimeoutExpired):
            burner.wait(timeout=0.6)
        burner.kill()
    assert watch.cores > 0
    assert any(str(burner.pid) in who for who, _ in watch.busiest) or watch.cores > 1  # load


def test_the_report_has_limit_advice_and_plan() -> None:
    found = measured(not_measured=("--x 1: no time was left",))
    text = "\n".join(report_lines(diagnosis(found)))
    for words in (
        "THE LIMIT: image encoder backward",
        "ADVICE",
        "not measured: --x 1",
        "then 0:16:40 on 1 rank",
    ):
        assert words in text


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    files = sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:24]
    samples = [Sample(file.read_bytes(), labels=[n % 3]) for n, file in enumerate(files)]
    folder = tmp_path_factory.mktemp("diagnosis") / "packed"
    with pack(folder, samples, class_names=["dog", "cat", "horse"], tokenizer=Tokenizer()):
        return folder


@pytest.mark.dali
def test_images_are_packed_anew_with_all_that_a_loader_needs(
    labelled: Path, tmp_path: Path
) -> None:
    from unicl_fast.benchmarks.diagnosis.variants import pack_again

    with PackedDataset(labelled) as dataset:
        pack_again(dataset, tmp_path / "small", count=8, short_side=40, format="jpeg")
        with PackedDataset(tmp_path / "small") as small:
            assert len(small) == 8
            assert min(small.samples["height"].min(), small.samples["width"].min()) == 40
            assert small.labels_of(5).tolist() == dataset.labels_of(5).tolist()
            assert small.manifest.templates == dataset.manifest.templates


@pytest.mark.dali
def test_images_in_memory_are_those_that_were_read_just_before() -> None:
    from unicl_fast.benchmarks.diagnosis.loader_parts import LoaderParts

    reads: list[tuple[bool, int]] = []

    def read(pairs: list[tuple[int, int]], *, cold: bool, seconds: float) -> Cost:
        reads.append((cold, len(pairs)))
        return Cost(wall=seconds / (9.5 if cold else 100), cpu=0.0)

    bench: Any = SimpleNamespace(
        loader=SimpleNamespace(host=SimpleNamespace(plan_steps=lambda first, count: None)),
        datasets=[SimpleNamespace(image_bytes=lambda sample: b"bytes")],
        planned_samples=lambda most: ([0] * 200, [*range(100), *range(100)]),
        local_batch=8, reads_cold=False, read=read,
    )  # fmt: skip
    first, *_ = LoaderParts._feed_stages(bench, seconds=0.03)
    assert reads == [(True, 100), (False, 9)] * 3
    assert first.cost.wall == pytest.approx(1e-4)
    assert "cold: 950 images/s" in first.note


@pytest.mark.dali
def test_what_is_read_cold_is_in_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicl_fast.benchmarks.diagnosis.loader_parts import LoaderParts

    read: list[int] = []
    dropped: list[tuple[int, int]] = []
    (tmp_path / "shard").write_bytes(b"images")
    dataset = SimpleNamespace(
        folder=tmp_path, remote=None, samples=np.array([(40,)] * 9, [("size", int)]),
        shard_of=lambda sample: "shard", offset_of=lambda sample: 40 * sample,
        image_bytes=lambda sample: read.append(sample) or b"bytes",
    )  # fmt: skip
    bench: Any = SimpleNamespace(datasets=[dataset])
    bench.forget = functools.partial(LoaderParts.forget, bench)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *range_, **_: dropped.append(range_[:2]))
    pairs = [(0, sample) for sample in range(9)]
    assert LoaderParts.read(bench, pairs, cold=True, seconds=0.01).wall > 0
    assert read == list(range(9))  # the second time they would be warm
    assert dropped == [(0, 0)]  # the whole file: of less than a page, nothing is dropped
    LoaderParts.read(bench, pairs, cold=False, seconds=0.01)
    assert len(read) > 20


@pytest.mark.dali
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_a_run_is_diagnosed_from_its_options(labelled: Path, tmp_path: Path, nproc: int) -> None:
    result = tmp_path / "result.json"
    options = ["--seconds", "2", "--try", "--rounds", "1", "--json", str(result), *SMALL]
    out = tmp_path / "report"
    command = ["run", "--data", str(labelled), "--nproc", str(nproc), "--out", str(out), *options]
    shown = subprocess.run(
        [sys.executable, "-m", "unicl_fast.benchmarks.run", *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
    ).stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert (out / "report.json").read_text() == result.read_text()
    found = json.loads(result.read_text())
    names = {stage["name"] for stage in found["measured"]["stages"]}
    assert {READ, "checksums", "plan and target map", "JPEG decode", "resize and flip"} <= names
    assert {"image encoder forward", "loss and its gradient", "clip and update"} <= names
    assert found["limit"]["stage"] in {*names, CHECKPOINT}
    assert found["measured"]["local_batch"] == 8 // nproc
    assert found["measured"]["checkpoint"]["num_bytes"] > 1e5
    assert found["measured"]["variants"]
    # the data set is too small for the larger batch, if there was time to try it
    reasons = ("no time was left", "has 24 samples in an epoch")
    for text in found["measured"]["not_measured"]:
        assert any(reason in text for reason in reasons), text
    assert found["hours"] > 0
    assert found["largest_batch"] >= 8
    assert "THE LIMIT: " in shown
    assert not list(Path.cwd().glob("unicl-bench-*"))
    check_spreads(found["measured"])
    kept = as_kept(result.read_text())
    assert not compare(kept, kept, name="itself", tolerance=0.0).is_regression
    page = look_at(out / "report.html", tmp_path, width=390)
    assert (page["scroll_width"], page["beside"], page["broken"]) == (390, [], False)


def check_spreads(found: dict[str, Any]) -> None:
    """Loader, step, whole and stages have rounds."""
    for part in ("loader", "step", "whole"):
        assert min(found[part]["rounds"]) <= found[part]["wall"] <= max(found[part]["rounds"])
    timed = [stage for stage in found["stages"] if stage["name"] != "collectives"]  # in one go
    assert all(len(stage["cost"]["rounds"]) >= 2 for stage in timed)


def test_wrong_options_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unicl_fast.benchmarks.run import main

    with pytest.raises(SystemExit) as stopped:
        main(["run", "--data", str(tmp_path / "nowhere"), *SMALL])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
