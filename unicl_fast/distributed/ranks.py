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
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unicl_fast.system.progress import START_PATIENCE, WaitingForRanks, mark

Json = bool | int | float | str | list[Any] | dict[str, Any] | None
"""Values that ranks exchange; without tuples, paths or arrays they arrive as they were sent."""
T = TypeVar("T", bound=Json)

_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.02
_BEAT_SECONDS = 0.5


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


@contextlib.contextmanager
def rank_0_alone(ranks: Ranks) -> Iterator[None]:
    """Around what rank 0 does alone, however long: the others wait at the end of the block.

    A thread of rank 0 tells them every moment that it still works, so no single collective comes
    near the group's time limit. If rank 0 ends, so does their waiting, in a RuntimeError.
    """
    if ranks.world_size == 1:
        yield
        return
    if not ranks.is_main:
        yield
        with WaitingForRanks():
            while _rank_0_works(ranks):
                pass
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
    # ASCII, since the names of files may hold what UTF-8 cannot
    return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)


def _from_bytes(content: UInt8[Tensor, " n"]) -> Any:
    return json.loads(content.numpy().tobytes())


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Gathers the rows [sizes[rank], ...] of all ranks in rank order.

    Differentiable for floating types: a rank gets back the sum over ranks of its rows' gradients.
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


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the ranks that torchrun's variables name; a process alone has nothing to join.

    Within `timeout_seconds` the ranks must have met, and each collective must be done.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mark("meeting the other ranks", patience=START_PATIENCE, waits_for_ranks=True)
    store, rank, world_size = _open_store(timeout)
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        session = agree_on_session(store, rank=rank, world_size=world_size, timeout=timeout)
        store = PrefixStore(f"unicl_fast/{session}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
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

    Every rank writes a nonce. Rank 0 replies with the nonces it has read, and a name; a rank
    accepts a reply that contains its nonce, then acknowledges it. Raises RuntimeError if not all
    came in time.
    """
    nonce = secrets.token_hex(8)
    deadline = time.monotonic() + timeout.total_seconds()
    others = range(1, world_size)
    heard: dict[str, str] | None = None
    if rank:
        store.set(f"unicl_fast/hello/{rank}", nonce)
    while time.monotonic() < deadline:
        if rank:
            reply = json.loads(_read(store, "unicl_fast/reply") or "{}")
            if reply.get("heard", {}).get(str(rank)) == nonce:
                session: str = reply["session"]
                store.set(f"unicl_fast/accepted/{rank}", session)
                return session
        else:
            hellos = {str(other): _read(store, f"unicl_fast/hello/{other}") for other in others}
            if hellos != heard:
                heard = hellos
                store.set("unicl_fast/reply", json.dumps({"session": nonce, "heard": heard}))
            if all(_read(store, f"unicl_fast/accepted/{other}") == nonce for other in others):
                return nonce
        time.sleep(_POLL_SECONDS)
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
    # the same on all ranks, and different for jobs that share a node
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


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
