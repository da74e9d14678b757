"""Number formats and memory layout, decided in this one place."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import EfficiencyConfig, PrecisionName
from unicl_fast.distributed.ranks import Ranks, from_rank_0
from unicl_fast.models.text_encoder import TextAttention, find_varlen_attention
from unicl_fast.system.kernels import kernel
from unicl_fast.system.machine import HostBuffers, choose_device
from unicl_fast.system.wording import count_of

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_FEWEST_TURNS = 4
_MEASURED_SECONDS = 0.3
"""Turns of the measurement for `auto`: so many at least, and as long after the first."""
_COMPUTE_TYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic of the encoders; weights stay in fp32 (fp64 for `fp64`)."""

    name: PrecisionName

    def __post_init__(self) -> None:
        """Resolves `auto` for this machine; a trainer has resolved it for its device before."""
        if self.name == "auto":
            object.__setattr__(self, "name", fast_precision(choose_device("auto")))

    @property
    def compute_type(self) -> torch.dtype:
        """The type of activations and of the encoder's input."""
        return _COMPUTE_TYPES[self.name]

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(
        self, device_type: str, *, cache_enabled: bool = True
    ) -> contextlib.AbstractContextManager[object]:
        """The context to run encoders in; casts each weight once, or each time it is used."""
        if self.compute_type == self.weight_type:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.compute_type, cache_enabled=cache_enabled)

    def build_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; switched off for the others."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")


def settle_precision(
    given: PrecisionName,
    device: torch.device,
    *,
    stored: PrecisionName | None = None,
    ranks: Ranks = _ALONE,
) -> PrecisionName:
    """Settles `efficiency.precision`: for auto, a checkpoint's, or the fastest of rank 0."""
    if given != "auto":
        return given
    if stored is not None:
        return stored
    fastest: PrecisionName = fast_precision(device) if ranks.is_main else "fp32"
    return from_rank_0(fastest, ranks)


def fast_precision(device: torch.device) -> PrecisionName:
    """The precision that `auto` means on a device; says why in the log.

    A CPU is measured, with the threads that this process has. Its instructions alone do not tell:
    AVX-512's products of pairs in bf16 have 2.3 times fp32's rate on AMD's Zen 4 and half of it on
    Intel's Sapphire Rapids, emulated ones took 14 times as long as fp32, and the casts to bf16 are
    more parallel regions, in which the threads of a busy machine wait for each other. bf16 rounds
    more, so it has to be faster by a tenth at least.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        name: PrecisionName = "bf16" if major >= 8 else "fp16"
        logger.info("precision: %s, the fastest here (efficiency.precision=auto)", name)
        return name
    fp32, bf16 = seconds_of_products(torch.get_num_threads())
    name = "bf16" if bf16 < 0.9 * fp32 else "fp32"
    logger.info(
        "precision: %s (efficiency.precision=auto); the same products took %.1f ms in fp32 and "
        "%.1f ms in bf16, on %s",
        name, 1000 * fp32, 1000 * bf16, count_of(torch.get_num_threads(), "thread"),
    )  # fmt: skip
    return name


@functools.lru_cache(maxsize=1)
def seconds_of_products(num_threads: int) -> tuple[float, float]:
    """Measures in fp32 and bf16, once, what both encoders are made of, forward and backward.

    A convolution of 3 x 3 and a linear layer, large enough for all threads. The two take turns,
    and the medians count: on a busy machine single turns are held up.
    """
    generator = torch.Generator().manual_seed(0)  # the global one is the model's
    images, kernels, tokens, weight = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((4, 64, 28, 28), (64, 64, 3, 3), (256, 256), (1024, 256))
    )
    images = images.to(memory_format=torch.channels_last)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    deadline = math.inf
    while len(seconds[True]) < _FEWEST_TURNS or time.perf_counter() < deadline:
        for reduced in (False, True):
            begun = time.perf_counter()
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                outputs = F.conv2d(images, kernels, padding=1), F.linear(tokens, weight)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            seconds[reduced].append(time.perf_counter() - begun)
        deadline = min(deadline, time.perf_counter() + _MEASURED_SECONDS)
    # the first turn has loaded libraries and prepared the kernels
    fp32, bf16 = (statistics.median(found[1:]) for found in seconds.values())
    return fp32, bf16


def place_module(module: nn.Module, *, device: torch.device, precision: Precision) -> nn.Module:
    """Moves weights to the device and into the weight type, and chooses attention for both.

    Torch's fused attention is slower than plain products on a CPU in 16 bits: its backward pass
    takes 2 to 8 times as long (torch 2.13). Attention modules of timm and ours have a switch. Ours
    also takes a kernel for texts without padding, where there is one.
    """
    fused_is_slow = device.type == "cpu" and precision.compute_type.itemsize <= 2
    for part in module.modules():
        if fused_is_slow and hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]  # never on: timm has some off
        if isinstance(part, TextAttention):
            part.varlen_attn = find_varlen_attention(
                device=device,
                compute_type=precision.compute_type,
                head_width=part.out_proj.in_features // part.heads,
            )
    return module.to(device=device, dtype=precision.weight_type)


def set_device_arithmetic(efficiency: EfficiencyConfig, device: torch.device) -> None:
    """Sets torch's switches for the whole process, as `efficiency` says; those of a CPU stay.

    Under autocast TF32 is for the loss, whose products of features are in fp32: the features have
    the rounding of 16 bits already. cuDNN measures which of its convolutions is the fastest, once
    for each size; they differ in rounding, so two starts of a run on a GPU may differ in it.
    """
    if device.type != "cuda":
        return
    tf32 = Precision(efficiency.precision).name in ("tf32", "bf16", "fp16")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


# Bytes to the encoder's input.

_CACHED_VALUES = 1 << 18
"""Values normalised at once on the CPU: 1 MiB of fp32, a core's second-level cache."""
_LARGE_VALUES = 1 << 20
"""From so many on, 4 MiB of fp32, they are stored past the caches, which would not hold them, and
into memory that is used again."""
_BUFFERS = HostBuffers()


def normalise_images(
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turns decoded images into the encoder's input: (images / 255 - mean) / std.

    The uint8 batch leaves the decoder in [b h w c] order; seen as [b c h w] that IS channels_last,
    so no pixel moves. The arithmetic is done in fp32 and rounded once: a bf16 subtraction would
    lose a bit and a half. On the CPU, fp32 is made by one kernel, and other types in pieces of the
    batch that stay in the cache.

    `mean` and `std` are those of each channel, of values in 0 to 1. The result is [b c h w] in
    channels_last order.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != len(mean):
        raise ValueError(
            f"expected uint8 images [b h w {len(mean)}], got {images.dtype} {list(images.shape)}"
        )
    b, h, w, c = images.shape
    arithmetic = torch.promote_types(torch.float32, dtype)
    # a row of the image as one long line: broadcasting over 3 channels would not vectorise
    scale, shift = _lines(tuple(mean), tuple(std), w, arithmetic, images.device)
    if images.device.type == "cpu" and images.numel() >= _LARGE_VALUES:
        normalised = _BUFFERS.empty((b, h, w * c), dtype)
    else:
        normalised = torch.empty(b, h, w * c, dtype=dtype, device=images.device)
    lines = images.reshape(b, h, w * c)
    if images.device.type == "cpu" and dtype == torch.float32:
        _normalise_on_host(normalised, lines, scale, shift, channels=c)
    else:
        piece = b if images.device.type != "cpu" else max(1, _CACHED_VALUES // (h * w * c))
        for part, pixels in zip(normalised.split(piece), lines.split(piece), strict=True):
            if dtype == arithmetic:
                part.copy_(pixels).mul_(scale).add_(shift)
            else:
                part.copy_(pixels.to(arithmetic).mul_(scale).add_(shift))
    return normalised.view(b, h, w, c).permute(0, 3, 1, 2)


def _normalise_on_host(
    out: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, *, channels: int
) -> None:
    """Runs a kernel; `out` and `pixels` are [b h v], of float32 and uint8, and contiguous."""
    values = pixels.shape[2]
    streams = (
        out.numel() >= _LARGE_VALUES
        and channels == 3
        and values >= _BLOCK_VALUES
        and out.data_ptr() % _ALIGNMENT == 0
    )
    run, shape = (_normalise_rgb_streaming, (-1,)) if streams else (_normalise_lines, (-1, values))
    run(out.view(shape).numpy(), pixels.reshape(shape).numpy(), scale.numpy(), shift.numpy())


@functools.lru_cache(maxsize=32)
def _lines(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Factor and offset for each value of a row of pixels, made once: the copy makes a GPU wait."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return (
        torch.tensor(scale * width, dtype=dtype, device=device),
        torch.tensor(shift * width, dtype=dtype, device=device),
    )


# The Numba kernels. Torch has no such operator: converting, multiplying and adding are three, which
# took 79 us for an image of 224 x 224 even in pieces that stay in the cache; the plain kernel takes
# 33, and filling its memory with one number 25.
#
# A batch of images is larger than a cache, so an ordinary store first fetches the line that it is
# about to overwrite, and drives out what the decoder's threads are using. The streaming kernel
# stores past the caches: 27 us for the image alone; while two threads decoded it took 94 with the
# plain kernel, and all that the main thread does for an image fell from 105 to 60.

_BLOCK_VALUES = 48
"""Values that the streaming kernel stores at once: three vectors of 16, whole RGB pixels."""
_ALIGNMENT = 64
"""Alignment of the bytes that it writes to; torch's memory has it."""
_LANES = 16


@kernel(fastmath={"contract"}, error_model="numpy")
def _normalise_lines(out: Any, lines: Any, scale: Any, shift: Any) -> None:
    """Computes out [n w] = lines [n w] * scale [w] + shift [w], float32, rounded once."""
    for i in range(lines.shape[0]):
        line, target = lines[i], out[i]
        for j in range(line.size):
            target[j] = np.float32(line[j]) * scale[j] + shift[j]


def _define_stream_block(typing: Any, out: Any, values: Any, scale: Any, shift: Any) -> Any:
    """Normalises one block at addresses. LLVM has such stores, Numba has no name for them."""

    def generate(context: Any, builder: Any, signature: Any, addresses: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), _LANES)
        integers = ir.VectorType(ir.IntType(8), _LANES)
        past_the_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])

        def part(address: Any, kind: Any, number: int) -> Any:
            pointer = builder.inttoptr(address, kind.as_pointer())
            return builder.gep(pointer, [ir.Constant(ir.IntType(64), number)])

        out, values, scale, shift = addresses
        for number in range(_BLOCK_VALUES // _LANES):
            value = builder.uitofp(builder.load(part(values, integers, number), align=1), floats)
            factor = builder.load(part(scale, floats, number), align=4)
            offset = builder.load(part(shift, floats, number), align=4)
            product = builder.fmul(value, factor, flags=("contract",))
            result = builder.fadd(product, offset, flags=("contract",))
            store = builder.store(result, part(out, floats, number), align=_ALIGNMENT)
            store.set_metadata("nontemporal", past_the_caches)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


def _define_fence(typing: Any) -> Any:
    """Waits for streaming stores, which nothing else orders, to be in memory for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_stream_block: Any = intrinsic(_define_stream_block)
_fence: Any = intrinsic(_define_fence)


@kernel(fastmath={"contract"}, error_model="numpy")
def _normalise_rgb_streaming(out: Any, values: Any, scale: Any, shift: Any) -> None:
    """Computes the same of RGB pixels in one contiguous row [n], with stores past the caches.

    The address of `out` is a multiple of `_ALIGNMENT`; `scale` and `shift` have a period of three
    and at least `_BLOCK_VALUES` values.
    """
    num_blocks = values.size // _BLOCK_VALUES
    out_at, values_at = out.ctypes.data, values.ctypes.data
    scale_at, shift_at = scale.ctypes.data, shift.ctypes.data
    for block in range(num_blocks):
        start = block * _BLOCK_VALUES
        _stream_block(out_at + 4 * start, values_at + start, scale_at, shift_at)
    _fence()
    for j in range(num_blocks * _BLOCK_VALUES, values.size):
        out[j] = np.float32(values[j]) * scale[j % 3] + shift[j % 3]
