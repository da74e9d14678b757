"""The training loader on a data set under a URL: its rate, and the bytes that it reads.

The same data set lies in a folder and under the URL (unicl-pack upload). Loaders take turns: from
the folder, from the URL with an empty cache, and with a full one. Then one epoch is read without
decoding for each window of the order and each size of the cache, and the bytes read from the store
are divided by those of the images.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.config import TrainConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset

from ..harness import Figures, rate_of, ratio_of, summarise, take_turns
from .own import open_loader

_MOST_BATCHES = 20
_LARGE_CACHE = 20 * 10**9
ConfigOf = Callable[..., TrainConfig]
"""Takes fields of DataConfig."""


def measure_storage(
    data: Path,
    url: str,
    config_of: ConfigOf,
    *,
    block_bytes: int,
    windows: Sequence[int],
    caches: Sequence[float],
    rounds: int,
) -> Figures:
    """Rates and traffic; RuntimeError if batches from the URL differ from those of the folder.

    Args:
        data: folder of the data set.
        url: the same data set in a store.
        config_of: makes the loader's config with other fields of DataConfig.
        block_bytes: of a request.
        windows: values of data.shuffle_window.
        caches: sizes of the cache, as parts of the data set.
        rounds: turns of each loader.
    """
    torch.set_num_threads(1)
    config_of = functools.partial(config_of, block_bytes=block_bytes)
    with PackedDataset(data) as local:
        figures = _rates(local, url, config_of(), rounds=rounds)
        pixels = local.manifest.pixels
        total = local.manifest.num_bytes if pixels is None else pixels.num_bytes
        for part, window in itertools.product(caches, windows):
            most = max(int(part * total), 16 * block_bytes)
            read = [_read_an_epoch(url, config_of, window, most) for _ in range(min(rounds, 3))]
            name = f"cache {part:g}, window {window or 'all'}"
            figures[f"{name}: bytes read / needed"] = summarise([ratio for ratio, _ in read])
            rates = [len(local) / seconds for _, seconds in read]
            figures[f"{name}: images/s, undecoded"] = summarise(rates)
    return figures


def _rates(local: PackedDataset, url: str, config: TrainConfig, *, rounds: int) -> Figures:
    """Images/s of the loaders, and the ratios to the folder's within a round."""
    size = config.run.global_batch_size
    count = min(_MOST_BATCHES, len(local) // size)

    def images_of(dataset: PackedDataset) -> Tensor:
        with contextlib.closing(open_loader(dataset, config)) as loader:
            batches = itertools.islice(loader.batches(0), count)
            return torch.stack([batch.images[:, ::32, ::32] for batch in batches])

    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
        cache = CacheOptions(folder=Path(scratch), block_bytes=config.data.block_bytes)
        with PackedDataset(url, cache=cache) as remote:
            if remote.manifest != local.manifest:
                raise ValueError(f"{url} is not the data set of --data: upload that one")

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
                rounds=rounds,
                before=empty_cache,
            )
    figures = {f"{name}: images/s": rate_of(turns[name], count * size) for name in turns}
    for name in list(turns)[1:]:
        figures[f"{name}: rate against the folder"] = ratio_of(turns, "folder", name)
    return figures


def _read_an_epoch(
    url: str, config_of: ConfigOf, window: int, cache_bytes: int
) -> tuple[float, float]:
    """Bytes read by bytes needed, and seconds."""
    # with DALI's resampling, decoded images are read step by step as others are
    resample = "dali" if window or cache_bytes < _LARGE_CACHE else "fused"
    config = config_of(resample=resample, shuffle_window=window, cache_bytes=cache_bytes)
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
        cache = CacheOptions(
            folder=Path(folder), max_bytes=cache_bytes, block_bytes=config.data.block_bytes
        )
        with PackedDataset(url, cache=cache) as dataset:
            assert dataset.remote is not None
            traffic = dataset.remote.store.traffic
            loader = open_loader(dataset, config)
            before, started = traffic.read_bytes, time.perf_counter()
            for _ in loader.metadata_without_decoding(len(dataset) // config.run.global_batch_size):
                pass
            seconds = time.perf_counter() - started
            return (traffic.read_bytes - before) / dataset.needed_bytes, seconds
