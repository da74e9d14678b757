"""Statistics of the logits from tiles that are computed, used and overwritten.

They need O((b + u) d) memory; backward computes the products again. `TorchTiles` uses torch
operations on any device, `loss_triton.py` kernels. Exponentials have base 2: the scale includes the
factor log2(e), and `exp2` costs a third of `exp` on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unicl_fast.objectives.positives import Positives
from unicl_fast.system.gradients import first_only

_LOG2_E = 1 / math.log(2)
LARGEST_TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits of a tile. On the CPU two fp32 tiles (8 MiB) fit the L3 cache while products run at full
rate. On a GPU tiles only bound memory, and large ones keep it busy."""
_LONGEST_SIDE = {"cpu": 1024}
"""Rows or columns of a tile. On the CPU longer tiles of narrow logits were up to 17 % slower
(65,536 x 64). A GPU has no limit, since each tile costs two dozen launches."""


class TiledStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        counts: Tensor | None,
        positives: Positives,
        transposed: Positives,
        tiles_type: type[Tiles],
        with_columns: bool,
    ) -> tuple[Tensor, ...]:
        """Computes statistics of each image [b] and text [u], differentiable in all features.

        Features are fp64, fp32 or bf16. bf16 matrix products have bf16 results, which is twice as
        fast; everything else is fp32 then. `positives` is W, `transposed` W^T.

        Returns:
            log sum_k m_k exp(s x_i.v_k) and sum_k W_ik m_k s x_i.v_k of each image i; with
            `with_columns` also log sum_i exp(s x_i.v_k) and sum_i W_ik s x_i.v_k of each text k,
            which are most of the work if there are many more texts than images.
        """
        tiles = tiles_type(images, texts, scale * _LOG2_E, counts)
        row_logs, column_logs = tiles.log2_sum_exps(with_columns=with_columns)
        dtype = scale.dtype
        row_positives = positives.times(texts.to(dtype), counts).mul_(images).sum(dim=1)
        ctx.save_for_backward(images, texts, scale, counts, row_logs, column_logs)
        ctx.positives, ctx.transposed, ctx.tiles_type = positives, transposed, tiles_type
        of_rows = row_logs / _LOG2_E, row_positives.mul_(scale)
        if not with_columns:
            return of_rows
        column_positives = transposed.times(images.to(dtype)).mul_(texts).sum(dim=1)
        return *of_rows, column_logs / _LOG2_E, column_positives.mul_(scale)

    @staticmethod
    @first_only
    def backward(
        ctx: Any,
        grad_row_logs: Tensor,
        grad_row_sums: Tensor,
        grad_column_logs: Tensor | None = None,
        grad_column_sums: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """With G the gradient of the logits: s G V, s G^T X, and sum_i x_i . (G V)_i."""
        images, texts, scale, counts, row_logs, column_logs = ctx.saved_tensors
        positives, transposed = ctx.positives, ctx.transposed
        want_images, want_texts, want_scale = ctx.needs_input_grad[:3]
        want_images |= want_scale
        grad_images = grad_texts = grad_scale = None
        # positives first: their class sums are freed before the tiles
        if want_images:
            wide = texts.to(scale.dtype)
            grad_images = positives.times(wide, counts).mul_(grad_row_sums.unsqueeze(1))
            if grad_column_sums is not None:
                grad_images += positives.times(wide, grad_column_sums)
        if want_texts:
            wide = images.to(scale.dtype)
            grad_texts = transposed.times(wide, grad_row_sums)
            if counts is not None:
                grad_texts.mul_(counts.unsqueeze(1))
            if grad_column_sums is not None:
                grad_texts += transposed.times(wide).mul_(grad_column_sums.unsqueeze(1))
        wide = None
        tiles = ctx.tiles_type(images, texts, scale * _LOG2_E, counts)
        of_logs = row_logs, column_logs, grad_row_logs, grad_column_logs
        for rows, columns, gradient in tiles.gradients(*of_logs):
            if grad_images is not None:
                add_product(grad_images[rows], gradient, texts[columns])
            if grad_texts is not None:
                add_product(grad_texts[columns], gradient.T, images[rows])
        if grad_images is not None:
            grad_scale = (grad_images * images).sum() if want_scale else None
            grad_images = grad_images.mul_(scale).to(images.dtype)
        if grad_texts is not None:
            grad_texts = grad_texts.mul_(scale).to(texts.dtype)
        return grad_images, grad_texts, grad_scale, None, None, None, None, None


class Tiles:
    """The products of features and `factor` by tile: base-2 logits for the factor s log2(e)."""

    def __init__(
        self, images: Tensor, texts: Tensor, factor: Tensor, counts: Tensor | None
    ) -> None:
        self.images, self.texts, self.factor = images, texts, factor
        self.log2_counts = None if counts is None else counts.log2()
        self.rows, self.columns = _blocks(len(images), len(texts), images.device.type)

    def log2_sum_exps(
        self, *, with_columns: bool = True
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " u"]]:
        """Computes log2 of the sums of 2**logit, of rows with counts and of columns without.

        Columns mean nothing without `with_columns`.
        """
        raise NotImplementedError

    def gradients(
        self,
        row_logs: Float[Tensor, " b"],
        column_logs: Float[Tensor, " u"],
        grad_row_logs: Float[Tensor, " b"],
        grad_column_logs: Float[Tensor, " u"] | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields rows, columns, and the gradient of their logits [r c] through the log-sum-exps.

        The logs come from `log2_sum_exps`; the columns' are read only if they have a gradient. A
        yielded gradient has the features' type, and is valid until the next one.
        """
        raise NotImplementedError


class TorchTiles(Tiles):
    """Tiles by torch operations, in memory reused for every tile."""

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        size = self.rows[0].stop * self.columns[0].stop  # the first ones are the largest
        self._logits = self.factor.new_empty(size)
        self._scratch = self.factor.new_empty(size)
        wide = self.images.dtype == self.factor.dtype
        self._narrow = None if wide else self.images.new_empty(size)
        self._rounds = _multiplies_in_tf32(self.images)
        if self._rounds:
            self.texts = round_to_tf32(self.texts)

    def log2_sum_exps(self, *, with_columns: bool = True) -> tuple[Tensor, Tensor]:
        lowest = torch.finfo(self.factor.dtype).min  # finite: infinities are never subtracted
        row_maxima = self.factor.new_full((len(self.images),), lowest)
        column_maxima = self.factor.new_full((len(self.texts),), lowest)
        row_sums, column_sums = torch.zeros_like(row_maxima), torch.zeros_like(column_maxima)
        for rows, columns, logits, scratch in self:
            if with_columns:
                _accumulate(logits, scratch, 0, column_maxima[columns], column_sums[columns])
            if self.log2_counts is not None:
                logits.add_(self.log2_counts[columns])
            _accumulate(logits, scratch, 1, row_maxima[rows], row_sums[rows])
        return row_maxima + row_sums.log2(), column_maxima + column_sums.log2()

    def gradients(
        self,
        row_logs: Tensor,
        column_logs: Tensor,
        grad_row_logs: Tensor,
        grad_column_logs: Tensor | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        for rows, columns, logits, scratch in self:
            # scratch = g_i m_k exp(logit - log-sum-exp_i) + h_k exp(logit - log-sum-exp_k)
            torch.sub(logits, row_logs[rows].unsqueeze(1), out=scratch)
            if self.log2_counts is not None:
                scratch.add_(self.log2_counts[columns])
            scratch.exp2_().mul_(grad_row_logs[rows].unsqueeze(1))
            if grad_column_logs is not None:
                of_columns = logits.sub_(column_logs[columns]).exp2_()
                scratch.addcmul_(of_columns, grad_column_logs[columns])
            if self._narrow is None:
                yield rows, columns, scratch
            else:
                yield rows, columns, _shaped(self._narrow, scratch.shape).copy_(scratch)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields rows, columns, their logits [r c] to overwrite, and scratch [r c]."""
        for rows in self.rows:
            images = self.images[rows]
            if self._narrow is None:  # in 16 bits this would round once more
                images = images * self.factor
            if self._rounds:
                images = round_to_tf32(images)
            for columns in self.columns:
                texts = self.texts[columns]
                shape = len(images), len(texts)
                logits = _shaped(self._logits, shape)
                if self._narrow is None:
                    torch.mm(images, texts.T, out=logits)
                else:
                    narrow = torch.mm(images, texts.T, out=_shaped(self._narrow, shape))
                    logits.copy_(narrow).mul_(self.factor)
                yield rows, columns, logits, _shaped(self._scratch, shape)


def allows_tf32() -> bool:
    """Whether torch may multiply fp32 in TF32, with 10 fraction bits, on a CUDA device."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9 and up
    return bool(matmul.allow_tf32 if setting is None else setting == "tf32")


def _multiplies_in_tf32(features: Tensor) -> bool:
    return features.is_cuda and features.dtype == torch.float32 and allows_tf32()


def round_to_tf32(features: Tensor) -> Tensor:
    """Rounds fp32 to the nearest TF32 number; non-finite values stay non-finite.

    An H100's tensor cores truncate the 13 bits that TF32 lacks. That shrinks all logits, but not
    the exact sums of positives: emulated, well-fitted pairs have a loss of -0.07 at scale 100.
    """
    shifted = features * (2**13 + 1)  # Veltkamp's splitting
    return shifted - (shifted - features)


def _accumulate(logits: Tensor, scratch: Tensor, dim: int, maxima: Tensor, sums: Tensor) -> None:
    """Rescales running sums to the new maxima and adds a tile's exponentials."""
    grown = torch.maximum(maxima, logits.amax(dim))
    sums.mul_((maxima - grown).exp2_())
    maxima.copy_(grown)
    sums.add_(torch.sub(logits, grown.unsqueeze(dim), out=scratch).exp2_().sum(dim))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _blocks(num_rows: int, num_columns: int, device: str) -> tuple[list[slice], list[slice]]:
    """Rows and columns of tiles of nearly equal size, as few as the device's limits allow."""
    area = LARGEST_TILE.get(device, LARGEST_TILE["cuda"])
    longest = _LONGEST_SIDE.get(device, max(num_rows, num_columns))
    rows = min(num_rows, math.isqrt(area))
    columns = min(num_columns, area // rows, longest)
    rows = min(num_rows, area // columns, longest)
    return _parts(num_rows, rows), _parts(num_columns, columns)


def _parts(size: int, largest: int) -> list[slice]:
    count = -(-size // largest)
    length = -(-size // count)
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def _shaped(memory: Tensor, shape: Sequence[int]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
