"""Blocks of remote files in a local folder: bounded, shared by all processes of a machine.

A block is a file of its own, written aside and renamed, so one of the right name is whole. Who
wants a block that is not there takes the lock on the file aside (flock: the kernel lets go of it
when its holder dies, by SIGKILL too); the others wait for it and then read what it wrote, so each
block is fetched once. Before a block is fetched its bytes are added to a count in the folder; where
they would pass the limit, the blocks that were used longest ago make room, and the count is taken
anew from what is there. So what a killed process leaves makes the folder smaller than it may be,
never larger. The folder should lie on a disk of the machine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.system.atomic_files import is_at, lock, read_fully

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 20_000_000_000
DEFAULT_BLOCK_BYTES = 4 << 20
_PART = ".part"
_FILLED_TO = 0.8
"""Where room is made, that much of the limit stays: one look at all blocks serves many."""
_TOUCH_SECONDS = 10.0
"""A block that was used so short a time ago need not be marked as used again."""
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.002, 0.02
_OWN_TURN_SECONDS = 5.0
_LOCK_PATIENCE_SECONDS = 300.0
"""Longer than all tries of a request: only a holder that was stopped, not killed, takes as long."""
_MOST_ROUNDS = 20
"""A block that others store and remove again so often is read past the cache."""
_COUNT_DIGITS = 20
# What is wrong with the folder, and no reason not to train.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """Where bytes of remote data sets are kept, how many, and in pieces of which size."""

    folder: Path | None = None
    """None takes unicl_fast in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    max_bytes: int = DEFAULT_CACHE_BYTES
    """Of blocks. A data set's arrays lie in the folder beside that."""
    block_bytes: int = DEFAULT_BLOCK_BYTES
    """Of one block, and so of one request."""

    @property
    def place(self) -> Path:
        if self.folder is not None:
            return self.folder
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "unicl_fast"


class BlockCache:
    """The blocks of one folder. Safe in several threads and processes."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Makes the folder.

        Args:
            folder: of this cache; blocks lie in `blocks` below it.
            max_bytes: most that all blocks take together. Where processes differ, the smallest
                limit holds while that process reads.

        Raises:
            OSError: the folder cannot be made.
        """
        self._blocks = folder / "blocks"
        self._max_bytes = max_bytes
        self._blocks.mkdir(parents=True, exist_ok=True)
        self._lock_path = folder / "blocks.lock"
        self._own_turn = threading.Lock()
        self._failed = False

    def read_into(
        self, name: str, size: int, view: memoryview, start: int, fetch: Callable[[], bytes]
    ) -> None:
        """Fills `view` with a block's bytes from `start` on; fetches the block if need be.

        Args:
            name: of the block, FOLDER/NAME; says what is in it, for ever.
            size: bytes of the whole block.
            view: of at most size - start bytes.
            start: first byte in the block.
            fetch: gives the whole block; whatever it raises comes as it is.
        """
        for _ in range(_MOST_ROUNDS):
            if self._read_stored(name, size, view, start):
                return
            data = self._store(name, size, fetch)
            if data is not None:
                break
        else:
            data = fetch()
        view[:] = data[start : start + len(view)]

    @contextlib.contextmanager
    def opened(self, name: str, size: int, fetch: Callable[[], bytes]) -> Iterator[int | bytes]:
        """A block for many reads: a descriptor, or its bytes where it could not be kept."""
        for _ in range(_MOST_ROUNDS):
            file = self._open(name, size)
            if file is not None:
                break
            data = self._store(name, size, fetch)
            if data is not None:
                yield data
                return
        else:
            yield fetch()
            return
        try:
            yield file
        finally:
            os.close(file)

    def ensure(self, name: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Fetches a block ahead of its use, unless it is there or on its way."""
        file = self._open(name, size)
        if file is not None:
            os.close(file)
            return
        self._store(name, size, fetch, wait=False)

    def discard(self, name: str) -> None:
        """Forgets a block, whose bytes are not what they should be."""
        with contextlib.suppress(OSError):
            (self._blocks / name).unlink()

    def _read_stored(self, name: str, size: int, view: memoryview, start: int) -> bool:
        file = self._open(name, size)
        if file is None:
            return False
        try:
            return read_fully(file, view, offset=start) == len(view)
        finally:
            os.close(file)

    def _open(self, name: str, size: int) -> int | None:
        """Opens a block that is there, and marks it as used; one of another size is forgotten."""
        path = self._blocks / name
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self._complain(error)
            return None
        status = os.fstat(file)
        if status.st_size != size:  # after a machine went down: the name was on the disk first
            os.close(file)
            self.discard(name)
            return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(file)
        return file

    def _store(
        self, name: str, size: int, fetch: Callable[[], bytes], *, wait: bool = True
    ) -> bytes | None:
        """Fetches a block and keeps it.

        Returns:
            The block; None if another has stored it meanwhile, or (without `wait`) is at it.
        """
        path = self._blocks / name
        data: bytes | None = None
        try:
            with self._alone_with(path, wait=wait) as part:
                if part is None:
                    return None
                self._make_room(size)
                data = fetch()
                os.ftruncate(part, 0)
                _write_all(part, data)
                os.rename(f"{path}{_PART}", path)
                return data
        except _StuckError:
            pass  # whoever is at it was stopped: for this once without a cache
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._complain(error)
        return fetch() if data is None and wait else data

    @contextlib.contextmanager
    def _alone_with(self, path: Path, *, wait: bool) -> Iterator[int | None]:
        """The locked file beside a block; None if the block is there, or not to be waited for."""
        part = f"{path}{_PART}"
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _lock(file, wait=wait):
                    yield None
                    return
                # who had the lock may have renamed or removed what we opened
                if is_at(file, part):
                    if path.exists():
                        os.unlink(part)
                        yield None
                        return
                    try:
                        yield file
                    except BaseException:
                        with contextlib.suppress(OSError):
                            os.unlink(part)
                        raise
                    return
                if path.exists():
                    yield None
                    return
            finally:
                os.close(file)

    def _make_room(self, size: int) -> None:
        """Counts bytes that are to come, after making room for them where there is none."""
        with self._counting() as file:
            used = _read_count(file)
            if used is None or used + size > self._max_bytes:
                used = self._remove_oldest(size)
            os.pwrite(file, b"%0*d" % (_COUNT_DIGITS, used + size), 0)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[int]:
        # Threads queue here, so that one of each process asks for the lock again and again: nine of
        # them held each other up for 20 ms a block. Not for ever: a fork may have copied it locked.
        mine = self._own_turn.acquire(timeout=_OWN_TURN_SECONDS)
        file = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, wait=True, longest=_FIRST_WAIT_SECONDS)
            yield file
        finally:
            os.close(file)
            if mine:
                self._own_turn.release()

    def _remove_oldest(self, size: int) -> int:
        """Removes what was used longest ago until `size` more fit; returns what is left.

        Every block that somebody is writing counts in full, whatever is written of it yet.
        """
        found = []
        total = 0
        for folder, _, names in os.walk(self._blocks):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                except OSError:  # gone meanwhile
                    continue
                if name.endswith(_PART):
                    total += 0 if _remove_if_left(path) else size
                else:
                    total += status.st_size
                    found.append((status.st_mtime, status.st_size, path))
        if total + size > self._max_bytes:
            target = _FILLED_TO * self._max_bytes - size
            for _, num_bytes, path in sorted(found):
                if total <= target:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= num_bytes
        return total

    def _complain(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            logger.error(
                "CACHE: blocks cannot be kept in %s (%s): what is needed twice is read twice from "
                "the store; make room there or set data.cache_folder",
                self._blocks, error,
            )  # fmt: skip


class _StuckError(Exception):
    """A lock was held for longer than any request takes."""


def _lock(file: int, *, wait: bool, longest: float = _LONGEST_WAIT_SECONDS) -> bool:
    """Takes the lock on an open file; False if another has it and it is not waited for.

    By asking again and again: a call that waits in the kernel could not be given up.

    Raises:
        _StuckError: another has had it for too long.
    """
    pause, end = _FIRST_WAIT_SECONDS, time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        if lock(file):
            return True
        if not wait:
            return False
        if time.monotonic() > end:
            raise _StuckError
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _remove_if_left(path: str) -> bool:
    """Removes an unfinished block whose writer is gone; whether it was one."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        if not _lock(file, wait=False) or not is_at(file, path):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(file)


def _read_count(file: int) -> int | None:
    text = os.pread(file, _COUNT_DIGITS + 1, 0)
    return int(text) if len(text) == _COUNT_DIGITS and text.isdigit() else None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
