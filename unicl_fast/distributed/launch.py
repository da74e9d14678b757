"""How a program becomes ranks of one group on this machine, and how ranks report errors.

torch's elastic launcher (2.13) restarts after 2 (wrong input) and 75 (stopped), its ranks outlive
SIGKILL, and their codes are lost after a signal or when one only lost its peer.
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
from unicl_fast.system.wording import print_text, without_secrets

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.distributed.ranks import Ranks

_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"  # torchrun's own, so that ranks have one rule
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def start_ranks(
    module: str,
    *,
    nproc: int,
    argv: Sequence[str],
    max_restarts: int = 0,
    resumes: bool = True,
) -> NoReturn:
    """Starts a program `nproc` times on this machine as ranks of one group, and ends as they do.

    Signals are passed on to all ranks. If a rank fails, the others are ended too; ranks do not
    outlive this process. After a rank has died all are started again, up to `max_restarts` times,
    and see `is_restarted`; never after wrong input or a signal that asked for an end. After Ctrl-C
    a program that `resumes` has the exit code that says so.
    """
    mark("")  # rank 0 says what it does
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
    sys.exit(code if code >= 0 else 128 - code)  # as a shell has it


def is_restarted() -> bool:
    """Returns whether this rank was started again after a failure, by us or by torchrun."""
    return int(os.environ.get(_RESTART_COUNT, "0")) > 0


def is_own_rank() -> bool:
    return LAUNCHED_BY_US in os.environ


def _say(text: str) -> None:
    print(f"unicl_fast: {text}", file=sys.stderr, flush=True)


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
    """The started ranks, and how long to wait for those that should have ended."""

    def __init__(self, *, resumes: bool) -> None:
        self._resumes = resumes
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._deadline = math.inf
        self._num_interrupts = 0
        self.forwarded: set[int] = set()
        """Signals that asked for an end."""
        handle_stop_signals(self._forward)
        defer_signals(True)  # the ranks decide; not before their signals are passed on

    def start(self, module: str, *, nproc: int, argv: Sequence[str], attempt: int) -> None:
        # rank 0 takes the socket over: a port that was only looked up could be taken meanwhile
        listening = socket.create_server(("127.0.0.1", 0), backlog=max(128, nproc))
        port = listening.getsockname()[1]
        # without OMP_NUM_THREADS every rank would start as many threads as the machine has cores
        shared = {"OMP_NUM_THREADS": str(max(1, usable_cores() // nproc))}
        shared |= {"GLOO_SOCKET_IFNAME": "lo"}  # ranks of one machine listen to nobody else
        shared |= os.environ
        shared |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {_RESTART_COUNT: str(attempt), LAUNCHED_BY_US: "1"}
        sys.stdout.flush()
        self._deadline = math.inf
        store = {STORE_SOCKET: str(listening.fileno())}
        launcher = os.getpid()

        def begin() -> None:
            handle_stop_signals(signal.SIG_DFL)  # until the rank handles them itself, they end it
            _end_with(launcher)

        with listening:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", module, *argv],
                    env=shared
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    | ({} if rank else store),
                    pass_fds=() if rank else (listening.fileno(),),
                    start_new_session=True,  # Ctrl-C reaches them once, through this process
                    preexec_fn=begin,
                )
                for rank in range(nproc)
            ]
        if self.forwarded:  # while they were being started
            self._send(signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.forwarded.add(number)
        self._send(number)
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:  # a rank in the middle of a collective does not notice it
            self._deadline = time.monotonic() + 5

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> tuple[int, int]:
        """Waits for all ranks, ends them after the first failure; returns its rank and code."""
        cause, follow_until = (0, 0), math.inf
        while [rank for rank in self._ranks if rank.poll() is None]:  # asks all of them
            now = time.monotonic()
            if self._deadline == math.inf:  # later failures are the launcher's own doing
                cause = self._root_cause()
                if cause[1] and follow_until == math.inf:
                    # one may be seen before its cause; asked to stop, all save after the same step
                    follow_until = now + (10 if cause[1] == EXIT_INTERRUPTED else 2)
                if now >= follow_until:
                    self._send(signal.SIGTERM)  # a rank that waits for a hung one says so, and ends
                    self._deadline = now + (10 if cause[1] == EXIT_HUNG else 30)
            if now > self._deadline:
                self._send(signal.SIGKILL)  # stopped ones end by it too
            time.sleep(0.05)
        killed_by = -self._ranks[0].returncode
        if killed_by in self.forwarded and self._resumes:  # it would have said so itself
            _say(f"stopped by {signal.Signals(killed_by).name}; {AT_NO_RISK}")
        if not cause[1] or self._deadline == math.inf:
            cause = self._root_cause()
        if any(rank.returncode == EXIT_WRONG_INPUT for rank in self._ranks):
            return 0, EXIT_WRONG_INPUT  # whatever became of the others
        return cause

    def _root_cause(self) -> tuple[int, int]:
        """Finds the failed rank that explains how the others ended, and its code."""
        ends = [
            # killed by a signal that was passed on: it did not handle signals yet
            (number, EXIT_INTERRUPTED if -rank.returncode in self.forwarded else rank.returncode)
            for number, rank in enumerate(self._ranks)
            if rank.returncode
        ]

        # One that ended immediately when asked to may have torn another out of a collective; so may
        # one that crashed or hung: the other has lost its peer, which is a fault.
        return min(
            ends,
            key=lambda end: (
                not (self.forwarded and end[1] == EXIT_INTERRUPTED),
                end[1] == EXIT_FAULT,
            ),
            default=(0, 0),
        )


class SharedRefusal(ValueError):  # noqa: N818 - the error is its cause
    """An error that some or all ranks found, raised on all of them; rank 0 says it."""


@contextlib.contextmanager
def refused_together(ranks: Ranks) -> Iterator[None]:
    """All ranks pass, or none: the first rank's error inside the block is raised on all."""
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
    """Puts into words what torch says of a collective whose other side is gone, or stuck."""
    if "by peer" in str(error):  # connection closed, or reset
        what = "another rank has ended, and its own message says why"
    elif "Timed out waiting" in str(error):
        what = "another rank hangs, or its process was stopped: see what it does, and start again"
    else:
        return error
    return RuntimeError(f"{what}; this one cannot continue ({error})")


def stop(program: str, error: Exception, *, code: int) -> NoReturn:
    """Ends with the error's sentence; UNICL_TRACEBACK=1 shows its traceback instead."""
    if os.environ.get("UNICL_TRACEBACK"):
        raise error
    if isinstance(error, SharedRefusal) and os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends all ranks after the first: rank 0 must have spoken by then
    else:
        print_text(f"{program}: {error}", sys.stderr)
    sys.exit(code)


_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


class _LogWithoutSecrets(logging.Formatter):
    """Formats lines of the log; URLs in them lose user, password and query."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


_FORMATTER = _LogWithoutSecrets("%(asctime)s %(levelname).1s %(name)s: %(message)s", _DATE_FORMAT)


def configure_logging(ranks: Ranks, *, quiet: bool = False) -> None:
    """Lets rank 0 log, with the time; the others log only errors, a quiet rank 0 warnings too."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FORMATTER)
    handler.setLevel(logging.WARNING if quiet else logging.NOTSET)
    level = logging.INFO if ranks.is_main else logging.ERROR
    logging.basicConfig(level=level, handlers=[handler])
    if not ranks.is_main:
        warnings.simplefilter("ignore")


class _LogFile(logging.FileHandler):
    """A log that ends no run: what cannot be written is lost."""

    def _open(self) -> Any:
        return open_file(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the file is opened with the first line
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextlib.contextmanager
def keeping_log() -> Iterator[Callable[[Path], None]]:
    """Keeps the log until the yielded function gets a file for it, whose folder exists.

    An error that leaves the context is the file's last line. Without a file nothing is written.
    """
    root = logging.getLogger()
    file: logging.Handler = logging.NullHandler()
    kept = logging.handlers.MemoryHandler(0)  # passes every line on, once it has a target

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
