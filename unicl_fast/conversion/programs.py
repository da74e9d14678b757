"""Both encoders as programs for any number of samples: ONNX files, or programs of torch.export.

`image` and `text` are a file each, with its own weights and not those of the other. A .pt2 file is
the graph with its weights: torch runs it, or compiles it ahead of time, without this package or
timm. What an exporter takes is a module of one input and one output: a `Tower`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.checked_output import (
    load_source,
    new_folder,
    print_written,
    require_equal,
    samples_of,
    write_json,
)
from unicl_fast.conversion.requests import ToExport, ToOnnx
from unicl_fast.models.unicl import UniCL

PREPROCESSING_FILE = "preprocessing.json"
_INPUTS = {"image": "images", "text": "tokens"}
_OUTPUTS = {"image": "image_features", "text": "text_features"}
_OTHER_SIZE = 7
"""Samples of a batch, beside one and as many as were traced: an export may be fixed to a size."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 18  # of 2022: current runtimes all have it
_AT_SIZES = ", at batches of 1 and more"


def convert_to_onnx(command: ToOnnx) -> None:
    """Runs `unicl-convert onnx`."""
    require_packages()  # before a model is loaded for nothing
    difference = write_onnx(load_source(command), command.out)
    print_written(command.out, difference=difference, where=_AT_SIZES)
    print(f'next: onnxruntime.InferenceSession("{command.out / "image.onnx"}")')


def convert_to_export(command: ToExport) -> None:
    """Runs `unicl-convert export`."""
    difference = write_exported_programs(load_source(command), command.out)
    print_written(command.out, difference=difference, where=_AT_SIZES)
    print(f'next: torch.export.load("{command.out / "image.pt2"}").module()(images)')


class Tower(nn.Module):
    """Normalised images [b 3 h w], or token rows [b l], to unit-norm features [b d]."""

    def __init__(self, encoder: nn.Module, projection: nn.Parameter) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(inputs) @ self.projection, dim=-1)


def write_onnx(model: UniCL, folder: Path) -> float:
    """Writes the folder, and runs both files with onnxruntime at three batch sizes.

    Args:
        model: in fp32 and evaluation mode, with texts.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates, onnxruntime's from ours.

    Raises:
        ValueError: a package is not installed, or the folder is there already.
        RuntimeError: the encoder has what the exporter does not know, or the features are not ours.
        OSError: it cannot be written.
    """
    require_packages()
    return _write_towers(model, folder, ".onnx", export=_export_onnx, load=_load_onnx)


def require_packages() -> None:
    """Refuses to begin without the exporter and the runtime that checks it.

    Raises:
        ValueError: names the packages that are not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"converting to ONNX takes {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'unicl_fast[convert]'"
        )


@torch.no_grad()
def write_exported_programs(model: UniCL, folder: Path) -> float:
    """Writes programs of torch.export, read back and compared as by `write_onnx`."""
    return _write_towers(model, folder, ".pt2", export=_export_program, load=_load_program)


def _write_towers(
    model: UniCL,
    folder: Path,
    suffix: str,
    *,
    export: Callable[[Tower, Tensor, Path, str], None],
    load: Callable[[Path, str], Callable[[Tensor], Tensor]],
) -> float:
    """Writes a file for each tower, and runs it at three batch sizes.

    `export` takes a tower, inputs to trace it with, a file and the tower's name; `load` gives a
    file as a function of its inputs.
    """
    assert model.image_projection is not None
    assert model.text_encoder is not None
    assert model.text_projection is not None
    samples = samples_of(model)
    image = Tower(model.image_encoder, model.image_projection).eval()
    text = Tower(model.text_encoder, model.text_projection).eval()
    differences = []
    with new_folder(folder) as aside:
        for name, tower, inputs, features in (
            ("image", image, samples.images, samples.image_features),
            ("text", text, samples.tokens, samples.text_features),
        ):
            path = aside / f"{name}{suffix}"
            export(tower, inputs, path, name)
            run = load(path, name)
            for size in (1, len(inputs), _OTHER_SIZE):
                found, expected = run(_repeated(inputs, size)), _repeated(features, size)
                differences.append(require_equal(expected, found, what=_OUTPUTS[name]))
        values = Preprocessing.of(model.config).as_words()
        write_json(aside / PREPROCESSING_FILE, values | {"logit_scale": model.logit_scale.item()})
    return max(differences)


def _repeated(rows: Tensor, count: int) -> Tensor:
    """So many rows, from the first on, and again."""
    return rows.repeat(-(-count // len(rows)), *[1] * (rows.ndim - 1))[:count]


def _export_program(tower: Tower, inputs: Tensor, path: Path, _: str) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(tower, (inputs,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _load_program(path: Path, _: str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _export_onnx(tower: Tower, inputs: Tensor, path: Path, name: str) -> None:
    try:
        with _silence():
            torch.onnx.export(
                tower,
                (inputs,),
                path,
                input_names=[_INPUTS[name]],
                output_names=[_OUTPUTS[name]],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RuntimeError(
            f"torch {torch.__version__} cannot export the {name} encoder to ONNX: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _load_onnx(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        (features,) = session.run([_OUTPUTS[name]], {_INPUTS[name]: inputs.numpy()})
        return torch.from_numpy(features)

    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silences the exporter, which prints its progress and warns of functions of its own."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
