"""Finds missing waits between streams, on a GPU that is not there.

Work of a queue (a stream, a communicator, the host) is done in its order; two queues are ordered
only by what the host has done before it launches, by events, by waiting for a collective and by
synchronizing. Each queue has a vector clock: of every queue, the last work that is surely done
before its next. Work that reads memory must know of the last write, work that writes it of all uses
before. Freed memory goes to later work of the stream that it was made on, which must know of other
queues' uses, unless they were recorded (`record_stream`).

The host is one queue: threads run where they are started. As on the first NCCLs, a collective keeps
no tensor alive. DDP's own waiting, which is C++, is at the end of the backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_gpu import GPU, tensors_in, written_by
from fake_ranks import fake_ranks, group_of
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import unicl_fast
from unicl_fast import batch
from unicl_fast.distributed import ranks
from unicl_fast.distributed.ranks import Ranks

_ASK = ranks._begin_maximum_on_gpu  # `fake_ranks` has another
HOST, COMPUTE = "the host", "the compute stream"
_OURS = str(Path(unicl_fast.__file__).parent)
_CALLS_FOR_US = ("distributed_c10d.py", "c10d_logger.py", "contextlib.py", "happens_before.py")
Clock = Counter[str]
"""The number of the last known work, by queue."""


def _name(code: CodeType) -> str:
    return code.co_qualname.replace(".<locals>", "")


def _callers() -> list[CodeType]:
    """The code that calls into torch or the checker, and its callers."""
    frame: Any = sys._getframe(1)
    while frame and frame.f_code.co_filename.endswith(_CALLS_FOR_US):
        frame = frame.f_back
    found = []
    while frame:
        found.append(frame.f_code)
        frame = frame.f_back
    return found


class _Memory:
    """A storage, and who uses it; work is named by its queue, number and operator."""

    def __init__(self, tensor: Tensor, owner: str) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())  # its address stays taken
        self.owner, self.pinned = owner, False
        self.written: tuple[str, int, str] | None = None
        self.reads: dict[str, tuple[int, str]] = {}
        """The last of each queue since it was written."""
        self.uses: dict[str, tuple[int, str]] = {}
        """The last of each queue."""
        self.recorded: set[str] = set()
        self.number: int | None = None
        """Its value, if it is an integer that is followed on its way back to the host."""


class Checker(TorchDispatchMode):
    """Collects in `faults` what is not ordered; the wait called `without` does nothing."""

    def __init__(self, *, without: str = "") -> None:
        super().__init__()
        self.faults: list[str] = []
        self.waits: Counter[str] = Counter()
        """How often each wait of the package was met."""
        self.clocks: defaultdict[str, Clock] = defaultdict(Counter)
        self.stream = _Stream(name=COMPUTE)
        self._without = without
        self._memory: dict[int, _Memory] = {}
        self._shared: dict[int, _Memory] = {}
        """Memory that others than its owner have used."""
        self._freed: defaultdict[str, list[tuple[str, int, str]]] = defaultdict(list)
        """What others than its owner did last with memory that is free."""
        self._works: list[_Work] = []
        self._buckets: list[_Work] = []
        self.sent: list[Tensor] = []
        """By the collective that was just begun."""
        self._depth, self._backward = 0, torch.autograd.backward

    def __enter__(self) -> Checker:
        _Stream.checker = _Event.checker = self
        self._stack = contextlib.ExitStack()
        patches = {
            "torch.cuda.Stream": _Stream,  # torch asks what is one
            "torch.cuda.Event": _Event,
            "torch.cuda.stream": self._within,
            "torch.cuda.current_stream": lambda *_: self.stream,
            "torch.cuda.reset_peak_memory_stats": lambda *_: None,
            "torch.Tensor.record_stream": lambda *given: self._record(*given),
            "torch.autograd.backward": self._back_propagate,
            "unicl_fast.batch.ThreadPoolExecutor": _Inline,
            "unicl_fast.distributed.ranks._begin_maximum_on_gpu": _ASK,
        }
        for name, replacement in patches.items():
            self._stack.enter_context(mock.patch(name, replacement))
        for cached in (batch._copies_to, ranks._stream_of_numbers):
            cached.cache_clear()
            self._stack.callback(cached.cache_clear)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._stack.close()

    def waits_for(self, what: str) -> bool:
        """Notes a wait; returns whether it is to be done."""
        caller, *callers = _callers()
        if not caller.co_filename.startswith(_OURS):
            return True  # torch's
        ours = (_name(code) for code in callers if code.co_filename.startswith(_OURS))
        wait = f"{what} in {_name(caller)} for {next(ours, 'a test')}"
        self.waits[wait] += 1
        return wait != self._without

    def learn(self, queue: str, clock: Clock) -> None:
        self.clocks[queue] |= clock

    @contextlib.contextmanager
    def _within(self, stream: _Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def _back_propagate(self, *given: Any, **options: Any) -> None:
        self._depth += 1
        self._backward(*given, **options)
        self._depth -= 1
        while self._buckets and not self._depth:
            self.learn(self.stream.name, self._buckets.pop().clock)

    def _record(self, tensor: Tensor, stream: _Stream) -> None:
        if self.waits_for("record_stream"):
            self._of(tensor).recorded.add(stream.name)

    def _read(self, function: Callable[[Tensor], Any], tensor: Tensor) -> Any:
        """The host reads a number: one that was followed or is constant, or else 0."""
        self._launch(self.stream.name if tensor.is_cuda else HOST, "item", reads=[tensor])
        if tensor.is_cuda:
            self.learn(HOST, self.clocks[self.stream.name])
            return 0
        if (number := self._of(tensor).number) is not None:
            return number
        with contextlib.suppress(DataDependentOutputException):
            return function(tensor)
        return 0

    def _of(self, tensor: Tensor) -> _Memory:
        key = tensor.untyped_storage()._cdata
        if key not in self._memory:
            owner = self.stream.name if tensor.device.type == "cuda" else HOST
            self._memory[key] = _Memory(tensor, owner)
        return self._memory[key]

    def _launch(
        self, queue: str, name: str, *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()
    ) -> None:
        """Begins work of a queue, which knows what the host knows."""
        self.learn(queue, self.clocks[HOST])
        clock = self.clocks[queue]
        clock[queue] += 1
        work = clock[queue], name
        written = {id(one): one for one in map(self._of, writes)}
        for key, memory in (written | {id(one): one for one in map(self._of, reads)}).items():
            earlier = [memory.written] if memory.written else []
            if key in written:
                earlier += [(other, *use) for other, use in memory.reads.items()]
            for other, number, what in earlier:
                if clock[other] < number:
                    does = "writes" if key in written else "reads"
                    self._say(f"{name} on {queue} {does} what {what} on {other} may still use")
            if key in written:
                memory.written, memory.reads = (queue, *work), {}
            else:
                memory.reads[queue] = work
            memory.uses[queue] = work
            if queue != memory.owner:
                self._shared[key] = memory

    def _find_freed(self) -> None:
        """Pinned memory is left out: torch keeps it until its copies are done."""
        for key in [key for key, memory in self._shared.items() if memory.ref.expired()]:
            memory = self._shared.pop(key)
            unsafe = {*memory.uses} - memory.recorded - {memory.owner}
            if memory.owner != HOST:
                self._freed[memory.owner] += [(one, *memory.uses[one]) for one in unsafe]

    def _allocate(self, stream: str) -> None:
        """A stream may get any memory of its own that was freed before, for work from now on."""
        known = self.clocks[stream] | self.clocks[HOST]
        for queue, number, name in self._freed.pop(stream, []):
            if known[queue] < number:
                self._say(f"{stream} gets memory again that {name} on {queue} may still use")

    def _say(self, fault: str) -> None:
        ours = [_name(code) for code in _callers() if code.co_filename.startswith(_OURS)]
        self.faults.append(f"{fault} ({' < '.join(ours[:3])})")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, self.sent = kwargs or {}, []
        self._find_freed()
        name = function._schema.name.partition("::")[2]
        if function.namespace == "prim":  # a question about a tensor
            return function(*args, **kwargs)
        if function.namespace == "c10d":
            return self._collective(name, args)
        if name == "_pin_memory":
            return self._pin(args[0])
        if name == "_local_scalar_dense":
            return self._read(function, args[0])
        inputs = tensors_in((args, kwargs))
        known = {one.untyped_storage()._cdata for one in inputs}
        pinned = bool(kwargs.pop("pin_memory", False))
        result = function(*args, **kwargs)
        made = [one for one in tensors_in(result) if one.untyped_storage()._cdata not in known]
        if any(one.device.type == "cuda" for one in made):
            self._allocate(self.stream.name)
        for one in made if pinned else ():
            self._of(one).pinned = True
        writes = [*written_by(function._schema, args, kwargs), *made]
        if name in ("copy_", "_to_copy"):
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            self._copy(name, source=inputs[-1], target=writes[0], waits=waits)
        elif writes:  # others are views
            on_device = [one for one in (*inputs, *writes) if one.device.type == "cuda"]
            if on_device:  # kernels get numbers of the host as arguments
                inputs = [one for one in inputs if one.device.type == "cuda"]
            queue = self.stream.name if on_device else HOST
            self._launch(queue, name, reads=inputs, writes=writes)
        return result

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._launch(HOST, "pin_memory", reads=[tensor], writes=[pinned])
        memory, value = self._of(pinned), getattr(tensor, "constant", None)
        memory.pinned = True
        if value is not None and value.numel() == 1:
            with unset_fake_temporarily():
                memory.number = int(value)
        return pinned

    def _copy(self, name: str, *, source: Tensor, target: Tensor, waits: bool) -> None:
        stream, sent, received = self.stream.name, self._of(source), self._of(target)
        received.number = sent.number
        kinds = source.device.type, target.device.type
        received.pinned |= name == "_to_copy" and kinds == ("cuda", "cpu") and not waits
        if "cuda" not in kinds:
            self._launch(HOST, name, reads=[source], writes=[target])
            return
        if kinds == ("cpu", "cuda") and not sent.pinned:  # read before the call returns
            self._launch(HOST, name, reads=[source])
        self._launch(
            stream,
            name,
            reads=[source] if sent.owner != HOST or sent.pinned else [],
            writes=[target],
        )
        if kinds == ("cuda", "cpu") and (waits or not received.pinned):
            self.learn(HOST, self.clocks[stream])

    def _collective(self, name: str, args: tuple) -> Any:
        first, second = (tensors_in(one) for one in (*args, ())[:2])
        group = next(found for found in map(group_of, args) if found)
        if first[0].device.type == "cpu":
            return args[0], self._begin(Clock(), [])
        queue = f"communicator {group}"
        self.learn(queue, self.clocks[self.stream.name])
        self._launch(queue, name, reads=second, writes=first)
        return args[0], self._begin(self.clocks[queue].copy(), first)

    def _begin(self, clock: Clock, tensors: list[Tensor]) -> Any:
        self._works.append(_Work(self, clock))  # C++ would not keep it
        self.sent = tensors
        return self._works[-1].boxed()


class _Stream:
    """A CUDA stream."""

    checker: Checker
    device, numbers = GPU, itertools.count(1)

    def __init__(self, *_: object, name: str = "", **options: object) -> None:
        self.name = name or f"stream {next(self.numbers)}, of {_name(_callers()[0])}"

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def wait_event(self, event: _Event) -> None:
        if self.checker.waits_for("wait_event"):
            self.checker.learn(self.name, event.clock)

    def wait_stream(self, other: _Stream) -> None:
        if self.checker.waits_for("wait_stream"):
            self.checker.learn(self.name, self.checker.clocks[other.name])


class _Event:
    """A CUDA event."""

    checker: Checker

    def __init__(self, **options: object) -> None:
        self.clock = Clock()

    def record(self, stream: _Stream | None = None) -> _Event:
        self.clock = self.checker.clocks[(stream or self.checker.stream).name].copy()
        return self

    def synchronize(self) -> None:
        if self.checker.waits_for("synchronize"):
            self.checker.learn(HOST, self.clock)

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Work(dist.Work):
    """A collective that was begun."""

    def __init__(self, checker: Checker, clock: Clock) -> None:
        super().__init__()
        self._checker, self.clock = checker, clock

    def wait(self, timeout: object = None) -> bool:
        if self.clock and self._checker.waits_for("work.wait"):
            self._checker.learn(self._checker.stream.name, self.clock)
        return True

    def get_future(self) -> torch.futures.Future:
        """Only DDP asks for it, as soon as it has sent a bucket."""
        self._checker._buckets.append(self)
        future = torch.futures.Future()
        future.set_result(self._checker.sent)
        return future


def _make_mesh(*given: Any) -> Any:
    with unset_fake_temporarily():
        return init_device_mesh(*given)


@contextlib.contextmanager
def ranks_on_gpus(world_size: int) -> Iterator[Ranks]:
    """`fake_ranks` for tensors that have no values, which DDP and numbers of the host would read.

    What ranks tell each other is what this one says.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::broadcast_", "Meta"):
        pytest.skip(f"collectives of torch {torch.__version__} know no tensors without values")
    said: list[Any] = []

    def to_bytes(value: Any) -> Tensor:
        said.append(value)
        return torch.empty(1, dtype=torch.uint8)

    functions = {
        "torch.nn.parallel.distributed._verify_param_shape_across_processes": lambda *_: None,
        "torch._C._distributed_c10d.Reducer._rebuild_buckets": lambda _: False,
        # times the step by events of CUDA, if torch was built for it
        "torch._C._distributed_c10d.Reducer.prepare_for_forward": lambda _: None,
        "torch._C._distributed_c10d.Logger.set_runtime_stats_and_log": lambda _: None,
        "torch.cuda.current_device": lambda: 0,
        "unicl_fast.models.sharding.init_device_mesh": _make_mesh,
        "unicl_fast.distributed.ranks._to_bytes": to_bytes,
        "unicl_fast.distributed.ranks._from_bytes": lambda _: said[-1],
        "unicl_fast.distributed.ranks._gather_on_host": lambda mine, at: [mine] * at.world_size,
    }
    with fake_ranks(world_size) as place, contextlib.ExitStack() as stack:
        for name, replacement in functions.items():
            stack.enter_context(mock.patch(name, replacement))
        yield place


class _Inline(contextlib.nullcontext):
    """In place of an executor with a thread."""

    def __init__(self, **_: object) -> None:
        super().__init__(self)

    def submit(self, job: Callable[[], Any]) -> Future:
        future = Future()
        future.set_result(job())
        return future
