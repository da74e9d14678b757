"""Peak memory of a batch that no activations of the whole would fit with, and of what does fit.

    unicl-bench memory --data PACKED [--json FILE]

`unicl-pretrain` takes one step of each batch, in a process of its own: a micro-batch alone, the
large batch in micro-batches, and a batch of a middling size at once.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    summarise,
    write_result,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Peak memory of training steps with cached gradients and without."""

    data: Path
    """Packed data set."""
    preset: str = "mixed-small"
    """Of unicl-pretrain."""
    image_encoder: str = "vit_small_patch16_224"
    """timm's name."""
    image_size: int = 64
    """Side of the images."""
    large: int = 8192
    """Batch that is taken in micro-batches."""
    micro: int = 64
    """Micro-batch, and the smallest batch."""
    plain: int = 1024
    """Batch that is taken at once."""
    rounds: int = 1
    """Times that each is done."""


def run(settings: Settings) -> None:
    """Trains a step of each, prints, and writes the JSON if one is wanted."""
    batches = {
        f"batch {settings.micro:,}": (settings.micro, 0),
        f"batch {settings.large:,} in micro-batches of {settings.micro}": (
            settings.large,
            settings.micro,
        ),
        f"batch {settings.plain:,}": (settings.plain, 0),
    }
    peaks: dict[str, list[float]] = {name: [] for name in batches}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(settings.rounds):
        for name, (batch, micro) in batches.items():
            started = time.perf_counter()
            peaks[name].append(peak_of_a_step(settings, batch, micro) / 1e9)
            seconds[name].append(time.perf_counter() - started)
    figures: Figures = {f"{name}, peak GB": summarise(found) for name, found in peaks.items()}
    figures |= {f"{name}, seconds with start": summarise(found) for name, found in seconds.items()}
    print_figures(figures)
    write_result(settings, figures, "timm")


def peak_of_a_step(settings: Settings, batch: int, micro: int) -> int:
    """Largest resident size of unicl-pretrain in bytes; at least this process's own.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    size = str(settings.image_size)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as said:
        command = (
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", "--preset", settings.preset),
            *("--model.image-encoder", settings.image_encoder, "--data.image-size", size),
            *("--data.evaluation-resize", size, "--data.train", str(settings.data)),
            *("--efficiency.precision", "bf16", "--run.samples", "0", "--run.steps", "1"),
            *("--run.global-batch-size", str(batch), "--out", f"{name}/run"),
            *("--efficiency.micro-batch-size", str(micro)),
        )
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command[2:])}:\n{said.read()[-2000:]}")
    return usage.ru_maxrss * 1024
