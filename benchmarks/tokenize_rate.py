"""Texts per second of the tokenizer, beside open_clip's.

    python -m unicl_fast.benchmarks.tokenize_rate [FILE ...]

Both must give the same ids first. Then they take turns, so that a change of the machine's mood hits
both, and the median of the ratios is what counts. One thread: importing open_clip switches the
threads of the Rust library off.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from unicl_fast.prompts import fill_template, imagenet_class_names, imagenet_templates
from unicl_fast.tokenizer import Tokenizer

_ROUNDS = 5
_MAX_TEXTS = 20_000


def main() -> None:
    """Times the texts of the files given (ImageNet prompts if there are none)."""
    texts = _read_texts(sys.argv[1:])[:_MAX_TEXTS]
    from open_clip import tokenize

    tokenizer = Tokenizer()
    if not tokenizer(texts).equal(tokenize(texts)):  # also the warm-up of both
        sys.exit("the ids are not open_clip's: nothing to compare")
    ours, theirs = [], []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        tokenize(texts)
        middle = time.perf_counter()
        tokenizer(texts)
        theirs.append(middle - start)
        ours.append(time.perf_counter() - middle)
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    print(f"texts       {len(texts):,} (the same ids)")
    print(f"open_clip   {len(texts) / statistics.median(theirs):,.0f} texts/s")
    print(f"unicl_fast  {len(texts) / statistics.median(ours):,.0f} texts/s")
    print(f"ratio       {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _read_texts(paths: list[str]) -> list[str]:
    """Lines of text files, and the captions in .jsonl lists such as unicl-pack reads."""
    if not paths:
        return [
            fill_template(template, name)
            for template in imagenet_templates()
            for name in imagenet_class_names()
        ]
    texts: list[str] = []
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        if path.endswith(".jsonl"):
            for record in map(json.loads, lines):
                texts += record.get("captions") or [record["caption"]]
        else:
            texts += lines
    return texts


if __name__ == "__main__":
    main()
