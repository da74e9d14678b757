"""Names of tensors in transformers' CLIPModel and VisionTextDualEncoderModel, and ours.

Exports that one of the two classes can hold have its names, so that `AutoModel` loads them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_TEXT = {
    "text_encoder.token_embedding.": "text_model.embeddings.token_embedding.",
    "text_encoder.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_encoder.resblocks.": "text_model.encoder.layers.",
    "text_encoder.ln_final.": "text_model.final_layer_norm.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".attn.in_proj_": ".self_attn.qkv.",
}
_VIT = {
    "image_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "image_encoder.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "image_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "image_encoder.norm_pre.": "vision_model.pre_layrnorm.",
    "image_encoder.norm.": "vision_model.post_layernorm.",
    "image_encoder.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".attn.qkv.": ".self_attn.qkv.",
}
_TIMM = {"image_encoder.": "vision_model.timm_model."}
_PROJECTIONS = {
    "image_projection": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
"""Ours are [in out], theirs [out in]."""
_LEADING = {
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding.weight": 1,
}
"""Dimensions of size 1 that timm's tensors begin with and theirs lack."""


def to_transformers(tensors: Mapping[str, Tensor], *, as_clip: bool) -> dict[str, Tensor]:
    """Renames a model's tensors to those of CLIPModel, or of a dual encoder around timm's.

    As CLIPModel the image encoder must be a ViT of CLIP's.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = tensor.T
            continue
        image = _VIT if as_clip else _TIMM
        table = {"image_encoder": image, "text_encoder": _TEXT}.get(name.partition(".")[0], {})
        for ours, theirs in table.items():
            name = name.replace(ours, theirs)
        if table is _TEXT and not as_clip:
            name = f"text_model.{name}"  # as up to version 4, which 5 reads too
        if ".self_attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{letter}_proj")] = part
        else:
            found[name] = tensor.reshape(tensor.shape[_LEADING.get(name, 0) :])
    return found


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `to_transformers` renamed, by our names; others as they are.

    Raises:
        KeyError: a part of an attention's weights is missing.
    """
    if "visual_projection.weight" not in tensors:
        return dict(tensors)
    renamed = {theirs: ours for ours, theirs in _PROJECTIONS.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in renamed:
            found[renamed[name]] = tensor.T
            continue
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, tensor = name.replace("q_proj", "qkv"), torch.cat(parts)
        name = name.replace("text_model.text_model.", "text_model.")
        tensor = tensor[(None,) * _LEADING.get(name, 0)]
        is_timm = name.startswith("vision_model.timm_model.")
        image = _TIMM if is_timm else _VIT
        table = {"vision_model": image, "text_model": _TEXT}.get(name.partition(".")[0], {})
        for ours, theirs in table.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
