"""The packed data set, format versions 1 to 3: its arrays, its manifest and a plain reader.

A data set is a folder, or what lies under a URL: tar shards that WebDataset and DALI also read,
four small arrays that say where each image lies and which texts and labels it has, and a
manifest. In a raw data set (version 2) the images are decoded and lie in an array of their own
(`pixel_file`).
`docs/data-format.md` holds the full text. This module only reads; `shard_writer` writes. Decoding
images and choosing which sample comes when belong to others.
"""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import mapping_of, open_array, verify_arrays
from unicl_fast.dataset.file_check import check_files
from unicl_fast.dataset.file_ranges import ShardReader
from unicl_fast.dataset.files import FileReader, RemoteFiles, files_of
from unicl_fast.dataset.manifest import FORMAT_VERSION as FORMAT_VERSION
from unicl_fast.dataset.manifest import MANIFEST_NAME as MANIFEST_NAME
from unicl_fast.dataset.manifest import Manifest as Manifest
from unicl_fast.dataset.manifest import ShardInfo as ShardInfo
from unicl_fast.dataset.manifest import shard_name as shard_name
from unicl_fast.dataset.pixels import PIXELS_NAME, PixelFile, row_checksums
from unicl_fast.dataset.remote.block_cache import CacheOptions
from unicl_fast.dataset.remote.block_reader import BlockReader, RemoteFile
from unicl_fast.system.checksums import read_checksums

QUARANTINE_NAME = "quarantine.csv"
QUARANTINE_COLUMNS = ("source", "name", "kind", "message")
KEY_DIGITS = 10

Part = Literal["image", "members"]
"""Of a sample: its image, or its members in a shard, which in a raw data set lie elsewhere."""

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("xxh3", "<u8"),
        ("captions_start", "<u8"),
        ("captions_count", "<u2"),
        ("labels_start", "<u8"),
        ("labels_count", "<u2"),
    ]
)
"""A row of samples.npy: where the image's bytes lie in a shard, its size as displayed, XXH3-64 of
the bytes, and its ranges of captions.npy and labels.npy. In a raw data set shard, offset and size
are those of the JSON; the image's bytes are the row of pixels.npy with the sample's number."""
CAPTION_DTYPE = np.dtype([("tokens_start", "<u8"), ("tokens_length", "u1")])
"""A row of captions.npy: its range of tokens.npy, start and end tokens included."""
TOKEN_DTYPE = np.dtype("<u2")
LABEL_DTYPE = np.dtype("<i4")
ARRAY_DTYPES = {
    "samples": SAMPLE_DTYPE,
    "captions": CAPTION_DTYPE,
    "tokens": TOKEN_DTYPE,
    "labels": LABEL_DTYPE,
}

# What is wrong with the process or the machine, not with a shard.
_NOT_THE_SHARDS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedSampleError(ValueError):
    """The bytes of one sample are gone or not those that were packed; the message names it."""


class DamagedDatasetError(RuntimeError):
    """A data set was changed under a running job, beyond what can be gone on with."""


def sample_key(index: int) -> str:
    """The name of sample `index` inside its shard, without extension."""
    return f"{index:0{KEY_DIGITS}d}"


class PackedDataset:
    """One packed data set, opened for reading by sample number.

    Images are read with `preadv`, never mapped: a shard that shrinks or vanishes under a running
    job is then an error with a name instead of a bus error. Reads from several threads at once are
    safe. Arrays are memory-mapped and read-only, since they may be larger than memory should pay
    for; see `check_arrays` for what that costs.
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
            folder: what `unicl-pack build` made; a path, or a URL such as s3://bucket/folder.
            fraction: part of its samples that is there to be used, in (0, 1]: the first ones, at
                least one. Packing has shuffled them, so it is a random part, always the same.
            max_bad_fraction: shards (and the file of decoded images) that are missing or of
                another size are tolerated, with a warning, if they hold at most this part of the
                images. For training, which feeds others instead; an evaluation would count wrong.
                None tolerates all of them without a warning: for who names the damage by itself.
            verify: compare the arrays with their checksums, and what refers to something with what
                is there: about a second for ten million samples. Without it a damaged array gives
                wrong samples, or worse.
            cache: where bytes of a data set under a URL are kept, and how many.

        Raises:
            FileNotFoundError: not a data set, or a file of it is missing.
            ValueError: its files contradict each other or their checksums.
            StorageError: the store of a URL cannot be reached.
        """
        files = files_of(folder, cache, [f"{name}.npy" for name in ARRAY_DTYPES])
        self.place = files.place
        """What it is called in messages: its folder, or its URL."""
        self.folder = files.folder
        """Where manifest and arrays lie; of a data set under a URL, in the cache."""
        self.remote = files if isinstance(files, RemoteFiles) else None
        self.manifest = Manifest.load(self.folder)
        total = self.manifest.num_samples
        num_used = min(max(1, round(fraction * total)), total)
        self.samples: npt.NDArray[Any] = self._load_array("samples", total)[:num_used]
        self.captions: npt.NDArray[Any] = self._load_array("captions", self.manifest.num_captions)
        self.tokens: npt.NDArray[np.uint16] = self._load_array("tokens", self.manifest.num_tokens)
        self.labels: npt.NDArray[np.int32] = self._load_array("labels", self.manifest.num_labels)
        pixels = self.manifest.pixels
        self._pixel_file = None if pixels is None else PixelFile(self.place, pixels, total)
        large = [
            RemoteFile(name=shard.name, num_bytes=shard.num_bytes, xxh3=shard.xxh3)
            for shard in self.manifest.shards
        ]
        if pixels is not None:
            large.append(RemoteFile(name=PIXELS_NAME, num_bytes=pixels.num_bytes, xxh3=pixels.xxh3))
        self._files = files
        self._large = large
        self._reader: FileReader = files.reader(large)
        check_files(
            files,
            self.manifest,
            pixel_file=self._pixel_file,
            max_bad_fraction=max_bad_fraction,
        )
        self.largest_token: int | None = None
        """Largest token id of all captions; None if opened without `verify`."""
        if verify:
            self.largest_token = verify_arrays(
                self.folder, self.manifest, ARRAY_DTYPES, checksums=read_checksums(self.folder)
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __enter__(self) -> PackedDataset:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of every image of a raw data set; None of others."""
        return None if self._pixel_file is None else self._pixel_file.shape

    def image_bytes(self, index: int, *, verify: bool = False) -> npt.NDArray[np.uint8]:
        """The image of sample `index` as a file: JPEG, WebP, PNG, or of a raw set PNM (P6).

        Args:
            index: 0 to len - 1.
            verify: also compare with the checksum taken when packing; costs about 10 us for 100 kB.

        Raises:
            DamagedSampleError: the file that holds it cannot be read or is shorter than it was, or
                `verify` found other bytes.
        """
        row = self.samples[self._checked(index)]
        if self._pixel_file is None:
            file, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
            header = b""
            if file >= len(self.manifest.shards):
                raise DamagedSampleError(f"{self.describe(index)}: samples.npy is damaged")
        else:
            file, offset = len(self.manifest.shards), self._pixel_file.offset_of(index)
            header, size = self._pixel_file.pnm_header, self._pixel_file.row_bytes
        data = np.empty(len(header) + size, dtype=np.uint8)
        data[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        stored = data[len(header) :]
        self._read_stored(index, file, stored, offset)
        expected = int(row["xxh3"])
        if verify and xxhash.xxh3_64_intdigest(stored.data) != expected:
            if isinstance(self._reader, BlockReader):  # perhaps it is the cache that is damaged
                self._reader.discard(file, offset, size)
                self._read_stored(index, file, stored, offset)
                if xxhash.xxh3_64_intdigest(stored.data) == expected:
                    return data
                self._refuse_change()
            raise DamagedSampleError(
                f"{self.describe(index)}: the bytes differ from those that were packed (checksum)"
            )
        return data

    def _read_stored(
        self, index: int, file: int, stored: npt.NDArray[np.uint8], offset: int
    ) -> None:
        """Fills `stored` from a file, for sample `index`."""
        try:
            done = self._reader.read_into(file, stored, offset)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_THE_SHARDS:
                raise
            self._refuse_change()
            raise DamagedSampleError(
                f"{self.describe(index)}: {self._holder} cannot be read: {error}"
            ) from error
        if done < len(stored):
            raise DamagedSampleError(
                f"{self.describe(index)}: {self._holder} ends after {done} of {len(stored)} bytes"
            )

    def _refuse_change(self) -> None:
        """Asks, where bytes are not what they were, whether the whole data set was replaced."""
        if self.remote is not None and not self.remote.is_unchanged():
            raise DamagedDatasetError(
                f"{self.place} was replaced or removed while it was in use: its manifest is "
                "another one now. Upload a changed data set under another URL; to go on with this "
                "run, put back what it began with"
            )

    def pixels_of(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """What `image_bytes` gave of a raw data set as it is stored: uint8 [h w 3], no header."""
        assert self._pixel_file is not None
        return image[len(self._pixel_file.pnm_header) :].reshape(self._pixel_file.shape)

    def read_pixels(
        self,
        indices: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
        places: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Many images of a raw data set, decoded, their checksums compared: 1 us each of 3 kB.

        Args:
            indices: which samples, int64 [k], each in 0 to len - 1.
            out: uint8 [b h w 3], contiguous; out[places[i]] becomes the image of indices[i].
            places: int64 [k].

        Returns:
            bool [k]: which of them are as they were packed. What is wrong with the others
            `image_bytes` says.
        """
        assert self._pixel_file is not None
        expected = np.asarray(self.samples)["xxh3"][indices]
        if isinstance(self._reader, BlockReader):
            whole = self._reader.read_rows(
                len(self.manifest.shards),
                self._pixel_file.offset_of(indices),
                out.reshape(len(out), -1),
                places,
            )
            sound: npt.NDArray[np.bool_] = whole & (row_checksums(out, places) == expected)
            return sound
        assert isinstance(self._reader, ShardReader)
        try:
            file = self._reader.descriptor(len(self.manifest.shards))
        except OSError as error:
            if error.errno in _NOT_THE_SHARDS:
                raise
            return np.zeros(len(indices), np.bool_)
        whole = self._pixel_file.read_rows(file, indices, out, places)
        result: npt.NDArray[np.bool_] = whole & (row_checksums(out, places) == expected)
        return result

    def caption_tokens(self, index: int, which: int) -> npt.NDArray[np.uint16]:
        """Token ids of caption `which` of sample `index`, start and end included, unpadded."""
        row = self.samples[self._checked(index)]
        count = int(row["captions_count"])
        if not 0 <= which < count:
            raise IndexError(f"{self.describe(index)} has {count} captions, not a number {which}")
        caption = self.captions[int(row["captions_start"]) + which]
        start = int(caption["tokens_start"])
        return self.tokens[start : start + int(caption["tokens_length"])]

    def labels_of(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of sample `index`, in the data set's own label space; empty if it has none."""
        row = self.samples[self._checked(index)]
        start = int(row["labels_start"])
        return self.labels[start : start + int(row["labels_count"])]

    def describe(self, index: int, part: Part = "image") -> str:
        """Names one sample for a message: data set, file, key and offset."""
        place = f"{self.shard_of(index, part)}, offset {self.offset_of(index, part)}"
        return f"sample {sample_key(index)} of {self.place} ({place})"

    def offset_of(self, index: int, part: Part = "image") -> int:
        """The first byte of a part of sample `index` in its file, for messages."""
        if self._pixel_file is not None and part == "image":
            return self._pixel_file.offset_of(index)
        return int(self.samples[index]["offset"])

    def shard_of(self, index: int, part: Part = "image") -> str:
        """The name of the file that holds a part of sample `index`, for messages."""
        if self._pixel_file is not None and part == "image":
            return PIXELS_NAME
        shard = int(self.samples[index]["shard"])
        known = shard < len(self.manifest.shards)
        return self.manifest.shards[shard].name if known else f"shard {shard}, which does not exist"

    def check_arrays(self) -> None:
        """Tells whether the arrays' files have shrunk since they were opened; costs 2 us.

        Reading behind the end of a mapped file ends the process with a bus error, without a word.
        A file that is removed or replaced by another (as `mv` and most programs that copy do) stays
        what it was for those who have it open; only one that is cut in place goes away under them.
        Asked before each batch, this leaves the moment between the question and the reading.

        Raises:
            DamagedDatasetError: one has; names it.
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
        """One more reader of the shards by their number, and of pixels.npy behind them."""
        return self._files.reader(self._large)

    def blocks_of(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Which blocks hold the images of some samples of a data set under a URL.

        Returns:
            Each (file, block) once, in the order of need; nothing of a data set in a folder.
        """
        if not isinstance(self._reader, BlockReader):
            return []
        if self._pixel_file is not None:
            files = np.full(len(indices), len(self.manifest.shards))
            sizes = np.full(len(indices), self._pixel_file.row_bytes)
            return self._reader.blocks_of(files, self._pixel_file.offset_of(indices), sizes)
        rows = self.samples.take(indices)
        return self._reader.blocks_of(
            rows["shard"].astype(np.int64),
            rows["offset"].astype(np.int64),
            rows["size"].astype(np.int64),
        )

    def fetch_ahead(self, file: int, block: int) -> None:
        """Brings a block that `blocks_of` named into the cache."""
        assert isinstance(self._reader, BlockReader)
        self._reader.fetch_ahead(file, block)

    @property
    def needed_bytes(self) -> int:
        """Bytes of images that this process has read of a data set under a URL; else 0."""
        return self._reader.needs.num_bytes if isinstance(self._reader, BlockReader) else 0

    def close(self) -> None:
        """Closes the shard files; reading images afterwards is an error."""
        self._reader.close()

    @property
    def _holder(self) -> str:
        return "the shard" if self._pixel_file is None else PIXELS_NAME

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.place} has samples 0 to {len(self) - 1}, not {index}")
        return index

    def _load_array(self, name: str, length: int) -> npt.NDArray[Any]:
        return open_array(self.folder / f"{name}.npy", ARRAY_DTYPES[name], length)
