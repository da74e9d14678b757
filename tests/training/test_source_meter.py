"""The numbers of metrics.jsonl about each data set of a mix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rank_workers import describe_sources_of_slices, run_on_ranks
from small_runs import global_batch, tiny_config

from unicl_fast.batch import ListLoader
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.training.metrics import SourceMeter, read_metrics
from unicl_fast.training.trainer import Trainer


def test_epochs_and_positives_of_each_source(images: torch.Tensor) -> None:
    batch = dataclasses.replace(
        global_batch(images),
        class_ids=torch.tensor([5, 5, 5, 9] + [2**61 + i for i in range(6)] + [9, 5]),
        source_ids=torch.tensor([0, 0, 2, 2] + [1] * 6 + [2, 2]),
    )
    meter = SourceMeter(["a", "b", "c"], epochs=lambda step: [step / 2, step / 4, 0.0])
    assert meter.describe(batch, Ranks(), num_steps=3) == {
        "epochs/a": 1.5,
        "epochs/b": 0.75,
        "epochs/c": 0.0,
        "positives_per_row/a": 4.0,
        "positives_per_row/b": 1.0,
        "positives_per_row/c": (4 + 2 + 2 + 4) / 4,
    }


def test_a_source_without_a_row_in_the_batch_is_left_out(images: torch.Tensor) -> None:
    batch = dataclasses.replace(global_batch(images), source_ids=torch.zeros(12, dtype=torch.int64))
    meter = SourceMeter(["a", "b"], epochs=lambda step: [1.0, 0.0])
    values = meter.describe(batch, Ranks(), num_steps=1)
    assert "positives_per_row/a" in values
    assert "positives_per_row/b" not in values


@pytest.mark.dist
def test_positives_are_counted_over_ranks(images: torch.Tensor, tmp_path: Path) -> None:
    run_on_ranks(describe_sources_of_slices, 2, images, str(tmp_path))
    batch = dataclasses.replace(global_batch(images), source_ids=torch.arange(12) % 2)
    meter = SourceMeter(["a", "b"], epochs=lambda step: [1.0, 2.0])
    expected = repr(meter.describe(batch, Ranks(), num_steps=1))
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == [expected] * 2


def test_each_logging_step_has_them(images: torch.Tensor, tmp_path: Path) -> None:
    batch = dataclasses.replace(global_batch(images), source_ids=torch.arange(12) % 2)
    meter = SourceMeter(["a", "b"], epochs=lambda step: [step, 2 * step])
    config = tiny_config(steps=2)
    Trainer(config, ListLoader([batch]), run_folder=tmp_path, sources=meter, progress=False).fit()
    lines = read_metrics(tmp_path)
    assert [(line["epochs/a"], line["epochs/b"]) for line in lines] == [(1, 2), (2, 4)]
    assert all(line["positives_per_row/a"] >= 1 for line in lines)
