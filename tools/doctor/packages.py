"""Checks of Python, of what is installed for it, and of the environment variables of both."""

from __future__ import annotations

import codecs
import ctypes
import functools
import importlib.util
import io
import locale
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from unicl_fast.system.machine import choose_decode_device, obstacle_to_triton, usable_cores
from unicl_fast.system.wording import count_of

from .rows import Check, Found

_PACKAGE = "unicl_fast"
_OLDEST_PYTHON = (3, 11)
_EXTRAS = ("inspect", "convert", "evaluation", "remote", "sources", "ray")
"""Extras that are reported."""
_MAPS = Path("/proc/self/maps")
_DEVICES = Path("/dev")
_FORMATS = ("JPEG", "PNG", "WebP")
_SIDE = 32  # pixels of a side of the images that DALI is shown
_TORCH_ANEW = "install torch anew, as https://pytorch.org/get-started/locally says"
_OLDEST_FOR_TRITON = (8, 0)  # an A100, as efficiency.loss and efficiency.window_attention


def check_python() -> Found:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, {platform.machine()}, {sys.prefix}"
    if sys.version_info < _OLDEST_PYTHON or sys.maxsize < 2**32:
        return Found("fault", found, "make an environment with 64-bit Python 3.11 or newer")
    if platform.system() != "Linux":
        return Found("fault", f"{found}, on {platform.system()}", "use Linux: DALI needs it")
    return Found("ok", found)


def check_locale() -> Found:
    """Looks at the locale itself, since programs have switched Python to UTF-8 by now."""
    encoding = locale.getencoding()
    if codecs.lookup(encoding).name not in ("utf-8", "ascii") or not _names_are_utf8():
        return Found(
            "warning",
            f"file names mean {encoding} under this locale: the programs switch to UTF-8, and "
            "the library refuses to read class folders",
            "export PYTHONUTF8=1, or LC_ALL=C.UTF-8",
        )
    return Found("ok", f"{encoding}; file names are UTF-8")


def _names_are_utf8() -> bool:
    return sys.getfilesystemencoding() == "utf-8"


def check_requirements() -> Found:
    """Compares what is installed with what this package requires."""
    wrong = _not_met(_requirements())
    if wrong:
        return Found(
            "fault", f"missing or too old: {', '.join(wrong)}", f"pip install {_quoted(wrong)}"
        )
    return Found("ok", f"{_PACKAGE} {metadata.version(_PACKAGE)} and all that it requires")


def check_extras() -> Found:
    """Says which extras are there; one that is there in part is a warning."""
    there: list[str] = []
    absent: list[str] = []
    broken: list[str] = []
    for extra in _EXTRAS:
        wanted = _requirements(extra)
        wrong = _not_met(wanted)
        (broken if 0 < len(wrong) < len(wanted) else absent if wrong else there).append(extra)
    spacy = importlib.util.find_spec("spacy") and not importlib.util.find_spec("en_core_web_sm")
    found = f"there: {', '.join(there) or 'none'}"
    found += f"; not installed: {', '.join(absent)}" if absent else ""
    if broken:
        names = ",".join(broken)
        return Found("warning", f"{found}; in part: {names}", f"pip install 'unicl_fast[{names}]'")
    if spacy:
        return Found(
            "warning", f"{found}; spaCy is there without its English model",
            "python -m spacy download en_core_web_sm",
        )  # fmt: skip
    return Found("ok", found)


def _requirements(extra: str = "") -> list[Any]:
    """Requirements of this package on this machine, of an extra alone if one is named."""
    from packaging.requirements import Requirement

    every = map(Requirement, metadata.requires(_PACKAGE) or [])
    return [
        one
        for one in every
        if (one.marker is None or one.marker.evaluate({"extra": extra}))
        and ("extra" in str(one.marker)) == bool(extra)
    ]


def _not_met(requirements: Iterable[Any]) -> list[str]:
    wrong = []
    for one in requirements:
        try:
            met = one.specifier.contains(metadata.version(one.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            wrong.append(f"{one.name}{one.specifier}")
    return wrong


def _quoted(requirements: Iterable[str]) -> str:
    return " ".join(f"'{one}'" for one in requirements)


def check_torch() -> Found:
    """Imports torch, torchvision and timm, which have to fit one another."""
    try:
        import torch
        import torchvision

        torch.ones(2).add(1)
    except Exception as error:
        return Found("fault", f"cannot be imported: {error!r}", _TORCH_ANEW)
    built = torch.version.cuda or torch.version.hip
    built = (
        f"for CUDA {built}" if torch.version.cuda else f"for ROCm {built}" if built else "for CPUs"
    )
    return Found("ok", f"{torch.__version__}, built {built}; torchvision {torchvision.__version__}")


def check_cuda() -> Found:
    """Asks torch for CUDA devices, and each for a sum; a CPU alone is no fault."""
    import torch

    if torch.cuda.is_available():
        return _check_devices()
    if not list(_DEVICES.glob("nvidia[0-9]*")):
        return Found("ok", "no NVIDIA device here: torch computes on the CPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return Found(
            "warning", f"CUDA_VISIBLE_DEVICES={visible} hides the NVIDIA devices",
            "unset CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    if torch.version.cuda is None:
        return Found(
            "warning", f"there is an NVIDIA device, and torch {torch.__version__} has no CUDA",
            f"{_TORCH_ANEW}, for CUDA",
        )  # fmt: skip
    return Found(
        "warning",
        f"there is an NVIDIA device, and torch, built for CUDA {torch.version.cuda}, cannot use it",
        "see the row of the driver: it must support this CUDA; then nvidia-smi",
    )


def _check_devices() -> Found:
    import torch

    from unicl_fast.training.mfu import peak_of_gpu

    names = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(1, device=torch.device("cuda", index)).add(1).item()
        except RuntimeError as error:  # no kernels for this device, a device in an error state
            return Found(
                "fault", f"{name} does not compute: {error}", f"{_TORCH_ANEW}; nvidia-smi -q"
            )
        known = peak_of_gpu(name, torch.bfloat16) is not None
        names.append(name if known else f"{name} (its peak is not known: no mfu)")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Found("ok", f"{', '.join(names)}; NCCL {nccl}")


def check_dali() -> Found:
    """Decodes small images by the product's own graph, and says where a GPU's are decoded."""
    installed = sorted(
        f"{one.name} {one.version}"
        for one in metadata.distributions()
        if (one.name or "").startswith("nvidia-dali-cuda")
    )
    package = installed[0].split()[0] if installed else "nvidia-dali-cuda120"
    anew = f"pip install --force-reinstall {package}"
    try:
        from unicl_fast.pipelines import graph
    except ImportError as error:
        what, _, how = str(error).partition(": ")
        return Found("fault", what, how)
    if len(installed) > 1:
        return Found(
            "fault", f"{' and '.join(installed)} overwrite each other",
            f"pip uninstall {' '.join(one.split()[0] for one in installed)}; then {anew}",
        )  # fmt: skip
    failed = {}
    for name in _FORMATS:
        try:
            _decode(graph, name)
        except Exception as error:  # DALI's are of several types
            failed[name] = graph.reason_of(graph.DecodingError(str(error)))
    version = installed[0].split()[1] if installed else "of an unknown version"
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        return Found("fault", f"{version} does not decode {reasons}", anew)
    import torch

    found = f"{version} decodes {', '.join(_FORMATS)} on the CPU"
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
    from unicl_fast.pipelines.feed.host_batches import HostBatch

    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (120, 130, 140)).save(file, format=name)
    edges = (np.full((1, 2), edge, np.float32) for edge in (0, _SIDE))
    batch = HostBatch(inputs=([np.frombuffer(file.getvalue(), np.uint8)], *edges), metadata=0)
    data = DataConfig(image_size=_SIDE, threads=1, prefetch=1, resample="dali")
    cpu = torch.device("cpu")
    build = functools.partial(graph.build_evaluation_graph, data=data, batch_size=1, device=cpu)
    for (images,), _ in graph.run_graphs([build], iter([batch]), device=cpu, ahead=1):
        if not (images.float().mean((0, 1, 2)) - torch.tensor([120, 130, 140])).abs().max() < 4:
            raise RuntimeError("other pixels than were encoded")


def check_kernels() -> Found:
    """Asks for the folder of compiled kernels, as every program does."""
    import numba

    from unicl_fast.system import kernels

    config: Any = numba.config
    if config.DISABLE_JIT:
        return Found(
            "fault", "NUMBA_DISABLE_JIT=1: kernels would run in Python, or not at all",
            "unset NUMBA_DISABLE_JIT",
        )  # fmt: skip
    folder = kernels.cache_folder()
    own = "set NUMBA_CACHE_DIR to a folder of this user alone"
    if folder is None:
        return Found(
            "warning", f"Numba {numba.__version__}: every process compiles its kernels anew, 20 s",
            f"unset NUMBA_CACHE_LOCATOR_CLASSES, and {own}",
        )  # fmt: skip
    if folder.parent == Path(tempfile.gettempdir(), f"unicl_fast-{os.getuid()}"):
        return Found(
            "warning", f"Numba {numba.__version__}: kernels are kept in {folder.parent}, since the "
            "user's cache folder cannot be written, or others can write there",
            f"{own} that lasts longer",
        )  # fmt: skip
    return Found("ok", f"Numba {numba.__version__}; kernels are kept in {folder.parent}, private")


def check_apex() -> Found:
    """Tells NVIDIA's apex from PyPI's, as the optimizers do."""
    if importlib.util.find_spec("apex") is None:
        return Found("ok", "not installed; only fusedadamw and fusedlamb need it")
    from unicl_fast.training.optim import load_apex_optimizers

    try:
        load_apex_optimizers()
    except ValueError as error:
        return Found("warning", f"{error}", "pip uninstall apex; timm and others look for it too")
    return Found("ok", "NVIDIA's, with its CUDA extensions")


def check_blas() -> Found:
    """Asks the OpenBLAS of NumPy for its threads and its kernels."""
    import numpy as np

    blas: Any = np.show_config(mode="dicts")
    blas = blas["Build Dependencies"]["blas"]
    found = f"{blas.get('name')} {blas.get('version')}"
    threads, cores = openblas_threads(), usable_cores()
    if core := os.environ.get("OPENBLAS_CORETYPE"):
        return Found(
            "warning", f"{found} takes its kernels for {core}, by OPENBLAS_CORETYPE",
            "unset OPENBLAS_CORETYPE",
        )  # fmt: skip
    if threads is None:
        return Found("ok", found)
    found += f", {count_of(threads, 'thread')}"
    if threads > cores:
        return Found(
            "warning", f"{found} for {count_of(cores, 'core')}: they wait for one another",
            f"export OPENBLAS_NUM_THREADS={cores}",
        )  # fmt: skip
    return Found("ok", found)


def openblas_threads() -> int | None:
    """Threads of the OpenBLAS that this process has loaded; None without one."""
    paths = re.findall(r"(/\S*openblas\S*\.so\S*)", _MAPS.read_text(encoding="utf-8"))
    for path in dict.fromkeys(paths):
        library = ctypes.CDLL(path)
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
            function = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
            if function is not None:
                return int(function())
    return None


def check_compilers() -> Found:
    """Looks for what efficiency.compile and the Triton kernels need; a CPU needs neither."""
    import torch

    from unicl_fast.models.efficiency import has_compiler

    obstacles = [] if has_compiler() else ["no C++ compiler for efficiency.compile"]
    if torch.cuda.is_available():
        obstacle = obstacle_to_triton(None, oldest=_OLDEST_FOR_TRITON)
        obstacles += [f"{obstacle}: no kernels for the loss and for window attention"] * bool(
            obstacle
        )
    if not obstacles:
        return Found("ok", f"C++: {shutil.which(os.environ.get('CXX', 'g++'))}")
    found = "; ".join(obstacles)
    if not torch.cuda.is_available():
        return Found("ok", f"{found}, which a CPU seldom needs")
    return Found("warning", found, "install g++ (or name one in CXX), and pip install triton")


CHECKS = [
    Check("Python", check_python),
    Check("locale", check_locale),
    Check("requirements", check_requirements),
    Check("extras", check_extras),
    Check("torch", check_torch),
    Check("CUDA", check_cuda, needs=("torch",)),
    Check("Numba kernels", check_kernels),
    Check("DALI", check_dali, needs=("torch", "Numba kernels")),
    Check("apex", check_apex, needs=("torch",)),
    Check("OpenBLAS", check_blas),
    Check("compilers", check_compilers, needs=("torch",)),
]
