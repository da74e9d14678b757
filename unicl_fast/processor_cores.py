"""How many processor cores this process may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MY_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on, or fewer where a container has a quota of time."""
    return max(1, min(len(os.sched_getaffinity(0)), *_quotas()))


def cores_of_this_rank() -> int:
    """This rank's part of the cores: all of its own, or a share of what local ranks have together.

    torchrun and our launcher bind nothing: their ranks may run wherever the launcher may. A rank
    that was bound to cores of its own (by Slurm, or numactl) may not.
    """
    cores = usable_cores()
    if _shares_with_its_launcher():
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores)


def _shares_with_its_launcher() -> bool:
    try:
        return os.sched_getaffinity(os.getppid()) == os.sched_getaffinity(0)
    except OSError:  # it has ended
        return True


def _quotas() -> list[int]:
    """Whole cores' worth of time in cgroups (version 2) around this process, rounded up."""
    try:
        lines = _MY_CGROUP.read_text().splitlines()
    except OSError:
        return [os.cpu_count() or 1]
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    found = [os.cpu_count() or 1]
    for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue  # the root has none
        if quota != "max":
            found.append(-(-int(quota) // int(period)))
    return found
