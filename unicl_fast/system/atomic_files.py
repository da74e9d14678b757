"""Files that are complete or absent whatever is killed: atomic writes, locks, temporary folders."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from unicl_fast.system.untrusted_files import NotRegularError, open_regular, read_file

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without room for more: all of it, the user's part, or the largest file."""
LOCK_NAME = ".in-use"
_NO_PLACE_TO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds to the error of a full disk what was written: the system names no open file."""
    try:
        yield
    except OSError as error:
        is_bare = error.filename is None and error.errno in FULL_DISK
        if is_bare and error.strerror == os.strerror(error.errno or 0):
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end it takes the place of `path` atomically.

    A reader finds the old file or the new one. After an error the old one is still there. Without
    `flush` the new one need not survive a power cut.
    """
    # two programs may write the same file; and nobody can have put a link of this name there
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming_full_disk(path):
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


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where they are not there; raises as `refuse_file`."""
    refuse_file(path)
    path.mkdir(parents=True, exist_ok=True)


def refuse_file(path: Path) -> None:
    """Raises ValueError where a file stands in the way of a folder that is to be made."""
    there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    if os.path.lexists(there) and not there.is_dir():
        what = "is no folder" if there == path else f"cannot be made a folder: {there} is none"
        raise ValueError(f"{path} {what}; name another one, or move that file away")


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


def lock(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Locks an open file until the descriptor is closed; False if another process holds the lock.

    Several may hold it if each shares it.

    The kernel releases the lock with the process, however that ends. (A file with a process id
    would not do: containers may share a folder.)
    """
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes the folder if needed, and lets no other process enter this for it meanwhile.

    The lock is on a file in it that names host and process; the kernel releases it when the process
    ends, over NFS when the client is gone. A file system without locks gets a warning. There, and
    where clients of NFS do not share their locks, a second writer takes the file over; so the first
    should call what is yielded before it writes.

    Yields:
        A function that raises RuntimeError once another process has taken the folder over.

    Raises:
        ValueError: another process writes there; names it. Or nobody can write there.
    """
    path = folder / LOCK_NAME
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    token = secrets.token_hex(4)  # processes in containers may share host name and number
    name = f"process {os.getpid()} on {socket.gethostname()}, since {now} ({token})"
    descriptor = _open_locked(path)

    def check() -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody has removed the folder
            if (holder := read_file(path).decode("utf-8", "replace")) not in ("", name):
                raise RuntimeError(
                    f"{folder} was taken over by {holder}: this process stops before it mixes its "
                    "files with those of the other"
                )

    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name.encode(), 0)
        yield check
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            check()
            path.unlink()  # whoever has opened it meanwhile opens it anew
            folder.rmdir()  # if nothing was written
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        try:
            make_folder(path.parent)
            try:
                descriptor, _ = open_regular(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # the one before has just removed the folder
                continue
        except NotRegularError as error:
            raise ValueError(str(error)) from error
        except OSError as error:
            if error.errno not in _NO_PLACE_TO_WRITE:
                raise
            raise ValueError(
                f"{path.parent.absolute()} cannot be written to ({error.strerror}): choose a "
                "folder where you may write"
            ) from error
        try:
            is_free = lock(descriptor)
        except OSError as error:
            logger.warning(
                "%s: no locks there (%s): see to it that one program at a time writes there",
                path.parent, error.strerror,
            )  # fmt: skip
            is_free = True
        if not is_free:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is being written by {holder or 'another process'}: wait for it or "
                "end it, or choose another folder"
            )
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(prefix: str, *, root: Path | None = None) -> Iterator[Path]:
    """Makes a folder for a while, after removing those that killed programs left."""
    root = root or Path(tempfile.gettempdir())
    for old in root.glob(f"{prefix}*/{LOCK_NAME}"):
        with contextlib.suppress(OSError), locked(old) as is_unused:
            if is_unused:
                shutil.rmtree(old.parent, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as name:
            path = Path(name) / LOCK_NAME
            with locked(path) as is_ours:
                # a program that starts now may have removed it between its making and its lock
                if is_ours and path.exists():
                    yield Path(name)
                    return


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a file, which is made if needed; False if another process holds it."""
    descriptor, _ = open_regular(path, os.O_RDWR | os.O_CREAT, mode=0o600)
    try:
        yield lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)
