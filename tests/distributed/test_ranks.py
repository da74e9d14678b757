"""Ranks from SLURM's variables, and nothing taken over where torchrun has spoken."""

from __future__ import annotations

import pytest

from unicl_fast.distributed.rendezvous import adopt_slurm_ranks, first_host


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node7", "node7"),
        ("node[007-012,020],gpu1", "node007"),
        ("a1,b[2-3]", "a1"),
        ("cluster-gpu[3]", "cluster-gpu3"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, first: str) -> None:
    assert first_host(node_list) == first


SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "4711",
}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_slurm_tasks_become_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # so that what is set here is taken back afterwards
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_ranks()
    taken = {name: os.environ[name] for name in TORCHRUN[:5]}
    assert taken == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n1",
    }
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    for name in TORCHRUN:
        monkeypatch.delenv(name)


def test_torchrun_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_ranks()
    assert os.environ["WORLD_SIZE"] == "2"
