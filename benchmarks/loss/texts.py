"""Forward and backward passes of the paper's text encoder over captions, by their layout.

A full batch, whose texts have as many tokens as fit, gives the price of a token, in which layouts
are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unicl_fast.config import ModelConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import TextAttention, TextEncoder, VarlenAttention

from ..harness import Figures, printed, ratio_of, seconds_of, summarise, take_turns
from ..step.parts import random_batch

Encode = Callable[[], Tensor]


def measure_texts(
    data: Path | None, batch_size: int, *, device: torch.device, rounds: int
) -> Figures:
    """Times each layout; RuntimeError if their features differ."""
    if data is None:
        tokens = random_batch(batch_size, pixels=1, num_texts=batch_size).texts.tokens.to(device)
    else:
        tokens = read_captions(data, batch_size).to(device)
    lengths = tokens.argmax(dim=1) + 1
    num_tokens = int(lengths.sum())
    print(f"{len(tokens)} captions, {num_tokens} tokens, longest {int(lengths.max())}")
    works = layout_works(tokens, lengths)
    turns = take_turns(works, rounds=rounds, device_type=device.type)
    figures = {f"{name}, s": seconds_of(taken) for name, taken in turns.items()}
    padding = tokens.numel() / num_tokens
    for name in list(turns)[1:]:
        ratio = ratio_of(turns, name, "full", scale=padding)
        figures[f"{name}, times the cost of its real tokens"] = ratio
    return printed(figures | {"real tokens": summarise([num_tokens])})


def layout_works(tokens: Tensor, lengths: Tensor) -> dict[str, Encode]:
    """For each layout of token rows [n 77], "full" first, a pass forward and backward in bf16.

    Raises RuntimeError if the features of two layouts differ.
    """
    precision = Precision("bf16")

    def forward_and_backward(encode: Encode) -> Tensor:
        with precision.autocast(tokens.device.type):
            loss = encode().float().square().sum()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.detach()

    layouts = _layouts(tokens, lengths, precision)
    return {name: functools.partial(forward_and_backward, f) for name, f in layouts.items()}


def _layouts(tokens: Tensor, lengths: Tensor, precision: Precision) -> dict[str, Encode]:
    device = tokens.device
    trimmed, num_tokens = tokens[:, : int(lengths.max())], int(lengths.sum())
    full = torch.randint(1, 40_000, tokens.shape, generator=torch.Generator().manual_seed(0))
    full = full.to(device)
    full[:, -1] = tokens.max()  # the end of a text has the largest id
    encoder = TextEncoder(ModelConfig(context_length=tokens.shape[1]))
    place_module(encoder, device=device, precision=precision)
    attentions = [part for part in encoder.modules() if isinstance(part, TextAttention)]
    varlen = attentions[0].varlen_attn

    def encode(rows: Tensor, *packed: int, attention: VarlenAttention | None = None) -> Tensor:
        encoder.zero_grad()
        for part in attentions:
            part.varlen_attn = attention
        features: Tensor = encoder(rows, *packed)
        return features

    layouts: dict[str, Encode] = {
        "padded": lambda: encode(tokens),
        "trimmed": lambda: encode(trimmed),
        "packed": lambda: encode(trimmed, num_tokens),
    }
    compare(layouts, largest=1e-3)
    if varlen is not None:
        # it takes no fp32, in which the others were compared; features are about 1 each
        rows = {"packed, rows of any length": lambda: encode(trimmed, num_tokens, attention=varlen)}
        with precision.autocast(device.type):
            compare({"padded": layouts["padded"], **rows}, largest=0.1)
        layouts |= rows
    return {"full": lambda: encode(full), **layouts}


def read_captions(data: Path, count: int) -> Tensor:
    """Token rows [count 77] of the first captions of the data set's first images."""
    with PackedDataset(data) as dataset:
        with_captions = np.flatnonzero(dataset.samples["captions_count"])[:count]
        if len(with_captions) < count:
            raise ValueError(
                f"{data} has captions for {len(with_captions)} images, but {count} are wanted; "
                "lower --batch-size"
            )
        rows = torch.zeros(count, dataset.manifest.context_length, dtype=torch.int64)
        for row, index in zip(rows, with_captions.tolist(), strict=True):
            caption = dataset.caption_tokens(index, 0)
            row[: len(caption)] = torch.from_numpy(caption.astype(np.int64))
    return rows


@torch.no_grad()
def compare(layouts: dict[str, Encode], *, largest: float) -> None:
    """Raises RuntimeError if the features of two layouts differ by more than `largest`."""
    features = {name: encode() for name, encode in layouts.items()}
    for name, other in features.items():
        gap = float((other - features["padded"]).abs().max())
        if not np.isfinite(gap) or gap > largest:
            raise RuntimeError(f"features by {name} differ by {gap}; nothing was timed")
