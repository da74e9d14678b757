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
        ("cpu", ["nvidia0"], {}, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}),
        ("auto", ["nvidiactl"], {}, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}),
        ("cpu", [], {"OMP_WAIT_POLICY": "active"}, {}),
        ("auto", ["nvidia0"], {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("cuda", [], {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("cuda", [], {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {}),
    ],
)
def test_threads_sleep_on_a_cpu_and_the_memory_of_a_gpu_grows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    gpus: list[str],
    chosen: dict[str, str],
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    for name in gpus:
        (tmp_path / name).touch()
    with mock.patch.dict(os.environ, chosen, clear=True):
        choose_environment(device)
        assert dict(os.environ) == chosen | expected


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("pretrain", ["--data.train", "x", "--out", "y", "--run.device", "cpu"]),
        ("evaluate", ["knn", "--checkpoint", "x", "--train", "y", "--data", "z"]),
    ],
)
def test_programs_choose_their_environment_before_torch_is_imported(
    program: str, arguments: list[str]
) -> None:
    """OpenMP and torch's allocator read their variables once."""
    code = (
        "import sys; from unicl_fast.system import machine\n"
        "def look(device): sys.exit(1 if 'torch' in sys.modules else 7)\n"
        "machine.choose_environment = look\n"
        f"from unicl_fast.tools import {program}; {program}.main({arguments})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 7
