"""Reads a run's ledger and decides which steps, and which exact epochs, it proves.

The plan is not consulted: N successive draws of a source of N samples are an epoch, and correct if
no sample came twice; if they are drawn by weight, if each came as often as its weight says. Memory
is one byte per sample (more beyond 255 draws of one in an epoch), for any length of run.
"""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.weights import WeightedDraws
from unicl_fast.ledger.format import (
    DamagedSegmentError,
    LedgerSource,
    SegmentFile,
    SegmentHeader,
    list_segments,
    read_segment_file,
    read_weighted,
)

_ENDLESS = 1 << 62
_DRAWS_AT_ONCE = 1 << 20
_MOST_EXAMPLES = 10
_TWICE, _LOST, _UNKNOWN = 0, 1, 2  # in the order of SourceProof's fields

Int64Array = NDArray[np.int64]
Steps = tuple[int, int]
"""The first step, and the step after the last."""
Watch = Callable[[SegmentHeader, int, Int64Array, Int64Array], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Identifies a run in its ledger and its checkpoints."""

    run_id: str
    seed: int
    global_batch_size: int
    """`run.global_batch_size`; stages can have others."""
    sizes: list[int]
    """Samples of each source."""

    def __str__(self) -> str:
        return (
            f"run {self.run_id} with seed {self.seed} and batches of "
            f"{self.global_batch_size} out of sources of {self.sizes} samples"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class SourceProof:
    """The result for the epochs of one source."""

    name: str
    num_samples: int
    draws: int
    scheduled_twice: int
    """Draws of a sample already drawn in the same epoch, or as often as its weight says."""
    lost: int
    """Draws of samples that a complete epoch lacks."""
    unknown: int
    """Draws of samples outside the source."""

    @property
    def complete_epochs(self) -> int:
        return self.draws // self.num_samples

    @property
    def holds(self) -> bool:
        return not (self.scheduled_twice or self.lost or self.unknown)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One start of the program, or a stage that began while it ran, on all ranks."""

    header: SegmentHeader
    """One of its ranks' headers."""
    files: tuple[SegmentFile, ...]
    """By rank; empty if one is missing, since no step is complete then."""
    steps: tuple[Steps, ...]
    """Steps recorded by all ranks."""
    counts_until: int
    """A later segment starts at or before this step and supersedes the rest."""

    @property
    def counts(self) -> bool:
        """Whether any of it is not superseded."""
        return self.header.start_step < self.counts_until

    @property
    def num_superseded(self) -> int:
        """Steps that a later start repeated."""
        return sum(max(0, end - max(start, self.counts_until)) for start, end in self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LedgerProof:
    """The content of a ledger, and whether it is a proof."""

    steps: int
    """Steps from 0 up to this are proven without a hole."""
    holes: tuple[Steps, ...]
    """Steps that were done, since later ones or a checkpoint exist, but have no records."""
    num_draws: int
    """Draws of those steps."""
    num_lost_draws: int
    """Draws of the holes' steps."""
    global_batch_size: int
    """`run.global_batch_size`; stages can have others."""
    segments: tuple[Segment, ...]
    """Starts of the program and of stages, oldest first."""
    sources: tuple[SourceProof, ...]
    substitutes: dict[tuple[int, int], Counter[int]]
    """(source, scheduled sample) -> samples shown instead, with counts."""
    faults: tuple[str, ...]
    """The first contradictions, in words."""
    notes: tuple[str, ...]
    """Damage and truncated files, in words; they only matter if they leave a hole."""

    @property
    def holds(self) -> bool:
        return not (self.holes or self.faults) and all(source.holds for source in self.sources)

    @property
    def starts(self) -> list[Segment]:
        """The segments with which a program started."""
        return [segment for segment in self.segments if not segment.header.follows]

    @property
    def has_stages(self) -> bool:
        """Whether steps have several sizes."""
        headers = [segment.header for segment in self.segments]
        return any(one.global_batch_size != self.global_batch_size for one in headers)

    @property
    def num_superseded(self) -> int:
        """Steps done twice, because the run resumed from an earlier checkpoint."""
        return sum(segment.num_superseded for segment in self.segments)

    @property
    def num_substituted(self) -> int:
        """Draws that showed another sample than the scheduled one."""
        return sum(counter.total() for counter in self.substitutes.values())


def prove(
    folder: Path, *, steps_done: int = 0, run: Run | None = None, watch: Watch | None = None
) -> LedgerProof:
    """Reads a whole ledger.

    Args:
        folder: the folder of the segments, `ledger` of a run folder.
        steps_done: steps known to be done from elsewhere, such as the newest checkpoint.
        run: the run of this checkpoint, which the ledger must match.
        watch: also receives all draws in order: a header of their segment, the first step, and
            source ids and scheduled sample ids [steps n].

    Raises:
        FileNotFoundError: no ledger there, or not the weights by which samples were drawn.
        ValueError: an unknown format version, or damaged weights.
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
    faults += _contradictions(counting, run)
    covered = _union(
        (max(start, segment.header.start_step), min(end, segment.counts_until))
        for segment in counting
        for start, end in segment.steps
    )
    starts = [segment.header.start_step for segment in counting]
    done = max([steps_done, *starts, *(end for _, end in covered)])
    borders = [0, *itertools.chain(*covered), done]
    between = zip(borders[::2], borders[1::2], strict=True)
    holes = [(start, end) for start, end in between if start < end]
    steps = holes[0][0] if holes else done

    headers = [segment.header for segment in counting]
    weighted = read_weighted(folder, headers[0]) if headers else {}
    epochs = _EpochCounter(headers[0].sources if headers else (), weighted)
    substitutes: dict[tuple[int, int], Counter[int]] = {}
    if not faults:
        for segment, start, source_ids, ids in _read_draws(counting, steps):
            if fault := _impossible_record(segment, start, source_ids):
                faults.append(fault)
                break
            epochs.add(segment.header.draws_before(start), source_ids, ids)
            for file in segment.files:
                first = file.header.rank * file.header.local_batch_size
                for step, index, shown in file.substitutes(start, start + len(ids)):
                    at = step - start, first + index
                    key = int(source_ids[at]), int(ids[at])
                    substitutes.setdefault(key, Counter())[shown] += 1
            if watch is not None:
                watch(segment.header, start, source_ids, ids)
        faults += epochs.examples(headers)
    return LedgerProof(
        steps=steps,
        holes=tuple(holes),
        num_draws=_draws_before(headers, steps),
        num_lost_draws=sum(
            _draws_before(headers, end) - _draws_before(headers, start) for start, end in holes
        ),
        global_batch_size=headers[0].run_batch_size if headers else 0,
        segments=tuple(segments),
        sources=tuple(epochs.results()),
        substitutes=substitutes,
        faults=tuple(faults),
        notes=tuple(notes),
    )


def _read_segments(
    found: dict[int, dict[int, Path]], notes: list[str], faults: list[str]
) -> list[Segment]:
    """All segments with content, oldest first."""
    segments: list[Segment] = []
    counts_until = _ENDLESS
    for number in sorted(found, reverse=True):
        files, any_damaged = _read_files(number, found[number], notes)
        if not files:
            if any_damaged:
                faults.append(
                    f"no header of segment {number} can be read, so nobody knows what it supersedes"
                )
            continue
        first = next(iter(files.values())).header
        expected = {rank: dataclasses.replace(first, rank=rank) for rank in files}
        if any(file.header != expected[rank] for rank, file in files.items()):
            faults.append(f"the headers of segment {number} contradict each other")
            continue
        missing = sorted(set(range(first.world_size)) - set(files))
        if missing:
            notes.append(
                f"segment {number} has nothing of rank {', '.join(map(str, missing))}, so no step "
                "of it is whole"
            )
        whole = [] if missing else [files[rank] for rank in sorted(files)]
        segments.append(Segment(first, tuple(whole), tuple(_steps_of_all(whole)), counts_until))
        counts_until = min(counts_until, first.start_step)
    return segments[::-1]


def _read_files(
    number: int, paths: dict[int, Path], notes: list[str]
) -> tuple[dict[int, SegmentFile], bool]:
    """The readable files of segment `number` by rank, and whether another was damaged."""
    files, any_damaged = {}, False
    for rank, path in paths.items():
        try:
            file = read_segment_file(path)
            if file is not None and (file.header.segment, file.header.rank) != (number, rank):
                found = f"segment {file.header.segment} and rank {file.header.rank}"
                raise DamagedSegmentError(f"its header is of {found}")
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


def _contradictions(segments: Sequence[Segment], run: Run | None) -> list[str]:
    """Segments of different runs, or of another run than the checkpoint's, in words."""
    numbered = [(segment.header.segment, _run_of(segment.header)) for segment in segments]
    faults = [
        f"segments {one} and {other} are of different runs: {first}, and {second}"
        for (one, first), (other, second) in itertools.pairwise(numbered)
        if first != second
    ]
    for number, last in numbered[-1:]:
        if run is not None and run != last:
            other = f"another run than segment {number}: {run}, and {last}"
            faults.append(f"the newest checkpoint is of {other}")
    return faults


def _run_of(header: SegmentHeader) -> Run:
    sizes = [source.num_samples for source in header.sources]
    return Run(header.run_id, header.seed, header.run_batch_size, sizes)


def _union(ranges: Iterable[Steps]) -> list[Steps]:
    """Joins touching ranges, given in ascending order."""
    joined: list[Steps] = []
    for start, end in ranges:
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _steps_of_all(files: Sequence[SegmentFile]) -> list[Steps]:
    """The steps recorded by every rank."""
    common = [(0, _ENDLESS)] if files else []
    for file in files:
        mine = _union((one.step, one.end) for one in file.ranges)
        common = _union((max(a, c), min(b, d)) for a, b in common for c, d in mine)
    return common


def _read_draws(
    segments: Sequence[Segment], steps: int
) -> Iterator[tuple[Segment, int, Int64Array, Int64Array]]:
    """Proven steps in order: segment, first step, source ids and scheduled ids [steps n]."""
    for segment in segments:
        at_once = max(1, _DRAWS_AT_ONCE // segment.header.global_batch_size)
        last = min(segment.counts_until, steps)
        for start in range(segment.header.start_step, last, at_once):
            end = min(start + at_once, last)
            parts = [file.batch_rows(start, end) for file in segment.files]
            source_ids, ids = (
                np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)
            )
            yield segment, start, source_ids, ids


def _draws_before(headers: Sequence[SegmentHeader], step: int) -> int:
    """Draws of the run before a step that is in or after one of these segments."""
    began = [header for header in headers if header.start_step <= step] or headers[:1]
    return began[-1].draws_before(step) if began else 0


def _impossible_record(segment: Segment, start: int, source_ids: Int64Array) -> str:
    """The first record from step `start` on beyond the batch or its sources, in words; or ""."""
    num_sources = len(segment.header.sources)
    if source_ids.size and source_ids.max() >= num_sources:
        return (
            f"segment {segment.header.segment} draws from source {source_ids.max()} after step "
            f"{start}, and its header names {num_sources}"
        )
    for file in segment.files:
        size = file.header.local_batch_size
        for step, index, _ in file.substitutes(start, start + len(source_ids)):
            if index >= size:
                return f"{file.path.name}: step {step} has a substitute at {index} of {size} draws"
    return ""


class _EpochCounter:
    """Counts the ordered draws of all sources epoch by epoch; one byte per sample."""

    def __init__(
        self, sources: Sequence[LedgerSource], weighted: Mapping[int, WeightedDraws]
    ) -> None:
        self._sources, self._weighted = list(sources), weighted
        self._left = [self._owed(number, epoch=0) for number in range(len(sources))]
        """Draws of each sample that are left in each source's current epoch."""
        self._draws = [0] * len(self._sources)
        self._counts = np.zeros((len(self._sources), 3), np.int64)
        self._examples: list[tuple[int, int, int, int, int]] = []
        """Kind, source, epoch, sample, and the draw's number in the run (-1 if lost)."""

    def _owed(self, number: int, *, epoch: int) -> NDArray[Any]:
        """How often an epoch of a source draws each sample."""
        if number not in self._weighted:
            return np.ones(self._sources[number].num_samples, np.uint8)
        counts = self._weighted[number].counts(epoch)
        return counts.astype(np.min_scalar_type(counts.max()))

    def add(self, first: int, source_ids: Int64Array, ids: Int64Array) -> None:
        """Counts draws of any shape in order; `first` is the first one's number in the run."""
        for number, source in enumerate(self._sources):
            places = np.flatnonzero(source_ids == number)
            while len(places):
                left = source.num_samples - self._draws[number] % source.num_samples
                now, places = places[:left], places[left:]
                self._add_to_epoch(number, ids.reshape(-1)[now], first + now)

    def _add_to_epoch(self, number: int, ids: Int64Array, draws: Int64Array) -> None:
        """Counts draws within one epoch of a source; `draws` are their numbers in the run."""
        left, size = self._left[number], self._sources[number].num_samples
        epoch = self._draws[number] // size
        known = (ids >= 0) & (ids < size)
        self._note(_UNKNOWN, number, epoch, ids[~known], draws[~known])
        mine, draws = ids[known], draws[known]
        order = np.argsort(mine, kind="stable")
        ordered, again = mine[order], np.empty(len(mine), np.bool_)
        before = np.arange(len(mine)) - np.searchsorted(ordered, ordered)  # of the same sample
        again[order] = before >= left[ordered]
        self._note(_TWICE, number, epoch, mine[again], draws[again])
        np.subtract.at(left, mine[~again], 1)
        self._draws[number] += len(ids)
        if self._draws[number] % size == 0:
            lost = np.repeat(np.arange(size), left)
            self._note(_LOST, number, epoch, lost, np.full(len(lost), -1))
            self._left[number] = self._owed(number, epoch=epoch + 1)

    def _note(
        self, kind: int, number: int, epoch: int, samples: Int64Array, draws: Int64Array
    ) -> None:
        self._counts[number, kind] += len(samples)
        most = _MOST_EXAMPLES - len(self._examples)
        for sample, draw in zip(samples[:most].tolist(), draws[:most].tolist(), strict=True):
            self._examples.append((kind, number, epoch, sample, draw))

    def results(self) -> list[SourceProof]:
        return [
            SourceProof(source.name, source.num_samples, draws, *counts)
            for source, draws, counts in zip(
                self._sources, self._draws, self._counts.tolist(), strict=True
            )
        ]

    def examples(self, headers: Sequence[SegmentHeader]) -> list[str]:
        """The first faults, in words; `headers` are of all counted segments."""
        found = []
        firsts = [header.draws_before(header.start_step) for header in headers]
        for kind, source, epoch, sample, draw in self._examples:
            name = self._sources[source].name
            header = headers[max(0, bisect.bisect_right(firsts, draw) - 1)]
            step, index = divmod(draw - header.draws_before(0), header.global_batch_size)
            where = f"step {step}, global index {index}"
            words = {
                _TWICE: f"epoch {epoch} of {name} schedules sample {sample} again at {where}",
                _LOST: f"epoch {epoch} of {name} did not schedule sample {sample}",
                _UNKNOWN: f"{where}: {name} has no sample {sample}",
            }
            found.append(words[kind])
        return found
