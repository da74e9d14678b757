"""Window attention in Triton, tried against timm's before `auto` takes it.

`gpu_kernels.fault_in_trial` runs it. Windows are those of the presets, several for each program; so
the kernels are those of training. On a GPU there are as many programs, too: the wrong code that
ptxas 12.8 has made of others' kernels failed now and then, among thousands of programs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from unicl_fast.system.gpu_kernels import check_close

_SIDE, _WINDOW, _HEADS = 14, 7, 2
_IMAGES, _PROGRAMS, _TIMES = {"cuda": 512, "cpu": 2}, {"cpu": 2}, {"cuda": 20, "cpu": 1}
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors ten times those that rounding makes, in timm's attention as well."""


def try_out(device: torch.device, dtype_name: str) -> None:
    """Compares results and gradients of windows in one type, shifted and not.

    Raises:
        ArithmeticError: they are off by more than rounding explains.
    """
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
    """The attention of a block of Swin, and its gradients of x [b h w d] and of what is trained."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        mixed = block._attn(x)
    learnt = {name: one for name, one in sorted(block.attn.named_parameters()) if one.requires_grad}
    learnt = {"its input": x, **learnt}
    gradients = torch.autograd.grad(mixed, list(learnt.values()), grad.to(mixed.dtype))
    names = [f"the gradient of {name}" for name in learnt]
    return {"the attention": mixed.detach(), **dict(zip(names, gradients, strict=True))}
