r"""A prompt template drawn for each sample, as in the paper, or one for each class and batch.

    python -m unicl_fast.benchmarks.experiments templates --train packed/cifar10-train \
        --test packed/cifar10-test --out runs/objectives

With one template a class a batch of CIFAR-10 has ten texts to encode, whatever its size. The UniCL
runs of `objectives` are one side of the comparison: with the same --out they are not done again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .intervals import difference_of, mean_of
from .objectives import Encoder, accuracy_as_used, make_run
from .report import ExperimentSettings, Table, write_report
from .runs import Run, compare_rates, median_rate, run_all

_ARMS = {"one a sample": (), "one a class": ("--data.templates", "per_class")}


@dataclass(frozen=True, kw_only=True)
class Settings(ExperimentSettings):
    """Prompt templates: one for each sample, or one for each class and batch."""

    train: Path
    """CIFAR-10's training images, packed."""
    test: Path
    """Its test images, packed."""
    encoder: Encoder = "resnet9"
    """As in objectives."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each."""
    rounds: int = 5
    """Turns that each takes for the rate, on all cores; 0 measures none."""
    round_steps: int = 150
    """Steps of a turn."""


def run(settings: Settings) -> None:
    """Trains what is missing, measures the rates, and writes the table, the plot and numbers."""
    runs = {
        (name, seed): make_run(settings, settings.encoder, "unicl", seed, *options)
        for seed in settings.seeds
        for name, options in _ARMS.items()
    }
    rows = run_all(list(runs.values()), settings.out, jobs=settings.jobs)
    means = {
        name: mean_of(
            [
                100 * accuracy_as_used("unicl", rows[runs[name, seed].name])
                for seed in settings.seeds
            ]
        )
        for name in _ARMS
    }
    first, second = _ARMS
    differences = {}
    if len(settings.seeds) > 1:
        difference = difference_of(means[second].values, means[first].values)
        differences[f"{settings.encoder}: {second} - {first}"] = difference
    cells = {settings.encoder: means}
    table = Table(title="CIFAR-10 zero-shot top-1", unit="%", cells=cells, differences=differences)
    write_report("templates", settings, [table], rows, rate=_rates(settings))


def _rates(settings: Settings) -> dict[str, object]:
    """Images/s of one a class over one a sample, in short runs that take turns."""
    if settings.rounds == 0:
        return {}
    folder = settings.out / f"rates-{time.time_ns()}"
    rates: dict[str, list[float]] = {name: [] for name in _ARMS}
    for number in range(settings.rounds):
        for name, options in _ARMS.items():
            steps = (
                *("--run.steps", str(settings.round_steps), "--run.log-every-steps", "10"),
                "--data.evaluate",  # nothing: only the rate is wanted
            )
            whole = make_run(settings, settings.encoder, "unicl", 0, *options)
            short = Run(
                name=f"{number}/{name.replace(' ', '-')}", pretrain=(*whole.pretrain, *steps)
            )
            rates[name].append(_rate_of(short, folder))
    first, second = _ARMS
    return compare_rates(rates, second, first)


def _rate_of(run: Run, folder: Path) -> float:
    run_all([run], folder, jobs=1)
    return median_rate(run, folder)
