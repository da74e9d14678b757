"""Pictures that a build finds twice, byte for byte: one sample, with the texts of all.

Files of different sizes are different, so only those that share their size with another are read
beforehand. Pictures that merely look alike are the business of `near_duplicates`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import xxhash
from tqdm import tqdm

from unicl_fast.tools.entries import Entry, EntryError
from unicl_fast.tools.items import Item, Problem, join_texts

_AHEAD = 64
"""Files under way for each thread."""


def join_duplicates(
    samples: Sequence[tuple[str, Item]], *, max_file_bytes: int, workers: int, progress: bool
) -> None:
    """Gives the first of equal pictures the captions and labels of all; the others get a problem.

    Captions and labels that the first has already are not added. What cannot be read is left
    alone: packing will say why.

    Args:
        samples: name of the source, and item, in the order in which sources were named.
        max_file_bytes: larger files are not read.
        workers: threads that read.
        progress: show a progress bar.
    """
    sizes = Counter(_size(item) for _, item in samples)
    candidates = [
        (source, item)
        for source, item in samples
        if item.problem is None and item.entry is not None and sizes[_size(item)] > 1
    ]
    entries = [item.entry for _, item in candidates if item.entry is not None]
    digests = tqdm(
        _digests(entries, max_file_bytes=max_file_bytes, workers=workers),
        total=len(entries),
        desc="looking for duplicates",
        unit=" pictures",
        disable=not progress,
        smoothing=0.1,
    )
    first_of: dict[bytes, tuple[str, Item]] = {}
    for (source, item), digest in zip(candidates, digests, strict=True):
        if digest is None:
            continue
        first_source, first = first_of.setdefault(digest, (source, item))
        if first is item:
            continue
        joined = join_texts(first.captions, first.labels, item.captions, item.labels)
        if joined is None:  # it stays a sample of its own
            continue
        first.captions, first.labels = joined
        item.problem = Problem(
            kind="duplicate",
            message=f"the same bytes as {first.name} of {first_source}, which has its texts too",
        )


def _size(item: Item) -> int:
    return -1 if item.entry is None else item.entry.num_bytes


def _digests(
    entries: Sequence[Entry], *, max_file_bytes: int, workers: int
) -> Iterator[bytes | None]:
    """XXH3-128 of each, in order; None for what cannot be read."""

    def digest(entry: Entry) -> bytes | None:
        try:
            return xxhash.xxh3_128_digest(entry.read(max_bytes=max_file_bytes))
        except EntryError:
            return None

    waiting = iter(entries)
    with ThreadPoolExecutor(workers, thread_name_prefix="unicl-digest") as threads:
        # not all at once: results would pile up, and an interruption would wait for them
        while chunk := list(islice(waiting, workers * _AHEAD)):
            yield from threads.map(digest, chunk)
