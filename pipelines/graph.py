"""DALI's graphs: images and crop windows go in, uint8 [b h w c] crops come out.

One definition serves both devices: on `cpu` everything runs on the host and no driver is needed, on
`cuda` decoding starts on the host and ends on the device ("mixed"). Nothing in a graph is random:
every number that shapes an image is an input (see plan/). Images leave as uint8, a quarter of
float32's bytes; `unicl_fast.models.precision` normalises them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from unicl_fast.config import DataConfig, Resample
from unicl_fast.system.installation import install_command

try:
    from nvidia.dali import fn, types
    from nvidia.dali.backend import TensorCPU, TensorListCPU
    from nvidia.dali.pipeline import Pipeline as Pipeline
    from nvidia.dali.pipeline import pipeline_def
except ImportError as error:
    raise type(error)(
        "the data pipeline runs on NVIDIA DALI, which is not installed here: "
        f"{install_command('cuda12')}, or [cuda13], or [cpu] where there is no GPU"
    ) from error

from unicl_fast.system.machine import return_freed_memory

from .feed.host_batches import HostBatch, ImageForm, Metadata, decoding_threads
from .kernels.operators import GraphParts, augment, augment_operator, resample_operator

NextInputs = Callable[[], tuple[Any, ...]]
"""Gives the inputs of one batch; raises StopIteration after the last one."""
Outputs = Generator[tuple[Tensor, Metadata], None, None]
"""The images of each batch, and its metadata."""

HW_DECODER_LOAD = 0.65
"""Part of a batch's JPEGs for the hardware decoder of a GPU that has one; its cores decode the
others. DALI's default; its own benchmark on a Hopper takes 0.12 with 70 threads."""
_SMALL_BATCH_BYTES = 5_000_000
"""Bytes of a small batch's crops."""
_LARGE_BATCH_BYTES = 1_000_000_000
"""Bytes of a batch's windows, decoded and before they are resized, of which one is enough."""
_SOUND_SIDE = 16
"""Pixels of a side of the image that any decoder takes."""
# DALI widens these filters when it shrinks an image (antialias=True); linear is then the
# triangular filter that Pillow and torchvision call bilinear.
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How much a loader decodes at the same time."""

    threads: tuple[int, ...]
    """Decoding threads of each graph; graphs take turns."""
    ahead: int
    """Batches that each graph has ready before they are asked for."""

    @property
    def batches_begun(self) -> int:
        """Batches that have been begun when the first one is given."""
        return (len(self.threads) + 1) * self.ahead + 1


ONE_BY_ONE = Pace(threads=(1,), ahead=1)


def choose_pace(
    data: DataConfig, device: torch.device, *, num_images: int, window_bytes: float = 0
) -> Pace:
    """Chooses the pace of a loader whose batches have `num_images`, over all views.

    Decoders hold all windows of a batch, of `window_bytes` each on average. Images of 88 megapixels
    take 1.1 GB for eight, and 8.3 GB with the usual batches ahead (4.6 GB without); a stop waits
    until those under way are decoded. So very large ones are decoded one batch at a time.

    On the CPU two graphs have half of the threads each, so that no thread waits for another. There
    is one graph if there is one thread, or nothing is decoded ahead: two would only take turns
    waiting.
    """
    ahead = data.prefetch
    if not ahead:
        is_small = 3 * num_images * data.image_size**2 <= _SMALL_BATCH_BYTES
        is_large = num_images * window_bytes >= _LARGE_BATCH_BYTES
        ahead = 1 if is_large else 4 if is_small else 2
    threads = decoding_threads(data.threads)
    if threads == 1 or ahead == 1 or device.type != "cpu":
        return Pace(threads=(threads,), ahead=ahead)
    return Pace(threads=(-(-threads // 2), threads // 2), ahead=ahead)


def build_train_graph(
    next_inputs: NextInputs,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    threads: int = 1,
    ahead: int = 1,
    form: ImageForm = "files",
    augmentation: GraphParts | None = None,
) -> Pipeline:
    """Decode the window, resample it to a crop, flip it, augment it.

    Args:
        next_inputs: gives what `feed.host_batches.graph_inputs` makes: images, window starts (row,
            column) int32 [b 2], window shapes (height, width) int32 [b 2], flips int32 [b 1], and,
            where there is augmentation, its rows float32 [b m]. For crops, windows and flips are
            not given.
        data: the settings of crops.
        batch_size: most samples of a batch.
        device: where images end up.
        threads: decode.
        ahead: batches that are ready before they are asked for.
        form: of the images that are given.
        augmentation: what the data sets need (see `operators.parts_for`); None does without.

    Returns:
        A pipeline with one output, uint8 [b h w c] on `device`.
    """
    fused = is_fused(data.resample, device)
    kinds = _kinds_of(form) + [(types.FLOAT, 1, None)] * (augmentation is not None)

    def define() -> Any:
        crops, *others = _inputs(next_inputs, kinds)
        if form != "crops":
            starts, shapes, flips = others[:3]
            regions = decode_windows(crops, starts, shapes, device=device, form=form)
            crops = _resampled(regions, flips, data=data, fused=fused)
        if augmentation is not None:
            if fused:
                fill = types.Constant(list(augmentation.fill), dtype=types.UINT8)
                crops = augment_operator(data.image_size)(crops, others[-1], fill)
            else:
                crops = augment(crops, others[-1], augmentation)
        return crops

    build = pipeline_def(define, enable_conditionals=augmentation is not None and not fused)
    return build(**_pipeline_settings(batch_size, device, threads, ahead))


def build_decoding_graph(
    next_inputs: NextInputs,
    *,
    batch_size: int,
    device: torch.device,
    threads: int = 1,
    ahead: int = 1,
    form: ImageForm = "files",
) -> Pipeline:
    """Decode the windows and give only their shapes: for measuring what decoding costs.

    Inputs are those of `build_train_graph` without augmentation, and so are the arguments.
    """
    pipeline = Pipeline(**_pipeline_settings(batch_size, device, threads, ahead))
    with pipeline:
        first, starts, shapes, flips = _inputs(next_inputs, _kinds_of(form))
        regions = decode_windows(first, starts, shapes, device=device, form=form)
        pipeline.set_outputs(regions.shape(), flips)  # DALI warns of inputs that nothing takes
    return pipeline


def _kinds_of(form: ImageForm) -> list[tuple[Any, int, str | None]]:
    """Type, number of dimensions and layout of images and, but for crops, of their windows."""
    images = (types.UINT8, 1, None) if form == "files" else (types.UINT8, 3, "HWC")
    return [images] + [(types.INT32, 1, None)] * (0 if form == "crops" else 3)


def _inputs(next_inputs: NextInputs, kinds: Sequence[tuple[Any, int, str | None]]) -> list[Any]:
    """Nodes of the inputs, of each its type, number of dimensions and layout."""
    nodes = fn.external_source(
        next_inputs,
        num_outputs=len(kinds),
        batch=True,
        dtype=[dtype for dtype, _, _ in kinds],
        ndim=[ndim for _, ndim, _ in kinds],
        layout=[layout for _, _, layout in kinds],  # type: ignore[misc]
    )
    return list(nodes)


def decode_windows(
    first: Any,
    starts: Any,
    shapes: Any,
    *,
    device: torch.device,
    form: ImageForm,
) -> Any:
    """The window of each image, uint8 [h w c] of its own size."""
    if form == "pixels":
        # sent along to a GPU a batch ahead of its use
        pixels = first if device.type == "cpu" else first.gpu()
        return fn.slice(pixels, start=starts, shape=shapes, axis_names="HW")
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
    threads: int = 1,
    ahead: int = 1,
) -> Pipeline:
    """Decode the whole image and resample a region of it to a crop.

    `next_inputs` gives encoded images as a list of uint8 arrays, and starts and ends of regions,
    float32 [b 2], from `crop.evaluation_regions`; the rest is as for `build_train_graph`.
    """
    pipeline = Pipeline(**_pipeline_settings(batch_size, device, threads, ahead))
    with pipeline:
        kinds = [(types.UINT8, 1, None), (types.FLOAT, 1, None), (types.FLOAT, 1, None)]
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


def is_fused(resample: Resample, device: torch.device) -> bool:
    """Whether our operator resamples; a GPU's resize is DALI's."""
    return resample == "fused" and device.type == "cpu"


def _pipeline_settings(
    batch_size: int, device: torch.device, threads: int, ahead: int
) -> dict[str, Any]:
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
        "num_threads": threads,
        "device_id": device_id,
        "prefetch_queue_depth": ahead,
    }


def _decoder_settings(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    return {
        "device": "mixed",
        "jpeg_fancy_upsampling": True,  # as on the CPU; DALI's default is the nearest chroma
        "hw_decoder_load": HW_DECODER_LOAD,
    }


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
    batch_size: int,
    device: torch.device,
    pace: Pace = ONE_BY_ONE,
) -> Outputs[Metadata]:
    """Images and metadata of every batch, in order. Close the generator to stop before the end.

    Graphs take turns: of k graphs each gets every k-th batch. Within one, an operator begins when
    the one before has done the whole batch, and threads that are done early wait; another graph's
    have work meanwhile.

    Tensors share DALI's memory without a copy. They stay valid as long as they are held, even when
    the graph is gone: the default executor counts references and reuses a buffer only when nobody
    looks at it (a test pins that).

    Args:
        build: makes a graph that asks a function for its inputs, as `build_train_graph`.
        host_batches: the batches; iterated in another thread, so that waiting for storage hides
            after decoding, and closed at the end.
        batch_size: of the largest batch.
        device: where the graphs' images lie.
        pace: of the graphs; as many batches are prepared ahead of what they have ahead.

    Raises:
        DecodingError: DALI failed at the batch that was to come out next. Whatever `host_batches`
            raises comes as it is.
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
        """The next batch, its files in DALI's own form, as which it takes them at once."""
        batch = next(self._host_batches, None)
        if batch is None or not isinstance(batch.inputs[0], list):
            return batch
        first, *others = batch.inputs
        tensors = list(map(TensorCPU, first))
        files = TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]
        return dataclasses.replace(batch, inputs=(files, *others))

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

    DALI says that a batch failed, seldom at which image. So every sample is decoded by itself, by
    the same graph with room for one. That is slow (about the time of the batch on one thread, and a
    new graph after each image that fails) and happens only when a batch has failed.

    Args:
        build: makes the graph that failed, as `build_train_graph`.
        inputs: of the batch, as the graph takes them: encoded images, two corners or a corner
            and a size of the window, and more with a row a sample.
        device: where the graph's images lie.

    Raises:
        DecodingError: the decoder fails at a sound image too, so the images are not the cause (a
            device that is lost, or out of memory).
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
