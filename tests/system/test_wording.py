"""Counts, shortened values and differences of two configs, as messages show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack_runs import jpeg, run_pack
from small_runs import StepLoader, tiny_config

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.system.wording import (
    config_diff,
    count_of,
    count_of_kind,
    refuse_differences,
    shorten,
    without_secrets,
)
from unicl_fast.training.assembly import make_trainer

DATA: dict[str, Any] = {
    "shares": [0.5, 0.5],
    "sources": [
        {"num_samples": 50, "shards": ["aa", "bb"], "num_classes": 3},
        {"num_samples": 9, "shards": ["cc"], "num_classes": 0},
    ],
    "vocabulary_hash": ["1234", "1234"],
    "class_names": [["ant", "bee", "cat"], []],
    "templates": [["a photo of a {}", "a {}"], []],
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host/set=0.5", "http://host/set=0.5"),
        ("see https://u:p@w:d@host:80/a and s3://KEY:SECRET@bucket/b.",
         "see https://host:80/a and s3://bucket/b."),
        ("https://token@host/a", "https://host/a"),
        ("abfs://container@account.net/set", "abfs://container@account.net/set"),
        ("sftp://user@host/set", "sftp://user@host/set"),
        ("'http://host/a?X-Amz-Signature=1&sig=2' came", "'http://host/a?...' came"),
        ("404, url='http://host/a?token=x', twice", "404, url='http://host/a?...', twice"),
        ("http://host/path@2x:3/a", "http://host/path@2x:3/a"),
        ("/folder/a:b@c?d=e", "/folder/a:b@c?d=e"),
    ],
)  # fmt: skip
def test_urls_are_shown_without_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_one_thing_is_no_plural() -> None:
    assert count_of(1, "image") == "1 image"
    assert count_of(0, "class") == "0 classes"
    assert count_of(2000, "caption") == "2,000 captions"
    assert [count_of(n, "entry") for n in (1, 3)] == ["1 entry", "3 entries"]
    assert count_of_kind(1, "rows that --where left out") == "1 row that --where left out"
    assert count_of_kind(1, "folder _tmps") == "1 folder _tmps"
    assert count_of_kind(2000, ".txt files") == "2,000 .txt files"


def test_a_data_set_of_one_image_is_spoken_of_in_the_singular(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").write_bytes(jpeg(1))
    one = tmp_path / "one"
    words = "1 image, 0 captions, 1 label of 1 class"
    for arguments in (
        ("build", tmp_path / "in", "--out", one, "--workers", 1),
        ("inspect", one, "--no-near", "--html", tmp_path / "page.html"),
        ("build", one, "--out", tmp_path / "again", "--workers", 1),
    ):
        code, said = run_pack(*arguments, capsys=capsys)
        assert code == 0
        assert words in said
    page = (tmp_path / "page.html").read_text()
    assert "<title>one: 1 image</title>" in page
    assert "1 classes" not in page
    assert "1 images" not in page


def test_values_are_shown_up_to_a_limit_whatever_they_are() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten("a") == "'a'"
    assert shorten([0] * 100, limit=10) == "[0, 0, 0, ..."
    assert shorten(nested) == "a list"
    assert shorten(10**5000) == "a int"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"class_names": [["ant", "bee", "dog"], []]},
            "class_names[0][2] was 'cat' and is now 'dog'",
        ),
        (
            {"class_names": [["ant", "bat", "bee", "cat"], []]},
            "class_names[0] had 3 elements and now has 4, and class_names[0][1] was 'bee' and is "
            "now 'bat'",
        ),
        (
            {"class_names": [["ant", "bee"], []]},
            "class_names[0] had 3 elements and now has 2, and class_names[0][2] was 'cat'",
        ),
        (
            {"templates": [["a photo of a {}", "a {}", "the {}"], []]},
            "templates[0] had 2 elements and now has 3, and templates[0][2] is now 'the {}'",
        ),
        ({"shares": None}, "shares was [0.5, 0.5] and is now None"),
        ({"shares": [0.75, 0.25]}, "shares[0] was 0.5 and is now 0.75 (1 more difference)"),
        ({"vocabulary_hash": ["1234", "5678"]}, "vocabulary_hash[1] was '1234' and is now '5678'"),
        (
            {"sources": [DATA["sources"][0] | {"shards": ["aa", "ee"]}, DATA["sources"][1]]},
            "sources[0].shards[1] was 'bb' and is now 'ee'",
        ),
        ({"augmentation": 3}, "augmentation was not there and is now 3"),
    ],
    ids=[
        *("class name", "class more", "class less", "template", "no shares", "shares"),
        *("tokenizer", "shard", "new key"),
    ],
)
def test_data_that_differ_are_refused_with_the_element_that_does(
    images: torch.Tensor, checkpoint: Path, change: dict[str, Any], difference: str
) -> None:
    trainer = make_trainer(tiny_config(), StepLoader(images), data=DATA | change, progress=False)
    before = trainer.model.image_projection.detach().clone()
    with pytest.raises(ValueError) as refused:
        trainer.resume(checkpoint)
    message = str(refused.value)
    assert message.startswith("the checkpoint is of another data: ")
    assert difference in message
    assert len(message) < 300
    assert torch.equal(trainer.model.image_projection, before)


@pytest.fixture(scope="module")
def checkpoint(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    loader = StepLoader(images)
    make_trainer(tiny_config(steps=1), loader, run_folder=folder, data=DATA, progress=False).fit()
    return list_checkpoints(folder / "checkpoints")[-1]


def test_the_same_data_are_taken(images: torch.Tensor, checkpoint: Path) -> None:
    trainer = make_trainer(tiny_config(), StepLoader(images), data=DATA, progress=False)
    trainer.resume(checkpoint)
    assert trainer.step == 1


def test_a_thousand_classes_are_not_printed() -> None:
    names = [f"class {number}" for number in range(1000)]
    others = [*names[:500], "another", *names[501:]]
    with pytest.raises(ValueError) as refused:
        refuse_differences("data", {"class_names": [names]}, {"class_names": [others]})
    assert "class_names[0][500] was 'class 500' and is now 'another';" in str(refused.value)


def test_what_is_equal_has_no_differences() -> None:
    assert not list(config_diff({"a": [1, (2.0, None)]}, {"a": (1, [2.0, None])}))
    assert list(config_diff({"a": True}, {"a": 1}))
