"""The list of a run's bad samples, `quarantine.csv` in its folder: one row each, however often met.

Several ranks, and the same run after a restart, append to one file. Each row goes out in a single
write behind everything others wrote, under a lock, after reading what they wrote meanwhile; so the
rows stay whole and no sample stands there twice. Training never depends on the list: a file that
cannot be written is said and lived without.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from unicl_fast.system.atomic_files import lock

logger = logging.getLogger(__name__)

COLUMNS = ("data_set", "shard", "key", "offset", "reason")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """Where a sample lies, and what is wrong with it."""

    data_set: str
    """Folder of the packed data set."""
    shard: str
    """Name of the shard file."""
    key: str
    """Name of the sample in its shard."""
    offset: int
    """First byte of the image in the shard file."""
    reason: str


class QuarantineFile:
    """Appends to one list; not for several threads at once."""

    def __init__(self, path: Path) -> None:
        """Nothing is written before the first bad sample."""
        self.path = path
        self._listed: set[tuple[str, str]] = set()
        self._bytes_read = 0
        self._unfinished = b""
        self._has_failed = False

    def add(self, sample: BadSample) -> None:
        """Lists a sample, unless it stands there; says so once if it cannot."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path) as file:
                self._read_on(file)
                if (_printable(sample.data_set), sample.key) in self._listed:
                    return
                header = "" if self._bytes_read else _line(*COLUMNS)
                # a row that was cut off by a crash must not swallow the next one
                line_break = "\n" if self._unfinished else ""
                row = _line(*dataclasses.astuple(sample))
                data = (header + line_break + row).encode()
                if os.write(file, data) != len(data):
                    raise OSError("only part of a row could be written")
        except (OSError, csv.Error) as error:
            if not self._has_failed:
                logger.error("cannot write %s: %s; training goes on without it", self.path, error)
            self._has_failed = True

    def _read_on(self, file: int) -> None:
        """Takes in the rows that were written since the last look."""
        while data := os.pread(file, 1 << 20, self._bytes_read):
            self._bytes_read += len(data)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            text = [line.decode(errors="replace") for line in lines]
            self._listed |= {(row[0], row[2]) for row in csv.reader(text) if len(row) >= 3}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Where there are no locks there are appends all the same: a sample may stand there twice.
        with contextlib.suppress(OSError):
            lock(file, wait=True)
        yield file
    finally:
        os.close(file)  # and unlocks


def _line(*values: object) -> str:
    """One row of CSV on one line, in what UTF-8 can hold."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_printable(str(value)) for value in values])
    return text.getvalue()


def _printable(text: str) -> str:
    """On one line, and with names that are no UTF-8 escaped."""
    return " ".join(text.splitlines()).encode(errors="backslashreplace").decode()
