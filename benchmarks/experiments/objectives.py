r"""Table 2 of the paper, small: CE, SupCon and UniCL, same encoder, crops, steps and images.

    unicl-pack build $DATA/cifar10/cifar10-train.zip --format raw --out packed/cifar10-train
    unicl-pack build $DATA/cifar10/cifar10-test.zip --format raw --out packed/cifar10-test
    python -m unicl_fast.benchmarks.experiments objectives --train packed/cifar10-train \
        --test packed/cifar10-test --out runs/objectives

The budget is what goes through the image encoder: SupCon's step sees two views of half as many
samples. All see crops and flips alone. Each is evaluated as it would be used (CE by its rows, UniCL
by its prompts, SupCon by a linear probe, having neither), and all by the same linear probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .intervals import Mean, difference_of, mean_of
from .report import ExperimentSettings, Table, write_report
from .runs import Row, Run, run_all

Encoder = Literal["resnet9", "swin6"]
ARMS = ("ce", "supcon", "unicl")
_NAMES = {"ce": "CE", "supcon": "SupCon", "unicl": "UniCL"}
_OPTIONS = {
    "ce": ("--objective.name", "ce"),
    "unicl": (),
    # the temperature of 0.1 that SupCon's authors take
    "supcon": (
        *("--objective.name", "supcon", "--data.augment", "none,views=2"),
        *("--model.no-learn-logit-scale", "--model.logit-scale-init", "2.302585"),
    ),
}
_BATCH_SIZE = 256
_PROBE_C = "1"  # where a search on such features ended; one fit instead of fourteen


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an encoder needs beside the preset cifar10-small."""

    images: int
    """That go through the image encoder in one run."""
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
class Settings(ExperimentSettings):
    """CE, SupCon and UniCL with the same encoder and the same number of images encoded."""

    train: Path
    """CIFAR-10's training images, packed."""
    test: Path
    """Its test images, packed."""
    encoders: tuple[Encoder, ...] = ("resnet9", "swin6")
    """unicl_resnet9_small and unicl_swin6_small, which see 28 x 28 of the 32 x 32 pixels."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each."""


def run(settings: Settings) -> None:
    """Trains what is missing, then writes the table, the plot and the numbers."""
    runs = {
        (encoder, arm, seed): make_run(settings, encoder, arm, seed)
        for seed in settings.seeds  # a stopped experiment has all arms of its first seeds
        for encoder in settings.encoders
        for arm in ARMS
    }
    rows = run_all(list(runs.values()), settings.out, jobs=settings.jobs)
    as_used, probed = (
        {
            (encoder, arm): mean_of(
                [100 * take(arm, rows[runs[encoder, arm, seed].name]) for seed in settings.seeds]
            )
            for encoder in settings.encoders
            for arm in ARMS
        }
        for take in (accuracy_as_used, _probe_accuracy)
    )
    write_report("objectives", settings, _tables(settings, as_used, probed), rows)


def make_run(settings: Settings, encoder: Encoder, arm: str, seed: int, *more: str) -> Run:
    """One arm's run with one seed."""
    recipe = _RECIPES[encoder]
    images = round(settings.length * recipe.images)
    share = 2 if arm == "supcon" else 1
    evaluated = ("--data.evaluate", str(settings.test)) if arm != "supcon" else ()
    data = ("--train", str(settings.train), "--data", str(settings.test))
    return Run(
        name="/".join([encoder, arm, *more[-1:], f"seed{seed}"]),
        pretrain=(
            *("--preset", "cifar10-small", "--data.train", str(settings.train), *evaluated),
            *recipe.options,
            *_OPTIONS[arm],
            *more,
            *("--run.global-batch-size", str(_BATCH_SIZE // share)),
            *("--run.samples", str(images // share), "--run.seed", str(seed)),
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


Means = dict[tuple[Encoder, str], Mean]


def _tables(settings: Settings, as_used: Means, probed: Means) -> list[Table]:
    tables = []
    for title, means in (("as it is used", as_used), ("linear probe", probed)):
        cells = {
            encoder: {_NAMES[arm]: means[encoder, arm] for arm in ARMS}
            for encoder in settings.encoders
        }
        differences = {
            f"{encoder}: UniCL - {_NAMES[arm]}": difference_of(
                means[encoder, "unicl"].values, means[encoder, arm].values
            )
            for encoder in settings.encoders
            for arm in ARMS[:2]
            if len(settings.seeds) > 1
        }
        tables.append(
            Table(title=f"CIFAR-10 top-1, {title}", unit="%", cells=cells, differences=differences)
        )
    return tables
