"""`unicl-pack build --in-place`: images stay in their source files.

A file's samples stay together, in its order, so that training reads each stored block once; the
files are shuffled. With a known index, unchanged images are not checked again.
"""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import NO_FILE
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import SourcePlace
from unicl_fast.packing.samples import Samples
from unicl_fast.packing.sources.entries import Entry, FileEntry, PackedFile, Span
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.urls import stored_file

_READ_IN_PLACE: set[type[Entry]] = {FileEntry, Span, PackedFile}
UInt64Array = npt.NDArray[np.uint64]


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
        name = path if os.path.isabs(path) else os.path.relpath(whole_path(path), self._out)
        return name, status.st_size, status.st_mtime_ns


_real_folder = functools.lru_cache(maxsize=1 << 10)(os.path.realpath)


def whole_path(path: str) -> str:
    """A path without links above the file, or a URL."""
    folder, name = os.path.split(path)
    return path if is_url(path) else os.path.join(_real_folder(folder), name)


class KnownImages:
    """The images of an index, found by their places; 16 bytes of memory for each."""

    def __init__(self, folder: str, out: Path) -> None:
        """Raises ValueError if `folder` is no data set in place, or its source files changed."""
        self._dataset = PackedDataset(folder, max_bad_fraction=None)
        self._places = Places(out)
        self.notes: Counter[str] = Counter()
        """How many images were found, in words."""
        sources = self._dataset.sources
        if sources is None:
            raise ValueError(f"--known needs a data set of build --in-place, which {folder} is not")
        rows = sources.rows
        keys = [
            _file_key(whole_path(sources[n]), int(rows[n]["num_bytes"]), int(rows[n]["version"]))
            for n in range(len(sources))
        ]
        found = np.flatnonzero(sources.places["file"] != NO_FILE)
        mine = sources.places[found]
        files = np.array(keys, np.uint64)[mine["file"]] if len(keys) else np.empty(0, np.uint64)
        sample_keys = _mix(files, mine["offset"], mine["size"].astype(np.uint64))
        order = np.argsort(sample_keys, kind="stable")
        self._keys, self._numbers = sample_keys[order], found[order]

    def replace(self, entry: Entry) -> Entry:
        """The entry, or a `PackedFile` that is not checked again if its file is unchanged."""
        if isinstance(entry, PackedFile) or not isinstance(entry, (FileEntry, Span)):
            return entry
        try:
            place = self._places.of(entry)
        except OSError:
            return entry
        file = _file_key(whole_path(entry.path), place.num_bytes, place.version)
        key = _mix(*np.array([[file], [place.offset], [place.size]], np.uint64))[0]
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return entry
        self.notes["images that --known has, and that were not looked at again"] += 1
        row = self._dataset.samples[int(self._numbers[at])]
        size = int(row["height"]), int(row["width"])
        return PackedFile(entry.path, place.offset, place.size, *size, int(row["xxh3"]))


def _file_key(path: str, num_bytes: int, version: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{num_bytes} {version} ".encode() + os.fsencode(path))


def _mix(files: UInt64Array, offsets: UInt64Array, sizes: UInt64Array) -> UInt64Array:
    """Keys of images, from the keys of their files."""
    mixed: UInt64Array = files + offsets * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (sizes * np.uint64(0xC2B2AE3D27D4EB4F))
