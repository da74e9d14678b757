"""What a batch of captions costs the text encoder, with its padding and without.

    unicl-bench text --data PACKED [--json FILE]

Forward and backward of the paper's text encoder over real captions: padded to the context length,
trimmed to the longest, packed without padding. Beside them stands a full batch, whose texts all
have as many tokens as fit: its time for each token is the price at which the captions' real tokens
are counted. First the three layouts' features are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unicl_fast.benchmarks.harness import (
    BenchmarkSettings,
    print_figures,
    ratios_of,
    summarise,
    take_turns,
    write_result,
)
from unicl_fast.config import PrecisionName
from unicl_fast.models.text_encoder import TextEncoder
from unicl_fast.pipelines.host_memory import keep_freed_memory
from unicl_fast.precision import Precision, place_module
from unicl_fast.shards import PackedDataset
from unicl_fast.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What captions cost the text encoder, with their padding and without."""

    data: Path
    """Packed data set with captions."""
    batch_size: int = 64
    """Captions of a batch."""
    width: int = 512
    """Width of the encoder; a head for each 64."""
    layers: int = 12
    """Its blocks."""
    precision: PrecisionName = "bf16"
    """Arithmetic."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    keep_freed_memory()
    tokenizer = Tokenizer()
    tokens = read_captions(settings.data, settings.batch_size)
    lengths = tokens.argmax(dim=1) + 1
    trimmed, num_tokens = tokens[:, : int(lengths.max())], int(lengths.sum())
    full = torch.randint(1, 40_000, tokens.shape, generator=torch.Generator().manual_seed(0))
    full[:, -1] = tokenizer.end_id
    encoder = TextEncoder(
        vocab_size=49408,
        context_length=tokens.shape[1],
        width=settings.width,
        layers=settings.layers,
        heads=settings.width // 64,
    )
    precision = Precision(settings.precision)
    place_module(encoder, device=torch.device("cpu"), precision=precision)
    compare(encoder, tokens, trimmed, num_tokens)

    def forward_and_backward(rows: Tensor, known: int | None = None) -> Callable[[], object]:
        def work() -> object:
            with precision.autocast("cpu"):
                features = encoder(rows, known)
            features.float().square().sum().backward()
            return encoder.zero_grad()

        return work

    turns = take_turns(
        {
            "full": forward_and_backward(full),
            "padded": forward_and_backward(tokens),
            "trimmed": forward_and_backward(trimmed),
            "packed": forward_and_backward(trimmed, num_tokens),
        },
        rounds=settings.rounds,
    )
    share = num_tokens / tokens.numel()
    figures = {
        f"{name}, s": summarise([turn.wall_seconds for turn in taken])
        for name, taken in turns.items()
    }
    for name in ("padded", "trimmed", "packed"):
        ratios = [ratio / share for ratio in ratios_of(turns, name, "full")]
        figures[f"{name}, times the cost of its real tokens"] = summarise(ratios)
    print(f"{len(tokens)} captions, {num_tokens} tokens, longest {int(lengths.max())}")
    print_figures(figures)
    write_result(settings, figures, real_tokens=num_tokens, longest=int(lengths.max()))


def read_captions(data: Path, count: int) -> Tensor:
    """Token rows [count 77] of the first captions of the data set's first pictures."""
    with PackedDataset(data) as dataset:
        with_captions = np.flatnonzero(dataset.samples["captions_count"])[:count]
        if len(with_captions) < count:
            raise ValueError(
                f"{data} has captions for {len(with_captions)} pictures, but {count} are wanted; "
                "lower --batch-size"
            )
        rows = torch.zeros(count, dataset.manifest.context_length, dtype=torch.int64)
        for row, index in zip(rows, with_captions.tolist(), strict=True):
            caption = dataset.caption_tokens(index, 0)
            row[: len(caption)] = torch.from_numpy(caption.astype(np.int64))
    return rows


@torch.no_grad()
def compare(encoder: TextEncoder, tokens: Tensor, trimmed: Tensor, num_tokens: int) -> None:
    """Refuses to time layouts that do not compute the same features, in fp32."""
    padded = encoder(tokens)
    for other in (encoder(trimmed), encoder(trimmed, num_tokens)):
        gap = float((other - padded).abs().max())
        if not np.isfinite(gap) or gap > 1e-3:
            raise RuntimeError(f"the layouts' features differ by {gap}; nothing was timed")
