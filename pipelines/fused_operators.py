"""Our kernels as DALI operators: resampling, and augmentation.

They run inside the graph on DALI's threads, one call a sample, without Python's lock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from unicl_fast.pipelines.augment_kernels import augment_function
from unicl_fast.pipelines.resample import resample_function


@functools.cache  # DALI compiles around the kernel for a second or two
def resample_operator(image_size: int, interpolation: str) -> Any:
    """Resamples regions of pictures to squares, mirrored or not.

    Takes pictures uint8 [h w 3], starts and ends of regions float32 [2] in pixels (rows, then
    columns; ends beyond the picture mean its end), and flips int32 [1]; gives uint8 [size size 3].
    """
    cubic = interpolation == "bicubic"
    resample = resample_function()

    def run(square: Any, picture: Any, start: Any, end: Any, flip: Any) -> None:
        height, width = picture.shape[0], picture.shape[1]
        resample(
            square.ctypes,
            square.shape[0],
            picture.ctypes,
            height,
            width,
            start[0],
            min(end[0], height),
            start[1],
            min(end[1], width),
            flip[0] != 0,
            cubic,
        )

    return _operator(run, image_size, types.FLOAT, types.FLOAT, types.INT32)


@functools.cache
def augment_operator(image_size: int, fill: tuple[int, int, int]) -> Any:
    """Does to squares what their rows of the plan say.

    Takes pictures uint8 [size size 3] and rows float32 [k], columns as in `augment_plan.Column`;
    gives uint8 [size size 3]. `fill` is what an erased rectangle shows.
    """
    red, green, blue = fill
    augment = augment_function()

    def run(out: Any, picture: Any, row: Any) -> None:
        augment(
            out.ctypes, picture.ctypes, out.shape[0], row.ctypes, row.shape[0], red, green, blue
        )

    return _operator(run, image_size, types.FLOAT)


def _operator(run: Callable[..., None], image_size: int, *vectors: Any) -> Any:
    """Makes squares out of pictures and vectors of the types given."""

    def set_shapes(outputs: Any, inputs: Any) -> None:
        for shape in outputs[0]:
            shape[0] = image_size
            shape[1] = image_size
            shape[2] = 3

    return NumbaFunction(
        run_fn=run,
        setup_fn=set_shapes,
        out_types=[types.UINT8],
        in_types=[types.UINT8, *vectors],
        outs_ndim=[3],
        ins_ndim=[3, *[1] * len(vectors)],
    )
