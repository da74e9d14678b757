"""microsoft/UniCL's files: features against those of other libraries, both ways, and refusals."""

import argparse
import functools
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official_forward import OfficialModel
from torch import Tensor

from unicl_fast import UniCL
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.official import preset_of, with_present_names
from unicl_fast.conversion.output import num_parameters
from unicl_fast.conversion.torch_files import read_torch_file
from unicl_fast.text.tokenizer import Tokenizer

FILE = Path("some.pth")
read = functools.partial(read_torch_file, expected="a file of microsoft/UniCL")
TEXTS = ["a photo of a dog", "", "two people in the snow " * 30]


@pytest.fixture(scope="module")
def official() -> OfficialModel:
    return OfficialModel("swin-tiny")


@pytest.fixture(scope="module")
def entries(official: OfficialModel) -> dict[str, Tensor]:
    return official.entries


def older_names(entries: dict[str, Tensor], text: str = "lang_encoder.") -> dict[str, Tensor]:
    """The names in older files, of a model wrapped for several GPUs."""
    renamed = {}
    for name, tensor in entries.items():
        name = name.replace("image_encoder.", "visual.").replace("text_encoder.", text)
        renamed["module." + name.replace("image_projection", "vision_projection")] = tensor
    return renamed


def loaded(entries: dict[str, Tensor], folder: Path) -> UniCL:
    torch.save({"model": entries}, folder / "some.pth")
    return load_encoders(f"official:{folder / 'some.pth'}")


@torch.no_grad()
def assert_features_of(model: UniCL, official: OfficialModel) -> None:
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(2 * coarse, size=224, mode="bilinear")
    tokens = Tokenizer()(TEXTS)
    for found, expected in (
        (model.encode_image(images), official.image_features(images)),
        (model.encode_text(tokens), official.text_features(tokens)),
    ):
        assert expected.std(dim=0).max() > 0.01  # inputs are told apart
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_features_and_settings_of_a_released_model(official, tmp_path):
    model = loaded(older_names(official.entries), tmp_path)
    assert num_parameters(model) == 91_340_667
    assert_features_of(model, official)
    assert model.logit_scale.item() == pytest.approx(4.7)
    data = model.config.data
    assert (data.evaluation_resize, data.image_size, data.interpolation) == (256, 224, "bicubic")
    assert data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("text_encoder", ["lang_encoder.", "text."])
def test_each_older_name_has_its_present_one(entries, text_encoder):
    renamed = older_names(entries, text_encoder)
    assert not entries.keys() & renamed.keys()
    present = with_present_names(renamed, source=FILE)
    assert present.keys() == entries.keys()
    assert all(present[name] is tensor for name, tensor in entries.items())


@pytest.mark.parametrize(
    ("renamed", "changes", "message"),
    [
        ({}, {"image_encoder.patch_embed.proj.weight": torch.zeros(192, 3, 4, 4)},
         "width 192; known are 96 .Swin-T. and 128 .Swin-B."),
        ({}, {"text_encoder.token_embedding.weight": torch.zeros(49408, 256)},
         r"\[49408, 256\], not \[49408, 512\] as in the released models"),
        ({}, {"image_encoder.layers.0.blocks.0.attn.relative_position_bias_table":
              torch.zeros(23**2, 3)}, r"\[529, 3\], not \[169, 3\] as in the released models"),
        ({}, {"vision_projection": torch.zeros(768, 512)}, "image_projection twice"),
        ({"image_encoder.": "trunk."}, {},
         "not in the layout of microsoft/UniCL.*begin with image_projection.*trunk"),
        ({"text_projection": "proj"}, {}, "it lacks text_projection; its 339 entries begin with"),
    ],
    ids=["wider", "narrow text", "windows", "twice", "timm", "no projection"],
)  # fmt: skip
def test_entries_that_do_not_fit_are_refused_in_a_sentence(entries, renamed, changes, message):
    changed = {**entries, **changes}
    for old, new in renamed.items():
        changed = {name.replace(old, new): tensor for name, tensor in changed.items()}
    with pytest.raises(ValueError, match=message):
        preset_of(with_present_names(changed, source=FILE), source=FILE)


class Trap:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], argument: object = "sprung") -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(a=1), r"argparse\.Namespace"),
        (Trap(os.mkdir), r"posix\.mkdir"),  # of a module that torch knows as dangerous
        (Trap(eval, "open('sprung', 'w')"), r"(__builtin__\.|builtins\.)?eval"),
    ],
)
def test_a_file_with_code_is_refused_by_name_and_its_code_not_run(
    tmp_path, monkeypatch, value, name
):
    monkeypatch.chdir(tmp_path)  # where the traps leave something
    file = tmp_path / "in1k.pth"
    torch.save({"model": {"x": torch.ones(1)}, "config": value}, file)
    with pytest.raises(ValueError, match=rf"in1k.pth holds .* besides tensors \({name}\)"):
        read(file)
    file.write_bytes(pickle.dumps({"config": value}, protocol=4))
    with pytest.raises(ValueError, match=r"in1k.pth is a pickle of protocol 4 or 5, which"):
        read(file)
    file.write_bytes(pickle.dumps(value, protocol=2).replace(b"argparse", b"a\x1b[2J"))
    with pytest.raises(ValueError, match="besides tensors") as refusal:
        read(file)
    assert str(refusal.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["in1k.pth"]
    torch.save(value, file)
    torch.load(file, weights_only=False)
    is_trap = isinstance(value, Trap)
    assert len(list(tmp_path.iterdir())) == 1 + is_trap, "the trap works"


def test_files_that_are_no_checkpoints_are_told_apart(tmp_path):
    whole, file = tmp_path / "whole.pth", tmp_path / "in1k.pth"
    torch.save({"model": {"logit_scale": torch.ones([]), "x": torch.ones(100, 100)}}, whole)
    with pytest.raises(FileNotFoundError, match="is not there"):
        read(file)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)
    for contents, message in (
        (whole.read_bytes()[:-200], "cut short"),
        (b"<html>404 Not Found</html>", "no checkpoint that torch can read"),
        (b"", "no checkpoint that torch can read"),
    ):
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=message) as refusal:
            read(file)
        assert "Re-running" not in str(refusal.value)  # torch's advice would run the code
    for values, message in (
        (torch.ones(3, 4), r"one tensor of shape \[3, 4\]"),
        ({"model": {"epoch": 3, "x": torch.ones(1)}}, "holds no weights at epoch"),
        ({}, "holds nothing"),
        # of which a few bytes say that they are large
        ({"x": torch.ones(1, 1).expand(1000, 1000)}, "holds no weights at x"),
        ({"x": torch.ones(1), "y": torch.empty(10**6, device="meta")}, "holds no weights at y"),
        ({"x": torch.ones(9, 9).to_sparse()}, "holds no weights at x"),
    ):
        torch.save(values, file)
        with pytest.raises(ValueError, match=message):
            read(file)


def test_a_file_that_grows_when_it_is_read_is_refused_first(tmp_path, monkeypatch):
    plain, file = tmp_path / "plain.pth", tmp_path / "in1k.pth"
    torch.save({"x": torch.zeros(1000, 1000)}, plain)
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
        for info in whole.infolist():
            small.writestr(info.filename, whole.read(info))
    assert file.stat().st_size < 10_000
    assert torch.load(file)["x"].shape == (1000, 1000)
    monkeypatch.setattr("torch.load", pytest.fail)
    with pytest.raises(ValueError, match=r"in1k.pth is compressed, to \d,\d+ bytes of 4,00\d,"):
        read(file)


@pytest.mark.long
def test_swin_base_too(tmp_path):
    official = OfficialModel("swin-base", seed=3)
    model = loaded(official.entries, tmp_path)
    assert num_parameters(model) == 150_695_609
    assert_features_of(model, official)
