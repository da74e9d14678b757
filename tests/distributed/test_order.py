"""All ranks call the same collectives in the same order, under random delays."""

from pathlib import Path

import pytest
from ordered_collectives import train_noted
from rank_workers import needs_full, ranks_of, run_on_ranks
from small_runs import tiny_config
from waiting import wait_until

from unicl_fast.config import TrainConfig

pytestmark = pytest.mark.slow
FIXED = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0}
STAGES = {"run": {"steps": 0, "samples": 36, "stages": ("12:global_batch_size=6,image_size=16",)}}
LOCKED = {"optim": {"freeze": ("image", "text")}}
RUNS = {
    name: tiny_config(steps=3, precision="fp32", **efficiency).changed(
        checkpoint={"every_steps": 10}, **settings
    )
    for name, (efficiency, settings) in {
        "ddp": ({}, {}),
        "micro-batches": ({"micro_batch_size": 2}, {}),
        "optimizer": ({"shard": "optimizer"}, {}),
        "full": ({"shard": "full"}, {}),
        "lora": ({}, {"optim": {"lora": "image:2,text:2"}}),
        "locked": ({}, LOCKED),
        "a locked tower": ({}, {"optim": {"freeze": ("image",)}}),
        "stages": ({}, STAGES),
        "stages, full": ({"shard": "full"}, STAGES),
        "SIGTERM": ({}, {"run": {"steps": 50}}),
    }.items()
}


def logs_of(folder: Path, run: str) -> list[list[str]]:
    paths = [folder / f"{run}-{rank}.txt" for rank in range(3)]
    return [path.read_text().splitlines() if path.exists() else [] for path in paths]


def stored(data: Path, folder: Path) -> TrainConfig:
    """Features of both towers are stored before the run, and fed to it."""
    return RUNS["locked"].changed(
        data={"train": (str(data / "captions"),), **FIXED},
        efficiency={"stored_features": str(folder)},
    )


SENT = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"}
"""Texts, their gradients, and statistics of the loss."""
FULL = ["full", "stages, full"]


@pytest.mark.dali
@pytest.mark.parametrize(
    "names",
    [
        [*(name for name in RUNS if name not in FULL), "stored"],
        pytest.param(FULL, marks=needs_full),
    ],
)
def test_ranks_call_the_same_collectives_in_the_same_order(images, data, tmp_path, names):
    runs = {**RUNS, "stored": stored(data, tmp_path / "features")}
    run_on_ranks(train_noted, 3, images, tmp_path, {name: runs[name] for name in names})
    for name in names:
        first, *others = logs_of(tmp_path, name)
        assert {line.split()[0] for line in first} >= SENT, name
        assert all(log == first for log in others), name


def test_an_error_of_one_rank_ends_all_which_called_the_same_until_then(images, tmp_path):
    with ranks_of(train_noted, 3, images, tmp_path, {"error": RUNS["ddp"]}) as processes:
        wait_until(lambda: all(process.exitcode is not None for process in processes))
        assert all(process.exitcode for process in processes)
    shortest, *_, longest = sorted(logs_of(tmp_path, "error"), key=len)
    assert len(shortest) > 12
    assert all(longest[: len(log)] == log for log in logs_of(tmp_path, "error"))


def difference(logs: list[list[str]]) -> int:
    """The first line in which logs differ, 0 if they do not."""
    return next((at for at, lines in enumerate(zip(*logs, strict=False)) if len({*lines}) > 1), 0)


@pytest.mark.parametrize("fault", ["skips one", "swaps two"])
def test_a_rank_with_other_collectives_is_noticed(images, tmp_path, fault):
    """The others wait for it, or have what it sent in another place."""
    arguments = images, tmp_path, {"ddp": RUNS["ddp"]}, fault
    with ranks_of(train_noted, 3, *arguments):
        at = wait_until(lambda: difference(logs_of(tmp_path, "ddp")))
        first, faulty, last = logs_of(tmp_path, "ddp")
    assert first[at] == last[at] != faulty[at]
