"""How the ranks of a run find each other: by the variables of torchrun or SLURM, and torch's store.

torchrun's restarts share one store and its keys (pytorch issue 135712), so a quick rank would read
its peers' old addresses. Ranks first agree on a name for each attempt, since restart counts differ
between nodes.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import logging
import os
import re
import resource
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unicl_fast.distributed.launch import SharedRefusal
from unicl_fast.distributed.ranks import Ranks, gather_objects
from unicl_fast.system.machine import STORE_SOCKET, cores_of_rank, describe_cores, quota_of_cores
from unicl_fast.system.phases import START_PATIENCE, mark

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_ELSEWHERE = "192.0.2.1"  # reserved for documentation: the default route leads there
_SIOCGIFADDR = 0x8915  # Linux's request for an interface's address
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.5
FILES_BESIDE_SOCKETS = 4096
_SECONDS_TO_LET_GO = 0.2


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the ranks that torchrun's variables name; a single process has nothing to join.

    The ranks must meet, and each collective must end, within `timeout_seconds`. After an error in
    the context this rank leaves without waiting for others, which can be waiting for it.

    Raises ValueError: another rank has the same GPU.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield _with_cores(Ranks())
        return
    _prepare_sockets(int(os.environ["WORLD_SIZE"]))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mark("meeting the other ranks", patience=START_PATIENCE, waits_for_ranks=True)
    store, rank, world_size = _open_store(timeout)
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        session = agree_on_session(store, rank=rank, world_size=world_size, timeout=timeout)
        store = PrefixStore(f"unicl_fast/{session}", store)
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        claim_gpu(store, device)
        # NCCL connects at once, to a known device; its flight recorder writes the last collectives
        # to a file when one of them exceeds the limit
        if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        options = {"backend": "nccl", "device_id": device}
    options |= {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(**options)
    try:
        ranks = Ranks(
            rank=rank,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            host_group=dist.new_group(backend="gloo", timeout=timeout),
        )
        yield _with_cores(ranks)
    except BaseException:
        _abort_groups()
        raise
    mark("parting from the other ranks", waits_for_ranks=True)
    if keeps := torch.__version__ < "2.13":  # the oldest that is known to let go of Python's lock
        _keep_groups()
    dist.destroy_process_group()
    time.sleep(keeps * _SECONDS_TO_LET_GO)


def _abort_groups() -> None:
    """Leaves all groups at once; `destroy_process_group` waits for running collectives."""
    mark("leaving after an error")
    with contextlib.suppress(Exception):  # only the first error is shown
        _keep_groups()
        distributed_c10d._abort_process_group()
        # gloo's threads free the tensors of finished work; after Python's end that would abort us
        time.sleep(_SECONDS_TO_LET_GO)


def _keep_groups() -> None:
    """Spares groups their destructor, which waits for gloo's threads; those may wait for Python."""
    for group in list(distributed_c10d._world.pg_map):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def claim_gpu(store: Store, device: torch.device) -> None:
    """Raises ValueError if another rank of this store has claimed the same GPU."""
    gpu = torch.cuda.get_device_properties(device).uuid
    claims = store.add(f"unicl_fast/gpu/{gpu}", 1)
    if claims > 1:
        visible = torch.cuda.device_count()
        refusal = ValueError if claims == 2 else SharedRefusal  # only one rank reports it
        raise refusal(
            f"{claims} ranks have the same GPU ({device}, {gpu}; torch sees {visible} here): start "
            "as many ranks on a machine as it has GPUs, or let each see another one "
            "(CUDA_VISIBLE_DEVICES, or srun --gpus-per-task=1)"
        )


def _with_cores(ranks: Ranks) -> Ranks:
    """Counts this rank's cores, given the cores that each rank can use."""
    cores: list[Any] = gather_objects(list(describe_cores()), ranks)
    own = cores_of_rank(ranks.rank, cores, quota=quota_of_cores())
    return dataclasses.replace(ranks, cores=own)


def _prepare_sockets(world_size: int) -> None:
    """Makes room for connections, and chooses gloo's interface: gloo often uses loopback."""
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connects only ranks that talk
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * world_size + FILES_BESIDE_SOCKETS
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
    has_other_machines = world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    address = address_towards(os.environ.get("MASTER_ADDR", _LOOPBACK))
    if has_other_machines and address.startswith("127."):
        # MASTER_ADDR is another name of this machine, an IPv6 address, or not known here
        address = address_towards(_ELSEWHERE)
    name = interface_with(address)
    if name is not None and not (has_other_machines and address.startswith("127.")):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    elif has_other_machines:
        logger.warning(
            "no network interface is known that leads to MASTER_ADDR=%s: if ranks do not meet, "
            "name one in GLOO_SOCKET_IFNAME", os.environ.get("MASTER_ADDR"),
        )  # fmt: skip


def address_towards(host: str) -> str:
    """Returns this machine's IPv4 address on the network that leads to a host; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return _LOOPBACK
        address: str = probe.getsockname()[0]
        return address


def interface_with(address: str) -> str | None:
    """Returns the network interface with this IPv4 address (`eth0`); None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _open_store(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Opens the store that torchrun's variables name; also returns rank and world size.

    If the ranks meet on loopback, it listens there; torch's own would on all interfaces.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, address = os.environ.get("RANK"), os.environ.get("MASTER_ADDR")
    if agents or rank != "0" or address != _LOOPBACK:
        return next(iter(rendezvous("env://", timeout=timeout)))  # type: ignore[no-any-return]
    world_size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    if inherited := os.environ.pop(STORE_SOCKET, ""):
        listening = socket.socket(fileno=int(inherited))
    else:
        listening = socket.create_server((_LOOPBACK, port), backlog=max(128, world_size))
    # libuv accepts a listening socket since torch 2.8 (pytorch 150215); the store closes it
    how: dict[str, Any] = {"timeout": timeout, "use_libuv": torch.__version__ >= "2.8"}
    how |= {"is_master": True, "master_listen_fd": listening.detach()}
    return TCPStore(_LOOPBACK, port, world_size, **how), 0, world_size


def agree_on_session(
    store: Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """Agrees on a name for exactly the ranks that run now; RuntimeError if not all come in time.

    Every rank writes a nonce. Rank 0 replies to each with that nonce and the name; a rank accepts
    a reply that contains its nonce, and acknowledges it.
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
    """Returns a key's value, "" if there is none; `get` alone would wait for one."""
    return store.get(key).decode() if store.check([key]) else ""


def adopt_slurm_ranks() -> None:
    """Sets torchrun's variables from SLURM's, under `srun` with several tasks and no torchrun.

    Raises ValueError if one of SLURM's variables cannot be parsed.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or tasks == 1:
        return
    node = int(os.environ.get("SLURM_NODEID", "0"))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_of_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], node)),
    }
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    # the same on all ranks, different for jobs that share a node, and below the ports that Linux
    # uses for outgoing connections
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
    nodes = 0
    for part in tasks_per_node.split(","):
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) is None:
            break
        nodes += int(found[2] or 1)
        if node < nodes:
            return int(found[1])
    raise ValueError(
        f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node} has no number of tasks such as 2,4(x2) for "
        f"node {node}: start the ranks with torchrun"
    )
