"""Tries the Triton window attention against timm's before `auto` chooses it.

`gpu_kernels.fault_in_trial` runs it, with the presets' windows, several for each program, so that
the kernels are the ones of training. On a GPU the number of programs is too: the wrong code that
ptxas 12.8 produced for other kernels failed only now and then, among thousands of programs.
"""

import copy
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from unicl_fast.system.gpu_kernels import check_close

_SIDE, _WINDOW, _HEADS = 14, 7, 2
_IMAGES, _PROGRAMS, _TIMES = {"cuda": 512, "cpu": 2}, {"cpu": 2}, {"cuda": 20, "cpu": 1}
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors, ten times the rounding errors (timm's attention has them too)."""


def try_out(device: torch.device, dtype_name: str) -> None:
    """Raises ArithmeticError if results or gradients in one type are wrong, shifted or not."""
    from unicl_fast.models import window_attention  # imports triton

    dtype: torch.dtype = getattr(torch, dtype_name)
    kind = device.type
    window_attention.PROGRAMS = _PROGRAMS.get(kind, window_attention.PROGRAMS)
    torch.manual_seed(0)
    dim = _HEADS * window_attention.LARGEST_HEAD
    for shift in (0, _WINDOW // 2):
        block = SwinTransformerBlock(
            dim, (_SIDE, _SIDE), _HEADS, window_size=_WINDOW, shift_size=shift
        )
        nn.init.normal_(block.attn.relative_position_bias_table)
        x, grad = torch.randn(2, _IMAGES[kind], _SIDE, _SIDE, dim).to(device, dtype)
        block = block.to(device, dtype)
        exact = attention_and_gradients(copy.deepcopy(block).double(), x.double(), grad.double())
        window_attention.fuse(block)
        for _ in range(_TIMES[kind]):
            found = attention_and_gradients(block, x, grad)
            for name, ours in found.items():
                what = f"{name}, shifted by {shift},"
                check_close(ours, exact[name], what=what, tolerance=_TOLERANCES[dtype])


def attention_and_gradients(
    block: Any, x: Tensor, grad: Tensor, *, autocast: bool = False
) -> dict[str, Tensor]:
    """A Swin block's attention, and its gradients of x [b h w d] and of trained parameters."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        mixed = block._attn(x)
    learnt = {name: one for name, one in sorted(block.attn.named_parameters()) if one.requires_grad}
    learnt = {"its input": x, **learnt}
    gradients = torch.autograd.grad(mixed, list(learnt.values()), grad.to(mixed.dtype))
    names = [f"the gradient of {name}" for name in learnt]
    return {"the attention": mixed.detach(), **dict(zip(names, gradients, strict=True))}
