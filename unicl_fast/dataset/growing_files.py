"""The files of a packed data set while they grow: a tar with its DALI index, arrays, a list.

Apart from `shard_writer`, which decides what goes where, these know one file each: its layout,
its checksum, how it gets safely onto the disk, and how it is gone on with after a program died.
"""

from __future__ import annotations

import csv
import math
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import xxhash

from unicl_fast.dataset.arrays import HEADER_BYTES, npy_header
from unicl_fast.dataset.manifest import PixelsInfo
from unicl_fast.dataset.pixels import CHANNELS, PIXEL_DTYPE, PIXELS_NAME
from unicl_fast.dataset.reader import ARRAY_DTYPES, ShardInfo
from unicl_fast.system.checksums import file_checksum

BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)


class ShardFile:
    """A tar in the making, its checksum, and the index that DALI reads."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.file: BinaryIO = (folder / name).open("wb", buffering=1 << 20)
        self.num_bytes = 0
        self._index_path = (folder / name).with_suffix(".idx")
        self._index: list[str] = []
        self._hash = xxhash.xxh3_64()

    def add(self, key: str, members: list[tuple[str, bytes]]) -> int:
        """Appends the members of one sample; returns the offset of the first one's bytes."""
        entries, first = [], self.num_bytes + BLOCK
        for extension, data in members:
            name = f"{key}.{extension}"
            entries.append(f"{extension} {self.num_bytes + BLOCK} {len(data)} {name}")
            padding = bytes(padded_bytes(len(data)) - len(data))
            self._write(b"".join([tar_header(name, len(data)), data, padding]))
        self._index.append(" ".join(entries))
        return first

    def finish(self) -> ShardInfo:
        self._write(END_OF_TAR)
        sync_and_close(self.file)
        with self._index_path.open("w", encoding="ascii") as file:
            file.write(f"v1.2 {len(self._index)}\n")
            file.writelines(f"{line}\n" for line in self._index)
            sync_and_close(file)
        return ShardInfo(
            name=self.name,
            num_samples=len(self._index),
            num_bytes=self.num_bytes,
            xxh3=self._hash.hexdigest(),
        )

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """How much of a growing file was safely on the disk at some moment."""

    num_bytes: int
    xxh3: str
    """Of these bytes without the header, 16 hexadecimal digits."""


class GrowingFile:
    """A file that only grows, apart from a header whose place is kept free at its beginning."""

    def __init__(self, path: Path, *, header_bytes: int = 0, kept: Kept | None = None) -> None:
        """Opens it.

        Args:
            path: of the file.
            header_bytes: left empty at its beginning, for `finish`.
            kept: go on behind these bytes; what follows them goes. None begins a new file.

        Raises:
            ValueError: the file does not hold what was kept.
            FileNotFoundError: it is not there.
        """
        self.file: BinaryIO = path.open("wb" if kept is None else "r+b", buffering=1 << 20)
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
        self.file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def kept(self) -> Kept:
        """What it holds now; only after `sync` is it safe."""
        return Kept(num_bytes=self.num_bytes, xxh3=self._hash.hexdigest())

    def sync(self) -> None:
        """Comes back when all of it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, header: bytes = b"") -> None:
        """Writes the header into its place, and closes the file safely."""
        self.file.seek(0)
        self.file.write(header)
        sync_and_close(self.file)


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
        """By default of the type that the array of this name has, and one-dimensional."""
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
    """A CSV list that grows row by row; see `create_csv` for its spelling."""

    def __init__(self, path: Path, columns: Sequence[str], *, kept: Kept | None = None) -> None:
        super().__init__(path, kept=kept)
        self._rows = _csv_writer(self)
        if kept is None:
            self.write_row(columns)

    def write_row(self, fields: Sequence[str]) -> None:
        self._rows.writerow(fields)

    def write(self, text: str) -> None:
        """What the writer of rows calls."""
        self.append(text.encode("utf-8", "backslashreplace"))


class GrowingPixels:
    """The array of a raw data set's decoded images; the first one says how large all are."""

    def __init__(
        self, folder: Path, *, kept: Kept | None = None, size: tuple[int, int] | None = None
    ) -> None:
        """Opens nothing before the first image, unless there are some already.

        Args:
            folder: of the data set.
            kept: the images that are there.
            size: their height and width.
        """
        self._folder = folder
        self._array: ArrayFile | None = None
        self.size = size
        if size is not None:
            self._array = self._open(size, kept)

    @property
    def num_bytes(self) -> int:
        return 0 if self._array is None else self._array.num_bytes

    @property
    def array(self) -> ArrayFile:
        assert self._array is not None, "a data set has at least one sample"
        return self._array

    def append(self, pixels: bytes, *, height: int, width: int) -> None:
        """Appends one image [h w 3].

        Raises:
            ValueError: it is of another size than the first one, or its bytes are not.
        """
        if self._array is None:
            self.size = height, width
            self._array = self._open(self.size)
        assert self.size is not None
        if (height, width) != self.size or len(pixels) != CHANNELS * math.prod(self.size):
            raise ValueError(
                f"a raw data set has images of one size, {self.size[1]} x {self.size[0]} pixels "
                f"of three bytes here, not {width} x {height} in {len(pixels)} bytes"
            )
        self._array.append(pixels)

    def finish(self) -> PixelsInfo:
        """Closes and syncs the file."""
        self.array.finish()
        assert self.size is not None
        return PixelsInfo(
            height=self.size[0],
            width=self.size[1],
            num_bytes=self.num_bytes,
            # read again: the header, its beginning, is written last
            xxh3=file_checksum(self._folder / PIXELS_NAME),
        )

    def close(self) -> None:
        """For a file that is not wanted any more."""
        if self._array is not None:
            self._array.file.close()

    def _open(self, size: tuple[int, int], kept: Kept | None = None) -> ArrayFile:
        return ArrayFile(
            self._folder,
            PIXELS_NAME.removesuffix(".npy"),
            dtype=PIXEL_DTYPE,
            row_shape=(*size, CHANNELS),
            kept=kept,
        )


def padded_bytes(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _make_tar_template() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o644
    return info.tobuf(format=tarfile.USTAR_FORMAT)


_TAR_TEMPLATE = _make_tar_template()
# of all bytes but name and size; the checksum is taken over blanks in its own place
_TEMPLATE_SUM = sum(_TAR_TEMPLATE) - sum(_TAR_TEMPLATE[124:136] + _TAR_TEMPLATE[148:156]) + 8 * 32


def tar_header(name: str, size: int) -> bytes:
    """A ustar header with name and size only: no time, no owner, the same on every machine.

    A tenth of tarfile's time, which matters when images are smaller than a kilobyte.
    """
    name_bytes, size_bytes = name.encode("ascii"), b"%011o\0" % size
    header = bytearray(_TAR_TEMPLATE)
    header[: len(name_bytes)] = name_bytes
    header[124:136] = size_bytes
    header[148:156] = b"%06o\0 " % (_TEMPLATE_SUM + sum(name_bytes) + sum(size_bytes))
    return bytes(header)


def create_csv(path: Path, columns: Sequence[str]) -> tuple[TextIO, Any]:
    """A list to be written: the open file, and its csv writer, which has written the columns.

    Bytes of a name that are not UTF-8 stand in it as escapes.
    """
    file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    rows = _csv_writer(file)
    rows.writerow(columns)
    return file, rows


def _csv_writer(file: Any) -> Any:
    # all in quotes: Python before 3.13 writes a carriage return without, and reads a new line
    return csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
