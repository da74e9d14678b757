"""The present stage of this process, for its watchdog; early stops; a stderr for progress bars.

The present stage is one tuple in one place, since a process is one rank. A mark costs less than a
microsecond and takes no lock: storing a name is atomic, and a watchdog tells marks by the object.

Evaluations call `heartbeat_and_check_stop` between batches; the trainer decides what is asked
there. So an evaluation knows neither the trainer nor signals; alone, it always runs to its end.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

OR_WAITING = ", or waiting for other ranks"
"""Suffix of a stage's name whose work contains collectives that are not marked one by one."""


START_PATIENCE = 3.0
"""How many times the time limit a stage may last before the first step is done."""


class Stage(NamedTuple):
    """Work that ends, or shows progress, within the time limit."""

    name: str
    step: int | None = None
    """The optimizer step that the work is for."""
    patience: float = 1.0
    """How many times the time limit the stage may last."""
    waits_for_ranks: bool = False
    """Whether the stage cannot end before other ranks have reached it."""


_now = Stage("starting", patience=START_PATIENCE)


def current_stage() -> Stage:
    """Returns the present stage: another object after every mark, even of the same stage."""
    return _now


def mark(
    name: str, step: int | None = None, *, patience: float = 1.0, waits_for_ranks: bool = False
) -> None:
    """Ends the present stage and begins another."""
    global _now
    _now = Stage(name, step, patience, waits_for_ranks)


def mark_progress() -> None:
    """Restarts the time of the present stage, since it makes progress."""
    global _now
    _now = Stage(*_now)


_watch_wait: Callable[[bool], None] | None = None


@contextlib.contextmanager
def watching_waits(watch: Callable[[bool], None]) -> Iterator[None]:
    """Within this context, calls `watch` where a rank begins to wait for others, and ends to.

    With True and False, in the thread that waits.
    """
    global _watch_wait
    before, _watch_wait = _watch_wait, watch
    try:
        yield
    finally:
        _watch_wait = before


class WaitingForRanks:
    """Marks a collective, in which a rank waits when ANOTHER one hangs; the stage resumes after it.

    A class, since a generator's context manager costs five times as much.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        global _now
        if _watch_wait is not None:
            _watch_wait(True)
        self._before = _now
        name, step, patience, _ = _now
        name = name.removesuffix(OR_WAITING)
        _now = Stage(f"{name}: waiting for other ranks", step, patience, True)

    def __exit__(self, *_: object) -> None:
        global _now
        if _watch_wait is not None:
            _watch_wait(False)
        _now = Stage(*self._before)


class EvaluationStopped(Exception):  # noqa: N818 - it was asked for
    """An evaluation was stopped early and has no result."""


_stop_checks: list[Callable[[], bool]] = []


def heartbeat_and_check_stop() -> bool:
    """Shows progress between two batches; returns whether to continue.

    Ranks may get different answers: sum over all ranks, with the results, how many were told to
    stop, and raise `EvaluationStopped` on all of them.
    """
    mark_progress()
    return not any(is_stopped() for is_stopped in _stop_checks)


@contextlib.contextmanager
def stopping_when(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Evaluations inside the block stop early once `is_stopped` returns true."""
    _stop_checks.append(is_stopped)
    try:
        yield
    finally:
        _stop_checks.remove(is_stopped)


class ForgivingStderr:
    """stderr for a progress bar, which must not end a run when its log is on a full disk.

    What cannot be written is lost. (tqdm forgives a terminal that is gone, and nothing else.) All
    are equal, by which tqdm knows the bars that a line must not be written into.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForgivingStderr)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)
