"""`optim.lora`: adapters on frozen encoders, whose base is in no checkpoint."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from compared_runs import assert_equal, copy_of, last_of, losses_of, moved
from rank_workers import first_gradients, needs_full, run_on_ranks, train_each
from safetensors.torch import load_file
from small_runs import StepLoader, objective_config, tiny_config
from torch import nn

from unicl_fast.checkpoints import load
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.conversion.initial import initialise, load_encoders
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.adapters import add_adapters, check_adapters
from unicl_fast.models.freezing import freeze, merge
from unicl_fast.models.unicl import UniCL
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.memory_plan import plan
from unicl_fast.training.summary import describe_run
from unicl_fast.training.trainer import Trainer

BOTH = "image:4,text:2"


def config_of(lora: str, *, init: Path | str = "", **settings: object) -> TrainConfig:
    return tiny_config(**({"steps": 3} | settings)).changed(
        optim={"lora": lora},
        model={"init": str(init), "drop_path": 0.3 * ("image_encoder" not in settings)},
        checkpoint={"every_steps": 1},
    )


def trainer_of(images: torch.Tensor, config: TrainConfig, folder: Path | None = None) -> Trainer:
    model = build_model(config)
    if config.model.init:
        initialise(model)
    return make_trainer(config, StepLoader(images), model=model, run_folder=folder, progress=False)


def adapted(config: TrainConfig) -> UniCL:
    """A model in fp64 whose adapters change something."""
    model = build_model(config).double()
    freeze(model)
    generator = torch.Generator().manual_seed(3)
    for name, one in model.named_parameters():
        if "lora_" in name:
            one.data += torch.randn(one.shape, generator=generator, dtype=one.dtype) / 10
    return model.eval()


def features(model: UniCL) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    rows = Tokenizer(12)(["a dog", "two cats in the snow"])
    return [model.encode_image(pixels), model.encode_text(rows), model.encode_text(rows, 12)]


@pytest.fixture(scope="module")
def base(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, to start from."""
    folder = tmp_path_factory.mktemp("base")
    trainer_of(images, tiny_config(steps=1), folder).fit()
    return folder


@pytest.mark.parametrize("encoder", ["test_vit", "unicl_convnet7_small"])
def test_merged_features_are_those_of_the_adapters(encoder):
    config = config_of(BOTH, image_encoder=encoder)
    plain = build_model(config).double().eval()
    model = adapted(config)
    before = features(model)
    merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for merged, unmerged, without in zip(features(model), before, features(plain), strict=True):
        torch.testing.assert_close(merged, unmerged, rtol=1e-12, atol=1e-13)
        assert (merged - without).abs().max() > 1e-3  # each tower has adapters


ALL_AT_ONCE = {"micro_batch_size": 4, "activation_checkpointing": True, "loss": "tiled"}
SETTINGS = [{}, {"micro_batch_size": 5}, ALL_AT_ONCE, {"shard": "full"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_the_chain_rule_of_a_step_that_trains_all(images, settings):
    """Of W + 4 B A with B = 0 the gradient of B is 4 times W's times A transposed."""
    _, plain = first_gradients(images, Ranks(), config_of(""))
    _, gradients = first_gradients(images, Ranks(), config_of(BOTH, **settings))
    model = build_model(config_of(BOTH)).double()
    freeze(model)
    values, checked = dict(model.named_parameters()), 0
    for name, gradient in gradients.items():
        if "_encoder." not in name:
            torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-13)
        elif "lora_B" in name:
            layer = name.removesuffix(".lora_B.default.weight")
            weight = plain[f"{layer}_weight" if layer.endswith("in_proj") else f"{layer}.weight"]
            a = values[name.replace("lora_B", "lora_A")]
            expected = weight @ a.T * 16 / len(a)
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13, msg=name)
            checked += 1
        elif "lora_A" not in name:
            assert gradient is None, name
    assert checked == 6 * 4 + 2 * 4


def test_only_adapters_of_the_last_blocks_and_what_is_no_encoder_are_trained(images):
    trainer = trainer_of(images, config_of("image:4@last2,text:2"))
    before = copy_of(trainer.model)
    batches = trainer.loader.batches(0)
    for _ in range(2):
        trainer.train_step(next(batches))
    changed = moved(trainer.model, before)
    assert {"image_projection", "text_projection", "logit_scale"} <= changed
    of_encoders = {name for name in changed if "_encoder." in name}
    assert of_encoders == {name for name in before if ".lora_" in name}
    blocks = {name.split(".")[2] for name in of_encoders if name.startswith("image_encoder.")}
    assert blocks == {"4", "5"}


def test_batchnorm_below_adapters_keeps_its_averages(images):
    settings = {"image_encoder": "unicl_convnet7_small", "precision": "fp32"}
    trainer = trainer_of(images, config_of(BOTH, micro_batch_size=5, **settings))
    before = copy_of(trainer.model)
    trainer.train_step(next(trainer.loader.batches(0)))
    assert not [name for name in moved(trainer.model, before) if "running" in name]


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (BOTH, {}),
        pytest.param(BOTH, {"precision": "bf16", "micro_batch_size": 5},
                     marks=pytest.mark.slow),
        pytest.param("image:4", {"image_encoder": "unicl_convnet7_small",
                                        "precision": "fp32"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_resumes_bit_for_bit_from_checkpoints_without_its_base(
    images, base, tmp_path, lora, settings
):
    if "image_encoder" in settings:
        base = tmp_path / "base"
        trainer_of(images, tiny_config(steps=1, **settings), base).fit()
    config = config_of(lora, init=base, **settings)
    unbroken = trainer_of(images, config, tmp_path / "unbroken")
    unbroken.fit()
    first, *_, last = list_checkpoints(tmp_path / "unbroken" / "checkpoints")
    names = load_file(last / "model.safetensors").keys()
    assert not {name for name in names if "image_encoder." in name and ".lora_" not in name}
    resumed = trainer_of(images, config, tmp_path / "resumed")
    resumed.resume(first)
    resumed.fit()
    found = last_of(tmp_path / "resumed")
    for file in sorted(last.glob("*.safetensors")):
        assert (found / file.name).read_bytes()[2000:] == file.read_bytes()[2000:], file.name
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "unbroken")[1:]
    merge(unbroken.model.eval())
    loaded = load_encoders(last)
    assert_equal(loaded.state_dict(), unbroken.model.state_dict())


def test_a_changed_base_is_refused_by_its_checksum(images, base, tmp_path):
    run, moving = tmp_path / "run", tmp_path / "base"
    shutil.copytree(base, moving)
    config = config_of("image:2", init=moving)
    trainer_of(images, config, run).fit()
    load_encoders(run)
    with pytest.raises(ValueError, match="merge them by unicl-convert hf"):
        trainer_of(images, config_of("", init=run))
    shutil.rmtree(moving)
    with pytest.raises(ValueError, match="expected a run folder"):
        load_encoders(run)
    other = tiny_config(steps=1).changed(run={"seed": 1})
    trainer_of(images, other, moving).fit()
    other_base = "holds adapters on weights of xxh3"
    with pytest.raises(ValueError, match=f"{other_base} .*model.init=.*: give the"):
        load_encoders(run)
    with pytest.raises(ValueError, match=other_base):
        trainer_of(images, config).resume(list_checkpoints(run / "checkpoints")[0])


def test_a_checkpoint_that_describes_a_model_larger_than_memory_is_refused(
    images, base, tmp_path, monkeypatch
):
    """Its own file has none of the tensors by which others are compared."""
    trainer_of(images, config_of(BOTH, init=base), tmp_path).fit()
    monkeypatch.setattr(load, "free_memory", lambda device: 1_000_000)
    with pytest.raises(ValueError, match="describes a model of 0.0 GB, and 0.0 GB are free"):
        load_encoders(tmp_path)


def test_fresh_weights_below_adapters_are_in_the_checkpoint(images, tmp_path):
    """No source would give them again."""
    trainer = trainer_of(images, config_of(BOTH), tmp_path)
    trainer.fit()
    merge(trainer.model)
    assert_equal(trainer.model.state_dict(), load_encoders(tmp_path).state_dict())


@needs_full
@pytest.mark.slow
def test_ranks_train_adapters_as_one_process_does(images, tmp_path):
    runs = {shard: (config_of(BOTH, shard=shard, steps=2), None) for shard in ("off", "full")}
    run_on_ranks(train_each, 2, images, tmp_path, runs)
    trainer_of(images, runs["off"][0], tmp_path / "one").fit()
    one = load_file(last_of(tmp_path / "one") / "model.safetensors")
    for run in runs:
        for name, tensor in load_file(last_of(tmp_path / run) / "model.safetensors").items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-7, atol=1e-10, msg=name)


def test_the_summary_and_the_plan_count_what_is_trained(images, tmp_path):
    config = config_of(BOTH)
    trainer = trainer_of(images, config)
    trained = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    whole = sum(one.numel() for one in build_model(config).parameters())
    (line,) = [one for one in describe_run(trainer, tmp_path) if "trained" in one]
    assert f"{trained / 1e6:,.2f} M trained ({100 * trained / whole:.1f} %)" in line
    parts = plan(config, world_size=1, device_bytes=2**40, device_type="cpu").parts
    assert parts["gradients"] == 8 * trained
    assert parts["optimizer"] == 2 * 8 * trained


class ReadsPast(nn.Module):
    """As timm's BEiT, EVA and Swin V2 do it with the layer of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(nn.functional.linear(x, self.qkv.weight))


def test_an_encoder_that_reads_weights_past_their_layers_is_refused():
    encoder = ReadsPast()
    add_adapters(encoder, [encoder], rank=2)
    with pytest.raises(ValueError, match="reads the weights of 1 layers past .* such as qkv"):
        check_adapters(encoder, "it", torch.zeros(1, 4))


def test_what_cannot_be_adapted_is_refused_in_one_sentence(images, monkeypatch):
    with pytest.raises(ValueError, match="image:2@last7 names 7 blocks, .*VisionTransformer has 6"):
        trainer_of(images, config_of("image:2@last7"))
    with pytest.raises(ValueError, match="optim.lora: text:2: with objective.name=ce"):
        trainer_of(images, objective_config("ce").changed(optim={"lora": "text:2"}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="optim.lora needs the package peft: pip install peft"):
        trainer_of(images, config_of("text:2"))
