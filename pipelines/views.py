"""Two views of each picture through a graph that knows of one.

The graph gets every picture twice, all first views and then all second ones, each with cuts and
numbers of its own; its output is cut in two. Both views are decoded, which a picture shared by
them would save only where their windows overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.pipelines.plan import PlannedBatch


def graph_inputs(
    planned: PlannedBatch, encoded: list[NDArray[np.uint8]], integers: NDArray[np.int64]
) -> tuple[Any, ...]:
    """What the training graph takes for a batch: see `graph.build_train_graph`."""
    inputs: list[Any] = [
        encoded, planned.window_starts, planned.window_shapes, planned.flips[:, None], integers
    ]  # fmt: skip
    rows = planned.augment_rows
    if planned.second_cuts.shape[1]:
        second = np.split(planned.second_cuts, [2, 4], axis=1)
        cuts = [np.concatenate(pair) for pair in zip(inputs[1:4], second, strict=True)]
        # the second half of the integers is never looked at
        inputs = [encoded * 2, *cuts, np.concatenate([integers, np.zeros_like(integers)])]
        rows = rows.transpose(1, 0, 2).reshape(-1, 1, rows.shape[2])
    if rows.shape[2]:
        inputs.append(np.ascontiguousarray(rows[:, 0]))
    return tuple(inputs)


def split_views(images: Tensor, *, num_views: int) -> tuple[Tensor, Tensor | None]:
    """First and second views [b h w c] of what the graph gave."""
    if num_views == 1:
        return images, None
    size = len(images) // 2
    return images[:size], images[size:]
