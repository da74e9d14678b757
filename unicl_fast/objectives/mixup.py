"""mixup and CutMix: images blended two by two, and their labels in the same parts.

Zhang et al., arXiv 1710.09412, and Yun et al., arXiv 1905.04899. Under the unified contrast the
authors' rule is affinity = mixed labels x mixed labels transposed: image and text i have the
labels of both images in their parts, and k is a positive of i with the weight (Y Y^T)_ik.

Partners are the neighbours in the global batch, slots 2k and 2k + 1, and a pair's numbers are a
function of (seed, step, pair): the same on any number of ranks and after any restart, which timm's
Mixup, drawing from NumPy's generator and pairing within a rank, is not. Images that have no label
are left as they are, and so are their partners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.config import ObjectiveConfig
from unicl_fast.objectives.positives import Membership
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.system.keyed_random import fold_key

_PURPOSE = 0x313C


class PairDraws(NamedTuple):
    """What is drawn for each of p pairs; both of a pair get the same."""

    shares: NDArray[np.float64]
    """[p]: how much an image keeps of itself."""
    boxes: NDArray[np.int64]
    """[p 4] top, bottom, left, right of what CutMix takes from the partner; empty for mixup."""


def draw_pairs(
    objective: ObjectiveConfig, *, seed: int, step: int, num_pairs: int, image_size: int
) -> PairDraws:
    """The numbers of all pairs of a step.

    A share is drawn from Beta(alpha, alpha). CutMix's box has the area 1 - share about a centre
    drawn anywhere, is cut at the edges, and the share is what is left outside of it.
    """
    draw = np.random.Generator(np.random.Philox(key=fold_key(seed, _PURPOSE, step)))
    is_mixed = draw.random(num_pairs) < objective.mix_probability
    cuts = draw.random(num_pairs) < _part_of_cutmix(objective)
    shares = np.where(
        cuts,
        draw.beta(objective.cutmix or 1.0, objective.cutmix or 1.0, num_pairs),
        draw.beta(objective.mixup or 1.0, objective.mixup or 1.0, num_pairs),
    )
    shares = np.where(is_mixed, shares, 1.0)
    side = image_size * np.sqrt(1 - shares)
    centres = draw.integers(0, image_size, (2, num_pairs))
    low = np.clip(centres - side / 2, 0, image_size).astype(np.int64)
    high = np.clip(centres + side / 2, 0, image_size).astype(np.int64)
    boxes = np.stack([low[0], high[0], low[1], high[1]], axis=1)
    boxes[~(cuts & is_mixed)] = 0
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    shares = np.where(cuts & is_mixed, 1 - areas / image_size**2, shares)
    return PairDraws(shares, boxes)


def mix(
    images: Float[Tensor, "b c h w"],
    batch: Batch,
    objective: ObjectiveConfig,
    *,
    seed: int,
    global_batch_size: int,
) -> tuple[Float[Tensor, "b c h w"], Membership]:
    """This rank's images mixed with their neighbours, and the labels of each.

    Args:
        images: normalised; an even number, beginning at an even slot.
        batch: their ids, slots and step.
        objective: which mixes, how much.
        seed: of the run.
        global_batch_size: n.
    """
    draws = draw_pairs(
        objective,
        seed=seed,
        step=batch.step,
        num_pairs=global_batch_size // 2,
        image_size=images.shape[-1],
    )
    device = images.device
    pairs = batch.global_index // 2
    shares = _on_device(draws.shares, device)[pairs]
    boxes = _on_device(draws.boxes, device)[pairs]
    partner = _swapped(batch.class_ids)
    is_labelled = batch.class_ids < CAPTION_KEYS_START
    is_mixed = is_labelled & _swapped(is_labelled)
    shares = torch.where(is_mixed, shares, 1.0)
    boxes = boxes * is_mixed.unsqueeze(1)
    parts = torch.where(_inside(boxes, images.shape[-1]), 0.0, _blend(shares, boxes))
    mixed = torch.lerp(_swapped(images), images, parts.unsqueeze(1).to(images.dtype))
    return mixed, labels_of_pairs(batch.class_ids, partner, shares)


def labels_of_pairs(
    class_ids: Int[Tensor, " b"], partners: Int[Tensor, " b"], shares: Float[Tensor, " b"]
) -> Membership:
    """Each sample's own class with its share, and its partner's with the rest."""
    samples = torch.arange(len(class_ids), device=class_ids.device)
    return Membership(
        torch.cat([samples, samples]),
        torch.cat([class_ids, partners]),
        torch.cat([shares, 1 - shares]),
    )


def check_pairs_on_one_rank(
    objective: ObjectiveConfig, *, share: int, micro_batch_size: int
) -> None:
    """Neighbours must be on the same rank, and encoded together.

    Raises:
        ValueError: an odd number of images on a rank, or micro-batches.
    """
    if not objective.mixes:
        return
    if share % 2:
        raise ValueError(
            f"objective.mixup and objective.cutmix mix images two by two, and a rank has {share} "
            "of them: make run.global_batch_size an even multiple of the number of ranks"
        )
    if micro_batch_size:
        raise ValueError(
            "efficiency.micro_batch_size cannot be used with objective.mixup or objective.cutmix; "
            "set it to 0, or these"
        )


def _part_of_cutmix(objective: ObjectiveConfig) -> float:
    if objective.mixup and objective.cutmix:
        return objective.cutmix_share
    return 1.0 if objective.cutmix else 0.0


def _on_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """A copy there; from pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _swapped(values: Tensor) -> Tensor:
    """Neighbours in each other's places."""
    swapped: Tensor = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped


def _inside(boxes: Int[Tensor, "b 4"], size: int) -> Tensor:
    """Pixels of the boxes: bool [b size size]."""
    places = torch.arange(size, device=boxes.device)
    top, bottom, left, right = (edge.unsqueeze(1) for edge in boxes.unbind(1))
    rows = (places >= top) & (places < bottom)
    columns = (places >= left) & (places < right)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _blend(shares: Float[Tensor, " b"], boxes: Int[Tensor, "b 4"]) -> Float[Tensor, "b 1 1"]:
    """What of an image's own pixels is left outside of a box: all where there is one."""
    has_box = boxes[:, 1] > boxes[:, 0]
    return torch.where(has_box, 1.0, shares)[:, None, None]
