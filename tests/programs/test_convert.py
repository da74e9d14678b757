"""`unicl-convert` as a user calls it: output, refusals, and programs that read its files."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub_of
from huggingface_hub import ModelCard
from program_runs import call, refusal_of
from small_models import write_run
from small_runs import tiny_config
from timm.models import _registry

import unicl_fast
from unicl_fast import models
from unicl_fast.checkpoints.load import build_model
from unicl_fast.conversion.card import collect_facts
from unicl_fast.conversion.initial import initialise, load_encoders
from unicl_fast.conversion.sources import weights_checksum
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models import small
from unicl_fast.tools.convert import __main__ as convert
from unicl_fast.training.data import describe_datasets


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_config(image_encoder="unicl_convnet7_small", precision="fp32"))
    return folder


@pytest.mark.parametrize(
    ("format", "files", "next_step"),
    [
        ("hf", {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"},
         "unicl-eval zero-shot --checkpoint"),
        ("open_clip", {"open_clip_config.json", "open_clip_model.safetensors"}, "local-dir:"),
        ("timm", {"config.json", "model.safetensors"}, "timm.create_model("),
    ],
)  # fmt: skip
def test_each_format_says_what_it_read_wrote_and_what_is_next(
    trained, tmp_path, capsys, monkeypatch, format, files, next_step
):
    out = tmp_path / "out"
    call(convert, format, trained, out)
    said = capsys.readouterr().out
    model = load_encoders(trained)
    assert f"{len(model.state_dict()):,} entries" in said
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in said
    assert {path.name for path in out.iterdir()} == files
    assert all(name in said for name in files)
    (line,) = re.findall(r"^next: (.*)$", said, re.M)
    assert next_step in line
    if line.startswith("import "):  # in a process to which our encoder is not known yet
        monkeypatch.setattr(models, "small", small)
        monkeypatch.delitem(sys.modules, small.__name__)
        monkeypatch.delitem(_registry._model_entrypoints, "unicl_convnet7_small")
        exec(line, {})
    if format != "hf":
        assert "checked: features of equal pixels differ from ours by at most" in said
    if format == "open_clip":
        assert re.search(
            r"16 drawn images prepared by open_clip: cosine with ours [01]\.\d{4}", said
        )
    assert "is there already" in refusal_of(convert, format, trained, out)
    missing = refusal_of(convert, format, tmp_path / "nowhere", tmp_path / "other")
    assert "expected a run folder" in missing


@pytest.fixture(scope="module")
def documented(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a data set whose license is stated, and evaluations in its folder."""
    folder = tmp_path_factory.mktemp("documented")
    packed, run = folder / "secret" / "labels", folder / "run"
    shutil.copytree(data / "labels", packed)
    manifest = json.loads((packed / "manifest.json").read_text()) | {"license": "CC|BY 4.0"}
    with PackedDataset(packed) as dataset:
        described = describe_datasets([dataset], None)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    data_settings = {"train": (str(packed),), "augment": ("labels:clip",)}
    write_run(run, tiny_config(precision="fp32").changed(data=data_settings), data=described)
    figure = {"k": 20, "top1": 2 / 3, "top1_interval_95": [0.2077, 0.9385], "top5": 1.0,
              "num_samples": 3}  # fmt: skip
    values = {
        "protocol": "knn", "weights_xxh3": weights_checksum(run), "name": "held-out",
        "metric": "top1", "results": [figure],
    }  # fmt: skip
    (run / "results").mkdir()
    (run / "results" / "knn.json").write_text(json.dumps(values))
    (run / "other.json").write_text(json.dumps(values | {"weights_xxh3": "another"}))
    (run / "bases.json").write_text('{"protocol": "bases"}')
    return run


def test_a_run_is_published_with_its_card_and_comes_back_bit_for_bit(
    documented, tmp_path, monkeypatch, capsys
):
    out, cache = tmp_path / "hub" / "us" / "first", tmp_path / "cache"
    call(convert, "hf", documented, out, "--license", "mit")
    said = capsys.readouterr().out
    assert f"then hf upload OWNER/first {out}" in said
    assert said.count("left out of the card") == 1
    assert "other.json is about other weights" in said
    assert len(list(out.iterdir())) == 7

    card = re.sub(" +", " ", (out / "README.md").read_text())
    for line in (
        "license: mit",
        "| labels | 21 | 10 | 0 | by its size | CC\\|BY 4.0 |",
        "| held-out | knn, k = 20 | top1 | 66.67 | 20.77 to 93.85 | 3 | knn.json |",
        "- optimizer: AdamW",
        "- samples seen: 24",
        "measured on the data sets above only",
        'load_model("hf-hub:OWNER/first")',
    ):
        assert line in card
    (figure,) = ModelCard.load(out / "README.md").data.eval_results
    assert (figure.dataset_name, figure.metric_value) == ("held-out", 2 / 3)
    assert figure.metric_args == {"interval_95": [0.2077, 0.9385]}
    assert "secret" not in card + (out / "config.json").read_text()
    assert "before you publish" not in card

    expected = unicl_fast.load_model(documented, device="cpu")
    photo = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    unicl_fast.evaluation.inference.Image.fromarray(photo).save(tmp_path / "p.png")
    with hub_of(tmp_path / "hub", monkeypatch, cache=cache):
        again = unicl_fast.load_model("hf-hub:us/first", device="cpu")
        assert np.array_equal(again.embed_images([photo]), expected.embed_images([photo]))
        assert np.array_equal(again.embed_texts(["a cat"]), expected.embed_texts(["a cat"]))
        config = again.encoders.config
        started = build_model(config.changed(model={"init": "hf-hub:us/first"}))
        initialise(started)
        assert torch.equal(started.text_projection, expected.encoders.text_projection)
        facts, _ = collect_facts("hf-hub:us/first", evaluations=())
        assert facts.data[0]["license"] == "CC|BY 4.0"
        assert facts.figures[0]["value"] == 2 / 3
        use = card.split("```python\n")[1].split("```")[0].replace("OWNER", "us")
        exec(use.replace("photo.jpg", str(tmp_path / "p.png")), {})
        assert "'cat': 0." in capsys.readouterr().out


def test_an_evaluation_of_other_weights_is_no_figure_of_the_card(documented, tmp_path):
    arguments = ("hf", documented, tmp_path / "out", "--evaluations")
    other = documented / "other.json"
    assert "is about other weights (xxh3 another)" in refusal_of(convert, *arguments, other)
    state = documented / "checkpoints" / "step-00000002" / "state.json"
    assert "is no result of an evaluation" in refusal_of(convert, *arguments, state)
    damaged = tmp_path / "damaged.json"
    values = json.loads((documented / "results" / "knn.json").read_text())
    values["results"][0]["top1"] = 7
    damaged.write_text(json.dumps(values))
    said = refusal_of(convert, *arguments, damaged)
    assert "damaged.json is damaged: top1 must be a number in 0 to 1, not 7" in said
