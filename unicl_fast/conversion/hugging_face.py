"""Describes models to transformers, whose `AutoModel` loads exports, and reads its descriptions.

CLIPModel holds a ViT of CLIP's, SiglipModel one of SigLIP's with its text encoder. Other encoders
of timm are held by VisionTextDualEncoderModel, in transformers' wrapper of timm. None has other
objectives and text encoders, nor the small encoders that only this package registers with timm.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import timm
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from unicl_fast.conversion.libraries import is_of_timm, timm_arguments
from unicl_fast.conversion.open_clip import UnknownArchitectureError, side_of
from unicl_fast.conversion.output import (
    require_equal,
    sample_images,
    sample_tokens,
    write_json,
)
from unicl_fast.dataset.other_tokens import LONGEST_CAPTION
from unicl_fast.models import transformers_text
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL
from unicl_fast.models.vits import ACTIVATIONS, ViT, name_of
from unicl_fast.system.program import logging_at
from unicl_fast.text.tokenizer import Tokenizer, read_vocabulary

Layout = Literal["clip", "siglip", "vision-text-dual-encoder", "unicl"]
"""The model_type of an export; the last one is our own."""
OF_CLIPS_TOKENS = ("clip", "vision-text-dual-encoder")
"""Those that come with CLIP's tokenizer."""
_CLASSES: dict[Layout, str] = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "unicl": "UniCL",
}
_BOTH = ("weight", "bias")
_VIT_PARAMETERS = {
    "clip": {
        *("cls_token", "pos_embed", "patch_embed.proj.weight"),
        *(f"{norm}.{kind}" for norm in ("norm_pre", "norm") for kind in _BOTH),
    },
    "siglip": {
        *("pos_embed", "attn_pool.latent"),
        *(f"{one}.{kind}" for one in ("patch_embed.proj", "norm") for kind in _BOTH),
        *(f"attn_pool.{one}.{kind}" for one in ("q", "kv", "proj", "norm") for kind in _BOTH),
        *(f"attn_pool.mlp.{one}.{kind}" for one in ("fc1", "fc2") for kind in _BOTH),
    },
}
_BLOCK_PARAMETERS = {
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in _BOTH
}
_NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip text": {
        **{"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048},
        **{"num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    },
    "clip vision": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "image_size": 224, "patch_size": 32},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    },
    "siglip text": {
        **{"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 64},
        **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    },
    "siglip vision": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "image_size": 224, "patch_size": 16},
        **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
    },
}
"""Values that a config.json may leave out."""
_SIZE_ARGUMENTS = ("img_size", "dynamic_img_size", "num_classes", "drop_rate", "drop_path_rate")
"""Arguments of timm's that leave features as they are, at one image size."""
_OF_TEXT_ENCODER = re.compile(
    r"(?:(?:bert|roberta|distilbert|mpnet)\.)?((?:embeddings|encoder|transformer)\..*)"
)
_START, _END = "<|startoftext|>", "<|endoftext|>"


class Described(NamedTuple):
    """A model of transformers in our terms."""

    settings: dict[str, Any]
    """Fields of `ModelConfig`; none of the image encoder's if there is none."""
    image_size: int
    kind: str
    """clip, siglip or timm, for the preprocessing of images."""


def read_settings(
    values: Mapping[str, Any], *, image: bool, text: bool, pooling: str = "mean"
) -> Described:
    """Translates a config.json of transformers; encoders that are not wanted can be of any kind.

    `pooling` is that of a text encoder by itself.

    Raises:
        UnknownArchitectureError: ours has no such model; it names the settings.
    """
    kind = values["model_type"]
    if kind in transformers_text.PAD_IDS:
        return Described(_of_transformers(kind, values, pooling), 0, "")
    is_dual = kind == "vision-text-dual-encoder"
    if kind not in ("clip", "siglip") and not is_dual:
        raise UnknownArchitectureError(
            f"ours has no model of model_type {kind!r}: known are clip, siglip (which SigLIP 2 of "
            "fixed size is too), vision-text-dual-encoder, and of texts "
            f"{', '.join(transformers_text.PAD_IDS)}"
        )
    groups: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for tower, group in groups.items():
        for name in (f"{tower}_config", f"{tower}_config_dict"):  # older files have both
            group |= values.get(name) or {}
    kinds = {tower: str(group.get("model_type", "")).split("_")[0] if is_dual else kind
             for tower, group in groups.items()}  # fmt: skip
    settings: dict[str, Any] = {}
    if kind == "siglip":
        width = {**_DEFAULTS["siglip vision"], **groups["vision"]}["hidden_size"]
        settings |= {"embed_dim": width}
    else:
        settings |= {"embed_dim": values.get("projection_dim", 512)}
    image_size = 224
    if image:
        encoder, image_size = _image_encoder(kinds["vision"], groups["vision"])
        projection = "none" if kind == "siglip" else "linear"
        settings |= {"image_encoder": encoder, "image_projection": projection}
    if text:
        settings |= _text_settings(kinds["text"], groups["text"], is_dual=is_dual)
        settings |= {"text_projection": "biased" if kind == "siglip" else "linear"}
    return Described(settings, image_size, kinds["vision"])


def _image_encoder(kind: str, given: Mapping[str, Any]) -> tuple[str, int]:
    """Timm's name of an image encoder, and its image size."""
    if kind == "timm":
        return str(given["architecture"]), timm_side(given)
    if kind not in _NORM_EPS:
        _refuse("vision_config", given, ["model_type"])
    group = {**_DEFAULTS[f"{kind} vision"], **given}
    if group["layer_norm_eps"] != _NORM_EPS[kind] or not group.get("vision_use_head", True):
        _refuse("vision_config", group, ["layer_norm_eps", "vision_use_head"])
    vit = ViT(
        kind=kind,
        patch_size=group["patch_size"],
        width=group["hidden_size"],
        depth=group["num_hidden_layers"],
        heads=group["num_attention_heads"],
        hidden=group["intermediate_size"],
        activation=_activation("vision_config", group),
        image_size=side_of(group["image_size"]),
    )
    return name_of(vit), vit.image_size


def timm_side(given: Mapping[str, Any]) -> int:
    """The image size that a config of timm's, or of its wrapper, says.

    Raises UnknownArchitectureError for arguments by which timm would build another model.
    """
    arguments = given.get("model_args") or {}
    if others := [name for name in arguments if name not in _SIZE_ARGUMENTS]:
        _refuse("model_args", arguments, others)
    size = arguments.get("img_size") or (given.get("pretrained_cfg") or {}).get("input_size")
    if size is None and (known := timm.get_pretrained_cfg(str(given["architecture"]))):
        size = known.input_size
    return int(side_of(size or 224))


def _text_settings(kind: str, given: Mapping[str, Any], *, is_dual: bool) -> dict[str, Any]:
    if is_dual and kind in transformers_text.PAD_IDS:
        return _of_transformers(kind, given, "pooler")
    if kind not in _NORM_EPS or (is_dual and kind == "siglip"):  # which has a head of its own
        _refuse("text_config", given, ["model_type"])
    group = {**_DEFAULTS[f"{kind} text"], **given}
    end = group.get("eos_token_id")
    if kind == "clip" and end not in (2, group["vocab_size"] - 1):  # 2: the largest id, as ours
        _refuse("text_config", group, ["eos_token_id", "vocab_size"])
    width = group["hidden_size"]
    return {
        "text_width": width,
        "text_layers": group["num_hidden_layers"],
        "text_heads": group["num_attention_heads"],
        "vocab_size": group["vocab_size"],
        "context_length": group["max_position_embeddings"],
        "text_activation": _activation("text_config", group),
        "text_causal": kind == "clip",
        "text_pool": "end" if kind == "clip" else "last",
        "text_mlp_ratio": _ratio(group["intermediate_size"], width),
        "text_norm_eps": float(group["layer_norm_eps"]),
    }


def _of_transformers(kind: str, given: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """A text encoder that is transformers' own; of a longer table of positions we take a part."""
    import transformers  # seconds

    group = {**transformers.AutoConfig.for_model(kind).to_dict(), **given}
    fixed = {
        **{"pad_token_id": transformers_text.PAD_IDS[kind], "is_decoder": False},
        **{"type_vocab_size": transformers_text.type_vocab_size(kind)},
        **{"position_embedding_type": "absolute", "relative_attention_num_buckets": 32},
    }
    other = [name for name, value in fixed.items() if group.get(name, value) != value]
    if other or (kind == "distilbert" and pooling == "pooler"):
        _refuse("text_config", group, ["model_type", *other])
    width, layers, heads, hidden, activation = (
        group[transformers_text.field_of(kind, name)]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "hidden_act")
    )  # fmt: skip
    positions = group["max_position_embeddings"] - transformers_text.unused_positions(kind)
    return {
        "text_width": width,
        "text_layers": layers,
        "text_heads": heads,
        "vocab_size": group["vocab_size"],
        "context_length": min(positions, LONGEST_CAPTION),
        "text_activation": _activation("text_config", {"hidden_act": activation}),
        "text_causal": False,
        "text_pool": f"{kind}:{pooling}",
        "text_mlp_ratio": _ratio(hidden, width),
        "text_norm_eps": float(group.get("layer_norm_eps", 1e-12)),
    }


def pooling_of(values: Mapping[str, Any]) -> str:
    """How a config of sentence-transformers' pooling reads tokens; the mean where it is empty."""
    start = "pooling_mode_"
    modes = [name.removeprefix(start).rpartition("_")[0] for name, is_on in values.items()
             if name.startswith(start) and is_on is True]  # fmt: skip
    mode = values.get("pooling_mode") or ",".join(modes) or "mean"
    if mode not in ("cls", "mean"):
        raise UnknownArchitectureError(f"ours reads texts at cls or by their mean, not by {mode}")
    return str(mode)


def text_encoder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a text encoder by itself by our names, without heads and poolers."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _OF_TEXT_ENCODER.fullmatch(name)
        if match is not None and not name.endswith(".position_ids"):
            name = match[1].replace(".gamma", ".weight").replace(".beta", ".bias")  # of TensorFlow
            found[f"text_encoder.network.{name}"] = tensor
    return found


def _ratio(hidden: int, width: int) -> float:
    """A factor by which a width, rounded down, gives exactly the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _activation(where: str, group: Mapping[str, Any]) -> str:
    found = [
        ours
        for ours, theirs in transformers_text.ACTIVATIONS.items()
        if theirs == group["hidden_act"]
    ]
    if not found:
        _refuse(where, group, ["hidden_act"])
    return found[0]


def _refuse(where: str, group: Mapping[str, Any], names: list[str]) -> NoReturn:
    shown = ", ".join(f"{name}={group[name]!r}" for name in names if name in group)
    raise UnknownArchitectureError(f"ours has no encoder with {where} {shown}")


def layout_of(model: UniCL) -> Layout:
    """The class of transformers that computes exactly what a model does."""
    config, encoder = model.config.model, model.image_encoder
    if model.text_encoder is None:
        return "unicl"
    projections = config.image_projection, config.text_projection
    texts = config.text_causal, config.text_pool
    if (
        model.learnt.keys() == {"logit_scale", "logit_bias"}
        and (projections, texts) == (("none", "biased"), (False, "last"))
        and _is_vit_of(encoder, "siglip")
    ):
        return "siglip"
    has_space = model.learnt.keys() == {"logit_scale"} and projections == ("linear", "linear")
    is_like_clip = texts == (True, "end") and config.vocab_size == Tokenizer().vocab_size
    if has_space and is_like_clip and _is_vit_of(encoder, "clip"):
        return "clip"
    is_known = is_like_clip or config.text_pool.endswith(":pooler")
    can_be_wrapped = has_space and is_known and is_of_timm(config.image_encoder)
    return "vision-text-dual-encoder" if can_be_wrapped else "unicl"


def _is_vit_of(encoder: Any, kind: str) -> bool:
    """Whether an encoder is CLIP's ViT (a norm first, read at its token) or SigLIP's."""
    if type(encoder) is not vision_transformer.VisionTransformer:
        return False
    block, norms = encoder.blocks[0], [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
    outside = {name for name, _ in encoder.named_parameters() if not name.startswith("blocks.")}
    prefix = kind == "clip"
    return (
        outside == _VIT_PARAMETERS[kind]
        and {name for name, _ in block.named_parameters()} == _BLOCK_PARAMETERS
        and type(block) is vision_transformer.Block
        and type(block.mlp.act) in ACTIVATIONS
        and {norm.eps for norm in norms} == {_NORM_EPS[kind]}
        and encoder.global_pool == ("token" if kind == "clip" else "map")
        and encoder.pos_embed.shape[1] == encoder.patch_embed.num_patches + prefix
    )


def settings_for_transformers(model: UniCL, layout: Layout) -> dict[str, Any]:
    """The fields of a config.json by which `AutoModel` builds a model."""
    named = {"model_type": layout, "architectures": [_CLASSES[layout]]}
    if layout == "unicl":
        return named
    config = model.config.model
    text = {
        "model_type": "siglip_text_model" if layout == "siglip" else "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": int(config.text_width * config.text_mlp_ratio),
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": transformers_text.ACTIVATIONS[config.text_activation],
        "layer_norm_eps": config.text_norm_eps,
    }
    if config.text_kind:
        text = model.text_encoder.network.config.to_diff_dict()
    elif layout == "siglip":
        text["projection_size"] = config.embed_dim
    else:
        text |= {
            "projection_dim": config.embed_dim,
            "bos_token_id": config.vocab_size - 2,
            "eos_token_id": config.vocab_size - 1,
            "pad_token_id": config.vocab_size - 1,
        }
    encoder: Any = model.image_encoder
    vision: dict[str, Any] = {"hidden_size": feature_width(encoder)}
    if layout == "vision-text-dual-encoder":
        vision |= {
            "model_type": "timm_wrapper",
            "architecture": config.image_encoder,
            "model_args": timm_arguments(model),
            "num_classes": 0,
            "label_names": [],
        }
    else:
        block = encoder.blocks[0]
        vision |= {
            "model_type": f"{layout}_vision_model",
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": model.config.data.image_size,
            "patch_size": encoder.patch_embed.patch_size[0],
            "hidden_act": transformers_text.ACTIVATIONS[ACTIVATIONS[type(block.mlp.act)]],
            "layer_norm_eps": encoder.norm.eps,
            **({"projection_dim": config.embed_dim} if layout == "clip" else {}),
        }
    space = {
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
    }
    return {
        **named,
        **(space if layout != "siglip" else {}),
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
    given = {"input_ids": tokens}
    if model.config.model.text_kind:
        given["input_ids"], given["attention_mask"] = model.text_encoder.with_padding(tokens)
    found = theirs(**given, pixel_values=images)
    is_training = model.training
    model.eval()
    pairs = {
        "image features": (model.encode_image(images), found.image_embeds),
        "text features": (model.encode_text(tokens), found.text_embeds),
    }
    model.train(is_training)
    return max(require_equal(*pair, what=what) for what, pair in pairs.items())
