"""Freed memory is used again, and never while somebody looks at it."""

import gc
import platform
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from unicl_fast.system.machine import HostBuffers

SHAPE = (4, 300, 300)


def test_memory_is_used_again_when_the_tensor_is_gone():
    buffers = HostBuffers()
    first = buffers.empty(SHAPE, torch.float32)
    place = first.data_ptr()
    del first
    again = buffers.empty(SHAPE, torch.float32)
    assert again.data_ptr() == place
    assert again.shape == SHAPE
    assert again.dtype == torch.float32
    assert again.is_contiguous()
    assert place % 4096 == 0


def _saved_for_backward(tensor: Tensor) -> Tensor:
    return (torch.ones(SHAPE, requires_grad=True) * tensor).sum()


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: tensor[1],
        lambda tensor: tensor.permute(2, 0, 1),
        Tensor.numpy,
        Tensor.untyped_storage,
        _saved_for_backward,
    ],
    ids=["view", "permuted", "numpy", "storage", "graph"],
)
def test_memory_is_kept_while_anything_looks_at_it(look):
    buffers = HostBuffers()
    tensor = buffers.empty(SHAPE, torch.float32)
    place = tensor.data_ptr()
    holder = look(tensor)
    del tensor
    gc.collect()
    assert buffers.empty(SHAPE, torch.float32).data_ptr() != place
    del holder
    gc.collect()
    assert buffers.empty(SHAPE, torch.float32).data_ptr() == place


def test_no_more_is_kept_than_one_spare_and_what_is_held():
    buffers = HostBuffers()
    held = [buffers.empty(SHAPE, torch.float32) for _ in range(5)]
    del held[1:]
    another = buffers.empty(SHAPE, torch.float32)
    assert len(buffers._buffers) == 3
    del held, another


def test_the_smallest_that_fits_serves_and_too_small_ones_go():
    buffers = HostBuffers()
    large, small = (buffers.empty((count, *SHAPE), torch.float32) for count in (8, 2))
    places = large.data_ptr(), small.data_ptr()
    del large, small
    assert buffers.empty(SHAPE, torch.bfloat16).data_ptr() == places[1]
    assert buffers.empty((16, *SHAPE), torch.float32).numel() == 16 * 4 * 300 * 300
    assert len(buffers._buffers) == 1
    assert buffers.empty((0, 3), torch.float32).shape == (0, 3)


def test_threads_never_get_the_same_memory():
    buffers = HostBuffers()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            tensor = buffers.empty((64, 64), torch.float32).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_user_that_goes_while_it_is_asked_for_leaves_its_memory_once():
    """Tensors are dropped by other threads, and by the collector, in the middle of a call."""
    buffers = HostBuffers()
    tensor = buffers.empty(SHAPE, torch.float32)
    ((memory, _),) = buffers._buffers
    answers = iter([tensor])
    buffers._buffers = [(memory, lambda: next(answers, None))]
    others = [buffers.empty(SHAPE, torch.float32) for _ in range(2)]
    places = [id(memory) for memory, _ in buffers._buffers]
    assert len(set(places)) == len(places)
    assert others[0].data_ptr() != others[1].data_ptr()


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
