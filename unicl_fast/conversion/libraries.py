"""Writes folders for timm (the image encoder) and ONNX runtimes.

Each library reads its files, and its features are compared with ours, before the folder appears.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.conversion import preprocessing
from unicl_fast.conversion.output import (
    new_folder,
    require_equal,
    sample_images,
    sample_tokens,
    write_json,
    write_tensors,
)
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import Head, UniCL
from unicl_fast.system.installation import install_command

_KEPT_BY_TIMM = ("fixed_input_size", "pool_size", "first_conv", "classifier")
_OTHER_SIZE = 7
"""A third batch size: an exported program can be fixed to one sample or the traced number."""
_OPSET = 18  # of 2022: all current runtimes have it


def is_of_timm(name: str) -> bool:
    """Whether an encoder is timm's own, and not one that another package registers with timm."""
    return module_of_encoder(name).startswith("timm.")


def module_of_encoder(name: str) -> str:
    """The module that registers an encoder with timm."""
    return str(timm.model_entrypoint(name.split(".")[0]).__module__)


def fixed_size(name: str) -> int | None:
    """The image size that a timm encoder has tables for; None if it works at any size."""
    registered = timm.get_pretrained_cfg(name)
    is_fixed = registered is not None and registered.fixed_input_size
    return int(registered.input_size[-1]) if is_fixed else None


@torch.no_grad()
def write_timm(model: UniCL, folder: Path) -> float:
    """Writes a new folder with the image encoder of a model in fp32 and evaluation mode.

    Returns the largest difference between coordinates of timm's features and ours. Raises
    RuntimeError if they differ, ValueError if the folder exists.
    """
    name, arguments = model.config.model.image_encoder, timm_arguments(model)
    registered = timm.get_pretrained_cfg(name)
    known = {} if registered is None else registered.to_dict()
    kept = {key: known[key] for key in _KEPT_BY_TIMM if known.get(key) is not None}
    values = {
        "architecture": name,
        "num_classes": 0,
        "num_features": feature_width(model.image_encoder),
        "model_args": arguments,
        "pretrained_cfg": kept
        | {"num_classes": 0, "license": "unknown"}
        | preprocessing.for_timm(model.config.data),
    }
    with new_folder(folder) as aside:
        write_json(aside / "config.json", values)
        weights = aside / "model.safetensors"
        write_tensors(weights, model.image_encoder.state_dict())
        theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(weights), **arguments)
        images = sample_images(model)
        expected, found = model.image_encoder(images), theirs.eval()(images)
        return require_equal(expected, found, name="image features")


def timm_arguments(model: UniCL) -> dict[str, Any]:
    """More arguments for timm.create_model: the image size, if it is not timm's own."""
    size, fixed = model.config.data.image_size, fixed_size(model.config.model.image_encoder)
    return {} if fixed in (None, size) else {"img_size": size}


class Tower(nn.Module):
    """Encodes normalised images [b 3 h w], or token rows [b l], as unit-norm features [b d].

    Exporters need modules of one input and one output.
    """

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        for name, tensor in head._asdict().items():
            setattr(self, name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        head = Head(*(getattr(self, name) for name in Head._fields))
        return F.normalize(head(self.encoder(inputs)), dim=-1)


@torch.no_grad()
def write_onnx(model: UniCL, folder: Path) -> float:
    """As `write_timm`, with both encoders for onnxruntime, compared at three batch sizes.

    Also raises ValueError if a package is missing, RuntimeError if an encoder cannot be exported.
    """
    require_packages()
    assert model.text_encoder is not None
    image = Tower(model.image_encoder, model.head("image")).eval()
    text = Tower(model.text_encoder, model.head("text")).eval()
    images, tokens = sample_images(model), sample_tokens(model)
    differences = []
    with new_folder(folder) as aside:
        for name, tower, inputs, features in (
            ("image", image, images, model.encode_image(images)),
            ("text", text, tokens, model.encode_text(tokens)),
        ):
            run = _export_onnx(tower, inputs, aside / f"{name}.onnx")
            for size in (1, len(inputs), _OTHER_SIZE):
                rows = torch.arange(size) % len(inputs)
                found = run(inputs[rows])
                differences.append(require_equal(features[rows], found, name=f"{name}_features"))
        described = preprocessing.in_words(model.config.data, model.config.model)
        logits = {name: one.item() for name, one in model.learnt.items() if one.ndim == 0}
        write_json(aside / "preprocessing.json", described | logits)
    return max(differences)


def require_packages() -> None:
    """Raises ValueError if packages for exporting to ONNX and checking the result are missing."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        names = ", ".join(missing)
        raise ValueError(f"converting to ONNX needs {names}: {install_command('convert')}")


def _export_onnx(tower: Tower, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    input_name = "tokens" if path.stem == "text" else "images"
    output_name = f"{path.stem}_features"
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # the exporter logs, prints and warns
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
