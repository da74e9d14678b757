"""The cost of writing a checkpoint while training continues.

    unicl-bench checkpoint [--folder DIR]

A turn is a few steps with a checkpoint after the first. What is still being written
at the end of a turn is waited for outside the clock: a run writes its next one later.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config import CheckpointConfig, OptimConfig
from unicl_fast.objectives.targets import collate
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.trainer import Trainer

from ..harness import summarise, take_turns
from .step import ModelStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelStage):
    """Cost of a checkpoint for training: written beside it, or waited for."""

    batch_size: int = 8
    """Images of a step."""
    steps: int = 4
    """Steps of a turn."""
    ema_decay: float = 0.9999
    """Above 0 the average of the weights is stored too."""
    folder: Path | None = None
    """Folder for checkpoints, on the disk to measure; by default a temporary one."""

    def run(self) -> None:
        keep_freed_memory()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="unicl-bench-") as folder:
            trainer, batch = build(self, Path(folder))
            size = compare(trainer)
            saves: dict[str, Callable[[], None]] = {
                "without": lambda: None,
                "awaited": trainer.save,
                "beside": lambda: trainer.save(required=False),
            }
            saving: dict[str, list[float]] = {name: [] for name in saves}

            def steps(name: str) -> None:
                for step in range(self.steps):
                    loss, _ = trainer.train_step(batch)
                    if step == 0:
                        loss.item()
                        # every machine waits for the call; turns cost more than it where the
                        # writing thread and the steps share few cores
                        started = time.perf_counter()
                        saves[name]()
                        saving[name].append(time.perf_counter() - started)
                loss.item()  # waits for a device

            turns = take_turns(
                {name: functools.partial(steps, name) for name in saves},
                rounds=self.rounds,
                before=lambda name: trainer.finish_writing(),
            )
            trainer.finish_writing()
        taken = {name: [turn.wall_seconds for turn in turns[name]] for name in saves}
        step = statistics.median(taken["without"]) / self.steps
        figures = {f"{self.steps} steps, {name}, s": values for name, values in taken.items()}
        for name in ("awaited", "beside"):
            figures[f"save() of one {name}, s"] = saving[name][1:]  # without the warm-up
            cost = [one - none for one, none in zip(taken[name], taken["without"], strict=True)]
            figures[f"cost of one {name}, s"] = cost
            figures[f"cost of one {name}, steps"] = [seconds / step for seconds in cost]
        print(f"{'a checkpoint, MB':46} {size / 1e6:10.4g}")
        summaries = {name: summarise(values) for name, values in figures.items()}
        self.report(summaries, "safetensors", facts={"bytes of a checkpoint": size})


def build(settings: Checkpoint, folder: Path) -> tuple[Trainer, Batch]:
    """A trainer after a step, and a batch of noise with captions, which takes the usual time."""
    config = settings.config("bf16")
    config = dataclasses.replace(
        config,
        optim=OptimConfig(ema_decay=settings.ema_decay),
        checkpoint=CheckpointConfig(keep=1),
    )
    texts = [f"image {number} of some things" for number in range(settings.batch_size)]
    batch = noise(texts, torch.full((len(texts),), -1), side=settings.image_size)
    trainer = Trainer(config, ListLoader([batch]), run_folder=folder, progress=False)
    batch = batch.to(trainer.device)
    trainer.train_step(batch)
    return trainer, batch


def noise(texts: Sequence[str], labels: Tensor, *, side: int) -> Batch:
    """A batch of images without content; the others of its parts are given."""
    size = (len(texts), side, side, 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    return collate(images, Tokenizer()(texts), labels)


def compare(trainer: Trainer) -> int:
    """Bytes of a checkpoint; raises RuntimeError if the two ways write different files."""
    assert trainer.run_folder is not None
    written = []
    for must in (True, False):
        trainer.save(required=must)
        trainer.finish_writing()
        checkpoint = find_checkpoint(trainer.run_folder)
        written.append(read_state(checkpoint).checksums)
    if written[0] != written[1]:
        raise RuntimeError(f"awaited and beside write different files: {written}; nothing timed")
    return sum(path.stat().st_size for path in checkpoint.iterdir())
