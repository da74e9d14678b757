"""Where the time of a training step goes, and how far each part is from the matmul floor.

    unicl-bench profile --data PACKED [--preset NAME] [--json FILE]

A step is taken apart at the features: both encoders forward, the loss and its gradient with respect
to the features, both encoders backward, the update. The parts give the gradients of the whole step,
which is compared first. The floor of a part is the time that its matrix products and convolutions
would take at the rate of one large square product of the same type on the same machine. (Fused
attention on a CPU is not counted: it is used there in fp32 only, and is a few percent.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import DeviceName
from unicl_fast.models.precision import Precision
from unicl_fast.presets import build_preset
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.system.machine import choose_device
from unicl_fast.training.cached_gradients import back_propagate_learnt
from unicl_fast.training.step import contrast_over_ranks, encoder_input, texts_to_encode
from unicl_fast.training.trainer import Trainer

from ..harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    summarise,
    write_result,
)
from .step import take_batch

_SQUARE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Time of a training step by its parts, beside the floor of their matrix products."""

    data: Path
    """Packed data set."""
    preset: str = "swin-tiny"
    """Model and settings."""
    batch_size: int = 16
    """Images of a step."""
    device: DeviceName = "auto"
    """Where the step runs."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    keep_freed_memory()
    config = build_preset(settings.preset)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(
            config.run, global_batch_size=settings.batch_size, steps=1000, device="cpu"
        ),
    )
    batch = take_batch(config, settings.data)
    device = choose_device(settings.device)
    trainer = Trainer(config, ListLoader([batch]), device=device, progress=False)
    step = StepInParts(trainer, batch.to(device))
    compare(step)
    operations = step.count_operations()
    step.take()  # warm-up
    taken = [step.take() for _ in range(settings.rounds)]
    rate = measure_rate(step.compute_type, device)
    figures: Figures = {f"{part}, s": summarise([t[part] for t in taken]) for part in taken[0]}
    figures["whole step, s"] = summarise([sum(t.values()) for t in taken])
    for part, count in operations.items():
        floor = count / rate
        figures[f"{part}, times its floor"] = summarise([t[part] / floor for t in taken])
    total = sum(operations.values()) / rate
    figures["whole step, times its floor"] = summarise([sum(t.values()) / total for t in taken])
    figures["rate of one product, GFLOP/s"] = summarise([rate / 1e9])
    print_figures(figures)
    precision = trainer.config.efficiency.precision
    write_result(settings, figures, "timm", operations=operations, precision=precision)


class StepInParts:
    """A trainer's step on one batch, taken apart and timed."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch
        self.device = batch.images.device
        self.precision = Precision(trainer.config.efficiency.precision)
        self.compute_type = self.precision.compute_type
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self.counting = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside, or counts its operations."""
        self._wait()
        started = time.perf_counter()
        counter = FlopCounterMode(display=False) if self.counting else contextlib.nullcontext()
        with counter:
            yield
        self._wait()
        self.seconds[name] = time.perf_counter() - started
        if isinstance(counter, FlopCounterMode) and counter.get_total_flops():
            self.operations[name] = counter.get_total_flops()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self) -> dict[str, float]:
        """One step; seconds of each part."""
        trainer = self.trainer
        trainer.model.train()
        loss = self.back_propagate()
        with self.part("clip and update"):
            trainer.update(loss)
            trainer.optimizer.zero_grad()
        return dict(self.seconds)

    def back_propagate(self) -> Tensor:
        """Adds the step's gradient to the parameters'."""
        trainer, batch = self.trainer, self.batch
        model, config = trainer.model, trainer.config
        model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        with self.part("normalise images"):
            pixels = encoder_input(batch.images, config)
            tokens, num_tokens, text_class_ids, text_counts = texts_to_encode(batch, config)
        with self.part("image encoder forward"), self.precision.autocast(self.device.type):
            images = model.encode_image(pixels)
        with self.part("text encoder forward"), self.precision.autocast(self.device.type):
            texts = model.encode_text(tokens, num_tokens)
            scale = model.logit_scale.exp()
        features = [feature.detach().requires_grad_() for feature in (images, texts, scale)]
        with self.part("loss and its gradient"):
            loss = contrast_over_ranks(
                *features[:2],
                class_ids=batch.class_ids,
                text_class_ids=text_class_ids,
                text_counts=text_counts,
                scale=features[2],
                ranks=trainer.ranks,
                form=config.efficiency.loss,
            )
            scaled = trainer.scaler.scale(loss)
            image_gradient, text_gradient, scale_gradient = torch.autograd.grad(scaled, features)
        with self.part("image encoder backward"):
            images.backward(image_gradient)
        with self.part("text encoder backward"):
            back_propagate_learnt([texts, scale], [text_gradient, scale_gradient])
        return loss.detach()

    def count_operations(self) -> dict[str, int]:
        """Floating-point operations of the matrix products and convolutions of each part."""
        self.counting = True
        self.back_propagate()
        self.counting = False
        self.trainer.optimizer.zero_grad()
        return self.operations


def compare(step: StepInParts) -> None:
    """Refuses to time parts that do not add up to the trainer's step."""
    trainer = step.trainer
    trainer.model.train()
    found = []
    for back_propagate in (lambda: trainer.back_propagate(step.batch), step.back_propagate):
        back_propagate()
        found.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
        trainer.optimizer.zero_grad()
    for whole, parts in zip(*found, strict=True):
        gap = float((whole - parts).norm() / whole.norm().clamp_min(1e-12))
        if not gap < 0.05:  # sums of narrow types in another order
            raise RuntimeError(f"the parts' gradients differ by {gap:.2g}; nothing was timed")


def measure_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of one large square product, the best of five."""
    left, right = (torch.randn(_SQUARE, _SQUARE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * _SQUARE**3 / best
