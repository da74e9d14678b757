"""The packed data set, format versions 1 to 5 (docs/data-format.md), read by sample number.

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
    blocks_in,
)
from unicl_fast.dataset.files import FileReader, LocalFiles, RemoteFiles, check_files
from unicl_fast.dataset.in_place import Place, SourceFiles
from unicl_fast.dataset.manifest import PPM_FORMAT_VERSION, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.images.encoded_images import ppm_bytes
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
        self.sources = self._open_sources(cache)
        """The files that hold the images; None where they are in the data set's own files."""
        total = self.manifest.num_samples
        num_used = min(max(1, round(fraction * total)), total)
        self.samples = self._open_array("samples", total)[:num_used]
        self.captions = self._open_array("captions", self.manifest.num_captions)
        self.tokens: npt.NDArray[Any] = self._open_array("tokens", self.manifest.num_tokens)
        self.labels: npt.NDArray[np.int32] = self._open_array("labels", self.manifest.num_labels)
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
        """That of the tokenizer of `tokens`."""
        self._tokens_folder: Path | None = None
        self.largest_token: int | None = None
        """Largest token id of all captions; None if opened without `verify`."""
        if verify:
            self.largest_token = verify_arrays(
                self.folder,
                self.manifest,
                dtypes_of(self.manifest),
                checksums=read_checksums(self.folder),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, here or in another process, opens the files anew: descriptors are not shared."""
        others = self._tokens_folder, self.tokens.dtype, self.vocabulary_hash
        return self._reopen, (), (self.largest_token, *others)

    def __setstate__(self, state: tuple[int | None, Path | None, np.dtype[Any], str]) -> None:
        self.largest_token, folder, dtype, vocabulary_hash = state
        if folder is not None:
            self.take_tokens(folder, dtype, vocabulary_hash=vocabulary_hash)

    def take_tokens(self, folder: Path, dtype: np.dtype[Any], *, vocabulary_hash: str) -> None:
        """Replaces the token rows of captions by another tokenizer's, arrays in a folder.

        Raises FileNotFoundError, or ValueError if they are of other captions.
        """
        num_captions = self.manifest.num_captions
        captions = open_array(folder / "captions.npy", ARRAY_DTYPES["captions"], num_captions)
        last = captions[-1:]
        num_tokens = int((last["tokens_start"] + last["tokens_length"]).sum())
        self.tokens = open_array(folder / "tokens.npy", dtype, num_tokens)
        self.captions, self.largest_token = captions, None
        self._tokens_folder, self.vocabulary_hash = folder, vocabulary_hash

    def whole(self) -> PackedDataset:
        """All samples of the data set, opened anew and not checked; the caller closes it."""
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
        """Height, width and channels of every image of a raw data set; None for others."""
        return None if self._layout is None else self._layout.shape

    @functools.cached_property
    def is_decoded(self) -> bool:
        """Whether no image needs a decoder: all are raw, or PPMs by their sizes in bytes."""
        if self.manifest.version != PPM_FORMAT_VERSION:
            return self._layout is not None
        rows = self.samples
        return bool(np.all(ppm_bytes(rows["height"], rows["width"]) == rows["size"]))

    def image_bytes(
        self, index: int, *, verify: bool = False, max_pixels: int = 0
    ) -> npt.NDArray[np.uint8]:
        """The image of sample `index` as a file: JPEG, WebP, PNG or PPM; from a raw set PPM.

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
            if (place := self.source_place(index)) is not None:
                file, offset, size = place.file + len(self.manifest.shards), *place[1:]
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
        reader, number = self._reader_of(file)
        for _ in range(2 if isinstance(reader, BlockReader) else 1):
            self._read_stored(index, file, stored, offset)
            found, expected = 0, int(row["xxh3"])
            if not verify or (found := xxhash.xxh3_64_intdigest(stored.data)) == expected:
                return data
            if isinstance(reader, BlockReader):  # perhaps only the cache is damaged
                reader.discard(number, offset, size)
        self._refuse_change()
        raise DamagedSampleError(
            f"{self.describe(index)}: the bytes differ from those that were packed (checksum "
            f"{found:016x}, expected {expected:016x})" + self._advice(file)
        )

    def source_place(self, index: int) -> Place | None:
        """The place of a sample's image in a source file; None if it is in the data set's own."""
        return None if self.sources is None else self.sources.place_of(index)

    def _reader_of(self, file: int) -> tuple[FileReader, int]:
        """The reader of a file, and the file's number there: source files follow the shards."""
        number = file - len(self.manifest.shards)
        if self.sources is None or number < 0:
            return self._reader, file
        return self.sources.reader, number

    def _advice(self, file: int) -> str:
        """Says how a source file has changed, if `file` is one."""
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
        indices: Int64Array,
        out: npt.NDArray[np.uint8],
        positions: Int64Array,
    ) -> npt.NDArray[np.bool_]:
        """Reads many images of a raw data set and compares their checksums: 1 us each of 3 kB.

        The image of indices[i] comes to out[positions[i]], of a contiguous uint8 [b h w 3].

        Returns:
            bool [k], which of them are as they were packed. `image_bytes` says what is wrong with
            the others.
        """
        assert self._layout is not None
        size = self._layout.row_bytes
        sizes = np.full(len(indices), size)
        return self._read_stored_images(indices, out.reshape(-1), size * positions, sizes)

    def image_sizes(self, indices: Int64Array, *, max_pixels: int = 0) -> Int64Array:
        """Sizes in bytes of what `image_bytes` returns, int64 [k]; 0 where it refuses the image."""
        files, offsets, sizes = self._places(indices)
        if self._layout is not None:
            return sizes + len(self._layout.pnm_header)
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
    ) -> npt.NDArray[np.bool_]:
        """Reads many images as files and compares their checksums: 2 us each of 1 kB.

        The file of indices[i] comes to buffer[starts[i]], of uint8 [n]; `sizes` are those of
        `image_sizes`, where 0 leaves an image out.

        Returns:
            bool [k], which of them are as they were packed. `image_bytes` says what is wrong with
            the others.
        """
        if self._layout is not None:
            header = np.frombuffer(self._layout.pnm_header, dtype=np.uint8)
            buffer[starts[:, None] + np.arange(len(header))] = header
            starts, sizes = starts + len(header), sizes - len(header)
        return self._read_stored_images(indices, buffer, starts, sizes)

    def _read_stored_images(
        self,
        indices: Int64Array,
        buffer: npt.NDArray[np.uint8],
        starts: Int64Array,
        sizes: Int64Array,
    ) -> npt.NDArray[np.bool_]:
        """Reads images as they are stored; returns which are as they were packed, bool [k]."""
        files, offsets, _ = self._places(indices)
        whole = np.zeros(len(indices), np.bool_)
        asked_for = sizes > 0
        is_source = (files >= len(self.manifest.shards)) & (self.sources is not None)
        for group in (asked_for & ~is_source, asked_for & is_source):
            mine = np.flatnonzero(group)
            if not len(mine):
                continue
            reader, number = self._reader_of(int(files[mine[0]]))
            numbers = files[mine] + (number - files[mine[0]])
            try:
                whole[mine] = reader.read_ranges(
                    numbers, offsets[mine], sizes[mine], buffer, starts[mine]
                )
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
        """Bytes of shards and source files by number, and 0 at the end."""
        sources = [] if self.sources is None else [self.sources.rows["num_bytes"]]
        shards = [shard.num_bytes for shard in self.manifest.shards]
        return np.concatenate([shards, *sources, [0]]).astype(np.int64)

    def caption_tokens(
        self, index: int, which: int, *, context_length: int | None = None
    ) -> npt.NDArray[Any]:
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
        if part == "image" and (place := self.source_place(index)) is not None:
            return place.offset
        return int(self.samples[index]["offset"])

    def shard_of(self, index: int, part: Part = "image") -> str:
        """The name of the file that holds a part of sample `index`, for messages."""
        if self._layout is not None and part == "image":
            return PIXELS_NAME
        if part == "image" and (place := self.source_place(index)) is not None:
            assert self.sources is not None
            return self.sources[place.file]
        shard = int(self.samples[index]["shard"])
        known = shard < len(self.manifest.shards)
        return self.manifest.shards[shard].name if known else f"shard {shard}, which does not exist"

    def check_arrays(self) -> None:
        """Raises DamagedDatasetError if an array's file was cut since it was opened; costs 2 us.

        Reading after the end of a mapped file would end the process with a bus error. Files that
        are removed or replaced do not change for processes that have them open.
        """
        own: list[npt.NDArray[Any]] = [self.samples, self.captions, self.tokens, self.labels]
        arrays = dict(zip(ARRAY_DTYPES, own, strict=True))
        if self.sources is not None:
            arrays |= self.sources.arrays
        for name, array in arrays.items():
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
        files, offsets, sizes = self._places(indices)
        assert self.cache is not None, "a folder has no cache"
        if self.remote is None:  # source files are under URLs, and the shards are not
            outside = files >= len(self.manifest.shards)
            files, offsets, sizes = files[outside], offsets[outside], sizes[outside]
        return blocks_in(files, offsets, sizes, block_bytes=self.cache.block_bytes)

    def fetch_ahead(self, file: int, block: int) -> None:
        """Brings a block that `blocks_of` named into the cache."""
        reader, number = self._reader_of(file)
        assert isinstance(reader, BlockReader), "a folder has no cache"
        reader.fetch_ahead(number, block)

    @property
    def cache(self) -> CacheOptions | None:
        """The cache that images are read through; None if all lie in folders."""
        if self.remote is not None:
            return self.remote.options
        return None if self.sources is None else self.sources.cache

    @property
    def needed_bytes(self) -> int:
        """Bytes of images that this process has read through the cache."""
        readers = [self._reader, *([] if self.sources is None else [self.sources.reader])]
        return sum(one.num_bytes_read for one in readers if isinstance(one, BlockReader))

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this process has read from stores."""
        own = 0 if self.remote is None else self.remote.store.traffic.read_bytes
        return own + (0 if self.sources is None else self.sources.num_bytes_fetched)

    def close(self) -> None:
        """Closes the files; reading images afterwards is an error."""
        self._reader.close()
        if self.sources is not None:
            self.sources.reader.close()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location} has samples 0 to {len(self) - 1}, not {index}")
        return index

    def _open_sources(self, cache: CacheOptions | None) -> SourceFiles | None:
        if self.manifest.in_place is None:
            return None
        if self.remote is not None:
            self.remote.copy([f"{name}.npy" for name in dtypes_of(self.manifest)])
        sources = SourceFiles(self.folder, self.manifest, cache, location=self.location)
        if self.remote is not None and len(sources) and sources.cache is None:
            raise ValueError(
                f"{self.location} holds no images: they are in files of the machine that it was "
                f"made on, such as {sources[0]}; index them by their URLs"
            )
        return sources

    def _open_array(self, name: str, length: int) -> npt.NDArray[Any]:
        return open_array(self.folder / f"{name}.npy", ARRAY_DTYPES[name], length)
