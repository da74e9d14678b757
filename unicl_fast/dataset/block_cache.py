"""Ranges of remote files, read in blocks that a bounded local folder keeps for all processes.

A block is a file named by its whole file's checksum. It is fetched once, written aside under a
lock, and renamed; its bytes are counted before, so the limit holds even after crashes. fsspec's
caches have no limit and are not shared while they fill (96 requests for our 32).
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import PixelsInfo, ShardInfo
from unicl_fast.dataset.object_store import ObjectStore
from unicl_fast.system.atomic_files import is_at, lock
from unicl_fast.system.untrusted_files import open_regular

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
LargeFiles = Mapping[str, ShardInfo | PixelsInfo]
"""Files read in ranges, by name; numbered in this order."""

DEFAULT_CACHE_BYTES = 20_000_000_000
DEFAULT_BLOCK_BYTES = 4 << 20
_PART = ".part"
_FILLED_TO = 0.8
"""Fraction of the limit kept when making room, so that one listing of blocks serves many."""
_TOUCH_SECONDS = 10.0  # a block used more recently is not touched again
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.002, 0.02
_OWN_TURN_SECONDS = 5.0
_LOCK_PATIENCE_SECONDS = 300.0
"""Longer than all tries of a request: only a suspended holder (not a killed one) takes so long."""
_MOST_ROUNDS = 20
"""After so many rounds in which others stored and removed a block, the cache is bypassed."""
_COUNT_DIGITS = 20
# Faults of the folder, which must not stop training.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """Folder and size of the cache of remote data sets."""

    folder: Path | None = None
    """None uses unicl_fast in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    max_bytes: int = DEFAULT_CACHE_BYTES
    """Largest total size of blocks; arrays of data sets come on top."""
    block_bytes: int = DEFAULT_BLOCK_BYTES
    """Size of a block, and of a request."""

    @property
    def place(self) -> Path:
        if self.folder is not None:
            return self.folder
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "unicl_fast"


class BlockCache:
    """The blocks of one folder, safe in several threads and processes."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Creates the folder; of several processes' limits the smallest holds while it reads."""
        self._blocks = folder / "blocks"
        self._max_bytes = max_bytes
        self._blocks.mkdir(parents=True, exist_ok=True)
        self._lock_path = folder / "blocks.lock"
        self._own_turn = threading.Lock()
        self._failed = False

    @contextlib.contextmanager
    def opened(self, name: str, size: int, fetch: Callable[[], bytes]) -> Iterator[int | bytes]:
        """Opens a block: yields a descriptor, or its bytes if they were just fetched.

        `name`, FOLDER/NAME, identifies the content for ever. Errors of `fetch` are passed on.
        """
        for _ in range(_MOST_ROUNDS):
            if (file := self._open(name, size)) is not None:
                try:
                    yield file
                finally:
                    os.close(file)
                return
            if (data := self._store(name, size, fetch)) is not None:
                yield data
                return
        yield fetch()

    def read_into(
        self, name: str, size: int, view: memoryview, start: int, fetch: Callable[[], bytes]
    ) -> None:
        """Fills `view` with a block's bytes from `start` on; otherwise as `opened`."""
        with self.opened(name, size, fetch) as stored:
            if isinstance(stored, int):
                if os.preadv(stored, [view], start) == len(view):
                    return
                stored = fetch()  # truncated since it was opened
        view[:] = stored[start : start + len(view)]

    def ensure(self, name: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Fetches a block ahead of use, unless it is stored or being fetched."""
        if (file := self._open(name, size)) is not None:
            os.close(file)
        else:
            self._store(name, size, fetch, wait=False)

    def discard(self, name: str) -> None:
        """Removes a block with wrong bytes."""
        with contextlib.suppress(OSError):
            (self._blocks / name).unlink()

    def _open(self, name: str, size: int) -> int | None:
        """Opens a stored block and marks it as used; removes one of another size."""
        path = self._blocks / name
        try:
            file = open_regular(path)[0]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self._complain(error)
            return None
        status = os.fstat(file)
        if status.st_size != size:  # after a power cut: the name reached the disk first
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
        """Fetches and stores a block; None if another has stored it or (without `wait`) does."""
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
            pass  # its holder is suspended: bypass the cache this once
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._complain(error)
        return fetch() if data is None and wait else data

    @contextlib.contextmanager
    def _alone_with(self, path: Path, *, wait: bool) -> Iterator[int | None]:
        """Locks the partial file; yields None if the block is stored, or locked without `wait`."""
        part = f"{path}{_PART}"
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open_regular(part, os.O_RDWR | os.O_CREAT)[0]
            try:
                if not lock(file):
                    if not wait:
                        yield None
                        return
                    _wait_for_lock(file)
                # the previous holder may have renamed or removed the file that we opened
                is_ours, is_stored = is_at(file, part), path.exists()
                if is_stored:
                    if is_ours:
                        os.unlink(part)
                    yield None
                    return
                if is_ours:
                    try:
                        yield file
                    except BaseException:
                        with contextlib.suppress(OSError):
                            os.unlink(part)
                        raise
                    return
            finally:
                os.close(file)

    def _make_room(self, size: int) -> None:
        """Makes room for a block and counts its bytes, before they are fetched."""
        # Threads queue here, so that one per process polls for the lock: nine of them delayed each
        # other by 20 ms a block. With a time limit, since a fork may have copied it locked.
        mine = self._own_turn.acquire(timeout=_OWN_TURN_SECONDS)
        file = open_regular(self._lock_path, os.O_RDWR | os.O_CREAT)[0]
        try:
            _wait_for_lock(file, longest=_FIRST_WAIT_SECONDS)
            text = os.pread(file, _COUNT_DIGITS + 1, 0)  # an invalid count means full
            used = int(text) if len(text) == _COUNT_DIGITS and text.isdigit() else self._max_bytes
            if used + size > self._max_bytes:
                used = self._remove_oldest(size)
            os.pwrite(file, b"%0*d" % (_COUNT_DIGITS, used + size), 0)
        finally:
            os.close(file)
            if mine:
                self._own_turn.release()

    def _remove_oldest(self, size: int) -> int:
        """Removes the least recently used blocks until `size` more fit; returns the total left."""
        found, total = [], 0
        for folder, _, names in os.walk(self._blocks):
            for name in names:
                path = os.path.join(folder, name)
                if name.endswith(_PART):
                    total += 0 if _remove_if_left(path) else size  # counted in full
                    continue
                with contextlib.suppress(OSError):  # removed meanwhile
                    status = os.stat(path)
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
                "CACHE: blocks cannot be kept in %s (%s), and are read from the store each time; "
                "make room there or set data.cache_folder",
                self._blocks, error,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CachedFile:
    """An object read in blocks."""

    store: ObjectStore
    name: str
    num_bytes: int
    identity: str
    """Identifies its content, together with its size; 16 hexadecimal digits."""


class Ranges(NamedTuple):
    """k ranges: sizes[i] bytes from offsets[i] of file numbers[i], for starts[i] of a buffer."""

    numbers: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    starts: Int64Array

    def take(self, which: npt.NDArray[Any]) -> "Ranges":
        return Ranges(*(values[which] for values in self))


class BlockReader:
    """Reads ranges of large files through the cache; safe in several threads and after a fork."""

    def __init__(
        self, file_of: Callable[[int], CachedFile], cache: BlockCache, *, block_bytes: int
    ) -> None:
        self._file_of = file_of
        self._cache, self._block_bytes = cache, block_bytes
        self._closed = False
        self._counting = threading.Lock()
        self.num_bytes_read = 0

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were.

        Raises FileNotFoundError, StorageError, or ValueError if the reader is closed.
        """
        if self._closed:
            raise ValueError(f"{self._file_of(number).store.url} has been closed")
        view, done = buffer.data, 0
        wanted = min(len(view), max(0, self._file_of(number).num_bytes - offset))
        while done < wanted:
            block, start = divmod(offset + done, self._block_bytes)
            name, size, fetch = self._block(number, block)
            count = min(wanted - done, size - start)
            self._cache.read_into(name, size, view[done : done + count], start, fetch)
            done += count
        self._count(done)
        return done

    def read_ranges(self, ranges: Ranges, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Reads many ranges, as `LocalReader`, opening each block once; may raise OSError."""
        whole = np.zeros(len(ranges.numbers), np.bool_)
        for number in np.unique(ranges.numbers).tolist():
            mine = np.flatnonzero(ranges.numbers == number)
            with contextlib.suppress(FileNotFoundError):
                whole[mine] = self._read_ranges_of(number, ranges.take(mine), buffer)
        return whole

    def _read_ranges_of(
        self, number: int, ranges: Ranges, buffer: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.bool_]:
        from unicl_fast.system.kernels import pread_ranges  # here, because it loads Numba

        _, offsets, sizes, starts = ranges
        whole = np.zeros(len(offsets), np.bool_)
        blocks = offsets // self._block_bytes
        inside = (offsets + sizes - 1) // self._block_bytes == blocks
        inside &= offsets + sizes <= self._file_of(number).num_bytes
        for i in np.flatnonzero(~inside).tolist():
            part = buffer[starts[i] : starts[i] + sizes[i]]
            with contextlib.suppress(FileNotFoundError):
                whole[i] = self.read_into(number, part, int(offsets[i])) == len(part)
        for block in np.unique(blocks[inside]).tolist():
            mine = np.flatnonzero(inside & (blocks == block))
            within = offsets[mine] - block * self._block_bytes
            name, block_size, fetch = self._block(number, block)
            with (
                contextlib.suppress(FileNotFoundError),
                self._cache.opened(name, block_size, fetch) as stored,
            ):
                if isinstance(stored, int):
                    files = np.full(len(mine), stored, np.int32)
                    places = within, sizes[mine], buffer, starts[mine]
                    whole[mine] = pread_ranges(files, *places)
                    continue
                data = np.frombuffer(stored, np.uint8)
                for i, begin in zip(mine.tolist(), within.tolist(), strict=True):
                    part = data[begin : begin + sizes[i]]
                    buffer[starts[i] : starts[i] + sizes[i]] = part
                whole[mine] = True
        self._count(int(sizes[whole & inside].sum()))  # the others are counted already
        return whole

    def fetch_ahead(self, number: int, block: int) -> None:
        """Fetches a block into the cache, unless it is there or being fetched."""
        name, size, fetch = self._block(number, block)
        if size > 0 and not self._closed:
            self._cache.ensure(name, size, fetch)

    def discard(self, number: int, offset: int, size: int) -> None:
        """Removes cached blocks of a range that turned out to be wrong."""
        place = (np.array([value]) for value in (number, offset, size))
        for number, block in blocks_in(*place, block_bytes=self._block_bytes):
            self._cache.discard(self._block(number, block)[0])

    def close(self) -> None:
        """Closes the reader; reading afterwards raises ValueError."""
        self._closed = True

    def _block(self, number: int, block: int) -> tuple[str, int, partial[bytes]]:
        """The name of a block in the cache, its size, and a function that fetches it."""
        file = self._file_of(number)
        start = block * self._block_bytes
        end = min(start + self._block_bytes, file.num_bytes)
        name = f"{file.identity}-{file.num_bytes}-{self._block_bytes}/{block:08d}"
        return name, end - start, partial(file.store.read, file.name, start, end)

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.num_bytes_read += num_bytes


def blocks_in(
    numbers: Int64Array, offsets: Int64Array, sizes: Int64Array, *, block_bytes: int
) -> list[tuple[int, int]]:
    """The blocks of some ranges of files, (file, block) once each, in order."""
    first = offsets // block_bytes
    last = (offsets + np.maximum(sizes, 1) - 1) // block_bytes
    ranges = zip(numbers.tolist(), first.tolist(), last.tolist(), strict=True)
    blocks = [(number, i) for number, start, end in ranges for i in range(start, end + 1)]
    return list(dict.fromkeys(blocks))


class _StuckError(Exception):
    """A lock was held longer than any request needs."""


def _wait_for_lock(file: int, *, longest: float = _LONGEST_WAIT_SECONDS) -> None:
    """Acquires a lock by polling, since a blocking call could not be abandoned."""
    pause, end = _FIRST_WAIT_SECONDS, time.monotonic() + _LOCK_PATIENCE_SECONDS
    while not lock(file):
        if time.monotonic() > end:
            raise _StuckError
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _remove_if_left(path: str) -> bool:
    """Removes an unfinished block if its writer died; returns whether it is gone."""
    try:
        file = open_regular(path, os.O_RDWR)[0]
    except OSError:
        return True
    try:
        if left := lock(file) and is_at(file, path):
            os.unlink(path)
        return left
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
