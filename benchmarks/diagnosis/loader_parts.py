"""The loader of a run on the bench, taken apart: reading, checking, planning, decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from unicl_fast.config import DataConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.object_store import CONNECTIONS
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.feed.host_batches import HostBatch, steps_at_once
from unicl_fast.pipelines.graph import (
    Pipeline,
    batches_ahead,
    build_decoding_graph,
    build_train_graph,
    decode,
    split_threads,
)
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.machine import choose_decode_device, free_memory
from unicl_fast.system.wording import count_of
from unicl_fast.training.data import cache_options

from ..harness import in_turns
from .clocks import flow, median
from .model import CHECKSUMS, READ, Cost, Stage

FIRST_STEP = 1
"""The first step of a run draws a contact sheet, which no other does."""
_ROUNDS = 3
_READ_SAMPLES, _KEPT_SAMPLES = 2048, 64


class LoaderParts:
    """A loader of a run and its data, whose parts are measured by themselves."""

    def __init__(
        self,
        loader: TrainLoader,
        datasets: Sequence[PackedDataset],
        data: DataConfig,
        *,
        ranks: Ranks,
        local_batch: int,
        device: torch.device,
    ) -> None:
        self.loader, self.datasets, self.data = loader, datasets, data
        self.ranks, self.local_batch = ranks, local_batch
        self.decode_device = choose_decode_device(
            data.decode_device, device=device, threads=data.threads
        )[0]

    def stages(self, *, seconds: float) -> list[Stage]:
        """The parts of the loader, each by itself."""
        stages = self._feed_stages(seconds=seconds)
        if self.loader.form == "crops":
            # made in threads from plan to crop: one stage
            crops = in_turns({"crops": lambda: self._crops(seconds / _ROUNDS)}, rounds=_ROUNDS)
            cost = median(crops["crops"])
            return [*stages, Stage(name="crop and resize", cost=cost, side="graph")]
        return stages + self._graph_stages(seconds=seconds)

    def _crops(self, seconds: float) -> Cost:
        with contextlib.closing(self.loader.host.crop_resizer()) as resizer:
            groups = (
                self.loader.host.group(resizer, step)
                for step in range(0, 1 << 30, resizer.batches_at_once)
            )
            images = resizer.batches_at_once * self.local_batch
            return flow(groups, images=images, skip=1, seconds=seconds)

    def _feed_stages(self, *, seconds: float) -> list[Stage]:
        host, batch = self.loader.host, self.local_batch
        count = steps_at_once(batch)
        # each once: a small data set has several epochs in that number of samples
        pairs = list(dict.fromkeys(zip(*self.planned_samples(_READ_SAMPLES), strict=True)))
        kept = [self.datasets[source].image_bytes(n) for source, n in pairs[:_KEPT_SAMPLES]]
        size = sum(map(len, kept)) / len(kept)
        turn = min(seconds / _ROUNDS, 0.5)
        num_read = 0

        def cold() -> Cost:
            nonlocal num_read
            cost = self.read(pairs, cold=True, seconds=turn)
            num_read = max(2, int(turn / cost.wall))
            return cost

        def warm() -> Cost:
            # of the others, nothing is in memory any more
            return self.read(pairs[:num_read], cold=False, seconds=turn)

        def plan() -> Cost:
            plans = (host.plan_steps(start, count) for start in range(0, 1 << 40, count))
            return flow(plans, images=count * batch, skip=1, seconds=min(turn, 0.2 / _ROUNDS))

        def check() -> Cost:
            digests = (xxhash.xxh3_64_intdigest(image) for image in _again(kept))
            return flow(digests, images=1, skip=1, seconds=0.1 / _ROUNDS)

        works = {"cold": cold, "warm": warm, "plan": plan, "checksums": check}
        costs = {name: median(taken) for name, taken in in_turns(works, rounds=_ROUNDS).items()}
        note = f"{size / 1e3:,.0f} kB an image"
        mine, other = ("cold", "warm") if self.reads_cold else ("warm", "cold")
        kind = "cold" if self.reads_cold else "in memory"
        rest = f"{other}: {1 / costs[other].wall:,.0f} images/s"
        return [
            Stage(name=READ, cost=costs[mine], side="feed", note=f"{kind}, {note}; {rest}"),
            Stage(name=CHECKSUMS, cost=costs["checksums"], side="feed"),
            Stage(name="plan and target map", cost=costs["plan"], side="feed"),
        ]

    @functools.cached_property
    def reads_cold(self) -> bool:
        """Whether the data is larger than the memory that could keep it."""
        total = sum(self.bytes_of(dataset) for dataset in self.datasets)
        return total > free_memory(torch.device("cpu"))

    def bytes_of(self, dataset: PackedDataset) -> int:
        """Bytes of a data set's images, as far as they are used."""
        manifest = dataset.manifest
        total = sum(shard.num_bytes for shard in manifest.shards)
        if manifest.pixels is not None:
            total = manifest.pixels.num_bytes
        return total * len(dataset) // max(1, manifest.num_samples)

    @property
    def larger_cache(self) -> int:
        """A --data.cache-bytes that holds all images under URLs; 0 where they fit."""
        total = sum(map(self.bytes_of, self._remote))
        fits = total <= self.data.cache_bytes
        return 0 if fits else math.ceil(1.05 * total / 1e9) * 10**9

    @property
    def _remote(self) -> list[PackedDataset]:
        return [dataset for dataset in self.datasets if dataset.remote is not None]

    def planned_samples(self, most: int, step: int = 0) -> tuple[list[int], list[int]]:
        """Sources and samples that the plan asks for, in order."""
        count = max(1, -(-most // self.local_batch))
        where = {"rank": self.ranks.rank, "world_size": self.ranks.world_size}
        sources, samples = self.loader.plan.schedule(step, count, **where)
        return sources[:most].tolist(), samples[:most].tolist()

    def read(self, pairs: Sequence[tuple[int, int]], *, cold: bool, seconds: float) -> Cost:
        """The bytes of these sources' samples, in one thread as the loader reads them.

        Cold ones are read once at most: after that they are in memory.
        """
        datasets = self.datasets
        if cold:
            self.forget(pairs)
        images = (
            len(datasets[source].image_bytes(sample))
            for source, sample in (pairs if cold else _again(pairs))
        )
        return flow(images, images=1, skip=0, seconds=seconds)

    def forget(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Asks the kernel to drop what it has in memory of the files of samples in folders.

        It drops whole pages, so that the range of a small image would drop nothing.
        """
        datasets = self.datasets
        local = [(datasets[source], sample) for source, sample in pairs]
        files = {one.folder / one.shard_of(sample) for one, sample in local if one.remote is None}
        for path in files:
            with path.open("rb") as file, contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _graph_stages(self, *, seconds: float) -> list[Stage]:
        """Only decode, then with resizing, then with augmentation: what each adds."""
        held = self._held()
        data = self.data
        where: dict[str, Any] = {"device": self.decode_device, "form": self.loader.form}
        plain = functools.partial(build_train_graph, **where, augmentation=None)
        builds: dict[str, Callable[..., Pipeline]] = {}
        if self.decode_device.type == "cpu":
            builds["decode"] = functools.partial(build_decoding_graph, **where)
        builds["resize and flip"] = plain
        augmented = self.loader.augmentation is not None
        if augmented:
            builds["augment"] = self.loader.build_graph
        # the last input is the rows of the augmentation, which other graphs do not take
        plain_inputs = [
            dataclasses.replace(one, inputs=one.inputs[:-1]) if augmented else one for one in held
        ]
        images = self.loader.num_images
        skip = batches_begun(self.data, images, self.decode_device)

        def take(name: str) -> Cost:
            inputs = _generator(held if name == "augment" else plain_inputs)
            batches = decode(
                builds[name], inputs, data=data, batch_size=images, device=self.decode_device
            )
            return flow(batches, images=self.local_batch, skip=skip, seconds=seconds)

        # in turns, since only their differences are looked at
        turns = in_turns({name: functools.partial(take, name) for name in builds}, rounds=_ROUNDS)
        costs = {name: median(taken) for name, taken in turns.items()}
        stages, before = [], Cost(wall=0.0, cpu=0.0)
        for name, cost in costs.items():
            rounds = zip(cost.rounds, before.rounds or (0.0,) * len(cost.rounds), strict=True)
            added = Cost(
                wall=max(0.0, cost.wall - before.wall),
                cpu=max(0.0, cost.cpu - before.cpu),
                rounds=tuple(max(0.0, with_it - without) for with_it, without in rounds),
            )
            shown = f"{self.image_kind} decode" if name == "decode" else name
            stages.append(Stage(name=shown, cost=added, side="graph", note=self._note_of(name)))
            before = cost
        return stages

    def _note_of(self, name: str) -> str:
        if name != "decode":
            return ""
        return f"{count_of(self.data.threads, 'thread')}, {self.mean_size}"

    @property
    def mean_size(self) -> str:
        """The usual size of an image, in words."""
        rows = self.datasets[0].samples[:1000]
        height, width = (int(np.median(rows[side])) for side in ("height", "width"))
        return f"usually {height} x {width} pixels"

    @functools.cached_property
    def image_kind(self) -> str:
        """JPEG, PNG, WebP or raw: that of the first samples."""
        first = bytes(self.datasets[0].image_bytes(0)[:12])
        if first.startswith(b"\xff\xd8"):
            return "JPEG"
        if first.startswith(b"\x89PNG"):
            return "PNG"
        return "WebP" if first[8:12] == b"WEBP" else "raw"

    def _held(self) -> list[HostBatch[Any]]:
        """A few batches as the graph takes them, read already."""
        count = max(2, min(16, 1024 // self.local_batch))
        with contextlib.closing(self.loader.host.batches(FIRST_STEP)) as batches:
            return [next(batches) for _ in range(count)]

    def store_cost(self, cache: Path, *, seconds: float) -> Cost | None:
        """An image out of the object store, by as many requests at once as a run makes.

        None for data sets in folders.
        """
        if not self._remote:
            return None
        connections = CONNECTIONS
        options = CacheOptions(folder=cache, block_bytes=cache_options(self.data).block_bytes)
        location = self._remote[0].location
        with PackedDataset(location, cache=options, max_bad_fraction=None) as dataset:
            assert dataset.remote is not None
            traffic = dataset.remote.store.traffic
            blocks = iter(dataset.blocks_of(np.arange(len(dataset))))
            before, started = traffic.read_bytes, time.perf_counter()

            def fetch(_: int) -> None:
                while time.perf_counter() - started < seconds:
                    if (block := next(blocks, None)) is None:
                        return
                    dataset.fetch_ahead(*block)

            with ThreadPoolExecutor(connections) as pool:
                list(pool.map(fetch, range(connections)))
            taken = time.perf_counter() - started
            num_bytes = max(1, traffic.read_bytes - before)
            wall = taken / num_bytes * self.bytes_of(dataset) / len(dataset)
            return Cost(wall=wall, cpu=0.0)


def batches_begun(data: DataConfig, images: int, device: torch.device) -> int:
    """Batches that a loader has begun when it gives its first one."""
    graphs = len(split_threads(data, device))
    return (graphs + 1) * batches_ahead(data, images) + 1


def _generator(held: Sequence[HostBatch[Any]]) -> Generator[HostBatch[Any], None, None]:
    yield from _again(held)


def _again(values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from values
