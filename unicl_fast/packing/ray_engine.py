"""`--engine ray`: checks images on the machines of a Ray cluster; results come in order.

A Ray task checks a chunk in the same worker process, under the same limits, as `workers`. Chance
decides which machine checks an image, so an image that a machine cannot read is read here too, and
a difference stops the build.
"""

import functools
import itertools
import os
import platform
from collections.abc import Generator, Iterable
from typing import Any

import msgspec

from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.sources.entries import EntryError, Problem
from unicl_fast.packing.workers import (
    CHUNKS_AHEAD,
    Checked,
    ImageOptions,
    ImageWorker,
    Task,
    in_order,
    make_chunks,
)

_NOT_READ = ("unreadable", "missing")
"""Problems that can be the machine's rather than the image's."""


def check_on_ray(
    tasks: Iterable[Task], *, options: ImageOptions, workers: int
) -> Generator[Checked | Problem, None, None]:
    """Checks tasks on a Ray cluster, as `check_in_order` does on this machine.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, else starts one here.
    `workers` is the number of chunks under way; 0 stands for several for each core. Raises
    RuntimeError if the cluster cannot run the tasks, or one of its machines cannot read an image
    that this machine can.
    """
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        _join(ray, workers)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    # images are checked in separate processes, so no image can kill Ray's process
    remote = ray.remote(num_cpus=1, max_retries=-1)(_check_chunk)
    sent, answered = itertools.tee(make_chunks(map(_with_whole_paths, tasks), options))
    answers = in_order(
        lambda chunk: remote.remote(chunk, options).future(),
        sent,
        ahead=workers or cores * CHUNKS_AHEAD,
    )
    try:
        # the answers come first: they read the chunks that they answer
        for (machine, results), chunk in zip(answers, answered, strict=False):
            for task, result in zip(chunk, results, strict=True):
                if isinstance(result, Problem) and result.kind in _NOT_READ:
                    _require_unreadable_here(task, result, machine, options)
                yield result
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray could not check images: {error}") from error
    finally:
        if is_ours:
            ray.shutdown()


def _join(ray: Any, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        ray.init(num_cpus=workers or None, include_dashboard=False, **quiet)


def _with_whole_paths(task: Task) -> Task:
    """The task with absolute paths: Ray's processes run in other folders."""
    path = task.entry.path
    if is_url(path):
        return task
    entry = msgspec.structs.replace(task.entry, path=os.path.abspath(path))
    return msgspec.structs.replace(task, entry=entry)


def _require_unreadable_here(
    task: Task, problem: Problem, machine: str, options: ImageOptions
) -> None:
    """Raises RuntimeError if this machine can read the image."""
    try:
        task.entry.read(max_bytes=options.max_file_bytes)
    except EntryError:
        return
    raise RuntimeError(
        f"{task.name}: {machine} could not read {task.entry.path} ({problem.message}), and "
        f"{platform.node()}, which runs the build, can. All machines of the Ray cluster must see "
        "the sources and --out under the same paths: put them on a file system that all "
        "share, or build with --engine local"
    )


# From here on: what runs in a process of Ray.


def _check_chunk(tasks: list[Task], options: ImageOptions) -> tuple[str, list[Checked | Problem]]:
    """The name of the machine, and one result for each task."""
    return platform.node(), _worker(options).check(tasks)


@functools.cache
def _worker(options: ImageOptions) -> ImageWorker:
    """The worker process of this process of Ray; it ends with it."""
    return ImageWorker(options)
