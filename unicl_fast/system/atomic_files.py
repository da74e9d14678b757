"""Files that are complete or absent whatever is killed: atomic writes, locks, temporary folders."""

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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from unicl_fast.system.phases import mark_progress
from unicl_fast.system.untrusted_files import NotRegularError, open_regular, read_file

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Out of room: the disk is full, the user's quota is used up, or the file is too large."""
LOCK_NAME = ".in-use"
_POLLED_SECONDS = 0.1
_NO_PLACE_TO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the path to the error of a full disk: the system does not name an open file."""
    try:
        yield
    except OSError as error:
        is_bare = error.filename is None and error.errno in FULL_DISK
        if is_bare and error.strerror == os.strerror(error.errno or 0):
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end it replaces `path` atomically.

    A reader finds the old file or the new one, after an error the old one. Without `flush` the new
    one can be lost in a power cut.
    """
    # random: two programs can write the same file, and nobody can have put a link of this name here
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
    """Makes a folder and its parents if needed; raises ValueError if a file is in the way."""
    there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
    if os.path.lexists(there) and not there.is_dir():
        what = "is not a folder" if there == path else f"cannot be made: {there} is a file"
        raise ValueError(f"{path} {what}; name another one, or move that file away")
    path.mkdir(parents=True, exist_ok=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_fully(descriptor: int, buffer: memoryview, *, offset: int) -> int:
    """Reads from an open file until the buffer is full or the file ends; returns the bytes read."""
    done = 0
    while count := os.preadv(descriptor, [buffer[done:]], offset + done):
        done += count
    return done


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed; False if another process holds the lock.

    The kernel releases it however the process ends.
    """
    try:
        # not a file with a process id: containers can share a folder
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Returns whether this path still names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes the folder if needed, and keeps other processes from writing to it in this context.

    The lock is on a file in the folder that names host and process. The kernel releases it when the
    process ends; over NFS, when the client is gone. A file system without locks gets a warning: a
    second writer takes the file over there, as it does if NFS clients do not share locks.

    Yields:
        A function to call before writing: RuntimeError if another process has taken over.

    Raises ValueError: another process, which is named, writes there, or nobody can.
    """
    path = folder / LOCK_NAME
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    token = secrets.token_hex(4)  # containers can share host names and process ids
    name = f"process {os.getpid()} on {socket.gethostname()}, since {now} ({token})"
    descriptor = _open_locked(path)

    def check() -> None:
        with contextlib.suppress(FileNotFoundError):  # the folder was removed
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
            path.unlink()  # a process that has opened it by now notices, and opens it again
            folder.rmdir()  # fails, as it should, if anything was written
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        try:
            make_folder(path.parent)
            try:
                descriptor, _ = open_regular(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # the last writer has just removed the folder
                continue
        except NotRegularError as error:
            raise ValueError(str(error)) from error
        except OSError as error:
            if error.errno not in _NO_PLACE_TO_WRITE:
                raise
            raise ValueError(
                f"{path.parent.absolute()} cannot be written to ({error.strerror}): choose a "
                "folder that you can write to"
            ) from error
        try:
            is_free = lock(descriptor)
        except OSError as error:
            logger.warning(
                "%s: no locks there (%s): make sure that only one program at a time writes there",
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
    """Makes a folder for this context, and removes those that killed programs have left."""
    root = root or Path(tempfile.gettempdir())
    for old in root.glob(f"{prefix}*/{LOCK_NAME}"):
        with contextlib.suppress(OSError), locked(old) as is_unused:
            if is_unused:
                shutil.rmtree(old.parent, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as name:
            path = Path(name) / LOCK_NAME
            with locked(path) as is_ours:
                # a program that starts now can remove it before it is locked
                if is_ours and path.exists():
                    yield Path(name)
                    return


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Locks a file, which is made if needed; yields False if another process holds the lock.

    `wait` polls until it is free, and counts as progress: the holder can work for hours, and its
    own watchdog ends it if it hangs. The holder may remove the file. On a file system without locks
    nobody waits.
    """
    while True:
        descriptor, _ = open_regular(path, os.O_RDWR | os.O_CREAT, mode=0o666)
        try:
            try:
                while not (is_ours := lock(descriptor)) and wait:
                    mark_progress()
                    time.sleep(_POLLED_SECONDS)
            except OSError:
                if not wait:
                    raise
                is_ours = True
            is_there = is_at(descriptor, path)
            if is_there or not wait:
                yield is_ours and is_there
                return
        finally:
            os.close(descriptor)
