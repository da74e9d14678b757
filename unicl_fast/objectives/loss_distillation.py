"""Distillation: what images and texts have to do with each other, learnt from a teacher.

Vasu et al., "MobileCLIP", arXiv 2311.17049. A teacher's features y of the same images and w of the
same texts were stored; the student's are u and v. In the affinity form the student's matrix is
compared with the teacher's, rows and columns as distributions:

    p_i = softmax_k( t y_i.w_k )        q_i = softmax_k( s u_i.v_k )
    L_i2t = 1/n sum_i KL(p_i || q_i)    L_t2i = the same of columns    L = (L_i2t + L_t2i) / 2

That is the unified loss with the teacher's probabilities as the weights of positives, less their
entropy: so it has the same statistics of rows and columns, which the same `all_reduce` completes,
and `TiledAffinities` makes them from tiles of both matrices, of which none is stored.

The widths of student and teacher may differ, as only products are compared. The feature form
compares the features themselves, through a learnt projection.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unicl_fast.config import LossForm
from unicl_fast.objectives.loss import (
    AllReduce,
    LogitStatistics,
    as_operands,
    one_rank,
    stores_logits,
)
from unicl_fast.objectives.loss_tiled import LOG2_E, TorchTiles, add_product


def affinity_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    teacher_images: Float[Tensor, "b t"],
    teacher_texts: Float[Tensor, "u t"],
    scale: Float[Tensor, ""] | float,
    teacher_scale: float,
    *,
    text_counts: Int[Tensor, " u"] | None = None,
    exclude_self: bool = False,
    form: LossForm = "auto",
    all_reduce: AllReduce = one_rank,
) -> Float[Tensor, ""]:
    """The divergence of the student's affinities from the teacher's, averaged over both directions.

    Args:
        image_features: of unit norm.
        text_features: of unit norm, the distinct texts.
        teacher_images: the teacher's features of the same images, of unit norm, of any type.
        teacher_texts: its features of the same texts.
        scale: factor of the student's products.
        teacher_scale: factor of the teacher's.
        text_counts: how many samples have each text; None means 1.
        exclude_self: the texts are images too, and the first ones these: pairs (i, i) are left out.
            The matrix of all images is symmetric, so its rows are all.
        form: "dense" holds both matrices [b u]; "tiled" multiplies them three times and holds
            O((b + u) (d + t)), as "triton" does, which has no kernels for it; "auto" takes what
            the size asks for.
        all_reduce: as for `unified_contrastive_loss`.

    Returns:
        A scalar, in fp64 if features are, else in fp32; 0 where the matrices agree. It is
        differentiable in the student's features and scale.
    """
    num_logits = len(image_features) * len(text_features)
    dense = stores_logits(form, num_logits, image_features.device.type)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts, arithmetic = as_operands(image_features, text_features, dense=dense)
        scale = torch.as_tensor(scale, dtype=arithmetic, device=images.device)
        teacher = Teacher(
            teacher_images.to(arithmetic),
            teacher_texts.to(arithmetic),
            torch.full_like(scale, teacher_scale),  # no number of the host's is copied
            None if text_counts is None else text_counts.to(arithmetic),
            exclude_self=exclude_self,
            dense=dense,
        )
        if not exclude_self:
            zeros = torch.zeros_like(teacher.column_logs)
            known = LogitStatistics(teacher.column_logs, zeros, zeros)
            complete, _ = all_reduce(known, zeros.sum())
            assert complete is not None
            teacher.complete_columns(complete.log_sum_exp)
        rows, columns = teacher.compare(images, texts, scale)
        losses = rows.losses() - teacher.row_logs
        merged, i2t = all_reduce(None if exclude_self else columns, losses.mean())
        if merged is None:
            return i2t
        losses = merged.losses() - teacher.column_logs
        if text_counts is None:
            return (i2t + losses.mean()) / 2
        return (i2t + (text_counts * losses).sum() / text_counts.sum()) / 2


def feature_loss(
    features: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n t"],
    projection: Float[Tensor, "d t"] | None,
    *,
    counts: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """1 - cosine between the student's features, projected, and the teacher's, averaged.

    Args:
        features: the student's.
        teacher: the teacher's, of any type.
        projection: is learnt; None takes features as they are.
        counts: how many samples have each; None means 1.

    Returns:
        A scalar, in fp64 if features are, else in fp32.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if projection is not None:
            features = features @ projection.to(features.dtype)
        distances = 1 - F.cosine_similarity(features, teacher.to(features.dtype), dim=1)
        if counts is None:
            return distances.mean()
        return (counts * distances).sum() / counts.sum()


class Teacher:
    """A teacher's affinities, and how a student's differ from them."""

    def __init__(
        self,
        images: Float[Tensor, "b t"],
        texts: Float[Tensor, "u t"],
        scale: Tensor,
        counts: Tensor | None,
        *,
        exclude_self: bool,
        dense: bool,
    ) -> None:
        self.images, self.texts, self.scale, self.counts = images, texts, scale, counts
        self.exclude_self, self._dense = exclude_self, dense
        if dense:
            self._logits = self._masked(scale * images @ texts.T)
            self.row_logs = self._counted(self._logits).logsumexp(1)
            self.column_logs = self._logits.logsumexp(0)
        else:
            logs = self.tiles().log2_sum_exps()
            self.row_logs, self.column_logs = (one / LOG2_E for one in logs)
        self._own_logs = self.column_logs
        """log sum_i exp(logit) of each text over these images; `column_logs` may be of all."""

    def tiles(self) -> TorchTiles:
        operands = self.images, self.texts, self.scale * LOG2_E, self.counts
        return TorchTiles(*operands, exclude_self=self.exclude_self)

    def complete_columns(self, column_logs: Float[Tensor, " u"]) -> None:
        """Takes the columns' log-sum-exps over the images of all ranks."""
        self.column_logs = column_logs

    def compare(
        self, images: Tensor, texts: Tensor, scale: Tensor
    ) -> tuple[LogitStatistics, LogitStatistics]:
        """Statistics of a student's rows and columns.

        The weights of positives are the teacher's probabilities, and what is summed is the
        difference of the logits, s u_i.v_k - t y_i.w_k: the losses are divergences then, plus the
        teacher's log-sum-exps.
        """
        row_weight = torch.ones_like(self.row_logs)
        column_weight = (self._own_logs - self.column_logs).exp()
        if not self._dense:
            found = TiledAffinities.apply(images, texts, scale, self)  # type: ignore[no-untyped-call]
            row_logs, column_logs, row_sums, column_sums = found
        else:
            logits = self._masked(scale * images @ texts.T)
            difference = logits - self._logits
            row_logs, column_logs = self._counted(logits).logsumexp(1), logits.logsumexp(0)
            weights = (self._counted(self._logits) - self.row_logs.unsqueeze(1)).exp()
            row_sums = (weights * difference).sum(1)
            column_sums = ((self._logits - self.column_logs).exp() * difference).sum(0)
        return (
            LogitStatistics(row_logs, row_sums, row_weight),
            LogitStatistics(column_logs, column_sums, column_weight),
        )

    def _masked(self, logits: Tensor) -> Tensor:
        if not self.exclude_self:
            return logits
        itself = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        return logits.masked_fill(itself, torch.finfo(logits.dtype).min)

    def _counted(self, logits: Tensor) -> Tensor:
        return logits if self.counts is None else logits + self.counts.log()


class TiledAffinities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, teacher: Teacher
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-sum-exps of the student's rows [b] and columns [u], and the sums of `compare`.

        Differentiable in its features and scale; types are those of `TiledStatistics`.
        """
        student = TorchTiles(
            images, texts, scale * LOG2_E, teacher.counts, exclude_self=teacher.exclude_self
        )
        row_logs, column_logs = student.log2_sum_exps()
        row_sums, column_sums = torch.zeros_like(row_logs), torch.zeros_like(column_logs)
        for (rows, columns, logits, _), (_, _, known, scratch) in zip(
            student, teacher.tiles(), strict=True
        ):
            difference = logits.sub_(known)
            if teacher.exclude_self:  # where both are -inf
                difference.nan_to_num_(nan=0.0)
            weights = _row_weights(teacher, known, rows, columns, scratch)
            row_sums[rows] += weights.mul_(difference).sum(1)
            weights = _column_weights(teacher, known, columns)
            column_sums[columns] += weights.mul_(difference).sum(0)
        ctx.save_for_backward(images, texts, scale, row_logs, column_logs)
        ctx.teacher = teacher
        return (
            row_logs / LOG2_E,
            column_logs / LOG2_E,
            row_sums.div_(LOG2_E),
            column_sums.div_(LOG2_E),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_row_logs: Tensor,
        grad_column_logs: Tensor,
        grad_row_sums: Tensor,
        grad_column_sums: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of features and scale, as `TiledStatistics` has them."""
        images, texts, scale, row_logs, column_logs = ctx.saved_tensors
        teacher = ctx.teacher
        grad_images = torch.zeros_like(images, dtype=scale.dtype)
        grad_texts = torch.zeros_like(texts, dtype=scale.dtype)
        student = TorchTiles(
            images, texts, scale * LOG2_E, teacher.counts, exclude_self=teacher.exclude_self
        )
        of_logs = row_logs, column_logs, grad_row_logs, grad_column_logs
        for (rows, columns, gradient), (_, _, known, scratch) in zip(
            student.gradients(*of_logs), teacher.tiles(), strict=True
        ):
            weights = _row_weights(teacher, known, rows, columns, scratch)
            gradient += weights.mul_(grad_row_sums[rows].unsqueeze(1))
            gradient += _column_weights(teacher, known, columns).mul_(grad_column_sums[columns])
            add_product(grad_images[rows], gradient, texts[columns])
            add_product(grad_texts[columns], gradient.T, images[rows])
        grad_scale = (grad_images * images).sum()  # the logits are products of all three
        grad_images = grad_images.mul_(scale).to(images.dtype)
        grad_texts = grad_texts.mul_(scale).to(texts.dtype)
        return grad_images, grad_texts, grad_scale, None


def _row_weights(
    teacher: Teacher, logits: Tensor, rows: slice, columns: slice, scratch: Tensor
) -> Tensor:
    """m_k exp(logit - log-sum-exp_i) of a tile [r c] of the teacher's logits, in `scratch`."""
    torch.sub(logits, LOG2_E * teacher.row_logs[rows].unsqueeze(1), out=scratch)
    if teacher.counts is not None:
        scratch.add_(teacher.counts[columns].log2())
    return scratch.exp2_()


def _column_weights(teacher: Teacher, logits: Tensor, columns: slice) -> Tensor:
    """exp(logit - log-sum-exp_k) of a tile [r c] of the teacher's logits, in their place."""
    return logits.sub_(LOG2_E * teacher.column_logs[columns]).exp2_()
