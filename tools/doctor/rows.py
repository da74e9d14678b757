"""The rows of the screen: checks, each run in a child process, which it can crash or block.

A library for another processor crashes the process that imports it, and a missing driver blocks it
for ever. Such a check is a fault, and the others still run.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unicl_fast.system.child import Death, run_limited
from unicl_fast.system.wording import shorten

_SECONDS = 600.0  # limit of a check: on a busy machine importing torch needs minutes


class Found(NamedTuple):
    """The result of a check."""

    state: Literal["ok", "warning", "fault"]
    """warning: something is slow, or an option is not available; fault: runs will fail."""
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """An importable function that checks one thing."""

    name: str
    look: Callable[[], Found]
    needs: tuple[str, ...] = ()
    """Earlier checks; if one of them fails, this one is skipped."""


def run_checks(
    checks: Sequence[Check], *, seconds: float = _SECONDS
) -> Iterator[tuple[str, Found]]:
    """Runs checks in order, each for at most `seconds`; yields names and results as they come."""
    failed: set[str] = set()
    begun: list[str] = []

    def due() -> Iterator[Check]:
        for check in checks:
            if not failed.intersection(check.needs):
                begun.append(check.name)
                yield check

    for found in run_limited(_look, due(), seconds=seconds):
        if isinstance(found, Death):
            fix = "reinstall the library that it imports"
            if found.kind == "time":
                fix = "see which disk or driver does not answer: dmesg, nvidia-smi"
            found = Found("fault", f"the check {found.how}", fix)
        if found.state == "fault":
            failed.add(begun[-1])
        yield begun[-1], found


def _look(check: Check) -> Found:
    logging.disable()
    warnings.simplefilter("ignore")
    try:
        return check.look()
    except Exception as error:
        text = f"the check failed: {shorten(error, limit=300)}"
        return Found("fault", text, "correct the error, and start again")
