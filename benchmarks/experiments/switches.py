r"""CIFAR-10 with every switch of `efficiency` that a CPU gains by, and without any.

    python -m unicl_fast.benchmarks.experiments switches --train packed/cifar10-train \
        --test packed/cifar10-test --out runs/switches

The same seeds see the same images in the same order, so accuracies should differ by less than
those of seeds do, and rates by what the switches are worth. Runs go one after another, each on all
cores, in turns. Not on: compilation, which is slower on a CPU, and what BatchNorm forbids, which is
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .intervals import difference_of, mean_of
from .report import ExperimentSettings, Table, write_report
from .runs import Run, compare_rates, median_rate, run_all

_SAMPLES = 100_000
_PLAIN = (
    *("--efficiency.no-unique-texts", "--efficiency.text-layout", "padded"),
    *("--efficiency.loss", "dense", "--efficiency.no-fused-optimizer"),
    "--efficiency.no-channels-last",
)
_ARMS = {"all on": ("--efficiency.loss", "tiled"), "plain": _PLAIN}
"""At this batch `auto` would take the dense loss; tiles are what the switch is about."""


@dataclass(frozen=True, kw_only=True)
class Settings(ExperimentSettings):
    """The same training with what `efficiency` offers and without."""

    train: Path
    """CIFAR-10's training images, packed."""
    test: Path
    """Its test images, packed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each arm each."""
    jobs: int = 1
    """More would disturb the rates."""


def run(settings: Settings) -> None:
    """Trains what is missing, and writes accuracies, rates and their ratios."""
    runs = {(arm, seed): _make_run(settings, arm, seed) for seed in settings.seeds for arm in _ARMS}
    rows = run_all(list(runs.values()), settings.out, jobs=settings.jobs)
    last = {key: rows[run.name]["last"] for key, run in runs.items()}
    means = {
        arm: mean_of([100 * _accuracy(last[arm, seed]) for seed in settings.seeds]) for arm in _ARMS
    }
    on, plain = means.values()
    differences = {}
    if len(settings.seeds) > 1:
        differences["all on - plain"] = difference_of(on.values, plain.values)
    rates = {
        arm: [median_rate(runs[arm, seed], settings.out) for seed in settings.seeds]
        for arm in _ARMS
    }
    table = Table(
        title="CIFAR-10 zero-shot top-1",
        unit="%",
        cells={"cifar10-small": means},
        differences=differences,
    )
    write_report("switches", settings, [table], rows, rate=compare_rates(rates, *_ARMS))


def _make_run(settings: Settings, arm: str, seed: int) -> Run:
    data = ("--data.train", str(settings.train), "--data.evaluate", str(settings.test))
    length = (
        *("--run.samples", str(round(settings.length * _SAMPLES)), "--run.seed", str(seed)),
        *("--run.evaluate-every-steps", "0"),
    )
    return Run(
        name=f"{arm.replace(' ', '-')}/seed{seed}",
        pretrain=(
            *("--preset", "cifar10-small", *data, *length),
            *("--efficiency.precision", settings.precision, *_ARMS[arm]),
        ),
        execution=settings.execution(),
    )


def _accuracy(last: dict[str, float]) -> float:
    [name] = [name for name in last if name.endswith("/top1")]
    return last[name]
