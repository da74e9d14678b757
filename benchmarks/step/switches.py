"""Time and memory of a step, by switch of `efficiency`.

Two trainers take turns on the same batch, from the same weights: one as `unicl-pretrain` runs it
here, one with a single switch changed; then the next switch. Memory is what the first step takes
above the model in a fresh process, at most: gradients, averages of the optimizer and activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.system.machine import choose_device, keep_freed_memory

from ..harness import Figures, peak_bytes, peak_megabytes, printed, ratio_of, take_turns
from .parts import build_trainer

_AS_IT_IS = "as it is"
_LOSSES_AGREE = 0.03
"""Relative difference allowed between the losses of a step in 16 bits and one in 32."""


def measure_switches(base: TrainConfig, batch: Batch, *, rounds: int, memory: bool) -> Figures:
    """The ratio of each changed step's time to the step's as it is; megabytes with `memory`.

    Raises:
        RuntimeError: a switch changes the loss.
    """
    figures: Figures = {}
    measured = {_AS_IT_IS: base}
    for name, change in switches_of(base).items():
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
        turns = take_turns(works, rounds=rounds)
        figures |= printed({f"{name}, times as long": ratio_of(turns, name, _AS_IT_IS)})
        measured[name] = other
    for name, config in measured.items() if memory else ():
        figures[f"{name}, MB above the model"] = peak_megabytes(_peak, config, batch)
    return figures


def switches_of(config: TrainConfig) -> dict[str, dict[str, object]]:
    """The changes of `efficiency` that are worth a look, by name."""
    other_precision = "fp32" if config.efficiency.precision != "fp32" else "bf16"
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
    if (size := config.run.global_batch_size) > 1:
        switches["two micro-batches"] = {"micro_batch_size": -(-size // 2)}
    return switches


def steps_of(config: TrainConfig, batch: Batch) -> Callable[[], float]:
    """A function that takes a training step at each call, and returns its loss."""
    trainer, batch = build_trainer(config, batch)
    return lambda: float(trainer.train_step(batch)[0])


def _peak(config: TrainConfig, batch: Batch) -> float:
    keep_freed_memory()
    device = choose_device(config.run.device)
    return peak_bytes(steps_of(config, batch), device_type=device.type)
