"""Runs stages one after another, each in a process of its own, and writes the report.

Its three files are rewritten after each stage, so a machine that is taken back leaves its results.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch

from unicl_fast.system.atomic_files import make_folder, write_text_atomically
from unicl_fast.system.wording import markdown_table

from ..harness import Program, describe_machine, end_of, run_apart
from ..run import load_program
from .stages import COMMANDS, PROGRAMS, STAGES, TINY

_TERMINATED = 128 + signal.SIGTERM
_RATE = "step as trained, images/s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Program):
    """Checks and measurements of a GPU, in commands of less than nine minutes."""

    out: Path
    stages: str = "first"
    minutes: float = 9.0
    data: Path | None = None
    dry_run: bool = False
    only: str = ""
    result: Path | None = None

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Self:
        """By argparse: a bare checkout on a machine with a GPU has no tyro."""
        parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__)
        add = parser.add_argument
        add(
            "--out", type=Path, required=True, help="new folder for the report: gpu.md, .json, .log"
        )
        add(
            "--stages",
            default="first",
            help=f"some of {', '.join(COMMANDS)}, or of their "
            f"stages {', '.join(STAGES)}; joined by commas",
        )
        add("--minutes", type=float, default=9.0, help="after it, other stages are skipped")
        add("--data", type=Path, help="packed data set of JPEGs, for the stage run")
        add("--dry-run", action="store_true", help="tiny, on the CPU: measures nothing")
        add("--only", default="", help=argparse.SUPPRESS)  # the stage of this process, and
        add("--result", type=Path, help=argparse.SUPPRESS)  # where it leaves its result
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
        make_folder(self.out)
        # the process of a stage has a session of its own, which `run_apart` ends on its way out
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
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
            with tempfile.TemporaryDirectory() as folder:
                result = self._run_stage(name, deadline, Path(folder))
            print(f"  {result['status']} {result['reason']}", flush=True)
            report["stages"][name] = result
            self._write(report)
        done = [stage["status"] for stage in report["stages"].values()]
        if "failed" in done or "cut off" in done:
            raise RuntimeError(f"not all stages are done: see {self.out / 'gpu.md'}")

    def _write(self, report: dict[str, Any]) -> None:
        write_text_atomically(self.out / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_text_atomically(self.out / "gpu.md", format_page(report))

    def _chosen(self) -> list[str]:
        names: list[str] = []
        for name in filter(None, self.stages.split(",")):
            names += COMMANDS.get(name, [name])
        if unknown := [name for name in names if name not in STAGES]:
            known = ", ".join([*COMMANDS, *STAGES])
            raise ValueError(f"no stage {', '.join(unknown)}; stages are {known}")
        return list(dict.fromkeys(names))

    def _run_stage(self, name: str, deadline: float, folder: Path) -> dict[str, Any]:
        """Runs a stage in a process of its own, which ends at the deadline."""
        stage = STAGES[name]
        if missing := [package for package in stage.needs if not _is_there(package)]:
            return _skipped(f"needs {', '.join(missing)}")
        if stage.needs_data and self.data is None:
            return _skipped("needs --data")
        if time.monotonic() >= deadline:
            return _skipped(f"the {self.minutes:g} minutes are over")
        log, file = folder / "log", folder / "result.json"
        options = ["--out", self.out.absolute(), "--only", name, "--result", file]
        options += ["--dry-run"] * self.dry_run + (["--data", self.data] if self.data else [])
        command = [sys.executable, Path(__file__).parent, *options]
        ended = run_apart(command, log, seconds=max(1.0, deadline - time.monotonic()))
        status, reason = "done", ""
        if ended.code is None:
            status, reason = "cut off", f"the {self.minutes:g} minutes are over"
        elif ended.code:
            status, reason = "failed", f"ended with code {ended.code}: {end_of(log)[-1000:]}"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"figures": {}}
        seconds = round(ended.wall_seconds, 1)
        with (self.out / "gpu.log").open("a", encoding="utf-8") as all_logs:
            all_logs.write(f"\n=== {name}\n{log.read_text(encoding='utf-8', errors='replace')}")
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
        with _noting_choices() as chosen:
            try:
                program(json=self.result, **options).run()
            finally:
                _add_notes(self.result, chosen)


@contextlib.contextmanager
def _noting_choices() -> Iterator[list[str]]:
    """Collects what `auto` becomes: each choice is a line of the log."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("unicl_fast")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        ours.removeHandler(handler)


def _add_notes(result: Path | None, lines: list[str]) -> None:
    if result is not None and result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        found["notes"] = [*found.get("notes", ()), *dict.fromkeys(lines)]
        result.write_text(json.dumps(found), encoding="utf-8")


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
        figures, notes = stage.get("figures"), stage.get("notes")
        if figures or notes:
            parts.append(f"## {name}: {STAGES[name].about}")
        if figures:
            rows = [[label, *(f"{one[key]:,.4g}" for key in ("median", "low", "high"))]
                    for label, one in figures.items()]  # fmt: skip
            parts.append(markdown_table(["figure", "median", "lowest", "highest"], rows))
        if notes:
            parts.append("\n".join(f"- {note}" for note in notes))
    if rows := list(_beside_others(report["stages"])):
        parts.append("## Images/s beside what others publish for one GPU")
        parts.append(markdown_table(["step of", "images/s here", "published"], rows))
    return "\n\n".join(parts) + "\n"


def _beside_others(stages: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the models whose rates others publish."""
    for name, stage in stages.items():
        rate = stage.get("figures", {}).get(_RATE)
        if rate is not None and (marks := STAGES[name].marks):
            yield [STAGES[name].options["image_encoder"], f"{rate['median']:,.0f}", marks]
