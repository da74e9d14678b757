"""The input of a training step, the loaders that provide it, and its way to a GPU.

The data pipeline and the trainer share nothing else. Axes in the whole project:

    b  samples of this rank in one step      n  samples of all ranks (the global batch)
    u  distinct texts of this rank           d  embedding dimension
    l  context length in tokens              c h w  image channels, height, width
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The distinct texts of a local batch."""

    tokens: Tensor
    """int64 [u l]: token rows, padded with 0 to the context length; or stored features of a frozen
    text encoder, [u w] of its type (`efficiency.stored_features`)."""
    lengths: NDArray[np.int64]
    """int64 [u]: tokens of each row without padding; on the host, since they decide shapes."""
    index: Tensor
    """int64 [b]: the row of `tokens` for each image."""
    counts: Tensor
    """int64 [u]: how many samples of this batch have each text; they sum to b."""
    weights: Tensor | None = None
    """float32 [u]: the sum of these samples' `Batch.weights`."""
    max_num_texts: Callable[[], int] | None = None
    """The largest u of all ranks, if they have exchanged it ahead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Classes of images and texts, as mapped by the objective (`Objective.map_targets`).

    A text is a positive of an image if its class id is the image's, or one of several. Ids are any
    int64; `objectives.targets.map_targets` says how they are found, and why ranks agree on them.
    """

    class_ids: Tensor
    """int64 [b]: the class of each image."""
    text_class_ids: Tensor
    """int64 [u]: the class of each text."""
    image_classes: Tensor | None = None
    """int64 [2 e]: for every class of an image, its sample, 0 to b - 1, and the class: `class_ids`
    and other labels, each once. Texts of all of them are positives. None if the objective does not
    use all labels."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's local batch: images, distinct texts, and the classes of both."""

    step: int
    """The optimizer step, counted from 0."""
    images: Tensor
    """uint8 [b h w c], RGB; or stored features of a frozen image encoder, [b w] of its type
    (`efficiency.stored_features`)."""
    texts: Texts
    targets: Targets
    weights: Tensor | None = None
    """float32 [b]: the weight of each sample in the loss (`data.sample_weights`); None if equal."""
    global_index: Tensor
    """int64 [b]: global index of each sample, 0 to n - 1. Drop path is keyed on it."""
    sample_ids: Tensor | None = None
    """int64 [b] on the host: each sample's row in its data set, for the records."""
    scheduled_ids: Tensor | None = None
    """int64 [b] on the host: the planned rows; they differ from `sample_ids` if a bad sample was
    replaced by another of the same data set."""
    source_ids: Tensor | None = None
    """int64 [b] on the host: the number of each sample's data set."""

    @property
    def batch_size(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with the model's inputs on `device`; records stay on the host."""
        inputs = _moved(_tensors(self, _INPUTS), device)
        texts = dataclasses.replace(self.texts, **_moved(_tensors(self.texts), device))
        targets = dataclasses.replace(self.targets, **_moved(_tensors(self.targets), device))
        return dataclasses.replace(self, texts=texts, targets=targets, **inputs)

    def model_inputs(self) -> dict[str, Tensor]:
        """The tensors that `to` moves, by name."""
        return _tensors(self, _INPUTS) | _tensors(self.texts) | _tensors(self.targets)


_INPUTS = ("images", "weights", "global_index")


def _tensors(fields: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    names = [field.name for field in dataclasses.fields(fields)] if names is None else names
    values = {name: getattr(fields, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    return {name: send(value, device) for name, value in tensors.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationBatch:
    """Images to encode, and their rows in the data set."""

    images: Tensor
    """uint8 [b h w c], RGB."""
    sample_ids: Tensor
    """int64 [b] on the host."""

    def to(self, device: torch.device) -> EvaluationBatch:
        """The same batch with the images on `device`."""
        return dataclasses.replace(self, images=send(self.images, device))

    def model_inputs(self) -> dict[str, Tensor]:
        """The fields that `to` moves, by name."""
        return {"images": self.images}


class ReadingTime:
    """How long a loader's threads waited for storage, excluding work such as checksums."""

    def __init__(self, *, decodes_files: bool = True) -> None:
        """Starts at zero; `decodes_files` tells encoded images from raw ones."""
        self.decodes_files = decodes_files
        self.num_threads = 1
        """Threads that may read at the same time."""
        self.blocked_seconds = 0.0
        """Summed over threads."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts the time inside, in any thread, less the thread's CPU time, as reading."""
        computed, begun = time.thread_time(), time.perf_counter()
        yield
        passed = time.perf_counter() - begun - (time.thread_time() - computed)
        with self._lock:
            self.blocked_seconds += passed


@runtime_checkable
class Loader(Protocol):
    """Feeds a trainer.

    It releases a batch before it requests the next one, on several ranks before the one after that.
    """

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yields the batches of steps `start_step`, `start_step + 1`, ... without end."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class EvaluationLoader(Protocol):
    """Feeds an evaluation: over all ranks, each sample of a data set once per iteration."""

    def __iter__(self) -> Iterator[EvaluationBatch]: ...


class ListLoader:
    """A loader that repeats batches from memory."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        if not batches:
            raise ValueError("a ListLoader needs at least one batch")
        self._batches = batches

    def batches(self, start_step: int) -> Iterator[Batch]:
        for step in itertools.count(start_step):
            yield dataclasses.replace(self._batches[step % len(self._batches)], step=step)

    def close(self) -> None:
        pass


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device without blocking the host.

    CUDA copies from other than pinned memory block. torch caches pinned memory, and does not
    reuse a buffer while a copy reads it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


AnyBatch = TypeVar("AnyBatch", Batch, EvaluationBatch)


@functools.cache
def _copies_to(device: torch.device) -> torch.cuda.Stream:
    """One stream for all copies to a device: torch's allocator keeps freed memory per stream."""
    return torch.cuda.Stream(device)


def copied_ahead(
    batches: Generator[AnyBatch, None, None], device: torch.device
) -> Generator[AnyBatch, None, None]:
    """Yields host batches on a CUDA device; the next one is copied during the step on this one.

    A thread draws, pins and copies a batch as soon as the one before it is yielded, on a stream for
    which the device's current stream waits. The host waits only for the batch to be made, never for
    the device, which holds two batches or three. Closing the generator closes `batches`.
    """
    copies = _copies_to(device)

    def copy_next() -> tuple[AnyBatch, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            return batch.to(device), copies.record_event()

    with (
        contextlib.closing(batches),
        ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="unicl-copy",
            # threads start on GPU 0, where pinning memory would use half a gigabyte
            initializer=torch.cuda.set_device,
            initargs=(copies.device,),
        ) as thread,
    ):
        coming = thread.submit(copy_next)
        while (found := coming.result()) is not None:
            coming = thread.submit(copy_next)
            batch, is_copied = found
            compute = torch.cuda.current_stream(device)
            compute.wait_event(is_copied)
            for tensor in batch.model_inputs().values():
                # the memory belongs to the copy stream, which would otherwise reuse it once the
                # host releases it, under kernels that are still to read it
                tensor.record_stream(compute)
            del found, tensor
            yield batch
            del batch  # held here, its memory could not be reused


class OneIterator:
    """The part of a loader that has one iterator of batches at a time, and ends it."""

    _running: Generator[Batch, None, None] | None = None

    def close(self) -> None:
        """Ends the iterator, its threads and buffers; batches that are still held stay valid."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _begin(
        self, batches: Generator[Batch, None, None], *, copies_to: torch.device | None
    ) -> Iterator[Batch]:
        """Ends the last iterator and returns the next, whose batches are copied to a GPU if any."""
        self.close()
        self._running = batches if copies_to is None else copied_ahead(batches, copies_to)
        return self._running
