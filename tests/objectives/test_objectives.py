"""Each objective is its textbook formula, on any number of ranks, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import reference_loss
import torch
from rank_workers import first_gradients, run_on_ranks, write_objective_gradients
from small_runs import (
    OBJECTIVES,
    global_batch,
    labelled_batch,
    labelled_loader,
    objective_config,
    tiny_config,
)
from timm.data import Mixup
from torch.nn import functional as F

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.features import require_text_encoder
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.loss_tiled import LARGEST_TILE
from unicl_fast.objectives.mixup import draw_pairs, labels_of_pairs, mix
from unicl_fast.objectives.positives import Membership
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.training.global_loss import encoder_input, global_loss, shown_images, shown_indices
from unicl_fast.training.trainer import Trainer


def evaluated(objective: str, **settings: object) -> tuple[TrainConfig, UniCL]:
    """In evaluation mode, so that a formula may encode once more, and in fp64."""
    config = objective_config(objective, **settings)
    model = UniCL(config).to(torch.float64).eval()
    if model.class_rows is not None:  # biases begin at 0 and would not be seen
        torch.nn.init.normal_(model.class_rows.data[:, -1])
    return config, model


def loss_of(model: UniCL, batch: Batch, config: TrainConfig) -> torch.Tensor:
    return global_loss(model, batch, config, Ranks())


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_supcon_is_the_mean_over_anchors_and_positives(images: torch.Tensor, form: str) -> None:
    """Khosla et al., equation 2, by loops."""
    config, model = evaluated("supcon", loss=form)
    batch = labelled_batch(images, objective="supcon")
    views = model.encode_image(encoder_input(shown_images(batch), config))
    classes = batch.class_ids.repeat(2).tolist()
    scale, total = model.logit_scale.exp(), 0
    for i, anchor in enumerate(views):
        others = [a for a in range(len(views)) if a != i]
        positives = [p for p in others if classes[p] == classes[i]]
        denominator = torch.stack([(scale * anchor @ views[a]).exp() for a in others]).sum()
        terms = [((scale * anchor @ views[p]).exp() / denominator).log() for p in positives]
        total -= torch.stack(terms).mean() / len(views)
    torch.testing.assert_close(loss_of(model, batch, config), total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_ce_is_that_of_a_linear_layer(images: torch.Tensor, form: str) -> None:
    config, model = evaluated("ce", loss=form)
    batch = labelled_batch(images, objective="ce")
    features = model.image_encoder(encoder_input(batch.images, config))
    weight, bias = model.class_rows[:, :-1], model.class_rows[:, -1]
    source, label = batch.class_ids >> 32, batch.class_ids & 0xFFFFFFFF
    expected = F.cross_entropy(F.linear(features, weight, bias), 2 * source + label)
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


def test_clip_has_one_positive_a_pair_and_equal_texts_as_negatives(images: torch.Tensor) -> None:
    """Radford et al., figure 3: the diagonal of all pairs, whatever is equal."""
    config, model = evaluated("clip")
    batch = labelled_batch(images, objective="clip")
    assert len(batch.tokens) < len(images)
    pixels, texts, scale, *_ = model(encoder_input(batch.images, config), batch.tokens)
    logits = scale * pixels @ texts[batch.text_index].T
    # an equal text is as good as one's own: its logit is the same
    diagonal = torch.arange(len(images))
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


def mixed_by_hand(batch: Batch, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and shares of labels [n classes], pixel by pixel."""
    images = encoder_input(batch.images, config)
    names = sorted(set(batch.class_ids.tolist()))
    draws = draw_pairs(
        config.objective, seed=config.run.seed, step=batch.step, num_pairs=6, image_size=32
    )
    mixed, shares = images.clone(), torch.zeros(len(images), len(names), dtype=torch.float64)
    for i in range(len(images)):
        j, share = i ^ 1, draws.lambdas[i // 2]
        top, bottom, left, right = draws.boxes[i // 2]
        if max(batch.class_ids[[i, j]]) >= 2**62:
            share = 1.0
        elif bottom > top:
            mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
        else:
            mixed[i] = share * images[i] + (1 - share) * images[j]
        shares[i, names.index(batch.class_ids[i])] += share
        shares[i, names.index(batch.class_ids[j])] += 1 - share
    return mixed, shares


@pytest.mark.parametrize("unique_texts", [True, False])
@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_unicl_of_mixed_images_takes_labels_times_labels(
    images: torch.Tensor, form: str, unique_texts: bool
) -> None:
    config, model = evaluated("unicl, mixed", loss=form, unique_texts=unique_texts)
    for step in range(3):
        batch = labelled_batch(images, objective="unicl, mixed", step=step)
        mixed, shares = mixed_by_hand(batch, config)
        pixels, texts, scale, *_ = model(mixed, batch.tokens)
        logits = scale * pixels @ texts[batch.text_index].T
        affinity = shares @ shares.T
        targets = affinity / affinity.sum(1, keepdim=True)
        expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


def assert_equal_with_gradients(model: UniCL, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """The loss, and its gradient with respect to every parameter, in fp64."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(one, parameters) for one in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("unique_texts", [True, False])
@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_images_of_several_labels_have_the_texts_of_all_of_them(
    images: torch.Tensor, form: str, unique_texts: bool
) -> None:
    """Against the oracle; the last images have captions, and the very last one no label."""
    config, model = evaluated("unicl, labels", loss=form, unique_texts=unique_texts)
    for step in range(2):
        batch = labelled_batch(images, objective="unicl, labels", step=step)
        pixels, texts, scale, *_ = model(encoder_input(batch.images, config), batch.tokens)
        samples, classes = batch.image_classes
        of_images = [set(classes[samples == sample].tolist()) for sample in range(len(images))]
        assert max(map(len, of_images)) > 2
        assert (batch.class_ids >= CAPTION_KEYS_START).sum() == 2
        expected = reference_loss.several_labels_loss(
            pixels, texts[batch.text_index], of_images, batch.class_ids.tolist(), scale
        )
        assert_equal_with_gradients(model, loss_of(model, batch, config), expected)


def test_ce_of_several_labels_takes_them_in_equal_parts(images: torch.Tensor) -> None:
    config, model = evaluated("ce, labels")
    batch = labelled_batch(images, objective="ce, labels")
    samples, classes = batch.image_classes
    parts = torch.zeros(len(images), 5, dtype=torch.float64)
    parts[samples, 2 * (classes >> 32) + (classes & 0xFFFFFFFF)] = 1
    assert parts.sum(1).max() == 3
    features = model.encode_image(encoder_input(batch.images, config))
    expected = F.cross_entropy(features @ model.class_rows.T, parts / parts.sum(1, keepdim=True))
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


def test_ce_of_mixed_images_takes_mixed_labels(images: torch.Tensor) -> None:
    config, model = evaluated("ce, mixed")
    batch = labelled_batch(images, objective="ce, mixed")
    mixed, shares = mixed_by_hand(batch, config)
    logits = model.encode_image(mixed) @ model.class_rows.T
    expected = F.cross_entropy(logits, shares)  # the batch has all five classes, in their order
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", ["sigmoid", "sigmoid, mixed"])
def test_the_sigmoid_form_asks_of_each_pair(images: torch.Tensor, objective: str) -> None:
    """Weights are cosines of labels, so that a mixed image's own text is wholly its own."""
    config, model = evaluated(objective)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
    batch = labelled_batch(images, objective=objective)
    if objective == "sigmoid":
        mixed = encoder_input(batch.images, config)
        shares = F.one_hot(batch.class_ids.unique(return_inverse=True)[1]).double()
    else:
        mixed, shares = mixed_by_hand(batch, config)
    pixels, texts, scale, bias, *_ = model(mixed, batch.tokens)
    logits = scale * pixels @ texts[batch.text_index].T + bias
    rows = F.normalize(shares, dim=1)
    expected = F.binary_cross_entropy_with_logits(logits, rows @ rows.T, reduction="sum") / 12
    torch.testing.assert_close(loss_of(model, batch, config), expected, rtol=1e-9, atol=0)


def test_many_learnt_rows_of_few_images_take_no_square_matrix(images: torch.Tensor) -> None:
    """In the dense form, which is taken for few logits: the weights of pairs are 3 x 10,000."""
    rows = torch.nn.functional.normalize(torch.randn(10_000, 4), dim=1)
    several = Membership(torch.arange(3), torch.arange(3) * 3_333, torch.ones(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        unified_contrastive_loss(
            rows[:3],
            rows,
            several,
            10.0,
            text_class_ids=torch.arange(10_000),
            directions="i2t",
            form="dense",
        )
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 20e6


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_the_sigmoid_form_takes_texts_of_all_classes_of_an_image(
    images: torch.Tensor, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair weighs 1 if the text's class is one of the image's, however many these are."""
    monkeypatch.setitem(LARGEST_TILE, "cpu", 5 * 5)
    config, model = evaluated("sigmoid, labels", loss=form)
    for step in range(2):
        batch = labelled_batch(images, objective="sigmoid, labels", step=step)
        pixels, texts, scale, bias, *_ = model(encoder_input(batch.images, config), batch.tokens)
        samples, classes = batch.image_classes
        positives = torch.zeros(len(images), len(images), dtype=torch.float64)
        for image in range(len(images)):
            positives[image] = torch.isin(batch.class_ids, classes[samples == image])
        assert positives.sum(dim=1).max() > 2
        logits = scale * pixels @ texts[batch.text_index].T + bias
        total = F.binary_cross_entropy_with_logits(logits, positives, reduction="sum")
        assert_equal_with_gradients(model, loss_of(model, batch, config), total / len(images))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_a_pair_is_mixed_as_timm_mixes_it(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, mixup: float, cutmix: float
) -> None:
    """In a batch of two the first and the last, which timm pairs, are neighbours."""
    config = tiny_config()
    objective = ObjectiveConfig(mixup=mixup, cutmix=cutmix)
    batch = dataclasses.replace(
        labelled_batch(images, objective="unicl"),
        images=images[:2],
        class_ids=torch.tensor([3, 4]),
        global_index=torch.arange(2),
    )
    pixels = encoder_input(batch.images, config)
    draws = draw_pairs(objective, seed=0, step=0, num_pairs=1, image_size=32)
    theirs = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (draws.lambdas[0], cutmix > 0))
    monkeypatch.setattr(
        "timm.data.mixup.cutmix_bbox_and_lam",
        lambda *_, **__: (draws.boxes[0], draws.lambdas[0]),
    )
    expected, targets = theirs(pixels.clone(), batch.class_ids)
    mixed, labels = mix(
        pixels, batch, TrainConfig(objective=objective, run=RunConfig(global_batch_size=2))
    )
    torch.testing.assert_close(mixed, expected)
    ours = torch.zeros(2, 5, dtype=torch.float64)
    ours.index_put_((labels.samples, labels.labels), labels.weights, accumulate=True)
    torch.testing.assert_close(ours, targets.double(), rtol=1e-6, atol=1e-6)
    assert 0 < draws.lambdas[0] < 1


def test_what_is_drawn_follows_its_law() -> None:
    settings = {"seed": 3, "num_pairs": 4000, "image_size": 224}
    both = ObjectiveConfig(mixup=0.8, cutmix=1.0, mix_probability=0.5, cutmix_share=0.25)
    draws = draw_pairs(both, step=0, **settings)
    cuts = draws.boxes[:, 1] > draws.boxes[:, 0]
    mixes = (draws.lambdas < 1) & ~cuts
    assert cuts.mean() == pytest.approx(0.125, abs=0.03)
    assert mixes.mean() == pytest.approx(0.375, abs=0.03)
    # the variance of Beta(a, a) is 1 / (8a + 4)
    assert draws.lambdas[mixes].var() == pytest.approx(1 / (8 * 0.8 + 4), abs=0.01)
    areas = np.diff(draws.boxes[:, :2]) * np.diff(draws.boxes[:, 2:])
    np.testing.assert_allclose(1 - areas[:, 0][cuts] / 224**2, draws.lambdas[cuts])
    again = draw_pairs(both, step=0, **settings)
    assert (again.lambdas == draws.lambdas).all()
    assert (draw_pairs(both, step=1, **settings).lambdas != draws.lambdas).any()


def test_mixed_images_keep_their_memory_format(images: torch.Tensor) -> None:
    config = tiny_config()
    batch = labelled_batch(images, objective="unicl")
    pixels = encoder_input(batch.images, config)
    mixed, _ = mix(pixels, batch, TrainConfig(objective=ObjectiveConfig(mixup=1.0)))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_a_label_that_stands_twice_adds_up() -> None:
    """Partners of one class: the pair is not mixed at all as far as labels go."""
    generator = torch.Generator().manual_seed(0)
    u, v = F.normalize(torch.randn(2, 6, 4, dtype=torch.float64, generator=generator), dim=2)
    ids, shares = torch.tensor([0, 0, 1, 1, 2, 2]), torch.full((6,), 0.3, dtype=torch.float64)
    for form in ("dense", "tiled"):
        mixed = unified_contrastive_loss(u, v, labels_of_pairs(ids, ids, shares), 9.0, form=form)
        plain = unified_contrastive_loss(u, v, ids, 9.0, form=form)
        torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=0)


# One for each thing that ranks exchange: classes and texts, views, pairs, memberships.
FEW = ["unicl", "supcon", "ce, mixed", "sigmoid, labels"]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "chosen"),
    [
        pytest.param(2, FEW, id="2"),
        pytest.param(
            *(2, [name for name in OBJECTIVES if name not in FEW]),
            id="2-more",
            marks=pytest.mark.slow,
        ),
        pytest.param(3, list(OBJECTIVES), id="3", marks=[pytest.mark.slow, pytest.mark.long]),
        # four ranks would part pairs
        pytest.param(
            *(4, [name for name in OBJECTIVES if "mixed" not in name]),
            id="4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_give_the_objectives_of_one_process(
    images: torch.Tensor, tmp_path: Path, world_size: int, chosen: list[str]
) -> None:
    """Loss and every parameter's gradient in fp64, drop path on; two views of different masks."""
    run_on_ranks(write_objective_gradients, world_size, images, str(tmp_path), chosen, {})
    for objective in chosen:
        config = objective_config(objective, loss="dense")
        alone_loss, alone = first_gradients(
            images, Ranks(), config, labelled_loader(images, objective)
        )
        for form, rank in itertools.product(("dense", "tiled"), range(world_size)):
            written = f"{form}{rank}"
            loss, gradients = torch.load(tmp_path / f"{objective}-{written}.pt", weights_only=True)
            assert loss == pytest.approx(alone_loss, rel=1e-13)
            for name, gradient in alone.items():
                if gradient is None:
                    assert gradients[name] is None
                    continue
                assert gradient.abs().max() > 0, f"{objective}: {name} has nothing to compare"
                torch.testing.assert_close(
                    gradients[name], gradient, rtol=1e-9, atol=1e-13, msg=f"{objective} {name}"
                )


@pytest.mark.parametrize(
    "objective",
    [name for name in OBJECTIVES if name.endswith("labels") and not name.startswith("ce")],
)
@pytest.mark.parametrize("unique_texts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_micro_batches_of_images_of_several_classes(
    images: torch.Tensor, objective: str, unique_texts: bool
) -> None:
    loader = labelled_loader(images, objective)
    loss, expected = first_gradients(images, Ranks(), objective_config(objective), loader)
    config = objective_config(objective, micro_batch_size=5, unique_texts=unique_texts)
    in_parts, gradients = first_gradients(images, Ranks(), config, loader)
    assert in_parts == pytest.approx(loss, rel=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13, msg=name)


def test_second_views_have_slots_of_their_own(images: torch.Tensor) -> None:
    share = labelled_batch(images, objective="supcon", rank=1, world_size=3)
    assert shown_indices(share, global_batch_size=12).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("objective", "efficiency", "message"),
    [
        ("ce, labels", {"micro_batch_size": 4}, "ce has no texts"),
        ("supcon", {"micro_batch_size": 4}, "supcon has no texts"),
        ("ce", {"micro_batch_size": 4}, "ce has no texts"),
        ("unicl, mixed", {"micro_batch_size": 4}, "cannot be used with objective.mixup"),
        ("sigmoid", {"loss": "triton"}, "triton has kernels for objective.form=softmax only"),
    ],
)
def test_what_an_objective_cannot_do_is_refused(
    images: torch.Tensor, objective: str, efficiency: dict, message: str
) -> None:
    loader = ListLoader([global_batch(images)])
    with pytest.raises(ValueError, match=message):
        Trainer(objective_config(objective, **efficiency), loader, progress=False).fit()


def test_other_views_and_torn_pairs_are_refused(images: torch.Tensor) -> None:
    loader = ListLoader([global_batch(images)])
    config = objective_config("supcon")
    one_view = dataclasses.replace(config, data=dataclasses.replace(config.data, augment=()))
    with pytest.raises(ValueError, match="two views"):
        Trainer(one_view, loader)
    with pytest.raises(ValueError, match="a rank has 3 of them"):
        Trainer(objective_config("unicl, mixed"), loader, ranks=Ranks(world_size=4))
    with pytest.raises(ValueError, match="mix labels, which clip does not have"):
        ObjectiveConfig(name="clip", mixup=0.1)
    with pytest.raises(ValueError, match="which ce does not have: take unicl or clip, or softmax"):
        ObjectiveConfig(name="ce", form="sigmoid")
    with pytest.raises(ValueError, match="several labels an image, which supcon does not"):
        ObjectiveConfig(name="supcon", positives="labels")
    levels = DataConfig(prompts="levels")
    with pytest.raises(ValueError, match="positives=labels adds those of other levels"):
        TrainConfig(data=levels, objective=ObjectiveConfig(positives="labels"))
    with pytest.raises(ValueError, match="for which objective.name=ce has no rows"):
        TrainConfig(data=levels, objective=ObjectiveConfig(name="ce"))
    with pytest.raises(ValueError, match="positives=labels cannot be used with objective.mixup"):
        ObjectiveConfig(positives="labels", cutmix=0.1)
    with pytest.raises(ValueError, match="needs classes"):
        UniCL(dataclasses.replace(tiny_config(), objective=ObjectiveConfig(name="ce")))


@pytest.mark.parametrize("objectives", [("unicl", "unicl, labels"), ("unicl, labels", "unicl")])
def test_batches_with_other_classes_than_the_objective_takes_are_refused(
    images: torch.Tensor, objectives: tuple[str, str]
) -> None:
    loader = labelled_loader(images, objectives[1])
    trainer = Trainer(objective_config(objectives[0]), loader, progress=False)
    with pytest.raises(ValueError, match="but the loader's batches have .* Batch.image_classes"):
        trainer.fit()


def test_a_model_without_texts_says_so(images: torch.Tensor) -> None:
    _, model = evaluated("supcon")
    for_it = "has no text encoder.*: take .*linear-probe or knn"
    with pytest.raises(ValueError, match=for_it):
        require_text_encoder(model, "zero-shot")
    with pytest.raises(ValueError, match=for_it):
        model.encode_text(global_batch(images).tokens)
    assert not [name for name, _ in model.named_parameters() if "text" in name]


def test_a_fixed_scale_stays(images: torch.Tensor) -> None:
    config = tiny_config()
    fixed = dataclasses.replace(
        config, model=dataclasses.replace(config.model, learn_logit_scale=False)
    )
    trainer = Trainer(fixed, ListLoader([global_batch(images)]), progress=False)
    trainer.fit()
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
