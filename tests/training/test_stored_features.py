"""`efficiency.stored_features`: each is encoded once, and the run is that which encodes."""

import copy
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from compared_runs import assert_equal, losses_of
from program_runs import SMALL, call, run
from small_runs import tiny_config

from unicl_fast.batch import Batch
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import SharedRefusal
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import fold_statistics
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.tools import ledger, pretrain
from unicl_fast.training import run as run_module
from unicl_fast.training import stored_features
from unicl_fast.training.settle import check_settings
from unicl_fast.training.trainer import Trainer

pytestmark = pytest.mark.dali

CPU = torch.device("cpu")
FIXED = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0}
LOCKED = [
    *(*SMALL, "--optim.freeze", "image", "--efficiency.precision", "fp32", "--ledger"),
    *("--optim.lr", "1e-3"),  # a higher rate enlarges the rounding of another local batch
    *("--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1"),
    *("--data.flip-probability", "0", "--run.trackers"),
]


def config_of(
    *datasets: Path, features: Path | None, precision: str = "fp32", **settings: object
) -> TrainConfig:
    config = tiny_config(precision=precision)
    data = DataConfig(
        train=tuple(map(str, datasets)), image_size=32, evaluation_resize=32,
        **(FIXED | settings),
    )  # fmt: skip
    config = dataclasses.replace(config, data=data)
    efficiency = {"stored_features": str(features or "")}
    return config.changed(optim={"freeze": ("image",)}, efficiency=efficiency)


def of_images(folder: Path, kind: str) -> list[Path]:
    """The files of images' features, which only their key finds."""
    return [one for one in folder.glob(f"*.{kind}") if not list(folder.glob(f"{one.stem}.*.items"))]


def trainer_of(config: TrainConfig, folder: Path, checkpoint: Path | None = None) -> Trainer:
    return run_module.build_trainer(
        config, run_folder=folder, build_loader=TrainLoader, evaluate=dict, ranks=Ranks(),
        device=CPU, checkpoint=checkpoint, progress=False,
    )  # fmt: skip


def trained(config: TrainConfig, folder: Path) -> tuple[list[torch.Tensor], Trainer, list[Batch]]:
    """The losses of all steps, the trainer, and the batches that it was fed."""
    trainer = trainer_of(config, folder)
    found, fed = [], []
    for batch, _ in zip(trainer.loader.batches(0), range(trainer.total_steps), strict=False):
        found.append(trainer.train_step(batch)[0])
        fed.append(batch)
    trainer.loader.close()
    return found, trainer, fed


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bf16", "fp64"))]
)
def test_a_locked_run_from_stored_features_is_the_run_that_encodes_bit_for_bit(
    data, tmp_path, monkeypatch, precision
):
    sources = data / "labels", data / "captions"
    encoding = config_of(*sources, features=None, precision=precision)
    stored = config_of(*sources, features=tmp_path / "features", precision=precision)
    expected, plain, shown = trained(encoding, tmp_path / "encoding")
    found, trainer, fed = trained(stored, tmp_path / "stored")
    assert all(map(torch.equal, found, expected))
    assert_equal(trainer.model.state_dict(), plain.model.state_dict())
    assert all(batch.images.ndim == 2 for batch in fed)
    pairs = list(zip(fed, shown, strict=True))
    assert all(torch.equal(one.sample_ids, two.sample_ids) for one, two in pairs)
    assert (tmp_path / "stored" / "contact-sheet.png").exists()  # of the epoch that is encoded
    encode = Mock(side_effect=AssertionError("they are stored"))
    monkeypatch.setattr(stored_features, "_Images", encode)
    again, trainer, _ = trained(stored, tmp_path / "again")
    assert all(map(torch.equal, again, expected))
    monkeypatch.setattr(type(trainer.model.image_encoder), "forward", encode)
    trainer.train_step(fed[0])  # the encoder is not run


@pytest.mark.slow
def test_features_are_stored_and_fed_in_micro_batches_and_once_for_equal_images(data, tmp_path):
    """The same images packed twice have one file of features."""
    sources = [data / "labels", Path(shutil.copytree(data / "labels", tmp_path / "again"))]

    def config(features: Path | None) -> TrainConfig:
        one = config_of(*sources, features=features)
        return one.changed(efficiency={"micro_batch_size": 5})

    expected, *_ = trained(config(None), tmp_path / "encoding")
    found, *_ = trained(config(tmp_path / "features"), tmp_path / "stored")
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 1


def test_a_sample_without_an_image_is_replaced_as_in_every_run(data, tmp_path):
    packed = tmp_path / "labels"
    shutil.copytree(data / "labels", packed)
    with PackedDataset(packed) as dataset:
        shard, offset = packed / dataset.shard_of(4), dataset.offset_of(4)
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"damaged")
    config = config_of(packed, features=None)
    expected, _, shown = trained(config, tmp_path / "encoding")
    stored = config_of(packed, features=tmp_path / "features")
    found, _, fed = trained(stored, tmp_path / "stored")
    assert all(map(torch.equal, found, expected))
    pairs = list(zip(fed, shown, strict=True))
    assert all(torch.equal(one.sample_ids, two.sample_ids) for one, two in pairs)
    assert any(not torch.equal(one.sample_ids, one.scheduled_ids) for one in fed)
    (sealed,) = (tmp_path / "features").glob("*.json")
    assert json.loads(sealed.read_text())["unreadable"] == [4]
    assert "labels" in (tmp_path / "stored" / "quarantine.csv").read_text()


def test_stored_features_that_are_damaged_are_refused(data, tmp_path):
    config = config_of(data / "labels", features=tmp_path / "features")
    trainer_of(config, tmp_path / "run").loader.close()
    (path,) = (tmp_path / "features").glob("*.npy")
    rows = np.load(path)
    rows[3, 2] += 1
    np.save(path, rows)
    with pytest.raises(SharedRefusal, match=r"are damaged: its xxh3 is .*remove"):
        trainer_of(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"freeze": ("image:2",)}}, r"this run trains it: add --optim\.freeze image"),
        ({"optim": {"freeze": (), "lora": "image:2"}}, "stored_features .* this run trains it"),
        ({"data": {"crop_ratio": (0.75, 1.0)}}, "this run draws crops: add"),
        (
            {"data": {"crop_scale": (0.5, 1), "flip_probability": 0.5, "augment": ("clip",)}},
            r"draws crops, flips, augmentation: add --data\.crop-scale 1 1",
        ),
        ({"efficiency": {"shard": "full"}}, "take off or optimizer"),
    ],
)
def test_features_that_would_differ_between_epochs_are_refused(changes, message):
    config = config_of(Path("data"), features=Path("features"))
    with pytest.raises(ValueError, match=message):
        config.changed(**changes)


def both_frozen(*datasets: Path, features: Path | None, **settings: object) -> TrainConfig:
    """Both encoders locked, and heads of the widths of the encoders."""
    config = config_of(*datasets, features=features, **settings)
    model = {"drop_path": 0.0, "image_projection": "mlp", "text_projection": "mlp"}
    return config.changed(optim={"freeze": ("image", "text")}, model=model)


def test_a_run_of_two_stored_towers_is_the_run_that_encodes(data, tmp_path):
    """Texts are encoded beside others, so their features differ by rounding."""
    sources = data / "labels", data / "captions"
    config = both_frozen(*sources, features=tmp_path / "features", precision="fp64")
    config = config.changed(run={"steps": 3})  # fewer draws than samples
    plain = config.changed(efficiency={"stored_features": ""})
    expected, encoding, _ = trained(plain, tmp_path / "encoding")
    found, trainer, fed = trained(config, tmp_path / "stored")
    assert all(one.texts.tokens.ndim == 2 for one in fed)
    assert fed[0].texts.tokens.dtype == torch.float64
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    pairs = zip(trainer.model.parameters(), encoding.model.parameters(), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)
    stored = [json.loads(one.read_text()) for one in of_images(tmp_path / "features", "json")]
    assert all("stored" in one for one in stored)  # only those that were drawn
    # a longer run adds what it needs, beside it or for all
    longer = config.changed(run={"steps": 30})
    trained(longer, tmp_path / "longer")
    stored = [json.loads(one.read_text()) for one in of_images(tmp_path / "features", "json")]
    assert not any("stored" in one for one in stored)
    again, *_ = trained(config, tmp_path / "again")
    assert all(map(torch.equal, again, found))  # what was stored is never encoded anew


def test_heads_standardise_by_the_training_data_and_keep_the_statistics(data, tmp_path):
    config = both_frozen(data / "captions", features=tmp_path / "features", precision="fp32")
    config = config.changed(model={"standardise": True}, run={"steps": 5})  # three epochs
    trainer = trainer_of(config, tmp_path / "run")
    (name,) = of_images(tmp_path / "features", "npy")
    rows = torch.from_numpy(np.load(name)).double()
    head = trainer.model.head("image")
    torch.testing.assert_close(head.mean.double(), rows.mean(0))
    deviation = rows.std(0, correction=0)
    torch.testing.assert_close((1 / head.factor).double(), deviation, rtol=1e-4, atol=1e-6)
    assert trainer.model.head("text").factor.ndim == 0
    weights = trainer.model.state_dict()
    folded = copy.deepcopy(trainer.model).eval()
    fold_statistics(folded)
    assert folded.config.model.standardise is False
    assert not any(name.endswith(("mean", "factor")) for name in folded.state_dict())
    batch = next(trainer.loader.batches(0))
    for encode, given in (("encode_image", batch.images), ("encode_text", batch.texts.tokens)):
        one, two = getattr(trainer.model, encode)(given), getattr(folded, encode)(given)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    trainer.train_step(batch)
    assert torch.equal(trainer.model.state_dict()["image_mean"], weights["image_mean"])
    trainer.loader.close()


@pytest.mark.parametrize("kind", ["linear", "biased"])
def test_a_projection_of_one_layer_gets_the_bias_that_folding_needs(kind):
    config = tiny_config(precision="fp32").changed(
        model={"standardise": True, "image_projection": kind}
    )
    model = build_model(config).eval()
    features = torch.randn(9, 64) * 3 + 1
    model.set_statistics("image", features.mean(0), features.std(0))
    model.set_statistics("text", torch.zeros(16), torch.full((16,), 2.0))
    texts = torch.randn(3, 16)
    before = model.encode_image(features), model.encode_text(texts)
    fold_statistics(model)
    assert model.config.model.image_projection == "biased"
    assert model.config.model.text_projection == "linear"
    after = model.encode_image(features), model.encode_text(texts)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    model = build_model(config)
    model.set_statistics("image", torch.zeros(64), torch.tensor([1e-9] + [1.0] * 63))
    assert model.head("image").factor.max().item() == pytest.approx(1000)


def test_standardising_needs_features_or_a_model_that_has_statistics():
    config = tiny_config(precision="fp32").changed(model={"standardise": True})
    with pytest.raises(ValueError, match=r"by efficiency\.stored_features, or a model"):
        check_settings(config, Ranks())
    check_settings(config.changed(model={"init": "runs/heads"}), Ranks())


def test_a_killed_store_is_continued_and_gives_the_same_features(data, tmp_path, monkeypatch):
    config = both_frozen(data / "labels", features=tmp_path / "whole", precision="fp32")
    trainer_of(config, tmp_path / "run").loader.close()
    broken = config.changed(efficiency={"stored_features": str(tmp_path / "killed")})
    monkeypatch.setattr(stored_features, "RECORDED_AT_ONCE", 8)
    encode, calls = stored_features._Images._encode, itertools.count()

    def failing(self: object, images: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2:  # a blank image comes first
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(stored_features._Images, "_encode", failing)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(broken, tmp_path / "run")
    (sealed,) = (tmp_path / "killed").glob("*.json")
    assert "stored" in json.loads(sealed.read_text())
    shown = Mock(wraps=encode)
    monkeypatch.setattr(stored_features._Images, "_encode", lambda self, one: shown(self, one))
    trainer_of(broken, tmp_path / "run").loader.close()
    assert shown.call_count < 1 + 2  # the blank one, and the batch that was not stored
    (one,), (two,) = (of_images(tmp_path / name, "npy") for name in ("whole", "killed"))
    assert np.array_equal(np.load(one), np.load(two))


@pytest.mark.slow
def test_two_ranks_store_and_feed_both_towers_as_one_does(data, tmp_path, caplog):
    caplog.set_level("INFO")
    frozen = [*LOCKED, "--optim.freeze", "image", "text", "--model.drop-path", "0"]
    frozen += ["--model.standardise", "--model.image-projection", "mlp"]
    frozen += ["--data.train", data / "labels", data / "captions"]
    for out, *more in (("one",), ("two", "--nproc", "2")):
        folder = tmp_path / f"features-{out}"
        given = ["--efficiency.stored-features", folder, "--out", tmp_path / out, *more]
        if out == "one":
            call(pretrain, *frozen, *given)
            said = caplog.text
        else:
            said = run("pretrain", *frozen, *given).stderr
        assert said.count("encoding 41 images once") == 1
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    texts = [next((tmp_path / f"features-{one}").glob("*.items")) for one in ("one", "two")]
    assert texts[0].name == texts[1].name
    rows = [one.with_name(f"{one.name.partition('.')[0]}.npy").read_bytes() for one in texts]
    assert rows[0] == rows[1]
    for checkpoint in (tmp_path / "one" / "checkpoints").iterdir():
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)
    expected = losses_of(tmp_path / "one")
    given = ["--efficiency.stored-features", tmp_path / "features-two", "--out", tmp_path / "one"]
    run("pretrain", *frozen, *given, "--resume", "auto", "--nproc", "2")
    assert losses_of(tmp_path / "one") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SystemExit) as ended:
        call(ledger, tmp_path / "one")
    assert ended.value.code == 0
