"""A contestant of `unicl-bench input` in a process of its own, and the handle to it.

The whole session of its process is stopped by a signal between its turns; its memory and CPU time
are those of all processes of the session.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from unicl_fast.config import CLIP_MEAN, CLIP_STD
from unicl_fast.system.machine import return_freed_memory
from unicl_fast.tools.diagnose.measuring import Turn

from ..harness import FIND_BENCHMARKS
from .contenders import Contender, ContenderError, MissingPackageError, Task

_WARM_UP = 8
"""Batches taken before the clock starts: those that were ready before the turn do not count."""
_WARM_UP_SECONDS = 0.5
_PATIENCE = 300.0
"""Seconds to wait for any answer; FFCV and Numba compile at the first batch."""
_TIME_TO_END = 10.0
"""Seconds that a contestant has to end its own workers before all of them are killed."""
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
_MEAN, _STD = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)


class Worker:
    """A contestant's process, a context manager; it is stopped by SIGSTOP unless it answers."""

    def __init__(self, contender: Contender, task: Task, *, prepare: bool = False) -> None:
        """Starts the process; with `prepare` it only writes the contestant's own files."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                # the cores are busy decoding; more threads of torch's would wait for each other
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._connection.send((contender, task, prepare))

    def __enter__(self) -> Worker:
        try:
            self._answer()  # imports, data sets opened
        except BaseException:
            self._end()
            raise
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def images(self, count: int) -> np.ndarray:
        """Its first `count` images, or a few more: float32 [n h w 3] in levels of 0 to 255."""
        with self._running():
            return np.asarray(self._ask("images", count))

    def moments(self, batches: int) -> np.ndarray:
        """Mean and deviation of each image of `batches` batches [n 2], in levels."""
        with self._running():
            return np.asarray(self._ask("moments", batches))

    def turn(self, seconds: float) -> Turn:
        """Warms up, then runs for `seconds`; the turn is that of one image, on average."""
        with self._running():
            self._ask("warm", seconds)
            return Turn(*self._ask("turn", seconds))

    def memory(self, seconds: float) -> list[int]:
        """`session_bytes` of its processes, a few times while it runs for `seconds`."""
        with self._running():
            self._ask("warm", seconds)
            self._connection.send(("turn", seconds))
            samples, is_over = [], False
            while not is_over:  # once in any case: on a busy machine it may be over already
                is_over = self._connection.poll(seconds / 6)
                samples.append(session_bytes(self._process.pid))
            self._answer()
        return samples

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:  # also one that has not answered: the others are still to be timed
            self._signal(signal.SIGSTOP)

    def _ask(self, command: str, number: float) -> Any:
        self._connection.send((command, number))
        return self._answer()

    def _answer(self) -> Any:
        if not self._connection.poll(_PATIENCE):
            raise ContenderError(f"no answer within {_PATIENCE:.0f} s")
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            raise ContenderError(f"its process ended with code {code}") from None
        if isinstance(answer, ContenderError):
            raise answer
        return answer

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _end(self) -> None:
        self._connection.close()
        # Most end by themselves: loaders killed in mid-batch leave files in /dev/shm.
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TIME_TO_END)
        self._signal(signal.SIGKILL)
        self._process.wait()


# The socket carries everything: no command line, no file.
_PROGRAM = f"{FIND_BENCHMARKS}; from {__name__} import serve; serve(int(sys.argv[1]))"


def die_with_parent() -> None:
    """Has this process killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def serve(descriptor: int) -> None:
    """Answers the handle at the other end of a socket, until that is closed."""
    die_with_parent()
    with Connection(descriptor) as connection:
        try:
            contender, task, prepare = connection.recv()
            if prepare:
                pkgutil.resolve_name(contender.prepare)(task)
                connection.send(None)
            else:
                _serve_batches(connection, contender, task)
        except EOFError:
            return
        except ImportError as error:
            connection.send(MissingPackageError(str(error)))
        except ContenderError as error:
            connection.send(error)
        except Exception as error:  # peers raise errors of many kinds
            connection.send(ContenderError(f"{type(error).__name__}: {error}"))


def _serve_batches(connection: Connection, contender: Contender, task: Task) -> None:
    batches = pkgutil.resolve_name(contender.code)(task)
    connection.send(None)
    while True:
        command, number = connection.recv()
        if command == "images":
            taken = [_levels(next(batches), task) for _ in range(-(-number // task.batch_size))]
            answer: Any = np.concatenate(taken)
        elif command == "moments":
            answer = np.concatenate([_moments(next(batches), task) for _ in range(number)])
        elif command == "warm":
            return_freed_memory()  # the comparison's, which belongs to no loader
            warm_up(batches, min(number, _WARM_UP_SECONDS))
            answer = None
        else:
            answer = take_turn(batches, number)
        connection.send(answer)


def warm_up(batches: Iterator[Any], seconds: float) -> None:
    """Takes the batches that were ready, and lets caches fill."""
    start = time.perf_counter()
    taken = 0
    while taken < _WARM_UP or time.perf_counter() - start < seconds:
        next(batches)
        taken += 1


def take_turn(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Seconds of wall time and of CPU time for an image, over one batch at least."""
    session = os.getsid(0)
    images = 0
    cpu_start, start = session_seconds(session), time.perf_counter()
    while not images or time.perf_counter() - start < seconds:
        batch = next(batches)
        images += batch if isinstance(batch, int) else len(batch)
        del batch  # its buffer can be used again
    wall = time.perf_counter() - start
    # clock ticks are hundredths of a second: a short turn may see none
    cpu = max(session_seconds(session) - cpu_start, 0.01)
    return wall / images, cpu / images


def _levels(batch: Any, task: Task) -> np.ndarray:
    """A contestant's batch [b c h w], of the type that all are to make, as levels [b h w c]."""
    expected = (task.batch_size, 3, task.image_size, task.image_size)
    if tuple(batch.shape) != expected or "float32" not in str(batch.dtype):
        raise ContenderError(f"made {batch.dtype} {tuple(batch.shape)}, not float32 {expected}")
    images = np.array(batch, dtype=np.float32).transpose(0, 2, 3, 1)
    levels: np.ndarray = (images * _STD + _MEAN) * 255
    return levels


def _moments(batch: Any, task: Task) -> np.ndarray:
    values = _levels(batch, task).reshape(len(batch), -1)
    return np.stack([values.mean(1), values.std(1)], axis=1)


def _session_processes(session: int) -> Iterator[tuple[Path, list[str]]]:
    """Folder in /proc and fields of its stat file, from the state on, of each process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = (
                (path / "stat")
                .read_text(encoding="utf-8", errors="replace")
                .rpartition(")")[2]
                .split()
            )
            if int(fields[3]) == session:
                yield path, fields


def session_seconds(session: int) -> float:
    """CPU time so far of all processes of a session, of ended children too."""
    times = (fields[11:15] for _, fields in _session_processes(session))  # utime to cstime
    return sum(map(int, itertools.chain.from_iterable(times))) / os.sysconf("SC_CLK_TCK")


def session_bytes(session: int) -> int:
    """Memory that all processes of a session would hold if they were alone on the machine.

    Pages of a file count once and whole; so does memory that is shared by a name, as much as the
    process with the most of it has. Other pages are shared within the session only, and count in
    parts.
    """
    named: dict[tuple[str, ...], int] = {}
    unnamed = 0
    for path, _ in _session_processes(session):
        with contextlib.suppress(OSError):  # ended meanwhile
            for name, sizes in _mappings(
                (path / "smaps").read_text(encoding="utf-8", errors="replace")
            ):
                if name is None:
                    unnamed += sizes["Pss"]
                    continue
                # pages that a process has written are its own, though the mapping has a file
                own = sizes["Private_Dirty"] if "p" in name[0] else 0
                unnamed += own
                named[name] = max(named.get(name, 0), sizes["Rss"] - own)
    return unnamed + sum(named.values())


def _mappings(smaps: str) -> Iterator[tuple[tuple[str, ...] | None, dict[str, int]]]:
    """Each mapping of a process: its name, None if it has no file, and its sizes in bytes."""
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        permissions, offset, device, inode = block.split(maxsplit=5)[1:5]
        sizes = re.findall(r"^(\w+): +(\d+) kB$", block, flags=re.MULTILINE)
        name = None if inode == "0" else (permissions, offset, device, inode)
        yield name, {size: 1024 * int(kilobytes) for size, kilobytes in sizes}
