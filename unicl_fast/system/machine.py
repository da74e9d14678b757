"""The machine as this process can use it: cores and limits, a device, and memory."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fractions
import math
import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unicl_fast.system.wording import count_of

if TYPE_CHECKING:  # programs that do not train need not wait for torch
    import torch

Cores = tuple[str, str, Sequence[int]]
"""A process's kernel, container (by host name), and the cores that it can run on."""
LAUNCHED_BY_US = "UNICL_FAST_RANK"
"""Environment variable that `start_ranks` sets for its ranks, as torchrun sets its run id."""
STORE_SOCKET = "UNICL_STORE_SOCKET"
"""Variable with the file descriptor on which rank 0's store listens, from the launcher."""
_CGROUPS = Path("/sys/fs/cgroup")
_MY_CGROUP = Path("/proc/self/cgroup")
_NO_LIMIT = 2**60  # without a limit on memory, control groups of version 1 have a larger number
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DEVICES = Path("/dev")
_GPUS = ("nvidia[0-9]*", "kfd", "dxg")  # device files of NVIDIA's and AMD's drivers, and of WSL
# Torch's variables for its allocator; all versions from 2.6 to 2.13 read the first.
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_NEVER = 2**31 - 1
# Cores that feed 4,500 images/s, the goal for Swin-T on an H100: a JPEG of ImageNet costs 1.03 ms
# of a core (one packed at 256 pixels 0.31, so 3 would do), and the trainer needs a core.
_THREADS_TO_DECODE = 6


def check_current_folder() -> None:
    """Raises FileNotFoundError if the current folder was removed: MKL would abort on import."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError(
            "the current directory was removed or replaced since you changed to it: change to one "
            "that is there (cd ~), and start again"
        ) from None


def usable_cores() -> int:
    """Returns how many cores this process can run on, or fewer if a CPU quota limits it."""
    return int(max(1, min(len(os.sched_getaffinity(0)), os.cpu_count() or 1, _whole_cores())))


def describe_cores() -> Cores:
    """Returns this process's kernel, container and cores."""
    container = socket.gethostname()
    try:
        kernel = _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:  # a sandbox, where no other process is visible either
        kernel = container
    return kernel, container, sorted(os.sched_getaffinity(0))


def quota_of_cores() -> float:
    """Returns the CPU quota, in cores, of all ranks in this container; inf without a limit."""
    quota = _whole_cores()
    has_launcher = LAUNCHED_BY_US in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if "SLURM_CPUS_PER_TASK" in os.environ and not has_launcher:
        tasks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        quota = min(quota, tasks * int(os.environ["SLURM_CPUS_PER_TASK"]))
    return quota


def cores_of_rank(rank: int, cores: Sequence[Cores], *, quota: float) -> int:
    """Returns a rank's number of cores: each core is shared evenly by the ranks that can use it.

    `cores` has `describe_cores` of every rank, `quota` is this rank's `quota_of_cores`.
    """
    kernel, container, mine = cores[rank]
    num_ranks_on = collections.Counter(
        core for other, _, theirs in cores if other == kernel for core in theirs
    )
    part = sum(fractions.Fraction(1, num_ranks_on[core]) for core in mine)
    num_ranks = sum(each[:2] == (kernel, container) for each in map(tuple, cores))
    return max(1, int(min(part, quota / num_ranks)))


def control_groups(controller: str = "") -> list[Path]:
    """Returns the folders of this process's control group and its parents.

    They are of version 2, or with a `controller` (cpu, memory) of version 1, as on older hosts.
    """
    try:
        lines = _MY_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = [line.split(":", 2)[1:] for line in lines if line.count(":") >= 2]
    found = [each for each in groups if controller in each[0].split(",")]
    names, own = found[0] if found else (controller, "")
    folder = _CGROUPS / names / own.strip("/")
    return [folder, *folder.parents]


def cpu_quota() -> float:
    """Returns the smallest CPU quota of the control groups, in cores (1.5); inf without one."""
    smallest = math.inf
    limits: list[tuple[Path, ...]] = [(folder / "cpu.max",) for folder in control_groups()]
    of_version_1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    limits += [tuple(folder / name for name in of_version_1) for folder in control_groups("cpu")]
    for files in limits:
        try:
            texts = [file.read_text(encoding="utf-8") for file in files]
            quota, period = " ".join(texts).split()
        except (OSError, ValueError):
            continue  # the root group has no files
        if quota not in ("max", "-1"):
            smallest = min(smallest, int(quota) / int(period))
    return smallest


def _whole_cores() -> float:
    """The quota in whole cores, rounded up: two threads use 1.5 cores, one does not."""
    quota = cpu_quota()
    return quota if quota == math.inf else math.ceil(quota)


def free_memory(device: torch.device) -> int:
    """Returns the free bytes of this rank's device, or its share of the host's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free: float = _fields_of(Path("/proc/meminfo"))["MemAvailable"] * 1024
    for folder in control_groups():
        free = min(free, _free_in_group(folder))
    for folder in control_groups("memory"):  # of version 1
        free = min(free, _free_in_group(folder, "limit_in_bytes", "usage_in_bytes", "total_"))
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_group(
    folder: Path, limit: str = "max", used: str = "current", prefix: str = ""
) -> float:
    path = folder / f"memory.{limit}"
    most = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
    if most == "max" or int(most) >= _NO_LIMIT:
        return math.inf
    files = _fields_of(folder / "memory.stat")
    # cached files count as used, and make room when it is needed
    reclaimed = files[f"{prefix}inactive_file"] + files[f"{prefix}active_file"]
    return int(most) - int((folder / f"memory.{used}").read_text(encoding="utf-8")) + reclaimed


def _fields_of(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8").replace(":", " ").splitlines()
    return {name: int(value) for name, value, *_ in map(str.split, lines)}


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Returns this rank's device for `run.device`; raises ValueError if there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # SLURM can show each task only its own device
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} has no device of its own: torch sees {visible}; start as "
            "many ranks as there are devices"
        )
    return torch.device("cuda", local_rank)


def gpu_bytes(name: str) -> int:
    """Returns the memory of the smallest GPU for `run.device`; 0 if it means the CPU."""
    import torch

    if choose_device(name).type == "cpu":
        return 0
    gpus = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)


def choose_decode_device(
    requested: str, *, device: torch.device, threads: int
) -> tuple[torch.device, str]:
    """Chooses the device that decodes images, for a model on `device`; also returns why.

    `requested` is `data.decode_device`, `threads` the rank's decoding threads (0: its cores).
    """
    import torch

    if device.type != "cuda":
        return device, "the model is on no GPU"
    if requested == "gpu":
        return device, "data.decode_device=gpu"
    why = f"data.decode_device={requested}"
    threads = threads or usable_cores()
    if requested == "auto" and threads < _THREADS_TO_DECODE:
        why += (
            f"; a rank has {count_of(threads, 'decoding thread')}, and a fast model may need "
            f"{_THREADS_TO_DECODE}: add cores, pack at --resize short:256, or try decode_device=gpu"
        )
    return torch.device("cpu"), why


def return_freed_memory() -> None:
    """Returns free memory to the kernel, once; set-up leaves some 100 MB."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed blocks of any size; for programs to call when they start.

    Returns whether it worked: other C libraries cannot.
    """
    # Writing a fresh float32 batch of 64 images (38 MB) cost 19 ms, since the kernel clears each
    # page at its first touch; in reused memory 2 ms. The price: the process never shrinks. One
    # arena per core, since memory that is free in one is of no use to another.
    choices = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: usable_cores()}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in choices.items())


def choose_environment(device: str) -> None:
    """Sets variables that torch's import reads, for `run.device`, unless the user has set them."""
    if device == "cuda" or (device == "auto" and any(map(any, map(_DEVICES.glob, _GPUS)))):
        # torch's allocator then extends its memory instead of keeping pieces
        if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
            os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
        # since 2.15 "nccl" means a new backend, which nobody has tried here (pytorch PR 192281)
        os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
        return
    # for ideep, torch's wrapper of oneDNN, which keeps prepared products for the latest shapes:
    # texts have new ones at each step; its 1,024 cost 400 MB after 90 steps for 1 % of the time
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    if "OMP_WAIT_POLICY" not in os.environ:
        # idle OpenMP threads sleep; spinning, they would take the cores from the loader
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's library


class CpuTimes(NamedTuple):
    """Seconds since some moment in the past: use differences."""

    own: float
    """CPU time of this process."""
    waited: float
    """Time in which its threads, summed over the living ones, were ready but had no core."""
    busy: float
    """CPU time of all processes, and of the machine's other guests, on this process's cores."""


def cpu_times() -> CpuTimes:
    """Reads the times of this process and its cores in 0.1 ms; 0 if the kernel has none."""
    spent = os.times()
    waited = busy = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has ended
            waited += int(path.read_text(encoding="utf-8").split()[1]) / 1e9
    cores = os.sched_getaffinity(0)
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
            name, *ticks = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, _, _, irq, softirq, steal, *_ = map(int, ticks)
                busy += (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return CpuTimes(spent.user + spent.system, waited, busy)


def resident_bytes() -> int:
    """Returns how much of this process's memory is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * mmap.PAGESIZE
