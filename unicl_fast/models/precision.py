"""Number formats and memory layout of the encoders."""

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
from unicl_fast.system.machine import choose_device
from unicl_fast.system.wording import count_of

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_FEWEST_TURNS = 4
_MEASURED_SECONDS = 0.3
"""The measurement for `auto` has at least so many turns, and lasts so long after the first."""
_COMPUTE_TYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic of the encoders; weights are fp32 (fp64 for `fp64`)."""

    name: PrecisionName

    def __post_init__(self) -> None:
        """Resolves `auto` for this machine; a trainer resolves it for its device earlier."""
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
        """The context to run encoders in; casts each weight once, or at each use."""
        if self.compute_type == self.weight_type:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.compute_type, cache_enabled=cache_enabled)

    def build_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; disabled for the others."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")


def settle_precision(
    given: PrecisionName,
    device: torch.device,
    *,
    stored: PrecisionName | None = None,
    ranks: Ranks = _ALONE,
) -> PrecisionName:
    """Resolves `efficiency.precision=auto`: a checkpoint's, else rank 0's fastest."""
    if given != "auto":
        return given
    if stored is not None:
        return stored
    fastest: PrecisionName = fast_precision(device) if ranks.is_main else "fp32"
    return from_rank_0(fastest, ranks)


def fast_precision(device: torch.device) -> PrecisionName:
    """Resolves `auto` for a device, and logs why.

    A CPU is measured, with this process's threads, since its instruction set does not tell:
    relative to fp32, bf16 has 2.3 times the rate on AMD's Zen 4 and half of it on Intel's Sapphire
    Rapids (both AVX-512), emulation took 14 times as long, and the casts add parallel regions in
    which threads of a busy machine wait for each other. bf16 must be faster by a tenth at least,
    because it rounds more.
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
    """Median seconds in fp32 and bf16 of a convolution and a linear layer, forward and backward."""
    generator = torch.Generator().manual_seed(0)  # the global one belongs to the model
    images, kernels, tokens, weight = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((4, 64, 28, 28), (64, 64, 3, 3), (256, 256), (1024, 256))
    )
    images = images.to(memory_format=torch.channels_last)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    deadline = math.inf
    while len(seconds[True]) < _FEWEST_TURNS or time.perf_counter() < deadline:
        for reduced in (False, True):  # in turns, since a busy machine delays single ones
            begun = time.perf_counter()
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                outputs = F.conv2d(images, kernels, padding=1), F.linear(tokens, weight)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            seconds[reduced].append(time.perf_counter() - begun)
        deadline = min(deadline, time.perf_counter() + _MEASURED_SECONDS)
    # the first turn loads libraries and prepares kernels
    fp32, bf16 = (statistics.median(found[1:]) for found in seconds.values())
    return fp32, bf16


def place_module(module: nn.Module, *, device: torch.device, precision: Precision) -> nn.Module:
    """Moves weights to the device and weight type, and chooses attention kernels for both.

    On a CPU in 16 bits torch's fused attention is slower than plain products: backward costs 2 to 8
    times as much (torch 2.13). Text attention also gets the kernel for texts without padding, if
    there is one.
    """
    fused_is_slow = device.type == "cpu" and precision.compute_type.itemsize <= 2
    for part in module.modules():
        if fused_is_slow and hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]  # never on: timm disables some
        if isinstance(part, TextAttention):
            part.varlen_attn = find_varlen_attention(
                device=device,
                compute_type=precision.compute_type,
                head_width=part.out_proj.in_features // part.heads,
            )
    return module.to(device=device, dtype=precision.weight_type)


def set_device_arithmetic(efficiency: EfficiencyConfig, device: torch.device) -> None:
    """Sets torch's process-wide switches for a CUDA device; a CPU's stay."""
    if device.type != "cuda":
        return
    # under autocast TF32 affects the loss, whose fp32 products are of features rounded to 16 bits
    tf32 = Precision(efficiency.precision).name in ("tf32", "bf16", "fp16")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # times its convolutions once for each size; they round differently, so two starts may differ
    torch.backends.cudnn.benchmark = True


# From bytes to the encoder's input.

_CACHED_VALUES = 1 << 18  # values normalised at once on the CPU: 1 MiB of fp32, one core's L2 cache
_LARGE_VALUES = 1 << 20
"""From 4 MiB of fp32 on, the result is stored past the caches, which could not hold it."""


def normalise_images(
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turns decoded images into the encoder's input: (images / 255 - mean) / std.

    uint8 [b h w c] viewed as [b c h w] is channels_last already, so no pixel moves. Arithmetic is
    in fp32 and rounded once: a bf16 subtraction would lose a bit and a half. On the CPU, fp32 is
    computed by one kernel, other types in cache-sized pieces of the batch.

    `mean` and `std` are per channel, of values in 0 to 1. Returns [b c h w] in channels_last order.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != len(mean):
        raise ValueError(
            f"expected uint8 images [b h w {len(mean)}], got {images.dtype} {list(images.shape)}"
        )
    b, h, w, c = images.shape
    arithmetic = torch.promote_types(torch.float32, dtype)
    # a row of pixels as one long line: broadcasting over 3 channels would not vectorise
    scale, shift = _lines(tuple(mean), tuple(std), w, arithmetic, images.device)
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
    """Runs a kernel on contiguous float32 `out` and uint8 `pixels`, both [b h v]."""
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
    """Scale and shift for each value of a row; cached, since the copy synchronises a GPU."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return (
        torch.tensor(scale * width, dtype=dtype, device=device),
        torch.tensor(shift * width, dtype=dtype, device=device),
    )


# The Numba kernels. Torch needs three operators to convert, multiply and add: 79 us for an image of
# 224 x 224 even in cache-sized pieces; the plain kernel takes 33, and filling its memory 25.
#
# A batch exceeds the cache, so an ordinary store first fetches the line that it overwrites, and
# evicts the decoder threads' data. Streaming stores bypass the caches: 27 us for the image alone;
# while two threads decoded, the plain kernel took 94 us, and the main thread's total per image fell
# from 105 to 60.

_BLOCK_VALUES = 48  # values of one streaming store: three vectors of 16, whole RGB pixels
_ALIGNMENT = 64  # bytes to which its target is aligned; torch's memory is
_LANES = 16


@kernel(fastmath={"contract"}, error_model="numpy")
def _normalise_lines(out: Any, lines: Any, scale: Any, shift: Any) -> None:
    """Computes out [n w] = lines [n w] * scale [w] + shift [w], float32, rounded once."""
    for i in range(lines.shape[0]):
        line, target = lines[i], out[i]
        for j in range(line.size):
            target[j] = np.float32(line[j]) * scale[j] + shift[j]


def _define_stream_block(typing: Any, out: Any, values: Any, scale: Any, shift: Any) -> Any:
    """Normalises one block at raw addresses; LLVM has streaming stores, Numba does not."""

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
    """Waits until streaming stores, which nothing else orders, are visible to all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_stream_block: Any = intrinsic(_define_stream_block)
_fence: Any = intrinsic(_define_fence)


@kernel(fastmath={"contract"}, error_model="numpy")
def _normalise_rgb_streaming(out: Any, values: Any, scale: Any, shift: Any) -> None:
    """The same for RGB pixels in one contiguous row [n], with streaming stores.

    `out` is aligned to `_ALIGNMENT`; `scale`, `shift`: period 3, at least `_BLOCK_VALUES` values.
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
