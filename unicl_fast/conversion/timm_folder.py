"""The image encoder alone, in a folder that timm reads.

`timm.create_model(NAME, num_classes=0, checkpoint_path="FOLDER/model.safetensors")` gives the
features before the projection, and from timm 1.0.16 on
`timm.create_model("local-dir:FOLDER", pretrained=True)` knows name, image size and preprocessing
by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.comparison import images_for, require_equal
from unicl_fast.conversion.new_files import new_folder, write_json, write_tensors
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_KEPT = ("fixed_input_size", "pool_size", "first_conv", "classifier")


def write_timm(model: UniCL, folder: Path) -> float:
    """Writes the folder, and reads it with timm.

    Args:
        model: in fp32 and evaluation mode.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates, at unit norm.

    Raises:
        ValueError: the folder is there already.
        RuntimeError: the features are not ours.
        OSError: it cannot be written.
    """
    with new_folder(folder) as aside:
        write_json(aside / CONFIG_FILE, timm_config(model))
        write_tensors(aside / WEIGHTS_FILE, model.image_encoder.state_dict())
        return _compare(model, aside)


def timm_config(model: UniCL) -> dict[str, Any]:
    """The `config.json` that timm reads: architecture, arguments, preprocessing."""
    config = model.config
    name = config.model.image_encoder
    registered = timm.get_pretrained_cfg(name)
    known = {} if registered is None else registered.to_dict()
    kept = {key: known[key] for key in _KEPT if known.get(key) is not None}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": feature_width(model.image_encoder),
        "model_args": arguments_of(model),
        "pretrained_cfg": kept
        | {"num_classes": 0, "license": "unknown"}
        | Preprocessing.of(config).for_timm(),
    }


def arguments_of(model: UniCL) -> dict[str, Any]:
    """What timm.create_model needs beside the name: the size, where tables depend on it."""
    registered = timm.get_pretrained_cfg(model.config.model.image_encoder)
    fixed = registered is not None and registered.fixed_input_size
    size = model.config.data.image_size
    return {"img_size": size} if fixed and size != registered.input_size[-1] else {}


@torch.no_grad()
def _compare(model: UniCL, folder: Path) -> float:
    theirs = timm.create_model(
        model.config.model.image_encoder,
        num_classes=0,
        checkpoint_path=str(folder / WEIGHTS_FILE),
        **arguments_of(model),
    ).eval()
    images = images_for(model)
    return require_equal(model.image_encoder(images), theirs(images), what="image features")
