"""The plan of a run: the largest local batch, time on more ranks, cadence of checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from unicl_fast.config import TrainConfig
from unicl_fast.training.memory_plan import plan as plan_memory

from .model import Measured

RANKS = (1, 8, 64)
_DAY = 86_400.0
_LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class OnRanks:
    """The run on a number of ranks like this one, each with the present local batch."""

    ranks: int
    images_per_second: float
    hours: float
    """For all samples of the run, checkpoints included; evaluations are not counted."""
    checkpoint_steps: int
    """Steps between checkpoints that lose the least, by the rate of failures."""
    lost: float
    """Part of the time that checkpoints and failures take at that cadence."""


def on_ranks(measured: Measured, *, samples: int, failures_per_day: float) -> list[OnRanks]:
    """Plans the run on 1, 8 and 64 ranks, without communication between them.

    Args:
        measured: the run as it is.
        samples: length of the run.
        failures_per_day: of one rank; a run stops when any rank fails.
    """
    plans = []
    for ranks in RANKS:
        rate = measured.predict() * ranks / measured.world_size
        step_seconds = measured.local_batch * ranks / rate
        steps, lost = cadence(
            cost_seconds=checkpoint_cost(measured),
            failure_seconds=_DAY / (failures_per_day * ranks) if failures_per_day else math.inf,
            step_seconds=step_seconds,
        )
        plans.append(
            OnRanks(
                ranks=ranks,
                images_per_second=rate,
                hours=samples / rate / 3600,
                checkpoint_steps=steps,
                lost=lost,
            )
        )
    return plans


def checkpoint_cost(measured: Measured) -> float:
    """Seconds of training that one checkpoint takes."""
    one = measured.checkpoint
    on_cores = one.writing_cpu_seconds / measured.cores if measured.device == "cpu" else 0.0
    return one.blocking_seconds + on_cores


def cadence(
    *, cost_seconds: float, failure_seconds: float, step_seconds: float
) -> tuple[int, float]:
    """Steps between checkpoints by Young's rule, and the part of the time that is lost with it.

    The interval is sqrt(2 x cost x mean time between failures): then as much is lost by writing as
    by steps that are done again. Without failures there is no best one; once an hour is taken.
    """
    interval = 3600.0
    if math.isfinite(failure_seconds):
        interval = math.sqrt(2 * cost_seconds * failure_seconds)
    steps = max(1, round(interval / step_seconds))
    between = steps * step_seconds
    return steps, cost_seconds / between + between / 2 / failure_seconds


def largest_batch(
    config: TrainConfig, *, world_size: int, device_bytes: int, device_type: str, longest_text: int
) -> int:
    """The largest local batch, a power of two, whose step fits by the memory plan; 0 if none."""
    largest = 0
    batch = 1
    while batch <= _LARGEST:
        run = dataclasses.replace(config.run, global_batch_size=batch * world_size)
        found = plan_memory(
            dataclasses.replace(config, run=run),
            world_size=world_size,
            device_bytes=device_bytes,
            device_type=device_type,
            longest_text=longest_text,
        )
        if not found.fits:
            break
        largest, batch = batch, 2 * batch
    return largest
