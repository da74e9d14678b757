"""Runs the stages one after another and keeps the report up to date.

Each stage has a process of its own, so that a crash or an illegal access on the device ends that
stage alone, and its memory is free afterwards. They are forked from this one, which has imported
everything and never touches the device. Where a library has touched it at its import, forks cannot
use it: then the stages run in this process, and the report says so.
"""

from __future__ import annotations

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

from ..harness import describe_machine
from .dali_stages import PART_B
from .measure import Bench, NotOnDeviceError, describe
from .stages import PART_A, GpuStage

STAGES: dict[str, GpuStage] = PART_A | PART_B
MARKS = {
    "product of 8192^3, bf16": (620.0, "H100, assumed"),
    "copy of 4 GB": (2700.0, "H100, assumed"),
    "swin-tiny, bf16, 512": (5927.0, "H100, roofline"),
    "compiled: blocks": (5927.0, "H100, roofline of the eager step"),
    "swin-base, bf16, 512": (1410.0, "H100, roofline with timm's attention"),
    "vit_base_patch32_224, ours": (773.0, "open_clip on an A100"),
    "vit_base_patch32_224, open_clip": (773.0, "open_clip on an A100"),
    "vit_base_patch16_224, ours": (332.0, "open_clip on an A100"),
    "vit_base_patch16_224, open_clip": (332.0, "open_clip on an A100"),
}
"""Figures that were modelled or published, in the unit of the measured one of that name."""
_WAIT_FOR_DEVICE = 120.0
_FORK: Any = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Everything there is to measure on a GPU, in one report."""

    out: Path
    """New folder for gpu.json, gpu.md, and a file of each stage."""
    stages: str = ""
    """Names of stages, joined by commas; empty takes all."""
    minutes: float = 25.0
    """Time for all stages. Later ones are skipped, and the one that runs is ended."""
    data: Path | None = None
    """Packed data set of JPEGs with captions or labels, for part B."""
    dry_run: bool = False
    """Run part A on the CPU with tiny sizes: shows that all stages work, and measures nothing."""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Self:
        """As `Stage.parse`, whose options `--json` and `--rounds` this report does not have."""
        import tyro  # here: a bare checkout on a machine with a GPU has none

        return tyro.cli(cls, args=list(options), prog=prog)

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
    lines = [
        "# Dry run on a CPU: no figure here is a GPU's" if report["dry_run"] else "# GPU report",
        f"\n{machine}\n",
    ]
    if report["stand_ins"]:
        lines.append(f"Missing, with a stand-in: {', '.join(report['stand_ins'])}\n")
    lines += ["| part | stage | status | seconds |", "|---|---|---|---|"]
    for name, stage in report["stages"].items():
        status = ": ".join(filter(None, (stage["status"], stage.get("reason", ""))))
        cells = (STAGES[name].part, name, status, stage.get("wall_seconds", ""))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    for name, stage in report["stages"].items():
        if stage.get("figures"):
            lines += _table(name, stage["figures"], has_marks=not report["dry_run"])
    lines.append(
        "\n`busy` is the part of the time in which kernels ran; `peak` is memory allocated on the "
        "device, and `of work` the part above what was allocated before. A mark was modelled or "
        "published for the card that it names."
    )
    return "\n".join(lines) + "\n"


def _table(name: str, figures: dict[str, Any], *, has_marks: bool) -> list[str]:
    lines = [f"\n## {STAGES[name].part} {name}: {STAGES[name].about}\n"]
    lines += [
        "| figure | | busy | peak, GB | of work | mark | times the mark |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, figure in figures.items():
        value, about = MARKS.get(label, (0.0, "")) if has_marks else (0.0, "")
        has_mark = bool(about) and "median" in figure
        cells = (
            label,
            describe(figure),
            f"{figure['busy']:.2f}" if "busy" in figure else "",
            f"{figure['peak_gb']:.2f}" if "peak_gb" in figure else "",
            f"{figure['risen_gb']:.2f}" if "risen_gb" in figure else "",
            f"{value:,g} ({about})" if has_mark else "",
            f"{figure['median'] / value:.2f}" if has_mark else "",
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
