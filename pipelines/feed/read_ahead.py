"""Brings blocks of remote data sets into the local cache before the samples in them are read.

The plan knows which samples come, however far ahead, so nothing is guessed: the reader says where
it is, and a few threads fetch the blocks that come after, in the order in which they will be
needed. A fetch that fails is left to the reading itself, which tries anew and says what is wrong;
so nothing waits for these threads, and they may stop at any time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.object_store import CONNECTIONS
from unicl_fast.dataset.reader import PackedDataset

logger = logging.getLogger(__name__)

Schedule = Callable[[int], tuple[NDArray[np.int32], NDArray[np.int64]] | None]
"""Sources and samples of a stretch of the order, by its number; None behind the end."""
_Block = tuple[int, int, int]
"""The numbers of a source, of a file in it, and of a block in that."""
_JOIN_SECONDS = 2.0


@contextlib.contextmanager
def reading_ahead(
    datasets: Sequence[PackedDataset], schedule: Schedule, *, start: int, stretches: int
) -> Iterator[Callable[[int], None]]:
    """Fetches ahead within this context, if a data set lies under a URL and `stretches` is not 0.

    Args:
        datasets: the sources, open; local ones need nothing.
        schedule: the order of samples, in stretches.
        start: the first stretch that will be read.
        stretches: how many are looked at beyond the one that is being read.

    Yields:
        A function to call with the number of a stretch that is about to be read; from any thread,
        nearly in order.
    """
    options = [dataset.remote.options for dataset in datasets if dataset.remote is not None]
    if not options or not stretches:
        yield lambda stretch: None
        return
    # More blocks than half the cache would push out those that are being used.
    most_blocks = min(one.max_bytes // (2 * one.block_bytes) for one in options)
    ahead = _ReadAhead(datasets, schedule, start, stretches, most_blocks)
    try:
        yield ahead.follow
    finally:
        ahead.close()


class _ReadAhead:
    """Follows one rank through its order."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        schedule: Schedule,
        start: int,
        stretches: int,
        most_blocks: int,
    ) -> None:
        self._datasets = list(datasets)
        self._schedule = schedule
        self._stretches = stretches
        self._most_blocks = most_blocks
        self._next = start
        self._last_use: dict[_Block, int] = {}
        self._uses: dict[int, list[_Block]] = {}
        self._done = start
        self._lock = threading.Lock()
        self._wanted: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._closed = False
        # Daemons: one that waits for a store that does not answer must not hold up the end.
        self._threads = [
            threading.Thread(target=self._fetch, name="unicl-read-ahead", daemon=True)
            for _ in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()
        self.follow(start)

    def follow(self, stretch: int) -> None:
        with self._lock:
            while self._done < stretch:
                for block in self._uses.pop(self._done, ()):
                    if self._last_use.get(block, self._done) <= self._done:
                        self._last_use.pop(block, None)
                self._done += 1
            self._next = max(self._next, stretch)
            while (
                not self._closed
                and self._next <= stretch + self._stretches
                and len(self._last_use) < self._most_blocks
            ):
                scheduled = self._schedule(self._next)
                if scheduled is None:
                    return
                self._want(*scheduled)
                self._next += 1

    def close(self) -> None:
        """Ends the threads, without waiting long for one whose request is under way."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS / len(self._threads))

    def _want(self, source_ids: NDArray[np.int32], sample_ids: NDArray[np.int64]) -> None:
        used: list[_Block] = []
        for source, dataset in enumerate(self._datasets):
            if dataset.remote is not None:
                mine = sample_ids[source_ids == source]
                used += [(source, *block) for block in dataset.blocks_of(mine)]
        for block in used:
            if block not in self._last_use:
                self._wanted.put(block)
            self._last_use[block] = self._next
        self._uses[self._next] = used

    def _fetch(self) -> None:
        while not self._closed:
            block = self._wanted.get()
            if block is None:
                return
            source, file, number = block
            with self._lock:
                is_past = self._last_use.get(block, -1) < self._done
            if is_past:  # it has been read meanwhile
                continue
            try:
                self._datasets[source].fetch_ahead(file, number)
            except Exception as error:  # whoever needs it will say so
                logger.debug("reading ahead: %s", error)
