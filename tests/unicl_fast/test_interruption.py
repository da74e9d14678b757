"""Signals that ask a run to stop: it stops where it can go on, on all ranks at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_workers import StepwiseLoader, run_on_ranks, train_until_rank_1_is_signalled
from small_runs import tiny_config

from unicl_fast.batch import Batch
from unicl_fast.checkpoint import list_checkpoints
from unicl_fast.dist import Ranks
from unicl_fast.interruption import Interrupted, Interruption
from unicl_fast.trainer import Trainer


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell that starts tests behind itself lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SignallingLoader(StepwiseLoader):
    """Sends this process a signal while the batch of a step is fetched."""

    def __init__(self, images: torch.Tensor, *, step: int, number: signal.Signals) -> None:
        super().__init__(images)
        self.step, self.number = step, number

    def batches(self, start_step: int) -> Iterator[Batch]:
        for batch in super().batches(start_step):
            if batch.step == self.step:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    images: torch.Tensor, tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny_config(steps=6)
    unbroken = Trainer(config, StepwiseLoader(images), progress=False)
    unbroken.fit()
    before = signal.getsignal(number)
    stopped = Trainer(
        config,
        SignallingLoader(images, step=2, number=number),
        run_folder=tmp_path,
        progress=False,
    )
    with pytest.raises(Interrupted, match=f"{number.name} after step 3 of 6"):
        stopped.fit()
    assert signal.getsignal(number) is before
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step-00000003"
    resumed = Trainer(config, StepwiseLoader(images), run_folder=tmp_path, progress=False)
    resumed.resume(newest)
    resumed.fit()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_signal_in_the_last_step_lets_the_run_end(images: torch.Tensor) -> None:
    loader = SignallingLoader(images, step=2, number=signal.SIGTERM)
    Trainer(tiny_config(steps=3), loader, progress=False).fit()


def test_a_second_ctrl_c_ends_at_once() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.has_come(Ranks())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_a_shell_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.has_come(Ranks())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.dist
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    images: torch.Tensor, tmp_path: Path
) -> None:
    run_on_ranks(train_until_rank_1_is_signalled, 2, images, tmp_path)
    steps = [int((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert steps[0] == steps[1]
    assert 3 <= steps[0] <= 4
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == f"step-{steps[0]:08d}"
