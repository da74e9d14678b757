"""Runs risky work, which can crash, hang or exhaust memory, in a child process.

Such work reads or decodes other people's files, or calls kernels and drivers. A child ends with its
parent, its output is discarded, the operating system enforces its memory limit, and its death is
described. (concurrent.futures reports neither exit code nor task of a worker that dies, and cannot
end one that hangs.)
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = 77  # exit code of a child that ran into its memory limit
_STARTS = 3  # attempts to start a child that is killed while it starts, perhaps by the OOM killer

# multiprocessing's spawn would run the user's main module again in each child, which is as slow as
# all other imports, and start another process to track resources.
_PROGRAM = "import sys; sys.path[:] = {path}; from {module} import begin; begin({descriptor})"


class Death(NamedTuple):
    """How a child ended before it had answered."""

    kind: Literal["memory", "time", "crash"]
    how: str
    """A verb phrase: "crashed (SIGSEGV)", "did not end within 5 s"."""


class Child:
    """The parent's end of a child."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        """Starts `serve(connection, *arguments)` in a child, and waits until it calls `enter`.

        Raises RuntimeError if it cannot start.
        """
        for _ in range(_STARTS):
            code = self._start(serve, arguments)
            if code == 0:
                return
            if code > 0:  # it ended by itself, and would do so again
                break
        raise RuntimeError(
            f"a worker process could not start (exit code {code}): see above if it said why, and "
            "whether memory is free"
        )

    def _start(self, serve: Callable[..., None], arguments: Sequence[Any]) -> int:
        """Returns 0 when the child has called `enter`, else its exit code."""
        self.connection, theirs = multiprocessing.Pipe()
        program = _PROGRAM.format(path=sys.path, module=__name__, descriptor=theirs.fileno())
        with theirs:  # from now on only the child holds it, so the pipe ends when the child does
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            self.connection.send((serve, arguments))
            self.connection.recv()
        except (EOFError, OSError):
            return self.reap() or os.EX_SOFTWARE  # it can end with 0 before it is ready
        return 0

    def kill(self) -> None:
        """Ends the child at once; a thread that waits for its answer gets an EOFError."""
        self._process.kill()

    def reap(self) -> int:
        """Waits for the end of the child; returns its exit code."""
        self.connection.close()
        return self._process.wait()


def begin(descriptor: int) -> None:
    """Runs, in the child, the function that comes first through the pipe."""
    connection = Connection(descriptor)
    serve, arguments = connection.recv()
    serve(connection, *arguments)


def enter(connection: Connection, *, memory_bytes: int = 0) -> None:
    """Limits this child to `memory_bytes` more than it has (0: no limit), and reports ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops us
    # output of C libraries, libtiff above all, would break the parent's progress bar
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    if memory_bytes:
        # RLIMIT_DATA counts private writable memory (since Linux 4.7), not files, nor address space
        # that allocators only reserve; an allocation beyond it fails
        pages = int(open("/proc/self/statm", encoding="ascii").read().split()[5])  # noqa: SIM115
        limit = pages * resource.getpagesize() + memory_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    connection.send(None)


def describe_death(code: int, *, memory_bytes: int = 0) -> Death:
    """Describes the end of a child by its exit code."""
    if code == OUT_OF_MEMORY:
        return Death("memory", f"needs more than {memory_bytes / 1e9:.1f} GB of memory")
    if code == -signal.SIGKILL:
        return Death("crash", "was killed, possibly out of memory")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        how = signal.Signals(-code).name
    return Death("crash", f"crashed ({how})")


def run_limited(
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    memory_bytes: int = 0,
    seconds: float | None = None,
) -> Iterator[R | Death]:
    """Calls an importable function with each task, in a child with limits.

    Args:
        function: gets one task; its ValueError, OSError or RuntimeError is raised here.
        tasks: advanced when the last result has been consumed.
        memory_bytes: a child's memory beyond that at its start; 0 is no limit.
        seconds: for each task, without the start of the child; None is no limit.

    Yields:
        The result, or how the child died; then the next task gets a new child.
    """
    child: Child | None = None
    result: Any
    try:
        for task in tasks:
            running = child = child or Child(_serve, function, memory_bytes)
            failed, is_late, result = False, False, None
            try:
                running.connection.send(task)
                if is_late := not running.connection.poll(seconds):
                    running.kill()
                    raise EOFError
                failed, result = running.connection.recv()
            except (EOFError, OSError):
                child, code = None, running.reap()
                result = describe_death(code, memory_bytes=memory_bytes)
                if is_late:
                    result = Death("time", f"did not end within {seconds:g} s")
            if failed:
                raise result
            yield result
    finally:
        if child is not None:
            child.kill()
            child.reap()


def fault_of(function: Callable[..., object], *arguments: Any, seconds: float) -> str:
    """Calls an importable function in a child; describes how it failed, "" if it did not."""
    (found,) = run_limited(_outcome, [(function, arguments)], seconds=seconds)
    return found.how if isinstance(found, Death) else found


def _outcome(task: tuple[Callable[..., object], Sequence[Any]]) -> str:
    function, arguments = task
    try:
        function(*arguments)
    except Exception as error:  # CUDA's errors have several lines
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _serve(connection: Connection, function: Callable[[Any], Any], memory_bytes: int) -> None:
    enter(connection, memory_bytes=memory_bytes)
    with contextlib.suppress(EOFError, OSError):  # the parent is done, or gone
        while True:
            task = connection.recv()
            try:
                answer = (False, function(task))
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            except (ValueError, OSError, RuntimeError) as error:
                answer = (True, error)
            connection.send(answer)
