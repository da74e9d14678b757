"""Rows of lists, tables and descriptions: their columns, conditions and texts.

Readers of all formats make a row a dict, whose fields are one value or a list.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, join_rows
from unicl_fast.packing.sources.list_options import ListOptions, names_of
from unicl_fast.system.checked_fields import MOST_CHARACTERS, plain_number
from unicl_fast.system.wording import shorten

MAX_CAPTION_BYTES = 100_000
"""Size of the longest caption that is read, in UTF-8. Encoders only see its first words, and
tokenizing needs 140 bytes of memory for each byte."""

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
"""The usual names of columns, in upper or lower case: all of the first group that is there."""
_OF_SHOPS: dict[str, Sequence[Sequence[str]]] = {
    "image": [("base_image", "additional_images"), ("images",), ("image_src",), ("image_link",)],
    "caption": [("title",), ("name",)],
    "label": [("categories",), ("category",), ("product_category",), ("product_type",)],
}
"""Those of shops' exports, for lists without a usual name of images, or of texts."""

GROUP = "\0group"  # a column that no list has, for the keys of rows

LOW_SCORE = "low score"
"""The kind of problem of rows that `--min-score` leaves out."""
LEFT_OUT = "rows that --where left out"
FAILED_DOWNLOADS = "failed downloads of img2dataset"
"""Several readers count both in `Source.passed_over`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list, or fields of a description, to read."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    weight: str = ""
    guessed: tuple[str, ...] = ()
    """Columns that were chosen by names of shops' exports."""
    found: dict[str, dict[Label, None]] = field(default_factory=dict)
    """The labels that each label column had so far."""


def choose_columns(
    path: object, header: Sequence[str], options: ListOptions, *, attributes: Collection[str] = ()
) -> Columns:
    """Chooses the columns of a list: by the options, else by usual names.

    `attributes` are in its cells. Raises ValueError without a column of an option's name, with
    images, or with texts.
    """
    for column, option in options.asked_columns(header):
        if column not in header and column not in attributes:
            also = f", and in its cells {', '.join(islice(attributes, 20))}" if attributes else ""
            raise ValueError(f"{path} has no column {column!r} ({option}); it has {header}{also}")

    def find(what: str, usual: dict[str, Sequence[Sequence[str]]]) -> tuple[str, ...]:
        spelled = str.lower if usual is _USUAL else as_usual
        groups = (tuple(one for one in header if spelled(one) in each) for each in usual[what])
        return next(filter(None, groups), ())

    images = names_of(options.image_column) or find("image", _USUAL)[:1]
    captions = names_of(options.caption_column) or find("caption", _USUAL)
    labels = tuple(options.patterns("label")) or find("label", _USUAL)
    guessed: tuple[str, ...] = ()
    if not images and options.cells != "plain":
        images = guessed = find("image", _OF_SHOPS)
    if not images:
        raise ValueError(
            f"{path} has no column of a usual name with images or paths (image, file, path, ...); "
            f"name it by --image-column. It has {shorten(header, limit=1000)}"
        )
    # in a shop's export a name for one kind must not switch the other off
    if options.cells != "plain" and (guessed or not (captions or labels)):
        if not captions:
            captions = find("caption", _OF_SHOPS)
            guessed = (*guessed, *captions)
        if not labels:
            labels = find("label", _OF_SHOPS)
            guessed = (*guessed, *labels)
    if not captions and not labels:
        raise ValueError(
            f"{path} has no columns of usual names with captions or labels; name them by "
            "--caption-column or --label-column, such as --caption-column title --label-column "
            f"category. It has {shorten(header, limit=1000)}"
        )
    return Columns(images, captions, labels, options.weight_column, guessed)


def as_usual(column: str) -> str:
    """A column's name as usual names are written: `Image Src` is image_src."""
    return column.strip().lower().replace(" ", "_")


def meets(row: dict[str, Any], conditions: Sequence[tuple[str, str]]) -> bool:
    """Whether a row meets all conditions of `--where`; in a list, one equal value is enough."""
    return all(
        any(str(value) == wanted for value in flat(row.get(column)))
        for column, wanted in conditions
    )


def flat(value: Any) -> Iterator[Any]:
    """The values in lists of any depth, in order; not recursive: untrusted rows can nest deeply."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += reversed(value)
        elif not isinstance(value, dict):
            yield value


def too_low(row: dict[str, Any], scores: Sequence[tuple[str, float]]) -> Problem | None:
    """The problem of a row with a score below `--min-score`."""
    for column, lowest in scores:
        value = row.get(column)
        try:
            number = plain_number(value, float) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
            is_enough = number >= lowest
        except (TypeError, ValueError, OverflowError):
            is_enough = False
        if not is_enough:
            return Problem(LOW_SCORE, f"{column} is {shorten(value)}, below {lowest:g}")
    return None


def add_texts(item: Item, row: dict[str, Any], columns: Columns, where: str) -> None:
    """Adds a row's captions and labels, each once, and its weight; bad values are problems.

    `where` names the row in messages.
    """
    if item.problem is not None and item.problem.kind == TOO_MANY:
        return
    captions: list[str] = []
    labels: list[Label] = []
    for column in columns.captions:
        for caption in _values(row.get(column)):
            if not isinstance(caption, str) or _has_half_characters(caption):
                item.problem = _bad_value(where, column, caption)
            elif (size := len(caption.encode())) > MAX_CAPTION_BYTES:
                message = f"{size:,} bytes; captions of at most {MAX_CAPTION_BYTES:,} are read"
                item.problem = Problem("too long", f"{where}: {column} holds {message}")
            else:
                captions.append(caption)
    for column in columns.labels:
        found = columns.found.setdefault(column, {})
        for label in _values(row.get(column)):
            is_label = type(label) in (str, int) and len(str(label)) <= MOST_CHARACTERS
            if not is_label or _has_half_characters(str(label)):
                item.problem = _bad_value(where, column, label)
            elif label not in (-1, "-1"):  # usually means none
                labels.append(label)
                found[label] = None
    if columns.weight:
        _add_weight(item, row.get(columns.weight), f"{where}: the weight in {columns.weight}")
    keys = flat(row.get(GROUP))
    has_key = (key for key in keys if key not in (None, "") and key == key)  # NaN means none
    join_rows(item, captions, labels, list(map(str, has_key)))


def _add_weight(item: Item, value: Any, what: str) -> None:
    """Adds a row's weight; it must be a positive number, of which float32 can hold many's sum."""
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if 1e-30 <= weight <= 1e30:
        item.weights.append(weight)
    else:
        found = shorten(value, limit=200)
        item.problem = Problem("bad row", f"{what} is {found}, not a number of 1e-30 to 1e30")


def _values(value: Any) -> list[Any]:
    """A field as a list, without None and blank texts."""
    values = value if isinstance(value, list) else [value]
    return [
        one for one in values if one is not None and not (isinstance(one, str) and not one.strip())
    ]


def _has_half_characters(text: str) -> bool:
    """Whether a text has a lone surrogate, which JSON can spell and no encoding can store."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _bad_value(where: str, column: str, value: Any) -> Problem:
    return Problem("bad row", f"{where}: {column} holds {shorten(value, limit=200)}")


@dataclass(frozen=True, slots=True)
class TableTask:
    """One file to read."""

    path: str
    options: ListOptions
    rows_file: str
    """Receives a JSON array for each row: its number, its `Item` and the paths that it names; the
    entry's path is `images_file`."""
    images_file: str


class TableResult(msgspec.Struct):
    """Facts about a file that are not in its rows."""

    labels_are_names: bool = True
    """Whether the file names all labels that are numbers."""
    passed_over: dict[str, int] = {}
    notes: dict[str, int] = {}
    columns: dict[str, list[Label]] = {}
    """The labels of each label column."""
    damaged: list[tuple[int, int, str]] = []
    """Rows that cannot be read: the first, the end or -1, and why."""
