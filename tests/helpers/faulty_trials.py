"""Trials of kernels that crash, or whose module has a fault."""

import importlib
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch


def try_out(device: torch.device, what: str, *arguments: str) -> None:
    {"crashes": crash, "has no GPU": have_no_gpu, "mutated": _mutate}[what](device, *arguments)


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def have_no_gpu(*_: object) -> None:
    raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")


def _mutate(
    device: torch.device, trial: str, module: str, old: str, new: str, *arguments: str
) -> None:
    """Runs a trial on a copy of a module in which one text is replaced by another."""
    source = Path(importlib.util.find_spec(module).origin).read_text()
    assert source.count(old) == 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutated.py")
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
        importlib.import_module(trial).try_out(device, *arguments)
