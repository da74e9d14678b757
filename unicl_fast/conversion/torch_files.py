"""Reads tensors from files of torch.save that others publish, without running code in them.

No other file of the project unpickles weights: many published checkpoints exist in no other form.
torch's restricted unpickler (`weights_only`) reads only tensors and containers.
"""

import contextlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicl_fast.system.untrusted_files import open_file

# torch has other words for modules that it knows to be dangerous, such as os
_FOREIGN_OBJECT = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_NEW_PROTOCOL = "Unsupported operand 149"
"""The opcode FRAME, with which pickles of protocols 4 and 5 begin."""
_TORCH_ADVICE = re.compile(r"^Weights only load failed.*WeightsUnpickler error:", re.DOTALL)
_EXPECTED = "{'model': {name: tensor}}"
_ZIP = b"PK\x03\x04"


def read_torch_file(path: Path, *, expected: str) -> dict[str, Tensor]:
    """Reads `{"model": {name: tensor}}`; the wrapper can also be `state_dict`, or missing.

    Raises FileNotFoundError, or ValueError if it is cut short, compressed, not a checkpoint, or
    holds anything but tensors with memory for all their numbers; errors name `expected`.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {problem}: expected {expected}")
    with open_file(path) as file:
        is_zip = file.read(4) == _ZIP
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is cut short ({path.stat().st_size:,} bytes, and the end of the archive is "
            "missing): copy or download it again"
        )
    if is_zip:
        _refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused below
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, EOFError, KeyError, RuntimeError, ...
        raise ValueError(_why_not(path, error, expected)) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
            break
    if not isinstance(values, dict) or not values:
        if isinstance(values, Tensor):
            kind = f"one tensor of shape {list(values.shape)}"
        else:
            kind = f"a {type(values).__name__}" if values else "nothing"
        raise ValueError(f"{path} holds {kind}: expected {_EXPECTED}, as in {expected}")
    others = [str(name) for name, value in values.items() if not _is_whole(value)]
    if others:
        raise ValueError(f"{path} holds no weights at {', '.join(others)}: expected {_EXPECTED}")
    return {str(name): tensor for name, tensor in values.items()}


def _refuse_compressed(path: Path) -> None:
    """A few bytes could become more than fits in memory; torch.save compresses nothing."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # torch says it
        inside = sum(entry.file_size for entry in archive.infolist())
        if inside > path.stat().st_size:
            raise ValueError(
                f"{path} is compressed, to {path.stat().st_size:,} bytes of {inside:,}: read it by "
                "torch.load if you trust it, and write it again by torch.save"
            )


def _is_whole(value: Any) -> bool:
    """Whether it is a tensor on the host with memory for each number."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _why_not(path: Path, error: Exception, expected: str) -> str:
    text = str(error)
    weights = 'torch.load(FILE, weights_only=False)["model"]'
    foreign = _FOREIGN_OBJECT.search(text)
    if foreign is not None:
        # a name from somebody's file, which could hold control characters
        name = foreign[1].encode("unicode_escape").decode("ascii")[:200]
        problem = f"holds Python objects besides tensors ({name})"
    elif "TorchScript" in text:
        problem, weights = "is a TorchScript program", "torch.jit.load(FILE).state_dict()"
    elif _NEW_PROTOCOL in text:
        problem = "is a pickle of protocol 4 or 5"
    else:
        # cut off torch's advice to read the file with weights_only=False
        reason = _TORCH_ADVICE.sub("", text).strip().split("\n")[0][:200] or type(error).__name__
        return (
            f"{path} is no checkpoint that torch can read, or is damaged: {reason}. Expected "
            f"{expected}, a file of torch.save with {_EXPECTED}; copy or download it again"
        )
    return (
        f"{path} {problem}, which could run any code: it was not read. If it is your own, save "
        f'only its weights where you made it: torch.save({{"model": {weights}}}, NEW)'
    )
