"""microsoft/UniCL's released models, written out from their description in plain steps.

`random_entries` makes a checkpoint in their layout with weights that matter (no zeros, no ones),
and the two forward passes read it entry by entry. Nothing here knows timm or our models. The image
encoder is Swin (Liu et al., arXiv 2103.14030): windows are gone through one by one, as no program
for use would.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SHIFT = 7, 3
SIZES = {"swin-tiny": (96, (2, 2, 6, 2)), "swin-base": (128, (2, 2, 18, 2))}
HEAD_WIDTH = 32
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, VOCABULARY, CONTEXT, EMBED = 512, 12, 8, 49408, 77, 512


def random_entries(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Every entry of a released file of that model, by name."""
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, Tensor] = {}

    def draw(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    def linear(prefix: str, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        entries[f"{prefix}.weight"] = draw(fan_out, fan_in, std=fan_in**-0.5)
        if bias:
            entries[f"{prefix}.bias"] = draw(fan_out, std=0.2)

    def norm(prefix: str, width: int) -> None:
        entries[f"{prefix}.weight"] = draw(width, std=0.2, mean=1.0)
        entries[f"{prefix}.bias"] = draw(width, std=0.2)

    width, depths = SIZES[name]
    entries["image_encoder.patch_embed.proj.weight"] = draw(width, 3, 4, 4, std=48**-0.5)
    entries["image_encoder.patch_embed.proj.bias"] = draw(width, std=0.2)
    norm("image_encoder.patch_embed.norm", width)
    side = 224 // 4
    for stage, depth in enumerate(depths):
        for block in range(depth):
            prefix = f"image_encoder.layers.{stage}.blocks.{block}"
            if block % 2 and side > WINDOW:
                entries[f"{prefix}.attn_mask"] = shifted_window_mask(side)
            norm(f"{prefix}.norm1", width)
            table = draw((2 * WINDOW - 1) ** 2, width // HEAD_WIDTH, std=0.5)
            entries[f"{prefix}.attn.relative_position_bias_table"] = table
            entries[f"{prefix}.attn.relative_position_index"] = relative_positions()
            linear(f"{prefix}.attn.qkv", width, 3 * width)
            linear(f"{prefix}.attn.proj", width, width)
            norm(f"{prefix}.norm2", width)
            linear(f"{prefix}.mlp.fc1", width, 4 * width)
            linear(f"{prefix}.mlp.fc2", 4 * width, width)
        if stage < len(depths) - 1:
            prefix = f"image_encoder.layers.{stage}.downsample"
            linear(f"{prefix}.reduction", 4 * width, 2 * width, bias=False)
            norm(f"{prefix}.norm", 4 * width)
            width, side = 2 * width, side // 2
    norm("image_encoder.norm", width)

    entries["text_encoder.positional_embedding"] = draw(CONTEXT, TEXT_WIDTH, std=0.3)
    entries["text_encoder.token_embedding.weight"] = draw(VOCABULARY, TEXT_WIDTH, std=0.3)
    for layer in range(TEXT_LAYERS):
        prefix = f"text_encoder.resblocks.{layer}"
        linear(f"{prefix}.attn.out_proj", TEXT_WIDTH, TEXT_WIDTH)
        linear(f"{prefix}.attn.in_proj", TEXT_WIDTH, 3 * TEXT_WIDTH)
        for kind in ("weight", "bias"):  # nn.MultiheadAttention spells these two so
            entries[f"{prefix}.attn.in_proj_{kind}"] = entries.pop(f"{prefix}.attn.in_proj.{kind}")
        norm(f"{prefix}.ln_1", TEXT_WIDTH)
        linear(f"{prefix}.mlp.c_fc", TEXT_WIDTH, 4 * TEXT_WIDTH)
        linear(f"{prefix}.mlp.c_proj", 4 * TEXT_WIDTH, TEXT_WIDTH)
        norm(f"{prefix}.ln_2", TEXT_WIDTH)
    norm("text_encoder.ln_final", TEXT_WIDTH)
    entries["image_projection"] = draw(width, EMBED, std=width**-0.5)
    entries["text_projection"] = draw(TEXT_WIDTH, EMBED, std=TEXT_WIDTH**-0.5)
    entries["logit_scale"] = torch.tensor(4.7)  # above ln 100: the released ones are not clamped
    return entries


def relative_positions() -> Tensor:
    """int64 [49 49]: row of the bias table for each pair of places in a window."""
    places = [(y, x) for y in range(WINDOW) for x in range(WINDOW)]
    rows = [
        [(y - v + WINDOW - 1) * (2 * WINDOW - 1) + (x - u + WINDOW - 1) for v, u in places]
        for y, x in places
    ]
    return torch.tensor(rows)


def shifted_window_mask(side: int) -> Tensor:
    """[windows 49 49]: -100 between places that the shift has brought together from far apart."""

    def region(place: int) -> int:
        return (place >= side - WINDOW) + (place >= side - SHIFT)

    masks = []
    for top in range(0, side, WINDOW):
        for left in range(0, side, WINDOW):
            regions = torch.tensor(
                [
                    3 * region(top + y) + region(left + x)
                    for y in range(WINDOW)
                    for x in range(WINDOW)
                ]
            )
            masks.append(-100.0 * (regions[:, None] != regions[None, :]))
    return torch.stack(masks)


def image_features(entries: dict[str, Tensor], images: Tensor) -> Tensor:
    """Unit-norm features [b 512] of normalised images [b 3 224 224]."""

    def at(name: str) -> Tensor:
        return entries[f"image_encoder.{name}"]

    def norm(x: Tensor, prefix: str) -> Tensor:
        return layer_norm(x, at(f"{prefix}.weight"), at(f"{prefix}.bias"), eps=1e-5)

    def linear(x: Tensor, prefix: str) -> Tensor:
        return x @ at(f"{prefix}.weight").T + at(f"{prefix}.bias")

    x = F.conv2d(images, at("patch_embed.proj.weight"), at("patch_embed.proj.bias"), stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")  # [b side side width]
    stage = 0
    while f"image_encoder.layers.{stage}.blocks.0.norm1.weight" in entries:
        block = 0
        while f"image_encoder.layers.{stage}.blocks.{block}.norm1.weight" in entries:
            prefix = f"layers.{stage}.blocks.{block}"
            shift = SHIFT if block % 2 and x.shape[1] > WINDOW else 0
            shifted = torch.roll(norm(x, f"{prefix}.norm1"), (-shift, -shift), dims=(1, 2))
            mask = at(f"{prefix}.attn_mask") if shift else None
            mixed = windows_one_by_one(entries, f"image_encoder.{prefix}.attn", shifted, mask)
            x = x + torch.roll(mixed, (shift, shift), dims=(1, 2))
            hidden = F.gelu(linear(norm(x, f"{prefix}.norm2"), f"{prefix}.mlp.fc1"))
            x = x + linear(hidden, f"{prefix}.mlp.fc2")
            block += 1
        if f"image_encoder.layers.{stage}.downsample.reduction.weight" in entries:
            corners = [x[:, y::2, left::2] for left in (0, 1) for y in (0, 1)]
            merged = norm(torch.cat(corners, dim=-1), f"layers.{stage}.downsample.norm")
            x = merged @ at(f"layers.{stage}.downsample.reduction.weight").T
        stage += 1
    pooled = norm(x, "norm").flatten(1, 2).mean(dim=1)
    features = pooled @ entries["image_projection"]
    return features / features.norm(dim=1, keepdim=True)


def windows_one_by_one(
    entries: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention within each window of 7 x 7 of x [b side side width]."""
    b, side, _, width = x.shape
    heads = width // HEAD_WIDTH
    index = entries[f"{prefix}.relative_position_index"]
    bias = entries[f"{prefix}.relative_position_bias_table"][index].permute(2, 0, 1)
    out = torch.empty_like(x)
    number = 0
    for top in range(0, side, WINDOW):
        for left in range(0, side, WINDOW):
            here = (slice(None), slice(top, top + WINDOW), slice(left, left + WINDOW))
            qkv = x[here].reshape(b, WINDOW**2, width) @ entries[f"{prefix}.qkv.weight"].T
            qkv = qkv + entries[f"{prefix}.qkv.bias"]
            query, key, value = (
                part.view(b, WINDOW**2, heads, HEAD_WIDTH).transpose(1, 2)
                for part in qkv.chunk(3, dim=2)
            )
            scores = query @ key.transpose(2, 3) / math.sqrt(HEAD_WIDTH) + bias
            if mask is not None:
                scores = scores + mask[number]
            mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
            mixed = mixed @ entries[f"{prefix}.proj.weight"].T + entries[f"{prefix}.proj.bias"]
            out[here] = mixed.view(b, WINDOW, WINDOW, width)
            number += 1
    return out


def text_features(entries: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Unit-norm features [n 512] of token rows [n 77], read at the largest token id."""

    def at(name: str) -> Tensor:
        return entries[f"text_encoder.{name}"]

    def norm(x: Tensor, prefix: str) -> Tensor:
        return layer_norm(x, at(f"{prefix}.weight"), at(f"{prefix}.bias"), eps=1e-12)

    n, length = tokens.shape
    x = at("token_embedding.weight")[tokens] + at("positional_embedding")
    future = torch.full((length, length), -math.inf).triu(1)
    for layer in range(TEXT_LAYERS):
        prefix = f"resblocks.{layer}"
        qkv = norm(x, f"{prefix}.ln_1") @ at(f"{prefix}.attn.in_proj_weight").T
        qkv = qkv + at(f"{prefix}.attn.in_proj_bias")
        query, key, value = (
            part.view(n, length, TEXT_HEADS, -1).transpose(1, 2) for part in qkv.chunk(3, dim=2)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(TEXT_WIDTH // TEXT_HEADS) + future
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + mixed @ at(f"{prefix}.attn.out_proj.weight").T + at(f"{prefix}.attn.out_proj.bias")
        hidden = norm(x, f"{prefix}.ln_2") @ at(f"{prefix}.mlp.c_fc.weight").T
        hidden = hidden + at(f"{prefix}.mlp.c_fc.bias")
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
        x = x + hidden @ at(f"{prefix}.mlp.c_proj.weight").T + at(f"{prefix}.mlp.c_proj.bias")
    at_end = norm(x, "ln_final")[torch.arange(n), tokens.argmax(dim=1)]
    features = at_end @ entries["text_projection"]
    return features / features.norm(dim=1, keepdim=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return weight * centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() + bias
