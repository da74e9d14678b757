"""Trials of kernels, in a child that can crash: here by Triton's interpreter."""

import logging
import re
from pathlib import Path

import pytest
import torch

from unicl_fast.config import EfficiencyConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models import compilation
from unicl_fast.objectives import loss
from unicl_fast.system import gpu_kernels, kernels
from unicl_fast.system.gpu_kernels import fault_in_trial
from unicl_fast.training.settle import settle_loss

pytest.importorskip("triton")

CPU = torch.device("cpu")
WINDOWS = "unicl_fast.models.window_trial", "unicl_fast.models.window_attention"
LOSS = "unicl_fast.objectives.loss_trial", "unicl_fast.objectives.loss_triton"
_KEYS = "grad_tokens + channels + place, by_key.to(given.dtype)"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A new folder for results of trials, of processes that interpret."""
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return tmp_path


def fault_after_a_start(*arguments: object) -> str:
    gpu_kernels._answers.clear()
    return fault_in_trial(*arguments)


def test_what_was_found_right_is_tried_once_on_a_machine(cache, monkeypatch, caplog):
    runs: list[tuple[str, ...]] = []
    fault = "failed: it is off"
    caplog.set_level(logging.INFO, logger=gpu_kernels.logger.name)

    def fault_of(function: object, *arguments: str, seconds: float) -> str:
        runs.append(arguments)
        return fault

    def starts() -> int:
        found = fault_after_a_start("faulty_trials", CPU, "float32")
        assert found == (fault and f"faulty_trials float32: the trial {fault}")
        return len(runs)

    monkeypatch.setattr(gpu_kernels, "fault_of", fault_of)
    assert [starts(), starts()] == [1, 2]  # a fault is tried again
    assert not caplog.messages
    fault = ""
    assert [starts(), starts()] == [3, 3]
    tried, found = caplog.messages
    assert "right on this machine, tried within" in tried
    assert "right on this machine, as an earlier start has found" in found
    with monkeypatch.context() as another:
        another.setattr(torch, "__version__", "3.0")
        assert [starts(), starts()] == [4, 4]
        another.setattr(gpu_kernels.platform, "node", lambda: "another machine")
        assert [starts(), starts()] == [5, 5]
    assert starts() == 5
    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    assert [starts(), starts()] == [6, 7]


@pytest.mark.slow
def test_a_crash_or_a_hang_is_a_fault(cache, monkeypatch):
    fault = fault_after_a_start("faulty_trials", CPU, "crashes")
    assert fault == "faulty_trials crashes: the trial crashed (SIGSEGV)"
    monkeypatch.setattr(gpu_kernels, "TRIAL_SECONDS", 0.01)
    assert "did not end within" in fault_after_a_start("faulty_trials", CPU, "crashes")
    assert not list(cache.rglob("right-*"))


@pytest.mark.slow
def test_a_gpu_for_one_process_only_is_no_fault_of_kernels():
    """In compute mode EXCLUSIVE_PROCESS the trial's child gets no context."""
    found = fault_after_a_start("faulty_trials", CPU, "has no GPU")
    expected = r"faulty_trials has no GPU: the trial could not begin.*`nvidia-smi -c 0` admits"
    assert re.match(expected, found)


def test_ranks_take_the_answer_of_another_where_no_file_can_keep_it(monkeypatch):
    """All ranks of a machine would try the loss at once, in the first step."""
    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    monkeypatch.setattr(gpu_kernels, "fault_of", lambda *_, **__: "was tried again")
    monkeypatch.setattr(compilation, "gather_integers", lambda value, ranks: [value, 0])
    monkeypatch.setattr(loss, "obstacle_to_triton", lambda index, oldest: "")
    config = TrainConfig(efficiency=EfficiencyConfig(precision="bf16", loss="auto"))
    config = config.changed(run={"global_batch_size": 4096})
    ranks, gpu = Ranks(rank=1, local_rank=1, world_size=2), torch.device("cuda:1")
    monkeypatch.setattr(gpu_kernels, "_answers", {})
    assert "tried again" in loss.fault_of_triton(gpu)
    gpu_kernels._answers.clear()
    assert settle_loss(config, gpu, ranks) == "auto"
    assert loss.fault_of_triton(gpu) == ""


@pytest.mark.slow
@pytest.mark.parametrize("trial", [WINDOWS[0], LOSS[0]])
def test_our_kernels_pass_their_trials(trial):
    assert fault_after_a_start(trial, CPU, "float32") == ""


MUTANTS = {
    "no store": (*WINDOWS, f"tl.store({_KEYS}, mask=exists)", "by_key = by_key"),
    "not divided": (*WINDOWS, "* inverse\n        where = mixed", "\n        where = mixed"),
    "no mask": (*WINDOWS, "_MASKED = tl.constexpr(-100.0)", "_MASKED = tl.constexpr(0.0)"),
    "no sum": (*WINDOWS, "bias_sum += by_score", "bias_sum = by_score"),
    "half a gradient": (*LOSS, "total += grad_row_logs", "total = grad_row_logs"),
    "rows of one block": (*LOSS, "of_rows = by_rows + column", "of_rows = by_rows + 0 * column"),
}
FOUND = {
    "no store": "off by nan",
    "not divided": "the attention, ",
    "no mask": "shifted by 3",
    "no sum": "relative_position_bias_table",
    "half a gradient": "its gradient of images",
    "rows of one block": "the loss is off",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=[pytest.mark.long] * (one not in ("no store", "half a gradient")))
        for one in MUTANTS
    ],
)
def test_wrong_kernels_fail_their_trials(name):
    fault = fault_after_a_start("faulty_trials", CPU, "mutated", *MUTANTS[name], "float32")
    assert FOUND[name] in fault
    assert "ArithmeticError: " in fault


@pytest.mark.gpu
@pytest.mark.parametrize("trial", [WINDOWS[0], LOSS[0]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_kernels_pass_their_trials_on_a_gpu(trial, dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fault_after_a_start(trial, torch.device("cuda"), dtype) == ""
