"""Cells of shops' exports: several images, HTML, paths of categories, attributes or variants.

`study_cells` looks at all rows of a list once and decides how its cells are read; `Cells` then
makes of each row one as other lists have it. Guesses are counted in `notes`; with `--cells plain`
nothing is guessed, and a cell is one value.
"""

from __future__ import annotations

import html
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from typing import Any

import numpy as np
import xxhash

from unicl_fast.packing.sources.items import PATH
from unicl_fast.packing.sources.rows import (
    Columns,
    ListOptions,
    as_usual,
    choose_columns,
    fields_of,
    flat,
)

_BETWEEN = re.compile(r"(?<!\\)[,;|\n]")
_PHOTO = re.compile(r".+\.(jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
# In linear time: html.parser needs 13 s for 100 kB of "<a<a<a". It would also remove "<unk>".
_TAG = re.compile(
    r"<!--[^<>]*>|</?(a|b|big|blockquote|br|center|code|dd|div|dl|dt|em|figure|font|h[1-6]|hr|i|"
    r"iframe|img|ins|li|ol|p|pre|s|section|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|"
    r"ul|video)(?=[\s/>])[^<>]*>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:[a-z][a-z0-9]{1,31}|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)
_IN_WORDS = {"a", "b", "big", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u"}
"""Tags that can stand inside a word; others separate words."""
_NEXT_ATTRIBUTE = re.compile(r",(?=[^,=]*=)")
_ATTRIBUTE = re.compile(r"[\w .-]{1,80}")
_KEYS = ("sku", "variant_sku")
_PARENTS = ("parent_sku", "item_group_id")
_PARENTS_BESIDE_KEYS = ("parent", "handle")  # which mean other things elsewhere
_AFTER_PARENT = re.compile(r"[-_./ ]")
_MOST_SHOWN = 20
_MOST_LEVELS = 20  # the rest of a path stays in its last name
_MOST_STUDIED = 10_000  # different cells of a column
_GROUP = "\0group"  # a column that no list has

Row = dict[str, Any]
Rows = Callable[[Collection[str]], Iterable[Row]]
"""Begins to read a list anew, at least some of its columns."""


def without_html(text: str) -> str:
    """The text without tags and entities; one that has none stays as it is."""
    for _ in range(2):  # some exports escape twice
        if not (_TAG.search(text) or _ENTITY.search(text)):
            break
        text = _TAG.sub(lambda tag: "" if (tag[1] or "").lower() in _IN_WORDS else " ", text)
        text = " ".join(_ENTITY.sub(lambda entity: html.unescape(entity[0]), text).split())
    return text


def images_in(cell: object) -> list[str]:
    """The names in a cell: one, a list, or several with `,`, `;`, `|` or line ends between."""
    if isinstance(cell, str) and isinstance(listed := _json_in(cell, "["), list):
        cell = listed
    if not isinstance(cell, str):
        return list(filter(None, _texts_in(cell)))
    parts = [part.strip() for part in _BETWEEN.split(cell) if part.strip()]
    return parts if len(parts) > 1 and all(map(_PHOTO.fullmatch, parts)) else [cell] * bool(cell)


def attributes_in(cell: object) -> Row:
    """The values of a cell like `size=XS,material=Wool|Nylon` or of a JSON object, by attribute."""
    if isinstance(cell, str) and isinstance(found := _json_in(cell, "{"), dict):
        return found
    if not isinstance(cell, str) or "=" not in cell:
        return cell if isinstance(cell, dict) else {}
    pairs = [part.partition("=") for part in _NEXT_ATTRIBUTE.split(cell)]
    if not all(equals and _ATTRIBUTE.fullmatch(name.strip()) for name, equals, _ in pairs):
        return {}
    return {name.strip(): value.split("|") for name, _, value in pairs}


def _json_in(cell: str, bracket: str) -> object:
    if not cell.lstrip().startswith(bracket):
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts_in(value: Any) -> list[str]:
    return [one for one in _list_of(value) if isinstance(one, str)]


@dataclass(frozen=True, slots=True)
class Levels:
    """How the cells of a column are read as paths of a hierarchy."""

    separator: str
    root: tuple[str, ...] = ()
    """The names with which all paths begin."""
    note: str = ""
    """That they are read so, in words."""

    def paths_in(self, cell: str) -> list[tuple[str, ...]]:
        """The paths of a cell, as names from the top down, without the root."""
        found, above = list[tuple[str, ...]](), len(self.root)
        for part in _BETWEEN.split(without_html(cell)):
            names = tuple(filter(None, map(str.strip, part.split(self.separator, _MOST_LEVELS))))
            if below := names[above:] if names[:above] == self.root else names:
                found.append(below)
        return found

    def labels_in(self, value: Any) -> list[str]:
        """The paths as labels; one on the way to another says nothing more."""
        found = [path for cell in _texts_in(value) for path in self.paths_in(cell)]
        above = {path[:end] for path in found for end in range(len(path))}
        return [PATH.join(path) for path in dict.fromkeys(found) if path not in above]


def _study_levels(column: str, cells: Counter[str]) -> Levels | None:
    """How a label column is read if half of its cells are paths below few names.

    `T-shirt/top` among other names is none.
    """
    for levels in map(Levels, (">", "/")):
        found = {cell: levels.paths_in(cell) for cell in cells}
        paths = list(dict.fromkeys(chain(*found.values())))
        deep = [path for path in paths if path[1:]]
        num_deep = sum(cells[cell] for cell, own in found.items() if any(one[1:] for one in own))
        if 2 * num_deep >= cells.total() and len(deep) >= 2 * len({path[0] for path in deep}) > 0:
            ends = zip(min(paths), max(paths), strict=False)
            root = tuple(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
            example = " > ".join(max(paths, key=len)[len(root) :])
            below = f" below {'/'.join(root)}" * bool(root)
            note = f"cells of {column} read as paths{below}, such as {example} (--cells)"
            return replace(levels, root=root, note=note)
    return None


class _Parents:
    """The keys of all rows, in 8 bytes each, to find the row of which another is a variant."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = array("Q", map(_digest, keys))
        self._known = np.unique(np.array(digests, np.uint64))

    def find(self, key: str) -> str:
        """The shortest key of a row that this one continues after a `-`, `_`, `.`, `/` or blank."""
        for match in _AFTER_PARENT.finditer(key):
            digest = np.uint64(_digest(key[: match.start()]))
            place = int(np.searchsorted(self._known, digest))
            if self._known[place : place + 1] == digest:
                return key[: match.start()]
        return key


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


@dataclass(kw_only=True, slots=True)
class Cells:
    """How the rows of a list are read; by default a cell is one value."""

    columns: Columns
    kind: str = "plain"
    """As `ListOptions.cells`."""
    holders: Mapping[str, str] = field(default_factory=dict)
    """The columns that hold attributes which options name, by attribute."""
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The columns of captions that are made of several."""
    levels: Mapping[str, Levels] = field(default_factory=dict)
    """How label columns with paths are read."""
    keys: Sequence[str] = ()
    """The columns that `key_of` reads."""
    key_of: Callable[[Row], Any] | None = None
    """The key or keys of a row for `--split`; None: the values in the group column."""
    notes: Counter[str] = field(default_factory=Counter)
    """Guesses in words, and how many rows or texts each changed."""

    def columns_read(self) -> set[str]:
        """The columns that texts, labels and the group are made of."""
        parts = chain(*self.templates.values())
        columns = {*self.columns.captions, *self.columns.labels, self.columns.group}
        return {*columns, *parts, *self.holders.values(), *self.keys}

    def with_attributes(self, row: Row) -> Row:
        """The row with attributes that options name as columns."""
        for holder in dict.fromkeys(self.holders.values()):
            found = attributes_in(row.get(holder))
            row = row | {name: found[name] for name in self.holders if name in found}
        return row

    def images_of(self, row: Row) -> list[str]:
        """The names of a row's images, each once."""
        cells = [row.get(column) for column in self.columns.images]
        if self.kind == "plain":
            return [cell for cell in cells if isinstance(cell, str) and cell]
        names = list(dict.fromkeys(name for cell in cells for name in images_in(cell)))
        if len(names) > 1:
            what = "the first is taken" if self.kind == "first" else "each is a sample"
            self.notes[f"rows with several images: {what} (--cells)"] += 1
        return names[:1] if self.kind == "first" else names

    def texts_of(self, row: Row, images: Sequence[str]) -> Row:
        """The row with plain texts, paths as labels, and its group: `images` stay together."""
        row, columns = dict(row), self.columns
        if self.kind != "plain":
            for column in dict.fromkeys((*columns.captions, *chain(*self.templates.values()))):
                row[column] = self._plain(row.get(column))
            for column in columns.labels:
                levels, value = self.levels.get(column), row.get(column)
                row[column] = levels.labels_in(value) if levels else self._plain(value)
                if levels and value:
                    self.notes[levels.note] += 1
        for template, names in self.templates.items():
            row[template] = _filled(template, {name: row.get(name) for name in names})
        if self.key_of is not None:
            row[columns.group] = [self.key_of(row), *images[: len(images) > 1]]
        return row

    def _plain(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._plain(one) if isinstance(one, str) else one for one in value]
        if not isinstance(value, str) or (plain := without_html(value)) is value:
            return value
        self.notes["texts from which HTML tags and entities were removed (--cells)"] += 1
        return plain


def _filled(template: str, values: Row) -> str | None:
    """A caption of several columns; None if one of them is blank."""
    for name, value in values.items():
        texts = [str(one).strip() for one in _list_of(value) if isinstance(one, str | int | float)]
        if not (text := ", ".join(filter(None, texts))):
            return None
        template = template.replace(f"{{{name}}}", text)
    return template


def study_cells(path: object, header: Sequence[str], rows: Rows, options: ListOptions) -> Cells:
    """Chooses a list's columns and how its cells are read; raises as `choose_columns`."""
    missing = {name for name, _ in options.asked_columns(header)} - set(header)
    holders, others = _find_attributes(missing, rows(header)) if missing else ({}, [])
    columns = choose_columns(path, header, options, attributes=holders, others=others)
    cells = Cells(columns=columns, holders=holders)
    fields = {text: fields_of(text, header) for text in columns.captions}
    cells.templates = {text: names for text, names in fields.items() if names}
    if options.cells == "plain" and not options.group_pattern:
        return cells
    cells.columns = replace(columns, group=_GROUP)
    cells.keys, cells.key_of = _choose_key(header, rows, options, cells.notes)
    if options.cells == "plain":
        return cells
    cells.kind = options.cells
    if columns.guessed:
        chosen = ", ".join(columns.guessed)
        cells.notes[f"columns chosen by their names: {chosen}"] += len(columns.guessed)
    found: dict[str, Counter[str]] = {column: Counter() for column in columns.labels}
    for row in rows(columns.labels):
        for column, counter in found.items():
            texts = _texts_in(row.get(column))
            counter.update(one for one in texts if one in counter or len(counter) < _MOST_STUDIED)
    studied = {column: _study_levels(column, counter) for column, counter in found.items()}
    cells.levels = {column: levels for column, levels in studied.items() if levels is not None}
    return cells


def _find_attributes(wanted: set[str], rows: Iterable[Row]) -> tuple[dict[str, str], list[str]]:
    """The columns whose cells hold the attributes `wanted`, and names of other attributes."""
    holders, others = dict[str, str](), dict[str, None]()
    for row in rows:
        for column, cell in row.items():
            for name in attributes_in(cell):
                if name in wanted:
                    holders.setdefault(name, column)
                elif len(others) < _MOST_SHOWN:
                    others[name] = None
        if len(holders) == len(wanted):
            break
    return holders, list(others)


def key_by_pattern(options: ListOptions) -> Callable[[Row], Any] | None:
    """The function from a row to the parts of its group column that `group_pattern` finds."""
    if (pattern := options.pattern()) is None:
        return None
    return lambda row: [_part(pattern, one) for one in flat(row.get(options.group_column))]


def _choose_key(
    header: Sequence[str], rows: Rows, options: ListOptions, notes: Counter[str]
) -> tuple[Sequence[str], Callable[[Row], Any] | None]:
    """The function from a row to its key for `--split`, None without one, and its columns."""
    column, usual = options.group_column, {as_usual(name): name for name in header}
    key = next((usual[name] for name in _KEYS if name in usual), "")
    names = (*_PARENTS, *(_PARENTS_BESIDE_KEYS if key else ()))
    parent = next((usual[name] for name in names if name in usual), "")
    if options.group_pattern:
        return [column], key_by_pattern(options)
    if column or options.cells == "plain" or not (key or parent):
        return [column], lambda row: row.get(column) if column else None
    parents = None if parent else _Parents(_first(row, key) for row in rows([key]))
    what = f"their {parent}" if parent else f"their {key} or one that it continues"
    note = f"rows grouped for --split by {what} (--group-column)"

    def of_parent(row: Row) -> Any:
        own = _first(row, key)
        notes[note] += 1
        return (parents.find(own) if parents else _first(row, parent)) or own

    return [key, parent], of_parent


def _first(row: Row, column: str) -> str:
    """The first value of a field as text; empty without one."""
    return str(next((one for one in flat(row.get(column)) if one is not None), ""))


def _part(pattern: re.Pattern[str], value: object) -> str:
    """The first group of the first match, or all of it; the value itself without a match."""
    text = "" if value is None else str(value)
    found = pattern.search(text)
    return text if found is None else found[1 if pattern.groups else 0] or text
