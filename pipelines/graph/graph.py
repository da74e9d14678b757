"""The DALI graphs: images (encoded or not) and windows go in, uint8 [h w c] squares come out.

One definition serves both devices: on `cpu` everything runs on the host and no driver is needed,
on `cuda` decoding starts on the host and ends on the device ("mixed"), and the rest follows it.
Nothing in a graph is random; every number that shapes an image is an input (see plan.py). Images
leave as uint8 because that is a quarter of float32's bytes; `unicl_fast.models.precision`
normalises them. Which bytes go in, and what becomes of the outputs, is left to feed.py and
loader.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from unicl_fast.config import DataConfig, Resample

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline as Pipeline
    from nvidia.dali.pipeline import pipeline_def
except ImportError as error:
    raise ImportError(
        "the data pipeline runs on NVIDIA DALI, which is not installed here; "
        "install it with: pip install nvidia-dali-cuda120 (it runs without a GPU too)"
    ) from error

from unicl_fast.system.machine import cores_of_this_rank

from .augment import augment
from .augment_parts import GraphParts
from .fused_operators import augment_operator, resample_operator

Source = Callable[[], tuple[Any, ...]]
"""Gives the inputs of one batch; raises StopIteration behind the last one."""

Images = Literal["files", "pixels", "squares"]

_SMALL_BATCH_BYTES = 5_000_000
"""Of its squares."""
# DALI widens these filters when it shrinks an image (antialias=True); linear is then the
# triangular filter that Pillow and torchvision call bilinear.
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def build_train_graph(
    source: Source,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    images: Images = "files",
    augmentation: GraphParts | None = None,
) -> Pipeline:
    """Decode the window, resample it to a square, mirror it, augment it.

    Args:
        source: gives encoded images as a list of uint8 arrays, window starts (row, column) int32
            [b 2], window shapes (height, width) int32 [b 2], flips int32 [b 1], integers int64
            [b k], and, where there is augmentation, its rows float32 [b m]. With `images` as
            pixels the first is uint8 [b h w 3]; as squares, uint8 [b size size 3], and windows and
            flips are not given.
        data: what a square looks like, what makes it, in how many threads and how far ahead.
        batch_size: most samples of a batch.
        device: where images end up.
        images: what the source gives: files, decoded images, or squares that are made of those.
        augmentation: what the sources need (see `augment_parts.parts_for`); None does without.

    Returns:
        A pipeline with two outputs: images uint8 [b h w c] and the integers, both on `device`.
    """
    fused = is_fused(data.resample, device)

    def define() -> tuple[Any, Any]:
        first, *cuts, integers, rows = _training_inputs(
            source, images=images, has_rows=augmentation is not None
        )
        squares = first
        if images != "squares":
            starts, shapes, flips = cuts
            squares = _resampled(
                decode_windows(first, starts, shapes, data=data, device=device, images=images),
                flips,
                data=data,
                fused=fused,
            )
        if augmentation is not None:
            if fused:
                fill = types.Constant(list(augmentation.fill), dtype=types.UINT8)
                squares = augment_operator(data.image_size)(squares, rows, fill)
            else:
                squares = augment(squares, rows, augmentation)
        return squares, _on_device(integers, device)

    build = pipeline_def(define, enable_conditionals=augmentation is not None and not fused)
    return build(**_pipeline_settings(data, batch_size, device))


def _training_inputs(source: Source, *, images: Images, has_rows: bool) -> list[Any]:
    """Nodes of what a source gives; the last is None where there is no augmentation."""
    first = (types.UINT8, 1 if images == "files" else 3, "" if images == "files" else "HWC")
    kinds = [first, (types.INT64, 1, "")]
    if images != "squares":
        kinds[1:1] = [(types.INT32, 1, "")] * 3
    if has_rows:
        kinds.append((types.FLOAT, 1, ""))
    nodes = fn.external_source(
        source,
        num_outputs=len(kinds),
        batch=True,
        dtype=[dtype for dtype, _, _ in kinds],
        ndim=[ndim for _, ndim, _ in kinds],
        layout=[layout for _, _, layout in kinds],
    )
    return [*nodes, *[None] * (not has_rows)]


def decode_windows(
    first: Any,
    starts: Any,
    shapes: Any,
    *,
    data: DataConfig,
    device: torch.device,
    images: Images,
) -> Any:
    """What is seen of each image, uint8 [h w c] of its own size."""
    if images == "pixels":
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
        **_decoder_settings(data, device),
    )


def _resampled(windows: Any, flips: Any, *, data: DataConfig, fused: bool) -> Any:
    """Squares, mirrored where they should be."""
    if fused:
        start, end = (types.Constant([edge] * 2, dtype=types.FLOAT) for edge in (0.0, math.inf))
        return resample_operator(data.image_size, data.interpolation)(windows, start, end, flips)
    # One operator for resampling and mirroring: 5 to 10 % faster on the CPU than two.
    return fn.resize_crop_mirror(
        windows,
        size=[data.image_size] * 2,
        crop=[data.image_size] * 2,
        mirror=fn.squeeze(flips, axes=0),
        interp_type=_FILTERS[data.interpolation],
        antialias=True,
    )


def build_evaluation_graph(
    source: Source,
    *,
    data: DataConfig,
    batch_size: int,
    device: torch.device,
) -> Pipeline:
    """Decode the whole image and resample its central region to a square.

    Args:
        source: gives encoded images as a list of uint8 arrays, and region starts and ends
            float32 [b 2] from `crop.central_windows`; batches may be smaller than `batch_size`.
        data: as for `build_train_graph`.
        batch_size: most samples of a batch.
        device: where images end up.

    Returns:
        A pipeline with one output: images uint8 [b h w c] on `device`.
    """
    pipeline = Pipeline(**_pipeline_settings(data, batch_size, device))
    with pipeline:
        encoded, starts, ends = fn.external_source(
            source,
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.FLOAT],
            ndim=[1, 1, 1],
        )
        whole = fn.decoders.image(
            encoded,
            output_type=types.RGB,
            adjust_orientation=False,
            **_decoder_settings(data, device),
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


def decoding_threads(threads: int) -> int:
    """Decoding threads of this rank: as given, or (0) one for each of its cores."""
    return threads or cores_of_this_rank()


def batches_ahead(data: DataConfig, batch_size: int) -> int:
    """What `data.prefetch` means for batches of so many images."""
    is_small = 3 * batch_size * data.image_size**2 <= _SMALL_BATCH_BYTES
    return data.prefetch or (4 if is_small else 2)


def shares_of_threads(data: DataConfig, device: torch.device) -> list[DataConfig]:
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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "images were to be decoded on a GPU, but this machine has no usable CUDA driver; "
            "set run.device=cpu, or check the driver with nvidia-smi"
        )
    return {
        "batch_size": batch_size,
        "num_threads": decoding_threads(data.threads),
        "device_id": _device_index(device),
        "prefetch_queue_depth": batches_ahead(data, batch_size),
    }


def _device_index(device: torch.device) -> int | None:
    """DALI's name of a device: None is the host."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _decoder_settings(data: DataConfig, device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    height, width = data.decoder_hint
    return {
        "device": "mixed",
        "hw_decoder_load": data.hw_decoder_load,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
    }


def _on_device(node: Any, device: torch.device) -> Any:
    """Sends an input along to the device, a batch ahead of its use."""
    return node if device.type == "cpu" else node.gpu()
