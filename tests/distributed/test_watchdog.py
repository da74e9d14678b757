"""A rank that hangs is ended and named with its phase; slow work is left alone."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_workers import ranks_of, train_watched
from waiting import wait_until

from unicl_fast.config import RunConfig, TrainConfig
from unicl_fast.distributed.signals import EXIT_HUNG
from unicl_fast.distributed.watchdog import Watchdog, group_timeout
from unicl_fast.system.phases import WaitingForRanks, current_phase, mark, mark_progress
from unicl_fast.training import run

FAIL = mock.Mock(side_effect=MemoryError("nothing left"))


@pytest.fixture(autouse=True)
def _stage_is_our_own() -> Iterator[None]:
    mark("testing", 7)
    yield
    mark("testing")


class Clock:
    """A watchdog without its thread, whose clock the test advances."""

    def __init__(self, *, limit_seconds: float = 100, rank: int = 0, world_size: int = 1) -> None:
        self.codes: list[int] = []
        self.watchdog = Watchdog(
            limit_seconds=limit_seconds, rank=rank, world_size=world_size, end=self.codes.append
        )
        self.now = self.watchdog._ticked = 0.0  # of whole numbers, sums are exact

    def pass_by(self, seconds: float) -> None:
        """Seconds during which the watchdog's thread runs every second."""
        for _ in range(int(seconds)):
            if not self.codes:
                self.jump(1)

    def jump(self, seconds: float) -> None:
        """Seconds during which the whole process stands still."""
        self.now += seconds
        self.watchdog._tick(self.now)


def test_a_stage_that_lasts_too_long_ends_the_process_and_is_named(capfd):
    clock = Clock()
    mark("waiting for the next batch", 12)
    clock.pass_by(101)
    assert clock.codes == []
    clock.pass_by(1)
    assert clock.codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "rank 0 HANGS: 'waiting for the next batch' in step 12 has lasted 101 s" in said
    assert "run.timeout_seconds=100" in said
    assert "the storage of data.train is stuck" in said
    assert "--resume auto" in said
    assert "test_watchdog.py" in said  # the stacks


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_collectives_of_nccl_are_written_before_the_end(
    monkeypatch, capfd, tmp_path, fails
):
    clock = Clock(rank=3, world_size=4)

    def dump() -> bytes:
        assert clock.codes == []
        if fails:
            raise RuntimeError("the recorder is off")
        return b"collectives"

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", dump, raising=False)
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(tmp_path / "rank-"))
    mark("step: update", 12)
    clock.pass_by(102)
    assert clock.codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert (f"NCCL's last collectives are in {tmp_path}/rank-3" in said) == (not fails)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"collectives"] * (not fails)


def test_progress_starts_the_time_anew():
    clock = Clock()
    for sign in (mark_progress, lambda: mark("testing", 7), WaitingForRanks().__enter__):
        clock.pass_by(90)
        sign()
    clock.pass_by(90)
    assert clock.codes == []


def test_a_run_on_a_gpu_names_versions_that_nobody_tried(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(run, "choose_device", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(run, "untried_versions", lambda: "nobody has tried torch 9")
    build = mock.Mock(side_effect=ValueError("enough"))
    monkeypatch.setattr(run, "build_trainer", build)
    with pytest.raises(ValueError, match="enough"):
        run.pretrain(TrainConfig(), run_folder=tmp_path, build_loader=build, evaluate=build)
    assert "nobody has tried torch 9; `uv sync --extra cuda13`" in caplog.text


def test_all_before_the_first_step_has_the_patience_that_the_config_promises(monkeypatch, tmp_path):
    stages = []

    def choose(*arguments: object) -> None:
        stages.append(current_phase())

    def build(*arguments: object, **settings: object) -> None:
        stages.append(current_phase())
        raise ValueError("enough")

    monkeypatch.setattr(run, "_choose_on_rank_0", choose)
    monkeypatch.setattr(run, "build_trainer", build)
    config = TrainConfig(run=RunConfig(timeout_seconds=0, device="cpu"))
    with pytest.raises(ValueError, match="enough"):
        run.pretrain(config, run_folder=tmp_path, build_loader=build, evaluate=build)
    assert [stage.name for stage in stages] == ["reading checkpoints", "opening the data"]
    assert all(stage.patience == 3 for stage in stages)
    clock = Clock()
    mark("reading checkpoints", patience=3)
    clock.pass_by(300)
    assert clock.codes == []
    clock.pass_by(2)
    assert clock.codes == [EXIT_HUNG]


def test_time_in_which_the_process_is_stopped_does_not_count():
    clock = Clock()
    clock.pass_by(50)
    clock.jump(10_000)
    clock.pass_by(40)
    assert clock.codes == []


def test_no_limit_watches_nothing():
    with Watchdog(limit_seconds=0):
        assert "unicl-watchdog" not in [thread.name for thread in threading.enumerate()]
    assert group_timeout(0) > 86400
    assert group_timeout(600) > 6 * 600


def test_a_rank_that_waits_for_others_has_twice_the_time(capfd):
    """So the rank at fault, which can hang in its own work, ends first."""
    clock = Clock(world_size=3)
    mark("step: encoding", 8)
    with WaitingForRanks():
        clock.pass_by(200)
        assert clock.codes == []
        clock.pass_by(2)
        assert clock.codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "rank 0 of 3 HANGS: 'step: encoding: waiting for other ranks' in step 8" in said
    assert "2 times run.timeout_seconds=100" in said
    assert "Another rank may be at fault" in said


def test_a_watchdog_that_cannot_watch_ends_the_process(monkeypatch, capfd):
    codes: list[int] = []
    watchdog = Watchdog(limit_seconds=0.5, end=codes.append)
    monkeypatch.setattr("unicl_fast.distributed.watchdog.current_phase", FAIL)
    with watchdog:
        wait_until(lambda: codes)
    assert codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "THE WATCHDOG CANNOT CONTINUE" in said
    assert "MemoryError: nothing left" in said


def test_a_process_whose_messages_nobody_reads_is_ended_too(monkeypatch):
    codes: list[int] = []
    with Watchdog(limit_seconds=0.5, end=codes.append):
        monkeypatch.setattr(os, "write", mock.Mock(side_effect=BrokenPipeError))
        wait_until(lambda: codes)
    assert codes[0] == EXIT_HUNG


@pytest.mark.slow
def test_ranks_that_wait_for_a_stopped_one_name_the_collective(images, tmp_path):
    with ranks_of(train_watched, 2, images, tmp_path, 30.0) as processes:
        wait_until(lambda: all((tmp_path / f"step-{rank}").exists() for rank in range(2)))
        os.kill(processes[1].pid, signal.SIGSTOP)
        processes[0].join(150)
        assert processes[0].exitcode == EXIT_HUNG
    # a collective of the step or of its figures: that depends on when the other was stopped
    hangs = r"rank 0 of 2 HANGS: '(step|reading the loss)[^']*waiting for other ranks' in step"
    assert re.search(hangs, (tmp_path / "stderr-0").read_text())
