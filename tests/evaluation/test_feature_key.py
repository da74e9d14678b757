"""Kept features are found again if they would be the same, and only then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack
from small_runs import tiny_config

from unicl_fast import Tokenizer, UniCL
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.features import feature_key, weights_checksum

pytestmark = pytest.mark.dali

TOKENIZER = Tokenizer()


def packed(out: Path, numbers: Sequence[int], *, caption: str = "one") -> PackedDataset:
    samples = [Sample(jpeg(number), captions=[caption]) for number in numbers]
    return pack(out, samples, class_names=(), tokenizer=TOKENIZER)


def key_of(model: UniCL, dataset: PackedDataset, layer: str = "encoder") -> str:
    return feature_key(model, dataset, layer=layer, weights=weights_checksum(model))


@pytest.fixture
def model() -> UniCL:
    return UniCL(tiny_config())


@torch.no_grad()
def test_each_weight_of_the_images_way_changes_the_key(model: UniCL, tmp_path: Path) -> None:
    with packed(tmp_path / "set", [0, 1]) as dataset:
        keys = {key_of(model, dataset)}
        assert {key_of(UniCL(tiny_config()), dataset)} == keys
        assert model.text_projection is not None
        model.text_projection += 1
        assert {key_of(model, dataset)} == keys, "texts do not decide features of images"
        names = [name for name, _ in model.named_parameters() if name.startswith("image_")]
        for count, name in enumerate((names[0], names[-1], "image_projection"), start=2):
            model.get_parameter(name).view(-1)[-1] += 1e-6
            keys.add(key_of(model, dataset))
            assert len(keys) == count, name


def test_other_images_another_order_or_layer_change_the_key(model: UniCL, tmp_path: Path) -> None:
    with (
        packed(tmp_path / "set", [0, 1]) as dataset,
        packed(tmp_path / "renamed", [0, 1], caption="two") as renamed,
        packed(tmp_path / "turned", [1, 0]) as turned,
        packed(tmp_path / "other", [0, 2]) as other,
        packed(tmp_path / "more", [0, 1, 2]) as more,
    ):
        assert key_of(model, renamed) == key_of(model, dataset)
        keys = {key_of(model, one) for one in (dataset, turned, other, more)}
        assert len(keys | {key_of(model, dataset, layer="projection")}) == 5


def test_images_seen_otherwise_change_the_key(model: UniCL, tmp_path: Path) -> None:
    seen_as = [
        *({"image_size": 28}, {"evaluation_resize": 36}, {"interpolation": "bicubic"}),
        *({"resample": "dali"}, {"mean": (0.5, 0.5, 0.4)}, {"std": (0.2, 0.2, 0.3)}),
    ]
    config = model.config
    with packed(tmp_path / "set", [0, 1]) as dataset:
        keys = {key_of(model, dataset)}
        for count, change in enumerate(seen_as, start=2):
            data = dataclasses.replace(config.data, **change)
            model.config = dataclasses.replace(config, data=data)
            keys.add(key_of(model, dataset))
            assert len(keys) == count, change
        efficiency = dataclasses.replace(config.efficiency, precision="bf16")
        model.config = dataclasses.replace(config, efficiency=efficiency)
        assert key_of(model, dataset) not in keys
