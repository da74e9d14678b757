"""The ranks of a run, and the few collectives that a step needs.

Every rank differentiates the same global loss with respect to its own images and texts; parameter
gradients are then summed over ranks. So a text's gradient is a reduce-scatter over ranks.
"""

import contextlib
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor

from unicl_fast.system.gradients import first_only
from unicl_fast.system.phases import WaitingForRanks, mark_progress

Json = bool | int | float | str | list[Any] | dict[str, Any] | None
"""Values that ranks exchange; without tuples, paths or arrays they arrive as they were sent."""
T = TypeVar("T", bound=Json)

# torch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_BEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers; a single process is rank 0 of 1 and has no group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host_group: Any = None
    """A gloo group for values on the host, so that exchanging them waits for no device."""
    cores: int = 0
    """This rank's share of its machine's cores; 0 if unknown."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_batch_size(self, global_batch_size: int) -> int:
        """Returns the size of a rank's local batch; raises ValueError if it would be uneven."""
        size, left = divmod(global_batch_size, self.world_size)
        if not left:
            return size
        near = [each * self.world_size for each in (size, size + 1) if each]
        divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        ranks = sorted(divisors, key=lambda n: abs(math.log(n / self.world_size)))[:4]
        raise ValueError(  # ranks first: a resumed run cannot change its batch
            f"{self.world_size} ranks cannot share a global batch of {global_batch_size} evenly: "
            f"start {_either(sorted(ranks))} {'ranks' if max(ranks) > 1 else 'rank'}, or set "
            f"run.global_batch_size to {_either(near)} in a new run"
        )


def _either(numbers: list[int]) -> str:
    return " or ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def gather_integers(value: int, ranks: Ranks) -> list[int]:
    """Gathers the value of every rank, on the host."""
    if ranks.world_size == 1:
        return [value]
    return list(map(int, _gather_on_host(torch.tensor([value], dtype=torch.int64), ranks)))


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """Gathers a small object of every rank, in rank order, on the host, as JSON.

    (torch's own function unpickles, and so executes, anything that comes over the network.)
    """
    if ranks.world_size == 1:
        return [value]
    content = _to_bytes(value)
    sizes = gather_integers(len(content), ranks)
    gathered = _gather_on_host(_pad_rows(content, max(sizes)), ranks)
    return [_from_bytes(rows[:size]) for rows, size in zip(gathered, sizes, strict=True)]


def _gather_on_host(mine: Tensor, ranks: Ranks) -> list[Tensor]:
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    with WaitingForRanks():
        dist.all_gather(gathered, mine, group=ranks.host_group)
    return gathered


def from_rank_0(value: T, ranks: Ranks) -> T:
    """Returns rank 0's value on all ranks, sent by the host as JSON."""
    if ranks.world_size == 1:
        return value
    content = _to_bytes(value if ranks.is_main else None)
    size = torch.tensor([len(content)])
    with WaitingForRanks():
        dist.broadcast(size, src=0, group=ranks.host_group)
        content = content if ranks.is_main else content.new_empty(int(size))
        dist.broadcast(content, src=0, group=ranks.host_group)
    found: T = _from_bytes(content)
    return found


def tensors_from_rank_0(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Returns rank 0's named tensors, all on the host, on all ranks, bit for bit."""
    if ranks.world_size == 1:
        return dict(tensors)
    found = {}
    for name, dtype, shape in from_rank_0(_kinds_of(tensors), ranks):
        mine = torch.empty(shape, dtype=getattr(torch, dtype))
        found[name] = tensors[name].contiguous() if ranks.is_main else mine
        _send_bytes(dist.broadcast, found[name], 0, ranks)
    return found


def tensors_to_rank_0(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Returns the named tensors of all ranks on rank 0, and nothing on the others.

    Rank 0's tensors are returned as they are, others on the host. If a name is repeated, the
    tensor of the first rank counts.
    """
    every = gather_objects(_kinds_of(tensors), ranks)
    if not ranks.is_main:
        for one in tensors.values():
            _send_bytes(dist.send, one.cpu().contiguous(), 0, ranks)
        return {}
    found = dict(tensors)
    for rank, its_kinds in enumerate(every[1:], start=1):
        for name, dtype, shape in its_kinds:
            one = torch.empty(shape, dtype=getattr(torch, dtype))
            _send_bytes(dist.recv, one, rank, ranks)
            found.setdefault(name, one)
    return found


def _send_bytes(exchange: Callable[..., Any], tensor: Tensor, rank: int, ranks: Ranks) -> None:
    """Broadcasts, sends or receives a host tensor as bytes: gloo does not know all types."""
    if tensor.numel():
        with WaitingForRanks():
            exchange(tensor.reshape(-1).view(torch.uint8), rank, group=ranks.host_group)


def _kinds_of(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Returns the name, type and shape of each tensor."""
    return [
        (name, str(one.dtype).removeprefix("torch."), list(one.shape))
        for name, one in tensors.items()
    ]


@contextlib.contextmanager
def rank_0_alone(ranks: Ranks) -> Iterator[None]:
    """For work that only rank 0 does, however long: the others wait at the end of the context.

    A thread of rank 0 sends heartbeats, so no collective reaches the group's time limit. If rank 0
    ends, the others get a RuntimeError.
    """
    if ranks.world_size == 1:
        yield
        return
    if not ranks.is_main:
        yield
        with WaitingForRanks():
            while _rank_0_works(ranks):
                mark_progress()  # rank 0's own watchdog ends it if it hangs
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            _rank_0_works(ranks)

    with ThreadPoolExecutor(1, thread_name_prefix="unicl-rank-0") as pool:
        beating = pool.submit(beat)
        try:
            yield
        finally:
            done.set()
            beating.result()
            _rank_0_works(ranks, answer=False)


def _rank_0_works(ranks: Ranks, *, answer: bool = True) -> bool:
    """Returns rank 0's `answer` on all ranks."""
    works = torch.tensor([int(answer)])
    dist.broadcast(works, src=0, group=ranks.host_group)
    return bool(works)


def _to_bytes(value: Json) -> UInt8[Tensor, " n"]:
    # ASCII, since file names can contain bytes that are not UTF-8
    return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)


def _from_bytes(content: UInt8[Tensor, " n"]) -> Any:
    return json.loads(content.numpy().tobytes())


class PendingMaximum:
    """The maximum of an integer over ranks, requested early and waited for late.

    Ranks on GPUs use NCCL, whose trees gather 1,024 ranks' answers in 0.2 ms; gloo's ring needs
    100 ms. NCCL's exchanges follow each other, so request it a step ahead.
    """

    def __init__(self, value: int, ranks: Ranks) -> None:
        """Sends this rank's value; all ranks must call this in the same order."""
        self._maximum: int | None = value if ranks.world_size == 1 else None
        if self._maximum is None:
            begin = _begin_maximum_on_gpu if uses_nccl() else _begin_maximum_on_host
            self._value, self._wait = begin(torch.tensor([value]), ranks)

    def wait(self) -> int:
        if self._maximum is None:
            with WaitingForRanks():
                self._wait()
            self._maximum = int(self._value)
        return self._maximum


def uses_nccl() -> bool:
    """Returns whether ranks exchange tensors between GPUs."""
    return dist.is_initialized() and dist.get_backend() == "nccl"


def _begin_maximum_on_host(value: Tensor, ranks: Ranks) -> tuple[Tensor, Callable[[], Any]]:
    """Returns the tensor that will hold the maximum over ranks, and a function that waits."""
    group = ranks.host_group
    return value, dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group, async_op=True).wait


@functools.cache
def _stream_of_numbers() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _begin_maximum_on_gpu(value: Tensor, ranks: Ranks) -> tuple[Tensor, Callable[[], Any]]:
    """The same, through the GPU and back to the host."""
    value = value.pin_memory()
    # in a separate stream: the exchange does not wait for the step's kernels, nor they for it
    with torch.cuda.stream(_stream_of_numbers()):
        on_gpu = value.to("cuda", non_blocking=True)
        work = dist.all_reduce(on_gpu, op=dist.ReduceOp.MAX, async_op=True)
        work.wait()  # makes the stream wait, not the host
        value.copy_(on_gpu, non_blocking=True)
        return value, torch.cuda.current_stream().record_event().synchronize


class RowsInFlight:
    """The rows of all ranks in rank order, gathered while other work is done.

    Backward mirrors forward: `receive` starts to reduce-scatter the gradients, `send` waits.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.world_size = ranks.world_size
        self.own_gradient: Tensor | None = None
        self._work: dist.Work | None = None
        self._in_use: tuple[Tensor, ...] = ()

    def send(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """Starts to gather [world_size num_rows, ...], which only `receive` can read.

        Each rank's rows are padded with zeros to `num_rows`, the same on all ranks.
        """
        if self.world_size == 1:
            return rows
        gathered: Tensor = _Send.apply(rows, num_rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def receive(self, gathered: Tensor) -> Tensor:
        if self.world_size == 1:
            return gathered
        received: Tensor = _Receive.apply(gathered, self)  # type: ignore[no-untyped-call]
        return received

    def start(self, collective: Callable[..., Any], output: Tensor, rows: Tensor) -> None:
        self._work = collective(output, rows, async_op=True)
        self._in_use = output, rows  # until the work is done

    def wait(self) -> None:
        assert self._work is not None
        with WaitingForRanks():
            self._work.wait()
        self._work, self._in_use = None, ()


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Gathers rows, equally many on each rank, in rank order.

    Differentiable for floating types: a rank gets the sum over ranks of its rows' gradients.
    """
    in_flight = RowsInFlight(ranks)
    return in_flight.receive(in_flight.send(rows, num_rows=len(rows)))


def sum_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Sums over ranks; the gradient is the same on all ranks and passes unchanged."""
    if ranks.world_size == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def max_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns the element-wise maximum over ranks, without gradient."""
    if ranks.world_size == 1:
        return x
    x = x.clone()
    with WaitingForRanks():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, in_flight: RowsInFlight) -> Tensor:
        ctx.num_own, ctx.in_flight = len(rows), in_flight
        gathered = rows.new_empty(in_flight.world_size * num_rows, *rows.shape[1:])
        in_flight.start(_all_gather, gathered, _pad_rows(rows, num_rows))
        return gathered

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.in_flight.wait()
        return ctx.in_flight.own_gradient[: ctx.num_own], None, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathered: Tensor, in_flight: RowsInFlight) -> Tensor:
        ctx.in_flight = in_flight
        in_flight.wait()
        return gathered.view_as(gathered)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Float[Tensor, "u d"]) -> tuple[Tensor, None]:
        in_flight = ctx.in_flight
        num_rows = len(grad) // in_flight.world_size
        in_flight.own_gradient = grad.new_empty(num_rows, *grad.shape[1:])
        in_flight.start(_reduce_scatter, in_flight.own_gradient, grad.contiguous())
        return grad, None


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
