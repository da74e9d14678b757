"""Describes models to transformers, whose `AutoModel` loads exports.

CLIPModel holds a ViT of CLIP's. Other encoders of timm are held by VisionTextDualEncoderModel, in
transformers' wrapper of timm. Neither has other objectives and text encoders than CLIP's, nor the
small encoders that only this package registers with timm.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import QuickGELU
from timm.models import vision_transformer
from torch import nn

from unicl_fast.conversion.libraries import is_of_timm, timm_arguments
from unicl_fast.conversion.output import (
    require_equal,
    sample_images,
    sample_tokens,
    write_json,
)
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.program import logging_at
from unicl_fast.text.tokenizer import Tokenizer, read_vocabulary

Layout = Literal["clip", "vision-text-dual-encoder", "unicl"]
"""The model_type of an export; the last one is our own."""
_CLASSES: dict[Layout, str] = {
    "clip": "CLIPModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "unicl": "UniCL",
}
_TEXT_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_VIT_ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
_VIT_PARAMETERS = {
    *("cls_token", "pos_embed", "patch_embed.proj.weight"),
    *(f"{norm}.{kind}" for norm in ("norm_pre", "norm") for kind in ("weight", "bias")),
}
_BLOCK_PARAMETERS = {
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
_START, _END = "<|startoftext|>", "<|endoftext|>"


def layout_of(model: UniCL) -> Layout:
    """The class of transformers that computes exactly what a model does."""
    config, encoder = model.config.model, model.image_encoder
    is_like_clip = (
        model.text_encoder is not None
        and model.learnt.keys() == {"logit_scale"}
        and config.image_projection == config.text_projection == "linear"
        and (config.text_causal, config.text_pool) == (True, "end")
        and config.vocab_size == Tokenizer().vocab_size
    )
    if not (is_like_clip and is_of_timm(config.image_encoder)):
        return "unicl"
    return "clip" if _is_vit_of_clip(encoder) else "vision-text-dual-encoder"


def _is_vit_of_clip(encoder: Any) -> bool:
    """Whether an encoder is the ViT of CLIPModel: a norm before its blocks, read at its token."""
    if type(encoder) is not vision_transformer.VisionTransformer:
        return False
    block, norms = encoder.blocks[0], [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
    outside = {name for name, _ in encoder.named_parameters() if not name.startswith("blocks.")}
    return (
        outside == _VIT_PARAMETERS
        and {name for name, _ in block.named_parameters()} == _BLOCK_PARAMETERS
        and type(block) is vision_transformer.Block
        and type(block.mlp.act) in _VIT_ACTIVATIONS
        and len({norm.eps for norm in norms}) == 1
        and encoder.global_pool == "token"
        and encoder.pos_embed.shape[1] == encoder.patch_embed.num_patches + 1
    )


def settings_for_transformers(model: UniCL, layout: Layout) -> dict[str, Any]:
    """The fields of a config.json by which `AutoModel` builds a model."""
    named = {"model_type": layout, "architectures": [_CLASSES[layout]]}
    if layout == "unicl":
        return named
    config = model.config.model
    text = {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": int(config.text_width * config.text_mlp_ratio),
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": _TEXT_ACTIVATIONS.get(config.text_activation, config.text_activation),
        "layer_norm_eps": config.text_norm_eps,
        "projection_dim": config.embed_dim,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": config.vocab_size - 1,
    }
    encoder: Any = model.image_encoder
    vision: dict[str, Any] = {"hidden_size": feature_width(encoder)}
    if layout == "clip":
        block = encoder.blocks[0]
        vision |= {
            "model_type": "clip_vision_model",
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": model.config.data.image_size,
            "patch_size": encoder.patch_embed.patch_size[0],
            "hidden_act": _VIT_ACTIVATIONS[type(block.mlp.act)],
            "layer_norm_eps": encoder.norm.eps,
            "projection_dim": config.embed_dim,
        }
    else:
        vision |= {
            "model_type": "timm_wrapper",
            "architecture": config.image_encoder,
            "model_args": timm_arguments(model),
            "num_classes": 0,
            "label_names": [],
        }
    return {
        **named,
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
        "text_config": text,
        "vision_config": vision,
        "dtype": "float32",
    }


def write_tokenizer(folder: Path, *, context_length: int) -> None:
    """Writes CLIP's tokenizer for transformers, which cuts texts at `context_length`."""
    vocabulary, merges = read_vocabulary()
    tokens = dict(zip([*list(vocabulary)[:-2], _START, _END], vocabulary.values(), strict=True))
    write_json(folder / "vocab.json", tokens)
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": _START,
            **dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END),
        },
    )


def is_installed() -> bool:
    """Whether transformers is there, to load what is written for it."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def difference_in_transformers(model: UniCL, folder: Path) -> float:
    """Loads an export by `AutoModel`, and returns the largest difference from our features.

    Raises:
        RuntimeError: transformers cannot load it, or its features differ.
    """
    import transformers  # seconds to import

    transformers.utils.logging.disable_progress_bar()
    images, tokens = sample_images(model), sample_tokens(model)
    with logging_at("transformers", logging.ERROR):
        try:
            theirs = transformers.AutoModel.from_pretrained(folder).eval()
        except Exception as error:  # of a version that lacks one of the classes
            raise RuntimeError(
                f"transformers {transformers.__version__} cannot load the converted model: "
                f"{error!r}; nothing was written: pip install --upgrade transformers timm"
            ) from error
    found = theirs(input_ids=tokens, pixel_values=images)
    is_training = model.training
    model.eval()
    pairs = {
        "image features": (model.encode_image(images), found.image_embeds),
        "text features": (model.encode_text(tokens), found.text_embeds),
    }
    model.train(is_training)
    return max(require_equal(*pair, what=what) for what, pair in pairs.items())
