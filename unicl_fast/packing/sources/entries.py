"""Entries locate the bytes of an image: in a file, an archive, a table or a packed data set.

A worker process reads an entry with one seek, without its archive's directory: opening ImageNet's
zip in each worker would cost 6 s and 0.9 GB. They are structs, which msgspec stores and pickles in
a microsecond.
"""

import os
import zipfile
import zlib
from typing import BinaryIO

import msgspec
import numpy as np
import xxhash

from unicl_fast.dataset.object_store import StorageError, is_url
from unicl_fast.images.codec import encode_png
from unicl_fast.system.untrusted_files import open_file, read_file

MAX_FILE_BYTES = 512_000_000
"""Size of the largest file read as an image; no larger one could be used in training."""
LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1


class Problem(msgspec.Struct, array_like=True, frozen=True):
    """Why a file, row or item cannot be packed: a short `kind` to count by, and a sentence."""

    kind: str
    message: str


class EntryError(ValueError):
    """A file cannot be read, because of `problem`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(kind, message)


def check_file_size(num_bytes: int, max_bytes: int) -> None:
    """Raises `EntryError` for a file of too many bytes."""
    if num_bytes > max_bytes:
        message = f"{num_bytes:,} bytes; files of at most {max_bytes:,} are read"
        raise EntryError("too large", message)


class _Entry(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """One file that any process can read at any time.

    `num_bytes` is its size as listed, a hint for dividing work. `read` returns its bytes, or raises
    `EntryError`, also for more than `max_bytes`.
    """

    path: str
    """The file or URL that holds it."""


class FileEntry(_Entry, frozen=True):
    """A file in a folder."""

    num_bytes: int
    mtime_ns: int = 0
    """When it was written; shows a resumed build that the file has changed."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        try:
            return read_file(self.path, most_bytes=max_bytes)
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error
        except ValueError as error:
            raise EntryError("too large", str(error)) from error


class Span(_Entry, frozen=True):
    """An image's file inside another file, as one run of bytes: a member of a tar, for example."""

    offset: int
    num_bytes: int

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return read_span(self.path, self.offset, self.num_bytes)


class PackedFile(_Entry, frozen=True):
    """An image's file in a shard of a packed data set."""

    offset: int
    num_bytes: int
    height: int
    width: int
    xxh3: int
    """XXH3-64 of the bytes, taken when they were checked and packed."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return _read_packed(self.path, self.offset, self.num_bytes, self.xxh3)


class PackedPixels(_Entry, frozen=True):
    """An image of a raw data set, read as a PNG with exactly its pixels."""

    offset: int
    height: int
    width: int
    xxh3: int

    @property
    def num_bytes(self) -> int:
        return 3 * self.height * self.width

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        data = _read_packed(self.path, self.offset, self.num_bytes, self.xxh3)
        return encode_png(np.frombuffer(data, np.uint8).reshape(self.height, self.width, 3))


class ZipEntry(_Entry, frozen=True):
    """A file inside a zip, by the zip's directory.

    A zip can lie: sizes and checksums are compared with the data, and nothing is inflated beyond
    its declared size.
    """

    header_offset: int
    packed_bytes: int
    num_bytes: int
    method: int
    crc: int
    flags: int

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        if self.flags & _ENCRYPTED:
            raise EntryError("unreadable", "encrypted inside the zip")
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise EntryError("unreadable", f"zip compression method {self.method} is not known")
        check_file_size(self.num_bytes, max_bytes)
        check_file_size(self.packed_bytes, max_bytes)
        try:
            with open_file(self.path) as file:
                packed = self._read_packed(file)
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error
        data = packed if self.method == zipfile.ZIP_STORED else self._inflate(packed)
        if len(data) != self.num_bytes or zlib.crc32(data) != self.crc:
            raise EntryError("damaged", "the zip's checksum does not fit the file inside it")
        return data

    def _read_packed(self, file: BinaryIO) -> bytes:
        # the data follow the local header, which repeats the name and has an extra field whose
        # length can differ from the directory's (APPNOTE.TXT 4.3.7)
        file.seek(self.header_offset)
        header = file.read(LOCAL_HEADER_BYTES)
        if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise EntryError("damaged", "the zip has no file where its directory says")
        name_bytes = int.from_bytes(header[26:28], "little")
        extra_bytes = int.from_bytes(header[28:30], "little")
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        return file.read(self.packed_bytes)

    def _inflate(self, packed: bytes) -> bytes:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # never more than the directory declares, even if the stream holds more
            return inflater.decompress(packed, self.num_bytes + 1)
        except zlib.error as error:
            raise EntryError("damaged", f"the zip's compressed data are broken: {error}") from error


Entry = FileEntry | Span | PackedFile | PackedPixels | ZipEntry
Found = Entry | Problem
"""A listed file, or why it is not read."""


def _read_packed(path: str, offset: int, num_bytes: int, xxh3: int) -> bytes:
    data = read_span(path, offset, num_bytes)
    if xxhash.xxh3_64_intdigest(data) != xxh3:
        message = f"{path}, offset {offset}: the image's bytes are not those that were packed"
        raise EntryError("damaged", f"{message} (checksum)")
    return data


def read_span(path: str, offset: int, num_bytes: int) -> bytes:
    """Returns exactly these bytes of a regular file or object, or raises `EntryError`."""
    try:
        if is_url(path):
            # here, since workers need its manifest and cache for nothing else
            from unicl_fast.packing.sources.urls import read_range

            data = read_range(path, offset, num_bytes)
        else:
            with open_file(path) as file:
                file.seek(offset)
                data = file.read(num_bytes)
    except (OSError, StorageError) as error:
        raise EntryError("unreadable", getattr(error, "strerror", "") or str(error)) from error
    if len(data) < num_bytes:
        raise EntryError("damaged", f"{path} has shrunk since it was listed")
    return data
