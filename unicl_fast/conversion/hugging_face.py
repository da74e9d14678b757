"""Writes configs with which transformers' `AutoModel` loads our exports, and reads its configs.

CLIPModel holds CLIP's ViTs, SiglipModel SigLIP's and its text encoder, VisionTextDualEncoderModel
any encoder of timm. None supports other objectives or text encoders, or the small image encoders
that only this package registers with timm.
"""

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from unicl_fast.conversion.libraries import is_of_timm, timm_arguments
from unicl_fast.conversion.open_clip import UnknownArchitectureError, refuse_settings, side_of
from unicl_fast.conversion.output import (
    require_equal_features,
    sample_images,
    sample_tokens,
    write_json,
)
from unicl_fast.dataset.other_tokens import LONGEST_CAPTION
from unicl_fast.models import transformers_text
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL
from unicl_fast.models.vits import ACTIVATIONS, ViT, mlp_ratio, name_of
from unicl_fast.system.program import logging_at
from unicl_fast.text.tokenizer import Tokenizer, read_vocabulary

Layout = Literal["clip", "siglip", "vision-text-dual-encoder", "unicl"]
"""The model_type of an export; the last one is our own."""
_CLASSES: dict[Layout, str] = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "unicl": "UniCL",
}
_NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
_SIZES: dict[str, Any] = {
    **{"hidden_size": 768, "intermediate_size": 3072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12},
}
_CLIP = _SIZES | {"hidden_act": "quick_gelu", "layer_norm_eps": _NORM_EPS["clip"]}
_SIGLIP = _SIZES | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": _NORM_EPS["siglip"]}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip text": {
        **_CLIP,
        **{"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        **{"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
    },
    "clip vision": {**_CLIP, "image_size": 224, "patch_size": 32},
    "siglip text": {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64},
    "siglip vision": {**_SIGLIP, "image_size": 224, "patch_size": 16},
}
"""transformers' values for fields that a config.json leaves out."""
_SIZE_ARGUMENTS = ("img_size", "dynamic_img_size", "num_classes", "drop_rate", "drop_path_rate")
"""Arguments of timm that do not change features at one image size."""
_OF_TEXT_ENCODER = re.compile(
    r"(?:(?:bert|roberta|distilbert|mpnet)\.)?((?:embeddings|encoder|transformer)\..*)"
)
_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_settings(
    values: Mapping[str, Any], *, image: bool, text: bool, pooling: str
) -> tuple[dict[str, Any], int, str]:
    """Translates a config.json of transformers; encoders that are not wanted can be of any kind.

    Returns fields of `ModelConfig`, the image size, and the kind of preprocessing: clip, siglip,
    timm, or "" for a text encoder by itself, for which `pooling` counts. Raises
    UnknownArchitectureError, which names the settings that ours do not support.
    """
    kind = values["model_type"]
    if kind in transformers_text.PAD_IDS:
        return _of_transformers(kind, values, pooling), 0, ""
    is_dual, is_siglip = kind == "vision-text-dual-encoder", kind == "siglip"
    if kind not in _NORM_EPS and not is_dual:
        raise UnknownArchitectureError(
            f"ours has no model of model_type {kind!r}: known are clip, siglip (also SigLIP 2 of "
            "fixed size), vision-text-dual-encoder, and for texts "
            f"{', '.join(transformers_text.PAD_IDS)}"
        )
    groups: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for tower, group in groups.items():
        for name in (f"{tower}_config", f"{tower}_config_dict"):  # older files have both
            group |= values.get(name) or {}
    kinds = {tower: str(group.get("model_type", "")).split("_")[0] if is_dual else kind
             for tower, group in groups.items()}  # fmt: skip
    width = groups["vision"].get("hidden_size", _SIZES["hidden_size"])
    settings: dict[str, Any] = {
        "embed_dim": width if is_siglip else values.get("projection_dim", 512)
    }
    image_size = 224
    if image:
        encoder, image_size = _image_encoder(kinds["vision"], groups["vision"])
        projection = "none" if is_siglip else "linear"
        settings |= {"image_encoder": encoder, "image_projection": projection}
    if text:
        settings |= _text_settings(kinds["text"], groups["text"], is_dual=is_dual)
        settings |= {"text_projection": "biased" if is_siglip else "linear"}
    return settings, image_size, kinds["vision"]


def _image_encoder(kind: str, given: Mapping[str, Any]) -> tuple[str, int]:
    """Timm's name of an image encoder, and its image size."""
    if kind == "timm":
        return str(given["architecture"]), timm_side(given)
    if kind not in _NORM_EPS:
        refuse_settings("vision_config", given, ["model_type"])
    group = {**_DEFAULTS[f"{kind} vision"], **given}
    if group["layer_norm_eps"] != _NORM_EPS[kind] or not group.get("vision_use_head", True):
        refuse_settings("vision_config", group, ["layer_norm_eps", "vision_use_head"])
    vit = ViT(
        kind=kind,
        patch_size=group["patch_size"],
        width=group["hidden_size"],
        depth=group["num_hidden_layers"],
        heads=group["num_attention_heads"],
        hidden=group["intermediate_size"],
        activation=_activation("vision_config", group, group["hidden_act"]),
        image_size=side_of(group["image_size"]),
    )
    return name_of(vit), vit.image_size


def timm_side(given: Mapping[str, Any]) -> int:
    """The image size in a config of timm or of its wrapper.

    Raises UnknownArchitectureError for arguments with which timm would build another model.
    """
    arguments = given.get("model_args") or {}
    if others := [name for name in arguments if name not in _SIZE_ARGUMENTS]:
        refuse_settings("model_args", arguments, others)
    size = arguments.get("img_size") or (given.get("pretrained_cfg") or {}).get("input_size")
    if size is None and (known := timm.get_pretrained_cfg(str(given["architecture"]))):
        size = known.input_size
    return int(side_of(size or 224))


def _text_settings(kind: str, given: Mapping[str, Any], *, is_dual: bool) -> dict[str, Any]:
    if is_dual and kind in transformers_text.PAD_IDS:
        return _of_transformers(kind, given, "pooler")
    if kind not in _NORM_EPS or (is_dual and kind == "siglip"):  # SigLIP's texts have a head
        refuse_settings("text_config", given, ["model_type"])
    group = {**_DEFAULTS[f"{kind} text"], **given}
    end = group.get("eos_token_id")
    if kind == "clip" and end not in (2, group["vocab_size"] - 1):  # 2: the largest id, as ours
        refuse_settings("text_config", group, ["eos_token_id", "vocab_size"])
    width = group["hidden_size"]
    return {
        "text_width": width,
        "text_layers": group["num_hidden_layers"],
        "text_heads": group["num_attention_heads"],
        "vocab_size": group["vocab_size"],
        "context_length": group["max_position_embeddings"],
        "text_activation": _activation("text_config", group, group["hidden_act"]),
        "text_causal": kind == "clip",
        "text_pool": "end" if kind == "clip" else "last",
        "text_mlp_ratio": mlp_ratio(group["intermediate_size"], width),
        "text_norm_eps": float(group["layer_norm_eps"]),
    }


def _of_transformers(kind: str, given: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """The settings of transformers' own text encoders, for texts of at most LONGEST_CAPTION."""
    import transformers  # seconds

    group = {**transformers.AutoConfig.for_model(kind).to_dict(), **given}
    fixed = {
        **{"pad_token_id": transformers_text.PAD_IDS[kind], "is_decoder": False},
        **{"type_vocab_size": transformers_text.type_vocab_size(kind)},
        **{"position_embedding_type": "absolute", "relative_attention_num_buckets": 32},
    }
    other = [name for name, value in fixed.items() if group.get(name, value) != value]
    if other or (kind == "distilbert" and pooling == "pooler"):
        refuse_settings("text_config", group, ["model_type", *other])
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
        "text_activation": _activation("text_config", group, activation),
        "text_causal": False,
        "text_pool": f"{kind}:{pooling}",
        "text_mlp_ratio": mlp_ratio(hidden, width),
        "text_norm_eps": float(group.get("layer_norm_eps", 1e-12)),
    }


def pooling_of(values: Mapping[str, Any]) -> str:
    """The pooling in a config of sentence-transformers; mean if it names none."""
    start = "pooling_mode_"
    modes = [name.removeprefix(start).rpartition("_")[0] for name, is_on in values.items()
             if name.startswith(start) and is_on is True]  # fmt: skip
    mode = values.get("pooling_mode") or ",".join(modes) or "mean"
    if mode not in ("cls", "mean"):
        raise UnknownArchitectureError(f"ours pools texts at cls or by their mean, not by {mode}")
    return str(mode)


def text_encoder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a text encoder by itself to ours, without heads and poolers."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _OF_TEXT_ENCODER.fullmatch(name)
        if match is not None and not name.endswith(".position_ids"):
            name = match[1].replace(".gamma", ".weight").replace(".beta", ".bias")  # TensorFlow's
            found[f"text_encoder.network.{name}"] = tensor
    return found


def _activation(name: str, group: Mapping[str, Any], given: str) -> str:
    for ours, theirs in transformers_text.ACTIVATIONS.items():
        if theirs == given:
            return ours
    refuse_settings(name, {**group, "hidden_act": given}, ["hidden_act"])


def layout_of(model: UniCL) -> Layout:
    """The class of transformers that computes the same as a model."""
    config, encoder = model.config.model, model.image_encoder
    if model.text_encoder is None:
        return "unicl"
    projections = config.image_projection, config.text_projection
    texts = config.text_causal, config.text_pool
    if (
        model.learnt.keys() == {"logit_scale", "logit_bias"}
        and (projections, texts) == (("none", "biased"), (False, "last"))
        and _vit_of(encoder, "siglip")
    ):
        return "siglip"
    has_space = model.learnt.keys() == {"logit_scale"} and projections == ("linear", "linear")
    is_like_clip = texts == (True, "end") and config.vocab_size == Tokenizer().vocab_size
    if has_space and is_like_clip and _vit_of(encoder, "clip"):
        return "clip"
    is_known = is_like_clip or config.text_pool.endswith(":pooler")
    can_be_wrapped = has_space and is_known and is_of_timm(config.image_encoder)
    return "vision-text-dual-encoder" if can_be_wrapped else "unicl"


def _vit_of(encoder: Any, kind: str) -> ViT | None:
    """The sizes of an encoder that is a ViT of CLIP's or SigLIP's; None for any other."""
    if type(encoder) is not VisionTransformer:
        return None
    block, patches = encoder.blocks[0], encoder.patch_embed
    if type(block) is not Block or type(block.mlp) is not Mlp:
        return None
    vit = ViT(
        kind=kind,
        patch_size=patches.patch_size[0],
        width=encoder.embed_dim,
        depth=len(encoder.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        activation=ACTIVATIONS.get(type(block.mlp.act), ""),
        image_size=patches.img_size[0],
    )
    if not vit.activation:
        return None
    with torch.device("meta"):
        same = VisionTransformer(img_size=vit.image_size, num_classes=0, **vit.arguments)
    return vit if _parts(encoder) == _parts(same) else None


def _parts(encoder: Any) -> tuple[object, ...]:
    """The parts that decide a ViT's features, besides its sizes."""
    norms = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    shapes = {name: parameter.shape for name, parameter in encoder.named_parameters()}
    return encoder.global_pool, norms, shapes


def settings_for_transformers(model: UniCL, layout: Layout) -> dict[str, Any]:
    """The fields of a config.json with which `AutoModel` builds a model."""
    named: dict[str, Any] = {"model_type": layout, "architectures": [_CLASSES[layout]]}
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
    vision: dict[str, Any] = {"hidden_size": feature_width(model.image_encoder)}
    if layout == "vision-text-dual-encoder":
        vision |= {
            "model_type": "timm_wrapper",
            "architecture": config.image_encoder,
            "model_args": timm_arguments(model),
            "num_classes": 0,
            "label_names": [],
        }
    else:
        vit = _vit_of(model.image_encoder, layout)
        assert vit is not None
        vision |= {
            "model_type": f"{layout}_vision_model",
            "intermediate_size": vit.hidden,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads,
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "hidden_act": transformers_text.ACTIVATIONS[vit.activation],
            "layer_norm_eps": _NORM_EPS[layout],
            **({"projection_dim": config.embed_dim} if layout == "clip" else {}),
        }
    if layout != "siglip":
        named |= {"projection_dim": config.embed_dim}
        named |= {"logit_scale_init_value": model.logit_scale.item()}
    return {**named, "text_config": text, "vision_config": vision, "dtype": "float32"}


def write_tokenizer(folder: Path, *, context_length: int) -> None:
    """Writes CLIP's tokenizer for transformers; it cuts texts at `context_length` tokens."""
    vocabulary, merges = read_vocabulary()
    tokens = dict(zip([*list(vocabulary)[:-2], _START, _END], vocabulary.values(), strict=True))
    write_json(folder / "vocab.json", tokens)
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")
    described = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    ends = dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END)
    write_json(folder / "tokenizer_config.json", {**described, "bos_token": _START, **ends})


def is_installed() -> bool:
    """Whether transformers is installed, to check exports."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def difference_in_transformers(model: UniCL, folder: Path) -> float:
    """Loads an export by `AutoModel`, and returns the largest difference from our features.

    Raises RuntimeError if transformers cannot load it, or its features differ.
    """
    import transformers  # seconds to import

    transformers.utils.logging.disable_progress_bar()
    with logging_at("transformers", logging.ERROR):
        try:
            theirs = transformers.AutoModel.from_pretrained(folder).eval()
        except Exception as error:  # a version without one of the classes
            raise RuntimeError(
                f"transformers {transformers.__version__} cannot load the converted model: "
                f"{error!r}; nothing was written: pip install --upgrade transformers timm"
            ) from error
    given = {"input_ids": sample_tokens(model), "pixel_values": sample_images(model)}
    if model.config.model.text_kind:
        ids, mask = model.text_encoder.with_padding(given["input_ids"])
        given |= {"input_ids": ids, "attention_mask": mask}
    found = theirs(**given)
    return require_equal_features(model, found.image_embeds, found.text_embeds)
