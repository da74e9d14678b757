"""Checks samples in worker processes, and hands the results back in order.

Each thread here looks after one worker process (`image_worker`). Results come in the order of the
tasks whatever the number of workers, and only a few chunks are under way at a time, so memory does
not grow with the data set. An image that ends its worker, by a crash, by taking too long or for
want of memory, is tried once more by itself in a fresh process, and left out if that ends as well:
nothing else is lost, and what is packed is the same as if the image had merely been damaged.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from unicl_fast.packing.build.worker import Checked as Checked
from unicl_fast.packing.build.worker import ImageOptions as ImageOptions
from unicl_fast.packing.build.worker import ImageWorker, WorkerDeathError
from unicl_fast.packing.build.worker import Task as Task
from unicl_fast.packing.sources.items import Problem
from unicl_fast.system.machine import usable_cores

_CHUNK_ITEMS = 64
_CHUNK_BYTES = 4_000_000
_PNG_GROWTH = 8
"""A photograph as PNG takes up to so many times the bytes of its JPEG."""
CHUNKS_AHEAD = 3
"""Chunks under way for each worker: one in hand, one waiting, one on its way back."""


def check_in_order(
    tasks: Iterable[Task], *, options: ImageOptions, context_length: int, workers: int
) -> Iterator[Checked | Problem]:
    """Checks tasks in parallel; results come in the order of the tasks.

    `workers` is the number of processes; 0 takes one for each core.

    Worker processes are spawned, so a script that calls this must guard its main part by
    `if __name__ == "__main__":`. A single worker is a process too: an image that crashes a decoder
    must not take this program's files with it.

    Raises:
        RuntimeError: no worker process can be started.
    """
    workers = workers or usable_cores()
    pool = WorkerPool(options, context_length=context_length)
    threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="unicl-pack")
    under_way: deque[Future[list[Checked | Problem]]] = deque()
    chunks = make_chunks(tasks, options)
    try:
        while True:
            for chunk in chunks:
                under_way.append(threads.submit(pool.check, chunk))
                if len(under_way) >= workers * CHUNKS_AHEAD:
                    break
            if not under_way:
                return
            yield from under_way.popleft().result()
    finally:
        pool.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        pool.reap()


class WorkerPool:
    """Worker processes at the disposal of threads, started when they are needed."""

    def __init__(self, options: ImageOptions, *, context_length: int) -> None:
        self._options = options
        self._context_length = context_length
        self._lock = threading.Lock()
        self._idle: list[ImageWorker] = []
        self._alive: set[ImageWorker] = set()
        self._closed = False

    def check(self, tasks: list[Task]) -> list[Checked | Problem]:
        """One result for each task, whatever becomes of the workers."""
        results: list[Checked | Problem] = []
        while len(results) < len(tasks):
            worker = self._take()
            first = len(results)
            try:
                for result in worker.check(tasks[first:]):
                    results.append(result)  # one by one: those before a death count
            except WorkerDeathError as death:
                self._forget(worker)
                culprit = first + death.num_finished
                # finished, and their answers died with the worker: nothing is wrong with them
                results += self.check(tasks[len(results) : culprit])
                if culprit < len(tasks):
                    results.append(self._check_alone(tasks[culprit]))
            else:
                self._give_back(worker)
        return results

    def kill(self) -> None:
        """Ends all workers; a thread that waits for one gives up its chunk."""
        with self._lock:
            self._closed = True
            for worker in self._alive:
                worker.kill()

    def reap(self) -> None:
        """After `kill`, when no thread is left that asks."""
        for worker in self._alive:
            worker.reap()

    def _check_alone(self, task: Task) -> Checked | Problem:
        """A second try in a fresh process.

        The first may have died of something else: a neighbour's leak, a signal from outside, or a
        clock that ran on while the whole job was stopped (Ctrl-Z).
        """
        worker = self._start()
        try:
            (result,) = worker.check([task])
        except WorkerDeathError as death:
            self._forget(worker)
            return death.problem
        self._give_back(worker)
        return result

    def _take(self) -> ImageWorker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._start()

    def _start(self) -> ImageWorker:
        worker = ImageWorker(self._options, context_length=self._context_length)
        with self._lock:
            self._alive.add(worker)
            if self._closed:
                worker.kill()
        return worker

    def _give_back(self, worker: ImageWorker) -> None:
        with self._lock:
            self._idle.append(worker)

    def _forget(self, worker: ImageWorker) -> None:
        with self._lock:
            self._alive.discard(worker)
            if self._closed:
                raise RuntimeError("the build is over")  # nobody waits for this chunk any more


def make_chunks(tasks: Iterable[Task], options: ImageOptions) -> Iterator[list[Task]]:
    """Tasks by the handful: so many that handing them out costs little, and few bytes."""
    growth = _PNG_GROWTH if options.format == "png" else 1
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
