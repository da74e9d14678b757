"""Reads sources under URLs in place, through the size-limited cache of remote data sets."""

import functools
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import xxhash
from fsspec.spec import AbstractBufferedFile

from unicl_fast.dataset.block_cache import BlockCache, BlockReader, CachedFile, CacheOptions
from unicl_fast.dataset.in_place import identity_of
from unicl_fast.dataset.object_store import ObjectStore, is_url, split_url
from unicl_fast.system.untrusted_files import open_file
from unicl_fast.system.wording import without_secrets

_BUFFER_BYTES = 1 << 16


class StoredFile(NamedTuple):
    """An object as it was when first looked up."""

    num_bytes: int
    version: int
    """XXH3-64 of its version."""
    cached: CachedFile


@functools.lru_cache(maxsize=1 << 12)
def stored_file(url: str) -> StoredFile:
    """Looks up an object, once in a process; raises FileNotFoundError or StorageError."""
    root, name = split_url(url)
    found = _store(root).find(name)
    if found is None:
        raise FileNotFoundError(f"{url}: there is no such object")
    version = xxhash.xxh3_64_intdigest(found.version.encode())
    cached = CachedFile(_store(root), name, found.size, identity_of(url, version))
    return StoredFile(found.size, version, cached)


@functools.cache
def _store(url: str) -> ObjectStore:
    return ObjectStore(url)


@functools.cache
def _cache(options: CacheOptions) -> BlockCache:
    return BlockCache(options.place, max_bytes=options.max_bytes)


def read_range(url: str, offset: int, num_bytes: int) -> bytes:
    """Reads bytes of an object, up to its end; raises like `stored_file`."""
    data = np.empty(num_bytes, np.uint8)
    options = CacheOptions()
    reader = BlockReader(
        lambda _: stored_file(url).cached, _cache(options), block_bytes=options.block_bytes
    )
    return data[: reader.read_into(0, data, offset)].tobytes()


def open_source(path: str) -> BinaryIO:
    """Opens a file, or an object, for reading."""
    if not is_url(path):
        return cast("BinaryIO", open_file(path))
    return cast("BinaryIO", _RemoteFile(path))


class _RemoteFile(AbstractBufferedFile):  # type: ignore[misc]
    """An object as a seekable file."""

    def __init__(self, url: str) -> None:
        super().__init__(None, url, "rb", _BUFFER_BYTES, size=stored_file(url).num_bytes)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end - start)


def require_lasting(places: Iterable[str]) -> None:
    """Raises ValueError for URLs with secrets, which an index must not keep."""
    for place in filter(is_url, places):
        if without_secrets(place) != place or "?" in place:
            raise ValueError(
                f"{without_secrets(place)}: a URL with a password or a signature is not kept in an "
                "index; let the store's client find the keys, or leave --in-place out"
            )
