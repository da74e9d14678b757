"""Translates open_clip's configs and names of tensors to ours and back.

Our image encoders are timm's: open_clip's own (CLIP's ViT and ResNet) are read as timm's of the
same architecture, for which timm renames the tensors, and every encoder is written as timm's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from torch import Tensor

from unicl_fast.conversion import preprocessing
from unicl_fast.conversion.libraries import fixed_size
from unicl_fast.conversion.output import (
    new_folder,
    require_equal_features,
    sample_images,
    sample_tokens,
    write_json,
    write_own_tokenizer,
    write_tensors,
)
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL
from unicl_fast.models.vits import ViT, name_of
from unicl_fast.text.file_tokenizer import CANONICAL, TOKENIZER_FILES

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_NATIVE_EPS = 1e-5

# settings that an equal encoder of ours does not need; some are only for training
_IGNORED = {
    *("image_size", "head_width", "patch_dropout", "output_tokens", "pos_embed_type"),
    *("attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id", "eos_id"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
_READ = {
    *("width", "layers", "heads", "mlp_ratio", "patch_size", "act_kwargs", "norm_kwargs"),
    *("timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"),
    *("context_length", "vocab_size", "no_causal_mask", "pool_type", "proj_bias", "proj_type"),
}
_RESNETS = {
    (64, 3, 4, 6, 3): "resnet50_clip",
    (64, 3, 4, 23, 3): "resnet101_clip",
    (80, 4, 6, 10, 6): "resnet50x4_clip",
    (96, 6, 8, 18, 8): "resnet50x16_clip",
    (128, 3, 15, 36, 10): "resnet50x64_clip",
}
"""Width and layers of each stage to timm's name."""
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_MATRICES = {
    "visual.proj": "image_projection",
    "text_projection": "text_projection",
    "text.text_projection": "text_projection",
}
_LINEARS = {
    "visual.head.mlp.fc1": "image_hidden",
    "visual.head.mlp.fc2": "image_projection",
    **dict.fromkeys(("visual.head.proj", "visual.attnpool.c_proj"), "image_projection"),
    **dict.fromkeys(("text_projection", "text.text_projection"), "text_projection"),
    **dict.fromkeys(("text.proj", "text.proj.2"), "text_projection"),
    "text.proj.0": "text_hidden",
}
"""Linear projections; their weights are [out in]."""


class UnknownArchitectureError(ValueError):
    """A model has a setting that ours do not support."""


def image_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the image encoder of a `model_cfg` to fields of `ModelConfig`.

    Raises UnknownArchitectureError, which names the settings that ours do not support.
    """
    vision = model_cfg["vision_cfg"]
    _refuse_others("vision_cfg", vision)
    if vision.get("timm_model_name"):
        is_mlp = vision.get("timm_proj") == "mlp"
        pools_otherwise = pooling(model_cfg) in ("abs_attn", "rot_attn")
        if pools_otherwise or (is_mlp and vision.get("timm_proj_bias")):
            refuse_settings("vision_cfg", vision, ("timm_proj", "timm_proj_bias", "timm_pool"))
        if is_mlp:
            return {"image_encoder": vision["timm_model_name"], "image_projection": "mlp"}
        # without timm_proj, open_clip projects with timm's classifier
        has_bias = vision.get("timm_proj_bias") or not vision.get("timm_proj", "linear")
        projection = "biased" if has_bias else "linear"
        projection = "none" if vision.get("timm_proj") == "none" else projection
        return {"image_encoder": vision["timm_model_name"], "image_projection": projection}
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    if isinstance(layers, list | tuple):
        name = _RESNETS.get((width, *layers))
        if name is None:
            refuse_settings("vision_cfg", vision, ("width", "layers"))
        return {"image_encoder": name, "image_projection": "biased"}
    if vision.get("pool_type", "tok") != "tok" or vision.get("act_kwargs"):
        refuse_settings("vision_cfg", vision, ("pool_type", "act_kwargs"))
    if (vision.get("norm_kwargs") or {}).get("eps", _NATIVE_EPS) != _NATIVE_EPS:
        refuse_settings("vision_cfg", vision, ("norm_kwargs",))
    vit = ViT(
        kind="clip",
        patch_size=vision.get("patch_size", 16),
        width=width,
        depth=layers,
        heads=width // vision.get("head_width", 64),
        hidden=int(width * vision.get("mlp_ratio", 4.0)),
        activation="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        image_size=side_of(vision.get("image_size", 224)),
    )
    return {"image_encoder": name_of(vit), "image_projection": "linear"}


def text_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the text encoder of a `model_cfg`, as `image_settings`."""
    text = model_cfg["text_cfg"]
    _refuse_others("text_cfg", text)
    pools = {"argmax": "end", "last": "last"}
    activations = {None: "gelu", "none": "gelu", "tanh": "gelu_tanh"}
    pool = text.get("pool_type", "argmax")
    approximate = (text.get("act_kwargs") or {}).get("approximate")
    if pool not in pools or approximate not in activations:
        refuse_settings("text_cfg", text, ("pool_type", "act_kwargs"))
    projection = "biased" if text.get("proj_bias") else "linear"
    return {
        "text_width": text.get("width", 512),
        "text_layers": text.get("layers", 12),
        "text_heads": text.get("heads", 8),
        "vocab_size": text.get("vocab_size", 49408),
        "context_length": text.get("context_length", 77),
        "text_activation": (
            "quick_gelu" if model_cfg.get("quick_gelu") else activations[approximate]
        ),
        "text_causal": not text.get("no_causal_mask", False),
        "text_pool": pools[pool],
        "text_mlp_ratio": float(text.get("mlp_ratio", 4.0)),
        "text_norm_eps": float((text.get("norm_kwargs") or {}).get("eps", _NATIVE_EPS)),
        "text_projection": "none" if text.get("proj_type") == "none" else projection,
    }


def pooling_of_texts(model_cfg: Mapping[str, Any]) -> str:
    """Our name of the pooling of a text encoder of transformers; empty for open_clip's own.

    Raises UnknownArchitectureError for another pooling or projection than ours.
    """
    text = model_cfg["text_cfg"]
    if not text.get("hf_model_name"):
        return ""
    _refuse_others("text_cfg", {**text, "hf_model_name": None})
    pooler = text.get("hf_pooler_type", "mean_pooler")
    found = [ours for ours, name in _POOLERS.items() if name == pooler]
    if not found or text.get("hf_proj_type", "mlp") not in ("linear", "mlp"):
        refuse_settings("text_cfg", text, ("hf_pooler_type", "hf_proj_type"))
    return found[0]


def tokenizer(model_cfg: Mapping[str, Any], place: str) -> str:
    """The tokenizer of a `model_cfg` as `model.tokenizer` names it; empty for CLIP's.

    `place` has its files; if empty, they are in the hub's repository of its name.
    """
    text = model_cfg["text_cfg"]
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    # encoders that pool at the end token would read padding with it, which others use
    if not name or (text.get("pool_type") != "last" and not text.get("hf_model_name")):
        return ""
    clean = (text.get("tokenizer_kwargs") or {}).get("clean")
    return (place or f"hf-hub:{name}") + CANONICAL * (clean == "canonicalize")


def pooling(model_cfg: Mapping[str, Any]) -> str:
    """The pooling of timm's image encoder, by timm's name; empty for the encoder's default."""
    vision = model_cfg["vision_cfg"]
    return str(vision.get("timm_pool", "avg")) if vision.get("timm_model_name") else ""


def side_of(size: Any) -> Any:
    """The side of square images, by a number or a list that ends in height and width.

    Raises UnknownArchitectureError for other images.
    """
    sides = set(size[-2:]) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise UnknownArchitectureError(f"ours needs square images, not {size}")
    return sides.pop()


def _refuse_others(group: str, values: Mapping[str, Any]) -> None:
    """Refuses enabled settings that we do not know, such as attentional_pool."""
    others = [name for name, value in values.items() if value and name not in _READ | _IGNORED]
    if others:
        refuse_settings(group, values, others)


def refuse_settings(group: str, values: Mapping[str, Any], names: Iterable[str]) -> NoReturn:
    """Raises UnknownArchitectureError, which names the settings of a group and their values."""
    found = ", ".join(f"{name}={values[name]!r}" for name in names if name in values)
    raise UnknownArchitectureError(f"ours has no encoder with {group} {found}")


def from_open_clip(
    model_cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Renames an open_clip model's weights to ours.

    Names of open_clip's own image encoders only get the prefix `image_encoder.`: timm renames them.
    """
    linears = {**_LINEARS, **dict.fromkeys(_projecting_classifier(model_cfg), "image_projection")}
    ours: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original.removeprefix("module.")
        layer, _, kind = name.rpartition(".")
        if name in _NO_WEIGHTS or kind == "position_ids":
            continue
        if name in ("logit_scale", "logit_bias"):
            ours[name] = tensor.reshape([])
        elif name in _MATRICES:
            ours[_MATRICES[name]] = tensor
        elif layer in linears:
            is_bias = kind == "bias"
            ours[linears[layer] + "_bias" * is_bias] = tensor if is_bias else tensor.T
        elif name.startswith("visual.trunk."):
            ours["image_encoder." + name.removeprefix("visual.trunk.")] = tensor
        elif name.startswith("text.transformer.") and model_cfg["text_cfg"].get("hf_model_name"):
            ours["text_encoder.network." + name.removeprefix("text.transformer.")] = tensor
        elif name.startswith("visual."):
            ours["image_encoder." + name] = tensor
        else:
            in_text = name.removeprefix("text.").removeprefix("transformer.")
            ours["text_encoder." + in_text] = tensor
    return ours


def _projecting_classifier(model_cfg: Mapping[str, Any]) -> list[str]:
    """The classifier of timm's image encoder, if open_clip uses it as the projection."""
    vision = model_cfg["vision_cfg"]
    if not vision.get("timm_model_name") or vision.get("timm_proj", "linear"):
        return []
    registered = timm.get_pretrained_cfg(vision["timm_model_name"])
    names = getattr(registered, "classifier", None) or "head"
    return [f"visual.trunk.{names if isinstance(names, str) else names[0]}"]


@torch.no_grad()
def write_open_clip(model: UniCL, folder: Path) -> float:
    """Writes a folder for open_clip, as `write_timm`.

    Also raises ValueError if open_clip cannot build this image encoder at this size.
    """
    import open_clip  # seconds to import

    _require_convertible(model)
    if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        raise ValueError(
            f"open_clip {open_clip.__version__} reads no folders: pip install 'open_clip_torch>=3'"
        )
    values = {
        "model_cfg": _open_clip_config(model),
        "preprocess_cfg": preprocessing.for_open_clip(model.config.data),
    }
    is_own, text = not model.config.model.text_kind, values["model_cfg"]["text_cfg"]
    with new_folder(folder) as aside:
        if not is_own:  # open_clip reads transformers' config.json from the place of this name
            write_json(aside / "config.json", model.text_encoder.network.config.to_dict())
            text["hf_model_name"] = str(aside)
        write_json(aside / CONFIG_FILE, values)
        write_tensors(aside / WEIGHTS_FILE, _open_clip_tensors(model))
        write_own_tokenizer(model, aside)
        theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{aside}")
        theirs.eval()
        images, texts = sample_images(model), sample_tokens(model)
        if not is_own:
            texts = model.text_encoder.with_padding(texts)[0]
            text["hf_model_name"] = str(folder.absolute())
            write_json(aside / CONFIG_FILE, values)
        return require_equal_features(model, theirs.encode_image(images), theirs.encode_text(texts))


def _require_convertible(model: UniCL) -> None:
    """Refuses an encoder that open_clip cannot build.

    It builds timm's encoders only at timm's image size, and expects features of num_features.
    """
    name, size = model.config.model.image_encoder, model.config.data.image_size
    pool, projection = model.config.model.text_pool, model.config.model.text_projection
    if model.config.model.text_kind and (
        pool.replace("xlm-", "").partition(":")[0] not in ("bert", "roberta")
        or projection not in ("linear", "mlp")
    ):
        raise ValueError(
            f"model.text_pool={pool} with model.text_projection={projection}: open_clip has BERT "
            "and RoBERTa, with a projection without bias: convert it to hf or onnx instead"
        )
    if (own_size := fixed_size(name)) not in (None, size):
        raise ValueError(
            f"open_clip builds {name} only for images of {own_size} pixels, but this model was "
            f"trained at {size}: convert it to timm, hf or onnx instead"
        )
    if projection == "mlp" and not model.config.model.text_kind:
        raise ValueError(
            "model.text_projection=mlp: open_clip projects this encoder's texts by one matrix: "
            "convert it to onnx instead"
        )
    width = feature_width(model.image_encoder)
    if width != int(model.image_encoder.num_features):  # type: ignore[arg-type]
        raise ValueError(
            f"{name} returns features of width {width}, but open_clip expects "
            f"{model.image_encoder.num_features}: convert it to timm, hf or onnx instead"
        )


def _open_clip_config(model: UniCL) -> dict[str, Any]:
    config = model.config.model
    vision: dict[str, Any] = {
        "timm_model_name": config.image_encoder,
        "timm_model_pretrained": False,
        "timm_pool": "",  # the model's own
        "timm_proj": "mlp" if config.image_projection == "mlp" else "linear",
        "timm_proj_bias": config.image_projection == "biased",
        "image_size": model.config.data.image_size,
    }
    if config.image_projection == "none":  # open_clip then needs the pooling by name
        pool = getattr(model.image_encoder, "global_pool", "")
        vision |= {"timm_proj": "none", "timm_pool": pool}
    text: dict[str, Any] = (
        {
            "context_length": config.context_length,
            "hf_proj_type": config.text_projection,
            "hf_pooler_type": _POOLERS[config.text_pool.partition(":")[2]],
        }
        if config.text_kind
        else {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
            "mlp_ratio": config.text_mlp_ratio,
            "norm_kwargs": {"eps": config.text_norm_eps},
            "no_causal_mask": not config.text_causal,
            "pool_type": "argmax" if config.text_pool == "end" else "last",
            "proj_bias": config.text_projection == "biased",
            "proj_type": "none" if config.text_projection == "none" else "linear",
        }
    )
    if place := config.tokenizer:  # open_clip reads a folder's files whichever name this is
        name = place.removesuffix(CANONICAL)
        text["hf_tokenizer_name"] = name[7:] if name.startswith("hf-hub:") else TOKENIZER_FILES[0]
        text["tokenizer_kwargs"] = {"clean": "canonicalize"} if name != place else {}
    if config.text_activation == "gelu_tanh":
        text["act_kwargs"] = {"approximate": "tanh"}
    learnt = model.learnt.get("logit_bias")
    bias = {} if learnt is None else {"init_logit_bias": learnt.item()}
    return {
        "embed_dim": config.embed_dim,
        **bias,
        # only for texts; timm's models have their own activation
        "quick_gelu": config.text_activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text,
    }


def _open_clip_tensors(model: UniCL) -> dict[str, Tensor]:
    """Renames the model's tensors to open_clip's."""
    names = {"image_projection_bias": "visual.head.proj.bias",
             "image_hidden_bias": "visual.head.mlp.fc1.bias",
             "text_projection_bias": "text_projection.bias"}  # fmt: skip
    linears = {"image_projection": "visual.head.proj.weight"}  # [out in]
    is_own = not model.config.model.text_kind
    if not is_own:
        linears |= {"text_projection": "text.proj.weight"}
    if model.config.model.text_projection == "mlp":
        linears |= {"text_hidden": "text.proj.0.weight", "text_projection": "text.proj.2.weight"}
    if model.config.model.image_projection == "mlp":
        linears |= {"image_hidden": "visual.head.mlp.fc1.weight",
                    "image_projection": "visual.head.mlp.fc2.weight"}  # fmt: skip
    if model.text_projection_bias is not None:
        linears["text_projection"] = "text_projection.weight"
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in linears:
            tensors[linears[name]] = tensor.T
        elif name.startswith("image_encoder."):
            tensors["visual.trunk." + name.removeprefix("image_encoder.")] = tensor
        elif not is_own and name.startswith("text_encoder.network."):
            tensors[name.replace("text_encoder.network", "text.transformer")] = tensor
        else:
            in_text = name.removeprefix("text_encoder.")
            is_block = in_text.startswith("resblocks.")
            tensors[names.get(name, "transformer." * is_block + in_text)] = tensor
    return tensors
