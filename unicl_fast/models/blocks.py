"""The repeated blocks of encoders: found by their class names, recomputed in backward.

Both encoders use this one mechanism: timm's own switch covers only the image side and updates
BatchNorm's statistics twice. An architecture without known blocks is refused.
"""

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
    """Makes each block recompute its forward pass in backward; ValueError without known blocks."""
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
    """The modules that are checkpointed or compiled one by one."""
    return [module for module in encoder.modules() if type(module).__name__ in KNOWN_BLOCKS]


def keep_activations_in_copy(encoder: nn.Module) -> None:
    """Undoes `checkpoint_blocks` in a copy, whose blocks would call the original's."""
    for block in find_blocks(encoder):
        block.__dict__.pop("forward", None)


def _checkpoint_forward(block: nn.Module) -> None:
    forward = block.forward
    # nothing in our models draws random numbers in forward, so there is no state to restore
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    # only for BatchNorm, since torch.compile accepts no context_fn
    if has_batch_norm(block):
        options["context_fn"] = lambda: (contextlib.nullcontext(), _averages_left_alone(block))

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = recomputing_forward


@contextlib.contextmanager
def _averages_left_alone(block: nn.Module) -> Iterator[None]:
    """Keeps the recomputed forward pass from updating BatchNorm's running averages again."""
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
    """Restores BatchNorm's averages after a non-finite step."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._buffers: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the averages, before a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_where(self, is_bad: Tensor) -> None:
        """Restores them if `is_bad` (bool [] on the device, which is not read back)."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(is_bad, kept, buffer))
