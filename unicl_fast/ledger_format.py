"""The ledger's files byte by byte: what a rank was fed at each step, and how that is read again.

A start of the program opens a segment, one file a rank: a header, then one record a step. The text
of the format is in docs/reliability.md. Only NumPy and xxhash are known here, so that a program
which reads a ledger starts quickly; writing one is `ledger`'s.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

LEDGER_FOLDER = "ledger"
VERSION = 1

_MAGIC = b"UNICLLGR"
_START = struct.Struct("<8sII")  # magic, bytes of JSON, checksum of them
_MARK = b"\xf5STP"
_HEAD = struct.Struct("<4sIQI")  # mark, checksum of what follows it, step, substitutes
_CHECKED_FROM = 8
_PLACE_BYTES = 4
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
            _HEAD.size
            + self.share * (self.source_bytes + self.id_bytes)
            + num_substitutes * (_PLACE_BYTES + self.id_bytes)
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
    text = json.dumps({"version": VERSION} | dataclasses.asdict(header)).encode()
    return _START.pack(_MAGIC, len(text), _checksum(text)) + text


def decode_header(data: memoryview) -> tuple[SegmentHeader, int] | None:
    """The header and the offset of the first record; None where it was cut off in the writing.

    Raises:
        DamagedSegmentError: it is whole, and not what was written.
        ValueError: of a version that is not known here.
    """
    if len(data) < _START.size:
        return None
    magic, size, checksum = _START.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedSegmentError("it does not begin as a segment of a ledger does")
    text = bytes(data[_START.size : _START.size + size])
    if len(text) < size:
        return None
    if _checksum(text) != checksum:
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
            _pack(places, _PLACE_BYTES),
            _pack(shown_ids[places], header.id_bytes),
        )
    )
    return _MARK + struct.pack("<I", _checksum(body)) + body


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Records of consecutive steps that lie one after another and have the same size."""

    step: int
    offset: int
    count: int
    num_substitutes: int

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.step + self.count


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmentFile:
    """One rank's records of one start, found and checked."""

    path: Path
    header: SegmentHeader
    runs: tuple[Run, ...]
    """In ascending order of steps."""
    torn_bytes: int
    """Of a last record that was not written to its end."""
    damaged: tuple[tuple[int, int], ...]
    """Ranges of bytes in which no sound record was found, though records follow."""

    def batch_rows(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source ids and scheduled sample ids, int64 [end - start, share].

        The records of all these steps must be there.
        """
        header = self.header
        sources_end = _HEAD.size + header.share * header.source_bytes
        ids_end = sources_end + header.share * header.id_bytes
        source_ids = np.zeros((end - start, header.share), dtype=np.int64)
        sample_ids = np.zeros_like(source_ids)
        for run, first, last in self._parts(start, end):
            rows = self._rows(run, first, last)
            into = slice(first - start, last - start)
            _unpack(rows[:, _HEAD.size : sources_end], source_ids[into])
            _unpack(rows[:, sources_end:ids_end], sample_ids[into])
        return source_ids, sample_ids

    def substitutes(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Step, place in the rank's share, and sample shown, wherever it is not the scheduled."""
        header = self.header
        places_from = header.record_bytes(0)
        for run, first, last in self._parts(start, end):
            if not run.num_substitutes:
                continue
            rows = self._rows(run, first, last)
            ids_from = places_from + run.num_substitutes * _PLACE_BYTES
            shape = (last - first, run.num_substitutes)
            places, ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
            _unpack(rows[:, places_from:ids_from], places)
            _unpack(rows[:, ids_from:], ids)
            for row in range(last - first):
                for place, sample in zip(places[row].tolist(), ids[row].tolist(), strict=True):
                    yield first + row, place, sample

    def _parts(self, start: int, end: int) -> Iterator[tuple[Run, int, int]]:
        for run in self.runs:
            first, last = max(start, run.step), min(end, run.end)
            if first < last:
                yield run, first, last

    def _rows(self, run: Run, first: int, last: int) -> NDArray[np.uint8]:
        size = self.header.record_bytes(run.num_substitutes)
        offset = run.offset + (first - run.step) * size
        count = (last - first) * size
        return np.fromfile(self.path, dtype=np.uint8, count=count, offset=offset).reshape(-1, size)


def read_segment_file(path: Path) -> SegmentFile | None:
    """Finds and checks all records of a file; None where even its header was cut off.

    What does not agree with its checksum is passed over up to the next sound record. The file may
    still be growing.

    Raises:
        DamagedSegmentError: its header is damaged, or its steps go backwards.
        ValueError: of a format version that is not known here.
    """
    if not path.stat().st_size:
        return None  # and nothing to map
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        found = decode_header(view)
        if found is None:
            return None
        header, offset = found
        runs: list[Run] = []
        damaged: list[tuple[int, int]] = []
        torn_bytes = 0
        while offset < len(view):
            run = _read_run(view, header, offset)
            if run is None:
                sound = _next_sound_record(mapped, view, header, offset + 1)
                if sound is None and _is_torn(view, header, offset):
                    torn_bytes = len(view) - offset
                else:
                    damaged.append((offset, sound or len(view)))
                offset = sound or len(view)
                continue
            if runs and run.step < runs[-1].end:
                raise DamagedSegmentError(
                    f"the record of step {run.step} follows that of step {runs[-1].end - 1}"
                )
            runs.append(run)
            offset += run.count * header.record_bytes(run.num_substitutes)
    return SegmentFile(
        path=path,
        header=header,
        runs=tuple(runs),
        torn_bytes=torn_bytes,
        damaged=tuple(damaged),
    )


def _read_run(view: memoryview, header: SegmentHeader, offset: int) -> Run | None:
    """The longest run of sound records that starts at `offset`, None if there is none."""
    head = _sound_head(view, header, offset)
    if head is None:
        return None
    step, num_substitutes = head
    size = header.record_bytes(num_substitutes)
    most = (len(view) - offset) // size
    # Heads first, all at once, then checksums, one call each: that is what a long ledger costs.
    heads = np.ndarray((most,), dtype=_HEAD_DTYPE, buffer=view, offset=offset, strides=(size,))
    alike = heads["mark"] == _MARK_NUMBER
    alike &= heads["num_substitutes"] == num_substitutes
    alike &= heads["step"] == np.arange(step, step + most, dtype=np.uint64)
    most = int(np.argmin(alike)) if not alike.all() else most
    digest = xxhash.xxh3_64_intdigest
    for count, checksum in enumerate(heads["checksum"][:most].tolist()):
        first = offset + count * size
        if digest(view[first + _CHECKED_FROM : first + size]) & 0xFFFFFFFF != checksum:
            return Run(step, offset, count, num_substitutes)
    return Run(step, offset, most, num_substitutes)


def _sound_head(view: memoryview, header: SegmentHeader, offset: int) -> tuple[int, int] | None:
    """Step and number of substitutes of the record at `offset`, None if it is not sound."""
    if len(view) - offset < _HEAD.size:
        return None
    mark, checksum, step, num_substitutes = _HEAD.unpack_from(view, offset)
    end = offset + header.record_bytes(num_substitutes)
    if mark != _MARK or num_substitutes > header.share or end > len(view):
        return None
    return (step, num_substitutes) if _checksum(view[offset + 8 : end]) == checksum else None


def _next_sound_record(
    mapped: mmap.mmap, view: memoryview, header: SegmentHeader, offset: int
) -> int | None:
    while (offset := mapped.find(_MARK, offset)) >= 0:
        if _sound_head(view, header, offset) is not None:
            return offset
        offset += 1
    return None


def _is_torn(view: memoryview, header: SegmentHeader, offset: int) -> bool:
    """Whether what is left may be the beginning of a record."""
    left = len(view) - offset
    if left < _HEAD.size:
        return bytes(view[offset : offset + 4]) == _MARK[:left]
    mark, _, _, num_substitutes = _HEAD.unpack_from(view, offset)
    return (
        mark == _MARK
        and num_substitutes <= header.share
        and left < header.record_bytes(num_substitutes)
    )


_MARK_NUMBER = int.from_bytes(_MARK, "little")
_HEAD_DTYPE = np.dtype(
    [("mark", "<u4"), ("checksum", "<u4"), ("step", "<u8"), ("num_substitutes", "<u4")]
)
assert _HEAD_DTYPE.itemsize == _HEAD.size


def _checksum(data: bytes | memoryview) -> int:
    value: int = xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF
    return value


def _pack(values: NDArray[Any], width: int) -> bytes:
    """The low `width` bytes of each number, little-endian."""
    return values.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _unpack(packed: NDArray[np.uint8], into: NDArray[np.int64]) -> None:
    """Rows of packed numbers, [k count * width] -> [k count]."""
    width = packed.shape[1] // into.shape[1]
    if width:
        as_bytes = into.view(np.uint8).reshape(*into.shape, 8)
        as_bytes[..., :width] = packed.reshape(*into.shape, width)
