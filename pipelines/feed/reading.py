"""Reads the images of planned samples, replaces those that are bad, and reads ahead from URLs.

A sample is bad when its bytes cannot be read, are not those that were packed (checksum), hold more
than `data.max_pixels`, or are refused by the decoder. The plan says which samples may stand in for
it, so a process that has seen no bad sample yet feeds the same batches.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.feature_files import FeatureFile
from unicl_fast.dataset.object_store import CONNECTIONS
from unicl_fast.dataset.reader import (
    DamagedSampleError,
    PackedDataset,
    TooManyBadSamplesError,
    sample_key,
)
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.system.atomic_files import lock
from unicl_fast.system.untrusted_files import open_regular

from ..plan.plan import SAMPLE_FIELDS, PlannedBatch, TrainPlan

logger = logging.getLogger(__name__)

READ_AHEAD = 65_536
"""Samples whose images are fetched from a URL before they are needed, in the order of the global
batches; limited to half of `data.cache_bytes`."""

MAX_ATTEMPTS = 100
"""Substitutes tried for one sample. When so many fail, the data is gone, not damaged: with half of
all samples bad it happens once in 10**30 times."""
_LOGGED = 5
_REASON_LENGTH = 300
COLUMNS = ("data_set", "shard", "key", "offset", "reason")
"""Columns of quarantine.csv: folder of the packed data set, name of the shard file, name of the
sample in it, first byte of its image, and what is wrong."""

Schedule = Callable[[int], tuple[NDArray[np.int32], NDArray[np.int64]] | None]
"""Sources and samples of a chunk of the order, by its number; None after the end."""
_Block = tuple[int, int, int]
"""The numbers of a source, of a file in it, and of a block in that."""
_JOIN_SECONDS = 2.0


class SampleReader:
    """Reads images of planned samples, and remembers which of this process's samples are bad."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        plan: TrainPlan,
        quarantine: Path | None,
        *,
        max_pixels: int,
    ) -> None:
        """No sample is known to be bad yet.

        Args:
            datasets: those of the plan.
            plan: says which samples may stand in for a bad one.
            quarantine: the list in the run's folder, shared by its ranks; None writes none.
            max_pixels: an encoded image that has more is bad; it is known before it is decoded.
        """
        self._datasets = list(datasets)
        self._max_pixels = max_pixels
        self._plan = plan
        self.features: Sequence[FeatureFile] | None = None
        """Those of each data set, which are read in place of images."""
        self._bad: set[tuple[int, int]] = set()
        self._replacing = threading.Lock()
        self._file = None if quarantine is None else QuarantineFile(quarantine)

    def read(self, source: int, sample: int) -> NDArray[Any] | None:
        """The encoded image, its checksum compared, or its features; None if the sample is bad."""
        if (source, sample) in self._bad:
            return None
        if self.features is not None:
            row = self.features[source].row(sample)
            if row is None:
                self.mark_bad(source, sample, "it could not be read when features were stored")
            return row
        dataset = self._datasets[source]
        try:
            return dataset.image_bytes(sample, verify=True, max_pixels=self._max_pixels)
        except DamagedSampleError as error:
            self.mark_bad(source, sample, str(error).removeprefix(f"{dataset.describe(sample)}: "))
            return None

    def mark_bad(self, source: int, sample: int, reason: str) -> None:
        """Remembers that a sample must not be fed, logs it, and lists it."""
        if (source, sample) in self._bad:
            return
        self._bad.add((source, sample))
        dataset = self._datasets[source]
        if len(self._bad) <= _LOGGED:
            logger.error(
                "BAD SAMPLE: %s: %s; another of the same data set is fed in its place",
                dataset.describe(sample), reason,
            )  # fmt: skip
        if len(self._bad) == _LOGGED:
            logger.error(
                "further bad samples: replaced_samples in metrics.jsonl counts them, %s lists them",
                self._where,
            )
        if self._file is not None:
            where = dataset.location, dataset.shard_of(sample), sample_key(sample)
            self._file.add(*where, dataset.offset_of(sample), reason[:_REASON_LENGTH])

    def mark_undecodable(self, faults: Iterable[tuple[int, int, str]]) -> None:
        """Marks samples (source, sample, fault) that a decoder refuses; from any thread."""
        with self._replacing:
            for source, sample, fault in faults:
                self.mark_bad(source, sample, f"the decoder refuses it: {fault}")

    def read_files(
        self, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], EncodedImages]:
        """The encoded images of some batches, and these with substitutes; from any thread.

        Raises:
            TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        sample_ids = np.concatenate([batch.sample_ids for batch in batches])
        source_ids = np.concatenate([batch.source_ids for batch in batches])
        limit = self._max_pixels
        images, sound = read_images(self._datasets, source_ids, sample_ids, max_pixels=limit)
        actual, start = list(batches), 0
        for number, batch in enumerate(batches):
            end = start + len(batch.global_index)
            actual[number], bad, others = self._replace_bad(batch, sound[start:end])
            if others:
                images = images.replaced(start + bad, others)
            start = end
        return actual, images

    def read_features(self, planned: PlannedBatch) -> tuple[PlannedBatch, NDArray[Any]]:
        """The features of a batch [b w], and the batch with substitutes; raises as `read_files`."""
        actual, rows = self._read_rows(planned, range(len(planned.global_index)))
        return actual, np.stack(rows)

    def read_pixels(
        self, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], NDArray[np.uint8]]:
        """As `read_files`, from raw data sets of one size.

        Returns:
            The batches, with substitutes where they were needed, and uint8 [b h w 3] of all of
            them, concatenated.
        """
        sample_ids = np.concatenate([batch.sample_ids for batch in batches])
        source_ids = np.concatenate([batch.source_ids for batch in batches])
        shape = self._datasets[0].image_shape or ()
        pixels = np.empty((len(sample_ids), *shape), dtype=np.uint8)
        sound = np.zeros(len(sample_ids), dtype=np.bool_)
        for number, dataset in enumerate(self._datasets):
            mine = np.flatnonzero(source_ids == number)
            sound[mine] = dataset.read_pixels(sample_ids[mine], pixels, mine)
        actual, start = list(batches), 0
        for number, batch in enumerate(batches):
            end = start + len(batch.global_index)
            actual[number], bad, images = self._replace_bad(batch, sound[start:end])
            for row, image in zip(bad.tolist(), images, strict=True):
                source = actual[number].source_ids[row]
                pixels[start + row] = self._datasets[source].pixels_of(image)
            start = end
        return actual, pixels

    def _replace_bad(
        self, planned: PlannedBatch, sound: NDArray[np.bool_]
    ) -> tuple[PlannedBatch, NDArray[np.int64], list[NDArray[np.uint8]]]:
        """Reads again what did not come, and names what is bad; from any thread.

        Returns:
            The batch, a copy where samples were replaced, the rows that were read, and their
            images.
        """
        if not self._bad and sound.all():
            return planned, np.empty(0, np.int64), []
        with self._replacing:
            known = np.array([pair in self._bad for pair in _pairs(planned)])
            rows = np.flatnonzero(known | ~sound)
            actual, images = self._read_rows(planned, rows.tolist())
        return actual, rows, images

    def _read_rows(
        self, planned: PlannedBatch, rows: Sequence[int]
    ) -> tuple[PlannedBatch, list[NDArray[np.uint8]]]:
        """The images of some rows, and the batch (a copy where needed) with their substitutes."""
        actual, images, pairs = planned, [], _pairs(planned)
        for row in rows:
            image = self.read(*pairs[row])
            if image is None:
                if actual is planned:
                    copies = {field: getattr(planned, field).copy() for field in SAMPLE_FIELDS}
                    actual = dataclasses.replace(planned, **copies)
                image = self._read_substitute(actual, row)
            images.append(image)
        return actual, images

    def _read_substitute(self, planned: PlannedBatch, row: int) -> NDArray[np.uint8]:
        """Puts the first good substitute into a row of `planned`; returns its image."""
        source, scheduled = int(planned.source_ids[row]), int(planned.sample_ids[row])
        global_index = planned.global_index[row : row + 1]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            substitute = self._plan.substitute(planned.step, global_index, attempt=attempt)
            image = self.read(source, int(substitute.sample_ids[0]))
            if image is not None:
                for field in SAMPLE_FIELDS:
                    getattr(planned, field)[row] = getattr(substitute, field)[0]
                return image
        raise TooManyBadSamplesError(
            f"step {planned.step}: {self._datasets[source].describe(scheduled)} is bad, and so are "
            f"{MAX_ATTEMPTS} others that were tried in its place: see {self._where}, and check "
            "that the data set is whole and its storage reachable"
        )

    @property
    def _where(self) -> str:
        return "the log" if self._file is None else str(self._file.path)


def read_images(
    datasets: Sequence[PackedDataset],
    source_ids: NDArray[np.int32],
    sample_ids: NDArray[np.int64],
    *,
    max_pixels: int,
) -> tuple[EncodedImages, NDArray[np.bool_]]:
    """Reads the images of a batch, and compares their checksums.

    Returns:
        The images, and bool [b], which of them are as they were packed and have at most
        `max_pixels` (0 sets no limit). `PackedDataset.image_bytes` says what is wrong with others.
    """
    sizes = np.zeros(len(sample_ids), np.int64)
    rows_of = [np.flatnonzero(source_ids == number) for number in range(len(datasets))]
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sizes[rows] = dataset.image_sizes(sample_ids[rows], max_pixels=max_pixels)
    images = EncodedImages.empty(sizes)
    sound = np.zeros(len(sizes), np.bool_)
    for dataset, rows in zip(datasets, rows_of, strict=True):
        sound[rows] = dataset.read_images(
            sample_ids[rows], images.content, images.starts[rows], sizes[rows]
        )
    return images, sound


def _pairs(planned: PlannedBatch) -> list[tuple[int, int]]:
    """Source and sample of each row."""
    return list(zip(planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True))


class QuarantineFile:
    """The list of a run's bad samples, `quarantine.csv`: one row each, however often met.

    Several ranks, and the same run after a restart, append to one file: each row in a single write,
    under a lock, after reading what the rest wrote meanwhile. Training never depends on the list:
    if the file cannot be written, that is logged once. Not for several threads at once.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is written before the first bad sample."""
        self.path = path
        self._listed: set[tuple[str, str]] = set()
        self._bytes_read = 0
        self._unfinished = b""
        self._has_failed = False

    def add(self, data_set: str, shard: str, key: str, offset: int, reason: str) -> None:
        """Lists a sample, unless it stands there; see `COLUMNS`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path) as file:
                self._read_new_rows(file)
                if (_printable(data_set), key) in self._listed:
                    return
                header = "" if self._bytes_read else _line(*COLUMNS)
                # a row that was cut off by a crash must not swallow the next one
                line_break = "\n" if self._unfinished else ""
                row = _line(data_set, shard, key, offset, reason)
                data = (header + line_break + row).encode()
                if os.write(file, data) != len(data):
                    raise OSError("only part of a row could be written")
                self._read_new_rows(file)
        except (OSError, csv.Error) as error:
            if not self._has_failed:
                logger.error("cannot write %s: %s; training continues without it", self.path, error)
            self._has_failed = True

    def _read_new_rows(self, file: int) -> None:
        if os.fstat(file).st_size < self._bytes_read:
            logger.warning(
                "%s was removed or cut while the run wrote to it: samples that it listed before "
                "are in the log or lost", self.path,
            )  # fmt: skip
            self._bytes_read, self._unfinished = 0, b""
            self._listed.clear()
        while data := os.pread(file, 1 << 20, self._bytes_read):
            self._bytes_read += len(data)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            text = [line.decode(errors="replace") for line in lines]
            self._listed |= {(row[0], row[2]) for row in csv.reader(text) if len(row) >= 3}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)[0]
    try:
        # Where there are no locks there are appends all the same: a sample may stand there twice.
        with contextlib.suppress(OSError):
            lock(file, wait=True)
        yield file
    finally:
        os.close(file)  # and unlocks


def _line(*values: object) -> str:
    """One row of CSV on one line, in what UTF-8 can hold."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_printable(str(value)) for value in values])
    return text.getvalue()


def _printable(text: str) -> str:
    """Text on one line, with bytes of names that are no UTF-8 escaped."""
    return " ".join(text.splitlines()).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def reading_ahead(
    datasets: Sequence[PackedDataset], schedule: Schedule, *, num_chunks: int
) -> Iterator[Callable[[int], None]]:
    """Fetches blocks into the local cache within this context, if a data set lies under a URL.

    Reading begins with chunk 0 of the schedule; `num_chunks` are looked at beyond the one that is
    being read. Yields a function to call with the number of a chunk that is about to be read; from
    any thread, nearly in order. A fetch that fails is left to the reading itself.
    """
    options = [dataset.cache for dataset in datasets if dataset.cache is not None]
    if not options or not num_chunks:
        yield lambda chunk: None
        return
    # More blocks than half the cache would push out those that are being used.
    most_blocks = min(one.max_bytes // (2 * one.block_bytes) for one in options)
    reader = _ReadAhead(datasets, schedule, num_chunks, most_blocks)
    with contextlib.closing(reader):
        yield reader.follow


class _ReadAhead:
    """Follows one rank through its order."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        schedule: Schedule,
        num_chunks: int,
        most_blocks: int,
    ) -> None:
        self._datasets = list(datasets)
        self._schedule = schedule
        self._num_chunks = num_chunks
        self._most_blocks = most_blocks
        self._next = 0
        self._last_use: dict[_Block, int] = {}
        self._uses: dict[int, list[_Block]] = {}
        self._done = 0
        self._lock = threading.Lock()
        self._wanted: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._closed = False
        # Daemons: one that waits for a store that does not answer must not hold up the end.
        self._threads = [
            threading.Thread(target=self._fetch, name="unicl-read-ahead", daemon=True)
            for _ in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()
        self.follow(0)

    def follow(self, chunk: int) -> None:
        with self._lock:
            while self._done < chunk:
                for block in self._uses.pop(self._done, ()):
                    if self._last_use.get(block, self._done) <= self._done:
                        self._last_use.pop(block, None)
                self._done += 1
            self._next = max(self._next, chunk)
            while (
                not self._closed
                and self._next <= chunk + self._num_chunks
                and len(self._last_use) < self._most_blocks
            ):
                scheduled = self._schedule(self._next)
                if scheduled is None:
                    return
                self._want(*scheduled)
                self._next += 1

    def close(self) -> None:
        """Ends the threads, without waiting long for one whose request is under way."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS / len(self._threads))

    def _want(self, source_ids: NDArray[np.int32], sample_ids: NDArray[np.int64]) -> None:
        used: list[_Block] = []
        for source, dataset in enumerate(self._datasets):
            if dataset.cache is not None:
                mine = sample_ids[source_ids == source]
                used += [(source, *block) for block in dataset.blocks_of(mine)]
        for block in used:
            if block not in self._last_use:
                self._wanted.put(block)
            self._last_use[block] = self._next
        self._uses[self._next] = used

    def _fetch(self) -> None:
        while not self._closed:
            block = self._wanted.get()
            if block is None:
                return
            source, file, number = block
            with self._lock:
                is_past = self._last_use.get(block, -1) < self._done
            if is_past:  # it has been read meanwhile
                continue
            try:
                self._datasets[source].fetch_ahead(file, number)
            except Exception as error:  # whoever needs it will say so
                logger.debug("reading ahead: %s", error)
