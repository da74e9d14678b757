"""The user's run on the bench: built as `unicl-pretrain` builds it, then taken apart.

`Bench` holds the trainer and the loader of a run, and measures them alone and together. A changed
setting is another loader (`loader_cost`) or another trainer (`StepBench`) on the same data.
"""

from __future__ import annotations

import contextlib
import copy
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

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.models.precision import resolve_precision
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
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import choose_decode_device, free_memory, usable_cores
from unicl_fast.system.wording import count_of
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.data import resolve_decode_device
from unicl_fast.training.run import build_trainer
from unicl_fast.training.trainer import Trainer

from ..harness import in_turns, wait_for_gpu
from ..step.parts import StepInParts
from .clocks import TimedLoader, flow, median, repeated
from .model import CHECKSUMS, COPY, READ, Checkpointing, Cost, Stage

_FIRST_STEP = 1
"""The first step of a run draws a contact sheet, which no other does."""
_ROUNDS = 3
_READ_SAMPLES, _KEPT_SAMPLES = 2048, 64


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The data, its weights and its prompts, of which a loader is built."""

    datasets: Sequence[PackedDataset]
    weights: Sequence[float] | None
    prompts: ClassPrompts


class Bench:
    """One rank of a run, ready to be measured."""

    def __init__(
        self, config: TrainConfig, *, folder: Path, ranks: Ranks, device: torch.device
    ) -> None:
        """Builds data, loader and trainer. Raises as `unicl-pretrain` does."""
        # Evaluations are no part of a step. Ranks are not compared: each takes the parts of a step
        # by itself (`step_stages`), after which their weights differ. A run in stages is measured
        # by its own settings, those of the last stage.
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, evaluate=()),
            run=dataclasses.replace(config.run, check_ranks_every_steps=0, stages=()),
        )
        require(
            not config.efficiency.image_features,
            "unicl-bench measures runs that decode and encode images: leave "
            "efficiency.image_features out",
        )
        config = resolve_precision(config, device, ranks=ranks)
        config = resolve_decode_device(config, device, ranks)
        self.ranks, self.device = ranks, device
        self.free_bytes = min(gather_integers(free_memory(device), ranks))
        built: list[TrainLoader] = []

        def build_loader(
            config: TrainConfig,
            datasets: Sequence[PackedDataset],
            weights: Sequence[float] | None,
            prompts: ClassPrompts,
            **more: Any,
        ) -> TrainLoader:
            self.parts = Parts(datasets, weights, prompts)
            self.data_config = config
            built.append(TrainLoader(config, datasets, weights, prompts, **more))
            return built[0]

        self.trainer = build_trainer(
            config,
            run_folder=folder,
            build_loader=build_loader,
            evaluate=lambda *_, **__: {},
            ranks=ranks,
            device=device,
            progress=False,
        )
        (self.loader,) = built
        self.config = dataclasses.replace(self.trainer.config, data=self.data_config.data)
        self.timed_loader = TimedLoader(self.trainer.loader)
        self.trainer.loader = self.timed_loader
        self.local_batch = ranks.local_batch_size(config.run.global_batch_size)
        self.process = os.getpid()
        # ranks of this machine share its cores
        self.cores = usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def close(self) -> None:
        """Closes the loader and the data."""
        self.loader.close()
        for dataset in self.parts.datasets:
            dataset.close()

    def changed(self, changes: dict[str, dict[str, Any]]) -> TrainConfig:
        """The run's config with changes of its groups."""
        groups = {
            group: dataclasses.replace(getattr(self.config, group), **fields)
            for group, fields in changes.items()
        }
        return dataclasses.replace(self.config, **groups)

    # The loader.

    def new_loader(self, config: TrainConfig, parts: Parts | None = None) -> TrainLoader:
        """The loader of this rank with other settings or other data."""
        parts = parts or self.parts
        return TrainLoader(
            config,
            parts.datasets,
            parts.weights,
            parts.prompts,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.device,
        )

    def meet(self) -> None:
        """Waits for the other ranks, so that all measure the same at the same time."""
        gather_integers(0, self.ranks)

    def loader_cost(self, loader: TrainLoader, config: TrainConfig, *, seconds: float) -> Cost:
        """The loader alone, drained."""
        self.meet()
        images = self.ranks.local_batch_size(config.run.global_batch_size)
        batches = (batch.step for batch in loader.batches(_FIRST_STEP))
        skip = batches_begun(config, images, self.device)
        try:
            return flow(batches, images=images, skip=skip, seconds=seconds)
        finally:
            loader.close()

    def kept_batch(self, loader: TrainLoader) -> Batch:
        """A batch on the device that outlives the loader's buffers."""
        try:
            return copy.deepcopy(next(iter(loader.batches(_FIRST_STEP)))).to(self.device)
        finally:
            loader.close()

    def loader_stages(self, *, seconds: float) -> list[Stage]:
        """The parts of the loader, each alone."""
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
        kept = [self.parts.datasets[source].image_bytes(n) for source, n in pairs[:_KEPT_SAMPLES]]
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
        total = sum(self.bytes_of(dataset) for dataset in self.parts.datasets)
        return total > free_memory(torch.device("cpu"))

    def bytes_of(self, dataset: PackedDataset) -> int:
        """Bytes of a data set's images, as far as they are used."""
        manifest = dataset.manifest
        total = sum(shard.num_bytes for shard in manifest.shards)
        if manifest.pixels is not None:
            total = manifest.pixels.num_bytes
        return total * len(dataset) // max(1, manifest.num_samples)

    @property
    def fits_cache(self) -> bool:
        """Whether data sets under URLs stay in the cache after the first epoch."""
        return self._remote_bytes <= self.data_config.data.cache_bytes

    @property
    def larger_cache(self) -> int:
        """A --data.cache-bytes that holds all images; 0 where they fit."""
        return 0 if self.fits_cache else math.ceil(1.05 * self._remote_bytes / 1e9) * 10**9

    @property
    def _remote_bytes(self) -> int:
        return sum(map(self.bytes_of, self._remote))

    @property
    def _remote(self) -> list[PackedDataset]:
        return [dataset for dataset in self.parts.datasets if dataset.remote is not None]

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
        datasets = self.parts.datasets
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
        datasets = self.parts.datasets
        local = [(datasets[source], sample) for source, sample in pairs]
        files = {one.folder / one.shard_of(sample) for one, sample in local if one.remote is None}
        for path in files:
            with path.open("rb") as file, contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _graph_stages(self, *, seconds: float) -> list[Stage]:
        """Decode alone, with resizing, and with augmentation: what each adds to the one before."""
        held = self._held()
        data = self.data_config.data
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
        skip = batches_begun(self.data_config, images, self.decode_device)

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
        return f"{count_of(self.data_config.data.threads, 'thread')}, {self.mean_size}"

    @property
    def mean_size(self) -> str:
        """The usual size of an image, in words."""
        rows = self.parts.datasets[0].samples[:1000]
        height, width = (int(np.median(rows[side])) for side in ("height", "width"))
        return f"usually {height} x {width} pixels"

    @functools.cached_property
    def image_kind(self) -> str:
        """JPEG, PNG, WebP or raw: that of the first samples."""
        first = bytes(self.parts.datasets[0].image_bytes(0)[:12])
        if first.startswith(b"\xff\xd8"):
            return "JPEG"
        if first.startswith(b"\x89PNG"):
            return "PNG"
        return "WebP" if first[8:12] == b"WEBP" else "raw"

    @property
    def decode_device(self) -> torch.device:
        """The device that decodes."""
        data = self.data_config.data
        return choose_decode_device(data.decode_device, device=self.device, threads=data.threads)[0]

    def _held(self) -> list[HostBatch[Any]]:
        """A few batches as the graph takes them, read already."""
        count = max(2, min(16, 1024 // self.local_batch))
        with contextlib.closing(self.loader.host.batches(_FIRST_STEP)) as batches:
            return [next(batches) for _ in range(count)]

    def store_cost(self, cache: Path, *, connections: int, seconds: float) -> Cost | None:
        """An image out of the object store by `connections` requests at once; None for folders.

        Read-ahead makes `CONNECTIONS` of them, a loader without it one.
        """
        if not self._remote:
            return None
        options = CacheOptions(folder=cache, block_bytes=self.data_config.data.block_bytes)
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

    # The step.

    def step_stages(self, batch: Batch, *, rounds: int) -> list[Stage]:
        """The parts of a step; none where micro-batches or an objective without texts split it.

        Nor are there any where labels are mixed.
        """
        config, objective = self.trainer.config, self.trainer.config.objective
        micro = 0 < config.efficiency.micro_batch_size < self.local_batch
        if micro or not objective.has_texts or objective.mixes:
            return []
        step = StepInParts(self.trainer, batch)
        step.take()
        wall: dict[str, list[Cost]] = {}
        for _ in range(rounds):
            seconds = step.take()
            for name, cpu in step.cpu_seconds.items():
                cost = Cost(wall=seconds[name] / self.local_batch, cpu=cpu / self.local_batch)
                wall.setdefault(name, []).append(cost)
        self.trainer.optimizer.zero_grad()
        return [Stage(name=name, cost=median(costs), side="step") for name, costs in wall.items()]

    def copy_stage(self) -> Stage | None:
        """The copy of a batch to a GPU; None on a CPU."""
        if self.device.type == "cpu":
            return None
        batch = next(iter(self.loader.batches(_FIRST_STEP))).to(torch.device("cpu"))
        batch = copy.deepcopy(batch)
        self.loader.close()
        cost = repeated(lambda: batch.to(self.device), images=self.local_batch, count=8)
        return Stage(name=COPY, cost=cost, side="between")

    def collectives(self) -> Stage | None:
        """The sum of all gradients over the ranks; None for one rank."""
        if self.ranks.world_size == 1:
            return None
        size = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        gradient = torch.zeros(size, device=self.device)
        work = functools.partial(torch.distributed.all_reduce, gradient)
        work()
        cost = repeated(work, images=self.local_batch, count=3)
        return Stage(name="collectives", cost=cost, side="step", note=f"{size:,} gradients")

    # Together.

    def whole(self, steps: int, *, loader_may_limit: bool = True) -> Cost:
        """The cost of an image in the trainer's own loop, checkpoints and log included.

        The first steps are not timed: where the loader may limit the run, as many as there are
        batches that it makes ahead.
        """
        self.meet()
        images = self.loader.num_images
        skip = batches_begun(self.data_config, images, self.device) if loader_may_limit else 2
        trainer, moments = self.trainer, self.timed_loader.moments
        moments.clear()
        trainer.total_steps = trainer.step + skip + steps + 1
        try:
            trainer.fit()
        finally:
            self.loader.close()
        (first, cpu), (last, last_cpu) = moments[skip], moments[-1]
        count = (len(moments) - 1 - skip) * self.local_batch
        return Cost(wall=(last - first) / count, cpu=(last_cpu - cpu) / count)

    def checkpointing(self) -> Checkpointing:
        """Writes a checkpoint, and then another as a run does, without training."""
        trainer = self.trainer
        trainer.save()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.save(required=False)
        blocking = time.perf_counter() - wall
        trainer.finish_writing()
        writing = time.perf_counter() - wall
        cpu = time.process_time() - cpu
        assert trainer.run_folder is not None
        found = sorted((trainer.run_folder / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in found[-1].iterdir()) if found else 0
        return Checkpointing(
            blocking_seconds=blocking,
            writing_seconds=writing,
            writing_cpu_seconds=max(0.0, cpu),
            num_bytes=size,
            every_steps=self.config.checkpoint.every_steps,
        )


class StepBench:
    """A trainer with other settings, on a kept batch."""

    def __init__(self, bench: Bench, config: TrainConfig, batch: Batch) -> None:
        """Builds the trainer as a run does. Raises ValueError for settings that do not fit."""
        self.device, self.batch = bench.device, batch
        self.trainer = Trainer(
            config,
            ListLoader([batch]),
            ranks=bench.ranks,
            device=bench.device,
            progress=False,
        )

    def cost(self, *, count: int) -> Cost:
        """Takes steps."""
        return step_cost(self.trainer, self.batch, count=count)


def step_cost(trainer: Trainer, batch: Batch, *, count: int) -> Cost:
    """The step alone, on one batch that is kept; an image of a rank."""
    return repeated(lambda: trainer.train_step(batch), images=batch.batch_size, count=count)


def steps_within(trainer: Trainer, batch: Batch, seconds: float, *, most: int = 200) -> int:
    """Steps that take so long, agreed by all ranks; takes two to find out."""
    trainer.train_step(batch)
    wait_for_gpu()
    one = step_cost(trainer, batch, count=1).wall * batch.batch_size
    return int(from_rank_0(max(1, min(most, round(seconds / one))), trainer.ranks))


def batches_begun(config: TrainConfig, images: int, device: torch.device) -> int:
    """Batches that a loader has begun when it gives its first one."""
    graphs = len(split_threads(config.data, device))
    return (graphs + 1) * batches_ahead(config.data, images) + 1


def _generator(held: Sequence[HostBatch[Any]]) -> Generator[HostBatch[Any], None, None]:
    yield from _again(held)


def _again(values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from values
