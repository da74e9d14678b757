"""The bad samples that this process has met, and the substitutes that are fed in their place.

A sample is bad if its bytes cannot be read, are not those that were packed (checksum), hold more
than `data.max_pixels`, or are refused by the decoder. The plan says which samples may replace it,
so a process that has not met a bad sample yet feeds the same batches.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.quarantine import RunQuarantine
from unicl_fast.dataset.reader import PackedDataset, TooManyBadSamplesError, sample_key

from ..plan.plan import SAMPLE_FIELDS, PlannedBatch, TrainPlan

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
"""Substitutes tried for one sample. When so many fail, the data is gone, not damaged: with half of
all samples bad it happens once in 10**30 times."""
_LOGGED = 5
_REASON_LENGTH = 300

ReadOne = Callable[[int, int], NDArray[Any]]
"""Reads one sample, given the numbers of its source and sample; raises `BadSampleError`."""


class BadSampleError(Exception):
    """A sample must not be fed; the message says why."""


class BadSamples:
    """Remembers, logs and lists bad samples, and finds their substitutes; for any thread."""

    def __init__(
        self, datasets: Sequence[PackedDataset], plan: TrainPlan, quarantine: Path | None
    ) -> None:
        """No sample is known to be bad yet.

        The `plan` of these data sets says which samples may replace a bad one. `quarantine` is the
        list in the run's folder, shared by its ranks; None writes none.
        """
        self._datasets, self._plan = list(datasets), plan
        self._bad: set[tuple[int, int]] = set()
        self._lock = threading.RLock()
        self._list = None if quarantine is None else RunQuarantine(quarantine)

    def mark(self, source: int, sample: int, reason: str) -> None:
        """Remembers that a sample must not be fed, logs it, and lists it."""
        with self._lock:
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
                    "further bad samples: replaced_samples in metrics.jsonl counts them, %s lists "
                    "them", self._where,
                )  # fmt: skip
            if self._list is not None:
                where = dataset.location, dataset.shard_of(sample), sample_key(sample)
                self._list.add(*where, dataset.offset_of(sample), reason[:_REASON_LENGTH])

    def mark_undecodable(self, faults: Iterable[tuple[int, int, str]]) -> None:
        """Marks samples (source, sample, fault) that a decoder refuses."""
        for source, sample, fault in faults:
            self.mark(source, sample, f"the decoder refuses it: {fault}")

    def replace(
        self, planned: PlannedBatch, sound: NDArray[np.bool_], read: ReadOne
    ) -> tuple[PlannedBatch, NDArray[np.int64], list[NDArray[Any]]]:
        """Reads one by one the rows that are not sound [b] or known to be bad, or substitutes.

        Returns:
            The batch, a copy if samples were replaced; the rows that were read, and what was read.

        Raises TooManyBadSamplesError: no good sample was found in place of a bad one.
        """
        if not self._bad and sound.all():
            return planned, np.empty(0, np.int64), []
        with self._lock:
            pairs = list(zip(planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True))
            rows = np.flatnonzero(~sound | [pair in self._bad for pair in pairs])
            actual, found = planned, []
            for row in rows.tolist():
                value = self._read(*pairs[row], read)
                if value is None:
                    if actual is planned:
                        copies = {field: getattr(planned, field).copy() for field in SAMPLE_FIELDS}
                        actual = dataclasses.replace(planned, **copies)
                    value = self._read_substitute(actual, row, read)
                found.append(value)
        return actual, rows, found

    def _read(self, source: int, sample: int, read: ReadOne) -> NDArray[Any] | None:
        """Reads a sample; None if it is bad."""
        if (source, sample) in self._bad:
            return None
        try:
            return read(source, sample)
        except BadSampleError as error:
            self.mark(source, sample, str(error))
            return None

    def _read_substitute(self, planned: PlannedBatch, row: int, read: ReadOne) -> NDArray[Any]:
        """Puts the first good substitute into a row of `planned`; returns what was read."""
        source, scheduled = int(planned.source_ids[row]), int(planned.sample_ids[row])
        global_index = planned.global_index[row : row + 1]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            substitute = self._plan.substitute(planned.step, global_index, attempt=attempt)
            value = self._read(source, int(substitute.sample_ids[0]), read)
            if value is not None:
                for field in SAMPLE_FIELDS:
                    getattr(planned, field)[row] = getattr(substitute, field)[0]
                return value
        raise TooManyBadSamplesError(
            f"step {planned.step}: {self._datasets[source].describe(scheduled)} is bad, and so are "
            f"{MAX_ATTEMPTS} others that were tried in its place: see {self._where}, and check "
            "that the data set is whole and its storage reachable"
        )

    @property
    def _where(self) -> str:
        return "the log" if self._list is None else str(self._list.path)
