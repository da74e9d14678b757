"""Lists of images: CSV, TSV, JSONL and JSON with one image a row.

Rows that name the same image become one sample, with all their captions and labels.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unicl_fast.packing.sources.cells import Cells, study_cells
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.json_pieces import iter_elements
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.named_images import NamedImages
from unicl_fast.packing.sources.read_sources import SourceKind
from unicl_fast.packing.sources.rows import LEFT_OUT, add_texts, meets, too_low
from unicl_fast.packing.sources.spool import ItemStore, Source, Spool
from unicl_fast.packing.sources.trees import open_tree
from unicl_fast.system.untrusted_files import open_file

Row = dict[str, Any] | Problem
"""The fields by column, or the problem of a row that cannot be read."""
Rows = Iterator[tuple[int, Row]]
"""Numbered rows."""
Find = Callable[[str], Item]
"""Makes the item of an image, by its name."""


def read_list(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads a .csv, .tsv, .jsonl or .json with one or several rows for each image."""
    read_rows = _ROW_READERS[path.suffix.lower()]

    def rows(_: object = None) -> Iterator[dict[str, Any]]:
        return (row for _, row in read_rows(path) if not isinstance(row, Problem))

    # JSON rows can have different fields, such as `caption` in one and `captions` in another
    header = list(dict.fromkeys(name for row in rows() for name in row))
    if not header:
        raise ValueError(f"{path} has no rows that can be read")
    cells = study_cells(path, header, rows, options)
    images = NamedImages(path, open_tree(Path(options.image_root or path.parent)))
    source = collect_rows(path, read_rows(path), cells, options, images.find, spool)
    images.finish(source)
    source.notes.update(cells.notes)
    return source


def collect_rows(
    path: Path, rows: Rows, cells: Cells, options: ListOptions, find: Find, spool: Spool
) -> Source:
    """Makes samples of rows; calls `find` at an image's first row."""
    columns = cells.columns
    conditions, scores = options.conditions(), options.scores()
    items, broken = spool.new_items(), spool.new_items()
    passed_over: Counter[str] = Counter()
    for number, row in rows:
        line = f"line {number}"
        if isinstance(row, Problem):
            broken.append(Item(line, problem=row))
            continue
        row = cells.with_attributes(row)
        if not meets(row, conditions):
            passed_over[LEFT_OUT] += 1
        elif not (names := cells.images_of(row)):
            where = " or ".join(map(repr, columns.images))
            broken.append(refused(line, "bad row", f"no image path in {where}"))
        elif (low := too_low(row, scores)) is not None:
            broken.append(refused(line, low.kind, f"{', '.join(names)}: {low.message}"))
        else:
            texts = cells.texts_of(row, names)
            for name in names:
                item = Item(name)
                add_texts(item, texts, columns, line)
                add_named(items, item, find)
    if not items and not broken:
        left = ", ".join(options.where)
        raise ValueError(f"{path} has no rows" + (f" with {left}" if left else ""))
    items.extend(broken)
    return Source(
        name=path.name, items=items, labels_are_names=False, passed_over=passed_over,
        columns=columns.found,
    )  # fmt: skip


def add_named(items: ItemStore, item: Item, find: Find) -> None:
    """Adds an image's row; `find` makes the item of an image that is new."""
    number = items.find(item.name)
    if number is not None:
        items.add_row(number, item)
        return
    found = find(item.name)
    item.entry, item.problem = found.entry, item.problem or found.problem
    items.append_named(item)


def _csv_rows(path: Path) -> Rows:
    """Yields rows with their line numbers; the first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_file(path, "r", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = next(reader, None)
            if not header:
                raise ValueError(f"{path} is empty; its first line must name the columns")
            for name in header:
                if name and header.count(name) > 1:  # blank names are a spreadsheet's margin
                    raise ValueError(
                        f"{path} has the column {name!r} several times; give each its own name, or "
                        "one row for each text: rows with the same image are one sample"
                    )
            for fields in reader:
                if len(fields) == len(header):
                    yield reader.line_num, dict(zip(header, fields, strict=True))
                elif fields:
                    message = f"{len(fields)} fields where the header has {len(header)}"
                    yield reader.line_num, Problem("bad row", message)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path) -> Rows:
    """Yields one JSON object a line."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, _object_in(json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield number, Problem("bad row", f"not JSON: {error}")


def _json_rows(path: Path) -> Rows:
    """Yields the objects of one JSON array, numbered from 1."""
    for number, (_, row) in enumerate(iter_elements(path), start=1):
        yield number, _object_in(row)


def _object_in(value: Any) -> Row:
    return value if isinstance(value, dict) else Problem("bad row", "not a JSON object")


_ROW_READERS: dict[str, Callable[[Path], Rows]] = {
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    **dict.fromkeys((".jsonl", ".ndjson"), _jsonl_rows),
    ".json": _json_rows,
}
LIST_SUFFIXES = tuple(_ROW_READERS)

KIND = SourceKind(
    recognises=lambda place: place.is_file and place.path.suffix.lower() in LIST_SUFFIXES,
    read=lambda place, options, spool: read_list(place.path, options, spool),
)
