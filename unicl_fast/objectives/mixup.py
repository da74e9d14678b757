"""mixup and CutMix: images blended two by two, and their labels with the same weights.

Zhang et al., arXiv 1710.09412, and Yun et al., arXiv 1905.04899. Partners are samples 2k and 2k + 1
of the global batch, and a pair's numbers a function of (seed, step, pair): the same on any number
of ranks and after any restart, which timm's Mixup is not. Images without a label stay as they are,
and so do their partners.
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
    """The numbers of each of p pairs; both images of a pair get the same."""

    lambdas: NDArray[np.float64]
    """[p]: the part that an image keeps of itself."""
    boxes: NDArray[np.int64]
    """[p 4] top, bottom, left, right of what CutMix takes from the partner; empty for mixup."""


def draw_pairs(
    mixup: float, cutmix: float, *, seed: int, step: int, num_pairs: int, image_size: int
) -> PairDraws:
    """The numbers of all pairs of a step, by the alphas of both, of which 0 does none.

    lambda is drawn from Beta(alpha, alpha). CutMix's box has the area 1 - lambda about a centre
    drawn anywhere, is cut at the edges, and lambda becomes the area that is left outside of it.
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
    """This rank's normalised images mixed with their neighbours, and the labels of each.

    There is an even number of images, and the first one's global index is even. `draws` are those
    of the whole global batch.
    """
    class_ids = batch.targets.class_ids
    device = images.device
    pairs = batch.global_index // 2
    lambdas = send(torch.from_numpy(draws.lambdas), device)[pairs]
    boxes = send(torch.from_numpy(draws.boxes), device)[pairs]
    is_labelled = class_ids < CAPTION_KEYS_START
    is_mixed = is_labelled & _swapped(is_labelled)
    lambdas = torch.where(is_mixed, lambdas, 1.0)
    boxes = boxes * is_mixed.unsqueeze(1)
    # where there is a box, pixels outside of it are the image's own
    has_box = boxes[:, 1] > boxes[:, 0]
    outside = torch.where(has_box, 1.0, lambdas)[:, None, None]
    parts = torch.where(_inside(boxes, images.shape[-1]), 0.0, outside)
    mixed = torch.lerp(_swapped(images), images, parts.unsqueeze(1).to(images.dtype))
    return mixed, labels_of_pairs(class_ids, _swapped(class_ids), lambdas)


def labels_of_pairs(
    class_ids: Int[Tensor, " b"], partners: Int[Tensor, " b"], lambdas: Float[Tensor, " b"]
) -> Membership:
    """Gives each sample its own class with weight lambda, its partner's with the rest."""
    samples = torch.arange(len(class_ids), device=class_ids.device)
    return Membership(
        torch.cat([samples, samples]),
        torch.cat([class_ids, partners]),
        torch.cat([lambdas, 1 - lambdas]),
    )


def _swapped(values: Tensor) -> Tensor:
    """Swaps the neighbours of each pair."""
    swapped: Tensor = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped


def _inside(boxes: Int[Tensor, "b 4"], size: int) -> Tensor:
    """Pixels of the boxes: bool [b size size]."""
    positions = torch.arange(size, device=boxes.device)
    top, bottom, left, right = (edge.unsqueeze(1) for edge in boxes.unbind(1))
    rows = (positions >= top) & (positions < bottom)
    columns = (positions >= left) & (positions < right)
    return rows.unsqueeze(2) & columns.unsqueeze(1)
