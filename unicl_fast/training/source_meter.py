"""What each data set of a mix gives a run: passes made over it, and positives of its rows.

Both say whether a mix does what it is for. A source that goes round while the others are in their
first pass has too large a share; a source whose rows have one positive, themselves, teaches as
CLIP does, and one whose rows have many teaches as a classifier does. Asked for at logging steps
only, since class ids have to come from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from unicl_fast.batch import Batch
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.system.progress import WaitingForRanks


class SourceMeter:
    """Numbers for metrics.jsonl: `passes/NAME`, `positives_per_row/NAME`, `storage_bytes_...`."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        passes: Callable[[int], Sequence[float]],
        traffic: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        """What there is to say.

        Args:
            names: of the data sets.
            passes: made over each of them after so many steps.
            traffic: bytes that this rank has read from stores, and bytes of images that it
                needed of them; None where all data sets lie in folders.
        """
        self._names = list(names)
        self._passes = passes
        self._traffic = traffic
        self.traffic: tuple[int, int] | None = None
        """The same of all ranks, when it was last asked for."""

    def describe(self, batch: Batch, ranks: Ranks, *, num_steps: int) -> dict[str, float]:
        """The numbers after `num_steps` steps; all ranks call it together.

        Positives are counted in the global batch, the row itself included, and averaged over the
        rows of a source; of a source without a row in this batch nothing is said.
        """
        values = dict(
            zip((f"passes/{name}" for name in self._names), self._passes(num_steps), strict=True)
        )
        if self._traffic is not None:
            values |= self._describe_traffic(self._traffic(), ranks)
        if batch.source_ids is None:
            return values
        class_ids, source_ids = _gather(
            torch.stack([batch.class_ids.cpu(), batch.source_ids]), ranks
        ).numpy()
        _, index, counts = np.unique(class_ids, return_inverse=True, return_counts=True)
        positives = counts[index]
        for source, name in enumerate(self._names):
            mine = positives[source_ids == source]
            if len(mine):
                values[f"positives_per_row/{name}"] = float(mine.mean())
        return values

    def _describe_traffic(self, mine: tuple[int, int], ranks: Ranks) -> dict[str, float]:
        read, needed = (sum(gather_integers(number, ranks)) for number in mine)
        self.traffic = read, needed
        return {"storage_bytes_read": read, "storage_bytes_needed": needed}


def _gather(columns: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The columns of all ranks side by side, exchanged on the host."""
    if ranks.world_size == 1:
        return columns
    gathered = [torch.empty_like(columns) for _ in range(ranks.world_size)]
    with WaitingForRanks():
        torch.distributed.all_gather(gathered, columns, group=ranks.host_group)
    return torch.cat(gathered, dim=1)
