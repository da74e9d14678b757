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
        self.num_layers = 0
        self._uniform: Tensor | None = None

    def set(self, *, step: int, global_index: Tensor) -> None:
        """Fixes the masks of the forward passes of samples `global_index` (int64 [b]) at `step`."""
        if self.num_layers == 0:
            return
        layers = torch.arange(self.num_layers, device=global_index.device)
        keys = fold_key_tensor(fold_key(self.seed, _PURPOSE, step), layers)
        self._uniform = uniform_tensor(keys.unsqueeze(1), global_index.unsqueeze(0))

    def uniform(self, layer: int) -> Tensor:
        """Numbers of a layer, float64 [b] in [0, 1)."""
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
        self.drop_prob, self.layer, self.key = drop_prob, layer, key

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = (self.key.uniform(self.layer) < keep_prob).to(x.dtype).div_(keep_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def _replace_drop_path(encoder: nn.Module, key: DropPathKey) -> None:
    """Exchanges every timm DropPath, numbering layers in order of appearance."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                probability, layer = float(child.drop_prob), key.num_layers
                setattr(parent, name, KeyedDropPath(drop_prob=probability, layer=layer, key=key))
                key.num_layers += 1
