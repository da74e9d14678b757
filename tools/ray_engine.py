"""`--engine ray`: pictures are checked on the machines of a Ray cluster, results come in order.

In place of a thread that looks after a worker process there is a Ray task for each chunk. It has
the same worker process under the same limits (`picture_worker`) on its machine, so a picture that
crashes a decoder costs what it costs locally, and Ray's own process lives on. Where that is killed
or its machine is lost, Ray gives the chunk to another: checking changes nothing, so a second time
gives the same. What decides about bytes is what decides locally; machines with other versions of
Pillow or simplejpeg may encode other bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from unicl_fast.tools.items import Problem
from unicl_fast.tools.pack_workers import CHUNKS_AHEAD, WorkerPool, make_chunks
from unicl_fast.tools.picture_worker import Checked, PictureOptions, Task

Engine = Literal["local", "ray"]
"""Where pictures are checked."""


def require_engine(engine: Engine) -> None:
    """Refuses an engine that is none, or not installed.

    Raises:
        ValueError: the message says what to do.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"--engine takes {' or '.join(get_args(Engine))}, not {engine!r}")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError(
            "--engine ray takes Ray, which is not installed: pip install 'unicl_fast[ray]'"
        )


def check_on_ray(
    tasks: Iterable[Task], *, options: PictureOptions, context_length: int, workers: int
) -> Iterator[Checked | Problem]:
    """Checks tasks on a Ray cluster; results come in the order of the tasks.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, and starts one here for
    the time of the build where there is none. A caller that has joined one already stays in it.

    Args:
        tasks: what to check.
        options: as for local workers.
        context_length: of the tokens.
        workers: chunks that are checked at the same time; 0 takes one for each core of the cluster.

    Raises:
        RuntimeError: the cluster cannot run the tasks.
    """
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        _join(ray, workers)
    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    # whatever kills Ray's process is not the pictures' doing, which have processes of their own
    remote = ray.remote(num_cpus=1, max_retries=-1)(_check_chunk)
    under_way: deque[Any] = deque()
    chunks = make_chunks(tasks, options)
    try:
        while True:
            for chunk in chunks:
                under_way.append(remote.remote(chunk, options, context_length, os.getcwd()))
                if len(under_way) >= workers * CHUNKS_AHEAD:
                    break
            if not under_way:
                return
            yield from _result(ray, under_way.popleft())
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)
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


def _result(ray: Any, reference: Any) -> list[Checked | Problem]:
    try:
        found: list[Checked | Problem] = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray could not check pictures: {error}") from error
    return found


# From here on: what runs in a process of Ray.


def _check_chunk(
    tasks: list[Task], options: PictureOptions, context_length: int, folder: str
) -> list[Checked | Problem]:
    if os.getcwd() != folder:
        os.chdir(folder)  # sources may have relative paths
    return _pool(options, context_length).check(tasks)


@functools.cache
def _pool(options: PictureOptions, context_length: int) -> WorkerPool:
    """The worker process of this process of Ray; it ends with it."""
    return WorkerPool(options, context_length=context_length)
