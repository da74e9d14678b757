"""How a program becomes ranks of one group on this machine, and how ranks report errors.

torch's elastic launcher was tried (torch 2.13; torchrun ends with 1 for every code, its Python API
says each rank's). It does not fit: it starts ranks again after 2 (wrong input) and 75 (stopped,
saved) as after a crash; after a signal to the launcher the ranks' codes are lost; SIGUSR1 or
SIGKILL to the launcher leaves the ranks running; and it ends the others at the first code it sees,
be it that of a rank that only lost its peer.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from unicl_fast.distributed.signals import (
    AT_NO_RISK,
    EXIT_FAULT,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    defer_signals,
    handle_stop_signals,
)
from unicl_fast.system.machine import LAUNCHED_BY_US, usable_cores

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.distributed.ranks import Ranks

_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun's own, so that ranks have one rule
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
# How long the others may take to end by themselves when one has failed, or was asked to stop,
_SECONDS_TO_FOLLOW = 2.0
_SECONDS_TO_SAVE = 10.0
# and when they are told to. One that waits for a hung rank has only its message to write.
_SECONDS_TO_END = 30.0
_SECONDS_TO_REPORT = 10.0


def start_ranks(module: str, *, nproc: int, argv: Sequence[str], max_restarts: int = 0) -> NoReturn:
    """Starts a program `nproc` times on this machine as ranks of one group, and ends as they do.

    Signals are passed on to all ranks. If a rank fails, the others are ended too; ranks do not
    outlive this process.

    Args:
        module: module to start, as for `python -m`.
        nproc: number of ranks.
        argv: the program's arguments; --nproc means nothing to a rank.
        max_restarts: how often all ranks are started again after one has died; never after wrong
            input or a signal that asked for an end. They see `is_restarted`.
    """
    launcher = _Launcher()
    for attempt in range(max_restarts + 1):
        launcher.start(module, nproc=nproc, argv=argv, attempt=attempt)
        rank, code = launcher.wait()
        if code in (0, EXIT_WRONG_INPUT, EXIT_INTERRUPTED) or launcher.asked_to_stop:
            break
        ended = f"RANK {rank} ENDED WITH CODE {code}"
        if code < 0:
            ended = f"RANK {rank} WAS KILLED BY {signal.Signals(-code).name}"
        if attempt < max_restarts:
            _say(f"{ended}: starting all again, restart {attempt + 1} of {max_restarts}")
        elif max_restarts:
            _say(f"{ended}, and all {max_restarts} restarts are used up")
    sys.exit(code if code >= 0 else 128 - code)  # as a shell has it


def is_restarted() -> bool:
    """Returns whether this rank was started again after a failure, by us or by torchrun."""
    return int(os.environ.get(_RESTART_COUNT, "0")) > 0


def is_own_rank() -> bool:
    """Returns whether `start_ranks` has started this process."""
    return LAUNCHED_BY_US in os.environ


def _say(text: str) -> None:
    print(f"unicl_fast: {text}", file=sys.stderr, flush=True)


def _begin_rank(parent: int) -> None:
    handle_stop_signals(signal.SIG_DFL)  # until the rank handles them itself, they end it
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


class _Launcher:
    """The started ranks, and how long the launcher waits for those that should have ended."""

    def __init__(self) -> None:
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._deadline = math.inf
        self._num_interrupts = 0
        self._forwarded: set[int] = set()
        handle_stop_signals(self._forward)
        defer_signals(True)  # the ranks decide; not before their signals are passed on

    @property
    def asked_to_stop(self) -> bool:
        return bool(self._forwarded)

    def start(self, module: str, *, nproc: int, argv: Sequence[str], attempt: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            _RESTART_COUNT: str(attempt),
            LAUNCHED_BY_US: "1",
        }
        # without this every rank would start as many threads as the machine has cores
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // nproc))}
        sys.stdout.flush()
        self._deadline = math.inf
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C reaches them once, through this process
                preexec_fn=functools.partial(_begin_rank, os.getpid()),
            )
            for rank in range(nproc)
        ]
        if self.asked_to_stop:  # while they were being started
            self._send(signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._forwarded.add(number)
        self._send(number)
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:  # a rank in the middle of a collective does not notice it
            self._deadline = time.monotonic() + 5

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> tuple[int, int]:
        """Waits for all ranks; after the first that fails the others are ended.

        Returns:
            The rank that explains the end, and its code as subprocess has it: minus the signal
            that killed it.
        """
        cause, follow_until = None, math.inf
        while [rank for rank in self._ranks if rank.poll() is None]:  # asks all of them
            now = time.monotonic()
            if self._deadline == math.inf:  # later failures are the launcher's own doing
                cause = self._root_cause_rank()
                code = 0 if cause is None else self._code_of(cause)
                if code and follow_until == math.inf:
                    # asked to stop, all end at the same step; and one may be seen before its cause
                    interrupted = code == EXIT_INTERRUPTED
                    follow_until = now + (_SECONDS_TO_SAVE if interrupted else _SECONDS_TO_FOLLOW)
                if now >= follow_until:
                    self._send(signal.SIGTERM)
                    hung = code == EXIT_HUNG
                    self._deadline = now + (_SECONDS_TO_REPORT if hung else _SECONDS_TO_END)
            if now > self._deadline:
                self._send(signal.SIGKILL)  # stopped ones end by it too
            time.sleep(0.05)
        killed_by = -self._ranks[0].returncode
        if killed_by in self._forwarded:  # it would have said so itself
            _say(f"stopped by {signal.Signals(killed_by).name}; {AT_NO_RISK}")
        if cause is None or self._deadline == math.inf:
            cause = self._root_cause_rank()
        for number, rank in enumerate(self._ranks):
            if rank.returncode == EXIT_WRONG_INPUT:  # whatever became of the others
                return number, EXIT_WRONG_INPUT
        return (0, 0) if cause is None else (cause, self._code_of(cause))

    def _root_cause_rank(self) -> int | None:
        """Finds, of the ranks that have failed by now, the one that explains the others' ends."""
        failed = [number for number, rank in enumerate(self._ranks) if rank.returncode]

        def precedence(number: int) -> tuple[bool, bool]:
            # One that ended immediately when asked to may have torn another out of a collective; so
            # may one that crashed or hung: the other has lost its peer, which is a fault.
            code = self._code_of(number)
            return not (self._forwarded and code == EXIT_INTERRUPTED), code == EXIT_FAULT

        return min(failed, key=precedence, default=None)

    def _code_of(self, number: int) -> int:
        code: int = self._ranks[number].returncode
        # killed by a signal that was passed on: it did not handle signals yet
        return EXIT_INTERRUPTED if -code in self._forwarded else code


class SharedRefusal(ValueError):  # noqa: N818 - the error is its cause
    """Ranks refuse together; rank 0 says why, or the one that alone knows."""


@contextlib.contextmanager
def refused_together(ranks: Ranks) -> Iterator[None]:
    """All ranks pass, or none; an error that all ranks find inside is said by rank 0 alone."""
    from unicl_fast.distributed.ranks import gather_integers

    error: Exception | None = None
    try:
        yield
    except (ValueError, FileNotFoundError) as caught:
        error = caught
    refused = gather_integers(int(error is not None), ranks)
    if error is not None:
        if refused[0]:
            raise SharedRefusal(str(error)) from error
        raise error
    if any(refused):
        raise SharedRefusal(f"rank {refused.index(1)} cannot continue, and says why")


def explain(error: Exception) -> Exception:
    """Puts into words what torch says of a collective whose other side is gone."""
    if "by peer" not in str(error):  # connection closed, or reset
        return error
    return RuntimeError(
        f"another rank has ended, and its own message says why; this one cannot continue ({error})"
    )


def stop(program: str, error: Exception, *, code: int) -> NoReturn:
    """Ends with the error's sentence; UNICL_TRACEBACK=1 shows its traceback instead."""
    if os.environ.get("UNICL_TRACEBACK"):
        raise error
    if isinstance(error, SharedRefusal) and os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends all ranks after the first: rank 0 must have spoken by then
    else:
        print(f"{program}: {error}", file=sys.stderr)
    sys.exit(code)


def configure_logging(ranks: Ranks) -> None:
    """Lets rank 0 log; the others log only errors."""
    logging.basicConfig(
        level=logging.INFO if ranks.is_main else logging.ERROR,
        format="%(levelname).1s %(name)s: %(message)s",
    )
    if not ranks.is_main:
        warnings.simplefilter("ignore")
