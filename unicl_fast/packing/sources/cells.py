"""Cells of shops' exports: several images, HTML, paths of categories, attributes or variants.

`study_cells` looks at all rows of a list once and decides how its cells are read; `Cells` then
makes of each row one as other lists have it. Guesses are counted in `notes`; with `--cells plain`
nothing is guessed, and a cell is one value.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, takewhile
from typing import Any

from unicl_fast.packing.sources.items import PATH
from unicl_fast.packing.sources.list_options import ListOptions, fields_of
from unicl_fast.packing.sources.rows import GROUP, Columns, as_usual, choose_columns, flat

_BETWEEN = re.compile(r"(?<!\\)[,;|\n]")
_PHOTO = re.compile(r".+\.(jpe?g|png|webp|gif|bmp|tiff?|avif)", re.IGNORECASE)
# In linear time: html.parser needs 13 s for 100 kB of "<a<a<a". It would also remove "<unk>".
_TAG = re.compile(
    r"<!--[^<>]*>|</?(?:a|b|big|blockquote|br|center|code|dd|div|dl|dt|em|figure|font|h[1-6]|hr|i|"
    r"iframe|img|ins|li|ol|p|pre|s|section|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|"
    r"ul|video)(?=[\s/>])[^<>]*>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:[a-z][a-z0-9]{1,31}|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)
_NEXT_ATTRIBUTE = re.compile(r",(?=[^,=]*=)")
_ATTRIBUTE = re.compile(r"[\w .-]{1,80}")
_KEYS = ("sku", "variant_sku")
_PARENTS = ("parent_sku", "item_group_id", "parent", "handle")
_AFTER_PARENT = re.compile(r"[-_./ ]")
_MOST_SHOWN = 10
_MOST_LEVELS = 20  # the rest of a path stays in its last name
_MOST_STUDIED = 10_000  # different cells of a column, and rows to find attributes in

Row = dict[str, Any]
Rows = Callable[[Collection[str]], Iterable[Row]]
"""Begins to read a list anew, at least some of its columns."""


def without_html(text: str) -> str:
    """The text without tags and entities; one that has none stays as it is."""
    for _ in range(2):  # some exports escape twice
        if not (_TAG.search(text) or _ENTITY.search(text)):
            break
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), _TAG.sub(" ", text))
        text = " ".join(text.split())
    return text


def images_in(cell: object) -> list[str]:
    """The names in a cell: one, a list, or several with `,`, `;`, `|` or line ends between."""
    found = _parsed(cell, "[")
    if not isinstance(found, str):
        return list(filter(None, _texts_in(found)))
    parts = [part.strip() for part in _BETWEEN.split(found) if part.strip()]
    return parts if len(parts) > 1 and all(map(_PHOTO.fullmatch, parts)) else [found] * bool(found)


def attributes_in(cell: object) -> Row:
    """The values of a cell like `size=XS,material=Wool|Nylon` or of a JSON object, by attribute."""
    found = _parsed(cell, "{")
    if not isinstance(found, str):
        return found if isinstance(found, dict) else {}
    pairs = [part.partition("=") for part in _NEXT_ATTRIBUTE.split(found)]
    if not all(equals and _ATTRIBUTE.fullmatch(name.strip()) for name, equals, _ in pairs):
        return {}
    return {name.strip(): value.split("|") for name, _, value in pairs}


def _parsed(cell: object, bracket: str) -> object:
    """The JSON of a text that begins with this bracket; the cell itself without it."""
    try:
        if isinstance(cell, str) and cell.lstrip().startswith(bracket):
            return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    return cell


def _texts_in(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


@dataclass(frozen=True, slots=True)
class _Levels:
    """How the cells of a column are read as paths of a hierarchy."""

    separator: str
    root: tuple[str, ...] = ()
    """The names with which all paths begin."""
    note: str = ""
    """That they are read so, in words."""

    def paths_in(self, cell: str) -> list[tuple[str, ...]]:
        """The paths of a cell, as names from the top down, without the root."""
        parts = (one.split(self.separator, _MOST_LEVELS) for one in _BETWEEN.split(cell))
        paths = (tuple(filter(None, map(str.strip, part))) for part in parts)
        above = len(self.root)
        below = (path[above:] if path[:above] == self.root else path for path in paths)
        return list(filter(None, below))

    def labels_in(self, value: Any) -> list[str]:
        """The paths as labels; one on the way to another says nothing more."""
        found = [path for cell in _texts_in(value) for path in self.paths_in(cell)]
        above = {path[:end] for path in found for end in range(len(path))}
        return [PATH.join(path) for path in dict.fromkeys(found) if path not in above]


def _study_levels(column: str, cells: Counter[str], *, advise: bool) -> _Levels | None:
    """How a label column is read if half of its cells are paths below few names.

    `T-shirt/top` among other names is none.
    """
    for levels in map(_Levels, (">", "/")):
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
            read = replace(levels, root=root)
            tops = [{path[0] for path in read.paths_in(cell)} for cell in cells]
            return replace(read, note=note + _advice(column, tops) * advise)
    return None


def _advice(column: str, tops: Sequence[set[str]]) -> str:
    """How to leave paths out whose top never stands alone; sales and collections teach little."""
    alone = set().union(*(each for each in tops if len(each) == 1))
    others = set().union(*tops) - alone
    if not alone or not others or len(alone | others) > _MOST_SHOWN:
        return ""
    wanted = "|".join(map(re.escape, sorted(alone)))
    names = ", ".join(sorted(others))
    return (
        f"; no row has only {names}, which may say nothing of an image: "
        f"--label-column '{column}=^({wanted})' leaves them out"
    )


@dataclass(kw_only=True, slots=True)
class Cells:
    """How the rows of a list are read; by default a cell is one value."""

    columns: Columns
    kind: str = "plain"
    """As `ListOptions.cells`."""
    sources: Collection[str] = ()
    """The columns that are read, besides those of images."""
    holders: Mapping[str, str] = field(default_factory=dict)
    """The columns that hold attributes which options name, by attribute."""
    levels: dict[str, _Levels] = field(default_factory=dict)
    """How label columns with paths are read."""
    wanted: Mapping[str, Callable[[str], object]] = field(default_factory=dict)
    """Searches that find the wanted labels, by column; other columns are taken whole."""
    key_of: Callable[[Row], Any] | None = None
    """The key or keys of a row for `--split`; None: the values in the group column."""
    notes: Counter[str] = field(default_factory=Counter)
    """Guesses in words, and how many rows or texts each changed."""

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
        for column in columns.captions:
            names = fields_of(column, row)
            row |= {name: self._plain(row.get(name)) for name in names}
            if names != (column,):
                row[column] = _filled(column, {name: row[name] for name in names})
        for column in columns.labels:
            row[column] = self._plain(row.get(column))
            if row[column] and (levels := self.levels.get(column)) is not None:
                row[column] = levels.labels_in(row[column])
                self.notes[levels.note] += 1
            if find := self.wanted.get(column):
                values = row[column] if isinstance(row[column], list) else [row[column]]
                texts = (
                    (one, str(one).replace(PATH, "/"))
                    for one in values
                    if isinstance(one, str | int)
                )
                row[column] = [one for one, text in texts if find(text)]
        if self.key_of is not None:
            row[GROUP] = [self.key_of(row), *images[: len(images) > 1]]
        return row

    def _plain(self, value: Any) -> Any:
        if self.kind == "plain" or not isinstance(value, str | list):
            return value
        if isinstance(value, list):
            return [self._plain(one) if isinstance(one, str) else one for one in value]
        plain = without_html(value)
        if plain is not value:
            self.notes["texts from which HTML tags and entities were removed (--cells)"] += 1
        return plain


def _filled(template: str, values: Row) -> str | None:
    """A caption of several columns; None if one of them is blank."""
    for name, value in values.items():
        values_of = value if isinstance(value, list) else [value]
        texts = [str(one).strip() for one in values_of if isinstance(one, str | int | float)]
        if not (text := ", ".join(filter(None, texts))):
            return None
        template = template.replace(f"{{{name}}}", text)
    return template


def study_cells(path: object, header: Sequence[str], rows: Rows, options: ListOptions) -> Cells:
    """Chooses a list's columns and how its cells are read; raises as `choose_columns`."""
    asked = {name for name, _ in options.asked_columns(header)}
    known = _find_attributes(asked - set(header), rows(header))
    columns = choose_columns(path, header, options, attributes=known)
    holders = {name: holder for name, holder in known.items() if name in asked}
    cells = Cells(columns=columns, kind=options.cells, holders=holders)
    cells.wanted = wanted_labels(options)
    keys, cells.key_of = _choose_key(header, rows, options, cells.notes)
    cells.sources = {*asked, *columns.captions, *columns.labels, *holders.values(), *keys}
    if columns.guessed:
        chosen = f"columns chosen by their names: {', '.join(columns.guessed)}"
        cells.notes[chosen] += len(columns.guessed)
    found: dict[str, Counter[str]] = {column: Counter() for column in columns.labels}
    for row in rows(columns.labels) if options.cells != "plain" else ():
        for column, counter in found.items():
            texts = map(without_html, _texts_in(row.get(column)))
            counter.update(one for one in texts if one in counter or len(counter) < _MOST_STUDIED)
    for column, counter in found.items():
        levels = _study_levels(column, counter, advise=column not in cells.wanted)
        cells.levels |= {} if levels is None else {column: levels}
    return cells


def _find_attributes(wanted: set[str], rows: Iterable[Row]) -> dict[str, str]:
    """The columns whose cells hold attributes, by attribute, if any are `wanted`."""
    found: dict[str, str] = {}
    for row in islice(rows, _MOST_STUDIED) if wanted else ():
        for column, cell in row.items():
            for name in attributes_in(cell):
                found.setdefault(name, column)
        if wanted <= found.keys():
            break
    return found


def wanted_labels(options: ListOptions) -> dict[str, Callable[[str], object]]:
    """The searches of label columns that have an expression."""
    patterns = options.patterns("label")
    return {column: one.search for column, one in patterns.items() if one.pattern}


def key_in_group(options: ListOptions) -> Callable[[Row], Any]:
    """The function from a row to the value in the group column, or the part that counts."""
    ((column, pattern),) = options.patterns("group").items() or [("", re.compile(""))]

    def part(text: str) -> str:
        found = pattern.search(text)
        return found[1 if pattern.groups else 0] or text if found else text

    return lambda row: [part(str(one)) for one in flat(row.get(column)) if one is not None]


def _choose_key(
    header: Sequence[str], rows: Rows, options: ListOptions, notes: Counter[str]
) -> tuple[Collection[str], Callable[[Row], Any]]:
    """The columns of a row's key for `--split`, and the function that makes it of a row."""
    usual = {as_usual(name): name for name in header}
    key = next((usual[name] for name in _KEYS if name in usual), "")
    parent = next((usual[name] for name in _PARENTS if name in usual), "")
    if options.group_column or options.cells == "plain" or not key:  # a list of no shop
        return (), key_in_group(options)
    known = set() if parent else {_first(row, key) for row in rows([key])}
    what = f"their {parent}" if parent else f"their {key} or one that it continues"
    note = f"rows grouped by {what} (--group-column)"

    def of_parent(row: Row) -> str:
        own = _first(row, key)
        starts = (own[: match.start()] for match in _AFTER_PARENT.finditer(own))
        notes[note] += 1
        return _first(row, parent) or next((one for one in starts if one in known), own)

    return [key, parent], of_parent


def _first(row: Row, column: str) -> str:
    """The first value of a field as text; empty without one."""
    return str(next((one for one in flat(row.get(column)) if one is not None), ""))
