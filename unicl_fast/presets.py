"""Presets: functions that return a whole TrainConfig.

`unicl-pretrain --preset NAME` starts from one; every field can be set after it. The large ones
are the paper's encoders with the released recipe; the small ones train on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable

from unicl_fast.config import (
    CheckpointConfig,
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


def _released(image_encoder: str, *, drop_path: float = 0.0) -> TrainConfig:
    """The released recipe: 224 pixels, global batch 4,096, AdamW, 5 of 32 epochs of warm-up."""
    return TrainConfig(
        model=ModelConfig(image_encoder=image_encoder, drop_path=drop_path),
        efficiency=EfficiencyConfig(precision="bf16"),
        run=RunConfig(global_batch_size=4096),
    )


def swin_tiny() -> TrainConfig:
    """Swin-T, the paper's main model; drop path 0.2."""
    return _released("swin_tiny_patch4_window7_224", drop_path=0.2)


def swin_base() -> TrainConfig:
    """Swin-B; drop path 0.5."""
    return _released("swin_base_patch4_window7_224", drop_path=0.5)


def focalnet_base() -> TrainConfig:
    """FocalNet-B with the small receptive field; drop path 0.5."""
    return _released("focalnet_base_srf", drop_path=0.5)


def resnet50() -> TrainConfig:
    """ResNet-50. BatchNorm sees one rank's share of the batch."""
    return _released("resnet50")


def resnet101() -> TrainConfig:
    """ResNet-101. BatchNorm sees one rank's share of the batch."""
    return _released("resnet101")


def vit_base() -> TrainConfig:
    """ViT-B/16, CLIP's encoder."""
    return _released("vit_base_patch16_224")
