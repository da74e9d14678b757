"""Processes that read other people's files, under limits that the kernel holds.

Readers written in C can crash or ask for all memory there is; here this costs the file and nothing
else. concurrent.futures reports neither the exit code of a worker that dies nor its task.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from unicl_fast.packing.sources.items import Problem

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = 77
"""Exit code of a process that ran into its limit."""
_STARTS = 3
"""Times to start a process that is killed from outside, by the OOM killer say, as it starts."""

# multiprocessing's spawn would run the user's main module in each process once more, which takes as
# long as all else that one imports, and start another process that tracks its resources.
_PROGRAM = "import sys; sys.path[:] = {path}; from {module} import begin; begin({descriptor})"


class LimitedProcess:
    """The main process's end of a process that may die of what it reads."""

    def __init__(
        self, serve: Callable[..., None], *arguments: Any, descriptors: Sequence[int] = ()
    ) -> None:
        """Starts `serve(connection, *arguments)` in a process, and waits until it calls `enter`.

        The process inherits `descriptors`. Raises RuntimeError if it cannot be started, which is
        the fault of nothing that it would read.
        """
        for _ in range(_STARTS):
            code = self._start(serve, arguments, descriptors)
            if code == 0:
                return
            if code > 0:  # it has ended by itself, and would again
                break
        raise RuntimeError(
            f"a worker process could not start (exit code {code}): see above if it said why, and "
            "whether memory is free"
        )

    def _start(
        self, serve: Callable[..., None], arguments: Sequence[Any], descriptors: Sequence[int]
    ) -> int:
        """Returns 0 when the process has called `enter`, else the exit code that it ended with."""
        self.connection, theirs = multiprocessing.Pipe()
        program = _PROGRAM.format(path=sys.path, module=__name__, descriptor=theirs.fileno())
        with theirs:  # only the process holds it from then on: its end is the end of the pipe
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *descriptors],
            )
        try:
            self.connection.send((serve, arguments))
            self.connection.recv()
        except (EOFError, OSError):
            return self.reap() or os.EX_SOFTWARE  # it may have ended with 0, and is not ready
        return 0

    def kill(self) -> None:
        """Ends the process at once; a thread that waits for its answer gets an `EOFError`."""
        self._process.kill()

    def reap(self) -> int:
        """Waits for the end of the process; returns its exit code."""
        self.connection.close()
        return self._process.wait()


def begin(descriptor: int) -> None:
    """Runs the function that comes first through the pipe; the process does nothing else."""
    connection = Connection(descriptor)
    serve, arguments = connection.recv()
    serve(connection, *arguments)


def enter(connection: Connection, memory_bytes: int) -> None:
    """Limits this process to `memory_bytes` more than it has, and reports that it is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops us
    # What libraries in C, libtiff above all, print would tear the progress bar; what matters of it
    # comes back as the reason in quarantine.csv.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # RLIMIT_DATA counts private writable memory (since Linux 4.7), not files and not the address
    # space that allocators merely reserve; an allocation beyond it fails.
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[5])  # noqa: SIM115
    limit = pages * resource.getpagesize() + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    connection.send(None)


def describe_death(code: int, *, too_large: str) -> Problem:
    """Describes the end of a process by its exit code; `too_large` is for want of memory."""
    if code == OUT_OF_MEMORY:
        return Problem("too large", too_large)
    if code == -signal.SIGKILL:
        return Problem("crash", "the process was killed, for want of memory maybe")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        how = signal.Signals(-code).name
    return Problem("crash", f"a decoder crashed ({how})")


def in_order(submit: Callable[[T], Future[R]], tasks: Iterable[T], *, ahead: int) -> Iterator[R]:
    """Yields results in the order of the tasks, with at most `ahead` of these under way."""
    under_way: deque[Future[R]] = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def run_limited(
    function: Callable[[T], R], tasks: Sequence[T], *, memory_bytes: int
) -> Iterator[R | Problem]:
    """Calls a function with each task, in a process with `memory_bytes` more than at its start.

    Yields what the function returns, or how the process ended at that task; the next task then gets
    a new process. A ValueError, OSError or RuntimeError of the function is raised here.
    """
    left = list(tasks)
    while left:
        process = LimitedProcess(_serve, function, memory_bytes)
        try:
            while left:
                try:
                    process.connection.send(left.pop(0))
                    failed, result = process.connection.recv()
                except (EOFError, OSError):
                    limit = f"reading it takes more than {memory_bytes / 1e9:.1f} GB of memory"
                    yield describe_death(process.reap(), too_large=limit)
                    break
                if failed:
                    raise result
                yield result
        finally:
            process.kill()
            process.reap()


def _serve(connection: Connection, function: Callable[[Any], Any], memory_bytes: int) -> None:
    enter(connection, memory_bytes)
    with contextlib.suppress(EOFError, OSError):  # the main process is done, or gone
        while True:
            task = connection.recv()
            try:
                answer = (False, function(task))
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            except (ValueError, OSError, RuntimeError) as error:
                answer = (True, error)
            connection.send(answer)
