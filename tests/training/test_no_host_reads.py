"""A step that logs nothing waits for no device."""

import pytest
import torch
from small_runs import OBJECTIVES, global_batch, labelled_batch, objective_config, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from unicl_fast.batch import ListLoader
from unicl_fast.config import ModelConfig
from unicl_fast.models.text_encoder import build_text_encoder
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

# What makes the host wait: values read, shapes that depend on values, and tensors made of Python's
# numbers, since their copy to the device is not asynchronous.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2"),
    *("masked_select", "bincount", "lift_fresh"),
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


def trainer_of(images: torch.Tensor, **efficiency: object) -> Trainer:
    config = tiny_config(**efficiency)
    return make_trainer(config, ListLoader([global_batch(images)]), progress=False)


def reads_of_a_step(trainer: Trainer) -> list[str]:
    """Of the second, since the first one makes what stays."""
    batches = trainer.loader.batches(0)
    trainer.train_step(next(batches))
    with WaitingOperators() as operators:
        trainer.train_step(next(batches))
    return operators.found


@pytest.mark.parametrize(
    "efficiency",
    [
        *({}, {"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp16"}),
        *({"loss": "tiled"}, {"micro_batch_size": 5}),
        {"micro_batch_size": 5, "precision": "fp16", "activation_checkpointing": True},
        {"image_encoder": "unicl_convnet7_small", "precision": "fp32"},
    ],
    ids=lambda efficiency: ",".join(f"{k}={v}" for k, v in efficiency.items()) or "default",
)
def test_a_training_step_reads_nothing(images, efficiency):
    assert reads_of_a_step(trainer_of(images, **efficiency)) == []


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "mixed" not in name])
def test_a_step_of_an_objective_reads_nothing(images, objective):
    loader = ListLoader([labelled_batch(images, objective=objective)])
    trainer = make_trainer(objective_config(objective), loader, progress=False)
    assert reads_of_a_step(trainer) == []


def test_the_recorder_sees_reads():
    ones = torch.ones(3)
    with WaitingOperators() as operators:
        float(ones.sum())
        ones[ones > 0]
        torch.unique(ones)
        torch.tensor([1.0])
    assert operators.found == ["_local_scalar_dense", "index", "_unique2", "lift_fresh"]


def test_a_run_reads_when_it_logs_and_at_no_other_step(images):
    # one checkpoint at the end, since its numbers are looked over before writing
    rarely = {"run": {"log_every_steps": 3}, "checkpoint": {"every_steps": 0}}
    config = tiny_config(steps=6).changed(**rarely)
    trainer = make_trainer(config, ListLoader([global_batch(images)]), progress=False)
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


@pytest.mark.parametrize("pool", ["bert:mean", "roberta:pooler", "distilbert:cls", "mpnet:mean"])
def test_text_encoders_of_transformers_read_nothing(pool):
    """By themselves they look whether a mask of padding has any."""
    sizes = {"text_width": 32, "text_layers": 1, "text_heads": 4, "vocab_size": 100}
    encoder = build_text_encoder(ModelConfig(**sizes, text_activation="gelu", text_pool=pool))
    tokens = torch.randint(1, 100, (4, 12))
    tokens[0, 5:] = 0
    with WaitingOperators() as waiting:
        encoder(tokens).sum().backward()
    assert waiting.found == []
