"""How programs become ranks, and how they speak: shared by training and evaluation."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from unicl_fast.interruption import EXIT_INTERRUPTED

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.dist import Ranks

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_SECONDS_TO_END = 30.0


def start_ranks(module: str, *, nproc: int, argv: Sequence[str]) -> NoReturn:
    """Starts a program `nproc` times on this machine as ranks of one group, and ends as they do.

    Signals go on to all ranks. If a rank fails, the others are ended too; ranks do not outlive this
    process. (torchrun does the same, but its exit code says nothing of how its ranks ended.)

    Args:
        module: what to start, as for `python -m`.
        nproc: number of ranks.
        argv: the program's arguments; --nproc means nothing to a rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # without this every rank would start as many threads as the machine has cores
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc))}
    sys.stdout.flush()
    ranks: list[subprocess.Popen[bytes]] = []
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: _send(ranks, number))
    for rank in range(nproc):
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C reaches them once, through this process
                preexec_fn=functools.partial(_end_with, os.getpid()),
            )
        )
    sys.exit(_wait_for(ranks))


def _end_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent is gone, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first rank that did not end well; 0 if all did."""
    code = 0
    deadline = math.inf
    while running := [rank for rank in ranks if rank.poll() is None]:
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed and not code:
            code = failed[0]
            deadline = time.monotonic() + _SECONDS_TO_END
            if code != EXIT_INTERRUPTED:  # then all stop by themselves, at the same step
                _send(running, signal.SIGTERM)
        if time.monotonic() > deadline:
            _send(running, signal.SIGKILL)
        time.sleep(0.05)
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return code if code >= 0 else 128 - code


def stop(program: str, error: Exception, *, code: int) -> NoReturn:
    """Ends with the error's sentence; its traceback is there for who asks (UNICL_TRACEBACK=1)."""
    if os.environ.get("UNICL_TRACEBACK"):
        raise error
    print(f"{program}: {error}", file=sys.stderr)
    sys.exit(code)


def configure_logging(ranks: Ranks) -> None:
    """Rank 0 speaks; the others only when something is wrong."""
    logging.basicConfig(
        level=logging.INFO if ranks.is_main else logging.ERROR,
        format="%(levelname).1s %(name)s: %(message)s",
    )
    if not ranks.is_main:
        warnings.simplefilter("ignore")
