"""Checks of installed packages: requirements, torch and its devices, compiled kernels, DALI."""

from __future__ import annotations

import functools
import io
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from unicl_fast.system.gpu_kernels import obstacle_to_triton
from unicl_fast.system.machine import choose_decode_device

from .rows import Check, Found

_DEVICES = Path("/dev")
_FORMATS = ("JPEG", "PNG", "WebP")
_SIDE = 32  # pixels of a side of the images that DALI is shown
_TORCH_AGAIN = "install torch again, as https://pytorch.org/get-started/locally says"
_OLDEST_FOR_TRITON = (8, 0)  # an A100, as efficiency.loss and efficiency.window_attention


def check_requirements() -> Found:
    """Compares the installed packages with the requirements of this one, extras aside."""
    from packaging.requirements import Requirement

    wrong = []
    for one in map(Requirement, metadata.requires("unicl_fast") or []):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                met = one.specifier.contains(metadata.version(one.name), prereleases=True)
            except metadata.PackageNotFoundError:
                met = False
            wrong += [] if met else [f"{one.name}{one.specifier}"]
    if wrong:
        fix = " ".join(["pip install", *(f"'{each}'" for each in wrong)])
        return Found("fault", f"missing or too old: {', '.join(wrong)}", fix)
    return Found("ok", f"unicl_fast {metadata.version('unicl_fast')} and all that it requires")


def check_torch() -> Found:
    """Imports torch and torchvision, which have to fit each other."""
    try:
        import torch
        import torchvision

        torch.ones(2).add(1)
    except Exception as error:
        return Found("fault", f"cannot be imported: {error!r}", _TORCH_AGAIN)
    return Found("ok", f"{torch.__version__}; torchvision {torchvision.__version__}")


def check_cuda() -> Found:
    """Asks torch for CUDA devices; a machine without an NVIDIA card is fine."""
    import torch

    if torch.cuda.is_available():
        return _check_devices()
    if not list(_DEVICES.glob("nvidia[0-9]*")):
        return Found("ok", "no NVIDIA device (in a container: --gpus all): the CPU computes")
    try:
        torch.cuda.init()
        reason = "none is visible"
    except (RuntimeError, AssertionError) as error:  # the latter from a build for CPUs
        reason = str(error)
    found = f"torch {torch.__version__} cannot use the NVIDIA device: {reason}"
    if torch.version.cuda is None:
        return Found("warning", found, f"{_TORCH_AGAIN}, for CUDA")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Found("warning", found, "unset CUDA_VISIBLE_DEVICES")
    return Found("fault", found, "see nvidia-smi; the driver must support this CUDA")


def _check_devices() -> Found:
    """Has each device compute a sum, and asks whether Triton's kernels can be compiled."""
    import torch

    from unicl_fast.training.mfu import peak_of_gpu

    names = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(1, device=torch.device("cuda", index)).add(1).item()
        except RuntimeError as error:  # no kernels for this device, or a device in an error state
            fix = f"{_TORCH_AGAIN}; nvidia-smi -q"
            return Found("fault", f"{name} does not compute: {error}", fix)
        known = peak_of_gpu(name, torch.bfloat16) is not None
        names.append(name if known else f"{name} (its peak is not known: no mfu)")
    found = f"{', '.join(names)}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if obstacle := obstacle_to_triton(None, oldest=_OLDEST_FOR_TRITON):
        found += f"; {obstacle}: no fused kernels for the loss and window attention"
        return Found("warning", found, "pip install triton, and install gcc (or name one in CC)")
    return Found("ok", found)


def check_kernels() -> Found:
    """Asks for the folder of compiled kernels, as every program does."""
    import numba

    from unicl_fast.system import kernels

    config: Any = numba.config
    if config.DISABLE_JIT:
        found = "NUMBA_DISABLE_JIT=1: kernels would run in Python, or not at all"
        return Found("fault", found, "unset NUMBA_DISABLE_JIT")
    folder = kernels.cache_folder()
    fix = "set NUMBA_CACHE_DIR to a lasting folder that only this user can write"
    if folder is None:
        found = "every process compiles its kernels again, which takes 20 s"
        return Found("warning", found, f"unset NUMBA_CACHE_LOCATOR_CLASSES, and {fix}")
    if folder == Path(tempfile.gettempdir(), f"unicl_fast-{os.getuid()}"):
        found = f"kept in {folder}, since the user's cache folder is not private or writable"
        return Found("warning", found, fix)
    return Found("ok", f"kept in {folder}, which is private")


def check_dali() -> Found:
    """Decodes small images by the product's own graph, and says where a GPU's are decoded."""
    every = (str(one.name) for one in metadata.distributions())
    installed = sorted(name for name in every if name.startswith("nvidia-dali-cuda"))
    again = f"pip install --force-reinstall {(installed or ['nvidia-dali-cuda120'])[0]}"
    try:
        from unicl_fast.pipelines import graph, running
    except ImportError as error:
        what, _, how = str(error).partition(": ")
        return Found("fault", what, how)
    if len(installed) > 1:
        fix = f"pip uninstall {' '.join(installed)}; then {again}"
        return Found("fault", f"{' and '.join(installed)} overwrite each other", fix)
    failed = []
    for name in _FORMATS:
        try:
            _decode(graph, name)
        except Exception as error:  # DALI's are of several types
            failed.append(f"{name}: {running.reason_of(running.DecodingError(str(error)))}")
    if failed:
        return Found("fault", f"DALI does not decode {'; '.join(failed)}", again)
    import torch

    found = f"{', '.join(installed)} decodes {', '.join(_FORMATS)} on the CPU"
    if torch.cuda.is_available():
        device, why = choose_decode_device("auto", device=torch.device("cuda", 0), threads=0)
        found += f"; for a GPU auto decodes on {device.type}: {why}"
    return Found("ok", found)


def _decode(graph: Any, name: str) -> None:
    """Decodes an image of a format to a crop on the CPU; raises what DALI raises."""
    import numpy as np
    import torch
    from PIL import Image

    from unicl_fast.config import DataConfig
    from unicl_fast.pipelines.host_batches import HostBatch

    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (120, 130, 140)).save(file, format=name)
    edges = (np.full((1, 2), edge, np.float32) for edge in (0, _SIDE))
    batch = HostBatch(inputs=([np.frombuffer(file.getvalue(), np.uint8)], *edges), metadata=0)
    data = DataConfig(image_size=_SIDE, resample="dali")
    cpu = torch.device("cpu")
    build = functools.partial(graph.build_evaluation_graph, data=data, device=cpu)
    for images, _ in graph.decode(build, (one for one in [batch]), batch_size=1, device=cpu):
        if not (images.float().mean((0, 1, 2)) - torch.tensor([120, 130, 140])).abs().max() < 4:
            raise RuntimeError("other pixels than were encoded")


CHECKS = [
    Check("requirements", check_requirements),
    Check("torch", check_torch),
    Check("CUDA", check_cuda, needs=("torch",)),
    Check("Numba kernels", check_kernels),
    Check("DALI", check_dali, needs=("torch", "Numba kernels")),
]
