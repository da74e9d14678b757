"""Measures a run on the bench: its stages alone, all of it together, and changes until time is up.

All ranks do the same at the same time: numbers of steps are rank 0's, and so is the decision
whether there is time for one more change.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from unicl_fast.batch import Batch
from unicl_fast.distributed.ranks import from_rank_0, gather_objects
from unicl_fast.system.machine import cpu_times

from ..harness import in_turns
from .advise import Limit, find_limit
from .bench import Bench, step_cost, steps_within
from .clocks import Watch, median, median_ratio
from .model import READ, Cost, Measured, RankFigures, Stage, Variant
from .variants import Trials, candidates

_ROUNDS = 3
_FEWEST_CHANGES = 2
"""Changes that are measured even where the time is up: without one there is no advice."""
_FEWEST_STEPS, _MOST_STEPS = 4, 400
_LOSS = "loss and its gradient"
"""The part of a step in which ranks wait for each other."""


class Budget:
    """The seconds that a diagnosis may take, and a bar that shows them."""

    def __init__(self, seconds: float, *, turn: float | None = None, is_shown: bool) -> None:
        self.seconds = seconds
        self.turn = turn or min(1.0, seconds / 90)
        """Seconds of one turn of one contestant."""
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=round(seconds), bar_format="{desc:40} {percentage:3.0f} %", disable=not is_shown
        )

    def begin(self, what: str) -> None:
        """Names what is measured now."""
        self._bar.set_description_str(what, refresh=False)
        self._bar.n = min(self._bar.total, round(self.spent))
        self._bar.refresh()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - self.spent

    def close(self) -> None:
        """Removes the bar."""
        self._bar.leave = False
        self._bar.close()


def diagnose(bench: Bench, budget: Budget, *, folder: Path, start_seconds: float) -> Measured:
    """Measures one rank's run; all ranks call it together, and each has its own numbers.

    `folder` is for small data sets that are packed anew and for blocks of object stores.
    """
    budget.begin("object store")
    store = bench.loader_parts.store_cost(folder / "store", seconds=4 * budget.turn)
    budget.begin("loader and step, alone and together")
    batch = bench.kept_batch(bench.loader)
    watch = Watch(own=set(gather_objects(bench.process, bench.ranks)))
    loader, step, whole, step_ran = _alone_and_together(bench, budget, batch, watch)
    stages = _stages(bench, budget, batch)
    budget.begin("checkpoint")
    checkpoint = bench.checkpointing()
    measured = Measured(
        device=bench.device.type,
        cores=bench.cores,
        threads=bench.config.data.threads,
        world_size=bench.ranks.world_size,
        local_batch=bench.local_batch,
        loader=loader,
        step=step,
        whole=whole,
        stages=tuple(stages),
        checkpoint=checkpoint,
        others_cores=watch.cores / bench.ranks.world_size,
        others=watch.busiest,
        step_ran=step_ran,
        gpus=torch.cuda.device_count() if bench.device.type == "cuda" else 0,
        ranks_per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        ranks=_figures_of_ranks(bench, loader, stages),
        start_seconds=start_seconds,
    )
    if store is not None:
        measured = dataclasses.replace(
            measured,
            loader=max(loader, Cost(wall=store.wall, cpu=loader.cpu), key=lambda cost: cost.wall),
            store_wall=store.wall,
            cached_wall=loader.wall,
            larger_cache=bench.loader_parts.larger_cache,
        )
    return _with_variants(bench, budget, measured, batch, folder=folder)


def _alone_and_together(
    bench: Bench, budget: Budget, batch: Batch, watch: Watch
) -> tuple[Cost, Cost, Cost, float]:
    """The costs of loader, step and both, in turns: on a busy machine only their ratios hold.

    The last number is `Measured.step_ran`.
    """
    steps = steps_within(bench.trainer, batch, budget.turn)
    first = step_cost(bench.trainer, batch, count=1)
    loader = bench.loader_cost(bench.loader, bench.config, seconds=0)
    slowest = max(loader.wall, first.wall, (loader.cpu + first.cpu) / bench.cores)
    count = round(budget.seconds / 30 / (slowest * bench.local_batch))
    count = max(_FEWEST_STEPS, min(_MOST_STEPS, count))
    may_limit = loader.wall > first.wall / 2
    count = int(from_rank_0(count, bench.ranks))
    may_limit = bool(from_rank_0(may_limit, bench.ranks))
    ran = []

    def step_alone() -> Cost:
        before = cpu_times()
        cost = step_cost(bench.trainer, batch, count=steps)
        after = cpu_times()
        own, waited = after.own - before.own, after.waited - before.waited
        ran.append(own / (own + max(0.0, waited)))
        return cost

    works = {
        "loader": lambda: bench.loader_cost(bench.loader, bench.config, seconds=budget.turn),
        "step": step_alone,
        "whole": lambda: bench.whole(count, loader_may_limit=may_limit),
    }
    with watch.watching():
        turns = in_turns(works, rounds=_ROUNDS)
    whole = median(turns["whole"])
    loader = whole.times(median_ratio(turns["loader"], turns["whole"]))
    step = whole.times(median_ratio(turns["step"], turns["whole"]))
    return loader, step, whole, statistics.median(ran)


def _stages(bench: Bench, budget: Budget, batch: Batch) -> list[Stage]:
    budget.begin("the loader's stages")
    stages = bench.loader_parts.stages(seconds=budget.turn)
    budget.begin("the step's parts")
    seconds = step_cost(bench.trainer, batch, count=1).wall * bench.local_batch
    rounds = max(2, min(10, round(2 * budget.turn / max(1e-6, seconds))))
    rounds = int(from_rank_0(rounds, bench.ranks))
    stages += bench.step_stages(batch, rounds=rounds)
    more = (bench.copy_stage(), bench.collectives())
    return stages + [stage for stage in more if stage is not None]


def _figures_of_ranks(
    bench: Bench, loader: Cost, stages: Sequence[Stage]
) -> tuple[RankFigures, ...]:
    """The seconds that each rank takes by itself, from all ranks."""
    step = sum(
        stage.cost.wall
        for stage in stages
        if stage.side == "step" and stage.name not in (_LOSS, "collectives")
    )
    mine = [bench.ranks.rank, loader.wall, step]
    every = gather_objects(mine, bench.ranks)
    return tuple(RankFigures(rank=int(r), loader=one, step=other) for r, one, other in every)


def _with_variants(
    bench: Bench, budget: Budget, measured: Measured, batch: Batch, *, folder: Path
) -> Measured:
    """Measures changes, those first that relieve what limits the run, until time is up."""
    trials = Trials(bench, batch, folder=folder, seconds=budget.turn / 2)
    found: list[Variant] = []
    left_out: list[str] = []
    longest = 0.0
    limit = find_limit(measured)
    of_step = {stage.name for stage in measured.stages if stage.side == "step"}
    sides = {"step"} if limit.resource == "step" or limit.stage in of_step else {"loader"}
    every = sorted(candidates(bench), key=functools.partial(_urgency, limit, sides))
    order = from_rank_0([one.option for one in every], bench.ranks)  # ranks may see other limits
    every.sort(key=lambda one: order.index(one.option))
    for number, one in enumerate(every):
        has_time = number < _FEWEST_CHANGES or budget.left > longest
        if not from_rank_0(has_time, bench.ranks):
            left_out.append(f"{one.option}: no time was left, --seconds was {budget.seconds:g}")
            continue
        budget.begin(one.option)
        begun = time.perf_counter()
        variant = trials.measure(one)
        longest = max(longest, time.perf_counter() - begun)
        if isinstance(variant, Variant):
            found.append(variant)
        else:
            left_out.append(variant)
    return dataclasses.replace(measured, variants=tuple(found), not_measured=tuple(left_out))


def _urgency(limit: Limit, sides: set[str], one: Variant) -> int:
    """0 for changes of the very stage that limits, 1 for others of the same side, 2 for the rest.

    `sides` are those that take part in the limit: `loader` or `step`.
    """
    if limit.stage.startswith(one.stage) or (limit.stage == READ and one.side == "images"):
        return 0
    own = {"loader", "images"} if "loader" in sides else {"step"}
    return 1 if one.side in own or one.side == "both" else 2
