"""Checks of cores, threads, memory and disks."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.system.machine import (
    cpu_quota,
    cpu_times,
    free_memory,
    usable_cores,
)
from unicl_fast.system.wording import count_of

from .rows import Check, Found

_SHARED_MEMORY = Path("/dev/shm")
_MOUNTS = Path("/proc/self/mounts")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NO_LOCKS = ("nolock", "noflock", "localflock")
"""Options of NFS and Lustre with which other hosts do not see a lock."""
_GB = 10**9
_LEAST_MEMORY, _LITTLE_MEMORY = 1 * _GB, 4 * _GB
"""Bytes: libraries, DALI and decoded batches leave a small model no room in the first, and a large
one none in the second. A run plans its own memory before the first step."""
_LITTLE_SHARED_MEMORY = _GB
"""Ranks of one machine have NCCL's buffers there, and Docker gives 64 MB to all of them."""
_LITTLE_DISK = 2 * _GB
"""One checkpoint of Swin-B: 150 million parameters with AdamW's state, 12 bytes each."""
_BUSY = 0.15  # of the cores, as in the trainer's own warning
_BUSY_SECONDS = 0.4


def check_cores() -> Found:
    """Counts the cores of this process, and measures for a moment how busy others keep them."""
    there, mine, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_quota()
    before = cpu_times()
    time.sleep(_BUSY_SECONDS)
    after = cpu_times()
    others = (after.busy - before.busy) - (after.own - before.own)
    part = min(1.0, max(0.0, others / (_BUSY_SECONDS * mine)))
    found = f"{there} in the machine, {mine} for this process"
    found += "" if quota == math.inf else f", a quota of {quota:g}"
    found += f"; other processes take {part:.0%}"
    if usable_cores() == 1 < there:
        fix = "more: --cpus-per-task (Slurm), --cpus (Docker), limits.cpu (Kubernetes), taskset"
        return Found("warning", found, fix)
    if part > _BUSY:
        return Found("warning", found, "end them (see top), or expect slower steps and rates")
    return Found("ok", found)


def check_threads() -> Found:
    """Compares numbers of threads with the cores, and asks which precision `auto` takes."""
    import torch

    from unicl_fast.models.precision import fast_precision

    cores = usable_cores()
    asked = {name: os.environ.get(name, "").partition(",")[0] for name in _THREADS}
    many = [name for name, number in asked.items() if number.isdecimal() and int(number) > cores]
    if many:
        found = ", ".join(f"{name}={os.environ[name]}" for name in many)
        found += f" for {count_of(cores, 'core')}: threads wait for one another"
        return Found("warning", found, f"unset {' '.join(many)}")
    found = count_of(torch.get_num_threads(), "thread")
    if torch.get_num_threads() > cores:  # torch does not see a quota
        fix = f"export OMP_NUM_THREADS={cores}"
        return Found("warning", f"torch has {found} for {count_of(cores, 'core')}", fix)
    chosen = fast_precision(torch.device("cpu"))
    found += f"; on the CPU efficiency.precision=auto takes {chosen}"
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        found += "; without AVX2 decoding and training take several times as long"
        fix = "unset ATEN_CPU_CAPABILITY; of a virtual machine, pass the host's processor through"
        return Found("warning", found, fix)
    return Found("ok", found)


def check_memory() -> Found:
    import torch

    free = free_memory(torch.device("cpu"))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{total / _GB:.1f} GB in the machine, {free / _GB:.1f} GB free for this process"
    if free < _LITTLE_MEMORY:
        fix = "end other programs, raise the limit of the container (docker --memory, Slurm --mem)"
        return Found("fault" if free < _LEAST_MEMORY else "warning", found, fix)
    return Found("ok", found)


def check_shared_memory() -> Found:
    if not os.access(_SHARED_MEMORY, os.W_OK):
        found = f"{_SHARED_MEMORY} is not there or cannot be written: worker processes fail"
        return Found("fault", found, "mount a tmpfs there that all users can write (mode 1777)")
    usage = shutil.disk_usage(_SHARED_MEMORY)
    found = f"{usage.free / _GB:.2g} of {usage.total / _GB:.2g} GB free"
    if usage.free < _LITTLE_SHARED_MEMORY:
        fix = "docker run --shm-size=8g (or --ipc=host); remove left files"
        return Found("warning", f"{found}: NCCL may fail with several ranks", fix)
    return Found("ok", found)


def check_disks() -> Found:
    """Checks the current folder, the temporary one and that of caches and kernels."""
    try:
        folders = Path.cwd(), CacheOptions().place, Path(tempfile.gettempdir())
    except RuntimeError:
        found = "this user has no home, so object stores are read without a cache"
        return Found("warning", found, "set XDG_CACHE_HOME to a folder of this user")
    except FileNotFoundError as error:
        return Found("fault", f"{error}", "set TMPDIR to a folder that can be written")
    rows = list(map(check_folder, folders))
    if bad := [row for row in rows if row.state != "ok"]:
        return min(bad)  # a fault before a warning
    if os.statvfs(folders[-1]).f_flag & os.ST_NOEXEC:
        found = f"{folders[-1]} is mounted noexec: torch.compile cannot load what it compiled"
        return Found("warning", found, "set TMPDIR to a folder on another file system")
    return Found("ok", "; ".join(row.found for row in rows))


def check_folder(folder: Path) -> Found:
    """Checks whether a folder, or the one where it would be made, has room and can be written."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    found = f"{folder}: {usage.free / _GB:.3g} GB free"
    if not os.access(there, os.W_OK | os.X_OK) or not usage.total:  # /proc has no blocks
        fix = f"chown or chmod {there}, or take another"
        return Found("warning", f"{folder} cannot be written", fix)
    if usage.free == 0 or (inodes.f_files and not inodes.f_favail):
        return Found("fault", f"{found}: the disk is full", "make room, of files too: df -h, df -i")
    if usage.free < _LITTLE_DISK:
        return Found("warning", found, "make room, or take another")
    options = mount_options(there)
    locks = {one for one in options if one in _NO_LOCKS or one.startswith("local_lock=")}
    if locks - {"local_lock=none"}:
        found += f", mounted {', '.join(locks)}: two hosts can write into one run folder"
        return Found("warning", found, "mount it otherwise, or never start a run twice")
    return Found("ok", found)


def mount_options(path: Path) -> list[str]:
    """Options of the file system that a path lies on."""
    longest, found = -1, ""
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, place, _, options, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if path.resolve().is_relative_to(place) and len(place) >= longest:
            longest, found = len(place), options
    return found.split(",")


CHECKS = [
    Check("cores", check_cores),
    Check("threads", check_threads, needs=("torch",)),
    Check("memory", check_memory, needs=("torch",)),
    Check("/dev/shm", check_shared_memory),
    Check("disks", check_disks),
]
