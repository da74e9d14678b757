"""The ranks of a run: how they find each other, and the few collectives that a step needs.

The convention for gradients: every rank holds the same global loss and differentiates it with
respect to ITS images and texts; parameter gradients are then summed over ranks. So a text's
gradient is the sum of what every rank's images say about it (reduce-scatter), while a sum over
ranks passes its gradient on unchanged.

Ranks meet by the variables of torchrun or SLURM, and torch's store. torchrun keeps one store for
all its restarts, and torch (2.13, pytorch issue 135712) puts the same keys into it each time. A
rank that is quicker than its peers reads where they WERE, and calls an address at which nobody
answers: most restarts of two ranks that were watched ended so. The number of restarts does not tell
attempts apart, since agents on nodes whose ranks were well do not count. So ranks agree on a name
for each attempt first.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import math
import os
import re
import resource
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unicl_fast.system.machine import STORE_SOCKET
from unicl_fast.system.progress import WaitingForRanks, mark

Json = bool | int | float | str | list[Any] | dict[str, Any] | None
"""Values that ranks exchange; without tuples, paths or arrays they arrive as they were sent."""
T = TypeVar("T", bound=Json)

# torch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux's request for an interface's address
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.5
_FILES_BESIDE_SOCKETS = 4096


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
        """Computes the size of a rank's local batch; raises ValueError if it would not be even."""
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
    return " or ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def gather_integers(value: int, ranks: Ranks) -> list[int]:
    """Gathers the value of every rank, on the host."""
    if ranks.world_size == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    with WaitingForRanks():
        dist.all_gather(gathered, mine, group=ranks.host_group)
    return [int(tensor) for tensor in gathered]


def sum_integers(values: Sequence[int], ranks: Ranks) -> list[int]:
    """Sums each of the values over ranks, on the host."""
    sums = torch.tensor(values, dtype=torch.int64)
    if ranks.world_size > 1:
        with WaitingForRanks():
            dist.all_reduce(sums, group=ranks.host_group)
    return [int(value) for value in sums]


def gather_to_rank_0(rows: Tensor, ranks: Ranks) -> list[Tensor]:
    """Gathers tensors of one shape on rank 0, on the host; other ranks get an empty list."""
    if ranks.world_size == 1:
        return [rows]
    gathered = [torch.empty_like(rows) for _ in range(ranks.world_size)] if ranks.is_main else []
    with WaitingForRanks():
        dist.gather(rows, gathered or None, dst=0, group=ranks.host_group)
    return gathered


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """Gathers an object of every rank, in rank order, on the host, as JSON: keep it small.

    torch's own way would unpickle, and so run, whatever comes over the network.
    """
    if ranks.world_size == 1:
        return [value]
    content = _to_bytes(value)
    sizes = gather_integers(len(content), ranks)
    mine = _pad_rows(content, max(sizes))
    gathered = [torch.empty_like(mine) for _ in sizes]
    with WaitingForRanks():
        dist.all_gather(gathered, mine, group=ranks.host_group)
    return [_from_bytes(rows[:size]) for rows, size in zip(gathered, sizes, strict=True)]


def from_rank_0(value: T, ranks: Ranks) -> T:
    """Returns rank 0's value on all ranks, by way of the host, as JSON."""
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


def _to_bytes(value: Json) -> UInt8[Tensor, " n"]:
    # ASCII, since the names of files may hold what UTF-8 cannot
    return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)


def _from_bytes(content: UInt8[Tensor, " n"]) -> Any:
    return json.loads(content.numpy().tobytes())


class PendingMaximum:
    """The maximum of an integer over ranks: asked for early, waited for late, on the host."""

    def __init__(self, value: int, ranks: Ranks) -> None:
        """Sends this rank's value; all ranks come here in the same order."""
        self._value = torch.tensor([value], dtype=torch.int64)
        self._work: dist.Work | None = None
        if ranks.world_size > 1:
            self._work = dist.all_reduce(
                self._value, op=dist.ReduceOp.MAX, group=ranks.host_group, async_op=True
            )

    def wait(self) -> int:
        if self._work is not None:
            with WaitingForRanks():
                self._work.wait()
        return int(self._value)


class RowsInFlight:
    """The rows of all ranks in rank order, on their way while other work is done.

    Backward mirrors forward: `receive` begins to send the gradients back, each summed over ranks,
    and `send` waits for them. What is computed between the two calls hides both ways.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.world_size = ranks.world_size
        self.own_gradient: Tensor | None = None
        self._work: dist.Work | None = None
        self._in_use: tuple[Tensor, ...] = ()

    def send(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """Begins to gather [world_size num_rows, ...], which only `receive` may read.

        A rank's rows are padded with zeros to `num_rows`, the same on all ranks.
        """
        if self.world_size == 1:
            return rows
        gathered: Tensor = _Send.apply(rows, num_rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def receive(self, gathered: Tensor) -> Tensor:
        """Waits for what `send` returned."""
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
    """Gathers the rows of all ranks, as many on each, in rank order.

    Differentiable for floating types: a rank gets back the sum over ranks of its rows' gradients.
    """
    in_flight = RowsInFlight(ranks)
    return in_flight.receive(in_flight.send(rows, num_rows=len(rows)))


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


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, in_flight: RowsInFlight) -> Tensor:
        ctx.num_own, ctx.in_flight = len(rows), in_flight
        gathered = rows.new_empty(in_flight.world_size * num_rows, *rows.shape[1:])
        in_flight.start(_all_gather, gathered, _pad_rows(rows, num_rows))
        return gathered

    @staticmethod
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


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the ranks that torchrun's variables name; a process alone has nothing to join.

    Within `timeout_seconds` the ranks must have met, and each collective must be done.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    _prepare_sockets(int(os.environ["WORLD_SIZE"]))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mark("meeting the other ranks", waits_for_ranks=True)
    store, rank, world_size = _open_store(timeout)
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        session = agree_on_session(store, rank=rank, world_size=world_size, timeout=timeout)
        store = PrefixStore(f"unicl_fast/{session}", store)
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        # NCCL connects at once, to a device that it need not guess; its last collectives are
        # written to a file when one of them outlasts the limit
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        options = {"backend": "nccl", "device_id": device}
    dist.init_process_group(
        **options, store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        yield Ranks(
            rank=rank,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            host_group=dist.new_group(backend="gloo", timeout=timeout),
        )
    finally:
        mark("parting from the other ranks", waits_for_ranks=True)
        dist.destroy_process_group()


def _prepare_sockets(world_size: int) -> None:
    """Makes room for the connections to other ranks, and chooses the interface that gloo uses.

    By itself gloo takes the interface of the host's own name, which often is the loopback one, and
    connects every rank with every other at once.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connects the ranks that talk
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * world_size + _FILES_BESIDE_SOCKETS
    if soft < needed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    if hard < needed:
        logger.warning(
            "%d ranks may need %d open files in a process, and the system allows %d: raise "
            "`ulimit -Hn`", world_size, needed, hard,
        )  # fmt: skip
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = address_towards_rank_0()
    if name := interface_with(address):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    elif world_size != int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        logger.warning(
            "no network interface has the address %s from which MASTER_ADDR=%s is reached: if "
            "ranks do not meet, name one in GLOO_SOCKET_IFNAME",
            address, os.environ.get("MASTER_ADDR"),
        )  # fmt: skip


def address_towards_rank_0() -> str:
    """Finds this machine's IPv4 address on the network of MASTER_ADDR; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", _LOOPBACK), 9))
        except OSError:
            return _LOOPBACK
        address: str = probe.getsockname()[0]
        return address


def interface_with(address: str) -> str | None:
    """Finds the network interface that has this IPv4 address: `eth0`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _open_store(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Opens the store that torchrun's variables name; returns the rank and world size too.

    torch's own way listens on all interfaces. Where ranks meet on the loopback interface, so does
    the store. torchrun's is its own, and already open.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, address = os.environ.get("RANK"), os.environ.get("MASTER_ADDR")
    if agents or rank != "0" or address != _LOOPBACK:
        store, number, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        return store, number, world_size
    world_size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    if inherited := os.environ.pop(STORE_SOCKET, ""):
        listening = socket.socket(fileno=int(inherited))
    else:
        listening = socket.create_server((_LOOPBACK, port), backlog=max(128, world_size))
    store = TCPStore(
        _LOOPBACK,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=listening.detach(),  # the store closes it
    )
    return store, 0, world_size


def agree_on_session(
    store: Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """Agrees on a name that exactly the ranks that run now have in common.

    Every rank writes a nonce. Rank 0 replies to each with the nonce it has read, and a name; a rank
    accepts a reply that contains its nonce, then acknowledges it. Raises RuntimeError if not all
    came in time.
    """
    nonce = secrets.token_hex(8)
    deadline = time.monotonic() + timeout.total_seconds()
    waiting = dict.fromkeys(range(1, world_size), "") if rank == 0 else {}
    pause = _FIRST_PAUSE_SECONDS
    if rank:
        store.set(f"unicl_fast/hello/{rank}", nonce)
    while time.monotonic() < deadline:
        if rank:
            heard, _, session = _read(store, f"unicl_fast/reply/{rank}").partition(" ")
            if heard == nonce:
                store.set(f"unicl_fast/accepted/{rank}", session)
                return session
        else:
            for other, answered in list(waiting.items()):
                hello = _read(store, f"unicl_fast/hello/{other}")
                if hello != answered:
                    waiting[other] = hello
                    store.set(f"unicl_fast/reply/{other}", f"{hello} {nonce}")
                elif hello and _read(store, f"unicl_fast/accepted/{other}") == nonce:
                    del waiting[other]
            if not waiting:
                return nonce
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)  # a thousand ranks ask one store
    raise RuntimeError(f"not all {world_size} ranks came within {timeout}: see what the others say")


def _read(store: Store, key: str) -> str:
    """Reads what is there now, "" for nothing; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def adopt_slurm_ranks() -> None:
    """Under `srun` with several tasks, but not torchrun, sets its variables from SLURM's.

    Raises:
        ValueError: a variable of SLURM is not written as SLURM documents it.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or tasks == 1:
        return
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(
            tasks_of_node(
                os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ.get("SLURM_NODEID", "0"))
            )
        ),
    }
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    # The same on all ranks, different for jobs that share a node, and below the ports that Linux
    # gives to outgoing connections.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 12000))


def first_host(node_list: str) -> str:
    """Returns the first name of a SLURM node list: `r1n07-ib` of `r[1-2]n[07-12,20]-ib,gpu1`."""
    found = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", node_list)
    if found is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST={node_list} is no node list such as node[1-4],gpu1: set "
            "MASTER_ADDR to the address of the first node"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Returns how many tasks a node has: 4 for the nodes 1 and 2 of SLURM's `2,4(x2)`."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in tasks_per_node.split(",")]
    for part in found:
        if part is None:
            break
        if node < (repeats := int(part[2] or 1)):
            return int(part[1])
        node -= repeats
    raise ValueError(
        f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node} has no number of tasks such as 2,4(x2) for "
        f"node {os.environ.get('SLURM_NODEID', '0')}: start the ranks with torchrun"
    )
