"""Changes that may make a run faster, each measured in turns with the run as it is.

`candidates` chooses by the settings what is worth a try here. A change of the loader is a
loader of its own, one of the step a trainer of its own, one of the images a small data set that is
packed anew.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.images.check import check_image
from unicl_fast.images.codec import ImageError
from unicl_fast.training.data import build_prompts

from ..harness import in_turns
from .bench import Bench, Parts, step_cost, steps_within
from .clocks import median_ratio
from .model import SAME, Cost, Variant

_ROUNDS = 3
_COPIED_SAMPLES = 384
_SMALLEST_BATCH = 64
"""Local batches below this are tried larger."""


def candidates(bench: Bench) -> list[Variant]:
    """Changes worth a try with these settings; of one stage, those first that may gain the most."""
    return [*_of_step(bench), *_of_batch(bench), *_more_threads(bench), *_of_images(bench),
            *_of_loader(bench)]  # fmt: skip


def _switch(bench: Bench, group: str, name: str, value: Any, about: str, **more: Any) -> Variant:
    option = f"--{group}.{name.replace('_', '-')} {value}"
    if isinstance(value, bool):
        option = f"--{group}.{'' if value else 'no-'}{name.replace('_', '-')}"
    return Variant(option=option, about=about, set={group: {name: value}}, **more)


def _of_step(bench: Bench) -> Iterator[Variant]:
    efficiency, device = bench.config.efficiency, bench.device.type
    make = functools.partial(_switch, bench, "efficiency", side="step", stage="image encoder")
    other = "bf16" if efficiency.precision in ("fp32", "fp64") else "fp32"
    yield make("precision", other, "arithmetic of the encoders; rounds differently")
    if efficiency.activation_checkpointing:
        yield make("activation_checkpointing", False, "keeps activations; takes more memory")
    if 0 < efficiency.micro_batch_size < bench.local_batch:
        yield make("micro_batch_size", 0, "encodes each image once; takes more memory")
    if efficiency.loss != "auto":
        yield make("loss", "auto", "the fastest form of the loss here")
    if efficiency.compile == "off" and device == "cuda":
        yield make("compile", "blocks", "compiled encoders; a minute more at the start")


def _more_threads(bench: Bench) -> Iterator[Variant]:
    if bench.config.data.threads < int(bench.cores):
        yield _switch(
            bench, "data", "threads", int(bench.cores), "a thread for each core",
            side="loader", stage=f"{bench.loader_parts.image_kind} decode",
        )  # fmt: skip


def _of_loader(bench: Bench) -> Iterator[Variant]:
    data = bench.config.data
    make = functools.partial(_switch, bench, "data", side="loader")
    decode = f"{bench.loader_parts.image_kind} decode"
    if data.threads >= max(2, bench.cores):
        yield make("threads", data.threads // 2, "fewer decoding threads", stage=decode)
    if bench.loader.augmentation is not None and bench.loader.plan.num_views == 1:
        yield Variant(
            option="--data.augment none", about="crops and flips alone", stage="augment",
            side="loader", set={"data": {"augment": ()}}, same_results=False,
        )  # fmt: skip
    if data.resample == "dali" and bench.device.type == "cpu":
        yield make("resample", "fused", "our operators", stage="resize and flip")
    if data.prefetch:
        yield make("prefetch", 0, "as many batches ahead as fit their size", stage=decode)
    else:
        yield make("prefetch", 4, "more batches ahead", stage=decode)
    if bench.device.type == "cuda":
        other = "cpu" if bench.loader_parts.decode_device.type == "cuda" else "gpu"
        yield make("decode_device", other, "levels differ a little", stage=decode)


def _of_batch(bench: Bench) -> Iterator[Variant]:
    prompts, data = bench.parts.prompts, bench.config.data
    several = int(max(prompts.num_templates, default=1)) > 1
    if bench.config.objective.name == "unicl" and several and data.templates == "per_sample":
        yield _switch(
            bench, "data", "templates", "per_class", "as many prompts to encode as classes",
            side="both", stage="text encoder", same_results=False,
        )  # fmt: skip
    if bench.local_batch < _SMALLEST_BATCH:
        factor = max(2, _SMALLEST_BATCH // bench.local_batch)
        size = factor * bench.config.run.global_batch_size
        yield _switch(
            bench, "run", "global_batch_size", size, "fixed costs of a step are shared by more",
            side="both", stage="local batch", same_results=False, batch_factor=factor,
        )  # fmt: skip


def _of_images(bench: Bench) -> Iterator[Variant]:
    if bench.loader.form != "files" or len(bench.parts.datasets) > 1:
        return
    rows = bench.parts.datasets[0].samples[:1000]
    short = float(min(rows["height"].mean(), rows["width"].mean()))
    side = -(-bench.config.data.image_size * 8 // 7 // 8) * 8  # 256 for 224
    kind = bench.loader_parts.image_kind
    make = functools.partial(Variant, side="images", stage=f"{kind} decode", same_results=False)
    if short > 1.2 * side:
        yield make(
            option=f"unicl-pack build SOURCES --resize short:{side} --out DIR",
            about="images that are no larger than crops need",
            packing={"short_side": side, "format": "jpeg"},
        )
    elif kind in ("PNG", "WebP"):
        yield make(
            option="unicl-pack build SOURCES --format jpeg --out DIR",
            about=f"JPEGs are decoded faster than {kind}",
            packing={"format": "jpeg"},
        )
    yield make(
        option=f"unicl-pack build SOURCES --resize square:{side} --format raw --out DIR",
        about="nothing is decoded; more bytes are read",
        packing={"square_side": side, "format": "raw"},
    )


# Measuring.


class Trials:
    """Measures candidates one after the other."""

    def __init__(self, bench: Bench, batch: Any, *, folder: Path, seconds: float) -> None:
        """`seconds` is what one turn takes."""
        self.bench, self.batch, self.folder, self.seconds = bench, batch, folder, seconds
        self.steps = steps_within(bench.trainer, batch, seconds)

    def measure(self, one: Variant) -> Variant | str:
        """The variant with its ratios; or why there is none."""
        loader = step = SAME
        data: tuple[str, ...] = ()
        try:
            config = self.bench.changed(one.set)
            if one.side == "images":
                packed = self._packed(one)
                data = (str(packed),)
                loader = self._loader_ratio(config, packed)
            if one.side in ("loader", "both"):
                loader = self._loader_ratio(config)
            if one.side in ("step", "both"):
                step = self._step_ratio(config, new_batch=one.side == "both")
        except (ValueError, ImageError) as error:
            return f"{one.option}: {error}"
        except torch.OutOfMemoryError:
            return f"{one.option}: does not fit into the memory next to the run's own model"
        return dataclasses.replace(one, loader=loader, step=step, data=data)

    def _loader_ratio(self, config: TrainConfig, packed: Path | None = None) -> Cost:
        bench = self.bench
        parts = None
        if packed is not None:
            dataset = PackedDataset(packed)
            parts = Parts([dataset], None, build_prompts([dataset], config))
        loaders = {
            "now": (bench.loader, bench.config),
            "then": (bench.new_loader(config, parts), config),
        }
        works = {
            name: functools.partial(bench.loader_cost, *pair, seconds=self.seconds)
            for name, pair in loaders.items()
        }
        try:
            turns = in_turns(works, rounds=_ROUNDS)
        finally:
            if parts is not None:
                parts.datasets[0].close()
        return median_ratio(turns["then"], turns["now"])

    def _step_ratio(self, config: TrainConfig, *, new_batch: bool) -> Cost:
        bench, batch = self.bench, self.batch
        if new_batch:
            batch = bench.kept_batch(bench.new_loader(config))
        other = bench.other_trainer(config, batch)
        steps = steps_within(other, batch, self.seconds)
        works: dict[str, Callable[[], Cost]] = {
            "now": lambda: step_cost(bench.trainer, self.batch, count=self.steps),
            "then": lambda: step_cost(other, batch, count=steps),
        }
        turns = in_turns(works, rounds=_ROUNDS)
        return median_ratio(turns["then"], turns["now"])

    def _packed(self, one: Variant) -> Path:
        """The first samples of the data set, packed anew; they are a random part of it."""
        out = self.folder / "-".join(str(value) for value in one.packing.values())
        if not out.exists():
            pack_again(self.bench.parts.datasets[0], out, count=_COPIED_SAMPLES, **one.packing)
        return out


def pack_again(dataset: PackedDataset, out: Path, *, count: int, **image: Any) -> None:
    """Packs the first `count` samples with other images: `image` are arguments of `check_image`."""
    manifest = dataset.manifest
    form: Literal["raw", "encoded"] = "raw" if image.get("format") == "raw" else "encoded"
    shutil.rmtree(out, ignore_errors=True)
    with DatasetWriter(out, images=form) as writer:
        for index in range(min(count, len(dataset))):
            row = dataset.samples[index]
            made = check_image(bytes(dataset.image_bytes(index)), **image)
            captions = range(int(row["captions_count"]))
            writer.add(
                PackedSample(
                    image=made.data,
                    extension=made.extension,
                    height=made.height,
                    width=made.width,
                    xxh3=xxhash.xxh3_64_intdigest(made.data),
                    captions=["" for _ in captions],
                    tokens=[dataset.caption_tokens(index, which) for which in captions],
                    labels=dataset.labels_of(index).tolist(),
                )
            )
        writer.finish(
            tokenizer=manifest.tokenizer,
            vocabulary_hash=manifest.vocabulary_hash,
            context_length=manifest.context_length,
            class_names=manifest.class_names,
            templates=manifest.templates,
            source=["unicl-bench run"],
            seed=0,
            tool_version="0",
        )
