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
from unicl_fast.nvidia_apex import has_apex_optimizers, load_apex_optimizers

logger = logging.getLogger(__name__)

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
        name: of the config; "auto" is apex's fused AdamW where it can work, else torch's.
        device: of the parameters.
        precision: of the config.

    Raises:
        ValueError: an optimizer of apex that cannot work here; says why.
    """
    apex_can_work = device.type == "cuda" and precision != "fp64"
    if name == "auto":
        return "apex-fusedadam" if apex_can_work and has_apex_optimizers() else "adamw"
    if name.startswith("apex-") and not apex_can_work:
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
    elif name == "apex-fusedadam":
        optimizer = load_apex_optimizers().FusedAdam(groups, adam_w_mode=True, **arguments)
    else:
        assert name == "apex-fusedlamb", name
        optimizer = load_apex_optimizers().FusedLAMB(groups, max_grad_norm=math.inf, **arguments)
    return optimizer


@torch.no_grad()
def update_unless(is_bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One update of parameters and optimizer state, or none at all where `is_bad`.

    Zeroed gradients would not do: weight decay and the averages would move all the same. Torch's
    fused AdamW takes the flag where it is, on the device; for others the host has to read it.

    Args:
        is_bad: bool [], on the parameters' device.
        optimizer: what `build_optimizer` made.
    """
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        masked: Any = optimizer
        # what torch.amp.GradScaler tells it by, without a scale
        masked.grad_scale, masked.found_inf = None, is_bad.float()
        masked.step()
        del masked.grad_scale, masked.found_inf
    elif not is_bad.item():
        optimizer.step()


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
