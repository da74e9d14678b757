"""A data set's files, in a folder or under a URL, and how they are read.

`PackedDataset` asks here for what it does not map: how large files are, whether they are what the
manifest says, and ranges of the large ones. A data set under a URL keeps its small files in a local
folder too (`remote.local_copy`), and reads the large ones through a cache (`remote.block_cache`).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.arrays import (
    HEADER_BYTES,
    PIXEL_DTYPE,
    PIXELS_NAME,
    PixelLayout,
    npy_header,
)
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest, shard_name
from unicl_fast.dataset.remote.block_cache import BlockCache, BlockReader, CacheOptions, LargeFile
from unicl_fast.dataset.remote.local_copy import open_local_copy
from unicl_fast.dataset.remote.object_store import ObjectStore, is_url
from unicl_fast.system.atomic_files import read_fully

logger = logging.getLogger(__name__)

# Beyond this many files one is opened for each read: descriptors are a scarce resource (often
# 1,024 a process), opening a local file costs a few microseconds.
_MAX_OPEN_FILES = 256

Int64Array = npt.NDArray[np.int64]
Fault = ValueError | FileNotFoundError


class LocalReader:
    """Reads ranges of one folder's large files by their number, and keeps the files open.

    It is safe in several threads. `BlockReader` has the same methods.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Opens no file before it is read."""
        self.num_bytes_read = 0
        """Bytes that this process has read through a cache, which a folder does not have."""
        self._paths = [folder / name for name in names]
        self._files: dict[int, int] = {}
        self._folder = folder
        self._closed = False

    def read_into(self, number: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a file; returns how many bytes there were.

        Raises:
            OSError: the file cannot be read.
            ValueError: the reader has been closed.
        """
        file, is_kept = self._open(number, most=_MAX_OPEN_FILES)
        if is_kept:
            try:
                return read_fully(file, buffer.data, offset=offset)
            except OSError as error:
                # A network file system forgets a file that was replaced: by its name it is there.
                # The descriptor is left alone, since another thread may be reading through it.
                if error.errno != errno.ESTALE:
                    raise
            file = os.open(self._paths[number], os.O_RDONLY)
        try:
            return read_fully(file, buffer.data, offset=offset)
        finally:
            os.close(file)

    def read_rows(
        self, number: int, offsets: Int64Array, rows: npt.NDArray[np.uint8], positions: Int64Array
    ) -> npt.NDArray[np.bool_]:
        """Reads many ranges of equal size in one call.

        Args:
            number: which file.
            offsets: where the ranges begin, int64 [k].
            rows: uint8 [b n], contiguous; rows[positions[i]] becomes the range of offsets[i].
            positions: int64 [k], each in 0 to b - 1.

        Returns:
            bool [k], which of them came whole; the content of the others is undefined.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the reader has been closed.
        """
        from unicl_fast.dataset.pixels import read_rows  # here, because it loads Numba

        file, _ = self._open(number, most=None)
        whole: npt.NDArray[np.bool_] = read_rows(file, offsets, rows, positions)
        return whole

    def blocks_of(
        self, numbers: Int64Array, offsets: Int64Array, sizes: Int64Array
    ) -> list[tuple[int, int]]:
        """Lists the cache's blocks that some ranges lie in: none here, a folder has no cache."""
        return []

    def fetch_ahead(self, number: int, block: int) -> None:
        """Does nothing, since a folder has no cache."""

    def discard(self, number: int, offset: int, size: int) -> bool:
        """Returns False: there is no cache that could hold wrong bytes of a range."""
        return False

    def close(self) -> None:
        """Closes the files; reading afterwards is an error."""
        self._closed = True
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, number: int, *, most: int | None) -> tuple[int, bool]:
        """A file's descriptor, and whether it is kept; one that is not is the caller's to close."""
        if self._closed:
            raise ValueError(f"{self._folder} has been closed")
        file = self._files.get(number)
        if file is not None:
            return file, True
        opened = os.open(self._paths[number], os.O_RDONLY)
        if most is not None and len(self._files) >= most:
            return opened, False
        file = self._files.setdefault(number, opened)
        if file != opened:  # another thread was first
            os.close(opened)
        return file, True


FileReader = LocalReader | BlockReader


class LocalFiles:
    """The files of a data set in a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        """Folder of the manifest and the arrays."""
        self.place = str(self.folder)
        """The data set's name in messages."""

    def where(self, name: str) -> str:
        """A file's path or URL, for messages."""
        return str(self.folder / name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        """Bytes of files; None for a missing one, the error for one that cannot be asked."""
        return {name: _size_of(self.folder / name) for name in names}

    def head_of(self, name: str, size: int) -> bytes:
        """The first bytes of a file; raises OSError if it cannot be read."""
        with (self.folder / name).open("rb") as file:
            return file.read(size)

    def reader(self, files: Sequence[LargeFile]) -> FileReader:
        """A reader of large files, which are numbered in this order."""
        return LocalReader(self.folder, [file.name for file in files])


class RemoteFiles:
    """The files of a data set under a URL; its methods are those of `LocalFiles`."""

    def __init__(self, url: str, options: CacheOptions, array_names: Sequence[str]) -> None:
        """Fetches the small files, those of `array_names` among them.

        Raises:
            FileNotFoundError: the URL is not that of a data set.
            ValueError: the data differ from their checksums.
            StorageError: the store cannot be reached.
        """
        self.store = ObjectStore(url)
        self.place = self.store.url
        self.options = options
        self._cache = BlockCache(options.place, max_bytes=options.max_bytes)
        self.folder = open_local_copy(self.store, options.place, array_names)
        self._manifest = (self.folder / MANIFEST_NAME).read_bytes()

    def where(self, name: str) -> str:
        return self.store.url_of(name)

    def sizes_of(self, names: Sequence[str]) -> dict[str, int | OSError | None]:
        found = self.store.find_all(names)
        return {name: None if one is None else one.size for name, one in found.items()}

    def head_of(self, name: str, size: int) -> bytes:
        return self.store.read(name, 0, size)

    def reader(self, files: Sequence[LargeFile]) -> FileReader:
        return BlockReader(self.store, files, self._cache, block_bytes=self.options.block_bytes)

    def is_unchanged(self) -> bool:
        """Whether the data set at the URL is still the one that was opened."""
        return self.store.read_whole(MANIFEST_NAME) == self._manifest


def open_files(
    place: str | os.PathLike[str], options: CacheOptions | None, array_names: Sequence[str]
) -> LocalFiles | RemoteFiles:
    """The files of the data set at a path or a URL; raises what `RemoteFiles` does."""
    if is_url(place):
        return RemoteFiles(str(place), options or CacheOptions(), array_names)
    return LocalFiles(place)


def check_files(
    files: LocalFiles | RemoteFiles,
    manifest: Manifest,
    *,
    layout: PixelLayout | None,
    max_bad_fraction: float | None,
) -> None:
    """Compares the sizes of the large files with the manifest, without reading them.

    A missing file need not be the end, since training can feed other samples than those in it.

    Args:
        files: the data set's files.
        manifest: its manifest.
        layout: its decoded images; None if the images are in the shards.
        max_bad_fraction: files that are missing or of another size are tolerated, with a warning,
            if they hold at most this part of the images; None tolerates all without a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size, or the manifest contradicts itself.
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
    faults: list[Fault] = []
    num_bad = 0
    if layout is not None and (found := find_pixel_fault(files, layout)) is not None:
        faults.append(found[0])
        num_bad = found[1]
    sizes = files.sizes_of([shard.name for shard in manifest.shards])
    for shard in manifest.shards:
        fault = _size_fault(files.where(shard.name), sizes[shard.name], shard.num_bytes)
        if fault is not None:
            faults.append(fault)
            num_bad += shard.num_samples if layout is None else 0
    if not faults or max_bad_fraction is None:
        return
    if not max_bad_fraction:
        raise faults[0]
    num_files = len(manifest.shards) + (layout is not None)
    damage = (
        f"{faults[0]} ({len(faults)} such of {num_files} files, with the images of {num_bad} of "
        f"{total} samples"
    )
    if num_bad > max_bad_fraction * total:
        raise type(faults[0])(
            f"{damage}: more than data.max_bad_fraction = {max_bad_fraction} allows)"
        )
    logger.warning(
        "DAMAGED DATA SET: %s: within data.max_bad_fraction = %s, so others are fed instead)",
        damage, max_bad_fraction,
    )  # fmt: skip


def find_pixel_fault(
    files: LocalFiles | RemoteFiles, layout: PixelLayout
) -> tuple[Fault, int] | None:
    """A fault of pixels.npy and how many images it costs; None if the file is whole.

    Compares the size and the header; pixels are compared when they are read.
    """
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
