"""Batches of stored features instead of images; a step then runs no image encoder, and no DALI."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.batch import Batch, ReadingTime, copied_ahead
from unicl_fast.dataset.feature_files import FeatureFile

from .read.bad_samples import BadSampleError
from .steps import PlannedStep, RankSteps


class FeatureLoader:
    """One rank's batches of stored features; implements `unicl_fast.batch.Loader`.

    Samples, texts and targets are those of the `TrainLoader` with the same steps, bit for bit.
    """

    def __init__(
        self, steps: RankSteps, features: Sequence[FeatureFile], *, device: torch.device
    ) -> None:
        """`features` are stored ones of each data set, all of one dtype; batches go to `device`."""
        self.steps, self.plan = steps, steps.plan
        self.reading = ReadingTime(decodes_files=False)
        self._features, self._device = list(features), device
        self._dtype: torch.dtype = getattr(torch, features[0].dtype)
        self._unreadable = [np.array(sorted(one.unreadable), np.int64) for one in features]

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ... without end.

        Raises:
            TooManyBadSamplesError: so many samples have no features that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        batches = self._batches(start_step)
        return batches if self._device.type == "cpu" else copied_ahead(batches, self._device)

    def close(self) -> None:
        """Does nothing: no file is held open."""

    def _batches(self, start_step: int) -> Generator[Batch, None, None]:
        at_once = self.steps.at_once
        for first in itertools.count(start_step, at_once):
            yield from map(self._batch_of, self.steps.plan_steps(first, at_once))

    def _batch_of(self, step: PlannedStep) -> Batch:
        self.steps.begin(step.batch.step)
        sources, samples = step.batch.source_ids, step.batch.sample_ids
        kind = self._features[0].rows
        values = np.empty((len(samples), kind.shape[1]), kind.dtype)
        sound = np.ones(len(samples), np.bool_)
        for number, one in enumerate(self._features):
            mine = np.flatnonzero(sources == number)
            values[mine] = one.rows[samples[mine]]
            sound[mine] = ~np.isin(samples[mine], self._unreadable[number])
        actual, rows, others = self.steps.bad.replace(step.batch, sound, self._read_one)
        for row, other in zip(rows.tolist(), others, strict=True):
            values[row] = other
        metadata = self.steps.metadata_of(step, actual)
        return metadata.with_images(torch.from_numpy(values).view(self._dtype))

    def _read_one(self, source: int, sample: int) -> NDArray[np.generic]:
        row = self._features[source].row(sample)
        if row is None:
            raise BadSampleError("it could not be read when features were stored")
        return row
