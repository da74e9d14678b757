"""Triton's kernels on this machine's GPU: whether they run, how deep they pipeline, and a trial.

A trial runs in a child, because a process cannot use its GPU any more after a kernel has read out
of bounds. A file remembers a trial that went well.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.child import fault_of

if TYPE_CHECKING:  # programs that do not train need not wait for torch
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_FIRST_WITH_FENCES = (3, 7, 1)
_HOPPER = 90
TRIAL_SECONDS = 300.0  # enough to import torch from a slow disk and compile five kernels
_EXCLUSIVE = (
    "could not begin, since this GPU admits one process only (EXCLUSIVE_PROCESS; `nvidia-smi -c 0` "
    "admits a second one)"
)
_answers: dict[tuple[object, ...], str] = {}
"""The answers of this process's trials, by trial, device and arguments."""


def obstacle_to_triton(index: int | None, *, oldest: tuple[int, int]) -> str:
    """Returns why Triton cannot run on a CUDA device (None: the current one); empty if it can.

    `oldest` is the lowest compute capability that the caller's kernels support.
    """
    import torch

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(index) < oldest:
        return "the GPU is too old for Triton"
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        return "Triton finds no C compiler"  # for the code that launches a kernel
    # that code includes it; Debian's default scheme names another folder
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "Triton finds no Python.h (package python3-dev)"
    return ""


def fenced_stages(stages: int, *, capability: int, version: str) -> int:
    """Returns the number of stages, 1 if Triton would compile several of them wrongly.

    Since Hopper, tensor cores read shared memory through a separate proxy, which sees writes of
    `cp.async` only after a fence. Before 3.7.1 Triton left the fence out of loops with several
    stages (its pull requests 9610 and 10537).
    """
    release = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return 1 if capability >= _HOPPER and release < _FIRST_WITH_FENCES else stages


def fault_of_child(function: Callable[..., object], *arguments: Any) -> str:
    """As `fault_of`, for work on a GPU; a GPU that admits no second process is said as that."""
    fault = fault_of(function, *arguments, seconds=TRIAL_SECONDS)
    # cudaErrorDevicesUnavailable, in the words of torch and of DALI
    return _EXCLUSIVE if "busy or unavailable" in fault else fault


def fault_in_trial(trial: str, device: torch.device, *arguments: str) -> str:
    """Tries kernels on a device, in a child, unless they passed on this machine before.

    Args:
        trial: a module whose `try_out(device, *arguments)` raises an error if the kernels compute
            wrong results.
        device: the device to try them on.
        arguments: choose among the module's kernels.

    Returns:
        The fault, without a full stop; empty if there is none.
    """
    key = trial, device, *arguments
    if key not in _answers:
        _answers[key] = _ask_or_try(trial, device, arguments)
    return _answers[key]


def adopt_answer(fault: str, trial: str, device: torch.device, *arguments: str) -> None:
    """Makes another rank's answer this one's, which need not try where no file can remember it."""
    _answers[trial, device, *arguments] = fault


def _ask_or_try(trial: str, device: torch.device, arguments: tuple[str, ...]) -> str:
    what = " ".join([trial.rpartition(".")[2], *arguments[:1]])  # others may be long
    kept = _file_of(trial, device, arguments)
    if kept is not None and kept.is_file():
        logger.info("%s: right on this machine, as an earlier start has found", what)
        return ""
    begun = time.monotonic()
    fault = fault_of_child(_try_out, trial, str(device), *arguments)
    if fault:
        return f"{what}: the trial {fault}"
    seconds = time.monotonic() - begun
    logger.info("%s: right on this machine, tried within %.0f s", what, seconds)
    if kept is not None:
        try:
            write_text_atomically(kept, json.dumps({"seconds": seconds}) + "\n")
        except OSError as error:
            logger.warning("%s: the next start tries it again (%s)", what, error)
    return ""


def _try_out(trial: str, device: str, *arguments: str) -> None:
    import torch

    # new memory is then filled with NaN, instead of the last call's right results
    torch.use_deterministic_algorithms(True, warn_only=True)
    importlib.import_module(trial).try_out(torch.device(device), *arguments)


def _file_of(trial: str, device: torch.device, arguments: tuple[str, ...]) -> Path | None:
    """Returns the file that remembers a good trial; None if there is no place for it.

    Its folder depends on the code, its name on the machine, the GPU and the compilers.
    """
    import torch

    from unicl_fast.system.kernels import cache_folder, folder_of

    above = cache_folder()
    files = [importlib.util.find_spec(name) for name in (trial, "triton")]
    origins = [spec.origin for spec in files if spec is not None and spec.origin]
    if above is None or len(origins) < 2:
        return None
    of_device: tuple[object, ...] = (device.type,)
    if device.type == "cuda":
        of_device = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    versions = torch.__version__, Path(origins[1]).read_text(encoding="utf-8")
    assembler = os.environ.get("TRITON_PTXAS_PATH", "")
    key = repr((platform.node(), of_device, versions, assembler, arguments))
    name = f"right-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return folder_of(above, trial, origins[0]) / name


def check_close(found: Tensor, exact: Tensor, *, what: str, tolerance: float) -> None:
    """Raises ArithmeticError if a result differs by more than `tolerance` of the exact norm."""
    error = float((found.double() - exact).norm() / exact.norm())
    if not error <= tolerance:  # also if it is NaN
        raise ArithmeticError(f"{what} is off by {error:.1e} of its norm; {tolerance:.0e} is usual")
