"""The parts of a step and their times, noted without waiting for the device.

On a GPU a border is a CUDA event on the current stream, so a part is the device's time between
borders, working or idle. `data_wait` is then the time in which the device has no batch: the host
can wait for one while the device computes. On a CPU a border is the host's clock. Parts follow each
other without a gap, so they sum to the elapsed time.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from unicl_fast.system.phases import watching_waits

Part = Literal[
    "data_wait", "forward", "loss", "backward", "communication", "optimizer", "other",
    "checkpoint", "evaluation", "checks",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)
NO_TRAINING: tuple[Part, ...] = ("checkpoint", "evaluation", "checks")
"""Parts that rates leave out; `checks` compares the weights of ranks, and settles a start."""


class StepClock:
    """Seconds of each part of each step; only reading the result of `cut` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._free: list[torch.cuda.Event] = []
        self._borders: list[tuple[Part, Any]] = []
        self._part: Part = "other"
        self._interrupted: list[Part] = []
        self.begin("other")

    def begin(self, part: Part) -> None:
        self._part = part
        self._borders.append((part, self._now()))

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Within this context, waiting for a collective of ours is `communication`.

        Transfers of DDP and of `efficiency.shard=full` overlap with forward and backward, and
        count there; updates that owners send (`optimizer`) are seen.
        """
        return watching_waits(self._note_wait)

    def cut(self) -> Callable[[], dict[Part, float]]:
        """Ends a stretch of time; returns a function that waits for the device to finish it.

        That returns the seconds of each part since the last cut; they sum to the time since then.
        """
        now = self._now()
        borders = [*self._borders, (self._part, now)]
        self._borders = borders[-1:]
        return functools.partial(self._sum, borders)

    def _sum(self, borders: Sequence[tuple[Part, Any]]) -> dict[Part, float]:
        if self._on_gpu:
            borders[-1][1].synchronize()
        sums: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        for (part, begun), (_, ended) in itertools.pairwise(borders):
            sums[part] += begun.elapsed_time(ended) / 1e3 if self._on_gpu else ended - begun
        if self._on_gpu:
            self._free += [event for _, event in borders[:-1]]
        return sums

    def _note_wait(self, begins: bool) -> None:
        if self._part in NO_TRAINING:  # these include their waiting
            return
        if begins:
            self._interrupted.append(self._part)
            self.begin("communication")
        elif self._interrupted:
            self.begin(self._interrupted.pop())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # perhaps not the current device
        return event
