"""Runs the stages one after another and keeps the report up to date.

Each stage has a process of its own, so that a crash or an illegal access on the device only ends
that stage, and its memory is free afterwards. They are forked from this one, which has imported
everything and never touches the device. Where a library has touched it at its import, forks cannot
use it: then the stages run in this process, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch

from unicl_fast.system.atomic_files import make_folder, write_text_atomically
from unicl_fast.system.wording import markdown_table

from ..harness import Program, describe_machine
from .dali_stages import PART_B
from .measure import Bench, NotOnDeviceError, describe
from .stages import PART_A, GpuStage

STAGES: dict[str, GpuStage] = PART_A | PART_B
_WAIT_FOR_DEVICE = 120.0
_FORK: Any = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Program):
    """Everything there is to measure on a GPU, in one report."""

    out: Path
    stages: str = ""
    minutes: float = 25.0
    data: Path | None = None
    dry_run: bool = False

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Self:
        """By argparse: a bare checkout on a machine with a GPU has no tyro."""
        parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__)
        parser.add_argument(
            "--out", type=Path, required=True, help="new folder for the report and stages/"
        )
        parser.add_argument("--stages", default="", help="names of stages, joined by commas")
        parser.add_argument(
            "--minutes",
            type=float,
            default=25.0,
            help="time for all stages; later ones are skipped",
        )
        parser.add_argument("--data", type=Path, help="packed data set of JPEGs, for part B")
        parser.add_argument(
            "--dry-run", action="store_true", help="part A on the CPU, tiny: measures nothing"
        )
        return cls(**vars(parser.parse_args(options)))

    def run(self) -> None:
        """Runs the stages; one that fails is reported, and the next one runs.

        Raises:
            ValueError: no such stage, a folder that holds a report, or no GPU.
        """
        names = self._chosen()
        if (self.out / "gpu.json").exists():
            raise ValueError(f"{self.out} holds a report: name another folder")
        forks = self.dry_run or _forks_reach_device()
        make_folder(self.out / "stages")
        report: dict[str, Any] = {
            "dry_run": self.dry_run,
            "machine": describe_machine("timm", "triton", "open_clip_torch"),
            "a_process_for_each_stage": forks,
            "stand_ins": sorted(n for n, m in sys.modules.items() if _is_stand_in(m)),
            "stages": {name: {"status": "not reached"} for name in names},
        }
        self._write(report)
        gc.freeze()  # collections in the stages need not look at what was imported here
        deadline = time.monotonic() + 60 * self.minutes
        for name in names:
            print(f"{STAGES[name].part} {name}: {STAGES[name].about}", flush=True)
            result = self._run_stage(name, deadline, forks=forks)
            print(f"  {result['status']} {result['reason']}", flush=True)
            report["stages"][name] = result
            self._write(report)
        gc.unfreeze()

    def _write(self, report: dict[str, Any]) -> None:
        write_text_atomically(self.out / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_text_atomically(self.out / "gpu.md", format_page(report))

    def _chosen(self) -> list[str]:
        possible = PART_A if self.dry_run else STAGES
        names = [name for name in self.stages.split(",") if name] or list(possible)
        if unknown := [name for name in names if name not in possible]:
            kind = "dry run has" if self.dry_run else "stages are"
            raise ValueError(f"no stage {', '.join(unknown)}; {kind} {', '.join(possible)}")
        return names

    def _run_stage(self, name: str, deadline: float, *, forks: bool) -> dict[str, Any]:
        stage = STAGES[name]
        if missing := [package for package in stage.needs if not _is_there(package)]:
            return _skipped(f"needs {', '.join(missing)}")
        if stage.needs_data and self.data is None:
            return _skipped("needs --data")
        if time.monotonic() >= deadline:
            return _skipped(f"the {self.minutes:g} minutes are over")
        file = self.out / "stages" / f"{stage.part}-{name}.json"
        started = time.monotonic()
        exit_code, cut_off = 0, False
        if forks:
            process = _FORK.Process(target=self._run_in_fork, args=(stage, file))
            process.start()
            try:
                process.join(max(1.0, deadline - time.monotonic()))
            finally:  # also after Ctrl-C, which the stage's process group does not get
                cut_off = process.is_alive()
                _end(process)
            exit_code = process.exitcode
        else:
            self._run_here(stage, file)
        found: dict[str, Any] = {"status": "unfinished", "reason": "", "figures": {}}
        if file.is_file():
            found |= json.loads(file.read_text(encoding="utf-8"))
        if cut_off:
            found |= {"status": "cut off", "reason": f"the {self.minutes:g} minutes are over"}
        elif found["status"] == "unfinished":
            found |= {"status": "failed", "reason": f"its process ended with code {exit_code}"}
        return found | {"wall_seconds": round(time.monotonic() - started, 1)}

    def _run_in_fork(self, stage: GpuStage, file: Path) -> None:
        os.setpgid(0, 0)  # a stage that has to be ended takes along what it started
        self._run_here(stage, file)

    def _run_here(self, stage: GpuStage, file: Path) -> None:
        device = torch.device("cpu" if self.dry_run else "cuda:0")
        torch.manual_seed(0)
        run_stage(stage, Bench(device, file, is_tiny=self.dry_run), self.data)


def run_stage(stage: GpuStage, bench: Bench, data: Path | None = None) -> None:
    """Runs a stage; an error is its result."""
    try:
        stage.run(bench, *([data] if stage.needs_data else []))
        bench.status = "done"
    except NotOnDeviceError as error:
        bench.status, bench.reason = "refused", str(error)
    except Exception as error:
        traceback.print_exc()
        bench.status, bench.reason = "failed", f"{type(error).__name__}: {error}"[:2000]
    bench.write()


def _forks_reach_device() -> bool:
    """Whether the GPU works in forks of this process; raises ValueError where none works at all."""
    process = _FORK.Process(target=_exit_without_device)
    process.start()
    process.join(_WAIT_FOR_DEVICE)
    _end(process)
    if process.exitcode == 0:
        return True
    try:
        _use_device()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(
            f"no CUDA device works here ({error}); --dry-run runs the stages on the CPU"
        ) from error
    return False


def _exit_without_device() -> None:
    try:
        _use_device()
    except (RuntimeError, AssertionError):
        sys.exit(1)


def _use_device() -> None:
    torch.ones(1, device="cuda").cpu()


def _end(process: BaseProcess) -> None:
    """Ends a process, if it still runs, with those that it started."""
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def _is_stand_in(module: object) -> bool:
    return getattr(type(module), "is_stand_in", False)


def _is_there(package: str) -> bool:
    if _is_stand_in(sys.modules.get(package)):
        return False
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # the parent of nvidia.dali is missing
        return False


def _skipped(reason: str) -> dict[str, Any]:
    return {"status": "skipped", "reason": reason, "figures": {}}


def format_page(report: dict[str, Any]) -> str:
    """The report as a page of Markdown: a table of stages, and one of figures for each stage."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    dry, stand_ins = report["dry_run"], report["stand_ins"]
    parts = ["# Dry run on a CPU: no figure here is a GPU's" if dry else "# GPU report", machine]
    if stand_ins:
        parts.append(f"Missing, with a stand-in: {', '.join(stand_ins)}")
    rows = []
    for name, stage in report["stages"].items():
        status = ": ".join(filter(None, (stage["status"], stage.get("reason", ""))))
        rows.append([STAGES[name].part, name, status, str(stage.get("wall_seconds", ""))])
    parts.append(markdown_table(["part", "stage", "status", "seconds"], rows))
    for name, stage in report["stages"].items():
        if stage.get("figures"):
            parts.append(f"## {STAGES[name].part} {name}: {STAGES[name].about}")
            rows = [
                [
                    *(label, describe(figure)),
                    *(
                        f"{figure[key]:.2f}" if key in figure else ""
                        for key in ("busy", "peak_gb", "risen_gb")
                    ),
                ]
                for label, figure in stage["figures"].items()
            ]
            parts.append(markdown_table(["figure", "", "busy", "peak, GB", "of work"], rows))
    parts.append(
        "`busy` is the part of the time in which kernels ran; `peak` is memory allocated on the "
        "device, and `of work` the part above what was allocated before."
    )
    return "\n\n".join(parts) + "\n"
