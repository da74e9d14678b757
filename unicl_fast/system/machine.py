"""How many processor cores this process may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MY_CGROUP = Path("/proc/self/cgroup")
LAUNCHED_BY_US = "UNICL_FAST_RANK"
"""Variable that says so to a rank, as torchrun says it by `_LAUNCHED_BY_TORCHRUN`."""
_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


def usable_cores() -> int:
    """Cores that this process may run on, or fewer where a container has a quota of time."""
    return max(1, min(len(os.sched_getaffinity(0)), *_quotas()))


def cores_of_this_rank() -> int:
    """This rank's part of the cores: all of its own, or a share of what local ranks have together.

    Slurm says how many cores a task has; where it does not, a rank that may not run everywhere is
    taken to have been bound to cores of its own.
    """
    cores = usable_cores()
    if "SLURM_CPUS_PER_TASK" in os.environ and not _has_a_launcher():
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    if not _is_bound_alone():
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores)


def _has_a_launcher() -> bool:
    """Whether the process above this one started all local ranks."""
    return LAUNCHED_BY_US in os.environ or _LAUNCHED_BY_TORCHRUN in os.environ


def _is_bound_alone() -> bool:
    mine = os.sched_getaffinity(0)
    if not _has_a_launcher():
        return len(mine) < (os.cpu_count() or 1)
    if os.getppid() == 1:  # the launcher of a container, or what inherits from one that has ended
        return False
    try:  # launchers bind nothing: their ranks may run wherever they may themselves
        return os.sched_getaffinity(os.getppid()) != mine
    except OSError:  # it ended just now
        return False


def _quotas() -> list[int]:
    """Whole cores' worth of time in cgroups (version 2) around this process, rounded up."""
    found = [os.cpu_count() or 1]
    try:
        lines = _MY_CGROUP.read_text().splitlines()
    except OSError:
        return found
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue  # the root has none
        if quota != "max":
            found.append(-(-int(quota) // int(period)))
    return found
