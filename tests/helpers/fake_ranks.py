"""Rank 0 of many ranks that are not there: what its step sends, and how much work that makes.

Torch's fake process group answers every collective at once and leaves the results as they were.
`Collectives` fills them in: what was gathered is this rank's own, and the largest number of texts
is found.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unicl_fast.distributed import ranks
from unicl_fast.distributed.ranks import Ranks


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[Ranks]:
    """Ranks on GPUs, as far as their collectives go."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)

    def maximum(value: Tensor, _: Ranks) -> tuple[Tensor, Callable[[], object]]:
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
        return value, work.wait

    try:
        with (
            mock.patch.object(ranks, "uses_nccl", return_value=True),
            mock.patch.object(ranks, "_begin_maximum_on_gpu", maximum),
        ):
            yield Ranks(world_size=world_size, host_group=dist.new_group(backend="fake"))
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Records collectives, and counts all operators that torch dispatches."""

    def __init__(self, ranks: Ranks, *, text_counts: Sequence[int]) -> None:
        """`text_counts` has a rank's number of distinct texts; this rank's is the first."""
        super().__init__()
        self.num_dispatches = 0
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self._host_group = ranks.host_group.group_name
        self._text_counts = text_counts

    def figures(self) -> dict[str, object]:
        collectives = {
            name: {"calls": self.calls[name], "bytes": self.num_bytes[name]} for name in self.calls
        }
        return {"dispatches": self.num_dispatches, "collectives": collectives}

    def note(self, name: str, num_bytes: int) -> None:
        self.calls[name] += 1
        self.num_bytes[name] += num_bytes

    def note_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Stands in for DDP's own all-reduce, whose answer the fake group does not give."""
        self.note("device all-reduce of gradients", bucket.buffer().nbytes)
        answer: Future[Tensor] = Future()
        answer.set_result(bucket.buffer())
        return answer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":
            return result
        if function.namespace != "c10d":
            self.num_dispatches += 1
            return result
        name = function._schema.name.removeprefix("c10d::").strip("_")
        lists = [_tensors(argument) for argument in args[:2]]
        group = next(found for found in map(group_of, args) if found)
        place = "host" if group == self._host_group else "device"
        # the larger side: what a gather gives, what a reduce-scatter takes
        num_bytes = max(sum(tensor.nbytes for tensor in tensors) for tensors in lists)
        self.note(f"{place} {name} of {lists[0][0].dtype}".replace("torch.", ""), num_bytes)
        if name in ("allgather", "_allgather_base", "allgather_into_tensor_coalesced"):
            with torch.utils._python_dispatch._disable_current_modes():
                self._fill(lists[0], lists[1][0])
        value = lists[0][0]
        is_number = name == "allreduce" and value.dtype == torch.int64 and value.numel() == 1
        if is_number and int(value) == self._text_counts[0]:
            value.fill_(max(self._text_counts))
        return result

    def _fill(self, gathered: list[Tensor], mine: Tensor) -> None:
        parts = gathered
        if len(gathered) == 1:  # one tensor with the rows of all ranks
            parts = list(gathered[0].view(-1, *mine.shape))
        for part in parts:
            part.copy_(mine)


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def group_of(argument: object) -> str:
    """The name of the group that an argument holds, "" for other arguments."""
    try:
        return ProcessGroup.unbox(argument).group_name
    except (RuntimeError, TypeError):
        return ""
