"""Loops of other libraries with our loader, target map and loss, beside our trainer."""

import itertools
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import Sample, pack
from PIL import Image
from small_runs import tiny_config

from examples.own_loop.torch_dataset import TorchDataset
from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.codec import encode_png, pixels_of
from unicl_fast.objectives.targets import CAPTION_KEYS_START, collate
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.data import build_prompts, open_datasets
from unicl_fast.training.settle import settle_objective


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Every third image has a label alone, every third a caption alone, the others both."""
    files = sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:24]
    samples = [
        Sample(
            file.read_bytes(),
            captions=["" if n % 3 == 0 else f"photo {n}"] * (n % 3 > 0),
            labels=[n % 4] * (n % 3 != 1),
        )
        for n, file in enumerate(files)
    ]
    folder = tmp_path_factory.mktemp("loops") / "packed"
    names = ["dog", "cat", "horse", "bird"]
    with pack(folder, samples, class_names=names, tokenizer=Tokenizer()):
        return folder


@pytest.fixture
def config(packed: Path) -> TrainConfig:
    config = tiny_config(precision="fp32", steps=20)
    return config.changed(data={"train": (str(packed),)})


@pytest.fixture
def expected(config: TrainConfig) -> list[float]:
    """The losses of our trainer."""
    from unicl_fast.pipelines.train_loader import TrainLoader

    datasets, weights = open_datasets(config.data)
    config = settle_objective(config, datasets)
    assert config.objective.takes_all_labels  # some images have a label and a caption
    loader = TrainLoader(config, datasets, weights, build_prompts(datasets, config))
    trainer = make_trainer(config, loader, progress=False)
    batches = itertools.islice(loader.batches(0), 20)
    losses = [float(trainer.train_step(batch)[0]) for batch in batches]
    loader.close()
    return losses


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.parametrize("library", ["accelerate", "lightning", "dcp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loop_of_another_library_resumes_and_has_the_losses_of_the_trainer(
    library, config, expected, monkeypatch,
    tmp_path,
):  # fmt: skip
    if library != "dcp":
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    train = import_module(f"examples.own_loop.{library}_loop").train
    if library == "lightning":
        losses = train(config, 9)
        (saved,) = tmp_path.rglob("*.ckpt")
        losses += train(config, 20, resume=str(saved))
    else:
        losses = train(config, 9, tmp_path / "state") + train(config, 20, tmp_path / "state")
    assert max(expected) - min(expected) > 0.1  # it learns, so steps that differ would show
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.dali
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchtitan_s_checkpoints_resume_our_loader(packed, tmp_path):
    """By the calls of its trainer, which itself runs on a GPU only."""
    checkpoint = pytest.importorskip("torchtitan.components.checkpoint")
    base = pytest.importorskip("torchtitan.components.dataloader").BaseDataLoader
    loaders, managers = [], []
    for _ in range(2):
        loader = import_module("examples.own_loop.torchtitan_loader").UniclDataLoader
        settings = loader.Config(dataset_path=str(packed), preset="digits-small", steps=20)
        kept = {"tokenizer": None, "seq_len": 77, "snapshot_every_n_steps": 3}
        loaders.append(settings.build(dp_world_size=1, dp_rank=0, local_batch_size=8, **kept))
        assert isinstance(loaders[-1], base)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        managers.append(
            checkpoint.CheckpointManager.Config(enable=True, interval=3, keep_latest_k=0).build(
                dataloader=loaders[-1],
                model_parts=[model],
                optimizers=optimizer,
                lr_schedulers=torch.optim.lr_scheduler.ConstantLR(optimizer),
                states={},
                sd_adapter=None,
                base_folder=str(tmp_path),
            )
        )
    batches = iter(loaders[0])
    saved = [bool(next(batches)) and managers[0].save(step) for step in (1, 2, 3)]
    assert saved == [False, False, True]
    assert managers[1].load()
    for (inputs, ids), (again, ids_again) in itertools.islice(
        zip(batches, loaders[1], strict=False), 4
    ):
        assert inputs["batch"].step == again["batch"].step >= 3
        assert torch.equal(inputs["input"], again["input"])
        assert torch.equal(ids, ids_again)
    for loader in loaders:
        loader.loader.close()


def test_a_torch_data_set_has_a_text_for_each_image(packed):
    def square(image: Any) -> Any:
        return image.resize((32, 32))

    with PackedDataset(packed) as source:
        dataset = TorchDataset(source, transform=square, context_length=16)
        loader = torch.utils.data.DataLoader(dataset, batch_size=24)
        (images, tokens, labels), *more = loader
        assert not more
        assert (images.shape, images.dtype) == ((24, 32, 32, 3), torch.uint8)
        batch = collate(images, tokens, labels, prompts=dataset.prompts)
        assert isinstance(batch, Batch)
        for index, label in enumerate(labels.tolist()):
            known = source.labels_of(index).tolist()
            if label < 0:
                caption = source.caption_tokens(index, 0)
                assert tokens[index, : len(caption)].tolist() == caption.tolist()
                assert batch.targets.class_ids[index] >= CAPTION_KEYS_START
            else:
                assert known == [label] == [int(batch.targets.class_ids[index])]
                rows = dataset.prompts.rows_of(0, label, range(dataset.prompts.num_templates[0]))
                assert tokens[index, :8].tolist() in dataset.prompts.tokens[rows][:, :8].tolist()
        kinds = {label < 0 for n, label in enumerate(labels.tolist()) if n % 3 == 2}
        assert kinds == {True, False}  # those that have both show either
        assert dataset[5][1].tolist() == tokens[5].tolist()
        short = TorchDataset(source, context_length=3)
        for index in range(24):  # the end token stays, by which texts are pooled
            assert short[index][1][-1] == tokens.max()
        dataset.epoch = 1
        assert any(dataset[n][1].tolist() != tokens[n].tolist() for n in range(24))


@pytest.mark.filterwarnings("ignore:.set_vital")
def test_torchdata_s_loader_resumes_a_torch_data_set(packed):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    with PackedDataset(packed) as source:

        def make(epoch: int) -> Any:
            dataset = TorchDataset(source, transform=lambda image: image.resize((8, 8)))
            dataset.epoch = epoch
            generator = torch.Generator().manual_seed(epoch)
            return torchdata.StatefulDataLoader(
                dataset, batch_size=4, shuffle=True, generator=generator
            )

        first = make(3)
        batches = iter(first)
        next(batches)
        state, rest = first.state_dict(), list(batches)
        second = make(0)
        second.load_state_dict(state)
        for one, other in zip(second, rest, strict=True):
            assert all(map(torch.equal, one, other))
        assert second.dataset.epoch == 3
        assert any(not all(map(torch.equal, *pair)) for pair in zip(make(3), make(0), strict=True))


def test_grey_images_can_be_stacked_with_others(tmp_path):
    colours = Image.new("RGB", (8, 6), (200, 100, 0)), Image.new("L", (8, 6), 77)
    samples = [Sample(encode_png(pixels_of(image)), labels=[0]) for image in colours]
    folder = tmp_path / "set"
    with pack(folder, samples, class_names=["dog"], tokenizer=Tokenizer()) as source:
        images, _, _ = next(iter(torch.utils.data.DataLoader(TorchDataset(source), batch_size=2)))
    assert images.shape == (2, 6, 8, 3)
    assert (images[1] == 77).all()
