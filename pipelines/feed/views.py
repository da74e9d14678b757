"""One view of each image or two, through a graph that knows of one.

For two, the graph gets every image twice, all first views and then all second ones, each with
cuts and numbers of its own; its output is cut in two. Both views are decoded, which an image
shared by them would save only where their windows overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.jpeg_windows import cut_to_windows
from ..plan.plan import PlannedBatch


def graph_inputs(
    planned: PlannedBatch,
    images: list[NDArray[np.uint8]] | NDArray[np.uint8],
    integers: NDArray[np.int64],
) -> tuple[Any, ...]:
    """What the training graph takes for a batch of files or pixels: `graph.build_train_graph`.

    Of files, what the windows need.
    """
    if planned.num_views == 1:
        starts, shapes, flips = planned.cuts(0)
    else:
        starts, shapes, flips = map(
            np.concatenate, zip(planned.cuts(0), planned.cuts(1), strict=True)
        )
        if isinstance(images, list):
            images = images * 2
        else:
            images = np.concatenate([images] * 2)
    if isinstance(images, list):
        images, starts = cut_to_windows(images, starts, shapes)
    return images, starts, shapes, flips[:, None], *_beside(planned, integers)


def square_inputs(
    planned: PlannedBatch,
    views: Sequence[NDArray[np.uint8]],
    integers: NDArray[np.int64],
) -> tuple[Any, ...]:
    """The same for the squares of each view, uint8 [b s s 3]."""
    squares = views[0] if len(views) == 1 else np.concatenate(views)
    return squares, *_beside(planned, integers)


def _beside(planned: PlannedBatch, integers: NDArray[np.int64]) -> list[NDArray[Any]]:
    """What goes beside the images: integers, and rows of augmentation if there is any."""
    rows = planned.augment_rows
    if planned.num_views == 2:
        # the second half of the integers is never looked at
        integers = np.concatenate([integers, np.zeros_like(integers)])
    if not rows.shape[2]:
        return [integers]
    return [integers, np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1, rows.shape[2])]


def split_views(images: Tensor, *, num_views: int) -> tuple[Tensor, Tensor | None]:
    """First and second views [b h w c] of what the graph gave."""
    if num_views == 1:
        return images, None
    size = len(images) // 2
    return images[:size], images[size:]
