"""The parts of a step: they sum to the time that passes, and noting them waits for nothing."""

import time
from collections.abc import Iterator

import pytest
import torch
from fake_gpu import FakeEvent
from small_runs import global_batch, tiny_config, trainer_of

from unicl_fast.batch import Batch
from unicl_fast.system.phases import WaitingForRanks
from unicl_fast.training import step_clock
from unicl_fast.training.metrics import StepMeter, read_metrics
from unicl_fast.training.step_clock import NO_TRAINING, PARTS, StepClock

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Hours:
    """A clock that a test moves, for CPUs and for the events of GPUs."""

    def __init__(self) -> None:
        self.now = FakeEvent.now = 0.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        FakeEvent.now += seconds


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hours]:
    hours = Hours()
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: hours.now)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", torch.device)
    yield hours
    FakeEvent.now = 0.0


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    return {part: pytest.approx(value) for part, value in seconds.items() if value}


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_parts_are_summed_over_steps(hours, device):
    clock = StepClock(device)
    hours.pass_by(0.5)
    for part, seconds in {"data_wait": 1, "forward": 2, "backward": 4, "optimizer": 8}.items():
        clock.begin(part)
        hours.pass_by(seconds)
    clock.begin("other")
    clock.begin("evaluation")
    hours.pass_by(16)
    clock.begin("forward")
    hours.pass_by(32)
    clock.begin("other")
    hours.pass_by(64)
    first = {"other": 0.5, "data_wait": 1, "forward": 2, "backward": 4, "optimizer": 8}
    assert nonzero(clock.cut()()) == first | {"forward": 34, "evaluation": 16, "other": 64.5}
    hours.pass_by(3)
    assert nonzero(clock.cut()()) == {"other": 3}  # without a gap


def test_only_reading_waits_for_the_device_and_events_are_used_again(hours, monkeypatch):
    events: list[FakeEvent] = []

    def make(**options: bool) -> FakeEvent:
        events.append(FakeEvent(**options))
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", make)
    clock = StepClock(GPU)
    for num_reads in range(3):
        for part in PARTS:
            clock.begin(part)
        clock.begin("other")
        assert sum(event.num_waits for event in events) == num_reads
        read = clock.cut()
        assert sum(event.num_waits for event in events) == num_reads
        read()  # waits for the newest, so all are done
    assert len(events) == 1 + len(PARTS) + 2


def test_waiting_for_other_ranks_is_communication(hours):
    clock = StepClock(CPU)
    with clock.watching():
        for part in ("forward", "checkpoint"):
            clock.begin(part)
            hours.pass_by(1)
            with WaitingForRanks():
                hours.pass_by(10)
            hours.pass_by(1)
    with WaitingForRanks():  # another one watches now, or nobody
        hours.pass_by(100)
    expected = {"forward": 2, "communication": 10, "checkpoint": 112}
    assert nonzero(clock.cut()()) == expected


def test_rates_and_the_time_that_is_left(hours):
    meter = StepMeter(CPU)
    found = []
    for pace in (50, 2, 4):  # a start is slower
        for _ in range(2):
            meter.clock.begin("data_wait")
            hours.pass_by(pace / 2)
            meter.clock.begin("forward")
            hours.pass_by(pace / 2)
            meter.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(2.0))
        line = meter.begin_line([torch.tensor(3)])()
        assert (line.steps, line.numbers) == ([(1.0, 2.0)] * 2, [3.0])
        found.append(meter.summary(line, samples=24, world_size=4, steps_left=10))
        meter.clock.begin("evaluation")
        hours.pass_by(6)
    assert [line["step_seconds"] for line in found] == [50, 2, 4]
    assert found[2]["images_per_second"] == 3
    assert found[2]["images_per_second_per_device"] == 0.75
    assert found[2]["data_wait_fraction"] == 0.5
    assert found[2]["seconds/evaluation"] == 3
    # the evaluations so far took 12 s, 2 s for each of the 6 steps
    assert [line["eta_seconds"] for line in found] == [500, 10 * (2 + 6 / 4), 10 * (3 + 12 / 6)]
    assert found[2]["host_memory_bytes"] > 1e7
    assert {f"seconds/{part}" for part in PARTS} <= found[0].keys()


def test_the_parts_of_a_run_sum_to_its_time(images, tmp_path):
    config = tiny_config(steps=4)
    config = config.changed(
        run={"log_every_steps": 3, "evaluate_every_steps": 2}, checkpoint={"every_steps": 1}
    )

    def late(batch: Batch) -> Batch:
        time.sleep(0.02)
        return batch

    def slow_evaluation(model: torch.nn.Module) -> dict[str, float]:
        time.sleep(0.06)
        return {"top1": 0.5}

    evaluations = {"slow": slow_evaluation}
    trainer = trainer_of(images, config, tmp_path, change=late, evaluations=evaluations)
    begun = time.perf_counter()
    trainer.fit()
    elapsed = time.perf_counter() - begun
    first, *_ = (line for line in read_metrics(tmp_path) if "loss" in line)
    seconds = {part: first[f"seconds/{part}"] for part in PARTS}
    assert seconds["data_wait"] >= 0.02
    assert seconds["evaluation"] >= 0.02  # one in three steps
    always = {"forward", "loss", "backward", "optimizer", "checkpoint", "other"}
    assert all(seconds[part] > 0 for part in always)
    assert 3 * sum(seconds.values()) <= elapsed
    training = sum(value for part, value in seconds.items() if part not in NO_TRAINING)
    assert first["step_seconds"] == pytest.approx(training)
    assert first["images_per_second"] == pytest.approx(12 / training)
    assert trainer.clock is None


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 5}], ids=str)
def test_each_way_to_back_propagate_has_the_parts_in_order(images, settings):
    trainer = trainer_of(images, tiny_config(**settings))
    begun: list[str] = []

    class Recorder(StepClock):
        def begin(self, part: str) -> None:
            begun.append(part)

    trainer.clock = Recorder(CPU)
    begun.clear()
    trainer.train_step(global_batch(images))
    # three micro-batches of images, one of texts
    more = ["forward", "backward"] * 3 if settings else []
    assert begun == ["forward", "loss", "backward", *more, "optimizer"]
