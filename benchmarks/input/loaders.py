"""The training loader against itself: with augmentation, and from a URL.

    unicl-bench augment --data PACKED
    unicl-bench storage --data PACKED --url s3://bucket/PACKED

`augment`: the same images leave loaders with and without augmentation, with the fused operator and
with DALI's, which are compared on a batch. Figures are rates against the loader that only crops,
resizes and flips, fused.

`storage`: the same data set lies in a folder and under the URL (unicl-pack upload). Loaders take
turns: from the folder, from the URL with an empty cache, and with a full one. Then one epoch is
read, undecoded, for each window of the order and each size of the cache, and bytes read from the
store are divided by those of the images.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import DataConfig, Resample, RunConfig, TrainConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import Figures, LoaderStage, rate_of, ratio_of, summarise, take_turns
from .contenders import Task

_CROP_ONLY = "none"
_WARM_UP = 8
"""Batches that are ready when a turn begins, and so do not count."""
_CACHE_BYTES = 20 * 10**9
_RESAMPLERS: tuple[Resample, ...] = ("fused", "dali")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OwnLoaderStage(LoaderStage):
    """Options of stages that run the training loader alone."""

    batches: int = 20
    """Batches of a turn."""


def config_of(options: Task | LoaderStage, **data: Any) -> TrainConfig:
    """The loader's config; `data` are more fields of its DataConfig."""
    size: dict[str, Any] = {
        "image_size": options.image_size,
        "evaluation_resize": options.image_size,
    }
    return TrainConfig(
        data=DataConfig(threads=options.threads, **size, **data),
        run=RunConfig(global_batch_size=options.batch_size),
    )


def prompts_of(dataset: PackedDataset) -> ClassPrompts:
    """The prompts of a single data set, of its own class names and templates."""
    manifest = dataset.manifest
    return ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())


def open_loader(dataset: PackedDataset, config: TrainConfig) -> TrainLoader:
    """The training loader of a single data set."""
    return TrainLoader(config, [dataset], None, prompts_of(dataset))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment(_OwnLoaderStage):
    """Images/s with augmentation against without, and with DALI's operators."""

    augment: tuple[str, ...] = (
        "unicl",
        "supcon,views=1",
        "none,policy=trivial",
        "none,policy=auto",
    )
    """Entries of data.augment, one view each: two are twice the images."""

    def run(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        specs = (_CROP_ONLY, *self.augment)
        for spec in specs:
            if parse_augmentation(spec).views != 1:
                raise ValueError(f"{spec}: add views=1; a second view is one more image")
        with PackedDataset(self.data) as dataset, contextlib.ExitStack() as stack:
            batches: dict[str, Iterator[Tensor]] = {}
            for spec, resample in itertools.product(specs, _RESAMPLERS):
                config = config_of(self, resample=resample, augment=(spec,))
                loader = stack.enter_context(contextlib.closing(open_loader(dataset, config)))
                batches[f"{spec}, {resample}"] = (batch.images for batch in loader.batches(0))
            for spec in specs:
                compare(spec, next(batches[f"{spec}, fused"]), next(batches[f"{spec}, dali"]))

            def take(name: str, count: int) -> None:
                collections.deque(itertools.islice(batches[name], count), maxlen=0)

            works = {name: functools.partial(take, name, self.batches) for name in batches}
            ready = functools.partial(take, count=_WARM_UP)
            turns = take_turns(works, rounds=self.rounds, warm_up=0, before=ready)
        plain = f"{_CROP_ONLY}, fused"
        figures: Figures = {}
        for name, mine in turns.items():
            by_cpu_time = ratio_of(turns, plain, name, unit="cpu_seconds")
            figures[f"{name}: images/s"] = rate_of(mine, self.batches * self.batch_size)
            figures[f"{name}: rate against none"] = ratio_of(turns, plain, name)
            figures[f"{name}: rate by CPU time against none"] = by_cpu_time
        self.report(figures, "numpy", "numba", "nvidia-dali-cuda120")


def compare(spec: str, fused: Tensor, dali: Tensor) -> None:
    """Raises RuntimeError if the two operators differ.

    They resample a level apart, and DALI repeats border pixels (tests/pipelines/test_graph.py);
    thresholds of a policy make more of that in a few places.
    """
    gap = (fused.int() - dali.int()).abs().float().flatten(1).mean(1)
    print(f"{spec}: mean difference of an image {gap.median():.3f}, at most {gap.max():.3f}")
    if gap.median() > 0.5 or (gap > 3).float().mean() > 0.1:
        raise RuntimeError(f"{spec}: the fused operator and DALI's differ; nothing was timed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage(_OwnLoaderStage):
    """Rate from a URL beside that from a folder, and bytes read by window and cache."""

    url: str
    """URL of the same data set in a store."""
    block_bytes: int = 1 << 20
    """Bytes of a request."""
    windows: tuple[int, ...] = (0, 1024, 512, 256)
    """Values of data.shuffle_window to read an epoch with."""
    caches: tuple[float, ...] = (1.25, 0.5, 0.25)
    """Sizes of the cache to do so with, as parts of the data set."""

    def run(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        with PackedDataset(self.data) as dataset:
            figures = self._rates(dataset) | self._traffic(dataset)
        self.report(figures, "numpy", "fsspec", "nvidia-dali-cuda120")

    def _rates(self, local: PackedDataset) -> Figures:
        """Images/s of the loaders, and the ratios to the folder's within a round."""
        config = config_of(self, block_bytes=self.block_bytes)

        def images_of(dataset: PackedDataset) -> Tensor:
            with contextlib.closing(open_loader(dataset, config)) as loader:
                batches = itertools.islice(loader.batches(0), self.batches)
                return torch.stack([batch.images[:, ::32, ::32] for batch in batches])

        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
            cache = CacheOptions(folder=Path(scratch), block_bytes=self.block_bytes)
            with PackedDataset(self.url, cache=cache) as remote:
                if remote.manifest != local.manifest:
                    raise ValueError(
                        f"{self.url} is another data set than {self.data}: upload this one"
                    )

                def empty_cache(name: str) -> None:
                    for blocks in (Path(scratch) / "blocks").iterdir() if "empty" in name else ():
                        shutil.rmtree(blocks)

                if not torch.equal(images_of(local), images_of(remote)):
                    raise RuntimeError("batches from the URL differ from those of the folder")
                turns = take_turns(
                    {
                        "folder": lambda: images_of(local),
                        "URL, cache empty": lambda: images_of(remote),
                        "URL, cache full": lambda: images_of(remote),
                    },
                    rounds=self.rounds,
                    before=empty_cache,
                )
        count = self.batches * self.batch_size
        figures = {f"{name}: images/s": rate_of(turns[name], count) for name in turns}
        for name in list(turns)[1:]:
            figures[f"{name}: rate against the folder"] = ratio_of(turns, "folder", name)
        return figures

    def _traffic(self, local: PackedDataset) -> Figures:
        """Bytes from the store divided by bytes of images, over one epoch."""
        figures: Figures = {}
        pixels = local.manifest.pixels
        total = local.manifest.num_bytes if pixels is None else pixels.num_bytes
        for part, window in itertools.product(self.caches, self.windows):
            most = max(int(part * total), 16 * self.block_bytes)
            results = [self._read_an_epoch(window, most) for _ in range(min(self.rounds, 3))]
            name = f"cache {part:g}, window {window or 'all'}"
            figures[f"{name}: bytes read / needed"] = summarise([ratio for ratio, _ in results])
            rates = [len(local) / seconds for _, seconds in results]
            figures[f"{name}: images/s, undecoded"] = summarise(rates)
        return figures

    def _read_an_epoch(self, window: int, cache_bytes: int) -> tuple[float, float]:
        """Bytes read by bytes needed, and seconds."""
        # with DALI's resampling, decoded images are read step by step as others are
        resample = "dali" if window or cache_bytes < _CACHE_BYTES else "fused"
        config = config_of(
            self,
            resample=resample,
            shuffle_window=window,
            cache_bytes=cache_bytes,
            block_bytes=self.block_bytes,
        )
        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
            cache = CacheOptions(
                folder=Path(folder), max_bytes=cache_bytes, block_bytes=self.block_bytes
            )
            with PackedDataset(self.url, cache=cache) as dataset:
                assert dataset.remote is not None
                traffic = dataset.remote.store.traffic
                loader = open_loader(dataset, config)
                before, started = traffic.read_bytes, time.perf_counter()
                for _ in loader.metadata_without_decoding(len(dataset) // self.batch_size):
                    pass
                seconds = time.perf_counter() - started
                return (traffic.read_bytes - before) / dataset.needed_bytes, seconds
