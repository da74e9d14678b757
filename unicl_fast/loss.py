"""The unified contrastive loss, a pure function of the tensors it is given.

Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022, equations 2 and
3: with P(i) the samples of i's class, n samples, s the scale,

    L_i2t = 1/n sum_i -1/|P(i)| sum_{k in P(i)} log( exp(s u_i.v_k) / sum_j exp(s u_i.v_j) )
    L_t2i = the same with pictures and texts exchanged
    L     = (L_i2t + L_t2i) / 2

The columns of the logits are the DISTINCT texts with their counts m_j. Equal texts give equal
columns, so this is exact: the sum over j becomes log-sum-exp of s u_i.v_j + log m_j, and column j
stands for m_j terms of L_t2i.

The loss knows no ranks. It is made of three pieces, so that `unicl_fast.step` can put the pieces
of several ranks together: rows are complete where the picture is; columns are described by
`ColumnStatistics`, which can be merged; the column losses follow from merged statistics.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Directions = Literal["both", "i2t", "t2i"]


class ColumnStatistics(NamedTuple):
    """What a text's loss needs to know about the pictures compared with it.

    Statistics of disjoint sets of pictures merge by taking the largest `maximum`, bringing
    `exp_sum` to it, and adding everything else.
    """

    maximum: Float[Tensor, " u"]
    """Largest logit; carries no gradient, since it cancels."""
    exp_sum: Float[Tensor, " u"]
    """Sum of exp(logit - maximum)."""
    positive_sum: Float[Tensor, " u"]
    """Sum of the logits of pictures of the text's class."""
    positive_count: Float[Tensor, " u"]
    """Number of pictures of the text's class."""


def unified_contrastive_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"],
    scale: Float[Tensor, ""] | float,
    *,
    text_class_ids: Int[Tensor, " u"] | None = None,
    text_counts: Int[Tensor, " u"] | None = None,
    exclude_self: bool = False,
    directions: Directions = "both",
) -> Float[Tensor, ""]:
    """The loss of pictures against texts; equal class ids are positives.

    Special cases: all classes distinct is CLIP's InfoNCE; text features that are one learnt row
    for each class with `directions="i2t"` is cross-entropy; both views of every picture as image
    AND as text features with `exclude_self=True` is SupCon.

    Args:
        image_features: [b d], unit norm.
        text_features: [u d], unit norm, the distinct texts.
        class_ids: int64 [b], any values.
        scale: factor of the products, exp(logit_scale).
        text_class_ids: int64 [u]; None takes `class_ids`, one text for each picture.
        text_counts: int64 [u], how many samples have each text; None means 1.
        exclude_self: leave out the pairs (i, i), for two views of the same pictures (u = b).
        directions: which of the two terms to take; "both" is their mean.

    Returns:
        A scalar, in fp64 if any input is, else in fp32 whatever the inputs' type. A picture or
        text without any positive contributes 0.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if text_class_ids is None:
        text_class_ids = class_ids
    _check_shapes(
        image_features, text_features, class_ids, text_class_ids, text_counts, exclude_self
    )
    counts = torch.ones_like(text_class_ids) if text_counts is None else text_counts
    with torch.autocast(image_features.device.type, enabled=False):
        row_losses, statistics = compare(
            image_features,
            text_features,
            class_ids,
            text_class_ids,
            counts,
            scale,
            exclude_self=exclude_self,
        )
        i2t = row_losses.mean()
        t2i = (counts * column_losses(statistics)).sum() / counts.sum()
    if directions == "i2t":
        return i2t
    if directions == "t2i":
        return t2i
    return (i2t + t2i) / 2


def compare(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"],
    text_class_ids: Int[Tensor, " u"],
    text_counts: Int[Tensor, " u"],
    scale: Float[Tensor, ""] | float,
    *,
    exclude_self: bool = False,
) -> tuple[Float[Tensor, " b"], ColumnStatistics]:
    """Some pictures against all texts: their losses, and what the texts' losses need of them.

    The dense form: holds the logits [b u]. A text of count 0 is as if it were not there, so ranks
    may pad their texts.
    """
    image_features, text_features, scale = _accumulation_type(image_features, text_features, scale)
    logits = scale * (image_features @ text_features.T)
    positives = class_ids.unsqueeze(1) == text_class_ids.unsqueeze(0)
    if exclude_self:
        itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        positives = positives & ~itself
        logits = logits.masked_fill(itself, -math.inf)
    return (
        _row_losses(logits, positives, text_counts),
        _column_statistics(logits, positives),
    )


def column_losses(statistics: ColumnStatistics) -> Float[Tensor, " u"]:
    """Loss of each text against all pictures that `statistics` describe; 0 without a positive."""
    maximum, exp_sum, positive_sum, positive_count = statistics
    log_sum_exp = maximum + exp_sum.log()
    losses = log_sum_exp - positive_sum / positive_count.clamp(min=1)
    return torch.where(positive_count > 0, losses, 0)


def _row_losses(
    logits: Float[Tensor, "b u"], positives: Bool[Tensor, "b u"], text_counts: Int[Tensor, " u"]
) -> Float[Tensor, " b"]:
    counts = text_counts.to(logits.dtype)
    log_sum_exp = torch.logsumexp(logits + counts.log(), dim=1)
    weights = positives * counts
    positive_count = weights.sum(dim=1)
    # masked, not multiplied: an excluded logit is -inf, and 0 * inf is not a number
    positive_sum = torch.where(positives, logits, 0).mul(counts).sum(dim=1)
    losses = log_sum_exp - positive_sum / positive_count.clamp(min=1)
    return torch.where(positive_count > 0, losses, 0)


def _column_statistics(
    logits: Float[Tensor, "b u"], positives: Bool[Tensor, "b u"]
) -> ColumnStatistics:
    # a column with no picture left (one picture, itself excluded) has the maximum -inf
    maximum = logits.detach().amax(dim=0).clamp(min=torch.finfo(logits.dtype).min)
    return ColumnStatistics(
        maximum=maximum,
        exp_sum=(logits - maximum).exp().sum(dim=0),
        positive_sum=torch.where(positives, logits, 0).sum(dim=0),
        positive_count=positives.sum(dim=0).to(logits.dtype),
    )


def _accumulation_type(
    image_features: Tensor, text_features: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything in fp32, or in fp64 if the features are."""
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    scale = torch.as_tensor(scale, dtype=dtype, device=image_features.device)
    return image_features.to(dtype), text_features.to(dtype), scale


def _check_shapes(
    image_features: Tensor,
    text_features: Tensor,
    class_ids: Tensor,
    text_class_ids: Tensor,
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
    if class_ids.shape != (b,):
        raise ValueError(f"expected {b} class_ids, one a picture, got {list(class_ids.shape)}")
    if text_class_ids.shape != (u,):
        raise ValueError(
            f"expected {u} text_class_ids, one a text, got {list(text_class_ids.shape)}; "
            "pass text_class_ids when there are not as many texts as pictures"
        )
    if text_counts is not None and text_counts.shape != (u,):
        raise ValueError(f"expected {u} text_counts, got {list(text_counts.shape)}")
    if exclude_self and (b != u or text_counts is not None):
        raise ValueError(
            "exclude_self compares the pictures with themselves: it takes as many text features "
            f"as image features and no text_counts, got {u} for {b}"
        )
