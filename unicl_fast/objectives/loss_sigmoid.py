"""The sigmoid form from tiles that are computed, used and overwritten: none is stored.

The loss of an image is a sum over its row, and the row's positives are again class sums:

    sum_k m_k log(1 + exp(z_ik))  -  s u_i . (sum_k W_ik m_k v_k)  -  bias sum_k W_ik m_k

so memory is O((b + u) d) as in `loss_tiled.py`, whose tiles these are; the backward pass multiplies
them again. No row or column is normalised: there are no maxima, and one exponential for each logit
and pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unicl_fast.objectives.loss_tiled import TorchTiles, add_product
from unicl_fast.objectives.positives import Positives


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
        """Computes the loss of each image [b], differentiable in features, scale and bias.

        Types are those of `TiledStatistics`; `positives` is W, `transposed` W^T, of weights of at
        most 1.
        """
        ones = scale.new_ones(len(texts), 1)
        weights = ones.squeeze(1) if counts is None else counts
        row_weights = positives.times(ones, counts).squeeze(1)
        losses = positives.times(texts.to(scale.dtype), counts).mul_(images).sum(dim=1)
        losses.mul_(scale).addcmul_(row_weights, bias).neg_()
        for rows, columns, logits, scratch in TorchTiles(
            images, texts, scale, None, exclude_self=False
        ):
            # log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)), which never overflows
            torch.abs(logits.add_(bias), out=scratch)
            scratch.neg_().exp_().log1p_().add_(logits.clamp_(min=0))
            losses[rows] += scratch @ weights[columns]
        ctx.save_for_backward(images, texts, scale, bias, counts, row_weights)
        ctx.positives, ctx.transposed = positives, transposed
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of features, scale and bias.

        With g_i the gradient of an image's loss, that of a logit is
        G_ik = g_i m_k (sigmoid(z_ik) - W_ik), and the features' are s G V and s G^T X.
        """
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
        for rows, columns, logits, _ in TorchTiles(images, texts, scale, None, exclude_self=False):
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
