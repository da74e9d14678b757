"""What limits a run: the rule from numbers to a sentence, and when a run says it."""

import dataclasses
import logging
import re
from typing import Any

import pytest
from small_runs import tiny_config, trainer_of

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system.machine import CpuTimes
from unicl_fast.training import bottleneck
from unicl_fast.training.bottleneck import BottleneckWatch, Usage, find_bottleneck

SOUND = Usage(seconds=40, data_wait_seconds=1, cores=2, cpu_seconds=70, cpu_wait_seconds=30)
WAITING = dataclasses.replace(SOUND, data_wait_seconds=8)
CROWDED = dataclasses.replace(SOUND, cpu_seconds=40, cpu_wait_seconds=55, others_cpu_seconds=38)


NOTHING = "nothing", ""


def find(usage: Usage, **settings: Any) -> tuple[str, str]:
    return find_bottleneck(dataclasses.replace(usage, **settings)) or NOTHING


SILENT = {
    "a run that does not wait": find(SOUND, is_remote=True),
    "on a GPU": find(SOUND, on_gpu=True, is_remote=True),
    "decoding hides reading": find(SOUND, reading_blocked=0.9),
    "a GPU computes on": find(CROWDED, on_gpu=True),
    "its own threads wait for each other": find(CROWDED, others_cpu_seconds=8),
    "it had nearly all": find(CROWDED, cpu_seconds=70),
    "it did not want more": find(CROWDED, cpu_wait_seconds=5),
}
BLOCKED = {"reading_blocked": 0.8, "read_bytes": 480_000_000, "on_gpu": True}
IDLE = {"cores": 8, "threads": 2, "on_gpu": True}
LATE = {"data_wait_seconds": 20, "reading_blocked": 0.9}


def test_runs_that_lose_nothing_hear_nothing():
    assert {name: found for name, found in SILENT.items() if found != NOTHING} == {}


@pytest.mark.parametrize(
    ("usage", "settings", "name", "said", "unsaid"),
    [
        (CROWDED, {}, "other processes",
         ["this one got 1.0 of 2 cores in the last 40 s, others 0.9", "its threads waited 55 s"],
         ["waits for data", "OMP_NUM_THREADS"]),  # it has one thread already
        (CROWDED, {"compute_threads": 2}, "other processes", ["OMP_NUM_THREADS=1"], []),
        # they explain waiting before anything else
        (CROWDED, LATE, "other processes", ["training waits for data 50% of the time"], []),
        (CROWDED, LATE | {"on_gpu": True}, "other processes", ["waits for data 50%"], []),
        (WAITING, BLOCKED | {"is_remote": True}, "storage",
         ["20% of the time, for storage: its readers are blocked 80%",
          "12.0 MB/s come from the store",
          "data.cache_bytes", "data.shuffle_window", "data.cache_folder"], []),
        (WAITING, BLOCKED, "storage", ["faster disk"], ["data."]),
        (WAITING, {}, "decoding",
         ["the process uses 1.8 of 2 cores", "unicl-pack build --resize short:256"], []),
        (WAITING, {"on_gpu": True}, "decoding", ["data.decode_device=gpu"], []),
        (WAITING, {"on_gpu": True, "decodes_files": False}, "decoding", [], ["raw", "data."]),
        (WAITING, IDLE | {"cpu_seconds": 100}, "decoding threads",
         ["data.threads=2, while 69% of 8 cores have no work"], []),
        (WAITING, IDLE | {"cpu_seconds": 300}, "decoding", [], []),
    ],
)  # fmt: skip
def test_a_limit_is_named_with_its_numbers_and_what_helps(usage, settings, name, said, unsaid):
    found = find(usage, **settings)
    assert found[0] == name
    assert [part for part in said if part not in found[1]] == []
    assert [part for part in unsaid if part in found[1]] == []
    options = [part.partition(".")[2] for part in said if re.fullmatch(r"data\.\w+", part)]
    assert all(hasattr(DataConfig(), option) for option in options)


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
    data, ranks = tiny_config().data, ranks or Ranks()
    return BottleneckWatch(data, ranks=ranks, on_gpu=False, reading=reading)


def look(watch: BottleneckWatch, machine: Machine, waits: float, **cores: float) -> str | None:
    """A line of ten steps and ten seconds."""
    machine.pass_by(10, **cores)
    return watch.look({"seconds/data_wait": waits, "storage_bytes_read": 0}, num_steps=10)


def test_a_start_is_left_alone_and_a_cause_is_said_once(machine):
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


def test_short_windows_say_nothing(machine):
    watching = watch()
    for _ in range(40):
        machine.pass_by(0.5, own=1.0, others=1.0)
        assert watching.look({"seconds/data_wait": 0.03}, num_steps=10) is None


def test_other_ranks_on_the_same_cores_are_not_others(machine):
    watching = watch(ranks=Ranks(world_size=2, cores=1))
    for _ in range(20):  # each rank has half a core, and waits
        assert look(watching, machine, 0.01, own=0.5, others=0.5) is None


def test_a_run_logs_the_sentence(
    images, machine, monkeypatch,
    caplog,
):  # fmt: skip
    monkeypatch.setattr(bottleneck, "_START_STEPS", 1)

    def crowded(batch: object) -> object:
        machine.pass_by(10, own=1.0, others=1.0)
        return batch

    with caplog.at_level(logging.WARNING):
        trainer_of(images, tiny_config(steps=12), change=crowded).fit()
    (warning,) = [one for one in caplog.messages if "other processes hold the cores" in one]
    assert "got 1.0 of 2 cores" in warning
