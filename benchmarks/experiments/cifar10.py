r"""Three experiments on CIFAR-10: objectives, prompt templates, and the switches of `efficiency`.

    unicl-pack build $DATA/cifar10/cifar10-train.zip --format raw --out packed/cifar10-train
    unicl-pack build $DATA/cifar10/cifar10-test.zip --format raw --out packed/cifar10-test
    data="--train packed/cifar10-train --test packed/cifar10-test"
    python -m unicl_fast.benchmarks.experiments objectives $data --out runs/objectives
    python -m unicl_fast.benchmarks.experiments templates $data --out runs/objectives
    python -m unicl_fast.benchmarks.experiments switches $data --out runs/switches

`objectives` is Table 2 of the paper, small: CE, SupCon and UniCL with the same encoder, crops,
steps and images. The budget is the number of images through the image encoder: SupCon's step sees
two views of half as many samples. All see crops and flips alone. Each is evaluated as it would be
used (CE by its rows, UniCL by its prompts, SupCon by a linear probe, having neither), and all by
the same linear probe.

`templates` draws a prompt template for each sample, as in the paper, or one for each class and
batch: then a batch of CIFAR-10 has ten texts to encode, whatever its size. The UniCL runs of
`objectives` are one side of the comparison: with the same --out they are not repeated.

`switches` trains with every switch of `efficiency` that a CPU gains by, and without any. The same
seeds see the same images in the same order, so accuracies should differ by less than those of
seeds do, and rates by what the switches gain. Runs follow each other, each on all cores, in turns.
Compilation is off, which is slower on a CPU, and micro-batches, which BatchNorm forbids.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .harness import (
    Difference,
    ExperimentSettings,
    Mean,
    Row,
    Run,
    Table,
    compare_rates,
    difference_of,
    mean_of,
    median_rate,
    run_all,
    write_report,
)

Encoder = Literal["resnet9", "swin6"]
OBJECTIVES = {"ce": "CE", "supcon": "SupCon", "unicl": "UniCL"}
_OPTIONS = {
    "ce": ("--objective.name", "ce"),
    "unicl": (),
    # the temperature of 0.1 of SupCon's authors
    "supcon": (
        *("--objective.name", "supcon", "--data.augment", "none,views=2"),
        *("--model.no-learn-logit-scale", "--model.logit-scale-init", "2.302585"),
    ),
}
_BATCH_SIZE = 256
_PROBE_C = "1"  # the result of a search on such features; one fit instead of fourteen

_TEMPLATES = {"one a sample": (), "one a class": ("--data.templates", "per_class")}
_SWITCH_SAMPLES = 100_000
_PLAIN = (
    *("--efficiency.no-unique-texts", "--efficiency.text-layout", "padded"),
    *("--efficiency.loss", "dense", "--efficiency.no-fused-optimizer"),
    "--efficiency.no-channels-last",
)
_SWITCHES = {"all on": ("--efficiency.loss", "tiled"), "plain": _PLAIN}
"""At this batch `auto` would take the dense loss; the switch is about tiles."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An encoder's changes of the preset cifar10-small."""

    images: int
    """Images through the image encoder in one run."""
    options: tuple[str, ...]


_RECIPES: dict[Encoder, Recipe] = {
    "resnet9": Recipe(
        images=640_000,
        options=(
            *("--model.image-encoder", "unicl_resnet9_small", "--optim.lr", "6e-3"),
            *("--optim.betas", "0.9", "0.98", "--optim.weight-decay", "0.3"),
        ),
    ),
    "swin6": Recipe(
        images=300_000,
        options=("--model.image-encoder", "unicl_swin6_small", "--optim.betas", "0.9", "0.98"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cifar10Settings(ExperimentSettings):
    """Options of the three experiments."""

    train: Path
    """CIFAR-10's training images, packed."""
    test: Path
    """Its test images, packed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each arm."""

    def differences(self, pairs: Mapping[str, tuple[Mean, Mean]]) -> dict[str, Difference]:
        """The first minus the second of each pair; none for a single seed."""
        if len(self.seeds) < 2:
            return {}
        return {name: difference_of(a.values, b.values) for name, (a, b) in pairs.items()}

    def mean(self, values: Sequence[float]) -> Mean:
        """The mean over seeds of accuracies, in %."""
        return mean_of([100 * value for value in values])


@dataclass(frozen=True, kw_only=True)
class Objectives(Cifar10Settings):
    """CE, SupCon and UniCL with the same encoder and the same number of images encoded."""

    encoders: tuple[Encoder, ...] = ("resnet9", "swin6")
    """unicl_resnet9_small and unicl_swin6_small, which see 28 x 28 of the 32 x 32 pixels."""

    def run(self) -> None:
        """Trains the missing runs, then writes the tables, the plot and the numbers."""
        runs = {
            (encoder, arm, seed): make_run(self, encoder, arm, seed)
            for seed in self.seeds  # a stopped experiment has all arms of its first seeds
            for encoder in self.encoders
            for arm in OBJECTIVES
        }
        rows = run_all(list(runs.values()), self.out, jobs=self.jobs)
        tables = []
        for title, take in (("as it is used", accuracy_as_used), ("linear probe", _probe_accuracy)):
            cells: dict[str, dict[str, Mean]] = {
                encoder: {
                    label: self.mean(
                        [take(arm, rows[runs[encoder, arm, seed].name]) for seed in self.seeds]
                    )
                    for arm, label in OBJECTIVES.items()
                }
                for encoder in self.encoders
            }
            differences = self.differences(
                {
                    f"{encoder}: UniCL - {label}": (means["UniCL"], means[label])
                    for encoder, means in cells.items()
                    for label in ("CE", "SupCon")
                }
            )
            title = f"CIFAR-10 top-1, {title}"
            tables.append(Table(title=title, unit="%", cells=cells, differences=differences))
        write_report("objectives", self, tables, rows)


def make_run(settings: Cifar10Settings, encoder: Encoder, arm: str, seed: int, *more: str) -> Run:
    """The run of one objective with one seed; `more` are more options."""
    recipe = _RECIPES[encoder]
    images = round(settings.length * recipe.images)
    views = 2 if arm == "supcon" else 1
    evaluated = ("--data.evaluate", str(settings.test)) if arm != "supcon" else ()
    data = ("--train", str(settings.train), "--data", str(settings.test))
    return Run(
        name="/".join([encoder, arm, *more[-1:], f"seed{seed}"]),
        pretrain=(
            *("--preset", "cifar10-small", "--data.train", str(settings.train), *evaluated),
            *recipe.options,
            *_OPTIONS[arm],
            *more,
            *("--run.global-batch-size", str(_BATCH_SIZE // views)),
            *("--run.samples", str(images // views), "--run.seed", str(seed)),
            *("--run.evaluate-every-steps", "0", "--checkpoint.every-steps", "500"),
            *("--efficiency.precision", settings.precision),
        ),
        execution=settings.execution(),
        evaluations={"probe": ("linear-probe", *data, "--c", _PROBE_C)},
    )


def accuracy_as_used(arm: str, row: Row) -> float:
    """CE's by its rows, UniCL's zero-shot by its prompts, SupCon's by a linear probe."""
    if arm == "supcon":
        return _probe_accuracy(arm, row)
    kind = "accuracy" if arm == "ce" else "zero_shot"
    [value] = [
        value
        for key, value in row["last"].items()
        if key.startswith(f"{kind}/") and key.endswith("/top1")
    ]
    return float(value)


def _probe_accuracy(arm: str, row: Row) -> float:
    return float(row["probe"]["top1"])


@dataclass(frozen=True, kw_only=True)
class Templates(Cifar10Settings):
    """Prompt templates: one for each sample, or one for each class and batch."""

    encoder: Encoder = "resnet9"
    """As in objectives."""
    rounds: int = 5
    """Turns of each for the rate, on all cores; 0 measures none."""
    round_steps: int = 150
    """Steps of a turn."""

    def run(self) -> None:
        """Trains the missing runs, measures the rates, and writes the report."""
        runs = {
            (name, seed): make_run(self, self.encoder, "unicl", seed, *options)
            for seed in self.seeds
            for name, options in _TEMPLATES.items()
        }
        rows = run_all(list(runs.values()), self.out, jobs=self.jobs)
        means = {
            name: self.mean(
                [accuracy_as_used("unicl", rows[runs[name, seed].name]) for seed in self.seeds]
            )
            for name in _TEMPLATES
        }
        first, second = _TEMPLATES
        table = Table(
            title="CIFAR-10 zero-shot top-1",
            unit="%",
            cells={self.encoder: means},
            differences=self.differences(
                {f"{self.encoder}: {second} - {first}": (means[second], means[first])}
            ),
        )
        write_report("templates", self, [table], rows, rate=self._rates())

    def _rates(self) -> dict[str, object]:
        """Images/s of one a class over one a sample, in short runs that take turns."""
        if self.rounds == 0:
            return {}
        folder = self.out / f"rates-{time.time_ns()}"
        steps = (
            *("--run.steps", str(self.round_steps), "--run.log-every-steps", "10"),
            "--data.evaluate",  # no data sets: only the rate matters
        )
        rates: dict[str, list[float]] = {name: [] for name in _TEMPLATES}
        for number in range(self.rounds):
            for name, options in _TEMPLATES.items():
                whole = make_run(self, self.encoder, "unicl", 0, *options)
                short = Run(
                    name=f"{number}/{name.replace(' ', '-')}", pretrain=(*whole.pretrain, *steps)
                )
                run_all([short], folder, jobs=1)
                rates[name].append(median_rate(short, folder))
        first, second = _TEMPLATES
        return compare_rates(rates, second, first)


@dataclass(frozen=True, kw_only=True)
class Switches(Cifar10Settings):
    """The same training with the switches of `efficiency` and without."""

    jobs: int = 1
    """More would disturb the rates."""

    def run(self) -> None:
        """Trains the missing runs, and writes accuracies, rates and their ratios."""
        runs = {(arm, seed): self._make_run(arm, seed) for seed in self.seeds for arm in _SWITCHES}
        rows = run_all(list(runs.values()), self.out, jobs=self.jobs)
        means = {
            arm: self.mean(
                [accuracy_as_used("unicl", rows[runs[arm, seed].name]) for seed in self.seeds]
            )
            for arm in _SWITCHES
        }
        rates = {
            arm: [median_rate(runs[arm, seed], self.out) for seed in self.seeds]
            for arm in _SWITCHES
        }
        on, plain = means.values()
        table = Table(
            title="CIFAR-10 zero-shot top-1",
            unit="%",
            cells={"cifar10-small": means},
            differences=self.differences({"all on - plain": (on, plain)}),
        )
        write_report("switches", self, [table], rows, rate=compare_rates(rates, *_SWITCHES))

    def _make_run(self, arm: str, seed: int) -> Run:
        samples = str(round(self.length * _SWITCH_SAMPLES))
        return Run(
            name=f"{arm.replace(' ', '-')}/seed{seed}",
            pretrain=(
                *("--preset", "cifar10-small", "--data.train", str(self.train)),
                *("--data.evaluate", str(self.test), "--run.samples", samples),
                *("--run.seed", str(seed), "--run.evaluate-every-steps", "0"),
                *("--efficiency.precision", self.precision, *_SWITCHES[arm]),
            ),
            execution=self.execution(),
        )
