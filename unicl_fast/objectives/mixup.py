"""mixup and CutMix: images blended in pairs, and their labels with the same weights.

Zhang et al., arXiv 1710.09412, and Yun et al., arXiv 1905.04899. Partners are samples 2k and 2k + 1
of the global batch, and a pair's random numbers a function of (seed, step, pair): unlike with
timm's Mixup, the same on any number of ranks and after a restart. Images without a label are left
alone, and so are their partners.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch, send
from unicl_fast.objectives.positives import Membership
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.system.keyed_random import fold_key, random_betas, random_units

_PURPOSE = 0x313C


class PairDraws(NamedTuple):
    """The random numbers of p pairs; both images of a pair share them."""

    lambdas: NDArray[np.float64]
    """[p]: the weight of an image itself."""
    boxes: NDArray[np.int64]
    """[p 4] top, bottom, left, right of the partner's rectangle in CutMix; empty for mixup."""


def draw_pairs(
    mixup: float, cutmix: float, *, seed: int, step: int, num_pairs: int, image_size: int
) -> PairDraws:
    """The numbers of all pairs of a step; an alpha of 0 disables mixup or CutMix.

    lambda is drawn from Beta(alpha, alpha). CutMix's box has area 1 - lambda around a centre drawn
    anywhere, and is clipped to the image; lambda becomes the area outside it.
    """
    pairs = np.arange(num_pairs)

    def key(purpose: int) -> np.uint64:
        return np.uint64(fold_key(seed, _PURPOSE, step, purpose))

    part_of_cutmix = 0.0 if not cutmix else 0.5 if mixup else 1.0
    is_cut = random_units(key(1), pairs) < part_of_cutmix
    lambdas = random_betas(key(2), pairs, np.where(is_cut, cutmix or 1.0, mixup or 1.0))
    side = image_size * np.sqrt(1 - lambdas)
    centres = np.stack([random_units(key(3), pairs), random_units(key(4), pairs)]) * image_size
    low = np.clip(centres - side / 2, 0, image_size).astype(np.int64)
    high = np.clip(centres + side / 2, 0, image_size).astype(np.int64)
    boxes = np.stack([low[0], high[0], low[1], high[1]], axis=1)
    boxes[~is_cut] = 0
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    return PairDraws(np.where(is_cut, 1 - areas / image_size**2, lambdas), boxes)


def mix(
    images: Float[Tensor, "b c h w"], batch: Batch, draws: PairDraws
) -> tuple[Float[Tensor, "b c h w"], Membership]:
    """Mixes this rank's images (an even number, from an even index) by the global batch's draws."""
    class_ids = batch.targets.class_ids
    device = images.device
    pairs = batch.global_index // 2
    lambdas = send(torch.from_numpy(draws.lambdas), device)[pairs]
    boxes = send(torch.from_numpy(draws.boxes), device)[pairs]
    is_labelled = class_ids < CAPTION_KEYS_START
    is_mixed = is_labelled & _swapped(is_labelled)
    lambdas = torch.where(is_mixed, lambdas, 1.0)
    boxes = boxes * is_mixed.unsqueeze(1)
    # with a box, pixels outside it are the image's own
    has_box = boxes[:, 1] > boxes[:, 0]
    outside = torch.where(has_box, 1.0, lambdas)[:, None, None]
    parts = torch.where(_inside(boxes, images.shape[-1]), 0.0, outside)
    mixed = torch.lerp(_swapped(images), images, parts.unsqueeze(1).to(images.dtype))
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


def _inside(boxes: Int[Tensor, "b 4"], size: int) -> Tensor:
    """Whether each pixel is in its image's box: bool [b size size]."""
    positions = torch.arange(size, device=boxes.device)
    top, bottom, left, right = (edge.unsqueeze(1) for edge in boxes.unbind(1))
    rows = (positions >= top) & (positions < bottom)
    columns = (positions >= left) & (positions < right)
    return rows.unsqueeze(2) & columns.unsqueeze(1)
