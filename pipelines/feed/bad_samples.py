"""Bad samples of a run: found, remembered, listed, and replaced by others.

A sample is bad when its bytes cannot be read, are not those that were packed (checksum), or are
refused by the decoder. The plan says which samples may stand in for it; `BadSamples` reads them
until one is good. Its memory only saves trying again: a process without it feeds the same.
`QuarantineFile` lists what is bad, and `find_undecodable` finds it in a batch that failed.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unicl_fast.dataset.reader import (
    DamagedSampleError,
    PackedDataset,
    TooManyBadSamplesError,
    sample_key,
)
from unicl_fast.system.atomic_files import lock

from ..graph import DecodingError, HostBatch, Pipeline, Source, run_graphs
from ..plan.plan import SAMPLE_FIELDS, PlannedBatch, TrainPlan

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
"""Substitutes tried for one sample. When so many fail, the data is gone, not damaged: with half of
all samples bad it happens once in 10**30 times."""
_LOGGED = 5
_REASON_LENGTH = 300
COLUMNS = ("data_set", "shard", "key", "offset", "reason")
"""Columns of quarantine.csv: folder of the packed data set, name of the shard file, name of the
sample in it, first byte of its image, and what is wrong."""
_SOUND_SIDE = 16


class BadSamples:
    """The samples of this process's data sets that are known to be bad; images are read here."""

    def __init__(self, datasets: Sequence[PackedDataset], quarantine: Path | None) -> None:
        """`quarantine`: the list in the run's folder, shared by its ranks; None writes none."""
        self._datasets = list(datasets)
        self._known: set[tuple[int, int]] = set()
        self._replacing = threading.Lock()
        self._file = None if quarantine is None else QuarantineFile(quarantine)

    def read(self, source: int, sample: int) -> NDArray[np.uint8] | None:
        """The encoded image, its checksum compared; None if the sample is bad."""
        if (source, sample) in self._known:
            return None
        dataset = self._datasets[source]
        try:
            return dataset.image_bytes(sample, verify=True)
        except DamagedSampleError as error:
            self.add(source, sample, str(error).removeprefix(f"{dataset.describe(sample)}: "))
            return None

    def add(self, source: int, sample: int, reason: str) -> None:
        """Remembers that a sample is not to be fed, logs it, and lists it."""
        if (source, sample) in self._known:
            return
        self._known.add((source, sample))
        dataset = self._datasets[source]
        if len(self._known) <= _LOGGED:
            logger.error(
                "BAD SAMPLE: %s: %s; another of the same data set is fed in its place",
                dataset.describe(sample), reason,
            )  # fmt: skip
        if len(self._known) == _LOGGED:
            logger.error(
                "further bad samples: replaced_samples in metrics.jsonl counts them, %s lists them",
                self._where,
            )
        if self._file is not None:
            shard, offset = dataset.shard_of(sample), dataset.offset_of(sample)
            self._file.add(
                dataset.place, shard, sample_key(sample), offset, reason[:_REASON_LENGTH]
            )

    def read_batch(
        self, plan: TrainPlan, planned: PlannedBatch
    ) -> tuple[PlannedBatch, list[NDArray[np.uint8]]]:
        """The encoded images of a batch, and the batch with substitutes where they were needed.

        Raises:
            TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        encoded = [self.read(source, sample) for source, sample in _pairs(planned)]
        bad = [row for row, image in enumerate(encoded) if image is None]
        if bad:
            planned = _copied(planned)
        for row in bad:
            encoded[row] = self._read_substitute(plan, planned, row)
        return planned, [image for image in encoded if image is not None]

    def read_pixels(
        self, plan: TrainPlan, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], NDArray[np.uint8]]:
        """As `read_batch`, for several batches from raw data sets of one size; from any thread.

        Returns:
            The batches, with substitutes where they were needed, and uint8 [b h w 3] of all of
            them, concatenated.

        Raises:
            TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        sample_ids = np.concatenate([batch.sample_ids for batch in batches])
        source_ids = np.concatenate([batch.source_ids for batch in batches])
        shape = self._datasets[0].image_shape or ()
        pixels = np.empty((len(sample_ids), *shape), dtype=np.uint8)
        sound = np.zeros(len(sample_ids), dtype=np.bool_)
        for number, dataset in enumerate(self._datasets):
            mine = np.flatnonzero(source_ids == number)
            sound[mine] = dataset.read_pixels(sample_ids[mine], pixels, mine)
        fed = list(batches)
        if not self._known and sound.all():
            return fed, pixels
        start = 0
        with self._replacing:
            for number, batch in enumerate(batches):
                end = start + len(batch.global_index)
                fed[number] = self._replace_bad(plan, batch, pixels[start:end], sound[start:end])
                start = end
        return fed, pixels

    def _replace_bad(
        self,
        plan: TrainPlan,
        planned: PlannedBatch,
        pixels: NDArray[np.uint8],
        sound: NDArray[np.bool_],
    ) -> PlannedBatch:
        """The batch with substitutes where it is not `sound` [b]; their pixels are filled in."""
        pairs = _pairs(planned)
        bad = [row for row, pair in enumerate(pairs) if not sound[row] or pair in self._known]
        if bad:
            planned = _copied(planned)
        for row in bad:
            image = self.read(*pairs[row])  # tries again, and says what is wrong
            if image is None:
                image = self._read_substitute(plan, planned, row)
            pixels[row] = self._datasets[pairs[row][0]].pixels_of(image)
        return planned

    def _read_substitute(
        self, plan: TrainPlan, planned: PlannedBatch, row: int
    ) -> NDArray[np.uint8]:
        """Puts the first good substitute into a row of `planned`; returns its image."""
        source, scheduled = int(planned.source_ids[row]), int(planned.sample_ids[row])
        global_index = planned.global_index[row : row + 1]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            substitute = plan.substitute(planned.step, global_index, attempt=attempt)
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


def _pairs(planned: PlannedBatch) -> list[tuple[int, int]]:
    """Source and sample of each row."""
    return list(zip(planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True))


def _copied(planned: PlannedBatch) -> PlannedBatch:
    copies = {field: getattr(planned, field).copy() for field in SAMPLE_FIELDS}
    return PlannedBatch(step=planned.step, **copies)


class QuarantineFile:
    """The list of a run's bad samples, `quarantine.csv`: one row each, however often met.

    Several ranks, and the same run after a restart, append to one file. Each row goes out in a
    single write at its end, under a lock, after reading what others wrote meanwhile; so rows stay
    whole and no sample stands there twice. Training never depends on the list: if the file cannot
    be written, that is logged once. Not for several threads at once.
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
        except (OSError, csv.Error) as error:
            if not self._has_failed:
                logger.error("cannot write %s: %s; training continues without it", self.path, error)
            self._has_failed = True

    def _read_new_rows(self, file: int) -> None:
        while data := os.pread(file, 1 << 20, self._bytes_read):
            self._bytes_read += len(data)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            text = [line.decode(errors="replace") for line in lines]
            self._listed |= {(row[0], row[2]) for row in csv.reader(text) if len(row) >= 3}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
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


def find_undecodable(
    build: Callable[[Source], Pipeline], inputs: tuple[Any, ...], *, device: torch.device
) -> dict[int, str]:
    """Finds the images of a batch that the decoder refuses, and its reasons, by row; often one.

    DALI says that a batch failed, seldom at which image. So every sample is decoded alone, by the
    same graph with room for one. That is slow (about the time of the batch on one thread, and a
    new graph behind each image that fails) and happens only when a batch has failed.

    Args:
        build: makes the graph that failed, for batches of one.
        inputs: of the batch, as the graph takes them: encoded images, two corners or a corner
            and a size of the window, and others with a row a sample.
        device: where the graph's outputs lie.

    Raises:
        DecodingError: the decoder fails at a sound image too, so the images are not the cause (a
            device that is lost, or out of memory).
    """
    reasons: dict[int, str] = {}
    start, size = 0, len(inputs[0])
    while start < size:
        one_by_one = (
            HostBatch(inputs=tuple(column[row : row + 1] for column in inputs), facts=row)
            for row in range(start, size)
        )
        try:
            for _ in run_graphs([build], one_by_one, device=device, ahead=1):
                pass
            break
        except DecodingError as error:
            (row,) = error.in_flight
            reasons[row] = reason_of(error)
            start = row + 1
    if reasons:
        _, first, end_or_shape, *others = (column[:1] for column in inputs)
        window = np.zeros_like(first), np.full_like(end_or_shape, _SOUND_SIDE)
        sound = HostBatch(inputs=([_sound_image()], *window, *others), facts=0)
        for _ in run_graphs([build], iter([sound]), device=device, ahead=1):
            pass
    return reasons


def reason_of(error: DecodingError) -> str:
    """The heart of DALI's message in one line: it wraps it in tracebacks of the graph."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    text = text.partition("C++ context:")[0]
    return " ".join((text.strip() or str(error)).split()) or type(error).__name__


@functools.cache
def _sound_image() -> NDArray[np.uint8]:
    """A file that any decoder takes."""
    file = io.BytesIO()
    Image.new("RGB", (_SOUND_SIDE, _SOUND_SIDE), (120, 130, 140)).save(file, format="JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
