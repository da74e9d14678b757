"""Finds out what limits a run, from measurements beside its steps, and names the option that helps.

`find_bottleneck` is the rule: numbers in, a cause and a sentence out. `BottleneckWatch` collects
the numbers of a run and says the sentence once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Literal

import torch

from unicl_fast.batch import ReadingTime
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.efficiency import has_batch_norm
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.mixup import check_pairs_on_one_rank
from unicl_fast.system.machine import cpu_times, usable_cores

Cause = Literal["other processes", "storage", "decoding", "decoding threads"]

WAIT_FRACTION = 0.05
"""Waiting for data below this part of the time is left alone: a change would gain no more."""
_LOST_CORES = 0.15
"""Part of its cores that a process must lose to others: daemons and kernel threads take less."""
_BLOCKED = 0.5
"""Part of the time in which readers wait for storage, from which on it is the limit: where decoding
is, they have read ahead and rest."""
_IDLE_CORES = 0.25
"""Part of a rank's cores without work, from which on more decoding threads can help."""
_WINDOW_SECONDS, _WINDOW_LINES = 30.0, 5
"""A window is as long as both: batches ahead hide a few slow ones, and a logging step that happens
to wait is no rule."""
_START_STEPS = 16
"""Steps of a start that are in no window: kernels are compiled, caches and batches ahead filled."""

_SMALLEST_LOCAL_BATCH = 8
"""Images of a rank, below which more ranks are not advised: each has a fixed cost a step. An
estimate, not measured."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The work and the waiting of one rank's process in a window of time."""

    seconds: float
    """Length of the window."""
    data_wait_seconds: float
    """Waiting of the training loop, or of its GPU, for data."""
    cores: float
    """Cores of this rank."""
    cpu_seconds: float
    """CPU time that the process got."""
    cpu_wait_seconds: float = 0.0
    """Time that its threads were ready to run and had no core, summed over them."""
    others_cpu_seconds: float = 0.0
    """CPU time that processes beside the run got on the same cores."""
    reading_blocked: float = 0.0
    """Part of the time that a reading thread waited for storage, 0 to 1."""
    read_bytes: int = 0
    """Bytes that came from object stores; 0 where all data sets are in folders."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """A cause, and a sentence with the evidence and the options that help."""

    cause: Cause
    sentence: str


def find_bottleneck(
    usage: Usage,
    *,
    on_gpu: bool,
    ranks_to_try: int = 1,
    compute_threads: int = 1,
    threads: int = 0,
    decodes_files: bool = True,
    is_remote: bool = False,
) -> Bottleneck | None:
    """Says what limits a rank, or None where nothing stands out.

    Args:
        usage: the measurements.
        on_gpu: whether a GPU trains; other processes slow it by the loader alone.
        ranks_to_try: ranks for `--nproc` that give the same result on fewer cores each; 1 for none.
        compute_threads: threads of torch's operators.
        threads: `data.threads`, 0 for as many as cores.
        decodes_files: whether images are encoded files, not raw.
        is_remote: whether data sets are under URLs.
    """
    waits = usage.data_wait_seconds > WAIT_FRACTION * usage.seconds
    if usage.seconds <= 0 or not (waits or not on_gpu):
        return None
    waiting = f"training waits for data {usage.data_wait_seconds / usage.seconds:.0%} of the time"
    used = usage.cpu_seconds / usage.seconds
    capacity = usage.cores * usage.seconds
    lost = min(usage.cpu_wait_seconds, usage.others_cpu_seconds, capacity - usage.cpu_seconds)
    if lost > _LOST_CORES * capacity:
        help_ = "end them, or give the run cores of its own"
        if not on_gpu and compute_threads > 1:
            # two busy processes on two cores: 0.7 of the CPU time, and 0.9 of the wall time
            help_ += (
                ", or resume with OMP_NUM_THREADS=1: threads of an operator spin while they wait "
                "for one that has no core"
            )
        if not on_gpu and ranks_to_try > 1:
            help_ += f", or start with --nproc {ranks_to_try}, whose ranks have a thread each"
        return Bottleneck(
            cause="other processes",
            sentence=f"other processes hold the cores: this one got {used:.1f} of {usage.cores:g} "
            f"cores in the last {usage.seconds:.0f} s, others "
            f"{usage.others_cpu_seconds / usage.seconds:.1f}, and its threads waited "
            f"{usage.cpu_wait_seconds:.0f} s for one"
            + (f"; {waiting}" if waits else "")
            + f"; {help_}",
        )
    if not waits:
        return None
    if usage.reading_blocked > _BLOCKED:
        rate = usage.read_bytes / usage.seconds / 1e6
        where = f"; {rate:,.1f} MB/s come from the store" if is_remote else ""
        help_ = "copy the data to a faster disk, or pack smaller images (unicl-pack build --resize)"
        if is_remote:
            help_ = (
                "raise data.read_ahead, give data.cache_bytes room for the data set or set "
                "data.shuffle_window, and put data.cache_folder on a disk of this machine"
            )
        return Bottleneck(
            cause="storage",
            sentence=f"{waiting}, for storage: its readers are blocked {usage.reading_blocked:.0%} "
            f"of the time{where}; {help_}",
        )
    idle = 1 - used / usage.cores
    if threads and threads < usage.cores and idle > _IDLE_CORES:
        return Bottleneck(
            cause="decoding threads",
            sentence=f"{waiting}, for decoding by data.threads={threads}, while {idle:.0%} of "
            f"{usage.cores:g} cores have no work; set data.threads=0, which takes all cores",
        )
    help_ = "pack large images smaller (unicl-pack build --resize short:256), or raw (--format raw)"
    if not decodes_files:
        help_ = "pack smaller images (unicl-pack build --resize), or give the run more cores"
    elif on_gpu:
        help_ += ", or take data.decode_device=gpu"
    return Bottleneck(
        cause="decoding",
        sentence=f"{waiting}, for images to be made ready: the process uses {used:.1f} of "
        f"{usage.cores:g} cores, and storage keeps up; {help_}",
    )


class BottleneckWatch:
    """Looks at windows of some logging steps and says what limits, once a cause."""

    def __init__(
        self, model: UniCL, *, ranks: Ranks, on_gpu: bool, reading: ReadingTime | None
    ) -> None:
        """Begins before the first step; `reading` is the loader's, None for one that tells not."""
        config = model.config
        self._reading = reading or ReadingTime()
        self._cores = float(ranks.cores or usable_cores())
        self._ranks_here = max(1, round(len(os.sched_getaffinity(0)) / self._cores))
        self._find = functools.partial(
            find_bottleneck,
            on_gpu=on_gpu,
            ranks_to_try=_ranks_to_try(model, ranks),
            compute_threads=torch.get_num_threads(),
            threads=config.data.threads,
            decodes_files=self._reading.decodes_files,
            is_remote=any("://" in name for name in config.data.train),
        )
        self._said: set[Cause] = set()
        self._steps = 0
        self._begin({})

    def _begin(self, values: Mapping[str, float]) -> None:
        self._begun, self._lines, self._data_wait = time.perf_counter(), 0, 0.0
        self._cpu, self._blocked = cpu_times(), self._reading.blocked_seconds
        self._read_bytes = int(values.get("storage_bytes_read", 0))

    def look(self, values: Mapping[str, float], *, num_steps: int) -> str | None:
        """Takes a line of metrics, the means of `num_steps` steps; returns what is to be logged."""
        begun, self._steps = self._steps, self._steps + num_steps
        if begun < _START_STEPS:
            self._begin(values)
            return None
        self._lines += 1
        self._data_wait += num_steps * values["seconds/data_wait"]
        seconds = time.perf_counter() - self._begun
        if self._lines < _WINDOW_LINES or seconds < _WINDOW_SECONDS:
            return None
        found = self._find(self._usage(values, seconds))
        self._begin(values)
        if found is None or found.cause in self._said:
            return None
        self._said.add(found.cause)
        return found.sentence

    def _usage(self, values: Mapping[str, float], seconds: float) -> Usage:
        own, waited, busy = (
            now - before for now, before in zip(cpu_times(), self._cpu, strict=True)
        )
        return Usage(
            seconds=seconds,
            data_wait_seconds=self._data_wait,
            cores=self._cores,
            cpu_seconds=own,
            cpu_wait_seconds=max(0.0, waited),
            others_cpu_seconds=max(0.0, busy - own * self._ranks_here) / self._ranks_here,
            reading_blocked=(self._reading.blocked_seconds - self._blocked)
            / (seconds * self._reading.num_threads),
            read_bytes=int(values.get("storage_bytes_read", 0)) - self._read_bytes,
        )


def _ranks_to_try(model: UniCL, ranks: Ranks) -> int:
    """The most ranks of a core or more that can share the global batch; 1 for a run of several.

    BatchNorm sees the local batch, so it would make another result of more ranks.
    """
    if ranks.world_size > 1 or has_batch_norm(model):
        return 1
    most = min(usable_cores(), model.config.run.global_batch_size // _SMALLEST_LOCAL_BATCH)
    return max(filter(functools.partial(_can_share, model.config), range(2, most + 1)), default=1)


def _can_share(config: TrainConfig, world_size: int) -> bool:
    try:
        for stage in config.settings_of_stages:
            size = Ranks(world_size=world_size).local_batch_size(stage.run.global_batch_size)
            check_pairs_on_one_rank(stage, local_batch_size=size)
    except ValueError:
        return False
    return True
