"""What each switch of `efficiency` does to a training step: its time, and its memory.

    unicl-bench efficiency --data PACKED --image-encoder resnet50 [--json FILE]

Two trainers take turns on the same batch, from the same weights: one as `unicl-pretrain` runs it
here, one with a single switch the other way; then the next switch. Their first losses are compared
before. Memory is what the first step takes above the model in a fresh process, at most: gradients,
averages of the optimizer and activations.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.models.precision import settle_precision
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.training.trainer import Trainer

from ..harness import (
    BenchmarkSettings,
    Figures,
    peak_bytes,
    print_figures,
    ratios_of,
    summarise,
    take_turns,
    write_result,
)
from .step import step_config, take_batch

_AS_IT_IS = "as it is"
_LOSSES_AGREE = 0.03
"""Relative, of a step in 16 bits and one in 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What each switch of efficiency does to a training step."""

    data: Path
    """Packed data set; with captions the switches of texts count, with labels hardly."""
    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model."""
    image_size: int = 224
    """Side of the images."""
    batch_size: int = 16
    """Images of a step."""
    compile: bool = False
    """Try torch.compile as well, which takes minutes."""
    memory: bool = True
    """Measure memory, too."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    keep_freed_memory()  # as in training
    config = step_config(
        settings.image_encoder,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        precision="auto",
    )
    base = settle_precision(config, torch.device("cpu"))
    batch = take_batch(base, settings.data)
    figures: Figures = {}
    measured = {_AS_IT_IS: base}
    for name, change in switches_of(settings, base.efficiency.precision).items():
        other = changed(base, change)
        work = steps_of(base, batch)
        try:
            works = {_AS_IT_IS: work, name: steps_of(other, batch)}
        except ValueError as error:  # micro-batches of BatchNorm, say
            print(f"{name} is passed over: {error}")
            continue
        losses = [work() for work in works.values()]
        if not abs(losses[0] - losses[1]) <= _LOSSES_AGREE * losses[0]:
            raise RuntimeError(f"{name}: the losses are {losses}; nothing was timed")
        turns = take_turns(works, rounds=settings.rounds)
        figure = {f"{name}, times as long": summarise(ratios_of(turns, name, _AS_IT_IS))}
        print_figures(figure)
        figures |= figure
        measured[name] = other
    if settings.memory:
        figures |= measure_memory(measured, batch)
    write_result(settings, figures, "timm", precision=base.efficiency.precision)


def switches_of(settings: Settings, precision: str) -> dict[str, dict[str, object]]:
    """What is changed for each figure, where `precision` is what the step has."""
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
        switches["compiled"] = {"compile": True}
    return switches


def changed(config: TrainConfig, change: dict[str, object]) -> TrainConfig:
    """The config with other values of `efficiency`."""
    efficiency = dataclasses.replace(config.efficiency, **change)  # type: ignore[arg-type]
    return dataclasses.replace(config, efficiency=efficiency)


def steps_of(config: TrainConfig, batch: Batch) -> Callable[[], float]:
    """Takes a training step at each call, and returns its loss."""
    trainer = Trainer(config, ListLoader([batch]), progress=False)
    return lambda: float(trainer.train_step(batch)[0])


def measure_memory(configs: dict[str, TrainConfig], batch: Batch) -> Figures:
    """Megabytes of the first step of each, by fresh processes that share nothing with this one."""
    figures: Figures = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, config in configs.items():
            if config.efficiency.compile:  # its memory would be the compiler's
                continue
            peak = pool.apply(_peak_megabytes, (config, batch))
            figures[f"{name}, MB above the model"] = summarise([peak])
    print_figures(figures)
    return figures


def _peak_megabytes(config: TrainConfig, batch: Batch) -> float:
    keep_freed_memory()
    return peak_bytes(steps_of(config, batch)) / 1e6
