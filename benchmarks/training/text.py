"""What a batch of captions costs the text encoder, with its padding and without.

    unicl-bench text --data PACKED [--json FILE]

Forward and backward of the paper's text encoder over real captions: padded to the context length,
trimmed to the longest, in four groups by length, each trimmed to its own longest, and packed
without padding; on a GPU with torch's kernel for rows of any length, and spread out for attention
as elsewhere. Beside them stands a full batch, whose texts all have as many tokens as fit: its time
for each token is the price at which the captions' real tokens are counted. First the layouts'
features are compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unicl_fast.config import DeviceName, PrecisionName
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import CausalAttention, TextEncoder, VarlenAttention
from unicl_fast.system.host_memory import keep_freed_memory
from unicl_fast.system.machine import choose_device
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import (
    BenchmarkSettings,
    print_figures,
    ratios_of,
    summarise,
    take_turns,
    write_result,
)


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
    device: DeviceName = "cpu"
    """Where."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    keep_freed_memory()
    device = choose_device(settings.device)
    tokens = read_captions(settings.data, settings.batch_size).to(device)
    lengths = tokens.argmax(dim=1) + 1
    trimmed, num_tokens = tokens[:, : int(lengths.max())], int(lengths.sum())
    full = torch.randint(1, 40_000, tokens.shape, generator=torch.Generator().manual_seed(0))
    full[:, -1] = Tokenizer().end_id
    full = full.to(device)
    encoder = TextEncoder(
        vocab_size=49408,
        context_length=tokens.shape[1],
        width=settings.width,
        layers=settings.layers,
        heads=settings.width // 64,
    )
    precision = Precision(settings.precision)
    place_module(encoder, device=device, precision=precision)
    attentions = [part for part in encoder.modules() if isinstance(part, CausalAttention)]
    varlen = attentions[0].varlen_attn

    def encode_packed(attention: VarlenAttention | None = None) -> Tensor:
        for part in attentions:
            part.varlen_attn = attention
        return encoder(trimmed, num_tokens)

    layouts: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: encoder(tokens),
        "trimmed": lambda: encoder(trimmed),
        "grouped": functools.partial(encode_groups, encoder, *make_groups(tokens, lengths)),
        "packed": encode_packed,
    }
    compare(layouts, largest=1e-3)
    if varlen is not None:
        # it takes no fp32, in which the others were compared; features are some 1 each
        rows = {"packed, rows of any length": functools.partial(encode_packed, varlen)}
        with precision.autocast(device.type):
            compare({"padded": layouts["padded"], **rows}, largest=0.1)
        layouts |= rows

    def forward_and_backward(encode: Callable[[], Tensor]) -> Callable[[], object]:
        def work() -> object:
            with precision.autocast(device.type):
                features = encode()
            features.float().square().sum().backward()
            encoder.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return None

        return work

    works = {"full": forward_and_backward(lambda: encoder(full))}
    works |= {name: forward_and_backward(encode) for name, encode in layouts.items()}
    turns = take_turns(works, rounds=settings.rounds)
    share = num_tokens / tokens.numel()
    figures = {
        f"{name}, s": summarise([turn.wall_seconds for turn in taken])
        for name, taken in turns.items()
    }
    for name in layouts:
        ratios = [ratio / share for ratio in ratios_of(turns, name, "full")]
        figures[f"{name}, times the cost of its real tokens"] = summarise(ratios)
    print(f"{len(tokens)} captions, {num_tokens} tokens, longest {int(lengths.max())}")
    print_figures(figures)
    write_result(settings, figures, real_tokens=num_tokens, longest=int(lengths.max()))


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


def make_groups(tokens: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
    """Four groups of equally many texts by length, each as wide as its longest.

    Returns:
        The groups' tokens, and where each text lies in them.
    """
    order = lengths.argsort()
    groups = [tokens[group, : int(lengths[group].max())] for group in order.chunk(4)]
    return groups, order.argsort()


def encode_groups(encoder: TextEncoder, groups: list[Tensor], places: Tensor) -> Tensor:
    """Features of one group after the other, in the order of the texts."""
    return torch.cat([encoder(group) for group in groups])[places]


@torch.no_grad()
def compare(layouts: dict[str, Callable[[], Tensor]], *, largest: float) -> None:
    """Refuses to time layouts whose features differ by more than so much."""
    features = {name: encode() for name, encode in layouts.items()}
    for name, other in features.items():
        gap = float((other - features["padded"]).abs().max())
        if not np.isfinite(gap) or gap > largest:
            raise RuntimeError(f"features by {name} differ by {gap}; nothing was timed")
