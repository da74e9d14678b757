"""Times the parts of a run's loader: reading, checking, planning, decoding."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import xxhash

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.pipelines.crops import CropBatches
from unicl_fast.pipelines.graph import Pipeline, build_decoding_graph, build_train_graph
from unicl_fast.pipelines.running import Pace, decode
from unicl_fast.pipelines.train_loader import decoder_of
from unicl_fast.system.wording import count_of

from .bench import Bench
from .clocks import FIRST_STEP, flow
from .measuring import in_turns
from .model import CHECKSUMS, READ, Cost, Stage, median

T = TypeVar("T")
_ROUNDS = 3
_READ_SAMPLES, _KEPT_SAMPLES, _HELD_BATCHES = 2048, 64, 16


def feed_stages(bench: Bench, *, seconds: float) -> list[Stage]:
    """The parts of the feeding thread, each alone, in turns of `seconds`."""
    planner, batch, ranks = bench.loader.steps, bench.local_batch, bench.ranks
    count = planner.at_once
    steps = -(-_READ_SAMPLES // batch)
    of_rank = {"rank": ranks.rank, "world_size": ranks.world_size}
    sources, samples = bench.loader.plan.schedule(0, steps, **of_rank)
    pairs = list(zip(sources.tolist(), samples.tolist(), strict=True))[:_READ_SAMPLES]

    def images(pairs: Iterable[tuple[int, int]]) -> Iterator[Any]:
        return (bench.parts.datasets[source].image_bytes(sample) for source, sample in pairs)

    kept = _within(images(pairs[:_KEPT_SAMPLES]), seconds)

    def read() -> Cost:
        return flow(images(itertools.cycle(pairs)), images=1, skip=0, seconds=seconds)

    def check() -> Cost:
        digests = (xxhash.xxh3_64_intdigest(image) for image in itertools.cycle(kept))
        return flow(digests, images=1, skip=1, seconds=min(seconds, 0.05))

    def plan() -> Cost:
        plans = (planner.plan_steps(start, count) for start in range(0, 1 << 40, count))
        return flow(plans, images=count * batch, skip=1, seconds=min(seconds, 0.05))

    works = {READ: read, CHECKSUMS: check, "plan and target map": plan}
    turns = in_turns(works, rounds=_ROUNDS, most_seconds=6 * seconds)
    notes = {READ: f"{sum(map(len, kept)) / len(kept) / 1e3:,.0f} kB per image"}
    return [
        Stage(name=name, cost=median(taken), side="feed", note=notes.get(name, ""))
        for name, taken in turns.items()
    ]


def graph_stages(bench: Bench, *, seconds: float) -> list[Stage]:
    """The costs that decoding, resizing and augmentation each add."""
    loader, dataset = bench.loader, bench.parts.datasets[0]
    data = bench.config.data
    if loader.form == "crops":
        return [_crops(bench, seconds)]
    with contextlib.closing(loader.host.batches(FIRST_STEP)) as batches:
        whole = _within(itertools.islice(batches, _HELD_BATCHES), seconds)
    # a part of a batch, one at a time: a batch of large images needs minutes
    images = min(loader.num_images, max(16, 8 * data.threads))
    held = [dataclasses.replace(one, inputs=tuple(rows[:images] for rows in one.inputs))
            for one in whole]  # fmt: skip
    device = decoder_of(data, bench.device)
    pace = Pace(threads=(data.threads,), ahead=1)
    place: dict[str, Any] = {"device": device, "form": loader.form}
    builds: dict[str, Callable[..., Pipeline]] = {}
    if device.type == "cpu":
        builds["decode"] = functools.partial(build_decoding_graph, **place)
    builds["resize and flip"] = functools.partial(build_train_graph, **place, data=data)
    plain_inputs = held
    if loader.augmentation is not None:
        builds["augment"] = loader.build_graph
        # the last input, the rows of the augmentation, is unknown to the other graphs
        plain_inputs = [dataclasses.replace(one, inputs=one.inputs[:-1]) for one in held]

    def take(name: str) -> Cost:
        kept = held if name == "augment" else plain_inputs
        inputs = (one for one in itertools.cycle(kept))  # a generator, which `decode` closes
        batches = decode(builds[name], inputs, batch_size=images, device=device, pace=pace)
        count = images / loader.plan.num_views
        return flow(batches, images=count, skip=pace.batches_begun, seconds=seconds)

    # in turns, since only their differences matter
    works = {name: functools.partial(take, name) for name in builds}
    turns = in_turns(works, rounds=_ROUNDS, most_seconds=6 * seconds)
    stages, before = [], [Cost(wall=0.0, cpu=0.0)] * _ROUNDS
    for name, taken in turns.items():
        added = [
            Cost(wall=max(0.0, with_it.wall - less.wall), cpu=max(0.0, with_it.cpu - less.cpu))
            for with_it, less in zip(taken, before, strict=False)
        ]
        note, shown = "", name
        if name == "decode":
            rows = dataset.samples[:1000]
            height, width = (int(np.median(rows[side])) for side in ("height", "width"))
            threads = count_of(data.threads, "thread")
            note = f"{threads}, usually {height} x {width} pixels"
            shown = decoding_stage(bench)
        stages.append(Stage(name=shown, cost=median(added), side="graph", note=note))
        before = taken
    return stages


def _crops(bench: Bench, seconds: float) -> Stage:
    """The single stage of small or raw images: threads go from plan to crop."""
    host = bench.loader.host
    assert isinstance(host, CropBatches)

    def take() -> Cost:
        with contextlib.closing(host.resizer()) as resizer:
            at_once = resizer.batches_at_once
            groups = (host.group(resizer, step) for step in range(0, 1 << 30, at_once))
            return flow(groups, images=at_once * bench.local_batch, skip=1, seconds=seconds)

    taken = in_turns({"crops": take}, rounds=_ROUNDS, most_seconds=6 * seconds)["crops"]
    return Stage(name=decoding_stage(bench), cost=median(taken), side="graph")


def decoding_stage(bench: Bench) -> str:
    """The name of the stage that decodes images or crops stored pixels."""
    kind = image_kind(bench.parts.datasets[0])
    if bench.loader.form != "crops":
        return f"{kind} decode"
    return (f"{kind} decode, " if bench.loader.reading.decodes_files else "") + "crop and resize"


def image_kind(dataset: PackedDataset) -> str:
    """The first sample's format: JPEG, PNG, WebP or raw."""
    first = bytes(dataset.image_bytes(0)[:12])
    if first.startswith(b"\xff\xd8"):
        return "JPEG"
    if first.startswith(b"\x89PNG"):
        return "PNG"
    return "WebP" if first[8:12] == b"WEBP" else "raw"


def _within(values: Iterable[T], seconds: float) -> list[T]:
    """The values that arrive within `seconds`, at least one."""
    found: list[T] = []
    deadline = time.perf_counter() + seconds
    for value in values:
        found.append(value)
        if time.perf_counter() > deadline:
            break
    return found
