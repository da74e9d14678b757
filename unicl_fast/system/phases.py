"""The present phase of this process, for its watchdog, and requests to stop an evaluation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

OR_WAITING = ", or waiting for other ranks"
"""Suffix of a phase's name if its work contains collectives that are not marked one by one."""
START_PATIENCE = 3.0  # the patience of phases before the first step is done


class Phase(NamedTuple):
    """Work that ends, or shows progress, within the time limit."""

    name: str
    step: int | None = None
    """The optimizer step."""
    patience: float = 1.0
    """Factor of the time limit."""
    waits_for_ranks: bool = False
    """Whether the phase cannot end before other ranks have reached it."""


# A global, since a process is one rank. Storing it is atomic and needs no lock.
_now = Phase("starting", patience=START_PATIENCE)


def current_phase() -> Phase:
    """Returns the present phase; each mark makes a new object, also if the phase is the same."""
    return _now


def mark(
    name: str, step: int | None = None, *, patience: float = 1.0, waits_for_ranks: bool = False
) -> None:
    """Ends the present phase and begins another."""
    global _now
    _now = Phase(name, step, patience, waits_for_ranks)


def mark_progress() -> None:
    """Restarts the present phase's time, since it makes progress."""
    global _now
    _now = Phase(*_now)


_watch_wait: Callable[[bool], None] | None = None


@contextlib.contextmanager
def watching_waits(watch: Callable[[bool], None]) -> Iterator[None]:
    """Calls `watch` in a thread that waits for other ranks: True as it begins, then False."""
    global _watch_wait
    before, _watch_wait = _watch_wait, watch
    try:
        yield
    finally:
        _watch_wait = before


class WaitingForRanks:
    """Marks a collective, in which a rank waits if another hangs; the phase resumes after it."""

    __slots__ = ("_before",)  # a class: a generator as context manager costs five times as much

    def __enter__(self) -> None:
        global _now
        if _watch_wait is not None:
            _watch_wait(True)
        self._before = _now
        name, step, patience, _ = _now
        name = name.removesuffix(OR_WAITING)
        _now = Phase(f"{name}: waiting for other ranks", step, patience, True)

    def __exit__(self, *_: object) -> None:
        global _now
        if _watch_wait is not None:
            _watch_wait(False)
        _now = Phase(*self._before)


class EvaluationStopped(Exception):  # noqa: N818 - it was requested
    """An evaluation was stopped early and has no result."""


_stop_checks: list[Callable[[], bool]] = []


def heartbeat_and_check_stop() -> bool:
    """Marks progress between two batches of an evaluation; returns whether to continue.

    Answers can differ between ranks: exchange them, and raise `EvaluationStopped` on all ranks.
    """
    mark_progress()
    return not any(is_stopped() for is_stopped in _stop_checks)


@contextlib.contextmanager
def stopping_when(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Evaluations in this context stop early once `is_stopped` returns True."""
    _stop_checks.append(is_stopped)
    try:
        yield
    finally:
        _stop_checks.remove(is_stopped)
