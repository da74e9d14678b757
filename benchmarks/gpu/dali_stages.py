"""Part B: what needs DALI on the GPU, and most of it a packed data set. Dry runs have none of it.

The loader is timed as other work is. Runs are those of `unicl-pretrain`, in processes of their own;
of them the figures are losses, the part of the time spent waiting for data, and what a resumed run
differs by. (Their images/s are in metrics.jsonl, measured by the program itself.)
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from unicl_fast.config import DataConfig, RunConfig, TrainConfig

from .measure import Bench
from .stages import PART_A, GpuStage, run_tests

_HW_DECODER_LOADS = (0.0, 0.12, 0.35, 0.65, 0.9)
_THREADS = (4, 8, 16)
_BATCH_SIZE = 256
_LEAST_BUSY_LOADER = 0.01
"""Kernels of the loader are few: JPEGs are decoded by hardware, and their headers on the host."""


def run_pipeline_tests(bench: Bench) -> None:
    """Runs the tests of the loader that need a GPU."""
    run_tests(bench, "tests/pipelines")


def measure_loader(bench: Bench, data: Path) -> None:
    """The loader on its own, by the hardware decoder's part of the JPEGs and by threads."""
    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.pipelines.loader import TrainLoader

    from ..input.own import prompts_of

    with PackedDataset(data) as dataset:
        prompts = prompts_of(dataset)
        for load, threads in itertools.product(_HW_DECODER_LOADS, _THREADS):
            config = TrainConfig(
                data=DataConfig(threads=threads, hw_decoder_load=load),
                run=RunConfig(global_batch_size=_BATCH_SIZE),
            )
            loader = TrainLoader(config, [dataset], None, prompts, device=bench.device)
            batches = loader.batches(0)

            def take(batches: Iterator[Any] = batches) -> Tensor:
                images: Tensor = next(batches).images
                return images

            name = f"hw_decoder_load {load:g}, {threads} threads"
            rate = {"count": _BATCH_SIZE, "unit": "images/s"}
            turns = {"repeat": 10, "warm_up": 1, "least_busy": _LEAST_BUSY_LOADER}
            bench.time(name, take, **rate, **turns)
            loader.close()


def train(bench: Bench, data: Path) -> None:
    """A run of 300 steps: the loss as it falls, and the waiting for data."""
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
        run = Path(folder) / "run"
        _finish(_start_run(bench, data, run, steps=300))
        lines = _metrics(run)
    for line in lines[:: max(1, len(lines) // 10)]:
        bench.note(f"loss at step {line['step']}", line["loss"])
    waits = [line["data_wait_fraction"] for line in lines[len(lines) // 2 :]]
    bench.note("waiting for data, second half", 100 * sum(waits) / len(waits), "%")


def kill_and_resume(bench: Bench, data: Path) -> None:
    """A run that is killed and resumed, against the same run unbroken."""
    steps = 60
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        _finish(_start_run(bench, data, whole, steps=steps))
        process = _start_run(bench, data, broken, steps=steps)
        while process.poll() is None and not any(broken.glob("checkpoints/*")):
            time.sleep(0.05)
        was_running = process.poll() is None
        process.kill()
        process.communicate()
        bench.note("killed at its first checkpoint", "yes" if was_running else "no, it had ended")
        _finish(_start_run(bench, data, broken, steps=steps, more=("--resume", "auto")))
        losses = [_metrics(run)[-1]["loss"] for run in (whole, broken)]
    gap = abs(losses[0] - losses[1]) / abs(losses[0])
    bench.note("last loss of the resumed run", gap, "relative error")


def _start_run(
    bench: Bench, data: Path, run: Path, *, steps: int, more: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    options = {
        "--preset": "swin-tiny",
        "--data.train": data,
        "--out": run,
        "--run.device": bench.device.type,
        "--run.global-batch-size": _BATCH_SIZE,
        "--run.samples": 0,
        "--run.steps": steps,
        "--run.log-every-steps": max(1, steps // 30),
        "--run.evaluate-every-steps": 0,
        "--checkpoint.every-steps": steps // 3,
    }
    words = [str(word) for option in options.items() for word in option]
    return subprocess.Popen(
        [sys.executable, "-m", "unicl_fast.tools.pretrain", *words, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},  # a bar would fill the pipe
    )


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"unicl-pretrain ended with code {process.returncode}: {output[-1000:]}")


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def _stage(part: str, about: str, run: Callable[..., None]) -> GpuStage:
    needs = ("nvidia.dali", "tyro", "msgspec", "xxhash", "ftfy", "regex")
    return GpuStage(part=part, about=about, run=run, needs=needs, needs_data=True)


PART_B = {
    "dali-tests": GpuStage(
        part="B1",
        about="pytest -m gpu tests/pipelines",
        run=run_pipeline_tests,
        needs=("nvidia.dali", *PART_A["tests"].needs),
    ),
    "dali-loader": _stage("B2", "the loader on its own", measure_loader),
    "dali-run": _stage("B3", "300 steps of Swin-T", train),
    "dali-resume": _stage("B4", "killed and resumed", kill_and_resume),
}
