"""Kernels that are kept on disk are used as long as all that they are made of is the same."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from trunk_table import files_of, imports_of, module_of

from unicl_fast.system import kernels

CONSTANTS = """
import enum

FACTOR = {factor}

class Place(enum.IntEnum):
    FIRST = {first}
"""
LOWEST = """
from unicl_fast.system.kernels import kernel

@kernel(inline="always")
def inlined(x):
    return x + {inlined}
"""
LOWER = """
from unicl_fast.lowest import inlined
from unicl_fast.system.kernels import kernel

@kernel
def called(x):
    return inlined(x) * {called}
"""
UPPER = """
from unicl_fast.constants import FACTOR, Place
from unicl_fast.lower import called
from numba import carray, types
from unicl_fast.system.kernels import c_function, kernel

@kernel
def number(x):
    return called(x) * FACTOR + Place.FIRST

@c_function(types.CPointer(types.int64))
def in_c(x):
    carray(x, 1)[0] = number(x[0])
"""
PLAIN = """
from numba import njit

@njit(cache=True)
def plain(x):
    return x + 1
"""
PROGRAM = """
import ctypes
from plain import plain
from unicl_fast.upper import in_c, number

value = ctypes.c_int64(1)
in_c.ctypes(ctypes.byref(value))
plain(1)
print(number(1), value.value)
print(*(sum(one.stats.cache_hits.values()) for one in (number, plain)), in_c.cache_hits)
"""
CLOSURES = """
from numba import carray, types
from unicl_fast.system.kernels import c_function

def adder(summand):
    @c_function(types.CPointer(types.int64))
    def add(x):
        carray(x, 1)[0] += summand
    return add
"""
ADD = """
import ctypes, sys
from unicl_fast.closures import adder

for word in sys.argv[1:]:
    value = ctypes.c_int64(0)
    add = adder(int(word))
    add.ctypes(ctypes.byref(value))
    print(value.value, add.cache_hits)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package `unicl_fast` with kernels of its own, and the real module that compiles them."""
    folder = tmp_path / "code" / "unicl_fast"
    (folder / "system").mkdir(parents=True)
    for name in ("__init__", "system/__init__", "training/__init__"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text("")
    shutil.copy(kernels.__file__, folder / "system")
    write(folder)
    (folder / "upper.py").write_text(UPPER)
    (folder / "closures.py").write_text(CLOSURES)
    (folder.parent / "plain.py").write_text(PLAIN)
    return folder


def write(package: Path, **changes: int) -> None:
    values = {"factor": 2, "first": 3, "inlined": 10, "called": 7, **changes}
    for name, text in (("constants", CONSTANTS), ("lowest", LOWEST), ("lower", LOWER)):
        (package / f"{name}.py").write_text(text.format(**values))


def run(package: Path, program: str, *words: str, **environment: str) -> str:
    cache = package.parents[1] / "cache"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA")}
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=package.parent,
        # without bytecode: Python takes a file's old one if its second and its size are equal
        env=clean | {"XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_change_in_what_a_kernel_is_made_of_compiles_anew_and_nothing_else_does(package):
    """Prints the results of both kernels of `upper`; then cache hits: ours, Numba's, C's."""
    (package / "other.py").write_text("RATE = 1")
    assert run(package, PROGRAM) == "157 157\n0 0 0\n"
    (package / "other.py").write_text("RATE = 2")  # a file that `upper` does not import
    assert run(package, PROGRAM) == "157 157\n1 1 1\n"
    write(package, factor=4)
    assert run(package, PROGRAM) == "311 311\n0 1 0\n"
    write(package, first=5, inlined=20, called=9)
    assert run(package, PROGRAM) == "383 383\n0 1 0\n"
    assert run(package, PROGRAM) == "383 383\n1 1 1\n"


def test_a_file_s_key_follows_what_it_imports_directly_or_not(package, monkeypatch):
    def file_of(name: str) -> Path | None:
        path = package / f"{name.removeprefix('unicl_fast.').replace('.', '/')}.py"
        return path if path.is_file() else None

    def keys(**changes: int) -> list[str]:
        write(package, **changes)
        kernels._read.cache_clear()
        names = ("upper", "lower", "lowest", "closures")
        return [kernels._hash_code(f"unicl_fast.{name}", package / f"{name}.py") for name in names]

    monkeypatch.setattr(kernels, "_file_of", file_of)
    first = keys()
    of_factor, of_inlined = keys(factor=4), keys(inlined=4)
    assert [a == b for a, b in zip(first, of_factor, strict=True)] == [False, True, True, True]
    assert [a == b for a, b in zip(first, of_inlined, strict=True)] == [False, False, False, True]
    assert keys() == first


def test_no_import_of_a_file_is_missed():
    """In no file, since any of them may come to hold a constant of a kernel."""
    for file in files_of("unicl_fast", "pipelines"):
        module = module_of(file)
        own = {name for name in imports_of(file) if kernels._file_of(name)}
        assert own <= kernels._read(module, file)[1], file
        assert kernels._file_of(module) == file


@pytest.mark.slow
def test_closures_kept_by_different_processes_are_told_apart(package):
    assert run(package, ADD, "1") == "1 0\n"
    assert run(package, ADD, "2") == "2 0\n"
    assert run(package, ADD, "1", "2") == "1 1\n2 1\n"
    assert run(package, ADD, "2", "1") == "2 1\n1 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("taken_by", ["a link", "a folder that others can write"])
def test_where_others_can_write_kernels_are_compiled_anew_and_it_is_said_once(
    package, tmp_path, taken_by
):
    (tmp_path / "file").touch()
    private = tmp_path / "tmp" / f"unicl_fast-{os.getuid()}"
    private.parent.mkdir()
    if taken_by == "a link":
        private.symlink_to(tmp_path)
    else:
        private.mkdir()
        private.chmod(0o777)
    homeless = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(private.parent)}
    for hits in ("0 0 0", "0 1 0"):  # Numba keeps `plain` beside its file
        said = run(package, PROGRAM, **homeless)
        assert said.startswith(f"157 157\n{hits}\n")
        assert said.count("set NUMBA_CACHE_DIR") == 1


def test_the_folder_is_this_user_s_alone_and_only_the_last_used_versions_stay(
    tmp_path, monkeypatch, caplog
):
    above, file = tmp_path / "cache" / "unicl_fast" / "numba", tmp_path / "closures.py"
    file.write_text(CLOSURES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    choices = mock.Mock(CACHE_LOCATOR_CLASSES="", CACHE_DIR="")
    monkeypatch.setattr(kernels, "_config", choices)
    assert kernels.cache_folder.__wrapped__() == above
    assert above.stat().st_mode & 0o077 == 0
    for number in range(12):
        for name in ("closures", "upper"):
            (above / f"unicl_fast.{name}-{number}").mkdir()
            os.utime(above / f"unicl_fast.{name}-{number}", (number, number))
    made = kernels.folder_of.__wrapped__(above, "unicl_fast.closures", str(file))
    left = sorted(above.glob("unicl_fast.closures-*"), key=lambda folder: folder.stat().st_mtime)
    assert [folder.stat().st_mtime for folder in left[:-1]] == list(range(5, 12))
    assert left[-1] == made
    assert len(list(above.glob("unicl_fast.upper-*"))) == 12
    above.chmod(0o777)
    assert kernels.cache_folder.__wrapped__() == tmp_path / f"unicl_fast-{os.getuid()}"
    assert "can be written by other users" in caplog.text
    choices.CACHE_LOCATOR_CLASSES = "InTreeCacheLocator"  # Numba then looks elsewhere
    assert kernels.cache_folder.__wrapped__() is None
