"""Times work on a GPU, and refuses work that was not done there.

CUDA events around a round give its time. They cannot say who worked: between two events the GPU may
have waited for the host. So one more round runs under the profiler, and its kernels must take a
good part of the measured time. That part ("busy") is given with each figure: the rest is waiting
for launches. What the work returns must lie on the device, too.

Only `Bench.time` and `Bench.take_turns` make figures with a unit of time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from unicl_fast.system.atomic_files import write_text_atomically

from ..harness import in_turns, summarise

_LEAST_BUSY = 0.1
"""Least part of the time that kernels must take. Small batches in eager mode leave the GPU idle for
more than half of it, work on the CPU for all of it."""
_MOST_WALL = 2.0
"""Most wall time, in units of the time between the events."""
_UNITS_WITHOUT_TIME = {"", "%", "GB", "GFLOP", "graphs", "tests", "relative error"}

T = TypeVar("T")
Work = Callable[[], object]
"""Returns one or more tensors on the device, in any nesting."""


class NotOnDeviceError(RuntimeError):
    """Work that was to be timed on a GPU was not done there."""


class Round(NamedTuple):
    seconds: float
    """Between two CUDA events; on a CPU, wall time."""
    wall_seconds: float
    peak_bytes: int
    """Largest memory allocated on the device; 0 on a CPU."""
    risen_bytes: int
    """How far that is above what was allocated before the round."""


class Bench:
    """Measures for one stage, and writes each figure to the stage's file at once."""

    def __init__(self, device: torch.device, file: Path, *, is_tiny: bool) -> None:
        """`file` is in the report's folder; `is_tiny` is a dry run, which measures nothing."""
        self.device, self.file, self.is_tiny = device, file, is_tiny
        self.figures: dict[str, Any] = {}
        self.status, self.reason = "unfinished", ""
        self.write()

    def write(self) -> None:
        """Replaces the stage's file: a machine that is taken away leaves what was measured."""
        known = {
            "dry_run": self.is_tiny,
            "status": self.status,
            "reason": self.reason,
            "figures": self.figures,
        }
        write_text_atomically(self.file, json.dumps(known, indent=1) + "\n")

    def first_if_tiny(self, *values: T) -> tuple[T, ...]:
        """All values; only the first in a dry run, since the others would be the same."""
        return values[:1] if self.is_tiny else values

    def note(self, name: str, value: float | str, unit: str = "") -> None:
        """Writes a value that is no time: a version, a size, an error, a count.

        Raises:
            ValueError: the unit may hold time, which is only measured by `time`.
        """
        if unit not in _UNITS_WITHOUT_TIME:
            raise ValueError(f"{name}: a figure in {unit} comes from Bench.time, not from a note")
        self._add(name, {"value": value, "unit": unit})

    def time(self, name: str, work: Work, **turns: Any) -> float:
        """Times work on its own; returns the median seconds of one call. See `take_turns`."""
        return self.take_turns({name: work}, **turns)[name]

    def take_turns(
        self,
        works: Mapping[str, Work],
        *,
        count: float = 1.0,
        unit: str = "s",
        rounds: int = 5,
        repeat: int = 3,
        warm_up: int = 2,
        least_busy: float = _LEAST_BUSY,
    ) -> dict[str, float]:
        """Times works that take turns, and writes a figure for each.

        Args:
            works: by the names of their figures.
            count: how much one call handles, for a rate.
            unit: "s", or of a rate: images/s, TFLOP/s, GB/s.
            rounds: of which the median is taken.
            repeat: calls within a round, so that the host can run ahead as it does in training.
            warm_up: rounds before, which are not timed.
            least_busy: least part of the time in which kernels must run.

        Returns:
            The median seconds of one call, by name.

        Raises:
            NotOnDeviceError: the work was not done on the device.
        """
        if self.is_tiny:
            rounds, repeat, warm_up = 1, 1, 0
        contestants = {
            name: functools.partial(self._round, work, repeat) for name, work in works.items()
        }
        medians = {}
        for name, timed in in_turns(contestants, rounds=rounds, warm_up=warm_up).items():
            seconds = [one.seconds / repeat for one in timed]
            medians[name] = summarise(seconds)["median"]
            figure = summarise(seconds if unit == "s" else [count / s for s in seconds])
            figure |= {"unit": unit, "seconds": medians[name]}
            if self.device.type == "cuda":
                figure["busy"] = _prove(name, works[name], medians[name], timed, least_busy)
                figure["peak_gb"] = max(one.peak_bytes for one in timed) / 1e9
                figure["risen_gb"] = max(one.risen_bytes for one in timed) / 1e9
            self._add(name, figure)
        return medians

    @contextlib.contextmanager
    def running_out_of_memory(self, name: str) -> Iterator[None]:
        """Notes it as a result if the device has too little memory for the block."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.note(name, "out of memory")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, name: str, figure: dict[str, Any]) -> None:
        self.figures[name] = figure
        print(f"  {name}: {describe(figure)}", flush=True)
        self.write()

    def _round(self, work: Work, repeat: int) -> Round:
        gc.collect()
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(repeat):
                work()
            seconds = time.perf_counter() - started
            return Round(seconds, seconds, 0, 0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        start.record()
        for _ in range(repeat):
            work()
        end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated()
        return Round(start.elapsed_time(end) / 1e3, wall, peak, peak - before)


def _prove(
    name: str, work: Work, seconds: float, timed: Sequence[Round], least_busy: float
) -> float:
    """Returns the part of `seconds` in which kernels ran, or raises NotOnDeviceError."""
    results: list[object] = []

    def call() -> None:
        results.append(work())

    # the profiler starts its service at the first use in a process, which may be too late
    kernels = kernel_seconds(call) or kernel_seconds(call)
    places = {getattr(leaf, "device", None) for leaf in tree_leaves(results)}
    found = {place.type if isinstance(place, torch.device) else "no tensor" for place in places}
    slowest = max(one.wall_seconds / one.seconds for one in timed)
    reasons = {
        f"its results are on {', '.join(sorted(found)) or 'no device'}": found != {"cuda"},
        f"kernels ran in {kernels:.2e} of {seconds:.2e} s": kernels < least_busy * seconds,
        f"the clock shows {slowest:.1f} times the device's time": slowest > _MOST_WALL,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise NotOnDeviceError(f"{name} was not done on the GPU: {'; '.join(wrong)}")
    return kernels / seconds


def kernel_seconds(work: Work) -> float:
    """Seconds that the device's kernels take in one call, without copies from and to the host."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    seconds: float = sum(
        event.time_range.elapsed_us() / 1e6
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
        and not getattr(event, "is_user_annotation", False)
        and not any(copy in event.name for copy in ("HtoD", "DtoH"))
    )
    return seconds


def describe(figure: Mapping[str, Any]) -> str:
    """A figure as a cell of a table."""
    if "value" in figure:
        value = figure["value"]
        return f"{value if isinstance(value, str) else f'{value:,.4g}'} {figure['unit']}".strip()
    spread = f"({figure['low']:,.4g} to {figure['high']:,.4g})"
    return f"{figure['median']:,.4g} {figure['unit']} {spread}"
