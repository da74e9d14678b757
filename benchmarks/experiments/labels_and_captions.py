"""Labels alone, captions alone, or both: the same number of samples seen, five seeds.

    python -m unicl_fast.benchmarks.experiments labels-and-captions --data $DATA --out runs/mixture

$DATA is the folder that CONTRIBUTING.md calls the test data. Every fifth class of its Tiny ImageNet
is held back, with all its images; measured are zero-shot accuracy on these, on new images of the
classes that were learnt, and whether a held-out Flickr8k photograph finds one of its captions.
Words of some held-back classes occur in captions and among COCO's labels (refrigerator, goldfish,
cliff, bucket), as in any data: it is their images that no class of Tiny ImageNet has shown.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from .harness import (
    ExperimentSettings,
    Row,
    Run,
    Table,
    difference_of,
    mean_of,
    run_all,
    run_program,
    write_report,
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
# training sees 32 pixels: decoding photographs of 500 would be most of the time
_SMALL = ("--resize", "short:64", "--quality", "95")
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
        """Packs, trains the missing runs, then writes the tables, the plot and the numbers."""
        packed = self.out / "packed"
        pack(self.data, packed)
        runs = {
            (arm, seed): _make_run(self, packed, arm, seed) for seed in self.seeds for arm in _ARMS
        }
        rows = run_all(list(runs.values()), self.out, jobs=self.jobs)
        values = {
            title: {
                arm: mean_of(
                    [100 * rows[runs[arm, seed].name][evaluation][key] for seed in self.seeds]
                )
                for arm in _ARMS
            }
            for title, (evaluation, key) in _MEASURED.items()
        }
        differences = {
            f"{title}: both - {arm}": difference_of(means["both"].values, means[arm].values)
            for title, means in values.items()
            for arm in ("labels", "captions")
            if len(self.seeds) > 1
        }
        some_row = next(iter(rows.values()))
        chance = {
            title: 100 * _chance(some_row[evaluation], key)
            for title, (evaluation, key) in _MEASURED.items()
        }
        table = Table(
            title="held out", unit="%", cells=values, differences=differences, chance=chance
        )
        write_report("labels-and-captions", self, [table], rows)


def _chance(evaluated: Row, key: str) -> float:
    if key.startswith("top"):
        return int(key.removeprefix("top")) / int(evaluated["num_classes"])
    return round(float(evaluated[f"{key}_chance"]), 3)


def _make_run(settings: LabelsAndCaptions, packed: Path, arm: str, seed: int) -> Run:
    weights, text = _ARMS[arm]
    return Run(
        name=f"{arm}/seed{seed}",
        pretrain=(
            *("--preset", "mixed-small", *_RECIPE, "--data.text", text, "--data.train"),
            *(f"{packed / name}={weight}" for name, weight in weights.items()),
            *("--run.samples", str(round(settings.length * _SAMPLES)), "--run.seed", str(seed)),
            *("--efficiency.precision", settings.precision),
        ),
        execution=settings.execution(),
        evaluations={
            "held_back": ("zero-shot", "--data", str(packed / "tiny-held-back")),
            "learnt": ("zero-shot", "--data", str(packed / "tiny-learnt-new")),
            "retrieval": ("retrieval", "--data", str(packed / "flickr-new")),
        },
    )


def pack(data: Path, packed: Path) -> None:
    """Makes the lists and packs them; existing data sets are kept."""
    packed.mkdir(parents=True, exist_ok=True)
    tiny, flickr = data / "tiny-imagenet", data / "captions/flickr8k"
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
    in_zip = ("--image-root", str(tiny / "tiny-imagenet-200-subset.zip"), "--label-column", "words")
    for name, chosen in lists.items():
        source = packed / f"{name}.csv"
        with source.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(chosen)
        _build(source, packed / name, *in_zip)
    lines = (flickr / "captions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"flickr-train": lines[:_FLICKR_TRAIN], "flickr-new": lines[_FLICKR_TRAIN:]}
    for name, chosen_lines in parts.items():
        source = packed / f"{name}.jsonl"
        source.write_text("".join(chosen_lines), encoding="utf-8")
        _build(source, packed / name, "--image-root", str(flickr), *_SMALL)
    _build(data / "captions/coco/captions.jsonl", packed / "coco", *_SMALL)


def _build(source: Path, out: Path, *options: str) -> None:
    if (out / "manifest.json").is_file():
        return
    command = ("build", str(source), "--out", str(out), *options)
    run_program("pack", command, out.with_suffix(".log"), threads=1)
