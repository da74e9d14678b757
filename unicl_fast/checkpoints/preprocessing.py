"""What is done to an image and a text before a model sees them, in words that others read.

A model is of no use without it: a wrong mean costs points of accuracy and raises no error. Every
format that `unicl_fast.conversion` writes carries it. It knows nothing of classes or prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unicl_fast.config import Interpolation, TrainConfig

_PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers stores


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How `unicl-eval` prepares images and texts for one model."""

    resize: int
    """Pixels of the shorter side after scaling."""
    image_size: int
    """Side of the square that is then cut from the centre."""
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    context_length: int
    vocab_size: int

    @classmethod
    def of(cls, config: TrainConfig) -> Preprocessing:
        """That of evaluation; training cuts and colours at random."""
        data, model = config.data, config.model
        return cls(
            resize=data.evaluation_resize,
            image_size=data.image_size,
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
        )

    def as_words(self) -> dict[str, Any]:
        """For people and programs of their own: `preprocessing.json`."""
        return {
            "image": {
                "color": "RGB",
                "resize_shorter_side_to": self.resize,
                "interpolation": self.interpolation,
                "antialias": True,
                "center_crop": self.image_size,
                "scale_to": [0.0, 1.0],
                "mean": list(self.mean),
                "std": list(self.std),
                "layout": "NCHW",
                "type": "float32",
            },
            "text": {
                "tokenizer": "CLIP byte-pair encoding, lower case",
                "context_length": self.context_length,
                "vocab_size": self.vocab_size,
                "start_token": self.vocab_size - 2,
                "end_token": self.vocab_size - 1,
                "padding_token": 0,
                "type": "int64",
            },
        }

    def for_timm(self) -> dict[str, Any]:
        """The fields of a timm `pretrained_cfg`."""
        return {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": self._crop_fraction(),
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def for_open_clip(self) -> dict[str, Any]:
        """The `preprocess_cfg` of open_clip, which always scales to the size that it cuts."""
        return {
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": "shortest",
        }

    def for_transformers(self) -> dict[str, Any]:
        """A `preprocessor_config.json`, as CLIPImageProcessor of transformers takes it."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.resize},
            "resample": _PILLOW_FILTERS[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def _crop_fraction(self) -> float:
        """image_size / resize, such that timm, which divides and rounds down, finds resize."""
        fraction = self.image_size / self.resize
        while math.floor(self.image_size / fraction) < self.resize:
            fraction = math.nextafter(fraction, 0)
        return fraction
