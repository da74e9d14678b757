"""How many cores a rank has, which device decodes, and how much memory is free."""

import mmap
import os
import subprocess
import sys
from math import inf
from pathlib import Path
from unittest import mock

import pytest
import torch

from unicl_fast.system import machine
from unicl_fast.system.machine import (
    LAUNCHED_BY_US,
    choose_decode_device,
    cores_of_rank,
    cpu_times,
    describe_cores,
    quota_of_cores,
    resident_bytes,
    usable_cores,
)

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _twelve_cores(monkeypatch: Patch, tmp_path: Path) -> None:
    """Of 64, for this process and the one that started it; no quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", LAUNCHED_BY_US, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_MY_CGROUP", tmp_path / "mine")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "mine").write_text("0::/job/step\n")


PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
FEW_SHAPES = {"LRU_CACHE_CAPACITY": "128"}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
OLD_NCCL = {"TORCH_DIST_USE_NCCL2": "0"}
_NODE_0, _NODE_1 = range(56), range(56, 112)


@pytest.mark.parametrize(
    ("masks", "quota", "expected"),
    [
        ([_NODE_0] * 4 + [_NODE_1] * 4, inf, [14] * 8),  # bound to NUMA nodes
        ([range(112)] * 8, inf, [14] * 8),  # bound to nothing
        ([range(14 * rank, 14 * rank + 14) for rank in range(8)], inf, [14] * 8),
        ([range(4), range(4, 112)], inf, [4, 108]),  # bound to cores of their own
        ([range(4), range(8)], inf, [2, 6]),  # the first four are shared
        ([_NODE_0] * 3, inf, [18] * 3),  # a third of 56
        ([range(12)], inf, [12]),
        ([range(112)] * 2, 9, [4, 4]),  # a quota is shared as well
        ([_NODE_0, _NODE_1], 3, [1, 1]),
        ([range(2)] * 5, 2, [1] * 5),  # never none
    ],
)
def test_a_core_is_shared_by_the_ranks_that_may_run_on_it(masks, quota, expected):
    cores = [("kernel", "host", mask) for mask in masks]
    assert [cores_of_rank(rank, cores, quota=quota) for rank in range(len(masks))] == expected


def test_ranks_of_other_machines_and_containers_are_told_apart(monkeypatch, tmp_path):
    machines = [(kernel, kernel, range(56)) for kernel in "abab"]
    assert cores_of_rank(1, machines, quota=inf) == 28
    # two containers on one machine share its cores, and have a quota each
    containers = [("kernel", name, range(96)) for name in ("a", "a", "b")]
    assert cores_of_rank(0, containers, quota=20) == 10
    assert cores_of_rank(2, containers, quota=20) == 20
    assert cores_of_rank(2, containers, quota=64) == 32
    # a sandbox that hides its kernel
    monkeypatch.setattr(machine, "_BOOT_ID", tmp_path / "none")
    kernel, container, _ = describe_cores()
    assert kernel == container != ""


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000", 2), ("-1", 12), ("900000", 9), ("9000000", 12)]
)
def test_a_quota_of_the_first_control_groups_counts(tmp_path, quota, expected):
    """A container sees its own group at the place of the host's root."""
    (tmp_path / "mine").write_text("4:memory:/m\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    group = tmp_path / "cpu,cpuacct"
    group.mkdir()
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == expected


def test_slurm_says_how_many_cores_its_tasks_have(monkeypatch):
    assert quota_of_cores() == inf
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert quota_of_cores() == 8
    cores = [describe_cores()] * 2
    assert list(cores[0][2]) == list(range(12))
    assert cores_of_rank(0, cores, quota=quota_of_cores()) == 4
    monkeypatch.setenv(LAUNCHED_BY_US, "1")  # the number is of the launcher's task
    assert quota_of_cores() == inf


@pytest.mark.parametrize(
    ("requested", "device", "threads", "expected", "reason"),
    [
        ("auto", "cpu", 100, "cpu", "no GPU"),
        ("gpu", "cpu", 100, "cpu", "no GPU"),  # a GPU's run, evaluated elsewhere
        ("cpu", "cuda", 1, "cpu", "data.decode_device=cpu"),
        ("gpu", "cuda", 100, "cuda", "data.decode_device=gpu"),
        ("auto", "cuda", 0, "cpu", "data.decode_device=auto"),
        ("auto", "cuda", 1, "cpu", "a rank has 1 decoding thread, and a fast model may need 6"),
    ],
)
def test_a_gpu_decodes_images_only_if_it_is_asked_to(
    monkeypatch, requested, device, threads, expected, reason
):
    monkeypatch.setattr(machine, "usable_cores", lambda: 6)
    chosen, why = choose_decode_device(requested, device=torch.device(device), threads=threads)
    assert chosen == torch.device(expected)
    assert reason in why
    assert threads == 1 or "may need" not in why


def test_a_quota_of_any_group_around_counts(tmp_path):
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
        ("cpu", ["nvidia0"], {}, PASSIVE | FEW_SHAPES),
        ("auto", ["nvidiactl"], {}, PASSIVE | FEW_SHAPES),
        ("cpu", [], {"OMP_WAIT_POLICY": "active"}, FEW_SHAPES),
        ("auto", ["nvidia0"], {}, EXPANDABLE | OLD_NCCL),
        ("cuda", [], {}, EXPANDABLE | OLD_NCCL),
        ("cuda", [], {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, OLD_NCCL),
        ("cuda", [], {"PYTORCH_ALLOC_CONF": "x", "TORCH_DIST_USE_NCCL2": "1"}, {}),
    ],
)
def test_threads_sleep_on_a_cpu_and_the_memory_of_a_gpu_grows(
    monkeypatch, tmp_path, device, gpus, chosen, expected
):
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    for name in gpus:
        (tmp_path / name).touch()
    with mock.patch.dict(os.environ, chosen, clear=True):
        machine.choose_environment(device)
        assert dict(os.environ) == chosen | expected


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("pretrain", ["--data.train", "x", "--out", "y", "--run.device", "cpu"]),
        ("evaluate.__main__", ["knn", "--checkpoint", "x", "--train", "y", "--data", "z"]),
    ],
)
def test_programs_choose_their_environment_before_torch_is_imported(program, arguments):
    """OpenMP and torch's allocator read their variables once."""
    code = (
        "import sys; from unicl_fast.system import machine\n"
        "def look(device): sys.exit(1 if 'torch' in sys.modules else 7)\n"
        "machine.choose_environment = look\n"
        f"from unicl_fast.tools.{program} import main; main({arguments})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 7


def test_cpu_time_is_that_of_this_process_and_of_its_cores(monkeypatch):
    monkeypatch.undo()  # the real cores
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not tell how long threads wait for a core")
    before = cpu_times()
    while cpu_times().own < before.own + 0.1:
        sum(range(100_000))
    after = cpu_times()
    assert 0.09 < after.own - before.own < 5
    assert after.waited >= before.waited
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert after.busy - before.busy >= after.own - before.own - 2 * tick * usable_cores()


def test_the_cores_of_this_process_alone_are_looked_at(monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    per_core = {0: 10, 5: 20, 12: 400}  # the process may run on the first twelve
    lines = [
        f"cpu{core} {n * ticks} {ticks} 0 9999 9999 0 0 {ticks} 0 0" for core, n in per_core.items()
    ]
    stat = "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 0 0"])
    read = Path.read_text

    def read_stat(path: Path, **how: str) -> str:
        return stat if path == Path("/proc/stat") else read(path, **how)

    monkeypatch.setattr(Path, "read_text", read_stat)
    assert cpu_times().busy == 10 + 20 + 2 * 2
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=FileNotFoundError))
    assert cpu_times()[1:] == (0, 0)  # a sandbox whose kernel says nothing


def test_memory_is_what_lies_in_ram():
    before = resident_bytes()
    # new pages: malloc may give some that lie in RAM already
    with mmap.mmap(-1, 40_000_000) as content:
        content.write(os.urandom(1000) * 40_000)
        assert resident_bytes() - before > 0.9 * len(content)


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = machine.free_memory(torch.device("cpu"))
    assert 1e8 < whole < 1e14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_memory(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.2)


@pytest.mark.parametrize(
    ("controller", "names", "prefix"),
    [("", ("max", "current"), ""), ("memory", ("limit_in_bytes", "usage_in_bytes"), "total_")],
    ids=["v2", "v1"],
)
@pytest.mark.parametrize(("limit", "expected"), [("1000", 670), (str(2**63 - 4096), None)])
def test_a_control_group_s_limit_counts_and_files_that_were_read_are_no_obstacle(
    monkeypatch, tmp_path, controller, names, prefix, limit, expected
):
    for name, value in zip(names, (limit, "900"), strict=True):
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    stat = f"{prefix}inactive_file 500\n{prefix}active_file 70\n"
    (tmp_path / "memory.stat").write_text(stat)
    groups = {"": [], "memory": [], controller: [tmp_path]}
    monkeypatch.setattr(machine, "control_groups", lambda controller="": groups[controller])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    free = machine.free_memory(torch.device("cpu"))
    assert free == expected or (expected is None and free > 10**6)
