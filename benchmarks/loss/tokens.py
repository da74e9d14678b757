"""Texts/s of the tokenizer and of open_clip's.

Both run on one thread: importing open_clip switches the threads of the Rust library off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from unicl_fast.text.class_lists import fill_template, imagenet_class_names, imagenet_templates
from unicl_fast.text.tokenizer import Tokenizer

from ..harness import Figures, printed, rate_of, ratio_of, take_turns

_MOST_TEXTS = 20_000


def measure_tokens(texts: Sequence[str], *, rounds: int) -> Figures:
    """Rates of both tokenizers; RuntimeError if their ids differ."""
    from open_clip import tokenize

    texts, tokenizer = list(texts[:_MOST_TEXTS]), Tokenizer()
    if not tokenizer(texts).equal(tokenize(texts)):
        raise RuntimeError("the ids are not open_clip's: nothing was timed")
    print(f"{len(texts):,} texts, the same ids")
    turns = take_turns(
        {"unicl_fast": lambda: tokenizer(texts), "open_clip": lambda: tokenize(texts)},
        rounds=rounds,
    )
    figures = {f"{name}, texts/s": rate_of(turns[name], len(texts)) for name in turns}
    return printed(figures | {"times open_clip": ratio_of(turns, "open_clip", "unicl_fast")})


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of all files; ImageNet's prompts if there are no files."""
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
