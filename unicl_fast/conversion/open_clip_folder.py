"""A folder that open_clip reads: `open_clip_config.json` and its weights.

`open_clip.create_model_and_transforms("local-dir:FOLDER")` builds the model, and whatever takes
open_clip's models runs on it. Our text encoder is CLIP's, so that this is renaming; the image
encoder is timm's on both sides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.comparison import require_equal, samples_of
from unicl_fast.conversion.new_files import new_folder, write_json, write_tensors
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_TEXT_BLOCKS = re.compile(r"^text_encoder\.resblocks\.")
_LAYER_NORM_EPS = 1e-12


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
    require_convertible(model)
    with new_folder(folder) as aside:
        write_json(
            aside / CONFIG_FILE,
            {
                "model_cfg": model_config(model),
                "preprocess_cfg": Preprocessing.of(model.config).for_open_clip(),
            },
        )
        write_tensors(aside / WEIGHTS_FILE, open_clip_tensors(model))
        return _compare(model, aside)


def require_convertible(model: UniCL) -> None:
    """Refuses what open_clip's wrapper of timm's models cannot express.

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


def model_config(model: UniCL) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
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


def open_clip_tensors(model: UniCL) -> dict[str, Tensor]:
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
def _compare(model: UniCL, folder: Path) -> float:
    import open_clip  # seconds to import

    if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        raise ValueError(
            f"open_clip {open_clip.__version__} reads no folders: pip install 'open_clip_torch>=3'"
        )
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    samples = samples_of(model)
    return max(
        require_equal(
            samples.image_features, theirs.encode_image(samples.images), what="image features"
        ),
        require_equal(
            samples.text_features, theirs.encode_text(samples.tokens), what="text features"
        ),
    )
