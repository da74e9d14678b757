"""Time and memory of a step, by switch of `efficiency`.

Two trainers take turns on the same batch: one as `unicl-pretrain` runs it here, one with a switch
changed. Memory is that of the first step above the model, at most, in a fresh process.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from unicl_fast.batch import Batch, Texts
from unicl_fast.config import TrainConfig
from unicl_fast.system.machine import keep_freed_memory

from ..harness import Figures, peak_bytes, peak_megabytes, printed, ratio_of, take_turns
from .parts import build_trainer

_AS_IT_IS = "as it is"
_EACH_TEXT = "each text by itself, padded"
_LOSSES_AGREE = 0.03
"""Relative difference allowed between the losses of a step in 16 bits and one in 32."""


def measure_switches(
    base: TrainConfig, batch: Batch, *, device: torch.device, rounds: int, memory: bool
) -> Figures:
    """The ratio of each changed step's time to the step's as it is; megabytes with `memory`.

    Raises RuntimeError if a switch changes the loss.
    """
    figures: Figures = {}
    measured = {_AS_IT_IS: base}
    for name, change in {_EACH_TEXT: {}, **switches_of(base, device)}.items():
        other = base.changed(efficiency=change)
        try:
            fed = repeated_texts(batch) if name == _EACH_TEXT else batch
            works = {_AS_IT_IS: steps_of(base, batch), name: steps_of(other, fed)}
            losses = [float(work()) for work in works.values()]
        except (ValueError, torch.OutOfMemoryError) as error:  # micro-batches of BatchNorm ...
            print(f"{name} is left out: {error}")
            continue
        if not abs(losses[0] - losses[1]) <= _LOSSES_AGREE * losses[0]:
            raise RuntimeError(f"{name}: the losses are {losses}; nothing was timed")
        turns = take_turns(works, rounds=rounds, device_type=device.type)
        figures |= printed({f"{name}, times as long": ratio_of(turns, name, _AS_IT_IS)})
        if name != _EACH_TEXT:
            measured[name] = other
    for name, config in measured.items() if memory else ():
        figures |= printed(
            {f"{name}, MB above the model": peak_megabytes(_peak, config, batch, device.type)}
        )
    return figures


def switches_of(config: TrainConfig, device: torch.device) -> dict[str, dict[str, object]]:
    """The changes of `efficiency` that are worth a look, by name."""
    other_precision = "fp32" if config.efficiency.precision != "fp32" else "bf16"
    switches: dict[str, dict[str, object]] = {
        other_precision: {"precision": other_precision},
        "tiled loss": {"loss": "tiled"},
        "activation checkpointing": {"activation_checkpointing": True},
    }
    if (size := config.run.global_batch_size) > 1:
        switches["two micro-batches"] = {"micro_batch_size": -(-size // 2)}
    if device.type == "cuda":
        switches["fp32 with TF32"] = {"precision": "tf32"}
        switches["timm's window attention"] = {"window_attention": "timm"}
        for way in ("off", "blocks"):
            if way != config.efficiency.compile:
                switches[f"compiled: {way}"] = {"compile": way}
    return switches


def steps_of(config: TrainConfig, batch: Batch) -> Callable[[], Tensor]:
    """A function that takes a training step at each call, and returns its loss."""
    trainer, batch = build_trainer(config, batch)
    return lambda: trainer.train_step(batch)[0]


def _peak(config: TrainConfig, batch: Batch, device_type: str) -> float:
    keep_freed_memory()
    step = steps_of(config, batch)
    return peak_bytes(lambda: step().item(), device_type=device_type)


def repeated_texts(batch: Batch) -> Batch:
    """The same batch without shared texts or skipped padding; its step gives the same result."""
    texts, targets = batch.texts, batch.targets
    tokens = texts.tokens[texts.index]
    each = Texts(
        tokens=tokens,
        lengths=np.full(len(tokens), tokens.shape[1]),
        index=torch.arange(len(tokens), device=tokens.device),
        counts=torch.ones_like(texts.index),
        weights=batch.weights,
    )
    targets = dataclasses.replace(targets, text_class_ids=targets.class_ids)
    return dataclasses.replace(batch, texts=each, targets=targets)
