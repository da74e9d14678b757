"""Batches of stored features instead of images and texts: a step then runs no encoder, no DALI."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.batch import Batch, OneIterator, ReadingTime
from unicl_fast.dataset.feature_files import FeatureFile, KnownRows, as_tensor
from unicl_fast.text.token_rows import TokenArray, distinct_texts, hashes_of

from .read.bad_samples import BadSampleError
from .steps import PlannedStep, RankSteps, TrainMetadata

_JOINED = 64  # parts of texts that are kept apart


class FeatureLoader(OneIterator):
    """One rank's batches of stored features; implements `unicl_fast.batch.Loader`.

    Samples, texts and targets are those of the `TrainLoader` with the same steps, bit for bit.
    """

    def __init__(
        self,
        steps: RankSteps,
        features: Sequence[FeatureFile],
        texts: KnownRows | None = None,
        *,
        end_step: int,
        device: torch.device,
    ) -> None:
        """`features` are stored ones of each data set, all of one dtype; batches go to `device`.

        Without `texts`, batches have tokens. Batches end before `end_step`, the run's or the
        stage's last: a short run has no features of later ones.
        """
        self.steps, self.plan = steps, steps.plan
        self.reading = ReadingTime(decodes_files=False)
        self._features, self._texts, self._device = list(features), texts, device
        self._end_step = end_step
        self._unreadable = [np.array(sorted(one.unreadable), np.int64) for one in features]

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ...

        Raises:
            TooManyBadSamplesError: so many samples have no features that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        copies_to = None if self._device.type == "cpu" else self._device
        return self._begin(self._batches(start_step), copies_to=copies_to)

    def _batches(self, start_step: int) -> Generator[Batch, None, None]:
        for planned in self._planned(start_step):
            yield from map(self._batch_of, planned)

    def _planned(self, start_step: int) -> Iterator[list[PlannedStep]]:
        for first in range(start_step, self._end_step, self.steps.at_once):
            count = min(self.steps.at_once, self._end_step - first)
            yield self.steps.plan_steps(first, count)

    def texts_from(self, start_step: int) -> TokenArray:
        """The distinct texts [m l] of this rank's batches from `start_step` on."""
        found: list[TokenArray] = []
        for planned in self._planned(start_step):
            batches = [self._metadata_of(step)[0].texts.tokens for step in planned]
            found.append(distinct_texts(torch.cat(batches).numpy()))
            if len(found) == _JOINED:
                found = [distinct_texts(*found)]
        return distinct_texts(*found)

    def _batch_of(self, step: PlannedStep) -> Batch:
        self.steps.begin(step.batch.step)
        metadata, values = self._metadata_of(step)
        if self._texts is not None:
            texts = metadata.texts
            numbers = self._texts.find(hashes_of(texts.tokens.numpy()))
            if (numbers < 0).any():
                raise ValueError(
                    f"step {step.batch.step} has a text without stored features: resume the run, "
                    "which encodes it"
                )
            texts = dataclasses.replace(texts, tokens=self._texts.take(numbers))
            metadata = dataclasses.replace(metadata, texts=texts)
        return metadata.with_images(as_tensor(values, self._features[0].dtype))

    def _metadata_of(self, step: PlannedStep) -> tuple[TrainMetadata, NDArray[np.generic]]:
        """A batch with tokens and without images, and its images' features [b w]."""
        sources, samples = step.batch.source_ids, step.batch.sample_ids
        kind = self._features[0].rows
        values = np.empty((len(samples), kind.shape[1]), kind.dtype)
        sound = np.ones(len(samples), np.bool_)
        for number, one in enumerate(self._features):
            mine = np.flatnonzero(sources == number)
            values[mine] = one.rows[samples[mine]]
            sound[mine] = one.stored[samples[mine]]
            sound[mine] &= ~np.isin(samples[mine], self._unreadable[number])
        actual, rows, others = self.steps.bad.replace(step.batch, sound, self._read_one)
        for row, other in zip(rows.tolist(), others, strict=True):
            values[row] = other
        return self.steps.metadata_of(step, actual), values

    def _read_one(self, source: int, sample: int) -> NDArray[np.generic]:
        row = self._features[source].row(sample)
        if row is None:
            raise BadSampleError("it could not be read, or was not, when features were stored")
        return row
