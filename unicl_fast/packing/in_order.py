"""Results of futures in the order of their tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(submit: Callable[[T], Future[R]], tasks: Iterable[T], *, ahead: int) -> Iterator[R]:
    """Yields results in the order of the tasks, with at most `ahead` tasks under way."""
    under_way: deque[Future[R]] = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
