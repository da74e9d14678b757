"""Reads what a user has - class folders, zips, lists - into one list of items to pack.

A source says for each picture where its bytes are and which captions and labels it has, as the
source spells them. Joining label spaces is the business of `class_names`, opening pictures that of
the workers. What is passed over or cannot be packed is never dropped in silence: it is counted by
name, or stays in the list with its problem and ends in quarantine.csv.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unicl_fast.tools.entries import Entry, EntryError, RefusedEntry, Tree
from unicl_fast.tools.picture_files import open_tree

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
IMAGE_COLUMNS = ("image", "file", "path")
CAPTION_COLUMNS = ("caption", "captions")
LABEL_COLUMNS = ("label", "labels")

NOT_PICTURES = frozenset(
    f".{extension}"
    for group in (
        "txt csv tsv json jsonl md rst xml html htm yaml yml toml ini cfg log pdf",
        "py sh db pkl npy npz mat h5 idx zip tar gz tgz mp3 wav mp4 avi mov",
    )
    for extension in group.split()
)
"""Extensions passed over in class folders; a file with any other, or none, is tried."""

MAX_TEXTS = 65_535
"""Captions, and labels, that the packed format counts for one sample."""
_TOO_MANY = "too many texts"

Label = str | int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why an item cannot be packed: a short `kind` to count by, and a sentence."""

    kind: str
    message: str


@dataclass(slots=True)
class Item:
    """One sample to be: a picture, and its texts and labels as the source spells them."""

    name: str
    """The picture's name inside its source."""
    entry: Entry | None = None
    captions: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Everything one SOURCE argument stands for."""

    name: str
    items: list[Item]
    has_class_folders: bool
    """Whether labels are names of folders; a list may hold numbers that only mean something
    together with a list of class names."""
    passed_over: Counter[str]
    """How many files or rows were not looked at, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """How to read lists; empty names take the first usual one that is there."""

    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""
    image_root: str = ""
    """Folder or zip that picture paths are relative to; by default the folder of the list."""
    where: Sequence[str] = ()
    """`column=value` conditions that a row must meet, all of them."""


Row = dict[str, Any] | Problem


def read_source(place: str, options: ListOptions | None = None) -> Source:
    """Reads one source.

    Args:
        place: a folder of class folders, a zip of one (`FILE.zip` or `FILE.zip/FOLDER`), or a list
            (.csv, .tsv, .jsonl).
        options: for lists.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not such a thing; the message says what to do.
    """
    path = Path(place)
    if path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        return _read_list(path, options or ListOptions())
    return _read_class_folders(path)


def _read_class_folders(path: Path) -> Source:
    """Class = name of the folder that directly holds the picture."""
    items: list[Item] = []
    passed_over: Counter[str] = Counter()
    for name, entry in open_tree(path).entries():
        *folders, file_name = name.split("/")
        suffix = os.path.splitext(file_name)[1].lower()
        if isinstance(entry, RefusedEntry):
            problem = Problem(kind=entry.kind, message=entry.message)
            items.append(Item(name, problem=problem))
        elif any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            passed_over["hidden files"] += 1
        elif suffix in NOT_PICTURES:
            passed_over[f"{suffix} files"] += 1
        elif folders:
            items.append(Item(name, entry, labels=[folders[-1]]))
        else:
            problem = Problem(
                kind="no class",
                message="the picture lies in no class folder; expected for example cat/1.jpg",
            )
            items.append(Item(name, problem=problem))
    if not items:
        raise ValueError(
            f"{path} holds no pictures; expected class folders with pictures in them, such as "
            f"{path}/cat/1.jpg"
        )
    return Source(
        name=path.name or str(path), items=items, has_class_folders=True, passed_over=passed_over
    )


def _read_list(path: Path, options: ListOptions) -> Source:
    """Rows with the same picture are one sample with all their captions and labels."""
    tree = open_tree(Path(options.image_root) if options.image_root else path.parent)
    conditions = [split_condition(condition) for condition in options.where]
    read_rows = _csv_rows if path.suffix.lower() in (".csv", ".tsv") else _jsonl_rows
    header = _column_names(read_rows(path))
    if not header:
        raise ValueError(f"{path} has no rows that can be read")
    columns = _choose_columns(path, header, options, conditions)
    items: dict[str, Item] = {}
    broken: list[Item] = []
    passed_over: Counter[str] = Counter()
    for line, row in read_rows(path):
        if isinstance(row, Problem):
            broken.append(Item(f"line {line}", problem=row))
            continue
        if not all(_matches(row.get(column), value) for column, value in conditions):
            passed_over["rows that --where left out"] += 1
            continue
        name = row.get(columns.image)
        if not isinstance(name, str) or not name:
            problem = Problem(kind="bad row", message=f"no picture path in {columns.image!r}")
            broken.append(Item(f"line {line}", problem=problem))
            continue
        if name not in items:
            items[name] = _find_picture(tree, name)
        _add_texts(items[name], row, columns, line)
    if not items and not broken:
        left = ", ".join(options.where)
        raise ValueError(f"{path} has no rows" + (f" with {left}" if left else ""))
    for item in items.values():
        if item.problem is None and not item.captions and not item.labels:
            item.problem = Problem(kind="no text", message="neither a caption nor a label")
    return Source(
        name=path.name,
        items=[*items.values(), *broken],
        has_class_folders=False,
        passed_over=passed_over,
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    image: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]


def _column_names(rows: Iterable[tuple[int, Row]]) -> list[str]:
    """All names in order of appearance: JSON rows need not have the same ones."""
    names: dict[str, None] = {}
    for _, row in rows:
        if not isinstance(row, Problem):
            names.update(dict.fromkeys(row))
    return list(names)


def _choose_columns(
    path: Path, header: list[str], options: ListOptions, conditions: list[tuple[str, str]]
) -> _Columns:
    """Finds the columns to read. JSON rows may say `caption` here and `captions` there."""

    def choose(wanted: str, usual: tuple[str, ...], option: str) -> tuple[str, ...]:
        if wanted and wanted not in header:
            raise ValueError(f"{path} has no column {wanted!r} ({option}); it has {header}")
        return (wanted,) if wanted else tuple(name for name in usual if name in header)

    images = choose(options.image_column, IMAGE_COLUMNS, "--image-column")
    captions = choose(options.caption_column, CAPTION_COLUMNS, "--caption-column")
    labels = choose(options.label_column, LABEL_COLUMNS, "--label-column")
    for column, _ in conditions:
        choose(column, (), "--where")
    if not images:
        raise ValueError(
            f"{path} has no column {' or '.join(IMAGE_COLUMNS)}; name the one with picture paths "
            f"by --image-column. It has {header}"
        )
    if not captions and not labels:
        raise ValueError(
            f"{path} has neither captions nor labels in columns of the usual names; name them by "
            f"--caption-column or --label-column. It has {header}"
        )
    return _Columns(images[0], captions, labels)


def _find_picture(tree: Tree, name: str) -> Item:
    """A whole path is as good as one relative to the root, if it leads there."""
    if ".." in name.split("/"):
        problem = Problem(kind="outside", message="paths must stay inside the image root")
        return Item(name, problem=problem)
    try:
        entry = tree.find(name)
        if isinstance(entry, RefusedEntry):
            raise EntryError(entry.kind, entry.message)
        return Item(name, entry)
    except EntryError as error:
        return Item(name, problem=Problem(kind=error.kind, message=str(error)))


def _add_texts(item: Item, row: dict[str, Any], columns: _Columns, line: int) -> None:
    """Adds a row's captions and labels, each once; a wrong type is the item's problem."""
    if item.problem is not None and item.problem.kind == _TOO_MANY:
        return
    captions: list[str] = []
    labels: list[Label] = []
    for column in columns.captions:
        for caption in _values(row.get(column)):
            if isinstance(caption, str):
                captions.append(caption)
            else:
                item.problem = _bad_value(line, column, caption)
    for column in columns.labels:
        for label in _values(row.get(column)):
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                item.problem = _bad_value(line, column, label)
            elif label not in (-1, "-1"):  # the usual sign for none
                labels.append(label)
    item.captions = _merge(item.captions, captions)
    item.labels = _merge(item.labels, labels)
    if max(len(item.captions), len(item.labels)) > MAX_TEXTS:
        message = f"more than {MAX_TEXTS:,} captions or labels"
        item.problem = Problem(kind=_TOO_MANY, message=message)


def _merge(known: list[Any], new: list[Any]) -> list[Any]:
    """Both, each value once, in order. A row with one value is the usual case, and made cheap."""
    if len(new) == 1:
        return known if new[0] in known else [*known, *new]
    return list(dict.fromkeys([*known, *new]))


def _values(value: Any) -> list[Any]:
    """A field as a list, without blanks."""
    values = value if isinstance(value, list) else [value]
    return [
        entry
        for entry in values
        if entry is not None and not (isinstance(entry, str) and not entry.strip())
    ]


def _bad_value(line: int, column: str, value: Any) -> Problem:
    return Problem(kind="bad row", message=f"line {line}: {column} holds {value!r}")


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their line numbers; the first line names the columns."""
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
                if len(fields) == len(header):
                    yield reader.line_num, dict(zip(header, fields, strict=True))
                else:
                    message = f"{len(fields)} fields where the header has {len(header)}"
                    yield reader.line_num, Problem(kind="bad row", message=message)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """One JSON object a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Problem(kind="bad row", message=f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, Problem(kind="bad row", message="not a JSON object")


def split_condition(condition: str) -> tuple[str, str]:
    """Column and value of a `--where` condition.

    Raises:
        ValueError: it is not COLUMN=VALUE.
    """
    column, equals, value = condition.partition("=")
    if not equals or not column:
        raise ValueError(f"--where takes COLUMN=VALUE, not {condition!r}")
    return column, value


def _matches(found: Any, wanted: str) -> bool:
    if isinstance(found, list):
        return any(_matches(entry, wanted) for entry in found)
    return str(found) == wanted
