"""How programs become ranks, and how they speak: shared by training and evaluation."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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

from unicl_fast.distributed import ending_at_once
from unicl_fast.distributed.ending_at_once import AT_NO_RISK
from unicl_fast.distributed.exit_codes import (
    EXIT_FAULT,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
)
from unicl_fast.system.machine import LAUNCHED_BY_US, usable_cores

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.distributed.ranks import Ranks

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
# How long the others may take to end by themselves when one has failed, or was asked to stop,
_SECONDS_TO_FOLLOW = 2.0
_SECONDS_TO_SAVE = 10.0
# and when they are told to. What waits for a rank that hangs has only to say so.
_SECONDS_TO_END = 30.0
_SECONDS_TO_SAY_SO = 10.0
_LIBC = ctypes.CDLL(None)
_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun's own, so that ranks have one rule


def start_ranks(module: str, *, nproc: int, argv: Sequence[str], max_restarts: int = 0) -> NoReturn:
    """Starts a program `nproc` times on this machine as ranks of one group, and ends as they do.

    Signals go on to all ranks. If a rank fails, the others are ended too; ranks do not outlive this
    process. (torchrun does the same, but its exit code says nothing of how its ranks ended.)

    Args:
        module: what to start, as for `python -m`.
        nproc: number of ranks.
        argv: the program's arguments; --nproc means nothing to a rank.
        max_restarts: how often all ranks are started again after one has died; never after wrong
            input or a signal that asked for an end. They see `is_restarted`.
    """
    launcher = _Launcher()
    for attempt in range(max_restarts + 1):
        launcher.start(module, nproc=nproc, argv=argv, attempt=attempt)
        ended = launcher.wait()
        if not ended.by_accident or launcher.asked_to_stop:
            break
        if attempt < max_restarts:
            _say(f"{ended}: starting all again, restart {attempt + 1} of {max_restarts}")
        elif max_restarts:
            _say(f"{ended}, and all {max_restarts} restarts are used up")
    sys.exit(ended.exit_code)


def is_restarted() -> bool:
    """Whether this rank was started again after a failure, by us or by torchrun."""
    return int(os.environ.get(_RESTART_COUNT, "0")) > 0


def is_own_rank() -> bool:
    """Whether `start_ranks` has started this process."""
    return LAUNCHED_BY_US in os.environ


def _say(text: str) -> None:
    print(f"unicl_fast: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ended:
    """How ranks ended: by the first that did not end well, or well."""

    rank: int
    returncode: int
    """As subprocess has it: minus the signal that killed it."""
    wrong_input: bool
    """Any rank said so."""

    @property
    def by_accident(self) -> bool:
        """Whether another try may end differently."""
        return self.returncode not in (0, EXIT_INTERRUPTED) and not self.wrong_input

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        if self.wrong_input:
            return EXIT_WRONG_INPUT
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"RANK {self.rank} ENDED WITH CODE {self.returncode}"
        return f"RANK {self.rank} WAS KILLED BY {signal.Signals(-self.returncode).name}"


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


class _Launcher:
    """The started ranks, and how long those that should have ended are waited for."""

    def __init__(self) -> None:
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._deadline = math.inf
        self._num_interrupts = 0
        self._forwarded: set[int] = set()
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        ending_at_once.forbid()  # the ranks decide; not before their signals are passed on

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
        if self._num_interrupts == 2:  # a rank in the middle of a collective does not hear it
            self._deadline = time.monotonic() + 5

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> _Ended:
        """Waits for all ranks; after the first that fails the others are ended."""
        telling, follow_until = None, math.inf
        while [rank for rank in self._ranks if rank.poll() is None]:  # asks all of them
            now = time.monotonic()
            if self._deadline == math.inf:  # what comes later is our own doing
                telling = self._root_cause_rank()
                code = 0 if telling is None else self._code_of(telling)
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
        killed_by = -self._ranks[0].returncode
        if killed_by in self._forwarded:  # it would have said so
            _say(f"stopped by {signal.Signals(killed_by).name}; {AT_NO_RISK}")
        if telling is None or self._deadline == math.inf:
            telling = self._root_cause_rank()
        return _Ended(
            rank=telling or 0,
            returncode=0 if telling is None else self._code_of(telling),
            wrong_input=any(rank.returncode == EXIT_WRONG_INPUT for rank in self._ranks),
        )

    def _root_cause_rank(self) -> int | None:
        """Of the ranks that have ended badly by now, the one that explains how the others did."""
        failed = [number for number, rank in enumerate(self._ranks) if rank.returncode]

        def precedence(number: int) -> tuple[bool, bool]:
            # One that ended at once when asked to may have torn another out of a collective; so may
            # one that crashed or hung: the other has lost its peer, which is a fault.
            code = self._code_of(number)
            return not (self._forwarded and code == EXIT_INTERRUPTED), code == EXIT_FAULT

        return min(failed, key=precedence, default=None)

    def _code_of(self, number: int) -> int:
        """How a rank ended, as subprocess has it."""
        code: int = self._ranks[number].returncode
        # killed by what was passed on: it had not begun to listen
        return EXIT_INTERRUPTED if -code in self._forwarded else code


class SharedRefusal(ValueError):  # noqa: N818 - what is wrong is its cause
    """Ranks refuse together; rank 0 says why, or the one that alone knows."""


@contextlib.contextmanager
def refused_together(ranks: Ranks) -> Iterator[None]:
    """All ranks pass, or none: what is refused inside by all is said by rank 0 alone."""
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
        raise SharedRefusal(f"rank {refused.index(1)} cannot go on, and says why")


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
    if isinstance(error, SharedRefusal) and os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends all ranks after the first: let rank 0 have spoken
        sys.exit(code)
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
