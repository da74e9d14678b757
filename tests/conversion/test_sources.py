"""Models of other libraries by one name: loaded, trained and exported without more settings."""

import copy
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import peft
import pytest
import timm
import torch
import transformers
from damage import flip_a_byte
from file_tokenizers import write_tokenizer
from hub_server import ask_hub_at, hub_of
from open_clip_folders import SMALL_MODELS, different_images, draw_open_clip, write_folder
from PIL import Image
from program_runs import call, refusal_of
from safetensors.torch import load_file, save_file
from small_runs import real_images
from source_runs import config_by_name, difference, pixels_of, started, train_one_step
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from unicl_fast import UniCL, build_model
from unicl_fast import load_model as load_for_use
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config_json import config_to_dict
from unicl_fast.conversion.adapter_folders import with_adapters, write_adapter
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.hugging_face import write_tokenizer as write_clip_tokenizer
from unicl_fast.conversion.initial import load_adapted, load_encoders
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.conversion.sources import find_own, find_source, weights_checksum
from unicl_fast.dataset.arrays import npy_header
from unicl_fast.dataset.other_tokens import take_tokens
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.models import vits
from unicl_fast.models.freezing import freeze
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, format_checksums
from unicl_fast.text.file_tokenizer import CANONICAL, FileTokenizer
from unicl_fast.tools import pretrain
from unicl_fast.tools.convert import __main__ as convert
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.tools.pack import __main__ as pack
from unicl_fast.tools.pretrain import parse_arguments, split_config

_TEXT: dict[str, Any] = {
    **{"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "eos_token_id": 49407, "bos_token_id": 49406},
}
_IMAGE: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 70, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
}
_GELU = {"hidden_act": "gelu"}


def _clip(text: dict[str, Any], image: dict[str, Any]) -> torch.nn.Module:
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=24)
    return transformers.CLIPModel(config)


def _siglip(text: dict[str, Any], image: dict[str, Any]) -> torch.nn.Module:
    config = transformers.SiglipConfig(text_config=text, vision_config=image)
    return transformers.SiglipModel(config)


def _dual(image: transformers.PretrainedConfig, given: dict[str, Any] = _TEXT) -> torch.nn.Module:
    text = transformers.CLIPTextConfig(**given)
    kind = transformers.VisionTextDualEncoderConfig
    config = kind.from_vision_text_configs(image, text, projection_dim=24)
    return transformers.VisionTextDualEncoderModel(config)


def _of_timm(name: str = "test_vit", *, width: int = 64) -> transformers.PretrainedConfig:
    kind = transformers.TimmWrapperConfig
    return kind(architecture=name, hidden_size=width, num_classes=0, label_names=[])


_OF_SIGLIP = _TEXT | {"hidden_size": 32, "vocab_size": 300, "max_position_embeddings": 16}
_OF_SIGLIP |= {"eos_token_id": 1, "bos_token_id": 2}
_VIT = "unicl_vit_{}_patch8_w32_d2_h2_m70_{}_32"
SMALL: dict[str, tuple[Callable[[], torch.nn.Module], str, str]] = {
    "CLIP": (lambda: _clip(_TEXT, _IMAGE), _VIT.format("clip", "quick_gelu"), "clip"),
    "CLIP of LAION": (
        lambda: _clip(_TEXT | _GELU | {"eos_token_id": 2}, _IMAGE | _GELU),
        *(_VIT.format("clip", "gelu"), "clip"),
    ),
    "SigLIP": (
        lambda: _siglip(_OF_SIGLIP, _IMAGE),
        *(_VIT.format("siglip", "gelu_tanh"), "siglip"),
    ),
    "dual of CLIP": (
        lambda: _dual(transformers.CLIPVisionConfig(**_IMAGE)),
        *(_VIT.format("clip", "quick_gelu"), "clip"),
    ),
    "dual of timm": (lambda: _dual(_of_timm()), "test_vit", "vision-text-dual-encoder"),
}
"""A model of transformers, its image encoder here, and the layout of its export."""
REAL: dict[str, Callable[[], torch.nn.Module]] = {
    "clip-vit-base-patch32": lambda: _clip({}, {}),
    "CLIP-ViT-B-16-laion2B": lambda: _clip(_GELU, _GELU | {"patch_size": 16}),
    "siglip-base-patch16-224": lambda: _siglip({}, {}),
    "siglip2-base-patch16-256": lambda: _siglip({"vocab_size": 256_000}, {"image_size": 256}),
    "dual of ResNet-50": lambda: _dual(_of_timm("resnet50", width=2048), {}),
}


@torch.no_grad()
def write_transformers(make: Callable[[], torch.nn.Module], folder: Path) -> torch.nn.Module:
    """A model as transformers builds and draws it, whose biases and scales matter, in a folder."""
    torch.manual_seed(3)
    model = make().eval()
    for tensor in model.parameters():
        if tensor.ndim and tensor.numel() == max(tensor.shape):
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape)).add_(0.05 * torch.rand(tensor.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", SMALL)
def test_a_model_of_transformers_is_loaded_trained_and_exported(kind, shared_data, tmp_path):
    make, image_encoder, layout = SMALL[kind]
    theirs = write_transformers(make, tmp_path / "theirs")
    ours = load_encoders(tmp_path / "theirs")
    assert ours.config.model.image_encoder == image_encoder
    assert difference(ours, theirs) < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale.reshape([]))

    write_export(ours, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == layout
    back = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    assert type(back).__name__ in (type(theirs).__name__, "CLIPModel")
    assert difference(ours, back.eval()) < 1e-5
    with torch.no_grad():  # as a library that trains it further leaves it
        torch._foreach_mul_(list(back.parameters()), 1.01)
        back.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").unlink()  # which a model does not save
    again = load_encoders(tmp_path / "hf")
    assert difference(again, back) < 1e-5
    assert pixels_of(again.config) == pixels_of(ours.config)
    shutil.rmtree(tmp_path / "hf")
    write_export(ours, tmp_path / "hf")
    write_open_clip(ours, tmp_path / "open_clip")
    for folder in ("hf", "open_clip"):
        again = load_encoders(tmp_path / folder)
        place = {"tokenizer": ours.config.model.tokenizer}  # is in the folder now
        assert again.config.changed(model=place).model == ours.config.model
        assert all(torch.equal(tensor, again.state_dict()[name])
                   for name, tensor in ours.state_dict().items())  # fmt: skip

    config = config_by_name(tmp_path / "theirs", "--model.drop-path", "0")
    assert config.model == ours.config.changed(model={"init": str(tmp_path / "theirs")}).model
    assert pixels_of(config) == pixels_of(ours.config)
    train_one_step(config, real_images(shared_data, 3), tmp_path / "run")


@pytest.mark.parametrize("make", [_clip, _siglip])
def test_a_model_may_leave_out_pixels_beyond_its_last_patch(make, tmp_path):
    """As siglip-so400m-patch14-384 does, of which 6 pixels a side are beyond 27 patches."""
    text = _TEXT | {"hidden_size": _IMAGE["hidden_size"]}
    theirs = write_transformers(lambda: make(text, _IMAGE | {"image_size": 37}), tmp_path / "it")
    ours = load_encoders(tmp_path / "it")
    assert ours.config.data.image_size == 37
    assert difference(ours, theirs) < 1e-5
    write_export(ours, tmp_path / "hf")
    assert difference(load_encoders(tmp_path / "hf"), theirs) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_a_model_of_transformers_in_its_real_size(name, shared_data, tmp_path):
    theirs = write_transformers(REAL[name], tmp_path / "theirs")
    ours = load_encoders(tmp_path / "theirs")
    assert difference(ours, theirs) < 1e-5
    del theirs
    write_export(ours, tmp_path / "hf")
    back = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert difference(ours, back) < 1e-5
    del ours, back
    config = config_by_name(tmp_path / "theirs")
    train_one_step(config, real_images(shared_data, 3), tmp_path / "run")


@pytest.fixture(scope="module")
def like_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_cfg = SMALL_MODELS["gelu"]
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    return write_folder(draw_open_clip(model_cfg), model_cfg, folder)


def test_a_file_of_settings_may_name_the_source_and_a_preset_s_own_makes_room(like_clip, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"preset: photos-small\nmodel: {{init: '{like_clip}'}}\n")
    config = split_config(parse_arguments(["--config", str(file), "--out", "out"]))
    assert config.model.init == str(like_clip)
    assert (config.model.init_image, config.model.image_encoder) == ("", "test_vit")
    given = ["--preset", "photos-small", "--init-text", str(like_clip), "--out", "out"]
    config = split_config(parse_arguments(given))
    assert config.model.init_image == "pypi:efficientnet-lite0"
    assert config.model.image_encoder == "tf_efficientnet_lite0"
    assert (config.model.text_width, config.model.context_length) == (32, 30)
    assert config.model.embed_dim != 24


def test_a_run_that_resumes_does_not_need_its_source_again(like_clip, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    source.symlink_to(like_clip)
    given = ["--preset", "vit-base", "--init", str(source), "--resume", "auto", "--out", str(out)]
    config = split_config(parse_arguments(given))
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config_to_dict(config)))
    source.unlink()
    assert split_config(parse_arguments(given)) == config
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        parse_arguments([*given[:4], "--out", str(out)])


def test_a_name_of_open_clip_s_without_a_tag_has_fresh_weights(monkeypatch):
    model_cfg = SMALL_MODELS["quickgelu"]
    monkeypatch.setattr("open_clip.get_model_config", lambda name: copy.deepcopy(model_cfg))
    model = load_encoders("open-clip:small")
    assert model.config.model.text_activation == "quick_gelu"
    assert model.config.model.embed_dim == 24
    assert weights_checksum("open-clip:small") == ""
    config = config_by_name("open-clip:small", "--model.drop-path", "0")
    fresh = build_model(config).state_dict()
    assert all(torch.equal(one, fresh[name]) for name, one in started(config).state_dict().items())


def _timm_folder(
    folder: Path, architecture: str, tensors: dict[str, torch.Tensor], size: int = 32, **more: Any
) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    described = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, size, size]}}
    (folder / "config.json").write_text(json.dumps(described | more))
    return folder


@torch.inference_mode()
def _assert_timm_s_features(model: UniCL, theirs: torch.nn.Module, size: int) -> None:
    expected = F.normalize(theirs(different_images(size)), dim=-1)
    torch.testing.assert_close(model.encode_image(different_images(size)), expected)


def test_an_image_encoder_by_itself_gives_timm_s_features(tmp_path):
    torch.manual_seed(2)
    theirs = timm.create_model("test_vit", num_classes=10).eval()
    folder = _timm_folder(tmp_path / "vit", "test_vit", theirs.state_dict(), size=160)
    model = load_encoders(folder)
    assert model.text_encoder is None
    theirs.reset_classifier(0)
    _assert_timm_s_features(model, theirs, 160)
    with pytest.raises(ValueError, match=r"does not name its timm model"):
        load_encoders(f"timm-file:{folder / 'model.safetensors'}")


def test_what_a_config_leaves_out_is_its_library_s_default(tmp_path, monkeypatch):
    described = {"model_cfg": SMALL_MODELS["gelu"], "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    assert find_source(str(tmp_path)).data["interpolation"] == "bicubic"
    found = find_source(str(_timm_folder(tmp_path / "vit", "test_vit", {}))).data
    assert (found["interpolation"], found["evaluation_resize"]) == ("bicubic", 36)  # 32 / 0.875
    assert found["std"] == timm.data.IMAGENET_DEFAULT_STD
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        find_source(str(tmp_path / "bert"), image=False)


def test_arguments_of_a_model_of_timm_are_used_or_refused(tmp_path):
    theirs = timm.create_model("test_vit", num_classes=0, img_size=96).eval()
    values: dict[str, Any] = {"model_args": {"img_size": 96}}
    model = load_encoders(_timm_folder(tmp_path / "vit", "test_vit", theirs.state_dict(), **values))
    _assert_timm_s_features(model, theirs, 96)
    tensors = timm.create_model("test_resnet", num_classes=0).state_dict()
    values = {"model_args": {"global_pool": "max"}}
    folder = _timm_folder(tmp_path / "resnet", "test_resnet", tensors, **values)
    with pytest.raises(ValueError, match="resnet.*no encoder with model_args global_pool='max'"):
        load_encoders(folder)


@pytest.mark.parametrize("architecture", ["no_such", "hf-hub:them/it", "local-dir:/", "x.y"])
def test_a_folder_of_an_architecture_that_timm_lacks_is_refused_here(
    architecture, tmp_path, monkeypatch
):
    monkeypatch.setattr("timm.create_model", pytest.fail)
    folder = _timm_folder(tmp_path / "theirs", architecture, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=f"theirs.*timm knows no model '{architecture}'"):
        load_encoders(folder)


def test_the_image_encoder_of_a_clip_of_own_size_is_read_by_its_name(tmp_path):
    name = "unicl_vit_clip_patch16_w32_d1_h2_m65_gelu_32"  # which nothing has registered yet
    vit = vits.ViT("clip", 16, 32, 1, 2, 65, "gelu", 32)
    theirs = VisionTransformer(img_size=32, num_classes=0, **vit.arguments)
    model = load_encoders(_timm_folder(tmp_path / "theirs", name, theirs.state_dict()))
    assert model.config.model.image_encoder == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip2"}, "no model of model_type 'siglip2': known are clip, siglip"),
        ({"text_config": {"hidden_size": 65_536}}, "of .* numbers, and .* copy or convert it"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config hidden_act='relu'"),
        ({"text_config": {"hidden_size": "wide"}}, "not a model that the library of its layout"),
        ({"text_config": {"eos_token_id": 7}}, "text_config eos_token_id=7, vocab_size=49408"),
        ({"vision_config": {"layer_norm_eps": 0.1}}, "vision_config layer_norm_eps=0.1"),
        ({"model_type": ["bert"]}, "no model of model_type|not a model that the library"),
        ({"vision_config": 5}, "not a model that the library of its layout"),
        ({"vision_config": {"num_hidden_layers": 10**6}}, "no ViT has .*depth=1000000"),
        ({"vision_config": {"num_attention_heads": 0}}, "no ViT has .*heads=0"),
        ({"vision_config": {"patch_size": 0}}, "no ViT has .*patch_size=0"),
        ({"vision_config": {"patch_size": [8, 8]}}, r"no ViT has .*patch_size=\[8, 8\]"),
        ({"vision_config": {"image_size": [32, 64]}}, "ours needs square images, not .*32, 64"),
    ],
    ids=str,
)
def test_a_config_that_ours_cannot_be_is_refused_before_memory_is_allocated(
    change, message, tmp_path
):
    write_transformers(SMALL["CLIP"][0], tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    # code of a repository is never run
    values["auto_map"] = {"AutoModel": "modeling_theirs.Model"}
    (tmp_path / "modeling_theirs.py").write_text("raise SystemExit('run')")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        load_encoders(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_hold_code_are_refused_and_tensors_are_read(tmp_path):
    theirs = write_transformers(SMALL["CLIP"][0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert difference(load_encoders(tmp_path), theirs) < 1e-5
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds Python objects besides tensors"):
        load_encoders(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    bytes_ = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(bytes_, tmp_path / "model.safetensors")
    assert 0 < difference(load_encoders(tmp_path), theirs) < 0.2
    too_large = {name: tensor.double() for name, tensor in tensors.items()}
    too_large["text_model.final_layer_norm.bias"][0] = 1e300
    save_file(too_large, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not finite numbers: ln_final.bias"):
        load_encoders(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: expected one of model.safet"):
        load_encoders(tmp_path)


def _in_shards(folder: Path) -> torch.nn.Module:
    """A small CLIP whose attention's parts lie in different files."""
    theirs = write_transformers(SMALL["CLIP"][0], folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="30KB")
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 3
    return theirs


def test_weights_in_several_files_are_read_through_their_index(tmp_path, monkeypatch):
    theirs = _in_shards(tmp_path)
    assert difference(load_encoders(tmp_path), theirs) < 1e-5
    assert config_by_name(tmp_path).model.embed_dim == 24
    before = weights_checksum(tmp_path)
    flip_a_byte(sorted(tmp_path.glob("model-*-of-*.safetensors"))[-1])
    assert weights_checksum(tmp_path) != before
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["hidden_size"] = 65_536
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("unicl_fast.conversion.sharded_files.read_stored", pytest.fail)
    with pytest.raises(ValueError, match="index.json has .*copy or convert it again"):
        load_encoders(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../model-00001.safetensors"}, r"is in '\.\./model.*expected the name of"),
        ({"file": "/etc/passwd"}, "expected the name of a file beside it"),
        ({"file": 5}, "expected the name of a file beside it"),
        ({"file": "model-00077-of-00078.safetensors"}, "names model-00077-of.*is not there"),
        ({"tensor": "nothing.weight"}, "do not agree on nothing.weight"),
        ({"weight_map": []}, "has no weight_map"),
        ({"moved": True}, "do not agree on"),
        ({"twice": True}, "do not agree on logit_scale"),
    ],
    ids=str,
)
def test_an_index_that_is_wrong_is_refused_before_weights_are_read(
    change, message, tmp_path, monkeypatch
):
    _in_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    listed = values["weight_map"]
    first, *_, last = listed
    listed[first] = change.get("file", listed[last] if "moved" in change else listed[first])
    if "tensor" in change:
        listed[change["tensor"]] = listed[first]
    if "twice" in change:
        other = next(name for name in listed.values() if name != listed["logit_scale"])
        tensors = load_file(tmp_path / other) | {"logit_scale": torch.zeros(())}
        save_file(tensors, tmp_path / other)
    index.write_text(json.dumps({**values, "weight_map": change.get("weight_map", listed)}))
    monkeypatch.setattr("unicl_fast.conversion.sharded_files.read_stored", pytest.fail)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_encoders(tmp_path)
    assert "\n" not in str(error.value)


def test_a_repository_of_transformers_in_several_files(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "them" / "clip"
    theirs = _in_shards(folder)
    with hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "cache"):
        assert difference(load_encoders("hf-hub:them/clip"), theirs) < 1e-5
    lost = sorted(folder.glob("model-*-of-*.safetensors"))[-1]
    lost.unlink()
    with (
        hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "cache2"),
        pytest.raises(FileNotFoundError, match=f"names {lost.name}, which is not there"),
    ):
        load_encoders("hf-hub:them/clip")


def test_a_repository_of_transformers_is_downloaded_once(tmp_path, monkeypatch, caplog):
    theirs = write_transformers(SMALL["SigLIP"][0], tmp_path / "hub" / "them" / "siglip")
    images = {"image_mean": [0.1, 0.2, 0.3], "resample": 2, "size": {"height": 32, "width": 32}}
    preprocessor = tmp_path / "hub" / "them" / "siglip" / "preprocessor_config.json"
    preprocessor.write_text(json.dumps(images))
    with hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "cache") as hub:
        config = config_by_name("hf-hub:them/siglip")
        ours = load_encoders("hf-hub:them/siglip")
        write_export(ours, tmp_path / "us")
    assert difference(ours, theirs) < 1e-5
    assert pixels_of(config) == pixels_of(ours.config)
    data = ours.config.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (data.interpolation, data.evaluation_resize) == ("bilinear", "squash")
    downloads = [path for method, path in hub.requests if method == "GET" and "resolve" in path]
    assert len(downloads) == len(set(downloads)) == 3
    # transformers 5 nests it; 4 can write both, and then only the old one has these settings
    processor = preprocessor.with_name("processor_config.json")
    for nested in ({"image_processor": images | {"image_mean": [0.3] * 3}}, {}):
        processor.write_text(json.dumps({"processor_class": "SiglipProcessor"} | nested))
        found = find_source(str(preprocessor.parent)).data
        assert found["mean"] == (*nested.get("image_processor", images)["image_mean"],)
        assert found["std"] == (0.5, 0.5, 0.5)
    processor.unlink()
    # without a network, files that were not downloaded are unknown
    preprocessor.unlink()
    with hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "without"):
        default = find_source("hf-hub:them/siglip").data
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its six trials
    for cache, expected in (("cache", data.mean), ("without", default["mean"])):
        ask_hub_at("http://127.0.0.1:9", monkeypatch, cache=tmp_path / cache)
        assert find_source("hf-hub:them/siglip").data["mean"] == expected
        assert "reached" not in caplog.text
    (lost,) = (tmp_path / "cache").glob("*/snapshots/*/preprocessor_config.json")
    lost.unlink()
    ask_hub_at("http://127.0.0.1:9", monkeypatch, cache=tmp_path / "cache")
    assert find_source("hf-hub:them/siglip").data == default
    assert "has none of processor_config.json, preprocessor_config.json" in caplog.text
    assert "using the defaults of models without that file" in caplog.text
    assert find_own("hf-hub:them/siglip") is None
    write_tokenizer(tmp_path / "us")
    (tmp_path / "hub" / "us").mkdir()
    (tmp_path / "us").rename(tmp_path / "hub" / "us" / "siglip")
    with hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "cache"):
        exported = load_for_use("hf-hub:us/siglip", device="cpu")
    assert exported.embed_texts(["a dog"]).shape == (1, 32)
    assert find_source(str(preprocessor.parent)).file == preprocessor.with_name("model.safetensors")


@pytest.mark.dali
def test_the_programs_accept_a_model_of_another_library(like_clip, data, tmp_path, capsys):
    result, out = tmp_path / "result.json", tmp_path / "run"
    on_labels = ("--data", data / "labels", "--device", "cpu", "--json", result)
    call(evaluate, "zero-shot", "--checkpoint", like_clip, "--templates", "simple", *on_labels)
    found = json.loads(result.read_text())
    assert found["num_samples"] == 21
    assert found["weights_xxh3"] == file_checksum(like_clip / "open_clip_model.safetensors")

    call(convert, "hf", like_clip, tmp_path / "export", "--evaluations", result)
    said = capsys.readouterr().out
    assert f"read {like_clip}: test_vit" in said
    assert "figures of evaluations on the card: 1" in said
    assert "a model in a file" in (tmp_path / "export" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "export" / "config.json").read_text()

    few = ("--run.global-batch-size", "4", "--run.steps", "1", "--run.device", "cpu")
    call(pretrain, "--init", like_clip, "--data.train", data / "captions", "--out", out, *few)
    loaded, trained = load_encoders(like_clip), load_encoders(out)
    assert trained.config.model.text_width == 32
    assert trained.config.data.mean == (0.4, 0.5, 0.6)
    before, after = loaded.text_projection, trained.text_projection
    assert 0 < (after - before).abs().max() < 1e-2


@pytest.mark.dali
@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_an_evaluation_before_training_equals_that_of_transformers(kind, shared_data, tmp_path):
    folder, result, photos = tmp_path / "theirs", tmp_path / "result.json", []
    theirs = write_transformers(SMALL[kind][0], folder)
    sizes: dict[str, Any] = {"size": {"height": 32, "width": 32}}
    if kind == "CLIP":
        sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
        write_clip_tokenizer(folder, context_length=77)
    else:
        write_tokenizer(folder)
    views = transformers.CLIPImageProcessor if kind == "CLIP" else transformers.SiglipImageProcessor
    views(**sizes, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    rows = (shared_data / "captions" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    for row in map(json.loads, rows[:20]):
        resized = 36 * max(row["width"], row["height"]) // min(row["width"], row["height"])
        if (resized - 32) % 4 != 3:  # docs/checkpoints.md: theirs cuts one pixel further up or left
            photos.append(row)
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, photos)))
    root = shared_data / "captions" / "flickr8k"
    call(pack, "build", tmp_path / "list.jsonl", "--image-root", root, "--out", tmp_path / "packed")
    given = ("--data", tmp_path / "packed", "--device", "cpu", "--json", result)
    call(evaluate, "retrieval", "--checkpoint", folder, *given)

    prepare = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenize = transformers.AutoTokenizer.from_pretrained(folder)
    images = [Image.open(root / row["image"]) for row in photos]
    texts = [text for row in photos for text in row["captions"]]
    plain = texts if kind == "CLIP" else [" ".join(re.findall(r"\w+", t.lower())) for t in texts]
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    with torch.inference_mode():
        pixels = prepare(images, return_tensors="pt").pixel_values
        expected = theirs(input_ids=tokenize(plain, **padded).input_ids, pixel_values=pixels)
    found = load_for_use(folder, device="cpu")
    assert abs(found.embed_images(images) - expected.image_embeds.numpy()).max() < 1e-3
    assert abs(found.embed_texts(texts) - expected.text_embeds.numpy()).max() < 1e-5
    owners = torch.arange(len(photos)).repeat_interleave(5)[:, None]
    ranked = expected.logits_per_text.argsort(1, descending=True) == owners
    for k in (1, 5, 10):
        rate = ranked[:, :k].any(1).double().mean().item()
        assert json.loads(result.read_text())[f"text_to_image_recall_at_{k}"] == pytest.approx(rate)


@pytest.mark.dali
def test_a_model_without_its_tokenizer_is_refused_texts(data, tmp_path):
    like_siglip = tmp_path / "siglip"
    write_transformers(SMALL["SigLIP"][0], like_siglip)
    train = ("--data.train", data / "captions", "--out", tmp_path / "x")
    for program, *given in (
        (evaluate, "zero-shot", "--checkpoint", like_siglip, "--data", data / "labels"),
        (pretrain, "--init", like_siglip, *train),
    ):
        assert "tokenizer.json is not there: the tokenizer of this" in refusal_of(program, *given)


@pytest.mark.dali
@pytest.mark.parametrize(
    "unused", [0, pytest.param(70_000, marks=pytest.mark.long, id="beyond 65,536 tokens")]
)
def test_a_tokenizer_goes_through_training_evaluation_and_export(
    unused, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    like_siglip, text = tmp_path / "siglip", _OF_SIGLIP | {"vocab_size": 300 + unused}
    write_transformers(lambda: _siglip(text, _IMAGE), like_siglip)
    write_tokenizer(like_siglip, unused=unused)
    captions, out = data / "captions", tmp_path / "run"
    few = ("--run.global-batch-size", "4", "--run.steps", "1", "--run.device", "cpu")
    few += ("--objective.name", "sigmoid", "--efficiency.precision", "fp32")
    both = ("--data.train", captions, data / "labels")
    call(pretrain, "--init", like_siglip, *both, "--out", out, *few)
    (made,) = (tmp_path / "cache" / "unicl_fast" / "tokens").iterdir()
    tokenizer = FileTokenizer(f"{like_siglip}{CANONICAL}", 16)
    stored = read_state(find_checkpoint(out)).data["vocabulary_hash"]
    assert stored[0] == tokenizer.vocabulary_hash
    with PackedDataset(captions) as dataset:
        reader = SampleReader(dataset)
        texts = [one for number in range(len(dataset))
                 for one in reader.read_description(number).captions]  # fmt: skip
        take_tokens(dataset, tokenizer, cache=made.parent)
        again = pickle.loads(pickle.dumps(dataset))  # as a worker gets it
        for one in (dataset, again):
            rows = [one.caption_tokens(sample, which) for sample in range(len(one))
                    for which in range(int(one.samples["captions_count"][sample]))]  # fmt: skip
            assert np.array_equal(np.stack(rows), np.stack(tokenizer.encode(texts)))
            assert one.vocabulary_hash == tokenizer.vocabulary_hash

    call(evaluate, "zero-shot", "--checkpoint", out, "--data", data / "labels", "--device", "cpu")

    # a damaged file is made anew
    before = (made / "tokens.npy").read_bytes()
    (made / "tokens.npy").write_bytes(before[:-1] + b"!")
    result = tmp_path / "result.json"
    given = ("--data", captions, "--device", "cpu", "--json", result)
    call(evaluate, "retrieval", "--checkpoint", out, *given)
    assert (made / "tokens.npy").read_bytes() == before
    assert json.loads(result.read_text())["num_images"] == 20

    call(convert, "open-clip", out, tmp_path / "open_clip")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(texts)
    assert theirs.equal(tokenizer(texts))
    assert load_for_use(tmp_path / "open_clip", device="cpu").embed_texts(texts).shape[0] == 100
    call(convert, "hf", out, tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    assert str(tmp_path) not in (tmp_path / "export" / "config.json").read_text()
    moved = (tmp_path / "export").rename(tmp_path / "moved")
    shutil.rmtree(like_siglip)
    ours = load_for_use(moved, device="cpu")
    theirs = transformers.AutoModel.from_pretrained(moved).eval()
    padded = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    tokens = transformers.AutoTokenizer.from_pretrained(moved)(["a photo of a dog"], **padded)
    with torch.inference_mode():  # as SigLIP's processor, without a mask of padding
        expected = theirs.get_text_features(input_ids=tokens.input_ids).pooler_output
    found = torch.from_numpy(ours.embed_texts(["A photo of a DOG!"]))
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["start", "length", "token", "fewer"])
def test_token_rows_that_others_made_up_are_made_anew(fault, data, tmp_path):
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path / "tokenizer")), 16)

    def rows() -> list[list[int]]:
        with PackedDataset(data / "captions") as dataset:
            take_tokens(dataset, tokenizer, cache=tmp_path / "cache")
            return [dataset.caption_tokens(sample, 0).tolist() for sample in range(len(dataset))]

    expected = rows()
    (folder,) = (tmp_path / "cache").iterdir()
    captions, tokens = (np.load(folder / f"{name}.npy") for name in ("captions", "tokens"))
    if fault == "start":
        captions["tokens_start"][0] = 2**60
    elif fault == "length":
        captions["tokens_length"][:2] = 17, captions["tokens_length"][:2].sum() - 17
        captions["tokens_start"][1] = 17
    elif fault == "token":
        tokens[3] = tokenizer.vocab_size
    else:
        captions, tokens = captions[:1], tokens[: captions["tokens_length"][0]]
    for name, array in (("captions", captions), ("tokens", tokens)):
        with (folder / f"{name}.npy").open("wb") as file:
            file.write(npy_header(array.dtype, array.shape))
            file.write(array.tobytes())
    names = "captions.npy", "tokens.npy"
    sums = [(name, file_checksum(folder / name)) for name in names]
    (folder / CHECKSUMS_NAME).write_text(format_checksums(sums))
    assert rows() == expected


def adapted(base: Path, *options: str) -> UniCL:
    """A run's model whose adapters and projections matter."""
    model = started(config_by_name(base, *options))
    freeze(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [one for one in model.parameters() if one.requires_grad]:
            parameter += torch.randn(parameter.shape, generator=generator) / 10
    return model


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("CLIP", "image:4,text:2"),
        pytest.param("CLIP", "image:4@last1,text:4", marks=pytest.mark.slow),
        pytest.param("SigLIP", "image:2,text:4", marks=pytest.mark.slow),
        pytest.param("dual of timm", "image:3,text:2", marks=pytest.mark.slow),
    ],
)
def test_adapters_become_a_folder_of_pefts_and_come_back(kind, lora, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_transformers(SMALL[kind][0], base)
    objective = "sigmoid" if kind == "SigLIP" else "unicl"
    ours = adapted(base, "--optim.lora", lora, "--objective.name", objective)
    assert write_adapter(ours, folder, base=str(base)) < 1e-5
    plain = transformers.AutoModel.from_pretrained(base).eval()
    assert difference(ours, plain) > 1e-2
    assert difference(load_encoders(base), plain) < 1e-5
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    assert difference(ours, theirs) < 1e-5
    scale = theirs.base_model.model.logit_scale
    assert torch.equal(scale.reshape([]), ours.logit_scale)
    back = load_encoders(folder)
    assert difference(back, theirs) < 1e-5
    assert torch.equal(back.logit_scale, ours.logit_scale)
    own = file_checksum(folder / "adapter_model.safetensors")
    assert weights_checksum(folder) == f"{own} on {weights_checksum(base)}"


def test_what_is_no_adapter_of_such_a_model_is_refused_in_a_sentence(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_transformers(SMALL["CLIP"][0], base)
    with pytest.raises(ValueError, match="the text encoder was trained whole"):
        write_adapter(adapted(base, "--optim.lora", "image:2"), folder, base=str(base))
    other = tmp_path / "other"
    write_transformers(SMALL["CLIP of LAION"][0], other)
    half = adapted(base, "--optim.lora", "image:2", "--optim.freeze", "text")
    with pytest.raises(RuntimeError, match="features of the converted model differ"):
        write_adapter(half, folder, base=str(other))
    with pytest.raises(ValueError, match="has no adapters: it is not a run with optim.lora"):
        load_adapted(base)
    assert not folder.exists()
    peft.LoraConfig(target_modules=["fc1"]).save_pretrained(str(folder))
    save_file({"base_model.model.no.lora_A.weight": torch.ones(1, 1)},
              folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"^\S*config.json names no model: set base_model"):
        load_encoders(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "adapters with peft_type IA3 are not read"),
        ({"alpha_pattern": {"fc1": 2}}, "peft_type LORA alpha_pattern are not read"),
        # those that change the base when they are loaded, or do more than adding to a layer
        ({"init_lora_weights": "pissa_niter_4"}, "LORA init_lora_weights=pissa_niter_4 are not"),
        ({"alora_invocation_tokens": [5]}, "peft_type LORA alora_invocation_tokens are not read"),
        ({"of_the_future": 1}, "peft_type LORA of_the_future are not read"),
        ({"peft_type": None}, "adapters with peft_type None are not read"),
        ({"base_model_name_or_path": str(folder)}, "adapter is for another folder of adapters"),
        ({}, "is not a model that the library of its layout could have written"),
    ):
        text = json.dumps(config | {"base_model_name_or_path": str(base)} | change)
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_encoders(folder)


@pytest.mark.parametrize(
    ("b", "a", "magnitude", "change", "message"),
    [
        # 640 kB that asked for 25.6 GB; the others were broadcast, or scaled by another rank
        ((80_000, 1), (1, 80_000), (64,), {}, r"A, B .* shapes \[\[1, 80000\], \[80000, 1\]"),
        ((1, 1), (1, 64), (64,), {}, r"a layer of \[64, 64\] needs \[\[1, 64\], \[64, 1\]"),
        ((64, 2), (1, 64), (64,), {}, "the adapter of fc has A, B"),
        ((64, 2), (2, 64), (64,), {}, r"has rank \[1\]"),
        ((64, 1), (1, 64), (1,), {}, r"\[1\]\]; a layer"),
        ((64, 1), (1, 64), (64,), {"lora_alpha": "8"}, "must have positive numbers in .*'8'"),
        ((64, 1), (1, 64), (64,), {"r": 0}, "must have positive numbers"),
        ((64, 1), (1, 64), (64,), {"rank_pattern": ["x"]}, "must have positive numbers"),
        ((64, 1), (1, 64), (64,), {}, ""),
        ((64, 2), (2, 64), (64,), {"rank_pattern": {"fc": 2}}, ""),
    ],
)
def test_an_adapter_of_other_shapes_than_its_layer_is_refused_before_any_product(
    b, a, magnitude, change, message, tmp_path
):
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 8, "use_dora": True} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    names = "lora_B.weight", "lora_A.weight", "lora_magnitude_vector"
    adapters = {
        f"base_model.model.fc.{name}": torch.ones(shape)
        for name, shape in zip(names, (b, a, magnitude), strict=True)
    }
    weights = {"fc.weight": torch.eye(64)}
    if message:
        with pytest.raises(ValueError, match=message):
            with_adapters(weights, adapters, tmp_path)
    else:
        assert with_adapters(weights, adapters, tmp_path)["fc.weight"].shape == (64, 64)


@pytest.mark.slow
@pytest.mark.dali
def test_the_adapters_of_a_run_are_converted_and_trained_further(data, tmp_path, capsys):
    base, run, folder = tmp_path / "base", tmp_path / "run", tmp_path / "adapter"
    write_transformers(SMALL["CLIP"][0], base)
    few = ("--run.global-batch-size", "4", "--run.steps", "2", "--run.device", "cpu")
    few += ("--optim.lr", "1e-1", "--data.train", data / "captions")
    call(pretrain, "--init", base, "--out", run, *few, "--optim.lora", "image:2,text:4")
    call(convert, "peft", run, folder)
    assert "differ from ours by at most" in capsys.readouterr().out
    plain = transformers.AutoModel.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    assert 0 < difference(load_encoders(run), theirs) < 1e-5
    assert difference(load_encoders(base), theirs) > 1e-4
    call(pretrain, "--init", folder, "--out", tmp_path / "more", *few)


def test_adapters_of_transformers_5_fit_a_file_of_transformers_4_in_bf16(tmp_path):
    write_transformers(SMALL["dual of timm"][0], tmp_path / "theirs")
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_export(load_encoders(tmp_path / "theirs"), base)
    tensors = load_file(base / "model.safetensors")
    assert any(name.startswith("text_model.text_model.") for name in tensors)
    described = json.loads((base / "config.json").read_text())
    del described["unicl_fast"]  # as if it were another's
    (base / "config.json").write_text(json.dumps(described))
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    plain = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(folder)
    assert difference(load_encoders(folder), theirs) < 1e-5


def test_a_folder_or_repository_that_peft_wrote_is_a_model(tmp_path, monkeypatch):
    base, folder = tmp_path / "hub" / "them" / "clip", tmp_path / "hub" / "them" / "adapter"
    write_transformers(SMALL["CLIP"][0], base)
    layers = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "fc2"]}
    config = peft.LoraConfig(**layers, use_dora=True, init_lora_weights=False)
    plain = transformers.AutoModel.from_pretrained(base)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(folder)
    ours = load_encoders(folder)
    assert difference(ours, theirs) < 1e-5
    assert difference(load_encoders(base), theirs) > 1e-2
    described = json.loads((folder / "adapter_config.json").read_text())
    described |= {"base_model_name_or_path": "them/clip", "revision": "main"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with hub_of(tmp_path / "hub", monkeypatch, cache=tmp_path / "cache"):
        assert difference(load_encoders("hf-hub:them/adapter"), theirs) < 1e-5
