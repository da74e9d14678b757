"""The items of a source while they wait to be packed: in a file, not in memory.

The order of a data set is drawn over all its samples, so all must have been read before the first
is packed, and ten million of them with their texts are gigabytes. What stays in memory is where the
record of each begins, 8 bytes. The file has no name, so the kernel removes it with the process.

Lists speak of an image in several rows, not always one after another. A record is never changed:
what a later row adds is a record of its own that points back to the one before. Names are found
again by an index of checksums, up to 54 bytes a name while a source is read, compared with what is
stored.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import xxhash

from unicl_fast.packing.sources.entries import Entry, field_names
from unicl_fast.packing.sources.items import TOO_MANY, Item, Problem, join_rows, require_text

_HEAD = struct.Struct("<QI")
"""Where the record before it of the same item begins, plus one; and how long this one is."""
_READ_BYTES = 2048
"""Read at once where a record is asked for: it is seldom longer."""
_WINDOW_BYTES = 1 << 18
"""Read at once where all are gone through."""
_BUFFER_BYTES = 1 << 20
_ENCODER = json.JSONEncoder(separators=(",", ":"))


class ItemStore(Sequence[Item]):
    """Items in the order in which they were appended; each is made anew when it is asked for."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is where the file lies; None takes the system's for temporary files."""
        self._folder = folder
        self._file: Any = None
        self._written = 0
        self._buffer = bytearray()
        self._newest = array("Q")
        self._kinds: list[type[Entry]] = []
        """Classes of entries; a record has the number of its."""
        self._numbers: dict[type, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self._get(number, _Window())

    def __iter__(self) -> Iterator[Item]:
        window = _Window(num_bytes=_WINDOW_BYTES)
        return (self._get(number, window) for number in range(len(self)))

    def _get(self, number: int, window: _Window) -> Item:
        records = []
        start = self._newest[number]
        while True:
            before, record = self._read(start, window)
            records.append(record)
            if not before:
                break
            start = before - 1
        item = self._item(records.pop())
        while records:
            _apply(item, records.pop())
        require_text(item)
        return item

    def name_of(self, number: int) -> str:
        """Of an item that no row was added to, or any other: the name never changes."""
        return self[number].name

    def append(self, item: Item) -> int:
        """Adds an item; returns its number."""
        self._newest.append(self._write(0, self._record(item)))
        return len(self._newest) - 1

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def add_row(self, number: int, row: Item) -> None:
        """Adds to an item what one more row says of it: captions, labels, a problem."""
        record = [row.captions, row.labels, _plain(row.problem)]
        self._newest[number] = self._write(self._newest[number] + 1, record)

    def _record(self, item: Item) -> list[Any]:
        fields: list[Any] = []
        kind = -1
        if item.entry is not None:
            made = type(item.entry)
            if made not in self._numbers:
                self._numbers[made] = len(self._kinds)
                self._kinds.append(made)
            kind = self._numbers[made]
            fields = [getattr(item.entry, name) for name in field_names(made)]
        problem = _plain(item.problem)
        return [item.captions, item.labels, problem, item.name, item.place, kind, *fields]

    def _item(self, record: list[Any]) -> Item:
        captions, labels, problem, name, place, kind, *fields = record
        return Item(
            name,
            None if kind < 0 else self._kinds[kind](*fields),
            captions,
            labels,
            None if problem is None else Problem(kind=problem[0], message=problem[1]),
            place,
        )

    def _write(self, before: int, record: list[Any]) -> int:
        """Writes a record; returns where it begins."""
        start = self._written + len(self._buffer)
        data = _ENCODER.encode(record).encode("ascii")
        self._buffer += _HEAD.pack(before, len(data))
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()
        return start

    def _flush(self) -> None:
        try:
            if self._file is None:
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._file.write(self._buffer)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    "no room left for the list of samples, which takes some hundred bytes of each "
                    f"on the disk of --out ({self._folder or tempfile.gettempdir()})",
                ) from error
            raise
        self._written += len(self._buffer)
        self._buffer.clear()

    def _read(self, start: int, window: _Window) -> tuple[int, Any]:
        """A record, and the head's pointer to the one before."""
        if start >= self._written:
            place = start - self._written
            before, length = _HEAD.unpack_from(self._buffer, place)
            place += _HEAD.size
            return before, json.loads(self._buffer[place : place + length].decode("ascii"))
        descriptor = self._file.fileno()
        head = window.read(descriptor, start, _HEAD.size)
        before, length = _HEAD.unpack(head)
        # as text: of bytes, json would first find out their encoding
        text = window.read(descriptor, start + _HEAD.size, length).decode("ascii")
        return before, json.loads(text)


@dataclasses.dataclass(slots=True)
class _Window:
    """Some bytes of a file, so that what lies close together is read at once."""

    num_bytes: int = _READ_BYTES
    start: int = 0
    data: bytes = b""

    def read(self, descriptor: int, start: int, length: int) -> bytes:
        place = start - self.start
        if not 0 <= place <= place + length <= len(self.data):
            forwards = start >= self.start  # a record that one behind it points back to is alone
            num_bytes = self.num_bytes if forwards else min(self.num_bytes, _READ_BYTES)
            self.start, place = start, 0
            self.data = os.pread(descriptor, max(num_bytes, length), start)
        return self.data[place : place + length]


class NamedItems:
    """Finds the items of a store by their names, while rows about them come in any order."""

    def __init__(self, items: ItemStore) -> None:
        self._items = items
        self._count = 0
        self._last = ("", -1)
        """Rows of an image mostly follow each other."""
        self._make_table(1 << 10)

    def find(self, name: str) -> int | None:
        """The number of the item with this name; None if there is none."""
        if self._last[0] == name and self._last[1] >= 0:
            return self._last[1]
        checksum = _checksum(name)
        slot = checksum & self._mask
        while number := self._numbers[slot]:
            if self._checksums[slot] == checksum and self._items.name_of(number - 1) == name:
                self._last = (name, number - 1)
                return number - 1
            slot = (slot + 1) & self._mask
        return None

    def append(self, item: Item) -> int:
        """Adds an item whose name is not known yet; returns its number."""
        if 3 * self._count >= 2 * self._mask:
            self._grow()
        number = self._items.append(item)
        self._put(_checksum(item.name), number + 1)
        self._count += 1
        self._last = (item.name, number)
        return number

    def _put(self, checksum: int, number: int) -> None:
        slot = checksum & self._mask
        while self._numbers[slot]:
            slot = (slot + 1) & self._mask
        self._checksums[slot] = checksum
        self._numbers[slot] = number

    def _make_table(self, size: int) -> None:
        self._mask = size - 1
        self._checksums = array("Q", [0]) * size
        self._numbers = array("I", [0]) * size

    def _grow(self) -> None:
        checksums, numbers = self._checksums, self._numbers
        self._make_table(2 * (self._mask + 1))
        for checksum, number in zip(checksums, numbers, strict=True):
            if number:
                self._put(checksum, number)


def _checksum(name: str) -> int:
    return int(xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")))


def _plain(problem: Problem | None) -> list[str] | None:
    return None if problem is None else [problem.kind, problem.message]


def _apply(item: Item, record: list[Any]) -> None:
    """Adds what one more row says, as if `add_texts` had been called with it."""
    captions, labels, problem = record
    if item.problem is not None and item.problem.kind == TOO_MANY:
        return
    if problem is not None:
        item.problem = Problem(kind=problem[0], message=problem[1])
    join_rows(item, captions, labels)
