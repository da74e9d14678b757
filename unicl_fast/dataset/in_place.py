"""Source files of a data set in place: tars or single images, all in folders or all under URLs."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from unicl_fast.dataset.arrays import IN_PLACE_DTYPES, NO_FILE, length_of, open_array
from unicl_fast.dataset.block_cache import BlockCache, BlockReader, CachedFile, CacheOptions
from unicl_fast.dataset.files import LocalReader
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.object_store import ObjectStore, is_url, split_url

_MOST_COMPARED, _MOST_ASKED = 65_536, 1024
"""Most source files, in folders and under URLs, whose sizes are compared at opening; with more,
changes are found when reading."""


class Place(NamedTuple):
    """The byte range of an image in a source file."""

    file: int
    offset: int
    size: int


class SourceFiles:
    """Paths or URLs of source files by number, built on access."""

    def __init__(self, folder: Path, manifest: Manifest, cache: CacheOptions | None) -> None:
        """Opens the arrays in `folder`, as `open_array`."""
        self.arrays = {
            # plain arrays, whose rows cost a third of the time
            name: np.asarray(open_array(folder / f"{name}.npy", dtype, length_of(manifest, name)))
            for name, dtype in IN_PLACE_DTYPES.items()
        }
        self.rows, self.places = self.arrays["files"], self.arrays["places"]
        self._folder = os.path.realpath(folder)
        self._stores: dict[str, ObjectStore] = {}
        self.cache: CacheOptions | None = None
        """None if source files are in folders."""
        if len(self) and is_url(self[0]):
            self.cache = cache or CacheOptions()
        self.reader = self._open_reader()
        """Reads source files by number."""

    def _open_reader(self) -> LocalReader | BlockReader:
        if self.cache is None:
            return LocalReader(Path(self._folder), self.__getitem__)
        blocks = BlockCache(self.cache.place, max_bytes=self.cache.max_bytes)
        return BlockReader(
            functools.lru_cache(1 << 12)(self._cached), blocks, block_bytes=self.cache.block_bytes
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> str:
        """A URL or a path; a path is stored as absolute, or relative to the data set's folder."""
        start, length = self.rows[["name_start", "name_length"]].item(number)
        name = os.fsdecode(self.arrays["names"][start : start + length].tobytes())
        if name.startswith("/") or is_url(name):
            return name
        return os.path.normpath(os.path.join(self._folder, name))

    @property
    def num_bytes_fetched(self) -> int:
        """Bytes that this process has read from stores."""
        return sum(store.read_bytes for store in self._stores.values())

    def place_of(self, index: int) -> Place | None:
        """The place of a sample's image; None if it is in the data set's own shard."""
        file, offset, size = self.places.item(index)
        return None if file == NO_FILE else Place(file, offset, size)

    def changed(self) -> Iterator[tuple[str, int]]:
        """Yields a message and the number of images for each source file of another size.

        Nothing is checked if there are very many.
        """
        if len(self) > (_MOST_COMPARED if self.cache is None else _MOST_ASKED):
            return
        wrong = {}
        for number, found in enumerate(self._sizes()):
            if found != int(self.rows[number]["num_bytes"]):
                wrong[number] = self.describe_change(number, found)
        if wrong:
            files = self.places["file"]
            counts = np.bincount(files[files != NO_FILE], minlength=len(self))
            for number, message in wrong.items():
                yield message, int(counts[number])

    def describe_change(self, number: int, found: int | None = None) -> str:
        """Says how a source file has changed, and what to do; it has `found` bytes now."""
        expected = int(self.rows[number]["num_bytes"])
        now = "it is missing" if found is None else f"it has {found} bytes"
        if found == expected:
            now = "its size is the same, its content is not"
        return (
            f"{self[number]} is not what was indexed, of {expected} bytes: {now}; put it back as "
            f"it was, or index it again: unicl-pack build --in-place SOURCE --out NEW"
        )

    def size_now(self, number: int) -> int | None:
        """The current size of a source file; None if it is missing."""
        if self.cache is None:
            return _size_of(self[number])
        store, name = self._object(number)
        found = store.find(name)
        return None if found is None else found.size

    def _sizes(self) -> Iterator[int | None]:
        if self.cache is None:
            yield from (_size_of(self[number]) for number in range(len(self)))
            return
        urls = [self[number].partition("://") for number in range(len(self))]
        above = os.path.commonpath([place.rpartition("/")[0] for *_, place in urls])
        if not above or len({protocol for protocol, *_ in urls}) > 1:  # in several buckets
            return
        # if the store can list, one listing of their common folder serves all
        store = ObjectStore(f"{urls[0][0]}://{above}")
        names = [place.removeprefix(f"{above}/") for *_, place in urls]
        found = store.find_all(names)
        yield from (None if (one := found[name]) is None else one.size for name in names)

    def _cached(self, number: int) -> CachedFile:
        store, name = self._object(number)
        row = self.rows[number]
        identity = identity_of(self[number], int(row["version"]))
        return CachedFile(store, name, int(row["num_bytes"]), identity)

    def _object(self, number: int) -> tuple[ObjectStore, str]:
        root, name = split_url(self[number])
        return self._stores.setdefault(root, ObjectStore(root)), name


def identity_of(url: str, version: int) -> str:
    """The cache's name for an object's content."""
    return xxhash.xxh3_64_hexdigest(f"{url}\0{version}".encode())


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
