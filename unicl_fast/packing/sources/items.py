"""Samples to be packed, as every reader gives them: items, and the entries that hold their images.

An `Item` is an image with the texts and labels that its source gives it, or the problem for which
it cannot be packed. An `Entry` says where the bytes of an image lie. It is small, and a worker
process reads it with one seek: without the directory of its archive, and without a library for the
format that holds it. Entries of folders and zips are in `trees`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import io
import math
import operator
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from unicl_fast.images.codec import encode_png
from unicl_fast.system.wording import shorten

MAX_FILE_BYTES = 512_000_000
"""Size of the largest file read as an image; no larger one could be used in training."""
_READ_BYTES = 1 << 20
MAX_TEXTS = 65_535
"""Captions, and labels, that the packed format counts for one sample."""
TOO_MANY = "too many texts"
MAX_CAPTION_BYTES = 100_000
"""Size of the longest caption that is read, in UTF-8. Encoders see its first words, and tokenizing
takes 140 bytes of memory for each byte."""

LOW_SCORE = "low score"
"""The kind of rows that `--min-score` leaves out."""
LEFT_OUT = "rows that --where left out"
FAILED_DOWNLOADS = "failed downloads of img2dataset"
"""Both are counted in `Source.passed_over` by several readers."""

Label = str | int
"""A class as its source spells it: a name, a key or a number; see also `spell_classes`."""


class EntryError(ValueError):
    """Says why a file cannot be read: a short `kind` to count by, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Entry(Protocol):
    """One file that can be read anywhere, any time."""

    @property
    def num_bytes(self) -> int:
        """The size as listed; a hint for dividing work."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Returns the bytes, or raises `EntryError`, also for more than `max_bytes`."""


@functools.cache
def field_names(kind: type[Entry]) -> tuple[str, ...]:
    """Returns the fields of an entry, in order: entries are stored and compared by them."""
    return tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


def fields_of(entry: Entry) -> tuple[Any, ...]:
    """Returns an entry as values, of which its class makes it again."""
    return _getter(type(entry))(entry)


@functools.cache
def _getter(kind: type[Entry]) -> Callable[[Entry], tuple[Any, ...]]:
    names = field_names(kind)
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda entry: tuple(getattr(entry, name) for name in names)


def check_file_size(num_bytes: int, max_bytes: int) -> None:
    """Raises `EntryError` for a file of too many bytes."""
    if num_bytes > max_bytes:
        message = f"{num_bytes:,} bytes; files of at most {max_bytes:,} are read"
        raise EntryError("too large", message)


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    """A file that is listed but never read, for a reason that its listing shows."""

    kind: str
    message: str
    num_bytes: int = 0

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        raise EntryError(self.kind, self.message)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a file that are an image's file: a member of a tar, for example."""

    path: str
    offset: int
    num_bytes: int

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return read_span(self.path, self.offset, self.num_bytes)


@dataclass(frozen=True, slots=True)
class Base64Span:
    """Part of a text file that is an image's file in base64 (RFC 4648, with padding)."""

    path: str
    offset: int
    num_characters: int

    @property
    def num_bytes(self) -> int:
        return self.num_characters // 4 * 3

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        try:
            text = read_span(self.path, self.offset, self.num_characters)
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise EntryError("damaged", f"not base64: {error}") from error


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
    """An image of a raw data set; read as a PNG of exactly these pixels."""

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
        where = f"{path}, offset {offset}"
        message = f"{where}: the image's bytes are not those that were packed (checksum)"
        raise EntryError("damaged", message)
    return data


def read_span(path: str, offset: int, num_bytes: int) -> bytes:
    """Returns exactly these bytes of a regular file, or raises `EntryError`."""
    try:
        with open_regular(path) as file:
            file.seek(offset)
            data = file.read(num_bytes)
    except OSError as error:
        raise EntryError("unreadable", error.strerror or str(error)) from error
    if len(data) < num_bytes:
        raise EntryError("damaged", f"{path} has shrunk since it was listed")
    return data


def open_regular(path: str) -> io.BufferedReader:
    """Opens a regular file; anything else is an OSError."""
    return open(open_descriptor(path)[0], "rb")


def open_descriptor(path: str) -> tuple[int, int]:
    """Opens a regular file, as a descriptor, and returns its size too; else raises OSError.

    Opening a device can have effects (a tape rewinds), so the file is looked at first; and again
    once it is open, since it may be another one by then. The call does not block: a pipe that lies
    among images must not stop the program.
    """
    if stat.S_ISREG(os.stat(path).st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return descriptor, status.st_size
        os.close(descriptor)
    raise OSError(f"{path} is not a regular file")


def read_regular(path: str, *, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file; raises OSError, or `EntryError` for too many.

    With a Python file object 900 bytes take 12 us instead of 7, since it asks the kernel for more.
    """
    descriptor, size = open_descriptor(path)
    try:
        check_file_size(size, max_bytes)
        # `read` takes memory for all that it is asked for, which for `max_bytes` takes longer than
        # reading a small file
        data = os.read(descriptor, size + 1)
        if len(data) == size:
            return data
        parts, num_bytes = [data], len(data)  # cut short; or some files, as of /proc, have no size
        while data and num_bytes <= max_bytes:
            data = os.read(descriptor, _READ_BYTES)
            parts.append(data)
            num_bytes += len(data)
    finally:
        os.close(descriptor)
    check_file_size(num_bytes, max_bytes)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason why an item cannot be packed: a short `kind` to count by, and a sentence."""

    kind: str
    message: str


@dataclass(slots=True)
class Item:
    """A sample to be packed: an image, and its texts and labels as the source spells them."""

    name: str
    """The image's name inside its source."""
    entry: Entry | None = None
    captions: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    problem: Problem | None = None
    source: str = ""
    """The name of its source, if it is not that of the SOURCE that it was read from: a packed data
    set knows where its samples came from."""


def refused(name: str, kind: str, message: str) -> Item:
    """Returns an item that cannot be packed."""
    return Item(name, problem=Problem(kind, message))


def spell_classes(names: Sequence[str]) -> list[str]:
    """Labels that tell the classes of one list apart, though some may have equal names.

    The built-in names of ImageNet have 'missile' and 'sunglasses' twice. A label is the name, a
    zero byte, and how many classes before it have the same name.
    """
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        labels.append(f"{name}\0{seen[name]}")
        seen[name] += 1
    return labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Everything that one SOURCE argument stands for."""

    name: str
    items: Sequence[Item]
    """Made anew each time they are read where there may be many (`spool.ItemStore`): changes to
    one are lost."""
    labels_are_names: bool
    """Whether labels are names though they may look like numbers: folders, or classes that the
    source itself names. A list may hold numbers that mean something only together with a list of
    class names."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files or rows were passed over, by reason."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list, or fields of a description, that are read."""

    image: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """How lists are read; an empty name takes the first usual one that is there."""

    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""
    image_root: str = ""
    """Folder or zip that image paths are relative to; by default the folder of the list."""
    where: Sequence[str] = ()
    """`COLUMN=VALUE` conditions, all of which a row must meet."""
    min_score: Sequence[str] = ()
    """`COLUMN=NUMBER`: rows with less there, or no number, have the problem `too_low` finds."""

    def conditions(self) -> list[tuple[str, str]]:
        """`where` as columns and values; what is not COLUMN=VALUE is a ValueError."""
        for condition in self.where:
            if condition.find("=") < 1:
                raise ValueError(f"--where takes COLUMN=VALUE, not {condition!r}")
        return [
            (column, value) for column, _, value in (each.partition("=") for each in self.where)
        ]

    def scores(self) -> list[tuple[str, float]]:
        """`min_score` as columns and numbers; what is not COLUMN=NUMBER is a ValueError."""
        found = []
        for condition in self.min_score:
            column, _, value = condition.rpartition("=")
            try:
                found.append((column, float(value)))
            except ValueError:
                column = ""
            if not column or math.isnan(found[-1][1]):
                raise ValueError(f"--min-score takes COLUMN=NUMBER, not {condition!r}")
        return found

    def text_columns(self, captions: tuple[str, ...], labels: tuple[str, ...]) -> Columns:
        """The columns of texts, with these for those that are not named."""
        return Columns(
            "",
            (self.caption_column,) if self.caption_column else captions,
            (self.label_column,) if self.label_column else labels,
        )


def choose_columns(
    path: object,
    header: Sequence[str],
    options: ListOptions,
    find: Callable[[str], tuple[str, ...]],
    *,
    no_image: str,
) -> Columns:
    """Chooses the columns of a list: those that the options name, else those of usual names.

    `find` returns the columns with a usual name for an `image`, `caption` or `label`; `no_image` is
    the error where there is none with images.

    Raises:
        ValueError: a column that an option names, of images, or of any text is not there.
    """
    named = {
        "image": options.image_column,
        "caption": options.caption_column,
        "label": options.label_column,
    }
    asked = [(name, f"--{what}-column") for what, name in named.items() if name]
    asked += [(column, "--where") for column, _ in options.conditions()]
    asked += [(column, "--min-score") for column, _ in options.scores()]
    for column, option in asked:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r} ({option}); it has {header}")
    images, captions, labels = ((name,) if name else find(what) for what, name in named.items())
    if not images:
        raise ValueError(no_image)
    if not captions and not labels:
        raise ValueError(
            f"{path} has neither captions nor labels in columns of the usual names; name them by "
            f"--caption-column or --label-column. It has {header}"
        )
    return Columns(images[0], captions, labels)


def meets(row: dict[str, Any], conditions: Sequence[tuple[str, str]]) -> bool:
    """Whether a row has all the values that `--where` asks for."""
    return all(_matches(row.get(column), value) for column, value in conditions)


def too_low(row: dict[str, Any], scores: Sequence[tuple[str, float]]) -> Problem | None:
    """The problem of a row whose scores are below those that `--min-score` asks for."""
    for column, lowest in scores:
        value = row.get(column)
        try:
            is_enough = float(value) >= lowest  # type: ignore[arg-type]  # or it is no number
        except (TypeError, ValueError, OverflowError):
            is_enough = False
        if not is_enough:
            return Problem(LOW_SCORE, f"{column} is {shorten(value)}, below {lowest:g}")
    return None


def _matches(found: Any, wanted: str) -> bool:
    if isinstance(found, list):
        return any(_matches(entry, wanted) for entry in found)
    return str(found) == wanted


def add_texts(item: Item, row: dict[str, Any], columns: Columns, where: str) -> None:
    """Adds a row's captions and labels, each once; a value of a wrong type is the item's problem.

    A field of the row is one value or a list. `where` is the row in words, for messages.
    """
    if item.problem is not None and item.problem.kind == TOO_MANY:
        return
    captions: list[str] = []
    labels: list[Label] = []
    for column in columns.captions:
        for caption in _values(row.get(column)):
            if not isinstance(caption, str):
                item.problem = _bad_value(where, column, caption)
            elif (size := len(caption.encode(errors="surrogatepass"))) > MAX_CAPTION_BYTES:
                message = f"{size:,} bytes; captions of at most {MAX_CAPTION_BYTES:,} are read"
                item.problem = Problem("too long", f"{where}: {column} holds {message}")
            else:
                captions.append(caption)
    for column in columns.labels:
        for label in _values(row.get(column)):
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                item.problem = _bad_value(where, column, label)
            elif label not in (-1, "-1"):  # the usual sign for none
                labels.append(label)
    join_rows(item, captions, labels)


def _values(value: Any) -> list[Any]:
    """Returns a field as a list, without blanks."""
    values = value if isinstance(value, list) else [value]
    return [
        entry
        for entry in values
        if entry is not None and not (isinstance(entry, str) and not entry.strip())
    ]


def _bad_value(where: str, column: str, value: Any) -> Problem:
    return Problem("bad row", f"{where}: {column} holds {shorten(value, limit=200)}")


def join_rows(item: Item, captions: list[str], labels: list[Label]) -> None:
    """Adds texts that an item does not have yet; too many are its problem."""
    item.captions = _merge(item.captions, captions)
    item.labels = _merge(item.labels, labels)
    if max(len(item.captions), len(item.labels)) > MAX_TEXTS:
        item.problem = Problem(TOO_MANY, f"more than {MAX_TEXTS:,} captions or labels")


def _merge(known: list[Any], new: list[Any]) -> list[Any]:
    """Returns both, each value once, in order. A row with one value, the usual case, is cheap."""
    if len(new) == 1:
        return known if new[0] in known else [*known, *new]
    return list(dict.fromkeys([*known, *new]))


def require_text(item: Item) -> None:
    """Gives an item without captions and labels its problem, once all rows have been read."""
    if item.problem is None and not item.captions and not item.labels:
        item.problem = Problem("no text", "neither a caption nor a label")


class JoinedTexts:
    """The captions and labels of samples with the same image, each once, in order."""

    def __init__(self, captions: Iterable[str], labels: Iterable[Any]) -> None:
        self.captions = dict.fromkeys(captions)
        self.labels = dict.fromkeys(labels)

    def add(self, captions: Iterable[str], labels: Iterable[Any]) -> bool:
        """Adds those of one more sample; adds nothing if that were more than a sample can have.

        A placeholder may stand for any number of images, and must then stay several samples, so
        that no text is lost.
        """
        new_captions = dict.fromkeys(text for text in captions if text not in self.captions)
        new_labels = dict.fromkeys(label for label in labels if label not in self.labels)
        counts = len(self.captions) + len(new_captions), len(self.labels) + len(new_labels)
        if max(counts) > MAX_TEXTS:
            return False
        self.captions |= new_captions
        self.labels |= new_labels
        return True
