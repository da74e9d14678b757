"""The sides of a race: `unicl-pretrain`, open_clip's program and sentence-transformers' trainer.

All train the same image encoder and a text encoder of the same size, on the same images, crops and
batch. Everything else is each side's own: optimizer, weight decay, fresh weights, order, loss.
The others read a list of files as their users write it: a row for each caption, or of five prompts.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicl_fast.config import TrainConfig
from unicl_fast.conversion.open_clip import CONFIG_FILE, WEIGHTS_FILE
from unicl_fast.dataset.reader import PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.untrusted_files import read_json

OPEN_CLIP = "open_clip"
SENTENCE_TRANSFORMERS = "sentence_transformers"
ROWS_OF_IMAGE = 5
"""Rows of an image in the others' list, with other texts each: COCO and Flickr have 5 captions."""
_OPEN_CLIP_RATIO = (3 / 4, 4 / 3)
_OPEN_CLIP_PRECISIONS = {"fp32": "fp32", "bf16": "amp_bfloat16", "fp16": "amp"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One side of a race."""

    name: str
    options: tuple[str, ...]
    """Options of its own training program."""

    @classmethod
    def parse(cls, text: str) -> Contestant:
        """Reads "NAME" or "NAME: OPTIONS"; how a name begins says whose program trains it."""
        name, _, options = text.partition(":")
        if not name.strip():
            raise ValueError(f"a contestant is NAME or NAME: OPTIONS, not {text!r}")
        return cls(name.strip(), tuple(shlex.split(options)))

    @property
    def peer(self) -> str:
        """Whose program trains it; empty for ours."""
        peers = OPEN_CLIP, SENTENCE_TRANSFORMERS
        return next((peer for peer in peers if self.name.startswith(peer)), "")


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is; the others count whole epochs of their list."""

    epochs: int
    steps_of_epoch: int
    batch_size: int

    @classmethod
    def nearest(cls, images: int, *, num_images: int, batch_size: int) -> Length:
        """The length nearest to `images` in which an image comes with every row in turn."""
        epochs = max(1, math.ceil(images / (ROWS_OF_IMAGE * num_images)))
        return cls(epochs, max(1, round(images / (epochs * batch_size))), batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.epochs * self.steps_of_epoch

    @property
    def images(self) -> int:
        """Images seen."""
        return self.steps * self.batch_size


def our_options(contestant: Contestant, length: Length, *, lr: float, seed: int) -> list[str]:
    """Options of `unicl-pretrain` beyond those that all runs of ours have in common."""
    return [
        *("--run.samples", str(length.images), "--run.seed", str(seed), "--run.trackers"),
        *("--run.evaluate-every-steps", "0", "--checkpoint.every-steps", "0"),
        *("--optim.lr", str(lr), "--optim.lr-batch-size", "0"),
        *contestant.options,
    ]


def open_clip_model(config: TrainConfig, start: Path | None = None) -> dict[str, Any]:
    """open_clip's description of the model that a config, or an export for open_clip, describes."""
    model, size = config.model, config.data.image_size
    drop_path = {"timm_drop_path": model.drop_path} if model.drop_path else {}
    if start is not None:
        found: dict[str, Any] = read_json(start / CONFIG_FILE)["model_cfg"]
        return found | {"vision_cfg": found["vision_cfg"] | drop_path}
    return {
        "embed_dim": model.embed_dim,
        "quick_gelu": model.text_activation == "quick_gelu",
        "vision_cfg": {
            "timm_model_name": model.image_encoder,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            **drop_path,
            "image_size": size,
        },
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            "width": model.text_width,
            "heads": model.text_heads,
            "layers": model.text_layers,
        },
    }


def open_clip_options(
    contestant: Contestant,
    config: TrainConfig,
    length: Length,
    *,
    rows: Path,
    out: Path,
    lr: float,
    seed: int,
    workers: int,
    precision: str,
    start: Path | None,
) -> list[str]:
    """Options of `open_clip_train.main` for the crops, batch, length and warm-up of a config.

    `start` is an export for open_clip whose weights it begins with.
    """
    data = config.data
    crops: dict[str, object] = {"scale": data.crop_scale}
    if data.crop_ratio != _OPEN_CLIP_RATIO:  # only timm's transforms, its option, take others
        crops |= {"use_timm": True, "ratio": data.crop_ratio}
    return [
        *("--train-data", str(rows), "--dataset-type", "csv", "--model", "race"),
        *("--batch-size", str(length.batch_size), "--epochs", str(length.epochs)),
        *("--lr", str(lr), "--warmup", str(round(config.optim.warmup_fraction * length.steps))),
        *("--seed", str(seed), "--workers", str(workers), "--device", "cpu"),
        *("--precision", _OPEN_CLIP_PRECISIONS[precision], "--log-every-n-steps", "10"),
        *("--image-mean", *map(str, data.mean), "--image-std", *map(str, data.std)),
        *("--aug-cfg", *(f"{name}={value}".replace(" ", "") for name, value in crops.items())),
        *("--logs", str(out), "--name", "open_clip", "--save-frequency", "0"),
        *(("--pretrained", str(start / WEIGHTS_FILE)) if start is not None else ()),
        *contestant.options,
    ]


def sentence_transformers_job(
    contestant: Contestant,
    config: TrainConfig,
    length: Length,
    *,
    rows: Path,
    lr: float,
    seed: int,
    start: Path,
) -> dict[str, Any]:
    """The job of `sentence_transformers_loop`, as the options of a contestant say.

    They are the name of a loss and its arguments, such as
    `CachedMultipleNegativesRankingLoss mini_batch_size=32`, or the trainer's `batch_sampler`, as
    JSON. `start` is an export for transformers.
    """
    data = config.data
    return {
        "start": str(start),
        "rows": str(rows),
        "loss": contestant.options or ["MultipleNegativesRankingLoss"],
        "crop": {"size": data.image_size, "scale": data.crop_scale, "ratio": data.crop_ratio},
        "arguments": {
            **{"per_device_train_batch_size": length.batch_size, "max_steps": length.steps},
            **{"learning_rate": lr, "seed": seed, "dataloader_drop_last": True, "use_cpu": True},
            "warmup_steps": round(config.optim.warmup_fraction * length.steps),
            "bf16": config.efficiency.precision == "bf16",
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        },
    }


class ImageList:
    """Images of packed data sets as files, and lists of them with texts, for the others."""

    def __init__(self, packed: Sequence[str], folder: Path) -> None:
        """Writes the image files once; `packed` are entries DIR or DIR=WEIGHT."""
        self.folder = folder
        parts = [entry.partition("=") for entry in packed]
        self._datasets = [PackedDataset(path) for path, _, _ in parts]
        sizes = np.array([len(dataset) for dataset in self._datasets], dtype=float)
        self.weights = sizes / sizes.sum()
        if any(weight for _, _, weight in parts):
            self.weights = np.array([float(weight) for _, _, weight in parts])
            self.weights /= self.weights.sum()
        self.num_images = int(sizes.sum())
        self._files = [self._write_images(number) for number in range(len(parts))]
        self._texts = [self._read_texts(dataset) for dataset in self._datasets]

    def _write_images(self, number: int) -> list[str]:
        """Writes a data set's images as they are stored, unless they are there."""
        dataset = self._datasets[number]
        folder = self.folder / f"images-{number}"
        make_folder(folder)
        names = []
        for index in range(len(dataset)):
            path = folder / f"{sample_key(index)}.image"
            if not path.exists():
                path.write_bytes(dataset.image_bytes(index, verify=True).tobytes())
            names.append(str(path.absolute()))
        return names

    @staticmethod
    def _read_texts(dataset: PackedDataset) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The captions of each sample, and the names of its labels."""
        reader, names = SampleReader(dataset), dataset.manifest.class_names
        described = [reader.read_description(index) for index in range(len(dataset))]
        reader.close()
        return [(one.captions, tuple(names[label] for label in one.labels)) for one in described]

    def write_rows(self, path: Path, count: int, *, seed: int) -> None:
        """Writes a list of `count` rows, in which images come equally often and texts vary."""
        generator = np.random.default_rng(seed)
        shares = np.floor(self.weights * count).astype(int)
        remainders = self.weights * count - shares
        shares[np.argsort(-remainders)[: count - shares.sum()]] += 1
        make_folder(path.parent)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["filepath", "title"])
            for number, share in enumerate(shares):
                files, texts = self._files[number], self._texts[number]
                templates = self._datasets[number].manifest.templates
                for turn in range(-(-share // len(files))):  # every image before any comes again
                    for index in generator.permutation(len(files))[: share - turn * len(files)]:
                        captions, labels = texts[index]
                        text = _draw_text(captions, labels, templates, turn + index, generator)
                        writer.writerow([files[index], text])


def _draw_text(
    captions: Sequence[str],
    labels: Sequence[str],
    templates: Sequence[str],
    turn: int,
    generator: np.random.Generator,
) -> str:
    """A caption, another in each turn, or a prompt of a label; by a coin where there are both."""
    if captions and (not labels or generator.random() < 0.5):
        return captions[turn % len(captions)]
    template = templates[int(generator.integers(len(templates)))]
    return template.replace("{}", labels[int(generator.integers(len(labels)))])


def register_open_clip_model(folder: Path, model: dict[str, Any]) -> None:
    """Makes open_clip know a model by the name race, and timm our encoders."""
    import open_clip

    import unicl_fast.models.small  # noqa: F401  registers its encoders
    from unicl_fast.models import vits

    vits.register(model["vision_cfg"]["timm_model_name"])
    description = folder / "race.json"  # the file's name is the model's
    description.write_text(json.dumps(model), encoding="utf-8")
    open_clip.add_model_config(description)
