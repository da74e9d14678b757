"""What processes that read other people's files have in common: limits, and how they end.

Readers written in C can crash or ask for all memory there is. In a process of their own, under a
ceiling on memory that the kernel holds, this costs the file and nothing else. Pictures are checked
by `picture_worker`; `run_limited` is for whole files, one at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from unicl_fast.tools.items import Problem

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = 77
"""Exit code of a process that ran into its limit."""

# Starting and reaping children is not safe in several threads at once (multiprocessing polls all
# children of the process whenever one is started).
children_lock = threading.Lock()


def limit_memory(num_bytes: int) -> None:
    """Lets this process take `num_bytes` more than it has; an allocation beyond that fails.

    RLIMIT_DATA counts private writable memory (since Linux 4.7), not files and not the address
    space that allocators merely reserve.
    """
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[5])  # noqa: SIM115
    limit = pages * resource.getpagesize() + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def silence_complaints() -> None:
    """Libraries in C print complaints of their own, which would tear the progress bar.

    What matters of them comes back as the reason in quarantine.csv.
    """
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def describe_crash(code: int) -> Problem:
    """A process's end that was not its own wish."""
    if code == -signal.SIGKILL:
        return Problem(kind="crash", message="the process was killed, for want of memory maybe")
    how = f"exit code {code}" if code >= 0 else _signal_name(-code)
    return Problem(kind="crash", message=f"a decoder crashed ({how})")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def run_limited(
    function: Callable[[T], R], tasks: Sequence[T], *, memory_bytes: int
) -> Iterator[R | Problem]:
    """Calls a function with each task, in a process that may take so much memory.

    Args:
        function: of a module's top level; what it raises is raised here.
        tasks: can be sent to a process.
        memory_bytes: beyond what the process has at its start.

    Yields:
        What the function returns, or how the process ended at that task; the next task then gets a
        new process.
    """
    left = list(tasks)
    while left:
        with _Process(function, memory_bytes) as process:
            while left:
                task = left.pop(0)
                result = process.call(task)
                yield result
                if isinstance(result, Problem):
                    break


class _Process:
    def __init__(self, function: Callable[[Any], Any], memory_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._memory_bytes = memory_bytes
        self._process = context.Process(
            target=_serve, args=(theirs, function, memory_bytes), daemon=True
        )
        with children_lock:
            self._process.start()
        theirs.close()  # only the process holds it now: its end is the end of the pipe

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        with children_lock:
            self._process.join()

    def call(self, task: Any) -> Any:
        try:
            self._connection.send(task)
            failed, result = self._connection.recv()
        except (EOFError, OSError):
            with children_lock:
                self._process.join()
            code = self._process.exitcode or 0
            if code == OUT_OF_MEMORY:
                message = f"reading it takes more than {self._memory_bytes / 1e9:.1f} GB of memory"
                return Problem(kind="too large", message=message)
            return describe_crash(code)
        if failed:
            raise result
        return result


def _serve(connection: Connection, function: Callable[[Any], Any], memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops us
    silence_complaints()
    limit_memory(memory_bytes)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                answer = (False, function(task))
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            except (ValueError, OSError, RuntimeError) as error:
                answer = (True, error)
            connection.send(answer)
