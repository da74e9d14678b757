"""Runs DALI graphs, or none, over batches prepared on the host, and hands out torch tensors.

What DALI cannot carry (numbers the host must know without reading the device, names for messages)
walks beside it: graphs give their batches in the order in which they took them. Batches are
prepared by one thread, ahead of the decoding, so that waiting for storage hides behind it. What a
batch holds, and which image of one that fails is to blame, is the loaders' business.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..graph.graph import Pipeline, Source
from .host_memory import return_freed_memory

Facts = TypeVar("Facts")
Outputs = Generator[tuple[list[Tensor], Facts], None, None]
"""What comes out of each batch, and what was remembered about it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch(Generic[Facts]):
    """What one run of a graph takes, and what is remembered about it meanwhile."""

    inputs: tuple[Any, ...]
    facts: Facts


class DecodingError(RuntimeError):
    """DALI could not make images of a batch, and its graph is of no more use."""

    def __init__(self, message: str, in_flight: Sequence[Any] = ()) -> None:
        """`in_flight`: facts of the batches that had not come out, the one that failed first."""
        super().__init__(message)
        self.in_flight = tuple(in_flight)


def run_graphs(
    builds: Sequence[Callable[[Source], Pipeline]],
    host_batches: Iterator[HostBatch[Facts]],
    *,
    device: torch.device,
    ahead: int,
) -> Outputs[Facts]:
    """Outputs and facts of every batch, in order. Close the generator to stop before the end.

    Graphs take turns: of k graphs each gets every k-th batch. Within one, an operator begins when
    the one before has done the whole batch, and threads that are done early wait; another graph's
    have work meanwhile.

    Tensors share DALI's memory without a copy. They stay valid as long as they are held, even when
    the graph is gone: the default executor counts references and reuses a buffer only when nobody
    looks at it (a test pins that).

    Args:
        builds: each makes a graph around a source.
        host_batches: what to feed; runs in another thread.
        device: where the graphs' outputs lie.
        ahead: batches prepared before they are asked for, beside those that graphs prefetch.

    Raises:
        DecodingError: DALI failed at the batch that was to come out next. Whatever `host_batches`
            raises comes as it is.
    """
    prepared: collections.deque[Future[HostBatch[Facts] | None]] = collections.deque()
    waiting: list[collections.deque[HostBatch[Facts] | None]] = [
        collections.deque() for _ in builds
    ]
    in_flight: dict[int, Facts] = {}
    host_error: Exception | None = None
    num_taken = 0
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="unicl-feed") as worker:

        def prepare_next() -> None:
            prepared.append(worker.submit(next, host_batches, None))

        def deal() -> None:
            """Gives the next batch to the graph whose turn it is."""
            nonlocal host_error, num_taken
            try:
                batch = prepared.popleft().result()
            except Exception as error:
                host_error = error
                raise
            waiting[num_taken % len(builds)].append(batch)
            if batch is not None:
                in_flight[num_taken] = batch.facts
            num_taken += 1
            prepare_next()

        def source_of(lane: int) -> Source:
            def source() -> tuple[Any, ...]:
                while not waiting[lane]:
                    deal()
                batch = waiting[lane].popleft()
                if batch is None:
                    raise StopIteration
                return batch.inputs

            return source

        for _ in range(ahead):
            prepare_next()
        pipelines = [build(source_of(lane)) for lane, build in enumerate(builds)]
        try:
            for pipeline in pipelines:
                pipeline.build()
            return_freed_memory()
            for number in itertools.count():
                try:
                    outputs = _run(pipelines[number % len(pipelines)], device)
                except StopIteration:
                    return
                except Exception as error:  # DALI's are of several types
                    if error is host_error or not in_flight:
                        raise
                    lost = [in_flight[place] for place in sorted(in_flight)]
                    raise DecodingError(str(error), lost) from error
                yield (
                    [from_dlpack(output.as_tensor()) for output in outputs],
                    in_flight.pop(number),
                )
                del outputs  # held here, the buffers could not be reused for the next batch
        finally:
            for future in prepared:
                future.cancel()


def run_without_graph(
    make_group: Callable[[int], Sequence[HostBatch[Facts]]],
    starts: Iterator[int],
    *,
    workers: int,
    ahead: int,
) -> Outputs[Facts]:
    """As `run_graphs` on the CPU, where nothing is left for a graph to do: inputs are the outputs.

    Args:
        make_group: some consecutive batches, complete; called in several threads at once.
        starts: what to call it with, in order; without end.
        workers: threads.
        ahead: groups prepared before they are asked for.
    """
    ready: collections.deque[Future[Sequence[HostBatch[Facts]]]] = collections.deque()
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="unicl-feed") as pool:
        try:
            for start in itertools.islice(starts, ahead):
                ready.append(pool.submit(make_group, start))
            while True:
                group = ready.popleft().result()
                ready.append(pool.submit(make_group, next(starts)))
                for batch in group:
                    yield [torch.from_numpy(array) for array in batch.inputs], batch.facts
        finally:
            for future in ready:
                future.cancel()


def _run(pipeline: Pipeline, device: torch.device) -> Any:
    if device.type == "cpu":
        return pipeline.run()
    # Ordered after DALI's work on torch's stream, without waiting for it on the host.
    return pipeline.run(torch.cuda.current_stream(device))  # positional only in DALI 2.4
