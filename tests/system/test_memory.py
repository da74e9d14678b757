"""Freed memory is used again, until it is given back."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from unicl_fast.system.machine import keep_freed_memory, resident_bytes, return_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(40_000_000, dtype=np.uint8)[::4096] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
texts = [bytes(1000) for _ in range(100_000)]
held = bytes(1000)
del texts
kept = resident_bytes()
return_freed_memory()
print(kept - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_large_block_is_reused_until_what_is_free_is_given_back():
    found = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
        ).stdout.split()
        for mode in ("plain", "keep")
    ]
    assert int(found[1][0]) < int(found[0][0]) / 10
    assert int(found[1][1]) > 80_000_000
