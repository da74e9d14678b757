"""Images, token rows and labels in memory to a `Batch`.

For loaders that decode elsewhere, for notebooks and for tests; the DALI loader makes its batches
in its own graph.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.objectives.targets import PromptLookup, map_targets, slice_targets


def collate(
    images: Tensor,
    tokens: Tensor,
    labels: Tensor,
    *,
    prompts: PromptLookup | None = None,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """One rank's share of a global batch, from the whole of it.

    Args:
        images: uint8 [n h w c], RGB.
        tokens: [n l] token rows padded with 0, as `Tokenizer` makes them.
        labels: int64 [n]; -1 is a caption without a class.
        prompts: finds captions that are prompts of classes.
        step: optimizer step of the batch.
        rank: which share to take.
        world_size: number of shares; divides n.
    """
    n = len(images)
    if not n == len(tokens) == len(labels) or n % world_size:
        raise ValueError(
            f"expected as many images as tokens and labels, and a multiple of {world_size} ranks, "
            f"got {n}, {len(tokens)} and {len(labels)}"
        )
    share = n // world_size
    start, stop = rank * share, (rank + 1) * share
    targets = slice_targets(
        map_targets(tokens.numpy().astype(np.uint16), labels.numpy(), prompts), start, stop
    )
    return Batch(
        step=step,
        images=images[start:stop],
        tokens=torch.from_numpy(targets.tokens.astype(np.int64)),
        text_lengths=targets.text_lengths,
        text_index=torch.from_numpy(targets.text_index),
        class_ids=torch.from_numpy(targets.class_ids),
        text_class_ids=torch.from_numpy(targets.text_class_ids),
        text_counts=torch.from_numpy(targets.text_counts),
        global_index=torch.arange(start, stop),
    )
