"""Temporary folders that do not stay behind when a program is killed: the next one removes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK_NAME = ".in-use"


@contextlib.contextmanager
def temporary_folder(prefix: str, *, root: Path | None = None) -> Iterator[Path]:
    """A new folder, removed at the end; those that killed programs have left go first.

    Whoever uses a folder holds a lock on a file in it, and the kernel lets go of the lock with the
    process, however that ends. (A process id would not do: containers may share a /tmp.)

    Args:
        prefix: of the folder's name, the program's own.
        root: where it is made; None takes the system's place for such.
    """
    root = root or Path(tempfile.gettempdir())
    for old in root.glob(f"{prefix}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError), _locked(old):
            shutil.rmtree(old.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=root) as name,
        _locked(Path(name) / _LOCK_NAME),
    ):
        yield Path(name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made if it is not there.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
