"""A run's `quarantine.csv`, which several ranks append to (`writer.py` has a build's)."""

import contextlib
import csv
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from unicl_fast.dataset.growing_files import csv_writer
from unicl_fast.system.atomic_files import lock
from unicl_fast.system.untrusted_files import open_regular
from unicl_fast.system.wording import encodable

logger = logging.getLogger(__name__)

COLUMNS = ("data_set", "shard", "key", "offset", "reason")
"""Folder of the packed data set, shard file, sample name in it, first byte of its image, fault."""


class RunQuarantine:
    """The list of a run's bad samples, one row each.

    Several ranks, and the same run after a restart, append to one file: each row in a single write,
    under a lock, after reading the others' new rows. Training never depends on the list: a failure
    to write is logged once. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        """Writes nothing before the first bad sample."""
        self.path = path
        self._listed: set[tuple[str, str]] = set()
        self._bytes_read = 0
        self._unfinished = b""
        self._has_failed = False

    def add(self, data_set: str, shard: str, key: str, offset: int, reason: str) -> None:
        """Lists a sample, unless it is listed; the arguments are the `COLUMNS`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path) as file:
                self._read_new_rows(file)
                if (_printable(data_set), key) in self._listed:
                    return
                header = "" if self._bytes_read else _line(*COLUMNS)
                # a row truncated by a crash must not swallow the next one
                line_break = "\n" if self._unfinished else ""
                row = _line(data_set, shard, key, offset, reason)
                data = (header + line_break + row).encode()
                if os.write(file, data) != len(data):
                    raise OSError("only part of a row could be written")
                self._read_new_rows(file)
        except (OSError, csv.Error) as error:
            if not self._has_failed:
                logger.error("cannot write %s: %s; training continues without it", self.path, error)
            self._has_failed = True

    def _read_new_rows(self, file: int) -> None:
        if os.fstat(file).st_size < self._bytes_read:
            logger.warning(
                "%s was removed or cut while the run wrote to it: samples that it listed before "
                "are in the log or lost", self.path,
            )  # fmt: skip
            self._bytes_read, self._unfinished = 0, b""
            self._listed.clear()
        while data := os.pread(file, 1 << 20, self._bytes_read):
            self._bytes_read += len(data)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            text = [line.decode(errors="replace") for line in lines]
            self._listed |= {(row[0], row[2]) for row in csv.reader(text) if len(row) >= 3}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)[0]
    try:
        # A file system without locks still appends: a sample may then be listed twice.
        with contextlib.suppress(OSError):
            lock(file, wait=True)
        yield file
    finally:
        os.close(file)  # and unlocks


def _line(*values: object) -> str:
    """One row of CSV on one line, valid UTF-8."""
    text = io.StringIO()
    csv_writer(text).writerow([_printable(str(value)) for value in values])
    return text.getvalue()


def _printable(text: str) -> str:
    """Text on one line; bytes of names that are not UTF-8 are escaped."""
    return encodable(" ".join(text.splitlines()))
