"""Experiments that two CPU cores can train: three on CIFAR-10, two on Tiny ImageNet and others.

docs/results.md has their commands, designs and numbers. `run` of each trains the missing runs, then
writes the tables, the plot and the numbers. The UniCL runs of `objectives` are one side of
`templates`: with the same --out they are not repeated. `switches` leaves compilation off, which is
slower on a CPU, and micro-batches, which BatchNorm forbids. Words of some held-back classes of
`labels-and-captions` occur in captions and among COCO's labels (refrigerator, goldfish, cliff,
bucket), as in any data: it is their images that no class of Tiny ImageNet has shown.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .harness import (
    ExperimentSettings,
    Row,
    Run,
    compare_rates,
    mean_of,
    median_rate,
    run_all,
    run_program,
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


# images through the image encoder in one run, and changes of the preset cifar10-small
_RECIPES: dict[Encoder, tuple[int, tuple[str, ...]]] = {
    "resnet9": (
        640_000,
        (
            *("--model.image-encoder", "unicl_resnet9_small", "--optim.lr", "6e-3"),
            *("--optim.betas", "0.9", "0.98", "--optim.weight-decay", "0.3"),
        ),
    ),
    "swin6": (
        300_000,
        ("--model.image-encoder", "unicl_swin6_small", "--optim.betas", "0.9", "0.98"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cifar10Settings(ExperimentSettings):
    """Options of the three experiments on CIFAR-10."""

    train: Path
    """CIFAR-10's training images, packed."""
    test: Path
    """Its test images, packed."""


@dataclass(frozen=True, kw_only=True)
class Objectives(Cifar10Settings):
    """CE, SupCon and UniCL with the same encoder and the same number of images encoded."""

    encoders: tuple[Encoder, ...] = ("resnet9", "swin6")
    """unicl_resnet9_small and unicl_swin6_small, which see 28 x 28 of the 32 x 32 pixels."""

    def run(self) -> None:
        arms = [(encoder, arm) for encoder in self.encoders for arm in OBJECTIVES]
        rows = self.train_arms(arms, lambda arm, seed: make_run(self, *arm, seed))
        tables = []
        for title, take in (("as it is used", accuracy_as_used), ("linear probe", _probe_accuracy)):
            cells = {
                encoder: {
                    label: mean_of([take(arm, row) for row in rows[encoder, arm]])
                    for arm, label in OBJECTIVES.items()
                }
                for encoder in self.encoders
            }
            pairs = {
                f"{encoder}: UniCL - {label}": (means["UniCL"], means[label])
                for encoder, means in cells.items()
                for label in ("CE", "SupCon")
            }
            tables.append(self.table(f"CIFAR-10 top-1, {title}", cells, pairs))
        write_report("objectives", self, tables, rows)


def make_run(settings: Cifar10Settings, encoder: Encoder, arm: str, seed: int, *more: str) -> Run:
    """The run of one objective with one seed; `more` are more options."""
    images, recipe = _RECIPES[encoder]
    images = round(settings.length * images)
    views = 2 if arm == "supcon" else 1
    evaluated = ("--data.evaluate", str(settings.test)) if arm != "supcon" else ()
    data = ("--train", str(settings.train), "--data", str(settings.test))
    return Run(
        name="/".join([encoder, arm, *more[-1:], f"seed{seed}"]),
        pretrain=(
            *("--preset", "cifar10-small", "--data.train", str(settings.train), *evaluated),
            *recipe,
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
    """Top-1 in %: CE by its rows, UniCL zero-shot by its prompts, SupCon by a linear probe."""
    if arm == "supcon":
        return _probe_accuracy(arm, row)
    kind = "accuracy/" if arm == "ce" else "zero_shot/"
    [name] = [name for name in row["last"] if name.startswith(kind) and name.endswith("/top1")]
    return 100 * float(row["last"][name])


def _probe_accuracy(arm: str, row: Row) -> float:
    return 100 * float(row["probe"]["top1"])


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
        rows = self.train_arms(_TEMPLATES, self._make_run)
        means = {
            arm: mean_of([accuracy_as_used("unicl", row) for row in rows[arm]]) for arm in rows
        }
        first, second = _TEMPLATES
        pairs = {f"{self.encoder}: {second} - {first}": (means[second], means[first])}
        table = self.table("CIFAR-10 zero-shot top-1", {self.encoder: means}, pairs)
        write_report("templates", self, [table], rows, rate=self._rates())

    def _make_run(self, arm: str, seed: int) -> Run:
        return make_run(self, self.encoder, "unicl", seed, *_TEMPLATES[arm])

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
            for name in _TEMPLATES:
                options = (*self._make_run(name, 0).pretrain, *steps)
                short = Run(name=f"{number}/{name.replace(' ', '-')}", pretrain=options)
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
        rows = self.train_arms(_SWITCHES, self._make_run)
        means = {
            arm: mean_of([accuracy_as_used("unicl", row) for row in rows[arm]]) for arm in rows
        }
        rates = {
            arm: [median_rate(self._make_run(arm, seed), self.out) for seed in self.seeds]
            for arm in _SWITCHES
        }
        pairs = {"all on - plain": (means["all on"], means["plain"])}
        table = self.table("CIFAR-10 zero-shot top-1", {"cifar10-small": means}, pairs)
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


_HELD_BACK = 5  # every fifth class
_FLICKR_TRAIN = 600
_SAMPLES = 32_000

# data sets with their weights in a batch, and which text a sample with both shows
_ARMS = {
    "labels": ({"tiny-learnt": 0.9, "coco": 0.1}, "labels"),
    "captions": ({"flickr-train": 0.85, "coco": 0.15}, "captions"),
    "both": ({"tiny-learnt": 0.45, "flickr-train": 0.45, "coco": 0.1}, "any"),
}
# beside the preset mixed-small; 32 of 64 pixels let fifteen runs fit into half an hour
_RECIPE = (
    *("--model.image-encoder", "unicl_resnet9_small", "--data.image-size", "32"),
    *("--data.evaluation-resize", "36", "--run.evaluate-every-steps", "0"),
    *("--checkpoint.every-steps", "0"),
)


_MEASURED = {
    "zero-shot top-1, held-back classes": ("held_back", "top1"),
    "zero-shot top-5, held-back classes": ("held_back", "top5"),
    "zero-shot top-1, learnt classes": ("learnt", "top1"),
    "image finds a caption, in 10 of 500": ("retrieval", "image_to_text_recall_at_10"),
    "caption finds its image, in 10 of 100": ("retrieval", "text_to_image_recall_at_10"),
}


@dataclass(frozen=True, kw_only=True)
class LabelsAndCaptions(ExperimentSettings):
    """Labels, captions, and both, at an equal number of samples seen."""

    data: Path
    """Folder with tiny-imagenet, captions/flickr8k and captions/coco."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of each arm."""

    def run(self) -> None:
        pack(self.data, self.out / "packed")
        rows = self.train_arms(_ARMS, self.make_run)
        self.report("labels-and-captions", rows, [("both", arm) for arm in _ARMS if arm != "both"])

    def weights(self, arm: str) -> dict[str, float]:
        """The packed data sets of an arm, with their weights in a batch."""
        return _ARMS[arm][0]

    def make_run(self, arm: str, seed: int, name: str = "", *more: str) -> Run:
        """The run of an arm with one seed; `more` are more options, and `name` is theirs."""
        packed = self.out / "packed"
        return Run(
            name=f"{name or arm}/seed{seed}".replace(", ", "-").replace(" ", "-"),
            pretrain=(
                *("--preset", "mixed-small", *_RECIPE, "--data.text", _ARMS[arm][1]),
                *("--data.train", *(f"{packed / n}={w}" for n, w in self.weights(arm).items())),
                *("--run.samples", str(round(self.length * _SAMPLES)), "--run.seed", str(seed)),
                *("--efficiency.precision", self.precision, *more),
            ),
            execution=self.execution(),
            evaluations={
                "held_back": ("zero-shot", "--data", str(packed / "tiny-held-back")),
                "learnt": ("zero-shot", "--data", str(packed / "tiny-learnt-new")),
                "retrieval": ("retrieval", "--data", str(packed / "flickr-new")),
            },
        )

    def report(
        self,
        name: str,
        rows: dict[str, list[Row]],
        compared: list[tuple[str, str]],
        **more: object,
    ) -> None:
        """Writes what was measured of each arm, and the first minus the second of pairs of arms."""
        cells = {
            title: {arm: mean_of([100 * row[evaluation][key] for row in rows[arm]]) for arm in rows}
            for title, (evaluation, key) in _MEASURED.items()
        }
        pairs = {
            f"{title}: {one} - {other}": (means[one], means[other])
            for title, means in cells.items()
            for one, other in compared
        }
        [some_row, *_] = next(iter(rows.values()))
        chance = {
            title: 100 * _chance(some_row[evaluation], key)
            for title, (evaluation, key) in _MEASURED.items()
        }
        write_report(name, self, [self.table("held out", cells, pairs, chance)], rows, **more)


def _chance(evaluated: Row, key: str) -> float:
    if key.startswith("top"):
        return int(key.removeprefix("top")) / int(evaluated["num_classes"])
    return round(float(evaluated[f"{key}_chance"]), 3)


def pack(data: Path, packed: Path, *, side: int = 64, templates: str = "imagenet") -> None:
    """Makes the lists and packs them; existing data sets are kept.

    Photographs are stored with `side` pixels on the shorter side, twice as many as training sees:
    decoding those of 500 would be most of the time.
    """
    packed.mkdir(parents=True, exist_ok=True)
    tiny = data / "tiny-imagenet"
    with (tiny / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    held_back = set(sorted({row["wnid"] for row in rows})[::_HELD_BACK])
    lists = {
        "tiny-held-back": [row for row in rows if row["wnid"] in held_back],
        **{
            name: [row for row in rows if row["wnid"] not in held_back and row["split"] == split]
            for name, split in (("tiny-learnt", "train"), ("tiny-learnt-new", "val"))
        },
    }
    pack_lists(lists, tiny, packed, templates=templates)
    pack_captions(data, packed, side=side)


def pack_captions(data: Path, packed: Path, *, side: int) -> None:
    """Packs Flickr8k in two parts, and COCO; existing data sets are kept."""
    small = ("--resize", f"short:{side}", "--quality", "95")
    flickr = data / "captions/flickr8k"
    lines = (flickr / "captions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"flickr-train": lines[:_FLICKR_TRAIN], "flickr-new": lines[_FLICKR_TRAIN:]}
    for name, chosen_lines in parts.items():
        source = packed / f"{name}.jsonl"
        source.write_text("".join(chosen_lines), encoding="utf-8")
        build_once(source, packed / name, "--image-root", str(flickr), *small)
    build_once(data / "captions/coco/captions.jsonl", packed / "coco", *small)


def pack_lists(
    lists: Mapping[str, list[Row]],
    tiny: Path,
    packed: Path,
    *more: str,
    label: str = "words",
    templates: str = "",
) -> None:
    """Packs rows of Tiny ImageNet's labels.csv, under the names that they have."""
    archive = str(tiny / "tiny-imagenet-200-subset.zip")
    options = ["--image-root", archive, "--label-column", label, *more]
    if templates:
        options += ["--templates", templates]
    for name, chosen in lists.items():
        source = packed / f"{name}.csv"
        with source.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(chosen[0]))
            writer.writeheader()
            writer.writerows(chosen)
        build_once(source, packed / name, *options)


def build_once(source: Path, out: Path, *options: str) -> None:
    """Packs a data set unless it is there."""
    if (out / "manifest.json").is_file():
        return
    command = ("build", str(source), "--out", str(out), *options)
    run_program("pack", command, out.with_suffix(".log"), threads=1)
