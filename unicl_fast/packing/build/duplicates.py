"""Images that a build finds twice, byte for byte: one sample, with the texts of all.

Files of different sizes are different, so only those that share their size with another are read
beforehand. Images that merely look alike are the business of `near_duplicates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from unicl_fast.packing.build.sample_views import ChangedSamples, ChosenSamples, Sample
from unicl_fast.packing.quarantine import DUPLICATE, duplicate_message
from unicl_fast.packing.sources.items import MAX_TEXTS, Entry, EntryError, Problem
from unicl_fast.packing.sources.spool import ItemStore

_AHEAD = 64
"""Files under way for each thread."""


def join_duplicates(
    samples: Sequence[Sample],
    changed: ItemStore,
    *,
    max_file_bytes: int,
    workers: int,
    progress: bool,
) -> Sequence[Sample]:
    """Gives the first of equal images the captions and labels of all; the others get a problem.

    Captions and labels that the first has already are not added. What cannot be read is left
    alone: packing will say why.

    Args:
        samples: name of the source, and item, in the order in which sources were named.
        changed: an empty store, for the items that change.
        max_file_bytes: larger files are not read.
        workers: threads that read.
        progress: show a progress bar.

    Returns:
        The samples, with these changes. In memory are some 50 bytes for each.
    """
    joined = ChangedSamples(samples, changed)
    candidates = _candidates(samples)
    digests = np.zeros((len(candidates), 2), np.uint64)
    is_read = np.zeros(len(candidates), np.bool_)
    entries = (item.entry for _, item in ChosenSamples(samples, candidates))
    for place, digest in enumerate(
        tqdm(
            _digests(entries, max_file_bytes=max_file_bytes, workers=workers),
            total=len(candidates),
            desc="looking for duplicates",
            unit=" images",
            disable=not progress,
            smoothing=0.1,
        )
    ):
        if digest is not None:
            digests[place] = np.frombuffer(digest, np.uint64)
            is_read[place] = True
    for group in _equal_rows(digests[is_read]):
        _join(samples, candidates[is_read][group], joined)
    return joined


def _candidates(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The numbers of samples whose files may be equal to others: those that share their size."""
    sizes = np.full(len(samples), -1, np.int64)
    is_sound = np.zeros(len(samples), np.bool_)
    for number, (_, item) in enumerate(samples):
        if item.entry is not None:
            sizes[number] = item.entry.num_bytes
            is_sound[number] = item.problem is None
    _, kinds, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(is_sound & (counts[kinds] > 1))


def _equal_rows(rows: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Groups of two or more equal rows [N 2], as rising numbers."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable, so numbers rise within a group
    ends = np.flatnonzero(np.any(np.diff(rows[order], axis=0) != 0, axis=1)) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    for place in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield order[bounds[place] : bounds[place + 1]]


def _join(samples: Sequence[Sample], group: npt.NDArray[np.int64], joined: ChangedSamples) -> None:
    """Joins the samples of one image into the first of them."""
    first_source, first = samples[int(group[0])]
    captions, labels = dict.fromkeys(first.captions), dict.fromkeys(first.labels)
    for number in group[1:].tolist():
        _, item = samples[number]
        more_captions = dict.fromkeys(text for text in item.captions if text not in captions)
        more_labels = dict.fromkeys(label for label in item.labels if label not in labels)
        counts = len(captions) + len(more_captions), len(labels) + len(more_labels)
        if max(counts) > MAX_TEXTS:  # it stays a sample of its own, so no text is lost
            continue
        captions |= more_captions
        labels |= more_labels
        message = duplicate_message(first_source, first.name)
        item.problem = Problem(kind=DUPLICATE, message=message)
        joined.change(number, item)
    first.captions, first.labels = list(captions), list(labels)
    joined.change(int(group[0]), first)


def _digests(
    entries: Iterable[Entry | None], *, max_file_bytes: int, workers: int
) -> Iterator[bytes | None]:
    """XXH3-128 of each, in order; None for what cannot be read."""

    def digest(entry: Entry | None) -> bytes | None:
        if entry is None:
            return None
        try:
            return bytes(xxhash.xxh3_128_digest(entry.read(max_bytes=max_file_bytes)))
        except EntryError:
            return None

    waiting = iter(entries)
    with ThreadPoolExecutor(workers, thread_name_prefix="unicl-digest") as threads:
        # not all at once: results would pile up, and an interruption would wait for them
        while chunk := list(islice(waiting, workers * _AHEAD)):
            yield from threads.map(digest, chunk)
