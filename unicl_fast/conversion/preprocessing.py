"""Describes our preprocessing in each format's terms.

It goes with the weights, since a wrong mean costs accuracy and raises no error.
"""

from __future__ import annotations

import math
from typing import Any

from unicl_fast.config import DataConfig, ModelConfig
from unicl_fast.pipelines.plan.crop import padding_level

_PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers stores


def in_words(data: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """The content of `preprocessing.json`, for people who write their own preprocessing."""
    size: dict[str, Any] = {
        "longest": {"resize_longer_side_to": data.image_size, "pad_to": data.image_size,
                    "padding": padding_level(data)},
        "squash": {"resize_both_sides_to": data.image_size},
    }.get(str(data.evaluation_resize), {"resize_shorter_side_to": data.evaluation_resize,
                                        "center_crop": data.image_size})  # fmt: skip
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
            "tokenizer": "CLIP byte-pair encoding, lower case",
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            "start_token": model.vocab_size - 2,
            "end_token": model.vocab_size - 1,
            "padding_token": 0,
            "type": "int64",
        },
    }


def for_timm(data: DataConfig) -> dict[str, Any]:
    """The fields of a timm `pretrained_cfg`."""
    fraction = 1.0
    if isinstance(data.evaluation_resize, int):
        # timm divides by the fraction and rounds down, which must give evaluation_resize
        fraction = data.image_size / data.evaluation_resize
        while math.floor(data.image_size / fraction) < data.evaluation_resize:
            fraction = math.nextafter(fraction, 0)
    return {
        "input_size": [3, data.image_size, data.image_size],
        "interpolation": data.interpolation,
        "crop_pct": fraction,
        "crop_mode": {"longest": "border", "squash": "squash"}.get(
            str(data.evaluation_resize), "center"
        ),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def for_open_clip(data: DataConfig) -> dict[str, Any]:
    """The `preprocess_cfg` of open_clip, which always scales to the size that it crops."""
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
