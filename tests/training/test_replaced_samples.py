"""Counting replaced samples from batches alone, over ranks, and stopping at the limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_workers import run_on_ranks, train_with_replaced_samples
from small_runs import global_batch, tiny_config

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.dataset.errors import TooManyBadSamplesError
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.training.limits import ReplacedSamples
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer


def with_replaced(batch: Batch, count: int) -> Batch:
    scheduled = torch.arange(batch.batch_size)
    shown = scheduled.clone()
    shown[:count] += 100
    return dataclasses.replace(batch, sample_ids=shown, scheduled_ids=scheduled)


def test_metrics_hold_the_count_since_the_start_of_this_process(
    images: torch.Tensor, tmp_path: Path
) -> None:
    batches = [with_replaced(global_batch(images, step=step), count=step % 3) for step in range(6)]
    config = tiny_config()
    Trainer(config, ListLoader(batches), run_folder=tmp_path, progress=False).fit()
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [0, 1, 3, 3, 4, 6]
    resumed = Trainer(config, ListLoader(batches), run_folder=tmp_path, progress=False)
    resumed.resume(tmp_path / "checkpoints" / "step-00000004")
    resumed.fit()
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [0, 1, 3, 3, 1, 3]


def test_batches_that_do_not_say_what_was_planned_count_as_good(
    images: torch.Tensor, tmp_path: Path
) -> None:
    loader = ListLoader([global_batch(images)])
    Trainer(tiny_config(), loader, run_folder=tmp_path, progress=False).fit()
    assert {line["replaced_samples"] for line in read_metrics(tmp_path)} == {0}


class Replacing:
    """A loader whose batches have `count` replaced samples each."""

    def __init__(self, images: torch.Tensor, count: int) -> None:
        self.batch, self.count = global_batch(images), count

    def batches(self, start_step: int) -> Iterator[Batch]:
        yield from ListLoader([with_replaced(self.batch, self.count)]).batches(start_step)

    def close(self) -> None: ...


def test_a_run_with_too_many_stops_and_says_where_to_look(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicl_fast.training.limits.LEAST_DRAWS", 30)
    config = tiny_config(steps=50)  # 12 samples a step, limit 30 * 0.2 = 6, then 0.2 of all
    data = dataclasses.replace(config.data, max_bad_fraction=0.2)
    config = dataclasses.replace(config, data=data)
    Trainer(config, Replacing(images, 2), run_folder=tmp_path / "good", progress=False).fit()
    trainer = Trainer(config, Replacing(images, 3), run_folder=tmp_path / "bad", progress=False)
    with pytest.raises(
        TooManyBadSamplesError,
        match=rf"9 of the 36 samples .*max_bad_fraction = 0.2 .*{tmp_path}/bad/quarantine.csv",
    ):
        trainer.fit()
    assert [line["replaced_samples"] for line in read_metrics(tmp_path / "bad")] == [3, 6, 9]
    assert len(list_checkpoints(tmp_path / "bad" / "checkpoints")) == 1


def test_the_first_ten_thousand_draws_have_one_allowance(images: torch.Tensor) -> None:
    draws = ReplacedSamples(max_fraction=0.01, global_batch_size=12, run_folder=None)
    draws.add(with_replaced(global_batch(images), count=12))
    draws.check(100)
    with pytest.raises(TooManyBadSamplesError, match="101 of the 12 samples .*the log"):
        draws.check(101)
    good = with_replaced(global_batch(images), count=0)
    for _ in range(2_000):
        draws.add(good)
    draws.check(240)
    with pytest.raises(TooManyBadSamplesError, match="241 of the 24012"):
        draws.check(241)
    assert draws.total(Ranks()) == 12


@pytest.mark.dist
def test_ranks_add_up_their_counts(images: torch.Tensor, tmp_path: Path) -> None:
    run_on_ranks(train_with_replaced_samples, 2, images, str(tmp_path))
    # rank r replaces r + 1 samples a step
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [3, 6, 9]
    told = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("9 of the 36 samples")
