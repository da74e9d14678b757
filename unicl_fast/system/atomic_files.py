"""Files that are complete or absent whatever is killed: atomic writes, locks, temporary folders."""

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
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end it takes the place of `path` atomically.

    A reader finds the old file or the new one. After an error the old one is still there. Without
    `flush` the new one need not survive a power cut.
    """
    # with the process's number, since two programs may write the same file
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        if flush:
            flush_to_disk(aside)
        aside.replace(path)
        if flush:
            flush_to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a small file atomically; after an OSError the old one is still there."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_fully(descriptor: int, buffer: memoryview, *, offset: int) -> int:
    """Reads from an open file until the buffer is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file until the descriptor is closed; False if another process holds the lock.

    The kernel releases the lock with the process, however that ends. (A file with a process id
    would not do: containers may share a folder.)
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def temporary_folder(prefix: str, *, root: Path | None = None) -> Iterator[Path]:
    """Makes a folder for a while, after removing those that killed programs left."""
    root = root or Path(tempfile.gettempdir())
    for old in root.glob(f"{prefix}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError), _locked(old) as is_unused:
            if is_unused:
                shutil.rmtree(old.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=root) as name,
        _locked(Path(name) / _LOCK_NAME),
    ):
        yield Path(name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a file, which is made if needed; False if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)
