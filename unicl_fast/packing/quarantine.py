"""Lists of samples by source and name: what a build left out, or `--leave-out` is to leave out.

A source is known only by its last name, so samples of `a/train` and `b/train` may have the same
name; a list that cannot distinguish them is refused.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import QUARANTINE_COLUMNS
from unicl_fast.system.untrusted_files import open_file
from unicl_fast.system.wording import count_of

_REASONS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row: one sample, or a stretch of a file, that was left out."""

    source: str
    name: str
    kind: str
    message: str


def read_left_out(path: Path, *, num_rows: int | None = None) -> Iterator[LeftOut]:
    """Reads all rows of a quarantine.csv, in order; `num_rows` is what the manifest says.

    Raises ValueError if it is no such list or has another number of rows, FileNotFoundError if it
    is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the data set again")
    count = 0
    try:
        with open_file(path, "r", encoding="utf-8", newline="") as file:
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
            f"{path} is damaged or cut short: {count_of(count, 'row')}, the manifest says "
            f"{num_rows}; copy the data set again"
        )


def count_left_out(path: Path) -> dict[str, int]:
    """How many samples a quarantine.csv lists by kind, most first."""
    return dict(Counter(row.kind for row in read_left_out(path)).most_common())


def describe_left_out(path: Path) -> str:
    """The counts by kind and the first few reasons, as text."""
    counts = count_left_out(path).items()
    first = itertools.islice(read_left_out(path), _REASONS_SHOWN)
    reasons = [f"  {row.name}: {row.message}" for row in first]
    return "\n".join([", ".join(f"{n:,} {kind}" for kind, n in counts), *reasons])


def as_listed(name: str) -> str:
    """A name as a list has it, which is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class LeaveOut:
    """The samples that `--leave-out FILE` names; `take` is asked once for each sample.

    Where the list names fewer than there are, nobody can say which ones it means: that is refused.
    """

    def __init__(self, path: str) -> None:
        """Reads the list, which has the columns `source` and `name`; "" names nothing."""
        self._path = path
        self._listed = _read_names(path) if path else Counter()
        """(source, name) of the samples, and in how many rows."""
        self._taken: Counter[tuple[str, str]] = Counter()

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self._listed)

    def take(self, source: str, name: str) -> bool:
        """Whether the list names this sample; more samples than the list names are refused."""
        key = as_listed(source), as_listed(name)
        if key not in self._listed:
            return False
        self._taken[key] += 1
        if self._taken[key] > (rows := self._listed[key]):
            raise ValueError(
                f"--leave-out: {self._path} names {key[1]} of {key[0]} in "
                f"{count_of(rows, 'row')}, and more samples are called so: "
                f"several sources are called {key[0]}, so which is meant cannot be known, and "
                "leaving all out would drop the one that is to stay. Pack sources under names of "
                "their own (links to them will do) and list copies anew. If all are to go, give "
                "the row as many times as there are samples"
            )
        return True


def _read_names(path: str) -> Counter[tuple[str, str]]:
    if is_url(path):
        raise ValueError(f"--leave-out takes a file on this machine, not {path}: copy it here")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--leave-out: there is no file {path}")
    try:
        with open_file(path, "r", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"source", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"it has the columns {rows.fieldnames}")
            return Counter((row["source"] or "", row["name"] or "") for row in rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"--leave-out: {path} should be a CSV file with the columns source and name: {error}"
        ) from error
