"""The released recipe's parameter groups, an optimizer over them, timm's warm-up and cosine.

AdamW is torch's, LAMB (You et al., arXiv 1904.00962) is timm's, and the fused twins of both are
NVIDIA apex's, where that is installed.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from timm.optim import Lamb
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from unicl_fast.config import TrainConfig
from unicl_fast.training.nvidia_apex import load_apex_optimizers

logger = logging.getLogger(__name__)

_SUMMED_AT_ONCE = 2**18
"""Squares in one dot product: more round too much in fp32, fewer cost calls."""

_OF_APEX = ("fusedadamw", "fusedlamb")
_UNDECAYED_NAMES = (
    "logit_scale",
    "positional_embedding",
    "pos_embed",
    "absolute_pos_embed",
    "relative_position_bias_table",
    "cls_token",
)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay.

    Without: 1-D parameters (norms, biases), logit_scale, position embeddings and tables of
    relative positions, as in the released recipe.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last_name = name.rsplit(".", 1)[-1]
        spared = parameter.ndim <= 1 or last_name == "bias" or last_name in _UNDECAYED_NAMES
        (undecayed if spared else decayed).append(parameter)
    return decayed, undecayed


def choose_optimizer(name: str, *, device: torch.device, precision: str) -> str:
    """What `optim.name` means on this machine.

    Args:
        name: of the config, as timm spells them; "auto" is torch's AdamW, whose fused kernel takes
            the clipping factor and leaves out a bad step without the host: apex's would need a
            pass over all gradients for the one and a wait for the device for the other.
        device: of the parameters.
        precision: of the config.

    Raises:
        ValueError: an optimizer of apex that cannot work here; says why.
    """
    if name == "auto":
        return "adamw"
    apex_can_work = device.type == "cuda" and precision != "fp64"
    if name in _OF_APEX and not apex_can_work:
        raise ValueError(
            f"optim.name={name} runs on CUDA devices with weights in fp32, not on {device.type} "
            f"with efficiency.precision={precision}; take adamw or lamb"
        )
    return name


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """`optim.name` over two groups, at the learning rate that the global batch size asks for.

    Raises:
        ValueError: the optimizer is not installed, or cannot work with this device or precision.
    """
    optim = config.optim
    decayed, undecayed = split_parameters(model)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    name = choose_optimizer(
        optim.name, device=decayed[0].device, precision=config.efficiency.precision
    )
    logger.info("optimizer: %s", name)
    arguments: dict[str, Any] = {
        "lr": scaled_lr(optim.lr, config),
        "betas": optim.betas,
        "eps": optim.eps,
    }
    optimizer: torch.optim.Optimizer
    # the two LAMBs clip the gradient to norm 1 by themselves; here optim.clip_norm decides
    if name == "adamw":
        fused = config.efficiency.fused_optimizer
        optimizer = torch.optim.AdamW(groups, fused=fused, **arguments)
    elif name == "lamb":
        optimizer = Lamb(groups, max_grad_norm=None, **arguments)
    elif name == "fusedadamw":
        optimizer = load_apex_optimizers().FusedAdam(groups, adam_w_mode=True, **arguments)
    else:
        assert name == "fusedlamb", name
        optimizer = load_apex_optimizers().FusedLAMB(groups, max_grad_norm=math.inf, **arguments)
    return optimizer


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Length of the gradient of all parameters together: float [], on their device.

    On the CPU by dot products of pieces, which take 0.4 of the time of torch's norm there and round
    less: its single sum over the 25 million entries of the token table is off by 5e-4 in fp32.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    pieces = [piece for one in gradients for piece in one.reshape(-1).split(_SUMMED_AT_ONCE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    grad_norm: Tensor,
    *,
    clip_norm: float,
    leave_out: Tensor,
) -> None:
    """One update with the clipped gradient, or none at all where it is to be left out.

    Torch's fused AdamW takes the factor and the flag where they are, on the device, and so spares a
    pass over all gradients; for others gradients are multiplied, and the host has to read the flag.
    Zeroed gradients would not do: weight decay and the averages would move all the same.

    Args:
        optimizer: what `build_optimizer` made.
        grad_norm: what `gradient_norm` says, [].
        clip_norm: the longest gradient that is used as it is; 0 is any.
        leave_out: bool [], on the parameters' device.
    """
    is_fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    if not is_fused and leave_out.item():
        return
    # as torch's clip_grad_norm_ has it
    divisor = ((grad_norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
    # the fused kernel takes its factor in fp32 and would round gradients that are not
    if divisor is not None and not (is_fused and divisor.dtype == torch.float32):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
        divisor = None
    if not is_fused:
        optimizer.step()
        return
    fused: Any = optimizer
    # what torch.amp.GradScaler tells it by
    fused.grad_scale, fused.found_inf = divisor, leave_out.float()
    fused.step()
    del fused.grad_scale, fused.found_inf


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to lr_min; `step_update(step + 1)` sets a step's rate."""
    warmup_steps = round(config.optim.warmup_fraction * total_steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup_steps),
        lr_min=scaled_lr(config.optim.lr_min, config),
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def scaled_lr(lr: float, config: TrainConfig) -> float:
    """Linear scaling: the rate given for lr_batch_size samples, for the run's global batch."""
    reference = config.optim.lr_batch_size
    return lr * config.run.global_batch_size / reference if reference else lr
