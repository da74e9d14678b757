"""Fetches blocks of data sets under URLs into the local cache before their samples are read."""

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

READ_AHEAD = 65_536
"""Samples whose images are fetched from a URL before they are needed, in the order of the global
batches; limited to half of `data.cache_bytes`."""

Schedule = Callable[[int], tuple[NDArray[np.int32], NDArray[np.int64]] | None]
"""Sources and samples of a chunk of the order, by its number; None after the end."""
_Block = tuple[int, int, int]  # the numbers of a source, of a file in it, and of a block in that
_JOIN_SECONDS = 2.0


@contextlib.contextmanager
def reading_ahead(
    datasets: Sequence[PackedDataset], schedule: Schedule, *, num_chunks: int
) -> Iterator[Callable[[int], None]]:
    """Fetches blocks into the local cache within this context, if a data set lies under a URL.

    Reading begins with chunk 0 of the schedule; `num_chunks` are looked at beyond the one that is
    being read. Yields a function to call with the number of a chunk that is about to be read; from
    any thread, nearly in order. A fetch that fails is left to the reading itself.
    """
    options = [dataset.cache for dataset in datasets if dataset.cache is not None]
    if not options or not num_chunks:
        yield lambda chunk: None
        return
    # More blocks than half the cache would push out those that are being used.
    most_blocks = min(one.max_bytes // (2 * one.block_bytes) for one in options)
    reader = _ReadAhead(datasets, schedule, num_chunks, most_blocks)
    with contextlib.closing(reader):
        yield reader.follow


class _ReadAhead:
    """Follows one rank through its order."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        schedule: Schedule,
        num_chunks: int,
        most_blocks: int,
    ) -> None:
        self._datasets = list(datasets)
        self._schedule = schedule
        self._num_chunks = num_chunks
        self._most_blocks = most_blocks
        self._next = 0
        self._last_use: dict[_Block, int] = {}
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
        self.follow(0)

    def follow(self, chunk: int) -> None:
        with self._lock:
            uses = self._last_use.items()
            self._last_use = {block: last for block, last in uses if last >= chunk}
            self._next = max(self._next, chunk)
            while (
                not self._closed
                and self._next <= chunk + self._num_chunks
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
        for source, dataset in enumerate(self._datasets):
            if dataset.cache is not None:
                mine = sample_ids[source_ids == source]
                for file, number in dataset.blocks_of(mine):
                    block = source, file, number
                    if block not in self._last_use:
                        self._wanted.put(block)
                    self._last_use[block] = self._next

    def _fetch(self) -> None:
        while not self._closed:
            block = self._wanted.get()
            if block is None:
                return
            source, file, number = block
            with self._lock:
                is_wanted = block in self._last_use
            if not is_wanted:  # it has been read meanwhile
                continue
            try:
                self._datasets[source].fetch_ahead(file, number)
            except Exception as error:  # whoever needs it will say so
                logger.debug("reading ahead: %s", error)
