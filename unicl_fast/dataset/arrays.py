"""The arrays of a packed data set: their types, and untrusting reads.

Compiled code without bounds checks follows their numbers into other arrays and shards, so each is
compared with its target at opening: about a second for ten million samples.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.manifest import Manifest, PixelsInfo
from unicl_fast.images.encoded_images import ppm_header
from unicl_fast.system.checksums import compare_checksum
from unicl_fast.system.untrusted_files import open_file

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
"""A row of samples.npy: where the image's bytes are in a shard, its displayed size, XXH3-64 of the
bytes, and its ranges of captions.npy and labels.npy. In a raw data set shard, offset and size are
the JSON's; the image's bytes are the row of pixels.npy with the sample's number."""
CAPTION_DTYPE = np.dtype([("tokens_start", "<u8"), ("tokens_length", "u1")])
"""A row of captions.npy: its range of tokens.npy, start and end tokens included."""
ARRAY_DTYPES = {
    "samples": SAMPLE_DTYPE,
    "captions": CAPTION_DTYPE,
    "tokens": np.dtype("<u2"),
    "labels": np.dtype("<i4"),
}
WEIGHT_DTYPE: np.dtype[Any] = np.dtype("<f4")
"""A row of weights.npy, which only a data set with weights has: a sample's weight."""
NO_FILE = 2**32 - 1  # the source file number of an image that is in the data set's own shard
IN_PLACE_DTYPES = {
    "places": np.dtype([("file", "<u4"), ("offset", "<u8"), ("size", "<u4")]),
    "files": np.dtype(
        [("name_start", "<u8"), ("name_length", "<u2"), ("num_bytes", "<u8"), ("version", "<u8")]
    ),
    "names": np.dtype("u1"),
}
"""More arrays of a data set in place: each sample's source file and byte range; each source file's
name (a URL, or a path as bytes) as a range of names.npy, its size, and when it was written
(nanoseconds) or XXH3-64 of its object's version."""
PIXELS_NAME = "pixels.npy"
"""The decoded images of a raw data set, uint8 [N h w 3]."""
PIXEL_DTYPE = np.dtype("|u1")
CHANNELS = 3

HEADER_BYTES = 512  # length of our .npy headers, fixed before the number of rows is known
_MAGIC = b"\x93NUMPY\x01\x00"
_BLOCK_ROWS = 1 << 16  # rows checked at once: a few megabytes, which stay in cache

Index = TypeVar("Index", int, npt.NDArray[np.int64])
Rows = npt.NDArray[Any]
Problems = list[tuple[npt.NDArray[np.bool_], str]]
"""Flags of the bad rows of a block, and the fault."""


def open_array(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    """Maps a one-dimensional .npy file read-only; ValueError unless it has `length` of `dtype`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the copy of this data set is not complete, copy it again"
        )
    descr = np.lib.format.dtype_to_descr(dtype)
    with open_file(path) as file:
        # compared, not parsed: NumPy would create types from any content
        if file.read(HEADER_BYTES) != npy_header(dtype, (length,)):
            raise ValueError(
                f"{path} is damaged or cut short: it does not begin as an array of {length} rows "
                f"of {descr}, which the manifest says; copy the data set again"
            )
        num_bytes = os.fstat(file.fileno()).st_size
    expected = HEADER_BYTES + length * dtype.itemsize
    if num_bytes != expected:
        found = f"{num_bytes} bytes where {expected} are expected"
        raise ValueError(f"{path} is damaged or cut short: {found}; copy the data set again")
    if not length:  # mmap refuses empty files
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(length,))


def dtypes_of(manifest: Manifest) -> dict[str, np.dtype[Any]]:
    """The types of all arrays of a data set."""
    dtypes = ARRAY_DTYPES | ({"weights": WEIGHT_DTYPE} if manifest.num_weights else {})
    return dtypes if manifest.in_place is None else {**dtypes, **IN_PLACE_DTYPES}


def length_of(manifest: Manifest, name: str) -> int:
    """The number of rows of an array, by the manifest."""
    info = manifest.in_place
    if info is not None and name in IN_PLACE_DTYPES:
        lengths = {"places": manifest.num_samples, "files": info.num_files}
        return lengths.get(name, info.num_name_bytes)
    return int(getattr(manifest, f"num_{name}"))


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The first `HEADER_BYTES` of our .npy files (NPY format 1.0)."""
    descr = np.lib.format.dtype_to_descr(dtype)
    length = HEADER_BYTES - len(_MAGIC) - 2
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    text = repr(fields).ljust(length - 1) + "\n"
    assert len(text) == length
    return _MAGIC + struct.pack("<H", length) + text.encode("ascii")


class PixelLayout:
    """The layout of `pixels.npy`: an array with one row per image, all of equal size."""

    def __init__(self, place: str | Path, info: PixelsInfo, num_samples: int) -> None:
        """Raises ValueError if the manifest of the data set at `place` contradicts itself."""
        self.num_samples = num_samples
        self.shape = (info.height, info.width, CHANNELS)
        self.row_bytes = info.height * info.width * CHANNELS
        self.num_bytes = HEADER_BYTES + num_samples * self.row_bytes
        if not self.row_bytes or self.num_bytes != info.num_bytes:
            raise ValueError(
                f"the manifest of {place} contradicts itself: {num_samples} images of "
                f"{info.width} x {info.height} pixels, but {info.num_bytes} bytes of {PIXELS_NAME}"
            )
        self.pnm_header = ppm_header(info.height, info.width)
        """Prepended to an image's bytes, it makes a file that decoders read."""

    def offset_of(self, index: Index) -> Index:
        """The first byte in the file of image `index`, or of several."""
        return HEADER_BYTES + index * self.row_bytes


def blocks_of(array: Rows) -> Iterator[Rows]:
    """Yields all rows in blocks, and releases the mapped pages read for it."""
    mapped = mapping_of(array)
    for start in range(0, len(array), _BLOCK_ROWS):
        yield np.asarray(array)[start : start + _BLOCK_ROWS]
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def mapping_of(array: Rows) -> mmap.mmap | None:
    """The mapped file behind an array or a view of it, or None."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def verify_arrays(
    folder: Path,
    manifest: Manifest,
    dtypes: dict[str, np.dtype[Any]],
    *,
    checksums: dict[str, str] | None,
) -> int:
    """Compares arrays with their checksums, and references in them with their targets.

    Reads the files, since mapped pages count as this process's memory. Without checksums (None)
    only references are compared. Returns the largest token id; raises ValueError if a file was
    changed, or a row refers to something that does not exist.
    """
    largest_token = 0
    for name, dtype in dtypes.items():
        path = folder / f"{name}.npy"
        digest = xxhash.xxh3_64()
        first = 0
        for block in _blocks(path, dtype, digest):
            if name == "tokens":
                largest_token = max(largest_token, int(block.max(initial=0)))
            else:
                _refuse_first(_problems_of(name, block, manifest), path=path, first=first)
            first += len(block)
        if checksums is not None:
            compare_checksum(path, digest.hexdigest(), checksums)
    return largest_token


def _blocks(path: Path, dtype: np.dtype[Any], digest: Any) -> Iterator[Rows]:
    """Yields all rows of a file, and feeds all its bytes to `digest`."""
    buffer = np.empty(_BLOCK_ROWS, dtype)
    view = memoryview(buffer.view(np.uint8))  # type: ignore[arg-type]
    with open_file(path, buffering=0) as file:
        digest.update(file.read(HEADER_BYTES))
        filled = 0
        while count := file.readinto(view[filled:]):
            filled += count
            whole = filled - filled % dtype.itemsize
            if filled == len(view) or whole == filled:
                digest.update(view[:whole])
                yield buffer[: whole // dtype.itemsize]
                filled = 0


def _refuse_first(problems: Problems, *, path: Path, first: int) -> None:
    for wrong, message in problems:
        if wrong.any():
            row = first + int(wrong.argmax())
            raise ValueError(f"{path} is damaged: row {row} {message}; copy the data set again")


def _check_samples(rows: Rows, manifest: Manifest) -> Problems:
    """Checks that every sample is inside its shard, and its ranges inside the other arrays."""
    shard_bytes = np.array([shard.num_bytes for shard in manifest.shards], np.uint64)
    no_shard = rows["shard"] >= len(shard_bytes)
    if no_shard.any():
        return [(no_shard, "names a shard that does not exist")]
    ends = shard_bytes[rows["shard"]]
    height, width = rows["height"], rows["width"]
    captions, labels = rows["captions_count"], rows["labels_count"]
    no_captions = _leaves(rows["captions_start"], captions, manifest.num_captions)
    no_labels = _leaves(rows["labels_start"], labels, manifest.num_labels)
    problems = [
        (_leaves(rows["offset"], rows["size"], ends), "lies beyond the end of its shard"),
        (rows["size"] == 0, "is an image of no bytes"),
        ((height == 0) | (width == 0), "is an image of no pixels"),
        (no_captions, "names captions that do not exist"),
        (no_labels, "names labels that do not exist"),
        ((captions | labels) == 0, "has neither captions nor labels"),
    ]
    if (pixels := manifest.pixels) is not None:
        wrong_size = (height != pixels.height) | (width != pixels.width)
        problems.append((wrong_size, "is an image of another size than the manifest says"))
    return problems


def _check_captions(rows: Rows, manifest: Manifest) -> Problems:
    lengths, longest = rows["tokens_length"], manifest.context_length
    wrong_length = (lengths == 0) | (lengths > longest)
    no_tokens = _leaves(rows["tokens_start"], lengths, manifest.num_tokens)
    return [
        (wrong_length, f"is a caption of no tokens, or of more than {longest}"),
        (no_tokens, "names tokens that do not exist"),
    ]


def _problems_of(name: str, rows: Rows, manifest: Manifest) -> Problems:
    if name == "samples":
        return _check_samples(rows, manifest)
    if name == "captions":
        return _check_captions(rows, manifest)
    if name == "labels":
        num_classes = len(manifest.class_names)
        wrong = (rows < 0) | (rows >= num_classes)
        return [(wrong, f"is not one of the {num_classes} classes that the manifest names")]
    if name == "weights":
        return [(~((rows > 0) & np.isfinite(rows)), "is not a positive number")]
    if name == "names":
        return [(rows == 0, "is a zero byte, which no path has")]
    assert manifest.in_place is not None
    if name == "places":
        unknown = (rows["file"] >= manifest.in_place.num_files) & (rows["file"] != NO_FILE)
        return [(unknown, "names a source file that does not exist")]
    length = rows["name_length"]
    no_name = _leaves(rows["name_start"], length, manifest.in_place.num_name_bytes)
    return [((length == 0) | no_name, "names a range of names.npy that does not exist")]


def _leaves(starts: Rows, counts: Rows, end: Any) -> npt.NDArray[np.bool_]:
    """Whether ranges exceed `end`; a start near 2**64 must not wrap around."""
    result: npt.NDArray[np.bool_] = (starts > end) | (starts + counts > end)
    return result
