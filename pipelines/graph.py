"""DALI graphs: images and crop windows go in, uint8 [b h w c] crops come out.

One definition serves both devices: on `cpu` everything runs on the host and no driver is needed; on
`cuda` decoding starts on the host and ends on the device ("mixed"). Nothing in a graph is random:
every number that shapes an image is an input (see plan/). Images leave as uint8, a quarter of
float32's bytes; `unicl_fast.models.precision` normalises them. `running.py` runs the graphs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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

from .host_batches import ImageForm
from .kernels.operators import GraphParts, augment, augment_operator, resample_operator

NextInputs = Callable[[], tuple[Any, ...]]
"""Returns the inputs of one batch; raises StopIteration after the last one."""

HW_DECODER_LOAD = 0.0
"""Part of a batch's JPEGs for the hardware decoder of a GPU that has one; its cores decode the
others. Zero until a busy H100 has passed `trial.py`: its engine ignores the order of streams, and
others saw 134 of 200 rounds corrupted (torchcodec PR 1634, vision PR 9606). DALI's default is 0.65.
"""
# DALI widens these filters when it shrinks an image (antialias=True); linear is then the
# triangular filter that Pillow and torchvision call bilinear.
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


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

    `next_inputs` gives the inputs of a `HostBatch`: images in this `form`, window
    starts (row, column) and shapes (height, width) int32 [b 2], flips int32 [b 1], and, with
    `augmentation` (`operators.parts_for`), its rows float32 [b m]; crops come without windows and
    flips. `threads` decode, and `ahead` batches are ready before they are requested.

    Returns a pipeline with one output, uint8 [b h w c] on `device`.
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


def files_for_dali(files: Sequence[NDArray[np.uint8]]) -> TensorListCPU:
    """Encoded images in DALI's own type, which a graph accepts at once instead of one by one."""
    build: Any = TensorListCPU  # DALI's stubs do not know `contiguous`
    found: TensorListCPU = build(list(map(TensorCPU, files)), contiguous=False)
    return found


def decode_windows(
    first: Any, starts: Any, shapes: Any, *, device: torch.device, form: ImageForm
) -> Any:
    """The window of each image, uint8 [h w c]; sizes differ."""
    if form == "pixels":
        # sent along to a GPU a batch ahead of its use
        pixels = first if device.type == "cpu" else first.gpu()
        return fn.slice(pixels, start=starts, shape=shapes, axis_names="HW")
    # Only the blocks under the window are decoded. Sizes in the index are as displayed and
    # packing leaves no image with an orientation tag, so nothing must rotate it here.
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
    """Crops of the windows, flipped as `flips` says."""
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
            encoded, output_type=types.RGB, adjust_orientation=False, **_decoder_settings(device)
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
