"""Freed memory stays in the process once that is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from unicl_fast.system.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(40_000_000, dtype=np.uint8)[::4096] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


RETURNING = """
from pathlib import Path
from unicl_fast.system.host_memory import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

assert keep_freed_memory()
texts = [bytes(1000) for _ in range(100_000)]
held = bytes(1000)
del texts
kept = resident()
return_freed_memory()
print(kept - resident())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@glibc
def test_what_is_free_can_be_given_back_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", RETURNING], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 80_000_000


@glibc
def test_a_large_block_is_reused_instead_of_fetched_anew() -> None:
    faults = {}
    for mode in ("plain", "keep"):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
        )
        faults[mode] = int(result.stdout)
    assert faults["keep"] < faults["plain"] / 10
