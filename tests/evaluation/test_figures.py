"""What the images of evaluations say, apart from how they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack

from unicl_fast.evaluation.report import most_confused
from unicl_fast.evaluation.retrieval import RetrievalFeatures, _read_captions
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.dali


def test_captions_are_those_of_their_numbers(tmp_path: Path) -> None:
    """Numbers count the captions of all images that have one; the second has a label only."""
    captions = [["a dog", "the same dog"], [], ["a cat"], ["a hen", "two hens", "three hens"]]
    samples = [
        Sample(jpeg(number), captions=own, labels=[] if own else [0])
        for number, own in enumerate(captions)
    ]
    found = RetrievalFeatures(
        image_features=torch.eye(3),
        text_features=torch.zeros(6, 3),
        image_of_text=torch.tensor([0, 0, 1, 2, 2, 2]),
        samples=np.array([0, 2, 3]),
    )
    with pack(tmp_path / "set", samples, class_names=("cow",), tokenizer=Tokenizer()) as dataset:
        texts = _read_captions(found, dataset, range(6))
    assert list(texts.values()) == [*captions[0], "a cat", *captions[3]]


def test_mistakes_are_listed_by_their_number_and_go_from_class_to_what_it_was_taken_for() -> None:
    confusion = np.array([[5, 3, 0], [1, 8, 1], [0, 4, 0]])
    assert most_confused(confusion, ("dog", "cat", "hen")) == [
        ("hen", "cat", 4, 1.0),
        ("dog", "cat", 3, 3 / 8),
        ("cat", "dog", 1, 1 / 10),
        ("cat", "hen", 1, 1 / 10),
    ]
    assert [row[2] for row in most_confused(confusion, ("dog", "cat", "hen"), count=2)] == [4, 3]
