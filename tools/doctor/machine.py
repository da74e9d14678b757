"""Checks of the driver, cores, memory, limits, networks and the clock."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import math
import os
import platform
import resource
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from unicl_fast.system.machine import (
    control_groups,
    cores_of_rank,
    cpu_times,
    describe_cores,
    free_memory,
    quota_of_cores,
    usable_cores,
)
from unicl_fast.system.wording import count_of

from .rows import Check, Found

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_SHARED_MEMORY = Path("/dev/shm")
_DEVICES = Path("/dev")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_NVML = "libnvidia-ml.so.1"
_INSTRUCTIONS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "AVX-512 bf16": {"avx512_bf16"},
    "AMX": {"amx_bf16", "amx_tile"},
    "NEON": {"asimd"},
    "bf16 of Arm": {"bf16"},
}
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_GB = 10**9
_LEAST_MEMORY, _LITTLE_MEMORY = 1 * _GB, 4 * _GB
"""Bytes: libraries, DALI and decoded batches leave a small model no room in the first, and a large
one none in the second. A run plans its own memory before the first step."""
_LITTLE_SHARED_MEMORY = _GB
"""Ranks of one machine have NCCL's buffers there, and Docker gives 64 MB to all of them."""
_FEW_PROCESSES = 4096
_BUSY = 0.15  # of the cores, as the trainer's own warning
_BUSY_SECONDS = 0.4
_RESOLVING_SECONDS = 1.5
_CLOCK_ERROR = 5  # TIME_ERROR of adjtimex: not synchronised


def check_driver() -> Found:
    """Asks NVML for the driver; a machine without an NVIDIA card needs none."""
    nodes = list(_DEVICES.glob("nvidia[0-9]*"))
    cards = count_cards()
    if not nodes and not cards:
        return Found("ok", "no NVIDIA device")
    if not nodes:
        return Found(
            "warning", f"{count_of(cards, 'NVIDIA card')}, and no /dev/nvidia0: no driver is "
            "loaded, or the container was started without devices",
            "install the driver, or start the container with --gpus all",
        )  # fmt: skip
    try:
        facts = read_nvml()
    except OSError:
        return Found(
            "warning", f"{_NVML} is not there, so nothing can be asked of the driver",
            "install the driver's libraries; in a container NVIDIA_DRIVER_CAPABILITIES=all",
        )  # fmt: skip
    except RuntimeError as error:
        return Found(
            "fault", f"NVML: {error}", "reboot, or load the module of this driver; nvidia-smi"
        )
    found = f"driver {facts.driver}, for CUDA {facts.cuda[0]}.{facts.cuda[1]}; "
    found += ", ".join(facts.names) or "no device"
    if (built := _cuda_of_torch()) and built > facts.cuda[:1]:
        return Found(
            "warning", f"{found}; torch was built for CUDA {built[0]}",
            "update the driver, or install torch for an older CUDA",
        )  # fmt: skip
    return Found("ok", found)


def count_cards() -> int:
    """NVIDIA's display devices and accelerators on the PCI bus."""
    found = 0
    for folder in _PCI_DEVICES.glob("*"):
        try:
            vendor, kind = (
                (folder / name).read_text(encoding="utf-8") for name in ("vendor", "class")
            )
        except OSError:
            continue
        found += vendor.strip() == _NVIDIA and kind.startswith(_DISPLAY)
    return found


class NvmlFacts(NamedTuple):
    """The answers of a driver."""

    driver: str
    cuda: tuple[int, int]
    """The newest CUDA that it supports."""
    names: list[str]


def read_nvml() -> NvmlFacts:
    """Asks NVML; raises OSError where it is not installed, RuntimeError with its own message."""
    nvml = ctypes.CDLL(_NVML)
    nvml.nvmlErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        if status := getattr(nvml, name)(*arguments):
            raise RuntimeError(nvml.nvmlErrorString(status).decode())

    call("nvmlInit_v2")
    try:
        text = ctypes.create_string_buffer(96)
        call("nvmlSystemGetDriverVersion", text, len(text))
        driver, version, number = text.value.decode(), ctypes.c_int(), ctypes.c_uint()
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        call("nvmlDeviceGetCount_v2", ctypes.byref(number))
        names = []
        for index in range(number.value):
            device = ctypes.c_void_p()
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
            call("nvmlDeviceGetName", device, text, len(text))
            names.append(text.value.decode())
    finally:
        nvml.nvmlShutdown()
    return NvmlFacts(driver, (version.value // 1000, version.value % 1000 // 10), names)


def _cuda_of_torch() -> tuple[int, ...]:
    """Major version of CUDA that torch was built for; versions of one major work together."""
    torch = sys.modules.get("torch")  # imported by its own check, unless it is broken
    version = torch.version.cuda if torch else None
    return tuple(int(part) for part in (version or "").split(".")[:1] if part)


def check_cpu() -> Found:
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = [name for name, needed in _INSTRUCTIONS.items() if needed <= flags]
    text = (
        f"{fields.get('model name', platform.machine())}: {', '.join(found) or 'none of the fast'}"
    )
    for name in _ISA_LIMITS:
        if name in os.environ:
            return Found(
                "warning",
                f"{text}; {name}={os.environ[name]} limits what torch uses",
                f"unset {name}",
            )
    if not flags & {"avx2", "asimd"}:
        return Found(
            "warning", f"{text}; without AVX2 decoding and training take several times as long",
            "take another machine; of a virtual one, pass the host's processor through",
        )  # fmt: skip
    return Found("ok", text)


def check_bf16() -> Found:
    """Measures fp32 and bf16 as `efficiency.precision=auto` does on a CPU."""
    import torch

    from unicl_fast.models.precision import fast_precision, seconds_of_products

    threads = torch.get_num_threads()
    fp32, bf16 = seconds_of_products(threads)
    cores = count_of(usable_cores(), "core")
    chosen = fast_precision(torch.device("cpu"))
    found = f"bf16 has {fp32 / bf16:.2g} times the rate of fp32; on the CPU auto takes {chosen}"
    if threads > usable_cores():
        return Found(
            "warning", f"torch has {threads} threads for {cores}; {found}",
            f"export OMP_NUM_THREADS={usable_cores()}",
        )  # fmt: skip
    return Found("ok", f"{found} ({count_of(threads, 'thread')})")


def check_cores() -> Found:
    usable, there = usable_cores(), os.cpu_count() or 1
    quota, (kernel, container, mine) = quota_of_cores(), describe_cores()
    rank = cores_of_rank(0, [(kernel, container, mine)], quota=quota)
    found = f"{there} in the machine, {len(mine)} for this process"
    found += "" if quota == math.inf else f", a quota of {quota:g}"
    found += f"; one rank takes {rank}"
    if usable == 1 < there:
        return Found(
            "warning", found,
            "give more: --cpus-per-task (Slurm), --cpus (Docker), limits.cpu (Kubernetes), taskset",
        )  # fmt: skip
    return Found("ok", found)


def check_other_processes() -> Found:
    """Measures how busy other processes keep the cores, for a moment."""
    before = cpu_times()
    time.sleep(_BUSY_SECONDS)
    after = cpu_times()
    others = (after.busy - before.busy) - (after.own - before.own)
    part = max(0.0, others / (_BUSY_SECONDS * len(describe_cores()[2])))
    found = f"they took {min(part, 1):.0%} of the cores for a moment"
    if part > _BUSY:
        return Found("warning", found, "end them, or expect slower steps and rates; see top")
    return Found("ok", found)


def check_memory() -> Found:
    import torch

    fields = dict(line.split(":") for line in _MEMORY_INFO.read_text(encoding="utf-8").splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    free = free_memory(torch.device("cpu"))
    found = f"{total / _GB:.1f} GB in the machine, {free / _GB:.1f} GB free for this process"
    fix = "end other programs, raise the limit of the container (docker --memory, Slurm --mem)"
    if free < _LITTLE_MEMORY:
        return Found("fault" if free < _LEAST_MEMORY else "warning", found, fix)
    return Found("ok", found)


def check_shared_memory() -> Found:
    if not os.access(_SHARED_MEMORY, os.W_OK):
        return Found(
            "fault", f"{_SHARED_MEMORY} is not there or cannot be written: worker processes fail",
            f"mount a tmpfs at {_SHARED_MEMORY} that all users can write (mode 1777)",
        )  # fmt: skip
    usage = shutil.disk_usage(_SHARED_MEMORY)
    found = f"{usage.free / _GB:.2g} of {usage.total / _GB:.2g} GB free"
    if usage.free < _LITTLE_SHARED_MEMORY:
        return Found(
            "warning", f"{found}: NCCL may fail with several ranks",
            "docker run --shm-size=8g (or --ipc=host); remove left files",
        )  # fmt: skip
    return Found("ok", found)


def check_limits() -> Found:
    from unicl_fast.distributed.rendezvous import FILES_BESIDE_SOCKETS

    limit = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        for name in ("NOFILE", "NPROC", "AS", "DATA", "FSIZE", "MEMLOCK")
    }
    endless = resource.RLIM_INFINITY
    files = limit["NOFILE"][1]
    processes = min([limit["NPROC"][0] % 2**64, *_limits_on_processes()])  # endless is -1
    low = []
    if files != endless and files < FILES_BESIDE_SOCKETS:
        low.append((f"{files:,} open files", f"ulimit -Hn {2 * FILES_BESIDE_SOCKETS}"))
    if processes < _FEW_PROCESSES:
        fix = f"ulimit -u {2 * _FEW_PROCESSES}, docker --pids-limit"
        low.append((f"{processes:,} processes and threads", fix))
    for name, what, option in (
        ("AS", "bytes of address space", "-v"),
        ("DATA", "bytes of data", "-d"),
        ("FSIZE", "bytes a file", "-f"),
    ):
        if limit[name][0] != endless:
            low.append((f"{limit[name][0]:,} {what}", f"ulimit {option} unlimited"))
    if (_DEVICES / "infiniband").is_dir() and limit["MEMLOCK"][0] != endless:
        low.append((f"{limit['MEMLOCK'][0]:,} bytes locked", "ulimit -l unlimited"))
    if low:
        allowed = ", ".join(what for what, _ in low)
        return Found("warning", f"at most {allowed}", "; ".join(fix for _, fix in low))
    return Found("ok", f"open files {'unlimited' if files == endless else format(files, ',')}")


def _limits_on_processes() -> list[int]:
    """Limits on processes and threads of the control groups around this process."""
    found = []
    for folder in (*control_groups(), *control_groups("pids")):
        with contextlib.suppress(OSError, ValueError):  # the root has none; "max"
            found.append(int((folder / "pids.max").read_text(encoding="utf-8")))
    return found


def check_network() -> Found:
    """Finds the interfaces that ranks would take, and tries the loopback one."""
    from unicl_fast.distributed.rendezvous import address_towards_rank_0, interface_with

    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        return Found("fault", f"nothing listens on 127.0.0.1: {error}", "ip link set lo up")
    names = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not _names_interface(wanted, names, exact=variable[0] == "G"):
            fix = f"unset {variable}, or name one of {', '.join(names)}"
            return Found("fault", f"{variable}={wanted} is no interface here", fix)
    rank_0 = os.environ.get("MASTER_ADDR")
    if rank_0 and not _resolves(rank_0):
        fix = "name the address of rank 0's machine in MASTER_ADDR"
        return Found("fault", f"MASTER_ADDR={rank_0} has no address", fix)
    gloo = os.environ.get("GLOO_SOCKET_IFNAME") or interface_with(address_towards_rank_0())
    nccl = os.environ.get("NCCL_SOCKET_IFNAME", "its own choice")
    found = f"{', '.join(names)}; gloo takes {gloo}, NCCL {nccl}"
    host = socket.gethostname()
    if gloo is None:
        return Found("warning", found, "name an interface in GLOO_SOCKET_IFNAME")
    if not _resolves(host):
        return Found(
            "warning", f"{found}; the host's name {host}, which torchrun needs, has no address",
            f"add it to /etc/hosts: 127.0.1.1 {host}",
        )  # fmt: skip
    return Found("ok", found)


def _names_interface(wanted: str, names: list[str], *, exact: bool) -> bool:
    """Whether NCCL's `eth,^docker`, `=eth0` or gloo's list of names leave an interface."""
    excludes = wanted.startswith("^")
    exact = exact or wanted.lstrip("^").startswith("=")
    asked = [one.partition(":")[0] for one in wanted.lstrip("^=").split(",")]
    hits = [n for n in names if any(n == a if exact else n.startswith(a) for a in asked)]
    if exact and not excludes and wanted[0] != "=":  # gloo takes each of them
        return set(asked) <= set(names)
    return len(hits) < len(names) if excludes else bool(hits)


def _resolves(name: str) -> bool:
    """Whether a host name has an address; a name server that does not answer counts as none."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        pool.submit(socket.getaddrinfo, name, None).result(timeout=_RESOLVING_SECONDS)
    except (OSError, UnicodeError, concurrent.futures.TimeoutError):
        return False
    finally:
        pool.shutdown(wait=False)
    return True


def check_clock() -> Found:
    """Compares the clock with the files of this program, and asks the kernel whether it is set."""
    now = time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    fix = "start a time service (timedatectl set-ntp true), on the host of a container"
    if now + 60 < Path(__file__).stat().st_mtime:
        return Found("fault", f"{found} is before this program was installed", fix)
    if _clock_state() == _CLOCK_ERROR:
        return Found(
            "warning", f"{found}; nothing sets the clock: object stores refuse requests that are "
            "15 minutes off", fix,
        )  # fmt: skip
    return Found("ok", found)


def _clock_state() -> int:
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))  # asks only
    except (OSError, AttributeError):  # another C library
        return 0


CHECKS = [
    Check("NVIDIA driver", check_driver),
    Check("CPU", check_cpu),
    Check("bf16", check_bf16, needs=("torch",)),
    Check("cores", check_cores),
    Check("other processes", check_other_processes),
    Check("memory", check_memory, needs=("torch",)),
    Check("/dev/shm", check_shared_memory),
    Check("limits", check_limits, needs=("torch",)),
    Check("network", check_network, needs=("torch",)),
    Check("clock", check_clock),
]
