"""Image encoders: timm's models without their classifier, whose drop path needs no generator.

A drop-path mask is a function of (seed, step, layer, global index). So a sample drops the same
branches whichever rank holds it and however often its forward pass is run, and resuming, other
numbers of ranks, activation checkpointing and cached gradients need no random state. Drop path
itself, "stochastic depth": Huang et al., arXiv 1603.09382.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import unicl_fast.models.small  # noqa: F401  registers the small networks with timm
from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, uniform_tensor

_PURPOSE = 0xD409


def build_image_encoder(
    name: str, *, image_size: int, drop_path: float, key: DropPathKey
) -> nn.Module:
    """A timm model that maps images [b 3 image_size image_size] to features [b num_features].

    Raises:
        ValueError: timm knows no such model, or the model cannot take this size.
    """
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "none"
        raise ValueError(
            f"model.image_encoder: timm knows no model {name!r}; similar names: {similar}"
        )
    arguments: dict[str, Any] = {}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments["img_size"] = image_size  # position tables and windows are made for one size
    try:
        encoder: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=0, drop_path_rate=drop_path, **arguments
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"model.image_encoder: {name} cannot be built for data.image_size={image_size} and "
            f"model.drop_path={drop_path}: {error}"
        ) from error
    _replace_drop_path(encoder, key)
    return encoder


def feature_width(encoder: nn.Module) -> int:
    """Width of what a timm model without classifier returns, which is not always num_features."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


class DropPathKey:
    """Decides the masks of one forward pass; shared by all layers of a model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.layers: list[KeyedDropPath] = []
        self._keep_probs: Tensor | None = None

    def set(self, *, step: int, global_index: Tensor) -> None:
        """Fixes the masks of the forward passes of samples `global_index` (int64 [b]) at `step`."""
        if not self.layers:
            return
        device = global_index.device
        if self._keep_probs is None or len(self._keep_probs) != len(self.layers):
            keep_probs = [[1.0 - layer.drop_prob] for layer in self.layers]
            self._keep_probs = torch.tensor(keep_probs, dtype=torch.float64)
        self._keep_probs = self._keep_probs.to(device)  # once: the copy makes a GPU wait
        numbers = torch.arange(len(self.layers), device=device)
        keys = fold_key_tensor(fold_key(self.seed, _PURPOSE, step), numbers)
        uniform = uniform_tensor(keys.unsqueeze(1), global_index.unsqueeze(0))
        factors = (uniform < self._keep_probs) / self._keep_probs
        for layer, its_factors in zip(self.layers, factors.unbind(), strict=True):
            layer.factors = its_factors


class KeyedDropPath(nn.Module):
    """timm's DropPath with the random tensor replaced by the key's.

    Layers differ in a tensor only, so that equal blocks share one compiled graph.
    """

    def __init__(self, *, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob, self.drops = drop_prob, drop_prob > 0
        self.factors: Tensor | None = None
        """The key sets them: each sample's branch is multiplied by its own, float64 [b]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drops:
            return x
        if self.factors is None:
            raise RuntimeError(
                "drop path in training mode needs its key: call model.set_drop_path_key(step=..., "
                "global_index=...) before the forward pass"
            )
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _replace_drop_path(encoder: nn.Module, key: DropPathKey) -> None:
    """Exchanges every timm DropPath, numbering layers in order of appearance."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                layer = KeyedDropPath(drop_prob=float(child.drop_prob))
                setattr(parent, name, layer)
                key.layers.append(layer)
