"""What Numba keeps of our kernels is used as long as all that they are made of is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOWER = """
import enum
from unicl_fast.kernels import kernel

FACTOR = {factor}

class Place(enum.IntEnum):
    FIRST = {first}

@kernel(inline="always")
def inlined(x):
    return x + {inlined}

@kernel
def called(x):
    return x * {called}
"""
UPPER = """
from numba import carray, types
from unicl_fast.kernels import c_function, kernel
from lower import FACTOR, Place, called, inlined

@kernel
def number(x):
    return called(inlined(x)) * FACTOR + Place.FIRST

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


def write(folder: Path, **changes: int) -> None:
    values = {"factor": 2, "first": 3, "inlined": 10, "called": 7, **changes}
    (folder / "lower.py").write_text(LOWER.format(**values))


def run(folder: Path) -> str:
    """What both functions of `upper` give of 1, then what came from the disk: `PROGRAM`."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_a_change_in_another_module_compiles_anew_and_nothing_else_does(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "upper.py").write_text(UPPER)
    (tmp_path / "plain.py").write_text(PLAIN)
    assert run(tmp_path) == "157 157\n0 0 0\n"
    assert run(tmp_path) == "157 157\n1 1 1\n"
    for change, result in (
        ({"factor": 4}, 11 * 7 * 4 + 3),
        ({"first": 5}, 11 * 7 * 2 + 5),
        ({"inlined": 20}, 21 * 7 * 2 + 3),
        ({"called": 9}, 11 * 9 * 2 + 3),
    ):
        write(tmp_path, **change)
        assert run(tmp_path) == f"{result} {result}\n0 1 0\n", change
