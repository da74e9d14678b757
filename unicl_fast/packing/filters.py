"""Filters of a build beyond what a list's columns and an image's size say.

Each makes a sequence of samples of a sequence of samples: what is dropped stays in it with a
problem, so that it is listed in quarantine.csv by name and counted by kind, as damaged images are.
All are functions of the samples and the seed: neither the number of workers nor a stop leaves a
trace. (Scores are looked at where lists are read, sizes where images are checked.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from unicl_fast.packing.near_duplicates import count_bits, find_leaders
from unicl_fast.packing.quarantine import CONCEPT_CAP, NEAR_DUPLICATE, looks_like
from unicl_fast.packing.samples import Sample, Samples
from unicl_fast.packing.sources.items import Item, Label, Problem

CAPTION_LENGTH = "caption length"
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def _with_problems(
    samples: Samples, problem_of: Callable[[int, Sample], Problem | None]
) -> Samples:
    """The samples, with a problem for each sound one that `problem_of` has one for."""

    def make(numbers: Sequence[int]) -> list[Sample]:
        made = samples.make(numbers)
        for number, sample in zip(numbers, made, strict=True):
            item = sample[1]
            item.problem = item.problem or problem_of(number, sample)
        return made

    return Samples(len(samples), make)


def filter_captions(samples: Samples, *, fewest: int, most: int) -> tuple[Samples, int]:
    """Drops captions of fewer or more words, and samples that had no other text.

    Args:
        samples: of any kind.
        fewest: words of the shortest caption that is kept.
        most: words of the longest one; 0 sets no limit.

    Returns:
        The samples, and how many captions were dropped.
    """

    def fits(caption: str) -> bool:
        count = sum(1 for _ in _WORD.finditer(caption))
        return count >= fewest and (not most or count <= most)

    def problem_of(number: int, sample: Sample) -> Problem | None:
        item = sample[1]
        before, item.captions = item.captions, list(filter(fits, item.captions))
        if before and not item.captions and not item.labels:
            limits = f"{fewest} to {most}" if most else f"{fewest} or more"
            return Problem(CAPTION_LENGTH, f"no caption has {limits} words: {before[0][:100]!r}")
        return None

    def num_captions(some: Samples) -> int:
        return sum(len(item.captions) for _, item in some)

    filtered = _with_problems(samples, problem_of)
    return filtered, num_captions(samples) - num_captions(filtered)


def drop_near_duplicates(samples: Samples, hashes: Iterator[int | None], bits: int) -> Samples:
    """Drops images that look like an earlier one which stays.

    Args:
        samples: of any kind.
        hashes: the perceptual hash of each sound sample in order; None where it cannot be read.
        bits: in how many of 64 the hashes of images that look alike may differ, 0 to 12.

    Raises:
        TooManyPairsError: as `find_leaders`.
    """
    sound = np.array([number for number, (_, item) in enumerate(samples) if not item.problem])
    found = list(hashes)
    hashed = np.array([one is not None for one in found], dtype=np.bool_)
    numbers = sound[hashed] if len(sound) else np.empty(0, np.int64)
    values = np.array([one for one in found if one is not None], np.uint64)
    leaders = np.arange(len(samples))
    leaders[numbers] = numbers[find_leaders(values, bits)]
    differing = np.zeros(len(samples), np.uint64)
    differing[numbers] = values
    differing = count_bits(differing ^ differing[leaders]).astype(np.uint64)

    def problem_of(number: int, sample: Sample) -> Problem | None:
        if leaders[number] == number:
            return None
        source, leader = samples[int(leaders[number])]
        looks = f"{looks_like(source, leader.name)} ({differing[number]} of 64 bits differ)"
        return Problem(NEAR_DUPLICATE, looks)

    return _with_problems(samples, problem_of)


def read_concepts(path: str) -> tuple[str, ...]:
    """Reads concepts of captions, one a line; raises ValueError for a file without any."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    concepts = tuple(dict.fromkeys(filter(None, map(_as_words, lines))))
    if not concepts:
        raise ValueError(f"--concepts: {path} names none; it should have one a line")
    return concepts


def cap_concepts(
    samples: Samples,
    concepts: Sequence[str],
    *,
    class_of: Callable[[Label], str],
    most: int,
    seed: int,
) -> Samples:
    """Keeps about `most` samples of each concept: MetaCLIP's rule (Xu et al., arXiv 2309.16671).

    A concept is a class, by the name that `class_of` finds for a label, or one of `concepts` that a
    caption names as words that follow each other. A sample is kept with the probability
    min(1, most / count) of the rarest of its concepts, by a number that its source, its name and
    the seed decide; one without a concept is kept.
    """
    known = frozenset(concepts)
    longest = max((concept.count(" ") + 1 for concept in concepts), default=0)

    def concepts_of(item: Item) -> set[tuple[str, str]]:
        named = {("class", class_of(label)) for label in item.labels}
        for caption in item.captions if known else ():
            words = _as_words(caption).split(" ")
            for first in range(len(words)):
                for end in range(first + 1, min(first + longest, len(words)) + 1):
                    if (phrase := " ".join(words[first:end])) in known:
                        named.add(("concept", phrase))
        return named

    counts = Counter(
        concept for _, item in samples if not item.problem for concept in concepts_of(item)
    )

    def problem_of(number: int, sample: Sample) -> Problem | None:
        source, item = sample
        named = concepts_of(item)
        if not named:
            return None
        rarest = min(named, key=lambda concept: (counts[concept], concept))
        name = f"{seed}\0{source}\0{item.name}".encode(errors="surrogateescape")
        if xxhash.xxh3_64_intdigest(name) * counts[rarest] < most << 64:
            return None
        kind, words = rarest
        message = f"{counts[rarest]:,} samples have the {kind} {words!r}, and {most:,} are kept"
        return Problem(CONCEPT_CAP, message)

    return _with_problems(samples, problem_of)


def apply_filters(
    samples: Samples,
    hash_all: Callable[[Samples], Iterator[int | None]],
    *,
    caption_words: tuple[int, int],
    near_duplicates: int | None,
    concepts: str,
    concept_cap: int,
    class_of: Callable[[Label], str],
    seed: int,
) -> tuple[Samples, Counter[str]]:
    """Applies those that are asked for, one after another, each to what the one before leaves.

    Args:
        samples: of all sources.
        hash_all: computes what `drop_near_duplicates` takes.
        caption_words: the fewest and most, of which 0 sets no limit.
        near_duplicates: bits, or None.
        concepts: a file of concepts, or empty.
        concept_cap: samples of a concept; 0 sets no limit.
        class_of: the class's name of a label.
        seed: decides which samples of a concept are kept.

    Returns:
        The samples, and how many captions were dropped.
    """
    dropped: Counter[str] = Counter()
    if any(caption_words):
        fewest, most = caption_words
        samples, count = filter_captions(samples, fewest=fewest, most=most)
        if count:
            dropped["captions of too few or too many words"] = count
    if near_duplicates is not None:
        samples = drop_near_duplicates(samples, hash_all(samples), near_duplicates)
    if concept_cap:
        known = read_concepts(concepts) if concepts else ()
        samples = cap_concepts(samples, known, class_of=class_of, most=concept_cap, seed=seed)
    return samples, dropped


def _as_words(text: str) -> str:
    return " ".join(match.group() for match in _WORD.finditer(text.lower()))
