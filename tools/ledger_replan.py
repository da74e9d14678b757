"""Plans a run again from what its ledger's headers say, and compares: a second witness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unicl_fast.ledger.format import SegmentHeader
from unicl_fast.pipelines.plan.order import assign_sources
from unicl_fast.pipelines.plan.plan import samples_of_draws


class Replan:
    """Shown all visits of a ledger (see `ledger_proof.prove`), counts those planned otherwise."""

    def __init__(self) -> None:
        self.num_draws = 0
        self.num_different = 0
        self._first = ""

    def __call__(
        self,
        header: SegmentHeader,
        first_step: int,
        source_ids: NDArray[np.int64],
        ids: NDArray[np.int64],
    ) -> None:
        """Compares the visits [steps n] of some steps."""
        draws = first_step * header.global_batch_size + np.arange(ids.size, dtype=np.int64)
        planned_sources, source_draws = assign_sources(draws, header.shares)
        planned = np.empty_like(draws)
        for number, source in enumerate(header.sources):
            mine = np.flatnonzero(planned_sources == number)
            planned[mine] = samples_of_draws(
                source_draws[mine],
                source=number,
                size=source.num_samples,
                seed=header.seed,
                shuffle_window=header.shuffle_window,
            )
        different = (planned != ids.reshape(-1)) | (planned_sources != source_ids.reshape(-1))
        self.num_draws += ids.size
        self.num_different += int(np.count_nonzero(different))
        if different.any() and not self._first:
            at = int(np.argmax(different))
            step, slot = divmod(int(draws[at]), header.global_batch_size)
            self._first = (
                f"; the first at step {step}, slot {slot}: planned was sample {planned[at]} of "
                f"source {planned_sources[at]}, the ledger has {ids.reshape(-1)[at]} of "
                f"{source_ids.reshape(-1)[at]}"
            )

    def in_words(self) -> str:
        return f"planned again: {self.num_different} of {self.num_draws} visits differ{self._first}"
