"""Rows of lists, tables and descriptions: which columns are read, which rows count, their texts.

Readers of all formats give a row as a dict. Its fields are one value or a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, Problem, join_rows
from unicl_fast.system.wording import shorten

MAX_CAPTION_BYTES = 100_000
"""Size of the longest caption that is read, in UTF-8. Encoders see its first words, and tokenizing
takes 140 bytes of memory for each byte."""

IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"),
    *("file", "path", "file_name", "filename", "filepath", "image_path", "url", "image_url"),
)
CAPTION_COLUMNS = ("caption", "captions")
LABEL_COLUMNS = ("label", "labels")
_USUAL: dict[str, Sequence[Sequence[str]]] = {
    "image": [(name,) for name in IMAGE_COLUMNS],
    "caption": [CAPTION_COLUMNS, ("text", "texts"), ("sentence", "sentences")],
    "label": [LABEL_COLUMNS, ("fine_label",), ("class", "cls")],
}
"""The usual names of columns, in any case as LAION's TEXT: all of the first group that is there."""

LOW_SCORE = "low score"
"""The kind of rows that `--min-score` leaves out."""
LEFT_OUT = "rows that --where left out"
FAILED_DOWNLOADS = "failed downloads of img2dataset"
"""Both are counted in `Source.passed_over` by several readers."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list, or fields of a description, that are read."""

    image: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How lists are read; the texts below are part of the help of `unicl-pack build`."""

    image_column: str = ""
    """Column with image paths, or images, if it is not called image, file, path or
    file_name."""
    caption_column: Sequence[str] = ()
    """Column with captions, or several, if it is not called caption, captions or text; in tars,
    field of KEY.json."""
    label_column: Sequence[str] = ()
    """Column with labels, or several (an image then has the labels of all), if it is not called
    label or labels. Labels are names, keys, or numbers into --class-names."""
    group_column: str = ""
    """Column of a key, such as the number of a product: --split puts the images of one key on one
    side."""
    image_root: str = ""
    """Folder or zip that image paths in lists are relative to; by default the list's folder, and
    for COCO's files the one that is called as they are (val2017) or images."""
    where: Sequence[str] = ()
    """COLUMN=VALUE: take only the rows of lists with this value; may be given several times, and
    then all must hold."""
    min_score: Sequence[str] = ()
    """COLUMN=NUMBER: leave out rows of lists with less there, or without a number; may be given
    several times."""

    def conditions(self) -> list[tuple[str, str]]:
        """`where` as columns and values; ValueError for anything but COLUMN=VALUE."""
        for condition in self.where:
            if condition.find("=") < 1:
                raise ValueError(f"--where takes COLUMN=VALUE, not {condition!r}")
        return [
            (column, value) for column, _, value in (each.partition("=") for each in self.where)
        ]

    def scores(self) -> list[tuple[str, float]]:
        """`min_score` as columns and numbers; ValueError for anything but COLUMN=NUMBER."""
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


def choose_columns(path: object, header: Sequence[str], options: ListOptions) -> Columns:
    """Chooses the columns of a list: those that the options name, else columns of usual names.

    Raises:
        ValueError: a column that an option names, of images, or of any text is not there.
    """
    named = {
        what: names_of(getattr(options, f"{what}_column"))
        for what in ("image", "caption", "label", "group")
    }
    asked = [(name, f"--{what}-column") for what, names in named.items() for name in names]
    asked += [(column, "--where") for column, _ in options.conditions()]
    asked += [(column, "--min-score") for column, _ in options.scores()]
    for column, option in asked:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r} ({option}); it has {header}")

    def find(what: str) -> tuple[str, ...]:
        groups = (tuple(one for one in header if one.lower() in each) for each in _USUAL[what])
        return next(filter(None, groups), ())

    images, captions, labels = (named[what] or find(what) for what in ("image", "caption", "label"))
    if not images:
        raise ValueError(
            f"{path} has no column with images or their paths of a usual name (image, file, path, "
            f"...); name it by --image-column. It has {shorten(header, limit=1000)}"
        )
    if not captions and not labels:
        raise ValueError(
            f"{path} has neither captions nor labels in columns of the usual names; name one or "
            "several by --caption-column or --label-column, such as --caption-column title "
            f"--label-column category. It has {shorten(header, limit=1000)}"
        )
    return Columns(images[0], captions, labels, options.group_column)


def names_of(option: Sequence[str]) -> tuple[str, ...]:
    """The columns that an option names: one as a text, or several."""
    return ((option,) if option else ()) if isinstance(option, str) else tuple(option)


def meets(row: dict[str, Any], conditions: Sequence[tuple[str, str]]) -> bool:
    """Whether a row has all the values that `--where` asks for; of a list one is enough."""
    return all(
        any(str(value) == wanted for value in _flat(row.get(column)))
        for column, wanted in conditions
    )


def _flat(value: Any) -> Iterator[Any]:
    """The values in lists of any depth, without recursion, which rows from anywhere could end."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif not isinstance(value, dict):
            yield value


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
    keys = _flat(row.get(columns.group)) if columns.group else ()
    join_rows(item, captions, labels, [str(key) for key in keys if key not in (None, "")])


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


@dataclass(frozen=True, slots=True)
class TableTask:
    """One file to read."""

    path: str
    options: ListOptions
    rows_file: str
    """Gets a JSON object a row: `row`, and `problem`, or `captions` and `labels` with `offset` and
    `size`, or with `path`."""
    images_file: str


@dataclass(kw_only=True, slots=True)
class TableResult:
    """The facts about a file that are not in its rows."""

    labels_are_names: bool = True
    """Whether the file has names for all numbers that are labels."""
    passed_over: dict[str, int] = field(default_factory=dict)
    damaged: list[tuple[int, int, str]] = field(default_factory=list)
    """Rows that cannot be read: the first, the one after the last or -1, and why."""
