"""Reads and writes the files that torch.save makes, of tensors alone.

The one place of the project that touches a pickle, since microsoft/UniCL's checkpoints exist in no
other form. torch reads them by a machine of its own that knows tensors and containers and calls
nothing else (`weights_only`); what is written holds tensors alone.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("model", "state_dict")
_FOREIGN_OBJECT = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
_TORCH_ADVICE = re.compile(r"^Weights only load failed.*WeightsUnpickler error:", re.DOTALL)
_ZIP = b"PK\x03\x04"


def read_official_file(path: Path) -> dict[str, Tensor]:
    """The entries of a checkpoint, `{"model": {name: tensor}}` or the names without the wrapper.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short, no checkpoint, or holds more than tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(
            f"{path} {what}: expected a file of microsoft/UniCL, such as in1k.pth"
        )
    with path.open("rb") as file:
        is_zip = file.read(4) == _ZIP
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is cut short ({path.stat().st_size:,} bytes, and the end of the archive is "
            "missing): copy or download it again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused in a sentence
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, EOFError, KeyError, RuntimeError, ...
        raise ValueError(_why_not(path, error)) from error
    return _tensors_in(path, values)


def write_official_file(path: Path, entries: Mapping[str, Tensor]) -> None:
    """Writes `{"model": entries}`, each tensor with memory of its own."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in entries.items()}
    torch.save({"model": copies}, path)


def _why_not(path: Path, error: Exception) -> str:
    text = str(error)
    foreign = _FOREIGN_OBJECT.search(text)
    if foreign is not None:
        return (
            f"{path} holds Python objects besides tensors ({foreign.group(1)}), which could run "
            "any code: it was not read. If it is a training checkpoint that you made yourself, "
            "save its weights alone where you made it: "
            'torch.save({"model": torch.load(FILE, weights_only=False)["model"]}, NEW)'
        )
    # torch advises to read the file all the same, code included: that is cut off
    reason = _TORCH_ADVICE.sub("", text).strip().split("\n")[0][:200] or type(error).__name__
    return (
        f"{path} is no checkpoint that torch can read, or is damaged: {reason}. Expected a "
        "file of torch.save with {'model': {name: tensor}}, such as microsoft/UniCL's in1k.pth; "
        "copy or download it again"
    )


def _tensors_in(path: Path, values: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
            break
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f"{path} holds {_kind(values)}: expected {{'model': {{name: tensor}}}}, as "
            "microsoft/UniCL's released files do"
        )
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} holds no weights at {', '.join(others)}: expected "
            "{'model': {name: tensor}}"
        )
    return {str(name): tensor for name, tensor in values.items()}


def _kind(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"one tensor of shape {list(values.shape)}"
    return "nothing" if values in ({}, None) else f"a {type(values).__name__}"
