"""Small sources as other programs write them, and the items that they are read as."""

import io
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from unicl_fast.packing.sources.entries import EntryError
from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import read_sources
from unicl_fast.packing.sources.spool import Source, Spool

_NO_OPTIONS = ListOptions()


def read_source(
    place: object, options: ListOptions = _NO_OPTIONS, spool: Spool | None = None
) -> Source:
    """One source by itself; without a spool nothing can be unpacked."""
    (source,) = read_sources([str(place)], options, spool or Spool(Path(tempfile.gettempdir())))
    return source


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w") as archive:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def outcomes(source: Source) -> dict[str, str]:
    """What becomes of each item: the kind of its problem, or "read"."""
    return {item.name: outcome(item) for item in source.items}


def outcome(item: Item) -> str:
    if item.problem is not None:
        return item.problem.kind
    try:
        return "read" if item.entry.read() else "empty"
    except EntryError as error:
        return error.problem.kind


def texts(source: Source) -> dict[str, tuple[list[str], list[str | int]]]:
    """Captions and labels of what has no problem."""
    return {item.name: (item.captions, item.labels) for item in source.items if not item.problem}


def read(item: Item) -> bytes:
    return item.entry.read()
