"""The unified contrastive loss, a pure function of the tensors it is given.

Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022, equations 2 and
3: with P(i) the samples of i's class, n samples, s the scale,

    L_i2t = 1/n sum_i -1/|P(i)| sum_{k in P(i)} log( exp(s u_i.v_k) / sum_j exp(s u_i.v_j) )
    L_t2i = the same with images and texts exchanged
    L     = (L_i2t + L_t2i) / 2

The columns of the logits are the DISTINCT texts with their counts m_j. Equal texts give equal
columns, so this is exact: the sum over j becomes log-sum-exp of s u_i.v_j + log m_j, and column j
stands for m_j terms of L_t2i.

The loss knows no ranks. It is made of pieces, so that `unicl_fast.training.step` can put the pieces
of
several ranks together: `compare` describes some images against all texts; rows are complete
there; columns are merged over ranks; `losses` follow from both. Two forms give the same: the dense
one, which is the formula, and the tiled one (`unicl_fast.objectives.loss_tiled`), which stores no
logits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl_fast.config import LossForm
from unicl_fast.objectives.loss_tiled import compare_tiled
from unicl_fast.objectives.positives import Membership, as_membership, find_positives

Directions = Literal["both", "i2t", "t2i"]

# Logits b u. Below it the dense form is as fast or faster on the CPU, and small; docs/loss.md.
_SMALLEST_TILED = 1 << 20


class Statistics(NamedTuple):
    """What the losses of images need to know about texts, or those of texts about images.

    Statistics of texts about disjoint sets of images merge by taking the log-sum-exp of
    `log_sum_exp` and adding everything else.
    """

    log_sum_exp: Float[Tensor, " n"]
    """log of the sum of exp(logit); the lowest finite number where there is nothing to sum."""
    positive_sum: Float[Tensor, " n"]
    """Sum of the logits of its positives, times their weights."""
    positive_weight: Float[Tensor, " n"]
    """Sum of the weights of its positives: how many there are, if nobody has several labels."""


def unified_contrastive_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"] | Membership,
    scale: Float[Tensor, ""] | float,
    *,
    text_class_ids: Int[Tensor, " u"] | Membership | None = None,
    text_counts: Int[Tensor, " u"] | None = None,
    exclude_self: bool = False,
    directions: Directions = "both",
    form: LossForm = "auto",
) -> Float[Tensor, ""]:
    """The loss of images against texts; equal class ids are positives.

    Special cases: all classes distinct is CLIP's InfoNCE; text features that are one learnt row
    for each class with `directions="i2t"` is cross-entropy; both views of every image as image
    AND as text features with `exclude_self=True` is SupCon.

    Args:
        image_features: [b d], unit norm.
        text_features: [u d], unit norm, the distinct texts.
        class_ids: int64 [b], any values; or a `Membership`, for several labels an image. Text k
            is then a positive of image i with the weight (Y Y^T)_ik over the row's sum.
        scale: factor of the products, exp(logit_scale).
        text_class_ids: int64 [u] or `Membership`; None takes `class_ids`, one text for each
            image.
        text_counts: int64 [u], how many samples have each text; None means 1.
        exclude_self: leave out the pairs (i, i), for two views of the same images (u = b).
        directions: which of the two terms to take; "both" is their mean.
        form: "dense" holds the logits [b u]; "tiled" computes them twice and holds O((b + u) d);
            "auto" takes the faster one for the size.

    Returns:
        A scalar, in fp64 if features are, else in fp32 whatever their type. An image or
        text without any positive contributes 0. In the tiled form the products of bf16 features
        are rounded to bf16, as autocast does, before anything is summed up in fp32: the loss is
        off by less than 0.1 %, a gradient by 1 % (scale 15) to 3 % (100) of its norm.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if text_class_ids is None:
        text_class_ids = class_ids
    _check_shapes(
        image_features, text_features, class_ids, text_class_ids, text_counts, exclude_self
    )
    with torch.autocast(image_features.device.type, enabled=False):
        rows, columns = compare(
            image_features,
            text_features,
            class_ids,
            text_class_ids,
            text_counts,
            scale,
            exclude_self=exclude_self,
            form=form,
        )
        i2t = losses(rows).mean()
        if text_counts is None:
            t2i = losses(columns).mean()
        else:
            t2i = (text_counts * losses(columns)).sum() / text_counts.sum()
    if directions == "i2t":
        return i2t
    if directions == "t2i":
        return t2i
    return (i2t + t2i) / 2


def compare(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"] | Membership,
    text_class_ids: Int[Tensor, " u"] | Membership,
    text_counts: Int[Tensor, " u"] | None,
    scale: Float[Tensor, ""] | float,
    *,
    exclude_self: bool = False,
    form: LossForm = "auto",
) -> tuple[Statistics, Statistics]:
    """Some images against all texts: what is known then about the images and about the texts.

    A text of count 0 is as if it were not there, so ranks may pad their texts. With `exclude_self`
    more "texts" may follow than there are images: those of other ranks.
    """
    b, u = len(image_features), len(text_features)
    if form == "auto":
        form = "tiled" if b * u >= _SMALLEST_TILED else "dense"
    operands = torch.promote_types(image_features.dtype, text_features.dtype)
    if operands == torch.float16 or form == "dense":
        # the gradients of logits are too small for fp16
        operands = torch.promote_types(operands, torch.float32)
    arithmetic = torch.promote_types(operands, torch.float32)
    image_features, text_features = image_features.to(operands), text_features.to(operands)
    scale = torch.as_tensor(scale, dtype=arithmetic, device=image_features.device)
    counts = None if text_counts is None else text_counts.to(arithmetic)
    if form == "dense":
        weights = _positive_weights(class_ids, text_class_ids, b, u, arithmetic)
        logits = scale * (image_features @ text_features.T)
        return _compare_dense(logits, weights, counts, exclude_self=exclude_self)
    positives = find_positives(
        class_ids,
        text_class_ids,
        num_images=b,
        num_texts=u,
        dtype=arithmetic,
        exclude_self=exclude_self,
    )
    compared = compare_tiled(
        image_features,
        text_features,
        scale,
        counts=counts,
        positives=positives,
        exclude_self=exclude_self,
    )
    rows = Statistics(
        compared.row_log_sum_exp,
        compared.row_positive_sum,
        positives.times(scale.new_ones(u, 1), counts).squeeze(1),
    )
    columns = Statistics(
        compared.column_log_sum_exp,
        compared.column_positive_sum,
        positives.transposed_times(scale.new_ones(b, 1)).squeeze(1),
    )
    return rows, columns


def losses(statistics: Statistics) -> Float[Tensor, " n"]:
    """Loss of each image, or of each text; 0 without a positive."""
    log_sum_exp, positive_sum, positive_weight = statistics
    has_positive = positive_weight > 0
    mean = positive_sum / torch.where(has_positive, positive_weight, 1)
    return torch.where(has_positive, log_sum_exp - mean, 0)


def _compare_dense(
    logits: Float[Tensor, "b u"],
    weights: Tensor,
    counts: Float[Tensor, " u"] | None,
    *,
    exclude_self: bool,
) -> tuple[Statistics, Statistics]:
    """The formula as it is written, from all logits and the matrix of positives [b u]."""
    if exclude_self:
        itself = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        weights = weights.masked_fill(itself, 0)
        # not -inf: where no other pair is left (one image), its gradient would be 0/0
        logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
    weighted = weights * logits

    def statistics(logits: Tensor, dim: int) -> Statistics:
        return Statistics(
            logits.logsumexp(dim), weighted.sum(dim), weights.sum(dim, dtype=logits.dtype)
        )

    columns = statistics(logits, dim=0)
    if counts is not None:
        logits = logits + counts.log()
        weighted, weights = weighted * counts, weights * counts
    return statistics(logits, dim=1), columns


def _positive_weights(
    class_ids: Tensor | Membership,
    text_class_ids: Tensor | Membership,
    b: int,
    u: int,
    dtype: torch.dtype,
) -> Tensor:
    """[b u]: whether they share the class, or how much of their labels."""
    if isinstance(class_ids, Tensor) and isinstance(text_class_ids, Tensor):
        return class_ids.unsqueeze(1) == text_class_ids.unsqueeze(0)
    images, texts = as_membership(class_ids, dtype), as_membership(text_class_ids, dtype)
    of_entries = (images.labels.unsqueeze(1) == texts.labels.unsqueeze(0)).to(dtype)
    of_entries = images.weights.unsqueeze(1) * of_entries * texts.weights
    of_rows = of_entries.new_zeros(b, of_entries.shape[1]).index_add(0, images.samples, of_entries)
    return of_rows.new_zeros(b, u).index_add(1, texts.samples, of_rows)


def _check_shapes(
    image_features: Tensor,
    text_features: Tensor,
    class_ids: Tensor | Membership,
    text_class_ids: Tensor | Membership,
    text_counts: Tensor | None,
    exclude_self: bool,
) -> None:
    b, u = len(image_features), len(text_features)
    if image_features.ndim != 2 or text_features.ndim != 2 or b == 0 or u == 0:
        raise ValueError(
            "expected features [b d] and [u d] with b and u at least 1, got "
            f"{list(image_features.shape)} and {list(text_features.shape)}"
        )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"image and text features differ in dimension: {image_features.shape[1]} and "
            f"{text_features.shape[1]}"
        )
    if isinstance(class_ids, Tensor) and class_ids.shape != (b,):
        raise ValueError(f"expected {b} class_ids, one an image, got {list(class_ids.shape)}")
    if isinstance(text_class_ids, Tensor) and text_class_ids.shape != (u,):
        raise ValueError(
            f"expected {u} text_class_ids, one a text, got {list(text_class_ids.shape)}; "
            "pass text_class_ids when there are not as many texts as images"
        )
    if text_counts is not None and text_counts.shape != (u,):
        raise ValueError(f"expected {u} text_counts, got {list(text_counts.shape)}")
    for membership in (class_ids, text_class_ids):
        if isinstance(membership, Membership):
            _check_membership(membership, exclude_self)
    if exclude_self and (b != u or text_counts is not None):
        raise ValueError(
            "exclude_self compares the images with themselves: it takes as many text features "
            f"as image features and no text_counts, got {u} for {b}"
        )


def _check_membership(membership: Membership, exclude_self: bool) -> None:
    shapes = [list(field.shape) for field in membership]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2] or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(
            f"expected samples, labels and weights of a Membership to be [e], got {shapes}"
        )
    if exclude_self:
        raise ValueError("exclude_self takes class ids, not a Membership")
