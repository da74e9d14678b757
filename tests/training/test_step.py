"""A step is the public loss on its features, and no efficiency switch changes it."""

import pytest
import torch
from compared_runs import assert_equal
from rank_workers import evaluated_buffers, first_gradients, run_on_ranks
from small_runs import global_batch, tiny_config, trainer_of
from torch import nn

from unicl_fast.checkpoints.load import build_model
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.precision import normalise_images
from unicl_fast.objectives.loss import reference_loss, unified_contrastive_loss
from unicl_fast.training.encoding import after_three_quarters


@pytest.mark.slow
def test_an_evaluation_sees_the_same_batchnorm_on_all_ranks(images):
    one, two = run_on_ranks(evaluated_buffers, 2, images)
    assert any("running_mean" in name for name in one)
    assert_equal(one, two)


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_a_training_step_is_the_public_function_on_its_features(images, form):
    """Loss and all gradients; texts are encoded at full length, one for each sample."""
    config = tiny_config(loss=form)
    loss, gradients = first_gradients(images, Ranks(), config)
    batch = global_batch(images)
    model = build_model(config).double().train()
    model.set_drop_path_key(step=0, global_index=batch.global_index)
    pixels = normalise_images(
        batch.images, mean=config.data.mean, std=config.data.std, dtype=torch.float64
    )
    features = (
        model.encode_image(pixels),
        model.encode_text(batch.texts.tokens[batch.texts.index]),
        batch.targets.class_ids,
        model.logit_scale.exp(),
    )
    for plain in (unified_contrastive_loss(*features), reference_loss(*features)):
        assert loss == pytest.approx(plain.item(), rel=1e-13)
        model.zero_grad()
        plain.backward(retain_graph=True)
        for name, one in model.named_parameters():
            torch.testing.assert_close(gradients[name], one.grad, rtol=1e-9, atol=1e-13, msg=name)


def trained(images: torch.Tensor, image_encoder: str, **efficiency: object) -> tuple:
    """Gradients of the first step; losses and weights of three."""
    config = tiny_config(image_encoder=image_encoder, steps=3, **efficiency)
    gradients = first_gradients(images, Ranks(), config)[1]
    trainer = trainer_of(images, config)
    batches = trainer.loader.batches(0)
    losses = [trainer.train_step(next(batches))[0].item() for _ in range(3)]
    return gradients, losses, trainer.model.state_dict()


BATCHNORM = ("unicl_convnet7_small", "test_resnet")


@pytest.fixture(
    scope="module",
    params=["test_vit", *(pytest.param(one, marks=pytest.mark.slow) for one in BATCHNORM)],
    name="plain",
)
def train_plainly(images: torch.Tensor, request: pytest.FixtureRequest) -> tuple[str, tuple]:
    """The image encoder's name, and what it is after steps without any switch."""
    return request.param, trained(images, request.param)


@pytest.mark.parametrize(
    "switch",
    [{"activation_checkpointing": True}, {"loss": "tiled"}],
    ids=lambda switch: ",".join(f"{name}={value}" for name, value in switch.items()),
)
def test_efficiency_changes_nothing(images, switch, plain):
    """Loss and gradients of a step; weights and BatchNorm's running averages after three."""
    image_encoder, (plain_gradients, plain_losses, plain_weights) = plain
    gradients, losses, weights = trained(images, image_encoder, **switch)
    assert losses == pytest.approx(plain_losses, rel=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-8, atol=1e-12, msg=name)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain_weights[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.003)])
def test_narrow_arithmetic_is_off_by_its_rounding_alone(images, precision, tolerance):
    """Loss to the type's resolution; gradients point the same way, micro-batches' nearly equal."""
    settings = [{"precision": "fp32"}, {"precision": precision}]
    settings.append({"precision": precision, "micro_batch_size": 5})
    losses, gradients = zip(
        *(first_gradients(images, Ranks(), tiny_config(**each)) for each in settings), strict=True
    )
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=tolerance)
    wide, narrow, micro = (
        torch.cat([one.flatten() for one in each.values()]) for each in gradients
    )
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 1 - 5 * tolerance
    assert (micro - narrow).norm() < tolerance * narrow.norm()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_texts_come_after_three_quarters_the_images_or_after_them(is_frozen):
    encoder = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(8)))
    encoder.requires_grad_(not is_frozen)
    x, order = torch.ones(1, 2, requires_grad=True), []
    for number, layer in enumerate(encoder):
        if not is_frozen:
            layer.weight.register_post_accumulate_grad_hook(lambda _, n=number: order.append(n))
    for _ in range(2):
        with after_three_quarters(encoder, lambda: order.append("texts")):
            encoder(x).sum().backward()
    assert order == 2 * (["texts"] if is_frozen else [7, 6, 5, 4, 3, 2, "texts", 1, 0])
