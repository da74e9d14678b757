"""A model without its run: `config.json` and `model.safetensors`, as the Hugging Face hub has them.

`unicl-convert hf` and `official` write such folders (`unicl_fast.conversion.export`); `load_model`,
and with it `unicl-eval`, reads them. With a model goes its `Preprocessing`: a wrong mean costs
points of accuracy and raises no error. Every format that `unicl_fast.conversion` writes has it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicl_fast.checkpoints.files import STATE_FILE
from unicl_fast.config import Interpolation, TrainConfig, config_from_dict
from unicl_fast.system.checksums import file_checksum

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LIBRARY = "unicl_fast"
FORMAT_VERSION = 1
_PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers stores


def is_export(path: Path) -> bool:
    """Whether a folder has both files; a checkpoint has a state too, a run has no weights there."""
    has_both = (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
    return has_both and not (path / STATE_FILE).exists()


def read_export(folder: Path) -> tuple[TrainConfig, Path]:
    """Reads the config of an export, and finds its weights; raises ValueError for any other."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; convert the model again") from error
    library = values.get("library_name") if isinstance(values, dict) else None
    if library != LIBRARY:
        raise ValueError(
            f"{path}: expected library_name {LIBRARY}, as unicl-convert hf and official write it, "
            f"not {library!r}; what other formats hold is read by their own libraries"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values.get('format_version')!r}, this unicl_fast reads "
            f"{FORMAT_VERSION}: install the version that wrote it, or convert the model again"
        )
    checksums = values.get("checksums")
    expected = checksums.get(WEIGHTS_FILE) if isinstance(checksums, dict) else None
    weights = folder / WEIGHTS_FILE
    if (found := file_checksum(weights)) != expected:
        raise ValueError(
            f"{weights} is damaged or was exchanged: its xxh3 is {found}, {CONFIG_FILE} says "
            f"{expected}; copy the folder again or convert the model again"
        )
    try:
        return config_from_dict(values.get("config")), weights
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How `unicl-eval` prepares images and texts for one model, in the words of each format."""

    resize: int
    """Pixels of the shorter side after scaling."""
    image_size: int
    """Side of the crop that is then taken from the centre."""
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    context_length: int
    vocab_size: int

    @classmethod
    def of(cls, config: TrainConfig) -> Preprocessing:
        """The preprocessing of evaluation; training crops and colours at random."""
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
        """For people, and for programs of their own: `preprocessing.json`."""
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
        # timm divides by the fraction and rounds down: it must find `resize` again
        fraction = self.image_size / self.resize
        while math.floor(self.image_size / fraction) < self.resize:
            fraction = math.nextafter(fraction, 0)
        return {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": fraction,
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def for_open_clip(self) -> dict[str, Any]:
        """The `preprocess_cfg` of open_clip, which always scales to the size that it crops."""
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
