"""Diagnoses of made-up numbers, for tests of their model, their sentences and their report."""

from __future__ import annotations

import dataclasses
from typing import Any

from unicl_fast.benchmarks.diagnosis.advise import advise, find_limit
from unicl_fast.benchmarks.diagnosis.model import READ, Checkpointing, Cost, Measured, Stage
from unicl_fast.benchmarks.diagnosis.report import Diagnosis
from unicl_fast.config import TrainConfig, config_to_dict

MS = 1e-3


def cost(wall: float, cpu: float = 0.0, *, spread: float = 0.0) -> Cost:
    """Of milliseconds; with three rounds, of which two are a part `spread` off, if one is given."""
    rounds = tuple(wall * MS * part for part in (1 - spread, 1, 1 + spread)) if spread else ()
    return Cost(wall=wall * MS, cpu=cpu * MS, rounds=rounds)


STAGES = (
    Stage(name=READ, cost=cost(0.1, 0.1), side="feed"),
    Stage(name="plan and target map", cost=cost(0.01, 0.01), side="feed"),
    Stage(name="JPEG decode", cost=cost(0.5, 1.0), side="graph"),
    Stage(name="augment", cost=cost(0.2, 0.4), side="graph"),
    Stage(name="image encoder backward", cost=cost(0.6, 0.01), side="step"),
    Stage(name="text encoder backward", cost=cost(0.2, 0.01), side="step"),
)
NO_CHECKPOINT = Checkpointing(
    blocking_seconds=0.1,
    writing_seconds=1.0,
    writing_cpu_seconds=0.2,
    num_bytes=10**8,
    every_steps=0,
)


def measured(**changes: Any) -> Measured:
    """A run on a GPU with 8 cores: the step takes 1 ms an image, the loader 0.8."""
    plain = Measured(
        device="cuda",
        cores=8,
        threads=8,
        world_size=1,
        local_batch=100,
        loader=cost(0.8, 1.5),
        step=cost(1.0, 0.1),
        whole=cost(1.0, 1.6),
        stages=STAGES,
        checkpoint=NO_CHECKPOINT,
    )
    return dataclasses.replace(plain, **changes)


def diagnosis(found: Measured, **changes: Any) -> Diagnosis:
    """What `unicl-bench run` makes of the numbers."""
    useful, idle = advise(found)
    config = TrainConfig()
    plain = Diagnosis(
        measured=found,
        limit=find_limit(found),
        advice=tuple(useful),
        does_not_matter=tuple(idle),
        hours=10**6 / found.predict() / 3600,
        largest_batch=64,
        tried=None,
        config=config_to_dict(config),
    )
    return dataclasses.replace(plain, **changes)
