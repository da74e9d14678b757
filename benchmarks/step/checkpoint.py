"""The cost of writing a checkpoint while training continues.

A turn is a few steps with a checkpoint after the first. What is still being written at the end of a
turn is awaited outside the clock: a run writes its next checkpoint later.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from unicl_fast.batch import Batch
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config import CheckpointConfig, OptimConfig, TrainConfig
from unicl_fast.training.trainer import Trainer

from ..harness import Figures, summarise, take_turns
from .parts import build_trainer

_STEPS = 4
"""Steps of a turn."""
_EMA_DECAY = 0.9999
"""Above 0: the average of the weights is stored too."""


def measure_checkpoint(
    config: TrainConfig, batch: Batch, folder: Path | None, *, rounds: int
) -> Figures:
    """Times steps with awaited checkpoints, and with those that a thread writes meanwhile.

    Raises:
        RuntimeError: the two ways write different files.
    """
    config = dataclasses.replace(
        config, optim=OptimConfig(ema_decay=_EMA_DECAY), checkpoint=CheckpointConfig(keep=1)
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix="unicl-bench-") as scratch:
        trainer, batch = build_trainer(config, batch, run_folder=Path(scratch))
        trainer.train_step(batch)
        size = compare(trainer)
        saves: dict[str, Callable[[], None]] = {
            "without": lambda: None,
            "awaited": trainer.save,
            "in a thread": lambda: trainer.save(required=False),
        }
        saving: dict[str, list[float]] = {name: [] for name in saves}

        def steps(name: str) -> None:
            for step in range(_STEPS):
                loss, _ = trainer.train_step(batch)
                if step == 0:
                    loss.item()
                    # every machine waits for the call; turns cost more than it where the writing
                    # thread and the steps share few cores
                    started = time.perf_counter()
                    saves[name]()
                    saving[name].append(time.perf_counter() - started)
            loss.item()  # waits for a device

        turns = take_turns(
            {name: functools.partial(steps, name) for name in saves},
            rounds=rounds,
            before=lambda name: trainer.finish_writing(),
        )
        trainer.finish_writing()
    taken = {name: [turn.wall_seconds for turn in turns[name]] for name in saves}
    step = statistics.median(taken["without"]) / _STEPS
    figures = {f"{_STEPS} steps, {name}, s": values for name, values in taken.items()}
    for name in ("awaited", "in a thread"):
        figures[f"save() of one {name}, s"] = saving[name][1:]  # without the warm-up
        cost = [one - none for one, none in zip(taken[name], taken["without"], strict=True)]
        figures[f"cost of one {name}, s"] = cost
        figures[f"cost of one {name}, steps"] = [seconds / step for seconds in cost]
    figures["a checkpoint, MB"] = [size / 1e6]
    return {name: summarise(values) for name, values in figures.items()}


def compare(trainer: Trainer) -> int:
    """Bytes of a checkpoint; RuntimeError if the two ways write different files."""
    assert trainer.run_folder is not None
    written = []
    for required in (True, False):
        trainer.save(required=required)
        trainer.finish_writing()
        checkpoint = find_checkpoint(trainer.run_folder)
        written.append(read_state(checkpoint).checksums)
    if written[0] != written[1]:
        raise RuntimeError(f"the two ways write different files: {written}; nothing was timed")
    return sum(path.stat().st_size for path in checkpoint.iterdir())
