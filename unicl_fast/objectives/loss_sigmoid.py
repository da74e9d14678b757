"""The sigmoid form of the loss; an image's row again needs only class sums, O((b + u) d) memory.

sum_k m_k log(1 + exp(z_ik))  -  s x_i . (sum_k W_ik m_k v_k)  -  bias sum_k W_ik m_k
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.objectives.loss import (
    AllReduce,
    as_operands,
    check_shapes,
    one_rank,
    positive_weights,
    scalar_like,
    stores_logits,
)
from unicl_fast.objectives.loss_tiled import TorchTiles, add_product
from unicl_fast.objectives.operands import LossForm
from unicl_fast.objectives.positives import Membership, Positives, find_positives
from unicl_fast.system.gradients import first_only


def sigmoid_contrastive_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"] | Membership,
    scale: Float[Tensor, ""] | float,
    bias: Float[Tensor, ""] | float,
    *,
    text_class_ids: Int[Tensor, " u"] | None = None,
    text_counts: Int[Tensor, " u"] | None = None,
    form: LossForm = "auto",
    all_reduce: AllReduce = one_rank,
) -> Float[Tensor, ""]:
    """The sigmoid form: each image-text pair is a positive one or not.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, with any number
    of positives. With logits z_ik = s x_i.v_k + bias, m_k samples that have text k, and pair
    weights W_ik, it is the cross-entropy of sigmoid(z_ik) against W_ik:

        L = 1/b sum_ik m_k ( log(1 + exp(z_ik)) - W_ik z_ik )

    All classes distinct is SigLIP's loss.

    Args:
        image_features: of unit norm.
        text_features: of unit norm, the distinct texts.
        class_ids: any int64; or a `Membership`, for several labels an image.
        scale: factor of the products, exp(logit_scale).
        bias: added to all logits.
        text_class_ids: None means `class_ids`, one text for each image; not for a `Membership`.
        text_counts: how many samples have each text; None means 1.
        form: "dense", "tiled" or "auto", as for `unified_contrastive_loss`.
        all_reduce: receives only the images' mean loss, since rows need nothing of other ranks.

    Returns:
        A scalar of the type that `unified_contrastive_loss` returns.

    Raises:
        ValueError: shapes that do not fit together, or "triton", which has no sigmoid kernels.
    """
    if form == "triton":
        raise ValueError(
            "form triton has kernels for the softmax form only: set auto, dense or tiled"
        )
    b, u = len(image_features), len(text_features)
    text_class_ids = check_shapes(
        image_features, text_features, class_ids, text_class_ids, text_counts
    )
    dense = stores_logits(form, b * u, image_features.device.type)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts, arithmetic = as_operands(image_features, text_features, dense=dense)
        scale, bias = (scalar_like(images, one, arithmetic) for one in (scale, bias))
        counts = None if text_counts is None else text_counts.to(arithmetic)
        if dense:
            weights = positive_weights(class_ids, text_class_ids, b, u, arithmetic)
            logits = scale * (images @ texts.T) + bias
            pairs = F.softplus(logits, threshold=40) - weights * logits
            losses = pairs.sum(dim=1) if counts is None else pairs @ counts
        else:
            positives = find_positives(class_ids, text_class_ids, b, u, dtype=arithmetic)
            losses = TiledSigmoid.apply(images, texts, scale, bias, counts, *positives)  # type: ignore[no-untyped-call]
        return all_reduce(None, losses.mean())[1]


class TiledSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        counts: Tensor | None,
        positives: Positives,
        transposed: Positives,
    ) -> Tensor:
        """The loss of each image [b]; operands as for `TiledStatistics`."""
        ones = scale.new_ones(len(texts), 1)
        weights = ones.squeeze(1) if counts is None else counts
        row_weights = positives.times(ones, counts).squeeze(1)
        losses = positives.times(texts.to(scale.dtype), counts).mul_(images).sum(dim=1)
        losses.mul_(scale).addcmul_(row_weights, bias).neg_()
        for rows, columns, logits, scratch in TorchTiles(images, texts, scale, None):
            # log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)), which never overflows
            torch.abs(logits.add_(bias), out=scratch)
            scratch.neg_().exp_().log1p_().add_(logits.clamp_(min=0))
            losses[rows] += scratch @ weights[columns]
        ctx.save_for_backward(images, texts, scale, bias, counts, row_weights)
        ctx.positives, ctx.transposed = positives, transposed
        return losses

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With g_i the gradient of a loss, z_ik has g_i m_k (sigmoid(z_ik) - W_ik)."""
        images, texts, scale, bias, counts, row_weights = ctx.saved_tensors
        wide = texts.to(scale.dtype)
        grad_images = ctx.positives.times(wide, counts).mul_(-grad.unsqueeze(1))
        wide = images.to(scale.dtype)
        grad_texts = ctx.transposed.times(wide, grad).neg_()
        if counts is not None:
            grad_texts.mul_(counts.unsqueeze(1))
        wide = None
        grad_bias = -(grad * row_weights).sum()
        narrow = images.dtype != scale.dtype
        for rows, columns, logits, _ in TorchTiles(images, texts, scale, None):
            gradient = logits.add_(bias).sigmoid_().mul_(grad[rows].unsqueeze(1))
            if counts is not None:
                gradient.mul_(counts[columns])
            grad_bias += gradient.sum()
            if narrow:
                gradient = gradient.to(images.dtype)
            add_product(grad_images[rows], gradient, texts[columns])
            add_product(grad_texts[columns], gradient.T, images[rows])
        grad_scale = (grad_images * images).sum()  # the logits are products of all three
        grad_images = grad_images.mul_(scale).to(images.dtype)
        grad_texts = grad_texts.mul_(scale).to(texts.dtype)
        return grad_images, grad_texts, grad_scale, grad_bias, None, None, None
