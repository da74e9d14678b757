"""Reads ranges of a remote data set's large files, block by block, through the cache.

Stands in for `unicl_fast.dataset.file_ranges.ShardReader`. A block is named by the checksum of the
file that it is a part of, so that blocks of a data set that was replaced under its URL are others,
and two copies of a data set share theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.remote.block_cache import BlockCache
from unicl_fast.dataset.remote.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file that is read in blocks."""

    name: str
    num_bytes: int
    xxh3: str
    """Of the whole file, as the manifest has it; never compared, since it is never read whole."""


@dataclass(slots=True)
class Needs:
    """Bytes that were asked for, in this process, however they came."""

    num_bytes: int = 0


class BlockReader:
    """Files of one data set by their number. Safe in several threads, and after a fork."""

    def __init__(
        self,
        store: ObjectStore,
        files: Sequence[RemoteFile],
        cache: BlockCache,
        *,
        block_bytes: int,
    ) -> None:
        """Nothing is fetched before it is read."""
        self._store = store
        self._files = list(files)
        self._cache = cache
        self._block_bytes = block_bytes
        self._closed = False
        self._counting = threading.Lock()
        self.needs = Needs()

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were.

        Raises:
            FileNotFoundError: the object is gone.
            StorageError: it could not be read.
            ValueError: the reader has been closed.
        """
        if self._closed:
            raise ValueError(f"{self._store.url} has been closed")
        view, done = buffer.data, 0
        wanted = min(len(view), max(0, self._files[number].num_bytes - offset))
        while done < wanted:
            block, start = divmod(offset + done, self._block_bytes)
            name, size, fetch = self._block(number, block)
            count = min(wanted - done, size - start)
            self._cache.read_into(name, size, view[done : done + count], start, fetch)
            done += count
        self._count(done)
        return done

    def read_rows(
        self,
        number: int,
        offsets: npt.NDArray[np.int64],
        rows: npt.NDArray[np.uint8],
        places: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Many ranges of equal size, each block opened once; see `pixel_file.PixelFile.read_rows`.

        Args:
            number: of the file.
            offsets: where the ranges begin, int64 [k]: in the file, some multiples of n apart.
            rows: uint8 [b n], contiguous; rows[places[i]] becomes the range of offsets[i].
            places: int64 [k].

        Returns:
            bool [k]: which of them came whole.
        """
        size = rows.shape[1]
        whole = np.zeros(len(offsets), np.bool_)
        blocks = offsets // self._block_bytes
        inside = (offsets + size - 1) // self._block_bytes == blocks
        inside &= offsets + size <= self._files[number].num_bytes
        for i in np.flatnonzero(~inside).tolist():
            whole[i] = self._read_row(number, rows[places[i]], int(offsets[i]))
        from unicl_fast.dataset._pixel_kernels import (
            read_rows,  # here, because writers need no compiler
        )

        for block in np.unique(blocks[inside]).tolist():
            mine = np.flatnonzero(inside & (blocks == block))
            starts = offsets[mine] - block * self._block_bytes
            name, block_size, fetch = self._block(number, block)
            try:
                with self._cache.opened(name, block_size, fetch) as stored:
                    if isinstance(stored, int):
                        first = starts.min()
                        indices = (starts - first) // size
                        whole[mine] = read_rows(stored, first, indices, rows, places[mine])
                    else:
                        data = np.frombuffer(stored, np.uint8)
                        rows[places[mine]] = data[starts[:, None] + np.arange(size)]
                        whole[mine] = True
            except FileNotFoundError:
                pass
        self._count(int(whole[inside].sum()) * size)  # the others were counted
        return whole

    def _read_row(self, number: int, row: npt.NDArray[np.uint8], offset: int) -> bool:
        try:
            return self.read_into(number, row, offset) == len(row)
        except FileNotFoundError:
            return False

    def blocks_of(
        self,
        numbers: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> list[tuple[int, int]]:
        """The blocks that some ranges lie in, each (file, block) once, in the order of need."""
        first = offsets // self._block_bytes
        last = (offsets + np.maximum(sizes, 1) - 1) // self._block_bytes
        found: dict[tuple[int, int], None] = {}
        for number, start, end in zip(numbers.tolist(), first.tolist(), last.tolist(), strict=True):
            for block in range(start, end + 1):
                found[number, block] = None
        return list(found)

    def fetch_ahead(self, number: int, block: int) -> None:
        """Brings a block into the cache, unless it is there or on its way.

        Raises:
            FileNotFoundError: the object is gone.
            StorageError: it could not be read.
        """
        name, size, fetch = self._block(number, block)
        if size > 0 and not self._closed:
            self._cache.ensure(name, size, fetch)

    def discard(self, number: int, offset: int, size: int) -> None:
        """Forgets what the cache holds of a range, which turned out to be wrong."""
        first, last = offset // self._block_bytes, (offset + max(size, 1) - 1) // self._block_bytes
        for block in range(first, last + 1):
            self._cache.discard(self._block(number, block)[0])

    def close(self) -> None:
        """Reading afterwards is an error."""
        self._closed = True

    def _block(self, number: int, block: int) -> tuple[str, int, partial[bytes]]:
        """The name of a block in the cache, its size, and what fetches it."""
        file = self._files[number]
        start = block * self._block_bytes
        end = min(start + self._block_bytes, file.num_bytes)
        name = f"{file.xxh3}-{file.num_bytes}-{self._block_bytes}/{block:08d}"
        return name, end - start, partial(self._store.read, file.name, start, end)

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.needs.num_bytes += num_bytes
