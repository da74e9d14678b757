"""The text encoder of the paper: CLIP's causal transformer, read at the end-of-text token.

Parameter names follow the released checkpoints (`resblocks.N.attn`, `mlp.c_fc`, ...), so that
converting them is renaming.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.models.packing import VARLEN_TYPES, Packing, VarlenAttention

_LAYER_NORM_EPS = 1e-12  # as released; PyTorch's default is 1e-5
_INIT_STD = 0.02


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before.

    Causality is what lets padding be cut off: nothing behind the end-of-text token can reach it.
    """

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # what fits the device; see place_module. The first is timm's name for its switch.
        self.fused_attn = True
        self.varlen_attn: VarlenAttention | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.in_proj_weight, std=_INIT_STD)

    def forward(self, x: Tensor, packing: Packing | None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        attention = self.varlen_attn if qkv.dtype in VARLEN_TYPES else None
        if packing is not None and attention is not None:
            heads = qkv.view(len(qkv), 3, self.heads, -1)
            mixed = packing.attend(attention, heads).flatten(1)
            return self.out_proj(mixed)  # type: ignore[no-any-return]
        if packing is not None:
            qkv = packing.spread(qkv)
        u, l, w3 = qkv.shape  # noqa: E741
        qkv = qkv.view(u, l, 3, self.heads, w3 // 3 // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attend = F.scaled_dot_product_attention if self.fused_attn else _plain_attention
        mixed = attend(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(u, l, w3 // 3)
        if packing is not None:
            mixed = packing.pack(mixed)
        return self.out_proj(mixed)  # type: ignore[no-any-return]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """The twin of `scaled_dot_product_attention`, written as products of matrices."""
    assert is_causal
    l = query.shape[-2]  # noqa: E741
    future = query.new_full((l, l), float("-inf")).triu(diagonal=1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + future
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


class TextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.attn = CausalAttention(width=width, heads=heads)
        self.ln_2 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, packing: Packing | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), packing)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """Token ids to one feature vector a text, before the projection."""

    def __init__(
        self, *, vocab_size: int, context_length: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.resblocks = nn.ModuleList(TextBlock(width=width, heads=heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        nn.init.trunc_normal_(self.positional_embedding, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u w"]:
        """Features at the end-of-text token, which has the largest id of the vocabulary.

        Args:
            tokens: int64 [u l], l at most the context length.
            num_tokens: how many of them are not padding, to compute those only; or more, and some
                padding is computed too.
        """
        u, l = tokens.shape  # noqa: E741
        if l > self.context_length:
            raise ValueError(
                f"texts have {l} tokens, the text encoder takes {self.context_length}: "
                "tokenize with its context length"
            )
        ends = tokens.argmax(dim=1)
        if num_tokens is None:
            packing = None
            x = self.token_embedding(tokens) + self.positional_embedding[:l]
        else:
            packing = Packing.of(ends, num_tokens, (u, l))
            x = self.token_embedding(tokens.flatten()[packing.positions])
            # not by an index: the gradient of one is added up in any order by several threads
            x = x + F.embedding(packing.positions % l, self.positional_embedding)
        for block in self.resblocks:
            x = block(x, packing)
        # normalising after picking the token is the same and l times less
        if packing is None:
            return self.ln_final(x[torch.arange(u, device=x.device), ends])  # type: ignore[no-any-return]
        return self.ln_final(x[packing.ends])  # type: ignore[no-any-return]
