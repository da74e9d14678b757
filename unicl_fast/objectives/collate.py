"""Makes a `Batch` of images, token rows and labels in memory.

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
    """Makes one rank's local batch from the samples of the global batch.

    Args:
        images: uint8 [n h w c], RGB.
        tokens: [n l] token rows padded with 0, as `Tokenizer` makes them.
        labels: int64 [n]; -1 is a caption without a class.
        prompts: finds captions that are prompts of classes.
        step: optimizer step of the batch.
        rank: the rank whose local batch is made.
        world_size: number of ranks; divides n.
    """
    n = len(images)
    if not n == len(tokens) == len(labels) or n % world_size:
        raise ValueError(
            f"expected as many images as tokens and labels, and a multiple of {world_size} ranks, "
            f"got {n}, {len(tokens)} and {len(labels)}"
        )
    size = n // world_size
    start, stop = rank * size, (rank + 1) * size
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
