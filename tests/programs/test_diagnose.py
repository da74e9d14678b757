"""The diagnosis of a run: its sentences by made-up numbers, its turns, its end, and a whole one."""

import contextlib
import dataclasses
import json
import os
import re
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
from diagnoses import MS, STAGES, cost, measured, trial
from packed_sets import Sample, pack
from pages import Page
from program_runs import SMALL, refusal_of
from small_runs import labelled_batch, tiny_config

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools import bench
from unicl_fast.tools.diagnose import diagnose, turns
from unicl_fast.tools.diagnose.advise import advise, find_limit, neighbours
from unicl_fast.tools.diagnose.bench import Bench
from unicl_fast.tools.diagnose.diagnose import Diagnoser
from unicl_fast.tools.diagnose.model import CHECKPOINT, EVALUATION, LOGGING, READ, Periodic, Stage
from unicl_fast.tools.diagnose.report import make_page, report_lines
from unicl_fast.tools.diagnose.step_parts import StepInParts
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.step_clock import StepClock

ON_CPU = {"device": "cpu", "cores": 2, "compute_threads": 2}
TRACKERS = Stage(name=LOGGING, cost=cost(0.1, 0.6), side="loop")
RANKS = tuple((0.8 * MS, step * MS) for step in (0.4, 0.9, 0.4))
SAVES = Periodic(name=CHECKPOINT, every_steps=3, seconds=0.2)


@pytest.mark.parametrize(
    ("changes", "stage", "remedy"),
    [
        ({}, "image encoder backward", ""),
        (ON_CPU, "JPEG decode", ""),  # the most CPU time
        ({"waiting": 0.5}, "JPEG decode", ""),
        ({"waiting": 0.5, "whole": cost(1.0, 7.0)}, "JPEG decode", "pack build --resize short:256"),
        ({"waiting": 0.5, "threads": 2}, "JPEG decode", "set data.threads=0"),
        ({"waiting": 0.5, "reading": 0.9}, READ, "copy the data to a faster disk"),
        ({"waiting": 0.5, "reading": 0.9, "is_remote": True}, READ, "; give data.cache_bytes room"),
        ({"reading": 0.9}, "image encoder backward", ""),  # it reads ahead, and nobody waits
        ({"periodic": (SAVES,)}, CHECKPOINT,
         "training waits 0.20 s every 3 steps; raise checkpoint.every_steps"),
        ({"periodic": (Periodic(name=EVALUATION, every_steps=9, seconds=0.3),)}, EVALUATION, ""),
        ({"stages": (*STAGES[:-1], TRACKERS)}, LOGGING, ""),
        ({"world_size": 3, "ranks": RANKS}, "rank 1", ""),
    ],
)  # fmt: skip
def test_the_limit_is_named_with_the_remedy_that_a_run_logs(changes, stage, remedy):
    found, sentence = find_limit(measured(**changes))
    assert found == stage
    assert sentence.startswith(f"{stage} limits the run to ")
    assert remedy in sentence
    if not stage.startswith("rank"):
        marked = re.findall('"name">(.*), the bottleneck', make_page(measured(**changes), {}))
        assert marked == [stage]


def test_advice_gains_in_each_round_and_is_ordered_by_gain():
    trials = (
        trial("--a", 0.85, 0.9, 0.8), trial("--b", 0.5, 0.5), trial("--straddles", 0.5, 1.01),
        trial("--little", 0.99, 0.98), trial("--once", 0.5),
    )  # fmt: skip
    useful, idle = advise(measured(trials=trials))
    assert [one.change.option for one in useful] == ["--b", "--a"]
    assert useful[1].gain == pytest.approx(1 / 0.85 - 1)
    assert str(useful[1]) == "+18% (+11% to +25%)"
    assert {one.change.option for one in idle} == {"--straddles", "--little", "--once"}


def diagnosed(*trials: Any, left: float = 1.0) -> Diagnoser:
    """A diagnosis after its trials."""
    found = Diagnoser.__new__(Diagnoser)
    found.bench = SimpleNamespace(ranks=Ranks())
    found.deadline = SimpleNamespace(left=left, seconds=60.0)
    found.measured = measured(trials=trials)
    found._report = lambda measured: setattr(found, "measured", measured)
    return found


def test_the_best_change_is_measured_again_since_coming_first_flatters_it():
    trials = (trial("--a", 0.5, 0.6), trial("--b", 0.7, 0.7))
    again = trial("--a", 0.9, 0.9)
    with mock.patch.object(Diagnoser, "trial", return_value=again) as measure:
        found = diagnosed(*trials)
        assert found.confirm(None) is None
        assert found.measured.trials == (trials[1], again)
        late = diagnosed(*trials, left=-1.0)
        assert late.confirm(None) is None
        assert late.measured.trials == trials
        assert diagnosed().confirm(None) is None
    measure.assert_called_once()


def test_only_changes_that_help_again_and_leave_results_alone_are_applied():
    other = trial("--other", 0.3, 0.3, same_results=False)
    packed = trial("pack", 0.4, 0.4, side="images")
    trials = (other, packed, trial("--a", 0.5, 0.6), trial("--b", 0.7, 0.7))
    found, applied = diagnosed(*trials), []
    again = {"--a": trial("--a", 0.9, 1.1), "--b": trial("--b", 0.8, 0.8)}
    with mock.patch.object(Diagnoser, "trial", lambda self, one, turns: again[one.option]):
        kept = found.confirm(applied)
    assert kept is not None
    assert kept.option == "--b"
    assert [(one["option"], one["is_kept"]) for one in applied] == [("--a", False), ("--b", True)]
    with mock.patch.object(Diagnoser, "trial", return_value="does not fit"):
        assert found.confirm(applied) is None
    assert applied[-1] == {**applied[-1], "option": "--b", "again": [0.0], "is_kept": False}
    assert found.measured.not_measured == ("--b: does not fit",)


def test_work_in_the_background_holds_up_the_next_one():
    work = Periodic(name=CHECKPOINT, every_steps=3, seconds=0.2, writing=1.0)
    assert work.seconds_of_step(0, 1.0) == 0
    assert work.seconds_of_step(3, 1.0) == pytest.approx(0.2 / 3)
    assert work.seconds_of_step(3, 0.1) == pytest.approx((0.2 + 0.7) / 3)


def test_a_busy_machine_is_named_first_and_changes_are_compared_by_cpu_time():
    trials = (trial("--wall", 0.5, 0.5), trial("--cpu", 2.0, 2.0, cpu=0.5))
    found = measured(others_cores=4.0, trials=trials)
    assert [one.change.option for one in advise(found)[0]] == ["--cpu"]
    first, *rest = report_lines(found)
    assert first.startswith("OTHER PROCESSES used 4.0 of 8 cores. Gains ")
    assert any("now 625 images per CPU second" in line for line in rest)
    waits = dataclasses.replace(found, waiting=0.5)  # less of it takes no less CPU time
    assert [one.change.option for one in advise(waits)[0]] == ["--wall"]
    assert not neighbours(measured(others_cores=0.7))


def test_the_report_has_limit_advice_time_and_applied_changes():
    applied = (
        {"option": "--a 1", "gain": 0.3, "again": [0.2, 0.4], "is_kept": True},
        {"option": "--b 2", "gain": 0.1, "again": [-0.1, 0.4], "is_kept": False},
    )
    found = measured(
        applied=applied, not_measured=("--x 1: no time was left",),
        trials=(trial("--a 1", 0.5, 0.4),),
    )  # fmt: skip
    text = "\n".join(report_lines(found))
    for words in (
        "THE LIMIT: image encoder backward",
        "ADVICE (now 1,000 images/s",
        "--a 1: +125% (+100% to +150%)",
        "not measured: --x 1",
        "THE RUN: 0:16:40 for 1,000,000 samples, on 1 rank",
        "APPLIED --b 2: +10%, then -10%, +40%: not kept",
        "USE: --a 1",
    ):
        assert words in text


def test_a_loader_is_timed_without_earlier_batches():
    taken: list[float] = []

    def take() -> None:
        taken.append(0.3 if len(taken) < 3 else 0.0)
        time.sleep(taken[-1])

    found = Bench.__new__(Bench)
    found.ranks, found.local_batch = Ranks(), 4
    one = SimpleNamespace(loader=SimpleNamespace(batches_begun=3, take=take))
    assert 0 < found.loader_cost(one, seconds=1.0).wall < 0.1
    assert len(taken) > 3 + 2


class SleepyLoader:
    """A loader that sleeps before each batch."""

    def __init__(self, batch: Batch, seconds: float) -> None:
        self.plain, self.seconds, self.starts = ListLoader([batch]), seconds, 0

    def batches(self, start_step: int) -> Iterator[Batch]:
        self.starts += 1
        for batch in self.plain.batches(start_step):
            time.sleep(self.seconds)
            yield batch

    def close(self) -> None:
        pass


def test_turns_of_a_loop_end_in_time_and_resume_with_the_time_of_each_part():
    images = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    loader = SleepyLoader(labelled_batch(images, objective="unicl"), 0.3)
    clock = StepClock(torch.device("cpu"))
    trainer = make_trainer(tiny_config(steps=1 << 20), loader, progress=False)
    trainer.observers, trainer.loader = [], turns.PacedLoader(loader, clock)
    turns.follow(trainer, clock)
    for number in range(2):
        begun = time.perf_counter()
        # 100 steps are to be skipped, but steps that wait are timed
        loop = trainer.loader.turn(trainer, seconds=0.5, skip=100)
        assert 1 <= loop.steps <= 3
        assert loop.parts["data_wait"] > 0.29 * loop.steps  # all else is as slow as the machine
        assert min(loop.parts[part] for part in ("forward", "backward", "optimizer")) > 0
        assert sum(loop.parts.values()) == pytest.approx(loop.wall, rel=0.1)
        assert number == 0 or time.perf_counter() - begun < 0.5 + 4 * loop.wall / loop.steps
    assert loader.starts == 1


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_step_with_a_frozen_tower_is_measured_in_parts(tower):
    images = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    batch = labelled_batch(images, objective="unicl")
    config = tiny_config().changed(optim={"freeze": (tower, f"{tower}_projection")})
    trainer = make_trainer(config, ListLoader([batch]), progress=False)
    assert f"{tower} encoder backward" in StepInParts(trainer, batch).take()


def test_turns_leave_out_the_pass_that_orders_buckets_and_evaluations_see_the_whole_model():
    one, whole, seen = mock.MagicMock(), mock.Mock(), []
    one.trainer.parallel.evaluated.return_value = contextlib.nullcontext(whole)
    one.trainer.parallel.has_buckets = True
    own = mock.Mock(now=one, ranks=Ranks(), _evaluations={"some": seen.append}, _evaluated=[1.0])
    one.compute_threads = torch.get_num_threads()
    Bench.loop(own, one, seconds=1, skips=False)
    one.loader.turn.assert_called_once_with(one.trainer, seconds=1, skip=1)
    assert [periodic.seconds for periodic in Bench.evaluation(own, seconds=1)] == [1.0]
    assert seen == [whole.eval()]


ENDING = """
import sys, time
from pathlib import Path
from unicl_fast.tools.diagnose import deadline
deadline.START_SECONDS = 1.0
show = lambda found: print(found.applied)
one = deadline.Deadline(0.2, scratch=Path(sys.argv[1]), conclude=show)
with one.enforced():
    if len(sys.argv) > 2:
        one.found = type("Found", (), {"applied": sys.argv[2]})
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [(("half",), 0, "half"), ((), 2, "nothing could be measured within 1 s")],
)
def test_a_diagnosis_ends_at_its_deadline(found, code, words, tmp_path):
    begun, scratch = time.monotonic(), tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(scratch), *found],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert time.monotonic() - begun < 50
    assert not scratch.exists()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    files = sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:24]
    samples = [Sample(file.read_bytes(), labels=[n % 3]) for n, file in enumerate(files)]
    folder = tmp_path_factory.mktemp("diagnosis") / "packed"
    with pack(folder, samples, class_names=["dog", "cat", "horse"], tokenizer=Tokenizer()):
        return folder


@pytest.mark.dali
def test_images_are_packed_anew_with_all_that_a_loader_needs(labelled, tmp_path):
    from unicl_fast.tools.diagnose.changes import pack_again

    smaller = {"short_side": 40, "format": "jpeg"}
    with PackedDataset(labelled) as dataset:
        pack_again(dataset, tmp_path / "small", count=8, seconds=60, **smaller)
        with PackedDataset(tmp_path / "small") as small:
            assert len(small) == 8
            assert min(small.samples["height"].min(), small.samples["width"].min()) == 40
            assert small.labels_of(5).tolist() == dataset.labels_of(5).tolist()
            assert small.manifest.templates == dataset.manifest.templates
        # without time for a second one, the first is repeated; and bytes can stay unchanged
        pack_again(dataset, tmp_path / "copied", count=8, seconds=0)
        with PackedDataset(tmp_path / "copied") as copied:
            images = {bytes(copied.image_bytes(index)) for index in range(8)}
            assert images == {bytes(dataset.image_bytes(0))}


SLEEPING = """
import sys, time
from unicl_fast.tools import bench
from unicl_fast.pipelines.train_loader import TrainLoader
plain = TrainLoader.batches

def batches(self, start_step):
    for batch in plain(self, start_step):
        time.sleep(1)
        yield batch

TrainLoader.batches = batches
bench.main(sys.argv[1:])
"""


@pytest.mark.dali
@pytest.mark.slow
def test_a_loader_that_sleeps_is_named_in_time(labelled, tmp_path):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SLEEPING, "run", "--data", str(labelled), "--seconds", "4", *SMALL],
        capture_output=True, text=True, check=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert "the loop waits for batches" in done.stdout
    assert time.monotonic() - begun < 2 * 4 + 60 + 30  # the report takes a while on a busy machine
    assert not list(tmp_path.glob("unicl-bench-*"))


def test_stored_features_are_advised_and_a_run_that_stores_them_is_timed_by_its_encoding():
    found = measured(num_images=60_000)
    reports = {
        stored: "\n".join(report_lines(dataclasses.replace(found, stored=stored)))
        for stored in ("", "could", "does")
    }
    assert "encoded once they need 0:01:00 instead of 0:16:40" in reports["could"]
    assert "stored-features" not in reports[""]
    assert "THE RUN: 0:01:00 to encode 60,000 images once" in reports["does"]
    rare = dataclasses.replace(found, num_images=10**6, stored="could")
    assert "stored-features" not in "\n".join(report_lines(rare)), "a run of a single epoch"


@pytest.mark.dali
@pytest.mark.parametrize("stores", [True, False])
def test_a_run_that_stores_features_is_measured_while_it_encodes(stores, monkeypatch, tmp_path):
    config = build_preset("photos-heads" if stores else "photos-features")
    if stores:
        config = config.changed(efficiency={"stored_features": "features"})

    def on_bench(config: TrainConfig, *of: Any, **more: Any) -> contextlib.nullcontext[Any]:
        assert not config.efficiency.stored_features
        return contextlib.nullcontext(SimpleNamespace(config=config))

    one_rank = contextlib.nullcontext((Ranks(), torch.device("cpu")))
    monkeypatch.setattr(diagnose, "on_ranks", lambda config: one_rank)
    monkeypatch.setattr(diagnose, "on_bench", on_bench)

    def diagnoser(*of: Any, note: Any, **more: Any) -> Any:
        return mock.Mock(diagnose=lambda: note(measured()), confirm=lambda applied: None)

    monkeypatch.setattr(diagnose, "Diagnoser", diagnoser)
    deadline = mock.MagicMock()
    diagnose.measure(config, deadline, applies=False, scratch=tmp_path)
    assert deadline.found.stored == ("does" if stores else "could")


@pytest.mark.dali
@pytest.mark.long
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_is_diagnosed_from_its_options(labelled, tmp_path, nproc):
    out = tmp_path / "report"
    options = ["--seconds", "10", "--apply", *SMALL]
    command = ["run", "--data", str(labelled), "--nproc", str(nproc), "--out", str(out), *options]
    shown = subprocess.run(
        [sys.executable, "-m", "unicl_fast.tools.bench", *command],
        check=True, stdout=subprocess.PIPE, text=True, timeout=400,
    ).stdout  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    found = json.loads((out / "report.json").read_text())
    names = {stage["name"] for stage in found["stages"]}
    assert {READ, "JPEG decode"} <= names
    assert {"image encoder forward", "loss and its gradient", "clip and update", LOGGING} <= names
    assert found["limit"]["stage"] in {*names, CHECKPOINT, "rank 0", "rank 1"}  # on busy cores
    assert found["local_batch"] == 8 // nproc
    assert found["trials"]
    assert len(found["ranks"]) == nproc
    assert found["seconds"] > 0
    assert "THE LIMIT: " in shown
    assert not list(Path.cwd().glob("unicl-bench-*"))
    assert "What limits this run" in Page(out / "report.html").headings


def test_wrong_options_are_refused_in_a_sentence(tmp_path):
    assert "nowhere" in refusal_of(bench, "run", "--data", tmp_path / "nowhere", *SMALL)
