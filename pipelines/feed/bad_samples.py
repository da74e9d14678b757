"""Bad samples of a run: noticed, remembered, listed, and others fed in their place.

A sample is bad when its bytes cannot be read, are not those that were packed (checksum), or are
refused by the decoder. Which sample stands in for it is the plan's to say; here is what was found
to be bad, and the search for the first substitute that is not. What is remembered only saves
trying again: a process that has forgotten it feeds the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.errors import DamagedSampleError, TooManyBadSamplesError
from unicl_fast.dataset.reader import PackedDataset, sample_key

from ..plan.plan import SAMPLE_FIELDS, PlannedBatch, TrainPlan
from .quarantine import BadSample, QuarantineFile

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
"""Substitutes tried for one place. When so many fail, the data is gone, not damaged: with half of
all samples bad it happens once in 10**30 places."""
_LOGGED = 5
_REASON_LENGTH = 300


class BadSamples:
    """What is known to be bad in the data sets of this process; read through it."""

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
        """Remembers that a sample is not to be fed, says so, and lists it."""
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
            self._file.add(
                BadSample(
                    data_set=dataset.place,
                    shard=dataset.shard_of(sample),
                    key=sample_key(sample),
                    offset=dataset.offset_of(sample),
                    reason=reason[:_REASON_LENGTH],
                )
            )

    def read_batch(
        self, plan: TrainPlan, planned: PlannedBatch
    ) -> tuple[PlannedBatch, list[NDArray[np.uint8]]]:
        """The encoded images of a batch, and the batch with substitutes where they were needed.

        Raises:
            TooManyBadSamplesError: no good sample was found for a place.
        """
        encoded = [self.read(source, sample) for source, sample in _pairs(planned)]
        bad = [place for place, image in enumerate(encoded) if image is None]
        if bad:
            planned = _copied(planned)
        for place in bad:
            encoded[place] = self._read_substitute(plan, planned, place)
        return planned, [image for image in encoded if image is not None]

    def read_pixels(
        self, plan: TrainPlan, batches: Sequence[PlannedBatch]
    ) -> tuple[list[PlannedBatch], NDArray[np.uint8]]:
        """As `read_batch`, for several batches from raw data sets of one size; from any thread.

        Returns:
            The batches, with substitutes where they were needed, and uint8 [b h w 3] of all of
            them, one behind the other.

        Raises:
            TooManyBadSamplesError: no good sample was found for a place.
        """
        sample_ids = np.concatenate([batch.sample_ids for batch in batches])
        source_ids = np.concatenate([batch.source_ids for batch in batches])
        shape = self._datasets[0].image_shape or ()
        pixels = np.empty((len(sample_ids), *shape), dtype=np.uint8)
        sound = np.zeros(len(sample_ids), dtype=np.bool_)
        for number, dataset in enumerate(self._datasets):
            places = np.flatnonzero(source_ids == number)
            sound[places] = dataset.read_pixels(sample_ids[places], pixels, places)
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
        bad = [place for place, pair in enumerate(pairs) if not sound[place] or pair in self._known]
        if bad:
            planned = _copied(planned)
        for place in bad:
            image = self.read(*pairs[place])  # tries again, and says what is wrong
            if image is None:
                image = self._read_substitute(plan, planned, place)
            pixels[place] = self._datasets[pairs[place][0]].pixels_of(image)
        return planned

    def _read_substitute(
        self, plan: TrainPlan, planned: PlannedBatch, place: int
    ) -> NDArray[np.uint8]:
        """Puts the first good substitute into one place of `planned`; returns its image."""
        source, scheduled = int(planned.source_ids[place]), int(planned.sample_ids[place])
        global_index = planned.global_index[place : place + 1]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            substitute = plan.substitute(planned.step, global_index, attempt=attempt)
            image = self.read(source, int(substitute.sample_ids[0]))
            if image is not None:
                for field in SAMPLE_FIELDS:
                    getattr(planned, field)[place] = getattr(substitute, field)[0]
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
    """Source and sample of each place."""
    return list(zip(planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True))


def _copied(planned: PlannedBatch) -> PlannedBatch:
    copies = {field: getattr(planned, field).copy() for field in SAMPLE_FIELDS}
    return PlannedBatch(step=planned.step, **copies)
