"""How an evaluation shows that it goes on, and is told to leave off.

Evaluations call `heartbeat_and_check_stop` between batches; the trainer decides what is asked
there. So an evaluation needs to know neither the trainer nor signals, and alone it always goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from unicl_fast.system.stages import mark_progress


class EvaluationStopped(Exception):  # noqa: N818 - it was asked for
    """An evaluation was left off before its end; it has no result."""


_is_asked: list[Callable[[], bool]] = []


def heartbeat_and_check_stop() -> bool:
    """Between two batches: shows progress, and asks whether to go on.

    Ranks may be told differently: count who was told to stop with the results, over all ranks, and
    raise `EvaluationStopped` on all of them.
    """
    mark_progress()
    return not any(asked() for asked in _is_asked)


@contextlib.contextmanager
def stopping_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Evaluations inside leave off when `asked` is true."""
    _is_asked.append(asked)
    try:
        yield
    finally:
        _is_asked.remove(asked)
