"""`optim.freeze`: what is frozen stays as it is and costs nothing."""

import pytest
import torch
from compared_runs import assert_equal, copy_of, last_of, moved, state_of
from rank_workers import first_gradients
from small_runs import objective_config, tiny_config, trainer_of

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import OptimConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.compilation import find_blocks
from unicl_fast.models.freezing import freeze
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer

TOWER = ("image", "image_projection")


def config_of(
    *frozen: str, drop_path: float | None = None, every_steps: int = 1, **settings: object
) -> TrainConfig:
    config = tiny_config(**settings)
    return config.changed(
        optim={"freeze": frozen},
        model={} if drop_path is None else {"drop_path": drop_path},
        checkpoint={"every_steps": every_steps},
    )


def train(trainer: Trainer, *, steps: int) -> None:
    batches = trainer.loader.batches(trainer.step)
    for _ in range(steps):
        trainer.train_step(next(batches))


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_projection_is_frozen_or_trained_with_its_bias(images, micro_batch_size):
    for entries, frozen in ((TOWER, True), (("image",), False)):
        config = config_of(*entries, micro_batch_size=micro_batch_size)
        trainer = trainer_of(images, config.changed(model={"image_projection": "biased"}))
        before = copy_of(trainer.model)
        train(trainer, steps=2)
        changed = {name for name in moved(trainer.model, before) if name.startswith("image_")}
        assert changed == (set() if frozen else {"image_projection", "image_projection_bias"})


ENTRIES = {
    "an image encoder": (("image",), ("image_encoder.",)),
    "a text encoder": (("text",), ("text_encoder.",)),
    "a whole tower": (TOWER, ("image_encoder.", "image_projection")),
    "blocks of both": (
        ("image:2", "text:1"),
        (
            *("image_encoder.pos_embed", "image_encoder.cls_token", "image_encoder.patch_embed."),
            *("image_encoder.blocks.0.", "image_encoder.blocks.1."),
            *("text_encoder.token_embedding.", "text_encoder.positional_embedding"),
            "text_encoder.resblocks.0.",
        ),
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_frozen_keeps_its_bits_and_all_else_is_trained(images, name):
    entries, prefixes = ENTRIES[name]
    trainer = trainer_of(images, config_of(*entries))
    before = copy_of(trainer.model)
    frozen = {name for name in before if name.startswith(prefixes)}
    train(trainer, steps=3)
    assert moved(trainer.model, before) == before.keys() - frozen
    parameters = dict(trainer.model.named_parameters())
    assert all(parameters[name].grad is None for name in frozen)
    assert all(parameters[name] not in trainer.optimizer.state for name in frozen)


@pytest.mark.parametrize(("entry", "last"), [("image", 3), ("image:2", 2)])
def test_frozen_batchnorm_keeps_its_averages(images, entry, last):
    config = config_of(entry, image_encoder="unicl_convnet7_small", precision="fp32")
    trainer = trainer_of(images, config)
    before = copy_of(trainer.model)
    train(trainer, steps=2)
    after = trainer.model.state_dict()
    for number, block in enumerate(find_blocks(trainer.model.image_encoder)):
        is_frozen = number < last
        for name, _ in block.named_buffers():
            full_name = f"image_encoder.blocks.{number}.{name}"
            assert torch.equal(after[full_name], before[full_name]) == is_frozen, full_name
        assert all(module.training != is_frozen for module in block.modules())


def test_there_is_no_graph_before_the_first_trained_layer(images):
    trainer = trainer_of(images, config_of("image:2", "text"))
    model, keeps_graph = trainer.model, []
    for module in (*find_blocks(model.image_encoder)[1:3], model.text_encoder):
        module.register_forward_hook(lambda *found: keeps_graph.append(found[-1].requires_grad))
    train(trainer, steps=1)
    assert keeps_graph == [False, False, True]  # texts come first


def test_a_frozen_encoder_drops_no_branches(images):
    model = trainer_of(images, config_of("image")).model
    pixels = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    model.set_drop_path_key(step=0, global_index=torch.arange(12))
    in_training = model.train().encode_image(pixels)
    assert torch.equal(in_training, model.eval().encode_image(pixels))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"loss": "dense"}, marks=pytest.mark.slow),
        {"micro_batch_size": 5},
        {"micro_batch_size": 4, "activation_checkpointing": True, "loss": "tiled"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "entries", [TOWER, ("image",), ("text", "text_projection"), ("image:3", "text:1")]
)
def test_gradients_are_those_of_a_step_that_trains_all(images, entries, settings):
    """Of what is trained; drop path is off."""
    plain_loss, plain = first_gradients(images, Ranks(), config_of(drop_path=0.0))
    config = config_of(*entries, drop_path=0.0, **settings)
    loss, gradients = first_gradients(images, Ranks(), config)
    assert loss == pytest.approx(plain_loss, rel=1e-13)
    trained = {name for name, gradient in gradients.items() if gradient is not None}
    model = build_model(config)
    freeze(model)
    assert trained == plain.keys() - model.frozen.names
    for name in trained:
        torch.testing.assert_close(gradients[name], plain[name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("entries", [TOWER, ("image",)], ids=["whole", "under a projection"])
def test_a_frozen_image_encoder_is_run_once_in_micro_batches(images, entries):
    trainer = trainer_of(images, config_of(*entries, micro_batch_size=5))
    sizes = []
    trainer.model.image_encoder.register_forward_hook(
        lambda module, inputs, features: sizes.append(len(features))
    )
    train(trainer, steps=1)
    assert sizes == [5, 5, 2]


def test_batchnorm_that_is_frozen_may_see_micro_batches(images):
    settings = {"image_encoder": "unicl_convnet7_small", "micro_batch_size": 5}
    loss, _ = first_gradients(images, Ranks(), config_of("image", **settings))
    whole, _ = first_gradients(images, Ranks(), config_of("image", **settings, **{"loss": "dense"}))
    assert loss == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="BatchNorm.*set efficiency.micro_batch_size=0"):
        trainer_of(images, config_of("image:2", **settings))


def test_a_run_may_freeze_less_when_it_resumes_and_more_again(images, tmp_path):
    locked = trainer_of(images, config_of("image", steps=2), tmp_path / "locked")
    first = copy_of(locked.model)
    locked.fit()
    config = config_of(steps=4)
    unbroken = trainer_of(images, config, tmp_path / "unbroken")
    unbroken.resume(last_of(tmp_path / "locked"))
    weight = unbroken.model.image_encoder.blocks[0].attn.qkv.weight
    assert torch.equal(weight, first["image_encoder.blocks.0.attn.qkv.weight"])
    assert weight not in unbroken.optimizer.state
    unbroken.fit()
    assert moved(unbroken.model, first) == {name for name, _ in unbroken.model.named_parameters()}
    middle, last = list_checkpoints(tmp_path / "unbroken" / "checkpoints")
    resumed = trainer_of(images, config, tmp_path / "resumed")
    resumed.resume(middle)
    resumed.fit()
    assert_equal(state_of(last_of(tmp_path / "resumed")), state_of(last))
    again = trainer_of(images, config_of("image", steps=5), tmp_path / "locked again")
    again.resume(last)
    weight = again.model.image_encoder.blocks[0].attn.qkv.weight
    before = weight.clone()
    again.fit()
    assert torch.equal(weight, before)
    assert weight not in again.optimizer.state


def test_all_that_is_logged_as_lr_is_the_rate_of_what_stands_on_the_encoders(images, tmp_path):
    trainer_of(images, config_of(steps=2), tmp_path / "plain").fit()
    config = config_of(*("image_projection", "text_projection"), steps=2)
    trainer_of(images, config.changed(optim={"layer_decay": 0.5}), tmp_path / "scaled").fit()
    rates = [[line["lr"] for line in read_metrics(tmp_path / run)] for run in ("plain", "scaled")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-14)


@pytest.mark.parametrize(
    ("objective", "entries", "message"),
    [
        ("unicl", ("image:7",), "image:7 names 7 blocks, and this VisionTransformer has 6"),
        ("unicl", ("text:3",), "text:3 names 3 blocks, and this TextEncoder has 2"),
        ("ce", ("text",), "objective.name=ce the model has no text_encoder"),
        ("ce", ("image_projection",), "objective.name=ce the model has no image_projection"),
        # the scale does not count
        ("unicl", (*TOWER, "text", "text_projection"), "leaves nothing to train"),
    ],
)
def test_missing_parts_and_a_run_with_nothing_to_train_are_refused(
    images, objective, entries, message
):
    config = objective_config(objective)
    with pytest.raises(ValueError, match=message):
        trainer_of(images, config.changed(optim={"freeze": entries}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("images",)}, "optim.freeze takes image, text, .* not 'images'"),
        ({"freeze": ("image:0",)}, "not 'image:0'"),
        ({"freeze": ("image", "image:2")}, "names a part twice: image image:2"),
        ({"lora": "image"}, "optim.lora takes image:RANK, .* not 'image'"),
        ({"lora": "image:0"}, "not 'image:0'"),
        ({"lora": "image:2,image:4"}, "optim.lora takes"),
        ({"lora": "image:2,dora"}, "optim.lora takes"),
        ({"lora": "image:2", "freeze": ("image:1",)}, "optim.freeze names it too"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)
