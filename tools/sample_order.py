"""The order in which samples are packed, and lists of samples that are to be left out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, in the same order for the same seed, anywhere.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the numbers are sorted by raw 64-bit numbers.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def read_leave_out(path: str) -> frozenset[tuple[str, str]]:
    """Sources and names of samples to leave out, as lists have them; empty without a file.

    Args:
        path: a CSV file whose header has the columns `source` and `name`, as quarantine.csv and
            what `unicl-pack inspect --duplicates-list` writes; "" for none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a list.
    """
    if not path:
        return frozenset()
    if not Path(path).is_file():
        raise FileNotFoundError(f"--leave-out: there is no file {path}")
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"source", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"it has the columns {rows.fieldnames}")
            return frozenset((row["source"] or "", row["name"] or "") for row in rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"--leave-out: {path} should be a CSV file with the columns source and name: {error}"
        ) from error
