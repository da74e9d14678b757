"""Small residual networks for 32-pixel pictures, under timm's names.

timm's ResNets begin with a stride-2 convolution and a pooling that leave 8 x 8 of a 32 x 32
picture. These begin at full size. They are registered with timm, so that `model.image_encoder`
takes them like any other, and anyone can add their own in the same way.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def _small_resnet(layers: tuple[int, ...], channels: tuple[int, ...], **kwargs: Any) -> ResNet:
    # what timm.create_model passes to every entry point and a ResNet does not take
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    # the deep stem is the one whose width timm lets us choose; the next line replaces it
    model = ResNet(
        BasicBlock, layers=layers, channels=channels, stem_type="deep",
        stem_width=channels[0] // 2, **kwargs,
    )  # fmt: skip
    model.conv1 = nn.Conv2d(model.in_chans, channels[0], kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.init_weights()
    return model


@register_model  # type: ignore[untyped-decorator]
def unicl_resnet10_small(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Four stages of one basic block, 32 to 256 channels: 1.2 M parameters."""
    return _small_resnet((1, 1, 1, 1), (32, 64, 128, 256), **kwargs)


@register_model  # type: ignore[untyped-decorator]
def unicl_resnet14_small(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Four stages of 1, 2, 2, 1 basic blocks, 32 to 256 channels: 1.6 M parameters."""
    return _small_resnet((1, 2, 2, 1), (32, 64, 128, 256), **kwargs)
