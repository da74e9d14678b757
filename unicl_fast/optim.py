"""AdamW with the released recipe's parameter groups, and timm's warm-up and cosine."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from unicl_fast.config import TrainConfig

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


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups, at the learning rate that the global batch size asks for."""
    optim = config.optim
    decayed, undecayed = split_parameters(model)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=scaled_lr(optim.lr, config),
        betas=optim.betas,
        eps=optim.eps,
        fused=config.efficiency.fused_optimizer,
    )


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
