"""OUT.partial: the work of an unfinished build, with which the same command resumes.

Next to the unfinished data set and its journal (`unicl_fast.dataset.writer`) it holds a record of
what the build is made of: its options, and a checksum of each source. Shards of another build must
never get into this one, so a command with other options or changed sources is refused with the
difference. A lock keeps a second build out; the kernel releases it when the process ends, however
that happens.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

import unicl_fast
from unicl_fast.dataset.growing_files import FinishedShard, read_journal
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.writer import JOURNAL_NAME, SET_NAME, read_made_of
from unicl_fast.packing.sources.items import Label, Source
from unicl_fast.packing.sources.spool import ItemStore, stamp
from unicl_fast.system.atomic_files import (
    flush_to_disk,
    is_at,
    lock,
    make_folder,
    write_text_atomically,
)
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum, parse_checksummed_json
from unicl_fast.system.wording import count_of, shorten, without_secrets

_RECORD_NAME = "build.json"
_LOCK_NAME = "unicl-pack.lock"
_COPIES_NAME = "copies"
_SHOWN = 5
_FILES = ("class_names", "templates", "leave_out", "hierarchy", "hierarchy_names")
"""Options that may name a file, whose contents then matter and not its name."""
_LISTS = ("where", "min_score", "hierarchy_columns")
_MADE_BY = ("pillow", "simplejpeg", "tokenizers")
"""Packages whose versions may show in the bytes that are written."""


class WorkFolder:
    """The folder; use it as a context manager.

    Left without `remove`, it stays if it holds finished shards, and is removed otherwise. An
    exception that ends the build gets a note about what the folder keeps.
    """

    def __init__(self, out: Path, *, restart: bool = False) -> None:
        """`restart` throws away the work of an earlier build."""
        self.path = out.with_name(f"{out.name}.partial")
        self._out = out
        self._restart = restart
        self._record: dict[str, Any] = {}
        self._finished: list[FinishedShard] = []
        self.is_complete = False
        """Whether an earlier build has finished the data set; nothing is left to do if
        `require_same` finds that it is the same build."""
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        make_folder(self._out.parent)
        self._lock = lock_folder(self.path)
        flush_to_disk(self._out.parent)
        made_of = None if (self.path / SET_NAME).exists() else read_made_of(self._out)
        if made_of is not None:
            self._record, self.is_complete = made_of, True
        if self._restart or self.is_complete:
            self._clear()
        self._finished = read_journal(self.path / JOURNAL_NAME)
        if not self._finished:
            self._clear()
            return self
        try:
            self._record = parse_checksummed_json((self.path / _RECORD_NAME).read_bytes())
        except (ValueError, OSError) as error:
            os.close(self._lock)
            raise ValueError(
                f"{self.path} holds an unfinished build, but what it was to become cannot be read "
                f"({error}); add --restart to begin anew, or name another --out"
            ) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        finished = read_journal(self.path / JOURNAL_NAME)
        if finished and error is not None:
            error.add_note(
                f"{self.path} keeps {_describe_finished(finished)}; the same command resumes after "
                "them, with --restart it begins anew"
            )
        elif not finished and self.path.is_dir():
            self.remove()
        os.close(self._lock)

    @property
    def spool(self) -> Path:
        """The folder of unpacked sources, which stay with the finished shards."""
        return self.path / "spool"

    @property
    def copies(self) -> Path:
        """The folder of copies of sources under URLs, which --restart keeps."""
        return self.path / _COPIES_NAME

    @property
    def record(self) -> dict[str, Any]:
        """The options and sources of the build; of a complete one also its summary."""
        return self._record

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Notes what the build is made of; once a shard is finished, it must be what it was.

        `what` names the group of values, `options` or `sources`. Values are JSON, under names that
        a user knows.

        Raises:
            ValueError: something differs; the message names it.
        """
        if not self.is_complete and not self._finished:
            self._record[what] = dict(values)
            text = dump_checksummed_json(self._record)
            write_text_atomically(self.path / _RECORD_NAME, text)
        elif differences := _differences(self._record.get(what, {}), values):
            if self.is_complete:
                raise ValueError(
                    f"{self._out} already holds a packed data set, made with other {what}:"
                    f"{differences}\nName another folder, or remove it"
                )
            raise ValueError(
                f"{self.path} holds {_describe_finished(self._finished)} of a build with other "
                f"{what}:{differences}\n"
                "Give these as they were to resume it; or add --restart to throw it away and "
                "begin anew, or name another --out"
            )

    def remove(self) -> None:
        """Removes the folder: the build is done, or there is nothing worth keeping."""
        self._clear()
        shutil.rmtree(self.path)

    def _clear(self) -> None:
        """Empties the folder but for copies, and the lock by which it is known as ours."""
        # first of all: without it, a program that is killed on the way leaves nothing to resume
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name in (_COPIES_NAME, _LOCK_NAME):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _differences(before: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The first few values that differ, a line for each; empty if none does."""

    def show(value: Any) -> str:
        return "not there" if value is None else shorten(value, limit=200)

    found = [
        f"\n  {name}: it was {show(before.get(name))}, and is {show(values.get(name))}"
        for name in dict.fromkeys([*before, *values])
        if before.get(name) != values.get(name)
    ]
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "".join(found[:_SHOWN]) + more


def _describe_finished(finished: list[FinishedShard]) -> str:
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


def shown_place(place: str) -> str:
    """A path as it is, a URL without passwords, which are as good as others for the same data."""
    return without_secrets(place) if is_url(place) else place


def describe_options(sources: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Lists all that a data set depends on besides the contents of its sources, as JSON values."""
    described: dict[str, Any] = {"sources": list(map(shown_place, sources))}
    for name, value in options.items():
        plain: Any = os.fspath(value) if isinstance(value, os.PathLike) else value
        described[f"--{name.replace('_', '-')}"] = list(plain) if name in _LISTS else plain
        if name in _FILES and plain and os.path.isfile(plain):
            described[f"contents of {plain}"] = file_checksum(Path(plain))
    described["--image-root"] = shown_place(image_root := options["image_root"])
    places = [place for place in (*sources, image_root) if place and not is_url(place)]
    described["where the sources lie"] = list(map(os.path.realpath, places))
    described["version of unicl_fast"] = unicl_fast.__version__
    for package in _MADE_BY:
        described[f"version of {package}"] = importlib.metadata.version(package)
    return described


def survey_source(source: Source) -> tuple[dict[Label, None], str]:
    """The labels of a source, and a checksum.

    The checksum covers what was read of every sample (name, place of the image, texts) and size and
    time of the files that hold the images. Two builds with the same checksums pack the same, unless
    somebody changes files and puts their times back.

    Returns:
        Distinct labels in the order of their first sample; number of samples and checksum as text.
    """
    items = source.items
    assert isinstance(items, ItemStore), "which all readers make"
    return items.labels(), f"{count_of(len(items), 'sample')}, checksum {items.checksum()}"


def stamp_all(paths: Sequence[str]) -> str:
    """A checksum of the stamps of files."""
    text = json.dumps([stamp(path) for path in paths])
    return (
        f"{count_of(len(paths), 'file')}, checksum "
        f"{xxhash.xxh3_128_hexdigest(text.encode('ascii'))}"
    )
