"""A folder next to the output for data that exceed memory or cannot be read in random order.

All samples are shuffled together, so all must be read before the first is packed: the items of all
sources wait in an SQLite database. An image in a Parquet file cannot be reached without unpacking
all before it, so such files are unpacked once, in order.
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

from unicl_fast.packing.sources.entries import Entry, FileEntry
from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, join_rows, require_text
from unicl_fast.system.wording import count_of

_CACHE_KILOBYTES = 16_000  # memory of the database for any number of samples; 64 MB are not faster
READ_ITEMS = 256  # items read at once; SQLite below 3.32 allows 999 values in a statement
_WRITE_ROWS = 64
_MOST_PENDING_BYTES = 1_000_000
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Item | str).decode


class Spool:
    """The folder, made when first needed; it stays for a build that resumes."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing yet."""
        self._folder = folder
        self._num_files = self._num_stores = 0
        self._database: sqlite3.Connection | None = None
        self.origins: dict[str, None] = {}
        """Files from which sources were read, besides the files of images."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()

    def new_file(self, origin: str) -> Path:
        """Returns the path for one more file, which the caller makes of the file `origin`."""
        self.origins[origin] = None  # or a resumed build would not notice that it has changed
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        return self._folder / f"{self._num_files:06d}"

    @property
    def has_files(self) -> bool:
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
        return ItemStore(self._database, self._num_stores, self._folder)


def stamp(path: str) -> tuple[str, int, int]:
    """A file's path, size and time of writing; zeros if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def _encode(item: Item) -> bytes:
    """An item as MessagePack, five times as fast as JSON; equal items give equal bytes."""
    try:
        return _pack(item)
    except (UnicodeEncodeError, OverflowError):  # a name that is not UTF-8, an integer of 65 bits
        return _pack(json.dumps(msgspec.to_builtins(item)))


def _decode(data: bytes) -> Item:
    found = _unpack(data)
    return msgspec.convert(json.loads(found), Item) if isinstance(found, str) else found


def _open_database(folder: Path) -> sqlite3.Connection:
    """Opens an empty database in an unlinked file, so that nothing outlives the process.

    It runs one transaction that is never committed.
    """
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
    """Items in the order of appending; each read makes a new one.

    Lists can name an image in several rows, not always consecutive; each row is one record. Records
    are written and read many at a time: one statement costs as much as reading a small image.
    """

    def __init__(self, database: sqlite3.Connection, number: int, spool: Path) -> None:
        """Makes the store's two tables in a database; `spool` has the unpacked files, if any."""
        self._database, self._spool = database, f"{spool}/"
        self._count = 0
        self._num_rows = self._num_sound = self._num_captioned = self._num_labelled = 0
        self.has_weights = False
        """Whether any item has a weight."""
        self._last = ("", -1)
        """Name and number of the last item found: an image's rows are mostly consecutive."""
        self.kinds: set[type[Entry]] = set()
        """Classes of the items' entries."""
        rows, names = f"rows_{number}", f"names_{number}"
        self._rows = rows
        self._pending: list[tuple[int, bytes]] = []
        """Rows not yet in the table."""
        self._pending_bytes = 0
        self._insert_row = f"INSERT INTO {rows} VALUES (?, ?)"
        self._insert_name = f"INSERT INTO {names} VALUES (?, ?)"
        self._find_name = f"SELECT item FROM {names} WHERE name = ?"
        # a row's id is (number of its item << 32) + number of the row
        self._execute(f"CREATE TABLE {rows} (id INTEGER PRIMARY KEY, record BLOB)")
        self._digest = xxhash.xxh3_128()
        self._holders: dict[str, None] = {}
        """Files with images whose entries do not know the file's size and time."""
        self._labels: dict[Label, None] = {}
        self._execute(f"CREATE TABLE {names} (name BLOB PRIMARY KEY, item INTEGER) WITHOUT ROWID")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for first in range(0, self._count, READ_ITEMS):
            yield from self.at(range(first, min(first + READ_ITEMS, self._count)))

    def at(self, numbers: Sequence[int]) -> list[Item]:
        """Returns the items with these numbers, in this order."""
        found: dict[int, Item] = {}
        for start in range(0, len(numbers), READ_ITEMS):
            some = numbers[start : start + READ_ITEMS]
            values = ", ".join(["(?)"] * len(some))
            # CROSS JOIN makes SQLite look up each item's rows instead of scanning the table
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
        number, entry = self._count, item.entry
        is_unpacked = False
        if entry is not None:
            self.kinds.add(type(entry))
            if not isinstance(entry, FileEntry):  # a FileEntry knows its time
                is_unpacked = entry.path.startswith(self._spool)
                if not is_unpacked:
                    self._holders[entry.path] = None
        self._write(number, item, is_unpacked=is_unpacked)
        self._count += 1
        return number

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def append_named(self, item: Item) -> int:
        """Adds an item with a new name, by which `find` will find it."""
        number = self.append(item)
        self._execute(self._insert_name, _as_key(item.name), number)
        self._last = (item.name, number)
        return number

    def find(self, name: str) -> int | None:
        """Returns the number of the item with this name; None without one."""
        if self._last[0] == name and self._last[1] >= 0:
            return self._last[1]
        for (number,) in self._execute(self._find_name, _as_key(name)):
            self._last = (name, int(number))
            return int(number)
        return None

    def add_row(self, number: int, row: Item) -> None:
        """Adds another row to an item: captions, labels, a problem."""
        self._write(number, row)

    def labels(self) -> dict[Label, None]:
        """All labels, in the order of their first item."""
        if self._num_rows == self._count:
            return self._labels
        # an item with too many texts ignores further labels
        return dict.fromkeys(label for item in self for label in item.labels)

    def notes(self) -> Counter[str]:
        """Counts rows that users should know about, in words."""
        notes = Counter({"rows of an image that an earlier row names": self._num_rows - len(self)})
        for what, count in (("caption", self._num_captioned), ("label", self._num_labelled)):
            if count:
                notes[f"rows without a {what}, where others have one"] = self._num_sound - count
        return +notes

    def checksum(self) -> str:
        """The number of items, and XXH3-128 of them and of their files' sizes and times.

        Builds with the same checksums pack the same, unless somebody changes files and resets their
        times.
        """
        digest = self._digest.copy()
        stamps = [stamp(path) for path in self._holders]
        digest.update(ascii(stamps).encode("ascii"))
        return f"{count_of(self._count, 'sample')}, checksum {digest.hexdigest()}"

    def _write(self, number: int, item: Item, *, is_unpacked: bool = False) -> None:
        """Writes a row; for the checksum, an unpacked image is known by its name."""
        data = _encode(item)
        spelled = _encode(msgspec.structs.replace(item, entry=None)) if is_unpacked else data
        self._digest.update(number.to_bytes(8, "big") + spelled)
        for label in item.labels:
            self._labels[label] = None
        self._pending.append(((number << 32) + self._num_rows, data))
        self._pending_bytes += len(data)
        self._num_rows += 1
        if item.problem is None:
            self._num_sound += 1
            self._num_captioned += bool(item.captions)
            self._num_labelled += bool(item.labels)
        self.has_weights |= bool(item.weights)
        if len(self._pending) >= _WRITE_ROWS or self._pending_bytes > _MOST_PENDING_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        self._run(self._database.executemany, self._insert_row, rows)

    def _made_of(self, rows: list[tuple[int, bytes]]) -> dict[int, Item]:
        """Makes items of their rows, which are sorted; by number."""
        items: dict[int, Item] = {}
        for number, data in rows:
            row = _decode(data)
            item = items.setdefault(number, row)
            if item is not row and (item.problem is None or item.problem.kind != TOO_MANY):
                item.problem = row.problem or item.problem
                item.weights += row.weights
                join_rows(item, row.captions, row.labels, row.groups)
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
                    "no room left for the list of samples, about 200 bytes for each, on the disk "
                    "of --out",
                ) from error
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The contents of one SOURCE argument."""

    name: str
    items: ItemStore
    labels_are_names: bool
    """Whether labels are names even if they look like numbers: folders, or classes that the source
    names itself. Numbers in a list have a meaning only with class names."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files or rows were skipped, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """Remarks on rows that were read, with their counts."""
    columns: dict[str, dict[Label, None]] = field(default_factory=dict)
    """The labels of each label column; empty if the source has no columns."""


def _as_key(name: str) -> bytes:
    """A name as bytes: it can hold lone surrogates, which SQLite refuses in texts."""
    return name.encode("utf-8", "surrogatepass")
