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
from unicl_fast.training.data import longest_text

from ..harness import in_turns
from .advise import Advice, advise, find_limit
from .bench import Bench
from .clocks import median, median_ratio
from .diagnose import Budget, diagnose
from .model import Measured
from .outlook import largest_batch, on_ranks
from .report import Diagnosis

_TRIED_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The options of a diagnosis; their sentences are those of `run.Run`."""

    seconds: float
    rounds: int
    """Turns of the best change and of the run as it is; 0 tries none."""
    samples: int
    failures_per_day: float


def measure(config: TrainConfig, request: Request, *, scratch: Path) -> Diagnosis | None:
    """Measures a run; None on ranks other than 0.

    `scratch` is an empty folder. Raises as `unicl-pretrain` does.
    """
    with on_bench(config, scratch) as bench:
        start = seconds_since_start()
        budget = Budget(request.seconds, is_shown=bench.ranks.is_main)
        with contextlib.closing(budget):
            measured = diagnose(bench, budget, folder=scratch / "trial", start_seconds=start)
        useful, idle = advise(measured)
        tried = None
        if request.rounds:
            tried = _try(bench, useful, measured, scratch, request)
        if not bench.ranks.is_main:
            return None
        return _diagnosis(bench, measured, useful, idle, tried, request)


def _diagnosis(
    bench: Bench,
    measured: Measured,
    useful: Sequence[Advice],
    idle: Sequence[Advice],
    tried: dict[str, Any] | None,
    request: Request,
) -> Diagnosis:
    config = bench.config
    plans = on_ranks(
        measured,
        samples=request.samples or config.run.total_steps * config.run.global_batch_size,
        failures_per_day=request.failures_per_day,
    )
    batch = largest_batch(
        config,
        world_size=bench.ranks.world_size,
        device_bytes=bench.free_bytes,
        device_type=bench.device.type,
        longest_text=longest_text(bench.parts.datasets, bench.parts.prompts),
    )
    return Diagnosis(
        measured=measured,
        limit=find_limit(measured),
        useful=tuple(useful),
        idle=tuple(idle),
        plans=tuple(plans),
        largest_batch=batch,
        tried=tried,
        config=config_to_dict(config),
    )


def _try(
    bench: Bench, useful: Sequence[Advice], measured: Measured, scratch: Path, request: Request
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
        rounds=request.rounds, seconds=request.seconds / 12,
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
            before=lambda _: (
                os.sync()
            ),  # checkpoints of one turn are not still being written in the next
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
