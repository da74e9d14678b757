"""Lists of images: CSV, TSV, JSONL and JSON with one image a row, and maps of zips.

A row names an image by its path and says which captions and labels it has. Rows of the same image
become one sample. JSON may be larger than memory, and is read element by element.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from unicl_fast.packing.sources.items import (
    LEFT_OUT,
    Columns,
    EntryError,
    Item,
    ListOptions,
    Problem,
    RefusedEntry,
    Source,
    add_texts,
    meets,
    refused,
    require_column,
    require_text_columns,
    split_condition,
)
from unicl_fast.packing.sources.spool import ItemStore, Spool
from unicl_fast.packing.sources.trees import Tree, Trees, open_tree

IMAGE_COLUMNS = ("image", "file", "path")
CAPTION_COLUMNS = ("caption", "captions")
LABEL_COLUMNS = ("label", "labels")

MAP_ENDING = "map.txt"
"""`train_map.txt` lists what `train.zip` holds, as the data loaders of Swin and UniCL expect."""

Row = dict[str, Any] | Problem
"""The fields by column, or why the row cannot be read."""


def read_list(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads a .csv, .tsv, .jsonl or .json with a row for each image, or several."""
    read_rows = _ROW_READERS[path.suffix.lower()]
    header = _column_names(read_rows(path))
    if not header:
        raise ValueError(f"{path} has no rows that can be read")
    columns = _choose_columns(path, header, options)
    tree = open_tree(Path(options.image_root) if options.image_root else path.parent)
    return _collect_rows(
        path, read_rows(path), columns, options, lambda name: find_image(tree, name), spool
    )


def read_map(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads `train_map.txt`: lines PATH<TAB>NUMBER, paths in the zip beside it, or ZIP@PATH.

    The zip of `train_map.txt` is `train.zip`; `--image-root` names another, or a folder.
    """
    root = Path(options.image_root) if options.image_root else _zip_of_map(path)
    trees = Trees()

    def find(name: str) -> Item:
        archive, at, inside = name.rpartition("@")
        if ".." in archive.split("/") or archive.startswith("/"):
            return refused(name, "outside", "the zip lies elsewhere")
        try:
            tree = trees.find(path.parent / archive if at else root)
        except (OSError, ValueError) as error:
            if not at:
                raise
            return refused(name, "missing", str(error))
        item = find_image(tree, inside.lstrip("/") if at else name)
        item.name = name
        return item

    columns = Columns("image", (), ("label",))
    return _collect_rows(path, _map_rows(path), columns, options, find, spool)


def _zip_of_map(path: Path) -> Path:
    stem = path.name.lower().removesuffix(MAP_ENDING).rstrip("_-.")
    return path.with_name(path.name[: len(stem)] + ".zip") if stem else path.parent


def _collect_rows(
    path: Path,
    rows: Iterable[tuple[int, Row]],
    columns: Columns,
    options: ListOptions,
    find: Callable[[str], Item],
    spool: Spool,
) -> Source:
    """Makes samples of numbered rows; rows with the same image are one, with all their texts.

    `find` makes the item of an image that is named for the first time.

    Raises:
        ValueError: there are no rows.
    """
    conditions = [split_condition(condition) for condition in options.where]
    items, broken = spool.new_items(), spool.new_items()
    passed_over: Counter[str] = Counter()
    for line, row in rows:
        if isinstance(row, Problem):
            broken.append(Item(f"line {line}", problem=row))
            continue
        if not meets(row, conditions):
            passed_over[LEFT_OUT] += 1
            continue
        name = row.get(columns.image)
        if not isinstance(name, str) or not name:
            broken.append(refused(f"line {line}", "bad row", f"no image path in {columns.image!r}"))
            continue
        add_named(items, name, row, columns, line, f"line {line}", find)
    if not items and not broken:
        left = ", ".join(options.where)
        raise ValueError(f"{path} has no rows" + (f" with {left}" if left else ""))
    items.extend(broken)
    return Source(name=path.name, items=items, labels_are_names=False, passed_over=passed_over)


def add_named(
    items: ItemStore,
    name: str,
    row: dict[str, Any],
    columns: Columns,
    position: int,
    where: str,
    find: Callable[[str], Item],
) -> None:
    """Adds a row that names its image: to the item with this name, or to a new one.

    `find` makes the new item, and `where` is the row in words, for messages.
    """
    number = items.find(name)
    item = find(name) if number is None else Item(name)
    add_texts(item, row, columns, where)
    if number is None:
        item.position = position
        items.append_named(item)
    else:
        items.add_row(number, item)


def _column_names(rows: Iterable[tuple[int, Row]]) -> list[str]:
    """Returns all names in order of appearance: JSON rows need not have the same ones."""
    names: dict[str, None] = {}
    for _, row in rows:
        if not isinstance(row, Problem):
            names.update(dict.fromkeys(row))
    return list(names)


def _choose_columns(path: Path, header: list[str], options: ListOptions) -> Columns:
    """Finds the columns to read. JSON rows may say `caption` here and `captions` there."""

    def choose(wanted: str, usual: tuple[str, ...], option: str) -> tuple[str, ...]:
        if wanted:
            require_column(path, wanted, header, option)
            return (wanted,)
        return tuple(name for name in usual if name in header)

    images = choose(options.image_column, IMAGE_COLUMNS, "--image-column")
    captions = choose(options.caption_column, CAPTION_COLUMNS, "--caption-column")
    labels = choose(options.label_column, LABEL_COLUMNS, "--label-column")
    for condition in options.where:
        require_column(path, split_condition(condition)[0], header, "--where")
    if not images:
        raise ValueError(
            f"{path} has no column {' or '.join(IMAGE_COLUMNS)}; name the one with image paths "
            f"by --image-column. It has {header}"
        )
    require_text_columns(path, captions, labels, header)
    return Columns(images[0], captions, labels)


def find_image(tree: Tree, name: str) -> Item:
    """Returns the item of an image; an absolute path is taken if it leads into the tree."""
    if ".." in name.split("/"):
        return refused(name, "outside", "paths must stay inside the image root")
    try:
        entry = tree.find(name)
        if isinstance(entry, RefusedEntry):
            raise EntryError(entry.kind, entry.message)
        return Item(name, entry)
    except EntryError as error:
        return refused(name, error.kind, str(error))


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields rows with their line numbers; the first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = next(reader, None)
            if not header:
                raise ValueError(f"{path} is empty; its first line must name the columns")
            for fields in reader:
                if not fields:
                    continue
                row: Row = dict(zip(header, fields, strict=False))
                if len(fields) != len(header):
                    row = _bad_row(f"{len(fields)} fields where the header has {len(header)}")
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields one JSON object a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _object_in(json.loads(line))
            except (ValueError, RecursionError) as error:
                row = _bad_row(f"not JSON: {error}")
            yield number, row


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the objects of one JSON array; "lines" are its elements, counted from 1."""
    for number, (_, row) in enumerate(iter_elements(path), start=1):
        yield number, _object_in(row)


def _object_in(value: Any) -> Row:
    return value if isinstance(value, dict) else _bad_row("not a JSON object")


def _bad_row(message: str) -> Problem:
    return Problem(kind="bad row", message=message)


def _map_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields lines PATH<TAB>NUMBER; the path may hold blanks."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name, _, label = line.decode("utf-8", "surrogateescape").rstrip("\r\n").rpartition("\t")
            if name and "\t" not in name and label.strip().removeprefix("-").isdecimal():
                yield number, {"image": name, "label": int(label)}
            else:
                yield number, _bad_row("not PATH<TAB>NUMBER")


_ROW_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
}

_BLOCK = 1 << 20
MAX_ELEMENT = 64 << 20
"""Characters of one element, twice which may be held. The outline of a crowd takes some 100,000."""

_decoder = json.JSONDecoder()
_BEHIND_VALUES = frozenset(" \t\r\n,]}:")
_NO_BLANK = re.compile(r"[^ \t\r\n]")


def iter_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields what a JSON file holds, in pieces.

    An array at the top gives its elements, each as ("", element). An object gives for each of its
    fields (name, value), and where the value is an array (name, element) for each element of it.

    Raises:
        ValueError: it is not JSON, or is cut short; what came before has been yielded.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _JsonWindow(file).top()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def first_character(path: Path) -> str:
    """Returns the first character that is no blank: `[` or `{` in files that are read here."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1]


class _JsonWindow:
    """Part of a JSON text, which moves forwards through it.

    ijson, with its parser in C, takes 5.6 s for 154 MB of COCO's instances where this takes 1.7 s
    (it reads the file once for each of the three arrays; its events are no faster). It also holds
    an element of any length, and refuses NaN and integers of more than 64 bits, which cost only
    their row here.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._before = 0
        """Characters of the file before the window."""
        self._ended = False

    def top(self) -> Iterator[tuple[str, Any]]:
        opening = self._peek()
        if opening not in ("[", "{"):
            raise ValueError(f"it begins with {opening!r}, not with [ or {{")
        yield from self._array("") if opening == "[" else self._object()
        if rest := self._peek():
            raise ValueError(f"{rest!r} follows where it should end")

    def _object(self) -> Iterator[tuple[str, Any]]:
        for _ in self._between("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                raise ValueError(f"a field's name at character {self._position:,} is no text")
            self._take(":")
            if self._peek() == "[":
                yield from self._array(name)
            else:
                yield name, self._value()

    def _array(self, name: str) -> Iterator[tuple[str, Any]]:
        for _ in self._between("[", "]"):
            yield name, self._value()

    def _between(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each entry between brackets, which the caller then reads."""
        self._take(opening)
        if self._peek() == closing:
            self._take(closing)
            return
        yield
        while self._take(f",{closing}") == ",":
            yield

    def _value(self) -> Any:
        """Reads the next value as a whole."""
        self._peek()
        wanted = _BLOCK
        while True:
            is_all = self._ended or len(self._text) - self._at > MAX_ELEMENT
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except ValueError as error:  # not JSON, or more digits than Python converts
                if is_all:
                    position = self._before + getattr(error, "pos", self._at)
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"at character {position:,}: {reason}") from error
            else:
                # a number at the end of the window, as 1 or 1. may be, can continue behind it
                if is_all or self._text[end : end + 1] in _BEHIND_VALUES:
                    self._at = end
                    return value
            self._more(wanted)
            wanted *= 2  # so that a long element is not tried again at every block

    def _take(self, characters: str) -> str:
        """Reads the next character that is no blank, which must be one of these."""
        found = self._peek()
        self._at += len(found)
        if not found or found not in characters:
            wanted, found = " or ".join(characters), repr(found) if found else "the end"
            raise ValueError(f"at character {self._position:,}: {found} where {wanted} should be")
        return found

    def _peek(self) -> str:
        """Returns the next character that is no blank, or nothing at the end."""
        while True:
            if found := _NO_BLANK.search(self._text, self._at):
                self._at = found.start()
                return found.group()
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more(_BLOCK)

    def _more(self, num_characters: int) -> None:
        self._before += self._at
        read = self._file.read(num_characters)
        self._text = self._text[self._at :] + read
        self._at = 0
        self._ended = not read

    @property
    def _position(self) -> int:
        return self._before + self._at
