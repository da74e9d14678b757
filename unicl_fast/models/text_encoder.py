"""The text encoder of the paper: CLIP's causal transformer, read at the end-of-text token.

Parameter names follow the released checkpoints. Padding can be skipped: a batch's tokens then form
one row (`TokenRow`), which only attention has to know. `ModelConfig` has the variants of open_clip;
in those that read padding, all of it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import Activation, ModelConfig

_TOKEN_STD, _POSITION_STD = 0.02, 0.01
"""Deviations of initial embeddings; with positions as large as tokens, texts begin nearly equal."""

VarlenAttention = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn`, or an equivalent."""
VARLEN_TYPES = {torch.float16, torch.bfloat16}  # the types that it accepts


class TokenRow(NamedTuple):
    """The p computed tokens in one row, and their places among u texts of l tokens.

    Only attention spreads them out again, or has a kernel for rows; the rest, 98 % of the
    arithmetic at width 512 and 20 tokens, treats each token alone.
    """

    positions: Int[Tensor, " p"]
    """Indices into the flattened [u l]: all real tokens, ascending, then possibly some padding."""
    ends: Int[Tensor, " u"]
    """Index in the row of each text's last token."""
    bounds: Int[Tensor, " n"]
    """int32, ascending from 0 to p: where each text begins, where the last one ends, and then the
    ends of pieces of computed padding, of up to l tokens or empty. For kernels only."""
    shape: tuple[int, int]
    """u and l."""

    @classmethod
    def build(cls, last: Int[Tensor, " u"], num_tokens: int, shape: tuple[int, int]) -> TokenRow:
        """Builds the row for texts that end at `last` [u], without reading the device."""
        u, l = shape  # noqa: E741
        if not u <= num_tokens <= u * l:
            raise ValueError(
                f"num_tokens must be from {u}, one for each text, to {u * l}, not {num_tokens}"
            )
        padding = (torch.arange(l, device=last.device) > last[:, None]).flatten()
        # a stable sort moves real tokens to the front; nonzero() would read the device
        positions = padding.byte().argsort(stable=True)[:num_tokens]
        stops = (last + 1).cumsum(0)
        # Computed padding must belong to some text, else a kernel leaves its output unwritten. The
        # host does not know how much there is: at most so many texts' worth.
        spare = -(-(num_tokens - u) // l)
        more = stops[-1] + l * torch.arange(1, spare + 1, device=last.device)
        bounds = torch.cat([F.pad(stops, (1, 0)), more.clamp(max=num_tokens)])
        return cls(positions, stops - 1, bounds.int(), shape)

    def pack(self, padded: Float[Tensor, "u l w"]) -> Float[Tensor, "p w"]:
        return padded.flatten(0, 1).index_select(0, self.positions)

    def spread(self, packed: Float[Tensor, "p w"]) -> Float[Tensor, "u l w"]:
        """Puts zeros into the padding; any value would do, since no real token sees it."""
        u, l = self.shape  # noqa: E741
        padded = packed.new_zeros(u * l, packed.shape[1])
        return padded.index_copy(0, self.positions, packed).view(u, l, -1)


def find_varlen_attention(
    *, device: torch.device, compute_type: torch.dtype, head_width: int
) -> VarlenAttention | None:
    """Torch's FlashAttention for rows of any length (CUDA 8.0, torch 2.11, 16 bits), or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    # as FlashAttention: heads of up to 256 values in steps of 8
    fits = compute_type in VARLEN_TYPES and not head_width % 8 and head_width <= 256
    if not fits or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" not in (varlen_attn.__kwdefaults__ or {}):
        return None  # 2.10, which calls it is_causal
    return cast(VarlenAttention, varlen_attn)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class TextAttention(nn.Module):
    """Multi-head self-attention; if it is causal, padding after the text can be skipped."""

    def __init__(self, width: int, *, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        # set by `place_module` for the device; `fused_attn` is timm's name for its switch
        self.fused_attn = True
        self.varlen_attn: VarlenAttention | None = None
        self.in_proj: nn.Module | None = None
        """Replaces `in_proj_weight` and `in_proj_bias` by a layer when it has an adapter."""
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, row: TokenRow | None) -> Tensor:
        if self.in_proj is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        else:
            qkv = self.in_proj(x)
        attention = self.varlen_attn if qkv.dtype in VARLEN_TYPES else None
        if row is not None and attention is not None:
            query_key_value = qkv.view(len(qkv), 3, self.heads, -1).unbind(1)
            bounds = (row.bounds, row.bounds, row.shape[1], row.shape[1])
            # each token sees its text up to itself
            mixed = attention(*query_key_value, *bounds, window_size=(-1, 0)).flatten(1)
        else:
            padded = self._attend_padded(qkv if row is None else row.spread(qkv))
            mixed = padded if row is None else row.pack(padded)
        return self.out_proj(mixed)  # type: ignore[no-any-return]

    def _attend_padded(self, qkv: Float[Tensor, "u l w3"]) -> Float[Tensor, "u l w"]:
        u, l, w3 = qkv.shape  # noqa: E741
        heads = qkv.view(u, l, 3, self.heads, w3 // 3 // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attend = F.scaled_dot_product_attention if self.fused_attn else _plain_attention
        mixed = attend(query, key, value, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(u, l, w3 // 3)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """`scaled_dot_product_attention` written as matrix products."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        l = query.shape[-2]  # noqa: E741
        scores = scores + query.new_full((l, l), float("-inf")).triu(diagonal=1)
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


class TextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text_width
        self.ln_1 = nn.LayerNorm(width, eps=config.text_norm_eps)
        self.attn = TextAttention(width, heads=config.text_heads, causal=config.text_causal)
        self.ln_2 = nn.LayerNorm(width, eps=config.text_norm_eps)
        hidden = int(width * config.text_mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", _ACTIVATIONS[config.text_activation]())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, row: TokenRow | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), row)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


def build_text_encoder(config: ModelConfig) -> nn.Module:
    """The text encoder of `model.text_pool`: ours, or one of transformers."""
    if config.text_kind:
        from unicl_fast.models.transformers_text import TransformersTextEncoder

        return TransformersTextEncoder(config)
    return TextEncoder(config)


class TextEncoder(nn.Module):
    """Token ids to one feature vector for each text, before the projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context_length = self.longest = config.context_length
        """Lengths of the position table and of the texts now accepted (see `run.stages`)."""
        # plain values, which torch.compile understands
        self.reads_end = config.text_pool == "end"
        self.ignores_padding = config.text_causal and self.reads_end
        """Whether nothing after the end-of-text token can reach the features."""
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.resblocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_layers))
        self.ln_final = nn.LayerNorm(width, eps=config.text_norm_eps)
        self._draw_weights(width, config.text_layers)

    def _draw_weights(self, width: int, layers: int) -> None:
        """Draws initial weights as CLIP does, scaled by width.

        The released UniCL code draws all matrices with a deviation of 0.02. Texts then start nearly
        equal, and a run learns about half as much from the same images (docs/results.md, "Fresh
        weights").
        """
        nn.init.normal_(self.token_embedding.weight, std=_TOKEN_STD)
        nn.init.normal_(self.positional_embedding, std=_POSITION_STD)
        # all branches together add as much as the first input, for any depth
        outputs = (2 * layers * width) ** -0.5
        deviations = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": outputs,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": outputs,
        }
        for name, parameter in self.resblocks.named_parameters():
            part = name.partition(".")[2]  # of a block
            if part in deviations:
                nn.init.normal_(parameter, std=deviations[part])
            elif part.endswith("bias"):
                nn.init.zeros_(parameter)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay; as in timm, the last block has the norm."""
        with_last_block = (99999,)
        return {
            "stem": r"^token_embedding|^positional_embedding",
            "blocks": [(r"^resblocks\.(\d+)", None), (r"^ln_final", with_last_block)],
        }

    def forward(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u w"]:
        """Features at the end-of-text token, which has the largest id of the vocabulary.

        With `num_tokens`, only so many tokens are computed: all real ones, and padding beyond them.
        If the encoder reads padding, all is computed, and shorter rows are padded with 0 again.
        """
        u, l = tokens.shape  # noqa: E741
        if l > self.longest:
            raise ValueError(
                f"texts have {l} tokens, the text encoder accepts {self.longest}: "
                "tokenize with its context length"
            )
        if not self.ignores_padding:
            tokens, num_tokens = F.pad(tokens, (0, self.longest - l)), None
            l = self.longest  # noqa: E741
        ends = tokens.argmax(dim=1) if self.reads_end else tokens.new_full((u,), l - 1)
        row = None if num_tokens is None else TokenRow.build(ends, num_tokens, (u, l))
        x = self.token_embedding(tokens if row is None else tokens.flatten()[row.positions])
        if row is None:
            x = x + self.positional_embedding[:l]
        else:  # not by indexing, whose gradient several threads add up in any order
            x = x + F.embedding(row.positions % l, self.positional_embedding)
        for block in self.resblocks:
            x = block(x, row)
        # normalising only the picked token gives the same, with l times less work
        last = x[torch.arange(u, device=x.device), ends] if row is None else x[row.ends]
        return self.ln_final(last)  # type: ignore[no-any-return]
