"""Both encoders as ONNX files, `image.onnx` and `text.onnx`, for any number of samples."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.conversion.towers import INPUTS, OUTPUTS, Tower, write_towers
from unicl_fast.models.unicl import UniCL

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 18  # of 2022: what runtimes of today all have


def write_onnx(model: UniCL, folder: Path) -> float:
    """Writes the folder, and runs both files with onnxruntime at three batch sizes.

    Args:
        model: in fp32 and evaluation mode.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates, onnxruntime's from ours.

    Raises:
        ValueError: a package is not installed, or the folder is there already.
        RuntimeError: the encoder has what the exporter does not know, or the features are not ours.
        OSError: it cannot be written.
    """
    require_packages()
    return write_towers(model, folder, ".onnx", export=_export, load=_load)


def require_packages() -> None:
    """Refuses to begin without the exporter and the runtime that checks it.

    Raises:
        ValueError: which are not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"converting to ONNX takes {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'unicl_fast[convert]'"
        )


def _export(tower: Tower, inputs: Tensor, path: Path, name: str) -> None:
    try:
        with _silence():
            torch.onnx.export(
                tower,
                (inputs,),
                path,
                input_names=[INPUTS[name]],
                output_names=[OUTPUTS[name]],
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


def _load(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        (features,) = session.run([OUTPUTS[name]], {INPUTS[name]: inputs.numpy()})
        return torch.from_numpy(features)

    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints its progress, and warns of functions of its own."""
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
