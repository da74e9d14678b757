"""One process that reads, checks and tokenises samples, and the handle that talks to it.

A decoder written in C can crash, loop or ask for all memory there is, and Python can interrupt none
of it. So images are checked in a process of their own, under two limits that the kernel holds:
a timer that ends the process when one image takes too long, and a ceiling on its memory. The
process counts the images that it has finished in memory that it shares with the main one; so it
may answer for many small ones at once, and the one it died of is known all the same. What follows
from a death is decided in `pack_workers`.

Imports what a worker needs and no more: neither torch nor a command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.images.check import CheckedImage, ImageError, ImageFormat, check_image
from unicl_fast.packing.limited_processes import (
    OUT_OF_MEMORY,
    LimitedProcess,
    describe_death,
    enter,
)
from unicl_fast.packing.sources.items import MAX_FILE_BYTES, Entry, EntryError, Problem
from unicl_fast.text.tokenizer import Tokenizer

BYTES_PER_PIXEL = 40
"""What decoding and encoding may hold at once for each pixel. Measured: 25 for transparent WebP and
JPEG 2000, 22 for a PNG that is scaled down, 6 to 18 for JPEGs; libjpeg reserves another 6."""
_SMALL_FILE_BYTES = 16_000_000
_BYTES_BESIDE_IMAGES = 400_000_000
"""The tokenizer, decoders' tables, and the heap's slack."""
_ANSWER_BYTES = 64_000
_ANSWER_SECONDS = 0.02
"""Answers wait for others until they are so large together, or so old."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One sample to check; `name` is for messages."""

    name: str
    entry: Entry
    captions: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    """Height and width that a decoded image must have: another's pixels stay in the worker."""
    answer_bytes: int = 0
    """Most that the image may take once it is checked, where that is more than its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A sound image, and the tokens of its captions."""

    image: CheckedImage
    xxh3: int
    tokens: list[npt.NDArray[np.uint16]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """What is done to sound images, and what one may cost."""

    short_side: int
    """Scale the shorter side down to this; 0 leaves sizes alone."""
    quality: int
    max_pixels: int
    seconds: float
    """Longest time for one sample, reading included; 0 sets no limit."""
    square_side: int = 0
    """Make images squares of so many pixels a side; 0 leaves sizes alone."""
    format: ImageFormat | Literal["packed"] = "keep"
    """What is made of sound images; packed only looks at them (`images.check_image`)."""
    return_images: bool = True
    """Whether results bring the images' bytes; a verification needs what was found only."""

    @property
    def max_file_bytes(self) -> int:
        """Largest file read: twice what 16-bit RGBA pixels without compression take."""
        return min(MAX_FILE_BYTES, _SMALL_FILE_BYTES + 16 * self.max_pixels)

    @property
    def memory_bytes(self) -> int:
        """What a worker may take beyond its start: the file, packed and unpacked, and pixels."""
        images = 2 * self.max_file_bytes + BYTES_PER_PIXEL * self.max_pixels
        return images + _BYTES_BESIDE_IMAGES


class WorkerDeathError(Exception):
    """A worker process ended before its time; `problem` says how, in the words of a quarantine."""

    def __init__(self, problem: Problem, *, num_finished: int) -> None:
        """`num_finished`: tasks before the one it died of, also those without an answer."""
        super().__init__(problem.message)
        self.problem = problem
        self.num_finished = num_finished


class ImageWorker:
    """The main process's end of one worker."""

    def __init__(self, options: ImageOptions, *, context_length: int) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            RuntimeError: it cannot be started, which is no image's fault.
        """
        self._options = options
        self._finished: Any = multiprocessing.get_context("spawn").RawValue(ctypes.c_int64)
        self._process = LimitedProcess(_serve, options, context_length, self._finished)

    def check(self, tasks: Sequence[Task]) -> Iterator[Checked | Problem]:
        """One result for each task, in order.

        Raises:
            WorkerDeathError: the process ended before all were done.
        """
        self._finished.value = num_answered = 0
        try:
            self._process.connection.send(tasks)
            while num_answered < len(tasks):
                answers = self._process.connection.recv()
                num_answered += len(answers)
                yield from map(_unpack, answers)
        except (EOFError, OSError) as error:
            raise WorkerDeathError(
                self._cause_of_death(), num_finished=self._finished.value
            ) from error

    def kill(self) -> None:
        """Ends the process at once; whoever waits for a result gets a `WorkerDeathError`."""
        self._process.kill()

    def reap(self) -> None:
        """Collects what is left of the process once it has ended."""
        self._process.reap()

    def _cause_of_death(self) -> Problem:
        code = self._process.reap()
        if code == -signal.SIGALRM:
            return Problem(
                kind="too slow", message=f"not done after {self._options.seconds:g} seconds"
            )
        return describe_death(code, too_large="takes more memory than its number of pixels should")


# From here on: what runs inside the process.


def _unpack(answer: tuple[Any, ...]) -> Checked | Problem:
    """What `_pack` made of a result."""
    if len(answer) == 2:
        kind, message = answer
        return Problem(kind=kind, message=message)
    data, extension, height, width, reencoded, xxh3, tokens = answer
    return Checked(
        image=CheckedImage(
            data=data, extension=extension, height=height, width=width, reencoded=reencoded
        ),
        xxh3=xxh3,
        tokens=[np.frombuffer(ids, np.uint16) for ids in tokens],
    )


def _serve(
    connection: Connection, options: ImageOptions, context_length: int, finished: Any
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
    enter(connection, options.memory_bytes)
    checker = _Checker(options, context_length)
    with contextlib.suppress(EOFError, OSError):  # the main process is done, or gone
        while True:
            answers: list[tuple[Any, ...]] = []
            num_bytes, oldest = 0, 0.0
            for task in connection.recv():
                checker.prepare(task)
                signal.setitimer(signal.ITIMER_REAL, options.seconds)
                answer, answer_bytes = _pack(checker.check(task))
                signal.setitimer(signal.ITIMER_REAL, 0)  # not while the main process is slow
                finished.value += 1
                oldest = oldest if answers else time.monotonic()
                answers.append(answer)
                num_bytes += answer_bytes
                if num_bytes >= _ANSWER_BYTES or time.monotonic() > oldest + _ANSWER_SECONDS:
                    connection.send(answers)
                    answers, num_bytes = [], 0
            if answers:
                connection.send(answers)


def _pack(result: Checked | Problem) -> tuple[tuple[Any, ...], int]:
    """A result as plain values, and their size: pickling the classes takes as long as decoding."""
    if isinstance(result, Problem):
        return (result.kind, result.message), len(result.message)
    image, tokens = result.image, [ids.tobytes() for ids in result.tokens]
    return (
        image.data,
        image.extension,
        image.height,
        image.width,
        image.reencoded,
        result.xxh3,
        tokens,
    ), len(image.data) + sum(map(len, tokens))


class _Checker:
    """Checks one sample after another."""

    def __init__(self, options: ImageOptions, context_length: int) -> None:
        self._options = options
        self._context_length = context_length
        self._tokenizer: Tokenizer | None = None

    def prepare(self, task: Task) -> None:
        """What is not to be counted as the sample's time."""
        if task.captions and self._tokenizer is None:  # data sets of labels need none
            self._tokenizer = Tokenizer(self._context_length)

    def check(self, task: Task) -> Checked | Problem:
        """The image and its tokens, or what is wrong with them; never an exception."""
        try:
            return self._check(task)
        except (EntryError, ImageError) as error:
            if isinstance(error.__cause__, MemoryError):
                os._exit(OUT_OF_MEMORY)
            return Problem(kind=error.kind, message=str(error))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # to be tried again with a heap that nobody has used
        except Exception as error:  # a fault of ours or of a library must cost one sample only
            return Problem(kind="failed", message=f"{type(error).__name__}: {error}")

    def _check(self, task: Task) -> Checked | Problem:
        image = check_image(
            task.entry.read(max_bytes=self._options.max_file_bytes),
            short_side=self._options.short_side,
            square_side=self._options.square_side,
            quality=self._options.quality,
            max_pixels=self._options.max_pixels,
            format=self._options.format,
        )
        if task.size is not None and (image.height, image.width) != task.size:
            image = dataclasses.replace(image, data=b"")
        tokens: list[npt.NDArray[np.uint16]] = []
        if task.captions:
            assert self._tokenizer is not None
            try:
                tokens = self._tokenizer.encode(list(task.captions))
            except (UnicodeError, TypeError) as error:  # lone surrogates, which JSON can carry
                return Problem(kind="bad caption", message=f"cannot be tokenised: {error}")
        xxh3 = xxhash.xxh3_64_intdigest(image.data)
        if not self._options.return_images:
            image = dataclasses.replace(image, data=b"")
        return Checked(image=image, xxh3=xxh3, tokens=tokens)
