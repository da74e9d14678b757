"""A sample with all its shard's data, byte by byte, for programs that check or copy data sets."""

import json
import math
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.arrays import NO_FILE
from unicl_fast.dataset.growing_files import BLOCK, END_OF_TAR, padded_bytes, tar_header
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset, sample_key

_MEMBERS = (["jpg", "json"], ["webp", "json"], ["png", "json"], ["ppm", "json"])


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of KEY.json."""

    captions: tuple[str, ...]
    labels: tuple[int, ...]
    source: str
    name: str
    weight: float | None = None
    """None if the data set has no weights."""
    group: str = ""
    """The key of its product, which several images can share; empty without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file in a shard."""

    extension: str
    offset: int
    """First byte of its contents in the shard."""
    data: memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSample:
    """A sample as stored in its shard."""

    members: tuple[Member, ...]
    description: Description

    @property
    def image(self) -> Member | None:
        """The image as a file; None if the shard does not hold it (raw, or in place)."""
        return self.members[0] if len(self.members) > 1 else None

    def index_line(self, index: int) -> str:
        """The sample's line of the shard's .idx file, without newline."""
        key = sample_key(index)
        return " ".join(
            f"{one.extension} {one.offset} {len(one.data)} {key}.{one.extension}"
            for one in self.members
        )


class SampleReader:
    """Reads whole samples by number; close it at the end."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset
        self._shards = dataset.manifest.shards
        self._is_raw = dataset.image_shape is not None
        self._reader = dataset.new_reader()

    def span(self, index: int) -> tuple[int, int, int]:
        """A sample's shard, and the bytes where its first header starts and its padding ends."""
        rows = self._dataset.samples
        shard, start = int(rows[index]["shard"]), int(rows[index]["offset"]) - BLOCK
        if shard >= len(self._shards):
            raise self._damaged(index, "there is no such shard")
        last = index + 1 == len(rows) or int(rows[index + 1]["shard"]) != shard
        end_of_shard = self._shards[shard].num_bytes - len(END_OF_TAR)
        end = end_of_shard if last else int(rows[index + 1]["offset"]) - BLOCK
        if not 0 <= start < end <= end_of_shard:
            raise self._damaged(index, f"samples.npy places it from byte {start} to {end}")
        return shard, start, end

    def read(self, index: int) -> StoredSample:
        """All data of a sample in its shard; DamagedSampleError if wrong. Compares no checksum."""
        members = self._members(index)
        found = [member.extension for member in members]
        is_elsewhere = self._is_elsewhere(index)
        if found not in ([["json"]] if is_elsewhere else _MEMBERS):
            expected = "json alone" if is_elsewhere else "jpg, webp, png or ppm, then json"
            raise self._damaged(
                index, f"its members are {', '.join(found)}; expected are {expected}"
            )
        row, first = self._dataset.samples[index], members[0]
        description = self._description(index, members[-1])
        if (first.offset, len(first.data)) != (int(row["offset"]), int(row["size"])):
            raise self._damaged(
                index,
                f"the {first.extension} has {len(first.data)} bytes from byte {first.offset} on, "
                f"samples.npy says {int(row['size'])} from {int(row['offset'])}",
            )
        return StoredSample(members=members, description=description)

    def read_description(self, index: int) -> Description:
        """Reads only KEY.json; DamagedSampleError if it is wrong."""
        image = BLOCK + padded_bytes(int(self._dataset.samples[index]["size"]))
        members = self._members(index, skipped=0 if self._is_elsewhere(index) else image)
        if [member.extension for member in members] != ["json"]:
            raise self._damaged(index, "there is no JSON where it should be")
        return self._description(index, members[0])

    def _is_elsewhere(self, index: int) -> bool:
        """Whether the shard holds only the sample's JSON."""
        return self._is_raw or self._dataset.source_place(index) is not None

    def _members(self, index: int, *, skipped: int = 0) -> tuple[Member, ...]:
        shard, start, end = self.span(index)
        block = np.empty(max(0, end - start - skipped), np.uint8)
        try:
            done = self._reader.read_into(shard, block, start + skipped)
        except OSError as error:
            raise self._damaged(index, f"the shard cannot be read: {error}") from error
        if done < len(block):
            raise self._damaged(index, f"the shard ends after {done} of {len(block)} bytes")
        first, key, members, position = start + skipped, sample_key(index), list[Member](), 0
        while position < len(block):
            header = _read_header(block[position : position + BLOCK].tobytes())
            if header is None:
                raise self._damaged(index, f"the tar header at byte {first + position} is damaged")
            name, size = header
            stem, _, extension = name.partition(".")
            if stem != key or not extension:
                message = f"a member is called {name!r}, which should be {key}.EXTENSION"
                raise self._damaged(index, message)
            begin = position + BLOCK
            position = begin + padded_bytes(size)
            if position > len(block):
                raise self._damaged(index, f"{name} of {size} bytes reaches into the next sample")
            if block[begin + size : position].any():
                raise self._damaged(index, f"the padding after {name} is not empty")
            data = block[begin : begin + size].data
            members.append(Member(extension=extension, offset=first + begin, data=data))
        return tuple(members)

    def _description(self, index: int, member: Member) -> Description:
        """Reads KEY.json, if it has the form that `unicl-pack build` writes."""
        try:
            # not by only msgspec, which refuses bytes of names that are not UTF-8
            found = msgspec.convert(json.loads(bytes(member.data)), Description)
        except (ValueError, RecursionError) as error:
            raise self._damaged(index, f"its JSON is not as it was written: {error}") from error
        if (found.weight is None) != (self._dataset.weights is None):
            raise self._damaged(index, "its JSON and the manifest do not agree on weights")
        return found

    def close(self) -> None:
        self._reader.close()

    def _damaged(self, index: int, message: str) -> DamagedSampleError:
        return DamagedSampleError(f"{self._dataset.describe(index, 'members')}: {message}")


def image_sizes(dataset: PackedDataset) -> npt.NDArray[np.uint32]:
    """Bytes of each image's file, or of its pixels in a raw data set, [N]."""
    sizes: npt.NDArray[np.uint32] = dataset.samples["size"]
    if dataset.sources is not None:
        places = dataset.sources.places[: len(dataset)]
        return np.where(places["file"] == NO_FILE, sizes, places["size"])
    if dataset.image_shape is None:
        return sizes
    return np.full(len(dataset), math.prod(dataset.image_shape), np.uint32)


def equal_images(dataset: PackedDataset) -> list[npt.NDArray[np.int64]]:
    """Samples with equal images, by size and checksum: groups of two or more ascending numbers."""
    keys = [image_sizes(dataset).astype(np.uint64), np.asarray(dataset.samples["xxh3"])]
    order = np.lexsort(keys)
    ends = np.flatnonzero(np.any([np.diff(key[order]) != 0 for key in keys], axis=0)) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    return [order[bounds[i] : bounds[i + 1]] for i in np.flatnonzero(np.diff(bounds) > 1).tolist()]


def shared_images(dataset: PackedDataset, other: PackedDataset) -> int:
    """How many images of `other` are also in `dataset`, byte for byte, or pixel for pixel if raw.

    By checksum, so never between a raw data set and one of files.
    """
    if (dataset.image_shape is None) != (other.image_shape is None):
        return 0
    return int(np.isin(other.samples["xxh3"], dataset.samples["xxh3"]).sum())


def _read_header(header: bytes) -> tuple[str, int] | None:
    """Name and size in a tar header; None if any byte differs from ours."""
    try:
        name = header[:100].split(b"\0", 1)[0].decode("ascii")
        size = int(header[124:135], 8)
        return (name, size) if size >= 0 and tar_header(name, size) == header else None
    except (ValueError, IndexError):
        return None
