"""Number formats and memory layout, decided in this one place.

How an image's bytes become the encoder's input, what autocast runs in, and the loss scaler that
fp16 needs. The rest of the program asks for a `Precision` and does not look inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unicl_fast.config import PrecisionName, TrainConfig
from unicl_fast.models._normalise_kernels import (
    ALIGNMENT,
    BLOCK_VALUES,
    normalise_lines,
    normalise_rgb_streaming,
)
from unicl_fast.models.packing import find_varlen_attention
from unicl_fast.models.text_encoder import CausalAttention
from unicl_fast.system.host_buffers import HostBuffers
from unicl_fast.system.machine import choose_device

_CACHED_VALUES = 1 << 18
"""Values normalised at once on the CPU: 1 MiB of fp32, a core's second-level cache."""
_CPU_INFO = Path("/proc/cpuinfo")
_LARGE_VALUES = 1 << 20
"""From so many on, 4 MiB of fp32, they are stored past the caches, which would not hold them, and
into memory that is used again."""
_BUFFERS = HostBuffers()
_COMPUTE_TYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic of the encoders; weights stay in fp32 (fp64 for `fp64`)."""

    name: PrecisionName

    def __post_init__(self) -> None:
        """Turns auto into what it means here; a trainer has settled it for its device before."""
        if self.name == "auto":
            object.__setattr__(self, "name", fast_precision(choose_device("auto")))

    @property
    def compute_type(self) -> torch.dtype:
        """Type of activations and of the images fed."""
        return _COMPUTE_TYPES[self.name]

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """The context to run encoders in."""
        if self.name in ("fp32", "fp64"):
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.compute_type)

    def build_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """Loss scaling for fp16, whose gradients underflow; switched off for the others."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")


def settle_precision(
    config: TrainConfig, device: torch.device, precision: PrecisionName | None = None
) -> TrainConfig:
    """The config with `efficiency.precision=auto` made what it means on a device, or as given."""
    if config.efficiency.precision != "auto":
        return config
    efficiency = dataclasses.replace(
        config.efficiency, precision=precision or fast_precision(device)
    )
    return dataclasses.replace(config, efficiency=efficiency)


def fast_precision(device: torch.device) -> PrecisionName:
    """What `auto` means on a device.

    On a CPU without instructions for it, bf16 is emulated: the convolutions of a small network took
    14 times as long as in fp32 where oneDNN was held to AVX2. AVX-512's product of pairs in bf16
    has 2.3 times fp32's rate on AMD's Zen 4, and half of it on Intel's Sapphire Rapids, whose fast
    unit is AMX.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16"
    flags, vendor = _cpu_flags()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and vendor == "AuthenticAMD")
    return "bf16" if fast else "fp32"


@functools.lru_cache(maxsize=1)
def _cpu_flags() -> tuple[frozenset[str], str]:
    """Instruction sets and vendor of the first processor; none where Linux does not say."""
    try:
        text = _CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset(), ""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    return frozenset(fields.get("flags", "").split()), fields.get("vendor_id", "")


def normalise_images(
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Decoded images to the encoder's input.

    The uint8 batch leaves the decoder in [b h w c] order; seen as [b c h w] that IS channels_last,
    so no pixel moves. The arithmetic is done in fp32 and rounded once: a bf16 subtraction would
    lose a bit and a half. On the CPU it is one pass to fp32, and to other types goes through the
    batch in pieces that stay in the cache.

    Args:
        images: uint8 [b h w c].
        mean: of each channel, of values in 0 to 1.
        std: of each channel, of values in 0 to 1.
        dtype: type of the result.
        channels_last: False copies the result into [b c h w] memory order.

    Returns:
        [b c h w] of `dtype`: (images / 255 - mean) / std.
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
        for target, source in zip(normalised.split(piece), lines.split(piece), strict=True):
            if dtype == arithmetic:
                target.copy_(source).mul_(scale).add_(shift)
            else:
                target.copy_(source.to(arithmetic).mul_(scale).add_(shift))
    seen = normalised.view(b, h, w, c).permute(0, 3, 1, 2)
    return seen if channels_last else seen.contiguous()


def _normalise_on_host(
    target: Tensor, source: Tensor, scale: Tensor, shift: Tensor, *, channels: int
) -> None:
    """Both [b h v], of float32 and uint8, and contiguous."""
    values = source.shape[2]
    if (
        target.numel() >= _LARGE_VALUES
        and channels == 3
        and values >= BLOCK_VALUES
        and target.data_ptr() % ALIGNMENT == 0
    ):
        normalise_rgb_streaming(
            target.view(-1).numpy(), source.reshape(-1).numpy(), scale.numpy(), shift.numpy()
        )
        return
    normalise_lines(
        target.view(-1, values).numpy(),
        source.reshape(-1, values).numpy(),
        scale.numpy(),
        shift.numpy(),
    )


@functools.lru_cache(maxsize=32)
def _lines(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Factor and offset for each value of a row of pixels; made once, since a GPU would wait."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return (
        torch.tensor(scale * width, dtype=dtype, device=device),
        torch.tensor(shift * width, dtype=dtype, device=device),
    )


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
        if isinstance(part, CausalAttention):
            part.varlen_attn = find_varlen_attention(
                device=device,
                compute_type=precision.compute_type,
                head_width=part.out_proj.in_features // part.heads,
            )
    return module.to(device=device, dtype=precision.weight_type)
