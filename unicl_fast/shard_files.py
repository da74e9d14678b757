"""The files of a packed data set while they grow: a tar with its DALI index, arrays of rows.

Apart from `shard_writer`, which decides what goes where, these know one file each: its layout,
its checksum, and how it gets safely onto the disk.
"""

from __future__ import annotations

import csv
import math
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import xxhash

from unicl_fast.array_files import HEADER_BYTES, npy_header
from unicl_fast.checksums import file_checksum
from unicl_fast.manifest import PixelsInfo
from unicl_fast.pixel_file import CHANNELS, PIXEL_DTYPE, PIXELS_NAME
from unicl_fast.shards import ARRAY_DTYPES, ShardInfo

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


class ArrayFile:
    """A .npy file that grows row by row; its length is filled in at the end."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dtype: np.dtype[Any] | None = None,
        row_shape: tuple[int, ...] = (),
    ) -> None:
        """By default of the type that the array of this name has, and one-dimensional."""
        self.file: BinaryIO = (folder / f"{name}.npy").open("wb", buffering=1 << 20)
        self.file.write(bytes(HEADER_BYTES))
        self.length = 0
        self._dtype = ARRAY_DTYPES[name] if dtype is None else dtype
        self._row_shape = row_shape

    @property
    def num_bytes(self) -> int:
        """Of the whole file so far."""
        return HEADER_BYTES + self.length * self._dtype.itemsize * math.prod(self._row_shape)

    def append(self, data: bytes, *, rows: int = 1) -> None:
        self.file.write(data)
        self.length += rows

    def finish(self) -> None:
        self.file.seek(0)
        self.file.write(npy_header(self._dtype, (self.length, *self._row_shape)))
        sync_and_close(self.file)


class GrowingPixels:
    """The array of a raw data set's decoded pictures; the first one says how large all are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._array: ArrayFile | None = None
        self._height = self._width = 0

    @property
    def num_bytes(self) -> int:
        return 0 if self._array is None else self._array.num_bytes

    def append(self, pixels: bytes, *, height: int, width: int) -> None:
        """Appends one picture [h w 3].

        Raises:
            ValueError: it is of another size than the first one, or its bytes are not.
        """
        if self._array is None:
            self._height, self._width = height, width
            self._array = ArrayFile(
                self._folder,
                PIXELS_NAME.removesuffix(".npy"),
                dtype=PIXEL_DTYPE,
                row_shape=(height, width, CHANNELS),
            )
        size = self._height, self._width
        if (height, width) != size or len(pixels) != CHANNELS * math.prod(size):
            raise ValueError(
                f"a raw data set has pictures of one size, {self._width} x {self._height} pixels "
                f"of three bytes here, not {width} x {height} in {len(pixels)} bytes"
            )
        self._array.append(pixels)

    def finish(self) -> PixelsInfo:
        """Closes and syncs the file."""
        assert self._array is not None, "a data set has at least one sample"
        self._array.finish()
        path = self._folder / PIXELS_NAME
        return PixelsInfo(
            height=self._height,
            width=self._width,
            num_bytes=self._array.num_bytes,
            xxh3=file_checksum(path),  # read again: the header, its beginning, is written last
        )

    def close(self) -> None:
        """For a file that is not wanted any more."""
        if self._array is not None:
            self._array.file.close()


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

    A tenth of tarfile's time, which matters when pictures are smaller than a kilobyte.
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
    # all in quotes: Python before 3.13 writes a carriage return without, and reads a new line
    rows = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    rows.writerow(columns)
    return file, rows


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
