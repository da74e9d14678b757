"""The ledger's binary format: what a rank was fed at each step.

Each start of the program, and each stage of a run, opens a segment: one file per rank, with a
header (`_START`, then a `SegmentHeader` as JSON) and a record per step, each in one write. Numbers
are little-endian, checksums the low 32 bits of XXH3-64. A record of b samples and k substitutes:

    4 bytes        a mark, to find the next record after damage
    u4             checksum of the rest
    u8, u4         step, k
    b x 0-2 bytes  data sets; as few bytes as possible, none for a single one
    b x 1-6 bytes  scheduled samples; as few bytes as the largest data set allows
    k x u4         which of the b samples had a substitute
    k x 1-6 bytes  samples shown instead, of the same data sets

A step counts in a segment if all ranks have its record; a segment supersedes earlier ones from its
start on. A step is missing if it does not count but precedes a step that does, a later segment's
start, or the newest checkpoint.
"""

import bisect
import dataclasses
import itertools
import json
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from msgspec import Meta
from numpy.typing import NDArray

from unicl_fast.dataset.arrays import WEIGHT_DTYPE, open_array
from unicl_fast.dataset.weights import WeightedDraws
from unicl_fast.system.checked_fields import LARGEST_INT, Count, from_json_values, require
from unicl_fast.system.untrusted_files import open_file, parse_json
from unicl_fast.system.wording import shorten

LEDGER_FOLDER = "ledger"
VERSION = 1

_MAGIC = b"UNICLLGR"
_START = struct.Struct("<8sII")  # magic, bytes of JSON, checksum of them
_MOST_HEADER_BYTES = 1 << 20
_NAME = re.compile(r"segment-(\d{4,})-rank-(\d{4,})\.bin")

_MARK = b"\xf5STP"
_HEAD = struct.Struct("<4sIQI")  # mark, checksum of the rest, step, substitutes
_CHECKED_FROM = 8
_INDEX_BYTES = 4

# No run writes values beyond these; they must cost neither memory nor time.
_STEPS = 1 << 53
_Step = Annotated[int, Meta(ge=0, lt=_STEPS)]
_Size = Annotated[int, Meta(ge=1, le=1 << 48)]
_Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
_Share = Annotated[int, Meta(ge=1, le=1 << 31)]


class DamagedSegmentError(ValueError):
    """A segment's file is damaged and cannot be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerSource:
    """A data set in the ledger."""

    name: str
    num_samples: _Size
    weights: str = ""
    """XXH3-64 of the samples' weights, if they are drawn by weight; see `weights_path`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmentHeader:
    """Describes one rank at a start of the program; determines the sizes of records."""

    segment: Count
    """Number of this start or stage, from 1."""
    start_step: _Step
    """The first step, from which this segment supersedes earlier ones."""
    rank: _Rank
    world_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    global_batch_size: Annotated[int, Meta(ge=1, le=LARGEST_INT)]
    sources: tuple[LedgerSource, ...]
    seed: Annotated[int, Meta(ge=-LARGEST_INT - 1, le=LARGEST_INT)]
    shares: tuple[_Share, ...]
    """Integers in the proportion of the sources' weights. With the seed and the next two fields,
    they allow planning the run again."""
    shuffle_window: Count = 0
    shuffle_groups: int = 1
    run_id: str = ""
    """The run's id, as in its checkpoints."""
    first_draw: Count = 0
    """Draws before the first step, if earlier stages had other batch sizes; else 0."""
    last_batch_size: Count = 0
    """`run.global_batch_size`, which the last stage has; 0 if it is this segment's."""
    follows: bool = False
    """Whether this is a stage of a program that was already running."""

    def __post_init__(self) -> None:
        """Raises ValueError for values that no run can have."""
        require(self.rank < self.world_size, "rank must be below world_size")
        divides = self.global_batch_size % self.world_size == 0
        require(divides, "world_size must divide global_batch_size")
        pairs = 1 <= len(self.sources) == len(self.shares) <= 1 << 16
        require(pairs, "sources and shares must be as many as each other, and one at least")

    @property
    def run_batch_size(self) -> int:
        """`run.global_batch_size`, possibly a later stage's."""
        return self.last_batch_size or self.global_batch_size

    def draws_before(self, step: int) -> int:
        """Draws of the run before a step of this segment."""
        first = self.first_draw or self.start_step * self.global_batch_size
        return first + (step - self.start_step) * self.global_batch_size

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def id_bytes(self) -> int:
        """Bytes of a sample id: as few as the largest source allows."""
        largest = max(source.num_samples for source in self.sources)
        return max(1, ((largest - 1).bit_length() + 7) // 8)

    @property
    def source_bytes(self) -> int:
        """Bytes of a source id: none for a single source."""
        return ((len(self.sources) - 1).bit_length() + 7) // 8

    def record_bytes(self, num_substitutes: int) -> int:
        return (
            _HEAD.size
            + self.local_batch_size * (self.source_bytes + self.id_bytes)
            + num_substitutes * (_INDEX_BYTES + self.id_bytes)
        )


def segment_name(segment: int, rank: int) -> str:
    return f"segment-{segment:04d}-rank-{rank:04d}.bin"


def weights_path(folder: Path, weights: str) -> Path:
    """The file with the weights of this checksum, an array as in a packed data set."""
    return folder / f"weights-{weights}.npy"


def read_weighted(folder: Path, header: SegmentHeader) -> dict[int, WeightedDraws]:
    """The sources that are drawn by weight; ValueError or FileNotFoundError without the weights."""
    found = {}
    for number, source in enumerate(header.sources):
        if not source.weights:
            continue
        path = weights_path(folder, source.weights)
        weights = open_array(path, WEIGHT_DTYPE, source.num_samples)
        if xxhash.xxh3_64_hexdigest(weights.data) != source.weights:
            raise ValueError(f"{path} is damaged: its checksum is not the one in its name")
        found[number] = WeightedDraws(weights, seed=header.seed, source=number)
    return found


def list_segments(folder: Path) -> dict[int, dict[int, Path]]:
    """Segment -> rank -> file, in ascending order."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    segments: dict[int, dict[int, Path]] = {}
    for segment, rank, path in sorted((int(m[1]), int(m[2]), path) for m, path in found if m):
        segments.setdefault(segment, {})[rank] = path
    return segments


def encode_header(header: SegmentHeader) -> bytes:
    text = json.dumps({"version": VERSION} | dataclasses.asdict(header)).encode()
    return _START.pack(_MAGIC, len(text), _checksum(text)) + text


def encode_record(
    header: SegmentHeader,
    *,
    step: int,
    source_ids: NDArray[np.int64],
    scheduled_ids: NDArray[np.int64],
    shown_ids: NDArray[np.int64],
) -> bytes:
    """One step of one rank; the arrays are int64 [b], in the order of the local batch."""
    replaced = np.flatnonzero(shown_ids != scheduled_ids)
    body = b"".join(
        (
            struct.pack("<QI", step, len(replaced)),
            _pack(source_ids, header.source_bytes),
            _pack(scheduled_ids, header.id_bytes),
            _pack(replaced, _INDEX_BYTES),
            _pack(shown_ids[replaced], header.id_bytes),
        )
    )
    return _MARK + struct.pack("<I", _checksum(body)) + body


@dataclasses.dataclass(frozen=True, slots=True)
class RecordRange:
    """Consecutive records of consecutive steps and the same size."""

    step: int
    offset: int
    count: int
    num_substitutes: int

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.step + self.count


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentFile:
    """One rank's records in one segment, found and checked."""

    path: Path
    header: SegmentHeader
    ranges: tuple[RecordRange, ...]
    """In ascending order of steps."""
    torn_bytes: int
    """Bytes of an incomplete last record."""
    damaged: tuple[tuple[int, int], ...]
    """Byte ranges without a valid record, though valid ones follow."""

    def batch_rows(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source ids and scheduled sample ids, int64 [end - start, b]; all records must exist."""
        header = self.header
        sources_end = _HEAD.size + header.local_batch_size * header.source_bytes
        source_ids = np.zeros((end - start, header.local_batch_size), dtype=np.int64)
        sample_ids = np.zeros_like(source_ids)
        for first, records, _ in self._read(start, end):
            into = slice(first - start, first - start + len(records))
            _unpack(records[:, _HEAD.size : sources_end], source_ids[into])
            _unpack(records[:, sources_end : header.record_bytes(0)], sample_ids[into])
        return source_ids, sample_ids

    def substitutes(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yields step, index in the local batch, and sample for each substitute."""
        for first, records, num_substitutes in self._read(start, end):
            if not num_substitutes:
                continue
            packed = records[:, self.header.record_bytes(0) :]
            indices = np.zeros((len(records), num_substitutes), dtype=np.int64)
            shown = np.zeros_like(indices)
            _unpack(packed[:, : num_substitutes * _INDEX_BYTES], indices)
            _unpack(packed[:, num_substitutes * _INDEX_BYTES :], shown)
            for row, pair in enumerate(zip(indices.tolist(), shown.tolist(), strict=True)):
                for index, sample in zip(*pair, strict=True):
                    yield first + row, index, sample

    def _read(self, start: int, end: int) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
        """Yields first step, records as bytes [k, size], and their number of substitutes."""
        begin = bisect.bisect_right(self.ranges, start, key=lambda one: one.end)
        for one in itertools.islice(self.ranges, begin, None):
            if one.step >= end:
                break
            first, last = max(start, one.step), min(end, one.end)
            size = self.header.record_bytes(one.num_substitutes)
            offset, count = one.offset + (first - one.step) * size, (last - first) * size
            data = np.fromfile(self.path, dtype=np.uint8, count=count, offset=offset)
            yield first, data.reshape(-1, size), one.num_substitutes


def read_segment_file(path: Path) -> SegmentFile | None:
    """Finds and checks all records of a file; None if even its header is incomplete.

    Bytes that fail their checksum are skipped up to the next valid record. The file may still be
    growing. Raises DamagedSegmentError for a damaged header or steps that go backwards, ValueError
    for an unknown format version.
    """
    if not path.stat().st_size:
        return None  # and nothing to map
    with (
        open_file(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        found = _decode_header(view)
        if found is None:
            return None
        header, offset = found
        ranges: list[RecordRange] = []
        damaged: list[tuple[int, int]] = []
        torn_bytes = 0
        while offset < len(view):
            head = _sound_head(view, header, offset)
            if head is None:
                sound = _next_sound_record(mapped, view, header, offset + 1)
                if sound is None and _is_torn(view, header, offset):
                    torn_bytes = len(view) - offset
                else:
                    damaged.append((offset, sound or len(view)))
                offset = sound or len(view)
                continue
            step, num_substitutes = head
            last = ranges[-1] if ranges else RecordRange(0, 0, 0, 0)
            if step < last.end:
                raise DamagedSegmentError(f"the record of step {step} follows step {last.end - 1}")
            size = header.record_bytes(num_substitutes)
            follows = last.offset + last.count * size == offset
            if follows and (last.end, last.num_substitutes) == head:
                ranges[-1] = dataclasses.replace(last, count=last.count + 1)
            else:
                ranges.append(RecordRange(step, offset, 1, num_substitutes))
            offset += size
    return SegmentFile(path, header, tuple(ranges), torn_bytes, tuple(damaged))


def _decode_header(data: memoryview) -> tuple[SegmentHeader, int] | None:
    """The header and the offset of the first record; None if it is incomplete."""
    if len(data) < _START.size:
        return None
    magic, size, checksum = _START.unpack_from(data)
    if magic != _MAGIC or size > _MOST_HEADER_BYTES:
        raise DamagedSegmentError("it does not begin as a segment of a ledger does")
    text = bytes(data[_START.size : _START.size + size])
    if len(text) < size:
        return None
    if _checksum(text) != checksum:
        raise DamagedSegmentError("its header's checksum does not agree")
    try:
        values = parse_json(text, where="its header")
        version = values.pop("version", None) if isinstance(values, dict) else VERSION
        if version == VERSION:
            return from_json_values(SegmentHeader, values), _START.size + size
    except ValueError as error:
        raise DamagedSegmentError(f"its header cannot be from a run: {error}") from error
    raise ValueError(f"it has format version {shorten(version)}, this program reads {VERSION}")


def _sound_head(view: memoryview, header: SegmentHeader, offset: int) -> tuple[int, int] | None:
    """Step and number of substitutes of the record at `offset`, None if it is not valid."""
    if len(view) - offset < _HEAD.size:
        return None
    mark, checksum, step, num_substitutes = _HEAD.unpack_from(view, offset)
    end = offset + header.record_bytes(num_substitutes)
    is_possible = num_substitutes <= header.local_batch_size and step < _STEPS and end <= len(view)
    if mark != _MARK or not is_possible:
        return None
    is_sound = _checksum(view[offset + _CHECKED_FROM : end]) == checksum
    return (step, num_substitutes) if is_sound else None


def _next_sound_record(
    mapped: mmap.mmap, view: memoryview, header: SegmentHeader, offset: int
) -> int | None:
    while (offset := mapped.find(_MARK, offset)) >= 0:
        if _sound_head(view, header, offset) is not None:
            return offset
        offset += 1
    return None


def _is_torn(view: memoryview, header: SegmentHeader, offset: int) -> bool:
    """Whether the rest of the file could be the beginning of a record."""
    left = len(view) - offset
    if left < _HEAD.size:
        return bytes(view[offset : offset + 4]) == _MARK[:left]
    mark, _, _, num_substitutes = _HEAD.unpack_from(view, offset)
    is_possible = mark == _MARK and num_substitutes <= header.local_batch_size
    return is_possible and left < header.record_bytes(num_substitutes)


def _checksum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _pack(values: NDArray[Any], width: int) -> bytes:
    """The low `width` bytes of each number, little-endian."""
    return values.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _unpack(packed: NDArray[np.uint8], into: NDArray[np.int64]) -> None:
    """Fills `into` [k, count] from rows of packed numbers, [k, count * width]."""
    width = packed.shape[1] // into.shape[1]
    if width:
        as_bytes = into.view(np.uint8).reshape(*into.shape, 8)
        as_bytes[..., :width] = packed.reshape(*into.shape, width)
