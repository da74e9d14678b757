"""A training step built for a benchmark, and taken apart at the features.

The parts must give the gradients of the whole step. The floor of a part is the time of its matrix
products and convolutions at the rate of one large square product of the same type.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import (
    DataConfig,
    DeviceName,
    EfficiencyConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.objectives.targets import collate
from unicl_fast.tools.diagnose.measuring import timed
from unicl_fast.tools.diagnose.step_parts import StepInParts
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

from ..harness import Figures, printed, rate_of, summarise, take_turns

_SQUARE = 4096
"""Side of the matrices whose product gives the floor."""
_COUNTS = 0.01
"""Part of a step's operations from which on a part is compared with the time that they need."""
_CONTEXT, _START, _END = 77, 49406, 49407


def step_config(
    image_encoder: str,
    *,
    image_size: int,
    batch_size: int,
    device: DeviceName = "auto",
    text: Mapping[str, Any] = MappingProxyType({}),
    **efficiency: Any,
) -> TrainConfig:
    """A timm model and the paper's text encoder (or fields of another one), in a long run."""
    return TrainConfig(
        data=DataConfig(image_size=image_size, evaluation_resize=image_size),
        model=ModelConfig(image_encoder=image_encoder, **text),
        efficiency=EfficiencyConfig(**efficiency),
        run=RunConfig(global_batch_size=batch_size, steps=1 << 20, device=device),
    )


def build_trainer(config: TrainConfig, batch: Batch, **more: Any) -> tuple[Trainer, Batch]:
    """A trainer whose loader has one batch, and that batch on the trainer's device."""
    trainer = make_trainer(config, ListLoader([batch]), progress=False, **more)
    return trainer, batch.to(trainer.device)


def measure_parts(config: TrainConfig, batch: Batch, *, rounds: int) -> Figures:
    """Seconds of each part, and in times of its floor; RuntimeError if the parts differ."""
    step = StepInParts(*build_trainer(config, batch))
    compare(step)
    with step.counter:
        step.back_propagate()
    step.trainer.optimizer.zero_grad()
    operations = {name: count for name, count in step.operations.items() if count}
    step.take()  # warm-up
    taken = [step.take() for _ in range(rounds)]
    whole = [sum(seconds.values()) for seconds in taken]
    rate = _measure_rate(step.precision.compute_type, step.device)
    total = sum(operations.values())
    figures = {f"{part}, s": summarise([t[part] for t in taken]) for part in taken[0]}
    figures["whole step, s"] = summarise(whole)
    for part, count in operations.items():
        if count >= _COUNTS * total:
            ratios = [seconds[part] / (count / rate) for seconds in taken]
            figures[f"{part}, times its floor"] = summarise(ratios)
    figures["whole step, times its floor"] = summarise([one / (total / rate) for one in whole])
    turns = take_turns(
        {"step": lambda: step.trainer.train_step(step.batch)},
        rounds=rounds,
        device_type=step.device.type,
    )
    figures["step as trained, images/s"] = rate_of(turns["step"], step.batch.batch_size)
    figures["rate of one product, GFLOP/s"] = summarise([rate / 1e9])
    return printed(figures)


def compare(step: StepInParts) -> None:
    """Raises RuntimeError if the parts do not give the gradients of the trainer's step."""
    trainer = step.trainer
    trainer.model.train()
    found = []
    take_whole = functools.partial(trainer.back_propagate, step.batch)
    for back_propagate in (take_whole, step.back_propagate):
        back_propagate()
        found.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
        trainer.optimizer.zero_grad()
    for whole, parts in zip(*found, strict=True):
        gap = float((whole - parts).norm() / whole.norm().clamp_min(1e-12))
        if not gap < 0.05:  # sums of narrow types in another order
            raise RuntimeError(f"the parts' gradients differ by {gap:.2g}; nothing was timed")


def random_batch(
    size: int, *, pixels: int, num_texts: int, longest: int = 40, seed: int = 0
) -> Batch:
    """Random images [size pixels pixels 3], and `num_texts` texts of 8 to `longest` tokens."""
    generator = torch.Generator().manual_seed(longest + seed)
    images = torch.randint(256, (size, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 40_000, (num_texts, _CONTEXT), generator=generator)
    lengths = torch.randint(8, longest + 1, (num_texts, 1), generator=generator)
    positions = torch.arange(_CONTEXT)
    tokens[:, 0] = _START
    tokens[positions == lengths - 1] = _END
    tokens[positions >= lengths] = 0
    of_images = tokens[torch.arange(size) % num_texts]
    return collate(images, of_images, torch.full((size,), -1))


def _measure_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large square product, the best of five."""
    left, right = (torch.randn(_SQUARE, _SQUARE, dtype=dtype, device=device) for _ in range(2))
    best = min(timed(lambda: float((left @ right).sum())).wall_seconds for _ in range(5))
    return 2 * _SQUARE**3 / best
