"""The collectives of each rank, in order, under random delays."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rank_workers import trainer_of
from torch.utils._pytree import tree_leaves

_NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier",
          "reduce_scatter_tensor")  # fmt: skip
_LONGEST_SECONDS = 0.02


@contextlib.contextmanager
def noted(file: Path, delays: random.Random, *, skipped: int | None = None) -> Iterator[None]:
    """Appends operator, types, sizes and group of each call; leaves out the one numbered so."""
    numbers = iter(range(1 << 30))

    def wrap(name: str, call: Any) -> Any:
        def noting(*arguments: Any, **settings: Any) -> Any:
            time.sleep(delays.random() * _LONGEST_SECONDS)
            if next(numbers) == skipped:
                return SimpleNamespace(wait=lambda: None)
            given = tree_leaves((arguments, settings))
            tensors = [(one.dtype, one.numel()) for one in given if isinstance(one, torch.Tensor)]
            group = settings.get("group") or dist.group.WORLD
            with file.open("a") as log:
                log.write(f"{name} {tensors} {group.group_name}\n")
            return call(*arguments, **settings)

        return noting

    with contextlib.ExitStack() as stack:
        for name in _NAMES:
            stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        yield


def train_noted(
    ranks: Any, images: torch.Tensor, folder: Path, runs: dict[str, Any], skipped: int | None
) -> None:
    """Trains runs, each with a log of this rank's collectives; rank 1 can skip one."""
    delays = random.Random(ranks.rank)
    for name, config in runs.items():
        trainer = trainer_of(ranks, images, config)
        trainer.model.image_encoder.register_forward_hook(
            lambda *_: time.sleep(delays.random() * _LONGEST_SECONDS)
        )
        if trainer.parallel.has_buckets:  # DDP's own calls are not Python's

            def add_up(_, bucket):  # DDP refuses annotations that are strings
                work = dist.all_reduce(bucket.buffer() / ranks.world_size, async_op=True)
                return work.get_future().then(lambda future: future.value()[0])

            trainer.parallel.encode.register_comm_hook(None, add_up)
        skips = skipped if ranks.rank == 1 else None
        with noted(folder / f"{name}-{ranks.rank}.txt", delays, skipped=skips):
            trainer.fit()
