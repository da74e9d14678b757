"""The cost of texts: tokenising them, finding equal ones and their classes, encoding them.

    unicl-bench tokenize [--files captions.jsonl ...]
    unicl-bench targets [--sizes 1024 8192]
    unicl-bench text --data PACKED

`tokenize` runs on one thread: importing open_clip switches the threads of the Rust library off.

`targets` compares the target map with functions of common libraries that find equal rows; ours
gives classes, too. Half of the rows are captions, half have labels; a third of the texts occurs
more than once. Rows begin alike, as captions do, which slows sorting and not hashing. The last
contestant is ours again, for images of four labels each (COCO's have 3.4).

`text` runs forward and backward of the paper's text encoder over real captions: padded to the
context length, trimmed to the longest, in four groups by length, each trimmed to its own longest,
and packed without padding; on a GPU with torch's kernel for rows of any length, and with padded
attention as elsewhere. Beside them runs a full batch, whose texts all have as many tokens as fit:
its time for each token is the unit in which the captions' real tokens are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unicl_fast.config import DeviceName, PrecisionName
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import TextAttention, TextEncoder, VarlenAttention
from unicl_fast.objectives.targets import ImageLabels, map_targets
from unicl_fast.system.machine import choose_device, keep_freed_memory
from unicl_fast.text.class_lists import fill_template, imagenet_class_names, imagenet_templates
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import Figures, Stage, printed, rate_of, ratio_of, seconds_of, take_turns

try:
    import pandas
except ImportError:
    pandas = None

Rows = npt.NDArray[np.uint16]
_ROWS_OF_A_TURN = 1 << 19
_CLASSES = 1000
_LABELS_OF_AN_IMAGE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize(Stage):
    """Texts/s of the tokenizer, beside open_clip's."""

    files: tuple[Path, ...] = ()
    """Text files with a caption a line, or .jsonl lists such as unicl-pack reads; without any,
    ImageNet's prompts."""
    texts: int = 20_000
    """Most texts that are taken."""

    def run(self) -> None:
        from open_clip import tokenize

        texts = _read_texts(self.files)[: self.texts]
        tokenizer = Tokenizer()
        if not tokenizer(texts).equal(tokenize(texts)):
            raise RuntimeError("the ids are not open_clip's: nothing was timed")
        print(f"{len(texts):,} texts, the same ids")
        turns = take_turns(
            {"unicl_fast": lambda: tokenizer(texts), "open_clip": lambda: tokenize(texts)},
            rounds=self.rounds,
        )
        figures = {f"{name}, texts/s": rate_of(turns[name], len(texts)) for name in turns}
        figures["times open_clip"] = ratio_of(turns, "open_clip", "unicl_fast")
        self.report(figures, "tokenizers", "open_clip_torch")


def _read_texts(paths: tuple[Path, ...]) -> list[str]:
    if not paths:
        return [
            fill_template(template, name)
            for template in imagenet_templates()
            for name in imagenet_class_names()
        ]
    texts: list[str] = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".jsonl":
            for record in map(json.loads, lines):
                texts += record.get("captions") or [record["caption"]]
        else:
            texts += lines
    return texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets(Stage):
    """Time of the target map, beside np.unique, torch.unique and others."""

    sizes: tuple[int, ...] = (1024, 8192, 65536)
    """Rows of a batch."""

    def run(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()  # as in training; all gain by it
        figures: Figures = {}
        if pandas is None:
            print("pandas is left out: it is not installed (pip install 'unicl_fast[bench]')")
        for size in self.sizes:
            contestants = make_contestants(*_make_batch(size))
            times = max(1, _ROWS_OF_A_TURN // size)  # one call is too short to be timed alone
            works = {
                name: functools.partial(timeit.timeit, work, number=times)
                for name, work in contestants.items()
            }
            turns = take_turns(works, rounds=self.rounds)
            for name, taken in turns.items():
                in_ms = seconds_of(taken, scale=1e3 / times)
                figures |= printed({f"{size:,} rows, {name}, ms": in_ms})
            for name in list(turns)[1:]:
                ratio = ratio_of(turns, name, "map_targets")
                figures |= printed({f"{size:,} rows, times {name}": ratio})
        self.write_result(figures, "numpy", "numba", "pandas")


def make_contestants(rows: Rows, labels: npt.NDArray[np.int64]) -> dict[str, Callable[[], object]]:
    """Functions that find equal rows, ours first; all of them group these rows alike."""
    tensor = torch.from_numpy(rows.astype(np.int16))  # torch cannot sort uint16
    void_rows = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))

    def number_bytes() -> list[int]:
        numbers = {row: number for number, row in enumerate(dict.fromkeys(map(bytes, rows)))}
        return [numbers[bytes(row)] for row in rows]

    def factorize() -> Any:
        # one object a row, pandas' fastest input: columns take three times as long
        return pandas.factorize(np.fromiter(map(bytes, rows), dtype=object, count=len(rows)))

    # what is timed, and the same with the number of each row's group
    others: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
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
    if pandas is not None:
        others["pandas.factorize of bytes"] = (factorize, lambda: factorize()[0])
    ours = map_targets(rows, labels)
    if not np.array_equal(ours.tokens[ours.text_index], rows):
        raise RuntimeError("map_targets gives rows that are not those it was given")
    for name, (_, find_groups) in others.items():
        groups = np.asarray(find_groups()).reshape(-1)
        pairs = np.unique(np.stack([groups, ours.text_index], axis=1), axis=0)
        if not len(pairs) == len(ours.tokens) == groups.max() + 1:
            raise RuntimeError(f"map_targets and {name} group the rows differently")
    timed = {name: work for name, (work, _) in others.items()}
    random = np.random.default_rng(1)
    classes = random.integers(0, _CLASSES, (len(rows), _LABELS_OF_AN_IMAGE))
    classes[:, 0] = np.where(labels >= 0, labels, classes[:, 0])
    several = ImageLabels(
        classes=classes.reshape(-1), starts=np.arange(len(rows) + 1) * _LABELS_OF_AN_IMAGE
    )
    return {
        "map_targets": lambda: map_targets(rows, labels),
        **timed,
        "map_targets of several labels": lambda: map_targets(rows, labels, image_labels=several),
    }


def _make_batch(batch_size: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Rows as a tokenizer makes them: start, Zipf-distributed words, end, padding."""
    random = np.random.default_rng(0)
    shape = (batch_size * 3 // 4, 77)
    pool = np.minimum(random.zipf(1.2, shape) + 319, 49405).astype(np.uint16)
    lengths = random.integers(8, 40, (len(pool), 1))
    pool[:, 0] = 49406
    pool[np.arange(77) == lengths - 1] = 49407
    pool[np.arange(77) >= lengths] = 0
    choice = random.integers(0, len(pool), batch_size)
    return pool[choice], np.where(choice % 2 == 0, choice % _CLASSES, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Stage):
    """Cost of captions in the text encoder, with their padding and without."""

    data: Path
    """Packed data set with captions."""
    batch_size: int = 64
    """Captions of a batch."""
    width: int = 512
    """Width of the encoder; a head for each 64."""
    layers: int = 12
    """Number of its blocks."""
    precision: PrecisionName = "bf16"
    """Arithmetic."""
    device: DeviceName = "auto"
    """Device that runs the encoder."""

    def run(self) -> None:
        keep_freed_memory()
        device, precision = choose_device(self.device), Precision(self.precision)
        tokens = read_captions(self.data, self.batch_size).to(device)
        lengths = tokens.argmax(dim=1) + 1
        num_tokens, longest = int(lengths.sum()), int(lengths.max())
        layouts = text_layouts(self, tokens, lengths, precision)

        def forward_and_backward(encode: Callable[[], Tensor]) -> None:
            with precision.autocast(device.type):
                features = encode()
            features.float().square().sum().backward()

        works = {name: functools.partial(forward_and_backward, f) for name, f in layouts.items()}
        turns = take_turns(works, rounds=self.rounds)
        figures = {f"{name}, s": seconds_of(taken) for name, taken in turns.items()}
        padding = tokens.numel() / num_tokens
        for name in list(turns)[1:]:
            ratio = ratio_of(turns, name, "full", scale=padding)
            figures[f"{name}, times the cost of its real tokens"] = ratio
        print(f"{len(tokens)} captions, {num_tokens} tokens, longest {longest}")
        self.report(figures, real_tokens=num_tokens, longest=longest)


def text_layouts(
    settings: Text, tokens: Tensor, lengths: Tensor, precision: Precision
) -> dict[str, Callable[[], Tensor]]:
    """An encoder of the texts in each layout, "full" first; their features have been compared."""
    device = tokens.device
    trimmed, num_tokens = tokens[:, : int(lengths.max())], int(lengths.sum())
    full = torch.randint(1, 40_000, tokens.shape, generator=torch.Generator().manual_seed(0))
    full = full.to(device)
    full[:, -1] = tokens.max()  # the end of a text has the largest id
    encoder = TextEncoder(
        vocab_size=49408,
        context_length=tokens.shape[1],
        width=settings.width,
        layers=settings.layers,
        heads=settings.width // 64,
    )
    place_module(encoder, device=device, precision=precision)
    attentions = [part for part in encoder.modules() if isinstance(part, TextAttention)]
    varlen = attentions[0].varlen_attn

    def encode(rows: Tensor, *packed: int, attention: VarlenAttention | None = None) -> Tensor:
        encoder.zero_grad()
        for part in attentions:
            part.varlen_attn = attention
        features: Tensor = encoder(rows, *packed)
        return features

    order = lengths.argsort()
    groups = [tokens[group, : int(lengths[group].max())] for group in order.chunk(4)]
    positions = order.argsort()

    def encode_groups() -> Tensor:
        encoder.zero_grad()
        return torch.cat([encoder(group) for group in groups])[positions]

    layouts: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: encode(tokens),
        "trimmed": lambda: encode(trimmed),
        "grouped": encode_groups,
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
def compare(layouts: dict[str, Callable[[], Tensor]], *, largest: float) -> None:
    """Raises RuntimeError if the features of two layouts differ by more than `largest`."""
    features = {name: encode() for name, encode in layouts.items()}
    for name, other in features.items():
        gap = float((other - features["padded"]).abs().max())
        if not np.isfinite(gap) or gap > largest:
            raise RuntimeError(f"features by {name} differ by {gap}; nothing was timed")
