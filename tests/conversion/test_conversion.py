"""Converted models give equal features in other libraries, at any batch size."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from small_models import model_with_weights_that_matter, small_config
from source_runs import difference
from timm.data import create_transform, resolve_data_config

from unicl_fast import UniCL, build_model
from unicl_fast.checkpoints.load import find_weights
from unicl_fast.conversion import preprocessing
from unicl_fast.conversion.card import Facts
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.libraries import write_onnx, write_timm
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.conversion.output import new_folder, require_equal
from unicl_fast.evaluation.inference import Model
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools.convert import open_clip_view

TEXTS = ["a photo of a dog", "", "two people in the snow"]


@pytest.fixture(scope="module")
def model() -> UniCL:
    return model_with_weights_that_matter(small_config())


@torch.inference_mode()
def test_open_clip_gives_equal_features_and_the_same_preprocessing(model, tmp_path):
    folder = tmp_path / "out"
    assert write_open_clip(model, folder) < 1e-5
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert difference(model, theirs.eval()) < 1e-5
    torch.testing.assert_close(theirs.logit_scale, model.logit_scale)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(tokens, Tokenizer(30)(TEXTS))
    resize, crop, *_, normalise = prepare.transforms
    assert (resize.size, crop.size) == (160, (160, 160))
    assert resize.interpolation.value == "bicubic"
    assert normalise.mean == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("view", "mode"), [(160, "shortest"), ("longest", "longest"), ("squash", "squash")]
)
def test_views_that_open_clip_has_are_equal_in_its_preprocessing(model, monkeypatch, view, mode):
    """On bytes of the same images, up to the interpolation: Pillow's and ours."""
    for resize in (view, 200):
        config = model.config.changed(data={"evaluation_resize": resize})
        monkeypatch.setattr(model, "config", config)
        given = preprocessing.for_open_clip(config.data)
        assert given["resize_mode"] == (mode if resize == view else "shortest")
        prepare = image_transform_v2(PreprocessCfg(size=160, **given), is_train=False)
        levels = torch.tensor(given["std"])[:, None, None] * 255
        apart = []
        for image in open_clip_view._drawn():
            ours = torch.from_numpy(Model(model).prepare(image).copy()).permute(2, 0, 1)
            mean = torch.tensor(given["mean"])[:, None, None] * 255
            apart.append((prepare(image) * levels + mean - ours).abs().mean().item())
        cosine, images = open_clip_view.least_cosine(model)
        assert images == "16 drawn images"
        assert (max(apart) < 0.5 and cosine > 0.999) if resize == view else max(apart) > 3


def test_open_clip_cannot_build_an_encoder_at_another_size(tmp_path):
    model = build_model(small_config(image_size=96))
    with pytest.raises(ValueError, match="only for images of 160 pixels, but.*trained at 96"):
        write_open_clip(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("image_size", [160, 96])
@torch.inference_mode()
def test_timm_gives_equal_features_and_the_same_preprocessing(tmp_path, image_size):
    model = model_with_weights_that_matter(small_config(image_size=image_size))
    folder = tmp_path / "out"
    assert write_timm(model, folder) < 1e-5
    images = torch.randn(3, 3, image_size, image_size)
    expected = model.image_encoder(images)
    file = folder / "model.safetensors"
    size = {"img_size": image_size}
    by_name = timm.create_model("test_vit", num_classes=0, checkpoint_path=file, **size)
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for theirs in (by_name, by_folder):
        torch.testing.assert_close(theirs.eval()(images), expected, rtol=0, atol=1e-5)
    prepare = create_transform(**resolve_data_config({}, model=by_folder))
    resize, crop, *_, normalise = prepare.transforms
    assert resize.size == image_size + 37
    assert tuple(crop.size) == (image_size, image_size)
    assert resize.interpolation.value == "bicubic"
    torch.testing.assert_close(normalise.std, torch.tensor([0.3, 0.2, 0.25]))


def test_timm_rounds_the_crop_to_the_size_that_was_meant():
    """It scales to floor(size / crop_pct), which a quotient of floats can miss by one."""
    for size, resize in [(224, 256), (28, 32), (28, 28), (288, 299), (147, 299), (9, 1009)]:
        config = small_config().changed(data={"image_size": size, "evaluation_resize": resize})
        fraction = preprocessing.for_timm(config.data)["crop_pct"]
        assert math.floor(size / fraction) == resize
        assert 0 < fraction <= 1


def test_an_export_is_read_back_bit_for_bit_and_names_no_place_or_data_set(model, tmp_path):
    folder = tmp_path / "out"
    write_export(model, folder, facts=Facts(origin={"steps": 12}), license="mit")
    again = load_encoders(folder)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    said, expected = (
        preprocessing.in_words(one.config.data, one.config.model) for one in (again, model)
    )
    assert said == expected
    of_clip = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    names = {"config.json", "preprocessor_config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", *names, *of_clip}
    texts = {name: (folder / name).read_text() for name in {*names, "tokenizer_config.json"}}
    described = json.loads(texts["config.json"])["unicl_fast"]
    groups = {"model", "objective", "pixels", "precision", "facts", "checksums"}
    assert described.keys() == {"version", "format_version", *groups}
    assert not [name for name in described["model"] if name.startswith("init")]
    assert not any("secret" in text or "Infinity" in text for text in texts.values())
    assert "license: mit" in texts["README.md"]
    assert "- steps: 12" in texts["README.md"]


def test_an_export_that_is_not_what_was_written_is_refused(model, tmp_path):
    folder = tmp_path / "out"
    write_export(model, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    values, contents = config.read_text(), weights.read_bytes()
    weights.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged or was replaced"):
        load_encoders(folder)
    weights.write_bytes(contents)
    for old, new, message in (
        ('"unicl_fast": {', '"timm": {', "read by their own libraries"),
        ('"format_version": 2', '"format_version": 1', "format version 1"),
        ('"text_width": 32', '"text_width": 64', "not the model that its config describes"),
        ("{", "", "is not JSON"),
    ):
        assert old in values
        config.write_text(values.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            find_weights(folder)


def assert_onnx_gives_our_features(model: UniCL, folder: Path, *, counts: tuple[int, ...]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert write_onnx(model, folder) < 1e-4
    size = model.config.data.image_size
    images = torch.randn(max(counts), 3, size, size)
    tokens = Tokenizer(model.config.model.context_length)(TEXTS * 3)
    for name, inputs, encode in (
        ("image", images, model.encode_image),
        ("text", tokens, model.encode_text),
    ):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        for count in counts:
            (found,) = session.run(None, {session.get_inputs()[0].name: inputs[:count].numpy()})
            np.testing.assert_allclose(found, encode(inputs[:count]), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_onnx_files_accept_any_number_of_samples(model, tmp_path):
    assert_onnx_gives_our_features(model, tmp_path / "out", counts=(1, 5))
    said = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert said["image"]["resize_shorter_side_to"] == 197
    assert said["image"]["mean"] == [0.4, 0.5, 0.6]
    assert said["text"]["end_token"] == Tokenizer().end_id
    assert said["logit_scale"] == pytest.approx(model.logit_scale.item())


@pytest.mark.long
@torch.inference_mode()
def test_swin_goes_to_onnx(tmp_path):
    """Its windows are the part that can fix the number of samples by mistake."""
    config = build_preset("swin-tiny").changed(model={"text_layers": 1})
    model = model_with_weights_that_matter(config)
    assert_onnx_gives_our_features(model, tmp_path / "onnx", counts=(1, 3))


def test_without_onnxruntime_the_extra_is_named(model, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .*\[convert\]"):
        write_onnx(model, tmp_path / "out")


def test_features_that_differ_leave_nothing_behind(tmp_path):
    changed = model_with_weights_that_matter(small_config("unicl_convnet7_small", 32))
    changed.image_encoder.register_forward_hook(lambda module, inputs, features: features.flip(1))
    for write in (write_open_clip, write_timm):
        with pytest.raises(RuntimeError, match="differ from ours by"):
            write(changed, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    nothing = torch.full((2, 3), float("nan"))
    with pytest.raises(RuntimeError, match="differ from ours by nan"):
        require_equal(torch.ones(2, 3), nothing, name="image features")


def test_nothing_is_written_over_and_nothing_half(tmp_path):
    out = tmp_path / "out"

    def fail() -> None:
        with new_folder(out) as aside:
            (aside / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(tmp_path.iterdir())
    out.mkdir()  # empty: it may be one's own
    with new_folder(out) as aside:
        (aside / "file").write_text("x")
    with pytest.raises(ValueError, match="is there already"), new_folder(out):
        pass
    assert (out / "file").read_text() == "x"
