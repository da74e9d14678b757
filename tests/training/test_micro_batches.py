"""Micro-batches give the plain step's loss, gradients and runs; one of them at a time is alive."""

import itertools

import pytest
import torch
from rank_workers import first_gradients, run_on_ranks, write_objective_gradients
from small_runs import labelled_loader, objective_config, tiny_config, trainer_of

from unicl_fast.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def plain(images: torch.Tensor) -> tuple[float, dict]:
    """Loss and gradients of one process without micro-batches."""
    return first_gradients(images, Ranks(), tiny_config())


def assert_equal_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13, msg=name)
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"


# The batch holds 12 images and 5 distinct texts.
@pytest.mark.parametrize(
    ("micro_batch_size", "others"),
    [
        pytest.param(size, others, marks=pytest.mark.slow if others and size != 5 else ())
        for size in (1, 4, 5, 11)
        for others in ({}, {"activation_checkpointing": True})
    ],
    ids=str,
)
def test_micro_batches_give_the_gradients_of_the_batch(images, plain, micro_batch_size, others):
    config = tiny_config(micro_batch_size=micro_batch_size, **others)
    loss, gradients = first_gradients(images, Ranks(), config)
    assert loss == pytest.approx(plain[0], rel=1e-13)
    assert_equal_gradients(gradients, plain[1])


@pytest.mark.parametrize(
    "world_size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_micro_batches_on_ranks_give_the_gradients_of_one_process(images, tmp_path, world_size):
    """Under the sigmoid form its bias has a gradient too, which every rank adds to once."""
    objectives = ["unicl", "sigmoid"]
    arguments = images, str(tmp_path), objectives, {"micro_batch_size": 3}
    if world_size == 1:
        write_objective_gradients(Ranks(), *arguments)
    else:
        run_on_ranks(write_objective_gradients, world_size, *arguments)
    for objective in objectives:
        loader = labelled_loader(images, objective)
        plain = first_gradients(images, Ranks(), objective_config(objective), loader)
        for form, rank in itertools.product(("dense", "tiled"), range(world_size)):
            path = tmp_path / f"{objective}-{form}{rank}.pt"
            loss, gradients = torch.load(path, weights_only=True)
            assert loss == pytest.approx(plain[0], rel=1e-13)
            assert_equal_gradients(gradients, plain[1])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_narrow_arithmetic_in_micro_batches_is_off_by_its_rounding(images, precision, tolerance):
    """Against the plain step of the same precision: only the order of summation differs."""
    loss, gradients = first_gradients(images, Ranks(), tiny_config(precision=precision))
    config = tiny_config(precision=precision, micro_batch_size=5)
    micro_loss, micro = first_gradients(images, Ranks(), config)
    assert micro_loss == pytest.approx(loss, rel=tolerance)
    flat, flat_micro = (
        torch.cat([gradient.flatten() for gradient in each.values()]) for each in (gradients, micro)
    )
    assert torch.linalg.vector_norm(flat_micro - flat) < tolerance * torch.linalg.vector_norm(flat)


def test_one_micro_batch_at_a_time_is_kept_for_backward(images):
    trainer = trainer_of(images, tiny_config(micro_batch_size=5))
    without_graph, with_graph = [], []
    alive = 0

    def watch(module: torch.nn.Module, inputs: tuple, features: torch.Tensor) -> None:
        nonlocal alive
        (without_graph, with_graph)[features.requires_grad].append(len(inputs[0]))
        if features.requires_grad:
            alive += len(features)
            assert alive <= 5, "the graph of an earlier micro-batch has not been used yet"
            features.register_hook(release)

    def release(gradient: torch.Tensor) -> None:
        nonlocal alive
        alive -= len(gradient)

    trainer.model.image_encoder.register_forward_hook(watch)
    trainer.train_step(next(trainer.loader.batches(0)))
    assert without_graph == with_graph == [5, 5, 2]
    assert alive == 0


def test_a_batch_that_fits_is_encoded_once(images):
    trainer = trainer_of(images, tiny_config(micro_batch_size=12))
    sizes = []
    trainer.model.image_encoder.register_forward_hook(
        lambda module, inputs, features: sizes.append(len(features))
    )
    trainer.train_step(next(trainer.loader.batches(0)))
    assert sizes == [12]


@pytest.mark.parametrize("image_encoder", ["unicl_convnet7_small", "test_resnet"])
def test_batchnorm_is_refused(images, image_encoder):
    config = tiny_config(image_encoder=image_encoder, micro_batch_size=4)
    with pytest.raises(ValueError, match="BatchNorm.*set efficiency.micro_batch_size=0"):
        trainer_of(images, config)
