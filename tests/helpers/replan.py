"""A run that is planned again from the seed in its ledger, draw by draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unicl_fast.ledger.format import LEDGER_FOLDER, SegmentHeader
from unicl_fast.ledger.proof import prove
from unicl_fast.pipelines.plan.order import assign_sources
from unicl_fast.pipelines.plan.plan import samples_of_draws


class Replan:
    """Counts the draws that differ; a `watch` of `prove`."""

    def __init__(self) -> None:
        self.num_draws = self.num_different = 0

    def __call__(
        self,
        header: SegmentHeader,
        first_step: int,
        source_ids: NDArray[np.int64],
        ids: NDArray[np.int64],
    ) -> None:
        draws = header.draws_before(first_step) + np.arange(ids.size, dtype=np.int64)
        planned_sources, source_draws = assign_sources(draws, header.shares)
        planned = np.empty_like(draws)
        for number, source in enumerate(header.sources):
            mine = np.flatnonzero(planned_sources == number)
            planned[mine] = samples_of_draws(
                draws[mine],
                source_draws[mine],
                source=number,
                size=source.num_samples,
                seed=header.seed,
                weights=header.shares,
                global_batch_size=header.global_batch_size,
                shuffle_window=header.shuffle_window,
                shuffle_groups=header.shuffle_groups,
            )
        different = (planned != ids.reshape(-1)) | (planned_sources != source_ids.reshape(-1))
        self.num_draws += ids.size
        self.num_different += int(np.count_nonzero(different))


def different_from_plan(run_folder: Path) -> int:
    replan = Replan()
    prove(run_folder / LEDGER_FOLDER, watch=replan)
    return replan.num_different
