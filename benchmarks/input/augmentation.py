"""What augmentation costs the input pipeline on the CPU, and what DALI's own operators would.

    unicl-bench augment --data PACKED [--json FILE]

The same images leave loaders with and without augmentation, with the fused operator and with
DALI's; first the two are compared on a batch, then all take turns. Figures are rates against the
loader that only cuts, resamples and mirrors, fused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import DataConfig, Resample, RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import (
    BenchmarkSettings,
    Figures,
    Turn,
    print_figures,
    ratios_of,
    summarise,
    write_result,
)

_CROP_ONLY = "none"
# Batches that lie ready when a turn begins.
_WARM_UP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Images/s with augmentation against without, and with DALI's operators."""

    data: Path
    """Packed data set with labels."""
    augment: tuple[str, ...] = (
        "unicl",
        "supcon,views=1",
        "none,policy=trivial",
        "none,policy=auto",
    )
    """As entries of data.augment, one view each: two are twice the images."""
    batch_size: int = 64
    """Images of a batch."""
    image_size: int = 224
    """Side of the squares."""
    threads: int = 2
    """Decoding threads."""
    batches: int = 20
    """Batches of a turn."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    specs = (_CROP_ONLY, *settings.augment)
    for spec in specs:
        if parse_augmentation(spec).views != 1:
            raise ValueError(f"{spec}: add views=1; a second view is one more image")
    with PackedDataset(settings.data) as dataset, contextlib.ExitStack() as stack:
        loaders = {
            (spec, resample): stack.enter_context(
                contextlib.closing(batches_of(dataset, settings, spec, resample))
            )
            for spec in specs
            for resample in ("fused", "dali")
        }
        for spec in specs:
            compare(spec, next(loaders[spec, "fused"]), next(loaders[spec, "dali"]))
        figures = measure(loaders, settings)
    print_figures(figures)
    write_result(settings, figures, "numpy", "numba", "nvidia-dali-cuda120")


def batches_of(
    dataset: PackedDataset, settings: Settings, spec: str, resample: Resample
) -> Generator[Tensor, None, None]:
    """Images uint8 [b h w c] of the training loader."""
    config = TrainConfig(
        data=DataConfig(
            image_size=settings.image_size,
            evaluation_resize=settings.image_size,
            threads=settings.threads,
            resample=resample,
            augment=(spec,),
        ),
        run=RunConfig(global_batch_size=settings.batch_size),
    )
    manifest = dataset.manifest
    prompts = ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())
    loader = TrainLoader(config, [dataset], None, prompts)
    try:
        for batch in loader.batches(0):
            yield batch.images
    finally:
        loader.close()


def compare(spec: str, fused: Tensor, dali: Tensor) -> None:
    """Refuses to time operators that do not do the same.

    They resample a level apart, and DALI repeats border pixels (tests/pipelines/test_graph.py);
    thresholds of a policy make more of that in a few places.
    """
    gap = (fused.int() - dali.int()).abs().float().flatten(1).mean(1)
    print(f"{spec}: mean difference of an image {gap.median():.3f}, at most {gap.max():.3f}")
    if gap.median() > 0.5 or (gap > 3).float().mean() > 0.1:
        raise RuntimeError(f"{spec}: the fused operator and DALI's differ; nothing was timed")


def measure(loaders: dict[tuple[str, Resample], Iterator[Tensor]], settings: Settings) -> Figures:
    """Rates of all in turns, and the ratio of each round to its round without augmentation."""
    turns: dict[str, list[Turn]] = {", ".join(name): [] for name in loaders}
    for _ in range(settings.rounds):
        for name, batches in zip(turns, loaders.values(), strict=True):
            turns[name].append(take_turn(batches, settings))
    plain = f"{_CROP_ONLY}, fused"
    images = settings.batches * settings.batch_size
    figures = {}
    for name, mine in turns.items():
        figures[f"{name}: images/s"] = summarise([images / turn.wall_seconds for turn in mine])
        for unit, kind in (
            ("wall_seconds", "rate"),
            ("cpu_seconds", "rate by CPU time"),
        ):
            # of equal numbers of images: how many times as long the other one takes
            ratios = ratios_of(turns, plain, name, unit=unit)
            figures[f"{name}: {kind} against none"] = summarise(ratios)
    return figures


def take_turn(batches: Iterator[Tensor], settings: Settings) -> Turn:
    """Takes `batches` of them, once what lay ready is gone."""
    for _ in range(_WARM_UP):
        next(batches)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(settings.batches):
        next(batches)
    return Turn(time.perf_counter() - wall, time.process_time() - processor)
