"""The packed data set, format versions 1 to 3 (docs/data-format.md), read by sample number.

A folder or the objects under a URL: tar shards, four small arrays and a manifest. In a raw data set
(version 2) the images are decoded and lie in an array of their own.
"""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    ARRAY_DTYPES,
    PIXELS_NAME,
    PixelLayout,
    blocks_of,
    mapping_of,
    open_array,
    verify_arrays,
)
from unicl_fast.dataset.block_cache import BlockReader, CacheOptions, LargeFiles
from unicl_fast.dataset.files import FileReader, LocalFiles, RemoteFiles, check_files
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.system.checksums import read_checksums

QUARANTINE_NAME = "quarantine.csv"
QUARANTINE_COLUMNS = ("source", "name", "kind", "message")

Part = Literal["image", "members"]
"""A part of a sample: its image, or its members in a shard, which a raw data set keeps apart."""

# Faults of the process or the machine, not of a file.
_NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedSampleError(ValueError):
    """The bytes of one sample are missing or differ from those packed; the message names it."""


class DamagedDatasetError(RuntimeError):
    """A data set was changed under a running job, beyond what the job can recover from."""


class TooManyBadSamplesError(RuntimeError):
    """Too much of the data is bad for the run to mean what was asked for."""


def sample_key(index: int) -> str:
    """The name of sample `index` inside its shard, without extension."""
    return f"{index:010d}"


class PackedDataset:
    """One packed data set, opened for reading by sample number.

    Images are read with `preadv`, never mapped: a shard that shrinks or vanishes under a running
    job is then an error with a name instead of a bus error. Reads from several threads at once are
    safe, and so are copies in worker processes, however these are started. Arrays are memory-mapped
    and read-only; see `check_arrays` for what that costs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fraction: float = 1.0,
        max_bad_fraction: float | None = 0.0,
        verify: bool = True,
        cache: CacheOptions | None = None,
    ) -> None:
        """Opens the data set in `folder`.

        Args:
            folder: a path or a URL such as s3://bucket/folder that `unicl-pack build` wrote.
            fraction: part of its samples to use, in (0, 1]: the first ones, at least one. Packing
                has shuffled them, so it is a random part, always the same.
            max_bad_fraction: as for `check_files`. For training, which feeds others instead; an
                evaluation would count wrong. None is for callers that report damage themselves.
            verify: compare the arrays with their checksums, and each reference with its target:
                about a second for ten million samples. Without it a damaged array gives wrong
                samples, or worse.
            cache: folder and size of the cache for a data set under a URL.

        Raises:
            FileNotFoundError: not a data set, or a file of it is missing.
            ValueError: its files contradict each other or their checksums.
            StorageError: the store of a URL cannot be reached.
        """
        self._reopen = functools.partial(
            type(self), folder, fraction=fraction, max_bad_fraction=None, verify=False, cache=cache
        )
        files: LocalFiles | RemoteFiles = LocalFiles(folder)
        if is_url(folder):
            names = [f"{name}.npy" for name in ARRAY_DTYPES]
            files = RemoteFiles(str(folder), cache or CacheOptions(), names)
        self.location = files.location
        """Its name in messages: its folder, or its URL."""
        self.folder = files.folder
        """Folder of manifest and arrays; for a data set under a URL, in the cache."""
        self.remote = files if isinstance(files, RemoteFiles) else None
        self.manifest = Manifest.load(self.folder)
        total = self.manifest.num_samples
        num_used = min(max(1, round(fraction * total)), total)
        self.samples = self._open_array("samples", total)[:num_used]
        self.captions = self._open_array("captions", self.manifest.num_captions)
        self.tokens: npt.NDArray[np.uint16] = self._open_array("tokens", self.manifest.num_tokens)
        self.labels: npt.NDArray[np.int32] = self._open_array("labels", self.manifest.num_labels)
        pixels = self.manifest.pixels
        self._layout = None if pixels is None else PixelLayout(self.location, pixels, total)
        self._files = files
        large: LargeFiles = {shard.name: shard for shard in self.manifest.shards}
        self._large = large if pixels is None else {**large, PIXELS_NAME: pixels}
        self._reader = self.new_reader()
        check_files(files, self.manifest, layout=self._layout, max_bad_fraction=max_bad_fraction)
        self.vocabulary_hash = self.manifest.vocabulary_hash
        """That of the tokenizer of `tokens`."""
        self._tokens_folder: Path | None = None
        self.largest_token: int | None = None
        """Largest token id of all captions; None if opened without `verify`."""
        if verify:
            self.largest_token = verify_arrays(
                self.folder, self.manifest, ARRAY_DTYPES, checksums=read_checksums(self.folder)
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, here or in another process, opens the files anew: descriptors are not shared."""
        return self._reopen, (), (self.largest_token, self._tokens_folder, self.vocabulary_hash)

    def __setstate__(self, state: tuple[int | None, Path | None, str]) -> None:
        self.largest_token, folder, vocabulary_hash = state
        if folder is not None:
            self.take_tokens(folder, vocabulary_hash=vocabulary_hash)

    def take_tokens(self, folder: Path, *, vocabulary_hash: str) -> None:
        """Replaces the token rows of captions by another tokenizer's, arrays in a folder.

        Raises FileNotFoundError, or ValueError if they are of other captions.
        """
        num_captions = self.manifest.num_captions
        captions = open_array(folder / "captions.npy", ARRAY_DTYPES["captions"], num_captions)
        last = captions[-1:]
        num_tokens = int((last["tokens_start"] + last["tokens_length"]).sum())
        self.tokens = open_array(folder / "tokens.npy", ARRAY_DTYPES["tokens"], num_tokens)
        self.captions, self.largest_token = captions, None
        self._tokens_folder, self.vocabulary_hash = folder, vocabulary_hash

    def __len__(self) -> int:
        return len(self.samples)

    def __enter__(self) -> PackedDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of every image of a raw data set; None for others."""
        return None if self._layout is None else self._layout.shape

    def image_bytes(
        self, index: int, *, verify: bool = False, max_pixels: int = 0
    ) -> npt.NDArray[np.uint8]:
        """The image of sample `index` as a file: JPEG, WebP or PNG; from a raw set PNM (P6).

        With `verify` also compared with the checksum taken when packing: 10 us for 100 kB. One of
        more than `max_pixels` is refused, since it is about to be decoded; 0 sets no limit, and raw
        images need none.

        Raises:
            DamagedSampleError: the file that holds it cannot be read or is shorter than it was,
                `verify` found other bytes, or it is too large.
            DamagedDatasetError: the data set under a URL was replaced meanwhile.
        """
        row = self.samples[self._checked(index)]
        if self._layout is None:
            file, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
            header = b""
            if file >= len(self.manifest.shards):
                raise DamagedSampleError(f"{self.describe(index)}: samples.npy is damaged")
            height, width = int(row["height"]), int(row["width"])
            if 0 < max_pixels < height * width:
                raise DamagedSampleError(
                    f"{self.describe(index)}: {width} x {height} pixels; at most {max_pixels:,} "
                    "are taken (data.max_pixels)"
                )
        else:
            file, offset = len(self.manifest.shards), self._layout.offset_of(index)
            header, size = self._layout.pnm_header, self._layout.row_bytes
        data = np.empty(len(header) + size, dtype=np.uint8)
        data[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        stored = data[len(header) :]
        for _ in range(1 if self.remote is None else 2):
            self._read_stored(index, file, stored, offset)
            if not verify or xxhash.xxh3_64_intdigest(stored.data) == int(row["xxh3"]):
                return data
            if isinstance(self._reader, BlockReader):  # perhaps only the cache is damaged
                self._reader.discard(file, offset, size)
        self._refuse_change()
        raise DamagedSampleError(
            f"{self.describe(index)}: the bytes differ from those that were packed (checksum)"
        )

    def _read_stored(
        self, index: int, file: int, stored: npt.NDArray[np.uint8], offset: int
    ) -> None:
        """Fills `stored` from a file, for sample `index`."""
        holder = "the shard" if self._layout is None else PIXELS_NAME
        try:
            done = self._reader.read_into(file, stored, offset)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_THE_FILES:
                raise
            self._refuse_change()
            raise DamagedSampleError(
                f"{self.describe(index)}: {holder} cannot be read: {error}"
            ) from error
        if done < len(stored):
            raise DamagedSampleError(
                f"{self.describe(index)}: {holder} ends after {done} of {len(stored)} bytes"
            )

    def _refuse_change(self) -> None:
        """Raises DamagedDatasetError if the whole data set under a URL was replaced."""
        if self.remote is not None and not self.remote.is_unchanged():
            raise DamagedDatasetError(
                f"{self.location} was replaced or removed while it was in use: its manifest is "
                "another one now. Upload a changed data set under another URL; to resume this run, "
                "put back the data set that it began with"
            )

    def pixels_of(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Takes the header off what `image_bytes` returned of a raw data set: uint8 [h w 3]."""
        assert self._layout is not None
        return image[len(self._layout.pnm_header) :].reshape(self._layout.shape)

    def read_pixels(
        self,
        indices: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
        positions: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Reads many images of a raw data set and compares their checksums: 1 us each of 3 kB.

        The image of indices[i] comes to out[positions[i]], of a contiguous uint8 [b h w 3].

        Returns:
            bool [k], which of them are as they were packed. `image_bytes` says what is wrong with
            the others.
        """
        assert self._layout is not None
        rows = out.reshape(len(out), self._layout.row_bytes)
        file, offsets = len(self.manifest.shards), self._layout.offset_of(indices)
        try:
            whole = self._reader.read_rows(file, offsets, rows, positions)
        except OSError as error:
            if error.errno in _NOT_THE_FILES:
                raise
            return np.zeros(len(indices), np.bool_)
        # 0.2 us each of 3 kB
        views, digest = list(rows), xxhash.xxh3_64_intdigest
        found = np.array([digest(views[i]) for i in positions.tolist()], dtype=np.uint64)
        sound: npt.NDArray[np.bool_] = whole & (found == np.asarray(self.samples)["xxh3"][indices])
        return sound

    def caption_tokens(
        self, index: int, which: int, *, context_length: int | None = None
    ) -> npt.NDArray[np.uint16]:
        """Token ids of caption `which` of sample `index`, start and end included, unpadded.

        One of more than `context_length` tokens is cut and keeps its end token.
        """
        row = self.samples[self._checked(index)]
        count = int(row["captions_count"])
        if not 0 <= which < count:
            raise IndexError(f"{self.describe(index)} has {count} captions, not a number {which}")
        caption = self.captions[int(row["captions_start"]) + which]
        start = int(caption["tokens_start"])
        found = self.tokens[start : start + int(caption["tokens_length"])]
        if context_length is None or len(found) <= context_length:
            return found
        return np.append(found[: context_length - 1], found[-1:])

    def count_longer_captions(self, context_length: int) -> int:
        """The number of captions that have more tokens, start and end included."""
        if self.manifest.context_length <= context_length:
            return 0
        parts = blocks_of(self.captions)
        return sum(int(np.count_nonzero(one["tokens_length"] > context_length)) for one in parts)

    def labels_of(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of sample `index` in the data set's own label space; may be empty."""
        row = self.samples[self._checked(index)]
        start = int(row["labels_start"])
        return self.labels[start : start + int(row["labels_count"])]

    def describe(self, index: int, part: Part = "image") -> str:
        """Names one sample for a message: data set, file, key and offset."""
        place = f"{self.shard_of(index, part)}, offset {self.offset_of(index, part)}"
        return f"sample {sample_key(index)} of {self.location} ({place})"

    def offset_of(self, index: int, part: Part = "image") -> int:
        """The first byte of a part of sample `index` in its file, for messages."""
        if self._layout is not None and part == "image":
            return self._layout.offset_of(index)
        return int(self.samples[index]["offset"])

    def shard_of(self, index: int, part: Part = "image") -> str:
        """The name of the file that holds a part of sample `index`, for messages."""
        if self._layout is not None and part == "image":
            return PIXELS_NAME
        shard = int(self.samples[index]["shard"])
        known = shard < len(self.manifest.shards)
        return self.manifest.shards[shard].name if known else f"shard {shard}, which does not exist"

    def check_arrays(self) -> None:
        """Raises DamagedDatasetError if an array's file was cut since it was opened; costs 2 us.

        Reading after the end of a mapped file would end the process with a bus error. Files that
        are removed or replaced do not change for processes that have them open.
        """
        arrays: list[npt.NDArray[Any]] = [self.samples, self.captions, self.tokens, self.labels]
        for name, array in zip(ARRAY_DTYPES, arrays, strict=True):
            mapped = mapping_of(array)
            if mapped is not None and mapped.size() < len(mapped):
                raise DamagedDatasetError(
                    f"{self.folder / name}.npy was cut from {len(mapped)} to {mapped.size()} bytes "
                    "while it was in use: copy the data set again, and replace files under a "
                    "running job by renaming, not in place"
                )

    def new_reader(self) -> FileReader:
        """Another reader of the shards by their number, and of pixels.npy after them."""
        return self._files.reader(self._large)

    def blocks_of(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Lists the cache's blocks that hold images under a URL, (file, block) once, as needed."""
        if self._layout is not None:
            files = np.full(len(indices), len(self.manifest.shards))
            sizes = np.full(len(indices), self._layout.row_bytes)
            return self._cached.blocks_of(files, self._layout.offset_of(indices), sizes)
        rows = self.samples.take(indices)
        places = (rows[field].astype(np.int64) for field in ("shard", "offset", "size"))
        return self._cached.blocks_of(*places)

    def fetch_ahead(self, file: int, block: int) -> None:
        """Brings a block that `blocks_of` named into the cache."""
        self._cached.fetch_ahead(file, block)

    @property
    def needed_bytes(self) -> int:
        """Bytes of images that this process has read through the cache."""
        return self._cached.num_bytes_read

    @property
    def _cached(self) -> BlockReader:
        assert isinstance(self._reader, BlockReader), "a folder has no cache"
        return self._reader

    def close(self) -> None:
        """Closes the shard files; reading images afterwards is an error."""
        self._reader.close()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location} has samples 0 to {len(self) - 1}, not {index}")
        return index

    def _open_array(self, name: str, length: int) -> npt.NDArray[Any]:
        return open_array(self.folder / f"{name}.npy", ARRAY_DTYPES[name], length)
