"""The published rows: how to prepare the data, the command of each, and its figure beside ours.

    python -m unicl_fast.benchmarks.experiments full-size --out runs/published

Nothing is trained here: these are commands for a cluster, printed as a script. A row's last line
writes OUT/ROW.json, whose figure stands in the table the next time. Published are ImageNet-1K top-1
accuracies from the paper's tables (arXiv 2204.03610) and the authors' list of models.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

PREPARATION = {
    "in1k-val": (
        "# ImageNet-1K: imagenet/train and imagenet/val as class folders named by WordNet ids",
        "unicl-pack build imagenet/val {small} --class-names imagenet --out {packed}/in1k-val",
    ),
    "in1k": ("unicl-pack build imagenet/train {small} --class-names imagenet --out {packed}/in1k",),
    "in21k": (
        "# ImageNet-21K as the paper has it: the 22K folders without those of the 1K classes, so",
        "# that ImageNet-1K stays unseen; WordNet's words.txt has an id, a tab and all names of a",
        "# class, of which the first is taken: the others would be read as part of each prompt",
        "mkdir in21k && comm -23 <(ls imagenet22k) <(ls imagenet/train) "
        "| xargs -I{{}} ln -s ../imagenet22k/{{}} in21k/{{}}",
        "grep -F -f <(ls in21k) words.txt | cut -d, -f1 > in21k-names.txt",
        "unicl-pack build in21k {small} --class-names in21k-names.txt --out {packed}/in21k",
    ),
    "gcc3m": (
        "# Conceptual Captions 3M, as img2dataset --output_format webdataset leaves it",
        "unicl-pack build cc3m/ {small} --out {packed}/gcc3m",
    ),
    "gcc15m": (
        "# Conceptual Captions 3M and 12M, likewise",
        "unicl-pack build cc3m/ cc12m/ {small} --out {packed}/gcc15m",
    ),
    "yfcc14m": (
        "# YFCC100M's 14 million images with English text, likewise",
        "unicl-pack build yfcc14m/ {small} --out {packed}/yfcc14m",
    ),
}
_SMALL = "--resize short:256"
_IN1K_SAMPLES = 300 * 1_281_167


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of the paper."""

    preset: str
    data: tuple[str, ...]
    """Names of packed data sets."""
    published: float
    """ImageNet-1K top-1 in %."""

    @property
    def name(self) -> str:
        """Encoder and data, for example swin-t-in21k-yfcc14m-halves."""
        encoder = "swin-t" if self.preset.startswith("swin-tiny") else "swin-b"
        halves = ("halves",) if self.preset.endswith("half-half") else ()
        return "-".join((encoder, *self.data, *halves))

    @property
    def sees_labels(self) -> bool:
        """Whether it trains on ImageNet-1K itself, so that its figure is not zero-shot."""
        return "in1k" in self.data

    def commands(self, settings: FullSize) -> list[list[str]]:
        """Training and evaluation."""
        run_folder = str(settings.out / self.name)
        held_out = str(settings.packed / "in1k-val")
        pretrain = ["unicl-pretrain", "--preset", self.preset]
        pretrain += ["--data.train", *(str(settings.packed / name) for name in self.data)]
        # Swin's own 300 epochs where ImageNet-1K's labels are learnt, the recipe's 32 elsewhere.
        # The paper does not say how long mixes with captions were trained: here an epoch covers all
        # of their samples.
        length = ["--run.samples", str(_IN1K_SAMPLES)] if self.sees_labels else []
        pretrain += ["--data.evaluate", held_out, *length]
        pretrain += ["--nproc", str(settings.nproc), "--out", run_folder, "--resume", "auto"]
        evaluate = ["unicl-eval", "zero-shot", "--checkpoint", run_folder, "--data", held_out]
        return [pretrain, [*evaluate, "--json", f"{run_folder}.json"]]


ROWS = (
    PublishedRow("swin-tiny", ("in1k",), 79.9),
    PublishedRow("swin-tiny", ("in1k", "gcc3m"), 80.2),
    PublishedRow("swin-tiny", ("in1k", "yfcc14m"), 81.1),
    PublishedRow("swin-tiny", ("in1k", "gcc15m"), 81.8),
    PublishedRow("swin-tiny", ("yfcc14m",), 30.1),
    PublishedRow("swin-tiny", ("in21k",), 28.5),
    PublishedRow("swin-tiny-half-half", ("in21k", "yfcc14m"), 36.4),
    PublishedRow("swin-tiny", ("in21k", "yfcc14m"), 40.5),
    PublishedRow("swin-base", ("in21k",), 29.9),
    PublishedRow("swin-base-half-half", ("in21k", "yfcc14m"), 41.1),
    PublishedRow("swin-base", ("in21k", "yfcc14m"), 44.3),
    PublishedRow("swin-base", ("in21k", "yfcc14m", "gcc15m"), 52.2),
)


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """Commands for the published rows, and a table of theirs and ours."""

    out: Path
    """Folder for the runs; ROW.json in it fills our column."""
    packed: Path = Path("packed")
    """Folder for the packed data sets."""
    nproc: int = 8
    """Ranks on each machine."""
    rows: tuple[str, ...] = ()
    """Names of rows; all by default."""

    def run(self) -> None:
        """Prints the script and the table; raises ValueError if there is no such row."""
        chosen = _chosen(self.rows)
        wanted = {name for row in chosen for name in row.data} | {"in1k-val"}
        for name, lines in PREPARATION.items():
            if name in wanted:
                print("\n".join(line.format(packed=self.packed, small=_SMALL) for line in lines))
        for row in chosen:
            print(f"\n# {row.name}: published {row.published}")
            print("\n".join(shlex.join(command) for command in row.commands(self)))
        print("\n" + "\n".join(f"# {line}" for line in table(self).splitlines()))


def table(settings: FullSize) -> str:
    """The rows as Markdown, with what was measured here beside what was published."""
    lines = ["| row | trained on | ImageNet-1K top-1 | published | here |", "|---|---|---|---|---|"]
    for row in _chosen(settings.rows):
        kind = "its labels learnt" if row.sees_labels else "zero-shot"
        half = " (half of each)" if row.preset.endswith("half-half") else ""
        sources = " + ".join(row.data) + half
        path, here = settings.out / f"{row.name}.json", ""
        if path.is_file():
            here = f"{100 * json.loads(path.read_text(encoding='utf-8'))['top1']:.1f}"
        lines.append(f"| {row.name} | {sources} | {kind} | {row.published} | {here} |")
    return "\n".join(lines)


def _chosen(names: tuple[str, ...]) -> list[PublishedRow]:
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)}; rows are {', '.join(known)}")
    return [known[name] for name in names or known]
