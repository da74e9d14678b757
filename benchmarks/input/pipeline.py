"""Images/s of the input pipeline on the CPU, beside what else one could take.

    unicl-bench input --data PACKED [--peers torchvision dali] [--json FILE] [--plot FILE.png]

Every contender cuts, resizes, mirrors and normalises the same files into float32 batches, with the
same number of threads or worker processes. Their images are compared first (input_compare.py).
Then each runs alone, for its memory; then they take turns, all but one stopped, and what counts is
the median of the ratios within a round. Limits and stages, which are parts of the work, take turns
with them. What is not installed is named and passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unicl_fast.config import Resample
from unicl_fast.dataset.reader import PackedDataset

from ..harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    summarise,
    write_result,
)
from .compare import (
    Gap,
    comparison_task,
    differs_in_law,
    gap_to,
    write_class_folder,
)
from .contenders import (
    OURS,
    PARTS,
    PEERS,
    RAW,
    Contender,
    Kind,
    Task,
    choose,
)
from .worker import ContenderError, MissingPackageError, Rate, Worker

T = TypeVar("T")

_COMPARED = 192
"""Images of each contender that are compared with Pillow's: four times as many as there are
squares, since those who draw with replacement do not show all of them sooner."""
_MOMENTS = 1024
"""Images of each whose means and deviations are compared."""
_PACKAGES = (
    *("torchvision", "timm", "webdataset", "spdl", "ffcv", "simplejpeg", "opencv-python-headless"),
    *("nvidia-dali-cuda120", "pillow", "numpy", "numba"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Images/s of the input pipeline on the CPU, beside what else one could take."""

    data: Path
    """Packed data set of JPEGs or PNGs; everybody reads its images."""
    raw_data: Path | None = None
    """The same images packed in another format, for a second contender of ours."""
    peers: tuple[str, ...] = ("all",)
    """Whom to compare with: torchvision, torchvision-v2, timm, webdataset, spdl, ffcv-jpg,
    ffcv-raw, pool, dali; or all."""
    parts: tuple[str, ...] = ("all",)
    """Limits and stages that take turns too: decode, turbojpeg, read, write, plan, texts,
    resample, normalise, loader; or all, or none."""
    batch_size: int = 64
    """Images of a batch."""
    image_size: int = 224
    """Side of the squares."""
    threads: int = 2
    """Decoding threads, or worker processes."""
    rounds: int = 7
    """Turns that each takes."""
    seconds: float = 3.0
    """Length of a turn."""
    resample: Resample = "fused"
    """What resizes in our loader."""
    tune_peers: bool = False
    """Let peers keep freed memory as our programs do, which none of them does by itself."""
    plot: Path | None = None
    """Where a bar chart of the rates is written, as PNG."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON and the plot if they are wanted."""
    ours = [OURS, RAW] if settings.raw_data else [OURS]
    others = choose(settings.peers, PEERS) + choose(settings.parts, PARTS)
    race = _Race([*ours, *others])
    with (
        tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder,
        PackedDataset(settings.data) as dataset,
    ):
        task = Task(
            data=settings.data.absolute(),
            scratch=Path(folder),
            batch_size=settings.batch_size,
            image_size=settings.image_size,
            threads=settings.threads,
            resample=settings.resample,
            keep_memory=settings.tune_peers,
        )
        tasks = {each.name: task for each in race.still_in()}
        if settings.raw_data:
            tasks[RAW.name] = dataclasses.replace(task, data=settings.raw_data.absolute())
        write_class_folder(dataset, task.class_folder)
        question = comparison_task(dataset, task)
        questions = dict.fromkeys(tasks, question)
        if settings.raw_data:
            with PackedDataset(settings.raw_data) as raw_dataset:
                questions[RAW.name] = comparison_task(
                    raw_dataset, dataclasses.replace(task, scratch=task.scratch / "raw")
                )
        gaps = race.compare_pixels(questions)
        race.prepare(tasks)
        figures = race.measure_memory(tasks, settings.seconds)
        figures |= race.measure_rates(tasks, settings)
    print_figures(figures)
    result = {"contenders": race.described(gaps), "left_out": race.left_out}
    write_result(settings, figures, *_installed(), **result)
    if settings.plot is not None:
        from .report import plot

        plot({settings.data.name: {"figures": figures, **result}}, settings.plot)


class _Race:
    """Those that take part, and why others do not any more."""

    def __init__(self, contenders: list[Contender]) -> None:
        self._contenders = contenders
        self.left_out: dict[str, str] = {}

    def still_in(self, *kinds: Kind) -> list[Contender]:
        return [
            each
            for each in self._contenders
            if each.name not in self.left_out and (not kinds or each.kind in kinds)
        ]

    def attempt(self, contender: Contender, work: Callable[[Contender], T]) -> T | None:
        """The result of its `work`; None, and a note, if the contender cannot do it.

        Raises:
            RuntimeError: it is ours.
        """
        try:
            return work(contender)
        except ContenderError as error:
            reason = str(error)
            if isinstance(error, MissingPackageError) and contender.install:
                reason = f"{reason}; to have it: {contender.install}"
            if contender.kind == "ours":
                raise RuntimeError(f"{contender.name}: {reason}") from error
            self.leave_out(contender, reason)
            return None

    def leave_out(self, contender: Contender, reason: str) -> None:
        print(f"{contender.name} is passed over: {reason}", flush=True)
        self.left_out[contender.name] = reason

    def compare_pixels(self, questions: Mapping[str, tuple[Task, np.ndarray]]) -> dict[str, Gap]:
        """Everybody's images against Pillow's; who makes something else is out.

        Args:
            questions: for each name a task and its answer, see `comparison_task`.
        """
        gaps = {}
        for each in self.still_in("ours", "peer"):
            gap = self.attempt(each, lambda who: _gap(who, *questions[who.name]))
            if gap is not None:
                gaps[each.name] = gap
                print(f"{each.name}: {gap.mean:.2f} levels from Pillow's in the mean", flush=True)
        return gaps

    def prepare(self, tasks: Mapping[str, Task]) -> None:
        for each in self.still_in():
            self.attempt(each, lambda who: _prepare(who, tasks[who.name]))

    def measure_memory(self, tasks: Mapping[str, Task], seconds: float) -> Figures:
        """Each alone, so that nobody shares a library with it."""

        def measure(who: Contender) -> list[float]:
            with Worker(who, tasks[who.name]) as worker:
                return [number / 1e6 for number in worker.memory(seconds)]

        figures = {}
        for each in self.still_in("ours", "peer"):
            megabytes = self.attempt(each, measure)
            if megabytes:
                figures[f"{each.name}, MB"] = summarise(megabytes)
        return figures

    def measure_rates(self, tasks: Mapping[str, Task], settings: Settings) -> Figures:
        """Turns of all, after the laws of their crops were compared."""
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for each in self.still_in():
                worker = self.attempt(
                    each, lambda who: stack.enter_context(Worker(who, tasks[who.name]))
                )
                if worker is not None:
                    workers[each.name] = worker
            self._compare_laws(workers, settings)
            rates: dict[str, list[Rate]] = {name: [] for name in workers}
            for _ in range(settings.rounds):
                for each in self.still_in():
                    turn = self.attempt(each, lambda who: workers[who.name].turn(settings.seconds))
                    if turn is not None:
                        rates[each.name].append(turn)
        return self._rate_figures({each.name: rates[each.name] for each in self.still_in()})

    def _compare_laws(self, workers: Mapping[str, Worker], settings: Settings) -> None:
        batches = -(-_MOMENTS // settings.batch_size)

        def moments_of(who: Contender) -> np.ndarray:
            return workers[who.name].moments(batches)

        reference = self.attempt(OURS, moments_of)
        assert reference is not None  # else the run has ended
        for each in self.still_in("ours", "peer"):
            moments = None if each is OURS else self.attempt(each, moments_of)
            difference = "" if moments is None else differs_in_law(moments, reference)
            if difference:
                self.leave_out(each, difference)

    def _rate_figures(self, rates: Mapping[str, list[Rate]]) -> Figures:
        figures = {}
        for unit, field in (("s", "wall"), ("CPU second", "processor")):
            values = {
                name: [getattr(rate, field) for rate in taken] for name, taken in rates.items()
            }
            for name, all_rates in values.items():
                figures[f"{name}, images/{unit}"] = summarise(all_rates)
            suffix = "" if field == "wall" else ", by CPU time"
            for own in self.still_in("ours"):
                for other in self.still_in("peer", "limit"):
                    pairs = zip(values[own.name], values[other.name], strict=True)
                    ratios = [mine / theirs for mine, theirs in pairs]
                    figures[f"{own.name} / {other.name}{suffix}"] = summarise(ratios)
        return figures

    def described(self, gaps: Mapping[str, Gap]) -> dict[str, dict[str, Any]]:
        """For the JSON: what each one is, and how near its images are to Pillow's."""
        described: dict[str, dict[str, Any]] = {}
        for each in self.still_in():
            facts: dict[str, Any] = {"kind": each.kind, "what": each.what}
            if each.differs:
                facts["differs"] = each.differs
            if each.name in gaps:
                facts["levels_from_pillow"] = dataclasses.asdict(gaps[each.name])
            described[each.name] = facts
        return described


def _gap(contender: Contender, task: Task, truth: np.ndarray) -> Gap:
    _prepare(contender, task)
    with Worker(contender, task) as worker:
        images = worker.images(_COMPARED)
    try:
        gap = gap_to(truth, images)
    except ValueError as error:
        raise ContenderError(str(error)) from error
    if gap.mean > contender.tolerance:
        raise ContenderError(
            f"it makes other images: {gap.mean:.2f} levels from Pillow's in the mean, "
            f"where {contender.tolerance} are allowed"
        )
    return gap


def _prepare(contender: Contender, task: Task) -> None:
    if contender.prepare:
        with Worker(contender, task, prepare=True):
            pass


def _installed() -> list[str]:
    found = []
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            version(package)
            found.append(package)
    return found
