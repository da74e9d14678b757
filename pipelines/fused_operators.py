"""The resampling kernel as DALI operators.

They run inside the graph on DALI's threads, one call a sample, without Python's lock. Building one
compiles its entry points, which takes seconds: each kind is built once in a process, and used by
every graph.
"""

from __future__ import annotations

import functools
from typing import Any

from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from unicl_fast.pipelines.resample import resample_region


@functools.cache
def window_operator(image_size: int, interpolation: str) -> Any:
    """(pictures uint8 [h w 3], flips int32 [1]) -> whole pictures as squares, mirrored or not."""
    cubic = interpolation == "bicubic"

    def run(square: Any, window: Any, flip: Any) -> None:
        height, width = window.shape[0], window.shape[1]
        resample_region(square, window, 0.0, height, 0.0, width, flip[0] != 0, cubic)

    return _operator(run, image_size, in_types=[types.UINT8, types.INT32])


@functools.cache
def region_operator(image_size: int, interpolation: str) -> Any:
    """(pictures uint8 [h w 3], starts float32 [2], ends float32 [2]) -> regions as squares."""
    cubic = interpolation == "bicubic"

    def run(square: Any, picture: Any, start: Any, end: Any) -> None:
        resample_region(square, picture, start[0], end[0], start[1], end[1], False, cubic)

    return _operator(run, image_size, in_types=[types.UINT8, types.FLOAT, types.FLOAT])


def _operator(run: Any, image_size: int, *, in_types: list[Any]) -> Any:
    def set_shapes(outputs: Any, inputs: Any) -> None:
        for shape in outputs[0]:
            shape[0] = image_size
            shape[1] = image_size
            shape[2] = 3

    return NumbaFunction(
        run_fn=run,
        setup_fn=set_shapes,
        out_types=[types.UINT8],
        in_types=in_types,
        outs_ndim=[3],
        ins_ndim=[3, *(1 for _ in in_types[1:])],
    )
