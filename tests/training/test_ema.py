"""The moving average of the weights: what it is, where it is used, and that it survives."""

from __future__ import annotations

import pytest
import torch
from compared_runs import assert_equal, last_of
from safetensors.torch import load_file
from small_runs import IMAGE_SIZE, tiny_config, trainer_of

from unicl_fast.config import TrainConfig
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.models.unicl import UniCL


def averaging_config(**settings: object) -> TrainConfig:
    return tiny_config(**settings).changed(optim={"ema_decay": 0.9})


def assert_equal_weights(one: UniCL, other: UniCL) -> None:
    assert_equal(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("micro_batch_size", [0, 5])
def test_it_is_the_moving_average_of_the_weights_after_each_step(images, micro_batch_size):
    trainer = trainer_of(images, averaging_config(micro_batch_size=micro_batch_size))
    batches = trainer.loader.batches(0)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        trainer.train_step(next(batches))
        decay = min(0.9, 1 - step ** (-2 / 3))
        for name, weight in trainer.model.state_dict().items():
            before = expected.get(name, torch.zeros_like(weight))
            expected[name] = decay * before + (1 - decay) * weight
    for name, weight in trainer.ema.module.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-14)
        assert weight.dtype == torch.float64
    moved = trainer.model.image_projection - trainer.ema.module.image_projection
    assert moved.abs().max() > 1e-5


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 5}])
def test_training_is_not_changed_by_it(images, settings):
    plain = trainer_of(images, tiny_config(steps=3, **settings))
    averaged = trainer_of(images, averaging_config(steps=3, **settings))
    plain.fit()
    averaged.fit()
    assert_equal_weights(plain.model, averaged.model)


@pytest.mark.parametrize(
    ("image_encoder", "precision"),
    [
        ("test_vit", "fp64"),
        pytest.param("test_vit", "bf16", marks=pytest.mark.slow),
        pytest.param("unicl_convnet7_small", "fp32", marks=pytest.mark.slow),
    ],
)
def test_resumed_it_equals_that_of_an_unbroken_run_bit_for_bit(
    images, tmp_path, image_encoder, precision
):
    config = averaging_config(image_encoder=image_encoder, precision=precision)
    unbroken = trainer_of(images, config, tmp_path / "unbroken")
    unbroken.fit()
    resumed = trainer_of(images, config, tmp_path / "resumed")
    resumed.resume(tmp_path / "unbroken" / "checkpoints" / "step-00000002")
    resumed.fit()
    assert_equal_weights(unbroken.ema.module, resumed.ema.module)
    stored = load_file(last_of(tmp_path / "resumed") / "ema.safetensors")
    assert stored.keys() == unbroken.ema.module.state_dict().keys()
    weight_type = torch.float64 if precision == "fp64" else torch.float32
    assert stored["image_projection"].dtype == weight_type


def test_a_nonfinite_step_moves_the_average_towards_the_weights_and_no_further(images):
    trainer = trainer_of(images, averaging_config())
    batches = trainer.loader.batches(0)
    for _ in range(2):
        trainer.train_step(next(batches))
    before = trainer.ema.module.image_projection.clone()
    weights = trainer.model.image_projection.detach().clone()
    trainer.model.image_encoder.register_forward_hook(lambda *_: _[-1] * torch.nan)
    loss, _ = trainer.train_step(next(batches))
    assert not loss.isfinite()
    decay = 1 - 3 ** (-2 / 3)
    expected = decay * before + (1 - decay) * weights
    torch.testing.assert_close(trainer.ema.module.image_projection, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "recomputed activations", "bf16"],
)
def test_it_is_what_is_evaluated_and_what_load_model_takes(images, tmp_path, settings):
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    seen = []

    @torch.no_grad()
    def encoded(model: UniCL) -> torch.Tensor:
        return model.encode_image(pixels.to(model.image_projection.dtype))

    def evaluation(model: UniCL) -> dict[str, float]:
        assert not model.training
        seen.append(encoded(model))
        return {"top1": 0.5}

    trainer = trainer_of(images, averaging_config(**settings), tmp_path)
    trainer.evaluations = {"digits": evaluation}
    trainer.fit()
    assert_equal_weights(trainer.ema.module, load_encoders(tmp_path))
    assert_equal_weights(trainer.ema.module, load_encoders(tmp_path, weights="ema"))
    last = load_encoders(tmp_path, weights="model")
    assert_equal_weights(trainer.model, last)
    torch.testing.assert_close(seen[0], encoded(load_encoders(tmp_path)), rtol=1e-5, atol=1e-6)
    assert (seen[0] - encoded(last)).abs().max() > 1e-4


def test_a_checkpoint_without_it_gives_the_weights_or_says_so(images, tmp_path):
    trainer = trainer_of(images, tiny_config(steps=2), tmp_path)
    trainer.fit()
    assert_equal_weights(trainer.model, load_encoders(tmp_path))
    with pytest.raises(ValueError, match="has no average of the weights"):
        load_encoders(tmp_path, weights="ema")


@pytest.mark.slow
def test_a_run_without_it_can_resume_with_it_and_back(images, tmp_path, caplog):
    trainer_of(images, tiny_config(steps=4), tmp_path).fit()
    averaged = trainer_of(images, averaging_config(steps=4), tmp_path)
    averaged.resume(tmp_path / "checkpoints" / "step-00000002")
    assert_equal_weights(averaged.model, averaged.ema.module)
    assert "it starts with them" in caplog.text
    averaged.fit()
    plain = trainer_of(images, tiny_config(steps=5), tmp_path)
    plain.resume(tmp_path / "checkpoints" / "step-00000004")
    assert_equal_weights(plain.model, averaged.model)
