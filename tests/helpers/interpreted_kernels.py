"""Results of kernels, in a process that interprets Triton on the CPU.

Triton reads TRITON_INTERPRET as it is imported, and torch imports triton: a process that has begun
without the variable cannot turn to it.
"""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch import nn

from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.positives import Membership

Compute = Callable[..., list[torch.Tensor]]
"""Calls a function of this file in the process in which the kernels run."""


def skip_with_old_triton() -> None:
    """Skips a test; before 3.6 the interpreter knows neither NumPy 2.4 nor products in fp64."""
    import triton

    if Version(triton.__version__) < Version("3.6"):  # as torch before 2.10 brings it
        pytest.skip(f"compiles or interprets kernels by Triton 3.6; this is {triton.__version__}")


def call_on(device: str, function: Compute, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    """Calls a function of this file with tensors and modules on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Membership):
            return Membership(*map(move, value))
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(device)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    results = function(*map(move, arguments), **{name: move(x) for name, x in options.items()})
    return [result.cpu() for result in results]


def loss_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, class_ids: Any, scale: float, **arguments: Any
) -> list[torch.Tensor]:
    """The loss, and its gradients of images, texts and scale."""
    wide = torch.promote_types(images.dtype, torch.float32)
    inputs = [x.detach().clone(memory_format=torch.preserve_format) for x in (images, texts)]
    inputs.append(torch.tensor(scale, dtype=wide, device=images.device))
    inputs = [x.requires_grad_() for x in inputs]
    loss = unified_contrastive_loss(*inputs[:2], class_ids, inputs[2], **arguments)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def loss_in_tf32(*call: Any, rounds: bool = True) -> list[torch.Tensor]:
    """The loss and its gradients, with products in TF32."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from unicl_fast.objectives import loss_triton

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        cut_off = [
            TensorHandle((x.data.view("uint32") & 0xFFFFE000).view("float32"), x.dtype)
            for x in (left, right)
        ]
        return multiply(self, *cut_off, *rest)

    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with (
            mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
            mock.patch.object(
                loss_triton,
                "round_to_tf32",
                loss_triton.round_to_tf32 if rounds else torch.Tensor.detach,
            ),
        ):
            return loss_and_gradients(*call, form="triton")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def attention_and_gradients(
    block: nn.Module, x: torch.Tensor, grad: torch.Tensor, *, fused: bool, autocast: bool = False
) -> list[torch.Tensor]:
    """Attention of a Swin block, and its gradients of x and the weights, by name."""
    from unicl_fast.models import window_trial

    block = copy.deepcopy(block)
    if fused:
        from unicl_fast.models.window_attention import blocks_that_fit, fuse

        (fitting,) = blocks_that_fit(block)
        fuse(fitting)
    return list(window_trial.attention_and_gradients(block, x, grad, autocast=autocast).values())


def check_operators(*, shift: int) -> list[torch.Tensor]:
    """Whether torch may trace, compile and differentiate window attention as it is registered."""
    from unicl_fast.models.window_attention import window_attention

    qkv, table = torch.randn(1, 6, 4, 3 * 2 * 16), torch.randn(5 * 3, 2)
    inputs = qkv.requires_grad_(), table.requires_grad_(), [3, 2, shift, shift, 1], 0.25
    torch.library.opcheck(window_attention, inputs)
    return []


def set_up_interpreter() -> None:
    """Blocks of 16 and tiles of 40 x 40, so that small batches have several and ragged ones.

    And five programs for window attention, which have several windows each.
    """
    from unicl_fast.models import window_attention
    from unicl_fast.objectives import loss_tiled, loss_triton

    for dtype in loss_triton.BLOCKS:
        loss_triton.BLOCKS[dtype] = loss_triton.Blocks(16, 16, 16, num_warps=4, num_stages=1)
    loss_tiled.LARGEST_TILE["cpu"] = 40 * 40
    window_attention.PROGRAMS = 5
    _mend_bf16()


def _mend_bf16() -> None:
    """Triton 3.9 interprets bf16 as integers: it multiplies them, and truncates; GPUs round."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        wide = [
            self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (left, right)
        ]
        return multiply(self, *wide, *rest)

    def create_fp_trunc(self: Any, value: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return truncate(self, value, dtype)
        rounded = torch.from_numpy(value.data).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_trunc = create_fp_trunc
