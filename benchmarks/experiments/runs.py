"""Training runs of an experiment: each in its folder, several beside each other, none twice.

A run is what a user would type: `unicl-pretrain` with options, then `unicl-eval` on what it left.
Its folder gets `row.json` when all is done, with the numbers and the commands; a run that has one
is taken as it is, and one that was stopped goes on from its checkpoint. `asked.json` says what it
was begun with, so that nothing else is taken for it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unicl_fast.system.machine import usable_cores
from unicl_fast.training.metrics import read_metrics

from ..harness import print_figures, summarise

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and what is evaluated after it."""

    name: str
    """Its folder under the experiment's, for example resnet9/ce/seed0."""
    pretrain: tuple[str, ...]
    """Options of unicl-pretrain, without --out."""
    execution: tuple[str, ...] = ()
    """More of them, which change how fast it runs and not what comes out."""
    evaluations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name in the row to arguments of unicl-eval, without --checkpoint and --json."""


def run_all(runs: Sequence[Run], folder: Path, *, jobs: int) -> dict[str, Row]:
    """Does what is not done yet, `jobs` at a time, and returns the row of each by name.

    Raises:
        RuntimeError: a program failed; the message has the end of what it said.
    """
    threads = max(1, usable_cores() // jobs)
    rows: dict[str, Row] = {}
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(runs), desc="runs", unit="run", dynamic_ncols=True) as bar,
    ):
        waiting = {pool.submit(_row_of, run, folder / run.name, threads): run for run in runs}
        try:
            for done in as_completed(waiting):
                name = waiting[done].name
                rows[name] = done.result()
                bar.set_postfix_str(name)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those at work end first, and keep what they did
            raise
    return {run.name: rows[run.name] for run in runs}


def median_rate(run: Run, folder: Path) -> float:
    """Images/s of a run that is done, without its first fifth, which has the start."""
    lines = read_metrics(folder / run.name / "run")
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates[len(rates) // 5 :])


def compare_rates(rates: Mapping[str, Sequence[float]], one: str, other: str) -> Row:
    """Prints how many times `other`'s rate `one` has, in pairs as they were taken."""
    found = summarise([a / b for a, b in zip(rates[one], rates[other], strict=True)])
    print_figures({f"images/s, {one} over {other}": found})
    return {"ratio": found, "images_per_second": rates}


def _row_of(run: Run, folder: Path, threads: int) -> Row:
    _note_what_is_asked(run, folder)
    path = folder / "row.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    run_folder = folder / "run"
    options = (*run.pretrain, *run.execution, "--out", str(run_folder), "--resume", "auto")
    run_program("pretrain", options, folder / "pretrain.log", threads=threads)
    config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    row = {
        "name": run.name,
        "pretrain": list(run.pretrain),
        "precision": config["efficiency"]["precision"],
        **_last_numbers(run_folder),
    }
    for name, arguments in run.evaluations.items():
        result = folder / f"{name}.json"
        options = (*arguments, "--checkpoint", str(run_folder), "--json", str(result))
        run_program("evaluate", options, folder / f"{name}.log", threads=threads)
        row[name] = json.loads(result.read_text(encoding="utf-8"))
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def _note_what_is_asked(run: Run, folder: Path) -> None:
    """Writes it down before anything is trained, or compares it with what was.

    Raises:
        RuntimeError: it was begun with other options or evaluations.
    """
    evaluations = {name: list(arguments) for name, arguments in run.evaluations.items()}
    asked = {"pretrain": list(run.pretrain), "evaluations": evaluations}
    path = folder / "asked.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != asked:
        raise RuntimeError(
            f"{folder} was begun as {json.dumps(before)}, and is asked for as {json.dumps(asked)}: "
            "remove it, or take another --out"
        )


def _last_numbers(run_folder: Path) -> Row:
    """The last value of everything that the run has measured."""
    last: Row = {}
    for line in read_metrics(run_folder):
        last |= line
    return {"last": last}


def run_program(module: str, options: Sequence[str], log: Path, *, threads: int) -> None:
    """Runs a program of unicl_fast.tools, whose output goes into a file.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", f"unicl_fast.tools.{module}", *options]
    with log.open("wb") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code != 0:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"unicl {module} {' '.join(options)} ended with {code} ({log}):\n{said}")
