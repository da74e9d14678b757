"""Standardised heads on frozen features: exported exactly, read back, trained on."""

import copy
import dataclasses

import open_clip
import pytest
import torch
from small_models import model_with_weights_that_matter, small_config, write_run
from torch.nn import functional as F

from unicl_fast import UniCL, build_model
from unicl_fast.conversion.initial import initialise, load_encoders
from unicl_fast.conversion.libraries import write_onnx
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import fold_statistics
from unicl_fast.tools.convert import __main__ as convert

KINDS = [("linear", "linear"), ("mlp", "linear"), ("mlp", "mlp")]


def headed(image: str, text: str) -> UniCL:
    """A small model whose heads have statistics of their own."""
    model = {
        "image_projection": image,
        "text_projection": text,
        "standardise": True,
        "feature_noise": 1.0,
    }
    found = model_with_weights_that_matter(small_config().changed(model=model))
    generator = torch.Generator().manual_seed(5)
    for tower, width in (("image", 64), ("text", 32)):
        mean = torch.randn(width, generator=generator)
        found.set_statistics(tower, mean, torch.rand(width, generator=generator) + 0.3)
    return found


@torch.no_grad()
def features_of(model: UniCL) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([[5, 7, 49407, 0], [9, 49407, 0, 0]])
    return model.encode_image(images), model.encode_text(tokens)


@pytest.mark.parametrize(("image", "text"), KINDS)
def test_a_run_with_heads_is_read_and_started_from_bit_for_bit(tmp_path, image, text):
    model = headed(image, text)
    write_run(tmp_path / "run", model.config, model.state_dict())
    read = load_encoders(tmp_path / "run")
    assert all(map(torch.equal, features_of(read), features_of(model)))
    config = model.config.changed(model={"init": str(tmp_path / "run")}, run={"seed": 3})
    fresh = build_model(config)
    initialise(fresh, Ranks())
    assert all(map(torch.equal, features_of(fresh.eval()), features_of(model)))


@pytest.mark.parametrize(("image", "text"), KINDS[:2])
def test_open_clip_has_the_same_heads_once_statistics_are_folded(tmp_path, image, text):
    model = headed(image, text)
    expected = features_of(model)
    fold_statistics(model)
    assert write_open_clip(model, tmp_path / "out") < 1e-5
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert (theirs.visual.head[-1].__class__.__name__ == "Mlp") == (image == "mlp")
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = F.normalize(theirs.encode_image(images), dim=-1)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
    ours = load_encoders(tmp_path / "out")  # and back
    for one, two in zip(features_of(ours), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_open_clip_has_no_mlp_for_these_texts(tmp_path):
    model = headed("mlp", "mlp")
    fold_statistics(model)
    with pytest.raises(ValueError, match=r"model\.text_projection=mlp: open_clip projects"):
        write_open_clip(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "text"), [KINDS[2], pytest.param(*KINDS[0], marks=pytest.mark.long)]
)
def test_onnx_and_our_own_export_have_the_same_heads(tmp_path, image, text):
    model = headed(image, text)
    expected = features_of(model)
    write_run(tmp_path / "run", model.config, model.state_dict())
    convert.main(["hf", str(tmp_path / "run"), str(tmp_path / "hf")])
    read = load_encoders(tmp_path / "hf")
    for one, two in zip(features_of(read), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    folded = copy.deepcopy(model)
    fold_statistics(folded)
    assert write_onnx(folded, tmp_path / "onnx") < 1e-4


def test_a_frozen_projection_is_frozen_with_its_hidden_layer():
    from unicl_fast.models.freezing import freeze

    model = headed("mlp", "mlp")
    model.config = dataclasses.replace(model.config).changed(
        optim={"freeze": ("image", "image_projection")}
    )
    freeze(model)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert not any(name.startswith("image_") for name in trained)
    assert {"text_hidden", "text_projection"} <= trained
