"""Runs DALI graphs: feeds them from a thread, lets them take turns, and finds what they refuse."""

import contextlib
import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from unicl_fast.config import DataConfig
from unicl_fast.system.machine import return_freed_memory, usable_cores

from .graph import NextInputs, Pipeline, files_for_dali
from .host_batches import HostBatch, Metadata

Outputs = Generator[tuple[Tensor, Metadata], None, None]
"""The images of each batch, and its metadata."""

_SMALL_BATCH_BYTES = 5_000_000  # bytes of a small batch's crops
_LARGE_BATCH_BYTES = 1_000_000_000
"""Bytes of a batch's decoded windows, before they are resized, beyond which one batch is enough."""
_SOUND_SIDE = 16  # pixels of a side of the image that any decoder accepts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How much a loader decodes at the same time."""

    threads: tuple[int, ...]
    """Decoding threads of each graph; graphs take turns."""
    ahead: int
    """Batches that each graph has ready before they are requested."""

    @property
    def batches_begun(self) -> int:
        """Batches in flight when the first one is returned."""
        return (len(self.threads) + 1) * self.ahead + 1


ONE_BY_ONE = Pace(threads=(1,), ahead=1)


def choose_pace(
    data: DataConfig, device: torch.device, *, num_images: int, window_bytes: float = 0
) -> Pace:
    """Chooses the pace of a loader whose batches have `num_images`.

    Decoders hold all windows of a batch, `window_bytes` each on average.
    """
    # Eight images of 88 megapixels take 1.1 GB, and 8.3 GB with the usual batches ahead; a stop
    # waits until the batches under way are decoded.
    is_small = 3 * num_images * data.image_size**2 <= _SMALL_BATCH_BYTES
    is_large = num_images * window_bytes >= _LARGE_BATCH_BYTES
    ahead = 1 if is_large else 4 if is_small else 2
    threads = data.threads or usable_cores()
    # Two graphs with half of the threads each, so that no thread waits for another; with one thread
    # or one batch ahead they would only take turns waiting.
    if threads == 1 or ahead == 1 or device.type != "cpu":
        return Pace(threads=(threads,), ahead=ahead)
    return Pace(threads=(-(-threads // 2), threads // 2), ahead=ahead)


class DecodingError(RuntimeError):
    """DALI failed to decode a batch, and its graph cannot be used any more."""

    def __init__(self, message: str, in_flight: Sequence[Any] = ()) -> None:
        """`in_flight`: metadata of the batches that had not come out; the first one failed."""
        super().__init__(message)
        self.in_flight = tuple(in_flight)


def decode(
    build: Callable[..., Pipeline],
    host_batches: Generator[HostBatch[Metadata], None, None],
    *,
    batch_size: int,
    device: torch.device,
    pace: Pace = ONE_BY_ONE,
) -> Outputs[Metadata]:
    """Images and metadata of every batch, in order. Close the generator to stop before the end.

    Graphs take turns: with k graphs, each gets every k-th batch. Within a graph, an operator starts
    when the previous one has done the whole batch, and threads that finish early wait; another
    graph's threads have work meanwhile.

    Tensors share DALI's memory without a copy. They stay valid as long as they are held, even when
    the graph is gone: the default executor counts references and reuses a buffer only when nobody
    holds it (a test pins that).

    `build` makes a graph, as `build_train_graph` does. `host_batches` are iterated in another
    thread, so that waiting for storage hides behind decoding, and closed at the end. `batch_size`
    is that of the largest batch; the host prepares as many batches ahead as `pace` says of graphs.

    Raises DecodingError if DALI fails at the next batch; errors of `host_batches` pass unchanged.
    """
    with (
        contextlib.closing(host_batches),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="unicl-feed") as worker,
    ):
        num_graphs = len(pace.threads)
        dealer = _Dealer(worker, host_batches, num_graphs=num_graphs, ahead=pace.ahead)
        settings = {"batch_size": batch_size, "ahead": pace.ahead}
        pipelines = [
            build(dealer.inputs_of(graph), threads=threads, **settings)
            for graph, threads in enumerate(pace.threads)
        ]
        try:
            for pipeline in pipelines:
                pipeline.build()
            return_freed_memory()
            for number in itertools.count():
                # On a GPU: ordered after DALI's work on torch's stream, without waiting for it on
                # the host; positional only in DALI 2.4.
                stream = [] if device.type == "cpu" else [torch.cuda.current_stream(device)]
                try:
                    outputs = pipelines[number % num_graphs].run(*stream)
                except StopIteration:
                    return
                except Exception as error:  # DALI's are of several types
                    if error is dealer.host_error or not dealer.in_flight:
                        raise
                    in_flight = [metadata for _, metadata in sorted(dealer.in_flight.items())]
                    raise DecodingError(str(error), in_flight) from error
                yield from_dlpack(outputs[0].as_tensor()), dealer.in_flight.pop(number)
                del outputs  # held here, the buffers could not be reused for the next batch
        finally:
            dealer.cancel()


class _Dealer(Generic[Metadata]):
    """Prepares batches ahead in a thread and deals them to graphs, which take turns."""

    def __init__(
        self,
        worker: Executor,
        host_batches: Generator[HostBatch[Metadata], None, None],
        *,
        num_graphs: int,
        ahead: int,
    ) -> None:
        self.in_flight: dict[int, Metadata] = {}
        """Metadata of batches that graphs have taken and not given back, by number."""
        self.host_error: Exception | None = None
        self._worker = worker
        self._host_batches = host_batches
        self._num_graphs = num_graphs
        self._prepared: dict[int, Future[HostBatch[Metadata] | None]] = {}
        self._num_asked_for = 0
        for _ in range(ahead):
            self._prepare_next()

    def inputs_of(self, graph: int) -> NextInputs:
        numbers = itertools.count(graph, self._num_graphs)

        def next_inputs() -> tuple[Any, ...]:
            number = next(numbers)
            while number >= self._num_asked_for:
                self._prepare_next()
            try:
                batch = self._prepared.pop(number).result()
            except Exception as error:
                self.host_error = error
                raise
            self._prepare_next()
            if batch is None:
                raise StopIteration
            self.in_flight[number] = batch.metadata
            return batch.inputs

        return next_inputs

    def _next(self) -> HostBatch[Metadata] | None:
        """The next batch, its files as DALI wants them."""
        batch = next(self._host_batches, None)
        if batch is None or not isinstance(batch.inputs[0], list):
            return batch
        first, *others = batch.inputs
        return dataclasses.replace(batch, inputs=(files_for_dali(first), *others))

    def cancel(self) -> None:
        for future in self._prepared.values():
            future.cancel()

    def _prepare_next(self) -> None:
        future = self._worker.submit(self._next)
        self._prepared[self._num_asked_for] = future
        self._num_asked_for += 1


def find_undecodable(
    build: Callable[..., Pipeline], inputs: tuple[Any, ...], *, device: torch.device
) -> dict[int, str]:
    """Finds the images of a batch that the decoder refuses, and its reasons, by row; often one.

    DALI says that a batch failed, seldom at which image. So each sample is decoded by itself, by
    the same graph (`build`) with batches of one: slow, but only after a failure. `inputs` are those
    of the graph: encoded images, two columns for the window, and more with one row a sample.

    Raises DecodingError if a sound image fails too: the device is lost, or out of memory.
    """
    reasons: dict[int, str] = {}
    start, size = 0, len(inputs[0])
    while start < size:
        one_by_one = (
            HostBatch(inputs=tuple(column[row : row + 1] for column in inputs), metadata=row)
            for row in range(start, size)
        )
        try:
            for _ in decode(build, one_by_one, batch_size=1, device=device):
                pass
            break
        except DecodingError as error:
            (row,) = error.in_flight
            reasons[row] = reason_of(error)
            start = row + 1
    if reasons:
        _, first, end_or_shape, *more = (column[:1] for column in inputs)
        window = np.zeros_like(first), np.full_like(end_or_shape, _SOUND_SIDE)
        sound = HostBatch(inputs=([_sound_image()], *window, *more), metadata=0)
        for _ in decode(build, (one for one in [sound]), batch_size=1, device=device):
            pass
    return reasons


def reason_of(error: DecodingError) -> str:
    """DALI's message without the tracebacks of the graph around it, in one line."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    text = text.partition("C++ context:")[0]
    return " ".join((text.strip() or str(error)).split()) or type(error).__name__


@functools.cache
def _sound_image() -> NDArray[np.uint8]:
    """A file that any decoder accepts."""
    file = io.BytesIO()
    Image.new("RGB", (_SOUND_SIDE, _SOUND_SIDE), (120, 130, 140)).save(file, format="JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
