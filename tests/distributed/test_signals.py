"""Signals that stop a run: all ranks stop after the same step, and it can resume."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_workers import (
    ZeroShotOfFour,
    evaluate_until_rank_1_is_signalled,
    run_on_ranks,
    signalled,
    train_until_rank_1_is_signalled,
)
from small_runs import StepLoader, tiny_config, trainer_of
from waiting import wait_until

from unicl_fast.checkpoints.files import list_checkpoints, write_checkpoint
from unicl_fast.checkpoints.load import read_state
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.distributed.signals import Interrupted, Interruption
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell that starts tests behind itself lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_resumes_as_if_nothing_had_been(images, tmp_path):
    config = tiny_config(steps=6)
    unbroken = trainer_of(images, config)
    unbroken.fit()
    before = signal.getsignal(signal.SIGTERM)
    loader = StepLoader(images, change=signalled)
    stopped = trainer_of(images, config, tmp_path, loader=loader)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        stopped.fit()
    assert signal.getsignal(signal.SIGTERM) is before
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step-00000003"
    resumed = trainer_of(images, config, tmp_path)
    resumed.resume(newest)
    resumed.fit()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(("steps", "expected"), [(2, 2), (5, 3)], ids=["last", "earlier"])
def test_a_signal_during_a_save_waits_for_the_save(images, tmp_path, steps, expected):
    """The run ends well if it was the last one, and otherwise after one more step."""
    trainer = trainer_of(images, tiny_config(steps=steps), tmp_path)  # saves in every second
    state_dict = trainer.scaler.state_dict

    def signal_in_between() -> dict[str, object]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return state_dict()

    trainer.scaler.state_dict = signal_in_between
    if steps == 2:
        trainer.fit()
    else:
        with pytest.raises(Interrupted, match="SIGTERM after step 3 of 5"):
            trainer.fit()
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert read_state(newest).step == expected
    assert read_state(newest.with_name("step-00000002")).step == 2


def test_a_second_ctrl_c_ends_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.has_come(Ranks())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_a_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.has_come(Ranks())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(images, tmp_path):
    steps = run_on_ranks(train_until_rank_1_is_signalled, 2, images, tmp_path)
    assert steps[0] == steps[1]
    assert 3 <= steps[0] <= 4
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == f"step-{steps[0]:08d}"


IN_A_CALL_THAT_HEARS_NOTHING = """
import ctypes, sys
from unicl_fast.distributed import signals
assert "torch" not in sys.modules
signals._SECONDS_TO_UNWIND = 0.5
with signals.exit_immediately_on_signals("program"), signals.Interruption():
    if sys.argv[1] == "training":
        signals.defer_signals(True, saves=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("phase", "signals", "code", "said"),
    [
        ("starting", [signal.SIGTERM], 75, "stopped by SIGTERM; no step is at risk"),
        ("starting", [signal.SIGINT], 75, "stopped by SIGINT; no step is at risk"),
        ("training", [signal.SIGINT, signal.SIGINT], 130, "ended by a second Ctrl-C, unsaved"),
        ("training", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], None, ""),
    ],
    ids=str,
)
def test_signals_are_heard_and_answered_while_the_main_thread_hears_nothing(
    phase, signals, code, said
):
    """It hangs in a call that no signal interrupts, as in a collective."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_CALL_THAT_HEARS_NOTHING, phase],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        for number in signals:
            process.send_signal(number)
        if phase == "training":  # before the step ends, which here it never does
            assert process.stderr.readline() == b"\n"
            assert b" came: finishing this step, then saving (Ctrl-C " in process.stderr.readline()
        if code is None:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            return

        def ended() -> bool:
            if len(signals) > 1:  # two that wait are one to the kernel: it may have missed one
                process.send_signal(signals[-1])
            return process.poll() is not None

        wait_until(ended)
        assert process.returncode == code
        assert process.stderr.read().decode().count(said) == 1
    finally:
        process.kill()
        process.communicate()


def evaluating(images: torch.Tensor, folder: Path, evaluation: ZeroShotOfFour) -> Trainer:
    """Evaluates in steps 3 and 6 of 6, and saves in step 6."""
    changes = {"run": {"evaluate_every_steps": 3}, "checkpoint": {"every_steps": 0}}
    config = tiny_config(steps=6).changed(**changes)
    evaluations = {"first": ZeroShotOfFour(images), "second": evaluation}
    return trainer_of(images, config, folder, evaluations=evaluations)


def evaluations_of(folder: Path) -> list[tuple[float, str, float]]:
    return [
        (line["step"], key, value)
        for line in read_metrics(folder)
        for key, value in line.items()
        if key.endswith("top1")
    ]


WHOLE = [(step, f"{name}/top1") for step in (3, 6) for name in ("first", "second")]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_that_is_broken_off_is_made_up_for(images, tmp_path, step):
    unbroken = evaluating(images, tmp_path / "unbroken", ZeroShotOfFour(images))
    unbroken.fit()
    expected = evaluations_of(tmp_path / "unbroken")
    assert [line[:2] for line in expected] == WHOLE
    out = tmp_path / "stopped"
    stopping = ZeroShotOfFour(images, signals_in_pass=step // 3)
    stopped = evaluating(images, out, stopping)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {step} of 6"):
        stopped.fit()
    assert stopping.shown[-1] == 2  # of four batches
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert newest.name == f"step-{step:08d}"
    assert evaluations_of(out)[-1][:2] == (step, "first/top1")
    resumed = evaluating(images, out, ZeroShotOfFour(images))
    resumed.resume(newest)
    resumed.fit()
    assert evaluations_of(out) == expected


def test_a_stop_in_an_evaluation_writes_the_checkpoint_that_failed_before(
    images, tmp_path, monkeypatch
):
    """The one that was due at this step was begun without waiting, and a full disk refused it."""
    refused: list[int] = []

    def write(folder: Path, *, step: int, **files: Any) -> None:
        if not refused:
            refused.append(step)
            raise OSError("no space left")
        write_checkpoint(folder, step=step, **files)

    monkeypatch.setattr("unicl_fast.checkpoints.writer.write_checkpoint", write)
    stopped = evaluating(images, tmp_path, ZeroShotOfFour(images, signals_in_pass=1))
    stopped.config = stopped.config.changed(checkpoint={"every_steps": 3})
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        stopped.fit()
    assert refused == [3]
    assert [one.name for one in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]


def test_an_evaluation_that_a_crash_cut_off_is_made_up_for(images, tmp_path):
    crashing = evaluating(images, tmp_path, ZeroShotOfFour(images))
    crashing.evaluations["second"] = mock.Mock(side_effect=RuntimeError("out of memory"))
    crashing.config = crashing.config.changed(checkpoint={"every_steps": 3})
    with pytest.raises(RuntimeError, match="out of memory"):
        crashing.fit()
    resumed = evaluating(images, tmp_path, ZeroShotOfFour(images))
    resumed.resume(list_checkpoints(tmp_path / "checkpoints")[-1])
    resumed.fit()
    assert [line[:2] for line in evaluations_of(tmp_path)] == WHOLE
    again = evaluating(images, tmp_path, ZeroShotOfFour(images))
    again.resume(list_checkpoints(tmp_path / "checkpoints")[-1])
    again.fit()
    assert [line[:2] for line in evaluations_of(tmp_path)] == WHOLE, "nothing is evaluated twice"


@pytest.mark.slow
def test_a_signal_to_one_rank_breaks_an_evaluation_off_on_all(images, tmp_path):
    assert run_on_ranks(evaluate_until_rank_1_is_signalled, 2, images, tmp_path) == [3, 3]
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step-00000003"
    assert not evaluations_of(tmp_path)
