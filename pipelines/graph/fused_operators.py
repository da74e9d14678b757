"""Our kernels as DALI operators: resampling, and augmentation.

They run inside the graph on DALI's threads, one call a sample, without Python's lock.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import nvidia.dali
from llvmlite import ir
from numba import carray
from numba import types as numba_types
from numba.extending import intrinsic
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from unicl_fast.system.kernels import c_function, kernel

from ..kernels.augment import augment_square
from ..kernels.resample import resample_region

_CHANNELS = 3
# How DALI calls such functions. A tensor list is an address of addresses of data, one of addresses
# of shapes (int64 each), one of numbers of dimensions, and the number of its tensors; what runs
# gets one sample's outputs and inputs, what sets shapes those of all samples and no data.
_ADDRESS, _NUMBER = numba_types.uint64, numba_types.int32
_RUN = [_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER] * 2
_SET_SHAPES = [_ADDRESS, _ADDRESS, _NUMBER] * 2 + [_NUMBER]


def resample_operator(image_size: int, interpolation: str) -> Any:
    """Resamples regions of images to squares, mirrored or not.

    Takes images uint8 [h w 3], starts and ends of regions float32 [2] in pixels (rows, then
    columns; ends beyond the image mean its end), and flips int32 [1]; gives uint8 [size size 3].
    """
    return _Compiled(
        _resample(interpolation == "bicubic"),
        _set_shapes(image_size),
        in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
    )


def augment_operator(image_size: int) -> Any:
    """Does to squares what their rows of the plan say.

    Takes images uint8 [size size 3], rows float32 [k], columns as in `augment_plan.Column`, and
    what an erased rectangle shows, uint8 [3]; gives uint8 [size size 3].
    """
    return _Compiled(
        _augment(),
        _set_shapes(image_size),
        in_types=[types.UINT8, types.FLOAT, types.UINT8],
    )


class _Compiled(NumbaFunction):
    """DALI's operator around C functions that are compiled already.

    Given Python functions it compiles them and what goes around them anew in every process, which
    takes two seconds and 16 MB.
    """

    def __init__(self, run: Any, set_shapes: Any, *, in_types: list[Any]) -> None:
        """The first input is an image, the others are vectors, of the types given.

        Raises:
            RuntimeError: this DALI calls such functions in another way.
        """
        if not self._is_known():
            raise RuntimeError(
                f"data.resample=fused needs a version of NVIDIA DALI from 2.2 to 2.4, or one that "
                f"calls operators as they do; {nvidia.dali.__version__} does not: install one of "
                "those, or set data.resample=dali"
            )
        super().__init__(
            run_fn=run,
            setup_fn=set_shapes,
            out_types=[types.UINT8],
            in_types=in_types,
            outs_ndim=[3],
            ins_ndim=[3, *[1] * (len(in_types) - 1)],
        )

    @classmethod
    def _is_known(cls) -> bool:
        """Whether DALI calls functions as it did: the methods replaced here are no public ones."""
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
    """Makes every output a square image."""

    @c_function(*_SET_SHAPES)
    def set_shapes(
        out_shapes: Any,
        _out_dimensions: Any,
        _num_outputs: Any,
        _in_shapes: Any,
        _in_dimensions: Any,
        _num_inputs: Any,
        num_samples: Any,
    ) -> None:
        for address in carray(_pointer(out_shapes), num_samples, np.uint64):
            shape = carray(_pointer(address), 3, np.int64)
            shape[0] = image_size
            shape[1] = image_size
            shape[2] = _CHANNELS

    return set_shapes


@functools.cache
def _resample(cubic: bool) -> Any:
    @c_function(*_RUN)
    def resample(
        out_data: Any,
        out_shapes: Any,
        _out_dimensions: Any,
        _num_outputs: Any,
        in_data: Any,
        in_shapes: Any,
        _in_dimensions: Any,
        _num_inputs: Any,
    ) -> None:
        image = _image(in_data, in_shapes, 0)
        start = _vector(in_data, in_shapes, 1, np.float32)
        end = _vector(in_data, in_shapes, 2, np.float32)
        flip = _vector(in_data, in_shapes, 3, np.int32)
        resample_region(
            _image(out_data, out_shapes, 0),
            image,
            float(start[0]),
            float(min(end[0], image.shape[0])),
            float(start[1]),
            float(min(end[1], image.shape[1])),
            flip[0] != 0,
            cubic,
        )

    return resample


@functools.cache
def _augment() -> Any:
    @c_function(*_RUN)
    def augment(
        out_data: Any,
        out_shapes: Any,
        _out_dimensions: Any,
        _num_outputs: Any,
        in_data: Any,
        in_shapes: Any,
        _in_dimensions: Any,
        _num_inputs: Any,
    ) -> None:
        square = _image(out_data, out_shapes, 0)
        copied, source = square.reshape(-1), _image(in_data, in_shapes, 0).reshape(-1)
        # a loop, not slices: those bring error messages along, which take Numba long to compile
        for i in range(copied.size):
            copied[i] = source[i]
        row = _vector(in_data, in_shapes, 1, np.float32)
        fill = _vector(in_data, in_shapes, 2, np.uint8)
        augment_square(square, row, fill)

    return augment


@kernel(inline="always")
def _image(data: Any, shapes: Any, number: int) -> Any:
    """A tensor of a list as uint8 [h w 3]."""
    shape = carray(_entry(shapes, number), 2, np.int64)
    return carray(_entry(data, number), (shape[0], shape[1], _CHANNELS), np.uint8)


@kernel(inline="always")
def _vector(data: Any, shapes: Any, number: int, dtype: Any) -> Any:
    """A tensor of a list as `dtype` [k]."""
    length = carray(_entry(shapes, number), 1, np.int64)[0]
    return carray(_entry(data, number), length, dtype)


@kernel(inline="always")
def _entry(addresses: Any, number: int) -> Any:
    """What the address in that place of a list of addresses points to."""
    return _pointer(carray(_pointer(addresses), number + 1, np.uint64)[number])


def _define_pointer(typing: Any, address: Any) -> Any:
    """An address as what `carray` takes; Numba has no name for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return numba_types.voidptr(address), generate


_pointer: Any = intrinsic(_define_pointer)
