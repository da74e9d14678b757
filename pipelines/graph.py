"""DALI's graphs: images and crop windows go in, uint8 [h w c] crops come out.

One definition serves both devices: on `cpu` everything runs on the host and no driver is needed,
on `cuda` decoding starts on the host and ends on the device ("mixed"), and the rest follows it. The
device is where images are decoded; the model's may be another (`data.decode_device`).
Nothing in a graph is random; every number that shapes an image is an input (see plan/). Images
leave as uint8 because that is a quarter of float32's bytes; `unicl_fast.models.precision`
normalises them. First graphs are built, then they are run over batches that `feed/` prepares; of
a batch that failed, `find_undecodable` names the images that are the cause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from unicl_fast.config import DataConfig, Resample

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline as Pipeline
    from nvidia.dali.pipeline import pipeline_def
except ImportError as error:
    raise type(error)(
        "the data pipeline runs on NVIDIA DALI, which is not installed here: "
        "pip install 'unicl_fast[cuda12]', or [cuda13], or [cpu] where there is no GPU"
    ) from error

from unicl_fast.system.machine import return_freed_memory

from .feed.host_batches import HostBatch, ImageForm, Metadata, decoding_threads
from .kernels.operators import GraphParts, augment, augment_operator, resample_operator

NextInputs = Callable[[], tuple[Any, ...]]
"""Gives the inputs of one batch; raises StopIteration after the last one."""
Outputs = Generator[tuple[list[Tensor], Metadata], None, None]
"""The output tensors of each batch, and its metadata."""

HW_DECODER_LOAD = 0.65
"""Part of a batch's JPEGs for the hardware decoder of a GPU that has one; its cores decode the
others. DALI's default; its own benchmark on a Hopper takes 0.12 with 70 threads."""
_SMALL_BATCH_BYTES = 5_000_000
"""Bytes of a small batch's crops."""
_SOUND_SIDE = 16
"""Pixels of a side of the image that any decoder takes."""
# DALI widens these filters when it shrinks an image (antialias=True); linear is then the
# triangular filter that Pillow and torchvision call bilinear.
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def build_train_graph(
    next_inputs: NextInputs,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    form: ImageForm = "files",
    augmentation: GraphParts | None = None,
) -> Pipeline:
    """Decode the window, resample it to a crop, flip it, augment it.

    Args:
        next_inputs: gives what `feed.host_batches.graph_inputs` makes: images, window starts (row,
            column) int32 [b 2], window shapes (height, width) int32 [b 2], flips int32 [b 1],
            integers int64 [b k], and, where there is augmentation, its rows float32 [b m]. For
            crops, windows and flips are not given.
        data: the settings of crops, decoding threads and batches made ahead.
        batch_size: most samples of a batch.
        device: where images end up.
        form: of the images that are given.
        augmentation: what the data sets need (see `operators.parts_for`); None does without.

    Returns:
        A pipeline with two outputs: images uint8 [b h w c] and the integers, both on `device`.
    """
    fused = is_fused(data.resample, device)
    kinds = [(types.UINT8, 1, "") if form == "files" else (types.UINT8, 3, "HWC")]
    kinds += [(types.INT32, 1, "")] * (0 if form == "crops" else 3)
    kinds += [(types.INT64, 1, "")] + [(types.FLOAT, 1, "")] * (augmentation is not None)

    def define() -> tuple[Any, Any]:
        nodes = _inputs(next_inputs, kinds) + [None] * (augmentation is None)
        first, *windows, integers, rows = nodes
        crops = first
        if form != "crops":
            starts, shapes, flips = windows
            regions = decode_windows(first, starts, shapes, data=data, device=device, form=form)
            crops = _resampled(regions, flips, data=data, fused=fused)
        if augmentation is not None:
            if fused:
                fill = types.Constant(list(augmentation.fill), dtype=types.UINT8)
                crops = augment_operator(data.image_size)(crops, rows, fill)
            else:
                crops = augment(crops, rows, augmentation)
        return crops, _on_device(integers, device)

    build = pipeline_def(define, enable_conditionals=augmentation is not None and not fused)
    return build(**_pipeline_settings(data, batch_size, device))


def build_decoding_graph(
    next_inputs: NextInputs,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    form: ImageForm = "files",
) -> Pipeline:
    """Decode the windows and give their shapes alone: for measuring what decoding costs.

    Inputs are those of `build_train_graph` without augmentation, and so are the arguments.
    """
    pipeline = Pipeline(**_pipeline_settings(data, batch_size, device))
    with pipeline:
        kinds = [(types.UINT8, 1, "") if form == "files" else (types.UINT8, 3, "HWC")]
        kinds += [(types.INT32, 1, "")] * 3 + [(types.INT64, 1, "")]
        first, starts, shapes, flips, integers = _inputs(next_inputs, kinds)
        regions = decode_windows(first, starts, shapes, data=data, device=device, form=form)
        # DALI warns of inputs that nothing takes
        pipeline.set_outputs(regions.shape(), flips, integers)
    return pipeline


def _inputs(next_inputs: NextInputs, kinds: list[tuple[Any, int, str]]) -> list[Any]:
    """Nodes of the inputs, of each its type, number of dimensions and layout."""
    nodes = fn.external_source(
        next_inputs,
        num_outputs=len(kinds),
        batch=True,
        dtype=[dtype for dtype, _, _ in kinds],
        ndim=[ndim for _, ndim, _ in kinds],
        layout=[layout for _, _, layout in kinds],
    )
    return list(nodes)


def decode_windows(
    first: Any,
    starts: Any,
    shapes: Any,
    *,
    data: DataConfig,
    device: torch.device,
    form: ImageForm,
) -> Any:
    """The window of each image, uint8 [h w c] of its own size."""
    if form == "pixels":
        return fn.slice(_on_device(first, device), start=starts, shape=shapes, axis_names="HW")
    # Only the blocks under the window are decoded. Sizes in the index are as displayed and
    # packing leaves no image with an orientation tag, so nothing may turn it here.
    return fn.decoders.image_slice(
        first,
        start=starts,
        shape=shapes,
        axis_names="HW",
        output_type=types.RGB,
        adjust_orientation=False,
        **_decoder_settings(device),
    )


def _resampled(windows: Any, flips: Any, *, data: DataConfig, fused: bool) -> Any:
    """Crops of the windows, flipped where they should be."""
    if fused:
        start, end = (types.Constant([edge] * 2, dtype=types.FLOAT) for edge in (0.0, math.inf))
        return resample_operator(data.image_size, data.interpolation)(windows, start, end, flips)
    # One operator for resampling and flipping: 5 to 10 % faster on the CPU than two.
    return fn.resize_crop_mirror(
        windows,
        size=[data.image_size] * 2,
        crop=[data.image_size] * 2,
        mirror=fn.squeeze(flips, axes=0),
        interp_type=_FILTERS[data.interpolation],
        antialias=True,
    )


def build_evaluation_graph(
    next_inputs: NextInputs,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
) -> Pipeline:
    """Decode the whole image and resample its central region to a crop.

    `next_inputs` gives encoded images as a list of uint8 arrays, and region starts and ends float32
    [b 2] from `crop.central_windows`; the rest is as for `build_train_graph`. The pipeline has one
    output: images uint8 [b h w c] on `device`.
    """
    pipeline = Pipeline(**_pipeline_settings(data, batch_size, device))
    with pipeline:
        kinds = [(types.UINT8, 1, ""), (types.FLOAT, 1, ""), (types.FLOAT, 1, "")]
        encoded, starts, ends = _inputs(next_inputs, kinds)
        whole = fn.decoders.image(
            encoded,
            output_type=types.RGB,
            adjust_orientation=False,
            **_decoder_settings(device),
        )
        if is_fused(data.resample, device):
            unflipped = types.Constant([0], dtype=types.INT32)
            operator = resample_operator(data.image_size, data.interpolation)
            images = operator(whole, starts, ends, unflipped)
        else:
            images = fn.resize(
                whole,
                size=[data.image_size] * 2,
                roi_start=starts,
                roi_end=ends,
                interp_type=_FILTERS[data.interpolation],
                antialias=True,
            )
        pipeline.set_outputs(images)
    return pipeline


def batches_ahead(data: DataConfig, batch_size: int) -> int:
    """The number of batches that `data.prefetch` means for batches of this size."""
    is_small = 3 * batch_size * data.image_size**2 <= _SMALL_BATCH_BYTES
    return data.prefetch or (4 if is_small else 2)


def split_threads(data: DataConfig, device: torch.device) -> list[DataConfig]:
    """The settings of graphs that take turns on the CPU, so that no thread waits for another.

    Two, with half of the threads each; one where there is one thread, nothing is done ahead (they
    would only take turns waiting), or a GPU does the work.
    """
    threads = decoding_threads(data.threads)
    if threads == 1 or data.prefetch == 1 or device.type != "cpu":
        return [data]
    return [dataclasses.replace(data, threads=part) for part in (-(-threads // 2), threads // 2)]


def is_fused(resample: Resample, device: torch.device) -> bool:
    """Whether our operator resamples; a GPU's resize is DALI's."""
    return resample == "fused" and device.type == "cpu"


def _pipeline_settings(data: DataConfig, batch_size: int, device: torch.device) -> dict[str, Any]:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"DALI decodes for cpu or cuda, not for {device}; set run.device")
    device_id = None  # the host
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "images were to be decoded on a GPU, but this machine has no usable CUDA driver; "
                "set run.device=cpu or data.decode_device=cpu, or check the driver with nvidia-smi"
            )
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return {
        "batch_size": batch_size,
        "num_threads": decoding_threads(data.threads),
        "device_id": device_id,
        "prefetch_queue_depth": batches_ahead(data, batch_size),
    }


def _decoder_settings(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    return {
        "device": "mixed",
        "jpeg_fancy_upsampling": True,  # as on the CPU; DALI's default is the nearest chroma
        "hw_decoder_load": HW_DECODER_LOAD,
    }


def _on_device(node: Any, device: torch.device) -> Any:
    """Sends an input along to the device, a batch ahead of its use."""
    return node if device.type == "cpu" else node.gpu()


# Running graphs.


class DecodingError(RuntimeError):
    """DALI could not make images of a batch, and its graph is of no more use."""

    def __init__(self, message: str, in_flight: Sequence[Any] = ()) -> None:
        """`in_flight`: metadata of the batches that had not come out, first the one that failed."""
        super().__init__(message)
        self.in_flight = tuple(in_flight)


def decode(
    build: Callable[..., Pipeline],
    host_batches: Generator[HostBatch[Metadata], None, None],
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
) -> Outputs[Metadata]:
    """As `run_graphs`, with graphs as `build_train_graph` makes them for these settings."""
    builds = [
        functools.partial(build, data=part, batch_size=batch_size)
        for part in split_threads(data, device)
    ]
    ahead = batches_ahead(data, batch_size)
    with contextlib.closing(host_batches):
        yield from run_graphs(builds, host_batches, device=device, ahead=ahead)


def run_graphs(
    builds: Sequence[Callable[[NextInputs], Pipeline]],
    host_batches: Iterator[HostBatch[Metadata]],
    *,
    device: torch.device,
    ahead: int,
) -> Outputs[Metadata]:
    """Outputs and metadata of every batch, in order. Close the generator to stop before the end.

    Graphs take turns: of k graphs each gets every k-th batch. Within one, an operator begins when
    the one before has done the whole batch, and threads that are done early wait; another graph's
    have work meanwhile.

    Tensors share DALI's memory without a copy. They stay valid as long as they are held, even when
    the graph is gone: the default executor counts references and reuses a buffer only when nobody
    looks at it (a test pins that).

    Args:
        builds: each makes a graph that asks a function for its inputs.
        host_batches: the batches; iterated in another thread, so that waiting for storage hides
            after decoding.
        device: where the graphs' outputs lie.
        ahead: batches prepared before they are asked for, beside those that graphs prefetch.

    Raises:
        DecodingError: DALI failed at the batch that was to come out next. Whatever `host_batches`
            raises comes as it is.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="unicl-feed") as worker:
        dealer = _Dealer(worker, host_batches, num_graphs=len(builds), ahead=ahead)
        pipelines = [build(dealer.inputs_of(graph)) for graph, build in enumerate(builds)]
        try:
            for pipeline in pipelines:
                pipeline.build()
            return_freed_memory()
            for number in itertools.count():
                # On a GPU: ordered after DALI's work on torch's stream, without waiting for it on
                # the host; positional only in DALI 2.4.
                stream = [] if device.type == "cpu" else [torch.cuda.current_stream(device)]
                try:
                    outputs = pipelines[number % len(pipelines)].run(*stream)
                except StopIteration:
                    return
                except Exception as error:  # DALI's are of several types
                    if error is dealer.host_error or not dealer.in_flight:
                        raise
                    in_flight = [metadata for _, metadata in sorted(dealer.in_flight.items())]
                    raise DecodingError(str(error), in_flight) from error
                yield (
                    [from_dlpack(output.as_tensor()) for output in outputs],
                    dealer.in_flight.pop(number),
                )
                del outputs  # held here, the buffers could not be reused for the next batch
        finally:
            dealer.cancel()


class _Dealer(Generic[Metadata]):
    """Prepares batches ahead in a thread and deals them to graphs, which take turns."""

    def __init__(
        self,
        worker: Executor,
        host_batches: Iterator[HostBatch[Metadata]],
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

    def cancel(self) -> None:
        for future in self._prepared.values():
            future.cancel()

    def _prepare_next(self) -> None:
        future = self._worker.submit(next, self._host_batches, None)
        self._prepared[self._num_asked_for] = future
        self._num_asked_for += 1


def find_undecodable(
    build: Callable[..., Pipeline],
    inputs: tuple[Any, ...],
    *,
    data: DataConfig,
    device: torch.device,
) -> dict[int, str]:
    """Finds the images of a batch that the decoder refuses, and its reasons, by row; often one.

    DALI says that a batch failed, seldom at which image. So every sample is decoded alone, by the
    same graph with room for one. That is slow (about the time of the batch on one thread, and a
    new graph after each image that fails) and happens only when a batch has failed.

    Args:
        build: makes the graph that failed, as `build_train_graph`.
        inputs: of the batch, as the graph takes them: encoded images, two corners or a corner
            and a size of the window, and more with a row a sample.
        data: the settings of the graph that failed.
        device: where the graph's outputs lie.

    Raises:
        DecodingError: the decoder fails at a sound image too, so the images are not the cause (a
            device that is lost, or out of memory).
    """
    alone = dataclasses.replace(data, threads=1, prefetch=1)
    builds = [functools.partial(build, data=alone, batch_size=1)]
    reasons: dict[int, str] = {}
    start, size = 0, len(inputs[0])
    while start < size:
        one_by_one = (
            HostBatch(inputs=tuple(column[row : row + 1] for column in inputs), metadata=row)
            for row in range(start, size)
        )
        try:
            for _ in run_graphs(builds, one_by_one, device=device, ahead=1):
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
        for _ in run_graphs(builds, iter([sound]), device=device, ahead=1):
            pass
    return reasons


def reason_of(error: DecodingError) -> str:
    """The heart of DALI's message in one line: it wraps it in tracebacks of the graph."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    text = text.partition("C++ context:")[0]
    return " ".join((text.strip() or str(error)).split()) or type(error).__name__


@functools.cache
def _sound_image() -> NDArray[np.uint8]:
    """A file that any decoder takes."""
    file = io.BytesIO()
    Image.new("RGB", (_SOUND_SIDE, _SOUND_SIDE), (120, 130, 140)).save(file, format="JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
