"""Each stage of `unicl-bench` once, small: it compares, measures, writes. No figure is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from object_stores import upload

from unicl_fast.batch import ListLoader
from unicl_fast.benchmarks import harness
from unicl_fast.benchmarks.run import STAGES, main
from unicl_fast.benchmarks.training import step
from unicl_fast.config import DataConfig, EfficiencyConfig, ModelConfig, RunConfig, TrainConfig
from unicl_fast.models.precision import normalise_images
from unicl_fast.objectives.targets import collate
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools.pack.__main__ import main as pack
from unicl_fast.training.trainer import Trainer

SMALL = {
    "loss": ["--sizes", "64", "--batch-size", "2", "--no-memory"],
    "step": ["--batch-size", "4", "--image-encoder", "test_vit", "--image-size", "160"],
    "efficiency": [
        *("--batch-size", "4", "--image-encoder", "test_vit", "--image-size", "160"),
        "--no-memory",
    ],
    "checkpoint": ["--image-encoder", "test_vit", "--image-size", "160", "--steps", "2"],
    "memory": [
        *("--image-encoder", "test_vit", "--image-size", "32"),
        *("--large", "16", "--micro", "4", "--plain", "8"),
    ],
    "profile": ["--batch-size", "4", "--preset", "digits-small"],
    "scale": ["--step-seconds", "0.1", "--preset", "cifar10-small", "--gpus", "8..32"],
    "augment": [
        *("--batch-size", "8", "--batches", "2", "--image-size", "32", "--threads", "1"),
        *("--augment", "none,grayscale=0.5"),
    ],
    "pack": ["--images", "24", "--formats", "keep", "webp", "--resize", "short:24"],
    "storage": [
        *("--batch-size", "8", "--batches", "2", "--image-size", "32", "--threads", "1"),
        *("--url", "faulty://bench/set", "--block-bytes", "65536", "--windows", "0", "64"),
        *("--caches", "1"),
    ],
    "input": [
        *("--batch-size", "8", "--seconds", "0.1", "--image-size", "32", "--threads", "1"),
        *("--peers", "none", "--parts", "none"),
    ],
}

ON_DATA = ("loss", "step", "efficiency", "memory", "profile", "input", "augment", "pack", "storage")
SLOW = (
    *("pack", "storage", "memory", "efficiency", "checkpoint"),
    *("loss", "step", "profile", "input", "augment", "scale"),
)
# have no rounds of contestants, or no --data: test_gpu.py, test_diagnosis.py, test_race.py
REPORTS = ("gpu", "run", "race")
LONG = (*("memory", "efficiency", "checkpoint", "augment", "storage", "pack"),)


@pytest.fixture(scope="module")
def packed(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("benchmarks")
    captions = (shared_data / "captions" / "flickr8k" / "captions.jsonl").read_text()
    (folder / "few.jsonl").write_text("\n".join(captions.splitlines()[:16]))
    root = str(shared_data / "captions" / "flickr8k")
    captioned, labelled = folder / "captioned", folder / "labelled"
    pack(["build", str(folder / "few.jsonl"), "--image-root", root, "--out", str(captioned)])
    images = shared_data / "tiny-imagenet"
    source = ["build", str(images / "labels.csv"), "--where", "split=val"]
    root = str(images / "tiny-imagenet-200-subset.zip")
    pack([*source, "--label-column", "words", "--image-root", root, "--out", str(labelled)])
    upload(captioned, "faulty://bench/set")
    return {
        "loss": captioned,
        "step": captioned,
        "efficiency": captioned,
        "memory": captioned,
        "profile": captioned,
        "input": labelled,
        "augment": labelled,
        "pack": images / "tiny-imagenet-200-subset.zip",
        "storage": captioned,
    }


def marked(stage: str) -> Any:
    marks: list[Any] = [pytest.mark.slow] * (stage in SLOW)
    marks += [pytest.mark.long, pytest.mark.timeout(1200)] * (stage in LONG)
    return pytest.param(stage, marks=marks)


@pytest.mark.parametrize("stage", [marked(s) for s in STAGES if s not in (*ON_DATA, *REPORTS)])
def test_a_stage_without_data_writes_its_figures(stage: str, tmp_path: Path) -> None:
    run_small(stage, tmp_path / "result.json")


@pytest.mark.dali
@pytest.mark.parametrize("stage", [marked(s) for s in ON_DATA])
def test_a_stage_on_data_writes_its_figures(
    stage: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    run_small(stage, tmp_path / "result.json", "--data", str(packed[stage]))


def run_small(stage: str, path: Path, *more: str) -> None:
    main([stage, *SMALL[stage], "--rounds", "1", "--json", str(path), *more])
    result = json.loads(path.read_text())
    assert result["settings"]["rounds"] == 1
    assert {"processor", "cores", "torch", "commit", "date"} <= result["machine"].keys()
    assert len(result["figures"]) >= 3
    for name, figure in result["figures"].items():
        smallest = -math.inf if stage == "checkpoint" else 1e-12  # a cost may be noise around 0
        assert smallest <= figure["low"] <= figure["median"] <= figure["high"] < math.inf, name


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_its_options(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    assert f"unicl-bench {stage}" in capsys.readouterr().out


def test_data_that_is_not_there_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["loss", "--parts", "text", "--data", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of garbage, which takes half a second in a process that has run tests."""
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)


@pytest.mark.usefixtures("_no_collection")
def test_turns_alternate() -> None:
    seen: list[str] = []
    turns = harness.take_turns(
        {name: lambda name=name: seen.append(name) for name in "ab"}, rounds=2, warm_up=1
    )
    assert seen == ["a", "b"] * 3
    assert [len(taken) for taken in turns.values()] == [2, 2]


def test_images_of_one_class_under_different_prompts_are_no_clip_batch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ModelConfig(
        image_encoder="test_vit", text_width=64, text_heads=1, text_layers=1, embed_dim=16
    )
    config = TrainConfig(
        data=DataConfig(image_size=160, evaluation_resize=160),
        model=model,
        efficiency=EfficiencyConfig(precision="fp32"),
        run=RunConfig(global_batch_size=4, steps=1, device="cpu"),
    )
    images = torch.randint(256, (4, 160, 160, 3), dtype=torch.uint8)
    tokens = Tokenizer()(["a photo of a cat", "a drawing of a cat", "a dog", "a photo of a dog"])
    for labels, has_losses in (([0, 0, 1, 1], False), ([0, 1, 2, 3], True)):
        batch = collate(images, tokens, torch.tensor(labels))
        ours = Trainer(config, ListLoader([batch]), progress=False).model
        theirs = step.build_open_clip(ours, config)
        pixels = normalise_images(images, mean=config.data.mean, std=config.data.std)
        step.compare(ours, theirs, batch, pixels, tokens)
        assert ("losses differ by at most" in capsys.readouterr().out) == has_losses


@pytest.mark.usefixtures("_no_collection")
def test_a_turn_ends_when_a_gpu_has_done_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waits"))
    harness.timed(lambda: seen.append("works"))
    assert seen == ["works"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    harness.timed(lambda: seen.append("works"))
    assert seen == ["works", "waits", "works", "waits"]
