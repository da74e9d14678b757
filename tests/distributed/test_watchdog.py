"""What hangs is ended, and named by rank and stage; what only takes long is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rank_workers import ranks_of, train_watched

from unicl_fast.config import RunConfig, TrainConfig
from unicl_fast.distributed import watchdog as watchdog_module
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.distributed.signals import EXIT_HUNG
from unicl_fast.distributed.watchdog import (
    Heartbeat,
    Heartbeats,
    Watchdog,
    describe_others,
    format_heartbeat,
    group_timeout,
    parse_heartbeat,
)
from unicl_fast.system.progress import Stage, WaitingForRanks, current_stage, mark, mark_progress
from unicl_fast.training import run


@pytest.fixture(autouse=True)
def _stage_is_our_own() -> Iterator[None]:
    mark("testing", 7)
    yield
    mark("testing")


class Clock:
    """A watchdog without its thread, whose clock advances when a test says so."""

    def __init__(self, *, limit_seconds: float = 100, rank: int = 0, world_size: int = 1) -> None:
        self.codes: list[int] = []
        self.watchdog = Watchdog(
            limit_seconds=limit_seconds, rank=rank, world_size=world_size, end=self.codes.append
        )
        self.now = time.monotonic()

    def pass_by(self, seconds: float) -> None:
        """Seconds during which the watchdog's thread runs every second."""
        for _ in range(int(seconds)):
            if not self.codes:
                self.jump(1)

    def jump(self, seconds: float) -> None:
        """Seconds during which the whole process stands still."""
        self.now += seconds
        self.watchdog._tick(self.now)


def test_a_stage_that_lasts_too_long_ends_the_process_and_is_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
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
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, fails: bool
) -> None:
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


def test_progress_starts_the_time_anew() -> None:
    clock = Clock()
    for sign in (mark_progress, lambda: mark("testing", 7), WaitingForRanks().__enter__):
        clock.pass_by(90)
        sign()
    clock.pass_by(90)
    assert clock.codes == []


def test_all_before_the_first_step_has_the_patience_that_the_config_promises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = []

    def choose(*arguments: object) -> None:
        stages.append(current_stage())

    def build(*arguments: object, **settings: object) -> None:
        stages.append(current_stage())
        raise ValueError("enough")

    monkeypatch.setattr(run, "_choose_on_rank_0", choose)
    monkeypatch.setattr(run, "build_trainer", build)
    config = TrainConfig(run=RunConfig(timeout_seconds=0, device="cpu"))
    with pytest.raises(ValueError, match="enough"):
        run.pretrain(config, run_folder=tmp_path, build_loader=build, evaluate=build)
    assert [stage.name for stage in stages] == [
        "reading checkpoints",
        "opening the data",
    ]
    assert all(stage.patience == 3 for stage in stages)
    clock = Clock()
    mark("reading checkpoints", patience=3)
    clock.pass_by(300)
    assert clock.codes == []
    clock.pass_by(2)
    assert clock.codes == [EXIT_HUNG]


def test_time_in_which_the_process_is_stopped_does_not_count() -> None:
    clock = Clock()
    clock.pass_by(50)
    clock.jump(10_000)
    clock.pass_by(40)
    assert clock.codes == []


def test_no_limit_watches_nothing() -> None:
    with Watchdog(limit_seconds=0):
        assert "unicl-watchdog" not in [thread.name for thread in threading.enumerate()]
    assert group_timeout(0) > 86400
    assert group_timeout(600) > 6 * 600


class Line:
    """Heartbeats that only listen."""

    def __init__(self, clock: Clock, beats: dict[int, tuple[Stage, float]]) -> None:
        self.clock, self.beats = clock, beats
        self.heard: dict[int, Heartbeat] = {}

    def receive(self) -> None:
        for rank, (stage, left) in self.beats.items():
            self.heard[rank] = Heartbeat(stage, 5.0, left, self.clock.now)

    def send(self, stage: Stage, *, age_seconds: float, left_seconds: float) -> None: ...


def test_nobody_is_blamed_for_waiting_while_another_rank_works(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Rank 0 may take long to save; the others wait in a collective of the next step."""
    clock = Clock(world_size=3)
    line = Line(clock, {1: (Stage("checkpoint", 8), 50.0), 2: (Stage("x", 8, 1, True), 50.0)})
    clock.watchdog._heartbeats = line
    with WaitingForRanks():
        clock.pass_by(400)
        assert clock.codes == []
        line.beats[1] = (Stage("checkpoint", 8), -1.0)  # that one hangs, and says so itself
        clock.pass_by(2)
        assert clock.codes == [EXIT_HUNG]
    assert "LOOK THERE FIRST: rank 1: for 5 s in 'checkpoint' in step 8." in capfd.readouterr().err


def test_a_rank_that_hangs_in_its_own_work_does_not_wait_for_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    clock = Clock(world_size=2)
    clock.watchdog._heartbeats = Line(clock, {1: (Stage("checkpoint", 8), 50.0)})
    clock.pass_by(102)
    assert clock.codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "rank 1: for 5 s in 'checkpoint' in step 8." in said
    assert "LOOK THERE FIRST" not in said


class Failing:
    """Heartbeats that fail whenever they are asked for."""

    def __init__(self) -> None:
        self.heard: dict[int, Heartbeat] = {}

    def receive(self) -> None:
        raise RecursionError("too deep")

    def close(self) -> None: ...


def test_failing_heartbeats_are_logged_once_and_the_watch_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    codes: list[int] = []
    with Watchdog(limit_seconds=0.5, world_size=2, end=codes.append) as watchdog:
        watchdog._heartbeats = Failing()
        wait_for(lambda: codes)
    assert codes[0] == EXIT_HUNG
    assert caplog.text.count("THE WATCHDOG FAILED with RecursionError: too deep") == 1


def test_one_failed_tick_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(limit_seconds=100)
    for _ in range(50):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unicl_fast.distributed.watchdog.current_stage", fail)
            watchdog._tick_or_log(time.monotonic())
        watchdog._tick_or_log(time.monotonic())
    assert caplog.text.count("THE WATCHDOG FAILED with MemoryError") == 1


def fail(*_: object) -> None:
    raise MemoryError("nothing left")


def test_a_watchdog_that_cannot_watch_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with Watchdog(limit_seconds=0.5, end=codes.append):
        monkeypatch.setattr("unicl_fast.distributed.watchdog.current_stage", fail)
        wait_for(lambda: codes)
    assert codes == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "THE WATCHDOG CANNOT CONTINUE" in said
    assert "MemoryError: nothing left" in said


def test_a_process_whose_messages_nobody_reads_is_ended_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(descriptor: int, text: bytes) -> None:
        raise BrokenPipeError

    codes: list[int] = []
    with Watchdog(limit_seconds=0.5, end=codes.append):
        monkeypatch.setattr(os, "write", refuse)
        wait_for(lambda: codes)
    assert codes[0] == EXIT_HUNG


TOKEN = b"t" * 16


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_no_datagram_makes_the_parser_fail(content: bytes, rank: int) -> None:
    """Random bytes alone, behind the right token, and as the rest of a heartbeat of right size."""
    beat = format_heartbeat(Stage("x"), token=TOKEN, rank=rank, age_seconds=1, left_seconds=2)
    rest = (TOKEN + content)[: len(beat)]
    for datagram in (content, TOKEN + content, rest + beat[len(rest) :]):
        found = parse_heartbeat(datagram, token=TOKEN, world_size=3)
        assert found is None or 0 <= found[0] < 3
    assert parse_heartbeat(content.ljust(len(beat), b"\0"), token=TOKEN, world_size=3) is None or (
        content.startswith(TOKEN)
    )


def old_datagrams(token: bytes) -> list[bytes]:
    """What must do nothing: nesting, random bytes, heartbeats in an older form, cut or foreign."""
    stage = ["step", 3, 1.0, False]
    beat = format_heartbeat(Stage("step"), token=token, rank=1, age_seconds=1, left_seconds=1)
    foreign = format_heartbeat(
        Stage("step"), token=bytes(16), rank=1, age_seconds=1, left_seconds=1
    )
    wild = format_heartbeat(Stage("step"), token=token, rank=9999, age_seconds=1, left_seconds=1)
    return [
        *(b"[" * 4000, b'{"a":' * 500, b"", b"null", os.urandom(len(beat)), os.urandom(2000)),
        *(json.dumps([token.hex(), rank, stage, 1.0, 1.0]).encode() for rank in (1, 10**400)),
        *(beat[:-1], beat + b"\0", beat[:16], foreign, wild),
    ]


def test_what_is_no_heartbeat_of_these_ranks_is_not_heard() -> None:
    for datagram in old_datagrams(TOKEN):
        assert parse_heartbeat(datagram, token=TOKEN, world_size=3) is None


@given(st.text(max_size=400), st.none() | st.integers(0, 2**62), st.booleans(), st.integers(0, 2))
def test_heartbeats_come_as_they_were_sent(
    name: str, step: int | None, waits_for_ranks: bool, rank: int
) -> None:
    stage = Stage(name, step, 1.0, waits_for_ranks)
    datagram = format_heartbeat(
        stage, token=TOKEN, rank=rank, age_seconds=1 / 3, left_seconds=-1 / 7
    )
    found = parse_heartbeat(datagram, token=TOKEN, world_size=3)
    assert found is not None
    sender, beat = found
    assert (sender, beat.age_seconds, beat.left_seconds) == (rank, 1 / 3, -1 / 7)
    assert beat.stage[1:] == stage[1:]
    shown = name.encode()[:160].decode(errors="ignore").rstrip("\0")
    assert beat.stage.name == shown


@pytest.mark.parametrize(("world_size", "largest"), [(1024, None), (8, 2**27)])
def test_a_burst_of_a_thousand_heartbeats_is_heard(
    world_size: int,
    largest: int | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the kernel that allows no such buffer is named; the other ranks are this process."""
    for name in ("gather_objects", "gather_integers"):
        monkeypatch.setattr(watchdog_module, name, lambda value, _: [value] * world_size)
    monkeypatch.setattr(watchdog_module, "from_rank_0", lambda value, _: value)
    if largest:
        monkeypatch.setattr(watchdog_module, "_BUFFERED_BYTES", largest)
    mine = Heartbeats(Ranks(world_size=world_size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, contextlib.closing(mine):
        for rank in range(1, world_size):
            beat = format_heartbeat(
                Stage("x"), token=mine._token, rank=rank, age_seconds=1, left_seconds=2
            )
            sender.sendto(beat, mine._socket.getsockname())
        mine.receive()
    if largest:
        assert "heartbeats of 7 other ranks need a receive buffer of 939524096 b" in caplog.text
        assert "set net.core.rmem_max=939524096" in caplog.text
    assert len(mine.heard) == world_size - 1 or "net.core.rmem_max=" in caplog.text


def test_ranks_send_their_heartbeats_in_turns() -> None:
    """Also after a pause of all of them, and each rank once in ten seconds."""
    clocks = [Clock(limit_seconds=1000, rank=rank, world_size=100) for rank in range(100)]
    sent: list[int] = []
    for clock in clocks:
        clock.now = clocks[0].now
        line = Line(clock, {})
        line.send = lambda *_, **__: sent.append(1)
        clock.watchdog._heartbeats = line
    seconds = []
    for second in range(60):
        before = len(sent)
        for clock in clocks:
            clock.jump(1000 if second == 30 else 1)
        seconds.append(len(sent) - before)
    for twenty in (seconds[:20], seconds[40:]):
        assert sum(twenty) == pytest.approx(200, abs=2)
    assert max(seconds[:30] + seconds[31:]) <= 12


def test_suspects_are_named_first() -> None:
    waiting = Stage("step: waiting for other ranks", 8, 1, True)
    heard = {
        0: Heartbeat(waiting, 50, 50, heard=99),
        2: Heartbeat(Stage("waiting for the next batch", 8), 100, -1, heard=99),
        3: Heartbeat(Stage("step", 8), 1, 99, heard=10),
        4: Heartbeat(waiting, 50, 50, heard=99),
    }
    told = describe_others(heard | {5: None}, now=100, silence=30, blame=True)
    assert told == [
        "LOOK THERE FIRST: rank 3: 90 s without a sign of life (stopped, frozen, gone, or cut "
        "off), last in 'step' in step 8.",
        "rank 2: for 101 s in 'waiting for the next batch' in step 8.",
        "ranks 0, 4: in 'step: waiting for other ranks' in step 8.",
        "rank 5: nothing was heard of.",
    ]


def wait_for(condition, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.05)


def said_by(folder: Path, rank: int) -> str:
    return (folder / f"stderr-{rank}").read_text()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(200)
def test_ranks_that_wait_for_a_stopped_one_name_it_and_the_collective(
    images: torch.Tensor, tmp_path: Path
) -> None:
    with ranks_of(train_watched, 2, images, tmp_path, 5.0, {}) as processes:
        wait_for(lambda: (tmp_path / "step-0").exists() and (tmp_path / "step-1").exists())
        os.kill(processes[1].pid, signal.SIGSTOP)
        processes[0].join(150)
        assert processes[0].exitcode == EXIT_HUNG
    said = said_by(tmp_path, 0)
    # a collective of the step, or the one of its figures: where the other was stopped decides
    hangs = r"rank 0 of 2 HANGS: '(step|reading the loss)[^']*waiting for other ranks' in step"
    assert re.search(hangs, said)
    assert re.search(r"LOOK THERE FIRST: rank 1: \d+ s without a sign of life", said)
