"""A data set's files, in a folder or under a URL, and how they are read.

Under a URL, large files are read through `block_cache`; manifest, checksums and arrays are copied
into a local folder named by the first two, so a replaced data set gets another one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    HEADER_BYTES,
    PIXEL_DTYPE,
    PIXELS_NAME,
    PixelLayout,
    npy_header,
)
from unicl_fast.dataset.block_cache import (
    BlockCache,
    BlockReader,
    CachedFile,
    CacheOptions,
    LargeFiles,
    Ranges,
)
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest, shard_name
from unicl_fast.dataset.object_store import ObjectStore
from unicl_fast.system.atomic_files import locked, read_fully, replacing
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, parse_checksums
from unicl_fast.system.untrusted_files import open_file, open_regular, read_file
from unicl_fast.system.wording import count_of

logger = logging.getLogger(__name__)

# Beyond this many files one is opened for each read: descriptors are scarce (often 1,024 a
# process), and opening a local file costs a few microseconds.
_MAX_OPEN_FILES = 256
_READINGS = 3
_BETWEEN_READINGS_SECONDS = 1.0
_UNUSED_DAYS = 30  # local copies unused for so long are removed to make room

Fault = ValueError | FileNotFoundError


class LocalReader:
    """Reads ranges of one folder's large files and keeps them open; safe in several threads."""

    def __init__(self, folder: Path, name_of: Callable[[int], str]) -> None:
        """Opens nothing yet; names, by number, are absolute paths or relative to `folder`."""
        self._files: dict[int, int] = {}
        self._folder, self._name_of = folder, name_of
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalReader, (self._folder, self._name_of)  # a copy opens its own descriptors

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were, or raises OSError."""
        file = self._kept(number)
        if file >= 0:
            try:
                return read_fully(file, buffer.data, offset=offset)
            except OSError as error:
                # A network file system forgets a replaced file: open it again by name. The
                # descriptor stays open, since another thread may be reading through it.
                if error.errno != errno.ESTALE:
                    raise
        file = self._open(number)
        try:
            return read_fully(file, buffer.data, offset=offset)
        finally:
            os.close(file)

    def read_ranges(self, ranges: Ranges, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Returns bool [k], which ranges were complete; the content of the others is undefined."""
        from unicl_fast.system.kernels import pread_ranges  # here, because it loads Numba

        numbers, offsets, sizes, starts = ranges
        files = np.array([self._kept(number) for number in numbers.tolist()], np.int32)
        whole: npt.NDArray[np.bool_] = pread_ranges(files, offsets, sizes, buffer, starts)
        for i in np.flatnonzero(files < 0).tolist():
            part = buffer[starts[i] : starts[i] + sizes[i]]
            with contextlib.suppress(OSError):
                whole[i] = self.read_into(int(numbers[i]), part, int(offsets[i])) == len(part)
        return whole

    def _kept(self, number: int) -> int:
        """The descriptor of a file that stays open; -1 if there are too many, or it is gone."""
        if self._closed:
            raise ValueError(f"{self._folder} has been closed")
        if number not in self._files and len(self._files) < _MAX_OPEN_FILES:
            with contextlib.suppress(OSError):
                opened = self._open(number)
                if self._files.setdefault(number, opened) != opened:  # another thread was first
                    os.close(opened)
        return self._files.get(number, -1)

    def close(self) -> None:
        """Closes the files; reading afterwards raises ValueError."""
        self._closed = True
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, number: int) -> int:
        return open_regular(self._folder / self._name_of(number))[0]


FileReader = LocalReader | BlockReader


class LocalFiles:
    """The files of a data set in a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.location = str(self.folder)

    def where(self, name: str) -> str:
        """A file's path or URL, for messages."""
        return str(self.folder / name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        """Sizes of files; None for a missing one, the error for an inaccessible one."""
        return {name: _size_of(self.folder / name) for name in names}

    def head_of(self, name: str, size: int) -> bytes:
        """The first bytes of a file; OSError if it cannot be read."""
        with open_file(self.folder / name) as file:
            data: bytes = file.read(size)
        return data

    def reader(self, files: LargeFiles) -> FileReader:
        """A reader of large files, numbered in this order."""
        return LocalReader(self.folder, list(files).__getitem__)


class RemoteFiles:
    """The files of a data set under a URL, with `LocalFiles`' methods."""

    def __init__(self, url: str, options: CacheOptions, array_names: Sequence[str]) -> None:
        """Fetches the small files; errors as for `copy`."""
        self.store = ObjectStore(url)
        self.location = self.store.url
        self.options = options
        self._cache = BlockCache(options.place, max_bytes=options.max_bytes)
        self.folder = self.copy(array_names)
        self._manifest = read_file(self.folder / MANIFEST_NAME)

    def copy(self, names: Sequence[str]) -> Path:
        """Creates a folder with the manifest, the checksums and the named files of a data set.

        Files with matching checksums are not fetched again; missing ones are left to the reader.
        Raises FileNotFoundError if the URL has no data set, ValueError if data differ from their
        checksums, StorageError if the store cannot be reached.
        """
        manifest, checksums, listed = _read_heads(self.store)
        store, above = self.store, self.options.place / "datasets"
        identity = xxhash.xxh3_128_hexdigest(b"\0".join((store.url.encode(), manifest, checksums)))
        folder = above / identity / store.name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(above / f"{identity}.lock", wait=True):
            os.utime(folder.parent)
            for name in names:
                _fetch_if_changed(store, folder / name, listed.get(name))
            if checksums:
                _put(folder / CHECKSUMS_NAME, checksums)
            _put(folder / MANIFEST_NAME, manifest)
            # by the time just written: a clock that is set meanwhile must not remove this folder
            oldest = folder.parent.stat().st_mtime - _UNUSED_DAYS * 86_400
            for old in above.iterdir():
                if old.is_dir() and old.stat().st_mtime < oldest:
                    logger.info("%s was not used for %d days, and is removed", old, _UNUSED_DAYS)
                    shutil.rmtree(old, ignore_errors=True)
        return folder

    def where(self, name: str) -> str:
        return self.store.url_of(name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        found = self.store.find_all(names)
        return {name: None if one is None else one.size for name, one in found.items()}

    def head_of(self, name: str, size: int) -> bytes:
        return self.store.read(name, 0, size)

    def reader(self, files: LargeFiles) -> FileReader:
        cached = [CachedFile(self.store, name, x.num_bytes, x.xxh3) for name, x in files.items()]
        return BlockReader(cached.__getitem__, self._cache, block_bytes=self.options.block_bytes)

    def is_unchanged(self) -> bool:
        """Whether the URL still has the data set that was opened."""
        return self.store.read_whole(MANIFEST_NAME) == self._manifest


def check_files(
    files: LocalFiles | RemoteFiles,
    manifest: Manifest,
    *,
    layout: PixelLayout | None,
    changed_sources: Iterable[tuple[str, int]] = (),
    max_bad_fraction: float | None,
) -> None:
    """Compares the large files' sizes with the manifest, without reading them.

    Missing files and wrong sizes only cause a warning if they affect at most the fraction
    `max_bad_fraction` of the images, and not even that with None. Otherwise raises
    FileNotFoundError or ValueError; also if the manifest contradicts itself.
    """
    total = manifest.num_samples
    in_shards = sum(shard.num_samples for shard in manifest.shards)
    if in_shards != total:
        raise ValueError(
            f"{files.where(MANIFEST_NAME)} contradicts itself: {total} samples, but the shards "
            f"hold {in_shards}"
        )
    for number, shard in enumerate(manifest.shards):
        if shard.name != shard_name(number):
            raise ValueError(
                f"{files.where(MANIFEST_NAME)}: shard {number} should be called "
                f"{shard_name(number)}, not {shard.name!r}"
            )
    pixel_fault = None if layout is None else find_pixel_fault(files, layout)
    faults: list[tuple[Fault, int]] = [] if pixel_fault is None else [pixel_fault]
    sizes = files.sizes_of([shard.name for shard in manifest.shards])
    for shard in manifest.shards:
        fault = _size_fault(files.where(shard.name), sizes[shard.name], shard.num_bytes)
        if fault is not None:
            faults.append((fault, shard.num_samples if layout is None else 0))
    if max_bad_fraction is not None:
        faults += [(ValueError(message), count) for message, count in changed_sources]
    if not faults or max_bad_fraction is None:
        return
    first, num_bad = faults[0][0], sum(num_images for _, num_images in faults)
    if not max_bad_fraction:
        raise first
    such = count_of(len(faults), "such file")
    damage = f"{first} ({such}, with the images of {num_bad} of {total} samples"
    if num_bad > max_bad_fraction * total:
        raise type(first)(f"{damage}: more than data.max_bad_fraction = {max_bad_fraction} allows)")
    logger.warning(
        "DAMAGED DATA SET: %s: within data.max_bad_fraction = %s, so others are fed instead)",
        damage, max_bad_fraction,
    )  # fmt: skip


def find_pixel_fault(
    files: LocalFiles | RemoteFiles, layout: PixelLayout
) -> tuple[Fault, int] | None:
    """A fault in the size or header of pixels.npy, and how many images it affects; or None."""
    path, total = files.where(PIXELS_NAME), layout.num_samples
    num_bytes = files.sizes_of([PIXELS_NAME])[PIXELS_NAME]
    fault = _size_fault(path, num_bytes, layout.num_bytes)
    if not isinstance(num_bytes, int):
        return None if fault is None else (fault, total)
    try:
        header = files.head_of(PIXELS_NAME, min(num_bytes, HEADER_BYTES))
    except OSError as error:
        return ValueError(f"{path} cannot be read: {error}"), total
    shape = (total, *layout.shape)
    if header != npy_header(PIXEL_DTYPE, shape):
        return ValueError(
            f"{path} is damaged: it does not begin as an array uint8 {list(shape)} of ours "
            "does, as the manifest says; copy the data set again"
        ), total
    whole = (num_bytes - HEADER_BYTES) // layout.row_bytes
    return None if fault is None else (fault, max(0, total - whole))


def _size_fault(path: str, size: int | OSError | None, expected: int) -> Fault | None:
    if isinstance(size, OSError):
        return ValueError(f"{path} cannot be read: {size}")
    if size is None:
        return FileNotFoundError(f"{path} is missing; copy the data set again")
    if size != expected:
        return ValueError(
            f"{path} has {size} bytes, the manifest says {expected}; copy the data set again"
        )
    return None


def _size_of(path: Path) -> int | OSError | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError as error:
        return error


def _read_heads(store: ObjectStore) -> tuple[bytes, bytes, dict[str, str]]:
    """Reads a manifest and its matching list of checksums (b"" if there is none)."""
    found, listed = "", dict[str, str]()
    for reading in range(_READINGS):
        if reading:
            time.sleep(_BETWEEN_READINGS_SECONDS)
        manifest = store.read_whole(MANIFEST_NAME)
        if manifest is None:
            raise FileNotFoundError(
                f"{store.url} is not a packed data set: it has no {MANIFEST_NAME}. "
                f"Make one with: unicl-pack build SOURCE... --out {store.url}"
            )
        checksums = store.read_whole(CHECKSUMS_NAME)
        if checksums is None:
            return manifest, b"", {}
        listed = parse_checksums(checksums, where=store.url_of(CHECKSUMS_NAME))
        found = xxhash.xxh3_64_hexdigest(manifest)
        if listed.get(MANIFEST_NAME) == found:
            return manifest, checksums, listed
    raise ValueError(
        f"{store.url_of(MANIFEST_NAME)} is damaged, or just being replaced: its checksum is "
        f"{found}, {CHECKSUMS_NAME} says {listed.get(MANIFEST_NAME) or 'nothing of it'}; wait "
        "until it is whole, or upload the data set again"
    )


def _fetch_if_changed(store: ObjectStore, path: Path, expected: str | None) -> None:
    """Fetches a file unless its checksum already matches; always, if it has none."""
    if expected is not None and path.is_file() and file_checksum(path) == expected:
        return
    stored = store.find(path.name)
    if stored is None:
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.partial")
    found = ""
    for _ in range(2):
        found = store.fetch_file(path.name, aside, size=stored.size)
        if expected is None or found == expected:
            aside.replace(path)
            return
    aside.unlink()
    raise ValueError(
        f"{store.url_of(path.name)} is damaged: its checksum is {found}, {CHECKSUMS_NAME} says "
        f"{expected}; upload the data set again"
    )


def _put(path: Path, data: bytes) -> None:
    if not path.is_file() or read_file(path) != data:
        with replacing(path, flush=False) as aside:
            aside.write_bytes(data)
