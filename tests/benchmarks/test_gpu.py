"""`unicl-bench gpu` without a GPU: its checks on a CPU, and its refusals."""

import subprocess

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Gpu
from unicl_fast.tools.bench import load_program

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        pytest.param("rates", "bf16 product, TFLOP/s", marks=pytest.mark.long),
        ("windows", "map of 7, 24 heads, shift 0: error, of the allowed"),
        ("loss", "tiled in fp32, scale 100: off by"),
        pytest.param("ways", "timm, compile=off, images/s", marks=pytest.mark.long),
    ],
)
def test_checks_run_on_a_cpu(name, figure):
    command = [*gpu._CHECK, name, "cpu"]  # in its own process, whose settings it changes
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    assert figure in done.stdout


def test_a_wrong_loss_is_found(monkeypatch):
    monkeypatch.setattr(gpu, "_LOSS_TOLERANCE", {"bf16": -1.0})
    with pytest.raises(RuntimeError, match="losses are wrong: dense in bf16, scale 14.3: off by"):
        gpu.check_loss(CPU)


@pytest.mark.parametrize("stage", ["step", "loss"])
def test_each_stage_has_commands_whose_options_exist(stage, tmp_path):
    for command in gpu.commands_of(stage, tmp_path).values():
        if gpu._BENCH[-1] in command:
            _, name, *options = command[command.index(gpu._BENCH[-1]) :]
            load_program(name).parse(options, prog="")


def test_a_part_that_fails_or_stalls_is_named(tmp_path):
    now = gpu.time.monotonic()
    run = gpu._run_part
    assert run("good", ("true",), tmp_path, now + 60) == "done"
    assert run("bad", ("false",), tmp_path, now + 60) == "ended with code 1"
    stalled = run("stalled", ("sleep", "60"), tmp_path, gpu.time.monotonic() + 0.3)
    assert stalled == "cut off after nine minutes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device works here. Run this on a machine where"):
        Gpu(out=tmp_path / "new").run()
    assert not (tmp_path / "new").exists()
