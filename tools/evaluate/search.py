"""`unicl-eval search`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unicl_fast.evaluation.choices import SIGNALS, Signal
from unicl_fast.system.wording import count_of, print_text

from .command import Number, Use

if TYPE_CHECKING:
    from unicl_fast.evaluation.search import Found, SearchIndex


@dataclass(frozen=True, kw_only=True)
class Search(Use):
    """Finds the images of a data set that fit texts or resemble example images.

    Texts are compared with images, with words predicted from them (by a run whose training captions
    and features are at hand), with titles (captions and class names), and with their words, so that
    a plural, a part of a word or a typing error finds it, too. What is encoded is kept in a
    folder. Without --query and --image, texts are read from the terminal or the standard input, one
    a line.

    Example: unicl-eval search --checkpoint runs/shop --data packed/shop --query "red apples"
    """

    query: tuple[str, ...] = ()
    """Texts to search for."""
    image: tuple[Path, ...] = ()
    """Image files to search for."""
    by: tuple[Signal, ...] = SIGNALS
    """Signals that rank images; several are weighed as measured on the data's own titles."""
    top: Number = 10
    """Images shown for each."""
    features: str = "auto"
    """Folder that keeps features, as in linear-probe."""

    def check(self) -> None:
        super().check()
        for path in self.image:
            if not path.is_file():
                raise FileNotFoundError(f"--image {path}: there is no such file")
        for file in filter(os.path.isfile, self.query):
            raise ValueError(f"{file} is a file, not a text: --image {file} searches by it")

    def run(self) -> None:
        from unicl_fast.evaluation.search import open_index

        folder = self.features_folder(self.features)
        with contextlib.ExitStack() as stack:
            on_ranks = stack.enter_context(self.model())
            index = stack.enter_context(open_index(on_ranks, self.data, folder=folder))
            if not on_ranks.ranks.is_main:
                return
            for path in self.image:
                _print_found(str(path), index.by_images([path], top=self.top)[0])
            for text in self.query if self.query or self.image else _typed(index):
                _print_found(text, index.by_texts([text], top=self.top, by=self.by)[0])


def _typed(index: SearchIndex) -> Iterator[str]:
    """Texts from the terminal or the standard input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{count_of(len(index), 'image')}; type what to search for (Ctrl-D ends)")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := input("search> " if is_terminal else "").strip():
                yield text


def _print_found(query: str, found: Sequence[Found]) -> None:
    lines = [query]
    for one in found:
        title = (one.caption or one.name) + (f" [{', '.join(one.labels)}]" if one.labels else "")
        more = f"  (and {count_of(one.others, 'other')} of its group)" if one.others else ""
        lines.append(f"  {one.score:.3f}  {title}  {one.source}/{one.name.lstrip('/')}{more}")
    print_text("\n".join(lines), sys.stdout)
