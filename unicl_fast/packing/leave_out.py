"""`--leave-out FILE` of build and merge: samples that a list names by source and name.

A source is known by its last name alone, so samples of `a/train` and `b/train` may be called alike.
Where a list names fewer than there are, nobody can say which ones it means, and to drop them all
would drop those that it leaves: that is refused.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from unicl_fast.dataset.remote.object_store import is_url
from unicl_fast.packing.quarantine import as_listed
from unicl_fast.system.wording import count_of


class LeaveOut:
    """The samples of a list; `take` is asked once for each sample of a build or merge."""

    def __init__(self, path: str) -> None:
        """Reads the list.

        Args:
            path: a CSV file whose header has the columns `source` and `name`, as quarantine.csv and
                what `unicl-pack inspect --duplicates-list` writes; "" names nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not such a list.
        """
        self._path = path
        self._listed = _read(path) if path else Counter()
        self._taken: Counter[tuple[str, str]] = Counter()

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self._listed)

    def names(self, source: str, name: str) -> bool:
        """Whether the list names a sample of this source, as it is called there."""
        return (as_listed(source), as_listed(name)) in self._listed

    def take(self, source: str, name: str) -> bool:
        """Like `names`; counts the sample.

        Raises:
            ValueError: more samples are called so than the list names.
        """
        if not self.names(source, name):
            return False
        key = as_listed(source), as_listed(name)
        self._taken[key] += 1
        if self._taken[key] > (rows := self._listed[key]):
            raise ValueError(
                f"--leave-out: {self._path} names {key[1]} of {key[0]} in "
                f"{count_of(rows, 'row')}, and more samples are called so: "
                f"several sources are called {key[0]}, so which is meant cannot be told, and "
                "leaving all out would drop the one that is to stay. Pack sources under names of "
                "their own (links to them will do) and list copies anew; equal files need no list, "
                "--duplicates join makes one sample of them. If all are to go, give the row as "
                "many times as there are samples"
            )
        return True


def _read(path: str) -> Counter[tuple[str, str]]:
    """Sources and names as the list has them, and in how many rows."""
    if is_url(path):
        raise ValueError(f"--leave-out takes a file on this machine, not {path}: copy it here")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--leave-out: there is no file {path}")
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"source", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"it has the columns {rows.fieldnames}")
            return Counter((row["source"] or "", row["name"] or "") for row in rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"--leave-out: {path} should be a CSV file with the columns source and name: {error}"
        ) from error
