"""`unicl-convert` as a user calls it: what it says, what it refuses, and that others run on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import official_forward
import pytest
import torch
from program_runs import call
from small_runs import tiny_config

from unicl_fast import UniCL
from unicl_fast.checkpoints.files import write_checkpoint
from unicl_fast.checkpoints.load import EMA_FILE, MODEL_FILE, OPTIMIZER_FILE, load_model
from unicl_fast.config import config_to_dict
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.official import read_official_file, write_official_file
from unicl_fast.tools import convert, evaluate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it, with a moving average that differs from its last weights."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(image_encoder="unicl_convnet7_small", precision="fp32")
    model = UniCL(config).state_dict()
    average = {name: tensor * 0.9 for name, tensor in model.items()}
    average |= {name: tensor for name, tensor in model.items() if not tensor.is_floating_point()}
    write_checkpoint(
        folder / "checkpoints",
        step=2,
        files={MODEL_FILE: model, EMA_FILE: average, OPTIMIZER_FILE: {}},
        state={
            "config": config_to_dict(config), "scaler": {}, "data": {}, "optimizer": "AdamW",
        },
    )  # fmt: skip
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        call(convert, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "files", "next_step"),
    [
        ("hf", {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"},
         "unicl-eval zero-shot --checkpoint"),
        ("open_clip", {"open_clip_config.json", "open_clip_model.safetensors"}, "local-dir:"),
        ("timm", {"config.json", "model.safetensors"}, "timm.create_model("),
        pytest.param(
            "export", {"image.pt2", "text.pt2", "preprocessing.json"}, "torch.export.load(",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_each_format_says_what_it_read_wrote_and_what_is_next(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
    files: set[str],
    next_step: str,
) -> None:
    out = tmp_path / "out"
    call(convert, format, trained, out)
    said = capsys.readouterr().out
    model = load_model(trained)
    assert f"{len(model.state_dict()):,} entries" in said
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in said
    assert {path.name for path in out.iterdir()} == files
    assert all(name in said for name in files)
    assert f"next: {next_step}" in said.replace('open_clip.create_model_and_transforms("', "")
    if format != "hf":
        assert "checked: features differ from ours by at most" in said
    assert "is there already" in refusal(capsys, format, trained, out)


def test_the_weights_that_are_asked_for_are_taken(trained: Path, tmp_path: Path) -> None:
    for weights in ("ema", "model", "auto"):
        call(convert, "hf", trained, tmp_path / weights, "--weights", weights)
    ema, last, auto = (
        load_model(tmp_path / weights).image_projection for weights in ("ema", "model", "auto")
    )
    assert torch.equal(auto, ema)
    assert not torch.equal(last, ema)


def test_two_models_are_averaged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last weights, as an export, and their average are two models of one architecture."""
    call(convert, "hf", trained, tmp_path / "last", "--weights", "model")
    capsys.readouterr()
    found = {}
    for alpha in (0.0, 0.3, 1.0):
        out = tmp_path / f"at-{alpha}"
        call(convert, "average", trained, tmp_path / "last", out, "--alpha", alpha)
        found[alpha] = load_model(out).state_dict()
    said = capsys.readouterr().out
    assert f"taken from {trained}, since they are whole numbers: image_encoder." in said
    assert "num_batches_tracked and 3 more" in said
    assert f"next: unicl-eval zero-shot --checkpoint {out}" in said
    first, second = (load_model(path).state_dict() for path in (trained, tmp_path / "last"))
    for name, one in first.items():
        assert torch.equal(found[0.0][name], one), name
        if one.is_floating_point():
            assert torch.equal(found[1.0][name], second[name]), name
            mean = 0.7 * one.double() + 0.3 * second[name].double()
            torch.testing.assert_close(found[0.3][name].double(), mean, rtol=1e-6, atol=1e-7)
    assert "is there already" in refusal(capsys, "average", trained, trained, out)
    new = tmp_path / "new"
    message = refusal(capsys, "average", trained, trained, new, "--alpha", "1.5")
    assert "--alpha must be a number in 0 to 1, not 1.5" in message


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"text_heads": 4}, "text_heads is 2 in the first and 4 in the second"),
        ({"text_layers": 3}, "text_layers is 2 in the first and 3 in the second (12 more diff"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean is (0.48145466"),
    ],
)
def test_models_that_differ_are_not_averaged(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    difference: str,
) -> None:
    config = load_model(trained).config
    for group in ("model", "data"):
        settings = getattr(config, group)
        known = {name: value for name, value in changes.items() if hasattr(settings, name)}
        config = dataclasses.replace(config, **{group: dataclasses.replace(settings, **known)})
    other = tmp_path / "other"
    write_export(UniCL(config), other, origin={})
    message = refusal(capsys, "average", trained, other, tmp_path / "out")
    assert f"the models cannot be averaged: {difference}" in message
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "expected a run folder" in refusal(capsys, "hf", tmp_path / "nowhere", out)
    assert "convert it to open_clip" in refusal(capsys, "to-official", trained, out)
    page = tmp_path / "in1k.pth"
    page.write_text("<html>")
    assert "no checkpoint that torch can read" in refusal(capsys, "official", page, out)
    assert "is a folder" in refusal(capsys, "official", trained, out)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.dali
def test_an_export_is_evaluated_as_its_run_is(trained: Path, data: Path, tmp_path: Path) -> None:
    call(convert, "hf", trained, tmp_path / "export")
    results = []
    for checkpoint in (trained, tmp_path / "export"):
        file = tmp_path / f"{checkpoint.name}.json"
        call(
            *(evaluate, "zero-shot", "--checkpoint", checkpoint, "--data", data / "labels"),
            *("--templates", "simple", "--device", "cpu", "--json", file),
        )
        results.append(json.loads(file.read_text()))
    assert results[0]["num_samples"] == 21
    assert results[0]["per_class"] == results[1]["per_class"]


@pytest.mark.slow
@pytest.mark.dali
def test_a_released_checkpoint_is_converted_evaluated_and_converted_back(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, result = tmp_path / "random.pth", tmp_path / "model", tmp_path / "result.json"
    entries = official_forward.random_entries("swin-tiny")
    write_official_file(file, entries)
    call(convert, "official", file, out)
    said = capsys.readouterr().out
    assert "339 entries, 91,340,667 parameters" in said
    (tmp_path / "template.txt").write_text("a photo of a {}.\n")
    call(
        *(evaluate, "zero-shot", "--checkpoint", out, "--data", data / "labels", "--json", result),
        *("--templates", tmp_path / "template.txt", "--device", "cpu"),
    )
    assert json.loads(result.read_text())["num_samples"] == 21
    call(convert, "to-official", out, tmp_path / "again.pth")
    said = capsys.readouterr().out
    assert "339 entries" in said
    assert "wants images scaled to 256 (bicubic), 224 in the centre" in said
    assert "note" not in said  # images are normalised as theirs
    again = read_official_file(tmp_path / "again.pth")
    assert all(torch.equal(again[name], tensor) for name, tensor in entries.items())
