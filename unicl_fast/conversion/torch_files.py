"""Files of torch.save that others publish: tensors are read out of them, and nothing is run.

This is the one place of the project that unpickles weights, since many checkpoints of others exist
in no other form. torch reads them by a machine of its own that knows tensors and containers and
calls nothing else (`weights_only`).
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

# torch says it in two ways: of modules that it knows as dangerous (os.system), and of all others
_FOREIGN_OBJECT = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_NEW_PROTOCOL = "Unsupported operand 149"
"""The operation FRAME, with which pickles of protocols 4 and 5 begin."""
_TORCH_ADVICE = re.compile(r"^Weights only load failed.*WeightsUnpickler error:", re.DOTALL)
_EXPECTED = "{'model': {name: tensor}}"
_ZIP = b"PK\x03\x04"


def read_torch_file(path: Path, *, expected: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, `{"model": {name: tensor}}` or the names without the wrapper.

    `state_dict` is known as a wrapper too. `expected` says in errors which file was expected.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short, no checkpoint, or holds more than tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"{path} {what}: expected {expected}")
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
        raise ValueError(f"{path} holds {kind}: expected {_EXPECTED}, as {expected} does")
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds no weights at {', '.join(others)}: expected {_EXPECTED}")
    return {str(name): tensor for name, tensor in values.items()}


def _why_not(path: Path, error: Exception, expected: str) -> str:
    text = str(error)
    weights = 'torch.load(FILE, weights_only=False)["model"]'
    foreign = _FOREIGN_OBJECT.search(text)
    if foreign is not None:
        # a name from somebody's file, which could hold control characters
        name = foreign[1].encode("unicode_escape").decode("ascii")[:200]
        what = f"holds Python objects besides tensors ({name})"
    elif "TorchScript" in text:
        what, weights = "is a TorchScript program", "torch.jit.load(FILE).state_dict()"
    elif _NEW_PROTOCOL in text:
        what = "is a pickle of protocol 4 or 5"
    else:
        # torch advises to read the file all the same, code included: that is cut off
        reason = _TORCH_ADVICE.sub("", text).strip().split("\n")[0][:200] or type(error).__name__
        return (
            f"{path} is no checkpoint that torch can read, or is damaged: {reason}. Expected was "
            f"{expected}, a file of torch.save with {_EXPECTED}; copy or download it again"
        )
    return (
        f"{path} {what}, which could run any code: it was not read. If it is your own, save only "
        f'its weights where you made it: torch.save({{"model": {weights}}}, NEW)'
    )
