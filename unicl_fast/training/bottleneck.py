"""Finds out what limits a run from measurements of its steps, and names the option that helps.

`LIMITS` is the table: numbers in, a sentence out. `BottleneckWatch` collects a run's numbers and
logs each sentence once; `unicl-bench run` consults the same table.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from unicl_fast.batch import ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system.machine import cpu_times, usable_cores

WAIT_FRACTION = 0.05
"""Waiting for data below this part of the time is ignored: no change would gain more."""
_LOST_CORES = 0.15
"""Part of its cores that a process must lose to others; daemons and the kernel need less."""
_BLOCKED = 0.5
"""Storage is the limit if readers wait for it longer than this part of the time."""
_IDLE_CORES = 0.25  # part of a rank's cores without work from which more decoding threads can help
_WINDOW_SECONDS, _WINDOW_LINES = 30.0, 5
"""A window has at least both: batches ahead hide slow ones, and one slow line proves nothing."""
_START_STEPS = 16
"""Steps before the first window: kernels compile, and caches and batches ahead fill."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The work, the waiting and the settings of one rank's process in a window of time."""

    seconds: float  # length of the window
    data_wait_seconds: float  # of the training loop, or of its GPU
    cores: float  # of this rank
    cpu_seconds: float  # of the process
    cpu_wait_seconds: float = 0.0  # time without a core of its ready threads, summed over them
    others_cpu_seconds: float = 0.0  # CPU time of processes outside the run on the same cores
    reading_blocked: float = 0.0
    """Part of the time that a reading thread waited for storage, 0 to 1."""
    read_bytes: int = 0  # from object stores; 0 if all data sets are in folders
    on_gpu: bool = False  # whether a GPU trains; other processes only slow its loader
    compute_threads: int = 1  # threads of torch's operators
    threads: int = 0  # `data.threads`, 0 for as many as cores
    decodes_files: bool = True  # whether images are encoded files, not raw
    is_remote: bool = False  # whether data sets are under URLs
    least_part: float = WAIT_FRACTION  # waiting below this part of the time is ignored

    @property
    def waits(self) -> bool:
        return self.data_wait_seconds > self.least_part * self.seconds

    @property
    def waits_for_storage(self) -> bool:
        return self.waits and self.reading_blocked > _BLOCKED

    @property
    def used(self) -> float:
        """Cores that the process used."""
        return self.cpu_seconds / self.seconds

    @property
    def waiting(self) -> str:
        return f"training waits for data {self.data_wait_seconds / self.seconds:.0%} of the time"


def _other_processes(usage: Usage) -> str | None:
    capacity = usage.cores * usage.seconds
    lost = min(usage.cpu_wait_seconds, usage.others_cpu_seconds, capacity - usage.cpu_seconds)
    if lost <= _LOST_CORES * capacity or not (usage.waits or not usage.on_gpu):
        return None
    remedies = "end them, or give the run its own cores"
    if not usage.on_gpu and usage.compute_threads > 1:
        # two busy processes on two cores: 0.7 of the CPU time, and 0.9 of the wall time
        remedies += (
            ", or resume with OMP_NUM_THREADS=1: threads of an operator spin while they wait for "
            "one that has no core"
        )
    waiting = f"; {usage.waiting}" if usage.waits else ""
    return (
        f"other processes hold the cores: this one got {usage.used:.1f} of {usage.cores:g} cores "
        f"in the last {usage.seconds:.0f} s, others {usage.others_cpu_seconds / usage.seconds:.1f}"
        f", and its threads waited {usage.cpu_wait_seconds:.0f} s for one{waiting}; {remedies}"
    )


def _storage(usage: Usage) -> str | None:
    if not usage.waits_for_storage:
        return None
    remedies = "copy the data to a faster disk, or pack smaller images (unicl-pack build --resize)"
    if usage.is_remote:
        rate = usage.read_bytes / usage.seconds / 1e6
        remedies = (
            "give data.cache_bytes room for the data set or set data.shuffle_window, and put "
            "data.cache_folder on a disk of this machine"
        )
        if usage.read_bytes:
            remedies = f"{rate:,.1f} MB/s come from the store; {remedies}"
    return (
        f"{usage.waiting}, for storage: its readers are blocked {usage.reading_blocked:.0%} of the "
        f"time; {remedies}"
    )


def _decoding_threads(usage: Usage) -> str | None:
    idle = 1 - usage.used / usage.cores
    if not usage.waits or not 0 < usage.threads < usage.cores or idle <= _IDLE_CORES:
        return None
    return (
        f"{usage.waiting}, for decoding by data.threads={usage.threads}, while {idle:.0%} of "
        f"{usage.cores:g} cores have no work; set data.threads=0, which uses all cores"
    )


def _decoding(usage: Usage) -> str | None:
    if not usage.waits:
        return None
    remedies = "pack large images smaller (unicl-pack build --resize short:256), or raw "
    remedies += "(--format raw)"
    if not usage.decodes_files:
        remedies = "pack smaller images (unicl-pack build --resize), or give the run more cores"
    elif usage.on_gpu:
        remedies += ", or set data.decode_device=gpu"
    return (
        f"{usage.waiting}, for images to be made ready: the process uses {usage.used:.1f} of "
        f"{usage.cores:g} cores, and storage keeps up; {remedies}"
    )


LIMITS: dict[str, Callable[[Usage], str | None]] = {
    "other processes": _other_processes,
    "storage": _storage,
    "decoding threads": _decoding_threads,
    "decoding": _decoding,
}
"""Rules for the limits of a rank; the first that returns a sentence (evidence and remedies) is
reported, since each explains effects that later rules would blame on other causes."""


def find_bottleneck(usage: Usage) -> tuple[str, str] | None:
    """The name and the sentence of a rank's limit, or None if nothing stands out."""
    for name, rule in LIMITS.items():
        if usage.seconds > 0 and (sentence := rule(usage)):
            return name, sentence
    return None


class BottleneckWatch:
    """Watches windows of some logging steps and reports each limit once."""

    def __init__(
        self, data: DataConfig, *, ranks: Ranks, on_gpu: bool, reading: ReadingTime | None
    ) -> None:
        """Begins before the first step; `reading` is the loader's, None if it measures none."""
        self._reading = reading or ReadingTime()
        self._cores = float(ranks.cores or usable_cores())
        self._ranks_here = max(1, round(len(os.sched_getaffinity(0)) / self._cores))
        self._settings: dict[str, Any] = {
            "on_gpu": on_gpu,
            "compute_threads": torch.get_num_threads(),
            "threads": data.threads,
            "decodes_files": self._reading.decodes_files,
            "is_remote": any("://" in name for name in data.train),
        }
        self._said: set[str] = set()
        self._steps = 0
        self._begin({})

    def _begin(self, values: Mapping[str, float]) -> None:
        self._begun, self._lines, self._data_wait = time.perf_counter(), 0, 0.0
        self._cpu, self._blocked = cpu_times(), self._reading.blocked_seconds
        self._read_bytes = int(values.get("storage_bytes_read", 0))

    def look(self, values: Mapping[str, float], *, num_steps: int) -> str | None:
        """Accepts a line of metrics, the means of `num_steps` steps; returns a sentence to log."""
        begun, self._steps = self._steps, self._steps + num_steps
        if begun < _START_STEPS:
            self._begin(values)
            return None
        self._lines += 1
        self._data_wait += num_steps * values["seconds/data_wait"]
        seconds = time.perf_counter() - self._begun
        if self._lines < _WINDOW_LINES or seconds < _WINDOW_SECONDS:
            return None
        found = find_bottleneck(self._usage(values, seconds))
        self._begin(values)
        if found is None or found[0] in self._said:
            return None
        self._said.add(found[0])
        return found[1]

    def _usage(self, values: Mapping[str, float], seconds: float) -> Usage:
        pairs = zip(cpu_times(), self._cpu, strict=True)
        own, waited, busy = (now - before for now, before in pairs)
        blocked = self._reading.blocked_seconds - self._blocked
        return Usage(
            seconds=seconds,
            data_wait_seconds=self._data_wait,
            cores=self._cores,
            cpu_seconds=own,
            cpu_wait_seconds=max(0.0, waited),
            others_cpu_seconds=max(0.0, busy - own * self._ranks_here) / self._ranks_here,
            reading_blocked=blocked / (seconds * self._reading.num_threads),
            read_bytes=int(values.get("storage_bytes_read", 0)) - self._read_bytes,
            **self._settings,
        )
