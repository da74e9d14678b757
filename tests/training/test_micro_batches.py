"""Micro-batches give the plain step's loss, gradients and runs; one of them at a time is alive."""

import pytest
import torch
from compared_runs import assert_same_gradients
from rank_workers import first_gradients
from small_runs import tiny_config, trainer_of

from unicl_fast.distributed.ranks import Ranks


def test_micro_batches_give_the_gradients_of_the_batch(images):
    """Of 12 images and 5 distinct texts."""
    plain = first_gradients(images, Ranks(), tiny_config())
    for size, recomputes in ((1, False), (5, False), (5, True), (11, False)):
        config = tiny_config(micro_batch_size=size, activation_checkpointing=recomputes)
        found = first_gradients(images, Ranks(), config)
        assert_same_gradients(found, plain, where=f"{size}, {recomputes}")


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
