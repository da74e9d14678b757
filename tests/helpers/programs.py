"""A program and all its processes as a test sees them from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_FAULTS = Path(__file__).parent / "faults"
_SHARED_MEMORY = Path("/dev/shm")


class Program:
    """A started unicl-pretrain; its processes are known by a word in their environment."""

    def __init__(
        self, *arguments: str | Path, folder: Path, torchrun: int = 0, fault: str = ""
    ) -> None:
        """Starts it.

        Args:
            arguments: of the program.
            folder: where its temporary files, its messages and the trigger of the fault go.
            torchrun: ranks to start with torchrun; 0 starts the program by itself.
            fault: see faults/sitecustomize.py.
        """
        self.mark = uuid.uuid4().hex
        self.trigger = folder / "fault"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._messages = folder / "messages"
        self._shared_memory_before = set(_SHARED_MEMORY.iterdir())
        program = ["-m", "unicl_fast.tools.pretrain"]
        if torchrun:
            program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            program += [str(torchrun), "-m", "unicl_fast.tools.pretrain"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "UNICL_TEST_RUN": self.mark,
            "TMPDIR": str(self.temporary),
            "UNICL_FAULT": fault,
            "UNICL_FAULT_WHEN": str(self.trigger),
            "PYTHONPATH": f"{_FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        with self._messages.open("w") as messages:
            self.process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                stdout=messages,
                stderr=messages,
                env=environment,
                # a shell that starts tests behind itself lets its children ignore it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def messages(self) -> str:
        return self._messages.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Process id -> RANK ("" where there is none) of all that live."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"UNICL_TEST_RUN={self.mark}".encode() in variables:
                rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), b"")
                found[int(folder.name)] = rank.decode()
        return found

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        (found,) = [number for number, name in self.processes().items() if name == str(rank)]
        return found

    def wait_for(self, condition: Callable[[], object], *, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended too early:\n{self.messages}"
            assert time.monotonic() < deadline, f"it takes too long:\n{self.messages}"
            time.sleep(0.02)

    def wait(self, *, seconds: float = 120) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.messages}") from None

    def wait_until_gone(self, *, seconds: float = 60) -> None:
        """All processes have ended, and nothing of theirs is left in memory or on disk."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"still running: {left}\n{self.messages}"
        while (files := self._unused_shared_memory()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not files, f"left in memory: {files}\n{self.messages}"
        # torchrun's folder, a cache that all share, and what wandb makes when timm imports it
        of_others = ("elastic", "torchinductor", "wandb")
        names = [path.name for path in self.temporary.iterdir()]
        left_on_disk = [name for name in names if not any(word in name for word in of_others)]
        assert not left_on_disk

    def _unused_shared_memory(self) -> list[Path]:
        """New files in /dev/shm that no living process has; other programs may run meanwhile."""
        new = set(_SHARED_MEMORY.iterdir()) - self._shared_memory_before
        if not new:
            return []
        used = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                used |= {line.split()[-1] for line in (folder / "maps").read_text().splitlines()}
                used |= {os.readlink(path) for path in (folder / "fd").iterdir()}
        return [path for path in new if str(path) not in used and path.exists()]

    def end(self) -> None:
        self.process.kill()  # not by its number, which another process may have by now
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(*arguments: str | Path, folder: Path, **how: object) -> Iterator[Program]:
    """A program of which nothing runs when the block is left."""
    program = Program(*arguments, folder=folder, **how)
    try:
        yield program
    finally:
        program.end()


def hears(process_id: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return False
    (caught,) = [line.split()[1] for line in lines if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def has_loaded(process_id: int, library: str) -> bool:
    """Whether a process has a shared library by now: how far it is in its imports."""
    with contextlib.suppress(OSError):
        return library in Path(f"/proc/{process_id}/maps").read_text()
    return False
