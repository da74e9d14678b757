"""Ranks: who we are, and the few collectives the step needs, with their gradients.

The convention for gradients: every rank holds the same global loss and differentiates it with
respect to ITS images and texts; parameter gradients are then summed over ranks. So a text's
gradient is the sum of what every rank's images say about it (reduce-scatter), while a sum over
ranks passes its gradient on unchanged.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from unicl_fast.distributed.rendezvous import open_store
from unicl_fast.system import stages
from unicl_fast.system.stages import WaitingForRanks


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers. One process alone is rank 0 of 1 and has no group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host_group: Any = None
    """A gloo group for facts that live on the host, so that exchanging them waits for no device."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share_of(self, global_batch_size: int) -> int:
        """This rank's part of a global batch.

        Raises:
            ValueError: the ranks cannot share it evenly.
        """
        if global_batch_size % self.world_size:
            below = global_batch_size // self.world_size * self.world_size
            near = [size for size in (below, below + self.world_size) if size]
            # ranks first: a run that is resumed cannot change its batch
            ranks = sorted(
                [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0],
                key=lambda n: abs(math.log(n / self.world_size)),
            )[:4]
            raise ValueError(
                f"{self.world_size} ranks cannot share a global batch of {global_batch_size} "
                f"evenly: start {_either(sorted(ranks))} {'ranks' if max(ranks) > 1 else 'rank'}, "
                f"or set run.global_batch_size to {_either(near)} in a new run"
            )
        return global_batch_size // self.world_size


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the ranks that torchrun's environment names; alone, there is nothing to join.

    Args:
        device: decides between NCCL and gloo.
        timeout_seconds: how long a collective, or the meeting itself, waits for another rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    stages.mark("meeting the other ranks", waits_for_ranks=True)
    store, rank, world_size = open_store(timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        yield Ranks(
            rank=rank,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            host_group=dist.new_group(backend="gloo", timeout=timeout),
        )
    finally:
        stages.mark("parting from the other ranks", waits_for_ranks=True)
        dist.destroy_process_group()


def gather_integers(value: int, ranks: Ranks) -> list[int]:
    """The value of every rank, exchanged on the host."""
    if ranks.world_size == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    with WaitingForRanks():
        dist.all_gather(gathered, mine, group=ranks.host_group)
    return [int(tensor) for tensor in gathered]


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """What every rank gives, in rank order, exchanged on the host; pickled, so keep it small."""
    if ranks.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * ranks.world_size
    with WaitingForRanks():
        dist.all_gather_object(gathered, value, group=ranks.host_group)
    return gathered


def from_rank_0(value: Any, ranks: Ranks) -> Any:
    """What rank 0 gives, on all ranks, exchanged on the host."""
    if ranks.world_size == 1:
        return value
    values = [value]
    with WaitingForRanks():
        dist.broadcast_object_list(values, src=0, group=ranks.host_group)
    return values[0]


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all ranks in rank order; ranks may hold different numbers of rows.

    Differentiable for floating types: a rank gets back the sum over ranks of its rows' gradients.

    Args:
        rows: [sizes[rank], ...].
        sizes: number of rows of each rank.
    """
    if len(sizes) == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, sizes)  # type: ignore[no-untyped-call]
    return gathered


def sum_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise sum; the gradient passes unchanged, since what follows is equal on all ranks."""
    if ranks.world_size == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def max_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise maximum, without gradient."""
    if ranks.world_size == 1:
        return x
    x = x.clone()
    with WaitingForRanks():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = _pad_rows(rows, max(sizes))
        gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
        with WaitingForRanks():
            dist.all_gather_into_tensor(gathered, padded)
        if min(sizes) == max(sizes):
            return gathered
        blocks = gathered.split(max(sizes))
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "u d"]) -> tuple[Tensor, None]:
        sizes, rank = ctx.sizes, dist.get_rank()
        blocks = [_pad_rows(block, max(sizes)) for block in grad.split(sizes)]
        mine = torch.empty_like(blocks[rank])
        with WaitingForRanks():
            dist.reduce_scatter_tensor(mine, torch.cat(blocks))
        return mine[: sizes[rank]], None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        with WaitingForRanks():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _pad_rows(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def adopt_slurm_ranks() -> None:
    """Under `srun` with several tasks, says in torchrun's variables what SLURM says in its own.

    Does nothing where torchrun has spoken, or where srun started a single task.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or tasks == 1:
        return
    first_node = first_host(os.environ["SLURM_STEP_NODELIST"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": os.environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
    }
    os.environ.setdefault("MASTER_ADDR", first_node)
    # the same on all ranks, and different for jobs that share a node
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list, for example `node007` of `node[007-012,020],gpu1`."""
    head, bracket, ranges = node_list.partition("[")
    if "," in head or not bracket:
        return head.split(",")[0]
    first = ranges.partition("]")[0].split(",")[0].split("-")[0]
    return head + first
