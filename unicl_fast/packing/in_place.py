"""`unicl-pack build --in-place`: images stay in their source files.

A file's samples stay together, in its order, so that training reads each stored block once; the
files are shuffled.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.writer import SourcePlace
from unicl_fast.packing.samples import Samples
from unicl_fast.packing.sources.entries import Entry, FileEntry, PackedFile, Span
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.urls import stored_file

_READ_IN_PLACE: set[type[Entry]] = {FileEntry, Span, PackedFile}


def require_in_place(sources: Sequence[Source], spool: Spool) -> None:
    """Refuses sources whose images are not consecutive bytes of a file."""
    for source in sources:
        if not source.items.kinds <= _READ_IN_PLACE or spool.has_files:
            raise ValueError(
                f"{source.name}: --in-place works with tars, and folders or lists of files; images "
                "in a zip, in Parquet or kept as pixels are packed without it"
            )


def shuffled_files(samples: Samples, *, seed: int) -> npt.NDArray[np.int64]:
    """All samples' numbers, int64 [n], file by file; a seed gives the same order everywhere."""
    files, last, count = np.empty(len(samples), np.int64), None, 0
    for number, (_, item) in enumerate(samples):
        path = getattr(item.entry, "path", last)
        count += number > 0 and path != last
        files[number], last = count, path
    keys = np.random.PCG64(seed).random_raw(count + 1)  # as `shuffled_order`
    return np.argsort(keys[files], kind="stable")


class Places:
    """Locates images in their source files, for a data set in `out`."""

    def __init__(self, out: Path) -> None:
        self._out = os.path.join(os.path.realpath(out.parent), out.name)
        self._are_urls: bool | None = None
        self._file = functools.lru_cache(maxsize=1 << 10)(self._describe)

    def of(self, entry: Entry) -> SourcePlace:
        """The place of an image; raises ValueError if only some images are under URLs."""
        assert isinstance(entry, (FileEntry, Span, PackedFile))
        if self._are_urls is None:
            self._are_urls = is_url(entry.path)
        if is_url(entry.path) != self._are_urls:
            raise ValueError(
                f"{entry.path} and images before it are not all in folders, or all under URLs: "
                "index each kind by itself, and give both to --data.train"
            )
        return SourcePlace(*self._file(entry.path), getattr(entry, "offset", 0), entry.num_bytes)

    def _describe(self, path: str) -> tuple[str, int, int]:
        """Name, size and version of a source file."""
        if is_url(path):
            found = stored_file(path)
            return path, found.num_bytes, found.version
        status = os.stat(path)
        if not os.path.isabs(path):  # without links above the file
            folder, file = os.path.split(path)
            path = os.path.relpath(os.path.join(os.path.realpath(folder), file), self._out)
        return path, status.st_size, status.st_mtime_ns % 2**64  # before 1970 it is negative
