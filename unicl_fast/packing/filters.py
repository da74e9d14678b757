"""Filters of a build beyond what a list's columns and an image's size say.

Each makes a sequence of samples of a sequence of samples: what is dropped stays in it with a
problem, so that it is listed in quarantine.csv by name and counted by kind, as damaged images are.
All are functions of the samples: neither the number of workers nor a stop leaves a trace. (Scores
are looked at where lists are read, sizes where images are checked.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unicl_fast.packing.near_duplicates import count_bits, find_leaders
from unicl_fast.packing.quarantine import NEAR_DUPLICATE, looks_like
from unicl_fast.packing.samples import Sample, Samples
from unicl_fast.packing.sources.items import Problem

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
