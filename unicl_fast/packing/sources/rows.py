"""Rows of lists, tables and descriptions: which columns are read, which rows count, their texts.

Readers of all formats give a row as a dict. Its fields are one value or a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unicl_fast.packing.sources.items import TOO_MANY, Item, Label, Problem, join_rows
from unicl_fast.system.wording import shorten

MAX_CAPTION_BYTES = 100_000
"""Size of the longest caption that is read, in UTF-8. Encoders see its first words, and tokenizing
takes 140 bytes of memory for each byte."""

CAPTION_COLUMNS = ("caption", "captions")
LABEL_COLUMNS = ("label", "labels")
"""The usual names in lists and tars; tables have more (`parquet_rows`)."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """How lists are read; an empty name takes the first usual one that is there."""

    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""
    image_root: str = ""
    """Folder or zip that image paths are relative to; by default the folder of the list."""
    where: Sequence[str] = ()
    """`COLUMN=VALUE` conditions, all of which a row must meet."""
    min_score: Sequence[str] = ()
    """`COLUMN=NUMBER`: rows with less there, or no number, have the problem `too_low` finds."""

    def conditions(self) -> list[tuple[str, str]]:
        """`where` as columns and values; what is not COLUMN=VALUE is a ValueError."""
        for condition in self.where:
            if condition.find("=") < 1:
                raise ValueError(f"--where takes COLUMN=VALUE, not {condition!r}")
        return [
            (column, value) for column, _, value in (each.partition("=") for each in self.where)
        ]

    def scores(self) -> list[tuple[str, float]]:
        """`min_score` as columns and numbers; what is not COLUMN=NUMBER is a ValueError."""
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

    def text_columns(self, captions: tuple[str, ...], labels: tuple[str, ...]) -> Columns:
        """The columns of texts, with these for those that are not named."""
        return Columns(
            "",
            (self.caption_column,) if self.caption_column else captions,
            (self.label_column,) if self.label_column else labels,
        )


def choose_columns(
    path: object,
    header: Sequence[str],
    options: ListOptions,
    find: Callable[[str], tuple[str, ...]],
    *,
    no_image: str,
) -> Columns:
    """Chooses the columns of a list: those that the options name, else those of usual names.

    `find` returns the columns with a usual name for an `image`, `caption` or `label`; `no_image` is
    the error where there is none with images.

    Raises:
        ValueError: a column that an option names, of images, or of any text is not there.
    """
    named = {
        "image": options.image_column,
        "caption": options.caption_column,
        "label": options.label_column,
    }
    asked = [(name, f"--{what}-column") for what, name in named.items() if name]
    asked += [(column, "--where") for column, _ in options.conditions()]
    asked += [(column, "--min-score") for column, _ in options.scores()]
    for column, option in asked:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r} ({option}); it has {header}")
    images, captions, labels = ((name,) if name else find(what) for what, name in named.items())
    if not images:
        raise ValueError(no_image)
    if not captions and not labels:
        raise ValueError(
            f"{path} has neither captions nor labels in columns of the usual names; name them by "
            f"--caption-column or --label-column. It has {header}"
        )
    return Columns(images[0], captions, labels)


def meets(row: dict[str, Any], conditions: Sequence[tuple[str, str]]) -> bool:
    """Whether a row has all the values that `--where` asks for."""
    return all(_matches(row.get(column), value) for column, value in conditions)


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


def _matches(found: Any, wanted: str) -> bool:
    if isinstance(found, list):
        return any(_matches(entry, wanted) for entry in found)
    return str(found) == wanted


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
    join_rows(item, captions, labels)


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
