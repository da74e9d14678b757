"""Augmentation with DALI's operators, on both devices: rows of the plan in, images out.

On a GPU this is what runs; on the CPU it is the twin of the fused operator (augment_kernels.py),
which `data.resample=dali` asks for. An image goes through those operators alone that its row asks
for: DALI splits the batch at every `if` below (AutoGraph reads them: this module is converted when
a graph is built) and puts it together behind it. What no source uses is not in a run's graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations as suite
from nvidia.dali.auto_aug.core import augmentation, select

from ..plan.augment import STAGE_WIDTH, Column
from ..plan.policies import Operator
from .augment_parts import GraphParts


def augment(images: Any, rows: Any, parts: GraphParts) -> Any:
    """Does to each image what its row says; must be called in a graph with conditionals.

    Args:
        images: uint8 [s s 3] of layout HWC, on either device.
        rows: float32 [k] on the host, columns as in `augment_plan.Column`.
        parts: what the graph is to hold.

    Returns:
        Images whose samples lie one after another in memory.
    """
    for stage in range(parts.stages):
        images = _apply_stage(images, rows, parts, Column.STAGES + stage * STAGE_WIDTH)
    if parts.twists:  # noqa: SIM102 - the second `if` is DALI's
        if rows[Column.IS_TWISTED] > 0:
            images = fn.color_twist(
                images,
                brightness=rows[Column.BRIGHTNESS],
                contrast=rows[Column.CONTRAST],
                saturation=rows[Column.SATURATION],
                hue=rows[Column.HUE],
            )
    if parts.blurs:  # noqa: SIM102
        if rows[Column.SIGMA] > 0:
            images = fn.gaussian_blur(images, sigma=rows[Column.SIGMA])
    if parts.erases:
        # Not split: it copies as it goes, and what was put together behind an `if` must be copied
        # into one piece of memory anyway. A rectangle of 0 rows erases nothing.
        erased = Column.ERASED
        return fn.erase(
            images,
            anchor=rows[erased : erased + 2],
            shape=rows[erased + 2 : erased + 4],
            axis_names="HW",
            fill_value=list(parts.fill),
        )
    return fn.copy(images)


def _apply_stage(images: Any, rows: Any, parts: GraphParts, start: int) -> Any:
    """One operator of a policy on each image whose row has one here."""
    # Where a row's operator is among those of this graph.
    places = np.zeros(len(Operator), dtype=np.int32)
    places[list(parts.operators)] = np.arange(len(parts.operators))
    number = fn.cast(rows[start], dtype=types.INT32)
    place = types.Constant(places)[number]
    if number > 0:
        images = select(
            [_OPERATORS[operator] for operator in parts.operators],
            place,
            data=images,
            numbers=rows[start + 1 : start + STAGE_WIDTH],
            grey=parts.grey,
        )
    return images


@augmentation
def _warp(data: Any, _: None, numbers: Any, grey: int) -> Any:
    matrix = fn.reshape(numbers, shape=[2, 3])
    return fn.warp_affine(
        data, matrix=matrix, fill_value=grey, interp_type=types.INTERP_LINEAR, inverse_map=True
    )


@augmentation
def _brightness(data: Any, _: None, numbers: Any) -> Any:
    return suite.brightness.op(data, numbers[0])


@augmentation
def _contrast(data: Any, _: None, numbers: Any) -> Any:
    return suite.contrast.op(data, numbers[0])


@augmentation
def _color(data: Any, _: None, numbers: Any) -> Any:
    return suite.color.op(data, numbers[0])


@augmentation
def _sharpness(data: Any, _: None, numbers: Any) -> Any:
    ones, centre = np.ones((3, 3), np.float32), np.zeros((3, 3), np.float32)
    centre[1, 1] = 1
    smooth = (ones + 4 * centre) / 13
    kernel = types.Constant(smooth) + numbers[0] * types.Constant(centre - smooth)
    return fn.filter(data, _beside(kernel, data))


@augmentation
def _posterize(data: Any, _: None, numbers: Any) -> Any:
    return suite.posterize.op(data, _beside(fn.cast(numbers[0], dtype=types.UINT8), data))


@augmentation
def _solarize(data: Any, _: None, numbers: Any) -> Any:
    return suite.solarize.op(data, _beside(numbers[0], data))


@augmentation
def _solarize_add(data: Any, _: None, numbers: Any) -> Any:
    return suite.solarize_add.op(data, _beside(fn.cast(numbers[0], dtype=types.UINT8), data))


@augmentation
def _equalize(data: Any, _: None) -> Any:
    return fn.equalize(data)


def _beside(node: Any, data: Any) -> Any:
    """On the device of the images, where an operator takes it as an input."""
    return node.gpu() if data.device == "gpu" else node


_OPERATORS = {
    Operator.WARP: _warp,
    Operator.BRIGHTNESS: _brightness,
    Operator.CONTRAST: _contrast,
    Operator.COLOR: _color,
    Operator.SHARPNESS: _sharpness,
    Operator.POSTERIZE: _posterize,
    Operator.SOLARIZE: _solarize,
    Operator.SOLARIZE_ADD: _solarize_add,
    Operator.INVERT: suite.invert,
    Operator.EQUALIZE: _equalize,
    Operator.AUTO_CONTRAST: suite.auto_contrast,
}
