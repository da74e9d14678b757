"""What limits a run: the rule from numbers to a sentence, and when a run says it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from small_runs import StepLoader, tiny_config

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system.machine import CpuTimes
from unicl_fast.training import bottleneck
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.bottleneck import BottleneckWatch, Usage, find_bottleneck

SOUND = Usage(seconds=40, data_wait_seconds=1, cores=2, cpu_seconds=70, cpu_wait_seconds=30)
WAITING = dataclasses.replace(SOUND, data_wait_seconds=8)
CROWDED = dataclasses.replace(
    SOUND, cpu_seconds=40, cpu_wait_seconds=55, others_cpu_seconds=38, cores=2
)


def find(usage: Usage, **settings: Any) -> tuple[str, str] | None:
    return find_bottleneck(dataclasses.replace(usage, **settings))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_run_that_does_not_wait_hears_nothing(on_gpu: bool) -> None:
    assert find(SOUND, on_gpu=on_gpu, is_remote=True) is None
    slow_disk = dataclasses.replace(SOUND, reading_blocked=0.9)  # that decoding hides
    assert find(slow_disk, on_gpu=on_gpu) is None


def test_other_processes_are_named_though_data_is_there() -> None:
    found = find(CROWDED, on_gpu=False)
    assert found is not None
    assert found[0] == "other processes"
    assert "this one got 1.0 of 2 cores in the last 40 s, others 0.9" in found[1]
    assert "its threads waited 55 s" in found[1]
    assert "waits for data" not in found[1]
    assert "OMP_NUM_THREADS" not in found[1]  # it has one thread already
    of_many = find(CROWDED, on_gpu=False, compute_threads=2)
    assert of_many is not None
    assert "OMP_NUM_THREADS=1" in of_many[1]
    # a GPU computes on
    assert find(CROWDED, on_gpu=True) is None


def test_other_processes_explain_waiting_for_data_before_anything_else() -> None:
    crowded = dataclasses.replace(CROWDED, data_wait_seconds=20, reading_blocked=0.9)
    for on_gpu in (False, True):
        found = find(crowded, on_gpu=on_gpu)
        assert found is not None
        assert found[0] == "other processes"
        assert "training waits for data 50% of the time" in found[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"others_cpu_seconds": 8},  # its own threads wait for each other
        {"cpu_seconds": 70},  # it had nearly all
        {"cpu_wait_seconds": 5},  # it did not want more
    ],
    ids=str,
)
def test_others_are_blamed_only_if_they_took_what_was_wanted(changes: dict[str, float]) -> None:
    assert find(dataclasses.replace(CROWDED, **changes), on_gpu=False) is None


def test_checkpoints_and_evaluations_that_take_much_are_named_with_their_options() -> None:
    for part, option in (
        ("checkpoint", "checkpoint.every_steps"), ("evaluation", "run.evaluate_every_steps")
    ):  # fmt: skip
        found = find(SOUND, **{f"{part}_seconds": 20.0})
        assert found == (
            "checkpoints and evaluations",
            f"{part}s take 50% of the time; raise {option}",
        )
        assert find(SOUND, **{f"{part}_seconds": 4.0}) is None


def test_storage_is_named_with_its_rate_and_the_options_of_a_url() -> None:
    blocked = dataclasses.replace(WAITING, reading_blocked=0.8, read_bytes=480_000_000)
    remote = find(blocked, on_gpu=True, is_remote=True)
    assert remote is not None
    assert remote[0] == "storage"
    assert "20% of the time, for storage: its readers are blocked 80%" in remote[1]
    assert "12.0 MB/s come from the store" in remote[1]
    for option in ("cache_bytes", "shuffle_window", "cache_folder"):
        assert f"data.{option}" in remote[1]
        assert hasattr(DataConfig(), option)
    local = find(blocked, on_gpu=True)
    assert local is not None
    assert "faster disk" in local[1]
    assert "data." not in local[1]


def test_decoding_is_named_with_what_can_be_changed() -> None:
    found = find(WAITING, on_gpu=False)
    assert found is not None
    assert found[0] == "decoding"
    assert "the process uses 1.8 of 2 cores" in found[1]
    assert "unicl-pack build --resize short:256" in found[1]
    on_gpu = find(WAITING, on_gpu=True)
    assert on_gpu is not None
    assert "data.decode_device=gpu" in on_gpu[1]
    raw = find(WAITING, on_gpu=True, decodes_files=False)
    assert raw is not None
    assert "raw" not in raw[1]
    assert "data." not in raw[1]


def test_too_few_threads_are_named_where_cores_are_idle() -> None:
    idle = dataclasses.replace(WAITING, cores=8, cpu_seconds=100)
    found = find(idle, on_gpu=True, threads=2)
    assert found is not None
    assert found[0] == "decoding threads"
    assert "data.threads=2, while 69% of 8 cores have no work" in found[1]
    busy = find(dataclasses.replace(idle, cpu_seconds=300), on_gpu=True, threads=2)
    assert busy is not None
    assert busy[0] == "decoding"


class Machine:
    """A machine whose clocks a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.times = 0.0, CpuTimes(0.0, 0.0, 0.0)
        monkeypatch.setattr(bottleneck.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(bottleneck, "cpu_times", lambda: self.times)
        monkeypatch.setattr(bottleneck, "usable_cores", lambda: 2)
        monkeypatch.setattr(bottleneck.os, "sched_getaffinity", lambda process: {0, 1})

    def pass_by(self, seconds: float, *, own: float, others: float) -> None:
        """`own` and `others` are cores in use."""
        before = self.times
        self.now += seconds
        self.times = CpuTimes(
            before.own + own * seconds,
            before.waited + others * seconds,
            before.busy + (own + others) * seconds,
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def watch(reading: ReadingTime | None = None, *, ranks: Ranks | None = None) -> BottleneckWatch:
    return BottleneckWatch(
        tiny_config().data, ranks=ranks or Ranks(), on_gpu=False, reading=reading
    )


def look(watch: BottleneckWatch, machine: Machine, waits: float, **cores: float) -> str | None:
    """A line of ten steps and ten seconds."""
    machine.pass_by(10, **cores)
    return watch.look(line(waits) | {"storage_bytes_read": 0}, num_steps=10)


def line(waits: float, checkpoints: float = 0.0) -> dict[str, float]:
    return {
        "seconds/data_wait": waits, "seconds/checkpoint": checkpoints, "seconds/evaluation": 0.0
    }  # fmt: skip


def test_a_start_is_left_alone_and_a_cause_is_said_once(machine: Machine) -> None:
    reading = ReadingTime()
    watching = watch(reading)
    waiting = [look(watching, machine, 0.5, own=1.9, others=0.0) for _ in range(6)]
    assert waiting == [None] * 6  # two lines of the start, four of a window
    assert "for images to be made ready" in look(watching, machine, 0.5, own=1.9, others=0.0)
    again = [look(watching, machine, 0.5, own=1.9, others=0.0) for _ in range(20)]
    assert again == [None] * 20
    reading.blocked_seconds += 45
    other = [look(watching, machine, 0.5, own=0.5, others=0.0) for _ in range(5)]
    assert other[:4] == [None] * 4
    assert "for storage" in other[4]
    quiet = [look(watching, machine, 0.01, own=1.9, others=0.0) for _ in range(10)]
    assert quiet == [None] * 10
    crowded = [look(watching, machine, 0.01, own=1.1, others=0.9) for _ in range(5)]
    assert "other processes hold the cores" in crowded[4]
    decoding = [look(watching, machine, 0.5, own=1.9, others=0.0) for _ in range(10)]
    assert decoding == [None] * 10  # said before the others were


def test_short_windows_say_nothing(machine: Machine) -> None:
    watching = watch()
    for _ in range(40):
        machine.pass_by(0.5, own=1.0, others=1.0)
        assert watching.look(line(0.03), num_steps=10) is None


def test_the_time_of_checkpoints_is_summed_over_a_window(machine: Machine) -> None:
    watching, said = watch(), []
    for _ in range(7):
        machine.pass_by(10, own=1.9, others=0.0)
        said.append(watching.look(line(0.0, checkpoints=0.4), num_steps=10))
    assert said == [None] * 6 + ["checkpoints take 40% of the time; raise checkpoint.every_steps"]


def test_other_ranks_on_the_same_cores_are_not_others(machine: Machine) -> None:
    watching = watch(ranks=Ranks(world_size=2, cores=1))
    for _ in range(20):  # each rank has half a core, and waits
        assert look(watching, machine, 0.01, own=0.5, others=0.5) is None


def test_a_run_logs_the_sentence(
    images: torch.Tensor,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bottleneck, "_START_STEPS", 1)

    def crowded(batch: object) -> object:
        machine.pass_by(10, own=1.0, others=1.0)
        return batch

    with caplog.at_level(logging.WARNING):
        make_trainer(
            tiny_config(steps=12), StepLoader(images, change=crowded), progress=False
        ).fit()
    (warning,) = [one for one in caplog.messages if "other processes hold the cores" in one]
    assert "got 1.0 of 2 cores" in warning
