"""The plan of a run: the largest local batch, time and price on more ranks, checkpoint cadence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from unicl_fast.config import TrainConfig
from unicl_fast.training.memory_plan import plan as plan_memory

from ..scale.model import Compute, Gloo, Nccl, simulate
from ..scale.sizes import measure_size
from .model import Cost, Measured, Variant

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
    price: float
    checkpoint_steps: int
    """Steps between checkpoints that lose the least, by the rate of failures."""
    lost: float
    """Part of the time that checkpoints and failures take at that cadence."""


def longer_steps(
    config: TrainConfig, measured: Measured, *, network_gbit: float
) -> dict[int, float]:
    """How many times as long a step takes on `RANKS` ranks, by the model of `unicl-bench scale`.

    Args:
        config: settings of the run; all texts of a batch are taken to be distinct.
        measured: the run as it is.
        network_gbit: Gb/s of a machine of 8 GPUs, or of one rank on CPUs.

    Raises:
        ValueError: the objective has no texts.
    """
    size, batch = measure_size(config), measured.local_batch
    alone = Compute.split(measured.step.wall * batch, size)
    on_gpus = measured.device == "cuda"
    nccl = Nccl(link_gbit=network_gbit)
    gloo = Gloo(link_mbit=1000 * network_gbit, hop_us=nccl.host_hop_us)

    def step_on(ranks: int) -> float:
        return simulate(
            alone.on_ranks(ranks, size, local_batch=batch),
            size,
            nccl if on_gpus else gloo,
            world_size=ranks,
            num_texts=batch,
            host_seconds=0.0 if on_gpus else None,
        ).seconds

    now = step_on(measured.world_size)
    return {ranks: step_on(ranks) / now for ranks in RANKS}


def on_ranks(
    measured: Measured,
    *,
    samples: int,
    price_per_hour: float,
    failures_per_day: float,
    longer: Mapping[int, float] | None = None,
) -> list[OnRanks]:
    """Plans the run on 1, 8 and 64 ranks.

    Args:
        measured: the run as it is.
        samples: length of the run.
        price_per_hour: of one rank.
        failures_per_day: of one rank; a run stops when any rank fails.
        longer: what `longer_steps` found; without it, communication is not counted.
    """
    plans = []
    for ranks in RANKS:
        step = Cost(wall=(longer or {}).get(ranks, 1.0), cpu=1.0)
        rate = measured.predict(Variant(option="", about="", step=step))
        rate *= ranks / measured.world_size
        step_seconds = measured.local_batch * ranks / rate
        steps, lost = cadence(
            cost_seconds=checkpoint_cost(measured),
            failure_seconds=_DAY / (failures_per_day * ranks) if failures_per_day else math.inf,
            step_seconds=step_seconds,
        )
        hours = samples / rate / 3600
        plans.append(
            OnRanks(
                ranks=ranks,
                images_per_second=rate,
                hours=hours,
                price=hours * ranks * price_per_hour,
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
