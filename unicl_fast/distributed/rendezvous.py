"""Where ranks find each other: torch's store, free of what an earlier attempt has left in it.

torchrun keeps one store for all its restarts, and torch (2.13, pytorch issue 135712) puts the same
keys into it each time. A rank that is quicker than its peers reads where they WERE, and calls an
address at which nobody answers: most restarts of two ranks that were watched ended so. The
count of restarts does not tell attempts apart, since agents on nodes whose ranks were well do not
count.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.02


def open_store(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """The store that the environment names, for this attempt alone; rank; number of ranks."""
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        session = agree_on_session(store, rank=rank, world_size=world_size, timeout=timeout)
        store = PrefixStore(f"unicl_fast/{session}", store)
    return store, rank, world_size


def agree_on_session(
    store: Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """A name that exactly the ranks that run now have in common.

    Every rank says hello with a number that nobody has had before. Rank 0 answers with the numbers
    it has heard, and a name; a rank believes an answer that holds its own number, and says so.

    Raises:
        RuntimeError: not all ranks came in time.
    """
    mine = secrets.token_hex(8)
    deadline = time.monotonic() + timeout.total_seconds()
    others = range(1, world_size)
    heard: dict[str, str] | None = None
    if rank:
        store.set(f"unicl_fast/hello/{rank}", mine)
    while time.monotonic() < deadline:
        if rank:
            answer = json.loads(_read(store, "unicl_fast/answer") or "{}")
            if answer.get("heard", {}).get(str(rank)) == mine:
                session: str = answer["session"]
                store.set(f"unicl_fast/believed/{rank}", session)
                return session
        else:
            hellos = {str(other): _read(store, f"unicl_fast/hello/{other}") for other in others}
            if hellos != heard:
                heard = hellos
                store.set("unicl_fast/answer", json.dumps({"session": mine, "heard": heard}))
            if all(_read(store, f"unicl_fast/believed/{other}") == mine for other in others):
                return mine
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(
        f"not all {world_size} ranks came within {timeout}: look at what the others say"
    )


def _read(store: Store, key: str) -> str:
    """What is there now, "" for nothing; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""
