"""What a build is made of: its options, and the labels and a checksum of each source.

The checksum covers what was read of every sample - name, place of the image, texts - and size and
time of the files that hold the images. Two builds with the same checksums pack the same, unless
somebody changes files and puts their times back.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

import unicl_fast
from unicl_fast.packing.sources.items import Entry, Item, Label, Source, field_names
from unicl_fast.packing.sources.spool import Spool, stamp
from unicl_fast.packing.sources.trees import FileEntry
from unicl_fast.system.checksums import file_checksum

_ENCODER = json.JSONEncoder(separators=(",", ":"), default=repr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was found in one source."""

    labels: dict[Label, None]
    """Distinct ones, in the order of their first sample."""
    checksum: str
    """Number of samples and their checksum, as text."""


def survey_source(source: Source, spool: Spool) -> Survey:
    """Goes through the samples of a source."""
    labels: dict[Label, None] = {}
    digest = xxhash.xxh3_128()
    holders: dict[str, None] = {}
    count = 0
    for item in source.items:
        count += 1
        labels.update(dict.fromkeys(item.labels))
        digest.update(_spell(item, spool, holders))
    for path in holders:
        digest.update(json.dumps(stamp(path)).encode("ascii"))
    return Survey(labels=labels, checksum=f"{count:,} samples, checksum {digest.hexdigest()}")


def stamp_all(paths: Sequence[str]) -> str:
    """A checksum of the stamps of files."""
    text = json.dumps([stamp(path) for path in paths])
    return f"{len(paths):,} files, checksum {xxhash.xxh3_128_hexdigest(text.encode('ascii'))}"


def _spell(item: Item, spool: Spool, holders: dict[str, None]) -> bytes:
    """An item as bytes that are equal for equal items; notes the file that holds its image."""
    problem = item.problem and (item.problem.kind, item.problem.message)
    entry = None if item.entry is None else _spell_entry(item.entry, spool, holders)
    fields = [item.name, entry, item.captions, item.labels, problem, item.position]
    return _ENCODER.encode(fields).encode("ascii")


def _spell_entry(entry: Entry, spool: Spool, holders: dict[str, None]) -> list[Any]:
    spelled: list[Any] = [type(entry).__name__]
    for name in field_names(type(entry)):
        value = getattr(entry, name)
        if name in ("path", "archive"):
            inside = spool.locate(value)
            if inside is None and not isinstance(entry, FileEntry):  # which knows its own time
                holders[value] = None
            value = value if inside is None else f"unpacked {inside}"
        spelled.append(value)
    return spelled


_FILES = ("class_names", "templates", "leave_out", "retry")
"""Options that may name a file, whose contents then matter and not its name."""
_MADE_BY = ("pillow", "simplejpeg", "tokenizers")
"""Packages whose versions may show in the bytes that are written."""


def describe_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a data set depends on besides its sources, as JSON values.

    Args:
        arguments: of the build, without those that only change how fast it is.
    """
    described: dict[str, Any] = {}
    for name, value in arguments.items():
        plain = [*map(os.fspath, value)] if isinstance(value, (list, tuple)) else value
        plain = os.fspath(plain) if isinstance(plain, os.PathLike) else plain
        described["sources" if name == "sources" else f"--{name.replace('_', '-')}"] = plain
        if name in _FILES and plain and os.path.isfile(plain):
            described[f"contents of {plain}"] = file_checksum(Path(plain))
    places = [*arguments["sources"], *filter(None, [arguments["image_root"]])]
    described["where the sources lie"] = [os.path.realpath(place) for place in places]
    described["version of unicl_fast"] = unicl_fast.__version__
    for package in _MADE_BY:
        described[f"version of {package}"] = importlib.metadata.version(package)
    return described
