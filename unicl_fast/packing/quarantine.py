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

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import QUARANTINE_COLUMNS
from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.samples import Samples
from unicl_fast.system.untrusted_files import open_file
from unicl_fast.system.wording import count_of, encodable

_REASONS_SHOWN = 5

Mask = npt.NDArray[np.bool_]


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


def are_wanted(samples: Samples, listed: Counter[tuple[str, str]], path: str) -> Mask:
    """Masks the samples, bool [n], that `--leave-out` does not name; `listed` is of its `path`.

    Raises ValueError if more samples have a name than the list has rows: nobody can know which ones
    it means.
    """
    wanted, taken = np.ones(len(samples), np.bool_), Counter[tuple[str, str]]()
    for number, (source, item) in enumerate(samples):
        # as a list, which is UTF-8, spells them
        if (key := (encodable(source), encodable(item.name))) not in listed:
            continue
        wanted[number] = False
        taken[key] += 1
        if taken[key] > (rows := listed[key]):
            raise ValueError(
                f"--leave-out: {path} names {key[1]} of {key[0]} in {count_of(rows, 'row')}, and "
                f"more samples are called so: several sources are called {key[0]}, so it is "
                "unclear which one to leave out. Pack sources under different names (links to "
                "them will do) and list copies again. To leave all of them out, repeat the row as "
                "many times as there are samples"
            )
    return wanted


def read_leave_out(path: str) -> Counter[tuple[str, str]]:
    """How many rows name each (source, name), in a list for `--leave-out`."""
    if is_url(path):
        raise ValueError(f"--leave-out needs a file on this machine, not {path}: copy it here")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--leave-out: there is no file {path}")
    try:
        # row by row: a list of near copies can be larger than what is read at once
        with open_file(path, "r", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"source", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"it has the columns {rows.fieldnames}")
            return Counter((row["source"] or "", row["name"] or "") for row in rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"--leave-out: {path} should be a CSV file with the columns source and name: {error}"
        ) from error
