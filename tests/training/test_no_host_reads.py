"""A step that logs nothing waits for no device, and a non-finite step is masked there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_runs import (
    global_batch,
    tiny_config,
)
from torch.utils._python_dispatch import TorchDispatchMode

from unicl_fast.batch import ListLoader
from unicl_fast.config import DeviceName, ModelConfig, TrainConfig
from unicl_fast.models.text_encoder import build_text_encoder
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

# What makes the host wait: values read, shapes that depend on values, and tensors made of Python's
# numbers, since their copy to the device is not asynchronous.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "masked_select",
    "bincount",
    "nonzero_numpy",
    "lift_fresh",
}


class WaitingOperators(TorchDispatchMode):
    """Records operators that would wait for a device, if the tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        sized = name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None
        if name in WAITING or by_mask or not sized:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def trainer_of(
    images: torch.Tensor,
    *,
    ema_decay: float = 0.0,
    device: DeviceName = "cpu",
    **efficiency: object,
) -> Trainer:
    config = tiny_config(**efficiency)
    config = config.changed(run={"device": device})
    config = config.changed(optim={"ema_decay": ema_decay})
    return make_trainer(config, ListLoader([global_batch(images)]), progress=False)


def rarely_logging(log_every_steps: int) -> TrainConfig:
    """Six steps and one checkpoint at the end, since its numbers are looked over before writing."""
    config = tiny_config(steps=6)
    return config.changed(run={"log_every_steps": log_every_steps}, checkpoint={"every_steps": 0})


@pytest.mark.parametrize(
    "efficiency",
    [
        {},
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"loss": "tiled"},
        {"micro_batch_size": 5},
        {"micro_batch_size": 5, "precision": "fp16", "activation_checkpointing": True},
        {"ema_decay": 0.99},
        {"ema_decay": 0.99, "micro_batch_size": 5, "precision": "fp32"},
        {"ema_decay": 0.99, "image_encoder": "unicl_convnet7_small", "precision": "fp32"},
    ],
    ids=lambda efficiency: ",".join(f"{k}={v}" for k, v in efficiency.items()) or "default",
)
def test_a_training_step_reads_nothing(images: torch.Tensor, efficiency: dict) -> None:
    trainer = trainer_of(images, **efficiency)
    batches = trainer.loader.batches(0)
    trainer.train_step(next(batches))  # the first one makes what stays
    with WaitingOperators() as operators:
        trainer.train_step(next(batches))
    assert operators.found == []


def test_the_recorder_sees_reads() -> None:
    ones = torch.ones(3)
    with WaitingOperators() as operators:
        float(ones.sum())
        ones[ones > 0]
        torch.unique(ones)
        torch.tensor([1.0])
    assert operators.found == ["_local_scalar_dense", "index", "_unique2", "lift_fresh"]


def test_a_run_reads_when_it_logs_and_at_no_other_step(images: torch.Tensor) -> None:
    trainer = make_trainer(rarely_logging(3), ListLoader([global_batch(images)]), progress=False)
    trainer.train_step(next(trainer.loader.batches(0)))
    with WaitingOperators() as operators:
        reads_before = []
        plain_step = trainer.train_step

        def watched_step(batch):
            reads_before.append(len(operators.found))
            return plain_step(batch)

        trainer.train_step = watched_step
        trainer.fit()
    steps = dict(zip(range(1, 6), reads_before, strict=True))
    assert steps[1] == steps[2] == 0
    assert steps[3] == steps[4] == steps[5]
    assert 0 < steps[3] < len(operators.found)


@contextmanager
def poisoned(trainer: Trainer) -> Iterator[None]:
    """Features of the first image are not a number."""

    def poison(module: torch.nn.Module, inputs: tuple, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([features[:1] * torch.nan, features[1:]])

    handle = trainer.model.image_encoder.register_forward_hook(poison)
    yield
    handle.remove()


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {f"weight {name}": value for name, value in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state[parameter].items():
            state[f"{key} of {name}"] = value
    for index, group in enumerate(trainer.optimizer.param_groups):
        state[f"steps of group {index}"] = torch.as_tensor(group.get("step", 0))
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "fp16"},
        {"micro_batch_size": 5},
        {"optimizer": "lamb"},
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
def test_a_nonfinite_step_changes_neither_weights_nor_optimizer(
    images: torch.Tensor, settings: dict
) -> None:
    trainer = trainer_of(images, **settings)
    batches = trainer.loader.batches(0)
    trainer.train_step(next(batches))
    trainer.train_step(next(batches))
    before = everything(trainer)
    with poisoned(trainer):
        loss, _ = trainer.train_step(next(batches))
    assert not loss.isfinite()
    for name, value in everything(trainer).items():
        assert torch.equal(value, before[name]), name
    loss, _ = trainer.train_step(next(batches))
    assert loss.isfinite()
    if not trainer.scaler.is_enabled():  # which may still be looking for its scale
        assert not torch.equal(
            everything(trainer)["exp_avg of image_projection"],
            before["exp_avg of image_projection"],
        )


def test_the_first_nonfinite_step_is_named_at_the_next_logging_step(images: torch.Tensor) -> None:
    trainer = make_trainer(rarely_logging(5), ListLoader([global_batch(images)]), progress=False)
    plain_step = trainer.train_step

    def step_with_two_nonfinite_ones(batch):
        if batch.step in (1, 3):
            with poisoned(trainer):
                return plain_step(batch)
        return plain_step(batch)

    trainer.train_step = step_with_two_nonfinite_ones
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        trainer.fit()
    assert trainer.step == 5


@pytest.mark.parametrize("pool", ["bert:mean", "roberta:pooler", "distilbert:cls", "mpnet:mean"])
def test_text_encoders_of_transformers_read_nothing(pool: str) -> None:
    """By themselves they look whether a mask of padding has any."""
    sizes = {"text_width": 32, "text_layers": 1, "text_heads": 4, "vocab_size": 100}
    encoder = build_text_encoder(ModelConfig(**sizes, text_activation="gelu", text_pool=pool))
    tokens = torch.randint(1, 100, (4, 12))
    tokens[0, 5:] = 0
    with WaitingOperators() as waiting:
        encoder(tokens).sum().backward()
    assert waiting.found == []
