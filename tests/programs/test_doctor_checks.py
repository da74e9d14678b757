"""Each check of `unicl-doctor` of packages and of the machine, sound and faulty."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unicl_fast.distributed import rendezvous
from unicl_fast.models import efficiency, precision
from unicl_fast.system import kernels
from unicl_fast.system.machine import CpuTimes
from unicl_fast.tools.doctor import machine, packages
from unicl_fast.tools.doctor.rows import Found

Patch = pytest.MonkeyPatch


def patch(target: Patch, where: Any, **values: object) -> None:
    for name, value in values.items():
        target.setattr(where, name, value)


def assert_found(found: Found, state: str, text: str) -> None:
    """A row has a state, and says a text in what was found or what to do."""
    assert found.state == state
    assert text in f"{found.found} {found.fix}"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: Patch) -> None:
    for name in (
        "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR",
        "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA", "NO_COLOR",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


# Python and its packages.


def fake_versions(monkeypatch: Patch, wanted: list[str], there: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    patch(monkeypatch, metadata, requires=lambda name: wanted, version=version)


def test_an_old_python_and_another_system_are_faults(monkeypatch: Patch) -> None:
    assert packages.check_python().state == "ok"
    monkeypatch.setattr(packages.platform, "system", lambda: "Darwin")
    assert_found(packages.check_python(), "fault", "use Linux")
    monkeypatch.setattr(packages, "_OLDEST_PYTHON", (4, 0))
    assert packages.check_python().state == "fault"


@pytest.mark.parametrize(("encoding", "state"), [("UTF-8", "ok"), ("ISO-8859-1", "warning")])
def test_a_locale_in_which_names_mean_other_characters(
    monkeypatch: Patch, encoding: str, state: str
) -> None:
    monkeypatch.setattr(packages.locale, "getencoding", lambda: encoding)
    assert packages.check_locale().state == state


def test_requirements_that_are_missing_or_old_are_faults(monkeypatch: Patch) -> None:
    wanted = ["torch>=2.6", "timm>=1.0.15", "ray>=2; extra == 'ray'"]
    there = {"torch": "2.7+cpu", "timm": "1.0.20", "unicl_fast": "1"}
    fake_versions(monkeypatch, wanted, there)
    assert packages.check_requirements().state == "ok"
    fake_versions(monkeypatch, wanted, there | {"timm": "0.9"})
    found = packages.check_requirements()
    assert found.state == "fault"
    assert found.fix == "pip install 'timm>=1.0.15'"


def test_extras_are_there_absent_or_in_part(monkeypatch: Patch) -> None:
    monkeypatch.setattr(packages, "_EXTRAS", ("remote", "ray"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = ["a>=1; extra == 'remote'", "b>=1; extra == 'remote'", "ray>=2; extra == 'ray'"]
    fake_versions(monkeypatch, wanted, {"a": "1", "b": "2"})
    assert packages.check_extras() == ("ok", "there: remote; not installed: ray", "")
    fake_versions(monkeypatch, wanted, {"a": "1"})
    assert_found(packages.check_extras(), "warning", "pip install 'unicl_fast[remote]'")
    fake_versions(monkeypatch, wanted, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "spacy" or None)
    assert_found(packages.check_extras(), "warning", "spacy download")


def test_torch_that_cannot_be_imported_is_a_fault(monkeypatch: Patch) -> None:
    assert packages.check_torch().state == "ok"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = packages.check_torch()
    assert found.state == "fault"
    assert "torchvision" in found.found


def test_torch_without_cuda_is_a_warning_only_beside_an_nvidia_device(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert packages.check_cuda().state == "ok"
    (tmp_path / "nvidia0").touch()
    assert_found(packages.check_cuda(), "warning", "has no CUDA")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert_found(packages.check_cuda(), "warning", "cannot use it")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = packages.check_cuda()
    assert (found.state, found.fix) == ("warning", "unset CUDA_VISIBLE_DEVICES")


def test_a_device_that_does_not_compute_is_a_fault(monkeypatch: Patch) -> None:
    patch(
        monkeypatch, torch.cuda, is_available=lambda: True, device_count=lambda: 1,
        get_device_name=lambda index: "NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: real(size))
    assert packages.check_cuda() == ("ok", "NVIDIA H100 80GB HBM3; NCCL 2.27.3", "")

    def fails(size: int, device: torch.device) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "ones", fails)
    assert packages.check_cuda().state == "fault"


@pytest.mark.dali
def test_dali_decodes_or_is_a_fault(monkeypatch: Patch) -> None:
    assert packages.check_dali().state == "ok"
    two = [SimpleNamespace(name=f"nvidia-dali-cuda{n}", version="2.4") for n in (110, 120)]
    monkeypatch.setattr(metadata, "distributions", lambda: two)
    assert_found(packages.check_dali(), "fault", "overwrite each other")
    monkeypatch.setattr(metadata, "distributions", list)
    monkeypatch.setattr(packages, "_decode", lambda graph, name: 1 / (name != "WebP"))
    assert_found(packages.check_dali(), "fault", "does not decode WebP: ")


def test_without_dali_the_fault_says_how_to_install_it(monkeypatch: Patch) -> None:
    monkeypatch.delitem(sys.modules, "unicl_fast.pipelines.graph", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    import unicl_fast.pipelines

    monkeypatch.delattr(unicl_fast.pipelines, "graph", raising=False)
    found = packages.check_dali()
    assert_found(found, "fault", "which is not installed here")
    assert found.fix.startswith("pip install 'unicl_fast[cuda12]', or ")


def test_where_kernels_are_kept(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path / "of_this_code")
    assert packages.check_kernels().state == "ok"
    private = tmp_path / f"unicl_fast-{os.getuid()}"
    monkeypatch.setattr(packages.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(kernels, "cache_folder", lambda: private / "of_this_code")
    assert_found(packages.check_kernels(), "warning", "lasts longer")
    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    assert_found(packages.check_kernels(), "warning", "compiles its kernels anew")
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert packages.check_kernels().state == "fault"


def test_the_apex_of_pypi_is_told_from_nvidias(monkeypatch: Patch, tmp_path: Path) -> None:
    assert packages.check_apex().state == "ok"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = packages.check_apex()
    assert found.state == "warning"
    assert "The package that PyPI has under this name is another project" in found.found
    assert found.fix.startswith("pip uninstall apex")


def test_openblas_with_more_threads_than_cores_is_a_warning(monkeypatch: Patch) -> None:
    assert (packages.openblas_threads() or 1) >= 1
    patch(monkeypatch, packages, openblas_threads=lambda: 64, usable_cores=lambda: 2)
    assert_found(packages.check_blas(), "warning", "export OPENBLAS_NUM_THREADS=2")
    monkeypatch.setattr(packages, "openblas_threads", lambda: 2)
    assert packages.check_blas().state == "ok"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    assert_found(packages.check_blas(), "warning", "unset OPENBLAS_CORETYPE")


def test_compilers_are_wanted_where_a_gpu_computes(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(efficiency, "has_compiler", lambda: False)
    assert packages.check_compilers().state == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packages, "obstacle_to_triton", lambda index, oldest: "Triton is missing")
    found = packages.check_compilers()
    assert found.state == "warning"
    assert "no C++ compiler" in found.found
    assert "Triton is missing" in found.found


# The machine.


class FakeNvml:
    """Stands for libnvidia-ml.so.1; `fails` is the function that does, with status 18."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails
        self.nvmlErrorString = lambda status: b"Driver/library version mismatch"
        vars(self.nvmlErrorString)["restype"] = None

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            if name == self._fails:
                return 18
            texts = {"nvmlSystemGetDriverVersion": b"570.1", "nvmlDeviceGetName": b"NVIDIA H100"}
            numbers = {"nvmlSystemGetCudaDriverVersion_v2": 12080, "nvmlDeviceGetCount_v2": 2}
            for argument in arguments:
                if name in texts and isinstance(argument, ctypes.Array):
                    argument.value = texts[name]
                elif name in numbers:
                    argument._obj.value = numbers[name]
            return 0

        return function


def test_the_driver_is_asked_where_there_is_a_device(monkeypatch: Patch, tmp_path: Path) -> None:
    patch(monkeypatch, machine, _DEVICES=tmp_path / "dev", _PCI_DEVICES=tmp_path / "pci")
    assert machine.check_driver() == ("ok", "no NVIDIA device", "")
    card = tmp_path / "pci" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    assert_found(machine.check_driver(), "warning", "--gpus all")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr(machine, "_NVML", "libno-such-library.so.1")
    assert_found(machine.check_driver(), "warning", "is not there")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeNvml())
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    found = machine.check_driver()
    assert found == ("ok", "driver 570.1, for CUDA 12.8; NVIDIA H100, NVIDIA H100", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert_found(machine.check_driver(), "warning", "update the driver")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: FakeNvml("nvmlInit_v2"))
    found = machine.check_driver()
    assert found.state == "fault"
    assert "version mismatch" in found.found


def test_the_instructions_of_the_cpu(monkeypatch: Patch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPU_INFO", info)
    info.write_text("model name\t: Xeon\nflags\t\t: sse2 avx2 avx512f amx_bf16 amx_tile\n")
    assert machine.check_cpu() == ("ok", "Xeon: AVX2, AVX-512, AMX", "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert_found(machine.check_cpu(), "warning", "unset ONEDNN_MAX_CPU_ISA")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    info.write_text("model name\t: old\nflags\t\t: sse2\n")
    assert_found(machine.check_cpu(), "warning", "without AVX2")


def test_the_rate_of_bf16_is_the_one_that_runs_measure(monkeypatch: Patch) -> None:
    monkeypatch.setattr(precision, "seconds_of_products", lambda threads: (0.2, 0.1))
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    found = machine.check_bf16()
    assert found.state == "ok"
    assert "2 times the rate of fp32; on the CPU auto takes bf16" in found.found
    monkeypatch.setattr(machine, "usable_cores", lambda: 0)
    assert_found(machine.check_bf16(), "warning", "export OMP_NUM_THREADS=0")


def test_one_core_of_many_is_a_warning(monkeypatch: Patch) -> None:
    patch(
        monkeypatch, machine, usable_cores=lambda: 8, quota_of_cores=lambda: inf,
        describe_cores=lambda: ("kernel", "host", range(8)),
    )  # fmt: skip
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    found = "64 in the machine, 8 for this process; one rank takes 8"
    assert machine.check_cores() == ("ok", found, "")
    patch(monkeypatch, machine, usable_cores=lambda: 1, quota_of_cores=lambda: 1)
    assert_found(machine.check_cores(), "warning", "a quota of 1")
    assert machine.check_cores().state == "warning"


@pytest.mark.parametrize(("busy", "state"), [(0.9, "warning"), (0.0, "ok")])
def test_other_processes_on_the_cores(monkeypatch: Patch, busy: float, state: str) -> None:
    times = iter([CpuTimes(1, 0, 5), CpuTimes(1, 0, 5 + busy)])
    patch(
        monkeypatch, machine, cpu_times=lambda: next(times), _BUSY_SECONDS=1,
        describe_cores=lambda: ("kernel", "host", range(2)),
    )  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert machine.check_other_processes().state == state


@pytest.mark.parametrize(("free", "state"), [(16e9, "ok"), (2e9, "warning"), (0.5e9, "fault")])
def test_little_memory(monkeypatch: Patch, free: float, state: str) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: int(free))
    assert machine.check_memory().state == state


def test_shared_memory_of_docker(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path)
    usage = SimpleNamespace(total=8e9, free=8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert machine.check_shared_memory().state == "ok"
    usage.free = usage.total = 64 << 20
    assert_found(machine.check_shared_memory(), "warning", "--shm-size")
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path / "none")
    assert machine.check_shared_memory().state == "fault"


def test_limits_that_are_too_low(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    endless = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_NOFILE: (1024, 1 << 20)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, (endless, endless)))
    monkeypatch.setattr(machine, "control_groups", lambda controller="": [tmp_path])
    assert machine.check_limits().state == "ok"
    (tmp_path / "pids.max").write_text("100\n")
    assert_found(machine.check_limits(), "warning", "at most 100 processes and threads")
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "infiniband").mkdir()
    limits |= {
        resource.RLIMIT_NOFILE: (1024, 1024),
        resource.RLIMIT_NPROC: (100, 100),
        resource.RLIMIT_FSIZE: (5000, endless),
        resource.RLIMIT_MEMLOCK: (65536, 65536),
    }
    found = machine.check_limits()
    assert found.state == "warning"
    for option in ("-Hn 8192", "-u", "-f unlimited", "-l unlimited"):
        assert f"ulimit {option}" in found.fix


def test_interfaces_that_are_named_and_absent_are_faults(monkeypatch: Patch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(machine, "_resolves", lambda name: name != "nowhere")
    monkeypatch.setattr(rendezvous, "interface_with", lambda address: "lo")
    assert machine.check_network().state == "ok"
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere")
    assert_found(machine.check_network(), "warning", "/etc/hosts")
    monkeypatch.setattr(rendezvous, "interface_with", lambda address: None)
    assert_found(machine.check_network(), "warning", "GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    assert_found(machine.check_network(), "fault", "MASTER_ADDR=nowhere has no address")
    for variable, value in {"GLOO_SOCKET_IFNAME": "eth", "NCCL_SOCKET_IFNAME": "ib"}.items():
        with monkeypatch.context() as here:
            here.setenv(variable, value)
            found = machine.check_network()
            assert found.state == "fault"
            assert found.fix == f"unset {variable}, or name one of lo, eth0"


def test_a_machine_without_loopback_is_a_fault(monkeypatch: Patch) -> None:
    def fails(address: object) -> None:
        raise OSError("cannot assign")

    monkeypatch.setattr(socket, "create_server", fails)
    assert_found(machine.check_network(), "fault", "ip link set lo up")


@pytest.mark.parametrize(
    ("wanted", "exact", "expected"),
    [
        ("eth0", True, True), ("eth", True, False), ("lo,eth0", True, True),
        ("lo,ib0", True, False), ("eth", False, True), ("ib,eth", False, True),
        ("=eth", False, False), ("=eth0:1", False, True), ("^lo,docker", False, True),
        ("^lo,eth", False, False), ("^=lo", False, True),
    ],
)  # fmt: skip
def test_variables_that_name_interfaces(wanted: str, exact: bool, expected: bool) -> None:
    assert machine._names_interface(wanted, ["lo", "eth0"], exact=exact) is expected


def test_a_host_without_an_address_is_known_even_if_no_server_answers(monkeypatch: Patch) -> None:
    assert machine._resolves("localhost")
    assert not machine._resolves("a" * 70 + ".invalid")
    monkeypatch.setattr(machine, "_RESOLVING_SECONDS", 0.01)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: time.sleep(0.3))
    assert not machine._resolves("slow")


def test_a_clock_that_is_wrong_or_that_nothing_sets(monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "_clock_state", lambda: 0)
    assert machine.check_clock().state == "ok"
    monkeypatch.setattr(machine, "_clock_state", lambda: 5)
    assert machine.check_clock().state == "warning"
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert machine.check_clock().state == "fault"
