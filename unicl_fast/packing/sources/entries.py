"""Entries locate the bytes of an image: in a file, an archive, a table or a packed data set.

A worker process reads an entry with one seek, without its archive's directory. `trees` has the
entries of zips.
"""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from unicl_fast.dataset.object_store import StorageError, is_url
from unicl_fast.images.codec import encode_png
from unicl_fast.system.untrusted_files import open_file, open_regular

MAX_FILE_BYTES = 512_000_000
"""Size of the largest file read as an image; no larger one could be used in training."""
_READ_BYTES = 1 << 20


class EntryError(ValueError):
    """The reason why a file cannot be read: a short `kind` to count by, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Entry(Protocol):
    """One file that any process can read at any time."""

    @property
    def num_bytes(self) -> int:
        """The size as listed; a hint for dividing work."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Returns the bytes; raises `EntryError`, also for more than `max_bytes`."""


@functools.cache
def field_names(kind: type[Entry]) -> tuple[str, ...]:
    """The names of an entry's fields, in order: entries are stored and compared by them."""
    return tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


@functools.cache
def fields_getter(kind: type[Entry]) -> Callable[[Any], tuple[Any, ...]]:
    """A function from an entry of this class to its fields, the arguments of the class."""
    names = field_names(kind)
    if len(names) > 1:  # with one name it would return no tuple
        return operator.attrgetter(*names)
    return lambda entry: tuple(getattr(entry, name) for name in names)


def check_file_size(num_bytes: int, max_bytes: int) -> None:
    """Raises `EntryError` for a file of too many bytes."""
    if num_bytes > max_bytes:
        message = f"{num_bytes:,} bytes; files of at most {max_bytes:,} are read"
        raise EntryError("too large", message)


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    """A file that is listed but never read, for a reason known from its listing."""

    kind: str
    message: str
    num_bytes: int = 0

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        raise EntryError(self.kind, self.message)


@dataclass(slots=True, unsafe_hash=True)
class FileEntry:
    """A file in a folder. Not frozen: that would make it three times as slow to construct."""

    path: str
    num_bytes: int
    mtime_ns: int = 0
    """When it was written; shows a resumed build that the file has changed."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        try:
            return read_regular(self.path, max_bytes=max_bytes)
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error


@dataclass(frozen=True, slots=True)
class Span:
    """An image's file inside another file, as one run of bytes: a member of a tar, for example."""

    path: str
    """Or a URL."""
    offset: int
    num_bytes: int

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return read_span(self.path, self.offset, self.num_bytes)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """An image's file in a shard of a packed data set."""

    path: str
    offset: int
    num_bytes: int
    height: int
    width: int
    xxh3: int
    """XXH3-64 of the bytes, taken when they were checked and packed."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return _read_packed(self.path, self.offset, self.num_bytes, self.xxh3)


@dataclass(frozen=True, slots=True)
class PackedPixels:
    """An image of a raw data set, read as a PNG with exactly its pixels."""

    path: str
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


def read_regular(path: str, *, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file; raises OSError, or `EntryError` for too many."""
    # 7 us for 900 bytes; a Python file object needs 12, with more system calls
    descriptor, size = open_regular(path)
    try:
        check_file_size(size, max_bytes)
        # not `max_bytes`: allocating those would cost more than reading a small file
        data = os.read(descriptor, size + 1)
        if len(data) == size:
            return data
        parts, num_bytes = [data], len(data)  # cut short, or a file without a size, as in /proc
        while data and num_bytes <= max_bytes:
            data = os.read(descriptor, _READ_BYTES)
            parts.append(data)
            num_bytes += len(data)
    finally:
        os.close(descriptor)
    check_file_size(num_bytes, max_bytes)
    return b"".join(parts)
