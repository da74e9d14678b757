"""OUT.partial: the work of an unfinished build, from which the same command resumes.

Next to the unfinished data set and its journal (`unicl_fast.dataset.writer`) it holds a record of
the options and a checksum of each source; a command with other ones is refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.dataset.growing_files import FinishedShard, read_journal
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.writer import JOURNAL_NAME, SET_NAME, read_made_of
from unicl_fast.system.atomic_files import (
    LOCK_NAME,
    flush_to_disk,
    make_folder,
    sole_writer,
    write_text_atomically,
)
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum, parse_checksummed_json
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.system.version import __version__
from unicl_fast.system.wording import config_diff, count_of, without_secrets

_RECORD_NAME = "build.json"
_COPIES_NAME = "copies"
_SHOWN = 5
_FILES = ("class_names", "templates", "leave_out", "hierarchy", "hierarchy_names")
"""Options that can name a file, whose contents matter too."""
_MADE_BY = ("pillow", "simplejpeg", "tokenizers", "ftfy", "regex")
"""Packages whose versions can change the bytes that are written."""


@contextlib.contextmanager
def work_folder(out: Path, *, restart: bool = False) -> Iterator[WorkFolder]:
    """Locks and opens the work folder of `out`; it stays if it holds finished shards.

    An exception that ends the build gets a note about them. Raises ValueError if another process
    holds the folder, it is not ours, or its record is damaged.
    """
    path = out.with_name(f"{out.name}.partial")
    if path.is_symlink():  # `rmtree` removes a folder, but no link to one
        raise ValueError(f"{path} is a link: remove it, or name an --out beside its folder")
    names = set(os.listdir(path)) if path.is_dir() else set()
    if names and not names & {LOCK_NAME, _RECORD_NAME}:
        raise ValueError(
            f"{path} is the folder for an unfinished build, and it holds something else; "
            "move it away or name another --out"
        )
    make_folder(out.parent)
    with sole_writer(path):
        flush_to_disk(out.parent)
        work = WorkFolder(out, path, restart=restart)
        try:
            yield work
        except BaseException as error:
            if finished := read_journal(path / JOURNAL_NAME):
                error.add_note(
                    f"{path} keeps {_describe_finished(finished)}; the same command resumes after "
                    "them, with --restart it begins anew"
                )
            raise
        finally:
            if path.is_dir() and not read_journal(path / JOURNAL_NAME):
                work.remove()


class WorkFolder:
    """The locked folder."""

    def __init__(self, out: Path, path: Path, *, restart: bool) -> None:
        """Reads the record of an earlier build; `restart` throws its work away."""
        self.path = path
        self.out = out
        self.record: dict[str, Any] = {}
        """The options and sources of the build, and a complete build's summary."""
        self.is_complete = False
        """Whether a build has finished the data set; `require_same` says if it was this one."""
        made_of = None if (path / SET_NAME).exists() else read_made_of(out)
        if made_of is not None:
            self.record, self.is_complete = made_of, True
        if restart or self.is_complete:
            self._clear()
        self._finished = read_journal(path / JOURNAL_NAME)
        if not self._finished:
            self._clear()
            return
        try:
            self.record = parse_checksummed_json(read_file(path / _RECORD_NAME))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path} holds an unfinished build whose record cannot be read "
                f"({error}); add --restart to begin anew, or name another --out"
            ) from error

    @property
    def spool(self) -> Path:
        """The folder of unpacked sources, kept with the finished shards."""
        return self.path / "spool"

    @property
    def copies(self) -> Path:
        """The folder of copies of sources under URLs, which --restart keeps."""
        return self.path / _COPIES_NAME

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Records the inputs of the build; once a shard is finished, they must not change.

        `what` names the group of values, such as `options`. Values are JSON, by the names that a
        user knows. Raises ValueError, with the differences, if any value has changed.
        """
        if not self.is_complete and not self._finished:
            self.record[what] = dict(values)
            text = dump_checksummed_json(self.record)
            write_text_atomically(self.path / _RECORD_NAME, text)
        elif found := list(config_diff(self.record.get(what, {}), values)):
            more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            differences = "".join(f"\n  {line}" for line in found[:_SHOWN] + more)
            if self.is_complete:
                raise ValueError(
                    f"{self.out} already holds a packed data set, made with other {what}:"
                    f"{differences}\nName another folder, or remove it"
                )
            raise ValueError(
                f"{self.path} holds {_describe_finished(self._finished)} of a build with other "
                f"{what}:{differences}\nGive these as they were to resume it; or add --restart to "
                "throw it away and begin anew, or name another --out"
            )

    def remove(self) -> None:
        """Removes the folder: the build is done, or has nothing to keep."""
        self._clear()
        shutil.rmtree(self.path)

    def _clear(self) -> None:
        """Empties the folder, except for copies and the lock, which marks it as ours."""
        # the journal first: a program killed here then leaves nothing to resume
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name in (_COPIES_NAME, LOCK_NAME):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _describe_finished(finished: list[FinishedShard]) -> str:
    samples = count_of(finished[-1].num_samples, "sample")
    return f"{count_of(len(finished), 'finished shard')} ({samples})"


def _shown(place: str) -> str:
    """A path, or a URL without its password, which can change."""
    return without_secrets(place) if is_url(place) else place


def describe_options(sources: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a data set depends on, except the contents of its sources, as JSON values."""
    described: dict[str, Any] = {"sources": list(map(_shown, sources))}
    for name, value in options.items():
        plain: Any = os.fspath(value) if isinstance(value, os.PathLike) else value
        described[f"--{name.replace('_', '-')}"] = plain
        if name in _FILES and plain and os.path.isfile(plain):
            described[f"contents of {plain}"] = file_checksum(Path(plain))
    described["--image-root"] = _shown(image_root := os.fspath(options["image_root"]))
    places = [place for place in (*sources, image_root) if place and not is_url(place)]
    described["where the sources lie"] = list(map(os.path.realpath, places))
    described["version of unicl_fast"] = __version__
    for package in _MADE_BY:
        described[f"version of {package}"] = importlib.metadata.version(package)
    return described
