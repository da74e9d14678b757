"""The proof that timed work was done on a GPU.

One more call runs under the profiler: its kernels must take a good part of the measured time, the
rest of which is waiting for launches, and its results must lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

_LEAST_BUSY = 0.1
"""Least part of the time that kernels must take. Small batches in eager mode leave the GPU idle for
more than half of it, work on the CPU for all of it."""


class NotOnDeviceError(RuntimeError):
    """Work that was to be timed on a GPU was not done there."""


def busy_part(name: str, work: Callable[[], object], *, seconds: float) -> float:
    """The part of a call's `seconds` in which kernels ran; it returns tensors, in any nesting.

    Raises NotOnDeviceError where hardly any kernel ran, or the results lie elsewhere.
    """
    results: list[object] = []

    def call() -> None:
        results.append(work())

    # the profiler starts its service at the first use in a process, which may be too late
    kernels = kernel_seconds(call) or kernel_seconds(call)
    places = {getattr(leaf, "device", None) for leaf in tree_leaves(results)}
    found = {place.type if isinstance(place, torch.device) else "no tensor" for place in places}
    reasons = {
        f"its results are on {', '.join(sorted(found)) or 'no device'}": found != {"cuda"},
        f"kernels ran in {kernels:.2e} of {seconds:.2e} s": kernels < _LEAST_BUSY * seconds,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise NotOnDeviceError(f"{name} was not done on the GPU: {'; '.join(wrong)}")
    return kernels / seconds


def kernel_seconds(work: Callable[[], object]) -> float:
    """Seconds that the device's kernels take in one call, without copies from and to the host."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    seconds: float = sum(
        event.time_range.elapsed_us() / 1e6
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
        and not getattr(event, "is_user_annotation", False)
        and not any(copy in event.name for copy in ("HtoD", "DtoH"))
    )
    return seconds
