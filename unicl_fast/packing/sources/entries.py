"""What a file in some source is to the rest of packing: a thing with a size that can be read.

An entry is small, can be sent to a worker process, and is read there without its tree. Entries of
folders are in `image_files`, those of zips in `zip_files`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MAX_FILE_BYTES = 512_000_000
"""Largest file read as an image; a larger one is no image that training could use."""


class EntryError(ValueError):
    """Why a file cannot be had: a short `kind` to count by, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Entry(Protocol):
    """One file that can be read anywhere, any time."""

    @property
    def num_bytes(self) -> int:
        """Size as listed; a hint for sharing out work."""
        ...

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The file's bytes, or an `EntryError`, also where there are more than `max_bytes`."""
        ...


@functools.cache
def field_names(kind: type[Entry]) -> tuple[str, ...]:
    """What an entry is made of, in order: entries are dataclasses, stored and compared by fields.

    Raises:
        TypeError: it is no dataclass.
    """
    return tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


class Tree(Protocol):
    """Named files under one root, names with forward slashes."""

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """All files, sorted by name."""
        ...

    def find(self, name: str) -> Entry:
        """The file called `name`, or an `EntryError`."""
        ...


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    """A file that is listed but will not be read, for a reason its listing shows."""

    kind: str
    message: str
    num_bytes: int = 0

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        raise EntryError(self.kind, self.message)


def check_file_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise EntryError(
            "too large", f"{num_bytes:,} bytes; files of at most {max_bytes:,} are read"
        )
