"""The tiles of `loss_tiled.py` as two Triton kernels, for NVIDIA GPUs of capability 8.0 and up.

Only gradients of logits pass through memory, written once and read twice. Keeping them on the chip
would recompute each logit for every 128 or 256 values of a feature, as no more sums fit into
registers; atomic additions would make sums depend on their order. Importing this imports triton.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.objectives.loss_tiled import Tiles, allows_tf32, round_to_tf32
from unicl_fast.system.gpu_kernels import fenced_stages

# torch.finfo(torch.float32).min, for fp64 too: not -inf, so that infinities are never subtracted
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# rows of blocks whose images and texts stay in the L2 cache together
_GROUP = tl.constexpr(8)


class Blocks(NamedTuple):
    """A program computes height x width logits, from depth feature values at a time."""

    height: int
    width: int
    depth: int
    num_warps: int
    num_stages: int


BLOCKS = {
    torch.bfloat16: Blocks(128, 128, 64, num_warps=8, num_stages=3),
    torch.float32: Blocks(128, 64, 32, num_warps=8, num_stages=3),
    torch.float64: Blocks(64, 64, 16, num_warps=8, num_stages=2),
}
"""By feature type. A test compiles them and checks shared memory and spilled registers."""


def blocks_for(dtype: torch.dtype, *, capability: int) -> Blocks:
    """The blocks for features of a type on a device; `capability` is 90 for 9.0."""
    blocks, version = BLOCKS[dtype], triton.__version__
    stages = fenced_stages(blocks.num_stages, capability=capability, version=version)
    return blocks._replace(num_stages=stages)


class TritonTiles(Tiles):
    """Tiles of logits that never leave the chip."""

    def __init__(self, images: Tensor, texts: Tensor, *rest: Any) -> None:
        precision = _precision(images.dtype)
        if precision == "tf32":
            images, texts = round_to_tf32(images), round_to_tf32(texts)
        super().__init__(_aligned(images), _aligned(texts), *rest)
        if images.device.type != "cuda" and isinstance(_sum_exps, triton.JITFunction):
            raise ValueError(
                f"the loss in Triton computes on a CUDA device, not on {images.device.type}; "
                "use form (efficiency.loss) auto, dense or tiled there"
            )
        if self.log2_counts is not None:
            self.log2_counts.clamp_(min=_LOWEST.value)
        major, minor = torch.cuda.get_device_capability(images.device) if images.is_cuda else (8, 0)
        blocks = blocks_for(images.dtype, capability=10 * major + minor)
        self._options = {**blocks._asdict(), "precision": precision}
        self._blocks = blocks

    def log2_sum_exps(self, *, with_columns: bool = True) -> tuple[Tensor, Tensor]:
        b, u, (height, width, *_) = len(self.images), len(self.texts), self._blocks
        by_rows = self.factor.new_empty(triton.cdiv(u, width), b)
        if not with_columns:
            self._launch(_sum_exps, slice(0, b), slice(0, u), by_rows, None)
            return _join(by_rows), self.factor.new_zeros(u)
        by_columns = self.factor.new_empty(triton.cdiv(b, height), u)
        self._launch(_sum_exps, slice(0, b), slice(0, u), by_rows, by_columns)
        return _join(by_rows), _join(by_columns)

    def gradients(
        self,
        row_logs: Tensor,
        column_logs: Tensor,
        grad_row_logs: Tensor,
        grad_column_logs: Tensor | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        of_rows = torch.stack([row_logs, grad_row_logs])
        of_columns = None
        if grad_column_logs is not None:
            of_columns = torch.stack([column_logs, grad_column_logs])
        memory = self.images.new_empty(self.rows[0].stop * self.columns[0].stop)
        for rows in self.rows:
            for columns in self.columns:
                height, width = rows.stop - rows.start, columns.stop - columns.start
                gradient = memory[: height * width].view(height, width)
                self._launch(
                    _logit_gradients,
                    rows,
                    columns,
                    of_rows[:, rows].contiguous(),
                    None if of_columns is None else of_columns[:, columns].contiguous(),
                    gradient,
                )
                yield rows, columns, gradient

    def _launch(self, kernel: Any, rows: slice, columns: slice, *operands: Tensor | None) -> None:
        """Runs a kernel on the logits of these rows and columns."""
        images, texts = self.images[rows], self.texts[columns]
        counts = None if self.log2_counts is None else self.log2_counts[columns]
        height, width, *_ = self._blocks
        programs = triton.cdiv(len(images), height) * triton.cdiv(len(texts), width)
        with torch.cuda.device_of(images):
            kernel[(programs,)](
                images,
                texts,
                self.factor,
                counts,
                *operands,
                len(images),
                len(texts),
                images.shape[1],
                **self._options,
            )


def _aligned(features: Tensor) -> Tensor:
    """Pads to 16 values, so that kernels copy 16 bytes at once: otherwise they lack registers."""
    missing = -features.shape[1] % 16
    return F.pad(features, (0, missing)) if missing else features.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply fp32: in three TF32 parts, or in one if torch may use TF32."""
    return "ieee" if dtype != torch.float32 else "tf32" if allows_tf32() else "tf32x3"


def _join(logs: Tensor) -> Tensor:
    """log2 of the sum of 2**log over the first dimension."""
    highest = logs.amax(0)
    return highest + (logs - highest).exp2_().sum(0).log2_()


@triton.jit
def _tile(
    images: tl.tensor,
    texts: tl.tensor,
    factor: tl.tensor,
    b: tl.tensor,
    u: tl.tensor,
    d: tl.tensor,
    precision: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
) -> tl.tensor:
    """This program's rows, columns, base-2 logits, and which of them exist."""
    row_blocks, column_blocks = tl.cdiv(b, height), tl.cdiv(u, width)
    program = tl.program_id(0)
    row, column = tl.swizzle2d(
        program // column_blocks, program % column_blocks, row_blocks, column_blocks, _GROUP
    )
    rows, columns = row * height + tl.arange(0, height), column * width + tl.arange(0, width)
    of_images = images + rows.to(tl.int64)[:, None] * d
    of_texts = texts + columns.to(tl.int64)[None, :] * d
    scale = tl.load(factor)
    logits = tl.zeros((height, width), dtype=scale.dtype)
    for start in range(0, d, depth):
        k = start + tl.arange(0, depth)
        left = tl.load(of_images + k[None, :], mask=(rows < b)[:, None] & (k < d)[None, :], other=0)
        right = tl.load(
            of_texts + k[:, None], mask=(columns < u)[None, :] & (k < d)[:, None], other=0
        )
        logits = tl.dot(left, right, logits, input_precision=precision, out_dtype=scale.dtype)
    exists = (rows < b)[:, None] & (columns < u)[None, :]
    return row, column, rows, columns, logits * scale, exists


@triton.jit
def _log2_sum_exp(logits: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    highest = tl.max(logits, axis)
    exps = tl.exp2(logits - tl.expand_dims(highest, axis))
    return highest + tl.log2(tl.sum(exps, axis))


@triton.jit(do_not_specialize=["b", "u"])
def _sum_exps(
    images: tl.tensor,
    texts: tl.tensor,
    factor: tl.tensor,
    counts: tl.tensor,
    by_rows: tl.tensor,
    by_columns: tl.tensor,
    b: tl.tensor,
    u: tl.tensor,
    d: tl.tensor,
    precision: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Stores log2-sum-exps of a tile: by_rows [column blocks, b], by_columns [row blocks, u]."""
    row, column, rows, columns, logits, exists = _tile(
        images, texts, factor, b, u, d, precision, height, width, depth
    )
    logits = tl.where(exists, logits, _LOWEST)
    # rows before columns: in the other order a B200 runs short of registers
    weighted = logits
    if counts is not None:
        weighted += tl.load(counts + columns, mask=columns < u, other=0)[None, :]
    of_rows = by_rows + column.to(tl.int64) * b + rows
    tl.store(of_rows, _log2_sum_exp(weighted, 1), mask=rows < b)
    if by_columns is not None:
        of_columns = by_columns + row.to(tl.int64) * u + columns
        tl.store(of_columns, _log2_sum_exp(logits, 0), mask=columns < u)


@triton.jit(do_not_specialize=["b", "u"])
def _logit_gradients(
    images: tl.tensor,
    texts: tl.tensor,
    factor: tl.tensor,
    counts: tl.tensor,
    of_rows: tl.tensor,
    of_columns: tl.tensor,
    gradient: tl.tensor,
    b: tl.tensor,
    u: tl.tensor,
    d: tl.tensor,
    precision: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Stores g_i m_k exp(logit - log-sum-exp_i) + h_k exp(logit - log-sum-exp_k) in [b, u].

    `of_rows` [2, b] are the log-sum-exps and their gradients g; `of_columns` [2, u] likewise with
    h, or None if columns have no gradients.
    """
    _, _, rows, columns, logits, exists = _tile(
        images, texts, factor, b, u, d, precision, height, width, depth
    )
    row_logs = tl.load(of_rows + rows, mask=rows < b, other=0)[:, None]
    grad_row_logs = tl.load(of_rows + b + rows, mask=rows < b, other=0)[:, None]
    total = tl.zeros_like(logits)
    if of_columns is not None:
        column_logs = tl.load(of_columns + columns, mask=columns < u, other=0)[None, :]
        grad_column_logs = tl.load(of_columns + u + columns, mask=columns < u, other=0)[None, :]
        total = grad_column_logs * tl.exp2(logits - column_logs)
    if counts is not None:
        logits += tl.load(counts + columns, mask=columns < u, other=0)[None, :]
    total += grad_row_logs * tl.exp2(logits - row_logs)
    where = gradient + rows.to(tl.int64)[:, None] * u + columns[None, :]
    # without the choice of 0 a B200 runs short of registers
    tl.store(where, tl.where(exists, total, 0).to(gradient.dtype.element_ty), mask=exists)
