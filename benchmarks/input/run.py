"""Images/s of the input pipeline on the CPU, compared with nine other loaders and the limits.

    unicl-bench input --data PACKED [--peers torchvision dali] [--augment SPEC...] [--url URL]

Images are compared first (contenders.py); then each contestant runs by itself for its memory; then
all take turns with the limits, which do a part of the work.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import Resample
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.tools.diagnose.measuring import Turn

from ..harness import Figures, Stage, Unit, printed, rate_of, ratio_of, summarise
from .contenders import (
    OURS,
    PARTS,
    PEERS,
    RAW,
    Contender,
    ContenderError,
    Gap,
    Kind,
    Task,
    choose,
    compare_distributions,
    compare_operators,
    comparison_task,
    gap_to,
    reason_left_out,
    write_class_folder,
)
from .report import table, verdict
from .worker import Worker

_COMPARED = 192
"""Images of each contestant that are compared with Pillow's: four times the number of squares,
since contestants that draw with replacement do not show all of them sooner."""
_MOMENTS = 1024
"""Images of each contestant whose means and deviations are compared."""
_UNITS: dict[Unit, tuple[str, str]] = {
    "wall_seconds": ("s", ""),
    "cpu_seconds": ("CPU second", ", by CPU time"),
}
_PACKAGES = (
    *("torchvision", "timm", "webdataset", "spdl", "ffcv", "simplejpeg", "opencv-python-headless"),
    *("nvidia-dali-cuda120", "pillow", "numpy", "numba", "fsspec"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input(Stage):
    """Images/s of the input pipeline on the CPU, compared with other loaders."""

    data: Path
    """Packed data set of JPEGs or PNGs."""
    batch_size: int = 64
    """Images in a batch."""
    image_size: int = 224
    """Side of the crops."""
    threads: int = 2
    """Decoding threads; of others, worker processes."""
    raw_data: Path | None = None
    """The same images packed in another format, for a second contestant of ours."""
    peers: tuple[str, ...] = ("all",)
    """Peers to compare with: torchvision, torchvision-v2, timm, webdataset, spdl, ffcv-jpg,
    ffcv-raw, pool, turboloader, litdata, mosaicml, grain, dali; or all, or none."""
    parts: tuple[str, ...] = ("all",)
    """Limits that take turns too: decode, decode-cut, turbojpeg, read, write; or all, or none."""
    augment: tuple[str, ...] = ()
    """Entries of data.augment to measure our loader with."""
    url: str = ""
    """URL of the same data set in a store, to measure the loader on it too."""
    block_bytes: int = 1 << 20
    """Bytes of a request to the store."""
    windows: tuple[int, ...] = (0, 1024, 512, 256)
    """Values of data.shuffle_window to read an epoch from the store with."""
    caches: tuple[float, ...] = (1.25, 0.5, 0.25)
    """Sizes of the cache to do so with, as parts of the data set."""
    rounds: int = 7
    """Turns of each contestant."""
    seconds: float = 3.0
    """Length of a turn."""

    def run(self) -> None:
        for spec in self.augment:
            parse_augmentation(spec)  # refused before minutes are spent
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
            tasks |= race.add_augmented(self.augment, task)
            for each in race.still_in():
                with race.attempt(each):
                    _prepare(each, tasks[each.name])
            figures = race.measure_memory(tasks, self.seconds)
            figures |= race.measure_rates(tasks, self)
        result = {"contenders": race.described(gaps), "left_out": race.left_out}
        whole = {"figures": figures, **result}
        print(f"\n{verdict(whole)}\n\n{table(whole)}\n")
        printed({name: figure for name, figure in figures.items() if ": " in name})
        if self.url:
            from .own import config_of  # with DALI
            from .storage import measure_storage

            grid = list(itertools.product(self.caches, self.windows))
            plain = functools.partial(config_of, task)
            sizes = {"block_bytes": self.block_bytes, "rounds": self.rounds}
            figures |= printed(measure_storage(self.data, self.url, plain, grid, **sizes))
        self.write_result(figures, *_PACKAGES, **result)


class _Race:
    """The contestants, and why some were left out."""

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
            self.left_out[contender.name] = reason_left_out(contender, error)

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

    def add_augmented(self, specs: Sequence[str], task: Task) -> dict[str, Task]:
        """Adds our loader with each augmentation, fused and by DALI; returns their tasks.

        Raises:
            RuntimeError: the two operators make different images.
        """
        tasks: dict[str, Task] = {}
        for spec in ("none", *specs) if specs else ():
            images = []
            for resample in get_args(Resample):
                each = dataclasses.replace(OURS, name=f"{spec}, {resample}", kind="augmented")
                own = dataclasses.replace(task, augment=(spec,), resample=resample)
                self._contenders.append(each)
                tasks[each.name] = own
                with self.attempt(each), Worker(each, own) as worker:
                    images.append(worker.images(own.batch_size))
            compare_operators(spec, *images)
        return tasks

    def measure_memory(self, tasks: Mapping[str, Task], seconds: float) -> Figures:
        """Runs each by itself, so that no other process shares its libraries."""
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
        return self._rates(turns) | self._rates_of_augmented(turns)

    def _rates(self, turns: Mapping[str, list[Turn]]) -> Figures:
        figures: Figures = {}
        for unit, (second, suffix) in _UNITS.items():
            for each in self.still_in("ours", "peer", "limit"):
                figures[f"{each.name}, images/{second}"] = rate_of(turns[each.name], 1, unit=unit)
            pairs = itertools.product(self.still_in("ours"), self.still_in("peer", "limit"))
            for own, other in pairs:
                ratio = ratio_of(turns, other.name, own.name, unit=unit)
                figures[f"{own.name} / {other.name}{suffix}"] = ratio
        return figures

    def _rates_of_augmented(self, turns: Mapping[str, list[Turn]]) -> Figures:
        figures: Figures = {}
        plain = "none, fused"
        for name in (each.name for each in self.still_in("augmented")):
            figures[f"{name}: images/s"] = rate_of(turns[name], 1)
            figures[f"{name}: rate against none"] = ratio_of(turns, plain, name)
            by_cpu_time = ratio_of(turns, plain, name, unit="cpu_seconds")
            figures[f"{name}: rate by CPU time against none"] = by_cpu_time
        return figures

    def described(self, gaps: Mapping[str, Gap]) -> dict[str, dict[str, Any]]:
        """For the JSON: each contestant, and how far its images are from Pillow's."""
        described = {}
        for each in self.still_in("ours", "peer", "limit"):
            facts: dict[str, Any] = {"kind": each.kind, "what": each.about, "differs": each.differs}
            if each.name in gaps:
                facts["levels_from_pillow"] = dataclasses.asdict(gaps[each.name])
            described[each.name] = {name: fact for name, fact in facts.items() if fact}
        return described


def _prepare(contender: Contender, task: Task) -> None:
    if contender.prepare:
        with Worker(contender, task, prepare=True):
            pass
