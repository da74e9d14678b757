"""Recomputes encoder blocks in backward instead of storing their activations.

One mechanism serves both encoders: timm's own switch covers only the image side, and counts every
BatchNorm statistic twice. The blocks are known by their class names; an architecture without any
of them is refused instead of left silently as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_BLOCKS = {
    "SwinTransformerBlock",  # Swin
    "SwinTransformerV2Block",
    "Block",  # ViT
    "FocalNetBlock",
    "BasicBlock",  # ResNet
    "Bottleneck",
    "ConvNeXtBlock",
    "SmallConvBlock",  # ours
    "SmallResidualBlock",
    "TextBlock",
}


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Makes every block of an encoder recompute its forward pass in backward.

    Returns:
        The number of blocks.

    Raises:
        ValueError: no module of a known block class.
    """
    blocks = [module for module in encoder.modules() if type(module).__name__ in _BLOCKS]
    if not blocks:
        raise ValueError(
            f"activation checkpointing knows the blocks {', '.join(sorted(_BLOCKS))}; "
            f"{type(encoder).__name__} has none of them: set "
            "efficiency.activation_checkpointing=False or add its block class"
        )
    for block in blocks:
        _checkpoint_forward(block)
    return len(blocks)


def undo_in_copy(encoder: nn.Module) -> None:
    """Lets the blocks of a copied encoder keep what they compute, as blocks do by themselves.

    A copy would share the recomputing function of the original's blocks, and so run those.
    """
    for module in encoder.modules():
        if type(module).__name__ in _BLOCKS:
            module.__dict__.pop("forward", None)


def _checkpoint_forward(block: nn.Module) -> None:
    forward = block.forward
    options: dict[str, Any] = {}
    # torch.compile can take no contexts: only where there are averages to leave alone
    if any(isinstance(module, _BatchNorm) for module in block.modules()):
        options["context_fn"] = lambda: (contextlib.nullcontext(), _averages_left_alone(block))

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in our models draws from a generator
            **options,
            **kwargs,
        )

    block.forward = recomputing_forward


@contextlib.contextmanager
def _averages_left_alone(block: nn.Module) -> Iterator[None]:
    """Keeps the second forward pass from moving BatchNorm's running averages again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked
