"""Translates preprocessing between `DataConfig` and the formats of other libraries.

It must accompany the weights: a wrong mean costs accuracy and raises no error.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

from unicl_fast.config import DataConfig, Interpolation, ModelConfig
from unicl_fast.models.transformers_text import PAD_IDS
from unicl_fast.pipelines.plan.crop import padding_level

_PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # transformers stores Pillow's numbers


def in_words(data: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """The content of `preprocessing.json`, for those who write their own preprocessing."""
    size: dict[str, Any] = {
        "longest": {"resize_longer_side_to": data.image_size, "pad_to": data.image_size,
                    "padding": padding_level(data)},
        "squash": {"resize_both_sides_to": data.image_size},
    }.get(str(data.evaluation_resize), {"resize_shorter_side_to": data.evaluation_resize,
                                        "center_crop": data.image_size})  # fmt: skip
    tokens: dict[str, Any] = {
        "tokenizer": "CLIP byte-pair encoding, lower case",
        "start_token": model.vocab_size - 2,
        "end_token": model.vocab_size - 1,
        "padding_token": 0,
    }
    if model.tokenizer:
        masks = model.text_pool.partition(":")[0] in PAD_IDS  # zeros, not the tokenizer's padding
        tokens = {"tokenizer": "the source's own"} | ({"padding_token": 0} if masks else {})
    return {
        "image": {
            "color": "RGB",
            **size,
            "interpolation": data.interpolation,
            "antialias": True,
            "scale_to": [0.0, 1.0],
            "mean": list(data.mean),
            "std": list(data.std),
            "layout": "NCHW",
            "type": "float32",
        },
        "text": {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            "type": "int64",
            **tokens,
        },
    }


def for_timm(data: DataConfig) -> dict[str, Any]:
    """The fields of a timm `pretrained_cfg`."""
    fraction = 1.0
    if isinstance(data.evaluation_resize, int):
        # timm's image_size / fraction, rounded down, must be evaluation_resize
        fraction = data.image_size / data.evaluation_resize
        while math.floor(data.image_size / fraction) < data.evaluation_resize:
            fraction = math.nextafter(fraction, 0)
    modes = {"longest": "border", "squash": "squash"}
    return {
        "input_size": [3, data.image_size, data.image_size],
        "interpolation": data.interpolation,
        "crop_pct": fraction,
        "crop_mode": modes.get(str(data.evaluation_resize), "center"),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def for_open_clip(data: DataConfig) -> dict[str, Any]:
    """The `preprocess_cfg` of open_clip, which always scales to the size of the crop."""
    mode = data.evaluation_resize
    return {
        "mode": "RGB",
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "resize_mode": mode if isinstance(mode, str) else "shortest",
        **({"fill_color": padding_level(data)} if mode == "longest" else {}),
    }


def for_transformers(data: DataConfig) -> dict[str, Any] | None:
    """A `preprocessor_config.json` for transformers' CLIPImageProcessor; None: it cannot pad."""
    if data.evaluation_resize == "longest":
        return None
    squashes = data.evaluation_resize == "squash"
    square = {"height": data.image_size, "width": data.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squashes else {"shortest_edge": data.evaluation_resize},
        "resample": _PILLOW_FILTERS[data.interpolation],
        "do_center_crop": not squashes,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }


def of_library(values: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """The fields of `DataConfig` that are in open_clip's or timm's settings.

    `image_size` is the side of their images, or None. open_clip scales to this size, timm to it
    divided by `crop_pct`.
    """
    found = _statistics(values.get("mean"), values.get("std"))
    if values.get("interpolation") in get_args(Interpolation):
        found["interpolation"] = values["interpolation"]
    if isinstance(image_size, int):
        fraction = values.get("crop_pct") or 1.0
        found["image_size"] = image_size
        found["evaluation_resize"] = math.floor(image_size / fraction)
    mode = values.get("resize_mode", values.get("crop_mode"))  # open_clip's, or timm's
    if mode in ("longest", "border", "squash"):
        found["evaluation_resize"] = "squash" if mode == "squash" else "longest"
    return found


def of_transformers(values: Mapping[str, Any], image_size: int, kind: str) -> dict[str, Any]:
    """The same for a `preprocessor_config.json`, with the defaults of `kind`."""
    is_siglip = kind == "siglip"  # its images are squashed
    default = [0.5] * 3 if is_siglip else None
    found = _statistics(values.get("image_mean", default), values.get("image_std", default))
    filters = {number: name for name, number in _PILLOW_FILTERS.items()}
    found["interpolation"] = filters.get(values.get("resample", 3), "bicubic")
    size = values.get("size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    squashes = "height" in size if isinstance(size, dict) else is_siglip
    if squashes and not values.get("do_center_crop", False):
        found["evaluation_resize"] = "squash"
    else:
        is_larger = isinstance(shorter, int) and shorter > image_size
        found["evaluation_resize"] = shorter if is_larger else image_size
    return found | {"image_size": image_size}


def of_export(pixels: Mapping[str, Any]) -> dict[str, Any]:
    """The same for our part of an export's config, but the size, which is its model's."""
    return {
        "interpolation": pixels["interpolation"],
        "evaluation_resize": pixels["evaluation_resize"],
        **_statistics(pixels["mean"], pixels["std"]),
    }


def _statistics(mean: Any, std: Any) -> dict[str, Any]:
    return {
        name: tuple(map(float, numbers))
        for name, numbers in (("mean", mean), ("std", std))
        if isinstance(numbers, list | tuple) and len(numbers) == 3
    }
