"""Prompts of labels and captions told apart: a source token, projections and scales per kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rank_workers import first_gradients, run_on_ranks, train_each
from safetensors.torch import load_file
from small_runs import (
    StepLoader,
    global_batch,
    labelled_batch,
    labelled_loader,
    objective_config,
    tiny_config,
)
from torch.func import functional_call
from torch.nn import functional as F

from unicl_fast.checkpoints import load
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.config import TEXT_KINDS, ObjectiveConfig, TrainConfig
from unicl_fast.conversion.export import write_export
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.features import model_on_ranks
from unicl_fast.evaluation.inference import Model, load_model
from unicl_fast.evaluation.requests import ZeroShot
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.training.global_loss import encoder_input, global_loss
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer

ALL = {"source_token": True, "projections": "per_kind", "temperature": "per_kind"}
OPTIONS = {name: {name: value} for name, value in ALL.items()} | {"all": ALL}


def config_with(
    *, source_token: bool = False, projections: str = "shared", temperature: str = "shared",
    **settings: object,
) -> TrainConfig:  # fmt: skip
    config = tiny_config(**settings)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, source_token=source_token, projections=projections, drop_path=0.0
        ),
        objective=ObjectiveConfig(temperature=temperature),
    )


def with_different_kinds(model: UniCL) -> UniCL:
    """In fp64 and evaluation mode, with weights of the two kinds that differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in model.double().named_parameters():
            if name.endswith(("source_embedding", "_projection", "logit_scale")):
                noise = torch.randn(one.shape, generator=generator, dtype=one.dtype)
                one.add_(0.2 * noise)
    return model.eval()


def loss_by_pairs(model: UniCL, images: torch.Tensor, objective: str, step: int) -> torch.Tensor:
    """The definition: each pair's logit by the weights of its text's kind, each text by itself."""
    config, d = model.config, model.config.model.embed_dim
    batch = labelled_batch(images, objective=objective, step=step)
    of_images = model.image_encoder(encoder_input(batch.images, config))
    weights = dict(model.text_encoder.named_parameters())
    source, positions = weights.pop("source_embedding"), weights["positional_embedding"]
    plain = UniCL(objective_config(objective.partition(",")[0])).double().text_encoder
    columns = []
    for text in batch.text_index.tolist():
        kind = int(batch.text_class_ids[text] >= CAPTION_KEYS_START)
        own = slice(kind * d, (kind + 1) * d)
        first = torch.cat([positions[:1] + source[kind], positions[1:]])
        tokens = batch.tokens[text : text + 1]
        feature = functional_call(plain, weights | {"positional_embedding": first}, (tokens,))
        column = F.normalize(feature @ model.text_projection[:, own], dim=1)
        rows = F.normalize(of_images @ model.image_projection[:, own], dim=1)
        columns.append(model.logit_scale[kind].exp() * rows @ column[0])
    logits = torch.stack(columns, dim=1)
    positives = (batch.class_ids[:, None] == batch.class_ids).double()
    if objective.startswith("sigmoid"):
        logits = logits + model.logit_bias
        return (F.softplus(logits) - positives * logits).sum() / len(logits)
    targets = positives / positives.sum(dim=1, keepdim=True)
    both = (targets * logits.log_softmax(dim=1)) + (targets.T * logits.log_softmax(dim=0))
    return -both.sum() / (2 * len(logits))


@pytest.mark.parametrize("form", ["dense", "tiled"])
@pytest.mark.parametrize("objective", ["unicl, kinds", "sigmoid, kinds"])
def test_the_loss_and_gradients_are_those_of_the_definition(
    images: torch.Tensor, objective: str, form: str
) -> None:
    config = objective_config(objective, loss=form)
    model = with_different_kinds(UniCL(config))
    parameters = dict(model.named_parameters())
    for step in (0, 1):
        batch = labelled_batch(images, objective=objective, step=step)
        loss = global_loss(model, batch, config, Ranks())
        expected = loss_by_pairs(model, images, objective, step)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        pair = (torch.autograd.grad(one, parameters.values()) for one in (loss, expected))
        for name, ours, theirs in zip(parameters, *pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_begins_as_one_without(images: torch.Tensor, option: str) -> None:
    """All other weights are drawn alike, the kinds are equal, and the first gradients differ."""
    plain_loss, plain = first_gradients(images, Ranks(), config_with())
    loss, gradients = first_gradients(images, Ranks(), config_with(**OPTIONS[option]))
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    own = {"source_token": "text_encoder.source_embedding", "projections": "text_projection",
           "temperature": "logit_scale", "all": "logit_scale"}[option]  # fmt: skip
    of_kinds = gradients[own]
    if option == "projections":
        of_kinds = of_kinds.unflatten(1, (2, -1)).transpose(0, 1)
        torch.testing.assert_close(of_kinds.sum(dim=0), plain[own], rtol=1e-9, atol=1e-13)
    assert len(of_kinds) == 2
    assert (of_kinds.reshape(2, -1).abs().amax(dim=1) > 0).all()
    assert not torch.allclose(of_kinds[0], of_kinds[1])


@pytest.mark.parametrize("freeze", [(), ("image",), ("text", "text_projection")])
@pytest.mark.parametrize(
    "efficiency",
    [
        {"micro_batch_size": 5},
        {"micro_batch_size": 2, "activation_checkpointing": True, "text_layout": "trimmed"},
        {"unique_texts": False, "text_layout": "padded"},
    ],
    ids=str,
)
def test_what_makes_it_cheap_changes_no_gradient(
    images: torch.Tensor, efficiency: dict, freeze: tuple[str, ...]
) -> None:
    def gradients_of(**settings: object) -> tuple[float, dict]:
        config = config_with(**ALL, **settings)
        optim = dataclasses.replace(config.optim, freeze=freeze)
        return first_gradients(images, Ranks(), dataclasses.replace(config, optim=optim))

    loss, gradients = gradients_of(**efficiency)
    plain_loss, plain = gradients_of()
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    for name, gradient in gradients.items():
        if plain[name] is None:
            assert gradient is None
            continue
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_model_of_one_kind_is_an_ordinary_one(images: torch.Tensor, option: str) -> None:
    """Its features, products and scale are those of the whole model for texts of that kind."""
    model = with_different_kinds(UniCL(config_with(**OPTIONS[option])))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = global_batch(images)
    pixels = encoder_input(batch.images, model.config)
    plain = UniCL(config_with()).state_dict()
    scores = []
    for number, kind in enumerate(TEXT_KINDS):
        one = model.of_kind(kind)
        assert not one.config.tells_kinds
        assert not one.training
        assert {name: tensor.shape for name, tensor in one.state_dict().items()} == {
            name: tensor.shape for name, tensor in plain.items()
        }
        kinds = torch.full((len(batch.tokens),), number)
        whole = model.encode_image(pixels) @ model.encode_text(batch.tokens, kinds=kinds).T
        own = one.encode_image(pixels), one.encode_text(batch.tokens)
        scores.append(one.scale * own[0] @ own[1].T)
        torch.testing.assert_close(scores[-1], model.scale * whole, rtol=1e-10, atol=1e-12)
        for features in own:
            torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)).double())
    assert not torch.allclose(*scores)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ValueError, match="say what each text is"):
        model.encode_text(batch.tokens)
    ordinary = UniCL(config_with())
    assert ordinary.of_kind("labels") is ordinary


@pytest.mark.parametrize(("causal", "pool"), [(False, "end"), (False, "last")])
def test_texts_whose_padding_counts_have_a_source_too(
    images: torch.Tensor, causal: bool, pool: str
) -> None:
    config = config_with(source_token=True)
    settings = dataclasses.replace(config.model, text_causal=causal, text_pool=pool)
    model = with_different_kinds(UniCL(dataclasses.replace(config, model=settings)))
    tokens = global_batch(images).tokens
    for number, kind in enumerate(TEXT_KINDS):
        kinds = torch.full((len(tokens),), number)
        torch.testing.assert_close(
            model.encode_text(tokens[:, :30], 99, kinds), model.of_kind(kind).encode_text(tokens)
        )


def test_a_run_resumes_bit_for_bit_and_is_evaluated_as_one_of_captions(
    images: torch.Tensor, tmp_path: Path
) -> None:
    config = config_with(**ALL, steps=4)
    optim = dataclasses.replace(config.optim, ema_decay=0.9, layer_decay=0.7)
    config = dataclasses.replace(config, optim=optim)
    seen: list[UniCL] = []

    def evaluate(model: UniCL) -> dict[str, float]:
        seen.append(model)
        return {"top1": 0.5}

    def trainer_in(folder: Path) -> Trainer:
        return Trainer(config, StepLoader(images), run_folder=folder, progress=False,
                       evaluations={"zero_shot": evaluate})  # fmt: skip

    unbroken = trainer_in(tmp_path / "unbroken")
    unbroken.fit()
    resumed = trainer_in(tmp_path / "resumed")
    resumed.resume(list_checkpoints(tmp_path / "unbroken/checkpoints")[0])
    resumed.fit()
    for one, other in ((unbroken.model, resumed.model), (unbroken.ema.module, resumed.ema.module)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    line = read_metrics(tmp_path / "unbroken")[-2]
    scales = unbroken.model.logit_scale.tolist()
    assert [line["logit_scale/labels"], line["logit_scale/captions"]] == scales
    assert scales[0] != scales[1]
    captions = unbroken.ema.module.of_kind("captions")
    assert torch.equal(seen[0].text_projection, captions.text_projection)
    assert torch.equal(seen[0].logit_scale, captions.logit_scale)


def test_a_model_is_stored_whole_and_used_for_one_kind(
    images: torch.Tensor, tmp_path: Path
) -> None:
    config = config_with(**ALL, precision="fp32")
    model = UniCL(config)
    with_different_kinds(model).float()
    write_export(model, tmp_path / "export")
    assert "told apart" in (tmp_path / "export/README.md").read_text()
    again = load.load_model(tmp_path / "export")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    texts = ["a photo of a dog", "two people"]
    of_kinds = {
        kind: load_model(tmp_path / "export", kind=kind, device="cpu") for kind in TEXT_KINDS
    }
    for kind, one in of_kinds.items():
        features = one.embed_texts(texts)
        assert features.shape == (2, config.model.embed_dim)
        command = ZeroShot(checkpoint=tmp_path / "export", data=("any",), kind=kind, device="cpu")
        with model_on_ranks(command) as on_ranks:
            evaluated = Model(on_ranks.model).embed_texts(texts)
        torch.testing.assert_close(features, evaluated)
        other = of_kinds["labels"].of_kind(kind)
        torch.testing.assert_close(features, other.embed_texts(texts))
    both = [one.embed_texts(texts) for one in of_kinds.values()]
    assert not (both[0] == both[1]).any()
    default = Model(model)
    torch.testing.assert_close(default.embed_texts(texts), of_kinds["captions"].embed_texts(texts))


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_that_divide_the_state_train_as_before(images: torch.Tensor, tmp_path: Path) -> None:
    """Micro-batches of texts differ in number by rank, and one rank may have captions alone."""
    runs = {}
    for shard in ("off", "optimizer", "full"):
        config = config_with(**ALL, steps=3, shard=shard, micro_batch_size=2)
        optim = dataclasses.replace(config.optim, ema_decay=0.9)
        runs[shard] = dataclasses.replace(config, optim=optim), None
    run_on_ranks(train_each, 3, images, tmp_path, runs)
    states = {
        shard: load_file(list_checkpoints(tmp_path / shard / "checkpoints")[-1] / "ema.safetensors")
        for shard in runs
    }
    for name, tensor in states["off"].items():
        assert torch.equal(states["optimizer"][name], tensor), name
        torch.testing.assert_close(states["full"][name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        ({"name": "clip"}, {"source_token": True}, "objective.name=clip does not"),
        ({"name": "supcon", "temperature": "per_kind"}, {}, "take unicl, or leave them out"),
        ({}, {"projections": "per_kind", "text_projection": "none", "embed_dim": 16},
         "per_kind needs projections"),
    ],
)  # fmt: skip
def test_what_has_no_kinds_is_refused(objective: dict, model: dict, message: str) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            config,
            objective=ObjectiveConfig(**objective),
            model=dataclasses.replace(config.model, **model),
        )


def test_another_run_is_not_resumed(images: torch.Tensor, tmp_path: Path) -> None:
    config = config_with(steps=2)
    Trainer(config, StepLoader(images), run_folder=tmp_path, progress=False).fit()
    other = Trainer(config_with(source_token=True, steps=2), StepLoader(images), progress=False)
    with pytest.raises(ValueError, match="source_token"):
        other.resume(list_checkpoints(tmp_path / "checkpoints")[-1])


def test_the_batches_of_the_tests_have_both_kinds(images: torch.Tensor) -> None:
    for loader in (StepLoader(images), labelled_loader(images, "unicl, kinds")):
        kinds = loader.batch_of(step=0).text_class_ids >= CAPTION_KEYS_START
        assert 0 < int(kinds.sum()) < len(kinds)
