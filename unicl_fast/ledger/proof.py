"""Reads a run's ledger and says what it proves: which steps, each sample once a pass, substitutes.

Nothing of the plan is used: the ids alone must say it. Memory is one bit a sample and some
megabytes, however long the run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unicl_fast.ledger.format import DamagedSegmentError, SegmentHeader, list_segments
from unicl_fast.ledger.ledger_passes import Passes, SourceProof
from unicl_fast.ledger.ledger_reading import SegmentFile, read_segment_file

_ENDLESS = 1 << 62
_DRAWS_AT_ONCE = 1 << 20

Int64Array = NDArray[np.int64]
Steps = tuple[int, int]
"""The first step, and the one after the last."""
Watch = Callable[[SegmentHeader, int, Int64Array, Int64Array], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One start of the program, over all its ranks."""

    header: SegmentHeader
    """Of one of its ranks."""
    files: tuple[SegmentFile, ...]
    """By rank; empty if one is missing, since no step is whole then."""
    steps: tuple[Steps, ...]
    """Those of which all ranks have a record."""
    counts_until: int
    """A later start goes on from this step, or from before: what is here beyond is superseded."""

    @property
    def counts(self) -> bool:
        """Whether anything of it is not superseded."""
        return self.header.start_step < self.counts_until

    @property
    def num_superseded(self) -> int:
        """Steps that a later start did again."""
        return sum(max(0, end - max(start, self.counts_until)) for start, end in self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LedgerProof:
    """What a ledger says, and whether that is a proof."""

    steps: int
    """Proven: those from 0 to this, without a hole."""
    holes: tuple[Steps, ...]
    """Steps that were done, since later ones or a checkpoint are there, but have no records."""
    global_batch_size: int
    segments: tuple[Segment, ...]
    """Starts of the program, oldest first."""
    sources: tuple[SourceProof, ...]
    substitutes: dict[tuple[int, int], Counter[int]]
    """(source, scheduled sample) -> samples shown instead, with counts."""
    faults: tuple[str, ...]
    """Contradictions, in words; the first of them."""
    notes: tuple[str, ...]
    """What is damaged or cut off. It only counts where it leaves a hole."""

    @property
    def holds(self) -> bool:
        return not (self.holes or self.faults) and all(source.holds for source in self.sources)

    @property
    def num_lost_slots(self) -> int:
        """Slots of the steps without records."""
        return sum(end - start for start, end in self.holes) * self.global_batch_size

    @property
    def num_superseded(self) -> int:
        """Steps that were done twice, because the run had gone back to a checkpoint."""
        return sum(segment.num_superseded for segment in self.segments)

    @property
    def num_substituted(self) -> int:
        """Visits at which another sample than the scheduled one was shown."""
        return sum(counter.total() for counter in self.substitutes.values())


def prove(folder: Path, *, steps_done: int = 0, watch: Watch | None = None) -> LedgerProof:
    """Reads all of a ledger.

    Args:
        folder: where the segments are, `ledger` of a run folder.
        steps_done: what is known from elsewhere, as from the newest checkpoint.
        watch: is shown all visits too, in their order: a header of their segment, the first step,
            and source ids and scheduled sample ids [steps n].

    Raises:
        FileNotFoundError: no ledger there.
        ValueError: of a format version that is not known here.
    """
    found = list_segments(folder) if folder.is_dir() else {}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no ledger (segment-NNNN-rank-RRRR.bin): give the run folder of a run "
            "that was trained with --ledger"
        )
    notes: list[str] = []
    faults: list[str] = []
    segments = _read_segments(found, notes, faults)
    counting = [segment for segment in segments if segment.counts]
    faults += _differences(counting)
    covered = _union(
        (max(start, segment.header.start_step), min(end, segment.counts_until))
        for segment in counting
        for start, end in segment.steps
    )
    ends = [end for _, end in covered]
    done = max([steps_done, *ends, *(segment.header.start_step for segment in counting)])
    holes = _gaps(covered, done)
    steps = holes[0][0] if holes else done

    global_batch_size = counting[0].header.global_batch_size if counting else 0
    passes = Passes(counting[0].header.sources if counting else ())
    substitutes: dict[tuple[int, int], Counter[int]] = {}
    if not faults:
        for segment, start, end in _pieces(counting, steps):
            source_ids, ids = _draws(segment, start, end)
            passes.visit(start * global_batch_size, source_ids, ids)
            _add_substitutes(substitutes, segment, start, source_ids, ids)
            if watch is not None:
                watch(segment.header, start, source_ids, ids)
        faults += passes.examples(global_batch_size=global_batch_size)
    return LedgerProof(
        steps=steps,
        holes=tuple(holes),
        global_batch_size=global_batch_size,
        segments=tuple(segments),
        sources=tuple(passes.results()),
        substitutes=substitutes,
        faults=tuple(faults),
        notes=tuple(notes),
    )


def _read_segments(
    found: dict[int, dict[int, Path]], notes: list[str], faults: list[str]
) -> list[Segment]:
    """All starts that have written something, oldest first."""
    segments: list[Segment] = []
    counts_until = _ENDLESS
    for number in sorted(found, reverse=True):
        files, damaged = _read_files(found[number], notes)
        if not files:
            if damaged:
                faults.append(
                    f"no header of segment {number} can be read, so nobody knows what it supersedes"
                )
            continue
        headers = [file.header for file in files.values()]
        first = headers[0]
        alike = {dataclasses.replace(h, rank=0) for h in headers} == {
            dataclasses.replace(first, rank=0)
        }
        if not alike or any(file.header.rank != rank for rank, file in files.items()):
            faults.append(f"the headers of segment {number} contradict each other")
            continue
        missing = sorted(set(range(first.world_size)) - set(files))
        if missing:
            notes.append(
                f"segment {number} has nothing of rank {', '.join(map(str, missing))}, so no step "
                "of it is whole"
            )
        whole = [] if missing else _steps_of_all([_steps_of(file) for file in files.values()])
        segments.append(
            Segment(
                header=first,
                files=() if missing else tuple(files[rank] for rank in sorted(files)),
                steps=tuple(whole),
                counts_until=counts_until,
            )
        )
        counts_until = min(counts_until, first.start_step)
    return segments[::-1]


def _read_files(paths: dict[int, Path], notes: list[str]) -> tuple[dict[int, SegmentFile], bool]:
    """The readable ones of a segment by rank, and whether another was damaged."""
    files, any_damaged = {}, False
    for rank, path in paths.items():
        try:
            file = read_segment_file(path)
        except DamagedSegmentError as error:
            notes.append(f"{path.name} cannot be read: {error}")
            any_damaged = True
            continue
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if file is None:
            notes.append(f"{path.name} ends within its header: that rank was ended there")
            continue
        files[rank] = file
        if file.torn_bytes:
            notes.append(f"{path.name} ends within a record: that rank was ended there")
        notes += [
            f"{path.name} is damaged between bytes {start} and {end}" for start, end in file.damaged
        ]
    return files, any_damaged


def _differences(segments: Sequence[Segment]) -> list[str]:
    """What must not change over a run, and did."""
    facts = [
        (
            segment.header.segment,
            segment.header.global_batch_size,
            [source.num_samples for source in segment.header.sources],
        )
        for segment in segments
    ]
    return [
        f"segments {one[0]} and {other[0]} are of different runs: batches of {one[1]} out of "
        f"sources of {one[2]} samples, and batches of {other[1]} out of {other[2]}"
        for one, other in itertools.pairwise(facts)
        if one[1:] != other[1:]
    ]


def _steps_of(file: SegmentFile) -> list[Steps]:
    return _union((run.step, run.end) for run in file.runs)


def _union(ranges: Iterator[Steps]) -> list[Steps]:
    """Joined where they touch; they come in ascending order."""
    joined: list[Steps] = []
    for start, end in ranges:
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _steps_of_all(ranks: Sequence[Sequence[Steps]]) -> list[Steps]:
    """The steps that every rank has."""
    common = list(ranks[0])
    for other in ranks[1:]:
        common = _union(
            (max(a, c), min(b, d)) for a, b in common for c, d in other if max(a, c) < min(b, d)
        )
    return common


def _gaps(covered: Sequence[Steps], end: int) -> list[Steps]:
    """What of [0, end) is not covered."""
    borders = [0, *(border for steps in covered for border in steps), end]
    pairs = zip(borders[::2], borders[1::2], strict=True)
    return [(start, stop) for start, stop in pairs if start < stop]


def _pieces(segments: Sequence[Segment], steps: int) -> Iterator[tuple[Segment, int, int]]:
    """The proven steps in order, some at a time, each from the segment that counts."""
    for segment in segments:
        at_once = max(1, _DRAWS_AT_ONCE // segment.header.global_batch_size)
        last = min(segment.counts_until, steps)
        for start in range(segment.header.start_step, last, at_once):
            yield segment, start, min(start + at_once, last)


def _draws(segment: Segment, start: int, end: int) -> tuple[Int64Array, Int64Array]:
    """Source ids and scheduled ids of the global batches, [end - start, n]."""
    parts = [file.batch_rows(start, end) for file in segment.files]
    return (
        np.concatenate([source_ids for source_ids, _ in parts], axis=1),
        np.concatenate([ids for _, ids in parts], axis=1),
    )


def _add_substitutes(
    substitutes: dict[tuple[int, int], Counter[int]],
    segment: Segment,
    start: int,
    source_ids: Int64Array,
    ids: Int64Array,
) -> None:
    for file in segment.files:
        first = file.header.rank * file.header.share
        for step, place, shown in file.substitutes(start, start + len(ids)):
            at = step - start, first + place
            key = int(source_ids[at]), int(ids[at])
            substitutes.setdefault(key, Counter())[shown] += 1
