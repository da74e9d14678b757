"""How many concepts captions speak of, as the paper's Table 1 counts them.

The paper takes the noun phrases that spaCy finds and counts the distinct ones that appear more than
5 times. Where spaCy or its English model is not installed, words are counted in the same way, and
the result says so.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

MORE_THAN = 5
"""A concept occurs more often than this."""
DEFAULT_MODEL = "en_core_web_sm"
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")

HowToCount = Literal["auto", "words", "noun-phrases"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Concepts:
    """What captions speak of."""

    num_concepts: int
    kind: str
    """What was counted, in words."""
    most_frequent: tuple[tuple[str, int], ...]
    """The first 30, with the number of their occurrences."""


def count_concepts(
    texts: Iterable[str], *, how: HowToCount = "auto", model: str = DEFAULT_MODEL
) -> Concepts:
    """Counts distinct concepts that occur more than 5 times.

    Args:
        texts: captions.
        how: "noun-phrases" as in the paper, "words", or "auto": the first if it can be done.
        model: spaCy's English model.

    Raises:
        ValueError: noun phrases are asked for, and spaCy or the model is not installed.
    """
    missing = "" if how == "words" else _what_is_missing(model)
    if missing and how == "noun-phrases":
        raise ValueError(
            f"noun phrases take spaCy with an English model, and {missing} is not installed: "
            f"pip install spacy && python -m spacy download {model}; or count words by "
            "--concepts words"
        )
    if how == "words" or missing:
        kind = f"distinct words that occur more than {MORE_THAN} times"
        if missing:
            kind += f" (no noun phrases as in the paper, since {missing} is not installed)"
        found = (word for text in texts for word in _WORD.findall(text.lower()))
    else:
        kind = f"distinct noun phrases that occur more than {MORE_THAN} times, by spaCy's {model}"
        found = _noun_phrases(texts, model)
    counts = Counter(found)
    frequent = [(text, count) for text, count in counts.items() if count > MORE_THAN]
    frequent.sort(key=lambda entry: (-entry[1], entry[0]))
    return Concepts(num_concepts=len(frequent), kind=kind, most_frequent=tuple(frequent[:30]))


def _what_is_missing(model: str) -> str:
    if importlib.util.find_spec("spacy") is None:
        return "spaCy"
    import spacy

    return "" if spacy.util.is_package(model) else f"spaCy's model {model}"


def _noun_phrases(texts: Iterable[str], model: str) -> Iterator[str]:
    """Noun phrases in lower case, without the articles and pronouns at their beginning."""
    import spacy

    language: Any = spacy.load(model, exclude=["ner", "lemmatizer"])
    for document in language.pipe(texts, batch_size=512):
        for chunk in document.noun_chunks:
            words = list(chunk)
            while words and words[0].pos_ in ("DET", "PRON"):
                words.pop(0)
            if words:
                yield " ".join(word.text.lower() for word in words)
