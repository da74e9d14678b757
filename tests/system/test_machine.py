"""How many cores a rank takes for its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from unicl_fast.system import machine
from unicl_fast.system.machine import (
    LAUNCHED_BY_US,
    choose_environment,
    cores_of_this_rank,
    usable_cores,
)


@pytest.fixture(autouse=True)
def _twelve_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 64, for this process and the one that started it; no quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", LAUNCHED_BY_US, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_MY_CGROUP", tmp_path / "mine")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "mine").write_text("0::/job/step\n")


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", LAUNCHED_BY_US])
def test_local_ranks_share_what_their_launcher_may_use(
    monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    assert cores_of_this_rank() == 12
    monkeypatch.setenv(launcher, "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cores_of_this_rank() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")  # of the launcher
    assert cores_of_this_rank() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores_of_this_rank() == 1

    def fails(process: int) -> set[int]:
        if process:
            raise ProcessLookupError
        return set(range(12))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(os, "sched_getaffinity", fails)
    assert cores_of_this_rank() == 4


def test_a_rank_that_is_bound_to_cores_has_them_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cores_of_this_rank() == 12  # by Slurm, through a shell that is bound as well
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores_of_this_rank() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert cores_of_this_rank() == 4
    monkeypatch.setenv(LAUNCHED_BY_US, "1")
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda process: set(range(12 if process == 0 else 60))
    )
    assert cores_of_this_rank() == 12
    monkeypatch.setattr(os, "getppid", lambda: 1)  # a container's launcher, or an heir's wider mask
    assert cores_of_this_rank() == 2


def test_a_quota_of_any_group_around_counts(tmp_path: Path) -> None:
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 12
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert usable_cores() == 3
    (tmp_path / "mine").write_text("12:cpu:/old\n")
    assert usable_cores() == 12
    (tmp_path / "mine").unlink()
    assert usable_cores() == 12


@pytest.mark.parametrize(
    ("device", "gpus", "chosen", "expected"),
    [
        ("cpu", ["nvidia0"], None, "passive"),
        ("auto", ["nvidiactl"], None, "passive"),
        ("auto", ["nvidia0"], None, None),
        ("cuda", [], None, None),
        ("cpu", [], "active", "active"),
    ],
)
def test_idle_threads_sleep_where_no_gpu_computes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    gpus: list[str],
    chosen: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    for name in gpus:
        (tmp_path / name).touch()
    with mock.patch.dict(os.environ):
        for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
            os.environ.pop(name, None)
        if chosen:
            os.environ["OMP_WAIT_POLICY"] = chosen
        choose_environment(device)
        assert os.environ.get("OMP_WAIT_POLICY") == expected
        assert os.environ.get("KMP_BLOCKTIME") == ("0" if expected == "passive" else None)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("pretrain", ["--data.train", "x", "--out", "y", "--run.device", "cpu"]),
        ("evaluate", ["knn", "--checkpoint", "x", "--train", "y", "--data", "z"]),
    ],
)
def test_programs_choose_how_threads_wait_before_torch_is_imported(
    program: str, arguments: list[str]
) -> None:
    """OpenMP reads the variable once, when it is loaded."""
    code = (
        "import sys; from unicl_fast.system import machine\n"
        "def look(device): sys.exit(1 if 'torch' in sys.modules else 7)\n"
        "machine.choose_environment = look\n"
        f"from unicl_fast.tools import {program}; {program}.main({arguments})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 7
