"""The concepts that captions name, found among stored tokens: `data.balance_concepts`.

A concept is a word, or words that follow each other, of a list. A caption names it where the tokens
of all its words stand in it, from the beginning of a word to the end of one: "dog" is in "the dog",
and neither in "dogs" nor in "kdog", whose last token is the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from unicl_fast.dataset.arrays import blocks_of, positions_of_ranges
from unicl_fast.system.kernels import kernel
from unicl_fast.text.tokenizer import Tokenizer

from .order import Int64Array


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Concepts:
    """A list of concepts as tokens, in the order of these, each once."""

    tokens: NDArray[np.uint16]
    """One concept's after another's."""
    starts: Int64Array
    """[k + 1] where each concept begins, and the end."""
    first_with: Int64Array
    """[v + 1] concepts that begin with token t are first_with[t] to first_with[t + 1] - 1."""
    ends_word: NDArray[np.bool_]
    """[v] whether a token ends a word, or marks the start of a text."""

    @property
    def digest(self) -> str:
        """XXH3 of what they are, whatever the file's name and order; 16 hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(self.tokens.tobytes() + self.starts.tobytes())


def read_concepts(path: Path) -> Concepts:
    """Reads concepts, one a line.

    Raises:
        ValueError: the file has none, or is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    tokenizer = Tokenizer()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.balance_concepts: {path} is not UTF-8: {error}") from error
    phrases = sorted({tuple(row[1:-1].tolist()) for row in tokenizer.encode(lines)} - {()})
    if not phrases:
        raise ValueError(f"data.balance_concepts: {path} names none; it should have one a line")
    firsts = np.array([phrase[0] for phrase in phrases])
    return Concepts(
        tokens=np.array([token for phrase in phrases for token in phrase], np.uint16),
        starts=np.cumsum([0, *map(len, phrases)], dtype=np.int64),
        first_with=np.searchsorted(firsts, np.arange(tokenizer.vocab_size + 1)),
        ends_word=tokenizer.ends_word,
    )


def find_named(
    samples: NDArray[Any], captions: NDArray[Any], tokens: NDArray[np.uint16], concepts: Concepts
) -> tuple[Int64Array, Int64Array]:
    """Finds which concepts the captions of each sample name.

    Args:
        samples: structured [N] with captions_start and captions_count.
        captions: structured, with tokens_start and tokens_length.
        tokens: flat; a caption's tokens are a range of it, start and end included.
        concepts: those of the list.

    Returns:
        How many each sample names [N], and which, one sample's after another's; each once.
    """
    counts, named = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows in blocks_of(samples):
        num_captions = rows["captions_count"].astype(np.int64)
        mine = captions[positions_of_ranges(rows["captions_start"], num_captions)]
        arguments = (
            num_captions,
            mine["tokens_start"].astype(np.int64),
            mine["tokens_length"].astype(np.int64),
            np.asarray(tokens),
            concepts.tokens,
            concepts.starts,
            concepts.first_with,
            concepts.ends_word,
        )
        found, _ = _name(*arguments, np.empty(0, np.int64))  # counts alone
        counts.append(found)
        named.append(_name(*arguments, np.empty(found.sum(), np.int64))[1])
    return np.concatenate(counts), np.concatenate(named)


@kernel
def _name(
    num_captions: Any, begins: Any, lengths: Any, tokens: Any, phrases: Any, starts: Any,
    first_with: Any, ends_word: Any, named: Any,
) -> Any:  # fmt: skip
    """Concepts of each sample, counted, and written into `named` where there is room for all."""
    counts = np.zeros(num_captions.size, np.int64)
    last_sample = np.full(starts.size - 1, -1, np.int64)
    total = caption = 0
    for sample in range(num_captions.size):
        for _ in range(num_captions[sample]):
            end = begins[caption] + lengths[caption]
            for position in range(begins[caption] + 1, end):
                if not ends_word[tokens[position - 1]]:
                    continue
                first = tokens[position]
                for concept in range(first_with[first], first_with[first + 1]):
                    size = starts[concept + 1] - starts[concept]
                    if last_sample[concept] == sample or position + size > end:
                        continue
                    place = 1
                    while (
                        place < size
                        and tokens[position + place] == phrases[starts[concept] + place]
                    ):
                        place += 1
                    if place == size:
                        last_sample[concept] = sample
                        counts[sample] += 1
                        if named.size:
                            named[total] = concept
                        total += 1
            caption += 1
    return counts, named
