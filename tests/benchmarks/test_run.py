"""Each program of `unicl-bench` once, small: it compares, measures, writes. No figure is judged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from object_stores import upload
from pack_runs import write_photos
from program_runs import refusal_of

from benchmarks import harness, packing
from benchmarks.harness import NotOnDeviceError
from benchmarks.step import open_clip
from benchmarks.step.parts import build_trainer, step_config
from unicl_fast.objectives.targets import collate
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools import bench
from unicl_fast.tools.bench import PROGRAMS, main
from unicl_fast.tools.pack.__main__ import main as pack

pytestmark = pytest.mark.slow


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
    upload(labelled, "faulty://bench/set")
    return {"captions": captioned, "labels": labelled, "zip": Path(root)}


def check(path: Path, program: str, *options: str, smallest: float) -> set[str]:
    """Runs a program for one round; returns the names of its figures, which are sound numbers."""
    main([program, *options, "--rounds", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["settings"]["rounds"] == 1
    assert {"processor", "cores", "torch", "commit", "date"} <= result["machine"].keys()
    for name, figure in result["figures"].items():
        assert smallest <= figure["low"] <= figure["median"] <= figure["high"] < math.inf, name
    return set(result["figures"])


_STEP = "step --batch-size 4 --image-encoder test_vit"
_INPUT = "input --data labels --batch-size 8 --seconds 0.1 --image-size 32 --threads 1 --peers none"
_MEASURED: dict[str, set[str]] = {
    "loss --data captions --sizes 64 --batch-size 2": {
        "times open_clip", "64: tiled fp32 / ClipLoss fp32", "64: tiled fp32, MB above the inputs",
        "64 rows, times np.unique(axis=0)", "packed, times the cost of its real tokens",
    },
    f"{_STEP} --data captions --image-size 160 --no-memory --parts open-clip switches profile": {
        "ratio", "two micro-batches, times as long", "whole step, times its floor",
    },
    f"{_STEP} --image-size 32 --parts switches --data labels": {"as it is, MB above the model"},
    f"{_INPUT} --parts none --augment none,grayscale=0.5 --caches 1 --url faulty://bench/set "
    "--block-bytes 65536 --windows 0 64": {
        "unicl_fast, images/s", "unicl_fast, MB", "cache 1, window 64: bytes read / needed",
        "none,grayscale=0.5, dali: rate by CPU time against none",
    },
    "pack --data zip --images 24 --formats keep webp --resize short:24": {
        "webp: unicl-pack / bare loop, by CPU time", "start of unicl-pack, s",
    },
}  # fmt: skip


@pytest.mark.dali
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("words", _MEASURED)
def test_each_program_measures_its_parts(words, packed, tmp_path):
    program, *options = [str(packed.get(word, word)) for word in words.split()]
    # 64 rows may find room in memory that the process has already
    smallest = 0.0 if program == "loss" else 1e-12
    assert _MEASURED[words] <= check(tmp_path / "a.json", program, *options, smallest=smallest)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_its_options(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([program, "--help"])
    assert stopped.value.code == 0
    assert f"unicl-bench {program}" in capsys.readouterr().out


def test_missing_data_is_reported_in_a_sentence(tmp_path):
    words = ("loss", "--parts", "text", "--data", tmp_path / "nowhere")
    assert "nowhere" in refusal_of(bench, *words)


def test_turns_alternate_and_end_when_a_gpu_has_done_its_work(monkeypatch):
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)  # half a second in a test run
    seen: list[str] = []
    turns = harness.take_turns(
        {name: lambda name=name: seen.append(name) for name in "ab"}, rounds=2, warm_up=1
    )
    assert seen == ["a", "b"] * 3
    assert [len(taken) for taken in turns.values()] == [2, 2]
    seen.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waits"))
    harness.timed(lambda: seen.append("works"))
    assert seen == ["works"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    harness.timed(lambda: seen.append("works"))
    assert seen == ["works", "waits", "works", "waits"]


def test_images_of_one_class_under_different_prompts_are_no_clip_batch(capsys):
    text = {"text_width": 64, "text_heads": 1, "text_layers": 1, "embed_dim": 16}
    settings = {"device": "cpu", "text": text, "precision": "fp32"}
    config = step_config("test_vit", image_size=160, batch_size=4, **settings)
    images = torch.randint(256, (4, 160, 160, 3), dtype=torch.uint8)
    tokens = Tokenizer()(["a photo of a cat", "a drawing of a cat", "a dog", "a photo of a dog"])
    for labels, has_losses in (([0, 0, 1, 1], False), ([0, 1, 2, 3], True)):
        trainer, batch = build_trainer(config, collate(images, tokens, torch.tensor(labels)))
        open_clip.open_clip_twin(trainer.model, batch)
        assert ("losses differ by at most" in capsys.readouterr().out) == has_losses


def test_work_on_the_cpu_is_refused(monkeypatch):
    """The real profiler sees no kernel of its products, and the results lie in host memory."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)  # a tenth of a second in a test run
    works = {"work": lambda: torch.ones(64, 64) @ torch.ones(64, 64)}
    with pytest.raises(NotOnDeviceError) as refused:
        harness.take_turns(works, rounds=1, device_type="cuda")
    assert "work was not done on the GPU: its results are on cpu" in str(refused.value)
    assert "kernels ran in 0.00e+00 of " in str(refused.value)


def test_a_writer_that_loses_an_image_stops_the_stage(tmp_path, monkeypatch):
    images = sorted(write_photos(tmp_path / "images", range(5)).rglob("*.jpg"))

    def lose(paths: list[Path], recipe: Any, name: str, out: Path) -> None:
        out.mkdir()
        packing._work(0, paths[1:], (recipe, name, out))

    monkeypatch.setattr(packing, "loop", lose)
    with pytest.raises(RuntimeError, match="keep: 1 of 5 images of the bare loop differ"):
        packing.compare(images, packing._Recipe("keep", ""), tmp_path, ["webdataset"])
