"""What every source is read into: items to be packed, and what is wrong with those that cannot be.

The readers (`sources` and the modules called `source_...`) make these, `build_dataset` and the
workers use them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from unicl_fast.packing.sources.entries import Entry

MAX_TEXTS = 65_535
"""Captions, and labels, that the packed format counts for one sample."""
TOO_MANY = "too many texts"

LEFT_OUT = "rows that --where left out"
FAILED_DOWNLOADS = "failed downloads of img2dataset"
"""Reasons of what is passed over, where several readers give them."""

Label = str | int
_L = TypeVar("_L", bound=str | int)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why an item cannot be packed: a short `kind` to count by, and a sentence."""

    kind: str
    message: str


@dataclass(slots=True)
class Item:
    """One sample to be: an image, and its texts and labels as the source spells them."""

    name: str
    """The image's name inside its source."""
    entry: Entry | None = None
    captions: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    problem: Problem | None = None
    place: int = 0
    """Where its file first speaks of it: a line, row or byte. A second try (`retry`) finds by it
    what lay behind a cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Everything one SOURCE argument stands for."""

    name: str
    items: Sequence[Item]
    """Made anew at each look where there may be many of them (`item_store`): not to be changed."""
    labels_are_names: bool
    """Whether labels are names though they may look like numbers: folders, or classes that the
    source itself names. A list may hold numbers that only mean something together with a list of
    class names."""
    passed_over: Counter[str]
    """How many files or rows were not looked at, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """How to read lists; empty names take the first usual one that is there."""

    image_column: str = ""
    caption_column: str = ""
    label_column: str = ""
    image_root: str = ""
    """Folder or zip that image paths are relative to; by default the folder of the list."""
    where: Sequence[str] = ()
    """`column=value` conditions that a row must meet, all of them."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list, or fields of a description, that are read."""

    image: str
    captions: tuple[str, ...]
    labels: tuple[str, ...]


def add_texts(item: Item, row: dict[str, Any], columns: Columns, where: str) -> None:
    """Adds a row's captions and labels, each once; a wrong type is the item's problem.

    Args:
        item: gets them.
        row: fields by column; a field is one value or a list.
        columns: which to take.
        where: the row in words, such as `line 3`, for messages.
    """
    if item.problem is not None and item.problem.kind == TOO_MANY:
        return
    captions: list[str] = []
    labels: list[Label] = []
    for column in columns.captions:
        for caption in _values(row.get(column)):
            if isinstance(caption, str):
                captions.append(caption)
            else:
                item.problem = _bad_value(where, column, caption)
    for column in columns.labels:
        for label in _values(row.get(column)):
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                item.problem = _bad_value(where, column, label)
            elif label not in (-1, "-1"):  # the usual sign for none
                labels.append(label)
    join_rows(item, captions, labels)


def join_rows(item: Item, captions: list[str], labels: list[Label]) -> None:
    """Adds texts that an item does not have yet; more than can be counted are its problem."""
    item.captions = _merge(item.captions, captions)
    item.labels = _merge(item.labels, labels)
    if max(len(item.captions), len(item.labels)) > MAX_TEXTS:
        message = f"more than {MAX_TEXTS:,} captions or labels"
        item.problem = Problem(kind=TOO_MANY, message=message)


def require_text(item: Item) -> None:
    """Gives an item without captions and labels its problem, once all rows have been read."""
    if item.problem is None and not item.captions and not item.labels:
        item.problem = Problem(kind="no text", message="neither a caption nor a label")


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


def _bad_value(where: str, column: str, value: Any) -> Problem:
    shown = repr(value)
    if len(shown) > 200:
        shown = shown[:200] + "..."
    return Problem(kind="bad row", message=f"{where}: {column} holds {shown}")


def require_column(path: object, column: str, header: Sequence[str], option: str) -> None:
    """Refuses a list without a column that an option names.

    Raises:
        ValueError: it has none.
    """
    if column not in header:
        raise ValueError(f"{path} has no column {column!r} ({option}); it has {header}")


def require_text_columns(
    path: object, captions: Sequence[str], labels: Sequence[str], header: Sequence[str]
) -> None:
    """Refuses a list in which neither columns of captions nor of labels were found.

    Raises:
        ValueError: there are none.
    """
    if not captions and not labels:
        raise ValueError(
            f"{path} has neither captions nor labels in columns of the usual names; name them by "
            f"--caption-column or --label-column. It has {header}"
        )


def split_condition(condition: str) -> tuple[str, str]:
    """Column and value of a `--where` condition.

    Raises:
        ValueError: it is not COLUMN=VALUE.
    """
    column, equals, value = condition.partition("=")
    if not equals or not column:
        raise ValueError(f"--where takes COLUMN=VALUE, not {condition!r}")
    return column, value


def meets(row: dict[str, Any], conditions: Sequence[tuple[str, str]]) -> bool:
    """Whether a row has all the values asked for by `--where`."""
    return all(_matches(row.get(column), value) for column, value in conditions)


def _matches(found: Any, wanted: str) -> bool:
    if isinstance(found, list):
        return any(_matches(entry, wanted) for entry in found)
    return str(found) == wanted


def join_texts(
    captions: Sequence[str],
    labels: Sequence[_L],
    more_captions: Sequence[str],
    more_labels: Sequence[_L],
) -> tuple[list[str], list[_L]] | None:
    """Captions and labels of two samples with the same image, each once, in order.

    Returns:
        Both; None if they are more than one sample can have. A placeholder may stand for any number
        of images, and must then stay several samples, so that no text is lost.
    """
    all_captions = list(dict.fromkeys([*captions, *more_captions]))
    all_labels = list(dict.fromkeys([*labels, *more_labels]))
    if max(len(all_captions), len(all_labels)) > MAX_TEXTS:
        return None
    return all_captions, all_labels
