"""A GPU that is not there: copies to it are done when a stream waits for them, and not before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from unicl_fast import batch

CUDA = torch.device("cuda", 0)


class Stream:
    """Copies that were asked for, and are done when another stream waits for an event of it."""

    def __init__(self, gpu: FakeGpu, device: torch.device = CUDA) -> None:
        self._gpu, self.device = gpu, device
        self.pending: list[Callable[[], object]] = []

    def record_event(self) -> list[Callable[[], object]]:
        with self._gpu.changed:
            self._gpu.num_events += 1
            self._gpu.changed.notify_all()
        pending, self.pending = self.pending, []
        return pending

    def wait_event(self, event: list[Callable[[], object]]) -> None:
        for copy in event:
            copy()


class FakeGpu:
    """Takes the place of torch's streams and copies; results of copies lie on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute = Stream(self)
        self.streams: list[Stream] = []
        """Those that were made beside the current one."""
        self.devices: dict[str, torch.device] = {}
        """The device that each thread has set, by the start of its name."""
        self.changed = threading.Condition()
        self.num_events = 0
        self.used_by: dict[int, Stream] = {}
        """The stream that the memory of a tensor was recorded for, by address."""
        self._current = threading.local()
        self._pinned: set[int] = set()
        self._to = torch.Tensor.to
        batch._copies_to.cache_clear()  # of another fake
        monkeypatch.setattr(torch.cuda, "Stream", self._make_stream)
        monkeypatch.setattr(torch.cuda, "set_device", self._set_device)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._stream())
        # functions, which become methods of tensors; ours are bound already
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(torch.Tensor, "to", lambda *given, **named: self._copy(*given, **named))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *given: self._record(*given))

    def wait_for_events(self, count: int) -> None:
        """Returns when so many batches are on their way; fails if they do not come."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_events >= count, timeout=120)

    def _make_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    def _set_device(self, device: torch.device) -> None:
        self.devices[threading.current_thread().name.partition("_")[0]] = device

    def _stream(self) -> Stream:
        return getattr(self._current, "stream", self.compute)

    @contextlib.contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        self._pinned.add(pinned.data_ptr())
        return pinned

    def _copy(
        self, tensor: torch.Tensor, *given: Any, non_blocking: bool = False, **named: Any
    ) -> Any:
        if not (given and isinstance(given[0], torch.device) and given[0].type == "cuda"):
            return self._to(tensor, *given, non_blocking=non_blocking, **named)
        assert non_blocking
        assert not tensor.numel() or tensor.data_ptr() in self._pinned, "the copy holds the host"
        copied = torch.full_like(tensor, 77)  # nobody may see it before the copy is done
        self._stream().pending.append(lambda: copied.copy_(tensor))
        return copied

    def _record(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.used_by[tensor.data_ptr()] = stream
