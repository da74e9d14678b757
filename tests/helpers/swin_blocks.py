"""Swin's blocks for tests of window attention, and how near their attention is to timm's."""

import copy
from typing import Any

import torch
from interpreted_kernels import Compute, attention_and_gradients
from timm.models.swin_transformer import SwinTransformerBlock

# fp32: 8 units in the last place. A random search of windows found 6.6 where timm's sums, which are
# in another order, had 4.2.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""A relative error that the kernels may have, even if timm's is smaller."""


def build_block(
    size: tuple[int, int], *, window: Any = 7, shift: int = 0, heads: int = 2, head_width: int = 32
) -> SwinTransformerBlock:
    """A block for maps of this size, with a bias that matters, as that of a trained one does."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(
        heads * head_width, size, heads, window_size=window, shift_size=shift
    )
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.nn.init.normal_(block.attn.qkv.bias)
    return block


def check_against_timm(
    compute: Compute, block: SwinTransformerBlock, size: tuple[int, int], *, images: int = 2,
    dtype: torch.dtype = torch.float32, autocast: bool = False,
) -> None:  # fmt: skip
    """The output and gradients of x and all weights: against timm in fp64, as close as timm's."""
    x, grad = torch.randn(2, images, *size, block.dim)
    block, x = block.to(dtype), x.to(dtype)
    call = attention_and_gradients, block, x, grad
    ours, theirs = (compute(*call, fused=fused, autocast=autocast) for fused in (True, False))
    wide = copy.deepcopy(block).double(), x.double(), grad.double()
    rounding = ROUNDING[torch.bfloat16 if autocast else dtype]
    for our, their, exact in zip(
        ours, theirs, attention_and_gradients(*wide, fused=False), strict=True
    ):
        assert our.dtype == their.dtype
        our_error, their_error = (float((x.double() - exact).norm()) for x in (our, their))
        assert our_error <= max(1.5 * their_error, rounding * float(exact.norm()))
