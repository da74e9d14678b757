"""Each objective is its textbook formula, on any number of ranks, and refuses what it cannot do."""

import dataclasses
import itertools
import math

import pytest
import torch
from compared_runs import assert_same_gradients
from rank_workers import first_gradients, gradients_of, run_on_ranks
from small_runs import (
    OBJECTIVES,
    global_batch,
    labelled_batch,
    labelled_loader,
    objective_config,
    tiny_config,
)
from torch.nn import functional as F

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.config_json import config_from_dict
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.features import require_text_encoder
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.loss_tiled import LARGEST_TILE
from unicl_fast.objectives.positives import Membership
from unicl_fast.objectives.registry import make_objective
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.encoding import encoder_input
from unicl_fast.training.step import global_loss


def evaluated(objective: str, **settings: object) -> tuple[TrainConfig, UniCL]:
    """In evaluation mode, so that a formula may encode once more, and in fp64."""
    config = objective_config(objective, **settings)
    model = build_model(config).to(torch.float64).eval()
    if "class_rows" in model.learnt:  # biases begin at 0 and would not be seen
        torch.nn.init.normal_(model.class_rows.data[:, -1])
    return config, model


def loss_of(model: UniCL, batch: Batch, config: TrainConfig) -> torch.Tensor:
    return global_loss(model, batch, config, Ranks())


def logits_of(model: UniCL, pixels: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits [b b] of images and the texts of all samples, by what the model has learnt."""
    images, texts, learnt = model(pixels, batch.texts.tokens)
    logits = learnt["logit_scale"].exp() * images @ texts[batch.texts.index].T
    return logits + learnt.get("logit_bias", 0)


def assert_equal_with_gradients(model: UniCL, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """The loss, and its gradient with respect to every parameter, in fp64."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(one, parameters) for one in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def classes_of(batch: Batch) -> torch.Tensor:
    """Y [b classes]: which of all classes, sorted, an image has; by its labels if there are any."""
    names = batch.targets.class_ids.unique()
    if batch.targets.image_classes is None:
        return (batch.targets.class_ids[:, None] == names).double()
    samples, classes = batch.targets.image_classes
    return torch.stack(
        [torch.isin(names, classes[samples == image]) for image in range(len(batch.images))]
    ).double()


@pytest.mark.parametrize("form", ["dense", "tiled"])
@pytest.mark.parametrize(
    "objective",
    [name for name in OBJECTIVES if name.startswith(("unicl", "clip", "sigmoid", "siglip"))],
)
def test_images_and_texts_give_the_loss_of_a_dense_matrix(images, objective, form, monkeypatch):
    """Weights of pairs: 1 in a common class.

    Of CLIP's they are the diagonal, whatever is equal: an equal text has the same logit.
    """
    monkeypatch.setitem(LARGEST_TILE, "cpu", 5 * 5)
    config, model = evaluated(objective, loss=form)
    for step in range(2):
        batch = labelled_batch(images, objective=objective, step=step)
        pixels = encoder_input(batch.images, config)
        assert len(batch.texts.tokens) < len(images)
        of_texts = F.one_hot(batch.targets.class_ids.unique(return_inverse=True)[1]).double()
        weights = classes_of(batch) @ of_texts.T
        if objective.endswith("labels"):
            assert weights.sum(1).max() > 2
            assert (batch.targets.class_ids >= CAPTION_KEYS_START).sum() == 2
        if objective == "clip":
            weights = torch.eye(len(images), dtype=torch.float64)
        logits = logits_of(model, pixels, batch)
        if objective.startswith("sig"):
            total = F.binary_cross_entropy_with_logits(logits, weights, reduction="sum")
            expected = total / len(images)
        else:
            i2t = F.cross_entropy(logits, weights / weights.sum(1, keepdim=True), reduction="none")
            t2i = F.cross_entropy(logits.T, (weights / weights.sum(0)).T, reduction="none")
            of_samples = torch.ones(12) if batch.weights is None else batch.weights
            expected = (of_samples * (i2t + t2i)).sum() / (2 * of_samples.sum())
        assert_equal_with_gradients(model, loss_of(model, batch, config), expected)


@pytest.mark.parametrize("form", ["dense", "tiled"])
@pytest.mark.parametrize("objective", ["ce", "ce, labels"])
def test_ce_is_that_of_a_linear_layer(images, objective, form):
    """Of several labels it takes all in equal parts."""
    config, model = evaluated(objective, loss=form)
    batch = labelled_batch(images, objective=objective)
    pixels, targets = encoder_input(batch.images, config), classes_of(batch)
    assert targets.sum(1).max() == (3 if objective == "ce, labels" else pytest.approx(1))
    features = model.image_encoder(pixels)
    logits = F.linear(features, model.class_rows[:, :-1], model.class_rows[:, -1])
    # the batch has all five classes, in their order
    expected = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


def test_sigmoids_begin_where_siglip_does():
    for objective in ("sigmoid", "siglip"):
        _, model = evaluated(objective)
        assert model.logit_scale.item() == pytest.approx(math.log(10))
        assert model.logit_bias.item() == -10


def test_many_learnt_rows_of_few_images_take_no_square_matrix(images):
    """In the dense form, which is taken for few logits: the weights of pairs are 3 x 10,000."""
    rows = torch.nn.functional.normalize(torch.randn(10_000, 4), dim=1)
    several = Membership(torch.arange(3), torch.arange(3) * 3_333, torch.ones(3))
    options = {"text_class_ids": torch.arange(10_000), "directions": "i2t", "form": "dense"}
    with torch.profiler.profile(profile_memory=True) as profile:
        unified_contrastive_loss(rows[:3], rows, several, 10.0, **options)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 20e6


# One for each thing that ranks exchange: classes and texts, memberships.
FEW = ["unicl", "unicl, labels", "ce, labels", "sigmoid, labels", "unicl, weighted labels"]
MICRO = ["unicl, labels", "unicl, weighted labels", "sigmoid"], {"micro_batch_size": 3}
COMPILED = {"compile": "blocks", "activation_checkpointing": True}
slow, long = pytest.mark.slow, pytest.mark.long


@pytest.mark.parametrize(
    ("world_size", "chosen", "efficiency"),
    [
        pytest.param(2, FEW, {}, id="2"),
        pytest.param(1, *MICRO, id="1, micro-batches"),
        pytest.param(3, *MICRO, id="3, micro-batches", marks=slow),
        pytest.param(4, {*OBJECTIVES} - {*FEW}, {}, id="4, others", marks=slow),
        pytest.param(3, [*OBJECTIVES], {}, id="3, all", marks=long),
        pytest.param(2, FEW[:1], COMPILED, id="2, blocks", marks=long),
    ],
)
def test_ranks_give_the_objectives_of_one_process(images, world_size, chosen, efficiency):
    """Loss and every parameter's gradient in fp64, drop path on.

    Of four ranks the last has captions, and fewer distinct texts.
    """
    arguments = images, [*chosen], efficiency
    if world_size == 1:
        of_ranks = [gradients_of(Ranks(), *arguments)]
    else:
        of_ranks = run_on_ranks(gradients_of, world_size, *arguments)
    near = {"of_loss": 1e-10, "rtol": 1e-7, "atol": 1e-11} if "compile" in efficiency else {}
    for objective in chosen:
        config = objective_config(objective, loss="dense")
        alone = first_gradients(images, Ranks(), config, labelled_loader(images, objective))
        for form, (rank, found) in itertools.product(("dense", "tiled"), enumerate(of_ranks)):
            where = f"{objective}-{form}{rank}"
            assert_same_gradients(found[objective, form], alone, **near, where=where)


@pytest.mark.parametrize(
    ("objective", "efficiency", "message"),
    [
        ("ce", {"micro_batch_size": 4}, "objective.name=ce has no texts: set it"),
        ("sigmoid", {"loss": "triton"}, "triton cannot compute the loss of objective.name=sigmoid"),
        ("siglip", {"loss": "triton"}, "triton cannot compute the loss of objective.name=siglip"),
    ],
)
def test_what_an_objective_cannot_do_is_refused(images, objective, efficiency, message):
    loader = ListLoader([global_batch(images)])
    with pytest.raises(ValueError, match=message):
        make_trainer(objective_config(objective, **efficiency), loader, progress=False).fit()


def test_other_options_and_names_are_refused():
    for name, option in (("clip", "positives"), ("ce", "logit_scale_max")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            make_objective(name, **{option: 1.0})
        with pytest.raises(ValueError, match=f"objective.{option} is not a field"):
            config_from_dict({"objective": {"name": name, option: 1.0}})
    with pytest.raises(ValueError, match="objective.name must be one of unicl, clip, .*'softmax'"):
        make_objective("softmax")
    levels = DataConfig(prompts="levels")
    for objective in (make_objective(positives="labels"), make_objective("ce")):
        with pytest.raises(ValueError, match="prompts=levels contrasts .* looks at others"):
            TrainConfig(data=levels, objective=objective)
    with pytest.raises(ValueError, match="needs classes"):
        build_model(dataclasses.replace(tiny_config(), objective=make_objective("ce")))


@pytest.mark.parametrize("objectives", [("unicl", "unicl, labels"), ("unicl, labels", "unicl")])
def test_batches_with_other_classes_than_the_objective_takes_are_refused(images, objectives):
    loader = labelled_loader(images, objectives[1])
    trainer = make_trainer(objective_config(objectives[0]), loader, progress=False)
    with pytest.raises(ValueError, match="loader's batches have .* Targets.image_classes"):
        trainer.fit()


def test_a_model_without_texts_says_so(images):
    _, model = evaluated("ce")
    for_it = "has no text encoder.*: use .*linear-probe or knn"
    with pytest.raises(ValueError, match=for_it):
        require_text_encoder(model, "zero-shot")
    with pytest.raises(ValueError, match=for_it):
        model.encode_text(global_batch(images).texts.tokens)
    assert not [name for name, _ in model.named_parameters() if "text" in name]
