"""A rank that meets the others, and ends with 3 where it can be reached from other machines."""

import os
import sys
from pathlib import Path

import torch

from unicl_fast.distributed.ranks import gather_integers
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.distributed.watchdog import Heartbeats

_LISTENING, _ANY_STATE = "0A", "07"  # of TCP, of UDP sockets that are connected to nobody


def open_to_others() -> list[str]:
    """The addresses, as the kernel writes them, that this process listens at beyond loopback."""
    own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            is_open = state == (_LISTENING if kind.startswith("tcp") else _ANY_STATE)
            is_loopback = local.split(":")[0].endswith("7F")
            if is_open and not is_loopback and f"socket:[{rest[5]}]" in own:
                found.append(f"{kind} {local}")
    return found


if __name__ == "__main__":
    with process_group(torch.device("cpu"), timeout_seconds=60) as ranks:
        heartbeats = Heartbeats(ranks)
        gather_integers(ranks.rank, ranks)
        if addresses := open_to_others():
            print(f"rank {ranks.rank} listens at", *addresses, file=sys.stderr)
        code = 3 * any(gather_integers(len(addresses), ranks))
        heartbeats.close()
    sys.exit(code)
