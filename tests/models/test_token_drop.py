"""Tokens that a ViT leaves out: as many of each image, a function of the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_runs import StepLoader, tiny_config

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.models.image_encoder import KeyedTokenDrop
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.assembly import make_trainer


def config_of(*, part: float = 0.5, **settings: Any) -> TrainConfig:
    return tiny_config(**settings).changed(model={"token_drop": part})


def shown(model: UniCL, batch: Any, *, step: int, rows: slice = slice(None)) -> torch.Tensor:
    """The tokens [b t w] behind the layer that drops them."""
    found: list[torch.Tensor] = []
    layer = model.drop_path_key.tokens
    handle = layer.register_forward_hook(lambda _, __, out: found.append(out))
    pixels = batch.images[rows].permute(0, 3, 1, 2).double() / 255
    model.set_drop_path_key(step=step, global_index=batch.global_index[rows])
    model.double().image_encoder(pixels)
    handle.remove()
    return found[0]


def test_tokens_are_a_function_of_step_and_sample(images):
    batch = next(iter(StepLoader(images).batches(0)))
    model = build_model(config_of())
    first = shown(model, batch, step=0)
    model.eval()
    every = shown(model, batch, step=0)
    prefix = model.image_encoder.num_prefix_tokens
    assert first.shape[1] - prefix == (every.shape[1] - prefix) / 2
    # those that are left are some of all, in their order, and other ones of each image
    kept = [
        [every[image].eq(token).all(dim=1).nonzero()[0].item() for token in first[image]]
        for image in range(len(first))
    ]
    assert all(numbers == sorted(set(numbers)) for numbers in kept)
    assert all(numbers[:prefix] == list(range(prefix)) for numbers in kept)
    assert len({tuple(numbers) for numbers in kept}) > 3  # of the 6 that 4 patches allow
    model.train()
    assert torch.equal(shown(model, batch, step=0, rows=slice(5, 9)), first[5:9])
    assert not torch.equal(shown(model, batch, step=1), first)


def test_micro_batches_leave_out_what_the_whole_batch_does(images):
    losses = []
    for size in (0, 4):
        trainer = make_trainer(config_of(micro_batch_size=size), StepLoader(images), progress=False)
        batch = next(iter(trainer.loader.batches(0)))
        losses.append([float(trainer.train_step(batch)[0]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    plain = make_trainer(config_of(part=0.0), StepLoader(images), progress=False)
    assert float(plain.train_step(batch)[0]) != pytest.approx(losses[0][0], rel=1e-6)


def test_an_encoder_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"model.token_drop .* timm's ViTs, and .* is none"):
        build_model(config_of(image_encoder="unicl_convnet7_small"))


def test_at_least_one_patch_is_left():
    layer = KeyedTokenDrop(0.999, num_prefix_tokens=1)
    layer.keys = torch.arange(2)
    assert layer(torch.randn(2, 5, 3)).shape == (2, 2, 3)
