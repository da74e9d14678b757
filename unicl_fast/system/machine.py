"""The machine as this process may use it: cores and limits, a device, and memory.

Freed memory is kept in the process, because getting it anew costs more than filling it. glibc takes
every block above 32 MB (less at first) from the kernel and gives it back when it is freed. The
kernel clears each page at its first touch: writing a fresh float32 batch of 64 images (38 MB) took
19 ms here, writing one that was there 2 ms, and a training step on the CPU that touched 30,000
fresh pages took 1.4 times the CPU time of one that touched none.

Threads allocate from several arenas, and what is free in one is of no use to the others: where it
is kept for good, glibc's eight arenas a core held 40 MB more beside the loader than one a core.

Large batches have memory of their own (`HostBuffers`). From the heap a batch that is made and
dropped at every step costs more than its size: what is allocated meanwhile lands in the hole that
the last one has left, and some three times its size stay with the process unused.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # programs that train nothing need not wait for torch
    import torch
    from torch import Tensor

LAUNCHED_BY_US = "UNICL_FAST_RANK"
"""Environment variable that `start_ranks` sets for its ranks, as torchrun sets its run id."""
STORE_SOCKET = "UNICL_STORE_SOCKET"
"""Variable with the file descriptor on which rank 0's store is to listen, from the launcher."""
_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
_CGROUPS = Path("/sys/fs/cgroup")
_MY_CGROUP = Path("/proc/self/cgroup")
_DEVICES = Path("/dev")
_GPUS = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of NVIDIA's and AMD's drivers, and of WSL."""
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Torch's variables for its allocator; all versions from 2.6 to 2.13 take the first."""
# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1
_SPARE = 1
"""Free buffers kept beside the one handed out: for who holds two at times and one at others."""


def check_current_folder() -> None:
    """Refuses a current folder that was removed: MKL would end the process when torch is imported.

    Raises:
        FileNotFoundError: says what to do.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError(
            "the current directory was removed or replaced since you changed to it: change to one "
            "that is there (cd ~), and start again"
        ) from None


def usable_cores() -> int:
    """Cores that this process may run on, or fewer where its container has a quota of CPU time."""
    return max(1, min(len(os.sched_getaffinity(0)), os.cpu_count() or 1, *_quotas()))


def cores_of_this_rank() -> int:
    """Cores of this rank: those it is bound to, or an equal part of those of all local ranks.

    Slurm says how many cores a task has. Where it does not, a rank that may not run on every core
    is taken to have been bound to cores of its own.
    """
    cores = usable_cores()
    if "SLURM_CPUS_PER_TASK" in os.environ and not _has_a_launcher():
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    if not _is_bound_alone():
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores)


def _has_a_launcher() -> bool:
    """Whether the parent process started all local ranks."""
    return LAUNCHED_BY_US in os.environ or _LAUNCHED_BY_TORCHRUN in os.environ


def _is_bound_alone() -> bool:
    mine = os.sched_getaffinity(0)
    if not _has_a_launcher():
        return len(mine) < (os.cpu_count() or 1)
    if os.getppid() == 1:  # a container's launcher, or the heir of one that has ended
        return False
    try:  # launchers bind nothing: their ranks may run wherever they may themselves
        return os.sched_getaffinity(os.getppid()) != mine
    except OSError:  # it ended just now
        return False


def control_groups() -> list[Path]:
    """Folders of this process's control group (version 2) and of those around it."""
    try:
        lines = _MY_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    return [_CGROUPS / own, *(_CGROUPS / own).parents]


def _quotas() -> list[int]:
    """Quotas of CPU time in the control groups, in whole cores, rounded up."""
    found = []
    for folder in control_groups():
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            continue  # the root has none
        if quota != "max":
            found.append(-(-int(quota) // int(period)))
    return found


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Chooses the device that `run.device` means for this rank; raises ValueError without one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # SLURM may show each task its own device only
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} has no device of its own: torch sees {visible}; start as "
            "many ranks as there are devices"
        )
    return torch.device("cuda", local_rank)


def return_freed_memory() -> None:
    """Gives what is free now back to the kernel, once: what set-up needed and the loop will not.

    Where freed memory is kept, compilers and tables of texts leave 100 MB behind otherwise.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks of any size; for programs to call when they start.

    The price: the process stays as large as it ever was. Child processes made by fork inherit it.
    Returns whether the C library took it; another one than glibc is left as it is.
    """
    choices = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: usable_cores()}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in choices.items())


def choose_environment(device: str) -> None:
    """Sets variables that libraries read once; for programs, before torch's import.

    On a CPU, idle threads of OpenMP sleep where they would spin for the next parallel region, and
    so take the cores from whoever else has work: the loader's threads, other programs, and the
    thread that they wait for. On a GPU, torch's allocator extends the memory that it has, where it
    would keep pieces that fit no later size. `device` is `run.device`; what the user has set stays.
    """
    if device == "cuda" or (device == "auto" and any(map(any, map(_DEVICES.glob, _GPUS)))):
        if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
            os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's library


class HostBuffers:
    """Gives tensors and takes their memory back without being told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[tuple[mmap.mmap, Callable[[], object]]] = []
        """Memory, and what gives its user as long as there is one."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, contiguous, on the CPU, and at the start of a page.

        Its memory is used again by a later call when the tensor, all views of it and all graphs
        that saved it are gone. Until then the process keeps it: calls are what frees buffers that
        are too small or too many. For large ones: each takes whole pages.
        """
        import numpy as np
        import torch

        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            # each user is asked once: one that went between two questions would be both, and its
            # memory be given to two
            asked = [(memory, user, user() is not None) for memory, user in self._buffers]
            held = [(memory, user) for memory, user, is_held in asked if is_held]
            free = [memory for memory, _, is_held in asked if not is_held]
            fitting = sorted((each for each in free if len(each) >= num_bytes), key=len)
            memory, *others = fitting or [_take(max(1, num_bytes))]
            # a tensor keeps the array alive that it was made of, so when that is gone, so is it
            array = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
            spare = [(each, lambda: None) for each in others[:_SPARE]]
            self._buffers = [*held, (memory, weakref.ref(array)), *spare]
            return torch.from_numpy(array).view(dtype).view(*shape)


def _take(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # an advice only: some systems have no name for it, some kernels and sandboxes refuse it
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
