"""Loaders that are killed and resumed: samples lost, doubled and out of order.

    unicl-bench resume [--kills 20] [--samples 1920] [--only unicl_fast grain] [--json FILE]

A loop records the ids of each step's samples and keeps the loader's own documented state every few
steps; all ranks are killed at a random moment, and resume from the last state as the loader's pages
say. Counted is what was trained on: steps up to each state that was resumed from, and steps after
the last. Each loader does so with 2 ranks of 2 workers, with those and 1 rank in turn, and with
those and 1 worker a rank in turn; on one data set, and on its mix of three. Where each rank has a
state of its own, a rank of more than before takes that of its number modulo theirs.
"""

import dataclasses
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from unicl_fast.system.bar import Bar
from unicl_fast.tools.diagnose.measuring import describe_machine

from ..harness import Program
from ..input.contenders import ContenderError, choose, reason_left_out
from .chain import Course, Layout, begin, prepare, run_chain, steps_of
from .contenders import RESUMERS, Resumer, Task
from .report import DATA, count, table

_BATCH = 48
_EVERY = 4
_MIX = 3
_USUAL = Layout(ranks=2, workers=2)
_LAYOUTS = {
    "same": (_USUAL,),
    "ranks": (_USUAL, Layout(ranks=1, workers=2)),
    "workers": (_USUAL, Layout(ranks=2, workers=1)),
}
_MOST_SAMPLES = 65_536 // _MIX // (2 * _BATCH) * (2 * _BATCH)
"""Two bytes of a record hold its id."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Program):
    """Kills loaders and resumes them: counts samples lost, doubled and out of order."""

    json: Path | None = None
    """File for the result as JSON."""
    kills: int = 20
    """Kills of each run."""
    samples: int = 1920
    """Samples of each data set, a multiple of 96, so that no epoch has an incomplete batch."""
    only: tuple[str, ...] = ("all",)
    """Loaders to try: unicl_fast, litdata, streaming, grain, webdataset, datasets, datasets-buffer,
    datasets-shuffle, torchdata; or all."""

    def run(self) -> None:
        if self.samples % (2 * _BATCH) or not 0 < self.samples <= _MOST_SAMPLES:
            raise ValueError(
                f"--samples must be a multiple of {2 * _BATCH} from {2 * _BATCH} to "
                f"{_MOST_SAMPLES}, not {self.samples}"
            )
        if self.kills < 1:
            raise ValueError(f"--kills must be at least 1, not {self.kills}")
        chosen = choose(self.only, RESUMERS)
        # killed ranks leave semaphores that this process's tracker frees; it would warn of each
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        contenders: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        total = len(chosen) * len(DATA) * (1 + len(_LAYOUTS))
        with (
            tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder,
            Bar(total=total, unit="run") as bar,
        ):
            for each in chosen:
                try:
                    chains = self._chains(each, Path(folder) / each.name, bar)
                except ContenderError as error:
                    left_out[each.name] = reason_left_out(each, error)
                else:
                    facts = {"what": each.about, "state": each.state}
                    contenders[each.name] = {**facts, "chains": chains}
        result = {"contenders": contenders, "left_out": left_out}
        print(f"\n{table(result)}", flush=True)
        if self.json is not None:
            packages = dict.fromkeys(name for each in chosen for name in each.packages)
            settings = {"kills": self.kills, "samples": self.samples, "only": self.only}
            settings |= {"batch_size": _BATCH, "steps_between_states": _EVERY}
            whole = {**result, "settings": settings, "machine": describe_machine(*packages)}
            self.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _chains(self, resumer: Resumer, folder: Path, bar: Bar) -> dict[str, Any]:
        """Counts and kills of each of a contestant's runs."""
        folder.mkdir()
        task = Task(folder=folder, num_sets=_MIX, samples=self.samples, batch_size=_BATCH)
        with _process(folder) as process:  # whose threads no rank is forked from
            process.submit(prepare, resumer, task).result()
        chains = {}
        with _process(folder) as process:
            for data in DATA:
                bar.set_description(f"{resumer.name}, {DATA[data]}")
                part = dataclasses.replace(task, num_sets=_MIX if data == "mix" else 1)
                num_steps = steps_of(self.kills, part.epoch_size // _BATCH)
                course = Course(kills=0, layouts=(_USUAL,), num_steps=num_steps, every=_EVERY)
                unbroken = process.submit(run_chain, resumer, part, course).result()
                bar.update()
                for how, layouts in _LAYOUTS.items():
                    killed = dataclasses.replace(course, kills=self.kills, layouts=layouts)
                    chain = process.submit(run_chain, resumer, part, killed).result()
                    counts = count(chain.steps, unbroken.steps, part.epoch_size)
                    facts = {"kills": chain.kills, "failure": chain.failure}
                    chains[f"{data}, {how}"] = {**dataclasses.asdict(counts), **facts}
                    bar.update()
        return chains


def _process(folder: Path) -> ProcessPoolExecutor:
    """A process of its own, which may fork ranks, and whose output goes into a file."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=begin, initargs=(folder,))
