"""The files of a packed data set while they grow, and the journal to resume an interrupted build.

A journal line, with its checksum, follows each finished shard once everything is on disk. It says
how much of each file belongs to the shards so far, so that the rest can be truncated.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import xxhash

from unicl_fast.dataset.arrays import HEADER_BYTES, npy_header
from unicl_fast.dataset.manifest import FORMAT_VERSION, ShardInfo
from unicl_fast.system.atomic_files import flush_to_disk
from unicl_fast.system.untrusted_files import open_file

_CHECKSUM_DIGITS = 16
_APPENDED_BYTES = 1 << 18
"""Bytes buffered before they are hashed and written, since rows of arrays are a few bytes each."""
BLOCK = 512  # bytes of a tar header, and the unit of padding
_ZEROS = bytes(BLOCK)
END_OF_TAR = bytes(2 * BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """How much of a growing file was safely on disk at some moment."""

    num_bytes: int
    xxh3: str
    """XXH3-64 of these bytes without the header, 16 hexadecimal digits."""


class GrowingFile:
    """A file that only grows, except for a header that is written last."""

    def __init__(self, path: Path, *, header_bytes: int = 0, kept: Kept | None = None) -> None:
        """Starts a file, or continues it after `kept`; ValueError if that has changed."""
        self.file: BinaryIO = open_file(path, "wb" if kept is None else "r+b")
        self.num_bytes = header_bytes
        self._hash = xxhash.xxh3_64()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        if kept is None:
            self.file.write(bytes(header_bytes))
            return
        self.file.seek(header_bytes)
        while self.num_bytes < kept.num_bytes:
            block = self.file.read(min(1 << 20, kept.num_bytes - self.num_bytes))
            if not block:
                break
            self._hash.update(block)
            self.num_bytes += len(block)
        if self.kept() != kept:
            self.file.close()
            raise ValueError(f"{path} does not hold what was written before the program ended")
        self.file.truncate(kept.num_bytes)
        self.file.seek(kept.num_bytes)

    def append(self, *parts: bytes) -> None:
        size = sum(map(len, parts))
        self.num_bytes += size
        self._waiting += parts
        self._waiting_bytes += size
        if self._waiting_bytes >= _APPENDED_BYTES:
            self._write_waiting()

    def _write_waiting(self) -> None:
        data = b"".join(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        self._hash.update(data)
        self.file.write(data)

    def kept(self) -> Kept:
        """Describes its content, which is on disk only after `sync`."""
        self._write_waiting()
        return Kept(num_bytes=self.num_bytes, xxh3=self._hash.hexdigest())

    def sync(self) -> None:
        """Returns when everything is on disk."""
        self._write_waiting()
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file as it is, without syncing."""
        with self.file:
            self._write_waiting()

    def finish(self, header: bytes = b"") -> None:
        """Writes the header at the beginning, syncs and closes the file."""
        self._write_waiting()
        self.file.seek(0)
        self.file.write(header)
        sync_and_close(self.file)


class ShardFile(GrowingFile):
    """A growing tar, and DALI's index of it."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder / name)
        self._path = folder / name
        self._index: list[str] = []

    def size_with(self, members: list[tuple[str, bytes]]) -> int:
        """Bytes of the complete shard with one more sample."""
        more = self.num_bytes + len(END_OF_TAR)
        for _, data in members:
            more += BLOCK + padded_bytes(len(data))
        return more

    def add(self, key: str, members: list[tuple[str, bytes]]) -> int:
        """Appends the members of one sample; returns the offset of the first one's contents."""
        entries, parts, position = [], list[bytes](), self.num_bytes
        for extension, data in members:
            name, size = f"{key}.{extension}", len(data)
            entries.append(f"{extension} {position + BLOCK} {size} {name}")
            parts += (tar_header(name, size), data, _ZEROS[: -size % BLOCK])
            position += BLOCK + padded_bytes(size)
        first = self.num_bytes + BLOCK
        self.append(*parts)
        self._index.append(" ".join(entries))
        return first

    def finish_shard(self) -> ShardInfo:
        """Ends the tar, writes its index, syncs and closes both."""
        self.append(END_OF_TAR)
        self.finish()
        with open_file(self._path.with_suffix(".idx"), "w", encoding="ascii") as file:
            file.write(f"v1.2 {len(self._index)}\n")
            file.writelines(f"{line}\n" for line in self._index)
            sync_and_close(file)
        return ShardInfo(
            name=self._path.name,
            num_samples=len(self._index),
            num_bytes=self.num_bytes,
            xxh3=self._hash.hexdigest(),
        )


class ArrayFile(GrowingFile):
    """A .npy file that grows row by row; its length is filled in at the end."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dtype: np.dtype[Any],
        row_shape: tuple[int, ...] = (),
        kept: Kept | None = None,
    ) -> None:
        """Opens NAME.npy."""
        super().__init__(folder / f"{name}.npy", header_bytes=HEADER_BYTES, kept=kept)
        self._dtype, self._row_shape = dtype, row_shape
        self._row_bytes = self._dtype.itemsize * math.prod(row_shape)

    @property
    def length(self) -> int:
        return (self.num_bytes - HEADER_BYTES) // self._row_bytes

    def finish(self, header: bytes = b"") -> None:
        super().finish(header or npy_header(self._dtype, (self.length, *self._row_shape)))


class ListFile(GrowingFile):
    """A CSV list that grows row by row; bytes that are not UTF-8 are escaped."""

    def __init__(self, path: Path, columns: Sequence[str], *, kept: Kept | None = None) -> None:
        super().__init__(path, kept=kept)
        self.write_row = csv_writer(self).writerow
        if kept is None:
            self.write_row(columns)

    def write(self, text: str) -> None:
        """The csv writer's output."""
        self.append(text.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedShard:
    """A journal line: everything safely on disk once a shard is finished."""

    shard: ShardInfo
    index_xxh3: str
    """Checksum of the shard's .idx file."""
    num_samples: int
    """Samples in this shard and all earlier ones."""
    num_quarantined: int
    """Rows of the quarantine list."""
    files: Mapping[str, Kept]
    """Kept part of each array, of the list, and of the pixels of a raw data set."""
    image_size: tuple[int, int] | None
    """Height and width of the images of a raw data set."""
    version: int = FORMAT_VERSION
    """The format version that this shard and earlier ones need."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """The caller's JSON values."""

    def to_line(self) -> bytes:
        text = json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode("ascii")
        return xxhash.xxh3_64_hexdigest(text).encode("ascii") + b" " + text + b"\n"


def read_journal(path: Path) -> list[FinishedShard]:
    """The finished shards in order, up to the first incomplete line."""
    found: list[FinishedShard] = []
    with open_file(path) if path.is_file() else contextlib.nullcontext(()) as lines:
        for line in lines:
            checksum, text = line[:_CHECKSUM_DIGITS], line[_CHECKSUM_DIGITS + 1 : -1]
            whole = xxhash.xxh3_64_hexdigest(text).encode("ascii")
            if not line.endswith(b"\n") or checksum != whole:
                break
            found.append(msgspec.convert(json.loads(text), FinishedShard))
    return found


class ShardJournal:
    """The journal while it grows; starts with exactly the lines that were verified."""

    def __init__(self, path: Path, finished: Sequence[FinishedShard]) -> None:
        data = b"".join(each.to_line() for each in finished)
        self._file = open_file(path, "r+b" if path.exists() else "wb", buffering=0)
        # overwritten with the same bytes, then truncated: no verified line is ever missing
        self._file.write(data)
        self._file.truncate(len(data))
        os.fsync(self._file.fileno())
        flush_to_disk(path.parent)

    def append(self, finished: FinishedShard) -> None:
        """Adds a line; returns when it is on disk."""
        self._file.write(finished.to_line())
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def padded_bytes(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


_TAR_TEMPLATE = tarfile.TarInfo("").tobuf(format=tarfile.USTAR_FORMAT)  # its mode is 0644
_AFTER_NAME, _TIME, _REST = _TAR_TEMPLATE[:124], _TAR_TEMPLATE[136:148], _TAR_TEMPLATE[156:]
# sum of all bytes except name and size, with blanks in place of the checksum
_TEMPLATE_SUM = sum(_TAR_TEMPLATE) - sum(_TAR_TEMPLATE[124:136] + _TAR_TEMPLATE[148:156]) + 8 * 32


def tar_header(name: str, size: int) -> bytes:
    """A ustar header with name and size only: no time, no owner, the same on every machine.

    Needs a tenth of tarfile's time, which matters for images smaller than a kilobyte.
    """
    name_bytes, size_bytes = name.encode("ascii"), b"%011o\0" % size
    # Adler-32's low half is 1 + the sum of all bytes, below 65,521, and faster than `sum`
    bytes_sum = (zlib.adler32(name_bytes + size_bytes) & 0xFFFF) - 1
    checksum = b"%06o\0 " % (_TEMPLATE_SUM + bytes_sum)
    fields = (name_bytes, _AFTER_NAME[len(name_bytes) :], size_bytes, _TIME, checksum, _REST)
    return b"".join(fields)


def csv_writer(file: Any) -> Any:
    # quote everything: Python before 3.13 does not quote a carriage return, and reads a new line
    return csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
