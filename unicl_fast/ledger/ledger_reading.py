"""Finds and checks the records of a ledger's segment, and takes them apart.

Damage is passed over up to the next sound record: what that means for a run is `ledger_proof`'s.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from unicl_fast.ledger.format import (
    CHECKED_FROM,
    HEAD,
    MARK,
    PLACE_BYTES,
    DamagedSegmentError,
    SegmentHeader,
    checksum_of,
    decode_header,
    unpack_numbers,
)

_HEADS_AT_ONCE = 1024
_MARK_NUMBER = int.from_bytes(MARK, "little")
_HEAD_DTYPE = np.dtype(
    [("mark", "<u4"), ("checksum", "<u4"), ("step", "<u8"), ("num_substitutes", "<u4")]
)
assert _HEAD_DTYPE.itemsize == HEAD.size


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
        sources_end = HEAD.size + header.share * header.source_bytes
        ids_end = sources_end + header.share * header.id_bytes
        source_ids = np.zeros((end - start, header.share), dtype=np.int64)
        sample_ids = np.zeros_like(source_ids)
        for run, first, last in self._parts(start, end):
            rows = self._rows(run, first, last)
            into = slice(first - start, last - start)
            unpack_numbers(rows[:, HEAD.size : sources_end], source_ids[into])
            unpack_numbers(rows[:, sources_end:ids_end], sample_ids[into])
        return source_ids, sample_ids

    def substitutes(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Step, place in the rank's share, and sample shown, wherever it is not the scheduled."""
        header = self.header
        places_from = header.record_bytes(0)
        for run, first, last in self._parts(start, end):
            if not run.num_substitutes:
                continue
            rows = self._rows(run, first, last)
            ids_from = places_from + run.num_substitutes * PLACE_BYTES
            shape = (last - first, run.num_substitutes)
            places, ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
            unpack_numbers(rows[:, places_from:ids_from], places)
            unpack_numbers(rows[:, ids_from:], ids)
            for row in range(last - first):
                for place, sample in zip(places[row].tolist(), ids[row].tolist(), strict=True):
                    yield first + row, place, sample

    def _parts(self, start: int, end: int) -> Iterator[tuple[Run, int, int]]:
        begin = bisect.bisect_right(self.runs, start, key=lambda run: run.end)
        for run in itertools.islice(self.runs, begin, None):
            if run.step >= end:
                break
            yield run, max(start, run.step), min(end, run.end)

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
            _append(runs, run, size=header.record_bytes(run.num_substitutes))
            offset += run.count * header.record_bytes(run.num_substitutes)
    return SegmentFile(
        path=path,
        header=header,
        runs=tuple(runs),
        torn_bytes=torn_bytes,
        damaged=tuple(damaged),
    )


def _append(runs: list[Run], run: Run, *, size: int) -> None:
    """Joined with the last one where it goes on from there."""
    last = runs[-1] if runs else None
    if (
        last is not None
        and last.num_substitutes == run.num_substitutes
        and last.end == run.step
        and last.offset + last.count * size == run.offset
    ):
        runs[-1] = dataclasses.replace(last, count=last.count + run.count)
    else:
        runs.append(run)


def _read_run(view: memoryview, header: SegmentHeader, offset: int) -> Run | None:
    """Sound records from `offset` on, _HEADS_AT_ONCE at most; None if the first is not sound."""
    head = _sound_head(view, header, offset)
    if head is None:
        return None
    step, num_substitutes = head
    size = header.record_bytes(num_substitutes)
    most = min((len(view) - offset) // size, _HEADS_AT_ONCE)
    # Heads first, all at once, then checksums, one call each: that is what a long ledger costs.
    heads = np.ndarray((most,), dtype=_HEAD_DTYPE, buffer=view, offset=offset, strides=(size,))
    alike = heads["mark"] == _MARK_NUMBER
    alike &= heads["num_substitutes"] == num_substitutes
    alike &= heads["step"] == np.arange(step, step + most, dtype=np.uint64)
    most = int(np.argmin(alike)) if not alike.all() else most
    digest = xxhash.xxh3_64_intdigest
    for count, checksum in enumerate(heads["checksum"][:most].tolist()):
        first = offset + count * size
        if digest(view[first + CHECKED_FROM : first + size]) & 0xFFFFFFFF != checksum:
            return Run(step, offset, count, num_substitutes)
    return Run(step, offset, most, num_substitutes)


def _sound_head(view: memoryview, header: SegmentHeader, offset: int) -> tuple[int, int] | None:
    """Step and number of substitutes of the record at `offset`, None if it is not sound."""
    if len(view) - offset < HEAD.size:
        return None
    mark, checksum, step, num_substitutes = HEAD.unpack_from(view, offset)
    end = offset + header.record_bytes(num_substitutes)
    if mark != MARK or num_substitutes > header.share or end > len(view):
        return None
    if checksum_of(view[offset + CHECKED_FROM : end]) != checksum:
        return None
    return step, num_substitutes


def _next_sound_record(
    mapped: mmap.mmap, view: memoryview, header: SegmentHeader, offset: int
) -> int | None:
    while (offset := mapped.find(MARK, offset)) >= 0:
        if _sound_head(view, header, offset) is not None:
            return offset
        offset += 1
    return None


def _is_torn(view: memoryview, header: SegmentHeader, offset: int) -> bool:
    """Whether what is left may be the beginning of a record."""
    left = len(view) - offset
    if left < HEAD.size:
        return bytes(view[offset : offset + 4]) == MARK[:left]
    mark, _, _, num_substitutes = HEAD.unpack_from(view, offset)
    return (
        mark == MARK
        and num_substitutes <= header.share
        and left < header.record_bytes(num_substitutes)
    )
