"""All ranks call the same collectives in the same order, under random delays."""

from __future__ import annotations

from pathlib import Path

import pytest
from ordered_collectives import train_noted
from rank_workers import ranks_of, run_on_ranks
from small_runs import tiny_config
from waiting import wait_until

pytestmark = pytest.mark.slow
RUNS = {
    name: tiny_config(steps=3, precision="fp32", **settings)
    for name, settings in {
        "ddp": {},
        "micro-batches": {"micro_batch_size": 2},
        "optimizer": {"shard": "optimizer"},
        "full": {"shard": "full"},
    }.items()
}


def logs_of(folder: Path, run: str) -> list[list[str]]:
    paths = [folder / f"{run}-{rank}.txt" for rank in range(3)]
    return [path.read_text().splitlines() if path.exists() else [] for path in paths]


def test_three_ranks_call_the_same_collectives_in_the_same_order(images, tmp_path):
    run_on_ranks(train_noted, 3, images, tmp_path, RUNS, None)
    for run in RUNS:
        first, *others = logs_of(tmp_path, run)
        assert len(first) > 12
        assert all(log == first for log in others), run


def test_a_rank_that_skips_a_collective_is_noticed(images, tmp_path):
    """It continues with its next one while the others wait."""

    def differ() -> bool:
        logs = logs_of(tmp_path, "ddp")
        return min(map(len, logs)) > 3 and len({log[3] for log in logs}) > 1

    with ranks_of(train_noted, 3, images, tmp_path, {"ddp": RUNS["ddp"]}, 3):
        wait_until(differ)
    first, faulty, last = logs_of(tmp_path, "ddp")
    assert first[:3] == faulty[:3] == last[:3]
    assert first[3] == last[3] != faulty[3]
