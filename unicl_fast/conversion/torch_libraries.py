"""Folders that two other libraries read: open_clip (both encoders) and timm (the image encoder).

`open_clip.create_model_and_transforms("local-dir:FOLDER")` builds the model from
`open_clip_config.json` and its weights, and whatever takes open_clip's models runs on it. Our text
encoder is CLIP's, so that this is renaming; the image encoder is timm's on both sides.

`timm.create_model(NAME, num_classes=0, checkpoint_path="FOLDER/model.safetensors")` gives the
features before the projection, and from timm 1.0.16 on
`timm.create_model("local-dir:FOLDER", pretrained=True)` knows name, image size and preprocessing
by itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.checked_output import (
    images_for,
    load_source,
    new_folder,
    print_written,
    require_equal,
    samples_of,
    write_json,
    write_tensors,
)
from unicl_fast.conversion.requests import ToOpenClip, ToTimm
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL

_TEXT_BLOCKS = re.compile(r"^text_encoder\.resblocks\.")
_LAYER_NORM_EPS = 1e-12
_KEPT = ("fixed_input_size", "pool_size", "first_conv", "classifier")


def convert_to_open_clip(command: ToOpenClip) -> None:
    """Runs `unicl-convert open-clip`."""
    model = load_source(command)
    print_written(command.out, difference=write_open_clip(model, command.out))
    data = model.config.data
    if data.evaluation_resize != data.image_size:
        print(
            f"note: open_clip scales the shorter side to {data.image_size} pixels, unicl-eval to "
            f"{data.evaluation_resize} and then crops {data.image_size}: accuracies differ a little"
        )
    _print_registration(model)
    print(f'next: open_clip.create_model_and_transforms("local-dir:{command.out}")')
    print(f"  or: clip_benchmark eval --model local-dir:{command.out} --dataset ...")


def convert_to_timm(command: ToTimm) -> None:
    """Runs `unicl-convert timm`."""
    model = load_source(command, needs_texts=False)
    print_written(command.out, difference=write_timm(model, command.out))
    _print_registration(model)
    name = model.config.model.image_encoder
    more = "".join(f", {name}={value}" for name, value in _timm_arguments(model).items())
    print(
        f'next: timm.create_model("{name}", num_classes=0, '
        f'checkpoint_path="{command.out / "model.safetensors"}"{more})'
    )
    if timm.get_pretrained_cfg(name) is not None:
        print(
            "  or, from timm 1.0.16 on: "
            f'timm.create_model("local-dir:{command.out}", pretrained=True)'
        )


def _print_registration(model: UniCL) -> None:
    if model.config.model.image_encoder.startswith("unicl_"):
        print("note: this encoder is registered with timm by: import unicl_fast.models.small")


def write_open_clip(model: UniCL, folder: Path) -> float:
    """Writes the folder, and reads it with open_clip.

    Args:
        model: in fp32 and evaluation mode.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates, open_clip's from ours.

    Raises:
        ValueError: open_clip cannot build this image encoder at this size, or the folder is there.
        RuntimeError: the features are not ours.
        OSError: it cannot be written.
    """
    _require_convertible(model)
    values = {
        "model_cfg": _open_clip_config(model),
        "preprocess_cfg": Preprocessing.of(model.config).for_open_clip(),
    }
    with new_folder(folder) as aside:
        write_json(aside / "open_clip_config.json", values)
        write_tensors(aside / "open_clip_model.safetensors", _open_clip_tensors(model))
        return _compare_in_open_clip(model, aside)


def _require_convertible(model: UniCL) -> None:
    """Refuses an image encoder that open_clip's wrapper of timm's models cannot express.

    Raises:
        ValueError: it builds encoders at timm's own image size only, and takes num_features for
            the width of what they return.
    """
    name, size = model.config.model.image_encoder, model.config.data.image_size
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        own_size = pretrained_cfg.input_size[-1]
        if own_size != size:
            raise ValueError(
                f"open_clip builds {name} for images of {own_size} pixels alone, this model was "
                f"trained at {size}: convert it to timm, hf, onnx or export instead"
            )
    width = feature_width(model.image_encoder)
    if width != int(model.image_encoder.num_features):  # type: ignore[arg-type]
        raise ValueError(
            f"{name} returns features of width {width}, open_clip expects "
            f"{model.image_encoder.num_features}: convert it to timm, hf, onnx or export instead"
        )


def _open_clip_config(model: UniCL) -> dict[str, Any]:
    config = model.config.model
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": True,  # of the text encoder; timm's models have their own
        "vision_cfg": {
            "timm_model_name": config.image_encoder,
            "timm_model_pretrained": False,
            "timm_pool": "",  # the model's own
            "timm_proj": "linear",
            "image_size": model.config.data.image_size,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
            "norm_kwargs": {"eps": _LAYER_NORM_EPS},
        },
    }


def _open_clip_tensors(model: UniCL) -> dict[str, Tensor]:
    """The model's tensors by open_clip's names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "image_projection":
            tensors["visual.head.proj.weight"] = tensor.T  # theirs is a Linear
        elif name.startswith("image_encoder."):
            tensors["visual.trunk." + name.removeprefix("image_encoder.")] = tensor
        else:
            renamed = _TEXT_BLOCKS.sub("transformer.resblocks.", name)
            tensors[renamed.removeprefix("text_encoder.")] = tensor
    return tensors


@torch.no_grad()
def _compare_in_open_clip(model: UniCL, folder: Path) -> float:
    import open_clip  # seconds to import

    if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        raise ValueError(
            f"open_clip {open_clip.__version__} reads no folders: pip install 'open_clip_torch>=3'"
        )
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    ours = samples_of(model)
    images, texts = theirs.encode_image(ours.images), theirs.encode_text(ours.tokens)
    return max(
        require_equal(ours.image_features, images, what="image features"),
        require_equal(ours.text_features, texts, what="text features"),
    )


def write_timm(model: UniCL, folder: Path) -> float:
    """Writes the folder of the image encoder, read back and compared as by `write_open_clip`."""
    with new_folder(folder) as aside:
        write_json(aside / "config.json", _timm_config(model))
        write_tensors(aside / "model.safetensors", model.image_encoder.state_dict())
        return _compare_in_timm(model, aside)


def _timm_config(model: UniCL) -> dict[str, Any]:
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
        "model_args": _timm_arguments(model),
        "pretrained_cfg": kept
        | {"num_classes": 0, "license": "unknown"}
        | Preprocessing.of(config).for_timm(),
    }


def _timm_arguments(model: UniCL) -> dict[str, Any]:
    """Arguments of timm.create_model beside the name: the size, where tables depend on it."""
    registered = timm.get_pretrained_cfg(model.config.model.image_encoder)
    fixed = registered is not None and registered.fixed_input_size
    size = model.config.data.image_size
    return {"img_size": size} if fixed and size != registered.input_size[-1] else {}


@torch.no_grad()
def _compare_in_timm(model: UniCL, folder: Path) -> float:
    theirs = timm.create_model(
        model.config.model.image_encoder,
        num_classes=0,
        checkpoint_path=str(folder / "model.safetensors"),
        **_timm_arguments(model),
    ).eval()
    images = images_for(model)
    return require_equal(model.image_encoder(images), theirs(images), what="image features")
