"""Texts per second of the tokenizer, beside open_clip's.

    unicl-bench tokenize [--files captions.jsonl ...] [--json FILE]

Both must give the same ids first. One thread: importing open_clip switches the threads of the Rust
library off.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from unicl_fast.text.class_lists import fill_template, imagenet_class_names, imagenet_templates
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
    """Texts a second of the tokenizer, beside open_clip's."""

    files: tuple[Path, ...] = ()
    """Text files with a caption a line, or .jsonl lists such as unicl-pack reads; without any,
    ImageNet's prompts."""
    texts: int = 20_000
    """At most so many."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    from open_clip import tokenize

    texts = _read_texts(settings.files)[: settings.texts]
    tokenizer = Tokenizer()
    if not tokenizer(texts).equal(tokenize(texts)):
        raise RuntimeError("the ids are not open_clip's: nothing was timed")
    turns = take_turns(
        {
            "unicl_fast": functools.partial(tokenizer, texts),
            "open_clip": functools.partial(tokenize, texts),
        },
        rounds=settings.rounds,
    )
    figures = {
        f"{name}, texts/s": summarise([len(texts) / turn.wall_seconds for turn in taken])
        for name, taken in turns.items()
    }
    figures["times open_clip"] = summarise(ratios_of(turns, "open_clip", "unicl_fast"))
    print(f"{len(texts):,} texts, the same ids")
    print_figures(figures)
    write_result(settings, figures, "tokenizers", "open_clip_torch")


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
