"""What a checkpoint holds: the state of a run, and nothing of the data path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import StepLoader, tiny_config

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.config import config_to_dict
from unicl_fast.system.checksums import parse_checksummed_json
from unicl_fast.training.trainer import Trainer

DATA = {"sources": [{"num_samples": 12}]}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize(
    ("optimizer", "of_a_parameter", "of_all"),
    [("adamw", {"exp_avg", "exp_avg_sq", "step"}, set()),
     ("lamb", {"exp_avg", "exp_avg_sq"}, {"group_step.0", "group_step.1"})],
)  # fmt: skip
def test_a_checkpoint_is_config_step_weights_average_optimizer_and_scaler(
    images: torch.Tensor,
    tmp_path: Path,
    ema_decay: float,
    optimizer: str,
    of_a_parameter: set[str],
    of_all: set[str],
) -> None:
    config = tiny_config(optimizer=optimizer, steps=4)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, ema_decay=ema_decay)
    )
    trainer = Trainer(config, StepLoader(images), run_folder=tmp_path, data=DATA, progress=False)
    trainer.fit()
    earlier, newest = list_checkpoints(tmp_path / "checkpoints")
    weights = set(trainer.model.state_dict())
    expected = {"model.safetensors": weights}
    if ema_decay:
        expected["ema.safetensors"] = weights
    expected["optimizer.safetensors"] = of_all | {
        f"{key}.{name}" for key in of_a_parameter for name, _ in trainer.model.named_parameters()
    }
    assert {path.name for path in newest.iterdir()} == {*expected, "state.json"}
    for file, names in expected.items():
        assert set(load_file(newest / file)) == names, file
    state, before = (
        parse_checksummed_json((path / "state.json").read_bytes()) for path in (newest, earlier)
    )
    assert state == {
        "step": 4,
        "run_id": trainer.run_id,
        "config": json.loads(json.dumps(config_to_dict(config))),
        "scaler": {},
        "data": DATA,
        "optimizer": {"adamw": "AdamW", "lamb": "Lamb"}[optimizer],
        "checksums": state["checksums"],
    }
    assert set(state["checksums"]) == set(expected)
    # two steps, and so two batches, later: nothing but the step and the files has moved
    assert state | {"step": 0, "checksums": 0} == before | {"step": 0, "checksums": 0}


def test_a_scaler_that_is_used_is_part_of_it(images: torch.Tensor, tmp_path: Path) -> None:
    config = tiny_config(precision="fp16", steps=1)
    trainer = Trainer(config, StepLoader(images), run_folder=tmp_path, progress=False)
    trainer.fit()
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    state = parse_checksummed_json((checkpoint / "state.json").read_bytes())
    assert set(state["scaler"]) == {
        *("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"),
    }
    assert set(state) == {"step", "run_id", *("config", "scaler", "data", "optimizer", "checksums")}
