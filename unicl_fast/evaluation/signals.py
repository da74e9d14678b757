"""How the signals of a search are weighed: by queries made from the data's own titles.

Of a sample with several captions one is the query, and the search is without it. Of one title, or
of titles that are nearly equal, such as a product's sizes, the query is half of one, with a letter
left out, as somebody types who half remembers it.
"""

import difflib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.evaluation.choices import Signal
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.untrusted_files import read_file

logger = logging.getLogger("unicl_fast")

_QUERIES, _AT_ONCE = 200, 20
_RATIOS = (1.0, 3.0, 9.0)  # none is 0: a person's query can need a signal that no title needs
_NEARLY = 0.8  # of two titles; Flickr8k's captions of one photograph are below it
_WORD_SCALE = 6.0  # deviations above the mean that all words of the query are worth

Scores: TypeAlias = dict[Signal, Float[np.ndarray, "q n"]]


def standardise(scores: Scores) -> Scores:
    """Each query's scores in standard deviations above their mean.

    Those of words are scaled by a constant: most are 0, so that a single weak hit would be dozens
    of deviations above the mean.
    """
    found: Scores = {}
    for signal, values in scores.items():
        if signal == "words":
            found[signal] = _WORD_SCALE * values
        else:
            centred = values - values.mean(axis=1, keepdims=True)
            found[signal] = centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-6)
    return found


def fuse(standardised: Scores, weights: Mapping[Signal, float]) -> Float[np.ndarray, "q n"]:
    """The weighted mean of the signals."""
    total = sum(weights[signal] for signal in standardised)
    parts = [weights[signal] / total * values for signal, values in standardised.items()]
    fused: NDArray[Any] = np.stack(parts).sum(axis=0).astype(np.float32)
    return fused


def measure(
    titles: Sequence[Sequence[str]],
    captions: Sequence[int],
    scores_of: Callable[[list[str], list[tuple[list[int], str]]], Scores],
) -> dict[str, Any]:
    """Weighs the signals by 200 queries made from the titles of samples, which are drawn.

    Args:
        titles: titles of each sample, captions first.
        captions: number of captions of each sample.
        scores_of: gets queries and, for each, samples, if any, and a title to leave out there.

    Returns:
        `weights` by signal; the `mean_reciprocal_rank` that the weighted mean and each signal alone
        give the first sample with the same titles; and the number of `queries`.
    """
    generator = np.random.default_rng(0)
    with_title = np.array([sample for sample, own in enumerate(titles) if own])
    chosen = np.sort(generator.permutation(with_title)[:_QUERIES])
    numbers: dict[tuple[str, ...], int] = {}
    same = np.array([numbers.setdefault(tuple(own), len(numbers)) for own in titles])
    ranks: dict[tuple[float, ...], list[float]] = {}
    signals: tuple[Signal, ...] = ()
    for start in range(0, len(chosen), _AT_ONCE):
        samples = chosen[start : start + _AT_ONCE]
        texts, left_out = [], []
        for sample in samples.tolist():
            title, *others = titles[sample][: captions[sample]] or titles[sample][:1]
            is_one = not others or any(
                difflib.SequenceMatcher(None, title, other).ratio() >= _NEARLY for other in others
            )
            texts.append(typed(title, generator) if is_one else title)
            own = np.flatnonzero(same == same[sample]).tolist()
            left_out.append(([] if is_one else own, title))
        scores = standardise(scores_of(texts, left_out))
        signals = tuple(scores)
        wanted = same[samples, None] == same
        single = map(tuple, np.eye(len(signals)).tolist())
        for ratio in (*single, *itertools.product(_RATIOS, repeat=len(signals))):
            fused = fuse(scores, dict(zip(signals, ratio, strict=True)))
            ranks.setdefault(ratio, []).extend(_reciprocal_ranks(fused, wanted))
    means = {ratio: float(np.mean(values)) for ratio, values in ranks.items()}
    best = max((ratio for ratio in means if min(ratio) > 0), key=lambda one: means[one])
    reached = {signal: means[tuple(float(one == signal) for one in signals)] for signal in signals}
    return {
        "queries": len(chosen),
        "weights": dict(zip(signals, best, strict=True)),
        "mean_reciprocal_rank": {"all": means[best], **reached},
    }


def kept_measure(file: Path, signals: Sequence[Signal], make: Callable[[], Any]) -> dict[str, Any]:
    """The result of `measure` that a file keeps for these signals; made if there is none."""
    if file.is_file():
        kept = parse_checksummed_json(read_file(file))
        if list(kept["weights"]) == list(signals):
            return kept
    made: dict[str, Any] = make()
    reached = ", ".join(f"{name} {at:.2f}" for name, at in made["mean_reciprocal_rank"].items())
    weights = ", ".join(f"{name} {weight:g}" for name, weight in made["weights"].items())
    logger.info("search: weights %s; mean reciprocal rank %s", weights, reached)
    write_text_atomically(file, dump_checksummed_json(made))
    return made


def typed(title: str, generator: np.random.Generator) -> str:
    """Half of a title's words, the longest without one of its letters."""
    words = title.split() or [title]
    count = (len(words) + 1) // 2
    first = int(generator.integers(len(words) - count + 1))
    words = words[first : first + count]
    longest = max(range(count), key=lambda at: len(words[at]))
    if len(words[longest]) > 3:
        letter = int(generator.integers(1, len(words[longest])))
        words[longest] = words[longest][:letter] + words[longest][letter + 1 :]
    return " ".join(words)


def _reciprocal_ranks(scores: NDArray[Any], wanted: NDArray[np.bool_]) -> list[float]:
    """1 / (1 + samples above the best wanted one); half of its equals count as above."""
    best = np.where(wanted, scores, -np.inf).max(axis=1, keepdims=True)
    above = (scores > best).sum(axis=1) + ((scores == best) & ~wanted).sum(axis=1) / 2
    found: list[float] = (1 / (1 + above)).tolist()
    return found
