"""Stochastic depth without a generator: the mask is a function of (seed, step, layer, slot).

A sample drops the same branches whichever rank holds it and however often its forward pass is
run, so resuming, other rank counts, activation checkpointing and cached gradients need no random
state. Stochastic depth itself: Huang et al., arXiv 1603.09382.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, uniform_tensor

_PURPOSE = 0xD409


class DropPathKey:
    """What the masks of one forward pass depend on; shared by all layers of a model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.num_layers = 0
        self._uniform: Tensor | None = None

    def set(self, *, step: int, global_index: Tensor) -> None:
        """Fixes the masks of the forward passes that follow.

        Args:
            step: optimizer step.
            global_index: int64 [b], places of the samples in the global batch.
        """
        if self.num_layers == 0:
            return
        layers = torch.arange(self.num_layers, device=global_index.device)
        keys = fold_key_tensor(fold_key(self.seed, _PURPOSE, step), layers)
        self._uniform = uniform_tensor(keys.unsqueeze(1), global_index.unsqueeze(0))

    def uniform(self, layer: int) -> Tensor:
        """float64 [b] in [0, 1) of a layer."""
        if self._uniform is None:
            raise RuntimeError(
                "drop path in training mode needs its key: call model.set_drop_path_key(step=..., "
                "global_index=...) before the forward pass"
            )
        return self._uniform[layer]


class KeyedDropPath(nn.Module):
    """timm's DropPath with the random tensor replaced by the key's."""

    def __init__(self, *, drop_prob: float, layer: int, key: DropPathKey) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.layer = layer
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = (self.key.uniform(self.layer) < keep_prob).to(x.dtype).div_(keep_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}, layer={self.layer}"


def replace_drop_path(module: nn.Module, key: DropPathKey) -> None:
    """Exchanges every timm DropPath below `module`, numbering layers in order of appearance."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                keyed = KeyedDropPath(
                    drop_prob=float(child.drop_prob), layer=key.num_layers, key=key
                )
                setattr(parent, name, keyed)
                key.num_layers += 1
