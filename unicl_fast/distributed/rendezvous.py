"""How ranks find each other: the variables of torchrun or SLURM, and torch's store.

torchrun keeps one store for all its restarts, and torch (2.13, pytorch issue 135712) puts the same
keys into it each time. A rank that is quicker than its peers reads where they WERE, and calls an
address at which nobody answers: most restarts of two ranks that were watched ended so. The number
of restarts does not tell attempts apart, since agents on nodes whose ranks were well do not count.
So ranks agree on a name for each attempt first.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system.progress import mark

_POLL_SECONDS = 0.02


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the ranks that torchrun's variables name; a process alone has nothing to join.

    Args:
        device: decides between NCCL and gloo.
        timeout_seconds: how long a collective, or the meeting itself, waits for another rank.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mark("meeting the other ranks", waits_for_ranks=True)
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        session = agree_on_session(store, rank=rank, world_size=world_size, timeout=timeout)
        store = PrefixStore(f"unicl_fast/{session}", store)
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
        mark("parting from the other ranks", waits_for_ranks=True)
        dist.destroy_process_group()


def agree_on_session(
    store: Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """Agrees on a name that exactly the ranks that run now have in common.

    Every rank writes a nonce. Rank 0 replies with the nonces it has read, and a name; a rank
    accepts a reply that contains its nonce, then acknowledges it.

    Raises:
        RuntimeError: not all ranks came in time.
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
    """Under `srun` with several tasks, sets torchrun's variables from SLURM's.

    Does nothing under torchrun, or where srun started a single task.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or tasks == 1:
        return
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", os.environ["SLURM_STEP_TASKS_PER_NODE"])[0],
    }
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    # the same on all ranks, and different for jobs that share a node
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def first_host(node_list: str) -> str:
    """Returns the first name of a SLURM node list: `node007` of `node[007-012,020],gpu1`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    assert found is not None, node_list
    return found[1] + (found[2] or "")
