"""Lists of samples by source and name: quarantine.csv, and the list for `--leave-out`.

A source is known only by its last name, so samples of `a/train` and `b/train` can have the same
name; a list that cannot distinguish them is refused.
"""

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
    """A row: one sample, or part of a file, that was left out."""

    source: str
    name: str
    kind: str
    message: str


def read_left_out(path: Path, *, num_rows: int | None = None) -> Iterator[LeftOut]:
    """Reads all rows of a quarantine.csv, in order; `num_rows` is the manifest's count.

    Raises ValueError for another kind of file or number of rows, FileNotFoundError without a file.
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


def count_left_out(path: Path, *, num_rows: int | None = None) -> dict[str, int]:
    """How many samples a quarantine.csv lists by kind, most first; raises like `read_left_out`."""
    return dict(Counter(row.kind for row in read_left_out(path, num_rows=num_rows)).most_common())


def describe_left_out(path: Path) -> str:
    """The counts by kind and the first few reasons, as text."""
    counts = count_left_out(path).items()
    first = itertools.islice(read_left_out(path), _REASONS_SHOWN)
    reasons = [f"  {row.name}: {row.message}" for row in first]
    return "\n".join([", ".join(f"{n:,} {kind}" for kind, n in counts), *reasons])


def _as_listed(name: str) -> str:
    """A name as a list, which is UTF-8, spells it."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class LeaveOut:
    """The samples that `--leave-out FILE` names; `take` is called once for each sample."""

    def __init__(self, path: str) -> None:
        """Reads the list, which has the columns `source` and `name`; "" names nothing."""
        self._path = path
        self._listed = _read_names(path) if path else Counter()
        """Number of rows by (source, name)."""
        self._taken: Counter[tuple[str, str]] = Counter()

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self._listed)

    def take(self, source: str, name: str) -> bool:
        """Whether the list names this sample.

        Raises ValueError if more samples have this name than the list has rows: nobody can know
        which ones it means.
        """
        key = _as_listed(source), _as_listed(name)
        if key not in self._listed:
            return False
        self._taken[key] += 1
        if self._taken[key] > (rows := self._listed[key]):
            raise ValueError(
                f"--leave-out: {self._path} names {key[1]} of {key[0]} in "
                f"{count_of(rows, 'row')}, and more samples are called so: several sources are "
                f"called {key[0]}, so it is unclear which one to leave out. Pack sources under "
                "different names (links to them will do) and list copies again. To leave all of "
                "them out, repeat the row as many times as there are samples"
            )
        return True


def _read_names(path: str) -> Counter[tuple[str, str]]:
    if is_url(path):
        raise ValueError(f"--leave-out needs a file on this machine, not {path}: copy it here")
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
