"""The packed data set, format versions 1 to 5 (docs/data-format.md), read by sample number.

A folder or the objects under a URL: tar shards, four small arrays and a manifest. A raw data set
(version 2) has decoded images in another array.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    ARRAY_DTYPES,
    NO_FILE,
    PIXELS_NAME,
    PixelLayout,
    blocks_of,
    dtypes_of,
    mapping_of,
    open_array,
    verify_arrays,
)
from unicl_fast.dataset.block_cache import (
    BlockReader,
    CacheOptions,
    Int64Array,
    LargeFiles,
    Ranges,
    blocks_in,
)
from unicl_fast.dataset.files import FileReader, LocalFiles, RemoteFiles, check_files
from unicl_fast.dataset.in_place import Place, SourceFiles
from unicl_fast.dataset.manifest import MANIFEST_NAME, PPM_FORMAT_VERSION, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.images.encoded_images import ppm_bytes
from unicl_fast.system.checksums import compare_checksum, file_checksum, read_checksums

logger = logging.getLogger(__name__)

Part = Literal["image", "members"]
"""A part of a sample: its image, or its members in a shard, which raw data sets store apart."""

# Faults of the process or machine, not of a file.
_NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedSampleError(ValueError):
    """A sample's bytes are missing or differ from the packed ones; the message names it."""


class DamagedDatasetError(RuntimeError):
    """A data set changed under a running job, beyond recovery."""


class TooManyBadSamplesError(RuntimeError):
    """Too many samples are bad for the run to mean what its settings say."""


def sample_key(index: int) -> str:
    """The name of sample `index` in its shard, without extension."""
    return f"{index:010d}"


class PackedDataset:
    """One packed data set, opened for reading by sample number.

    Images are read with `preadv`, never mapped: a shard that shrinks or vanishes under a running
    job is then an error with a name and not a bus error. Reads are thread-safe, and copies work in
    processes started by any method. Arrays are memory-mapped read-only; see `check_arrays`.
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
            folder: a path, or a URL such as s3://bucket/folder, written by `unicl-pack build`.
            fraction: part of its samples to use, in (0, 1]: the first ones, at least one. Packing
                has shuffled them, so this is a fixed random part; in place, of files.
            max_bad_fraction: as for `check_files`. Only for training, which feeds other samples; an
                evaluation would count wrong. None is for callers that report damage themselves.
            verify: compare arrays with their checksums, and each reference with its target: about a
                second for ten million samples. Otherwise a damaged array gives wrong samples, or
                worse.
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
        self.manifest = self._load_manifest()
        self.sources = self._open_sources(cache)
        """The source files with the images; None if the data set holds its own."""
        total = self.manifest.num_samples
        num_used = min(max(1, round(fraction * total)), total)
        self.samples = self._open_array("samples", total)[:num_used]
        self.captions = self._open_array("captions", self.manifest.num_captions)
        self.tokens: npt.NDArray[Any] = self._open_array("tokens", self.manifest.num_tokens)
        self.labels: npt.NDArray[np.int32] = self._open_array("labels", self.manifest.num_labels)
        self.weights: npt.NDArray[np.float32] | None = None
        """Each sample's weight, [N]; None without weights."""
        if self.manifest.num_weights:
            self.weights = self._open_array("weights", total)[:num_used]
        pixels = self.manifest.pixels
        self._layout = None if pixels is None else PixelLayout(self.location, pixels, total)
        self._files = files
        large: LargeFiles = {shard.name: shard for shard in self.manifest.shards}
        self._large = large if pixels is None else {**large, PIXELS_NAME: pixels}
        self._reader = self.new_reader()
        check_files(
            files,
            self.manifest,
            layout=self._layout,
            changed_sources=() if self.sources is None else self.sources.changed(),
            max_bad_fraction=max_bad_fraction,
        )
        self.vocabulary_hash = self.manifest.vocabulary_hash
        """The hash of the tokenizer of `tokens`."""
        self._tokens_folder: Path | None = None
        self.largest_token: int | None = None
        """Largest token id of all captions; None if opened without `verify`."""
        if verify:
            self._verify()

    def _verify(self) -> None:
        """Compares checksums, and warns if a part of the samples is not a random one."""
        num_used, total = len(self.samples), self.manifest.num_samples
        if num_used < total and self.sources is not None and len(self.sources) < total:
            logger.warning(
                "%s is in place: %d of its samples are those of its first files, a random part "
                "only if each file's own samples are in random order",
                self.location, num_used,
            )  # fmt: skip
        checksums, path = read_checksums(self.folder), self.folder / MANIFEST_NAME
        self.largest_token = verify_arrays(
            self.folder, self.manifest, dtypes_of(self.manifest), checksums=checksums
        )
        if checksums is not None:
            compare_checksum(path, file_checksum(path), checksums)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, here or in another process, reopen the files: descriptors are not shared."""
        others = self._tokens_folder, self.tokens.dtype, self.vocabulary_hash
        return self._reopen, (), (self.largest_token, *others)

    def __setstate__(self, state: tuple[int | None, Path | None, np.dtype[Any], str]) -> None:
        self.largest_token, folder, dtype, vocabulary_hash = state
        if folder is not None:
            self.take_tokens(folder, dtype, vocabulary_hash=vocabulary_hash)

    def take_tokens(self, folder: Path, dtype: np.dtype[Any], *, vocabulary_hash: str) -> None:
        """Uses another tokenizer's token rows in `folder`; ValueError if of other captions."""
        num_captions = self.manifest.num_captions
        captions = open_array(folder / "captions.npy", ARRAY_DTYPES["captions"], num_captions)
        last = captions[-1:]
        num_tokens = int((last["tokens_start"] + last["tokens_length"]).sum())
        self.tokens = open_array(folder / "tokens.npy", dtype, num_tokens)
        self.captions, self.largest_token = captions, None
        self._tokens_folder, self.vocabulary_hash = folder, vocabulary_hash

    def whole(self) -> PackedDataset:
        """All samples of the data set, reopened unchecked; the caller closes it."""
        opened: PackedDataset = self._reopen(fraction=1.0)
        return opened

    def __len__(self) -> int:
        return len(self.samples)

    def __enter__(self) -> PackedDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of every image of a raw data set; else None."""
        return None if self._layout is None else self._layout.shape

    @functools.cached_property
    def is_decoded(self) -> bool:
        """Whether no image needs a decoder: all are raw, or PPMs judging by their bytes."""
        if self.manifest.version != PPM_FORMAT_VERSION:
            return self._layout is not None
        rows = self.samples
        return bool(np.all(ppm_bytes(rows["height"], rows["width"]) == rows["size"]))

    def image_bytes(
        self, index: int, *, verify: bool = False, max_pixels: int = 0
    ) -> npt.NDArray[np.uint8]:
        """The image of sample `index` as a file: JPEG, WebP, PNG or PPM; PPM from a raw set.

        `verify` also compares the packed checksum: 10 us for 100 kB. An encoded image of more than
        `max_pixels` (0: no limit) is refused, since decoding follows.

        Raises:
            DamagedSampleError: its file cannot be read or is shorter, bytes differ, or it is too
                large.
            DamagedDatasetError: the data set under a URL was replaced.
        """
        row = self.samples[self._checked(index)]
        if row["shard"] >= len(self.manifest.shards) and self._layout is None:
            raise DamagedSampleError(f"{self.describe(index)}: samples.npy is damaged")
        height, width, header = int(row["height"]), int(row["width"]), b""
        if self._layout is not None:
            header = self._layout.pnm_header
        elif 0 < max_pixels < height * width:
            raise DamagedSampleError(
                f"{self.describe(index)}: {width} x {height} pixels; at most {max_pixels:,} "
                "are taken (data.max_pixels)"
            )
        ((file, offset, size),) = np.stack(self._places(np.array([index])), axis=1).tolist()
        data = np.empty(len(header) + size, dtype=np.uint8)
        data[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        stored = data[len(header) :]
        reader, number = self._reader_of(file)
        for _ in range(2 if isinstance(reader, BlockReader) else 1):
            self._read_stored(index, file, stored, offset)
            found, expected = 0, int(row["xxh3"])
            if not verify or (found := xxhash.xxh3_64_intdigest(stored.data)) == expected:
                return data
            if isinstance(reader, BlockReader):  # maybe only the cache is damaged
                reader.discard(number, offset, size)
        self._refuse_change()
        raise DamagedSampleError(
            f"{self.describe(index)}: the bytes differ from those that were packed (checksum "
            f"{found:016x}, expected {expected:016x})" + self._advice(file)
        )

    def source_place(self, index: int) -> Place | None:
        """The place of a sample's image in a source file; None if the data set holds it."""
        return None if self.sources is None else self.sources.place_of(index)

    def _reader_of(self, file: int) -> tuple[FileReader, int]:
        """The reader of a file, and its number there: source files follow the shards."""
        number = file - len(self.manifest.shards)
        if self.sources is None or number < 0:
            return self._reader, file
        return self.sources.reader, number

    def _advice(self, file: int) -> str:
        """Says how `file` has changed, if it is a source file."""
        number = file - len(self.manifest.shards)
        if self.sources is None or number < 0:
            return ""
        return f": {self.sources.describe_change(number, self.sources.size_now(number))}"

    def _read_stored(
        self, index: int, file: int, stored: npt.NDArray[np.uint8], offset: int
    ) -> None:
        """Fills `stored` from a file, for sample `index`."""
        holder = "the file" if self._layout is None else PIXELS_NAME
        reader, number = self._reader_of(file)
        try:
            if offset < 0:
                raise OverflowError("its offset is too large")
            done = reader.read_into(number, stored, offset)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_THE_FILES:
                raise
            self._refuse_change()
            raise DamagedSampleError(
                f"{self.describe(index)}: {holder} cannot be read: {error}" + self._advice(file)
            ) from error
        if done < len(stored):
            raise DamagedSampleError(
                f"{self.describe(index)}: {holder} ends after {done} of {len(stored)} bytes"
                + self._advice(file)
            )

    def _refuse_change(self) -> None:
        """Raises DamagedDatasetError if the data set under a URL was replaced."""
        if self.remote is not None and not self.remote.is_unchanged():
            raise DamagedDatasetError(
                f"{self.location} was replaced or removed while it was in use: its manifest is "
                "another one now. Upload a changed data set under another URL; to resume this run, "
                "put back the data set that it began with"
            )

    def image_sizes(
        self, indices: Int64Array, *, max_pixels: int = 0, headers: bool = True
    ) -> Int64Array:
        """Sizes in bytes of `image_bytes`' results, int64 [k]; 0 if it refuses the image.

        Without `headers` those of raw images are left out, also by `read_images`.
        """
        files, offsets, sizes = self._places(indices)
        if self._layout is not None:
            return sizes + headers * len(self._layout.pnm_header)
        ends, known = offsets + sizes, self._file_bytes
        sound = (sizes <= ends) & (ends <= known[np.minimum(files, len(known) - 1)])
        if max_pixels:
            rows = self.samples.take(indices)
            sound &= rows["height"].astype(np.int64) * rows["width"] <= max_pixels
        return np.where(sound, sizes, 0)

    def read_images(
        self,
        indices: Int64Array,
        buffer: npt.NDArray[np.uint8],
        starts: Int64Array,
        sizes: Int64Array,
        *,
        headers: bool = True,
    ) -> npt.NDArray[np.bool_]:
        """Reads many images as files and compares their checksums: 2 us each for 1 kB.

        The file of indices[i] goes to buffer[starts[i]], of uint8 [n]; `sizes` come from
        `image_sizes`, and 0 skips an image. Returns bool [k], which of them are as packed;
        `image_bytes` explains the others.
        """
        if self._layout is not None and headers:
            header = np.frombuffer(self._layout.pnm_header, dtype=np.uint8)
            buffer[starts[:, None] + np.arange(len(header))] = header
            starts, sizes = starts + len(header), sizes - len(header)
        files, offsets, _ = self._places(indices)
        whole = np.zeros(len(indices), np.bool_)
        asked_for = sizes > 0
        is_source = (files >= len(self.manifest.shards)) & (self.sources is not None)
        for group in (asked_for & ~is_source, asked_for & is_source):
            mine = np.flatnonzero(group)
            if not len(mine):
                continue
            reader, number = self._reader_of(int(files[mine[0]]))
            numbers = files + (number - files[mine[0]])
            ranges = Ranges(numbers, offsets, sizes, starts).take(mine)
            try:
                whole[mine] = reader.read_ranges(ranges, buffer)
            except OSError as error:
                if error.errno in _NOT_THE_FILES:
                    raise
        view, digest = buffer.data, xxhash.xxh3_64_intdigest  # 0.2 us each of 3 kB
        edges = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
        found = np.array([digest(view[start:end]) for start, end in edges], dtype=np.uint64)
        sound: npt.NDArray[np.bool_] = whole & (found == self.samples.take(indices)["xxh3"])
        return sound

    def _places(self, indices: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """File, offset and size of stored images, int64 [k]; source files follow the shards."""
        num_shards = len(self.manifest.shards)
        if self._layout is not None:
            size = np.full(len(indices), self._layout.row_bytes)
            return np.full(len(indices), num_shards), self._layout.offset_of(indices), size
        rows = self.samples.take(indices)
        files, offsets, sizes = (
            rows[name].astype(np.int64) for name in ("shard", "offset", "size")
        )
        if self.sources is not None:
            places = self.sources.places.take(indices)
            outside = places["file"] != NO_FILE
            files[outside] = places["file"][outside] + num_shards
            offsets[outside], sizes[outside] = places["offset"][outside], places["size"][outside]
        return files, offsets, sizes

    @functools.cached_property
    def _file_bytes(self) -> Int64Array:
        """Bytes of shards and source files by number, then 0."""
        sources = [] if self.sources is None else [self.sources.rows["num_bytes"]]
        shards = [shard.num_bytes for shard in self.manifest.shards]
        return np.concatenate([shards, *sources, [0]]).astype(np.int64)

    def caption_tokens(
        self, index: int, which: int, *, context_length: int | None = None
    ) -> npt.NDArray[Any]:
        """Token ids of caption `which`, unpadded; when cut, they keep the end token."""
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
        """The number of captions with more tokens, start and end included."""
        if self.manifest.context_length <= context_length:
            return 0
        parts = blocks_of(self.captions)
        return sum(int(np.count_nonzero(one["tokens_length"] > context_length)) for one in parts)

    def labels_of(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of sample `index` in the data set's label space; can be empty."""
        row = self.samples[self._checked(index)]
        start = int(row["labels_start"])
        return self.labels[start : start + int(row["labels_count"])]

    def describe(self, index: int, part: Part = "image") -> str:
        """Names a sample for messages: data set, file, key and offset."""
        place = f"{self.shard_of(index, part)}, offset {self.offset_of(index, part)}"
        return f"sample {sample_key(index)} of {self.location} ({place})"

    def offset_of(self, index: int, part: Part = "image") -> int:
        """The first byte of a part of sample `index` in its file, for messages."""
        if self._layout is not None and part == "image":
            return self._layout.offset_of(index)
        if part == "image" and (place := self.source_place(index)) is not None:
            return place.offset
        return int(self.samples[index]["offset"])

    def shard_of(self, index: int, part: Part = "image") -> str:
        """The file that holds a part of sample `index`, for messages."""
        if self._layout is not None and part == "image":
            return PIXELS_NAME
        if part == "image" and (place := self.source_place(index)) is not None:
            assert self.sources is not None
            return self.sources[place.file]
        shard = int(self.samples[index]["shard"])
        known = shard < len(self.manifest.shards)
        return self.manifest.shards[shard].name if known else f"shard {shard}, which does not exist"

    def check_arrays(self) -> None:
        """Raises DamagedDatasetError if an array's file was truncated since opening; costs 2 us.

        Reading beyond the end of a mapped file would be a bus error. Removed or replaced files do
        not change for processes that have them open.
        """
        own: list[npt.NDArray[Any]] = [self.samples, self.captions, self.tokens, self.labels]
        arrays = dict(zip(ARRAY_DTYPES, own, strict=True))
        if self.weights is not None:
            arrays["weights"] = self.weights
        if self.sources is not None:
            arrays |= self.sources.arrays
        for name, array in arrays.items():
            mapped = mapping_of(array)
            if mapped is not None and mapped.size() < len(mapped):
                others = self._tokens_folder if name in ("captions", "tokens") else None
                raise DamagedDatasetError(
                    f"{(others or self.folder) / name}.npy was cut from {len(mapped)} to "
                    f"{mapped.size()} bytes while it was in use: copy the data set again, and "
                    "replace files under a running job by renaming, not in place"
                )

    def new_reader(self) -> FileReader:
        """Another reader of the shards by number, followed by pixels.npy."""
        return self._files.reader(self._large)

    def blocks_of(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """The cache's blocks with images under a URL, (file, block) once each, in order of use."""
        files, offsets, sizes = self._places(indices)
        assert self.cache is not None, "a folder has no cache"
        if self.remote is None:  # only source files are under URLs
            outside = files >= len(self.manifest.shards)
            files, offsets, sizes = files[outside], offsets[outside], sizes[outside]
        return blocks_in(files, offsets, sizes, block_bytes=self.cache.block_bytes)

    def fetch_ahead(self, file: int, block: int) -> None:
        """Fetches a block of `blocks_of` into the cache."""
        reader, number = self._reader_of(file)
        assert isinstance(reader, BlockReader), "a folder has no cache"
        reader.fetch_ahead(number, block)

    @property
    def cache(self) -> CacheOptions | None:
        """The cache that images are read through; None if all are in folders."""
        if self.remote is not None:
            return self.remote.options
        return None if self.sources is None else self.sources.cache

    @property
    def needed_bytes(self) -> int:
        """Image bytes that this process has read through the cache."""
        readers = [self._reader, *([] if self.sources is None else [self.sources.reader])]
        return sum(one.num_bytes_read for one in readers if isinstance(one, BlockReader))

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this process has read from stores."""
        own = 0 if self.remote is None else self.remote.store.read_bytes
        return own + (0 if self.sources is None else self.sources.num_bytes_fetched)

    def close(self) -> None:
        """Closes the files; reading images afterwards raises ValueError."""
        self._reader.close()
        if self.sources is not None:
            self.sources.reader.close()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location} has samples 0 to {len(self) - 1}, not {index}")
        return index

    def _load_manifest(self) -> Manifest:
        """Reads the manifest, and copies the arrays that only some data sets have."""
        manifest = Manifest.load(self.folder)
        if self.remote is not None and (more := dtypes_of(manifest).keys() - ARRAY_DTYPES.keys()):
            self.remote.copy([f"{name}.npy" for name in sorted(more)])
        return manifest

    def _open_sources(self, cache: CacheOptions | None) -> SourceFiles | None:
        if self.manifest.in_place is None:
            return None
        sources = SourceFiles(self.folder, self.manifest, cache)
        if self.remote is not None and len(sources) and sources.cache is None:
            raise ValueError(
                f"{self.location} holds no images: they are in files of the machine that it was "
                f"made on, such as {sources[0]}; index them by their URLs"
            )
        return sources

    def _open_array(self, name: str, length: int) -> npt.NDArray[Any]:
        return open_array(self.folder / f"{name}.npy", dtypes_of(self.manifest)[name], length)
