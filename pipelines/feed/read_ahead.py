"""Brings blocks of remote data sets into the local cache before the samples in them are read.

Which samples come is known as far ahead as one likes (plan.py), so nothing is guessed: whoever
reads says where it is, and here the blocks of what comes after are fetched by a few threads, in the
order in which they will be needed. A fetch that fails is left to the reading itself, which tries
anew and says what is wrong; so nothing waits for these threads, and they may stop at any time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.remote.object_store import CONNECTIONS

logger = logging.getLogger(__name__)

Draws = Callable[[int], tuple[NDArray[np.int32], NDArray[np.int64]] | None]
"""Sources and samples of one stretch of the order, by its number; None behind the end."""
_Block = tuple[int, int, int]
"""Source, file, block."""
_JOIN_SECONDS = 2.0


class ReadAhead:
    """Follows one rank through its order; close it at the end."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        draws: Draws,
        *,
        start: int,
        stretches: int,
        most_blocks: int,
    ) -> None:
        """Starts fetching.

        Args:
            datasets: the sources, open; those in folders are passed over.
            draws: the order, in stretches.
            start: the first stretch that will be read.
            stretches: how many are looked at beyond the one that is being read.
            most_blocks: how many different blocks may be waiting to be used.
        """
        self._datasets = list(datasets)
        self._draws = draws
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
        """Says that a stretch is about to be read; from any thread, nearly in order."""
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
                draws = self._draws(self._next)
                if draws is None:
                    return
                self._want(*draws)
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
            if dataset.remote is None:
                continue
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


def blocks_of_half_the_cache(datasets: Sequence[PackedDataset]) -> int:
    """How many blocks may wait in the cache: more would push out those that are being used."""
    options = [dataset.remote.options for dataset in datasets if dataset.remote is not None]
    return min(one.max_bytes // (2 * one.block_bytes) for one in options)
