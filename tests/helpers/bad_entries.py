"""Entries that do to a packing worker what a broken decoder does; importable in the worker."""

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicl_fast.packing.workers import ImageOptions


@dataclass(frozen=True)
class Crashing:
    """Ends the process by a signal, as a segmentation fault or the kernel's OOM killer does."""

    signal: int
    num_bytes: int = 1

    def read(self, *, max_bytes: int = 0) -> bytes:
        os.kill(os.getpid(), self.signal)
        raise AssertionError


@dataclass(frozen=True, kw_only=True)
class KillingAtStart(ImageOptions):
    """Options with which a worker process is killed before it is ready, some times."""

    folder: str
    times: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _start, (self.folder, self.times)


def _start(folder: str, times: int) -> ImageOptions:
    starts = len(os.listdir(folder))
    (Path(folder) / str(starts)).touch()
    if starts < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return ImageOptions(short_side=0, quality=90, max_pixels=10_000_000, seconds=60)


@dataclass(frozen=True)
class Hanging:
    """Stays in C code that holds the interpreter's lock: no Python runs here any more."""

    num_bytes: int = 1

    def read(self, *, max_bytes: int = 0) -> bytes:
        ctypes.PyDLL(None).sleep(1000)
        raise AssertionError


@dataclass(frozen=True)
class Hungry:
    """Asks for memory and touches all of it."""

    gigabytes: int
    num_bytes: int = 1

    def read(self, *, max_bytes: int = 0) -> bytes:
        return bytes(np.ones(self.gigabytes << 30, np.uint8)[:1])


@dataclass(frozen=True)
class Faulty:
    """Raises what nobody has thought of."""

    num_bytes: int = 1

    def read(self, *, max_bytes: int = 0) -> bytes:
        raise KeyError("surprise")


@dataclass(frozen=True)
class CrashingOnce:
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


@dataclass(frozen=True)
class KillsParentOnce(CrashingOnce):
    """Kills the process that started the one which reads it first; sound from then on."""

    def victim(self) -> int:
        return os.getppid()
