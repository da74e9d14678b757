"""Waiting for what another thread or process does, however busy the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, timeout: float = 120) -> T:
    """Returns the condition's first true value; fails after `timeout` seconds without one."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"{timeout} s have passed, and it has not happened"
        time.sleep(0.02)
    return found
