"""Presets: functions that return a whole TrainConfig.

`unicl-pretrain --preset NAME` starts from one; every field can be set after it. The large ones are
the paper's encoders with the released recipe's optimizer, schedule and augmentation (RandAugment,
colour jitter, random erasing); the small ones train on two CPU cores, with crops and flips alone.
"""

from __future__ import annotations

import dataclasses
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
        data=DataConfig(augment=("unicl",), interpolation="bicubic"),
        model=ModelConfig(image_encoder=image_encoder, drop_path=drop_path),
        efficiency=EfficiencyConfig(precision="auto"),
        run=RunConfig(global_batch_size=4096),
    )


def swin_tiny() -> TrainConfig:
    """Swin-T, the paper's main model; drop path 0.2."""
    return _released("swin_tiny_patch4_window7_224", drop_path=0.2)


def swin_tiny_half_half() -> TrainConfig:
    """Swin-T on the first half of each data set: as many samples as one of them has.

    The paper's mixes of equal size: `--data.train in21k yfcc14m`.
    """
    return _with_halves(swin_tiny())


def swin_base() -> TrainConfig:
    """Swin-B; drop path 0.5."""
    return _released("swin_base_patch4_window7_224", drop_path=0.5)


def swin_base_half_half() -> TrainConfig:
    """Swin-B on the first half of each data set, as swin-tiny-half-half."""
    return _with_halves(swin_base())


def _with_halves(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, fraction=(0.5,)))


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


def cifar10_small() -> TrainConfig:
    """CIFAR-10 on two CPU cores within 20 minutes: 16 passes of a seven-layer network.

    The model sees 28 x 28 of the 32 x 32 pixels, cut anywhere in training and at the centre in
    evaluation: no image is scaled, and there is a quarter less to compute.
    """
    return TrainConfig(
        data=DataConfig(
            image_size=28,
            crop_scale=(28**2 / 32**2, 28**2 / 32**2),
            crop_ratio=(1.0, 1.0),
            evaluation_resize=32,
        ),
        model=ModelConfig(
            image_encoder="unicl_convnet7_small",
            text_width=64,
            text_layers=2,
            text_heads=2,
            embed_dim=128,
        ),
        optim=OptimConfig(lr=2e-3, lr_batch_size=0, lr_min=0.0, warmup_fraction=0.1),
        efficiency=EfficiencyConfig(precision="auto"),
        checkpoint=CheckpointConfig(every_steps=1562, keep=2),
        run=RunConfig(global_batch_size=128, samples=16 * 50_000, evaluate_every_steps=1562),
    )


def digits_small() -> TrainConfig:
    """The demo: 28-pixel digits, half labels, half captions, two minutes on two cores."""
    return TrainConfig(
        data=DataConfig(
            image_size=28,
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.9, 1.1),
            flip_probability=0.0,
            evaluation_resize=28,
        ),
        model=ModelConfig(
            image_encoder="unicl_convnet7_small",
            text_width=128,
            text_layers=2,
            text_heads=4,
            embed_dim=64,
        ),
        optim=OptimConfig(lr=1e-3, lr_batch_size=0, lr_min=0.0, warmup_fraction=0.1),
        efficiency=EfficiencyConfig(precision="auto"),
        checkpoint=CheckpointConfig(every_steps=100, keep=2),
        run=RunConfig(global_batch_size=128, samples=70_000, evaluate_every_steps=100),
    )


def mixed_small() -> TrainConfig:
    """Photographs at 64 pixels with labels, captions or both, minutes on two cores."""
    return TrainConfig(
        data=DataConfig(image_size=64, crop_scale=(0.4, 1.0), evaluation_resize=64),
        model=ModelConfig(
            image_encoder="unicl_convnet7_small",
            text_width=128,
            text_layers=2,
            text_heads=4,
            embed_dim=128,
        ),
        optim=OptimConfig(lr=1e-3, lr_batch_size=0, lr_min=0.0, warmup_fraction=0.1),
        efficiency=EfficiencyConfig(precision="auto"),
        checkpoint=CheckpointConfig(every_steps=50, keep=2),
        run=RunConfig(global_batch_size=128, samples=80_000, evaluate_every_steps=125),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "swin-tiny": swin_tiny,
    "swin-tiny-half-half": swin_tiny_half_half,
    "swin-base": swin_base,
    "swin-base-half-half": swin_base_half_half,
    "focalnet-base": focalnet_base,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "vit-base": vit_base,
    "cifar10-small": cifar10_small,
    "digits-small": digits_small,
    "mixed-small": mixed_small,
}


def build_preset(name: str) -> TrainConfig:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
