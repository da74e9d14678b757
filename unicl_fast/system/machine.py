"""Resources of the machine that this process may use: processor cores, memory limits, a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # programs that train nothing need not wait for torch
    import torch

LAUNCHED_BY_US = "UNICL_FAST_RANK"
"""Environment variable that `start_ranks` sets for its ranks, as torchrun sets its run id."""
_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
_CGROUPS = Path("/sys/fs/cgroup")
_MY_CGROUP = Path("/proc/self/cgroup")


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
        lines = _MY_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    return [_CGROUPS / own, *(_CGROUPS / own).parents]


def _quotas() -> list[int]:
    """Quotas of CPU time in the control groups, in whole cores, rounded up."""
    found = []
    for folder in control_groups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue  # the root has none
        if quota != "max":
            found.append(-(-int(quota) // int(period)))
    return found


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Chooses the device that `run.device` means for this rank.

    Raises:
        ValueError: CUDA is asked for and there is none, or this rank has no device of its own.
    """
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
