"""The ranks of a run, and the few collectives that a step needs, with their gradients.

The convention for gradients: every rank holds the same global loss and differentiates it with
respect to ITS images and texts; parameter gradients are then summed over ranks. So a text's
gradient is the sum of what every rank's images say about it (reduce-scatter), while a sum over
ranks passes its gradient on unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from unicl_fast.system.progress import WaitingForRanks


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers; a process alone is rank 0 of 1 and has no group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host_group: Any = None
    """A gloo group for values on the host, so that exchanging them waits for no device."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_batch_size(self, global_batch_size: int) -> int:
        """Computes the size of a rank's local batch.

        Raises:
            ValueError: the ranks cannot share the global batch evenly.
        """
        size, left = divmod(global_batch_size, self.world_size)
        if not left:
            return size
        near = [each * self.world_size for each in (size, size + 1) if each]
        divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        ranks = sorted(divisors, key=lambda n: abs(math.log(n / self.world_size)))[:4]
        raise ValueError(  # ranks first: a run that is resumed cannot change its batch
            f"{self.world_size} ranks cannot share a global batch of {global_batch_size} evenly: "
            f"start {_either(sorted(ranks))} {'ranks' if max(ranks) > 1 else 'rank'}, or set "
            f"run.global_batch_size to {_either(near)} in a new run"
        )


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def gather_integers(value: int, ranks: Ranks) -> list[int]:
    """Gathers the value of every rank, on the host."""
    if ranks.world_size == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    with WaitingForRanks():
        dist.all_gather(gathered, mine, group=ranks.host_group)
    return [int(tensor) for tensor in gathered]


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Gathers an object of every rank, in rank order, on the host; pickled, so keep it small."""
    if ranks.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * ranks.world_size
    with WaitingForRanks():
        dist.all_gather_object(gathered, value, group=ranks.host_group)
    return gathered


def from_rank_0(value: Any, ranks: Ranks) -> Any:
    """Returns rank 0's value on all ranks, by way of the host."""
    if ranks.world_size == 1:
        return value
    values = [value]
    with WaitingForRanks():
        dist.broadcast_object_list(values, src=0, group=ranks.host_group)
    return values[0]


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Gathers the rows of all ranks in rank order; ranks may hold different numbers of rows.

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
    """Sums over ranks; the gradient passes unchanged, since what follows is equal on all ranks."""
    if ranks.world_size == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def max_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Takes the element-wise maximum over ranks, without gradient."""
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
