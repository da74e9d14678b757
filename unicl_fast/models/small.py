"""A small convolutional network for small pictures, under a timm name.

timm's networks begin with strides that leave 8 x 8 of a 32 x 32 picture. This one follows what
trains fastest on CIFAR-10 (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv
2404.00498): seven layers without residual branches, a 2 x 2 convolution first, and a pooling
early in each block. It is registered with timm, so that `model.image_encoder` takes it like any
other, and anyone can add their own in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from timm.models import register_model
from torch import Tensor, nn


class SmallConvBlock(nn.Sequential):
    """Two 3 x 3 convolutions; the first is followed by a pooling that halves the picture."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class SmallConvNet(nn.Module):
    """Pictures [b in_chans h w], h and w at least 9, to the mean response of each channel."""

    default_cfg: ClassVar[dict[str, Any]] = {}  # timm's models have one, and open_clip asks for it

    def __init__(
        self, stem_channels: int = 24, channels: tuple[int, ...] = (64, 128, 256), in_chans: int = 3
    ) -> None:
        super().__init__()
        self.num_features = channels[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (number + 1), "module": f"blocks.{number}"}
            for number, width in enumerate(channels)
        ]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_channels, kernel_size=2), nn.ReLU(inplace=True)
        )
        widths = (stem_channels, *channels)
        self.blocks = nn.Sequential(
            *(SmallConvBlock(w, c) for w, c in zip(widths, channels, strict=False))
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.pool(self.blocks(self.stem(images)))  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """As timm's models have it; there is no classifier to begin with."""
        if num_classes or global_pool not in ("", "avg"):
            raise ValueError(
                f"it has no classifier and the mean for pooling, not {num_classes} classes and "
                f"{global_pool!r}"
            )

    def forward_intermediates(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        indices: Sequence[int] | None = None,
        intermediates_only: bool = True,
    ) -> list[Tensor]:
        """Maps [b c h w] of the blocks in `indices`, of all without it; under timm's name."""
        if not intermediates_only:
            raise NotImplementedError("only the maps are given; forward gives the features")
        maps: list[Tensor] = []
        image_map = self.stem(images)
        for block in self.blocks:
            image_map = block(image_map)
            maps.append(image_map)
        return maps if indices is None else [maps[place] for place in indices]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for learning rates that decay with depth, in timm's form."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


@register_model  # type: ignore[untyped-decorator]
def unicl_convnet7_small(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """Blocks of 64, 128 and 256 channels: 1.2 M parameters."""
    if pretrained:
        raise ValueError("nobody publishes weights of it; timm.create_model takes checkpoint_path=")
    if kwargs.get("drop_path_rate"):
        raise TypeError("it has no residual branches that drop path could leave out")
    return SmallConvNet(in_chans=kwargs.get("in_chans", 3))
