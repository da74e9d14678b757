"""Entries that do to a packing worker what a broken decoder does; importable in the worker."""

import ctypes
import os
import signal
from pathlib import Path

import msgspec
import numpy as np

from unicl_fast.packing.sources.entries import EntryError


class BadEntry(msgspec.Struct, kw_only=True):
    path: str = ""
    num_bytes: int = 1


class Crashing(BadEntry):
    """Ends the process by a signal, as a segmentation fault or the kernel's OOM killer does."""

    signal: int

    def read(self, *, max_bytes: int = 0) -> bytes:
        os.kill(os.getpid(), self.signal)
        raise AssertionError


class Hanging(BadEntry):
    """Stays in C code that holds the interpreter's lock: no Python runs here any more."""

    def read(self, *, max_bytes: int = 0) -> bytes:
        ctypes.PyDLL(None).sleep(1000)
        raise AssertionError


class Hungry(BadEntry):
    """Asks for memory and touches all of it."""

    gigabytes: int

    def read(self, *, max_bytes: int = 0) -> bytes:
        return bytes(np.ones(self.gigabytes << 30, np.uint8)[:1])


class Faulty(BadEntry):
    """Raises what nobody has thought of."""

    def read(self, *, max_bytes: int = 0) -> bytes:
        raise KeyError("surprise")


class Refused(BadEntry):
    """Raises a problem, as a damaged file does."""

    kind: str
    message: str

    def read(self, *, max_bytes: int = 0) -> bytes:
        raise EntryError(self.kind, self.message)


class CrashingOnce(msgspec.Struct):
    """Kills the first process that reads it; sound from then on."""

    path: str
    data: bytes
    num_bytes: int = 1

    def read(self, *, max_bytes: int = 0) -> bytes:
        mark = Path(self.path)
        if not mark.exists():
            mark.touch()
            os.kill(self.victim(), signal.SIGKILL)
        return self.data

    def victim(self) -> int:
        return os.getpid()


class KillsParentOnce(CrashingOnce):
    """Kills the process that started the one which reads it first; sound from then on."""

    def victim(self) -> int:
        return os.getppid()
