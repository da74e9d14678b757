"""CLIP and SigLIP ViTs of any size, registered with timm, which has only the published ones.

The name spells out all sizes: `unicl_vit_clip_patch16_w384_d12_h6_m1536_gelu_224`.
"""

import functools
import math
import re
from typing import Any, Literal, NamedTuple

import timm
from timm.layers import GELUTanh, LayerNorm, QuickGELU
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

Kind = Literal["clip", "siglip"]
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    QuickGELU: "quick_gelu",
    GELUTanh: "gelu_tanh",
}
"""timm's names of activations, also used by `ModelConfig` for texts."""
_WORDS = {
    "clip": {256: "xsmall", 512: "medium", 640: "betwixt", 768: "base", 1024: "large",
             1280: "huge", 1408: "giant", 1664: "gigantic"},
    "siglip": {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"},
}  # fmt: skip
"""timm's words for widths."""
# limits far beyond any real model, so that every name is built quickly on the meta device
_NAME = re.compile(
    r"unicl_vit_(clip|siglip)_patch([1-9]\d{0,3})_w([1-9]\d{0,4})_d([1-9]\d{0,2})_h([1-9]\d{0,2})"
    r"_m([1-9]\d{0,5})_(gelu|quick_gelu|gelu_tanh)_([1-9]\d{0,3})"
)
default_cfgs: dict[str, Any] = {}


class ViT(NamedTuple):
    """The sizes of a ViT; CLIP's is pooled at its class token, SigLIP's by attention."""

    kind: str
    patch_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    image_size: int

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of timm's class."""
        is_clip = self.kind == "clip"
        return {
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": mlp_ratio(self.hidden, self.width),
            "act_layer": next(one for one, name in ACTIVATIONS.items() if name == self.activation),
            "class_token": is_clip,
            "pre_norm": is_clip,
            "global_pool": "token" if is_clip else "map",
            "norm_layer": functools.partial(LayerNorm, eps=1e-5 if is_clip else 1e-6),
        }


def name_of(vit: ViT) -> str:
    """Timm's name of a ViT, or one registered here; ValueError for impossible sizes."""
    own_name = (
        f"unicl_vit_{vit.kind}_patch{vit.patch_size}_w{vit.width}_d{vit.depth}_h{vit.heads}"
        f"_m{vit.hidden}_{vit.activation}_{vit.image_size}"
    )
    if _NAME.fullmatch(own_name) is None:
        raise ValueError(f"no ViT has these sizes: {vit}")
    word = _WORDS[vit.kind].get(vit.width)
    quick = "_quickgelu" if vit.activation == "quick_gelu" and vit.kind == "clip" else ""
    stem = f"vit_{word}_patch{vit.patch_size}_{vit.kind}{quick}_"
    known = [name for name in timm.list_models(f"{stem}*") if name[len(stem) :].isdigit()]
    own = f"{stem}{vit.image_size}"
    # a name of another image size will do, since timm resizes position tables
    for name in sorted(known, key=lambda name: name != own):
        if _sizes_of(name) == vit[1:-1]:
            return str(name)
    register(own_name)
    return own_name


def register(name: str) -> None:
    """Registers a ViT with timm if the name follows this module's pattern."""
    match = _NAME.fullmatch(name)
    if match is None or timm.is_model(name):
        return
    kind, *sizes, activation, image_size = match.groups()
    patch_size, width, depth, heads, hidden = map(int, sizes)
    vit = ViT(kind, patch_size, width, depth, heads, hidden, activation, int(image_size))

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        network: nn.Module = _create_vision_transformer(
            name, pretrained, **{**vit.arguments, **kwargs}
        )
        return network

    create.__name__ = name
    size = {"input_size": (3, vit.image_size, vit.image_size), "fixed_input_size": True}
    default_cfgs.update(
        generate_default_cfgs({f"{name}.untrained": {**size, "classifier": "head"}})
    )
    register_model(create)


@functools.cache
def _sizes_of(name: str) -> tuple[Any, ...]:
    import torch

    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    assert isinstance(encoder, VisionTransformer)
    block: Any = encoder.blocks[0]
    return (
        int(encoder.patch_embed.patch_size[0]),
        int(encoder.embed_dim),
        len(encoder.blocks),
        int(block.attn.num_heads),
        int(block.mlp.fc1.out_features),
        ACTIVATIONS.get(type(block.mlp.act), ""),
    )


def mlp_ratio(hidden: int, width: int) -> float:
    """The factor with which `int(width * factor)` is exactly `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
