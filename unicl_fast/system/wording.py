"""Numbers of things in words, as the programs print them."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """`1 class`, `2,000 classes`: of nouns whose plural takes s or, behind an s, es."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
