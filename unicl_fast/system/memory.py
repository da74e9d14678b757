"""Keeps freed memory in the process, because getting it anew costs more than filling it.

glibc takes every block above 32 MB (less at first) from the kernel and gives it back when it is
freed. The kernel clears each page at its first touch: writing a fresh float32 batch of 64 images
(38 MB) took 19 ms here, writing one that was there 2 ms, and a training step on the CPU that
touched 30,000 fresh pages took 1.4 times the CPU time of one that touched none.

Threads allocate from several arenas, and what is free in one is of no use to the others: where it
is kept for good, glibc's eight arenas a core held 40 MB more beside the loader than one a core.

Large batches have memory of their own (`HostBuffers`). From the heap a batch that is made and
dropped at every step costs more than its size: what is allocated meanwhile lands in the hole that
the last one has left, and some three times its size stay with the process unused.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unicl_fast.system.machine import usable_cores

if TYPE_CHECKING:  # programs set glibc up before they import torch
    import torch
    from torch import Tensor

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1
_SPARE = 1
"""Free buffers kept beside the one handed out: for who holds two at times and one at others."""


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
    choices = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: usable_cores()}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in choices.items())


class HostBuffers:
    """Gives tensors and takes their memory back without being told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[tuple[mmap.mmap, Callable[[], object]]] = []
        """Memory, and what gives its user as long as there is one."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, contiguous, on the CPU, and at the start of a page.

        Its memory is used again by a later call when the tensor, all views of it and all graphs
        that saved it are gone. Until then the process keeps it: calls are what frees buffers that
        are too small or too many. For large ones: each takes whole pages.
        """
        import torch

        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            # each user is asked once: one that went between two questions would be both, and its
            # memory be given to two
            asked = [(memory, user, user() is not None) for memory, user in self._buffers]
            held = [(memory, user) for memory, user, is_held in asked if is_held]
            free = [memory for memory, _, is_held in asked if not is_held]
            fitting = sorted((each for each in free if len(each) >= num_bytes), key=len)
            memory, *others = fitting or [_take(max(1, num_bytes))]
            # a tensor keeps the array alive that it was made of, so when that is gone, so is it
            array = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
            spare = [(each, lambda: None) for each in others[:_SPARE]]
            self._buffers = [*held, (memory, weakref.ref(array)), *spare]
            return torch.from_numpy(array).view(dtype).view(*shape)


def _take(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # an advice only: some systems have no name for it, some kernels and sandboxes refuse it
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
