"""TSV files with the images themselves in base64, as Microsoft's vision tools make them.

Lines are KEY<TAB>BASE64 or KEY<TAB>TEXTS<TAB>BASE64. Next to NAME.tsv there may be NAME.label.tsv
and NAME.caption.tsv with lines KEY<TAB>TEXTS. TEXTS is JSON or plain text. NAME.lineidx is not
needed: the file is read once, and only the offset of each image's base64 is kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from unicl_fast.packing.sources.entries import Base64Span, open_regular
from unicl_fast.packing.sources.items import Item, Problem, Source, refused
from unicl_fast.packing.sources.rows import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    LEFT_OUT,
    Columns,
    ListOptions,
    add_texts,
    meets,
    too_low,
)
from unicl_fast.packing.sources.spool import ItemStore, Spool

_SIGNATURES = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"Qk", b"SUkq", b"TU0A", b"AAAA")
"""The first characters of JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or JPEG 2000 in base64."""
_MIN_BASE64 = 64
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
_HEAD_BYTES = 1 << 20
"""Limit for the key and texts of a line with an image, together; images may be longer."""
_LINES_TRIED = 10


def holds_images(path: Path) -> bool:
    """Whether a .tsv has images in it, rather than paths of images under a header."""
    with open_regular(str(path)) as file:
        for number, line in enumerate(_iter_lines(file)):
            start = line.head[line.last_field :]
            if (
                line.num_tabs in (1, 2)
                and line.end - line.start - line.last_field >= _MIN_BASE64
                and start.startswith(_SIGNATURES)
                and _BASE64.issuperset(start[:_MIN_BASE64])
            ):
                return True
            if number == _LINES_TRIED:
                break
    return False


def read_tsv(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads a TSV of images.

    In JSON, `class` and `label`, `labels` give labels, `caption` and `captions` captions, in an
    object or in each object of a list. Plain text between key and image, and in .label.tsv, is a
    label; in .caption.tsv a caption.
    """
    columns = options.text_columns(CAPTION_COLUMNS, (*LABEL_COLUMNS, "class"))
    conditions, scores = options.conditions(), options.scores()
    passed_over: Counter[str] = Counter()
    items, broken = spool.new_items(), spool.new_items()
    with open_regular(str(path)) as file:
        for number, line in enumerate(_iter_lines(file), start=1):
            where = f"line {number}"
            item, rows = _read_line(path, line, where)
            is_read = item.problem is None  # else it is unknown whether --where leaves it out
            if items.find(item.name) is not None:
                item = refused(where, "ambiguous", f"{where}: another line has this key")
            if is_read and conditions and not any(meets(row, conditions) for row in rows):
                passed_over[LEFT_OUT] += 1
                continue
            low = [too_low(row, scores) for row in rows or [{}]] if scores and is_read else []
            if item.problem is None and low and all(low):
                item.problem = low[0]
            kept = [row for row, problem in zip_longest(rows, low) if row and problem is None]
            for row in kept if item.problem is None else ():
                add_texts(item, row, columns, where)
            if item.entry is None:
                broken.append(item)
            else:
                items.append_named(item)
    if not items and not broken:
        raise ValueError(f"{path} has no lines" + (" that --where leaves" if conditions else ""))
    for kind, plain in (("label", columns.labels[0]), ("caption", columns.captions[0])):
        companion = path.with_suffix(f".{kind}.tsv")
        if companion.is_file():
            _read_companion(companion, plain, columns, items, passed_over)
    items.extend(broken)
    return Source(name=path.name, items=items, labels_are_names=False, passed_over=passed_over)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line without the bytes of its image."""

    head: bytes
    """The first bytes, at most `_HEAD_BYTES`."""
    start: int
    end: int
    """The offset after its last byte, not counting the line's end."""
    num_tabs: int
    last_field: int
    """The offset of its last field in the line."""


def _iter_lines(file: BinaryIO) -> Iterator[_Line]:
    """Yields lines that are not empty, however long, without holding them."""
    start = 0
    while head := file.readline(_HEAD_BYTES):
        tail, length = head, len(head)
        num_tabs = head.count(b"\t")
        last_field = head.rfind(b"\t") + 1
        while not tail.endswith(b"\n") and (more := file.readline(_HEAD_BYTES)):
            tail = more
            if b"\t" in tail:
                num_tabs += tail.count(b"\t")
                last_field = length + tail.rfind(b"\t") + 1
            length += len(tail)
        end = start + length - (len(tail) - len(tail.rstrip(b"\r\n")))
        if end > start:
            yield _Line(head[: end - start], start, end, num_tabs, last_field)
        start += length


def _read_line(path: Path, line: _Line, where: str) -> tuple[Item, list[dict[str, Any]]]:
    """Returns the item of a line, without its texts; and the rows with these."""
    problem = key = ""
    texts: list[str] = []
    if line.num_tabs not in (1, 2):
        problem = f"{line.num_tabs + 1} fields; 2 or 3 are read, the image being the last"
    elif line.last_field > len(line.head):
        problem = f"more than {_HEAD_BYTES:,} bytes before the image"
    else:
        try:
            key, *texts = line.head[: line.last_field - 1].decode("utf-8").split("\t")
            problem = "" if key else "no key"
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: {error}"
    if problem:
        return refused(where, "bad row", f"{where}: {problem}"), []
    first = line.start + line.last_field
    item = Item(key, Base64Span(str(path), first, line.end - first))
    return item, _rows_of(texts[0], "label", item) if texts else []


def _rows_of(text: str, plain: str, item: Item) -> list[dict[str, Any]]:
    """Returns the rows that a field of texts holds; plain text is a row with the column `plain`."""
    text = text.strip()
    if not text:
        return []
    if text[0] not in '[{"':
        return [{plain: int(text) if text.isdecimal() and len(text) < 10 else text}]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        item.problem = Problem("bad row", f"texts that are not JSON: {error!s:.300}")
        return []
    elements = found if isinstance(found, list) else [found]
    return [element if isinstance(element, dict) else {plain: element} for element in elements]


def _read_companion(
    path: Path, plain: str, columns: Columns, items: ItemStore, passed_over: Counter[str]
) -> None:
    """Adds the texts of .label.tsv or .caption.tsv, found by key."""
    with open_regular(str(path)) as file:
        for number, line in enumerate(_iter_lines(file), start=1):
            if line.end - line.start > len(line.head) or line.num_tabs < 1:
                passed_over[f"lines of {path.name} that are not KEY<TAB>TEXTS"] += 1
                continue
            key, _, text = line.head.decode("utf-8", "replace").partition("\t")
            known = items.find(key)
            if known is None:
                passed_over[f"lines of {path.name} about no image"] += 1
                continue
            item = Item(key)
            for row in _rows_of(text, plain, item):
                add_texts(item, row, columns, f"{path.name}, line {number}")
            items.add_row(known, item)
