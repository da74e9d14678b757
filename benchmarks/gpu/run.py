"""Runs the stages one after another, each in a process of its own, and writes the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch

from unicl_fast.system.atomic_files import make_folder, write_text_atomically
from unicl_fast.system.wording import markdown_table

from ..harness import Program, describe_machine, end_of, run_apart
from ..run import load_program
from .stages import PROGRAMS, STAGES, TINY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Program):
    """Everything there is to measure on a GPU, in one report."""

    out: Path
    stages: str = ""
    minutes: float = 25.0
    data: Path | None = None
    dry_run: bool = False
    only: str = ""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Self:
        """By argparse: a bare checkout on a machine with a GPU has no tyro."""
        parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__)
        add = parser.add_argument
        add("--out", type=Path, required=True, help="new folder for the report and stages/")
        add("--stages", default="", help=f"some of {','.join(STAGES)}; joined by commas")
        add("--minutes", type=float, default=25.0, help="after it, other stages are skipped")
        add("--data", type=Path, help="packed data set of JPEGs, for the stage run")
        add("--dry-run", action="store_true", help="tiny, on the CPU: measures nothing")
        add("--only", default="", help=argparse.SUPPRESS)  # the stage of this process
        return cls(**vars(parser.parse_args(options)))

    def run(self) -> None:
        """Runs the stages; one that fails is reported, and the next one runs.

        Raises:
            ValueError: no such stage, a folder that holds a report, or no GPU.
        """
        if self.only:
            self._run_here(self.only)
            return
        names = self._chosen()
        if (self.out / "gpu.json").exists():
            raise ValueError(f"{self.out} holds a report: name another folder")
        if not self.dry_run and not torch.cuda.is_available():
            raise ValueError("no CUDA device works here; --dry-run runs the stages on the CPU")
        make_folder(self.out / "stages")
        report: dict[str, Any] = {
            "dry_run": self.dry_run,
            "machine": describe_machine("timm", "triton", "open_clip_torch"),
            "stand_ins": sorted(n for n, m in sys.modules.items() if _is_stand_in(m)),
            "stages": {name: {"status": "not reached"} for name in names},
        }
        self._write(report)
        deadline = time.monotonic() + 60 * self.minutes
        for name in names:
            print(f"{name}: {STAGES[name].about}", flush=True)
            result = self._run_stage(name, deadline)
            print(f"  {result['status']} {result['reason']}", flush=True)
            report["stages"][name] = result
            self._write(report)

    def _write(self, report: dict[str, Any]) -> None:
        write_text_atomically(self.out / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_text_atomically(self.out / "gpu.md", format_page(report))

    def _chosen(self) -> list[str]:
        names = [name for name in self.stages.split(",") if name] or list(STAGES)
        if unknown := [name for name in names if name not in STAGES]:
            raise ValueError(f"no stage {', '.join(unknown)}; stages are {', '.join(STAGES)}")
        return names

    def _run_stage(self, name: str, deadline: float) -> dict[str, Any]:
        """Runs a stage in a process of its own, which ends at the deadline."""
        stage = STAGES[name]
        if missing := [package for package in stage.needs if not _is_there(package)]:
            return _skipped(f"needs {', '.join(missing)}")
        if stage.needs_data and self.data is None:
            return _skipped("needs --data")
        if time.monotonic() >= deadline:
            return _skipped(f"the {self.minutes:g} minutes are over")
        options = ["--out", self.out.absolute(), "--only", name]
        options += ["--dry-run"] * self.dry_run + (["--data", self.data] if self.data else [])
        log, file = self._file(name, "log"), self._file(name, "json")
        command = [sys.executable, Path(__file__).parent, *options]
        ended = run_apart(command, log, seconds=max(1.0, deadline - time.monotonic()))
        status, reason = "done", ""
        if ended.code is None:
            status, reason = "cut off", f"the {self.minutes:g} minutes are over"
        elif ended.code:
            status, reason = "failed", f"ended with code {ended.code}: {end_of(log)[-1000:]}"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"figures": {}}
        seconds = round(ended.wall_seconds, 1)
        return found | {"status": status, "reason": reason, "wall_seconds": seconds}

    def _run_here(self, name: str) -> None:
        stage = STAGES[name]
        program = PROGRAMS.get(stage.program) or load_program(stage.program)
        options = {"device": "cuda", **stage.options, **(TINY if self.dry_run else {})}
        if stage.needs_data:
            options["data"] = (str(self.data),)
        known = {field.name for field in dataclasses.fields(program)}
        options = {key: value for key, value in options.items() if key in known}
        torch.manual_seed(0)
        program(json=self._file(name, "json"), **options).run()

    def _file(self, name: str, ending: str) -> Path:
        return self.out / "stages" / f"{name}.{ending}"


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
        reason = " ".join(stage.get("reason", "").split())
        status = ": ".join(filter(None, (stage["status"], reason)))
        rows.append([name, status, str(stage.get("wall_seconds", ""))])
    parts.append(markdown_table(["stage", "status", "seconds"], rows))
    for name, stage in report["stages"].items():
        if figures := stage.get("figures"):
            parts.append(f"## {name}: {STAGES[name].about}")
            rows = [[label, *(f"{one[key]:,.4g}" for key in ("median", "low", "high"))]
                    for label, one in figures.items()]  # fmt: skip
            parts.append(markdown_table(["figure", "median", "lowest", "highest"], rows))
    return "\n\n".join(parts) + "\n"
