"""CPU time to an accuracy: what makes training cheaper, each alone and all together.

Every lever is given a part of the preset's samples, and has to reach the preset's accuracy. CPU
time is that of the steps, and of storing features, which other programs on the machine change
little: a dry run tells what of a program's time is its start. Evaluations come after it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .first_weights import write_templates
from .harness import ExperimentSettings, Mean, Row, Run, mean_of, run_program, write_report
from .small_size import build_once

_CIFAR10 = ("--preset", "cifar10-small", "--run.global-batch-size", "128")
_MUON = ("--optim.name", "muon")
_TWICE_THE_RATE = ("--optim.lr", "4e-3")
_SMALL_FIRST = ("--run.stages", "0.75:image_size=20")


class Arm(NamedTuple):
    """A way to train."""

    length: float = 1.0
    """Part of the task's samples."""
    options: tuple[str, ...] = ()
    """Beside the task's."""
    stores: bool = False
    """Store the features of the images, crops and flips left out, instead of encoding in steps."""


class Task(NamedTuple):
    """A data set, a preset, and ways to train it; the first is the preset's."""

    data: str
    samples: int
    options: tuple[str, ...]
    arms: Mapping[str, Arm]


TASKS = {
    "CIFAR-10": Task(
        "cifar10",
        19_200,
        _CIFAR10,
        {
            "preset": Arm(),
            "half": Arm(0.5),
            "small images first": Arm(1, _SMALL_FIRST),
            "muon, half": Arm(0.5, _MUON),
            "all, half": Arm(0.5, (*_MUON, *_SMALL_FIRST)),
        },
    ),
    "CIFAR-10, longer": Task(
        "cifar10",
        57_600,
        _CIFAR10,
        {
            "preset": Arm(),
            "half": Arm(0.5),
            "half, rate x2": Arm(0.5, _TWICE_THE_RATE),
            "muon, half": Arm(0.5, _MUON),
            "muon, half, rate x2": Arm(0.5, (*_MUON, *_TWICE_THE_RATE)),
            "muon, 0.4, rate x2": Arm(0.4, (*_MUON, *_TWICE_THE_RATE)),
            "all, half, rate x2": Arm(
                0.5, (*_MUON, *_TWICE_THE_RATE, "--run.stages", "0.4:image_size=20")
            ),
        },
    ),
    "CIFAR-10, ViT": Task(
        "cifar10",
        9_600,
        (
            *(*_CIFAR10, "--model.image-encoder", "test_vit", "--optim.lr", "1e-3"),
            *("--data.image-size", "128", "--data.evaluation-resize", "146"),
        ),
        {"preset": Arm(), "token drop": Arm(1, ("--run.stages", "0.9:token_drop=0.5"))},
    ),
    "Tiny ImageNet": Task(
        "tiny",
        7_680,
        (
            *("--preset", "photos-small", "--run.global-batch-size", "64", "--optim.lr", "1.5e-3"),
            *("--data.image-size", "64", "--data.evaluation-resize", "64"),
        ),
        {
            "preset": Arm(),
            "stored": Arm(stores=True),
            "stored, short texts": Arm(1, ("--run.stages", "0.75:context_length=12"), stores=True),
            "stored, half": Arm(0.5, stores=True),
            "stored, muon, half": Arm(0.5, _MUON, stores=True),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class TimeToAccuracy(ExperimentSettings):
    """CPU seconds and accuracy of presets, and of what may make them cheaper."""

    data: Path
    """Folder with cifar10 and tiny-imagenet."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Those to do."""

    def run(self) -> None:
        packed = self._pack()
        tables, ratios = [], {}
        done: dict[tuple[str, str], list[Row]] = {}
        for name in self.tasks:
            accuracy, seconds, rows = self._do(name, packed)
            preset, *others = rows
            ratios[name] = {arm: seconds[arm].mean / seconds[preset].mean for arm in rows}
            for what, means, unit in (
                ("zero-shot top-1", accuracy, "%"),
                ("training", seconds, "CPU seconds"),
            ):
                pairs = {f"{arm} - {preset}": (means[arm], means[preset]) for arm in others}
                tables.append(self.table(what, {name: means}, pairs, unit=unit))
            done |= {(name, arm): rows[arm] for arm in rows}
        write_report("time-to-accuracy", self, tables, done, cpu_time_ratios=ratios)

    def _do(
        self, name: str, packed: Path
    ) -> tuple[dict[str, Mean], dict[str, Mean], dict[str, list[Row]]]:
        """Accuracy, CPU seconds and rows of each arm of a task."""

        def make_run(arm: str, seed: int) -> Run:
            return self._make_run(name, arm, seed, packed)

        rows = self.train_arms(TASKS[name].arms, make_run)
        accuracy = {arm: mean_of([100 * row["new"]["top1"] for row in rows[arm]]) for arm in rows}
        # starts of two arms differ by no more than two of one
        start = fmean(self._start_seconds(make_run(arm, self.seeds[0])) for arm in rows)
        seconds = {
            arm: mean_of([row["train_cpu_seconds"] - start for row in rows[arm]]) for arm in rows
        }
        return accuracy, seconds, rows

    def _start_seconds(self, run: Run) -> float:
        """CPU seconds of a run before its first step, without those of storing features."""
        folder = self.out / run.name
        options = (*run.pretrain, *run.execution, "--out", str(folder / "dry"), "--dry-run")
        return run_program("pretrain", options, folder / "start.log", threads=1)

    def _make_run(self, name: str, arm: str, seed: int, packed: Path) -> Run:
        task, chosen = TASKS[name], TASKS[name].arms[arm]
        folder = f"{name}/{arm}/seed{seed}".replace(" ", "-").replace(",", "")
        train = packed / task.data
        stored = (
            *("--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1"),
            *("--data.flip-probability", "0"),
            *("--efficiency.image-features", str(self.out / "features" / folder)),
        )
        samples = round(self.length * chosen.length * task.samples)
        return Run(
            name=folder,
            pretrain=(
                *(*task.options, *chosen.options, *(stored if chosen.stores else ())),
                *("--data.train", str(train), "--run.samples", str(samples)),
                *("--run.seed", str(seed), "--run.evaluate-every-steps", "0"),
                *("--checkpoint.every-steps", "0", "--efficiency.precision", self.precision),
            ),
            execution=self.execution(),
            evaluations={"new": ("zero-shot", "--data", f"{train}-new")},
        )

    def _pack(self) -> Path:
        """Packs what is missing; of CIFAR-10's test images every fifth."""
        packed = self.out / "packed"
        templates = ("--templates", str(write_templates(packed)))
        cifar10, tiny = self.data / "cifar10", self.data / "tiny-imagenet"
        archive = cifar10 / "cifar10-test.zip"
        with zipfile.ZipFile(archive) as file:
            images = [one for one in file.namelist() if one.endswith(".jpg")][::5]
        listed = packed / "cifar10-new.csv"
        lines = ["image,label", *(f"{image},{image.split('/')[1]}" for image in images)]
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        build_once(cifar10 / "cifar10-train.zip", packed / "cifar10", "--format", "raw")
        build_once(listed, packed / "cifar10-new", "--format", "raw", "--image-root", str(archive))
        for split, name in (("train", "tiny"), ("val", "tiny-new")):
            build_once(
                *(tiny / "labels.csv", packed / name, "--where", f"split={split}", *templates),
                *("--label-column", "words", "--image-root"),
                str(tiny / "tiny-imagenet-200-subset.zip"),
            )
        return packed
