"""A run of a contestant that is killed again and again, and resumed from its last checkpoint.

Ranks are forked from a process that has imported the contestant's packages and holds no thread, so
that a start costs little. They train in lockstep, as an all-reduce makes them: a rank sends its ids
(and its state, at a checkpoint) and waits until all have sent theirs. A kill hits the process
groups of all ranks, with their workers, at a random moment of the step after the last whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pkgutil
import random
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..input.contenders import ContenderError, MissingPackageError
from ..input.worker import die_with_parent
from .contenders import Resumer, Task

_PATIENCE = 120.0
"""Seconds to wait for a rank's step; ours may compile its kernels before the first."""
_MOMENTS = 0.03
"""Longest time between a step and the kill, in seconds."""
_STEPS_PER_KILL = 8
_FORK = multiprocessing.get_context("fork")

Step = list[tuple[int, Sequence[int]]]
"""Epoch and ids of each rank's local batch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Ranks, and worker processes of each."""

    ranks: int
    workers: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a run is killed and resumed."""

    kills: int
    layouts: tuple[Layout, ...]
    """Those that take turns; the first begins."""
    num_steps: int
    every: int
    """Steps from one checkpoint to the next."""
    seed: int = 0


@dataclasses.dataclass(slots=True)
class Chain:
    """A run and what was trained on."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    """Those up to each checkpoint that was resumed from, and those after the last."""
    kills: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Steps that were done at each kill, and those of the checkpoint that is resumed from."""
    failure: str = ""
    """The message with which it could not be resumed."""


class ResumeError(RuntimeError):
    """A rank could not do its steps; the message is its error's last line."""


def steps_of(kills: int, epoch_steps: int) -> int:
    """Whole epochs with room for this number of kills."""
    return max(1, -(-kills * _STEPS_PER_KILL // epoch_steps)) * epoch_steps


def run_chain(resumer: Resumer, task: Task, course: Course) -> Chain:
    """Runs one contestant's chain; called in a process of its own, which it forks.

    Raises:
        MissingPackageError: a package is not installed.
        ContenderError: it cannot even start.
    """
    _import(resumer)
    chain, draw = Chain(), random.Random(course.seed)
    states: list[Any] | None = None
    saved_by = course.layouts[-1]  # nobody; so the first begins
    for number in range(course.kills + 1):
        done = len(chain.steps)
        others = [layout for layout in course.layouts if layout != saved_by]
        layout = (others or course.layouts)[0]
        until = course.num_steps
        if number < course.kills:
            room = course.num_steps - 2 * course.every - done
            longest = min(room, 2 * room // (course.kills - number))
            until = done + draw.randint(1, max(1, longest))
        ranks = _Ranks(resumer, task, layout, states, done=done, every=course.every)
        try:
            with ranks:
                ranks.train(until)
                time.sleep(draw.uniform(0, _MOMENTS) if number < course.kills else 0)
        except ResumeError as error:
            if states is None:
                raise ContenderError(str(error)) from None
            chain.failure = str(error)
            return chain
        if number == course.kills:
            chain.steps += ranks.steps
            break
        if ranks.states:
            states, saved_by = ranks.states, layout
            chain.steps += ranks.steps[: ranks.saved - done]
        chain.kills.append((until, len(chain.steps)))
    return chain


def begin(folder: Path) -> None:
    """Prepares the process that forks ranks: it dies with its parent, and writes into `folder`."""
    die_with_parent()
    homes = dict.fromkeys(("TMPDIR", "HF_HOME"), str(folder))
    os.environ |= {**homes, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("ab") as log:  # of ranks and their workers too
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)


def prepare(resumer: Resumer, task: Task) -> None:
    """Writes a contestant's data; raises ContenderError if it cannot."""
    _import(resumer)
    try:
        if resumer.prepare:
            pkgutil.resolve_name(resumer.prepare)(task)
    except Exception as error:  # peers raise errors of many kinds
        raise ContenderError(_message(error)) from None


def _import(resumer: Resumer) -> None:
    try:
        for name in resumer.imports:
            importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(str(error)) from None


class _Ranks:
    """The ranks of one start, a context manager; leaving it kills them all."""

    def __init__(
        self,
        resumer: Resumer,
        task: Task,
        layout: Layout,
        states: list[Any] | None,
        *,
        done: int,
        every: int,
    ) -> None:
        self.steps: list[Step] = []
        self.states: list[Any] = []
        """The ranks' states of the last checkpoint, and below the steps that were done by then."""
        self.saved = done
        self._done, self._every = done, every
        self._task, self._layout, self._resumer = task, layout, resumer
        self._given = states
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> _Ranks:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        for rank in range(self._layout.ranks):
            ours, theirs = _FORK.Pipe()
            task = dataclasses.replace(
                self._task,
                rank=rank,
                world_size=self._layout.ranks,
                workers=self._layout.workers,
            )
            # states of ranks of their own, of which more ranks take some twice
            state = self._given and self._given[rank % len(self._given)]
            work = (self._resumer, task, state, theirs, port, self._done, self._every)
            process = _FORK.Process(target=_rank, args=work)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def train(self, until: int) -> None:
        """Does steps in lockstep until this number is done."""
        for step in range(self._done + 1, until + 1):
            answers = [_answer(connection) for connection in self._connections]
            self.steps.append([(epoch, ids) for epoch, ids, _ in answers])
            if step % self._every == 0:
                self.states, self.saved = [state for _, _, state in answers], step
            for connection in self._connections:
                connection.send(None)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            for kill in (os.killpg, os.kill):  # a rank that has no group of its own yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()


def _answer(connection: Connection) -> Any:
    if not connection.poll(_PATIENCE):
        raise ResumeError(f"no step in {_PATIENCE:.0f} s")
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise ResumeError("a rank's process ended") from None
    if isinstance(answer, str):
        raise ResumeError(answer)
    return answer


def _rank(
    resumer: Resumer,
    task: Task,
    state: Any,
    connection: Connection,
    port: int,
    done: int,
    every: int,
) -> None:
    """Trains without end; the process that forked it kills it."""
    os.setsid()
    die_with_parent()
    rank, world_size = str(task.rank), str(task.world_size)
    os.environ |= {
        **{"RANK": rank, "LOCAL_RANK": rank, "GLOBAL_RANK": rank, "NODE_RANK": "0"},
        **{"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    try:
        batches = pkgutil.resolve_name(resumer.code)(task, state)
        for step, (epoch, ids, save) in enumerate(batches, done + 1):
            connection.send((epoch, ids, save() if step % every == 0 else None))
            connection.recv()
        connection.send("its batches ended")
    except Exception as error:  # peers raise errors of many kinds
        traceback.print_exc()
        connection.send(_message(error))
    signal.pause()


def _message(error: Exception) -> str:
    """Its type and text in one line; the statement that raised it if it has no text."""
    text = str(error).strip()
    if "Original Traceback" in text:  # of a worker, whose error is its last line
        text = text.splitlines()[-1]
    else:
        (*_, frame) = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {text or frame.line}"
    return " ".join(text.split())[:400]
