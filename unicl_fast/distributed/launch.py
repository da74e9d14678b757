"""Starts a program as ranks of one group on this machine; how ranks log and report errors.

torch's elastic launcher (2.13) restarts after 2 (wrong input) and 75 (stopped), its ranks outlive
it after SIGKILL, and their exit codes are lost after a signal or if a rank only lost its peer.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.handlers
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from unicl_fast.distributed.signals import (
    AT_NO_RISK,
    EXIT_FAULT,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    defer_signals,
    handle_stop_signals,
)
from unicl_fast.system.machine import LAUNCHED_BY_US, STORE_SOCKET, usable_cores
from unicl_fast.system.phases import mark
from unicl_fast.system.untrusted_files import open_file
from unicl_fast.system.wording import print_text, shorten_message, without_secrets

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.distributed.ranks import Ranks

_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # as torchrun sets it
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def start_ranks(
    module: str, *, nproc: int, argv: Sequence[str], max_restarts: int = 0, resumes: bool = True
) -> NoReturn:
    """Starts a program `nproc` times on this machine as ranks of one group, and ends as they do.

    Signals are passed on to all ranks. If a rank fails, the others are ended too; ranks do not
    outlive this process. After a failure all are started again (`is_restarted`), up to
    `max_restarts` times, but not after wrong input or a stop signal. A program that `resumes` ends
    with its own code after Ctrl-C.
    """
    mark("")  # rank 0 shows its own phases
    launcher = _Launcher(resumes=resumes)
    for attempt in range(max_restarts + 1):
        launcher.start(module, nproc=nproc, argv=argv, attempt=attempt)
        rank, code = launcher.wait()
        if code in (0, EXIT_WRONG_INPUT, EXIT_INTERRUPTED) or launcher.forwarded:
            break
        ended = f"RANK {rank} ENDED WITH CODE {code}"
        if code < 0:
            ended = f"RANK {rank} WAS KILLED BY {signal.Signals(-code).name}"
        if attempt < max_restarts:
            _say(f"{ended}: starting all again, restart {attempt + 1} of {max_restarts}")
        elif max_restarts:
            _say(f"{ended}, and all {max_restarts} restarts are used up")
    if signal.SIGINT in launcher.forwarded and not resumes:
        raise KeyboardInterrupt
    sys.exit(code if code >= 0 else 128 - code)  # as shells do


def is_restarted() -> bool:
    """Returns whether we or torchrun have started this rank again after a failure."""
    return int(os.environ.get(_RESTART_COUNT, "0")) > 0


def is_own_rank() -> bool:
    return LAUNCHED_BY_US in os.environ


def _say(text: str) -> None:
    print(f"unicl_fast: {text}", file=sys.stderr, flush=True)


def end_with_torchrun() -> None:
    """Under torchrun, ends this rank when torchrun is gone, as `start_ranks` does."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())


def _end_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class _Launcher:
    """The started ranks, and how long to wait for those that should have ended."""

    def __init__(self, *, resumes: bool) -> None:
        self._resumes = resumes
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._deadline = math.inf
        self._num_interrupts = 0
        self.forwarded: set[int] = set()
        """Stop signals that came."""
        handle_stop_signals(self._forward)
        defer_signals(True)  # from now on the ranks decide

    def start(self, module: str, *, nproc: int, argv: Sequence[str], attempt: int) -> None:
        # rank 0 inherits the socket: another program could take a port that is only looked up
        listening = socket.create_server(("127.0.0.1", 0), backlog=max(128, nproc))
        port = listening.getsockname()[1]
        # without OMP_NUM_THREADS every rank would start as many threads as the machine has cores
        shared = {"OMP_NUM_THREADS": str(max(1, usable_cores() // nproc))}
        shared |= {"GLOO_SOCKET_IFNAME": "lo"}  # ranks of one machine are not open to others
        shared |= os.environ
        shared |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {_RESTART_COUNT: str(attempt), LAUNCHED_BY_US: "1"}
        sys.stdout.flush()
        self._deadline = math.inf
        launcher = os.getpid()

        def begin() -> None:
            handle_stop_signals(signal.SIG_DFL)  # they end a rank until it handles them itself
            _end_with(launcher)

        def start_rank(rank: int) -> subprocess.Popen[bytes]:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            own |= {} if rank else {STORE_SOCKET: str(listening.fileno())}
            return subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=shared | own,
                pass_fds=() if rank else (listening.fileno(),),
                start_new_session=True,  # Ctrl-C reaches them once, through this process
                preexec_fn=begin,
            )

        with listening:
            self._ranks = list(map(start_rank, range(nproc)))
        if self.forwarded:  # while they were being started
            self._send(signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.forwarded.add(number)
        self._send(number)
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:  # a rank inside a collective does not notice it
            self._deadline = time.monotonic() + 5

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> tuple[int, int]:
        """Waits for all ranks, ends them after the first failure; returns its rank and code."""
        cause, follow_until = (0, 0), math.inf
        while [rank for rank in self._ranks if rank.poll() is None]:  # polls all of them
            now = time.monotonic()
            if self._deadline == math.inf:  # later failures are the launcher's doing
                cause = self._root_cause()
                if cause[1] and follow_until == math.inf:
                    # a failure can be seen before its cause; after a stop, all ranks save
                    follow_until = now + (10 if cause[1] == EXIT_INTERRUPTED else 2)
                if now >= follow_until:
                    self._send(signal.SIGTERM)  # a rank that waits for a hung one says so, and ends
                    self._deadline = now + (10 if cause[1] == EXIT_HUNG else 30)
            if now > self._deadline:
                self._send(signal.SIGKILL)  # also ends stopped ones
            time.sleep(0.05)
        killed_by = -self._ranks[0].returncode
        if killed_by in self.forwarded and self._resumes:  # before it could say so itself
            _say(f"stopped by {signal.Signals(killed_by).name}; {AT_NO_RISK}")
        if not cause[1] or self._deadline == math.inf:
            cause = self._root_cause()
        if any(rank.returncode == EXIT_WRONG_INPUT for rank in self._ranks):
            return 0, EXIT_WRONG_INPUT  # however the others ended
        return cause

    def _root_cause(self) -> tuple[int, int]:
        """Returns the failed rank that explains how the others ended, and its code."""
        ends = [
            # a rank that does not handle signals yet is killed by one that was passed on
            (number, EXIT_INTERRUPTED if -rank.returncode in self.forwarded else rank.returncode)
            for number, rank in enumerate(self._ranks)
            if rank.returncode
        ]
        # A fault can be the lost peer of a collective, of a rank that was stopped, crashed or hung.

        def order(end: tuple[int, int]) -> tuple[bool, bool]:
            return not self.forwarded or end[1] != EXIT_INTERRUPTED, end[1] == EXIT_FAULT

        return min(ends, key=order, default=(0, 0))


class SharedRefusal(ValueError):  # noqa: N818 - the error is its cause
    """An error that some or all ranks found, raised on all of them; rank 0 reports it."""


@contextlib.contextmanager
def refused_together(ranks: Ranks) -> Iterator[None]:
    """Raises the first rank's error in this context on all ranks."""
    from unicl_fast.distributed.ranks import gather_objects

    error: Exception | None = None
    try:
        yield
    except (ValueError, FileNotFoundError) as caught:
        error = caught
    errors = gather_objects(None if error is None else str(error), ranks)
    for rank, text in enumerate(errors):
        if text is not None:
            raise SharedRefusal(f"rank {rank}: {text}" if rank else text) from error


def explain(error: Exception) -> Exception:
    """Explains torch's error if the other side of a collective is gone or stuck."""
    if "by peer" in str(error):  # connection closed, or reset
        what = "another rank has ended, and its own message says why"
    elif "Timed out waiting" in str(error):
        what = "another rank hangs, or its process was stopped: see what it does, and start again"
    else:
        return error
    return RuntimeError(f"{what}; this one cannot continue ({error})")


def stop(program: str, error: Exception, *, code: int) -> NoReturn:
    """Ends with the error's message; UNICL_TRACEBACK=1 shows its traceback instead."""
    if os.environ.get("UNICL_TRACEBACK"):
        raise error
    if isinstance(error, SharedRefusal) and os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends all ranks after the first: rank 0 must report before that
    else:
        print_text(shorten_message(f"{program}: {error}"), sys.stderr)
    sys.exit(code)


class _LogWithoutSecrets(logging.Formatter):
    """Removes user, password and query from URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


_FORMATTER = _LogWithoutSecrets(
    "%(asctime)s %(levelname).1s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"
)


def configure_logging(ranks: Ranks, *, quiet: bool = False) -> None:
    """Makes rank 0 log, if `quiet` only warnings and errors; the other ranks log only errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FORMATTER)
    handler.setLevel(logging.WARNING if quiet else logging.NOTSET)
    level = logging.INFO if ranks.is_main else logging.ERROR
    logging.basicConfig(level=level, handlers=[handler])
    if not ranks.is_main:
        warnings.simplefilter("ignore")


class _LogFile(logging.FileHandler):
    """A log that never ends a run: lines that cannot be written are lost."""

    def _open(self) -> Any:
        return open_file(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the first line opens the file
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextlib.contextmanager
def keeping_log() -> Iterator[Callable[[Path], None]]:
    """Keeps the log until the yielded function is called with a file in an existing folder.

    An error that leaves the context is the file's last line. Without a file nothing is written.
    """
    root = logging.getLogger()
    file: logging.Handler = logging.NullHandler()
    kept = logging.handlers.MemoryHandler(0)  # passes every line on as soon as it has a target

    def write_to(path: Path) -> None:
        nonlocal file
        file = _LogFile(path, delay=True)
        file.setFormatter(_FORMATTER)
        kept.setTarget(file)
        kept.flush()
        if path.is_symlink():
            root.warning("%s is a link, through which no log is written: remove it", path)

    root.addHandler(kept)
    try:
        yield write_to
    except BaseException as error:
        text = f"ended by {type(error).__name__}: {error}"
        kept.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None))
        raise
    finally:
        root.removeHandler(kept)
        kept.close()
        with contextlib.suppress(OSError):
            file.close()
