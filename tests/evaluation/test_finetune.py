"""Fine-tuning: the first head, rates by depth, learning, ranks, and coming back from the disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NoReturn
from unittest.mock import Mock

import pytest
import torch
from rank_workers import finetune_slices, run_on_ranks
from safetensors.torch import load_file
from small_runs import global_batch, real_images, tiny_config
from torch.nn import functional as F

from unicl_fast import UniCL
from unicl_fast.batch import Batch, ListLoader
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation import finetune as finetune_module
from unicl_fast.evaluation.data import EvaluationData
from unicl_fast.evaluation.features import ModelOnRanks, encode_images, prepare_images
from unicl_fast.evaluation.finetune import (
    FineTuned,
    _begin_head,
    build_optimizer,
    finetune,
    load_finetuned,
    save_finetuned,
    zero_shot_head,
)
from unicl_fast.evaluation.requests import Finetune, FinetuneRecipe, check_options
from unicl_fast.system.progress import EvaluationStopped


@pytest.fixture(scope="module")
def images(shared_data: Path) -> torch.Tensor:
    return real_images(shared_data, 12)


def with_ids(batch: Batch) -> Batch:
    return dataclasses.replace(batch, sample_ids=torch.arange(12))


@pytest.mark.parametrize("projection", ["linear", "biased", "none"])
def test_the_zero_shot_head_ranks_as_zero_shot_does(images: torch.Tensor, projection: str) -> None:
    config = tiny_config()
    width = 64 if projection == "none" else 8
    settings = dataclasses.replace(config.model, image_projection=projection, embed_dim=width)
    model = UniCL(dataclasses.replace(config, model=settings)).double().eval()
    generator = torch.Generator().manual_seed(0)
    if model.image_projection_bias is not None:
        torch.nn.init.normal_(model.image_projection_bias, generator=generator)
    classifier = torch.randn(5, width, dtype=torch.float64, generator=generator)
    classifier = F.normalize(classifier, dim=1)
    features = encode_images(model, images, layer="encoder")
    head = zero_shot_head(model, classifier, features)
    scores = encode_images(model, images) @ classifier.T
    assert torch.equal(head.scores(features).argsort(dim=1), scores.argsort(dim=1))
    # as far from each other as zero-shot logits are
    spread = scores.std(dim=1).mean() * model.logit_scale.exp()
    torch.testing.assert_close(head.scores(features).std(dim=1).mean(), spread, rtol=0.3, atol=0)


@pytest.mark.parametrize("encoder", ["test_vit", "unicl_convnet7_small"])
def test_rates_fall_with_depth_from_the_head_down(encoder: str) -> None:
    model = UniCL(tiny_config(image_encoder=encoder))
    module = FineTuned(model, 3)
    optimizer = build_optimizer(module, FinetuneRecipe(layer_decay=0.5))
    scale = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[id(parameter)] = group["lr_scale"]
            assert group["weight_decay"] == (0 if parameter.ndim <= 1 else group["weight_decay"])
    assert len(scale) == len(list(module.parameters()))
    depths = [scale[id(p)] for p in module.encoder.parameters()]
    assert scale[id(module.head.weight)] == 1.0
    assert max(depths) == 0.5
    assert min(depths) <= 0.5**4
    first = next(module.encoder.parameters())
    assert scale[id(first)] == min(depths)


@pytest.mark.parametrize("more", [{}, {"mixup": 0.0, "ema_decay": 0.0, "label_smoothing": 0.0}])
def test_it_learns_a_few_images_by_heart(images: torch.Tensor, tmp_path: Path, more: dict) -> None:
    config = tiny_config(precision="fp32")
    model = UniCL(config)
    module = FineTuned(model, 3)
    recipe = FinetuneRecipe(lr=5e-3, layer_decay=0.9, **more)
    loader = ListLoader([with_ids(global_batch(images))])
    trained = finetune(
        model, module, loader, recipe, steps=80, labels_of=lambda sample: [sample % 3]
    )
    assert not trained.training
    assert (trained is module) == (recipe.ema_decay == 0)
    pixels = torch.randn(2, 3, 32, 32)
    logits = trained(prepare_images(model, images))
    assert (logits.argmax(dim=1) == torch.arange(12) % 3).all()
    save_finetuned(tmp_path, trained, config=config, class_names=("a", "b", "c"), settings={})
    again, names = load_finetuned(tmp_path)
    assert names == ("a", "b", "c")
    torch.testing.assert_close(again(pixels), trained(pixels))
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=weights.name):
        load_finetuned(tmp_path)


def test_an_image_that_another_had_to_replace_ends_it(images: torch.Tensor) -> None:
    batch = with_ids(global_batch(images))
    planned = torch.where(batch.global_index == 5, 99, batch.global_index)
    loader = ListLoader([dataclasses.replace(batch, scheduled_ids=planned)])
    model = UniCL(tiny_config(precision="fp32"))
    with pytest.raises(ValueError, match="cannot be read or decoded, and the log names them"):
        finetune(
            model,
            FineTuned(model, 3),
            loader,
            FinetuneRecipe(),
            steps=1,
            labels_of=lambda sample: [sample % 3],
        )


def test_each_rank_prepares_the_first_head_on_its_own_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks show the model the same images, which each decodes for itself."""
    asked: list[Ranks] = []

    def loader(on_ranks: ModelOnRanks, dataset: object) -> NoReturn:
        asked.append(on_ranks.ranks)
        raise EvaluationStopped

    monkeypatch.setattr(ModelOnRanks, "loader", loader)
    monkeypatch.setattr(finetune_module, "zero_shot_classifier", Mock())
    on_ranks = ModelOnRanks(UniCL(tiny_config()), Ranks(rank=1, world_size=2, cores=3))
    with pytest.raises(EvaluationStopped):
        _begin_head(
            Mock(spec=Finetune, head="zero-shot"),
            on_ranks,
            FineTuned(on_ranks.model, 3),
            Mock(spec=EvaluationData, class_names=(), templates=(), dataset=None),
            metric="top1",
        )
    assert asked == [Ranks(cores=3)]


def test_what_cannot_be_trained_is_refused(images: torch.Tensor, tmp_path: Path) -> None:
    model = UniCL(tiny_config(precision="fp32"))
    loader = ListLoader([with_ids(global_batch(images))])
    with pytest.raises(ValueError, match="sample 4 of the training images has no label"):
        finetune(
            model,
            FineTuned(model, 3),
            loader,
            FinetuneRecipe(),
            steps=1,
            labels_of=lambda sample: [] if sample == 4 else [0],
        )
    with pytest.raises(ValueError, match="--layer-decay must be a number in 1e-06 to 1, not 2"):
        check_options(FinetuneRecipe(layer_decay=2))
    with pytest.raises(FileNotFoundError, match=r"holds no finetuned\.json"):
        load_finetuned(tmp_path)


@pytest.mark.dist
def test_two_ranks_equal_one(images: torch.Tensor, tmp_path: Path) -> None:
    run_on_ranks(finetune_slices, 2, images, str(tmp_path / "two.safetensors"))
    finetune_slices(Ranks(), images, str(tmp_path / "one.safetensors"))
    one, two = (load_file(tmp_path / f"{which}.safetensors") for which in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12)
