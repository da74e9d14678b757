"""The ledger's files byte by byte: what a rank was fed at each step, and how that is read again.

A start of the program opens a segment, one file a rank: a header, then one record a step. The text
of the format is in docs/reliability.md. `ledger` writes it, `ledger_reading` finds and checks the
records of a file, `ledger_proof` puts the files of a run together.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

LEDGER_FOLDER = "ledger"
VERSION = 1

_MAGIC = b"UNICLLGR"
_START = struct.Struct("<8sII")  # magic, bytes of JSON, checksum of them
MARK = b"\xf5STP"
HEAD = struct.Struct("<4sIQI")  # mark, checksum of what follows it, step, substitutes
CHECKED_FROM = 8
PLACE_BYTES = 4
_MOST_HEADER_BYTES = 1 << 20
_NAME = re.compile(r"segment-(\d{4,})-rank-(\d{4,})\.bin")


class DamagedSegmentError(ValueError):
    """A segment's file is not what was written, and cannot be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerSource:
    """A data set as the ledger knows it."""

    name: str
    num_samples: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmentHeader:
    """What one rank says of itself when the program starts; sizes of records follow from it."""

    segment: int
    """Starts of the program are numbered from 1."""
    start_step: int
    """The first step of this start; it supersedes what earlier segments say of it and of later
    ones."""
    rank: int
    world_size: int
    global_batch_size: int
    sources: tuple[LedgerSource, ...]
    seed: int
    shares: tuple[int, ...]
    """Parts of the sources in every batch. With the seed they allow to plan the run again."""
    shuffle_window: int = 0
    """`data.shuffle_window`, which that takes too; not in the file where it is 0."""

    @property
    def share(self) -> int:
        """Slots of this rank in each step."""
        return self.global_batch_size // self.world_size

    @property
    def id_bytes(self) -> int:
        """Bytes of a sample id: as few as the largest source allows."""
        largest = max(source.num_samples for source in self.sources)
        return max(1, ((largest - 1).bit_length() + 7) // 8)

    @property
    def source_bytes(self) -> int:
        """Bytes of a source id: none where there is one source."""
        return ((len(self.sources) - 1).bit_length() + 7) // 8

    def record_bytes(self, num_substitutes: int) -> int:
        return (
            HEAD.size
            + self.share * (self.source_bytes + self.id_bytes)
            + num_substitutes * (PLACE_BYTES + self.id_bytes)
        )


def segment_name(segment: int, rank: int) -> str:
    return f"segment-{segment:04d}-rank-{rank:04d}.bin"


def list_segments(folder: Path) -> dict[int, dict[int, Path]]:
    """Segment -> rank -> file, in ascending order."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    numbers = sorted((int(m[1]), int(m[2]), path) for m, path in found if m is not None)
    segments: dict[int, dict[int, Path]] = {}
    for segment, rank, path in numbers:
        segments.setdefault(segment, {})[rank] = path
    return segments


def encode_header(header: SegmentHeader) -> bytes:
    values = {"version": VERSION} | dataclasses.asdict(header)
    if not header.shuffle_window:
        del values["shuffle_window"]
    text = json.dumps(values).encode()
    return _START.pack(_MAGIC, len(text), checksum_of(text)) + text


def decode_header(data: memoryview) -> tuple[SegmentHeader, int] | None:
    """The header and the offset of the first record; None where it was cut off in the writing.

    Raises:
        DamagedSegmentError: it is whole, and not what was written.
        ValueError: of a version that is not known here.
    """
    if len(data) < _START.size:
        return None
    magic, size, checksum = _START.unpack_from(data)
    if magic != _MAGIC or size > _MOST_HEADER_BYTES:
        raise DamagedSegmentError("it does not begin as a segment of a ledger does")
    text = bytes(data[_START.size : _START.size + size])
    if len(text) < size:
        return None
    if checksum_of(text) != checksum:
        raise DamagedSegmentError("its header's checksum does not agree")
    values = json.loads(text)
    version = values.pop("version")
    if version != VERSION:
        raise ValueError(f"it has format version {version}, this program reads {VERSION}")
    values["sources"] = tuple(LedgerSource(**source) for source in values["sources"])
    values["shares"] = tuple(values["shares"])
    return SegmentHeader(**values), _START.size + size


def encode_record(
    header: SegmentHeader,
    *,
    step: int,
    source_ids: NDArray[np.int64],
    scheduled_ids: NDArray[np.int64],
    shown_ids: NDArray[np.int64],
) -> bytes:
    """One step of one rank; each array is int64 [share], in the order of the slots."""
    places = np.flatnonzero(shown_ids != scheduled_ids)
    body = b"".join(
        (
            struct.pack("<QI", step, len(places)),
            _pack(source_ids, header.source_bytes),
            _pack(scheduled_ids, header.id_bytes),
            _pack(places, PLACE_BYTES),
            _pack(shown_ids[places], header.id_bytes),
        )
    )
    return MARK + struct.pack("<I", checksum_of(body)) + body


def checksum_of(data: bytes | memoryview) -> int:
    value: int = xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF
    return value


def _pack(values: NDArray[Any], width: int) -> bytes:
    """The low `width` bytes of each number, little-endian."""
    return values.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def unpack_numbers(packed: NDArray[np.uint8], into: NDArray[np.int64]) -> None:
    """Rows of packed numbers, [k count * width] -> [k count]."""
    width = packed.shape[1] // into.shape[1]
    if width:
        as_bytes = into.view(np.uint8).reshape(*into.shape, 8)
        as_bytes[..., :width] = packed.reshape(*into.shape, width)
