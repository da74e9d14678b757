"""A rank that meets the others, and ends with 3 if other machines can reach one of them."""

import os
import sys
from pathlib import Path

import torch

from unicl_fast.distributed.ranks import gather_integers
from unicl_fast.distributed.rendezvous import process_group

_LISTENING, _ANY_STATE = "0A", "07"  # of TCP, of UDP sockets that are connected to nobody


def open_to_others() -> list[str]:
    """Addresses, as the kernel writes them, at which this process listens beyond loopback."""
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
    with process_group(torch.device("cpu"), timeout_seconds=240) as ranks:
        gather_integers(ranks.rank, ranks)
        if addresses := open_to_others():
            print(f"rank {ranks.rank} listens at", *addresses, file=sys.stderr)
        code = 3 * any(gather_integers(len(addresses), ranks))
    sys.exit(code)
