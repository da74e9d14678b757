"""The files of a packed data set wherever it lies: in a folder, or under a URL.

`shards` asks here for what it does not map: how large files are, how one begins, a reader of the
large ones. Of a data set under a URL the small files lie in a folder too (`remote.mirror`), which
is then `folder`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.file_ranges import ShardReader
from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.remote.block_cache import BlockCache, CacheOptions
from unicl_fast.dataset.remote.block_reader import BlockReader, RemoteFile
from unicl_fast.dataset.remote.mirror import open_mirror
from unicl_fast.dataset.remote.object_store import ObjectStore, is_url


class FileReader(Protocol):
    """Reads ranges of some files by their number."""

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were."""

    def close(self) -> None:
        """Reading afterwards is an error."""


class DatasetFiles(Protocol):
    """What is asked of a data set's place."""

    place: str
    """As the user named it."""
    folder: Path
    """Where the manifest and the arrays lie."""

    def where(self, name: str) -> str:
        """A file's place, for messages."""

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        """Bytes of files; None of one that is not there, an error of one that cannot be asked."""

    def head_of(self, name: str, size: int) -> bytes:
        """The first bytes of a file.

        Raises:
            OSError: it cannot be read.
        """

    def reader(self, files: Sequence[RemoteFile]) -> FileReader:
        """A reader of large files."""


class LocalFiles:
    """Of a data set in a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.place = str(self.folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        return {name: _size_of(self.folder / name) for name in names}

    def head_of(self, name: str, size: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            return file.read(size)

    def reader(self, files: Sequence[RemoteFile]) -> ShardReader:
        return ShardReader(self.folder, [file.name for file in files])


class RemoteFiles:
    """Of a data set under a URL."""

    def __init__(self, url: str, options: CacheOptions, array_names: Sequence[str]) -> None:
        """Fetches the small files, those of `array_names` among them.

        Raises:
            FileNotFoundError: the URL is not that of a data set.
            ValueError: what came is not what its checksums say.
            StorageError: the store cannot be reached.
        """
        self.store = ObjectStore(url)
        self.place = self.store.url
        self.options = options
        self._cache = BlockCache(options.place, max_bytes=options.max_bytes)
        self.folder = open_mirror(self.store, options.place, array_names)
        self._manifest = (self.folder / MANIFEST_NAME).read_bytes()

    def where(self, name: str) -> str:
        return self.store.url_of(name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        found = self.store.find_all(names)
        return {name: None if one is None else one.size for name, one in found.items()}

    def head_of(self, name: str, size: int) -> bytes:
        return self.store.read(name, 0, size)

    def reader(self, files: Sequence[RemoteFile]) -> BlockReader:
        return BlockReader(self.store, files, self._cache, block_bytes=self.options.block_bytes)

    def is_unchanged(self) -> bool:
        """Whether the data set at the URL is still the one that was opened."""
        return self.store.read_whole(MANIFEST_NAME) == self._manifest


def files_of(
    place: str | os.PathLike[str], options: CacheOptions | None, array_names: Sequence[str]
) -> LocalFiles | RemoteFiles:
    """The files of the data set at a place, a path or a URL; raises what `RemoteFiles` does."""
    if is_url(place):
        return RemoteFiles(str(place), options or CacheOptions(), array_names)
    return LocalFiles(place)


def _size_of(path: Path) -> int | OSError | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError as error:
        return error
