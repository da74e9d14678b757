"""OUT.partial: what a build has done so far, which the same command goes on with.

Beside the data set in the making and its journal (`unicl_fast.dataset.writer`) it holds a record of
what is built of what. Shards of another build must never get into this one, so whoever comes back
with other options or changed sources is told what differs. A lock keeps a second build out; the
kernel lets go of it with the process, however that ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from unicl_fast.dataset.growing_files import FinishedShard, read_journal
from unicl_fast.dataset.writer import JOURNAL_NAME, SET_NAME
from unicl_fast.system.atomic_files import flush_to_disk, is_at, lock, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.wording import count_of, shorten

_RECORD_NAME = "build.json"
_LOCK_NAME = "unicl-pack.lock"
_SHOWN = 5


class WorkFolder:
    """The folder; use it as a context manager.

    Left without `remove`, it stays if it holds finished shards, and is removed otherwise. What it
    keeps is added to the exception that ends the build, as a note.
    """

    def __init__(self, out: Path, *, restart: bool = False) -> None:
        """`restart` throws away what an earlier build has left."""
        self.path = work_folder_of(out)
        self._out = out
        self._restart = restart
        self._record: dict[str, Any] = {}
        self._finished: list[FinishedShard] = []
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        flush_to_disk(self._out.parent)
        if self._restart:
            self._clear()
        self._finished = read_journal(self.path / JOURNAL_NAME)
        if self._finished:
            try:
                self._record = parse_checksummed_json((self.path / _RECORD_NAME).read_bytes())
            except (ValueError, OSError) as error:
                os.close(self._lock)
                raise ValueError(
                    f"{self.path} holds an unfinished build, but what it was to become cannot be "
                    f"read ({error}); add --restart to begin anew, or name another --out"
                ) from error
        else:
            self._clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = describe_unfinished(self._out)
        if kept and error is not None:
            error.add_note(kept)
        elif not kept and self.path.is_dir():
            self.remove()
        os.close(self._lock)

    @property
    def spool(self) -> Path:
        """Where sources are unpacked; what was unpacked stays with the finished shards."""
        return self.path / "spool"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What was noted before the data set was renamed, if it was and nothing was done since."""
        if (self.path / SET_NAME).exists():
            return None
        found: dict[str, Any] | None = self._record.get("summary")
        return found

    def note_summary(self, summary: Mapping[str, Any]) -> None:
        """Notes what to report should the program die between renaming and removing."""
        self._note("summary", dict(summary))

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Notes what the build is made of; where shards are finished, it must be what it was.

        Args:
            what: the group of values, `options` or `sources`.
            values: JSON values; their names are how a user knows them.

        Raises:
            ValueError: something differs; the message names it.
        """
        if not self._finished:
            self._note(what, dict(values))
            return
        before = self._record.get(what, {})
        names = list(dict.fromkeys([*before, *values]))
        differences = [
            f"{name}: it was {_show(before.get(name))}, and is {_show(values.get(name))}"
            for name in names
            if before.get(name) != values.get(name)
        ]
        if differences:
            more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise ValueError(
                f"{self.path} holds {describe_finished(self._finished)} of a build with other "
                f"{what}:\n  " + "\n  ".join(differences[:_SHOWN]) + more + "\n"
                "Give these as they were to go on with it; or add --restart to throw it away and "
                "begin anew, or name another --out"
            )

    def remove(self) -> None:
        """Removes the folder: the build is done, or there is nothing worth keeping."""
        shutil.rmtree(self.path)

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_NAME:
                path.unlink()

    def _note(self, what: str, values: dict[str, Any]) -> None:
        self._record[what] = values
        write_text_atomically(self.path / _RECORD_NAME, dump_checksummed_json(self._record))


def work_folder_of(out: Path) -> Path:
    """Where a build of `out` keeps what it has done."""
    return out.with_name(f"{out.name}.partial")


def describe_unfinished(out: Path) -> str:
    """What an unfinished build of `out` has left, and how it goes on; empty if nothing."""
    folder = work_folder_of(out)
    finished = read_journal(folder / JOURNAL_NAME)
    if not finished:
        return ""
    return (
        f"{folder} keeps {describe_finished(finished)}; the same command goes on behind them, "
        "with --restart it begins anew"
    )


def describe_finished(finished: list[FinishedShard]) -> str:
    """Shards and samples in words."""
    samples = count_of(finished[-1].num_samples, "sample")
    return f"{count_of(len(finished), 'finished shard')} ({samples})"


def lock_folder(folder: Path) -> int:
    """Makes the folder and holds a lock on it until the descriptor is closed.

    Raises:
        ValueError: another process holds it, or the folder is none of ours.
    """
    path = folder / _LOCK_NAME
    while True:
        folder.mkdir(exist_ok=True)
        if not path.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is where an unfinished build would lie, and it holds something else; "
                "move it away or name another --out"
            )
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # a build that ended has just removed the folder
            continue
        if not lock(descriptor):
            os.close(descriptor)
            raise ValueError(
                f"another build is writing into {folder}; wait for it, or name another --out"
            )
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # of a folder that is gone


def _show(value: Any) -> str:
    return "not there" if value is None else shorten(value)
