"""Checks of installed packages: torch and its devices, compiled kernels, DALI."""

import functools
import io
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from unicl_fast.system.gpu_kernels import obstacle_to_triton
from unicl_fast.system.installation import INSTALL_TRIED, untried_versions
from unicl_fast.system.machine import choose_decode_device

from .rows import Check, Found

_DEVICES = Path("/dev")
_FORMATS = ("JPEG", "PNG", "WebP")
_SIDE = 32  # pixels of the images that DALI decodes
_TORCH_AGAIN = (
    "install torch for the CUDA of the driver (nvidia-smi) as "
    "https://pytorch.org/get-started/locally says; python -m torch.utils.collect_env has the facts"
)
_OLDEST_FOR_TRITON = (8, 0)  # an A100, as efficiency.loss and efficiency.window_attention


def check_torch() -> Found:
    """Imports torch and torchvision, and computes a sum on each GPU that torch sees."""
    try:
        import torch
        import torchvision

        names = []
        for index in range(torch.cuda.device_count()):
            names.append(torch.cuda.get_device_name(index))
            torch.ones(1, device=torch.device("cuda", index)).add(1).item()
    except Exception as error:  # another build, no kernels for a device, a device in an error state
        return Found("fault", f"torch does not work: {error}", _TORCH_AGAIN)
    found = f"{torch.__version__}; torchvision {torchvision.__version__}"
    if not names:
        if not list(_DEVICES.glob("nvidia[0-9]*")):
            return Found("ok", f"{found}; no NVIDIA device: the CPU computes")
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return Found("warning", f"{found} sees no GPU", "unset CUDA_VISIBLE_DEVICES")
        return Found("fault", f"{found} cannot use the NVIDIA device", _TORCH_AGAIN)
    found += f"; {', '.join(names)}"
    if obstacle := obstacle_to_triton(None, oldest=_OLDEST_FOR_TRITON):
        found += f"; {obstacle}: no fused kernels for the loss and window attention"
        fix = "pip install triton, and install gcc (or name one in CC) and python3-dev"
        return Found("warning", found, fix)
    if untried := untried_versions():
        return Found("warning", f"{found}; {untried}", INSTALL_TRIED)
    return Found("ok", found)


def check_kernels() -> Found:
    """Checks the folder of compiled kernels."""
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
        found = f"kept in {folder}, because the user's cache folder is not private or writable"
        return Found("warning", found, fix)
    return Found("ok", f"kept in {folder}, which is private")


def check_dali() -> Found:
    """Decodes small images as a run does, and names the device that decodes images for a GPU."""
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
            _decode(graph, running, name)
        except Exception as error:  # DALI's errors have several types
            failed.append(f"{name}: {running.reason_of(running.DecodingError(str(error)))}")
    if failed:
        return Found("fault", f"DALI does not decode {'; '.join(failed)}", again)
    import torch

    found = f"{', '.join(installed)} decodes {', '.join(_FORMATS)} on the CPU"
    if torch.cuda.is_available():
        device, why = choose_decode_device("auto", device=torch.device("cuda", 0), threads=0)
        found += f"; for a GPU, auto decodes on {device.type}: {why}"
    return Found("ok", found)


def _decode(graph: Any, running: Any, name: str) -> None:
    """Decodes an image of a format to a crop on the CPU; raises DALI's errors."""
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
    for images, _ in running.decode(build, (one for one in [batch]), batch_size=1, device=cpu):
        if not (images.float().mean((0, 1, 2)) - torch.tensor([120, 130, 140])).abs().max() < 4:
            raise RuntimeError("other pixels than were encoded")


CHECKS: dict[str, Check] = {
    "torch": check_torch,
    "Numba kernels": check_kernels,
    "DALI": check_dali,
}
