"""The text encoder of the paper: CLIP's causal transformer, read at the end-of-text token.

Parameter names follow the released checkpoints (`resblocks.N.attn`, `mlp.c_fc`, ...), so that
converting them is renaming.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

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
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.in_proj_weight, std=_INIT_STD)

    def forward(self, x: Float[Tensor, "u l w"]) -> Float[Tensor, "u l w"]:
        u, l, w = x.shape  # noqa: E741
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = qkv.view(u, l, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(u, l, w))  # type: ignore[no-any-return]


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

    def forward(self, x: Float[Tensor, "u l w"]) -> Float[Tensor, "u l w"]:
        x = x + self.attn(self.ln_1(x))
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

    def forward(self, tokens: Int[Tensor, "u l"]) -> Float[Tensor, "u w"]:
        """Features at the end-of-text token, which has the largest id of the vocabulary.

        Args:
            tokens: int64 [u l], l at most the context length.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"texts have {length} tokens, the text encoder takes {self.context_length}: "
                "tokenize with its context length"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        for block in self.resblocks:
            x = block(x)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        # normalising after picking the token is the same and l times less
        return self.ln_final(x[rows, tokens.argmax(dim=1)])  # type: ignore[no-any-return]
