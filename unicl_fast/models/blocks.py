"""The repeated blocks of encoders: found by their class names, recomputed in backward.

One mechanism serves both encoders, since timm's own switch covers only the image side and counts
every BatchNorm statistic twice. An architecture without any known block is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

SWIN_BLOCK = "SwinTransformerBlock"
KNOWN_BLOCKS = {
    SWIN_BLOCK,
    "SwinTransformerV2Block",
    "Block",  # ViT
    "EvaBlock",
    "FocalNetBlock",
    "BasicBlock",  # ResNet
    "Bottleneck",
    "BottleneckBlock",  # timm's ResNets of CLIP
    "ConvNeXtBlock",
    "DepthwiseSeparableConv",  # MobileNets and EfficientNets
    "InvertedResidual",
    "SmallConvBlock",  # ours
    "TextBlock",
    *("BertLayer", "RobertaLayer", "XLMRobertaLayer", "TransformerBlock", "MPNetLayer"),
}


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Makes every block of an encoder recompute its forward pass in backward; returns how many.

    Raises:
        ValueError: no module of a known block class.
    """
    blocks = find_blocks(encoder)
    if not blocks:
        raise ValueError(
            f"activation checkpointing knows the blocks {', '.join(sorted(KNOWN_BLOCKS))}; "
            f"{type(encoder).__name__} has none of them: set "
            "efficiency.activation_checkpointing=False or add its block class"
        )
    for block in blocks:
        _checkpoint_forward(block)
    return len(blocks)


def find_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The modules that are recomputed in backward, or compiled, one at a time."""
    return [module for module in encoder.modules() if type(module).__name__ in KNOWN_BLOCKS]


def keep_activations_in_copy(encoder: nn.Module) -> None:
    """Undoes `checkpoint_blocks` in a copy, whose blocks would run those of the original."""
    for block in find_blocks(encoder):
        block.__dict__.pop("forward", None)


def _checkpoint_forward(block: nn.Module) -> None:
    forward = block.forward
    # nothing in our models draws from a generator, whose state would have to be restored
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    # torch.compile can take no contexts: only where there are averages to leave alone
    if has_batch_norm(block):
        options["context_fn"] = lambda: (contextlib.nullcontext(), _averages_left_alone(block))

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

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


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


class BatchNormBackup:
    """Puts back BatchNorm's averages, which the forward pass of a non-finite step has changed."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._buffers: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the averages, before a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_where(self, is_bad: Tensor) -> None:
        """Restores them after it, where `is_bad` (bool [] on the device, which is not read)."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(is_bad, kept, buffer))
