"""Images/s of the input pipeline on the CPU, beside nine other loaders and the limits.

    unicl-bench input --data PACKED [--peers torchvision dali] [--json FILE] [--plot FILE.png]
    python -m unicl_fast.benchmarks.input.race RESULT.json ... [--plot FILE.png]

Every contestant crops, resizes, flips and normalises the same files into float32 batches, with the
same number of threads or worker processes. Their images are compared first (contenders.py), then
each runs alone, for its memory, then they take turns with the limits and stages, which are parts of
the work. Contestants that are not installed are named and left out. The second command prints and
draws results, so that no table in the documentation is typed by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from unicl_fast.config import Resample
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.program import begin_program

from ..harness import Figures, LoaderStage, Turn, Unit, rate_of, ratio_of, summarise
from .contenders import (
    OURS,
    PARTS,
    PEERS,
    RAW,
    Contender,
    ContenderError,
    Gap,
    Kind,
    MissingPackageError,
    Task,
    choose,
    compare_distributions,
    comparison_task,
    gap_to,
    write_class_folder,
)
from .worker import Worker

_COLOURS = {"ours": "#c1440e", "peer": "#8a9ba8", "limit": "white"}
_RAW = "-raw"
_OFF_THE_SCALE = 4
"""Limits beyond so many times the fastest contestant are named in words: they would squeeze the
other bars."""

_COMPARED = 192
"""Images of each contestant that are compared with Pillow's: four times the number of squares,
since contestants that draw with replacement do not show all of them sooner."""
_MOMENTS = 1024
"""Images of each contestant whose means and deviations are compared."""
_PACKAGES = (
    *("torchvision", "timm", "webdataset", "spdl", "ffcv", "simplejpeg", "opencv-python-headless"),
    *("nvidia-dali-cuda120", "pillow", "numpy", "numba"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input(LoaderStage):
    """Images/s of the input pipeline on the CPU, beside other loaders."""

    raw_data: Path | None = None
    """The same images packed in another format, for a second contestant of ours."""
    peers: tuple[str, ...] = ("all",)
    """Peers to compare with: torchvision, torchvision-v2, timm, webdataset, spdl, ffcv-jpg,
    ffcv-raw, pool, dali; or all."""
    parts: tuple[str, ...] = ("all",)
    """Limits and stages that take turns too: decode, decode-cut, turbojpeg, read, write, plan,
    texts, resample, augment, normalise, loader; or all, or none."""
    rounds: int = 7
    """Turns of each contestant."""
    seconds: float = 3.0
    """Length of a turn."""
    resample: Resample = "fused"
    """The resizing operator of our loader."""
    tune_peers: bool = False
    """Let peers keep freed memory as our programs do, which none of them does by default."""
    plot: Path | None = None
    """File for a bar chart of the rates, as PNG."""

    def run(self) -> None:
        ours = [OURS, RAW] if self.raw_data else [OURS]
        race = _Race([*ours, *choose(self.peers, PEERS), *choose(self.parts, PARTS)])
        with (
            tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder,
            PackedDataset(self.data) as dataset,
        ):
            task = Task(
                data=self.data.absolute(),
                scratch=Path(folder),
                batch_size=self.batch_size,
                image_size=self.image_size,
                threads=self.threads,
                resample=self.resample,
                keep_memory=self.tune_peers,
            )
            tasks = {each.name: task for each in race.still_in()}
            write_class_folder(dataset, task.class_folder)
            questions = dict.fromkeys(tasks, comparison_task(dataset, task))
            if self.raw_data:
                tasks[RAW.name] = dataclasses.replace(task, data=self.raw_data.absolute())
                raw_task = dataclasses.replace(task, scratch=task.scratch / "raw")
                with PackedDataset(self.raw_data) as raw_dataset:
                    questions[RAW.name] = comparison_task(raw_dataset, raw_task)
            gaps = race.compare_pixels(questions)
            for each in race.still_in():
                with race.attempt(each):
                    _prepare(each, tasks[each.name])
            figures = race.measure_memory(tasks, self.seconds)
            figures |= race.measure_rates(tasks, self)
        result = {"contenders": race.described(gaps), "left_out": race.left_out}
        whole = {"figures": figures, **result}
        print(f"\n{verdict(whole)}\n\n{table(whole)}")
        self.write_result(figures, *_PACKAGES, **result)
        if self.plot is not None:
            plot({self.data.name: whole}, self.plot)


class _Race:
    """The contestants, and the reasons why some were left out."""

    def __init__(self, contenders: list[Contender]) -> None:
        self._contenders = contenders
        self.left_out: dict[str, str] = {}

    def still_in(self, *kinds: Kind) -> list[Contender]:
        return [
            each
            for each in self._contenders
            if each.name not in self.left_out and (not kinds or each.kind in kinds)
        ]

    @contextlib.contextmanager
    def attempt(self, contender: Contender) -> Iterator[None]:
        """Leaves the contestant out if it cannot do the block; RuntimeError if it is ours."""
        try:
            yield
        except ContenderError as error:
            reason = str(error)
            if isinstance(error, MissingPackageError) and contender.install:
                reason = f"{reason}; to have it: {contender.install}"
            if contender.kind == "ours":
                raise RuntimeError(f"{contender.name}: {reason}") from error
            print(f"{contender.name} is left out: {reason}", flush=True)
            self.left_out[contender.name] = reason

    def compare_pixels(self, questions: Mapping[str, tuple[Task, np.ndarray]]) -> dict[str, Gap]:
        """Compares all images with Pillow's, by a task and its result for each name."""
        gaps = {}
        for each in self.still_in("ours", "peer"):
            task, truth = questions[each.name]
            with self.attempt(each):
                _prepare(each, task)
                with Worker(each, task) as worker:
                    gap = gap_to(truth, worker.images(_COMPARED))
                if gap.mean > each.tolerance:
                    raise ContenderError(
                        f"it makes other images: {gap.mean:.2f} levels from Pillow's in the mean, "
                        f"where {each.tolerance} are allowed"
                    )
                gaps[each.name] = gap
                print(f"{each.name}: {gap.mean:.2f} levels from Pillow's in the mean", flush=True)
        return gaps

    def measure_memory(self, tasks: Mapping[str, Task], seconds: float) -> Figures:
        """Runs each alone, so that no other process shares its libraries."""
        figures = {}
        for each in self.still_in("ours", "peer"):
            with self.attempt(each), Worker(each, tasks[each.name]) as worker:
                megabytes = [number / 1e6 for number in worker.memory(seconds)]
                figures[f"{each.name}, MB"] = summarise(megabytes)
        return figures

    def measure_rates(self, tasks: Mapping[str, Task], settings: Input) -> Figures:
        """Turns of all, after the distributions of their crops were compared."""
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for each in self.still_in():
                with self.attempt(each):
                    workers[each.name] = stack.enter_context(Worker(each, tasks[each.name]))
            moments: dict[str, np.ndarray] = {}
            for each in self.still_in("ours", "peer"):
                with self.attempt(each):
                    moments[each.name] = workers[each.name].moments(
                        -(-_MOMENTS // settings.batch_size)
                    )
                    compare_distributions(moments[each.name], moments[OURS.name])
            turns: dict[str, list[Turn]] = {name: [] for name in workers}
            for _ in range(settings.rounds):
                for each in self.still_in():
                    with self.attempt(each):
                        turns[each.name].append(workers[each.name].turn(settings.seconds))
        figures: Figures = {}
        units: dict[Unit, tuple[str, str]] = {
            "wall_seconds": ("s", ""),
            "cpu_seconds": ("CPU second", ", by CPU time"),
        }
        for unit, (second, suffix) in units.items():
            for each in self.still_in():
                figures[f"{each.name}, images/{second}"] = rate_of(turns[each.name], 1, unit=unit)
            pairs = itertools.product(self.still_in("ours"), self.still_in("peer", "limit"))
            for own, other in pairs:
                ratio = ratio_of(turns, other.name, own.name, unit=unit)
                figures[f"{own.name} / {other.name}{suffix}"] = ratio
        return figures

    def described(self, gaps: Mapping[str, Gap]) -> dict[str, dict[str, Any]]:
        """For the JSON: each contestant, and how far its images are from Pillow's."""
        described = {}
        for each in self.still_in():
            facts: dict[str, Any] = {"kind": each.kind, "what": each.about, "differs": each.differs}
            if each.name in gaps:
                facts["levels_from_pillow"] = dataclasses.asdict(gaps[each.name])
            described[each.name] = {name: fact for name, fact in facts.items() if fact}
        return described


def _prepare(contender: Contender, task: Task) -> None:
    if contender.prepare:
        with Worker(contender, task, prepare=True):
            pass


def verdict(result: Mapping[str, Any]) -> str:
    """Says how the race ended: our rate beside the fastest peer's and the nearest limit's.

    A limit does a part of the work only, so nothing can be faster than the slowest of them.
    """
    figures, ours = result["figures"], OURS.name
    others = {
        kind: [name for name, facts in _by_rate(result) if facts["kind"] == kind]
        for kind in ("peer", "limit")
    }
    said = [f"{ours} makes {spread(figures[f'{ours}, images/s'])} images/s"]
    if peers := [name for name in others["peer"] if not name.endswith(_RAW)]:
        ratio = spread(figures[f"{ours} / {peers[0]}"])
        said.append(f"{ratio} times {peers[0]}, the fastest peer of {len(peers)}")
    if others["limit"]:
        limit = others["limit"][-1]
        ratio = spread(figures[f"{ours} / {limit}"])
        said.append(f"{ratio} of the nearest limit, {limit}")
    return ": ".join([said[0], ", and ".join(said[1:])]) if said[1:] else said[0]


def table(result: Mapping[str, Any]) -> str:
    """One row a contestant, the fastest first within its kind; ratios are to ours.

    Readers of decoded images are compared with our loader of decoded images, if it ran.
    """
    figures = result["figures"]
    lines = [
        "| | images/s | ours, times that | by CPU time | memory, MB | levels from Pillow |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in _by_rate(result):
        ours = "unicl_fast"
        if name.endswith(_RAW) and f"{ours}{_RAW}" in result["contenders"]:
            ours += _RAW
        cells = [
            spread(figures[f"{name}, images/s"]),
            spread(figures.get(f"{ours} / {name}")),
            spread(figures.get(f"{ours} / {name}, by CPU time")),
        ]
        memory, gap = figures.get(f"{name}, MB"), facts.get("levels_from_pillow")
        cells.append(_number(memory["median"]) if memory else "")
        cells.append(f"{gap['mean']:.2f}" if gap else "")
        kind = "" if facts["kind"] in ("ours", "peer") else f"{facts['kind']}: "
        lines.append(f"| {kind}{name} | {' | '.join(cells)} |")
    for name, reason in result["left_out"].items():
        lines.append(f"| {name} | left out: {reason} | | | | |")
    return "\n".join(lines)


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws a panel of bars for each titled result, one below the other: median rate and spread.

    Letters are large for the width, so that a page of 360 pixels still shows them.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = [_bars(result) for result in results.values()]
    heights = [1.5 + 0.3 * len(rows) for rows, _ in bars]
    figure = Figure(figsize=(6.6, sum(heights)), layout="constrained")
    panels = figure.subplots(len(bars), squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, result), (rows, beyond) in zip(panels, results.items(), bars, strict=True):
        rates = [result["figures"][f"{name}, images/s"] for name, _ in rows]
        top = max(rate["high"] for rate in rates)
        spreads = [(rate["median"] - rate["low"], rate["high"] - rate["median"]) for rate in rates]
        panel.barh(
            [name for name, _ in rows],
            [rate["median"] for rate in rates],
            color=[_COLOURS[kind] for _, kind in rows],
            edgecolor=["#4a4a4a" if kind == "limit" else _COLOURS[kind] for _, kind in rows],
            hatch=["///" if kind == "limit" else "" for _, kind in rows],
            xerr=np.transpose(spreads),
            error_kw={"ecolor": "#222222", "capsize": 2, "elinewidth": 0.8},
        )
        panel.invert_yaxis()
        for row, rate in enumerate(rates):
            text = f"{rate['median']:,.0f}"
            panel.text(rate["high"] + 0.015 * top, row, text, va="center", fontsize=11)
        panel.set_xlim(0, 1.16 * top)
        panel.set_xticks([])
        panel.tick_params("y", length=0, labelsize=11)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_title(title, fontsize=13, fontweight="bold", loc="left")
        panel.set_xlabel(_small_print(result, beyond), fontsize=10, loc="left")
    kinds = {"ours": "unicl_fast", "peer": "others", "limit": "a part of the work alone"}
    shown = {kind for rows, _ in bars for _, kind in rows}
    patches = [
        Patch(
            facecolor=_COLOURS[kind],
            edgecolor="#4a4a4a",
            hatch="///" * (kind == "limit"),
            label=text,
        )
        for kind, text in kinds.items()
        if kind in shown
    ]
    panels[0].legend(handles=patches, loc="lower right", fontsize=11, frameon=False)
    figure.savefig(path, dpi=160)


def _small_print(result: Mapping[str, Any], beyond: list[str]) -> str:
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"images/s, median and spread of {settings['rounds']} rounds: batches of "
        f"{settings['batch_size']} at {settings['image_size']} pixels,",
        f"{settings['threads']} threads or workers on {machine['cores']} cores of "
        f"{machine['processor']}",
    ]
    if any(name.endswith(_RAW) for name in result["contenders"]):
        lines.append(f"{_RAW}: of images that are stored decoded")
    if beyond:
        lines.append(f"parts that are faster than drawn: {', '.join(beyond)}")
    return "\n".join(lines)


def _by_rate(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[int, float]:
        kind, rate = item[1]["kind"], result["figures"][f"{item[0]}, images/s"]["median"]
        return {"limit": 1, "stage": 2}.get(kind, 0), -rate

    return sorted(result["contenders"].items(), key=order)


def _bars(result: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Names and kinds from top to bottom, limits first; and the limits that are off the scale."""
    rows = [(name, facts["kind"]) for name, facts in _by_rate(result)]
    whole = [row for row in rows if row[1] in ("ours", "peer")]
    rate = {name: result["figures"][f"{name}, images/s"]["median"] for name, _ in rows}
    most = _OFF_THE_SCALE * max(rate[name] for name, _ in whole)
    limits = [row for row in rows if row[1] == "limit"]
    beyond = [f"{name} {rate[name]:,.0f}" for name, _ in limits if rate[name] > most]
    return [row for row in limits if rate[row[0]] <= most] + whole, beyond


def spread(figure: Mapping[str, float] | None) -> str:
    """Median and spread as text; empty for no figure."""
    if figure is None:
        return ""
    low, middle, high = (_number(figure[key]) for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Prints a table of each result; draws all of them if a file is given."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files of `unicl-bench input`."""
    plot: Path | None = None
    """File for the bar charts, as PNG."""
    titles: tuple[str, ...] = ()
    """A title for each panel of it, instead of the name of the packed data set."""


def main() -> None:
    """Entry point of the second command."""
    report = tyro.cli(
        Report, args=begin_program(), prog="python -m unicl_fast.benchmarks.input.race"
    )
    results = [json.loads(path.read_text(encoding="utf-8")) for path in report.results]
    for path, result in zip(report.results, results, strict=True):
        print(f"\n{path.stem}\n\n{table(result)}")
    if report.plot is not None:
        titles = report.titles or [Path(result["settings"]["data"]).name for result in results]
        if len(titles) != len(results):
            sys.exit(
                f"--titles needs a title for each of {len(results)} results, not {len(titles)}"
            )
        plot(dict(zip(titles, results, strict=True)), report.plot)


if __name__ == "__main__":
    main()
