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
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from unicl_fast import ending_at_once
from unicl_fast.ending_at_once import AT_NO_RISK
from unicl_fast.exit_codes import EXIT_FAULT, EXIT_HUNG, EXIT_INTERRUPTED

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.dist import Ranks

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
# How long the others may take to end by themselves when one has failed, or was asked to stop,
_SECONDS_TO_FOLLOW = 2.0
_SECONDS_TO_SAVE = 10.0
# and when they are told to. What waits for a rank that hangs has only to say so.
_SECONDS_TO_END = 30.0
_SECONDS_TO_SAY_SO = 10.0
_LIBC = ctypes.CDLL(None)


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
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))}
    sys.stdout.flush()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches them once, through this process
            preexec_fn=functools.partial(_begin_rank, os.getpid()),
        )
        for rank in range(nproc)
    ]
    sys.exit(_Ranks(started).wait())


def _begin_rank(parent: int) -> None:
    for number in _FORWARDED:  # until the rank handles them itself, they end it
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    _end_with(parent)


def end_with_torchrun() -> None:
    """Under torchrun, ends this rank when torchrun is gone, as those of `start_ranks` do."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())


def _end_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent is gone, however that happens."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class _Ranks:
    """The started ranks, and how long those that should have ended are waited for."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._deadline = math.inf
        self._num_interrupts = 0
        self._forwarded: set[int] = set()
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        ending_at_once.forbid()  # the ranks decide; not before their signals are passed on

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._forwarded.add(number)
        self._send(number)
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:  # a rank in the middle of a collective does not hear it
            self._deadline = time.monotonic() + 5

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> int:
        """The exit code of the rank that brought about the end; 0 if all went well."""
        code, follow_until = 0, math.inf
        while [rank for rank in self._ranks if rank.poll() is None]:  # asks all of them
            now = time.monotonic()
            if self._deadline == math.inf:  # what comes later is our own doing
                code = self._telling_code()
                if code and follow_until == math.inf:
                    # asked to stop, all end at the same step; and one may be seen before its cause
                    interrupted = code == EXIT_INTERRUPTED
                    follow_until = now + (_SECONDS_TO_SAVE if interrupted else _SECONDS_TO_FOLLOW)
                if now >= follow_until:
                    self._send(signal.SIGTERM)
                    hung = code == EXIT_HUNG
                    self._deadline = now + (_SECONDS_TO_SAY_SO if hung else _SECONDS_TO_END)
            if now > self._deadline:
                self._send(signal.SIGKILL)  # stopped ones end by it too
            time.sleep(0.05)
        code = code if self._deadline < math.inf and code else self._telling_code()
        killed_by = -self._ranks[0].returncode
        if killed_by in self._forwarded:  # it would have said so
            name = signal.Signals(killed_by).name
            print(f"stopped by {name}; {AT_NO_RISK}", file=sys.stderr)
        return code

    def _telling_code(self) -> int:
        """Of the ranks that have ended by now, as a shell would tell it; 0 if all went well."""
        codes = [self._code_of(rank) for rank in self._ranks if rank.returncode]
        # one that ended at once may have torn another out of a collective
        if self._forwarded and EXIT_INTERRUPTED in codes:
            return EXIT_INTERRUPTED
        # so may one that crashed or hung: the other has lost its peer, which is a fault
        return next((code for code in codes if code != EXIT_FAULT), codes[0] if codes else 0)

    def _code_of(self, rank: subprocess.Popen[bytes]) -> int:
        if -rank.returncode in self._forwarded:  # it had not begun to listen
            return EXIT_INTERRUPTED
        code: int = rank.returncode
        return code if code > 0 else 128 - code


def explain(error: Exception) -> Exception:
    """What torch says of a collective whose other side is gone, in words."""
    if "by peer" not in str(error):  # connection closed, or reset
        return error
    return RuntimeError(
        f"another rank has ended, and its own message says why; this one cannot go on ({error})"
    )


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
