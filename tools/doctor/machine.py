"""Checks of cores, threads, shared memory and disks."""

import math
import os
import shutil
import tempfile
from pathlib import Path

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.system.machine import cpu_quota, usable_cores
from unicl_fast.system.wording import count_of

from .rows import Check, Found

_SHARED_MEMORY = Path("/dev/shm")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GB = 10**9
_LITTLE_SHARED_MEMORY = _GB
"""NCCL's buffers for the ranks of one machine are there; Docker's default is 64 MB in all."""
_LITTLE_DISK = 2 * _GB
"""A checkpoint of Swin-B: 150 million parameters with AdamW's state, 12 bytes each."""


def check_cores() -> Found:
    there, mine, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_quota()
    found = f"{there} in the machine, {mine} for this process"
    found += "" if quota == math.inf else f", a quota of {quota:g}"
    if usable_cores() == 1 < there:
        fix = "more: --cpus-per-task (Slurm), --cpus (Docker), limits.cpu (Kubernetes), taskset"
        return Found("warning", found, fix)
    return Found("ok", found)


def check_threads() -> Found:
    import torch

    cores = usable_cores()
    asked = {name: os.environ.get(name, "").partition(",")[0] for name in _THREADS}
    many = [name for name, number in asked.items() if number.isdecimal() and int(number) > cores]
    if many:
        found = ", ".join(f"{name}={os.environ[name]}" for name in many)
        found += f" for {count_of(cores, 'core')}: threads wait for one another"
        return Found("warning", found, f"unset {' '.join(many)}")
    found = f"{count_of(torch.get_num_threads(), 'thread')} for {count_of(cores, 'core')}"
    if torch.get_num_threads() > cores:  # torch does not see a quota
        return Found("warning", f"torch has {found}", f"export OMP_NUM_THREADS={cores}")
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
    """Checks the current folder, the cache folder and the temporary folder."""
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
    """Checks that a folder, or its nearest existing parent, has room and can be written."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    found = f"{folder}: {usage.free / _GB:.3g} GB free"
    if not os.access(there, os.W_OK | os.X_OK) or not usage.total:  # /proc has no blocks
        fix = f"chown or chmod {there}, or use another"
        return Found("warning", f"{folder} cannot be written", fix)
    if usage.free == 0 or (inodes.f_files and not inodes.f_favail):
        return Found("fault", f"{found}: the disk is full", "make room, of files too: df -h, df -i")
    if usage.free < _LITTLE_DISK:
        return Found("warning", found, "make room, or use another")
    return Found("ok", found)


CHECKS: dict[str, Check] = {
    "cores": check_cores,
    "threads": check_threads,
    "/dev/shm": check_shared_memory,
    "disks": check_disks,
}
