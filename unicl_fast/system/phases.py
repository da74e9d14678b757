"""The present phase of this process, by which its watchdog finds hangs, and early stops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

OR_WAITING = ", or waiting for other ranks"
"""Suffix of a phase's name whose work contains collectives that are not marked one by one."""
START_PATIENCE = 3.0
"""How many times the time limit a phase can last before the first step is done."""


class Phase(NamedTuple):
    """Work that ends, or shows progress, within the time limit."""

    name: str
    step: int | None = None
    """The optimizer step that the work is for."""
    patience: float = 1.0
    """How many times the time limit the phase can last."""
    waits_for_ranks: bool = False
    """Whether the phase cannot end before other ranks have reached it."""


# One name in one place, since a process is one rank. Storing it is atomic and needs no lock.
_now = Phase("starting", patience=START_PATIENCE)


def current_phase() -> Phase:
    """Returns the present phase: another object after every mark, even of the same phase."""
    return _now


def describe_phase(quiet_seconds: float) -> str:
    """Describes for a `line` the present phase of a program that marks its phases."""
    name, step, *_ = _now
    done = "" if step is None else f" {step:,} steps done,"
    return name and f"{name},{done} {quiet_seconds:.0f} s"


def mark(
    name: str, step: int | None = None, *, patience: float = 1.0, waits_for_ranks: bool = False
) -> None:
    """Ends the present phase and begins another."""
    global _now
    _now = Phase(name, step, patience, waits_for_ranks)


def mark_progress() -> None:
    """Restarts the time of the present phase, since it makes progress."""
    global _now
    _now = Phase(*_now)


_watch_wait: Callable[[bool], None] | None = None


@contextlib.contextmanager
def watching_waits(watch: Callable[[bool], None]) -> Iterator[None]:
    """Calls `watch`, in the waiting thread, with True as a rank begins to wait and then False."""
    global _watch_wait
    before, _watch_wait = _watch_wait, watch
    try:
        yield
    finally:
        _watch_wait = before


class WaitingForRanks:
    """Marks a collective, in which a rank waits if ANOTHER hangs; the phase resumes after it."""

    __slots__ = ("_before",)  # a class: a generator's context manager costs five times as much

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


class EvaluationStopped(Exception):  # noqa: N818 - it was asked for
    """An evaluation was stopped early and has no result."""


_stop_checks: list[Callable[[], bool]] = []


def heartbeat_and_check_stop() -> bool:
    """Shows progress between two batches of an evaluation; returns whether to continue.

    Ranks can get different answers: sum the stops over all ranks, with the results, and raise
    `EvaluationStopped` on all of them.
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
