"""What every benchmark does in the same way: turns, medians, memory, the machine, the result file.

Contestants take turns (A B C, A B C, ...), so that a change of the machine's mood hits all of them,
and what counts is the median over rounds of the ratio within a round. CPU time stands beside
wall time: on a machine that others use too, it is the figure that can be trusted.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What every stage can be told."""

    json: Path | None = None
    """Where the result is written as JSON."""
    rounds: int = 5
    """Turns that each takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One contestant's work, once."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads of this process."""


def take_turns(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[Turn]]:
    """Each contestant's turns, one in every round, after `warm_up` rounds off the clock."""
    for _ in range(warm_up):
        for work in contestants.values():
            work()
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            turns[name].append(_time(work))
    return turns


def _time(work: Callable[[], object]) -> Turn:
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Turn(time.perf_counter() - wall, time.process_time() - processor)


def ratios_of(
    turns: Mapping[str, Sequence[Turn]], one: str, other: str, *, unit: str = "wall_seconds"
) -> list[float]:
    """How many times as long `one` took as `other`, in each round; `unit` is a field of `Turn`."""
    pairs = zip(turns[one], turns[other], strict=True)
    return [getattr(mine, unit) / getattr(theirs, unit) for mine, theirs in pairs]


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread, and all values."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "all": list(values),
    }


def print_figures(figures: Figures) -> None:
    """One line a figure: name, median, spread."""
    for name, figure in figures.items():
        spread = f"({figure['low']:.4g} to {figure['high']:.4g})"
        print(f"{name:46} {figure['median']:10.4g}  {spread}", flush=True)


def write_result(
    settings: BenchmarkSettings, figures: Figures, *packages: str, **more: Any
) -> None:
    """Writes figures, settings, machine and what else there is to say into `settings.json`, if set.

    Of paths their last two parts: where a machine keeps its data is nobody's business.
    """
    if settings.json is None:
        return
    described = dataclasses.asdict(settings)
    for written in ("json", "plot"):
        described.pop(written, None)
    result = {
        **more,
        "figures": figures,
        "settings": described,
        "machine": describe_machine(*packages),
    }
    settings.json.write_text(json.dumps(result, indent=1, default=_last_parts) + "\n")


def _last_parts(value: object) -> str:
    if not isinstance(value, Path):
        raise TypeError(f"a result holds numbers, texts and paths, not {value!r}")
    return str(Path(*value.parts[-2:]))


def describe_machine(*packages: str) -> dict[str, Any]:
    """What a figure depends on: processor, commit, and versions of Python, torch and `packages`."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),  # above `threads`: somebody else was there
        "python": platform.python_version(),
        "commit": commit or "unknown",
        **{package: version(package) for package in ("torch", *packages)},
    }


def peak_bytes(work: Callable[[], object]) -> int:
    """How far this process's resident memory rises above where it stands, at most, during `work`.

    Linux only. Memory that the process already holds and `work` uses again is not seen: call it
    once in a fresh process.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present, proc(5)
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")
