"""What a checkpoint costs the training: written beside it, or waited for.

    unicl-bench checkpoint [--folder DIR] [--json FILE]

A turn is a few steps with a checkpoint after the first, as the trainer writes it. What is still
being written at the end of a turn is waited for off the clock: a run writes its next one later.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config import (
    CheckpointConfig,
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.objectives.collate import collate
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.trainer import Trainer

from ..harness import (
    BenchmarkSettings,
    print_figures,
    summarise,
    write_result,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What a checkpoint costs the training."""

    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model; beside it stands the paper's text encoder."""
    image_size: int = 224
    """Side of the images."""
    batch_size: int = 8
    """Images of a step."""
    steps: int = 4
    """Steps of a turn."""
    ema_decay: float = 0.9999
    """Above 0 the average of the weights is stored too."""
    folder: Path | None = None
    """Where checkpoints are written, on the disk in question; by default a temporary folder."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="unicl-bench-") as folder:
        trainer, batch = build(settings, Path(folder))
        size = compare(trainer)
        taken, held_up = measure(trainer, batch, settings)
    step = statistics.median(taken["without"]) / settings.steps
    figures = {f"{settings.steps} steps, {name}, s": values for name, values in taken.items()}
    for name in ("awaited", "beside"):
        figures[f"save() of one {name}, s"] = held_up[name]
        cost = [one - none for one, none in zip(taken[name], taken["without"], strict=True)]
        figures[f"cost of one {name}, s"] = cost
        figures[f"cost of one {name}, steps"] = [seconds / step for seconds in cost]
    summaries = {name: summarise(values) for name, values in figures.items()}
    print(f"{'a checkpoint, MB':46} {size / 1e6:10.4g}")
    print_figures(summaries)
    write_result(settings, summaries, "safetensors", facts={"bytes of a checkpoint": size})


def build(settings: Settings, folder: Path) -> tuple[Trainer, Batch]:
    """A trainer that has done a step, and a batch of noise with captions: neither shows in time."""
    config = TrainConfig(
        data=DataConfig(image_size=settings.image_size, evaluation_resize=settings.image_size),
        model=ModelConfig(image_encoder=settings.image_encoder),
        optim=OptimConfig(ema_decay=settings.ema_decay),
        efficiency=EfficiencyConfig(precision="bf16"),
        checkpoint=CheckpointConfig(keep=1),
        run=RunConfig(global_batch_size=settings.batch_size, steps=1 << 20),
    )
    size = (settings.batch_size, settings.image_size, settings.image_size, 3)
    texts = [f"image {number} of some things" for number in range(settings.batch_size)]
    batch = collate(
        torch.randint(256, size, dtype=torch.uint8),
        Tokenizer()(texts),
        torch.full((settings.batch_size,), -1),
    )
    trainer = Trainer(config, ListLoader([batch]), run_folder=folder, progress=False)
    batch = batch.to(trainer.device)
    trainer.train_step(batch)
    return trainer, batch


def compare(trainer: Trainer) -> int:
    """Refuses to time two ways of writing that do not write the same; returns the bytes of one."""
    assert trainer.run_folder is not None
    written = []
    for must in (True, False):
        trainer.save(must=must)
        trainer.finish_writing()
        checkpoint = find_checkpoint(trainer.run_folder)
        written.append(read_state(checkpoint).checksums)
    if written[0] != written[1]:
        raise RuntimeError(f"awaited and beside write different files: {written}; nothing timed")
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def measure(
    trainer: Trainer, batch: Batch, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each contestant's turns, and of the call within that saves; after a round of both.

    The call is what every machine waits for. Turns have more in them where the writing thread and
    the steps share few cores.
    """
    saves: dict[str, Callable[[], None]] = {
        "without": lambda: None,
        "awaited": trainer.save,
        "beside": lambda: trainer.save(must=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in saves}
    held_up: dict[str, list[float]] = {name: [] for name in saves}
    for number in range(settings.rounds + 1):
        for name, save in saves.items():
            gc.collect()
            started = time.perf_counter()
            for step in range(settings.steps):
                loss, _ = trainer.train_step(batch)
                if step == 0:
                    loss.item()
                    before = time.perf_counter()
                    save()
                    saving = time.perf_counter() - before
            loss.item()  # a device is waited for
            seconds = time.perf_counter() - started
            trainer.finish_writing()
            if number:
                taken[name].append(seconds)
                held_up[name].append(saving)
    return taken, held_up
