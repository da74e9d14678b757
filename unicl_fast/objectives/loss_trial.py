"""Tries the Triton loss against the dense form in fp64 before `auto` chooses it.

`gpu_kernels.fault_in_trial` runs it, with the kernels of training and sizes that are no multiples
of a block; a GPU gets some hundred programs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.operands import LossForm
from unicl_fast.system.gpu_kernels import check_close

_SIZES = {"cuda": (2000, 4100), "cpu": (200, 300)}
_WIDTH, _SCALE = 208, 20.0
_TIMES = {"cuda": 20, "cpu": 1}
# Relative errors, ten times the rounding errors; also for fp16, whose products are in fp32.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE_OF_TF32 = 1e-2


def try_out(device: torch.device, dtype_name: str) -> None:
    """Raises ArithmeticError if loss or gradients in one type are wrong; fp32 also in TF32."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(count, _WIDTH, generator=generator), dim=1).to(device, dtype)
        for count in _SIZES[device.type]
    )
    wide = images.double(), texts.double()
    exact = _loss_and_gradients(*wide, form="dense")
    for allows_tf32 in (False, True) if dtype == torch.float32 else (False,):
        torch.backends.cuda.matmul.allow_tf32 = allows_tf32
        tolerance = _TOLERANCE_OF_TF32 if allows_tf32 else _TOLERANCES[dtype]
        for _ in range(_TIMES[device.type]):
            found = _loss_and_gradients(images, texts, form="triton")
            for what, ours, theirs in zip(
                ("the loss", "its gradient of images", "its gradient of texts"),
                *(found, exact),
                strict=True,
            ):
                what += " with TF32" * allows_tf32
                check_close(ours, theirs, what=what, tolerance=tolerance)


def _loss_and_gradients(images: Tensor, texts: Tensor, *, form: LossForm) -> list[Tensor]:
    images, texts = (x.detach().requires_grad_() for x in (images, texts))
    classes = torch.arange(len(texts), device=images.device) % 50
    counts = classes % 3 + 1
    loss = unified_contrastive_loss(
        images,
        texts,
        classes[: len(images)],
        _SCALE,
        text_class_ids=classes,
        text_counts=counts,
        form=form,
    )
    return [loss.detach(), *torch.autograd.grad(loss, [images, texts])]
