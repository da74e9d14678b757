"""Image encoders: timm's models without their classifier, with keyed drop path."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

import unicl_fast.models.small  # noqa: F401  registers the small networks with timm
from unicl_fast.models.drop_path import DropPathKey, replace_drop_path


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
        encoder = timm.create_model(
            name, pretrained=False, num_classes=0, drop_path_rate=drop_path, **arguments
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"model.image_encoder: {name} cannot be built for data.image_size={image_size} and "
            f"model.drop_path={drop_path}: {error}"
        ) from error
    replace_drop_path(encoder, key)
    assert isinstance(encoder, nn.Module)
    return encoder


def feature_width(encoder: nn.Module) -> int:
    """Width of what a timm model without classifier returns, which is not always num_features."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]
