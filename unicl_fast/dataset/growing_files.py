"""The files of a packed data set while they grow, and the journal to resume an interrupted build.

The journal is replaced after each finished shard, once everything is on disk. It says how much of
each file belongs to the shards so far, so that the rest can be truncated.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec
import numpy as np
import xxhash

from unicl_fast.dataset.arrays import ARRAY_DTYPES, HEADER_BYTES, npy_header
from unicl_fast.dataset.manifest import FORMAT_VERSION, ShardInfo
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.untrusted_files import open_file, read_file

_BUFFER_BYTES = 1 << 18  # rows of arrays are a few bytes each
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
        mode = "wb" if kept is None else "r+b"
        self.file: BinaryIO = open_file(path, mode, buffering=_BUFFER_BYTES)
        self.num_bytes = header_bytes
        self._hash = xxhash.xxh3_64()
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

    def append(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self._hash.update(data)
        self.file.write(data)

    def kept(self) -> Kept:
        """Describes its content, which is on disk only after `sync`."""
        return Kept(num_bytes=self.num_bytes, xxh3=self._hash.hexdigest())

    def sync(self) -> None:
        """Returns when everything is on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file as it is, without syncing."""
        self.file.close()

    def finish(self, header: bytes = b"") -> None:
        """Writes the header at the beginning, syncs and closes the file."""
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
        self.append(b"".join(parts))
        self._index.append(" ".join(entries))
        return first

    def finish_shard(self) -> ShardInfo:
        """Ends the tar, writes its index, syncs and closes both."""
        self.append(END_OF_TAR)
        sync_and_close(self.file)
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
        dtype: np.dtype[Any] | None = None,
        row_shape: tuple[int, ...] = (),
        kept: Kept | None = None,
    ) -> None:
        """Opens NAME.npy; by default its rows have the type of the data set's array NAME."""
        super().__init__(folder / f"{name}.npy", header_bytes=HEADER_BYTES, kept=kept)
        self._dtype = ARRAY_DTYPES[name] if dtype is None else dtype
        self._row_shape = row_shape
        self._row_bytes = self._dtype.itemsize * math.prod(row_shape)

    @property
    def length(self) -> int:
        return (self.num_bytes - HEADER_BYTES) // self._row_bytes

    def finish(self, header: bytes = b"") -> None:
        super().finish(header or npy_header(self._dtype, (self.length, *self._row_shape)))


class ListFile(GrowingFile):
    """A CSV list that grows row by row, written as `create_csv` does."""

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
    """Everything that is safely on disk once a shard is finished."""

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


def read_journal(path: Path) -> list[FinishedShard]:
    """The finished shards in order; none without a journal, or if it is damaged."""
    try:
        shards = parse_checksummed_json(read_file(path))["shards"]
        return msgspec.convert(shards, list[FinishedShard])
    except (FileNotFoundError, ValueError):
        return []


def write_journal(path: Path, finished: Sequence[FinishedShard]) -> None:
    """Replaces the journal; returns when it is on disk."""
    shards = [dataclasses.asdict(each) for each in finished]
    write_text_atomically(path, dump_checksummed_json({"shards": shards}))


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


def create_csv(path: Path, columns: Sequence[str]) -> tuple[TextIO, Any]:
    """Starts a list, escaping bytes that are not UTF-8; returns the file and its csv writer."""
    file = open_file(path, "w", encoding="utf-8", errors="backslashreplace", newline="")
    rows = csv_writer(file)
    rows.writerow(columns)
    return file, rows


def csv_writer(file: Any) -> Any:
    # quote everything: Python before 3.13 does not quote a carriage return, and reads a new line
    return csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
