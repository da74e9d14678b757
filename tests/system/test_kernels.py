"""What Numba keeps of our kernels is used as long as all that they are made of is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import pytest

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
from lowest import inlined
from unicl_fast.system.kernels import kernel

@kernel
def called(x):
    return inlined(x) * {called}
"""
UPPER = """
from constants import FACTOR, Place
from lower import called
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
from upper import in_c, number

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
from closures import adder

for word in sys.argv[1:]:
    value = ctypes.c_int64(0)
    add = adder(int(word))
    add.ctypes(ctypes.byref(value))
    print(value.value, add.cache_hits)
"""


def write(folder: Path, **changes: int) -> None:
    values = {"factor": 2, "first": 3, "inlined": 10, "called": 7, **changes}
    for name, text in (("constants", CONSTANTS), ("lowest", LOWEST), ("lower", LOWER)):
        (folder / f"{name}.py").write_text(text.format(**values))


def run(folder: Path, program: str, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_a_change_in_another_module_compiles_anew_and_nothing_else_does(tmp_path: Path) -> None:
    """Results of both functions of `upper`; then what came from the disk: ours, Numba's, C's."""
    write(tmp_path)
    (tmp_path / "upper.py").write_text(UPPER)
    (tmp_path / "plain.py").write_text(PLAIN)
    assert run(tmp_path, PROGRAM) == "157 157\n0 0 0\n"
    assert run(tmp_path, PROGRAM) == "157 157\n1 1 1\n"
    for change, result in (
        ({"factor": 4}, 11 * 7 * 4 + 3),
        ({"first": 5}, 11 * 7 * 2 + 5),
        ({"inlined": 20}, 21 * 7 * 2 + 3),
        ({"called": 9}, 11 * 9 * 2 + 3),
    ):
        write(tmp_path, **change)
        assert run(tmp_path, PROGRAM) == f"{result} {result}\n0 1 0\n", change


def test_closures_kept_by_different_processes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "closures.py").write_text(CLOSURES)
    assert run(tmp_path, ADD, "1") == "1 0\n"
    assert run(tmp_path, ADD, "2") == "2 0\n"
    assert run(tmp_path, ADD, "1", "2") == "1 1\n2 1\n"
    assert run(tmp_path, ADD, "2", "1") == "2 1\n1 1\n"


@pytest.mark.skipif(
    not hasattr(numba.config, "CACHE_LOCATOR_CLASSES"), reason="this Numba cannot be told"
)
def test_where_numba_is_told_to_look_elsewhere_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_LOCATOR_CLASSES", "InTreeCacheLocator")
    (tmp_path / "closures.py").write_text(CLOSURES)
    assert run(tmp_path, ADD, "1") == "1 0\n"
    assert run(tmp_path, ADD, "1") == "1 0\n"
