"""Folders that other libraries read: open_clip, timm, ONNX runtimes, torch.export.

`open_clip.create_model_and_transforms("local-dir:FOLDER")` builds the model, and whatever takes
open_clip's models runs on it. Our text encoder is CLIP's and the image encoder timm's on both
sides, so that this is renaming. timm gets the image encoder alone, with its size and preprocessing:
`timm.create_model("local-dir:FOLDER", pretrained=True)` from timm 1.0.16 on.

`image` and `text` as programs for any number of samples are a file each, ONNX or torch.export's.
A .pt2 file is the graph with its weights: torch runs it, or compiles it ahead of time, without this
package or timm. What an exporter takes is a module of one input and one output: a `Tower`.

Each folder is read back by its library before it appears, and its features are compared with ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.export import (
    Samples,
    images_for,
    new_folder,
    require_equal,
    write_json,
    write_tensors,
)
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL

_TEXT_BLOCKS = re.compile(r"^text_encoder\.resblocks\.")
_LAYER_NORM_EPS = 1e-12
_KEPT_BY_TIMM = ("fixed_input_size", "pool_size", "first_conv", "classifier")
_OTHER_SIZE = 7
"""Samples of a batch, beside one and as many as were traced: an export may be fixed to a size."""
_OPSET = 18  # of 2022: current runtimes all have it


@torch.no_grad()
def write_open_clip(model: UniCL, folder: Path) -> float:
    """Writes a folder, and reads it with open_clip.

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
    import open_clip  # seconds to import

    _require_convertible(model)
    if not hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        raise ValueError(
            f"open_clip {open_clip.__version__} reads no folders: pip install 'open_clip_torch>=3'"
        )
    values = {
        "model_cfg": _open_clip_config(model),
        "preprocess_cfg": Preprocessing.of(model.config).for_open_clip(),
    }
    with new_folder(folder) as aside:
        write_json(aside / "open_clip_config.json", values)
        write_tensors(aside / "open_clip_model.safetensors", _open_clip_tensors(model))
        theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{aside}")
        theirs.eval()
        ours = Samples.of(model)
        images, texts = theirs.encode_image(ours.images), theirs.encode_text(ours.tokens)
        return max(
            require_equal(ours.image_features, images, what="image features"),
            require_equal(ours.text_features, texts, what="text features"),
        )


def _require_convertible(model: UniCL) -> None:
    """Refuses an image encoder that open_clip's wrapper of timm's models cannot express.

    It builds encoders at timm's own image size only, and takes num_features for the width of what
    they return.
    """
    name, size = model.config.model.image_encoder, model.config.data.image_size
    if (own_size := _fixed_size(name)) not in (None, size):
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


def _fixed_size(name: str) -> int | None:
    """The image size that timm builds an encoder for, where its tables depend on it."""
    registered = timm.get_pretrained_cfg(name)
    if registered is None or not registered.fixed_input_size:
        return None
    return int(registered.input_size[-1])


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
def write_timm(model: UniCL, folder: Path) -> float:
    """Writes a folder of the image encoder, read back and compared as by `write_open_clip`."""
    config, name = model.config, model.config.model.image_encoder
    registered = timm.get_pretrained_cfg(name)
    known = {} if registered is None else registered.to_dict()
    kept = {key: known[key] for key in _KEPT_BY_TIMM if known.get(key) is not None}
    values = {
        "architecture": name,
        "num_classes": 0,
        "num_features": feature_width(model.image_encoder),
        "model_args": timm_arguments(model),
        "pretrained_cfg": kept
        | {"num_classes": 0, "license": "unknown"}
        | Preprocessing.of(config).for_timm(),
    }
    with new_folder(folder) as aside:
        write_json(aside / "config.json", values)
        weights = aside / "model.safetensors"
        write_tensors(weights, model.image_encoder.state_dict())
        theirs = timm.create_model(
            name, num_classes=0, checkpoint_path=str(weights), **timm_arguments(model)
        ).eval()
        images = images_for(model)
        return require_equal(model.image_encoder(images), theirs(images), what="image features")


def timm_arguments(model: UniCL) -> dict[str, Any]:
    """Arguments of timm.create_model beside the name: the size, where tables depend on it."""
    size = model.config.data.image_size
    known = _fixed_size(model.config.model.image_encoder)
    return {} if known in (None, size) else {"img_size": size}


class Tower(nn.Module):
    """Normalised images [b 3 h w], or token rows [b l], to unit-norm features [b d]."""

    def __init__(self, encoder: nn.Module, projection: nn.Parameter) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(inputs) @ self.projection, dim=-1)


Export = Callable[[Tower, Tensor, Path], Callable[[Tensor], Tensor]]
"""Writes a tower, traced with inputs, into a file, and gives the file as a function of inputs."""


def write_onnx(model: UniCL, folder: Path) -> float:
    """Writes a folder, and runs both files with onnxruntime at three batch sizes.

    The rest is as in `write_open_clip`; a package that is not installed is a ValueError, and what
    the exporter does not know in an encoder a RuntimeError.
    """
    require_packages()
    return _write_towers(model, folder, ".onnx", export=_export_onnx)


def require_packages() -> None:
    """Refuses to begin without the exporter to ONNX and the runtime that checks it.

    Raises:
        ValueError: names the packages that are not installed.
    """
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"converting to ONNX takes {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'unicl_fast[convert]'"
        )


@torch.no_grad()
def write_exported_programs(model: UniCL, folder: Path) -> float:
    """Writes programs of torch.export, read back and compared as by `write_onnx`."""
    return _write_towers(model, folder, ".pt2", export=_export_program)


def _write_towers(model: UniCL, folder: Path, suffix: str, *, export: Export) -> float:
    """Writes a file for each tower, and runs it at three batch sizes."""
    assert model.image_projection is not None
    assert model.text_encoder is not None
    assert model.text_projection is not None
    samples = Samples.of(model)
    image = Tower(model.image_encoder, model.image_projection).eval()
    text = Tower(model.text_encoder, model.text_projection).eval()
    differences = []
    with new_folder(folder) as aside:
        for name, tower, inputs, features in (
            ("image", image, samples.images, samples.image_features),
            ("text", text, samples.tokens, samples.text_features),
        ):
            run = export(tower, inputs, aside / f"{name}{suffix}")
            for size in (1, len(inputs), _OTHER_SIZE):
                rows = torch.arange(size) % len(inputs)
                found = run(inputs[rows])
                differences.append(require_equal(features[rows], found, what=f"{name}_features"))
        values = Preprocessing.of(model.config).as_words()
        values["logit_scale"] = model.logit_scale.item()
        write_json(aside / "preprocessing.json", values)
    return max(differences)


def _export_program(tower: Tower, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch")
    program = torch.export.export(tower, (inputs,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _export_onnx(tower: Tower, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    input_name = "tokens" if path.stem == "text" else "images"
    output_name = f"{path.stem}_features"
    before = logging.root.manager.disable
    try:
        # the exporter prints its progress and warns of functions of its own
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                (inputs,),
                path,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RuntimeError(
            f"torch {torch.__version__} cannot export the {path.stem} encoder to ONNX: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        logging.disable(before)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(rows: Tensor) -> Tensor:
        (features,) = session.run([output_name], {input_name: rows.numpy()})
        return torch.from_numpy(features)

    return run
