"""The harness of all experiments: their runs, means over seeds with intervals, and the report.

A run is a user's command: `unicl-pretrain` with options, then `unicl-eval` on its result. Each has
a folder, which gets `row.json` when all is done, with the numbers and the commands; a run that has
one is not repeated, and one that was stopped resumes from its checkpoint. `asked.json` holds the
options it was begun with, so that no other run is taken for it. The report of an experiment is its
numbers as JSON, its tables as Markdown, and every run as a dot of a plot.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from unicl_fast.config import PrecisionName
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.machine import usable_cores
from unicl_fast.training.metrics import read_metrics

from ..harness import describe_machine, printed, summarise

Row = dict[str, Any]
"""The numbers of a run."""
Arm = TypeVar("Arm")

_LEVEL = 0.95
INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#2563a8"
_KEPT = ("images_per_second", "samples_seen", "step", "loss")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """Options of every experiment."""

    out: Path
    """Folder for runs, tables, plots and numbers; finished runs in it are not repeated."""
    jobs: int = 2
    """Runs beside each other, which share the cores; on GPUs take 1."""
    length: float = 1.0
    """Part of each run's length, to try an experiment out."""
    precision: PrecisionName = "auto"
    """efficiency.precision of all runs; each row names the chosen one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each arm."""

    def train_arms(
        self, arms: Iterable[Arm], make_run: Callable[[Arm, int], Run]
    ) -> dict[Arm, list[Row]]:
        """Does the runs of all arms and seeds; returns each arm's rows in the seeds' order."""
        # a stopped experiment has all arms of its first seeds
        runs = {(arm, seed): make_run(arm, seed) for seed in self.seeds for arm in arms}
        rows = run_all(list(runs.values()), self.out, jobs=self.jobs)
        return {arm: [rows[runs[arm, seed].name] for seed in self.seeds] for arm in arms}

    def table(
        self,
        title: str,
        cells: dict[Any, dict[str, Mean]],
        pairs: Mapping[str, tuple[Mean, Mean]] | str,
        chance: Mapping[str, float] | None = None,
        unit: str = "%",
    ) -> Table:
        """A table of means, and of the first minus the second of each pair unless seeds are few.

        The name of a column stands for the pairs of every other with it, in all rows.
        """
        if isinstance(pairs, str):
            pairs = {
                f"{row}: {arm} - {pairs}": (mean, means[pairs])
                for row, means in cells.items()
                for arm, mean in means.items()
                if arm != pairs
            }
        differences = {
            name: difference_of(one.values, other.values)
            for name, (one, other) in pairs.items()
            if len(self.seeds) > 1
        }
        return Table(
            title=title, cells=cells, differences=differences, chance=chance or {}, unit=unit
        )

    def execution(self) -> tuple[str, ...]:
        """Options of every run: beside others, one decoding thread suffices for small images."""
        return ("--data.threads", "1") if self.jobs > 1 else ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and the evaluations after it."""

    name: str
    """Its folder under the experiment's, for example resnet9/ce/seed0."""
    pretrain: tuple[str, ...]
    """Options of unicl-pretrain, without --out."""
    execution: tuple[str, ...] = ()
    """More options, which change the speed and not the result."""
    evaluations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arguments of unicl-eval by their name in the row, without --checkpoint and --json."""


def run_all(runs: Sequence[Run], folder: Path, *, jobs: int) -> dict[str, Row]:
    """Does the runs that are not finished, `jobs` at a time; returns the row of each by name."""
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
            pool.shutdown(cancel_futures=True)  # running ones end first, and keep their results
            raise
    return {run.name: rows[run.name] for run in runs}


def median_rate(run: Run, folder: Path) -> float:
    """Images/s of a finished run, without its first fifth, which includes the start."""
    lines = read_metrics(folder / run.name / "run")
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates[len(rates) // 5 :])


def compare_rates(rates: Mapping[str, Sequence[float]], one: str, other: str) -> Row:
    """Ratios of the rates of `one` to those of `other`, in pairs as they were taken."""
    found = summarise([a / b for a, b in zip(rates[one], rates[other], strict=True)])
    printed({f"images/s, {one} over {other}": found})
    return {"ratio": found, "images_per_second": rates}


def _row_of(run: Run, folder: Path, threads: int) -> Row:
    _note_options(run, folder)
    path = folder / "row.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    run_folder = folder / "run"
    options = (*run.pretrain, *run.execution, "--out", str(run_folder), "--resume", "auto")
    cpu_seconds = run_program("pretrain", options, folder / "pretrain.log", threads=threads)
    config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    last: Row = {}  # the last value of every metric
    for line in read_metrics(run_folder):
        last |= line
    row = {
        "name": run.name,
        "pretrain": list(run.pretrain),
        "precision": config["efficiency"]["precision"],
        "last": last,
        "train_cpu_seconds": round(cpu_seconds, 1),
    }
    for name, arguments in run.evaluations.items():
        result = folder / f"{name}.json"
        options = (*arguments, "--checkpoint", str(run_folder), "--json", str(result))
        log = folder / f"{name}.log"
        cpu_seconds += run_program("evaluate", options, log, threads=threads)
        row[name] = json.loads(result.read_text(encoding="utf-8"))
    row["cpu_seconds"] = round(cpu_seconds, 1)  # of these programs, not of one that was stopped
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def _note_options(run: Run, folder: Path) -> None:
    """Writes the options before anything is trained, or refuses others than those of the start."""
    evaluations = {name: list(arguments) for name, arguments in run.evaluations.items()}
    asked = {"pretrain": list(run.pretrain), "evaluations": evaluations}
    path = folder / "asked.json"
    if not path.is_file():
        make_folder(folder)
        path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != asked:
        raise RuntimeError(
            f"{folder} was begun as {json.dumps(before)}, and is asked for as {json.dumps(asked)}: "
            "remove it, or take another --out"
        )


def run_program(module: str, options: Sequence[str], log: Path, *, threads: int) -> float:
    """Runs a program of unicl_fast.tools; returns its CPU time in seconds, all processes together.

    Raises:
        RuntimeError: it failed; with the end of `log`.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", f"unicl_fast.tools.{module}", *options]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
    if code != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"unicl {module} {' '.join(options)} ended with {code} ({log}):\n{end}")
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over the seeds of one arm."""

    values: tuple[float, ...]
    mean: float
    deviation: float
    """Standard deviation between seeds (n - 1); nan for one seed."""

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}"


@dataclass(frozen=True, slots=True)
class Difference:
    """One arm minus another, in the unit of the values, and in standard deviations."""

    mean: float
    low: float
    high: float
    """End of the 95 % interval of Welch's t, which does not assume equal spreads."""
    effect: float
    effect_low: float
    effect_high: float
    """Hedges' g, Cohen's d corrected for few samples, with its 95 % interval (Hedges, 1981)."""

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard deviation of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Mean(tuple(values), statistics.fmean(values), deviation)


def difference_of(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one` minus `other`, at least two independent values each; g is nan where none has a spread.

    The interval of g is that of its large-sample variance, which is rough for five seeds: it tells
    roughly how large the effect is, while Welch's interval tells whether there is any.
    """
    n, m = len(one), len(other)
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(_LEVEL)
    mean = statistics.fmean(one) - statistics.fmean(other)
    pooled = math.sqrt(
        ((n - 1) * statistics.variance(one) + (m - 1) * statistics.variance(other)) / (n + m - 2)
    )
    effect = (mean / pooled if pooled else math.nan) * (1 - 3 / (4 * (n + m) - 9))
    reach = stats.norm.ppf((1 + _LEVEL) / 2) * math.sqrt(
        (n + m) / (n * m) + effect**2 / (2 * (n + m))
    )
    return Difference(
        mean, float(interval.low), float(interval.high), effect, effect - reach, effect + reach
    )


def without_nan(value: Any) -> Any:
    """The value for JSON, which has no nan."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Table:
    """Groups (rows) of arms (columns), each a mean over seeds, and differences of arms."""

    title: str
    cells: Mapping[str, Mapping[str, Mean]]
    differences: Mapping[str, Difference]
    chance: Mapping[str, float]
    """Results of guessing, for groups where they are informative."""
    unit: str = "%"

    def markdown(self) -> str:
        """The table, and one of the differences below it."""
        arms = list(next(iter(self.cells.values())))
        lines = [
            f"| {self.title}, {self.unit} | {' | '.join(arms)} |" + " chance |" * bool(self.chance),
            "|---|" + "---|" * (len(arms) + bool(self.chance)),
        ]
        for group, means in self.cells.items():
            chance = f" {self.chance[group]:g} |" if self.chance else ""
            lines.append(f"| {group} | {' | '.join(str(means[arm]) for arm in arms)} |{chance}")
        if self.differences:
            unit = "points" if self.unit == "%" else self.unit
            lines += ["", f"| difference (95 % interval) | {unit} | Hedges' g |", "|---|---|---|"]
        for name, found in self.differences.items():
            g = f"{found.effect:+.1f} ({found.effect_low:+.1f} to {found.effect_high:+.1f})"
            lines.append(f"| {name} | {found} | {g} |")
        return "\n".join(lines)


def write_report(
    name: str,
    settings: ExperimentSettings,
    tables: list[Table],
    arms: Mapping[Any, list[Row]],
    **more: object,
) -> None:
    """Prints the tables and writes NAME.md, NAME.png and NAME.json into `settings.out`."""
    text = "\n\n".join(table.markdown() for table in tables)
    print(text)
    (settings.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    _draw(tables, settings.out / f"{name}.png")
    result = {
        "tables": [without_nan(asdict(table)) for table in tables],
        **more,
        "runs": [_shortened(row) for rows in arms.values() for row in rows],
        "machine": describe_machine("timm", "nvidia-dali-cuda120"),
    }
    path = settings.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}, and .md and .png beside it")


def _shortened(row: Row) -> Row:
    """A row without this machine's paths and without the long results of evaluations."""
    options = [
        str(Path(*Path(word).parts[-2:])) if "/" in word else word for word in row["pretrain"]
    ]
    last = {
        key: value
        for key, value in row["last"].items()
        if key in _KEPT or key.endswith(("/top1", "/top5"))
    }
    evaluated = {
        key: {name: number for name, number in value.items() if isinstance(number, int | float)}
        for key, value in _evaluations(row).items()
    }
    described = {"name": row["name"], "pretrain": options, "precision": row["precision"]}
    taken: Row = {key: row[key] for key in ("cpu_seconds", "train_cpu_seconds") if key in row}
    return {**described, **taken, "last": last, **evaluated}


def _evaluations(row: Row) -> dict[str, Row]:
    """The results of a row by name; those of a command for several data sets as NAME/DATA SET."""
    found: dict[str, Row] = {}
    for key, value in row.items():
        if isinstance(value, dict) and key != "last":
            found[key] = value
            found |= {f"{key}/{one['name']}": one for one in value.get("data_sets", ())}
    return found


def _draw(tables: list[Table], path: Path) -> None:
    """Draws a panel for each group of each table: a dot a seed, the mean of an arm as a line."""
    panels = [(table, group) for table in tables for group in table.cells]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))  # legible on half a page
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (table, group) in zip(grid, panels, strict=False):
        for column, mean in enumerate(table.cells[group].values()):
            count = len(mean.values)
            spots = [column + 0.06 * (number - (count - 1) / 2) for number in range(count)]
            axes.plot(spots, mean.values, "o", color=ACCENT, alpha=0.75, markersize=5)
            axes.hlines(mean.mean, column - 0.3, column + 0.3, color=INK, linewidth=1.5)
            axes.annotate(
                f"{mean.mean:.1f}", (column + 0.32, mean.mean), va="center", fontsize=8, color=INK
            )
        if group in table.chance:
            axes.axhline(table.chance[group], color=FAINT, linestyle="--", linewidth=1)
        names = [column.replace(" ", "\n") for column in table.cells[group]]
        axes.set_xticks(range(len(names)), names, fontsize=7 if len(names) > 4 else 8)
        axes.set_xlim(-0.6, len(table.cells[group]) - 0.2)
        axes.set_title(f"{table.title}\n{group}", fontsize=8, color=INK)
        axes.set_ylabel(table.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=130)
