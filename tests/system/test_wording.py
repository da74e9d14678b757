"""What a checkpoint was trained with and what it shall go on with: the difference is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_workers import StepwiseLoader
from small_runs import tiny_config

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.system.differences import find_differences, refuse_differences
from unicl_fast.training.trainer import Trainer

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
    trainer = Trainer(tiny_config(), StepwiseLoader(images), data=DATA | change, progress=False)
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
    loader = StepwiseLoader(images)
    Trainer(tiny_config(steps=1), loader, run_folder=folder, data=DATA, progress=False).fit()
    return list_checkpoints(folder / "checkpoints")[-1]


def test_the_same_data_are_taken(images: torch.Tensor, checkpoint: Path) -> None:
    trainer = Trainer(tiny_config(), StepwiseLoader(images), data=DATA, progress=False)
    trainer.resume(checkpoint)
    assert trainer.step == 1


def test_a_thousand_classes_are_not_printed() -> None:
    names = [f"class {number}" for number in range(1000)]
    others = [*names[:500], "another", *names[501:]]
    with pytest.raises(ValueError) as refused:
        refuse_differences("data", {"class_names": [names]}, {"class_names": [others]})
    assert "class_names[0][500] was 'class 500' and is now 'another';" in str(refused.value)


def test_what_is_equal_has_no_differences() -> None:
    assert not list(find_differences({"a": [1, (2.0, None)]}, {"a": (1, [2.0, None])}))
    assert list(find_differences({"a": True}, {"a": 1}))
