"""A diagnosis from a config to its report: what `unicl-bench run` does on each rank."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.ranks import from_rank_0, gather_objects
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.system.machine import choose_device, keep_freed_memory
from unicl_fast.system.program import logging_at

from ..harness import in_turns
from .advise import Advice, advise, find_limit
from .bench import Bench
from .clocks import median, median_ratio
from .diagnose import Budget, diagnose
from .model import Measured
from .report import Diagnosis

_TRIED_STEPS = 5


def measure(
    config: TrainConfig, *, seconds: float, try_it: bool, rounds: int, samples: int, scratch: Path
) -> Diagnosis | None:
    """Measures a run; None on ranks other than 0.

    The options are those of `unicl-bench run`, and `scratch` is an empty folder. Raises as
    `unicl-pretrain` does.
    """
    with on_bench(config, scratch) as bench:
        start = seconds_since_start()
        budget = Budget(seconds, is_shown=bench.ranks.is_main)
        with contextlib.closing(budget):
            measured = diagnose(bench, budget, folder=scratch / "trial", start_seconds=start)
        useful, idle = advise(measured)
        tried = None
        if try_it:
            turns = {"rounds": rounds, "seconds": seconds / 12}
            tried = _try(bench, useful, measured, scratch, turns)
        if not bench.ranks.is_main:
            return None
        run = bench.config.run
        samples = samples or run.total_steps * run.global_batch_size
        return Diagnosis(
            measured=measured,
            limit=find_limit(measured),
            advice=tuple(useful),
            does_not_matter=tuple(idle),
            hours=samples / measured.predict() / 3600,
            largest_batch=bench.largest_batch(),
            tried=tried,
            config=config_to_dict(bench.config),
        )


def _try(
    bench: Bench, useful: Sequence[Advice], measured: Measured, scratch: Path, turns: dict[str, Any]
) -> dict[str, Any] | None:
    """Runs with the best change that settings or data can make; None where there is none."""
    alone = bench.ranks.world_size == 1  # each rank has packed images anew for itself
    known = {
        advice.variant.option: advice
        for advice in useful
        if advice.variant.set or (advice.variant.data and alone)
    }
    option = from_rank_0(next(iter(known), ""), bench.ranks)  # ranks may see other gains
    if not all(gather_objects(option in known, bench.ranks)):
        return None
    return try_out(
        bench, known[option], measured, scratch / "tried",
        **turns,
    )  # fmt: skip


def try_out(
    bench: Bench,
    advice: Advice,
    measured: Measured,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """The rate that a change gives in the trainer's own loop, in turns with the run as it is."""
    variant = advice.variant
    config = bench.changed(variant.set)
    if variant.data:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, train=variant.data)
        )
    other = Bench(config, folder=folder, ranks=bench.ranks, device=bench.device)
    may_limit = measured.loader.wall > measured.step.wall / 2
    may_limit = bool(from_rank_0(may_limit, bench.ranks))
    now_steps = steps_in(bench, measured.rate, seconds)
    then_steps = steps_in(other, advice.images_per_second, seconds)
    with contextlib.closing(other):
        turns = in_turns(
            {
                "now": lambda: bench.whole(now_steps, loader_may_limit=may_limit),
                "then": lambda: other.whole(then_steps, loader_may_limit=may_limit),
            },
            rounds=rounds,
            before=lambda _: os.sync(),  # no checkpoint of the turn before is being written
        )
    now, then = median(turns["now"]), median(turns["then"])
    # the machine may be slower now than it was for the diagnosis: the ratio is what was predicted
    gain = 1 / median_ratio(turns["then"], turns["now"]).wall
    return {
        "option": variant.option,
        "now": measured.world_size / now.wall,
        "then": measured.world_size / then.wall,
        "predicted_gain": advice.images_per_second / measured.rate,
        "measured_gain": gain,
    }


def steps_in(bench: Bench, rate: float, seconds: float) -> int:
    """Steps in `seconds` at a rate of all ranks, agreed by them; at least a few."""
    steps = max(_TRIED_STEPS, round(seconds * rate / bench.config.run.global_batch_size))
    return int(from_rank_0(steps, bench.ranks))


@contextlib.contextmanager
def on_bench(config: TrainConfig, scratch: Path) -> Iterator[Bench]:
    """The run of a config on this rank's bench; caches of object stores begin empty."""
    keep_freed_memory()
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cache = dataclasses.replace(config.data, cache_folder=str(scratch / "cache"))
    config = dataclasses.replace(config, data=cache)
    with (
        logging_at("unicl_fast", logging.WARNING),  # what each part says at its start
        process_group(device, timeout_seconds=config.run.timeout_seconds) as ranks,
    ):
        bench = Bench(config, folder=scratch / "run", ranks=ranks, device=device)
        with contextlib.closing(bench):
            # each measurement collects garbage first: 0.3 s, if it looked at all that stays
            gc.collect()
            gc.freeze()
            try:
                yield bench
            finally:
                gc.unfreeze()


def seconds_since_start() -> float:
    """Seconds since this process was started; Linux only."""
    text = Path("/proc/self/stat").read_text(encoding="utf-8")
    ticks = int(text[text.rindex(")") + 2 :].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
