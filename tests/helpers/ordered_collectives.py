"""The collectives of each rank, in order, under random delays."""

import contextlib
import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_ranks import group_of
from rank_workers import place_of, signalled, trainer_of
from small_runs import StepLoader, global_batch, staged_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.signals import Interrupted
from unicl_fast.objectives import text_columns
from unicl_fast.objectives.text_columns import TextColumns
from unicl_fast.training.run import build_trainer
from unicl_fast.training.trainer import Trainer

_LONGEST_SECONDS = 0.01
_BETWEEN_TWO = ("c10d::send", "c10d::recv_")  # parts of a checkpoint, from their owners


class Noted(TorchDispatchMode):
    """Appends operator, types, sizes and group of each collective to a file, after a delay.

    The dispatcher sees all of them, whoever calls: this package, DDP in C++ or `fully_shard`.
    """

    def __init__(self, file: Path, delays: random.Random) -> None:
        super().__init__()
        self._file, self._delays = file, delays

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith(("c10d", "_c10d")) and name not in _BETWEEN_TWO:
            given = tree_leaves((args, kwargs))
            tensors = [
                f"{str(one.dtype).removeprefix('torch.')}[{one.numel()}]"
                for one in given
                if isinstance(one, torch.Tensor)
            ]
            groups = [found for found in map(group_of, given) if found]
            time.sleep(self._delays.random() * _LONGEST_SECONDS)
            with self._file.open("a") as log:
                log.write(f"{name} {' '.join(tensors)} group {groups}\n")
        return function(*args, **(kwargs or {}))


def _fails(batch: Batch) -> Batch:
    if batch.step == 2:
        raise ValueError("a disk of rank 1")
    return batch


def _send_tables_first(columns: TextColumns, text_features: torch.Tensor) -> torch.Tensor:
    num_texts = columns._max_num_texts()
    columns._send_table(torch.stack([columns._class_ids, columns._counts], dim=1), num_texts)
    return columns._features.send(text_features, num_rows=num_texts)


CHANGES = {"SIGTERM": signalled, "error": _fails}
"""What happens in a loader."""
FAULTS = {
    "skips one": functools.partial(
        mock.patch.object, text_columns, "max_over_ranks", lambda x, ranks: x
    ),
    "swaps two": functools.partial(mock.patch.object, TextColumns, "send", _send_tables_first),
}
"""Patches of a rank whose collectives are not those of the others."""


def train_noted(
    ranks: Any,
    images: torch.Tensor,
    folder: Path,
    runs: dict[str, TrainConfig],
    happens: str | None = None,
) -> None:
    """Trains runs, each with a log of this rank's collectives.

    On rank 1 happens what a run is called in `CHANGES`, or the one of `FAULTS`.
    """
    delays = random.Random(ranks.rank)
    for name, config in runs.items():
        change = CHANGES.get(name if ranks.rank == 1 else "", lambda batch: batch)
        trainer = _build(ranks, images, folder / name, config)

        def late(
            start_step: int, batches: Any = trainer.loader.batches, change: Any = change
        ) -> Iterator[Batch]:
            for batch in batches(start_step):
                time.sleep(delays.random() * _LONGEST_SECONDS)
                yield change(batch)

        trainer.loader.batches = late
        with contextlib.ExitStack() as stack:
            if happens and ranks.rank == 1:
                stack.enter_context(FAULTS[happens]())
            stack.enter_context(contextlib.suppress(Interrupted))
            stack.enter_context(Noted(folder / f"{name}-{ranks.rank}.txt", delays))
            trainer.fit()


def _build(ranks: Any, images: torch.Tensor, folder: Path, config: TrainConfig) -> Trainer:
    if config.data.train:
        from unicl_fast.pipelines.train_loader import TrainLoader

        return build_trainer(
            config, run_folder=folder, build_loader=TrainLoader, evaluate=dict, ranks=ranks,
            device=torch.device("cpu"), checkpoint=None, progress=False,
        )  # fmt: skip
    make = functools.partial(staged_batch, config=config) if config.run.stages else global_batch
    loader = StepLoader(images, make=make, **place_of(ranks))
    return trainer_of(ranks, images, config, loader=loader, run_folder=folder)
