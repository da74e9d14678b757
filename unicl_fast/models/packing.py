"""Texts without their padding: all tokens of a batch in one row, and attention over such rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

VarlenAttention = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn`, or what computes the same."""
VARLEN_TYPES = {torch.float16, torch.bfloat16}
"""What it takes."""


class Packing(NamedTuple):
    """Where the p tokens that are computed lie among u texts of l.

    Everything but attention treats each token by itself, and is 98 % of the arithmetic at width
    512 and 20 tokens. So tokens lie in one row. For attention they are spread out, or stay where
    they are if there is a kernel for that.
    """

    positions: Int[Tensor, " p"]
    """Places in the flattened [u l]: what is not padding, rising, then perhaps some padding."""
    ends: Int[Tensor, " u"]
    """Where the last token of each text lies in the row."""
    bounds: Int[Tensor, " n"]
    """int32, rising from 0 to p: where each text begins in the row, where the last one ends, and
    then where stretches of computed padding do, of up to l tokens or empty. For `attend` only."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, last: Int[Tensor, " u"], num_tokens: int, shape: tuple[int, int]) -> Packing:
        """The packing of texts, decided without reading the device.

        Args:
            last: int64 [u], the position of the last token of each text.
            num_tokens: how many tokens are computed: those up to `last`, or more.
            shape: u and l.
        """
        u, l = shape  # noqa: E741
        if not u <= num_tokens <= u * l:
            raise ValueError(
                f"num_tokens must be from {u}, one for each text, to {u * l}, not {num_tokens}"
            )
        padding = (torch.arange(l, device=last.device) > last[:, None]).flatten()
        # a stable sort brings what is not padding to the front; nonzero() would read the device
        positions = padding.byte().argsort(stable=True)[:num_tokens]
        stops = (last + 1).cumsum(0)
        # Padding that is computed must belong to some text, else a kernel leaves its part of the
        # result unwritten. How much there is the host does not know: at most so many texts' worth.
        spare = -(-(num_tokens - u) // l)
        more = stops[-1] + l * torch.arange(1, spare + 1, device=last.device)
        bounds = torch.cat([F.pad(stops, (1, 0)), more.clamp(max=num_tokens)])
        return cls(positions, stops - 1, bounds.int(), shape)

    def pack(self, padded: Float[Tensor, "u l w"]) -> Float[Tensor, "p w"]:
        return padded.flatten(0, 1).index_select(0, self.positions)

    def spread(self, packed: Float[Tensor, "p w"]) -> Float[Tensor, "u l w"]:
        """Anything in the padding, which no real token sees: it lies behind them."""
        u, l = self.shape  # noqa: E741
        padded = packed.new_zeros(u * l, packed.shape[1])
        return padded.index_copy(0, self.positions, packed).view(u, l, -1)

    def attend(
        self, attention: VarlenAttention, qkv: Float[Tensor, "p 3 h d"]
    ) -> Float[Tensor, "p h d"]:
        """Causal attention within each text, in the row as it is."""
        query, key, value = qkv.unbind(1)
        longest = self.shape[1]
        return attention(
            *(query, key, value, self.bounds, self.bounds, longest, longest),
            window_size=(-1, 0),  # all that came before, nothing that comes after
        )


def find_varlen_attention(
    *, device: torch.device, compute_type: torch.dtype, head_width: int
) -> VarlenAttention | None:
    """Torch's kernel for rows of any length, or None where it cannot work.

    It is FlashAttention: CUDA devices of compute capability 8.0 and up, 16 bits, heads of up to
    256 values in steps of 8. Torch has it from 2.11 on.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    if compute_type not in VARLEN_TYPES or head_width % 8 or head_width > 256:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" not in (varlen_attn.__kwdefaults__ or {}):
        return None  # 2.10, which calls it is_causal
    return cast(VarlenAttention, varlen_attn)
