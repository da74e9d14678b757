"""Reads quarantine.csv of a packed data set: what a build or merge left out, and why.

One reader for all who ask it something, so that a list that is none is refused in the same words.
`unicl_fast.dataset.writer` writes it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.dataset.reader import QUARANTINE_COLUMNS

DUPLICATE = "duplicate"
"""The kind of images that went into equal ones."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row: one sample, or a stretch of a file, that was left out."""

    source: str
    name: str
    kind: str
    message: str


def read_left_out(path: Path, *, num_rows: int | None = None) -> Iterator[LeftOut]:
    """All rows of a list, in order.

    Args:
        path: of the list.
        num_rows: how many there are, as the manifest says; None takes any number.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such list, or has another number of rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the data set again")
    count = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != QUARANTINE_COLUMNS:
                raise ValueError(
                    f"{path} is no quarantine.csv of unicl-pack: its first line must be "
                    f"{','.join(QUARANTINE_COLUMNS)}, and is {','.join(header)[:200]!r}"
                )
            for row in reader:
                if len(row) != len(QUARANTINE_COLUMNS):
                    raise ValueError(f"{path}, line {reader.line_num}: {len(row)} fields of 4")
                count += 1
                yield LeftOut(*row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if num_rows is not None and count != num_rows:
        raise ValueError(
            f"{path} is damaged or cut short: {count} rows, the manifest says {num_rows}; "
            "copy the data set again"
        )


def duplicate_message(source: str, name: str) -> str:
    """What a list says of an image that went into an equal one, which is named."""
    return f"the same bytes as {name} of {source}, which has its texts too"


def as_listed(name: str) -> str:
    """A name as a list has it, which is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
