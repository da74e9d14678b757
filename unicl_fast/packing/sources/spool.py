"""A folder next to the output for data that exceed memory or cannot be read in any order.

The order of a data set is drawn over all its samples, so all must have been read before the first
is packed: the items of all sources wait in an SQLite database. An image in a Parquet file cannot be
reached without unpacking all before it, so such files are unpacked once, in order.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import xxhash

from unicl_fast.packing.sources.entries import Entry, FileEntry, field_names, fields_getter
from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, Problem, join_rows, require_text
from unicl_fast.system.wording import count_of

_CACHE_KILOBYTES = 16_000
"""Memory of the database for any number of samples; 64 MB were not faster."""
READ_ITEMS = 256
"""Items read at once; SQLite below 3.32 allows 999 values in a statement."""
_WRITE_ROWS = 64
_MOST_PENDING_BYTES = 1_000_000
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode


class Spool:
    """The folder, made when it is first needed; it stays for a build that resumes."""

    def __init__(self, folder: Path | None, *, takes_loose: bool = False) -> None:
        """Makes nothing yet.

        None allows no file; items then wait in the system's folder for temporary files.
        `takes_loose` puts images that lie in no class folder into a class of their folder's name,
        and treats all folders as classes.
        """
        self._folder = folder
        self.takes_loose = takes_loose
        self._prefix = f"{folder}/"
        self._num_files = 0
        self._database: sqlite3.Connection | None = None
        self._num_stores = 0
        self.origins: list[str] = []
        """Files that sources were made of, other than those that hold the images."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()

    def locate(self, path: str) -> str | None:
        """Returns a file's name in the spool, equal in every build; None for files elsewhere."""
        return path.removeprefix(self._prefix) if path.startswith(self._prefix) else None

    def new_file(self) -> Path:
        """Returns the path for one more file, which the caller makes."""
        if self._folder is None:
            message = "this source must be unpacked to be read, and there is no place for it"
            raise ValueError(message)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        return self._folder / f"{self._num_files:06d}"

    @property
    def has_files(self) -> bool:
        """Whether anything was unpacked."""
        return self._num_files > 0

    def checksum_origins(self) -> str:
        """The number of `origins`, and a checksum of their sizes and times."""
        text = json.dumps([stamp(path) for path in self.origins])
        checksum = xxhash.xxh3_128_hexdigest(text.encode("ascii"))
        return f"{count_of(len(self.origins), 'file')}, checksum {checksum}"

    def new_items(self) -> ItemStore:
        """Returns an empty store for the items of a source."""
        if self._database is None:
            self._database = _open_database(self._folder)
        self._num_stores += 1
        return ItemStore(self._database, self._num_stores, self.locate)


def stamp(path: str) -> tuple[str, int, int]:
    """Returns a file's path, its size and when it was written; zeros for one that is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def _encode(record: tuple[Any, ...]) -> bytes:
    """A record as MessagePack, a fifth of the time of JSON; equal ones give equal bytes."""
    try:
        return _pack(record)
    except (UnicodeEncodeError, OverflowError):  # a name that is no UTF-8, an integer of 65 bits
        return _pack(json.dumps(record))


def _decode(data: bytes) -> list[Any]:
    record = _unpack(data)
    found: list[Any] = json.loads(record) if isinstance(record, str) else record
    return found


def _open_database(folder: Path | None) -> sqlite3.Connection:
    """Opens an empty database in a file without a name, which the kernel removes with the process.

    It holds one transaction that is never committed: nothing of it is to outlive the process.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    descriptor, path = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    try:
        address = f"file:{quote(os.fsencode(path))}?nolock=1"  # some network disks have no locks
        database = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
    finally:
        os.unlink(path)
    for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KILOBYTES}"):
        database.execute(f"PRAGMA {setting}")
    database.execute("BEGIN")
    return database


class ItemStore:
    """Items in the order in which they were appended; each is made anew when it is asked for.

    Lists name an image in several rows, not always one after another. A later row is a record of
    its own. Records are written and read many at a time: a statement for each takes as long as
    reading a small image.
    """

    def __init__(
        self, database: sqlite3.Connection, number: int, locate: Callable[[str], str | None]
    ) -> None:
        """Makes the tables number `number` of a database; `locate` is the spool's."""
        self._database = database
        self._locate = locate
        self._count = 0
        self._num_rows = self._num_captioned = self._num_labelled = 0
        self._last = ("", -1)
        """Name and number of the item found last: rows of an image mostly follow each other."""
        self._kinds: list[type[Entry]] = []
        """Classes of entries; a record has the index of its entry's class."""
        rows, names = f"rows_{number}", f"names_{number}"
        self._rows = rows
        self._pending: list[tuple[int, bytes]] = []
        """Rows that are not in the table yet."""
        self._pending_bytes = 0
        self._insert_row = f"INSERT INTO {rows} VALUES (?, ?)"
        self._insert_name = f"INSERT INTO {names} VALUES (?, ?)"
        self._find_name = f"SELECT item FROM {names} WHERE name = ?"
        # the id of a row is (number of the item << 32) + number of the row
        self._execute(f"CREATE TABLE {rows} (id INTEGER PRIMARY KEY, record BLOB)")
        self._digest = xxhash.xxh3_128()
        self._holders: dict[str, None] = {}
        """Files that hold images of entries which do not know its size and time."""
        self._labels: dict[Label, None] = {}
        self._execute(f"CREATE TABLE {names} (name BLOB PRIMARY KEY, item INTEGER) WITHOUT ROWID")

    @property
    def kinds(self) -> set[type[Entry]]:
        """Classes of the items' entries."""
        return set(self._kinds)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for first in range(0, self._count, READ_ITEMS):
            yield from self.at(range(first, min(first + READ_ITEMS, self._count)))

    def at(self, numbers: Sequence[int]) -> list[Item]:
        """Returns the items of these numbers, in this order; each is one of the store."""
        found: dict[int, Item] = {}
        for start in range(0, len(numbers), READ_ITEMS):
            some = numbers[start : start + READ_ITEMS]
            values = ", ".join(["(?)"] * len(some))
            # CROSS JOIN: SQLite looks up each item's rows, and never walks through the table
            statement = (
                f"WITH wanted (item) AS (VALUES {values}) SELECT id >> 32, record FROM wanted "
                f"CROSS JOIN {self._rows} ON id >= item << 32 AND id < (item + 1) << 32 ORDER BY id"
            )
            if self._pending:
                self._flush()
            found |= self._made_of(self._execute(statement, *some))
        return [found[number] for number in numbers]

    def append(self, item: Item) -> int:
        """Adds an item; returns its number."""
        number, entry, kind = self._count, item.entry, -1
        fields: tuple[Any, ...] = ()
        spelled: tuple[Any, ...] = ()
        if entry is not None:
            if type(entry) not in self._kinds:
                self._kinds.append(type(entry))
            kind = self._kinds.index(type(entry))
            fields = spelled = fields_getter(type(entry))(entry)
            if not isinstance(entry, FileEntry):  # which knows its own time
                spelled = self._spell(entry, fields)
        head = (item.name, item.source, kind)
        self._write(number, item, head, fields, spelled)
        self._count += 1
        return number

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def append_named(self, item: Item) -> int:
        """Adds an item that `find` is to find by its name, which is not known yet."""
        number = self.append(item)
        self._execute(self._insert_name, _as_key(item.name), number)
        self._last = (item.name, number)
        return number

    def find(self, name: str) -> int | None:
        """Returns the number of the item that was appended under this name; None without one."""
        if self._last[0] == name and self._last[1] >= 0:
            return self._last[1]
        for (number,) in self._execute(self._find_name, _as_key(name)):
            self._last = (name, int(number))
            return int(number)
        return None

    def add_row(self, number: int, row: Item) -> None:
        """Adds one more row to an item: captions, labels, a problem."""
        self._write(number, row, ())

    def labels(self) -> dict[Label, None]:
        """All labels, in the order of their first item."""
        if self._num_rows == self._count:
            return self._labels
        # an item with too many texts ignores further labels
        return dict.fromkeys(label for item in self for label in item.labels)

    def notes(self) -> Counter[str]:
        """Counts rows that a user should hear of, in words."""
        notes = Counter({"rows of an image that an earlier row names": self._num_rows - len(self)})
        for what, count in (("caption", self._num_captioned), ("label", self._num_labelled)):
            if count:
                notes[f"rows without a {what}, where others have one"] = self._num_rows - count
        return +notes

    def checksum(self) -> str:
        """The number of items, and XXH3-128 of them and of size and time of the images' files.

        Two builds with the same checksums pack the same, unless somebody changes files and puts
        their times back.
        """
        digest = self._digest.copy()
        stamps = [stamp(path) for path in self._holders]
        digest.update(ascii([[kind.__name__ for kind in self._kinds], stamps]).encode("ascii"))
        return f"{count_of(self._count, 'sample')}, checksum {digest.hexdigest()}"

    def _spell(self, entry: Entry, fields: tuple[Any, ...]) -> tuple[Any, ...]:
        """The fields as they are in every build; notes the file that holds the image."""
        spelled = list(fields)
        for place, name in enumerate(field_names(type(entry))):
            if name in ("path", "archive"):
                inside = self._locate(fields[place])
                if inside is None:
                    self._holders[fields[place]] = None
                else:
                    spelled[place] = f"unpacked {inside}"
        return tuple(spelled)

    def _write(
        self,
        number: int,
        item: Item,
        head: tuple[Any, ...],
        fields: tuple[Any, ...] = (),
        spelled: tuple[Any, ...] = (),
    ) -> None:
        """Writes a row: texts and problem of an item, and its other fields in its first row."""
        problem = item.problem and (item.problem.kind, item.problem.message)
        record = (number, item.captions, item.labels, problem, item.groups, *head)
        data = _encode((*record, *fields))
        self._digest.update(data if spelled is fields else _encode((*record, *spelled)))
        for label in item.labels:
            self._labels[label] = None
        self._pending.append(((number << 32) + self._num_rows, data))
        self._pending_bytes += len(data)
        self._num_rows += 1
        self._num_captioned += bool(item.captions)
        self._num_labelled += bool(item.labels)
        if len(self._pending) >= _WRITE_ROWS or self._pending_bytes > _MOST_PENDING_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        self._run(self._database.executemany, self._insert_row, rows)

    def _made_of(self, rows: list[tuple[int, bytes]]) -> dict[int, Item]:
        """Makes items of their rows, which lie in order; by number."""
        items: dict[int, Item] = {}
        for number, data in rows:
            _, captions, labels, problem, groups, *others = _decode(data)
            if problem is not None:
                problem = Problem(*problem)
            if number not in items:
                name, source, kind, *fields = others
                entry = None if kind < 0 else self._kinds[kind](*fields)
                items[number] = Item(name, entry, captions, labels, problem, groups, source)
            else:
                item = items[number]  # as if `add_texts` had been called with it
                if item.problem is None or item.problem.kind != TOO_MANY:
                    item.problem = problem or item.problem
                    join_rows(item, captions, labels, groups)
        for item in items.values():
            require_text(item)
        return items

    def _execute(self, statement: str, *values: int | bytes) -> list[Any]:
        return self._run(self._database.execute, statement, values).fetchall()

    def _run(
        self, execute: Callable[..., sqlite3.Cursor], statement: str, values: Sequence[Any]
    ) -> sqlite3.Cursor:
        try:
            return execute(statement, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
                raise OSError(
                    errno.ENOSPC,
                    "no room left for the list of samples, which takes some 200 bytes of each on "
                    f"the disk of --out, or without one in {tempfile.gettempdir()}",
                ) from error
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Everything that one SOURCE argument stands for."""

    name: str
    items: ItemStore
    labels_are_names: bool
    """Whether labels are names though they may look like numbers: folders, or classes that the
    source itself names. Numbers in a list may mean something only together with class names."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files or rows were passed over, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """More to say of rows that were read, and of how many."""


def _as_key(name: str) -> bytes:
    """A name as bytes, since it can hold lone surrogates, which SQLite refuses in a text."""
    return name.encode("utf-8", "surrogatepass")
