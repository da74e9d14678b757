"""The present stage of this process, for its watchdog; early stops; a stderr for progress bars."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

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


# One name in one place, since a process is one rank. Storing it is atomic and takes no lock.
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
    """Calls `watch`, in the waiting thread, with True as a rank begins to wait and then False."""
    global _watch_wait
    before, _watch_wait = _watch_wait, watch
    try:
        yield
    finally:
        _watch_wait = before


class WaitingForRanks:
    """Marks a collective, in which a rank waits if ANOTHER hangs; the stage resumes after it."""

    __slots__ = ("_before",)  # a class: a generator's context manager costs five times as much

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
    """Shows progress between two batches of an evaluation; returns whether to continue.

    Ranks may get different answers: sum the stops over all ranks, with the results, and raise
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


_SOON = 2.0
"""Seconds after which work that nobody sees is shown."""


class _SlowBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar of which a log gets a line now and then, a terminal a live image."""

    def display(self, *arguments: Any, **options: Any) -> Any:
        if not sys.stderr.isatty():
            self.mininterval = 30
        return super().display(*arguments, **options)


def bar_if_slow(text: str, *, total: int, shown: bool) -> tqdm[Any]:
    """A bar over `total` items for work of more than two seconds."""
    return _SlowBar(
        total=total,
        desc=text,
        disable=not shown,
        delay=_SOON,
        mininterval=min(0.2, _SOON),
        dynamic_ncols=True,
        file=ForgivingStderr(),
    )


@contextlib.contextmanager
def said_if_slow(text: str, *, shown: bool = True) -> Iterator[None]:
    """Says on stderr what takes more than two seconds, and has no number to count."""
    say = threading.Timer(_SOON, lambda: print(f"{text} ...", file=ForgivingStderr(), flush=True))
    say.daemon = True
    if shown:
        say.start()
    try:
        yield
    finally:
        say.cancel()


class ForgivingStderr:
    """stderr for a progress bar, which must not end a run when its log is on a full disk."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:  # so tqdm knows bars that share a terminal
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
