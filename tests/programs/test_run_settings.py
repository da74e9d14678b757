"""Settings of a run: preset or the run's own, then a file, then the command line; and as YAML."""

import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_sets import Sample, pack
from PIL import Image
from program_runs import call, refusal_of
from small_runs import tiny_config

from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.conversion import packages
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.presets import PRESETS, Facts, build_preset, choose_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools import auto, pretrain
from unicl_fast.tools.pretrain import parse_arguments, parse_with_origin, split_config
from unicl_fast.tools.run_settings import as_yaml
from unicl_fast.training.memory_plan import plan
from unicl_fast.training.settle import settle


def settings_of(*options: str | Path) -> TrainConfig:
    return split_config(parse_arguments(["--out", "out", *map(str, options)]))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_line_overrides_the_file_and_the_file_the_preset(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "data:\n  train: [a, b=0.5]  # two data sets\noptim: {lr: 1e-2, warmup_fraction: .2}\n",
    )
    preset = build_preset("cifar10-small")
    config = settings_of("--preset", "cifar10-small", "--config", file, "--optim.lr", "0.5")
    assert config.optim.lr == 0.5
    assert config.optim.warmup_fraction == 0.2
    assert config.data.train == ("a", "b=0.5")
    assert config.data.image_size == preset.data.image_size
    assert config.run == preset.run
    file = write(tmp_path / "run.yaml", "preset: digits-small\nrun:\n  seed: 7\n")
    config = settings_of("--config", file)
    assert config.data == build_preset("digits-small").data
    config = settings_of("--config", file, "--preset", "mixed-small")
    assert config.data == build_preset("mixed-small").data
    assert config.run.seed == 7


@pytest.mark.parametrize(
    ("text", "group", "field", "value"),
    [
        ("efficiency: {shard: off}", "efficiency", "shard", "off"),
        ("efficiency: {compile: off}", "efficiency", "compile", "off"),
        ("model: {text_causal: false}", "model", "text_causal", False),
        ("optim: {lr: 1e-3}", "optim", "lr", 0.001),
        ("optim: {lr: 1}", "optim", "lr", 1),
        ("objective: {logit_scale_max: .inf}", "objective", "logit_scale_max", math.inf),
        ("data: {train: ['1e3']}", "data", "train", ("1e3",)),
        ("data: {train: [no, 2026-11-27]}", "data", "train", ("no", "2026-11-27")),
        ("", "run", "seed", 0),
    ],
)
def test_yaml_is_read_by_the_rules_of_json(tmp_path, text, group, field, value):
    """PyYAML alone takes `off` for false, 1e-3 for a text and a date for an object."""
    config = settings_of("--config", write(tmp_path / "run.yaml", text))
    assert getattr(getattr(config, group), field) == value


def test_printed_settings_are_a_file_of_the_same_settings(tmp_path, capsys):
    """Also texts that look like other values."""
    for name in PRESETS:
        call(pretrain, "--preset", name, "--print-config")
        file = write(tmp_path / "run.yaml", capsys.readouterr().out)
        printed, preset = settings_of("--config", file), build_preset(name)
        if name == "photos-heads":  # comes with its sentence encoder's settings
            assert printed.model.text_pool == "bert:mean"
            printed = dataclasses.replace(printed, model=preset.model)
        assert printed == preset
    names = ("1e5", "off", "10", "null", "~", "1_0", "a: b", "#", "ä", "-", "", ".inf", "=0.5")
    config = TrainConfig(data=DataConfig(train=names))
    assert settings_of("--config", write(tmp_path / "run.yaml", as_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {colour: 1}", "data.colour is not a field of this version; known are train, "),
        ("colour: {}", "colour is not a field of this version; known are data, "),
        ("data: 3", "data must be an object, not 3"),
        ("optim: {lr: fast}", "optim.lr must be a number in (0, inf), not 'fast'"),
        ("run: {seed: 010}", "run.seed must be a whole number, not 10.0"),
        ("run: {seed: 1, seed: 2}", "a name stands twice among ['seed', 'seed']"),
        ("run: {1: 2}", "run.1 is not a field"),
        ("run: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constr"),
        ("run: [1", "is not YAML: while parsing a flow sequence"),
        ("[" * 5000, "is not YAML: "),
        ("- run", "must hold groups of settings such as run:, not ['run']"),
        ("preset: 3", "preset must be a text, not 3"),
        ("preset: large", "no preset 'large'; presets are swin-tiny, "),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path, text, message):
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ValueError) as refused:
        settings_of("--config", file)
    assert message in str(refused.value)
    assert "preset" in text or str(file) in str(refused.value)


def test_fields_are_checked_together_after_the_options(tmp_path):
    file = write(tmp_path / "run.yaml", "data: {fraction: [1.0, 0.5]}")
    assert settings_of("--config", file, "--data.train", "a", "b").data.fraction == (1.0, 0.5)
    for arguments, message in (
        (("--config", file), "data.fraction takes one number"),
        (("--config", tmp_path), f"--config: there is no file {tmp_path}"),
        (("--config", tmp_path / "no.yaml"), f"--config: there is no file {tmp_path / 'no.yaml'}"),
        (("--preset", "swin-tiny", "--data.fraction", "half"), "--data.fraction"),
    ):
        said = refusal_of(pretrain, *arguments, "--out", tmp_path / "run")
        assert message in said
        assert "invalid float value" not in said


def test_a_run_is_resumed_with_its_own_and_with_given_settings(tmp_path):
    def resumed(*options: str) -> TrainConfig:
        return settings_of("--out", tmp_path, "--resume", "auto", *options)

    assert resumed() == build_preset("swin-tiny")  # nothing to resume yet
    own = build_preset("digits-small")
    own = own.changed(run={"seed": 5, "steps": 3})
    file = write(tmp_path / "config.json", json.dumps(config_to_dict(own)))
    assert resumed() == own
    assert settings_of("--config", file) == own
    longer = resumed("--run.steps", "9")
    assert (longer.run.steps, longer.run.seed, longer.data) == (9, 5, own.data)
    file = write(tmp_path / "more.yaml", "run: {seed: 6}")
    assert resumed("--config", str(file)) == own.changed(run={"seed": 6})
    # a named preset is the start, and without --resume the default is
    assert resumed("--preset", "mixed-small") == build_preset("mixed-small")
    assert settings_of("--out", tmp_path) == build_preset("swin-tiny")


GB = 10**9
MANY = {"num_images": 10**7, "largest_batch": 10**7}
PHOTOS = Facts(num_images=560, side=150, largest_batch=560, gpu_bytes=0, weights="timm:here")


@pytest.mark.parametrize(
    ("facts", "preset", "batch", "micro_batch"),
    [
        ({}, "photos-features", 128, 0),
        ({"num_images": 60, "largest_batch": 60}, "photos-features", 32, 0),
        ({"num_images": 1, "largest_batch": 1}, "photos-features", 1, 0),
        ({"weights": ""}, "mixed-small", 128, 0),
        ({"text_weights": "pypi:here"}, "photos-heads", 256, 0),
        ({"text_weights": "pypi:here", "num_images": 60, "largest_batch": 60},
         "photos-heads", 32, 0),
        ({"num_images": 20_000, "largest_batch": 20_000}, "photos-features", 128, 0),
        ({"num_images": 20_001, "largest_batch": 20_001}, "photos-small", 128, 0),
        ({"num_images": 20_001, "gpu_bytes": 24 * GB}, "photos-features", 128, 0),
        (MANY, "photos-small", 128, 0),
        (MANY | {"weights": ""}, "mixed-small", 128, 0),
        (MANY | {"gpu_bytes": 80 * GB}, "swin-tiny", 4096, 512),
        (MANY | {"largest_batch": 3000, "gpu_bytes": 24 * GB}, "swin-tiny", 2048, 128),
        (MANY | {"gpu_bytes": 8 * GB}, "photos-small", 128, 0),
        ({"num_images": 50_000, "largest_batch": 50_000, "side": 32}, "cifar10-small", 128, 0),
        ({"num_images": 10**7, "side": 32, "gpu_bytes": 80 * GB}, "cifar10-small", 128, 0),
    ],
)  # fmt: skip
def test_auto_chooses_a_preset_for_the_data_and_the_machine(facts, preset, batch, micro_batch):
    given = PHOTOS._replace(**facts)
    name, config, reasons = choose_preset(given, features="run/features")
    assert name == preset
    assert config.run.global_batch_size == batch
    assert config.run.samples <= 100 * given.num_images or name == "photos-heads"
    times = config.run.samples / batch / (config.run.evaluate_every_steps or 1)
    assert name != "photos-heads" or 10 <= times < 11
    assert config.efficiency.micro_batch_size == micro_batch
    stored = "run/features" if name in ("photos-features", "photos-heads") else ""
    assert config.efficiency.stored_features == stored
    assert config.model.init_image == ("timm:here" if name.startswith("photos") else "")
    is_short = name in ("photos-features", "photos-small") and given.num_images > 320
    assert ("larger --run.samples" in reasons) == is_short
    assert ("pip install" in reasons) == (name in ("mixed-small", "photos-features"))
    assert f"{given.num_images:,} image" in reasons


@pytest.mark.slow
def test_auto_s_micro_batch_fits_by_the_memory_plan():
    config = build_preset("swin-tiny")
    for size in (11, 16, 24, 40, 48, 80, 141):
        facts = PHOTOS._replace(num_images=10**7, largest_batch=10**7, gpu_bytes=size * GB)
        name, chosen, _ = choose_preset(facts, features="")
        assert name == "swin-tiny"
        size_of = chosen.efficiency.micro_batch_size
        planned = config.changed(efficiency={"micro_batch_size": size_of, "precision": "bf16"})
        assert plan(planned, world_size=1, device_bytes=size * GB).fits, size


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto") / "photos"
    with io.BytesIO() as file:
        Image.new("RGB", (64, 72)).save(file, format="png")
        samples = [Sample(file.getvalue(), (f"photo {number}",)) for number in range(5)]
    pack(out, samples, class_names=(), tokenizer=Tokenizer()).close()
    return out


@pytest.mark.parametrize(
    ("given", "size", "resize"),
    [
        (["--preset", "photos-heads", "--data.image-size", "64"], 64, 64),
        (["--preset", "photos-small", "--data.image_size=256"], 256, 288),
        (["--data.image-size", "112", "--data.evaluation-resize", "112"], 112, 112),
        (["--data.image-size", "64", "--data.evaluation-resize", "squash"], 64, "squash"),
        (["--config", "{image_size: 112}"], 112, 128),
        (["--config", "{image_size: 112}", "--data.image-size", "56"], 56, 64),
        (["--config", "{image_size: 112, evaluation_resize: 112}"], 112, 112),
        (["--config", "{evaluation_resize: longest}", "--data.image-size", "64"], 64, "longest"),
    ],
)
def test_evaluations_show_the_same_part_of_images_of_another_size(given, size, resize, tmp_path):
    if given[0] == "--config":
        given[1] = str(write(tmp_path / "run.yaml", f"data: {given[1]}"))
    data = settings_of(*given).data
    assert (data.image_size, data.evaluation_resize) == (size, resize)


@pytest.mark.parametrize(
    ("given", "resize"),
    [
        (("--preset", "photos-heads"), 96),
        (("--preset", "photos-features"), 96),
        (("--preset", "photos-heads", "--data.image-size", "48"), 48),
        (("--preset", "photos-heads", "--data.evaluation-resize", "squash"), "squash"),
        (("--preset", "photos-small"), 110),
    ],
)
def test_presets_that_show_whole_images_do_at_the_size_of_a_source(given, resize, monkeypatch):
    data = {"image_size": 96, "evaluation_resize": 110, "mean": (0.4, 0.4, 0.4)}
    brought = {"model": {}, "data": data}
    monkeypatch.setattr("unicl_fast.conversion.sources.settings_of", lambda _: dict(brought))
    config = settings_of(*given, "--init-image", "a-source")
    assert (config.data.evaluation_resize, config.data.mean) == (resize, (0.4, 0.4, 0.4))


@pytest.mark.parametrize(
    ("size", "resize", "smallest", "said"),
    [
        (64, 144, 0.4, "the middle 20 % of an image, training at least 40 %: leave data.evalu"),
        (64, 512, 0.08, "data.evaluation_resize=512 out, or set 64"),
        (224, 512, 0.08, ""),
        (224, 256, 0.9, ""),
        (64, 144, 1.0, ""),  # training shows the middle, too
        (64, "squash", 0.4, ""),
    ],
)
def test_evaluations_of_less_than_training_shows_are_said(size, resize, smallest, said, caplog):
    config = tiny_config().changed(
        data={"image_size": size, "evaluation_resize": resize, "crop_scale": (smallest, 1.0),
              "crop_ratio": (1.0, 1.0)}
    )  # fmt: skip
    settle(config, device=torch.device("cpu"), ranks=Ranks())
    assert bool(said) == bool(caplog.messages)
    assert said in "".join(caplog.messages)


def test_auto_looks_at_the_data_and_comes_before_file_and_options(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    data = ("--data.train", photos, "--run.device", "cpu")
    origin, arguments = parse_with_origin(["--preset", "auto", *map(str, data), "--out", "out"])
    said = "the preset mixed-small, which auto took: 5 images, no GPU, no package"
    assert origin.startswith(said)
    assert arguments.run.global_batch_size == 4
    with monkeypatch.context() as patch:  # the run verifies what it opens
        patch.setattr("unicl_fast.dataset.reader.verify_arrays", None)
        two = ("--preset", "auto", *data, "--data.fraction", "0.4", "--out", "out")
        origin, _ = parse_with_origin(list(map(str, two)))
    assert "auto took: 2 images" in origin
    assert arguments.model == build_preset("mixed-small").model
    file = write(
        tmp_path / "run.yaml",
        f"preset: auto\ndata: {{train: [{photos}=1.0], fraction: [0.6]}}\n"
        "run: {global_batch_size: 2, seed: 3}",
    )
    assert "3 images" in parse_with_origin(["--config", str(file), "--out", "out"])[0]
    config = settings_of("--config", file, "--run.seed", "4")
    assert (config.run.global_batch_size, config.run.seed) == (2, 4)
    with pytest.raises(ValueError, match="auto chooses by the data: give --data.train DIR"):
        settings_of("--preset", "auto")
    with pytest.raises(ValueError, match=r"^data.fraction must be a list, .*, not \['half'\]"):
        settings_of("--preset", "auto", *data, "--data.fraction", "half")
    write(file, f"preset: auto\ndata: {{train: [{photos}], fraction: [2]}}")
    with pytest.raises(ValueError, match=r"run.yaml: data.fraction must be a list"):
        settings_of("--config", file)


def test_auto_begins_with_weights_of_a_package_or_a_cache(tmp_path, monkeypatch):
    cache = tmp_path / "models--timm--tf_efficientnet_lite0.in1k"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert auto._weights_of_photos() == ""
    write(cache / "refs" / "main", "1" * 40)
    write(cache / "snapshots" / ("1" * 40) / "model.safetensors", "")
    assert auto._weights_of_photos() == "timm:tf_efficientnet_lite0.in1k"
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    assert auto._weights_of_photos() == "pypi:efficientnet-lite0"


def test_auto_starts_from_the_encoders_whose_heads_are_best_and_compares_once(
    photos, tmp_path, monkeypatch
):
    lite, text, whole = "pypi:efficientnet-lite0", "pypi:all-minilm-l6-v2", "hf-hub:me/clip"
    shutil.copytree(photos, tmp_path / "train")
    shutil.copytree(photos, tmp_path / "held-out")
    commands: list[list[str]] = []
    fails = [False]

    def compare(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        assert not set(options["env"]) & {"RANK", "WORLD_SIZE"}
        found = [
            {"name": image, "image": image, "text": text,
             "methods": [{"figures": {}}, {"figures": {"R@1": {"rate": rate}}}]}
            for image, text, rate in [(lite, "", 0.9), (lite, text, 0.3), (whole, whole, 0.4)]
        ]  # fmt: skip
        parts = {"data": str(tmp_path / "train"), "held_out": str(tmp_path / "held-out")}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(parts | {"bases": found}))
        return SimpleNamespace(returncode=int(fails[0]), stderr="starting\nno scikit-learn\n")

    def settings(initial: Mapping[str, str]) -> dict[str, Any]:
        # evaluation_resize of 80 would cut what training shows
        data = {"image_size": 64, "evaluation_resize": 80, "mean": (0.4, 0.4, 0.4)}
        return {"model": {"image_encoder": "vit_tiny"}, "data": data} if whole in initial.values() \
            else {"model": {}, "data": {}}  # fmt: skip

    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    monkeypatch.setattr(auto, "bases_at_hand", lambda: [lite, text, whole])
    monkeypatch.setattr(auto.subprocess, "run", compare)
    monkeypatch.setattr("unicl_fast.conversion.sources.settings_of", settings)
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "run"
    words = ["--preset", "auto", "--data.train", str(tmp_path / "train"), "--run.device", "cpu"]
    words += ["--out", str(out)]
    parse_with_origin([*words, "--dry-run"])
    assert not out.exists(), "a dry run writes nothing"
    for _ in range(2):  # as two ranks do
        origin, arguments = parse_with_origin(words)
        assert (
            f"heads on {whole} were best on held-out images: 40.0%, beside {lite} 30.0%" in origin
        )
        assert (arguments.model.init_image, arguments.model.init_text) == (whole, whole)
        assert arguments.model.image_encoder == "vit_tiny"
        assert (arguments.data.image_size, arguments.data.evaluation_resize) == (64, 64)
    assert len(commands) == 2
    assert [path.name for path in out.iterdir()] == ["bases.json"]
    twice = [*words[:3], str(tmp_path / "train"), *words[3:], "--init-text", text]
    assert parse_with_origin(twice)[1].data.evaluate == (str(tmp_path / "held-out"),)
    assert len(commands) == 2, "the choice is made"
    os.utime(tmp_path / "held-out" / "manifest.json", (9e9, 9e9))
    parse_with_origin(words)
    assert len(commands) == 3, "the data were packed again"
    (out / "bases.json").write_text('{"data": "others"}')
    fails[0] = True
    origin, arguments = parse_with_origin(words)
    assert "encoders could not be compared: no scikit-learn" in origin
    assert arguments.model.init_image == lite


def test_a_run_that_resumes_keeps_auto_s_choice_and_needs_the_query_of_urls(photos, tmp_path):
    data = ("--preset", "auto", "--data.train", photos, "--out", tmp_path)
    own = dataclasses.replace(build_preset("digits-small"), data=DataConfig(train=(str(photos),)))
    write(tmp_path / "config.json", json.dumps(config_to_dict(own)))
    for resume in ("auto", "checkpoints/step-1"):
        assert settings_of(*data, "--resume", resume) == own
    assert settings_of(*data).model != own.model
    signed = TrainConfig(data=DataConfig(train=("https://host/set?token=secret",)))
    write(tmp_path / "config.json", json.dumps(config_to_dict(signed)))
    said = refusal_of(pretrain, "--out", tmp_path, "--resume", "auto")
    assert "is a URL without its query" in said


def test_presets_are_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        call(pretrain, "--preset", "list")
    assert not ended.value.code
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [*PRESETS, "auto"]
    assert all(preset.about in line for line, preset in zip(shown, PRESETS.values(), strict=False))
