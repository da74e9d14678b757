"""Small networks for small images, under timm names.

timm's networks shrink a 32 x 32 image to 8 x 8 at once, and are made for a thousand classes. These
are for two CPU cores. They are registered with timm, so `model.image_encoder` accepts their names;
your own can be added in the same way.

- `unicl_convnet7_small`: seven layers without residual branches, a 2 x 2 convolution first and
  pooling early in each block, after the fastest network on CIFAR-10 (Jordan, "94% on CIFAR-10 in
  3.29 Seconds on a Single GPU", arXiv 2404.00498).
- `unicl_swin6_small`: timm's Swin with two stages of two and four blocks on patches of 4 pixels,
  made by three convolutions: with timm's single 4 x 4 one it learns little in a few epochs
  (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021).
"""

import itertools
from typing import Any, ClassVar

from jaxtyping import Float
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

# timm passes img_size to models of a fixed input size; Swin's tables and windows need it
default_cfgs = generate_default_cfgs(
    {"unicl_swin6_small.untrained": {"input_size": (3, 32, 32), "fixed_input_size": True}}
)


class SmallConvBlock(nn.Sequential):
    """Two 3 x 3 convolutions; a pooling after the first halves the image."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            *_conv_unit(in_channels, channels, pool=True, activation=nn.ReLU),
            *_conv_unit(channels, channels, activation=nn.ReLU),
        )

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:  # torch.compile skips nn.Sequential's own forward
            images = layer(images)
        return images


def _conv_unit(
    in_channels: int,
    channels: int,
    *,
    stride: int = 1,
    pool: bool = False,
    activation: type[nn.Module] = nn.SiLU,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(channels),
        activation(inplace=True),
    )


class SmallConvNet(nn.Module):
    """Three blocks that halve images [b in_chans h w], h and w at least 9, to means [b 256]."""

    default_cfg: ClassVar[dict[str, Any]] = {}  # timm's models have one, and open_clip reads it

    num_features, global_pool = 256, "avg"

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 24, kernel_size=2), nn.ReLU(inplace=True))
        widths = itertools.pairwise((24, 64, 128, 256))
        self.blocks = nn.Sequential(*itertools.starmap(SmallConvBlock, widths))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.pool(self.blocks(self.stem(images)))  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Timm's method; there is no classifier to begin with."""
        if num_classes or global_pool not in ("", self.global_pool):
            raise ValueError(
                f"it has no classifier and one pooling, not {num_classes} classes and "
                f"{global_pool!r}"
            )

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise learning-rate decay, in timm's form."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


@register_model  # type: ignore[untyped-decorator]
def unicl_convnet7_small(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """`SmallConvNet`: 1.2 M parameters."""
    _refuse(pretrained, drop_path_rate=kwargs.get("drop_path_rate"))
    return SmallConvNet(kwargs.get("in_chans", 3))


def _refuse(pretrained: bool, *, drop_path_rate: float | None = None) -> None:
    if pretrained:
        raise ValueError("nobody publishes its weights; pass checkpoint_path= to timm.create_model")
    if drop_path_rate:
        raise TypeError("it has no drop path")


class ConvPatchEmbed(PatchEmbed):  # type: ignore[misc]
    """timm's patches of 4 x 4 pixels, by three convolutions, two of them with stride 2."""

    def __init__(
        self, *, in_chans: int = 3, embed_dim: int, patch_size: int = 4, **kwargs: Any
    ) -> None:
        if patch_size != 4:
            raise ValueError(f"its convolutions make patches of 4 pixels, not {patch_size}")
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, patch_size=patch_size, **kwargs)
        self.proj = nn.Sequential(
            _conv_unit(in_chans, embed_dim // 4),
            _conv_unit(embed_dim // 4, embed_dim // 2, stride=2),
            _conv_unit(embed_dim // 2, embed_dim, stride=2),
        ).to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))


@register_model  # type: ignore[untyped-decorator]
def unicl_swin6_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Patches of 4 pixels, windows of 4 patches, 96 and 192 channels: 2.1 M parameters.

    At 28 or 32 pixels the first stage has four windows, shifted in every other block, then one.
    """
    _refuse(pretrained)
    shape = {"patch_size": 4, "window_size": 4, "embed_dim": 96, "depths": (2, 4)}
    network: nn.Module = build_model_with_cfg(
        SwinTransformer,
        "unicl_swin6_small",
        pretrained,
        feature_cfg={"out_indices": (0, 1), "flatten_sequential": True},
        **{"embed_layer": ConvPatchEmbed, **shape, "num_heads": (3, 6), **kwargs},
    )
    return network
