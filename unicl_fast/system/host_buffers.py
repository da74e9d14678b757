"""Large tensors on the host whose memory is used again as soon as nobody holds them.

A batch of images in fp32 is made and dropped at every step. From the heap it costs more than its
size: what is allocated meanwhile lands in the hole that the last one has left, the next one finds
no place there, and some three times its size stay with the process unused.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_SPARE = 1
"""Free buffers kept beside the one handed out: for who holds two at times and one at others."""


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
