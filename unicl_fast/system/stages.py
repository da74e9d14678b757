"""What this rank is doing now: one tuple, in one place, for whoever watches it (see `watchdog`).

A mark costs less than a microsecond and takes no lock: storing a name is atomic, and a watcher
tells one mark from the next by the object. A process is one rank, so one place is enough.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

OR_WAITING = ", or waiting for other ranks"
"""Behind the name of work with collectives in its midst, which cannot be told from them here."""


class Stage(NamedTuple):
    """One stretch of work that ends, or gives a sign of progress, within the time limit."""

    name: str
    step: int | None = None
    """The optimizer step it is for."""
    patience: float = 1.0
    """How many times the time limit it may last."""
    waits_for_ranks: bool = False
    """Whether it cannot end before other ranks have come as far."""


_now = Stage("starting")


def now() -> Stage:
    """The present stage; another object after every mark, even of the same stage."""
    return _now


def mark(
    name: str,
    step: int | None = None,
    *,
    patience: float = 1.0,
    waits_for_ranks: bool = False,
) -> None:
    """Says what begins now; what was going on before has ended."""
    global _now
    _now = Stage(name, step, patience, waits_for_ranks)


def mark_progress() -> None:
    """Says that the present stage goes on well: its time starts anew."""
    global _now
    _now = Stage(*_now)


class WaitingForRanks:
    """Around a collective: what a rank waits in when ANOTHER one hangs. The stage goes on after it.

    A class, since a generator's context manager costs five times as much.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        global _now
        self._before = _now
        name, step, patience, _ = _now
        name = name.removesuffix(OR_WAITING)
        _now = Stage(f"{name}: waiting for other ranks", step, patience, True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _now
        _now = Stage(*self._before)
