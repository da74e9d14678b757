"""Diagnoses of made-up numbers, for tests of their sentences and their report."""

from __future__ import annotations

import dataclasses
from typing import Any

from unicl_fast.benchmarks.diagnosis.model import READ, Change, Cost, Measured, Stage, Trial
from unicl_fast.benchmarks.diagnosis.report import Diagnosis
from unicl_fast.config import TrainConfig, config_to_dict

MS = 1e-3


def cost(wall: float, cpu: float = 0.0) -> Cost:
    """Of milliseconds."""
    return Cost(wall=wall * MS, cpu=cpu * MS)


def trial(option: str, *times: float, cpu: float = 1.0, **change: Any) -> Trial:
    """A change after which an image takes these times as long in each round."""
    change = {"about": "", "stage": "", "side": "step", **change}
    then = tuple(cost(one, cpu) for one in times)
    return Trial(
        change=Change(option=option, **change), now=(cost(1.0, 1.0),) * len(then), then=then
    )


STAGES = (
    Stage(name=READ, cost=cost(0.1, 0.1), side="feed"),
    Stage(name="plan and target map", cost=cost(0.01, 0.01), side="feed"),
    Stage(name="JPEG decode", cost=cost(0.5, 1.0), side="graph"),
    Stage(name="augment", cost=cost(0.2, 0.4), side="graph"),
    Stage(name="image encoder backward", cost=cost(0.6, 0.3), side="step"),
    Stage(name="text encoder backward", cost=cost(0.2, 0.1), side="step"),
)


def measured(**changes: Any) -> Measured:
    """A run on a GPU with 8 cores: the step takes 1 ms an image, the loader 0.8."""
    plain = Measured(
        device="cuda",
        cores=8,
        threads=8,
        compute_threads=8,
        world_size=1,
        local_batch=100,
        loader=cost(0.8, 1.5),
        step=cost(1.0, 0.1),
        whole=cost(1.0, 1.6),
        waiting=0.0,
        reading=0.1,
        stages=STAGES,
        largest_batch=64,
    )
    return dataclasses.replace(plain, **changes)


def diagnosis(found: Measured) -> Diagnosis:
    """What `unicl-bench run` makes of the numbers."""
    hours = 10**6 / found.rate / 3600
    return Diagnosis(measured=found, hours=hours, config=config_to_dict(TrainConfig()))
