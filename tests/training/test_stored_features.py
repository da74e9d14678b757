"""`efficiency.image_features`: an image is encoded once, and the run is the one that encodes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from compared_runs import assert_equal
from program_runs import SMALL, call, losses, run
from small_runs import tiny_config

from unicl_fast.batch import Batch
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import SharedRefusal
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.tools import ledger
from unicl_fast.training import run as run_module
from unicl_fast.training import stored_features
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
    efficiency = {"image_features": str(features or "")}
    return config.changed(optim={"freeze": ("image",)}, efficiency=efficiency)


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
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
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
    monkeypatch.setattr(stored_features, "_store", encode)
    again, trainer, _ = trained(stored, tmp_path / "again")
    assert all(map(torch.equal, again, expected))
    monkeypatch.setattr(type(trainer.model.image_encoder), "forward", encode)
    trainer.train_step(fed[0])  # the encoder is not run


@pytest.mark.slow
def test_features_are_stored_and_fed_in_micro_batches_and_once_for_equal_images(
    data: Path, tmp_path: Path
) -> None:
    """The same images packed twice have one file of features."""
    sources = [data / "labels", Path(shutil.copytree(data / "labels", tmp_path / "again"))]

    def config(features: Path | None) -> TrainConfig:
        one = config_of(*sources, features=features)
        return one.changed(efficiency={"micro_batch_size": 5})

    expected, *_ = trained(config(None), tmp_path / "encoding")
    found, *_ = trained(config(tmp_path / "features"), tmp_path / "stored")
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 1


def test_a_sample_without_an_image_is_replaced_as_in_every_run(data: Path, tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_other_weights_images_or_preprocessing_have_features_of_their_own(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    config = config_of(data / "labels", features=folder)
    others = (
        config,
        config.changed(data={"mean": (0.5, 0.5, 0.5)}),
        config.changed(run={"seed": 1}),  # which draws the weights
        config_of(data / "captions", features=folder),
    )
    for number, other in enumerate(others, start=1):
        trainer_of(other, tmp_path / "run").loader.close()
        assert len(list(folder.glob("*.npy"))) == number
    trainer_of(config.changed(optim={"lr": 1.0}), tmp_path / "run")
    assert len(list(folder.iterdir())) == 2 * 4


def test_stored_features_that_are_damaged_are_refused(data: Path, tmp_path: Path) -> None:
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
        ({"optim": {"freeze": (), "lora": "image:2"}}, "image_features .* this run trains it"),
        ({"data": {"crop_ratio": (0.75, 1.0)}}, "this run draws crops: add"),
        (
            {"data": {"crop_scale": (0.5, 1), "flip_probability": 0.5, "augment": ("clip",)}},
            r"draws crops, flips, augmentation: add --data\.crop-scale 1 1",
        ),
        ({"objective": {"mixup": 0.2}}, "set objective.mixup and objective.cutmix to 0"),
        ({"efficiency": {"shard": "full"}}, "take off or optimizer"),
    ],
)
def test_features_that_would_differ_between_epochs_are_refused(changes: dict, message: str) -> None:
    config = config_of(Path("data"), features=Path("features"))
    with pytest.raises(ValueError, match=message):
        config.changed(**changes)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_from_stored_features_resumes_on_other_ranks_with_its_ledger(
    data: Path, tmp_path: Path
) -> None:
    sources = ["--data.train", data / "labels", data / "captions"]
    features = ["--efficiency.image-features", tmp_path / "features"]
    run("pretrain", *LOCKED, *sources, "--out", tmp_path / "encoding")
    out = tmp_path / "stored"
    done = run("pretrain", *LOCKED, *sources, *features, "--out", out, "--nproc", "2")
    assert done.stderr.count("encoding 41 images once") == 1
    assert losses(out) == pytest.approx(losses(tmp_path / "encoding"), rel=1e-5)
    for checkpoint in (out / "checkpoints").iterdir():
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)
    run("pretrain", *LOCKED, *sources, *features, "--out", out, "--resume", "auto")
    assert losses(out) == pytest.approx(losses(tmp_path / "encoding"), rel=1e-5)
    with pytest.raises(SystemExit) as ended:
        call(ledger, out)
    assert ended.value.code == 0
