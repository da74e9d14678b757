"""The Numba kernels under `precision`: bytes to normalised fp32 on the CPU, in one pass.

Torch has no such operator: converting, multiplying and adding are three, which took 79 us for an
image of 224 x 224 even in pieces that stay in the cache; the plain kernel takes 33, and filling
its memory with one number 25.

A batch of images is larger than a cache, so an ordinary store first fetches the line that it is
about to overwrite, and drives out what the decoder's threads are using. The streaming kernel stores
past the caches: 27 us for the image alone; beside two decoding threads it took 94 with the plain
kernel, and all that the main thread does for an image fell from 105 to 60.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from unicl_fast.system.kernels import kernel

BLOCK_VALUES = 48
"""What the streaming kernel stores at once: three vectors of 16, after which RGB begins anew."""
ALIGNMENT = 64
"""Of the bytes that it writes to; torch's memory has it."""
_LANES = 16


@kernel(fastmath={"contract"}, error_model="numpy")
def normalise_lines(out: Any, lines: Any, scale: Any, shift: Any) -> None:
    """Computes out = lines * scale + shift, rounded once.

    Args:
        out: float32 [n w], written.
        lines: uint8 [n w].
        scale: float32 [w].
        shift: float32 [w].
    """
    for i in range(lines.shape[0]):
        line, target = lines[i], out[i]
        for j in range(line.size):
            target[j] = np.float32(line[j]) * scale[j] + shift[j]


def _define_stream_block(typing: Any, out: Any, values: Any, scale: Any, shift: Any) -> Any:
    """One block; the arguments are addresses. LLVM has such stores, Numba has no name for them."""

    def generate(context: Any, builder: Any, signature: Any, addresses: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), _LANES)
        integers = ir.VectorType(ir.IntType(8), _LANES)
        past_the_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])

        def part(address: Any, kind: Any, number: int) -> Any:
            pointer = builder.inttoptr(address, kind.as_pointer())
            return builder.gep(pointer, [ir.Constant(ir.IntType(64), number)])

        out, values, scale, shift = addresses
        for number in range(BLOCK_VALUES // _LANES):
            value = builder.uitofp(builder.load(part(values, integers, number), align=1), floats)
            factor = builder.load(part(scale, floats, number), align=4)
            offset = builder.load(part(shift, floats, number), align=4)
            product = builder.fmul(value, factor, flags=("contract",))
            result = builder.fadd(product, offset, flags=("contract",))
            store = builder.store(result, part(out, floats, number), align=ALIGNMENT)
            store.set_metadata("nontemporal", past_the_caches)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


def _define_fence(typing: Any) -> Any:
    """Such stores are ordered with nothing; behind this they are in memory for everybody."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_stream_block: Any = intrinsic(_define_stream_block)
_fence: Any = intrinsic(_define_fence)


@kernel(fastmath={"contract"}, error_model="numpy")
def normalise_rgb_streaming(out: Any, values: Any, scale: Any, shift: Any) -> None:
    """The same of pixels in one row, three values each, with stores past the caches.

    Args:
        out: float32 [n], contiguous, written; its address is a multiple of `ALIGNMENT`.
        values: uint8 [n], contiguous.
        scale: float32 [m], at least `BLOCK_VALUES`, with a period of three.
        shift: float32 [m], likewise.
    """
    num_blocks = values.size // BLOCK_VALUES
    out_at, values_at = out.ctypes.data, values.ctypes.data
    scale_at, shift_at = scale.ctypes.data, shift.ctypes.data
    for block in range(num_blocks):
        start = block * BLOCK_VALUES
        _stream_block(out_at + 4 * start, values_at + start, scale_at, shift_at)
    _fence()
    for j in range(num_blocks * BLOCK_VALUES, values.size):
        out[j] = np.float32(values[j]) * scale[j % 3] + shift[j % 3]
