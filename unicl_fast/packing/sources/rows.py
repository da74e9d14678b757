"""Rows of lists, tables and descriptions: their columns, conditions and texts.

Readers of all formats make a row a dict, whose fields are one value or a list.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import msgspec

from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, join_rows
from unicl_fast.system.checked_fields import plain_number
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
CellsKind = Literal["all", "first", "plain"]
_IN_BRACES = re.compile(r"\{([^{}]+)\}")

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


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How lists are read; the texts below are part of the help of `unicl-pack build`."""

    image_column: Sequence[str] = ()
    """One or several columns with image paths, or images, if not called image, file, path or
    file_name."""
    caption_column: Sequence[str] = ()
    """One or several columns with captions, if not called caption, captions or text; in tars,
    fields of KEY.json. '{name}, {color}' is a caption of two columns."""
    label_column: Sequence[str] = ()
    """One or several columns with labels, if not called label or labels; an image has the labels of
    all, and evaluations measure each column by itself. Labels are names, keys, or numbers into
    --class-names. 'categories=^(Men|Women)/' takes those that a regular expression finds. Any
    column can also be an attribute in cells like size=XS,color=Black."""
    group_column: str = ""
    """Column with a key, such as a product's number: --split keeps images with one key together,
    and a search shows the best of them. Invisible characters, full width and blanks do not matter;
    7, "7" and 7.0 are one key. 'sku=^[^-]+' takes the part that a regular expression finds: WS12 of
    WS12-XS-Orange. By default variants in a shop's export stay with their parent."""
    weight_column: str = ""
    """Column with a weight of each row, such as clicks: a positive number. An image of several rows
    has their mean, one of a source without columns 1. See data.sample_weights of unicl-pretrain."""
    cells: CellsKind = "all"
    """How cells of lists are read. all: as shops write them: several images in one become a sample
    each, paths such as Men/Tops/Tees become labels with a hierarchy, and HTML is removed; the
    report says so. first: the same with a row's first image. plain: a cell is one value."""
    image_root: str = ""
    """Folder or zip that image paths in lists are relative to; by default the list's folder, and
    for COCO's files the folder called images, or as they are (val2017)."""
    where: Sequence[str] = ()
    """COLUMN=VALUE: only read rows of lists with this value. Repeat it to add conditions."""
    takes_loose: bool = False
    """Put images outside class folders into a class named after their folder, instead of leaving
    them out, and treat all folders as classes. For callers in Python."""
    min_score: Sequence[str] = ()
    """COLUMN=NUMBER: leave out rows of lists with a smaller value or none. Repeat it to add
    conditions."""

    def asked_columns(self, header: Collection[str]) -> list[tuple[str, str]]:
        """The columns that options name, each with the option."""
        captions = names_of(self.caption_column)
        named = {
            "--image-column": names_of(self.image_column),
            "--caption-column": [one for text in captions for one in fields_of(text, header)],
            "--label-column": self.patterns("label"),
            "--group-column": self.patterns("group"),
            "--weight-column": names_of(self.weight_column),
            "--where": [column for column, _ in self.conditions()],
            "--min-score": [column for column, _ in self.scores()],
        }
        return [(name, option) for option, names in named.items() for name in names]

    def patterns(self, what: Literal["label", "group"]) -> dict[str, re.Pattern[str]]:
        """The expressions of COLUMN=EXPRESSION, by column; ValueError if one is no expression."""
        option = f"--{what}-column"
        found = {}
        for text in names_of(getattr(self, f"{what}_column")):
            column, _, expression = text.partition("=")
            try:
                found[column] = re.compile(expression)
            except re.error as error:
                message = f"{option} must be COLUMN or COLUMN=EXPRESSION: {expression!r}: {error}"
                raise ValueError(message) from error
        return found

    def conditions(self) -> list[tuple[str, str]]:
        """`where` as columns and values; ValueError for anything but COLUMN=VALUE."""
        found = []
        for condition in self.where:
            column, _, value = condition.partition("=")
            if not column or column == condition:
                raise ValueError(f"--where must be COLUMN=VALUE, not {condition!r}")
            found.append((column, value))
        return found

    def scores(self) -> list[tuple[str, float]]:
        """`min_score` as columns and numbers; ValueError for anything but COLUMN=NUMBER."""
        found = []
        for condition in self.min_score:
            column, _, value = condition.rpartition("=")
            try:
                found.append((column, plain_number(value, float)))
            except ValueError:
                column = ""
            if not column or math.isnan(found[-1][1]):
                raise ValueError(f"--min-score must be COLUMN=NUMBER, not {condition!r}")
        return found


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


def fields_of(text: str, header: Collection[str]) -> tuple[str, ...]:
    """The columns of which a caption is made: those in braces, or the one of this name."""
    found = () if text in header else _IN_BRACES.findall(text)
    return tuple(dict.fromkeys(found)) or (text,)


def names_of(option: Sequence[str]) -> tuple[str, ...]:
    """The columns that an option names."""
    return ((option,) if option else ()) if isinstance(option, str) else tuple(option)


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
            is_label = isinstance(label, (str, int)) and not isinstance(label, bool)
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
