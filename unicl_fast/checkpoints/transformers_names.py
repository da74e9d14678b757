"""Names of tensors in transformers' CLIP, SigLIP and VisionTextDualEncoder, and ours.

An export that one of these classes can hold has the names of that class, for `AutoModel`.
"""

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
"""For transformers' own text encoders."""
_TIMM = {"image_encoder.": "vision_model.timm_model."}
_POOL = "vision_model.head.attention.in_proj_"
_QUERY, _KEY_VALUE = "image_encoder.attn_pool.q.", "image_encoder.attn_pool.kv."
"""SigLIP's attention over patches: one tensor in transformers, two in timm."""
_CLIP = {"image_projection": "visual_projection.weight"}
_CLIP |= {"text_projection": "text_projection.weight"}
_SIGLIP = {"text_projection": "text_model.head.weight"}
"""Projections; ours are [in out], theirs [out in]."""
_LEADING = {
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding.weight": 1,
}
"""Dimensions of size 1 that timm's tensors begin with and theirs lack."""


def of_version_5(name: str) -> str:
    """A tensor's name in transformers 5; in a dual encoder, 4 repeats parts of it."""
    for part in ("text_model.", "vision_model."):
        name = name.replace(part * 2, part)
    return name


def to_transformers(tensors: Mapping[str, Tensor], *, layout: str) -> dict[str, Tensor]:
    """Renames a model's tensors for the class of transformers with the model_type `layout`.

    For `clip` and `siglip` the image encoder must be a ViT of that kind.
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
            name = f"text_model.{name}"  # as in version 4; 5 reads it too
        if ".self_attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{letter}_proj")] = part
        else:
            found[name] = tensor.reshape(tensor.shape[_LEADING.get(name, 0) :])
    return found


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of these classes to ours, and leaves others as they are.

    Raises KeyError if a part of an attention's weights is missing.
    """
    if not {"visual_projection.weight", f"{_POOL}weight"} & tensors.keys():
        return dict(tensors)
    text = _BERT if "text_model.embeddings.word_embeddings.weight" in tensors else _TEXT
    renamed = {theirs: ours for table in (_CLIP, _SIGLIP) for ours, theirs in table.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):  # in files of older versions; not weights
            continue
        if name in renamed:
            found[renamed[name]] = tensor.T
            continue
        if name.startswith(_POOL):
            width, kind = len(tensor) // 3, name.removeprefix(_POOL)
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
        image = _TIMM if name.startswith("vision_model.timm_model.") else _VIT
        table = {"vision_model": image, "text_model": text}.get(name.partition(".")[0], {})
        for ours, theirs in table.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
