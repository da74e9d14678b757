"""Diagnoses of made-up numbers, for tests of their sentences and their report."""

import dataclasses
from typing import Any

from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.tools.diagnose.model import (
    CHECKPOINT,
    LOGGING,
    READ,
    Change,
    Cost,
    Measured,
    Periodic,
    Stage,
    Trial,
)

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
    Stage(name=READ, cost=cost(0.1, 0.1), side="loader"),
    Stage(name="JPEG decode", cost=cost(0.5, 1.0), side="loader"),
    Stage(name="augment", cost=cost(0.2, 0.4), side="loader"),
    Stage(name="image encoder backward", cost=cost(0.6, 0.3), side="step"),
    Stage(name="text encoder backward", cost=cost(0.2, 0.1), side="step"),
    Stage(name=LOGGING, cost=cost(0.01, 0.01), side="loop"),
)
NO_CHECKPOINT = Periodic(name=CHECKPOINT, every_steps=0, seconds=0.1, note="written in 1 s")


def measured(**changes: Any) -> Measured:
    """A run on a GPU with 8 cores: the step takes 1 ms an image, the loader 0.8."""
    plain = Measured(
        config=config_to_dict(TrainConfig()), device="cuda", cores=8, threads=8,
        compute_threads=8, world_size=1, local_batch=100, samples=10**6, num_images=1000,
        loader=cost(0.8, 1.5), step=cost(1.0, 0.1), whole=cost(1.0, 1.6), waiting=0.0,
        reading=0.1, periodic=(NO_CHECKPOINT,), stages=STAGES,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)
