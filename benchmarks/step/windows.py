"""Window attention of Swin-T's four widths, forward and backward in bf16: timm's, and our kernels.

On a GPU with Triton both are compared first; elsewhere there is only timm's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from unicl_fast.models.compilation import fuse_window_attention

from ..harness import Figures, printed, rate_of, ratio_of, take_turns

_WIDTHS_AND_SIDES = ((96, 56), (192, 28), (384, 14), (768, 7))
_LARGEST_GAP = 0.05
"""Relative difference that the rounding of bf16 may cause."""


def measure_windows(batch_size: int, *, device: torch.device, rounds: int) -> Figures:
    """Images/s of each width; RuntimeError if results or gradients of the two differ."""
    figures: Figures = {}
    generator = torch.Generator().manual_seed(0)
    for width, side in _WIDTHS_AND_SIDES:
        block = SwinTransformerBlock(width, (side, side), width // 32, window_size=7, shift_size=3)
        block.to(device)
        shape = batch_size, side, side, width
        x, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        works = {"timm": functools.partial(_attend, block, x, grad)}
        if device.type == "cuda" and find_spec("triton") is not None:
            fused = copy.deepcopy(block)
            fuse_window_attention(fused)
            works["triton"] = functools.partial(_attend, fused, x, grad)
            compare(width, works["timm"], works["triton"])
        turns = take_turns(works, rounds=rounds, device_type=device.type)
        for name, taken in turns.items():
            figures[f"windows of {width} values, {name}, images/s"] = rate_of(taken, batch_size)
        if "triton" in turns:
            figures[f"windows of {width} values, ratio"] = ratio_of(turns, "timm", "triton")
    return printed(figures)


def _attend(block: SwinTransformerBlock, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output in bf16, and gradients of x and the weights."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        mixed = block._attn(x)
    weights = block.attn.parameters()
    return [mixed.detach(), *torch.autograd.grad(mixed, [x, *weights], grad.to(mixed.dtype))]


def compare(
    width: int, timms: Callable[[], list[Tensor]], ours: Callable[[], list[Tensor]]
) -> None:
    """Raises RuntimeError if a result or a gradient differs by more than bf16 rounds."""
    gap = max(
        float((our.float() - their.float()).norm() / their.float().norm())
        for our, their in zip(ours(), timms(), strict=True)
    )
    print(f"windows of {width} values: ours differ from timm's by {gap:.1e} of the norm")
    if not gap < _LARGEST_GAP:
        raise RuntimeError(f"windows of {width} values differ by {gap:.2g}; nothing was timed")
