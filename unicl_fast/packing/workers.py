"""Checks and tokenises samples in worker processes; one bad image costs nothing but itself.

A decoder written in C can crash, hang or use all memory. So images are checked in separate
processes, under a timer and a memory limit that the kernel enforces. If a process dies, the images
that it has not answered for are checked one by one, each twice at most: one that kills the process
both times is left out.
"""

# concurrent.futures.ProcessPoolExecutor was tried instead. The rates are equal within the spread (2
# cores, 5 rounds in turns: 8,400 images/s against 7,400 for small PNGs, 2,700 against 2,800 for
# photographs). But one crash breaks the whole pool: all chunks under way are lost, it does not say
# which image it was, and a new pool gives its first result after 0.9 s. With a pool for each worker
# the exit code, which distinguishes a crash, the timer and the limit, is in private attributes
# only, and before Python 3.14 a hanging process cannot be ended.

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

import msgspec
import xxhash

from unicl_fast.images.check import CheckedImage, ImageError, check_image
from unicl_fast.images.limits import RESIZE_QUALITY, ImageFormat
from unicl_fast.packing.looks import look_at
from unicl_fast.packing.sources.entries import (
    MAX_FILE_BYTES,
    Entry,
    EntryError,
    PackedFile,
    Problem,
)
from unicl_fast.packing.sources.items import problem_of
from unicl_fast.system.child import OUT_OF_MEMORY, Child, describe_death, enter
from unicl_fast.system.machine import usable_cores
from unicl_fast.text.tokenizer import Tokenizer

BYTES_PER_PIXEL = 40
"""Most bytes in use for each pixel while decoding and encoding. Measured: 25 for transparent WebP
and JPEG 2000, 22 for a PNG that is scaled down, 6 to 18 for JPEGs; libjpeg reserves another 6."""
CHUNKS_AHEAD = 3  # chunks under way for each worker: one in hand, one waiting, one on its way back
_SMALL_FILE_BYTES = 16_000_000
_BYTES_BESIDE_IMAGES = 400_000_000  # the tokenizer, decoders' tables, and the heap's slack
_CHUNK_ITEMS = 128
_CHUNK_BYTES = 4_000_000
_ANSWER_BYTES = 1_000_000  # A worker sends its answers once their images are this large together
_EXTENSIONS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"P6": "ppm"}
"""The extensions of a data set's files, by their first two bytes."""
_GROWTH = {"png": 8, "ppm": 16}
"""A photograph in such a format has up to this many times the bytes of its JPEG."""


T = TypeVar("T")
R = TypeVar("R")


class Task(msgspec.Struct):
    """One sample to check; `name` is for messages."""

    name: str
    entry: Entry
    captions: Sequence[str] = ()
    answer_bytes: int = 0
    """Most bytes of the checked image, if they can exceed its file's."""


class Checked(msgspec.Struct):
    """A sound image, as `CheckedImage` has it, and the tokens of its captions."""

    data: bytes
    """Empty if nobody needs it."""
    extension: str
    height: int
    width: int
    reencoded: bool
    xxh3: int
    tokens: list[bytes]
    """uint16 token ids of each caption as bytes: pickling arrays costs as much as a small image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """How images are changed, and the limits for each."""

    short_side: int = 0
    """Scale the shorter side down to this; 0 keeps sizes."""
    quality: int = RESIZE_QUALITY
    max_pixels: int
    seconds: float
    """Longest time for one sample, reading included; 0 sets no limit."""
    square_side: int = 0
    """Make images squares with this many pixels a side; 0 keeps sizes."""
    format: ImageFormat | Literal["packed"] = "keep"
    """The format of sound images; packed only checks them (`images.check_image`)."""
    in_place: bool = False
    """Sound images stay in their files: results contain only converted ones."""
    return_images: bool = True
    """Whether results contain the images' bytes; a verification needs only their properties."""

    look: bool = False
    """Results contain a `looks.LOOK` instead of the image."""

    @property
    def max_file_bytes(self) -> int:
        """Largest file read: twice the size of uncompressed 16-bit RGBA pixels."""
        return min(MAX_FILE_BYTES, _SMALL_FILE_BYTES + 16 * self.max_pixels)

    @property
    def memory_bytes(self) -> int:
        """Memory of a worker beyond its start: the file, packed and unpacked, and the pixels."""
        images = 2 * self.max_file_bytes + BYTES_PER_PIXEL * self.max_pixels
        return images + _BYTES_BESIDE_IMAGES


def require_one_size(image: Checked, name: str, notes: dict[str, Any]) -> None:
    """Raises ValueError for an image with another size than the first one's.

    `notes` are the writer's, which keep the first image's size for a resumed build.
    """
    first = (image.height, image.width), name
    (height, width), name_of_first = notes.setdefault("first_image", first)
    if (image.height, image.width) != (height, width):
        raise ValueError(
            f"--format raw needs images of one size, but {name_of_first} has {width} x {height} "
            f"pixels and {name} has {image.width} x {image.height}: add --resize square:PIXELS, "
            f"such as square:{min(height, width)}, which scales and cuts all"
        )


def answer_bytes(options: ImageOptions, notes: Mapping[str, Any]) -> int:
    """Most bytes of a checked image that becomes pixels; 0 for a file."""
    if options.format != "raw":
        return 0
    size = (options.square_side,) * 2 if options.square_side else notes.get("first_image", [()])[0]
    return 3 * (math.prod(size) if size else options.max_pixels)


def check_in_order(
    tasks: Iterable[Task], *, options: ImageOptions, workers: int
) -> Generator[Checked | Problem, None, None]:
    """Checks tasks in parallel; results come in the order of the tasks.

    `workers` is the number of processes; 0 starts one for each core. Even a single worker is a
    process: an image that crashes a decoder must not end this program. Only a few chunks are under
    way at a time.
    """
    workers = workers or usable_cores()
    started = [ImageWorker(options) for _ in range(workers)]
    idle: queue.LifoQueue[ImageWorker] = queue.LifoQueue()  # started processes come first
    for worker in started:
        idle.put(worker)

    def check(chunk: list[Task]) -> list[Checked | Problem]:
        worker = idle.get()
        try:
            return worker.check(chunk)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="unicl-pack")
    try:
        for results in in_order(
            lambda chunk: threads.submit(check, chunk),
            make_chunks(tasks, options),
            ahead=workers * CHUNKS_AHEAD,
        ):
            yield from results
    finally:
        for worker in started:
            worker.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in started:
            worker.reap()


def in_order(submit: Callable[[T], Future[R]], tasks: Iterable[T], *, ahead: int) -> Iterator[R]:
    """Yields results in the order of the tasks, with at most `ahead` tasks under way."""
    under_way: deque[Future[R]] = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def make_chunks(tasks: Iterable[Task], options: ImageOptions) -> Iterator[list[Task]]:
    """Groups tasks: enough to make handing them out cheap, but few bytes."""
    growth = _GROWTH.get(options.format, 1)
    chunk: list[Task] = []
    num_bytes = 0
    for task in tasks:
        chunk.append(task)
        num_bytes += max(growth * task.entry.num_bytes, task.answer_bytes)
        if len(chunk) >= _CHUNK_ITEMS or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


class ImageWorker:
    """A process that checks images, started on demand and again after it dies."""

    def __init__(self, options: ImageOptions) -> None:
        self._options = options
        self._process: Child | None = None
        self._closed = False

    def check(self, tasks: list[Task]) -> list[Checked | Problem]:
        """Returns one result for each task, even if the process dies."""
        results, death = self._ask(tasks)
        for task in tasks[len(results) :]:
            # Twice, since something else can have killed it: a neighbour's leak, a signal from
            # outside, or a clock that ran while the whole job was stopped (Ctrl-Z).
            for _ in range(2):
                answers, death = self._ask([task])
                if death is None:
                    break
            results += answers if death is None else [death]
        return results

    def kill(self) -> None:
        """Ends the process for good; a thread that waits for it raises RuntimeError."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def reap(self) -> None:
        """Reaps the process, after `kill` and once no thread uses it."""
        if self._process is not None:
            self._process.reap()

    def _ask(self, tasks: Sequence[Task]) -> tuple[list[Checked | Problem], Problem | None]:
        """Returns the results received, and a problem if the process died."""
        results: list[Checked | Problem] = []
        if self._process is None:
            self._process = Child(_serve, self._options)
            if self._closed:  # while it was started
                self._process.kill()
        process = self._process
        try:
            process.connection.send(tasks)
            while len(results) < len(tasks):
                results += process.connection.recv()
            return results, None
        except (EOFError, OSError):
            self._process = None
            code = process.reap()
        if self._closed:
            raise RuntimeError("the build is over")  # nobody waits for this chunk
        if code == -signal.SIGALRM:
            message = f"not done after {self._options.seconds:g} seconds"
            return results, Problem("too slow", message)
        death = describe_death(code)
        if death.kind == "memory":
            message = "uses more memory than its number of pixels should"
            return results, Problem("too large", message)
        return results, problem_of(death)


# From here on: what runs inside the process.


def _serve(connection: Connection, options: ImageOptions) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
    enter(connection, memory_bytes=options.memory_bytes)
    gc.freeze()  # imported objects need no scanning
    with contextlib.suppress(EOFError, OSError):  # the main process is done, or gone
        while True:
            answers: list[Checked | Problem] = []
            num_bytes = 0
            tasks = connection.recv()
            if any(task.captions for task in tasks):
                make_tokenizer()  # before a timer starts
            for task in tasks:
                signal.setitimer(signal.ITIMER_REAL, options.seconds)
                result = check_sample(task, options)
                answers.append(result)
                num_bytes += len(result.data) if isinstance(result, Checked) else 0
                if num_bytes >= _ANSWER_BYTES:
                    signal.setitimer(signal.ITIMER_REAL, 0)  # not while the main process is slow
                    connection.send(answers)
                    answers, num_bytes = [], 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            if answers:
                connection.send(answers)


make_tokenizer = functools.lru_cache(maxsize=1)(Tokenizer)  # a tenth of a second each


def check_sample(task: Task, options: ImageOptions) -> Checked | Problem:
    """Returns the image and its tokens, or its problem; raises nothing."""
    try:
        return _check(task, options)
    except EntryError as error:
        return error.problem
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            os._exit(OUT_OF_MEMORY)
        return Problem(error.kind, str(error))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # it is tried again with a fresh heap
    except Exception as error:  # a bug of ours or of a library must cost one sample only
        return Problem("failed", f"{type(error).__name__}: {error}")


def _check(task: Task, options: ImageOptions) -> Checked | Problem:
    entry = task.entry
    image = _check_image(entry, options)
    data, size = image.data, (image.height, image.width)
    tokens: list[bytes] = []
    if task.captions:
        try:
            tokens = [ids.tobytes() for ids in make_tokenizer().encode(task.captions)]
        except (UnicodeError, TypeError) as error:  # lone surrogates, which JSON can carry
            return Problem("bad caption", f"cannot be tokenised: {error}")
    if options.in_place and isinstance(entry, PackedFile) and not image.reencoded:
        xxh3 = entry.xxh3
    else:
        xxh3 = xxhash.xxh3_64_intdigest(data)
    if not options.return_images or (options.in_place and not image.reencoded):
        data = b""
    if options.look:
        data = look_at(data)
    return Checked(data, image.extension, *size, image.reencoded, xxh3, tokens)


def _check_image(entry: Entry, options: ImageOptions) -> CheckedImage:
    if options.in_place and isinstance(entry, PackedFile):
        # packing has checked it, and its checksum is known
        if (pixels := entry.height * entry.width) > options.max_pixels:
            raise EntryError("too large", f"{pixels:,} pixels (--max-pixels)")
        return CheckedImage(
            data=b"", extension="", height=entry.height, width=entry.width, reencoded=False
        )
    data = entry.read(max_bytes=options.max_file_bytes)
    if options.in_place and len(data) != entry.num_bytes:
        raise EntryError("damaged", "it was changed while it was indexed")
    format: ImageFormat | Literal["packed"] = options.format
    if isinstance(entry, PackedFile) and format == "keep":
        height, width, extension = entry.height, entry.width, _EXTENSIONS.get(data[:2], "")
        keeps_size = not (options.short_side or options.square_side)
        if keeps_size and extension and height * width <= options.max_pixels:
            # its checksum has just shown that it is the file that packing checked
            return CheckedImage(
                data=data, extension=extension, height=height, width=width, reencoded=False
            )
        format = "packed"
    return check_image(
        data,
        short_side=options.short_side,
        square_side=options.square_side,
        quality=options.quality,
        max_pixels=options.max_pixels,
        format=format,
    )
