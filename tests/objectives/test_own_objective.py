"""The objective of docs/objectives.md, as it stands there: a file and a line in the registry."""

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compared_runs import assert_same_gradients
from rank_workers import first_gradients
from small_runs import labelled_loader, tiny_config
from torch.nn import functional as F

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.objectives import registry
from unicl_fast.objectives.registry import make_objective
from unicl_fast.training.encoding import encoder_input
from unicl_fast.training.step import global_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


@pytest.fixture(autouse=True)
def margin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("unicl_fast.objectives.margin")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, module.__dict__)
    (line,) = re.findall(r'`"(\w+)": "([\w:]+)"`', PAGE.read_text(encoding="utf-8"))
    monkeypatch.setitem(registry.OBJECTIVES, *line)


def config_of(**options: float) -> TrainConfig:
    return dataclasses.replace(tiny_config(), objective=make_objective("margin", **options))


def test_without_a_margin_it_is_clip(images):
    clip = dataclasses.replace(tiny_config(), objective=make_objective("clip"))
    loader = labelled_loader(images, "clip, weighted")
    expected = first_gradients(images, Ranks(), clip, loader)
    found = first_gradients(images, Ranks(), config_of(margin=0.0), loader)
    assert_same_gradients(found, expected, of_loss=0, rtol=1e-12, atol=1e-15)


def test_positives_lose_the_margin(images):
    config = config_of(margin=0.2)
    batch = next(labelled_loader(images, "clip").batches(0))
    model = build_model(config).double().eval()
    loss = global_loss(model, batch, config, Ranks())
    pixels, texts, learnt = model(encoder_input(batch.images, config), batch.texts.tokens)
    each = texts[batch.texts.index]
    pairs = (batch.texts.index[:, None] == batch.texts.index[None, :]).double()
    logits = learnt["logit_scale"].exp() * (pixels @ each.T - 0.2 * pairs)
    targets = pairs / pairs.sum(1, keepdim=True)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_micro_batches_give_the_same_gradients(images):
    config = config_of(margin=0.2)
    loader = labelled_loader(images, "clip")
    expected = first_gradients(images, Ranks(), config, loader)
    parts = config.changed(efficiency={"micro_batch_size": 5})
    assert_same_gradients(first_gradients(images, Ranks(), parts, loader), expected)


def test_a_form_that_it_lacks_is_refused():
    with pytest.raises(ValueError, match="objective.name=margin: take one of auto, dense"):
        config_of().changed(efficiency={"loss": "tiled"})


def test_a_long_name_keeps_its_distance_in_the_help(monkeypatch):
    monkeypatch.setitem(registry.OBJECTIVES, "additive_margin", "unicl:CLIPObjective")
    assert "additive_margin   an image" in registry.list_objectives()
