"""What a data set under a URL costs the loader: its rate beside that of a folder, and bytes read.

    unicl-bench storage --data PACKED --url s3://bucket/PACKED [--json FILE]

The same data set lies in a folder and under the URL (unicl-pack upload). First the batches of both
are compared; then loaders take turns: from the folder, from the URL with an empty cache, and with a
full one. Then one pass is read, undecoded, for each window of the order and each size of the cache,
and bytes that came from the store are divided by those of the images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import time
from pathlib import Path

import torch

from unicl_fast.config import DataConfig, RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.remote.block_cache import CacheOptions
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    summarise,
    take_turns,
    write_result,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Rate from a URL beside that from a folder, and bytes read by window and cache."""

    data: Path
    """Packed data set."""
    url: str
    """Where the same data set lies in a store."""
    batch_size: int = 64
    """Images of a batch."""
    image_size: int = 224
    """Side of the squares."""
    threads: int = 2
    """Decoding threads."""
    batches: int = 20
    """Batches of a turn."""
    block_bytes: int = 1 << 20
    """Of a request."""
    windows: tuple[int, ...] = (0, 1024, 512, 256)
    """Values of data.shuffle_window to read a pass with."""
    caches: tuple[float, ...] = (1.25, 0.5, 0.25)
    """Sizes of the cache to do so with, as parts of the data set."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with PackedDataset(settings.data) as dataset:
        figures = _rates(dataset, settings) | _traffic(dataset, settings)
    print_figures(figures)
    write_result(settings, figures, "numpy", "fsspec", "nvidia-dali-cuda120")


def _rates(local: PackedDataset, settings: Settings) -> Figures:
    """Images/s of the loaders, and the ratios to the folder's within a round."""
    config = _config(settings)
    prompts = ClassPrompts([(local.manifest.class_names, local.manifest.templates)], Tokenizer())

    def images_of(dataset: PackedDataset) -> torch.Tensor:
        loader = TrainLoader(config, [dataset], None, prompts)
        with contextlib.closing(loader):
            batches = itertools.islice(loader.batches(0), settings.batches)
            return torch.stack([batch.images[:, ::32, ::32] for batch in batches])

    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
        cache = CacheOptions(folder=Path(scratch), block_bytes=settings.block_bytes)
        with PackedDataset(settings.url, cache=cache) as remote:
            if remote.manifest != local.manifest:
                raise ValueError(
                    f"{settings.url} is another data set than {settings.data}: upload this one"
                )

            def from_empty() -> torch.Tensor:
                for blocks in (Path(scratch) / "blocks").iterdir():
                    shutil.rmtree(blocks)
                return images_of(remote)

            if not torch.equal(images_of(local), images_of(remote)):
                raise RuntimeError("batches from the URL differ from those of the folder")
            turns = take_turns(
                {
                    "folder": lambda: images_of(local),
                    "empty": from_empty,
                    "full": lambda: images_of(remote),
                },
                rounds=settings.rounds,
            )
    count = settings.batches * settings.batch_size
    figures: Figures = {}
    for name, own in turns.items():
        what = "folder" if name == "folder" else f"URL, cache {name}"
        figures[f"{what}: images/s"] = summarise([count / turn.wall_seconds for turn in own])
        if name != "folder":
            pairs = zip(turns["folder"], own, strict=True)
            ratios = [folder.wall_seconds / turn.wall_seconds for folder, turn in pairs]
            figures[f"{what}: rate against the folder"] = summarise(ratios)
    return figures


def _traffic(local: PackedDataset, settings: Settings) -> Figures:
    """Bytes from the store divided by bytes of images, of one pass."""
    figures: Figures = {}
    manifest = local.manifest
    total = sum(shard.num_bytes for shard in manifest.shards)
    if manifest.pixels is not None:
        total = manifest.pixels.num_bytes
    for part, window in itertools.product(settings.caches, settings.windows):
        most = max(int(part * total), 16 * settings.block_bytes)
        config = _config(settings, window=window, cache_bytes=most)
        ratios, rates = [], []
        for _ in range(min(settings.rounds, 3)):
            with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
                ratio, seconds = _read_a_pass(settings, config, Path(scratch))
            ratios.append(ratio)
            rates.append(len(local) / seconds)
        name = f"cache {part:g}, window {window or 'all'}"
        figures[f"{name}: bytes read / needed"] = summarise(ratios)
        figures[f"{name}: images/s, undecoded"] = summarise(rates)
    return figures


def _read_a_pass(settings: Settings, config: TrainConfig, folder: Path) -> tuple[float, float]:
    data = config.data
    cache = CacheOptions(folder=folder, max_bytes=data.cache_bytes, block_bytes=data.block_bytes)
    with PackedDataset(settings.url, cache=cache) as dataset:
        assert dataset.remote is not None
        manifest, traffic = dataset.manifest, dataset.remote.store.traffic
        prompts = ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())
        loader = TrainLoader(config, [dataset], None, prompts)
        before, started = traffic.read_bytes, time.perf_counter()
        for _ in loader.host_batches(len(dataset) // settings.batch_size):
            pass
        seconds = time.perf_counter() - started
        return (traffic.read_bytes - before) / dataset.needed_bytes, seconds


def _config(settings: Settings, *, window: int = 0, cache_bytes: int = 20 * 10**9) -> TrainConfig:
    # with DALI's resampling, decoded images are read step by step as others are
    return TrainConfig(
        data=DataConfig(
            image_size=settings.image_size,
            evaluation_resize=settings.image_size,
            threads=settings.threads,
            resample="dali" if window or cache_bytes < 20 * 10**9 else "fused",
            shuffle_window=window,
            cache_bytes=cache_bytes,
            block_bytes=settings.block_bytes,
        ),
        run=RunConfig(global_batch_size=settings.batch_size),
    )
