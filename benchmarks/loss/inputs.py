"""The work of a step before the loss: tokens, TargetM, and the text encoder by the layout of texts.

All are compared with each other before they are timed: RuntimeError if they differ.
"""

import functools
import json
import timeit
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicl_fast.config import ModelConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import TextAttention, TextEncoder
from unicl_fast.objectives.targets import ImageLabels, map_targets
from unicl_fast.text.class_lists import fill_template, imagenet_class_names, imagenet_templates
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import Figures, printed, rate_of, ratio_of, seconds_of, summarise, take_turns
from ..input.contenders import INSTALL
from ..step.parts import random_batch

_MOST_TEXTS = 20_000
_ROWS_OF_A_TURN = 1 << 19
_CLASSES = 1000


def measure_tokens(paths: Sequence[Path], *, rounds: int) -> Figures:
    """Texts/s of our tokenizer and of open_clip's, each on one thread.

    Importing open_clip switches off the threads of the Rust library. The texts are captions, a line
    each or a .jsonl list, or ImageNet's prompts without a file.
    """
    from open_clip import tokenize

    templates, names = imagenet_templates(), imagenet_class_names()
    texts = [] if paths else [fill_template(one, name) for one in templates for name in names]
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = map(json.loads, lines if path.suffix == ".jsonl" else ())
        texts += [text for one in records for text in one.get("captions") or [one["caption"]]]
        texts += lines if path.suffix != ".jsonl" else []
    texts, tokenizer = texts[:_MOST_TEXTS], Tokenizer()
    if not tokenizer(texts).equal(tokenize(texts)):
        raise RuntimeError("the ids are not open_clip's: nothing was timed")
    print(f"{len(texts):,} texts, the same ids")
    works = {"unicl_fast": lambda: tokenizer(texts), "open_clip": lambda: tokenize(texts)}
    turns = take_turns(works, rounds=rounds)
    figures = {f"{name}, texts/s": rate_of(turns[name], len(texts)) for name in turns}
    return printed(figures | {"times open_clip": ratio_of(turns, "open_clip", "unicl_fast")})


def measure_targets(sizes: Sequence[int], *, rounds: int) -> Figures:
    """Milliseconds of TargetM, and the ratios of other functions that find equal rows, by size.

    All run on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures: Figures = {}
    for size in sizes:
        calls = max(1, _ROWS_OF_A_TURN // size)  # one call is too short to be timed
        works = {
            name: functools.partial(timeit.timeit, work, number=calls)
            for name, work in _targets_of(*_rows(size)).items()
        }
        turns = take_turns(works, rounds=rounds)
        own = turns.pop("map_targets")
        of_size = {"map_targets, ms": seconds_of(own, scale=1e3 / calls)}
        for name, taken in turns.items():
            of_size[f"{name}, ms"] = seconds_of(taken, scale=1e3 / calls)
            of_size[f"times {name}"] = ratio_of({"one": taken, "own": own}, "one", "own")
        figures |= printed({f"{size:,} rows, {name}": figure for name, figure in of_size.items()})
    torch.set_num_threads(threads)
    return figures


def _rows(count: int) -> tuple[Any, Any]:
    """Token rows uint16 [count 77], of which a third is repeated, and labels for half of them.

    Rows begin alike, as captions do, which slows sorting down but not hashing.
    """
    random = np.random.default_rng(0)
    pool = np.minimum(random.zipf(1.2, (count * 3 // 4, 77)) + 319, 49405).astype(np.uint16)
    lengths, positions = random.integers(8, 40, (len(pool), 1)), np.arange(77)
    pool[:, 0] = 49406
    pool[positions == lengths - 1] = 49407
    pool[positions >= lengths] = 0
    choice = random.integers(0, len(pool), count)
    return pool[choice], np.where(choice % 2 == 0, choice % _CLASSES, -1)


def _targets_of(rows: Any, labels: Any) -> dict[str, Callable[[], Any]]:
    """Functions that find equal rows, ours first, after comparing their groups."""
    tensor = torch.from_numpy(rows.astype(np.int16))  # torch cannot sort uint16
    void_rows = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))
    ours = map_targets(rows, labels)
    if not np.array_equal(ours.tokens[ours.text_index], rows):
        raise RuntimeError("map_targets gives rows that are not those it was given")

    def number_bytes() -> list[int]:
        numbers = {row: number for number, row in enumerate(dict.fromkeys(map(bytes, rows)))}
        return [numbers[bytes(row)] for row in rows]

    # the function that is timed, and the same with the number of each row's group
    others: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "np.unique(axis=0)": (
            lambda: np.unique(rows, axis=0),
            lambda: np.unique(rows, axis=0, return_inverse=True)[1],
        ),
        "torch.unique(dim=0)": (
            lambda: torch.unique(tensor, dim=0),
            lambda: torch.unique(tensor, dim=0, return_inverse=True)[1],
        ),
        "np.unique of void rows": (
            lambda: np.unique(void_rows, return_index=True, return_inverse=True),
            lambda: np.unique(void_rows, return_inverse=True)[1],
        ),
        "dict of bytes": (lambda: dict.fromkeys(map(bytes, rows)), number_bytes),
    }
    if find_spec("pandas") is None:
        print(f"pandas is left out: it is not installed ({INSTALL})")
    else:
        import pandas

        def factorize() -> Any:
            # one object per row, pandas' fastest input: columns take three times as long
            return pandas.factorize(np.fromiter(map(bytes, rows), dtype=object, count=len(rows)))

        others["pandas.factorize of bytes"] = factorize, lambda: factorize()[0]
    for name, (_, find_groups) in others.items():
        groups = np.asarray(find_groups()).reshape(-1)
        pairs = np.unique(np.stack([groups, ours.text_index], axis=1), axis=0)
        if not len(pairs) == len(ours.tokens) == groups.max() + 1:
            raise RuntimeError(f"map_targets and {name} group the rows differently")
    classes = np.random.default_rng(1).integers(0, _CLASSES, (len(labels), 4))
    classes[:, 0] = np.where(labels >= 0, labels, classes[:, 0])
    several = ImageLabels(classes=classes.reshape(-1), starts=np.arange(len(labels) + 1) * 4)
    return {
        "map_targets": lambda: map_targets(rows, labels),
        **{name: work for name, (work, _) in others.items()},
        "map_targets of several labels": lambda: map_targets(rows, labels, image_labels=several),
    }


def measure_texts(
    data: Path | None, batch_size: int, *, device: torch.device, rounds: int
) -> Figures:
    """Forward and backward passes of the paper's text encoder in bf16, by the layout of captions.

    A full batch, whose texts have as many tokens as fit, gives the price of a token, in which the
    layouts are given.
    """
    if data is None:
        tokens = random_batch(batch_size, pixels=1, num_texts=batch_size).texts.tokens.to(device)
    else:
        tokens = _read_captions(data, batch_size).to(device)
    lengths = tokens.argmax(dim=1) + 1
    num_tokens = int(lengths.sum())
    print(f"{len(tokens)} captions, {num_tokens} tokens, longest {int(lengths.max())}")
    precision = Precision("bf16")

    def forward_and_backward(encode: Callable[[], Tensor]) -> Tensor:
        with precision.autocast(device.type):
            loss = encode().float().square().sum()
        loss.backward()
        return loss.detach()

    layouts = _layouts(tokens, int(lengths.max()), num_tokens, precision)
    works = {name: functools.partial(forward_and_backward, f) for name, f in layouts.items()}
    turns = take_turns(works, rounds=rounds, device_type=device.type)
    figures = {f"{name}, s": seconds_of(taken) for name, taken in turns.items()}
    padding = tokens.numel() / num_tokens
    for name in list(turns)[1:]:
        ratio = ratio_of(turns, name, "full", scale=padding)
        figures[f"{name}, times the cost of its real tokens"] = ratio
    return printed(figures | {"real tokens": summarise([num_tokens])})


def _layouts(
    tokens: Tensor, longest: int, num_tokens: int, precision: Precision
) -> dict[str, Callable[[], Tensor]]:
    """Features of token rows [n 77] in each layout, "full" first; these are of random texts."""
    device, trimmed = tokens.device, tokens[:, :longest]
    full = torch.randint(1, 40_000, tokens.shape, generator=torch.Generator().manual_seed(0))
    full = full.to(device)
    full[:, -1] = tokens.max()  # the end of a text has the largest id
    encoder = TextEncoder(ModelConfig(context_length=tokens.shape[1]))
    place_module(encoder, device=device, precision=precision)
    attentions = [part for part in encoder.modules() if isinstance(part, TextAttention)]
    varlen = attentions[0].varlen_attn

    def encode(rows: Tensor, *packed: int, attention: Any = None) -> Tensor:
        encoder.zero_grad()
        for part in attentions:
            part.varlen_attn = attention
        features: Tensor = encoder(rows, *packed)
        return features

    layouts: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: encode(tokens),
        "trimmed": lambda: encode(trimmed),
        "packed": lambda: encode(trimmed, num_tokens),
    }
    _compare(layouts, largest=1e-3)
    if varlen is not None:
        # it does not accept fp32, in which the others were compared; features are about 1 each
        rows = {"packed, rows of any length": lambda: encode(trimmed, num_tokens, attention=varlen)}
        with precision.autocast(device.type):
            _compare({"padded": layouts["padded"], **rows}, largest=0.1)
        layouts |= rows
    return {"full": lambda: encode(full), **layouts}


@torch.no_grad()
def _compare(layouts: dict[str, Callable[[], Tensor]], *, largest: float) -> None:
    features = {name: encode() for name, encode in layouts.items()}
    for name, other in features.items():
        gap = float((other - features["padded"]).abs().max())
        if not gap <= largest:
            raise RuntimeError(f"features by {name} differ by {gap}; nothing was timed")


def _read_captions(data: Path, count: int) -> Tensor:
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
