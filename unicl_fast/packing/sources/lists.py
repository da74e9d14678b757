"""Lists of images: CSV, TSV, JSONL and JSON with one image a row, and maps of zips.

A row names an image by its path and says which captions and labels it has. Rows of the same
image become one sample.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from unicl_fast.packing.sources.entries import EntryError, RefusedEntry, Tree
from unicl_fast.packing.sources.item_store import NamedItems
from unicl_fast.packing.sources.items import (
    LEFT_OUT,
    Columns,
    Item,
    ListOptions,
    Problem,
    Source,
    add_texts,
    meets,
    require_column,
    require_text_columns,
    split_condition,
)
from unicl_fast.packing.sources.json_stream import iter_elements
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.trees import Trees, open_tree

IMAGE_COLUMNS = ("image", "file", "path")
CAPTION_COLUMNS = ("caption", "captions")
LABEL_COLUMNS = ("label", "labels")

MAP_ENDING = "map.txt"
"""`train_map.txt` says what `train.zip` holds, as the data loaders of Swin and UniCL have it."""

Row = dict[str, Any] | Problem
"""Fields by column, or why the row cannot be read."""


def read_list(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads a .csv, .tsv, .jsonl or .json with a row for each image, or several."""
    read_rows = _ROW_READERS[path.suffix.lower()]
    conditions = [split_condition(condition) for condition in options.where]
    header = _column_names(read_rows(path))
    if not header:
        raise ValueError(f"{path} has no rows that can be read")
    columns = _choose_columns(path, header, options, conditions)
    tree = open_tree(Path(options.image_root) if options.image_root else path.parent)
    return collect_rows(
        path, read_rows(path), columns, conditions, lambda name: find_image(tree, name), spool
    )


def read_map(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads `train_map.txt`: lines PATH<TAB>NUMBER, paths in the zip beside it, or ZIP@PATH.

    The zip of `train_map.txt` is `train.zip`; `--image-root` names another, or a folder.
    """
    root = Path(options.image_root) if options.image_root else _zip_of_map(path)
    trees = Trees()

    def find(name: str) -> Item:
        archive, at, inside = name.rpartition("@")
        place = path.parent / archive if at else root
        if ".." in archive.split("/") or archive.startswith("/"):
            return Item(name, problem=Problem(kind="outside", message="the zip lies elsewhere"))
        try:
            tree = trees.find(place)
        except (OSError, ValueError) as error:
            if not at:
                raise
            return Item(name, problem=Problem(kind="missing", message=str(error)))
        item = find_image(tree, inside.lstrip("/") if at else name)
        item.name = name
        return item

    columns = Columns("image", (), ("label",))
    conditions = [split_condition(condition) for condition in options.where]
    return collect_rows(path, _map_rows(path), columns, conditions, find, spool)


def _zip_of_map(path: Path) -> Path:
    stem = path.name.lower().removesuffix(MAP_ENDING).rstrip("_-.")
    return path.with_name(path.name[: len(stem)] + ".zip") if stem else path.parent


def collect_rows(
    path: Path,
    rows: Iterable[tuple[int, Row]],
    columns: Columns,
    conditions: list[tuple[str, str]],
    find: Callable[[str], Item],
    spool: Spool,
) -> Source:
    """Makes samples of rows; rows with the same image are one, with all their texts.

    Args:
        path: the list.
        rows: with their line numbers.
        columns: which to take.
        conditions: what `--where` asks for.
        find: makes the item of an image that is named for the first time.
        spool: has room for the items.

    Raises:
        ValueError: there are no rows.
    """
    items, broken = spool.new_items(), spool.new_items()
    named = NamedItems(items)
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
            problem = Problem(kind="bad row", message=f"no image path in {columns.image!r}")
            broken.append(Item(f"line {line}", problem=problem))
            continue
        number = named.find(name)
        item = find(name) if number is None else Item(name)
        add_texts(item, row, columns, f"line {line}")
        if number is None:
            item.place = line
            named.append(item)
        else:
            items.add_row(number, item)
    if not items and not broken:
        left = ", ".join("=".join(condition) for condition in conditions)
        raise ValueError(f"{path} has no rows" + (f" with {left}" if left else ""))
    items.extend(broken)
    return Source(
        name=path.name,
        items=items,
        labels_are_names=False,
        passed_over=passed_over,
    )


def _column_names(rows: Iterable[tuple[int, Row]]) -> list[str]:
    """All names in order of appearance: JSON rows need not have the same ones."""
    names: dict[str, None] = {}
    for _, row in rows:
        if not isinstance(row, Problem):
            names.update(dict.fromkeys(row))
    return list(names)


def _choose_columns(
    path: Path, header: list[str], options: ListOptions, conditions: list[tuple[str, str]]
) -> Columns:
    """Finds the columns to read. JSON rows may say `caption` here and `captions` there."""

    def choose(wanted: str, usual: tuple[str, ...], option: str) -> tuple[str, ...]:
        if wanted:
            require_column(path, wanted, header, option)
            return (wanted,)
        return tuple(name for name in usual if name in header)

    images = choose(options.image_column, IMAGE_COLUMNS, "--image-column")
    captions = choose(options.caption_column, CAPTION_COLUMNS, "--caption-column")
    labels = choose(options.label_column, LABEL_COLUMNS, "--label-column")
    for column, _ in conditions:
        require_column(path, column, header, "--where")
    if not images:
        raise ValueError(
            f"{path} has no column {' or '.join(IMAGE_COLUMNS)}; name the one with image paths "
            f"by --image-column. It has {header}"
        )
    require_text_columns(path, captions, labels, header)
    return Columns(images[0], captions, labels)


def find_image(tree: Tree, name: str) -> Item:
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


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """One array of JSON objects; "lines" are its elements, counted from 1."""
    for number, (_, row) in enumerate(iter_elements(path), start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, Problem(kind="bad row", message="not a JSON object")


def _map_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """PATH<TAB>NUMBER; the path may hold blanks."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name, _, label = line.decode("utf-8", "surrogateescape").rstrip("\r\n").rpartition("\t")
            if name and "\t" not in name and label.strip().removeprefix("-").isdecimal():
                yield number, {"image": name, "label": int(label)}
            else:
                yield number, Problem(kind="bad row", message="not PATH<TAB>NUMBER")


_ROW_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
}
