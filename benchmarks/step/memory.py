"""Peak memory of a batch that is larger than memory, in micro-batches.

`unicl-pretrain` takes one step of each batch, in a process of its own; the figure is the largest
resident size of the whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unicl_fast.config import TrainConfig
from unicl_fast.system.checked_fields import require

from ..harness import Figures, printed, summarise

_LARGE, _PLAIN = 128, 16
"""Micro-batches in the large batch, and in the one that is encoded at once."""


def measure_micro_batches(config: TrainConfig, data: Path | None) -> Figures:
    """Gigabytes and seconds of a micro-batch, of a large batch of them, and of a plain batch."""
    require(data is not None, "the part micro-batches trains on a packed data set: give --data")
    micro = config.run.global_batch_size
    batches = {
        f"batch {micro:,}": (micro, 0),
        f"batch {_LARGE * micro:,} in micro-batches of {micro}": (_LARGE * micro, micro),
        f"batch {_PLAIN * micro:,}": (_PLAIN * micro, 0),
    }
    figures: Figures = {}
    for name, sizes in batches.items():
        started = time.perf_counter()
        peak = _peak_of_a_step(config, data, *sizes)
        seconds = time.perf_counter() - started
        figures |= printed(
            {
                f"{name}, peak GB": summarise([peak / 1e9]),
                f"{name}, seconds with start": summarise([seconds]),
            }
        )
    return figures


def _peak_of_a_step(config: TrainConfig, data: Path | None, batch: int, micro: int) -> int:
    """Largest resident size of unicl-pretrain in bytes; at least this process's own."""
    size = str(config.data.image_size)
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
    ):
        command = (
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", "--preset", "mixed-small"),
            *("--model.image-encoder", config.model.image_encoder, "--data.image-size", size),
            *("--data.evaluation-resize", size, "--data.train", str(data)),
            *("--efficiency.precision", config.efficiency.precision),
            *("--run.samples", "0", "--run.steps", "1", "--run.device", config.run.device),
            *("--run.global-batch-size", str(batch), "--out", f"{name}/run"),
            *("--efficiency.micro-batch-size", str(micro)),
        )
        with subprocess.Popen(command, stdout=output, stderr=output) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command[2:])}:\n{output.read()[-2000:]}")
    return usage.ru_maxrss * 1024
