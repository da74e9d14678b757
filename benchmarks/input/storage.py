"""The bytes that the training loader reads of a data set under a URL (unicl-pack upload).

An epoch is read without decoding for each window of the order and each size of the cache.
"""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unicl_fast.config import TrainConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset

from ..harness import Figures, summarise
from .own import open_loader

_LARGE_CACHE = 20 * 10**9
ConfigOf = Callable[..., TrainConfig]
"""Takes fields of DataConfig."""


def measure_storage(
    data: Path,
    url: str,
    config_of: ConfigOf,
    grid: Sequence[tuple[float, int]],
    *,
    block_bytes: int,
    rounds: int,
) -> Figures:
    """Traffic and rates by cache and window; ValueError unless the URL has the same data set.

    `grid` has sizes of the cache, as parts of the data set, and windows.
    """
    torch.set_num_threads(1)
    with PackedDataset(data) as local:
        figures: Figures = {}
        pixels = local.manifest.pixels
        total = local.manifest.num_bytes if pixels is None else pixels.num_bytes
        for part, window in grid:
            most = max(int(part * total), 16 * block_bytes)
            read = [
                _read_an_epoch(local, url, block_bytes, config_of, window, most)
                for _ in range(min(rounds, 3))
            ]
            name = f"cache {part:g}, window {window or 'all'}"
            figures[f"{name}: bytes read / needed"] = summarise([ratio for ratio, _ in read])
            rates = [len(local) / seconds for _, seconds in read]
            figures[f"{name}: images/s, undecoded"] = summarise(rates)
    return figures


def _read_an_epoch(
    local: PackedDataset,
    url: str,
    block_bytes: int,
    config_of: ConfigOf,
    window: int,
    cache_bytes: int,
) -> tuple[float, float]:
    """Bytes read by bytes needed, and seconds."""
    # with DALI's resampling, decoded images are read step by step as others are
    resample = "dali" if window or cache_bytes < _LARGE_CACHE else "fused"
    config = config_of(resample=resample, shuffle_window=window, cache_bytes=cache_bytes)
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
        cache = CacheOptions(folder=Path(folder), max_bytes=cache_bytes, block_bytes=block_bytes)
        with PackedDataset(url, cache=cache) as dataset:
            if dataset.manifest != local.manifest:
                raise ValueError(f"{url} is not the data set of --data: upload that one")
            assert dataset.remote is not None
            store = dataset.remote.store
            loader = open_loader(dataset, config)
            before, started = store.read_bytes, time.perf_counter()
            steps = len(dataset) // config.run.global_batch_size
            with loader.steps.reading_ahead(0), contextlib.closing(loader.host.batches(0)) as read:
                for _ in itertools.islice(read, steps):
                    pass
            seconds = time.perf_counter() - started
            return (store.read_bytes - before) / dataset.needed_bytes, seconds
