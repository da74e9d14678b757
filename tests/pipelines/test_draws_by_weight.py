"""Samples drawn by weight: exact in every epoch, and proven by the ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicl_fast.batch import Batch
from unicl_fast.config import DataConfig
from unicl_fast.dataset.arrays import SAMPLE_DTYPE
from unicl_fast.dataset.weights import WeightedDraws, are_equal
from unicl_fast.ledger.format import LedgerSource, list_segments, read_segment_file, weights_path
from unicl_fast.ledger.proof import prove
from unicl_fast.ledger.writer import Ledger
from unicl_fast.pipelines.plan.plan import PlanSource, TrainPlan
from unicl_fast.tools.ledger import Replan, in_words

SIZES = (40, 25)


def make_plan(*weights: float, window: int = 0) -> TrainPlan:
    """Two sources in batches of 13; the first has these weights, repeated for all samples."""
    sources = []
    for number, size in enumerate(SIZES):
        rows = np.zeros(size, SAMPLE_DTYPE)
        rows["height"] = rows["width"] = rows["captions_count"] = 1
        own = np.resize(np.array(weights, np.float32), size) if weights and not number else None
        nothing = np.empty(0, np.int32)
        sources.append(
            PlanSource(
                name="",
                samples=rows,
                labels=nothing,
                num_templates=0,
                class_ids=nothing.astype(np.int64),
                weights=own,
            )
        )
    data = DataConfig(shuffle_window=window)
    return TrainPlan(sources, data=data, global_batch_size=13, seed=0)


def schedule(plan: TrainPlan, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and samples [steps 13]."""
    sources, samples = plan.schedule(0, steps, rank=0, world_size=1)
    return sources.reshape(steps, 13), samples.reshape(steps, 13)


@given(
    weights=st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=60),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**6),
)
def test_each_epoch_draws_a_sample_as_often_as_its_share_rounded(
    weights: list[float], seed: int, first: int
) -> None:
    values = np.array(weights, np.float32)
    share = values.astype(float) * len(values) / values.sum(dtype=float)
    draws = WeightedDraws(values, seed=seed, source=1)
    total = np.zeros(len(values))
    for epoch in range(first, first + 5):
        rows = draws.samples_of(np.arange(len(values)), epoch)
        assert np.array_equal(np.bincount(rows, minlength=len(values)), draws.counts(epoch))
        assert (np.abs(draws.counts(epoch) - share) < 1 + 1e-6).all()
        total += draws.counts(epoch)
    assert (np.abs(total - 5 * share) < 3).all()  # less than five roundings could add up to
    assert total.sum() == 5 * len(values)


@pytest.mark.parametrize("window", [0, 16])
def test_a_plan_of_weights(window: int) -> None:
    plain, planned = schedule(make_plan(window=window), 20)
    for weight in (1, 3, 0.1):  # equal weights change no bit
        assert np.array_equal(schedule(make_plan(weight, window=window), 20)[1], planned)
    plan = make_plan(1, 0.5, 6, 0.25, window=window)
    sources, samples = schedule(plan, 20)
    assert np.array_equal(sources, plain)
    assert np.array_equal(samples[sources == 1], planned[sources == 1])
    drawn = samples[sources == 0]
    assert len(drawn) == 160
    for epoch in range(4):
        counts = np.bincount(drawn[40 * epoch : 40 * epoch + 40], minlength=40)
        assert np.abs(counts - np.resize([1, 0.5, 6, 0.25], 40) / 7.75 * 4).max() < 1
    ranks = [plan.long_batch(3, 4, rank=rank, world_size=13).sample_ids for rank in range(13)]
    assert np.array_equal(np.stack(ranks, axis=1), samples[3:7])


def test_weights_of_several_data_sets_are_equal_only_together() -> None:
    three, one = np.full(4, 3, np.float32), np.ones(4, np.float32)
    assert are_equal([three, three])
    assert are_equal([one, None])
    assert not are_equal([three, None])
    assert not are_equal([three, one])


def record(plan: TrainPlan, folder: Path, ids: np.ndarray, sources: np.ndarray) -> None:
    """The ledger of a run that was fed these samples [steps n]."""
    ledger = Ledger(
        folder, sources=[LedgerSource("", size) for size in SIZES], seed=plan.seed,
        global_batch_size=13, shares=plan.weights,
        weights=[None if one is None else one.weights for one in plan.weighted],
    )  # fmt: skip
    empty = torch.empty(13)
    with ledger.segment(0):
        for step, (of_step, shown) in enumerate(zip(sources, torch.from_numpy(ids), strict=True)):
            ledger.record(
                Batch(
                    step=step, images=empty, texts=None, targets=None, global_index=empty,  # type: ignore[arg-type]
                    source_ids=torch.from_numpy(of_step.astype(np.int64)),
                    sample_ids=shown, scheduled_ids=shown,
                )
            )  # fmt: skip


def test_the_ledger_proves_draws_by_weight(tmp_path: Path) -> None:
    plan = make_plan(1, 0.5, 300, 0.25)
    sources, samples = schedule(plan, 25)
    record(plan, tmp_path / "sound", samples, sources)
    replan = Replan(tmp_path / "sound")
    proof = prove(tmp_path / "sound", watch=replan)
    assert proof.holds
    assert [one.complete_epochs for one in proof.sources] == [5, 5]
    assert "each sample as often as its weight says" in in_words(proof)
    assert replan.num_different == 0 < replan.num_draws
    wrong = samples.copy()
    wrong[0, np.flatnonzero(sources[0] == 0)[0]] += 1  # one draw of another sample
    record(plan, tmp_path / "wrong", wrong, sources)
    proof = prove(tmp_path / "wrong")
    assert not proof.holds
    assert (proof.sources[0].scheduled_twice, proof.sources[0].lost) == (1, 1)
    found = read_segment_file(list_segments(tmp_path / "sound")[1][0])
    assert found is not None
    path = weights_path(tmp_path / "sound", found.header.sources[0].weights)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="damaged"):
        prove(tmp_path / "sound")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        prove(tmp_path / "sound")
