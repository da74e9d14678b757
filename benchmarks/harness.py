"""The harness of all benchmarks: turns, ratios, memory, the machine, the result file.

The figure is the median over rounds of the ratio within a round; README.md has the rules.
"""

import abc
import contextlib
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

from unicl_fast.tools.diagnose.measuring import Turn, in_turns, result_text, timed

Figure = dict[str, Any]
"""Median, low, high and all values of a quantity."""
Figures = dict[str, Figure]
Unit = Literal["wall_seconds", "cpu_seconds"]
"""A field of `Turn`."""
_CALLS_ON_GPU = 3
_LEAST_BUSY = 0.1
"""Least part of the time that kernels must take. Small batches in eager mode leave the GPU idle for
more than half of it, work on the CPU for all of it."""
_POLL_SECONDS, _WATCH_SECONDS = 0.05, 2.0
FIND_BENCHMARKS = f"import sys; sys.path.append({str(Path(__file__).resolve().parents[1])!r})"
"""The first statement of a Python program that imports `benchmarks`."""


def module_command(module: str) -> list[str]:
    """The command that runs a module of this folder, such as `gpu`, as a program."""
    run = f"import runpy; runpy.run_module('{__package__}.{module}', run_name='__main__')"
    return [sys.executable, "-c", f"{FIND_BENCHMARKS}; {run}"]


class Program(abc.ABC):
    """A program of `unicl-bench`; its options are the fields of its class, a dataclass."""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Self:
        """The program with these options of the command line; exits with 2 if one is wrong."""
        import tyro

        return tyro.cli(cls, args=list(options), prog=prog)

    @abc.abstractmethod
    def run(self) -> None:
        """Does its work, prints, and writes the files that its options name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Program):
    """Options of programs that measure in rounds."""

    json: Path | None = None
    """File for the result as JSON."""
    rounds: int = 5
    """Turns of each contestant."""

    @abc.abstractmethod
    def run(self) -> None:
        """Compares the contestants, measures, prints, and writes the JSON if one is wanted.

        Raises RuntimeError before anything is timed if the contestants disagree.
        """

    def write_result(self, figures: Figures, *packages: str, **more: Any) -> None:
        """Writes figures, options, machine and `more` into the JSON, if one is wanted."""
        if self.json is not None:
            text = result_text(self, *packages, **more, figures=figures)
            self.json.write_text(text, encoding="utf-8")


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    before: Callable[[str], object] = lambda name: None,
    device_type: str = "cpu",
) -> dict[str, list[Turn]]:
    """The turns of each contestant, see `in_turns`; `before` is not timed.

    Raises:
        NotOnDeviceError: with `device_type="cuda"`, work that was not done on the GPU.
    """
    # several calls, so that the host can run ahead of a GPU as it does in training
    calls = _CALLS_ON_GPU if device_type == "cuda" else 1
    works = {name: functools.partial(timed, one, calls=calls) for name, one in contestants.items()}
    turns = in_turns(works, rounds=rounds, warm_up=warm_up, before=before)
    for name, work in contestants.items() if device_type == "cuda" else ():
        seconds = statistics.median(turn.wall_seconds for turn in turns[name])
        print(f"{name}: kernels ran in {busy_part(name, work, seconds=seconds):.0%} of the time")
    return turns


class NotOnDeviceError(RuntimeError):
    """Work that was to be timed on a GPU was not done there."""


def busy_part(name: str, work: Callable[[], object], *, seconds: float) -> float:
    """The part of a call's `seconds` in which kernels ran; it returns tensors, in any nesting.

    Raises NotOnDeviceError if hardly any kernel ran, or the results are not on the GPU.
    """
    import torch  # here: not every program needs it
    from torch.utils._pytree import tree_leaves

    results: list[object] = []
    # the profiler starts its service at the first use in a process, which can be too late
    kernels = 0.0
    for _ in range(2):
        kernels = kernels or kernel_seconds(lambda: results.append(work()))
    places = {getattr(leaf, "device", None) for leaf in tree_leaves(results)}
    found = {place.type if isinstance(place, torch.device) else "no tensor" for place in places}
    reasons = {
        f"its results are on {', '.join(sorted(found)) or 'no device'}": found != {"cuda"},
        f"kernels ran in {kernels:.2e} of {seconds:.2e} s": kernels < _LEAST_BUSY * seconds,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise NotOnDeviceError(f"{name} was not done on the GPU: {'; '.join(wrong)}")
    return kernels / seconds


def kernel_seconds(work: Callable[[], object]) -> float:
    """Seconds of the device's kernels in one call, without copies from and to the host."""
    import torch
    from torch.profiler import ProfilerActivity, profile

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


def ratio_of(
    turns: Mapping[str, Sequence[Turn]],
    one: str,
    other: str,
    *,
    unit: Unit = "wall_seconds",
    scale: float = 1.0,
) -> Figure:
    """How many times as long `one` took as `other` within each round, times `scale`.

    For equal work that is the ratio of the rates of `other` and `one`.
    """
    pairs = zip(turns[one], turns[other], strict=True)
    return summarise(
        [scale * getattr(mine, unit) / getattr(theirs, unit) for mine, theirs in pairs]
    )


def rate_of(turns: Sequence[Turn], count: float, *, unit: Unit = "wall_seconds") -> Figure:
    """Items per second of turns that each handled `count` of them."""
    return summarise([count / getattr(turn, unit) for turn in turns])


def seconds_of(turns: Sequence[Turn], *, unit: Unit = "wall_seconds", scale: float = 1.0) -> Figure:
    """Seconds of the turns, times `scale`."""
    return summarise([scale * getattr(turn, unit) for turn in turns])


def summarise(values: Sequence[float]) -> Figure:
    """Median, spread, and all values."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "all": list(values),
    }


def printed(figures: Figures) -> Figures:
    """Prints a line for each figure: name, median, spread; returns them."""
    for name, figure in figures.items():
        spread = f"({figure['low']:.4g} to {figure['high']:.4g})"
        print(f"{name:46} {figure['median']:10.4g}  {spread}", flush=True)
    return figures


class Ended(NamedTuple):
    """A process that has ended, with all processes that it waited for."""

    code: int | None
    """None if it was killed because its time was over."""
    wall_seconds: float
    cpu_seconds: float
    largest_bytes: int
    """Resident memory of the largest of them."""


def run_apart(
    command: Sequence[object],
    log: Path,
    *,
    seconds: float = math.inf,
    environment: Mapping[str, str] = MappingProxyType({}),
    watch: Callable[[int], object] = lambda number: None,
) -> Ended:
    """Runs a command in its own session, which is killed after `seconds` and by Ctrl-C.

    Its output goes into a file. `watch` is called with the session's number now and then.
    """
    started, watched = time.monotonic(), 0.0
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    try:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if (now := time.monotonic() - started) > seconds:
                os.killpg(process.pid, signal.SIGKILL)
                ended = os.wait4(process.pid, 0)
                break
            if now - watched > _WATCH_SECONDS:
                watched = now
                watch(process.pid)
            time.sleep(_POLL_SECONDS)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    passed = time.monotonic() - started
    code = process.returncode if passed <= seconds else None
    return Ended(code, passed, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def end_of(log: Path) -> str:
    """The last lines of a log, for a message."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:])


def peak_megabytes(function: Callable[..., float], *arguments: Any) -> Figure:
    """Runs a function that returns `peak_bytes` in a fresh process; the result in megabytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return summarise([pool.apply(function, arguments) / 1e6])


def peak_bytes(work: Callable[[], object], *, device_type: str = "cpu") -> int:
    """How far this process's resident memory, or a GPU's, rises, at most, during `work`; on Linux.

    Call it once in a fresh process: memory that is held already and used again is not seen.
    """
    gc.collect()
    if device_type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak, proc(5)
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    """A size in this process's status file, proc(5)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"^{field}:\s*(\d+) kB", status, flags=re.MULTILINE)[0])
