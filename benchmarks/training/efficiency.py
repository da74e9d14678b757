"""The time and memory of a training step: each switch of `efficiency`, batch sizes, its parts.

    unicl-bench efficiency --data PACKED --image-encoder resnet50
    unicl-bench memory --data PACKED
    unicl-bench profile --data PACKED [--preset NAME]

`efficiency`: two trainers take turns on the same batch, from the same weights: one as
`unicl-pretrain` runs it here, one with a single switch changed; then the next switch. Memory is
what the first step takes above the model in a fresh process, at most: gradients, averages of the
optimizer and activations.

`memory`: `unicl-pretrain` takes one step of each batch, in a process of its own.

`profile`: a step is taken apart at the features. The parts must give the gradients of the whole
step. The floor of a part is the time that its matrix products and convolutions would take at the
rate of one large square product of the same type on the same machine. (Fused attention on a CPU is
not counted: it is used there in fp32 only, and is a few percent.)
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import DeviceName, TrainConfig
from unicl_fast.models.precision import resolve_precision
from unicl_fast.system.machine import choose_device, keep_freed_memory
from unicl_fast.training.trainer import Trainer

from ..harness import (
    Figures,
    Stage,
    peak_bytes,
    peak_megabytes,
    printed,
    ratio_of,
    seconds_of,
    summarise,
    take_turns,
)
from .parts import StepInParts, compare, measure_rate
from .step import StepStage, long_preset, take_batch

_AS_IT_IS = "as it is"
_COUNTS = 0.01
"""Part of a step's operations from which on a part is compared with the time that they need."""
_LOSSES_AGREE = 0.03
"""Relative difference allowed between the losses of a step in 16 bits and one in 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency(StepStage):
    """Effect of each switch of efficiency on a step; those of texts matter with captions only."""

    batch_size: int = 16
    """Images of a step."""
    compile: bool = False
    """Try torch.compile as well, which takes minutes."""
    memory: bool = True
    """Measure memory, too."""

    def run(self) -> None:
        keep_freed_memory()  # as in training
        device = choose_device(self.device)
        base = resolve_precision(self.config("auto"), device)
        batch = take_batch(base, self.data)
        figures: Figures = {}
        measured = {_AS_IT_IS: base}
        for name, change in switches_of(self, base.efficiency.precision).items():
            efficiency = dataclasses.replace(base.efficiency, **change)  # type: ignore[arg-type]
            other = dataclasses.replace(base, efficiency=efficiency)
            try:
                works = {_AS_IT_IS: steps_of(base, batch), name: steps_of(other, batch)}
            except ValueError as error:  # micro-batches of BatchNorm, for example
                print(f"{name} is left out: {error}")
                continue
            losses = [work() for work in works.values()]
            if not abs(losses[0] - losses[1]) <= _LOSSES_AGREE * losses[0]:
                raise RuntimeError(f"{name}: the losses are {losses}; nothing was timed")
            turns = take_turns(works, rounds=self.rounds)
            figures |= printed({f"{name}, times as long": ratio_of(turns, name, _AS_IT_IS)})
            measured[name] = other
        if self.memory:
            figures |= printed(
                {
                    f"{name}, MB above the model": peak_megabytes(_peak, config, batch)
                    for name, config in measured.items()
                    # the memory of compiled ones would be the compiler's
                    if config.efficiency.compile in ("auto", "off")
                }
            )
        self.write_result(figures, "timm", precision=base.efficiency.precision)


def switches_of(settings: Efficiency, precision: str) -> dict[str, dict[str, object]]:
    """The change of each figure, where the step computes in `precision`."""
    other_precision = "fp32" if precision != "fp32" else "bf16"
    switches: dict[str, dict[str, object]] = {
        other_precision: {"precision": other_precision},
        "no channels_last": {"channels_last": False},
        "padded texts": {"text_layout": "padded"},
        "trimmed texts": {"text_layout": "trimmed"},
        "each text by itself": {"unique_texts": False},
        "tiled loss": {"loss": "tiled"},
        "no fused optimizer": {"fused_optimizer": False},
        "activation checkpointing": {"activation_checkpointing": True},
    }
    if settings.batch_size > 1:
        switches["two micro-batches"] = {"micro_batch_size": -(-settings.batch_size // 2)}
    if settings.compile:
        switches["compiled by block"] = {"compile": "blocks"}
        switches["compiled"] = {"compile": "encoders"}
    return switches


def steps_of(config: TrainConfig, batch: Batch) -> Callable[[], float]:
    """A function that takes a training step at each call, and returns its loss."""
    trainer = Trainer(config, ListLoader([batch]), progress=False)
    batch = batch.to(trainer.device)
    return lambda: float(trainer.train_step(batch)[0])


def _peak(config: TrainConfig, batch: Batch) -> float:
    keep_freed_memory()
    device = choose_device(config.run.device)
    return peak_bytes(steps_of(config, batch), device_type=device.type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Stage):
    """Peak memory of training steps with cached gradients and without."""

    data: Path
    """Packed data set."""
    preset: str = "mixed-small"
    """A preset of unicl-pretrain."""
    image_encoder: str = "vit_small_patch16_224"
    """A timm model."""
    image_size: int = 64
    """Side of the images."""
    large: int = 8192
    """Batch that is taken in micro-batches."""
    micro: int = 64
    """Micro-batch, and the smallest batch."""
    plain: int = 1024
    """Batch that is taken at once."""
    rounds: int = 1
    """Repetitions of each."""

    def run(self) -> None:
        batches = {
            f"batch {self.micro:,}": (self.micro, 0),
            f"batch {self.large:,} in micro-batches of {self.micro}": (self.large, self.micro),
            f"batch {self.plain:,}": (self.plain, 0),
        }
        peaks: dict[str, list[float]] = {name: [] for name in batches}
        works = {
            name: lambda name=name: peaks[name].append(peak_of_a_step(self, *batches[name]) / 1e9)
            for name in batches
        }
        turns = take_turns(works, rounds=self.rounds, warm_up=0)
        figures = {f"{name}, peak GB": summarise(found) for name, found in peaks.items()}
        for name, taken in turns.items():
            figures[f"{name}, seconds with start"] = seconds_of(taken)
        self.report(figures, "timm")


def peak_of_a_step(settings: Memory, batch: int, micro: int) -> int:
    """Largest resident size of unicl-pretrain in bytes; at least this process's own."""
    size = str(settings.image_size)
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
    ):
        command = (
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", "--preset", settings.preset),
            *("--model.image-encoder", settings.image_encoder, "--data.image-size", size),
            *("--data.evaluation-resize", size, "--data.train", str(settings.data)),
            *("--efficiency.precision", "bf16", "--run.samples", "0", "--run.steps", "1"),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(Stage):
    """Time of a training step by its parts, beside the floor of their matrix products."""

    data: Path
    """Packed data set."""
    preset: str = "swin-tiny"
    """Model and settings."""
    batch_size: int = 16
    """Images of a step."""
    device: DeviceName = "auto"
    """Device that runs the step."""

    def run(self) -> None:
        keep_freed_memory()
        device = choose_device(self.device)
        config = long_preset(self.preset, global_batch_size=self.batch_size, device=self.device)
        batch = take_batch(config, self.data)
        trainer = Trainer(config, ListLoader([batch]), progress=False)
        step = StepInParts(trainer, batch.to(device))
        compare(step)
        operations = step.count_operations()
        step.take()  # warm-up
        taken = [step.take() for _ in range(self.rounds)]
        whole = [sum(seconds.values()) for seconds in taken]
        rate = measure_rate(step.precision.compute_type, device)
        figures = {f"{part}, s": summarise([t[part] for t in taken]) for part in taken[0]}
        figures["whole step, s"] = summarise(whole)
        for part, count in operations.items():
            if count < _COUNTS * sum(operations.values()):
                continue  # its products are not what takes its time
            ratios = [seconds[part] / (count / rate) for seconds in taken]
            figures[f"{part}, times its floor"] = summarise(ratios)
        floor = sum(operations.values()) / rate
        figures["whole step, times its floor"] = summarise([seconds / floor for seconds in whole])
        figures["rate of one product, GFLOP/s"] = summarise([rate / 1e9])
        precision = trainer.config.efficiency.precision
        self.report(figures, "timm", operations=operations, precision=precision)
