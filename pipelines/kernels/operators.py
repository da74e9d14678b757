"""The graph's operators after decoding: our fused ones, and augmentation with DALI's own.

On the CPU our kernels run inside the graph on DALI's threads, one call a sample, without Python's
lock. On a GPU, and on the CPU with `data.resample=dali`, DALI's operators are used instead.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali
from numba import carray  # type: ignore[attr-defined]
from numba import types as numba_types
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations as suite
from nvidia.dali.auto_aug import core
from nvidia.dali.plugin.numba import NumbaFunction

from unicl_fast.augmentation import Augmentation
from unicl_fast.system.kernels import c_function, kernel

from ..plan.augment import RAND, STAGE_WIDTH, Column, Operator, num_stages
from .augment import augment_image
from .resample import resample_region


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphParts:
    """The parts of a run's graph that the augmentations of its sources need."""

    operators: tuple[Operator, ...]
    """Operators of policies, in order."""
    stages: int
    twists: bool
    erases: bool
    fill: tuple[int, int, int]
    """Levels that an erased rectangle shows."""


def parts_for(augmentations: Sequence[Augmentation], mean: Sequence[float]) -> GraphParts | None:
    """The parts that at least one data set uses; None if no data set augments.

    `mean` is the colour, in 0 to 1, of erased rectangles.
    """
    if not any(each.changes_pixels for each in augmentations):
        return None
    red, green, blue = (round(255 * min(max(level, 0.0), 1.0)) for level in mean)
    stages = num_stages(augmentations)
    return GraphParts(
        operators=tuple(sorted({one.operator for one in RAND})) if stages else (),
        stages=stages,
        twists=any(each.changes_colours for each in augmentations),
        erases=any(each.erase > 0 for each in augmentations),
        fill=(red, green, blue),
    )


_CHANNELS = 3
# How DALI calls such functions. A tensor list is an address of addresses of data, one of addresses
# of shapes (int64 each), one of numbers of dimensions, and the number of its tensors. A function
# that sets shapes gets the shapes of all samples and no data.
_ADDRESS, _NUMBER = numba_types.uint64, numba_types.int32
_RUN = [_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER] * 2
_SET_SHAPES = [_ADDRESS, _ADDRESS, _NUMBER] * 2 + [_NUMBER]
# The same with the types that our functions see.
_pointer: Any = numba_types.CPointer  # untyped
_SHAPES = _pointer(_pointer(numba_types.int64))
_TENSORS = _pointer(numba_types.voidptr), _SHAPES, numba_types.voidptr, _NUMBER


def resample_operator(image_size: int, interpolation: str) -> Any:
    """Resamples regions of images to crops, flipped or not.

    Inputs are images uint8 [h w 3], starts and ends of regions float32 [2] in pixels (rows, then
    columns; an infinite end is the image's), and flips int32 [1]; the output is
    uint8 [size size 3].
    """
    in_types = [types.UINT8, types.FLOAT, types.FLOAT, types.INT32]
    return _Compiled(_resample(interpolation == "bicubic"), image_size, in_types=in_types)


def augment_operator(image_size: int) -> Any:
    """Augments images as their rows of the plan say.

    Inputs are images uint8 [size size 3], rows float32 [k] with columns as in `Column`, and the
    colour of erased rectangles uint8 [3]; the output is uint8 [size size 3].
    """
    return _Compiled(_augment(), image_size, in_types=[types.UINT8, types.FLOAT, types.UINT8])


class _Compiled(NumbaFunction):
    """DALI's operator around C functions that are compiled already.

    If it is given Python functions, it compiles them and their wrappers again in every process,
    which costs two seconds and 16 MB.
    """

    def __init__(self, run: Any, image_size: int, *, in_types: list[Any]) -> None:
        """The first input is an image, the rest are vectors, of the types given.

        Raises RuntimeError: this DALI calls such functions in another way.
        """
        if not self._is_known():
            raise RuntimeError(
                f"data.resample=fused needs a version of NVIDIA DALI from 2.2 to 2.4, or one that "
                f"calls operators as they do; {nvidia.dali.__version__} does not: install one of "
                "those, or set data.resample=dali"
            )
        super().__init__(
            run_fn=run,
            setup_fn=_set_shapes(image_size),
            out_types=[types.UINT8],
            in_types=in_types,
            outs_ndim=[3],
            ins_ndim=[3, *[1] * (len(in_types) - 1)],
        )

    @classmethod
    def _is_known(cls: Any) -> bool:
        """Whether DALI still calls functions in this way: the methods replaced here are private."""
        try:
            calls = cls._run_fn_sig(None), cls._setup_fn_sig(None)
        except (AttributeError, TypeError):
            return False
        return calls == (numba_types.void(*_RUN), numba_types.void(*_SET_SHAPES)) and all(
            hasattr(NumbaFunction, name) for name in ("_get_run_fn_cpu", "_get_setup_fn_cpu")
        )

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> Any:
        return run_fn.address

    def _get_setup_fn_cpu(self, setup_fn: Any) -> Any:
        return setup_fn.address


@functools.cache
def _set_shapes(image_size: int) -> Any:
    """Sets the shape of every output to [size size 3]."""

    @c_function(*[_SHAPES, numba_types.voidptr, _NUMBER] * 2, _NUMBER)
    def set_shapes(
        out_shapes: Any, _out_dimensions: Any, _num_outputs: Any,
        _in_shapes: Any, _in_dimensions: Any, _num_inputs: Any, num_samples: Any,
    ) -> None:  # fmt: skip
        for number in range(num_samples):
            shape = out_shapes[number]
            shape[0] = image_size
            shape[1] = image_size
            shape[2] = _CHANNELS

    return set_shapes


@functools.cache
def _resample(cubic: bool) -> Any:
    @c_function(*_TENSORS, *_TENSORS)
    def resample(
        out_data: Any, out_shapes: Any, _out_dimensions: Any, _num_outputs: Any,
        in_data: Any, in_shapes: Any, _in_dimensions: Any, _num_inputs: Any,
    ) -> None:  # fmt: skip
        image = _image(in_data, in_shapes, 0)
        start = _vector(in_data, in_shapes, 1, np.float32)
        end = _vector(in_data, in_shapes, 2, np.float32)
        flip = _vector(in_data, in_shapes, 3, np.int32)
        resample_region(
            _image(out_data, out_shapes, 0),
            image,
            np.float64(start[0]),
            np.float64(image.shape[0] if math.isinf(end[0]) else end[0]),
            np.float64(start[1]),
            np.float64(image.shape[1] if math.isinf(end[1]) else end[1]),
            flip[0] != 0,
            cubic,
        )

    return resample


@functools.cache
def _augment() -> Any:
    @c_function(*_TENSORS, *_TENSORS)
    def augment(
        out_data: Any, out_shapes: Any, _out_dimensions: Any, _num_outputs: Any,
        in_data: Any, in_shapes: Any, _in_dimensions: Any, _num_inputs: Any,
    ) -> None:  # fmt: skip
        image = _image(out_data, out_shapes, 0)
        copied, original = image.reshape(-1), _image(in_data, in_shapes, 0).reshape(-1)
        # a loop, not slices: those bring error messages along, which take Numba long to compile
        for i in range(copied.size):
            copied[i] = original[i]
        row = _vector(in_data, in_shapes, 1, np.float32)
        fill = _vector(in_data, in_shapes, 2, np.uint8)
        augment_image(image, row, fill)

    return augment


@kernel(inline="always")
def _image(data: Any, shapes: Any, number: int) -> Any:
    """A tensor of a list as uint8 [h w 3]."""
    shape = shapes[number]
    return carray(data[number], (shape[0], shape[1], _CHANNELS), np.uint8)


@kernel(inline="always")
def _vector(data: Any, shapes: Any, number: int, dtype: Any) -> Any:
    """A tensor of a list as `dtype` [k]."""
    return carray(data[number], shapes[number][0], dtype)


# Augmentation with DALI's operators.


def augment(images: Any, rows: Any, parts: GraphParts) -> Any:
    """Augments images uint8 [s s 3] as their rows say, with DALI's operators, on either device.

    An image goes only through those operators that its row asks for: DALI splits the batch at every
    `if` below (AutoGraph converts this module when a graph with conditionals is built). Rows are
    float32 [k] on the host, columns as in `Column`.
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
    if parts.erases:
        # Not split: it copies as it goes, and what was put together after an `if` must be copied
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
    """Applies one operator of a policy to each image whose row has one here."""
    # From an operator's number to its position among those of this graph.
    positions = np.zeros(len(Operator), dtype=np.int32)
    positions[list(parts.operators)] = np.arange(len(parts.operators))
    number = fn.cast(rows[start], dtype=types.INT32)
    position = types.Constant(positions)[number]
    if number > 0:
        images = core.select(
            [_OPERATORS[operator] for operator in parts.operators],
            position,
            data=images,
            numbers=rows[start + 1 : start + STAGE_WIDTH],
            grey=(sum(parts.fill) + 1) // 3,  # DALI takes one level for all channels
        )
    return images


def _warp(data: Any, _: None, numbers: Any, grey: int) -> Any:
    matrix = fn.reshape(numbers, shape=[2, 3])
    return fn.warp_affine(
        data, matrix=matrix, fill_value=grey, interp_type=types.INTERP_LINEAR, inverse_map=True
    )


def _by_factor(augmentation: Any) -> Any:
    def apply(data: Any, _: None, numbers: Any) -> Any:
        return augmentation.op(data, numbers[0])

    return apply


def _sharpness(data: Any, _: None, numbers: Any) -> Any:
    ones, centre = np.ones((3, 3), np.float32), np.zeros((3, 3), np.float32)
    centre[1, 1] = 1
    smooth = (ones + 4 * centre) / 13
    kernel = types.Constant(smooth) + numbers[0] * types.Constant(centre - smooth)
    return fn.filter(data, _beside(kernel, data))


def _by_bytes(augmentation: Any) -> Any:
    def apply(data: Any, _: None, numbers: Any) -> Any:
        return augmentation.op(data, _beside(fn.cast(numbers[0], dtype=types.UINT8), data))

    return apply


def _solarize(data: Any, _: None, numbers: Any) -> Any:
    return suite.solarize.op(data, _beside(numbers[0], data))


def _equalize(data: Any, _: None) -> Any:
    return fn.equalize(data)


def _beside(node: Any, data: Any) -> Any:
    """Puts a node on the images' device, for an operator that has it as an input."""
    return node.gpu() if data.device == "gpu" else node


_as_augmentation: Any = core.augmentation
_OPERATORS = {
    Operator.WARP: _as_augmentation(_warp),
    Operator.BRIGHTNESS: _as_augmentation(_by_factor(suite.brightness)),
    Operator.CONTRAST: _as_augmentation(_by_factor(suite.contrast)),
    Operator.COLOR: _as_augmentation(_by_factor(suite.color)),
    Operator.SHARPNESS: _as_augmentation(_sharpness),
    Operator.POSTERIZE: _as_augmentation(_by_bytes(suite.posterize)),
    Operator.SOLARIZE: _as_augmentation(_solarize),
    Operator.SOLARIZE_ADD: _as_augmentation(_by_bytes(suite.solarize_add)),
    Operator.EQUALIZE: _as_augmentation(_equalize),
    Operator.INVERT: suite.invert,
    Operator.AUTO_CONTRAST: suite.auto_contrast,
}
