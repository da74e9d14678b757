"""mixup: images blended in pairs, and their labels with the same weights.

Zhang et al., arXiv 1710.09412. Partners are samples 2k and 2k + 1 of the global batch, and a pair's
lambda a function of (seed, step, pair): unlike with timm's Mixup, the same on any number of ranks
and after a restart. Images without a label are left alone, and so are their partners.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch, send
from unicl_fast.objectives.positives import Membership
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.system.keyed_random import fold_key, random_betas

_PURPOSE = 0x313C


def draw_lambdas(alpha: float, *, seed: int, step: int, num_pairs: int) -> NDArray[np.float64]:
    """The weight of an image itself, for each pair of a step [p]: from Beta(alpha, alpha)."""
    key = np.uint64(fold_key(seed, _PURPOSE, step, 2))
    drawn: NDArray[np.float64] = random_betas(key, np.arange(num_pairs), np.full(num_pairs, alpha))
    return drawn


def mix(
    images: Float[Tensor, "b c h w"], batch: Batch, drawn: NDArray[np.float64]
) -> tuple[Float[Tensor, "b c h w"], Membership]:
    """Mixes this rank's images (an even number, from an even index) by the global batch's draws."""
    class_ids = batch.targets.class_ids
    lambdas = send(torch.from_numpy(drawn), images.device)[batch.global_index // 2]
    is_labelled = class_ids < CAPTION_KEYS_START
    lambdas = torch.where(is_labelled & _swapped(is_labelled), lambdas, 1.0)
    parts = lambdas[:, None, None, None].to(images.dtype)
    mixed = torch.lerp(_swapped(images), images, parts)
    return mixed, labels_of_pairs(class_ids, _swapped(class_ids), lambdas)


def labels_of_pairs(
    class_ids: Int[Tensor, " b"], partners: Int[Tensor, " b"], lambdas: Float[Tensor, " b"]
) -> Membership:
    """Gives each sample its own class with weight lambda, and its partner's with the rest."""
    samples = torch.arange(len(class_ids), device=class_ids.device)
    return Membership(
        torch.cat([samples, samples]),
        torch.cat([class_ids, partners]),
        torch.cat([lambdas, 1 - lambdas]),
    )


def _swapped(values: Tensor) -> Tensor:
    swapped: Tensor = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped
