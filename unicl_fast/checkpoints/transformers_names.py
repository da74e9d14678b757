"""Names of tensors in transformers' CLIP, SigLIP and VisionTextDualEncoder, and ours.

Exports that one of these classes can hold have its names, so that `AutoModel` loads them.
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
    "image_encoder.attn_pool.latent": "vision_model.head.probe",
    "image_encoder.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "image_encoder.attn_pool.norm.": "vision_model.head.layernorm.",
    "image_encoder.attn_pool.mlp.": "vision_model.head.mlp.",
}
_BERT = {"text_encoder.network.": "text_model."}
"""Text encoders that are transformers' own."""
_TIMM = {"image_encoder.": "vision_model.timm_model."}
_POOL, _QUERY, _KEY_VALUE = (
    *("vision_model.head.attention.in_proj_", "image_encoder.attn_pool.q."),
    "image_encoder.attn_pool.kv.",
)
"""SigLIP's attention over patches, whose parts timm has apart."""
_CLIP = {
    "image_projection": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_SIGLIP = {"text_projection": "text_model.head.weight"}
"""Projections; ours are [in out], theirs [out in]."""
_LEADING = {
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding.weight": 1,
}
"""Dimensions of size 1 that timm's tensors begin with and theirs lack."""


def of_version_5(name: str) -> str:
    """A tensor's name as transformers 5 has it; 4 has parts of it twice in a dual encoder."""
    for part in ("text_model.", "vision_model."):
        name = name.replace(part * 2, part)
    return name


def to_transformers(tensors: Mapping[str, Tensor], *, layout: str) -> dict[str, Tensor]:
    """Renames a model's tensors to those of a class of transformers, named by its model_type.

    As `clip` and `siglip` the image encoder must be a ViT of that kind.
    """
    found: dict[str, Tensor] = {}
    projections = _SIGLIP if layout == "siglip" else _CLIP
    for name, tensor in tensors.items():
        if name in projections:
            found[projections[name]] = tensor.T
            continue
        if name.startswith(_QUERY) and layout == "siglip":
            kind = name.removeprefix(_QUERY)
            found[_POOL + kind] = torch.cat([tensor, tensors[_KEY_VALUE + kind]])
        if name.startswith((_QUERY, _KEY_VALUE)) and layout == "siglip":
            continue
        if name.startswith("logit_"):
            tensor = tensor.reshape([1] * (layout == "siglip"))
        image = _TIMM if layout == "vision-text-dual-encoder" else _VIT
        text = _BERT if name.startswith(tuple(_BERT)) else _TEXT
        table = {"image_encoder": image, "text_encoder": text}.get(name.partition(".")[0], {})
        for ours, theirs in table.items():
            name = name.replace(ours, theirs)
        name = name.replace("text_projection_bias", "text_model.head.bias")
        if table is _TEXT and image is _TIMM:
            name = f"text_model.{name}"  # as up to version 4, which 5 reads too
        if ".self_attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{letter}_proj")] = part
        else:
            found[name] = tensor.reshape(tensor.shape[_LEADING.get(name, 0) :])
    return found


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of the classes, by our names; others as they are.

    Raises:
        KeyError: a part of an attention's weights is missing.
    """
    if not {"visual_projection.weight", f"{_POOL}weight"} & tensors.keys():
        return dict(tensors)
    text = _BERT if "text_model.embeddings.word_embeddings.weight" in tensors else _TEXT
    renamed = {theirs: ours for table in (_CLIP, _SIGLIP) for ours, theirs in table.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):  # of older versions, and no weights
            continue
        if name in renamed:
            found[renamed[name]] = tensor.T
            continue
        if name.startswith(_POOL):
            width = len(tensor) // 3
            kind = name.removeprefix(_POOL)
            found |= {_QUERY + kind: tensor[:width], _KEY_VALUE + kind: tensor[width:]}
            continue
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, tensor = name.replace("q_proj", "qkv"), torch.cat(parts)
        if name.startswith("logit_"):
            tensor = tensor.reshape([])
        name = of_version_5(name).replace("text_model.head.bias", "text_projection_bias")
        tensor = tensor[(None,) * _LEADING.get(name, 0)]
        is_timm = name.startswith("vision_model.timm_model.")
        image = _TIMM if is_timm else _VIT
        table = {"vision_model": image, "text_model": text}.get(name.partition(".")[0], {})
        for ours, theirs in table.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
