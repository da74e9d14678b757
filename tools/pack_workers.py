"""Reads, checks and tokenises samples in worker processes, and hands them back in order.

Separate from the program so that a worker imports what it needs and no more: neither torch nor a
command line. Results come in the order of the tasks whatever the number of workers, and only a few
chunks are under way at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.images import Picture, PictureError, check_picture
from unicl_fast.tokenizer import Tokenizer
from unicl_fast.tools.picture_files import Entry, EntryError
from unicl_fast.tools.sources import Problem

_CHUNK_ITEMS = 64
_CHUNK_BYTES = 4_000_000
_CHUNKS_AHEAD = 3
"""Chunks under way for each worker: one in hand, one waiting, one on its way back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One sample to check; `name` is for messages."""

    name: str
    entry: Entry
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A sound picture, and the tokens of its captions."""

    picture: Picture
    xxh3: int
    tokens: list[npt.NDArray[np.uint16]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureOptions:
    """What is done to sound pictures."""

    short_side: int
    """Scale the shorter side down to this; 0 leaves sizes alone."""
    quality: int


def check_in_order(
    tasks: Iterable[Task], *, options: PictureOptions, context_length: int, workers: int
) -> Iterator[Checked | Problem]:
    """Checks tasks in parallel; results come in the order of the tasks.

    Worker processes are spawned, so a script that calls this must guard its main part by
    `if __name__ == "__main__":`. A single worker is a process too: a picture that crashes a decoder
    must not take this program's files with it.

    Raises:
        RuntimeError: a worker process died; the message names the pictures it may have been at.
    """
    executor = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(options, context_length),
    )
    under_way: deque[tuple[list[Task], Future[list[Checked | Problem]]]] = deque()
    chunks = _chunks(tasks)
    try:
        while True:
            for chunk in chunks:
                under_way.append((chunk, executor.submit(_check_chunk, chunk)))
                if len(under_way) >= workers * _CHUNKS_AHEAD:
                    break
            if not under_way:
                return
            results = under_way[0][1].result()  # still in the queue if its worker has died
            under_way.popleft()
            yield from results
    except BrokenProcessPool as error:
        names = [task.name for chunk, _ in under_way for task in chunk]
        raise RuntimeError(
            "a worker process died: out of memory, killed, or crashed by a picture. "
            + (f"It was at one of {len(names)} pictures from {names[0]} on; " if names else "")
            + "fewer --workers take less memory"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    chunk: list[Task] = []
    num_bytes = 0
    for task in tasks:
        chunk.append(task)
        num_bytes += task.entry.num_bytes
        if len(chunk) >= _CHUNK_ITEMS or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


# State of a worker process, set once by its initializer.
_options = PictureOptions(short_side=0, quality=90)
_tokenizer: Tokenizer | None = None
_context_length = 0


def _start_worker(options: PictureOptions, context_length: int) -> None:
    global _options, _context_length
    _options, _context_length = options, context_length
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops us
    # libtiff prints its complaints from C. They would tear the progress bar, and what matters of
    # them comes back as the reason in quarantine.csv.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _check_chunk(tasks: Sequence[Task]) -> list[Checked | Problem]:
    return [_check(task) for task in tasks]


def _check(task: Task) -> Checked | Problem:
    try:
        data = task.entry.read()
        picture = check_picture(data, short_side=_options.short_side, quality=_options.quality)
    except (EntryError, PictureError) as error:
        return Problem(kind=error.kind, message=str(error))
    tokens: list[npt.NDArray[np.uint16]] = []
    if task.captions:
        try:
            tokens = _get_tokenizer().encode(list(task.captions))
        except (UnicodeError, TypeError) as error:  # lone surrogates, which JSON can carry
            return Problem(kind="bad caption", message=f"cannot be tokenised: {error}")
    return Checked(picture=picture, xxh3=xxhash.xxh3_64_intdigest(picture.data), tokens=tokens)


def _get_tokenizer() -> Tokenizer:
    global _tokenizer
    if _tokenizer is None:  # built on the first caption: data sets of labels need none
        _tokenizer = Tokenizer(_context_length)
    return _tokenizer
