"""Keeps freed memory in the process, because getting it anew costs more than filling it.

glibc takes every block above 32 MB (less at first) from the kernel and gives it back when it is
freed. The kernel clears each page at its first touch: writing a fresh float32 batch of 64 images
(38 MB) took 19 ms here, writing one that was there 2 ms, and a training step on the CPU that
touched 30,000 fresh pages took 1.4 times the CPU time of one that touched none.

Threads allocate from several arenas, and what is free in one is of no use to the others: where it
is kept for good, glibc's eight arenas a core held 40 MB more beside the loader than one a core.
"""

from __future__ import annotations

import contextlib
import ctypes

from unicl_fast.system.machine import usable_cores

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1


def return_freed_memory() -> None:
    """Gives what is free now back to the kernel, once: what set-up needed and the loop will not.

    Where freed memory is kept, compilers and tables of texts leave 100 MB behind otherwise.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks of any size; for programs to call when they start.

    The price: the process stays as large as it ever was. Child processes made by fork inherit it.

    Returns:
        Whether the C library took it; another one than glibc is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    choices = {
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: _NEVER,
        _M_ARENA_MAX: usable_cores(),
    }
    return all(mallopt(name, value) for name, value in choices.items())
