"""How many samples of a run had to be replaced, and when that is too many.

A visit is bad when another sample was fed than the one that was planned, which a `Batch` says of
itself; so this needs to know nothing of files and decoders, and works with any loader. Ranks add
up their counts at logging steps only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unicl_fast.batch import Batch
from unicl_fast.dataset.errors import TooManyBadSamplesError
from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.distributed.ranks import Ranks, gather_integers

LEAST_DRAWS = 10_000
"""The limit is a part of at least so many visits: a few bad ones at the start stop nobody."""


class ReplacedSamples:
    """Counts since this process began to train."""

    def __init__(
        self, *, max_fraction: float, global_batch_size: int, run_folder: Path | None
    ) -> None:
        """Args as in the config; `run_folder` is for the message."""
        self._max_fraction = max_fraction
        self._global_batch_size = global_batch_size
        self._where = "the log" if run_folder is None else str(run_folder / QUARANTINE_NAME)
        self._bad = 0
        self._draws = 0

    def add(self, batch: Batch) -> None:
        """Counts this rank's part of one step."""
        self._draws += self._global_batch_size
        if batch.sample_ids is not None and batch.scheduled_ids is not None:
            # both lie on the host
            differ = batch.sample_ids.numpy() != batch.scheduled_ids.numpy()
            self._bad += int(np.count_nonzero(differ))

    def total(self, ranks: Ranks) -> int:
        """Bad visits of all ranks, exchanged on the host; to be called by all of them."""
        return sum(gather_integers(self._bad, ranks))

    def check(self, total: int) -> None:
        """Stops a run whose limit `total` exceeds; the same on all ranks.

        Raises:
            TooManyBadSamplesError: names the file that lists them.
        """
        if total > self._max_fraction * max(self._draws, LEAST_DRAWS):
            raise TooManyBadSamplesError(
                f"{total} of the {self._draws} samples since this start were bad and had to be "
                f"replaced, more than data.max_bad_fraction = {self._max_fraction} (of at least "
                f"{LEAST_DRAWS}) allows: {self._where} says which and why; mend the data, or set "
                "data.max_bad_fraction higher"
            )
