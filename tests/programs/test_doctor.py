"""`unicl-doctor`: its rows, its output, and each check."""

import os
import shutil
import signal
import sys
from importlib import metadata
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from program_runs import call, refusal_of, run

from unicl_fast.system import kernels
from unicl_fast.system.installation import install_command
from unicl_fast.tools.convert import __main__ as convert
from unicl_fast.tools.doctor import __main__ as doctor
from unicl_fast.tools.doctor import machine, software
from unicl_fast.tools.doctor.rows import Found, run_checks
from unicl_fast.tools.evaluate import __main__ as evaluate

_DOCS = Path(__file__).parents[2] / "docs"
_SOUND = Found("ok", "sound")
Patch = pytest.MonkeyPatch


def patch(target: Patch, where: Any, **values: object) -> None:
    for name, value in values.items():
        target.setattr(where, name, value)


def assert_found(found: Found, state: str, text: str) -> None:
    """A row has a state, and its finding or its remedy contains a text."""
    assert found.state == state
    assert text in f"{found.found} {found.fix}"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: Patch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NO_COLOR", *machine._THREADS):
        monkeypatch.delenv(name, raising=False)


def raises() -> Found:
    raise KeyError("no such field")


def ends() -> Found:
    os.kill(os.getpid(), signal.SIGTERM)
    return _SOUND


def sound() -> Found:
    return _SOUND


def test_checks_that_fail_are_faults_and_the_others_run():
    rows = dict(run_checks({"first": sound, "raises": raises, "ends": ends, "last": sound}))
    assert list(rows) == ["first", "raises", "ends", "last"]
    assert rows["first"] == rows["last"] == _SOUND
    assert_found(rows["raises"], "fault", "the check failed: KeyError('no such field')")
    assert_found(rows["ends"], "fault", "crashed (SIGTERM)")
    rows = dict(run_checks({"blocks": signal.pause}, seconds=0.5))
    assert_found(rows["blocks"], "fault", "did not end within 0.5 s")


@pytest.mark.parametrize(("state", "code"), [("warning", 0), ("fault", 1)])
def test_the_exit_code_is_1_with_a_fault_and_rows_say_their_state_and_no_secret(
    monkeypatch, capsys, state, code
):
    rows = {"data set": Found(state, "\x1b[2J https://user:secret@host/x", "do it"), "next": _SOUND}
    patch(monkeypatch, doctor, run_checks=lambda _: rows.items())
    with pytest.raises(SystemExit) as ended:
        call(doctor)
    assert ended.value.code == code
    text = capsys.readouterr().out
    assert text.startswith(f"{state.upper():8}data set")
    assert "-> do it" in text
    assert f"{code} fault{'' if code else 's'}, {1 - code} warning" in text
    assert "\x1b" not in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (doctor, ""), (convert, "hf x y"), (evaluate, "retrieval --checkpoint x --data y"),
    ],
)  # fmt: skip
def test_a_current_folder_that_was_removed_is_a_sentence(monkeypatch, tmp_path, program, words):
    """MKL would end the process when torch is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "cd ~" in refusal_of(program, *words.split())


def test_every_row_is_explained_in_the_documentation():
    page = (_DOCS / "reliability.md").read_text()
    assert not [name for name in doctor.CHECKS if f"`{name}`" not in page]


@pytest.mark.slow
def test_the_program_runs_here_and_without_a_home(monkeypatch):
    """This machine trains, so nothing here is a fault."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    shown = run("doctor").stdout
    assert [name for name in doctor.CHECKS if name not in shown] == []
    assert "WARNING Numba kernels" in shown
    assert "WARNING disks" in shown


def test_torch_that_cannot_be_imported_is_a_fault(monkeypatch):
    assert software.check_torch().state == "ok"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert_found(software.check_torch(), "fault", "torchvision")


def test_torch_without_a_gpu_matters_only_next_to_an_nvidia_device(monkeypatch, tmp_path):
    monkeypatch.setattr(software, "_DEVICES", tmp_path)
    patch(monkeypatch, torch.cuda, device_count=lambda: 0)
    assert_found(software.check_torch(), "ok", "the CPU computes")
    (tmp_path / "nvidia0").touch()
    assert_found(software.check_torch(), "fault", "python -m torch.utils.collect_env")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_found(software.check_torch(), "warning", "unset CUDA_VISIBLE_DEVICES")


def test_a_device_that_does_not_compute_is_a_fault(monkeypatch):
    patch(monkeypatch, torch.cuda, device_count=lambda: 1, get_device_name=lambda index: "H100")
    monkeypatch.setattr(software, "obstacle_to_triton", lambda index, oldest: "")
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: real(size))
    monkeypatch.setattr(software, "untried_versions", lambda: "nobody has tried torch 9")
    assert_found(software.check_torch(), "warning", "H100; nobody has tried torch 9 `uv sync")
    monkeypatch.setattr(software, "untried_versions", lambda: "")
    assert_found(software.check_torch(), "ok", "; H100")
    monkeypatch.setattr(software, "obstacle_to_triton", lambda index, oldest: "Triton is missing")
    assert_found(software.check_torch(), "warning", "Triton is missing: no fused kernels")
    fails = mock.Mock(side_effect=RuntimeError("no kernel image is available"))
    monkeypatch.setattr(torch, "ones", fails)
    assert_found(software.check_torch(), "fault", "no kernel image is available")


@pytest.mark.dali
def test_dali_decodes_or_is_a_fault(monkeypatch):
    assert software.check_dali().state == "ok"
    two = [SimpleNamespace(name=f"nvidia-dali-cuda{n}") for n in (110, 120)]
    monkeypatch.setattr(metadata, "distributions", lambda: two)
    assert_found(software.check_dali(), "fault", "overwrite each other")
    monkeypatch.setattr(metadata, "distributions", list)
    monkeypatch.setattr(software, "_decode", lambda graph, running, name: 1 / (name != "WebP"))
    assert_found(software.check_dali(), "fault", "does not decode WebP: ")


def test_without_dali_the_fault_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "unicl_fast.pipelines.graph", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    import unicl_fast.pipelines

    monkeypatch.delattr(unicl_fast.pipelines, "graph", raising=False)
    found = software.check_dali()
    assert_found(found, "fault", "which is not installed here")
    assert found.fix.startswith(f"{install_command('cuda12')}, or ")


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path)
    assert software.check_kernels().state == "ok"
    private = tmp_path / f"unicl_fast-{os.getuid()}"
    monkeypatch.setattr(software.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(kernels, "cache_folder", lambda: private)
    assert_found(software.check_kernels(), "warning", "lasting folder")
    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    assert_found(software.check_kernels(), "warning", "compiles its kernels again")
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert software.check_kernels().state == "fault"


def test_one_core_of_many_is_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    patch(monkeypatch, machine, cpu_quota=lambda: inf, usable_cores=lambda: 8)
    assert machine.check_cores() == ("ok", "64 in the machine, 8 for this process", "")
    patch(monkeypatch, machine, cpu_quota=lambda: 1.0, usable_cores=lambda: 1)
    assert_found(machine.check_cores(), "warning", "a quota of 1 more: --cpus-per-task")


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    """MKL limits torch to two threads of OMP_NUM_THREADS=64; other libraries use them all."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert_found(machine.check_threads(), "ok", "2 threads for 2 cores")
    for value in ("2", "2,4", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert machine.check_threads().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    found = machine.check_threads()
    assert_found(found, "warning", "OMP_NUM_THREADS=64, OPENBLAS_NUM_THREADS=3 for 2 cores")
    assert found.fix == "unset OMP_NUM_THREADS OPENBLAS_NUM_THREADS"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # torch does not see a quota
    assert_found(machine.check_threads(), "warning", "export OMP_NUM_THREADS=2")


@pytest.fixture
def roomy(monkeypatch: Patch) -> SimpleNamespace:
    """Says how much room every disk has."""
    usage = SimpleNamespace(total=10**12, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return usage


def test_shared_memory_of_docker(monkeypatch, tmp_path, roomy):
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path)
    assert machine.check_shared_memory().state == "ok"
    roomy.free = roomy.total = 64 << 20
    assert_found(machine.check_shared_memory(), "warning", "--shm-size")
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path / "none")
    assert machine.check_shared_memory().state == "fault"


def test_folders_that_are_full_or_read_only(monkeypatch, tmp_path, roomy):
    below = tmp_path / "not" / "there"
    assert machine.check_folder(below).state == "ok"
    roomy.free = 10**9
    assert_found(machine.check_folder(below), "warning", "make room, or use another")
    roomy.total = 0
    assert_found(machine.check_folder(below), "warning", "cannot be written")
    roomy.total, roomy.free = 10**12, 0
    assert machine.check_folder(below).state == "fault"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_found(machine.check_folder(below), "warning", "cannot be written")


def test_folders_that_a_user_may_lack(monkeypatch, tmp_path, roomy):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    assert machine.check_disks().state == "ok"
    status = SimpleNamespace(f_files=0, f_favail=0, f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    assert_found(machine.check_disks(), "warning", "noexec")
    fails = mock.Mock(side_effect=FileNotFoundError("No usable temporary directory found"))
    monkeypatch.setattr(machine.tempfile, "gettempdir", fails)
    assert machine.check_disks().state == "fault"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    assert_found(machine.check_disks(), "warning", "no home")
