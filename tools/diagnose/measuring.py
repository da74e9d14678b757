"""Turns, clocks, and results with their machine; benchmarks/ uses them too."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from unicl_fast.system.wording import without_secrets

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One contestant's work, once."""

    wall_seconds: float
    cpu_seconds: float  # CPU time of all threads of this process


def in_turns(
    contestants: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    warm_up: int = 0,
    before: Callable[[str], object] = lambda name: None,
    most_seconds: float = math.inf,
) -> dict[str, list[T]]:
    """Collects the results of each contestant, one per round after `warm_up` rounds.

    Calls `before` with the name of the next contestant. No round begins after `most_seconds`.
    """
    found: dict[str, list[T]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + most_seconds
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() > deadline:
            break
        for name, work in contestants.items():
            before(name)
            found[name].append(work())
    return {name: results[warm_up:] for name, results in found.items()}


def timed(
    work: Callable[[], object],
    *,
    cpu_clock: Callable[[], float] = time.process_time,
    calls: int = 1,
) -> Turn:
    """The mean time of `calls` calls, after collecting garbage; waits for the GPU."""
    gc.collect()
    wait_for_gpu()
    wall, cpu = time.perf_counter(), cpu_clock()
    for _ in range(calls):
        work()
    wait_for_gpu()
    return Turn((time.perf_counter() - wall) / calls, (cpu_clock() - cpu) / calls)


def wait_for_gpu() -> None:
    """Waits until the GPU of this process, if any, is idle."""
    torch = sys.modules.get("torch")  # some stages do not import it
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def result_text(options: Any, /, *packages: str, **more: Any) -> str:
    """A result's JSON, with `options` (a dataclass) and machine; URLs lose their secrets."""
    settings = dataclasses.asdict(options)
    settings.pop("json", None)
    result = {**more, "settings": settings, "machine": describe_machine(*packages)}
    return without_secrets(json.dumps(result, indent=1, default=_last_parts)) + "\n"


def _last_parts(value: object) -> str:
    """The end of a path: its first parts are private to a machine."""
    if not isinstance(value, Path):
        raise TypeError(f"a result holds numbers, texts and paths, not {value!r}")
    return str(Path(*value.parts[-2:]))


def describe_machine(*packages: str) -> dict[str, Any]:
    """Processor, commit and date; versions of Python, torch and installed `packages`."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = ""
    with contextlib.suppress(FileNotFoundError):  # no git
        commit = _git("describe", "--always")
        if commit and _git("diff", "--name-only", "HEAD", "--", "*.py"):
            commit += "-dirty"
    versions = {}
    for package in ("torch", *packages):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_initialized()
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        **({"gpu": torch.cuda.get_device_name()} if torch is not None and has_gpu else {}),
        "load_average": os.getloadavg(),  # above `threads`: other jobs were running
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def _git(*words: str) -> str:
    ended = subprocess.run(
        ["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    return ended.stdout.strip()
